// Which instruction sets this machine has. The build defines LIGHTNING_X86 when it compiled the x86 ones.
#include "../lightning.h"

namespace lightning {

namespace portable { extern const Kernels kernels; }
#ifdef LIGHTNING_X86
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }
#endif

namespace {

struct Found {
  const Kernels* tables[5] = {};
  Found() {
    const Kernels** next = tables;
#ifdef LIGHTNING_X86
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && __builtin_cpu_supports("avx512bf16")) *next++ = &avx512_bf16::kernels;
    if (has_avx512) *next++ = &avx512::kernels;
    if (has_avx2) *next++ = &avx2::kernels;
#endif
    *next = &portable::kernels;
  }
};

}  // namespace

const Kernels* const* available_kernels() {
  static const Found found;
  return found.tables;
}

}  // namespace lightning
