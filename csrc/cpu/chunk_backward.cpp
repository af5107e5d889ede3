// The gradients in two sweeps, from q, k, v and the initial state alone; no state was saved.
//
//   forward in time:   grad_q, see chunk_forward.h
//   backward in time, R being the gradient of the state after the block:
//     grad_k = ((grad_o V^T) o D)^T Q + (V R^T) o lambda^(n-1-j)
//     grad_v = ((Q K^T) o D)^T grad_o + (K R) o lambda^(n-1-j)
//     R <- lambda^n R + (Q o lambda^(i+1))^T grad_o
//   The gradient of the returned state seeds R; the last R is the gradient of the initial state.
//
// In reversed time each of grad_k and grad_v has the form of a forward block with operands (v, grad_o, q) and
// (k, q, grad_o), so they go through the same three functions of block.h.
#include "chunk_forward.h"
#include "kernels.h"

namespace lightning {
namespace LIGHTNING_ISA {
namespace {

template <class T>
class ReverseSweep final : public Sweep<Accumulate<T>> {
  using C = Compute<T>;
  using Acc = Accumulate<T>;
  using Unit = typename C::Unit;
  using Units = Matrix<Unit>;

 public:
  explicit ReverseSweep(const AttentionBackward& p)
      : Sweep<Acc>(p.shape, p.shape.key_dim, p.shape.value_dim, true), p_(p) {}

  void run(const Segment& segment, int64_t head, const Matrix<Acc>& state, Arena& arena, bool with_outputs,
           bool carry) const override {
    const int64_t key_dim = this->shape.key_dim, value_dim = this->shape.value_dim;
    const Scratch s(arena, key_dim, value_dim);
    const double scale = this->shape.scale;
    // The scale belongs to what passes through o: not to R, which may hold the gradient of the returned state.
    Decay<Acc> decay(this->shape.decay[head], segment.length, /*lag=*/1, scale, 1.0, scale);
    const auto q = rows_of<T>(p_.q, segment, head, key_dim, true);
    const auto k = rows_of<T>(p_.k, segment, head, key_dim, true);
    const auto v = rows_of<T>(p_.v, segment, head, value_dim, true);
    const auto grad_o = rows_of<T>(p_.grad_o, segment, head, value_dim, true);
    const auto grad_k = rows_of<T>(p_.grad_k, segment, head, key_dim, true);
    const auto grad_v = rows_of<T>(p_.grad_v, segment, head, value_dim, true);

    for (int64_t t = 0; t < segment.length; t += kBlock) {
      const int64_t n = minimum(kBlock, segment.length - t);
      decay.set_length(n);
      pack_rows<C>(s.q, q.from(t), n);
      pack_rows<C>(s.grad_o, grad_o.from(t), n);
      const Units grad_o_pairs = as_pairs<C>(s.grad_o_pairs, s.grad_o, n, value_dim);
      if (with_outputs) {
        prefetch_outputs(grad_v.from(t), n);
        prefetch_outputs(grad_k.from(t), n);
        pack_rows<C>(s.rows, k.from(t), n);
        transpose(s.transposed, s.q, n, ceil_div(key_dim, C::kPair));
        scores<C>(s.p, s.rows, s.transposed, decay, n, key_dim);
        outputs<C>(grad_v.from(t), s.rows, state_as_pairs<C>(s.state, state, key_dim, value_dim), s.p, grad_o_pairs,
                   decay, n, key_dim);

        pack_rows<C>(s.rows, v.from(t), n);
        transpose(s.transposed, s.grad_o, n, ceil_div(value_dim, C::kPair));
        scores<C>(s.p, s.rows, s.transposed, decay, n, value_dim);
        const Units q_pairs = as_pairs<C>(s.q_pairs, s.q, n, key_dim);
        const Units state_rows = state_as_rows<C>(s.state, state, key_dim, value_dim);
        transpose(s.state_transposed, state_rows, key_dim, ceil_div(value_dim, C::kPair));
        outputs<C>(grad_k.from(t), s.rows, s.state_transposed, s.p, q_pairs, decay, n, value_dim);
      }
      if (carry || t + n < segment.length) {
        pack_pairs<C>(s.q_pairs, s.q, n, key_dim, decay.added);
        update<C>(state, s.q_pairs, grad_o_pairs, decay, n, key_dim, value_dim);
      }
    }
  }

  void load_state(int64_t sequence, int64_t head, const Matrix<Acc>& state) const override {
    if (!p_.grad_final.data) return;
    const int64_t value_dim = this->shape.value_dim;
    const Acc* from = state_of<Acc>(p_.grad_final, sequence, head);
    for (int64_t i = 0; i < this->shape.key_dim; ++i)
      std::memcpy(state.row(i), from + i * value_dim, size_t(value_dim) * sizeof(Acc));
  }
  bool wants_final_state() const override { return p_.grad_initial.data != nullptr; }
  void store_state(int64_t sequence, int64_t head, const Matrix<Acc>& state) const override {
    const int64_t value_dim = this->shape.value_dim;
    Acc* to = state_of<Acc>(p_.grad_initial, sequence, head);
    for (int64_t i = 0; i < this->shape.key_dim; ++i)
      std::memcpy(to + i * value_dim, state.row(i), size_t(value_dim) * sizeof(Acc));
  }
  void reserve(Arena& arena) const override { Scratch(arena, this->shape.key_dim, this->shape.value_dim); }

 private:
  struct Scratch {
    Units q, grad_o, rows, transposed, q_pairs, grad_o_pairs, state, state_transposed, p;
    Scratch(Arena& arena, int64_t key_dim, int64_t value_dim) {
      const int64_t dim = key_dim > value_dim ? key_dim : value_dim;
      q = rows_matrix<C>(arena, key_dim);
      grad_o = rows_matrix<C>(arena, value_dim);
      rows = rows_matrix<C>(arena, dim);  // k, then v
      transposed = transposed_matrix<C>(arena, dim);
      q_pairs = pairs_matrix<C>(arena, kBlock, key_dim);
      p = rows_matrix<C>(arena, kBlock);
      if (C::kPair > 1) {
        grad_o_pairs = pairs_matrix<C>(arena, kBlock, value_dim);
        state = pairs_matrix<C>(arena, padded(key_dim) * C::kPair, value_dim);  // also as rows
      }
      state_transposed = pairs_matrix<C>(arena, value_dim, key_dim);
    }
  };

  AttentionBackward p_;
};

}  // namespace

void attention_backward(const AttentionBackward& p) {
  dispatch(p.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const ForwardSweep<T> grad_q(
        p.shape, {p.grad_o, p.v, p.k, p.grad_q, p.shape.value_dim, p.shape.key_dim, p.initial, State{}, true, false});
    const ReverseSweep<T> grad_kv(p);
    run_sweeps<Accumulate<T>>({&grad_kv, &grad_q});
  });
}

}  // namespace LIGHTNING_ISA
}  // namespace lightning
