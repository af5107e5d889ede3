// What every kernel of csrc/cuda stands on. It comes before each of them without being included, for NVRTC finds no
// files: nvcc gets it by -include, NVRTC in front of the source, and the emulator once.

typedef long long int64;
typedef float float32;

constexpr int kThreads = 256;  // of every block
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;  // threads of a warp

__device__ inline int lane() { return int(threadIdx.x % 32); }
__device__ inline int warp() { return int(threadIdx.x / 32); }

#ifdef __CUDACC__  // else the emulator says what these are
struct bfloat16 {
  unsigned short bits;
};
struct float16 {
  unsigned short bits;
};
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
__device__ inline float widen(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(float x, bfloat16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ inline void narrow(float x, float16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

// The kernel NAME, which runs a function of its parameters and of shared memory, taken for an array of SHARED. So many
// BLOCKS of it fit on a multiprocessor: that bounds its registers.
#define KERNEL(NAME, PARAMETERS, BLOCKS, SHARED, ...)                                                         \
  extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) NAME(const __grid_constant__ PARAMETERS p) { \
    extern __shared__ uint4 shared[];                                                                         \
    __VA_ARGS__(p, reinterpret_cast<SHARED*>(shared));                                                        \
  }
#endif
