#include "runtime.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace lightning {
namespace {

constexpr std::align_val_t kAlign{64};
constexpr int64_t kSegmentMultiple = 64;    // whole blocks, see kBlock in block.h
constexpr double kWorkPerThread = 1 << 18;  // multiply-adds that repay waking a thread (some 5 us)

bool forked = false;

}  // namespace

int usable_threads(int wanted) {
#if defined(__unix__) || defined(__APPLE__)
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
  (void)registered;
#endif
  return forked ? 1 : wanted;
}

Schedule::Schedule(const AttentionShape& shape) {
  const bool packed = shape.cu_seqlens != nullptr;
  const double tokens = double(shape.tokens) * double(shape.batch) * double(shape.heads);
  const double work = tokens * 2 * double(shape.key_dim) * double(shape.value_dim);
  threads_ = int(std::max(1.0, std::min(double(shape.threads), work / kWorkPerThread)));

  const auto share = int64_t(tokens / threads_) + 1;
  const int64_t limit =
      threads_ == 1 ? INT64_MAX : (share + kSegmentMultiple - 1) / kSegmentMultiple * kSegmentMultiple;

  std::vector<Segment> segments;
  for (int64_t n = 0; n < shape.sequences; ++n) {
    const int64_t start = packed ? shape.cu_seqlens[n] : 0;
    const int64_t length = packed ? shape.cu_seqlens[n + 1] - start : shape.tokens;
    // Equal parts: the slowest segment sets the time.
    const int64_t parts = length > limit ? (length + limit - 1) / limit : 1;
    int64_t part = (length + parts - 1) / parts;
    if (parts > 1) part = (part + kSegmentMultiple - 1) / kSegmentMultiple * kSegmentMultiple;
    int64_t at = 0;
    do {
      const int64_t size = std::min(part, length - at);
      segments.push_back({n, packed ? 0 : n, start + at, size, at == 0, at + size == length});
      split_ |= size < length;
      at += size;
    } while (at < length);
  }
  size_ = int64_t(segments.size());
  segments_ = new Segment[segments.size()];
  std::copy(segments.begin(), segments.end(), segments_);
}

Schedule::~Schedule() { delete[] segments_; }

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

Buffer::Buffer(size_t bytes) : data_(::operator new(bytes, kAlign)) {}
Buffer::~Buffer() { ::operator delete(data_, kAlign); }

void* thread_scratch(size_t bytes) {
  thread_local std::unique_ptr<Buffer> buffer;
  thread_local size_t capacity = 0;
  if (bytes > capacity) {
    buffer.reset();
    buffer = std::make_unique<Buffer>(bytes);
    capacity = bytes;
  }
  return buffer->data();
}

}  // namespace lightning
