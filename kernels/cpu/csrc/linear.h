// Linear layers over packed tiles, dense here and sparse in sparse_linear.h. A row's result is accumulated in one order (inputs ascending;
// int8: exact integer sums per group of 64 inputs, groups ascending), whatever rows and tiles share the call.
#pragma once
#include "int8_group.h"
#include "kernel_table.h"
#include "outputs.h"
#include "simd.h"
#include "sparse_linear.h"
#include "tiles.h"

namespace PL_ISA_NS {

template <int R, int T>
PL_INLINE void sums_int8(const pl_linear &l, const Input &x, int tile, int next, int row, F (&sum)[R][T]) {
    const int groups = l.in_padded / PL_GROUP;
    const int64_t tile_bytes = (int64_t)l.in_padded * PL_LANES;
    const uint8_t *w = (const uint8_t *)l.data + tile * tile_bytes;
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) sum[r][t] = set1(0.0f);
    for (int g = 0; g < groups; g++) {
        Int8Group<R, T> products;
        products.start(x, row, groups, g);
        // The streams go on kAhead groups ahead, one alone further than several; past their tiles' end, in `next`'s.
        constexpr int kAhead = R == 1 ? 2 * kPrefetchGroups : kPrefetchGroups;
        const int64_t ahead = (int64_t)kAhead * PL_GROUP * PL_LANES +
                              (g + kAhead < groups ? 0 : (next - tile - 1) * tile_bytes);
#pragma GCC unroll 4
        for (int k = 0; k < PL_GROUP; k += 4) {
            const uint8_t *at = w + ((int64_t)g * PL_GROUP + k) * PL_LANES;
            W4 weights[R];
            for (int r = 0; r < R; r++) {
                weights[r] = load_weights(at + r * tile_bytes);
                prefetch(at + r * tile_bytes + ahead);
            }
            const int8_t *inputs = x.int8 + (int64_t)row * l.in_padded + g * PL_GROUP + k;
            for (int t = 0; t < T; t++) products.multiply(t, weights, load_inputs(inputs + (int64_t)t * l.in_padded));
        }
        products.take_up(x, row, groups, g, sum);
    }
}

template <int R, int T>
PL_INLINE void sums_bf16(const pl_linear &l, const Input &x, int tile, int row, F (&sum)[R][T]) {
    const int64_t tile_size = (int64_t)l.in_padded * PL_LANES;
    const uint16_t *w = (const uint16_t *)l.data + tile * tile_size;
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) sum[r][t] = set1(0.0f);
    for (int k = 0; k < l.in_padded; k += 2) {
        W2 weights[R];
        for (int r = 0; r < R; r++) {
            const uint16_t *at = w + r * tile_size + (int64_t)k * PL_LANES;
            weights[r] = load_pairs(at);
            prefetch((const uint8_t *)at + kPrefetchBytes);
        }
        for (int t = 0; t < T; t++) {
            const float *in = x.fp32 + (int64_t)(row + t) * l.in_padded + k;
            F first = set1(in[0]), second = set1(in[1]);
            for (int r = 0; r < R; r++)
                sum[r][t] = fma(second_of(weights[r]), second, fma(first_of(weights[r]), first, sum[r][t]));
        }
    }
}

template <int R, int T>
PL_INLINE void sums_fp32(const pl_linear &l, const Input &x, int tile, int row, F (&sum)[R][T]) {
    const int64_t tile_size = (int64_t)l.in_padded * PL_LANES;
    const float *w = (const float *)l.data + tile * tile_size;
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) sum[r][t] = set1(0.0f);
    for (int k = 0; k < l.in_padded; k++) {
        F weights[R];
        for (int r = 0; r < R; r++) {
            weights[r] = load(w + r * tile_size + (int64_t)k * PL_LANES);
            prefetch((const uint8_t *)(w + r * tile_size + (int64_t)k * PL_LANES) + kPrefetchBytes);
        }
        for (int t = 0; t < T; t++) {
            F in = set1(x.fp32[(int64_t)(row + t) * l.in_padded + k]);
            for (int r = 0; r < R; r++) sum[r][t] = fma(weights[r], in, sum[r][t]);
        }
    }
}

template <int R, int T>
PL_INLINE void sums_any(const pl_linear &l, const Input &x, int tile, int next, int row, F (&sum)[R][T]) {
    if constexpr (R <= 2)
        if (l.tile_starts) return sums_sparse<R, T>(l, x, tile, row, sum);
    if (kOnlyInt8 || l.format == PL_INT8) return sums_int8<R, T>(l, x, tile, next, row, sum);
    if constexpr (!kOnlyInt8) {
        if (l.format == PL_BF16) sums_bf16<R, T>(l, x, tile, row, sum);
        else sums_fp32<R, T>(l, x, tile, row, sum);
    }
}

