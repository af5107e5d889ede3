// Vectors of one register, and the conversions between memory types and them.
//
// One source serves every instruction set: GCC and Clang turn their generic vectors into AVX-512, AVX2, SSE or NEON
// by the flags of the compilation; other compilers get arrays with the same operators.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LIGHTNING_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define LIGHTNING_VECTOR_BYTES 32
#else
#define LIGHTNING_VECTOR_BYTES 16
#endif

#if defined(__GNUC__) && !defined(LIGHTNING_PLAIN_VECTORS)
#define LIGHTNING_GNU_VECTORS 1
#define LIGHTNING_INLINE inline __attribute__((always_inline))
#else
#define LIGHTNING_INLINE inline
#endif

namespace lightning {
namespace LIGHTNING_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T>
constexpr int kWidth = LIGHTNING_VECTOR_BYTES / int(sizeof(T));

#ifdef LIGHTNING_GNU_VECTORS
// Count elements of T; always a whole number of registers or half of one.
template <class T, int Count = kWidth<T>>
struct VectorType {
  typedef T type __attribute__((vector_size(Count * sizeof(T))));
};
#else
template <class T, int Count = kWidth<T>>
struct VectorType {
  struct type {
    T lane[Count];
    T& operator[](int i) { return lane[i]; }
    const T& operator[](int i) const { return lane[i]; }
    friend type operator+(type a, const type& b) { for (int i = 0; i < Count; ++i) a[i] += b[i]; return a; }
    friend type operator-(type a, const type& b) { for (int i = 0; i < Count; ++i) a[i] -= b[i]; return a; }
    friend type operator*(type a, const type& b) { for (int i = 0; i < Count; ++i) a[i] *= b[i]; return a; }
    friend type operator/(type a, const type& b) { for (int i = 0; i < Count; ++i) a[i] /= b[i]; return a; }
    type& operator+=(const type& b) { return *this = *this + b; }
    type& operator*=(const type& b) { return *this = *this * b; }
  };
};
#endif

template <class T>
using Vector = typename VectorType<T>::type;

template <class T>
LIGHTNING_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
LIGHTNING_INLINE void store(T* p, const Vector<T>& v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
LIGHTNING_INLINE Vector<T> broadcast(T x) {
#ifdef LIGHTNING_GNU_VECTORS
  return x - Vector<T>{};  // x - 0 keeps the sign of -0
#else
  Vector<T> v;
  for (int i = 0; i < kWidth<T>; ++i) v[i] = x;
  return v;
#endif
}

template <class T>
LIGHTNING_INLINE T sum(const Vector<T>& v) {
  T lane[kWidth<T>];
  store(lane, v);
  for (int half = kWidth<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// A long sum in two levels, so that its error grows with the root of the length of each only.
template <class T>
class LongSum {
 public:
  LIGHTNING_INLINE void add(const Vector<T>& v) {
    part_ += v;
    if (++count_ == kPart) {
      total_ += part_;
      part_ = Vector<T>{};
      count_ = 0;
    }
  }
  LIGHTNING_INLINE T value() const { return sum<T>(total_ + part_); }

 private:
  static constexpr int kPart = 32;
  Vector<T> part_{}, total_{};
  int count_ = 0;
};

// Asks for the cache lines of `count` elements ahead of their use, to read or to write; never faults.
template <bool Write = false, class T>
LIGHTNING_INLINE void prefetch(const T* p, int64_t count) {
#if defined(__GNUC__)
  for (const char* line = reinterpret_cast<const char*>(p); line < reinterpret_cast<const char*>(p + count); line += 64)
    __builtin_prefetch(line, Write, 2);
#endif
}

// ---- 16-bit formats, one at a time ---------------------------------------------------------------------------

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_float(bfloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }

inline float to_float(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The exponent is moved by a multiplication, which also normalises subnormals.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * bits_to_float(0x77800000u)));
}

// Round to nearest, ties to even; NaN stays NaN.
inline bfloat16 to_bfloat16(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40u)};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline float16 to_float16(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the last bit of the result with that of a float and rounds.
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return {uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  return {uint16_t(sign | (magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13)};
}

// ---- memory type <-> a vector of the accumulate type ----------------------------------------------------------

LIGHTNING_INLINE Vector<double> load_as(const double* p) { return load(p); }
LIGHTNING_INLINE Vector<float> load_as(const float* p) { return load(p); }
LIGHTNING_INLINE void store_as(double* p, const Vector<double>& v) { store(p, v); }
LIGHTNING_INLINE void store_as(float* p, const Vector<float>& v) { store(p, v); }

#ifdef LIGHTNING_GNU_VECTORS

using HalfBits = typename VectorType<uint16_t, kWidth<float>>::type;

// GCC 12 converts whole AVX-512 vectors by halves, hence the intrinsics.
LIGHTNING_INLINE Vector<uint32_t> zero_extend(const HalfBits& x) {
#if defined(__AVX512F__)
  return (Vector<uint32_t>)_mm512_cvtepu16_epi32((__m256i)x);
#else
  return __builtin_convertvector(x, Vector<uint32_t>);
#endif
}

LIGHTNING_INLINE HalfBits truncate(const Vector<uint32_t>& x) {
#if defined(__AVX512F__)
  return (HalfBits)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, HalfBits);
#endif
}

// The bits of bfloat16 values, one in each 32-bit lane.
LIGHTNING_INLINE Vector<uint32_t> load_bits(const bfloat16* p) {
  HalfBits half;
  std::memcpy(&half, p, sizeof half);
  return zero_extend(half);
}

LIGHTNING_INLINE Vector<float> load_as(const bfloat16* p) { return (Vector<float>)(load_bits(p) << 16); }

LIGHTNING_INLINE void store_as(bfloat16* p, const Vector<float>& v) {
  const auto bits = (Vector<uint32_t>)v;
  const Vector<uint32_t> rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const auto nan = (Vector<uint32_t>)(v != v);
  const HalfBits half = truncate((rounded & ~nan) | ((bits >> 16 | 0x40u) & nan));
  std::memcpy(p, &half, sizeof half);
}

#else

LIGHTNING_INLINE Vector<float> load_as(const bfloat16* p) {
  Vector<float> v;
  for (int i = 0; i < kWidth<float>; ++i) v[i] = to_float(p[i]);
  return v;
}

LIGHTNING_INLINE void store_as(bfloat16* p, const Vector<float>& v) {
  for (int i = 0; i < kWidth<float>; ++i) p[i] = to_bfloat16(v[i]);
}

#endif

LIGHTNING_INLINE Vector<float> load_as(const float16* p) {
#if defined(__AVX512F__) && defined(LIGHTNING_GNU_VECTORS)
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__) && defined(__AVX2__) && defined(LIGHTNING_GNU_VECTORS)
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vector<float> v;
  for (int i = 0; i < kWidth<float>; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

LIGHTNING_INLINE void store_as(float16* p, const Vector<float>& v) {
#if defined(__AVX512F__) && defined(LIGHTNING_GNU_VECTORS)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
#elif defined(__F16C__) && defined(__AVX2__) && defined(LIGHTNING_GNU_VECTORS)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
#else
  for (int i = 0; i < kWidth<float>; ++i) p[i] = to_float16(v[i]);
#endif
}

// The accumulate type of a memory type.
template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

// The first `count` (at most one vector) elements; nothing past them is read or written. Missing ones are zero.
template <class T>
LIGHTNING_INLINE Vector<Accumulate<T>> load_first(const T* p, int64_t count) {
  constexpr int kLanes = kWidth<Accumulate<T>>;
  if (count >= kLanes) return load_as(p);
  T padded[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load_as(padded);
}

template <class T>
LIGHTNING_INLINE void store_first(T* p, const Vector<Accumulate<T>>& v, int64_t count) {
  constexpr int kLanes = kWidth<Accumulate<T>>;
  if (count >= kLanes) return store_as(p, v);
  T padded[kLanes];
  store_as(padded, v);
  for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

// f(j, elements at j) for the vectors that cover [0, dim); the count is a constant but for the last.
template <class Acc, class F>
LIGHTNING_INLINE void for_vectors(int64_t dim, F&& f) {
  constexpr int64_t kLanes = kWidth<Acc>;
  int64_t j = 0;
  for (; j + kLanes <= dim; j += kLanes) f(j, std::integral_constant<int64_t, kLanes>{});
  if (j < dim) f(j, dim - j);
}

// ---- e^x ------------------------------------------------------------------------------------------------------

template <class T>
LIGHTNING_INLINE Vector<T> exp_lanes(Vector<T> x) {
  for (int i = 0; i < kWidth<T>; ++i) x[i] = std::exp(x[i]);
  return x;
}

LIGHTNING_INLINE Vector<double> exp(const Vector<double>& x) { return exp_lanes<double>(x); }

#ifdef LIGHTNING_GNU_VECTORS
// Range reduction to |r| <= ln(2)/2 and a polynomial: 2 ulp; saturates at e^{+-87}.
LIGHTNING_INLINE Vector<float> exp(Vector<float> x) {
  const Vector<float> high = broadcast(87.0f), low = broadcast(-87.0f);
  x = x > high ? high : x;  // NaN compares false and passes through
  x = x < low ? low : x;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vector<float> shifted = x * 1.44269504f + round;
  const Vector<float> n = shifted - round;
  const Vector<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  Vector<float> p = r * (1.0f / 5040) + (1.0f / 720);
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const auto exponent = ((Vector<int32_t>)shifted << 23) + (127 << 23);  // the rest of `round` shifts out
  return p * (Vector<float>)exponent;
}
#else
LIGHTNING_INLINE Vector<float> exp(const Vector<float>& x) { return exp_lanes<float>(x); }
#endif

template <class Acc>
LIGHTNING_INLINE Vector<Acc> sigmoid(const Vector<Acc>& x) {
  const Vector<Acc> one = broadcast(Acc(1));
  return one / (one + exp(Vector<Acc>{} - x));
}

}  // namespace LIGHTNING_ISA
}  // namespace lightning
