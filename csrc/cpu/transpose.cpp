// to[c, r] = scale[r] * x[r, c], in squares of one register's lanes that are turned in registers.
//
// It stands between products of matrices that read and write memory in different orders, each in the one that is fast.
#include "kernels.h"
#include "runtime.h"

namespace lightning {
namespace LIGHTNING_ISA {
namespace {

constexpr int64_t kRun = 256;  // rows of x that one task takes

#if defined(LIGHTNING_GNU_VECTORS) && !defined(__clang__)
// Exchanges lanes i + Step of row r with lanes i of row r + Step, for all i and r whose bit Step is clear.
template <int Step, class Acc>
LIGHTNING_INLINE void exchange(Vector<Acc>* v) {
  constexpr int kLanes = kWidth<Acc>;
  using Index = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
  Vector<Index> low{}, high{};
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & Step ? kLanes + i - Step : i;
    high[i] = i & Step ? kLanes + i : i + Step;
  }
  for (int r = 0; r < kLanes; ++r) {
    if (r & Step) continue;
    const Vector<Acc> a = v[r], b = v[r + Step];
    v[r] = __builtin_shuffle(a, b, low);
    v[r + Step] = __builtin_shuffle(a, b, high);
  }
  if constexpr (Step > 1) exchange<Step / 2, Acc>(v);
}

template <class Acc>
LIGHTNING_INLINE void turn(Vector<Acc> (&v)[kWidth<Acc>]) {
  exchange<kWidth<Acc> / 2, Acc>(v);
}
#else
template <class Acc>
LIGHTNING_INLINE void turn(Vector<Acc> (&v)[kWidth<Acc>]) {
  constexpr int kLanes = kWidth<Acc>;
  Acc from[kLanes][kLanes], to[kLanes][kLanes];
  for (int r = 0; r < kLanes; ++r) store(from[r], v[r]);
  for (int r = 0; r < kLanes; ++r)
    for (int c = 0; c < kLanes; ++c) to[c][r] = from[r][c];
  for (int r = 0; r < kLanes; ++r) v[r] = load(to[r]);
}
#endif

// `whole`: the square is not cut off by an edge.
template <class T, class To, class Acc = Accumulate<T>>
LIGHTNING_INLINE void square(const Transpose& p, int64_t r, int64_t c, bool whole) {
  constexpr int64_t kLanes = kWidth<Acc>;
  const int64_t rows = whole || p.rows - r > kLanes ? kLanes : p.rows - r;
  const int64_t columns = whole || p.columns - c > kLanes ? kLanes : p.columns - c;
  const T* const x = static_cast<const T*>(p.x) + r * p.x_stride + c;
  To* const to = static_cast<To*>(p.to) + c * p.to_stride + r;
  Vector<Acc> v[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    v[i] = i < rows ? load_first(x + i * p.x_stride, columns) : Vector<Acc>{};
    if (p.scale && i < rows) v[i] *= broadcast(Acc(p.scale[(r + i) * p.scale_stride]));
  }
  turn<Acc>(v);
  for (int64_t i = 0; i < columns; ++i) store_first(to + i * p.to_stride, v[i], rows);
}

template <class T, class To>
void run(const Transpose& p) {
  constexpr int64_t kLanes = kWidth<Accumulate<T>>;
  const int64_t across = (p.columns + kLanes - 1) / kLanes, down = (p.rows + kRun - 1) / kRun;
  const int64_t useful = p.rows * p.columns / (1 << 14) + 1;  // threads whose waking is repaid

#pragma omp parallel for schedule(static) num_threads(useful < p.threads ? int(useful) : p.threads)
  for (int64_t task = 0; task < across * down; ++task) {
    const int64_t c = task / down * kLanes, begin = task % down * kRun;
    const int64_t end = p.rows - begin < kRun ? p.rows : begin + kRun;
    for (int64_t r = begin; r < end; r += kLanes) {
      if (r + kLanes <= p.rows && c + kLanes <= p.columns)
        square<T, To>(p, r, c, true);
      else
        square<T, To>(p, r, c, false);
    }
  }
}

}  // namespace

void transpose(const Transpose& p) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    p.wide ? run<T, Accumulate<T>>(p) : run<T, T>(p);
  });
}

}  // namespace LIGHTNING_ISA
}  // namespace lightning
