// The block form of the recurrence, for one head, kBlock tokens at a time (arXiv 2501.08313, section 2.2):
//
//   O = scale ((Q K^T) o D) V + scale (Q o lambda^(i+1)) S      D_ij = lambda^(i-j) for i >= j, else 0
//   S <- lambda^n S + (K o lambda^(n-1-j))^T V                  n tokens in the block, lambda = e^{-s}
//
// Every exponent of lambda is >= 0, so nothing overflows.
#pragma once

#include "pack.h"
#include "runtime.h"

namespace lightning {
namespace LIGHTNING_ISA {

template <class Acc>
constexpr Acc kSmallest = sizeof(Acc) == 8 ? Acc(2.2250738585072014e-308) : Acc(1.17549435e-38f);  // normal number

// Of the last `tokens` of a sweep, how many have a weight e^{-rate n} in the state that it leaves: elsewhere rounding to Acc
// gives zero, being less than half of the smallest number.
template <class Acc>
int64_t weighing_tokens(double rate, int64_t tokens) {
  constexpr double kFarthest = sizeof(Acc) == 8 ? 745.14 : 103.98;  // -log of that half
  return rate * double(tokens) <= kFarthest ? tokens : int64_t(kFarthest / rate) + 1;
}

// A head's powers of lambda, and the weights that its blocks need.
//
// `lag` = 0 sweeps forward in time, as above. The reverse sweep has `lag` = 1, with i and j counted from the block's last
// token: the gradient that enters stands AT that token, so token i takes lambda^i of it; the one that leaves stands at
// the token that the sweep meets next, so token j goes into it with lambda^(n-j).
template <class Acc>
struct Decay {
  Acc power[kBlock + 1] = {};              // lambda^n
  Acc causal[2 * kBlock + kPadding] = {};  // causal[kBlock - 1 - i + j] = factor * D_ij, for any i, j in the block
  Acc carried[kBlock] = {};                // of token i for the state that enters the block
  Acc added[kBlock] = {};                  // of token j into the state that leaves it, see set_length
  // What rounding took from lambda^n for the length n that is set. Over a million tokens of slow decay the same loss
  // block after block would add up to 1e-3.
  Acc correction = 0;

  // For blocks of up to `tokens`.
  Decay(double rate, int64_t tokens, int lag, double causal_factor, double carried_factor, double added_factor)
      : rate_(rate), lag_(lag), added_factor_(added_factor) {
    for (int64_t n = 0; n <= minimum(kBlock, tokens); ++n) {
      const double x = std::exp(-rate * double(n));
      power[n] = Acc(x);
      // Subnormal factors would cost a hundred cycles each, and vanish beside the current token, which weighs 1.
      if (n < kBlock && x >= double(kSmallest<Acc>)) causal[kBlock - 1 - n] = Acc(causal_factor * x);
      if (const int64_t i = n - 1 + lag; i >= 0 && i < kBlock) carried[i] = Acc(carried_factor * x);
    }
  }

  void set_length(int64_t tokens) {
    if (tokens == length_) return;
    length_ = tokens;
    correction = Acc(std::exp(-rate_ * double(tokens)) - double(power[tokens]));
    for (int64_t j = 0; j < tokens; ++j) added[j] = Acc(added_factor_) * power[tokens - 1 + lag_ - j];
  }

 private:
  double rate_;
  int lag_;
  double added_factor_;
  int64_t length_ = 0;
};

// Scratch for one block of tokens of `dim` elements.
template <class C>
Matrix<typename C::Unit> rows_matrix(Arena& arena, int64_t dim) {
  return arena.matrix<typename C::Unit>(kBlock, padded(dim) / C::kPair);
}
template <class C>
Matrix<typename C::Unit> transposed_matrix(Arena& arena, int64_t dim) {
  return arena.matrix<typename C::Unit>(padded(dim) / C::kPair, kBlock);
}

// Fetches where a block of outputs will go, while the block is computed.
template <class T>
void prefetch_outputs(const Rows<T>& o, int64_t tokens) {
  for (int64_t i = 0; i < tokens; ++i) prefetch<true>(o.token(i), o.dim);
}

// P = (Q K^T) o D, in layout `rows`. Q in `rows`, K in `transposed`. Finite operands are assumed: the zeros of D are
// factors, and what is infinite in a later token of the block reaches the earlier ones as NaN.
template <class C>
void scores(const Matrix<typename C::Unit>& p, const Matrix<typename C::Unit>& q,
            const Matrix<typename C::Unit>& k_transposed, const Decay<typename C::Acc>& decay, int64_t tokens,
            int64_t dim) {
  for (int64_t i = 0; i < tokens; i += kTileRows) {
    // Columns past the last row of the tile are never read.
    for_column_tiles<C>(minimum(tokens, i + kTileRows), [&](int64_t j, auto vectors) {
      Tile<C, vectors> tile;
      tile.clear();
      tile.add_product(q.row(i), q.ld, k_transposed.data + j, k_transposed.ld, ceil_div(dim, C::kPair));
      tile.multiply_toeplitz(decay.causal + kBlock - 1 - i + j);
      tile.store_units(p.row(i), p.ld, j);
    });
  }
}

// O = carried o (Q S) + P V, written to memory. Q and P in `rows`, S and V in `pairs`.
template <class C, class T>
void outputs(const Rows<T>& o, const Matrix<typename C::Unit>& q, const Matrix<typename C::Unit>& state,
             const Matrix<typename C::Unit>& p, const Matrix<typename C::Unit>& v,
             const Decay<typename C::Acc>& decay, int64_t tokens, int64_t key_dim) {
  for_column_tiles<C>(o.dim, [&](int64_t j, auto vectors) {
    for (int64_t i = 0; i < tokens; i += kTileRows) {
      Tile<C, vectors> tile;
      tile.clear();
      tile.add_product(q.row(i), q.ld, state.data + j, state.ld, ceil_div(key_dim, C::kPair));
      tile.scale_rows(decay.carried + i);
      tile.add_product(p.row(i), p.ld, v.data + j, v.ld, ceil_div(minimum(tokens, i + kTileRows), C::kPair));
      tile.store_rows(o.token(i) + j, o.stride, tokens - i, o.dim - j);
    }
  });
}

// S <- lambda^n S + K^T V. K (already weighted) and V in `pairs`.
template <class C>
void update(const Matrix<typename C::Acc>& state, const Matrix<typename C::Unit>& k_weighted,
            const Matrix<typename C::Unit>& v, const Decay<typename C::Acc>& decay, int64_t tokens, int64_t key_dim,
            int64_t value_dim) {
  for_column_tiles<C>(value_dim, [&](int64_t j, auto vectors) {
    for (int64_t i = 0; i < key_dim; i += kTileRows) {
      Tile<C, vectors> tile;
      tile.clear();  // summed apart: one rounding at the magnitude of the state for a block, not for each token
      tile.add_transposed_product(k_weighted.data + i, k_weighted.ld, v.data + j, v.ld, ceil_div(tokens, C::kPair));
      tile.scale_add_to(state.row(i) + j, state.ld, decay.power[tokens], decay.correction);
    }
  });
}

}  // namespace LIGHTNING_ISA
}  // namespace lightning
