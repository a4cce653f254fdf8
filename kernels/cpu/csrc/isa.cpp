// Which instruction set this CPU runs, and the table that goes with it.
#include "isa.h"

#ifdef PL_HAVE_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

static bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// Linux keeps the tile registers, 8 kB of every thread's state, from processes that have not asked for them.
static bool allowed_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

static bool has_amx() {
    constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
    unsigned eax, ebx, ecx, edx;
    if (!has_avx512() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    return (edx & kTile) && (edx & kInt8) && allowed_amx();
}

static const KernelTable &amx_kernels() {
    static const KernelTable table = [] {
        KernelTable all = kAvx512Kernels;
        all.linear_tiles = amx_linear_tiles;
        return all;
    }();
    return table;
}
#endif

static int32_t find_best_isa() {
#ifdef PL_HAVE_X86
    if (has_amx()) return PL_ISA_AMX;
    if (has_avx512()) return PL_ISA_AVX512;
    if (has_avx2()) return PL_ISA_AVX2;
#endif
    return PL_ISA_PORTABLE;
}

int32_t pl_best_isa(void) {
    static const int32_t best = find_best_isa();
    return best;
}

const KernelTable *kernels_for(int32_t isa) {
    if (isa > pl_best_isa()) return nullptr;
#ifdef PL_HAVE_X86
    if (isa == PL_ISA_AMX) return &amx_kernels();
    if (isa == PL_ISA_AVX512) return &kAvx512Kernels;
    if (isa == PL_ISA_AVX2) return &kAvx2Kernels;
#endif
    return isa == PL_ISA_PORTABLE ? &kPortableKernels : nullptr;
}
