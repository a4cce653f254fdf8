// Which instruction set this CPU runs, and the table that goes with it.
#include "isa.h"

#ifdef PL_HAVE_X86
static bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512vbmi2");
}
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

int32_t pl_best_isa(void) {
#ifdef PL_HAVE_X86
    if (has_avx512()) return PL_ISA_AVX512;
    if (has_avx2()) return PL_ISA_AVX2;
#endif
    return PL_ISA_PORTABLE;
}

const KernelTable *kernels_for(int32_t isa) {
    if (isa > pl_best_isa()) return nullptr;
#ifdef PL_HAVE_X86
    if (isa == PL_ISA_AVX512) return &kAvx512Kernels;
    if (isa == PL_ISA_AVX2) return &kAvx2Kernels;
#endif
    return isa == PL_ISA_PORTABLE ? &kPortableKernels : nullptr;
}
