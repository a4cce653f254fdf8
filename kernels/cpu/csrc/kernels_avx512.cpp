#define PL_USE_AVX512
#define PL_ISA_NS isa_avx512
namespace PL_ISA_NS {
static constexpr int kFewRows = 1, kFewTiles = 4, kManyRows = 8, kPrefetchBytes = 1024, kPrefetchGroups = 2, kSparsePrefetchBytes = 4096;  // 2 R T + R + 1 of 32 registers
}
#include "kernels.h"

using namespace PL_ISA_NS;
extern const KernelTable kAvx512Kernels;
const KernelTable kAvx512Kernels = PL_TABLE;
