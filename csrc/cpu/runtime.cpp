#include "runtime.h"

#include <algorithm>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

namespace lightning {
namespace {

constexpr std::align_val_t kAlign{64};
constexpr double kWorkPerThread = 1 << 18;  // multiply-adds that repay waking a thread (some 5 us)

}  // namespace

Schedule::Schedule(const AttentionShape& shape) {
  const bool packed = shape.cu_seqlens != nullptr;
  const double tokens = double(shape.tokens) * double(shape.batch) * double(shape.heads);
  const double work = tokens * 2 * double(shape.key_dim) * double(shape.value_dim);
  threads_ = int(std::max(1.0, std::min(double(shape.threads), work / kWorkPerThread)));
  const double share = tokens / threads_;  // of one thread, in tokens of one head

  std::vector<Segment> segments;
  for (int64_t n = 0; n < shape.sequences; ++n) {
    const int64_t start = packed ? shape.cu_seqlens[n] : 0;
    const int64_t length = packed ? shape.cu_seqlens[n + 1] - start : shape.tokens;
    // Rounded down: the first round of a cut sequence costs as much as two fifths of a segment more.
    const int64_t parts = threads_ > 1 && length > 0 ? std::max(int64_t(1), int64_t(double(length) / share)) : 1;
    const int64_t part = ((length + parts - 1) / parts + kBlock - 1) / kBlock * kBlock;
    int64_t at = 0;
    do {
      const int64_t size = std::min(part, length - at);
      segments.push_back({n, packed ? 0 : n, start + at, size, at == 0, at + size == length, size < length ? cut_++ : -1});
      at += size;
    } while (at < length);
  }
  size_ = int64_t(segments.size());
  segments_ = new Segment[segments.size()];
  std::copy(segments.begin(), segments.end(), segments_);
  heads_ = new int64_t[size_t(shape.heads)];
  std::iota(heads_, heads_ + shape.heads, int64_t(0));
  std::stable_sort(heads_, heads_ + shape.heads, [&](int64_t a, int64_t b) { return shape.decay[a] < shape.decay[b]; });
}

Schedule::~Schedule() {
  delete[] segments_;
  delete[] heads_;
}

Buffer::Buffer(size_t bytes) : data_(::operator new(bytes, kAlign)) {}
Buffer::~Buffer() { ::operator delete(data_, kAlign); }

void* thread_scratch(size_t bytes) {
  thread_local std::unique_ptr<Buffer> buffer;
  thread_local size_t capacity = 0;
  if (!buffer || bytes > capacity) {
    capacity = 0;  // should the allocation fail
    buffer.reset();
    buffer = std::make_unique<Buffer>(bytes);
    capacity = bytes;
  }
  return buffer->data();
}

}  // namespace lightning
