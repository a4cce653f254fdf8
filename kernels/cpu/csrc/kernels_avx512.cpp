#define PL_USE_AVX512
#define PL_ISA_NS isa_avx512
namespace PL_ISA_NS {
// Zen 4: a second stream of weights costs several rows more than it gains (DESIGN.md, 2026-11-24).
static constexpr int kRowsOfFour = 1, kRowsOfTwo = 1, kSparseRowsOfTwo = 0, kManyRows = 8;
static constexpr int kPrefetchBytes = 1024, kPrefetchGroups = 2, kSparsePrefetchBytes = 4096;
static constexpr bool kOnlyInt8 = false;
}
#include "kernels.h"

using namespace PL_ISA_NS;
extern const KernelTable kAvx512Kernels;
const KernelTable kAvx512Kernels = PL_TABLE;
