// The inner loops of linear layers over sparse tiles: packed values are expanded in registers by their masks, then go the
// dense way. Sums are made in the order of the dense loops, so that a sparse weight gives the bits of the same weight dense.
#pragma once
#include "kernel_table.h"
#include "simd.h"

namespace PL_ISA_NS {

// The stream of one sparse tile, group by group: the masks, then the values of their bits. Mask: one bit per value of a
// vector of 64 bytes.
template <typename Value, typename Mask>
class SparseTile {
public:
    PL_MEMBER void open(const pl_linear &l, int tile) { at_ = (const uint8_t *)l.data + l.tile_starts[tile]; }
    PL_MEMBER void begin_group() {
        masks_ = at_;
        at_ += PL_VECTORS * sizeof(Mask);
    }
    PL_MEMBER Mask mask(int vector) const {
        Mask bits;
        std::memcpy(&bits, masks_ + vector * sizeof(Mask), sizeof(Mask));
        return bits;
    }
    PL_MEMBER const Value *take(Mask bits) {
        const Value *values = (const Value *)at_;
        at_ += __builtin_popcountll(bits) * sizeof(Value);
        prefetch(at_ + kSparsePrefetchBytes);
        return values;
    }

private:
    const uint8_t *at_, *masks_;
};

template <int R, int T>
PL_INLINE void clear(F (&sum)[R][T]) {
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) sum[r][t] = set1(0.0f);
}

template <int R, int T>
PL_INLINE void sparse_int8(const pl_linear &l, const Input &x, int tile, int row, F (&sum)[R][T]) {
    const int groups = l.in_padded / PL_GROUP;
    SparseTile<uint8_t, uint64_t> tiles[R];
    for (int r = 0; r < R; r++) tiles[r].open(l, tile + r);
    for (int g = 0; g < groups; g++) {
        I dot[R][T];
        for (int t = 0; t < T; t++) {
            const I start = set1i(x.corrections[(int64_t)(row + t) * groups + g]);
            for (int r = 0; r < R; r++) dot[r][t] = start;
        }
        for (int r = 0; r < R; r++) tiles[r].begin_group();
#pragma GCC unroll 4
        for (int v = 0; v < PL_VECTORS; v++) {
            W4 weights[R];
            for (int r = 0; r < R; r++) {
                const uint64_t mask = tiles[r].mask(v);
                weights[r] = expand_weights(tiles[r].take(mask), mask);
            }
            for (int t = 0; t < T; t++) {
                const X4 inputs = load_inputs(x.int8 + (int64_t)(row + t) * l.in_padded + g * PL_GROUP + 4 * v);
                for (int r = 0; r < R; r++) dot[r][t] = dot4(dot[r][t], weights[r], inputs);
            }
        }
        for (int t = 0; t < T; t++) {
            const F scale = set1(x.scales[(int64_t)(row + t) * groups + g]);
            for (int r = 0; r < R; r++) sum[r][t] = fma(to_float(dot[r][t]), scale, sum[r][t]);
        }
    }
}

template <int R, int T>
PL_INLINE void sparse_bf16(const pl_linear &l, const Input &x, int tile, int row, F (&sum)[R][T]) {
    SparseTile<uint16_t, uint32_t> tiles[R];
    for (int r = 0; r < R; r++) tiles[r].open(l, tile + r);
    for (int k = 0; k < l.in_padded; k += 2 * PL_VECTORS) {
        for (int r = 0; r < R; r++) tiles[r].begin_group();
        for (int v = 0; v < PL_VECTORS; v++) {
            W2 weights[R];
            for (int r = 0; r < R; r++) {
                const uint32_t mask = tiles[r].mask(v);
                weights[r] = expand_pairs(tiles[r].take(mask), mask);
            }
            for (int t = 0; t < T; t++) {
                const float *in = x.fp32 + (int64_t)(row + t) * l.in_padded + k + 2 * v;
                const F first = set1(in[0]), second = set1(in[1]);
                for (int r = 0; r < R; r++)
                    sum[r][t] = fma(second_of(weights[r]), second, fma(first_of(weights[r]), first, sum[r][t]));
            }
        }
    }
}

template <int R, int T>
PL_INLINE void sparse_fp32(const pl_linear &l, const Input &x, int tile, int row, F (&sum)[R][T]) {
    SparseTile<float, uint16_t> tiles[R];
    for (int r = 0; r < R; r++) tiles[r].open(l, tile + r);
    for (int k = 0; k < l.in_padded; k += PL_VECTORS) {
        for (int r = 0; r < R; r++) tiles[r].begin_group();
        for (int v = 0; v < PL_VECTORS; v++) {
            F weights[R];
            for (int r = 0; r < R; r++) {
                const uint16_t mask = tiles[r].mask(v);
                weights[r] = expand_fp32(tiles[r].take(mask), mask);
            }
            for (int t = 0; t < T; t++) {
                const F in = set1(x.fp32[(int64_t)(row + t) * l.in_padded + k + v]);
                for (int r = 0; r < R; r++) sum[r][t] = fma(weights[r], in, sum[r][t]);
            }
        }
    }
}

template <int R, int T>
PL_INLINE void sums_sparse(const pl_linear &l, const Input &x, int tile, int row, F (&sum)[R][T]) {
    clear(sum);
    if (l.format == PL_INT8) sparse_int8<R, T>(l, x, tile, row, sum);
    else if (l.format == PL_BF16) sparse_bf16<R, T>(l, x, tile, row, sum);
    else sparse_fp32<R, T>(l, x, tile, row, sum);
}

}  // namespace PL_ISA_NS
