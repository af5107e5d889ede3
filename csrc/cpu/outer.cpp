// to[n, k] = sum over r of a[r, n] b[r, k] for few rows r, or none: the gradient of an expert's matrix, in one pass.
//
// Writing is the time. What is written past the caches is not read first, which makes it twice as fast.
#include "kernels.h"
#include "runtime.h"

namespace lightning {
namespace LIGHTNING_ISA {
namespace {

// Copies past the caches where `to` is aligned; end a thread's share with `streamed`.
LIGHTNING_INLINE void stream(char* to, const char* from, size_t bytes) {
#if defined(__AVX512F__)
  if (uintptr_t(to) % 64 == 0)
    for (; bytes >= 64; to += 64, from += 64, bytes -= 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
  if (uintptr_t(to) % 32 == 0)
    for (; bytes >= 32; to += 32, from += 32, bytes -= 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#endif
  std::memcpy(to, from, bytes);
}

LIGHTNING_INLINE void streamed() {
#if defined(__AVX2__)
  _mm_sfence();  // others may read it once the threads have joined
#endif
}

template <class T>
void run(const OuterProduct& p) {
  using Acc = Accumulate<T>;
  const auto *const a = static_cast<const T*>(p.a), *const b = static_cast<const T*>(p.b);
  const size_t bytes = size_t(p.dim) * sizeof(T);
  const bool alone = double(p.width) * double(p.dim) * double(p.rows + 1) < (1 << 15);  // does not repay a second thread

#pragma omp parallel num_threads(alone ? 1 : p.threads)
  {
    T* const line = static_cast<T*>(thread_scratch(bytes));
    std::memset(line, 0, bytes);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.width; ++n) {
      if (p.rows > 0) {
        Vector<Acc> factor[kOuterRows];
        for (int64_t r = 0; r < p.rows; ++r) factor[r] = broadcast(Acc(load_first(a + r * p.a_stride + n, 1)[0]));
        for_vectors<Acc>(p.dim, [&](int64_t k, auto count) {
          Vector<Acc> sum = factor[0] * load_first(b + k, count);
          for (int64_t r = 1; r < p.rows; ++r) sum += factor[r] * load_first(b + r * p.b_stride + k, count);
          store_first(line + k, sum, count);
        });
      }
      char* const to = reinterpret_cast<char*>(static_cast<T*>(p.to) + n * p.dim);
      if (p.past_caches)
        stream(to, reinterpret_cast<const char*>(line), bytes);
      else
        std::memcpy(to, line, bytes);
    }
    streamed();
  }
}

}  // namespace

void outer_product(const OuterProduct& p) {
  dispatch(p.dtype, [&](auto type) { run<typename decltype(type)::type>(p); });
}

}  // namespace LIGHTNING_ISA
}  // namespace lightning
