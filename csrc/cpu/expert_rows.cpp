// Few rows a group against their expert's matrix: y[r, n] = scale[e, n] * sum over k of x[r, k] w[e, n, k].
//
// Reading w is the time, so it is read once for all rows of a group, and the (expert, block of n) tasks of the whole
// call are shared out among the threads. Each sum has its own order, whatever the blocks and the other rows.
//
// The rows of w that are read side by side lie a page apart where that is possible: processors follow one run of
// addresses in a page, and several rows of one page would look like none. From memory, int8 rows of 1 KB come 1.4 times
// as fast for it, bfloat16 rows of 2 KB 1.2 times; what is asked for ahead are the rows that follow these.
#include "kernels.h"
#include "runtime.h"

namespace lightning {
namespace LIGHTNING_ISA {
namespace {

constexpr int64_t kTask = 64;  // rows of w that one task takes
constexpr int64_t kPage = 4096;
constexpr int64_t kPart = 64;  // vectors added up at a time: the two levels of LongSum, with one count for all sums
constexpr int kRowsW = 4;      // rows of w and of x held against each other in registers
constexpr int kRowsX = LIGHTNING_VECTOR_BYTES == 64 ? 4 : 2;

template <class Acc, class W>
LIGHTNING_INLINE Vector<Acc> load_weights(const W* p) {
  if constexpr (std::is_same_v<W, int8_t>) {
    Vector<Acc> v;
#if defined(__AVX512F__) && defined(LIGHTNING_GNU_VECTORS)
    if constexpr (std::is_same_v<Acc, float>) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      return (Vector<Acc>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
#elif defined(__AVX2__) && defined(LIGHTNING_GNU_VECTORS)
    if constexpr (std::is_same_v<Acc, float>) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      return (Vector<Acc>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
#endif
    for (int i = 0; i < kWidth<Acc>; ++i) v[i] = Acc(p[i]);
    return v;
  } else {
    return load_as(p);
  }
}

template <class Acc, class W>
LIGHTNING_INLINE Vector<Acc> load_first_weights(const W* p, int64_t count) {
  W padded[kWidth<Acc>] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load_weights<Acc>(padded);
}

// sums[n][m] = <w_n, x_m>, with rows of w that are w_stride apart; the rows of x are padded with zeros to whole vectors.
template <int N, int M, class Acc, class W>
LIGHTNING_INLINE void products(const Acc* x, int64_t x_stride, const W* w, int64_t w_stride, int64_t dim,
                               Acc (&sums)[N][M]) {
  constexpr int64_t kLanes = kWidth<Acc>;
  Vector<Acc> total[N][M] = {};
  for (int64_t k = 0; k < dim;) {
    Vector<Acc> acc[N][M] = {};
    const auto add = [&](const Vector<Acc>(&row)[N]) {
      for (int m = 0; m < M; ++m) {
        const Vector<Acc> xs = load(x + m * x_stride + k);
        for (int n = 0; n < N; ++n) acc[n][m] += row[n] * xs;
      }
    };
    Vector<Acc> row[N];
    for (const int64_t end = dim - k < kPart * kLanes ? dim : k + kPart * kLanes; k + kLanes <= end; k += kLanes) {
      for (int n = 0; n < N; ++n) {
        row[n] = load_weights<Acc>(w + n * w_stride + k);
        prefetch(w + (n + N) * w_stride + k, 1);
      }
      add(row);
    }
    if (k < dim && dim - k < kLanes) {
      for (int n = 0; n < N; ++n) row[n] = load_first_weights<Acc>(w + n * w_stride + k, dim - k);
      add(row);
      k = dim;
    }
    for (int n = 0; n < N; ++n)
      for (int m = 0; m < M; ++m) total[n][m] += acc[n][m];
  }
  for (int n = 0; n < N; ++n)
    for (int m = 0; m < M; ++m) sums[n][m] = sum<Acc>(total[n][m]);
}

template <class T, class W>
class Product {
  using Acc = Accumulate<T>;
  const ExpertRows& p_;
  const Acc* x_;  // [rows, x_stride_]
  const int64_t x_stride_;

  void put(int64_t r, int64_t n, Acc value) const {
    const int64_t to = r * p_.width + (p_.interleaved ? n / 2 + n % 2 * (p_.width / 2) : n);
    if (p_.wide)
      static_cast<Acc*>(p_.y)[to] = value;
    else
      store_first(static_cast<T*>(p_.y) + to, broadcast(value), 1);
  }

  template <int N, int M>
  void block(int64_t e, int64_t r, int64_t n, int64_t step) const {
    Acc sums[N][M];
    products<N, M>(x_ + r * x_stride_, x_stride_, static_cast<const W*>(p_.w) + e * p_.w_expert + n * p_.w_row,
                   step * p_.w_row, p_.dim, sums);
    for (int i = 0; i < N; ++i, n += step)
      for (int m = 0; m < M; ++m)
        put(r + m, n, p_.scale ? sums[i][m] * Acc(p_.scale[e * p_.width + n]) : sums[i][m]);
  }

  // Every step-th of N rows of w against all rows of the group: w comes from memory for the first M, then from L1.
  template <int N>
  void rows(int64_t e, int64_t begin, int64_t end, int64_t n, int64_t step) const {
    int64_t r = begin;
    for (; r + kRowsX <= end; r += kRowsX) block<N, kRowsX>(e, r, n, step);
    if constexpr (kRowsX > 2) {
      if (end - r == 3) return block<N, 3>(e, r, n, step);
      if (end - r == 2) return block<N, 2>(e, r, n, step);
    }
    if (r < end) block<N, 1>(e, r, n, step);
  }

 public:
  Product(const ExpertRows& p, const Acc* x, int64_t x_stride) : p_(p), x_(x), x_stride_(x_stride) {}

  void operator()(int64_t e, int64_t begin, int64_t end, int64_t n_begin, int64_t n_end) const {
    constexpr int64_t kMaxStep = kTask / kRowsW;
    const int64_t row = p_.w_row * int64_t(sizeof(W));
    const int64_t apart = row * kMaxStep > kPage ? (kPage + row - 1) / row : kMaxStep;
    int64_t n = n_begin;
    const int64_t steps[] = {apart, 1};
    for (const int64_t step : steps)
      for (; n + kRowsW * step <= n_end; n += kRowsW * step)
        for (int64_t i = 0; i < step; ++i) rows<kRowsW>(e, begin, end, n + i, step);
    for (; n < n_end; ++n) rows<1>(e, begin, end, n, 1);
  }
};

struct Group {
  int64_t expert, begin, end;
};

template <class T, class W>
void run(const ExpertRows& p) {
  using Acc = Accumulate<T>;
  constexpr int64_t kLanes = kWidth<Acc>;
  const Buffer group_buffer(size_t(p.experts) * sizeof(Group));
  auto* const groups = static_cast<Group*>(group_buffer.data());
  const auto inside = [&](int64_t row) { return row < 0 ? 0 : row < p.rows ? row : p.rows; };
  int64_t count = 0, begin = 0, last = 0;
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t end = inside(p.offs[e]);
    if (begin < end && end - begin <= p.max_rows) {
      groups[count++] = {e, begin, end};
      last = end;
    }
    begin = end;
  }
  if (count == 0) return;

  const int64_t x_stride = (p.dim + kLanes - 1) / kLanes * kLanes;
  const Buffer x_buffer(size_t(last * x_stride) * sizeof(Acc));
  auto* const x = static_cast<Acc*>(x_buffer.data());
  const Product<T, W> product(p, x, x_stride);
  const bool scarce = count * p.width < 4 * kTask * p.threads;  // tasks: half of one is better than none
  const int64_t size = scarce ? kTask / 2 : kTask, blocks = (p.width + size - 1) / size;
  const bool alone = double(count) * double(p.width) * double(p.dim) < (1 << 17);  // does not repay a second thread

#pragma omp parallel num_threads(alone ? 1 : p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t g = 0; g < count; ++g)
      for (int64_t r = groups[g].begin; r < groups[g].end; ++r) {
        const T* const from = static_cast<const T*>(p.x) + (p.order ? p.order[r] / p.top_k : r) * p.x_stride;
        for_vectors<Acc>(p.dim, [&](int64_t k, auto n) { store(x + r * x_stride + k, load_first(from + k, n)); });
      }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < count * blocks; ++task) {
      const Group& g = groups[task / blocks];
      const int64_t n = task % blocks * size;
      product(g.expert, g.begin, g.end, n, p.width - n < size ? p.width : n + size);
    }
  }
}

template <class T>
void widen(const WidenInt8& p) {
  using Acc = Accumulate<T>;
  constexpr int64_t kLanes = kWidth<Acc>;
  const Vector<Acc> factor = broadcast(Acc(1) / 128);
#pragma omp parallel for schedule(static) num_threads(p.rows * p.dim < (1 << 14) ? 1 : p.threads)
  for (int64_t r = 0; r < p.rows; ++r) {
    const int8_t* const x = p.x + r * p.x_stride;
    for_vectors<Acc>(p.dim, [&](int64_t k, auto count) {
      const Vector<Acc> v = count == kLanes ? load_weights<Acc>(x + k) : load_first_weights<Acc>(x + k, count);
      store_first(static_cast<T*>(p.to) + r * p.dim + k, v * factor, count);
    });
  }
}

}  // namespace

void expert_rows(const ExpertRows& p) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    p.scale ? run<T, int8_t>(p) : run<T, T>(p);
  });
}

void widen_int8(const WidenInt8& p) {
  dispatch(p.dtype, [&](auto type) { widen<typename decltype(type)::type>(p); });
}

}  // namespace LIGHTNING_ISA
}  // namespace lightning
