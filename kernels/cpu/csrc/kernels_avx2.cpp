#define PL_USE_AVX2
#define PL_ISA_NS isa_avx2
namespace PL_ISA_NS {
static constexpr int kRowsOfFour = 0, kRowsOfTwo = 1, kSparseRowsOfTwo = 0, kManyRows = 2;  // 16 registers, two to a vector
static constexpr int kPrefetchBytes = 1024, kPrefetchGroups = 4, kSparsePrefetchBytes = 512;
static constexpr bool kOnlyInt8 = false;
}
#include "kernels.h"

using namespace PL_ISA_NS;
extern const KernelTable kAvx2Kernels;
const KernelTable kAvx2Kernels = PL_TABLE;
