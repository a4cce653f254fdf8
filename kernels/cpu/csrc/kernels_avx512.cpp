#define PL_USE_AVX512
#define PL_ISA_NS isa_avx512
namespace PL_ISA_NS {
static constexpr int kFewRows = 3, kManyRows = 6, kPrefetchBytes = 1024;  // fits 32 registers: 2 R T + R + 1
}
#include "kernels.h"

using namespace PL_ISA_NS;
extern const KernelTable kAvx512Kernels;
const KernelTable kAvx512Kernels = PL_TABLE;
