// Matrix products on packed operands: the register tile every kernel of the attention is made of.
//
// An operand is a matrix of "units": one element, or the pair of bfloat16 that one dot-product instruction
// multiplies. Layouts of a matrix X [rows, cols] in units:
//   rows        [rows, cols / pair]        pairs along the columns: the left operand of X B
//   pairs       [rows / pair, cols]        pairs along the rows: the right operand of A X, and the left one of X^T B
//   transposed  [cols / pair, rows]        the right operand of A X^T
// With one element per unit the first two coincide.
#pragma once

#include <utility>

#include "simd.h"

namespace lightning {
namespace LIGHTNING_ISA {

// Arithmetic on the elements themselves.
template <class T>
struct Plain {
  using Unit = T;
  using Element = T;  // of the layout `rows`
  using Acc = T;
  static constexpr int kPair = 1;
  static LIGHTNING_INLINE Vector<T> multiply_add(const Vector<T>& c, T a, const Vector<T>& b) {
    return c + b * broadcast(a);
  }
};

#if defined(__AVX512BF16__) && defined(LIGHTNING_GNU_VECTORS)
// bfloat16 products, two per lane, summed in float32.
struct BFloat16Pairs {
  using Unit = uint32_t;
  using Element = bfloat16;
  using Acc = float;
  static constexpr int kPair = 2;
  static LIGHTNING_INLINE Vector<float> multiply_add(const Vector<float>& c, uint32_t a, const Vector<uint32_t>& b) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)broadcast(a), (__m512bh)b);
  }
  // Elements as the low and the high halves of units.
  static LIGHTNING_INLINE Vector<uint32_t> join(const bfloat16* low, const bfloat16* high) {
    return load_bits(low) | load_bits(high) << 16;
  }
  static LIGHTNING_INLINE Vector<uint32_t> join(const Vector<float>& low, const Vector<float>& high) {
    return zero_extend((HalfBits)_mm512_cvtneps_pbh((__m512)low)) |
           zero_extend((HalfBits)_mm512_cvtneps_pbh((__m512)high)) << 16;
  }
};
#endif

// The arithmetic for operands stored as T.
template <class T>
struct ComputeOf {
  using type = Plain<Accumulate<T>>;
};
#if defined(__AVX512BF16__) && defined(LIGHTNING_GNU_VECTORS)
template <>
struct ComputeOf<bfloat16> {
  using type = BFloat16Pairs;
};
#endif
template <class T>
using Compute = typename ComputeOf<T>::type;

// Sixteen accumulators hide the latency of the multiply-add on AVX-512, with its 32 registers; elsewhere there may be 16,
// and eight do.
constexpr int kTileRows = LIGHTNING_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kTileVectors = 2;

