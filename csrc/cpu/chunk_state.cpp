// The state alone: a sweep without outputs, over the tokens that have a weight in it.
#include "chunk_forward.h"
#include "kernels.h"

namespace lightning {
namespace LIGHTNING_ISA {

void attention_state(const AttentionState& p) {
  dispatch(p.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    AttentionShape shape = p.shape;
    Operand k = p.k, v = p.v;
    State initial = p.initial;
    // Tokens without a weight for any head are left out before threads divide the rest.
    int64_t weighing = 0;
    for (int64_t head = 0; head < shape.heads; ++head) {
      const int64_t n = weighing_tokens<Accumulate<T>>(shape.decay[head], shape.tokens);
      weighing = n > weighing ? n : weighing;
    }
    if (const int64_t skipped = (shape.tokens - weighing) / kBlock * kBlock; shape.heads > 0 && skipped > 0) {
      shape.tokens -= skipped;
      initial = {};
      if (!p.reverse) {
        k.data = static_cast<T*>(k.data) + skipped * k.token;
        v.data = static_cast<T*>(v.data) + skipped * v.token;
      }
    }
    const ForwardSweep<T> sweep(shape, {Operand{}, k, v, Operand{}, shape.key_dim, shape.value_dim, initial, p.final,
                                        /*transposed_state=*/false, p.reverse});
    run_sweeps<Accumulate<T>>({&sweep});
  });
}

}  // namespace LIGHTNING_ISA
}  // namespace lightning
