// The forward sweep: O and the final state. See block.h for the formula.
//
// It also gives grad_q, which is the same sum with other operands:
//   grad_q_t = scale * sum over j <= t of lambda^(t-j) (grad_o_t . v_j) k_j
// so the operands (grad_o, v, k) and the transposed initial state yield it.
//
// Without an O it makes the final state alone, of k scaled, also backward in time (see `Decay`).
#pragma once

#include "sweep.h"

namespace lightning {
namespace LIGHTNING_ISA {

template <class T>
class ForwardSweep final : public Sweep<Accumulate<T>> {
  using C = Compute<T>;
  using Acc = Accumulate<T>;
  using Unit = typename C::Unit;
  using Units = Matrix<Unit>;

 public:
  struct Operands {
    Operand q, k, v, o;          // q and o may be null together
    int64_t key_dim, value_dim;  // of q and k; of v and o
    State initial, final;
    bool transposed_state;  // `initial` is [value_dim, key_dim]
    bool reverse;           // only without o
  };

  ForwardSweep(const AttentionShape& shape, const Operands& x)
      : Sweep<Acc>(shape, x.key_dim, x.value_dim, x.reverse), x_(x) {}

  void run(const Segment& segment, int64_t head, const Matrix<Acc>& state, Arena& arena, bool with_outputs,
           bool carry) const override {
    const Scratch s(arena, x_.key_dim, x_.value_dim);
    const double scale = this->shape.scale;
    const int64_t skipped = wants_outputs() ? 0 : weightless(segment, head);
    if (skipped > 0) std::memset(state.data, 0, size_t(this->state_size()) * sizeof(Acc));  // as weightless as they are
    if (skipped >= segment.length) return;
    Decay<Acc> decay(this->shape.decay[head], segment.length, x_.reverse ? 1 : 0, scale, scale,
                     wants_outputs() ? 1.0 : scale);
    const auto q = wants_outputs() ? rows_of<T>(x_.q, segment, head, x_.key_dim, false) : Rows<T>{};
    const auto k = rows_of<T>(x_.k, segment, head, x_.key_dim, x_.reverse);
    const auto v = rows_of<T>(x_.v, segment, head, x_.value_dim, x_.reverse);
    const auto o = wants_outputs() ? rows_of<T>(x_.o, segment, head, x_.value_dim, false) : Rows<T>{};

    for (int64_t t = skipped; t < segment.length; t += kBlock) {
      const int64_t n = minimum(kBlock, segment.length - t);
      decay.set_length(n);
      pack_rows<C>(s.k, k.from(t), n);
      pack_rows<C>(s.v, v.from(t), n);
      const Units v_pairs = as_pairs<C>(s.v_pairs, s.v, n, v.dim);
      if (with_outputs) {
        prefetch_outputs(o.from(t), n);
        pack_rows<C>(s.q, q.from(t), n);
        transpose(s.k_transposed, s.k, n, ceil_div(k.dim, C::kPair));
        scores<C>(s.p, s.q, s.k_transposed, decay, n, k.dim);
        outputs<C>(o.from(t), s.q, state_as_pairs<C>(s.state, state, k.dim, v.dim), s.p, v_pairs, decay, n, k.dim);
      }
      if (carry || t + n < segment.length) {
        pack_pairs<C>(s.k_weighted, s.k, n, k.dim, decay.added);
        update<C>(state, s.k_weighted, v_pairs, decay, n, k.dim, v.dim);
      }
    }
  }

  void load_state(int64_t sequence, int64_t head, const Matrix<Acc>& state) const override {
    if (!x_.initial.data) return;
    const Acc* from = state_of<Acc>(x_.initial, sequence, head);
    for (int64_t i = 0; i < x_.key_dim; ++i)
      for (int64_t j = 0; j < x_.value_dim; ++j)
        state.row(i)[j] = x_.transposed_state ? from[j * x_.key_dim + i] : from[i * x_.value_dim + j];
  }
  bool wants_outputs() const override { return x_.o.data != nullptr; }
  bool wants_final_state() const override { return x_.final.data != nullptr; }
  void store_state(int64_t sequence, int64_t head, const Matrix<Acc>& state) const override {
    Acc* to = state_of<Acc>(x_.final, sequence, head);
    for (int64_t i = 0; i < x_.key_dim; ++i)
      std::memcpy(to + i * x_.value_dim, state.row(i), size_t(x_.value_dim) * sizeof(Acc));
  }
  void reserve(Arena& arena) const override { Scratch(arena, x_.key_dim, x_.value_dim); }

 private:
  struct Scratch {
    Units q, k, v, k_transposed, k_weighted, v_pairs, state, p;
    Scratch(Arena& arena, int64_t key_dim, int64_t value_dim) {
      q = rows_matrix<C>(arena, key_dim);
      k = rows_matrix<C>(arena, key_dim);
      v = rows_matrix<C>(arena, value_dim);
      k_transposed = transposed_matrix<C>(arena, key_dim);
      k_weighted = pairs_matrix<C>(arena, kBlock, key_dim);
      p = rows_matrix<C>(arena, kBlock);
      if (C::kPair > 1) {
        v_pairs = pairs_matrix<C>(arena, kBlock, value_dim);
        state = pairs_matrix<C>(arena, key_dim, value_dim);
      }
    }
  };

  // How many of a segment's tokens, in whole blocks from where the sweep begins, have no weight in the final state, be they
  // NaN. (Where there are outputs every token counts.)
  int64_t weightless(const Segment& segment, int64_t head) const {
    const int64_t after = x_.reverse ? segment.begin : this->shape.tokens - segment.begin - segment.length;
    const int64_t far = after + segment.length - weighing_tokens<Acc>(this->shape.decay[head], this->shape.tokens);
    return far <= 0 ? 0 : far >= segment.length ? segment.length : far / kBlock * kBlock;
  }

  Operands x_;
};

}  // namespace LIGHTNING_ISA
}  // namespace lightning
