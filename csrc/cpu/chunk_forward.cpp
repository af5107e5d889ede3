#include "chunk_forward.h"
#include "kernels.h"

namespace lightning {
namespace LIGHTNING_ISA {

void attention_forward(const AttentionForward& p) {
  dispatch(p.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const ForwardSweep<T> sweep(
        p.shape, {p.q, p.k, p.v, p.o, p.shape.key_dim, p.shape.value_dim, p.initial, p.final, false, false});
    run_sweeps<Accumulate<T>>({&sweep});
  });
}

}  // namespace LIGHTNING_ISA
}  // namespace lightning
