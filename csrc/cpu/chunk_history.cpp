// What a state adds to the outputs of a sweep that began without it, or its gradient to those of a sweep that ended without:
//
//   out_t += scale * lambda^(t+1) S^T x_t          or, from the last token backward, scale * lambda^(T-1-t) S^T x_t
//
// A head stops where the power of lambda is no normal number any more: subnormal factors would cost a hundred cycles each, and
// vanish beside the current token, which weighs 1.
#include "kernels.h"
#include "sweep.h"

namespace lightning {
namespace LIGHTNING_ISA {
namespace {

constexpr int64_t kTask = 16 * kBlock;  // tokens, of one head

template <class T>
class History {
  using C = Compute<T>;
  using Acc = Accumulate<T>;
  using Units = Matrix<typename C::Unit>;

 public:
  explicit History(const AttentionHistory& p) : p_(p) {}

  // Of the tokens nearest to the state, how many a head reaches.
  int64_t reach(int64_t head) const {
    constexpr double kFarthest = sizeof(Acc) == 8 ? 708.39 : 87.33;  // -log of the smallest normal number
    const double rate = p_.shape.decay[head];
    if (rate * double(p_.shape.tokens) <= kFarthest) return p_.shape.tokens;
    return int64_t(kFarthest / rate) + (p_.reverse ? 1 : 0);  // the nearest stands at distance 1, or 0
  }

  // Tokens `first` to `first + kTask` from the state on, of those that the head reaches.
  void run(int64_t batch, int64_t head, int64_t first, Arena& arena) const {
    const AttentionShape& shape = p_.shape;
    const Scratch s(arena, shape.key_dim, shape.value_dim);
    const Matrix<Acc> state = load_state(s.state, batch, head);
    const Units S = state_as_pairs<C>(s.pairs, state, shape.key_dim, shape.value_dim);
    const int64_t count = minimum(kTask, reach(head) - first);
    const Segment segment{batch, batch, p_.reverse ? shape.tokens - first - count : first, count, false, false, -1};
    const auto x = rows_of<T>(p_.x, segment, head, shape.key_dim, p_.reverse);
    const auto out = rows_of<T>(p_.out, segment, head, shape.value_dim, p_.reverse);
    const double rate = shape.decay[head];
    Acc weight[kBlock] = {};
    for (int64_t t = 0; t < count; t += kBlock) {
      const int64_t n = minimum(kBlock, count - t);
      for (int64_t i = 0; i < n; ++i)
        weight[i] = Acc(shape.scale * std::exp(-rate * double(first + t + i + (p_.reverse ? 0 : 1))));
      pack_rows<C>(s.x, x.from(t), n);
      add(out.from(t), s.x, S, weight, n);
    }
  }

  void reserve(Arena& arena) const { Scratch(arena, p_.shape.key_dim, p_.shape.value_dim); }

 private:
  struct Scratch {
    Matrix<Acc> state;
    Units x, pairs;
    Scratch(Arena& arena, int64_t key_dim, int64_t value_dim) {
      state = arena.matrix<Acc>(padded(key_dim), padded(value_dim));
      x = rows_matrix<C>(arena, key_dim);
      if (C::kPair > 1) pairs = pairs_matrix<C>(arena, key_dim, value_dim);
    }
  };

  Matrix<Acc> load_state(const Matrix<Acc>& to, int64_t batch, int64_t head) const {
    const Acc* from = state_of<Acc>(p_.state, batch, head);
    for (int64_t i = 0; i < padded(p_.shape.key_dim); ++i) {
      std::memset(to.row(i), 0, size_t(padded(p_.shape.value_dim)) * sizeof(Acc));
      if (i < p_.shape.key_dim)
        std::memcpy(to.row(i), from + i * p_.shape.value_dim, size_t(p_.shape.value_dim) * sizeof(Acc));
    }
    return to;
  }

  void add(const Rows<T>& out, const Units& x, const Units& S, const Acc* weight, int64_t tokens) const {
    for_column_tiles<C>(out.dim, [&](int64_t j, auto vectors) {
      for (int64_t i = 0; i < tokens; i += kTileRows) {
        Tile<C, vectors> tile;
        tile.clear();
        tile.add_product(x.row(i), x.ld, S.data + j, S.ld, ceil_div(p_.shape.key_dim, C::kPair));
        tile.scale_rows(weight + i);
        tile.add_to_rows(out.token(i) + j, out.stride, tokens - i, out.dim - j);
      }
    });
  }

  AttentionHistory p_;
};

}  // namespace

void attention_history(const AttentionHistory& p) {
  dispatch(p.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const History<T> history(p);
    Arena counter(nullptr);
    history.reserve(counter);
    const int64_t tasks = ceil_div(p.shape.tokens, kTask), heads = p.shape.heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.shape.threads) if (p.shape.batch * heads * tasks > 1)
    for (int64_t task = 0; task < p.shape.batch * heads * tasks; ++task) {
      const int64_t head = task / tasks % heads, first = task % tasks * kTask;
      if (first >= history.reach(head)) continue;
      Arena arena(thread_scratch(counter.used()));
      history.run(task / tasks / heads, head, first, arena);
    }
  });
}

}  // namespace LIGHTNING_ISA
}  // namespace lightning
