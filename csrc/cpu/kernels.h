// The launchers of one instruction set, and the choice of the element type.
#pragma once

#include "../lightning.h"
#include "simd.h"

namespace lightning {
namespace LIGHTNING_ISA {

void attention_forward(const AttentionForward&);
void attention_backward(const AttentionBackward&);
void attention_state(const AttentionState&);
void attention_history(const AttentionHistory&);
void attention_decode(const AttentionDecode&);
void gated_rms_norm_forward(const GatedRMSNorm&);
void gated_rms_norm_backward(const GatedRMSNorm&);
void moe_route_forward(const MoeRoute&);
void moe_route_backward(const MoeRoute&);
void moe_sort(const MoeSort&);
void gather_rows(const GatherRows&);
void swiglu_forward(const SwiGLU&);
void swiglu_backward(const SwiGLUBackward&);
void gather_sum(const GatherSum&);
void expert_rows(const ExpertRows&);
void widen_int8(const WidenInt8&);
void transpose(const Transpose&);
void outer_product(const OuterProduct&);

template <class T>
struct TypeTag {
  using type = T;
};

// f(TypeTag<T>) for the T that `dtype` names.
template <class F>
void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float64: return f(TypeTag<double>{});
    case DType::float32: return f(TypeTag<float>{});
    case DType::bfloat16: return f(TypeTag<bfloat16>{});
    case DType::float16: return f(TypeTag<float16>{});
  }
}

}  // namespace LIGHTNING_ISA
}  // namespace lightning