// T rows of R tiles; gated layers take tiles in pairs, so R tiles of them are R / 2 (at least one) pairs. `next`: the tile
// whose weights will be read after these.
template <int R, int T>
static void tiles(const pl_linear &l, const Input &x, const Output &out, int tile, int next, int row) {
    F sum[R][T];
    sums_any<R, T>(l, x, tile, R == 1 && out.mode == Output::kGated ? tile + 1 : next, row, sum);
    if (out.mode != Output::kGated) {
        for (int t = 0; t < T; t++)
            for (int r = 0; r < R; r++) finish(l, out, tile + r, row + t, sum[r][t]);
    } else if constexpr (R > 1) {
        for (int t = 0; t < T; t++)
            for (int r = 0; r < R; r += 2) finish_gated(l, out, tile + r, row + t, sum[r][t], sum[r + 1][t]);
    } else {
        F up[R][T];
        sums_any<R, T>(l, x, tile + 1, next, row, up);
        for (int t = 0; t < T; t++) finish_gated(l, out, tile, row + t, sum[0][t], up[0][t]);
    }
}

// All rows for R tiles: the weights come from memory once and from cache for the later row blocks.
template <int R, int MaxT>
static void rows_of_tiles(const pl_linear &l, const Input &x, const Output &out, int tile, int next, int rows) {
    for (int row = 0; row < rows;) {
        const int left = rows - row, blocks = (left + MaxT - 1) / MaxT, take = (left + blocks - 1) / blocks;
        if constexpr (MaxT >= 8) if (take == 8) tiles<R, 8>(l, x, out, tile, next, row);
        if constexpr (MaxT >= 7) if (take == 7) tiles<R, 7>(l, x, out, tile, next, row);
        if constexpr (MaxT >= 6) if (take == 6) tiles<R, 6>(l, x, out, tile, next, row);
        if constexpr (MaxT >= 5) if (take == 5) tiles<R, 5>(l, x, out, tile, next, row);
        if constexpr (MaxT >= 4) if (take == 4) tiles<R, 4>(l, x, out, tile, next, row);
        if constexpr (MaxT >= 3) if (take == 3) tiles<R, 3>(l, x, out, tile, next, row);
        if constexpr (MaxT >= 2) if (take == 2) tiles<R, 2>(l, x, out, tile, next, row);
        if (take == 1) tiles<R, 1>(l, x, out, tile, next, row);
        row += take;
    }
}

template <int R, int MaxT>
PL_INLINE void runs_of_tiles(const pl_linear &l, const Input &x, const Output &out, int rows, int step, int &tile, int end,
                             int next) {
    for (; tile + step <= end; tile += step)
        rows_of_tiles<R, MaxT>(l, x, out, tile, tile + step < end ? tile + step : next, rows);
}

// Whether a sparse layer takes less than half of its dense bytes.
PL_INLINE bool is_thin(const pl_linear &l) { return 2 * weight_bytes(l) < pl_packed_bytes(l.format, l.out, l.in); }

// Several tiles at once are several streams of weights, with fewer registers left for rows: up to kRowsOfFour rows take four
// tiles, up to kRowsOfTwo two, the rest one.
PL_INLINE void dense_tiles(const pl_linear &l, const Input &x, const Output &out, int rows, int pair, int begin, int end,
                           int next) {
    int tile = begin;
    if constexpr (kRowsOfFour > 0)
        if (rows <= kRowsOfFour) runs_of_tiles<4, kRowsOfFour>(l, x, out, rows, 4, tile, end, next);
    if (rows <= kRowsOfTwo) runs_of_tiles<2, kRowsOfTwo>(l, x, out, rows, 2, tile, end, next);
    runs_of_tiles<1, kManyRows>(l, x, out, rows, pair, tile, end, next);
}

// Up to kSparseRowsOfTwo rows take two tiles; one row only where little is left of the weights, as otherwise what it waits
// for is their memory, and one stream of that is enough. Picked weights always wait for it.
PL_INLINE void sparse_tiles(const pl_linear &l, const Input &x, const Output &out, int rows, int pair, int &tile, int end) {
    if constexpr (kSparseRowsOfTwo > 0)
        if (!l.picks && rows <= kSparseRowsOfTwo && (rows > 1 || is_thin(l)))
            runs_of_tiles<2, kSparseRowsOfTwo>(l, x, out, rows, 2, tile, end, end);
    runs_of_tiles<1, kManyRows>(l, x, out, rows, pair, tile, end, end);
}

static void linear_tiles(const pl_linear &l, const Input &x, const Output &out, int rows, int begin, int end, int next) {
    const int pair = out.mode == Output::kGated ? 2 : 1;
    if (!l.tile_starts) return dense_tiles(l, x, out, rows, pair, begin, end, next);
    // The memory behind a claim's last tiles need not be the next claim's.
    int tile = begin;
    sparse_tiles(l, x, out, rows, pair, tile, end - 2);
    fetch_start(l, next);
    sparse_tiles(l, x, out, rows, pair, tile, end);
}

}  // namespace PL_ISA_NS
