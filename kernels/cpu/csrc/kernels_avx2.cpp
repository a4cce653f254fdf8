#define PL_USE_AVX2
#define PL_ISA_NS isa_avx2
namespace PL_ISA_NS {
static constexpr int kFewRows = 1, kFewTiles = 2, kManyRows = 2, kPrefetchBytes = 1024, kPrefetchGroups = 4, kSparsePrefetchBytes = 512;  // 16 registers, two to a vector
}
#include "kernels.h"

using namespace PL_ISA_NS;
extern const KernelTable kAvx2Kernels;
const KernelTable kAvx2Kernels = PL_TABLE;
