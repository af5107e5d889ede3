// What the kernels need besides arithmetic: the division of a problem among threads, and scratch memory.
// Compiled once, for the baseline instruction set; the kernels of every instruction set share it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../lightning.h"

namespace lightning {

// A run of consecutive tokens of one sequence, which one thread sweeps for one head.
struct Segment {
  int64_t sequence, batch;  // state row, and row of the operands
  int64_t begin, length;    // tokens, within that row
  bool first, last;         // of its sequence
};

// All sequences cut into segments, in order. A sequence is cut only where it holds more than one thread's
// share of the work, so the segment states take O(threads * K * V).
class Schedule {
 public:
  // `threads`: how many there are; one thread is used when the work does not repay a second.
  explicit Schedule(const AttentionShape& shape);
  ~Schedule();
  Schedule(const Schedule&) = delete;
  Schedule& operator=(const Schedule&) = delete;

  int64_t size() const { return size_; }
  const Segment& operator[](int64_t i) const { return segments_[i]; }
  bool split() const { return split_; }  // does any sequence have several segments?
  int threads() const { return threads_; }

 private:
  Segment* segments_ = nullptr;
  int64_t size_ = 0;
  bool split_ = false;
  int threads_ = 1;
};

// `wanted` threads, but one in a forked child: the thread pool of GNU OpenMP does not survive a fork, and the first
// parallel region there would wait for ever.
int usable_threads(int wanted);

// At least `bytes` of 64-byte aligned memory that belongs to the calling thread until it asks again.
void* thread_scratch(size_t bytes);

// Asks for huge pages behind fresh memory that is about to be written: the first touch of each 4 KB page costs more
// than the writing. No effect where the system has none to give.
void advise_huge_pages(void* data, size_t bytes);

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