// f(0), ..., f(Count - 1) with compile-time indices, so that arrays indexed by them live in registers.
template <class F, int... I>
LIGHTNING_INLINE void unroll(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int Count, class F>
LIGHTNING_INLINE void unroll(F&& f) {
  unroll(std::make_integer_sequence<int, Count>{}, f);
}

// An accumulator of kTileRows x (Vectors * width) held in registers.
template <class C, int Vectors>
struct Tile {
  using Acc = typename C::Acc;
  using Unit = typename C::Unit;
  static constexpr int kLanes = kWidth<Acc>;

  Vector<Acc> acc[kTileRows][Vectors];

  LIGHTNING_INLINE void clear() {
    unroll<kTileRows>([&](auto i) { unroll<Vectors>([&](auto j) { acc[i][j] = Vector<Acc>{}; }); });
  }

  // tile += A B over `depth` units; A [kTileRows, depth] in layout `rows`
  LIGHTNING_INLINE void add_product(const Unit* a, int64_t lda, const Unit* b, int64_t ldb, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, ++a, b += ldb) step(b, [&](auto i) { return a[i * lda]; });
  }

  // tile += A^T B over `depth` units; A [depth, kTileRows] in layout `pairs`
  LIGHTNING_INLINE void add_transposed_product(const Unit* a, int64_t lda, const Unit* b, int64_t ldb, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, a += lda, b += ldb) step(b, [&](auto i) { return a[i]; });
  }

  // row i of the tile *= factor[i]
  LIGHTNING_INLINE void scale_rows(const Acc* factor) {
    unroll<kTileRows>([&](auto i) { unroll<Vectors>([&](auto j) { acc[i][j] *= broadcast(factor[i]); }); });
  }

  // row i, column j of the tile *= w[j - i]
  LIGHTNING_INLINE void multiply_toeplitz(const Acc* w) {
    unroll<kTileRows>([&](auto i) { unroll<Vectors>([&](auto j) { acc[i][j] *= load(w + j * kLanes - i); }); });
  }

  LIGHTNING_INLINE void store_to(Acc* c, int64_t ldc) const {
    unroll<kTileRows>([&](auto i) { unroll<Vectors>([&](auto j) { store(c + i * ldc + j * kLanes, acc[i][j]); }); });
  }

  // c = (factor + correction) * c + tile
  LIGHTNING_INLINE void scale_add_to(Acc* c, int64_t ldc, Acc factor, Acc correction) const {
    unroll<kTileRows>([&](auto i) {
      unroll<Vectors>([&](auto j) {
        Acc* const at = c + i * ldc + j * kLanes;
        const Vector<Acc> before = load(at);
        store(at, before * broadcast(factor) + (before * broadcast(correction) + acc[i][j]));
      });
    });
  }

  // Into columns `column`... of a matrix in layout `rows`, rounded to the operands' precision.
  LIGHTNING_INLINE void store_units(Unit* c, int64_t ldc, int64_t column) const {
    unroll<kTileRows>([&](auto i) {
      auto* row = reinterpret_cast<typename C::Element*>(c + i * ldc) + column;
      unroll<Vectors>([&](auto j) { store_as(row + j * kLanes, acc[i][j]); });
    });
  }

  // The first `rows` rows and `columns` columns, to memory of any type.
  template <class T>
  LIGHTNING_INLINE void store_rows(T* out, int64_t stride, int64_t rows, int64_t columns) const {
    if (rows >= kTileRows && columns >= Vectors * kLanes) {
      unroll<kTileRows>(
          [&](auto i) { unroll<Vectors>([&](auto j) { store_as(out + i * stride + j * kLanes, acc[i][j]); }); });
      return;
    }
    // By way of memory: an accumulator indexed at run time would not live in registers.
    Acc spilled[kTileRows][Vectors * kLanes];
    store_to(spilled[0], Vectors * kLanes);
    for (int i = 0; i < kTileRows && i < rows; ++i)
      for (int64_t j = 0; j < Vectors * kLanes && j < columns; j += kLanes)
        store_first(out + i * stride + j, load(spilled[i] + j), columns - j);
  }

  // The tile plus the first `rows` rows and `columns` columns of memory of any type, to there.
  template <class T>
  LIGHTNING_INLINE void add_to_rows(T* out, int64_t stride, int64_t rows, int64_t columns) {
    unroll<kTileRows>([&](auto i) {
      unroll<Vectors>([&](auto j) {
        const int64_t left = columns - j * kLanes;
        if (i < rows && left > 0) acc[i][j] += load_first(out + i * stride + j * kLanes, left);
      });
    });
    store_rows(out, stride, rows, columns);
  }

 private:
  template <class LeftUnit>
  LIGHTNING_INLINE void step(const Unit* b, LeftUnit&& left) {
    Vector<Unit> right[Vectors];
    unroll<Vectors>([&](auto j) { right[j] = load(b + j * kLanes); });
    unroll<kTileRows>([&](auto i) {
      const Unit a = left(i);
      unroll<Vectors>([&](auto j) { acc[i][j] = C::multiply_add(acc[i][j], a, right[j]); });
    });
  }
};

// f(first column, number of vectors as a constant) for tiles that cover [0, columns).
template <class C, class F>
LIGHTNING_INLINE void for_column_tiles(int64_t columns, F&& f) {
  constexpr int64_t kLanes = kWidth<typename C::Acc>;
  int64_t j = 0;
  for (; columns - j > (kTileVectors - 1) * kLanes; j += kTileVectors * kLanes)
    f(j, std::integral_constant<int, kTileVectors>{});
  for (; j < columns; j += kLanes) f(j, std::integral_constant<int, 1>{});
}

}  // namespace LIGHTNING_ISA
}  // namespace lightning
