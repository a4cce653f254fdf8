// neither: plain loops
#define PL_ISA_NS isa_portable
namespace PL_ISA_NS {
static constexpr int kRowsOfFour = 0, kRowsOfTwo = 1, kSparseRowsOfTwo = 0, kManyRows = 2;
static constexpr int kPrefetchBytes = 0, kPrefetchGroups = 0, kSparsePrefetchBytes = 0;
static constexpr bool kOnlyInt8 = false;
}
#include "kernels.h"

using namespace PL_ISA_NS;
extern const KernelTable kPortableKernels;
const KernelTable kPortableKernels = PL_TABLE;
