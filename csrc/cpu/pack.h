// Operands brought from memory into the layouts of tile.h, zero-padded so that no tile needs a tail.
#pragma once

#include <type_traits>

#include "tile.h"

namespace lightning {
namespace LIGHTNING_ISA {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
constexpr int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

// Every dimension is padded to a multiple of this: the columns of the widest tile, and whole pairs.
constexpr int64_t kPadding = 32;
constexpr int64_t padded(int64_t n) { return round_up(n, kPadding); }

// A [count, dim] operand of one head in memory: rows `stride` apart, which may be negative (time reversed).
template <class T>
struct Rows {
  T* data;
  int64_t stride, count, dim;
  T* token(int64_t t) const { return data + t * stride; }
  Rows from(int64_t t) const { return {token(t), stride, count - t, dim}; }
};

// A matrix of units in scratch memory.
template <class Unit>
struct Matrix {
  Unit* data;
  int64_t ld;
  Unit* row(int64_t i) const { return data + i * ld; }
};

// Hands out matrices one after the other; without memory (base null) it only counts what they take.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  // One more cache line than the columns need: rows a power of two apart would share a few cache sets.
  template <class Unit>
  Matrix<Unit> matrix(int64_t rows, int64_t cols) {
    const int64_t ld = round_up(cols, 64 / int64_t(sizeof(Unit))) + 64 / int64_t(sizeof(Unit));
    return {array<Unit>(rows * ld), ld};
  }
  template <class T>
  T* array(int64_t count) {
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += size_t(round_up(count * int64_t(sizeof(T)), 64));
    return reinterpret_cast<T*>(at);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// One row of `dim` elements into layout `rows`, rounded to the operands' precision if it is finer.
template <class C, class T>
LIGHTNING_INLINE void pack_row(typename C::Unit* to, const T* from, int64_t dim) {
  if constexpr (C::kPair == 1) {
    for (int64_t j = 0; j < padded(dim); j += kWidth<typename C::Acc>)
      store(to + j, j < dim ? load_first(from + j, dim - j) : Vector<typename C::Acc>{});
  } else {
    auto* elements = reinterpret_cast<typename C::Element*>(to);
    if constexpr (std::is_same_v<T, typename C::Element>) {
      std::memcpy(elements, from, size_t(dim) * sizeof(T));
    } else {
      for (int64_t j = 0; j < dim; j += kWidth<typename C::Acc>) store_as(elements + j, load_first(from + j, dim - j));
    }
    std::memset(elements + dim, 0, size_t(padded(dim) - dim) * sizeof(typename C::Element));
  }
}

// The next `count` tokens of an operand into layout `rows`; padding is zero. Of the tokens that follow, as many are
// fetched ahead: a head's rows lie too far apart for the hardware to guess.
template <class C, class T>
void pack_rows(const Matrix<typename C::Unit>& to, const Rows<T>& from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    pack_row<C>(to.row(i), from.token(i), from.dim);
    if (i + count < from.count) prefetch(from.token(i + count), from.dim);
  }
  for (int64_t i = count; i < padded(count); ++i)
    std::memset(to.row(i), 0, size_t(padded(from.dim) / C::kPair) * sizeof(typename C::Unit));
}

// Layout `rows` to layout `pairs`, row i times weight[i] (null: 1).
template <class C>
void pack_pairs(const Matrix<typename C::Unit>& to, const Matrix<typename C::Unit>& rows, int64_t count, int64_t dim,
                const typename C::Acc* weight) {
  using Acc = typename C::Acc;
  constexpr int64_t kLanes = kWidth<Acc>;
  for (int64_t i = 0; i < count; i += C::kPair) {
    typename C::Unit* out = to.row(i / C::kPair);
    if constexpr (C::kPair == 2) {
      // Rows past the count are zero, and so may their weights be anything finite.
      const auto* even = reinterpret_cast<const typename C::Element*>(rows.row(i));
      const auto* odd = reinterpret_cast<const typename C::Element*>(rows.row(i + 1));
      if (weight) {
        const Vector<Acc> w0 = broadcast(weight[i]), w1 = broadcast(i + 1 < count ? weight[i + 1] : Acc(0));
        for (int64_t j = 0; j < padded(dim); j += kLanes)
          store(out + j, C::join(load_as(even + j) * w0, load_as(odd + j) * w1));
      } else {
        for (int64_t j = 0; j < padded(dim); j += kLanes) store(out + j, C::join(even + j, odd + j));
      }
    } else {
      const Vector<Acc> w = broadcast(weight ? weight[i] : Acc(1));
      for (int64_t j = 0; j < padded(dim); j += kLanes) store(out + j, load(rows.row(i) + j) * w);
    }
  }
}

// `rows` as the right operand: itself, where a unit is an element.
template <class C>
Matrix<typename C::Unit> as_pairs(const Matrix<typename C::Unit>& to, const Matrix<typename C::Unit>& rows,
                                  int64_t count, int64_t dim) {
  if constexpr (C::kPair == 1) {
    return rows;
  } else {
    pack_pairs<C>(to, rows, count, dim, nullptr);
    return to;
  }
}

// A state (rows of the accumulate type) in layout `pairs`: itself, or rounded to the operands' precision.
template <class C>
Matrix<typename C::Unit> state_as_pairs(const Matrix<typename C::Unit>& to, const Matrix<typename C::Acc>& state,
                                        int64_t rows, int64_t dim) {
  if constexpr (C::kPair == 1) {
    return state;
  } else {
    for (int64_t i = 0; i < rows; i += C::kPair)
      for (int64_t j = 0; j < padded(dim); j += kWidth<typename C::Acc>)
        store(to.row(i / C::kPair) + j, C::join(load(state.row(i) + j), load(state.row(i + 1) + j)));
    return to;
  }
}

// The same in layout `rows`.
template <class C>
Matrix<typename C::Unit> state_as_rows(const Matrix<typename C::Unit>& to, const Matrix<typename C::Acc>& state,
                                       int64_t rows, int64_t dim) {
  if constexpr (C::kPair == 1) {
    return state;
  } else {
    for (int64_t i = 0; i < padded(rows); ++i) pack_row<C>(to.row(i), state.row(i), dim);
    return to;
  }
}

// Scratch for a matrix of `rows` x `dim` elements in layout `pairs`.
template <class C>
Matrix<typename C::Unit> pairs_matrix(Arena& arena, int64_t rows, int64_t dim) {
  return arena.matrix<typename C::Unit>(padded(rows) / C::kPair, padded(dim));
}

#if defined(LIGHTNING_GNU_VECTORS) && (defined(__clang__) || __GNUC__ >= 12)
// The lower (Half = 0) or upper halves of a and b, interleaved.
template <int Half, class V, int... I>
LIGHTNING_INLINE V interleave(const V& a, const V& b, std::integer_sequence<int, I...>) {
  constexpr int kLanes = int(sizeof...(I));
  return __builtin_shufflevector(a, b, (Half * kLanes / 2 + I / 2 + I % 2 * kLanes)...);
}

// A square of one vector's width: each round of interleaving rows i and i + width/2 rotates the bits of the
// element index (row, column) by one; after log2(width) rounds row and column have changed places.
template <class U>
LIGHTNING_INLINE void transpose_square(U* to, int64_t ld_to, const U* from, int64_t ld_from) {
  constexpr int kLanes = kWidth<U>;
  using Lanes = std::make_integer_sequence<int, kLanes>;
  Vector<U> x[kLanes], y[kLanes];
  unroll<kLanes>([&](auto i) { x[i] = load(from + i * ld_from); });
  unroll<(kLanes == 16 ? 4 : kLanes == 8 ? 3 : kLanes == 4 ? 2 : 1)>([&](auto) {
    unroll<kLanes / 2>([&](auto i) {
      y[2 * i] = interleave<0>(x[i], x[i + kLanes / 2], Lanes{});
      y[2 * i + 1] = interleave<1>(x[i], x[i + kLanes / 2], Lanes{});
    });
    unroll<kLanes>([&](auto i) { x[i] = y[i]; });
  });
  unroll<kLanes>([&](auto i) { store(to + i * ld_to, x[i]); });
}
#else
template <class U>
LIGHTNING_INLINE void transpose_square(U* to, int64_t ld_to, const U* from, int64_t ld_from) {
  for (int i = 0; i < kWidth<U>; ++i)
    for (int j = 0; j < kWidth<U>; ++j) to[j * ld_to + i] = from[i * ld_from + j];
}
#endif

// to [cols, rows] = from [rows, cols]^T, both padded: layout `rows` to layout `transposed`, in units.
template <class Unit>
void transpose(const Matrix<Unit>& to, const Matrix<Unit>& from, int64_t rows, int64_t cols) {
  constexpr int64_t kLanes = kWidth<Unit>;
  for (int64_t i = 0; i < round_up(rows, kLanes); i += kLanes)
    for (int64_t j = 0; j < round_up(cols, kLanes); j += kLanes)
      transpose_square(to.row(j) + i, to.ld, from.row(i) + j, from.ld);
}

}  // namespace LIGHTNING_ISA
}  // namespace lightning
