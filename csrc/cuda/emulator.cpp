// Each thread of a block is a fiber that runs until it waits: for its warp, as in a shuffle, or for its block at a
// barrier. Between two barriers one warp after the other runs alone, so that one which does not wait where it must
// meets stale values.
#include "emulator.h"

#include <stdexcept>
#include <string>

#ifndef __GLIBC__  // others may lack ucontext

namespace lightning {
bool can_emulate() { return false; }
void emulate(const char*, int64_t, size_t, const void*, size_t) {
  throw std::invalid_argument("this build cannot emulate CUDA");
}
}  // namespace lightning

#else

#undef _FORTIFY_SOURCE  // its longjmp takes a change of stacks for an error
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#define LIGHTNING_ISA emulator
#include "../cpu/simd.h"

// ---- what CUDA gives a kernel -----------------------------------------------------------------------------------

namespace {

struct Index {
  unsigned x;
};
thread_local Index threadIdx, blockIdx, gridDim;

enum class Wait { exchange, warp, barrier, end };
void wait(Wait what);

using Bits = uint32_t;
const Bits* exchange(Bits own);  // -> those of the warp's threads

template <class To, class From>
To as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

int lane();  // of prelude.cuh
inline void __syncthreads() { wait(Wait::barrier); }
inline void __syncwarp() { wait(Wait::warp); }
inline unsigned __float_as_uint(float x) { return as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return as<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
T __shfl_sync(unsigned, T x, int from) {
  return as<T>(exchange(as<Bits>(x))[from]);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int distance) {
  return as<T>(exchange(as<Bits>(x))[lane() ^ distance]);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int distance) {
  const int from = lane() - distance;
  return as<T>(exchange(as<Bits>(x))[from < 0 ? lane() : from]);
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  const Bits* all = exchange(x);
  return *std::max_element(all, all + 32);
}
inline unsigned __reduce_min_sync(unsigned, unsigned x) {
  const Bits* all = exchange(x);
  return *std::min_element(all, all + 32);
}
inline unsigned __match_any_sync(unsigned, int x) {
  const Bits* all = exchange(as<Bits>(x));
  unsigned same = 0;
  for (int i = 0; i < 32; ++i) same |= unsigned(all[i] == as<Bits>(x)) << i;
  return same;
}

using lightning::emulator::bfloat16;
using lightning::emulator::float16;
inline float widen(float x) { return x; }
inline float widen(bfloat16 x) { return lightning::emulator::to_float(x); }
inline float widen(float16 x) { return lightning::emulator::to_float(x); }
inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, bfloat16& y) { y = lightning::emulator::to_bfloat16(x); }
inline void narrow(float x, float16& y) { y = lightning::emulator::to_float16(x); }

struct Kernel {
  const char* name;
  size_t bytes;  // of its parameters
  void (*run)(const void* parameters, void* shared);
};
std::vector<Kernel> kernels;
struct Registered {
  Registered(const char* name, size_t bytes, void (*run)(const void*, void*)) { kernels.push_back({name, bytes, run}); }
};

#define __device__
#define KERNEL(NAME, PARAMETERS, BLOCKS, SHARED, ...)                                             \
  const Registered NAME{#NAME, sizeof(PARAMETERS), [](const void* parameters, void* shared) {     \
    __VA_ARGS__(*static_cast<const PARAMETERS*>(parameters), static_cast<SHARED*>(shared));       \
  }};
#include "prelude.cuh"
namespace step {
#include "step.cu"
}
namespace route {
#include "route.cu"
}
namespace sort {
#include "sort.cu"
}

// ---- a block ----------------------------------------------------------------------------------------------------

constexpr int kWarp = 32;
constexpr size_t kShared = (48 << 10) / sizeof(Bits), kStack = 64 << 10;
constexpr Bits kPoison = 0x7fc00bad;  // a NaN, and a large integer

