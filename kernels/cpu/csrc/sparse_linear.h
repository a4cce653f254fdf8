// The inner loops of linear layers over sparse tiles: packed values are expanded in registers by their masks, then go the
// dense way. Sums are made in the order of the dense loops, so that a sparse weight gives the bits of the same weight dense.
#pragma once
#include <algorithm>

#include "int8_group.h"
#include "kernel_table.h"
#include "picks.h"
#include "simd.h"
#include "sparse_tile.h"

namespace PL_ISA_NS {

template <int R, int T>
PL_INLINE void sparse_int8(const pl_linear &l, const Input &x, int tile, int row, F (&sum)[R][T]) {
    const int groups = l.in_padded / PL_GROUP;
    SparseTile<uint8_t, uint64_t> weights[R];
    for (int r = 0; r < R; r++) weights[r] = {l, tile + r};
    for (int g = 0; g < groups; g++) {
        Int8Group<R, T> products;
        products.start(x, row, groups, g);
        for (int r = 0; r < R; r++) weights[r].begin_group();
        // Unrolled whole, so that nothing but the expansion is left per vector: what binds is the one port that moves a
        // mask (one operation) and expands by it (two).
#pragma GCC unroll 16
        for (int v = 0; v < PL_VECTORS; v++) {
            W4 vector[R];
            for (int r = 0; r < R; r++) {
                const uint64_t mask = weights[r].mask(v);
                if (v % 2 == 0) weights[r].fetch_ahead();
                vector[r] = expand_weights(weights[r].take(mask), mask);
            }
            const int8_t *inputs = x.int8 + (int64_t)row * l.in_padded + g * PL_GROUP + 4 * v;
            for (int t = 0; t < T; t++) {
                const int8_t *of_row = inputs + (int64_t)t * l.in_padded;
                if constexpr (R == 1) products.dot[0][t] = dot4(products.dot[0][t], vector[0], of_row);
                else products.multiply(t, vector, load_inputs(of_row));
            }
        }
        products.take_up(x, row, groups, g, sum);
    }
}

// Weights that come with the numbers of their inputs: inputs are picked, 64 by one operation, instead of weights expanded.
template <int T>
PL_INLINE void picked_int8(const pl_linear &l, const Input &x, int tile, int row, F (&sum)[1][T]) {
    const int groups = l.in_padded / PL_GROUP, vectors = l.picks / 4, numbered = std::min(vectors, kNumberedVectors);
    const int group_bytes = (vectors + numbered) * 64;
    const uint8_t *at = (const uint8_t *)l.data + l.tile_starts[tile];
    for (int g = 0; g < groups; g++, at += group_bytes) {
        X64 inputs[T];
        I dot[T], offset = set1i(0);
        for (int t = 0; t < T; t++) {
            inputs[t] = load_group(x.int8 + (int64_t)(row + t) * l.in_padded + g * PL_GROUP);
            dot[t] = set1i(0);
        }
        const auto multiply = [&](const Picks &weights) __attribute__((always_inline)) {
            offset = dot_offset(offset, weights);
            for (int t = 0; t < T; t++) dot[t] = dot_picked(dot[t], weights, inputs[t]);
        };
        for (int i = 0; i < group_bytes; i += 64) prefetch(at + kSparsePrefetchBytes + i);
        for (int v = 0; v < numbered; v++) multiply(load_picks(at + v * kPickedPair));
        if (vectors > numbered) multiply(load_fourth_picks(at));
        for (int t = 0; t < T; t++) {
            const F scale = set1(x.scales[(int64_t)(row + t) * groups + g]);
            sum[0][t] = fma(to_float(sub(dot[t], offset)), scale, sum[0][t]);
        }
    }
}

template <int T>
PL_INLINE void sparse_bf16(const pl_linear &l, const Input &x, int tile, int row, F (&sum)[1][T]) {
    SparseTile<uint16_t, uint32_t> weights(l, tile);
    for (int k = 0; k < l.in_padded; k += 2 * PL_VECTORS) {
        weights.begin_group();
        for (int v = 0; v < PL_VECTORS; v++) {
            const uint32_t mask = weights.mask(v);
            weights.fetch_ahead();
            const W2 pairs = expand_pairs(weights.take(mask), mask);
            for (int t = 0; t < T; t++) {
                const float *in = x.fp32 + (int64_t)(row + t) * l.in_padded + k + 2 * v;
                sum[0][t] = fma(second_of(pairs), set1(in[1]), fma(first_of(pairs), set1(in[0]), sum[0][t]));
            }
        }
    }
}

template <int T>
PL_INLINE void sparse_fp32(const pl_linear &l, const Input &x, int tile, int row, F (&sum)[1][T]) {
    SparseTile<float, uint16_t> weights(l, tile);
    for (int k = 0; k < l.in_padded; k += PL_VECTORS) {
        weights.begin_group();
        for (int v = 0; v < PL_VECTORS; v++) {
            const uint16_t mask = weights.mask(v);
            weights.fetch_ahead();
            const F vector = expand_fp32(weights.take(mask), mask);
            for (int t = 0; t < T; t++)
                sum[0][t] = fma(vector, set1(x.fp32[(int64_t)(row + t) * l.in_padded + k + v]), sum[0][t]);
        }
    }
}

template <int R, int T>
PL_INLINE void sums_sparse(const pl_linear &l, const Input &x, int tile, int row, F (&sum)[R][T]) {
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) sum[r][t] = set1(0.0f);
    if constexpr (R == 1)
        if (l.picks) return picked_int8<T>(l, x, tile, row, sum);
    if (kOnlyInt8 || l.format == PL_INT8) return sparse_int8<R, T>(l, x, tile, row, sum);
    if constexpr (R == 1 && !kOnlyInt8) {
        if (l.format == PL_BF16) sparse_bf16<T>(l, x, tile, row, sum);
        else sparse_fp32<T>(l, x, tile, row, sum);
    }
}

}  // namespace PL_ISA_NS
