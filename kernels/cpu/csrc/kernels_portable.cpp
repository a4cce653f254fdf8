// neither: plain loops
#define PL_ISA_NS isa_portable
namespace PL_ISA_NS {
static constexpr int kFewRows = 1, kFewTiles = 2, kManyRows = 2, kPrefetchBytes = 0, kPrefetchGroups = 0, kSparsePrefetchBytes = 0;
}
#include "kernels.h"

using namespace PL_ISA_NS;
extern const KernelTable kPortableKernels;
const KernelTable kPortableKernels = PL_TABLE;