class Block {
 public:
  void run(const Kernel& kernel, const void* parameters, size_t shared) {
    kernel_ = &kernel;
    parameters_ = parameters;
    // As on a device, shared memory holds anything; what is beyond must not be touched.
    std::fill(shared_, shared_ + kShared, kPoison);
    for (int i = 0; i < kThreads; ++i) start(i);
    for (Wait all = Wait::barrier; all != Wait::end;) {
      all = advance(0);
      for (int warp = 1; warp < kWarps; ++warp)
        if (advance(warp) != all) throw std::logic_error("threads of a block wait for others that have ended");
    }
    const auto untouched = [](Bits x) { return x == kPoison; };
    if (!std::all_of(shared_ + shared / sizeof(Bits), shared_ + kShared, untouched))
      throw std::logic_error("more shared memory was written than there is");
  }

  void wait(Wait what) {
    const int self = int(threadIdx.x);
    what_[self] = what;
    if (_setjmp(fibers_[self]) == 0) _longjmp(scheduler_, 1);
  }

  const Bits* exchange(Bits own) {
    const int self = int(threadIdx.x), turn = turn_[self]++ % 2;  // a fiber may be one exchange ahead of another
    values_[turn][self] = own;
    wait(Wait::exchange);
    return values_[turn] + self / kWarp * kWarp;
  }

 private:
  // One warp up to the next barrier or its end.
  Wait advance(int warp) {
    Wait all;
    do {
      resume(warp * kWarp);
      all = what_[warp * kWarp];
      for (int i = warp * kWarp + 1; i < (warp + 1) * kWarp; ++i) {
        resume(i);
        if (what_[i] != all) throw std::logic_error("threads of a warp wait for different things");
      }
    } while (all == Wait::exchange || all == Wait::warp);
    return all;
  }

  void resume(int i) {
    threadIdx.x = unsigned(i);
    if (_setjmp(scheduler_) != 0) return;
    if (started_[i]) _longjmp(fibers_[i], 1);
    started_[i] = true;
    setcontext(&contexts_[i]);
  }

  void start(int i) {
    started_[i] = false;
    turn_[i] = 0;
    getcontext(&contexts_[i]);
    contexts_[i].uc_stack.ss_sp = stacks_.get() + size_t(i) * kStack;
    contexts_[i].uc_stack.ss_size = kStack;
    contexts_[i].uc_link = nullptr;
    makecontext(&contexts_[i], &Block::enter, 0);
  }

  static void enter();

  const Kernel* kernel_ = nullptr;
  const void* parameters_ = nullptr;
  std::unique_ptr<char[]> stacks_{new char[kThreads * kStack]};
  ucontext_t contexts_[kThreads];
  jmp_buf scheduler_, fibers_[kThreads];
  bool started_[kThreads];
  Wait what_[kThreads];
  int turn_[kThreads];
  Bits values_[2][kThreads];
  alignas(16) Bits shared_[kShared];
};

thread_local std::unique_ptr<Block> block;

void Block::enter() {
  block->kernel_->run(block->parameters_, block->shared_);
  block->wait(Wait::end);
}

void wait(Wait what) { block->wait(what); }
const Bits* exchange(Bits own) { return block->exchange(own); }

}  // namespace

namespace lightning {

bool can_emulate() { return true; }

void emulate(const char* name, int64_t blocks, size_t shared, const void* parameters, size_t bytes) {
  const auto called = [&](const Kernel& k) { return std::strcmp(k.name, name) == 0; };
  const auto kernel = std::find_if(kernels.begin(), kernels.end(), called);
  if (kernel == kernels.end()) throw std::invalid_argument(std::string("there is no kernel ") + name);
  if (bytes != kernel->bytes) throw std::invalid_argument("the kernel's parameters have another size");
  if (shared > kShared * sizeof(Bits)) throw std::invalid_argument("too much shared memory");
  if (!block) block = std::make_unique<Block>();
  gridDim.x = unsigned(blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = unsigned(i);
    block->run(*kernel, parameters, shared);
  }
}

}  // namespace lightning

#endif
