// The kernels of one instruction set. Compiled, like every kernel, once for each of them.
#include "kernels.h"

#define LIGHTNING_STRING(x) #x
#define LIGHTNING_NAME(x) LIGHTNING_STRING(x)

namespace lightning {
namespace LIGHTNING_ISA {

extern const Kernels kernels;
const Kernels kernels = {LIGHTNING_NAME(LIGHTNING_ISA),
                         attention_forward,
                         attention_backward,
                         attention_state,
                         attention_history,
                         attention_decode,
                         gated_rms_norm_forward,
                         gated_rms_norm_backward,
                         moe_route_forward,
                         moe_route_backward,
                         moe_sort,
                         gather_rows,
                         swiglu_forward,
                         swiglu_backward,
                         gather_sum,
                         expert_rows,
                         widen_int8,
                         transpose,
                         outer_product};

}  // namespace LIGHTNING_ISA
}  // namespace lightning
