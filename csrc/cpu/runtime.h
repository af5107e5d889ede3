// What the kernels need besides arithmetic: the division of a problem among threads, and scratch memory.
// Compiled once, for the baseline instruction set; the kernels of every instruction set share it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../lightning.h"

namespace lightning {

constexpr int64_t kBlock = 64;  // tokens that a kernel takes at a time

// A run of consecutive tokens of one sequence, which one thread sweeps for one head.
struct Segment {
  int64_t sequence, batch;  // state row, and row of the operands
  int64_t begin, length;    // tokens, within that row
  bool first, last;         // of its sequence
  int64_t cut;              // number among the segments of sequences that were cut, or -1
};

// All sequences as segments, in order. A sequence is cut only if it holds at least two threads' shares of the work, so
// the states of cut segments take O(threads * K * V).
//
// No standard container here: its inline functions, compiled for several instruction sets, would be merged into one by
// the linker.
class Schedule {
 public:
  // One thread is used when the work does not repay a second.
  explicit Schedule(const AttentionShape& shape);
  ~Schedule();
  Schedule(const Schedule&) = delete;
  Schedule& operator=(const Schedule&) = delete;

  int64_t size() const { return size_; }
  const Segment& operator[](int64_t i) const { return segments_[i]; }
  int64_t cut() const { return cut_; }  // segments of sequences that were cut
  int threads() const { return threads_; }
  // The heads, that of the slowest decay first: where far tokens are left out it takes longest.
  int64_t head(int64_t i) const { return heads_[i]; }

 private:
  Segment* segments_ = nullptr;
  int64_t* heads_ = nullptr;
  int64_t size_ = 0;
  int64_t cut_ = 0;
  int threads_ = 1;
};

// At least `bytes` of 64-byte aligned memory that belongs to the calling thread until it asks again. It is kept for the
// life of the thread, so ask for O(K * V) or a row, never for O(T).
void* thread_scratch(size_t bytes);

// 64-byte aligned heap memory, freed with its owner.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

}  // namespace lightning
