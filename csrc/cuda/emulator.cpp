// Each thread of a block is a fiber that runs until it waits: for its warp in a shuffle, for its block at a barrier. Between
// two barriers one warp after the other runs alone, so that one which does not wait where it must meets stale sums.
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
#include <limits>
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

enum class Wait { shuffle, barrier, end };
void wait(Wait what);
float __shfl_xor_sync(unsigned, float x, int distance);

using lightning::emulator::bfloat16;
using lightning::emulator::float16;
inline float widen(float x) { return x; }
inline float widen(bfloat16 x) { return lightning::emulator::to_float(x); }
inline float widen(float16 x) { return lightning::emulator::to_float(x); }
inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, bfloat16& y) { y = lightning::emulator::to_bfloat16(x); }
inline void narrow(float x, float16& y) { y = lightning::emulator::to_float16(x); }

struct Decode;
struct Kernel {
  std::string name;
  void (*run)(const Decode&, float* shared);
};
std::vector<Kernel> kernels;
struct Registered {
  Registered(const char* name, void (*run)(const Decode&, float*)) { kernels.push_back({name, run}); }
};

#define __device__
#define __syncthreads() wait(Wait::barrier)
#define STEP(T, S, ROWS, ACCESS, ALIGNED) \
  const Registered T##_##S##_##ROWS##_##ACCESS{"step_" #T "_" #S "_" #ROWS "_" #ACCESS, steps<T, S, ROWS, ALIGNED>};
#include "step.cu"

// ---- a block ----------------------------------------------------------------------------------------------------

constexpr int kWarp = 32;
constexpr size_t kSharedFloats = (48 << 10) / sizeof(float), kStack = 64 << 10;

class Block {
 public:
  void run(const Kernel& kernel, const Decode& parameters, size_t shared) {
    kernel_ = &kernel;
    parameters_ = &parameters;
    // As on a device, shared memory holds anything; what is beyond must not be touched.
    std::fill(shared_, shared_ + kSharedFloats, std::numeric_limits<float>::quiet_NaN());
    const size_t beyond = shared / sizeof(float);
    for (int i = 0; i < kThreads; ++i) start(i);
    for (Wait all = Wait::barrier; all != Wait::end;) {
      all = advance(0);
      for (int warp = 1; warp < kThreads / kWarp; ++warp)
        if (advance(warp) != all) throw std::logic_error("threads of a block wait for others that have ended");
    }
    for (size_t i = beyond; i < kSharedFloats; ++i)
      if (shared_[i] == shared_[i]) throw std::logic_error("more shared memory was written than there is");
  }

  void wait(Wait what) {
    const int self = int(threadIdx.x);
    what_[self] = what;
    if (_setjmp(fibers_[self]) == 0) _longjmp(scheduler_, 1);
  }

  float exchange(float x, int distance) {
    const int self = int(threadIdx.x), turn = turn_[self]++ % 2;  // a fiber may be one shuffle ahead of another
    values_[turn][self] = x;
    wait(Wait::shuffle);
    return values_[turn][self ^ distance];
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
    } while (all == Wait::shuffle);
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
  const Decode* parameters_ = nullptr;
  std::unique_ptr<char[]> stacks_{new char[kThreads * kStack]};
  ucontext_t contexts_[kThreads];
  jmp_buf scheduler_, fibers_[kThreads];
  bool started_[kThreads];
  Wait what_[kThreads];
  int turn_[kThreads];
  float values_[2][kThreads];
  float shared_[kSharedFloats];
};

thread_local std::unique_ptr<Block> block;

void Block::enter() {
  block->kernel_->run(*block->parameters_, block->shared_);
  block->wait(Wait::end);
}

void wait(Wait what) { block->wait(what); }
float __shfl_xor_sync(unsigned, float x, int distance) { return block->exchange(x, distance); }

}  // namespace

namespace lightning {

bool can_emulate() { return true; }

void emulate(const char* name, int64_t blocks, size_t shared, const void* parameters, size_t bytes) {
  const auto kernel =
      std::find_if(kernels.begin(), kernels.end(), [&](const Kernel& k) { return k.name == name; });
  if (kernel == kernels.end()) throw std::invalid_argument(std::string("there is no kernel ") + name);
  if (bytes != sizeof(Decode)) throw std::invalid_argument("the kernel's parameters have another size");
  if (shared > kSharedFloats * sizeof(float)) throw std::invalid_argument("too much shared memory");
  if (!block) block = std::make_unique<Block>();
  gridDim.x = unsigned(blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = unsigned(i);
    block->run(*kernel, *static_cast<const Decode*>(parameters), shared);
  }
}

}  // namespace lightning

#endif
