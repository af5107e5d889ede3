// Which instruction sets this machine has, of those that the build could compile: it defines LIGHTNING_HAVE_... for each.
#include "../lightning.h"

namespace lightning {

namespace portable { extern const Kernels kernels; }
#ifdef LIGHTNING_HAVE_avx2
namespace avx2 { extern const Kernels kernels; }
#endif
#ifdef LIGHTNING_HAVE_avx512
namespace avx512 { extern const Kernels kernels; }
#endif
#ifdef LIGHTNING_HAVE_avx512_bf16
namespace avx512_bf16 { extern const Kernels kernels; }
#endif

namespace {

struct Found {
  const Kernels* tables[5] = {};
  Found() {
    const Kernels** next = tables;
#ifdef LIGHTNING_HAVE_avx2
    __builtin_cpu_init();
    // Every CPU with AVX2 has F16C, which older compilers cannot ask for.
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#ifdef LIGHTNING_HAVE_avx512
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#ifdef LIGHTNING_HAVE_avx512_bf16
    if (has_avx512 && __builtin_cpu_supports("avx512bf16")) *next++ = &avx512_bf16::kernels;
#endif
#ifdef LIGHTNING_HAVE_avx512
    if (has_avx512) *next++ = &avx512::kernels;
#endif
#ifdef LIGHTNING_HAVE_avx2
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
