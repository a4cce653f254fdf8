// int8 linears of CPUs with AMX: many rows on the matrix unit, few rows by VNNI with as many streams of weights as these
// CPUs like. The unit's sums are the same integers as those of VNNI, and all that follows is done in the same order, so a
// row has the same bits here as alone. Everything else is the AVX-512 table's.
#define PL_USE_AVX512
#define PL_ISA_NS isa_amx
namespace PL_ISA_NS {
static constexpr int kRowsOfFour = 6, kRowsOfTwo = 8, kSparseRowsOfTwo = 8, kManyRows = 8;
static constexpr int kPrefetchBytes = 1024, kPrefetchGroups = 2, kSparsePrefetchBytes = 4096, kDensePrefetchBytes = 4096;
static constexpr bool kOnlyInt8 = true;
}
#include "linear.h"
#include "matrix_unit.h"

namespace PL_ISA_NS {

static constexpr int kGroupBytes = PL_GROUP * PL_LANES, kMostRows = 16;
// From how many rows on the matrix unit is faster than VNNI, which takes up to eight rows with one pass over the weights:
// dense passes of so few rows wait for memory, and sparse ones for the expansion (figures: DESIGN.md, 2026-11-30). Picked
// weights are never expanded.
static constexpr int kFewestRows = 9;

// The groups of a dense tile, one after another.
class DenseGroups {
public:
    DenseGroups(const pl_linear &l, int tile) : at_((const uint8_t *)l.data + (int64_t)tile * l.in_padded * PL_LANES) {}
    PL_MEMBER const uint8_t *next() {
        const uint8_t *group = at_;
        for (int i = 0; i < kGroupBytes; i += 64) prefetch(group + kDensePrefetchBytes + i);
        at_ += kGroupBytes;
        return group;
    }

private:
    const uint8_t *at_;
};

// The groups of a sparse tile, expanded. Always one ahead: the matrix unit reads memory, and would wait for stores that
// were only just made.
class SparseGroups {
public:
    SparseGroups(const pl_linear &l, int tile) : tile_(l, tile), left_(l.in_padded / PL_GROUP) { expand(); }
    PL_MEMBER const uint8_t *next() {
        const uint8_t *group = expanded_[current_];
        current_ ^= 1;
        if (left_ > 0) expand();
        return group;
    }

private:
    PL_MEMBER void expand() {
        left_--;
        tile_.begin_group();
#pragma GCC unroll 16
        for (int v = 0; v < PL_VECTORS; v++) {
            const uint64_t mask = tile_.mask(v);
            if (v % 2 == 0) tile_.fetch_ahead();
            store_weights(expanded_[current_] + 64 * v, expand_weights(tile_.take(mask), mask));
        }
    }

    alignas(64) uint8_t expanded_[2][kGroupBytes];
    SparseTile<uint8_t, uint64_t> tile_;
    int left_, current_ = 0;
};

// T rows over one tile. A group's products are taken up while the unit makes the next one's.
template <int T, typename Groups>
PL_INLINE void sums(const pl_linear &l, const Input &x, const MatrixUnit &unit, int tile, int row, F (&sum)[T]) {
    const int groups = l.in_padded / PL_GROUP;
    alignas(64) int32_t products[2][T * PL_LANES];
    const auto take_up = [&](int g) {
        for (int t = 0; t < T; t++) {
            const int64_t at = (int64_t)(row + t) * groups + g;
            const I dot = add(load(products[g % 2] + t * PL_LANES), set1i(x.corrections[at]));
            sum[t] = fma(to_float(dot), set1(x.scales[at]), sum[t]);
        }
    };
    for (int t = 0; t < T; t++) sum[t] = set1(0.0f);
    Groups weights(l, tile);
    for (int g = 0; g < groups; g++) {
        const int8_t *inputs = x.int8 + (int64_t)row * l.in_padded + g * PL_GROUP;
        unit.multiply(inputs, l.in_padded, weights.next(), products[g % 2]);
        if (g > 0) take_up(g - 1);
    }
    take_up(groups - 1);
}

template <int T>
static void block(const pl_linear &l, const Input &x, const MatrixUnit &unit, const Output &out, int tile, int row) {
    const auto sums_of = [&](int at, F (&sum)[T]) {
        if (l.tile_starts) sums<T, SparseGroups>(l, x, unit, at, row, sum);
        else sums<T, DenseGroups>(l, x, unit, at, row, sum);
    };
    F sum[T];
    sums_of(tile, sum);
    if (out.mode != Output::kGated) {
        for (int t = 0; t < T; t++) finish(l, out, tile, row + t, sum[t]);
        return;
    }
    F up[T];
    sums_of(tile + 1, up);
    for (int t = 0; t < T; t++) finish_gated(l, out, tile, row + t, sum[t], up[t]);
}

using Block = void (*)(const pl_linear &, const Input &, const MatrixUnit &, const Output &, int tile, int row);
static constexpr int kFewestAtOnce = 8;  // of equal blocks of at most 16, if there are 9 rows or more
static constexpr Block kBlocks[] = {block<8>,  block<9>,  block<10>, block<11>, block<12>,
                                    block<13>, block<14>, block<15>, block<16>};

// `take` rows from `row` on, for all the tiles of a claim.
static void rows_of_claim(const pl_linear &l, const Input &x, const Output &out, int take, int row, int begin, int end) {
    const MatrixUnit unit(take);
    const int step = out.mode == Output::kGated ? 2 : 1;
    for (int tile = begin; tile < end; tile += step) kBlocks[take - kFewestAtOnce](l, x, unit, out, tile, row);
}

}  // namespace PL_ISA_NS

using namespace PL_ISA_NS;

void amx_linear_tiles(const pl_linear &l, const Input &x, const Output &out, int rows, int begin, int end, int next) {
    if (l.format != PL_INT8) return kAvx512Kernels.linear_tiles(l, x, out, rows, begin, end, next);
    if (rows < kFewestRows || l.picks) return linear_tiles(l, x, out, rows, begin, end, next);
    for (int row = 0; row < rows;) {
        const int left = rows - row, blocks = (left + kMostRows - 1) / kMostRows, take = (left + blocks - 1) / blocks;
        rows_of_claim(l, x, out, take, row, begin, end);
        row += take;
    }
}
