// Linear layers over packed tiles, all weight formats. A row's result is accumulated in one order (inputs ascending;
// int8: exact integer sums per group of 64 inputs, groups ascending), whatever rows and tiles share the call.
#pragma once
#include "kernel_table.h"
#include "simd.h"

namespace PL_ISA_NS {

// What becomes of 16 outputs of one row: stored, added to what is there, or (gate and up tiles) gated.
PL_INLINE void finish(const pl_linear &l, const Output &out, int tile, int row, F value) {
    if (l.format == PL_INT8) value = mul(value, load(l.scale + tile * PL_LANES));
    if (l.bias) value = add(value, load(l.bias + tile * PL_LANES));
    int column = tile * PL_LANES, width = l.out - column;
    float *y = out.data + (int64_t)row * out.stride + column;
    if (width >= PL_LANES) {
        store(y, out.mode == Output::kAdd ? add(load(y), value) : value);
        return;
    }
    float lanes[PL_LANES];
    store(lanes, value);
    for (int i = 0; i < width; i++) y[i] = out.mode == Output::kAdd ? y[i] + lanes[i] : lanes[i];
}

PL_INLINE F silu(F x) { return div(x, add(set1(1.0f), exp(sub(set1(0.0f), x)))); }

// Tiles come in pairs (gate, up); writes silu(gate) * up, PL_LANES wide.
PL_INLINE void finish_gated(const pl_linear &l, const Output &out, int tile, int row, F gate, F up) {
    if (l.format == PL_INT8) {
        gate = mul(gate, load(l.scale + tile * PL_LANES));
        up = mul(up, load(l.scale + (tile + 1) * PL_LANES));
    }
    if (l.bias) {
        gate = add(gate, load(l.bias + tile * PL_LANES));
        up = add(up, load(l.bias + (tile + 1) * PL_LANES));
    }
    store(out.data + (int64_t)row * out.stride + tile / 2 * PL_LANES, mul(silu(gate), up));
}

template <int R, int T>
PL_INLINE void finish_all(const pl_linear &l, const Output &out, int tile, int row, const F (&sum)[R][T]) {
    for (int t = 0; t < T; t++) {
        if (out.mode == Output::kGated)
            for (int r = 0; r + 1 < R; r += 2) finish_gated(l, out, tile + r, row + t, sum[r][t], sum[r + 1][t]);
        else
            for (int r = 0; r < R; r++) finish(l, out, tile + r, row + t, sum[r][t]);
    }
}

template <int R, int T>
static void tiles_int8(const pl_linear &l, const Input &x, const Output &out, int tile, int row) {
    const int groups = l.in_padded / PL_GROUP;
    const int64_t tile_bytes = (int64_t)l.in_padded * PL_LANES;
    const uint8_t *w = (const uint8_t *)l.data + tile * tile_bytes;
    F sum[R][T];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) sum[r][t] = set1(0.0f);
    for (int g = 0; g < groups; g++) {
        I dot[R][T];
        for (int t = 0; t < T; t++) {
            I start = set1i(x.corrections[(int64_t)(row + t) * groups + g]);
            for (int r = 0; r < R; r++) dot[r][t] = start;
        }
        for (int k = 0; k < PL_GROUP; k += 4) {
            const uint8_t *at = w + ((int64_t)g * PL_GROUP + k) * PL_LANES;
            W4 weights[R];
            for (int r = 0; r < R; r++) {
                weights[r] = load_weights(at + r * tile_bytes);
                prefetch(at + r * tile_bytes + kPrefetchBytes);
            }
            for (int t = 0; t < T; t++) {
                X4 inputs = load_inputs(x.int8 + (int64_t)(row + t) * l.in_padded + g * PL_GROUP + k);
                for (int r = 0; r < R; r++) dot[r][t] = dot4(dot[r][t], weights[r], inputs);
            }
        }
        for (int t = 0; t < T; t++) {
            F scale = set1(x.scales[(int64_t)(row + t) * groups + g]);
            for (int r = 0; r < R; r++) sum[r][t] = fma(to_float(dot[r][t]), scale, sum[r][t]);
        }
    }
    finish_all<R, T>(l, out, tile, row, sum);
}

template <int R, int T>
static void tiles_bf16(const pl_linear &l, const Input &x, const Output &out, int tile, int row) {
    const int64_t tile_size = (int64_t)l.in_padded * PL_LANES;
    const uint16_t *w = (const uint16_t *)l.data + tile * tile_size;
    F sum[R][T];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) sum[r][t] = set1(0.0f);
    for (int k = 0; k < l.in_padded; k += 2) {
        F even[R], odd[R];
        for (int r = 0; r < R; r++) {
            const uint16_t *at = w + r * tile_size + (int64_t)k * PL_LANES;
            even[r] = even_bf16(at);
            odd[r] = odd_bf16(at);
            prefetch((const uint8_t *)at + kPrefetchBytes);
        }
        for (int t = 0; t < T; t++) {
            const float *in = x.fp32 + (int64_t)(row + t) * l.in_padded + k;
            F first = set1(in[0]), second = set1(in[1]);
            for (int r = 0; r < R; r++) sum[r][t] = fma(odd[r], second, fma(even[r], first, sum[r][t]));
        }
    }
    finish_all<R, T>(l, out, tile, row, sum);
}

template <int R, int T>
static void tiles_fp32(const pl_linear &l, const Input &x, const Output &out, int tile, int row) {
    const int64_t tile_size = (int64_t)l.in_padded * PL_LANES;
    const float *w = (const float *)l.data + tile * tile_size;
    F sum[R][T];
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
    finish_all<R, T>(l, out, tile, row, sum);
}

template <int R, int T>
PL_INLINE void tiles_any(const pl_linear &l, const Input &x, const Output &out, int tile, int row) {
    if (l.format == PL_INT8) tiles_int8<R, T>(l, x, out, tile, row);
    else if (l.format == PL_BF16) tiles_bf16<R, T>(l, x, out, tile, row);
    else tiles_fp32<R, T>(l, x, out, tile, row);
}

// All rows for R tiles: the weights come from memory once and from cache for the later row blocks.
template <int R, int MaxT>
static void rows_of_tiles(const pl_linear &l, const Input &x, const Output &out, int tile, int rows) {
    int row = 0;
    while (row < rows) {
        int left = rows - row, blocks = (left + MaxT - 1) / MaxT, take = (left + blocks - 1) / blocks;
        if constexpr (MaxT >= 6) if (take == 6) tiles_any<R, 6>(l, x, out, tile, row);
        if constexpr (MaxT >= 5) if (take == 5) tiles_any<R, 5>(l, x, out, tile, row);
        if constexpr (MaxT >= 4) if (take == 4) tiles_any<R, 4>(l, x, out, tile, row);
        if constexpr (MaxT >= 3) if (take == 3) tiles_any<R, 3>(l, x, out, tile, row);
        if (take == 2) tiles_any<R, 2>(l, x, out, tile, row);
        if (take == 1) tiles_any<R, 1>(l, x, out, tile, row);
        row += take;
    }
}

static void linear_tiles(const pl_linear &l, const Input &x, const Output &out, int rows, int begin, int end) {
    int tile = begin;
    if (rows <= kFewRows)
        for (; tile + 4 <= end; tile += 4) rows_of_tiles<4, kFewRows>(l, x, out, tile, rows);
    for (; tile + 2 <= end; tile += 2) rows_of_tiles<2, kManyRows>(l, x, out, tile, rows);
    for (; tile < end; tile++) rows_of_tiles<1, kManyRows>(l, x, out, tile, rows);
}

}  // namespace PL_ISA_NS
