// Paged attention. K and V are read back from the cache for every row, prefill included; reductions run over fixed
// tiles of 16 absolute positions in ascending order, so a row's result is the same in any batch and any chunking.
#pragma once
#include "kernel_table.h"
#include "reduce.h"

namespace PL_ISA_NS {

PL_INLINE const uint8_t *block_of(const KvLayer &kv, const int32_t *table, int position) {
    return kv.blocks + table[position / kv.block_tokens] * kv.block_bytes;
}

static void store_kv(const KvLayer &kv, const int32_t *table, int position, int kv_head, const float *k, const float *v) {
    uint8_t *block = const_cast<uint8_t *>(block_of(kv, table, position));
    const int at = position % kv.block_tokens, dim = kv.head_dim;
    const int64_t head = (int64_t)kv_head * kv.block_tokens * dim;
    const int64_t k_at = head + (int64_t)(at / PL_LANES) * dim * PL_LANES + at % PL_LANES, v_at = head + (int64_t)at * dim;
    if (kv.kv_format == PL_FP32) {
        float *ks = (float *)(block + kv.k_offset) + k_at, *vs = (float *)(block + kv.v_offset) + v_at;
        for (int d = 0; d < dim; d++) ks[(int64_t)d * PL_LANES] = k[d];
        for (int d = 0; d < dim; d++) vs[d] = v[d];
        return;
    }
    uint16_t *ks = (uint16_t *)(block + kv.k_offset) + k_at, *vs = (uint16_t *)(block + kv.v_offset) + v_at;
    for (int d = 0; d < dim; d += 16) {
        float lanes[16] = {};
        uint16_t half[16];
        const int width = dim - d < 16 ? dim - d : 16;
        std::memcpy(lanes, k + d, width * sizeof(float));
        store_bf16(half, load(lanes));
        for (int i = 0; i < width; i++) ks[(int64_t)(d + i) * PL_LANES] = half[i];
        std::memcpy(lanes, v + d, width * sizeof(float));
        store_bf16(half, load(lanes));
        std::memcpy(vs + d, half, width * sizeof(uint16_t));
    }
}

PL_INLINE F load_kv(const float *p) { return load(p); }
PL_INLINE F load_kv(const uint16_t *p) { return load_bf16(p); }
PL_INLINE float widen(float x) { return x; }
PL_INLINE float widen(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Asks memory for the K and V of a tile of 16 positions: blocks lie anywhere, and the hardware cannot guess where.
template <typename T>
PL_INLINE void fetch_tile(const KvLayer &kv, const Queries &in, int tile) {
    const int position = tile * PL_LANES;
    const int64_t bytes = (int64_t)kv.head_dim * sizeof(T);  // per position
    const int64_t at = ((int64_t)in.kv_head * kv.block_tokens + position % kv.block_tokens) * bytes;
    const uint8_t *block = block_of(kv, in.table, position) + at;
    for (int64_t i = 0; i < PL_LANES * bytes; i += 64) prefetch(block + kv.k_offset + i), prefetch(block + kv.v_offset + i);
}

// scores[r][position] for one tile of 16 positions, masked to what row r sees.
template <typename T, int R>
PL_INLINE void score_tile(const KvLayer &kv, const Queries &in, int tile, float *const (&scores)[R]) {
    const int position = tile * PL_LANES, dim = kv.head_dim;
    const T *k = (const T *)(block_of(kv, in.table, position) + kv.k_offset) + (int64_t)in.kv_head * kv.block_tokens * dim +
                 (int64_t)(position % kv.block_tokens) * dim;
    F sum[R];
    for (int r = 0; r < R; r++) sum[r] = set1(0.0f);
    for (int d = 0; d < dim; d++) {
        F keys = load_kv(k + (int64_t)d * PL_LANES);
        for (int r = 0; r < R; r++) sum[r] = fma(keys, set1(in.q[r][d]), sum[r]);
    }
    for (int r = 0; r < R; r++) {
        store(scores[r] + position, mul(sum[r], set1(in.scale)));
        const int last = in.position[r], first = in.window ? last - in.window + 1 : 0;
        if (position + PL_LANES - 1 > last || position < first)
            for (int i = 0; i < PL_LANES; i++)
                if (position + i > last || position + i < first) scores[r][position + i] = -INFINITY;
    }
}

// out[r][d .. d + 16 * W) = sum over positions of probability * V.
template <typename T, int R, int W>
PL_INLINE void weigh_values(const KvLayer &kv, const Queries &in, int first, int end, float *const (&probs)[R], int d) {
    const int dim = kv.head_dim;
    const int64_t head = (int64_t)in.kv_head * kv.block_tokens * dim;
    F sum[R][W];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) sum[r][w] = set1(0.0f);
    for (int p = first; p < end;) {
        const T *v = (const T *)(block_of(kv, in.table, p) + kv.v_offset) + head + (int64_t)(p % kv.block_tokens) * dim + d;
        const int stop = p + kv.block_tokens - p % kv.block_tokens < end ? p + kv.block_tokens - p % kv.block_tokens : end;
        for (; p < stop; p++, v += dim) {
            F values[W];
            for (int w = 0; w < W; w++) values[w] = load_kv(v + 16 * w);
            for (int r = 0; r < R; r++) {
                F weight = set1(probs[r][p]);
                for (int w = 0; w < W; w++) sum[r][w] = fma(values[w], weight, sum[r][w]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) store(in.out[r] + d + 16 * w, sum[r][w]);
}

// The same for the heads narrower than a vector, dimension by dimension.
template <typename T, int R>
static void weigh_narrow(const KvLayer &kv, const Queries &in, int first, int end, float *const (&probs)[R]) {
    for (int r = 0; r < R; r++)
        for (int d = 0; d < kv.head_dim; d++) in.out[r][d] = 0.0f;
    for (int p = first; p < end; p++) {
        const T *v = (const T *)(block_of(kv, in.table, p) + kv.v_offset) +
                     ((int64_t)in.kv_head * kv.block_tokens + p % kv.block_tokens) * kv.head_dim;
        for (int r = 0; r < R; r++)
            for (int d = 0; d < kv.head_dim; d++) in.out[r][d] += probs[r][p] * widen(v[d]);
    }
}

template <typename T, int R>
static void attend_rows(const KvLayer &kv, const Queries &in, float *scratch) {
    const int last = in.position[R - 1], tiles = last / PL_LANES + 1;
    const int lowest = in.window && in.position[0] >= in.window ? in.position[0] - in.window + 1 : 0;
    const int first_tile = lowest / PL_LANES;
    float *scores[R];
    for (int r = 0; r < R; r++) scores[r] = scratch + (int64_t)r * tiles * PL_LANES;
    for (int t = first_tile; t < tiles; t++) {
        if (t + 1 < tiles) fetch_tile<T>(kv, in, t + 1);
        score_tile<T, R>(kv, in, t, scores);
    }
    for (int r = 0; r < R; r++) {
        F peak = set1(-INFINITY), total = set1(0.0f);
        for (int t = first_tile; t < tiles; t++) peak = max(peak, load(scores[r] + t * PL_LANES));
        const F top = set1(reduce_max(peak));
        for (int t = first_tile; t < tiles; t++) {
            F weight = exp(sub(load(scores[r] + t * PL_LANES), top));
            store(scores[r] + t * PL_LANES, weight);
            total = add(total, weight);
        }
        const F inverse = set1(1.0f / reduce_add(total));
        for (int t = first_tile; t < tiles; t++)
            store(scores[r] + t * PL_LANES, mul(load(scores[r] + t * PL_LANES), inverse));
    }
    // Positions after a row's own have weight zero; adding zeros changes nothing, so rows may share the loop.
    const int first = first_tile * PL_LANES, end = last + 1, dim = kv.head_dim;
    if (dim < 16) return weigh_narrow<T, R>(kv, in, first, end, scores);
    int d = 0;
    constexpr int kWide = R > 4 ? 2 : 4;  // vectors at once, so that R sums of each fit into registers
    for (; d + 16 * kWide <= dim; d += 16 * kWide) weigh_values<T, R, kWide>(kv, in, first, end, scores, d);
    for (; d + 16 <= dim; d += 16) weigh_values<T, R, 1>(kv, in, first, end, scores, d);
    // A rest is covered by a last vector that ends with the head and computes some dimensions again, equally.
    if (d < dim) weigh_values<T, R, 1>(kv, in, first, end, scores, dim - 16);
}

template <typename T>
PL_INLINE void attend_any(const KvLayer &kv, const Queries &in, float *scratch) {
    static constexpr void (*kOfRows[PL_MAX_QUERIES])(const KvLayer &, const Queries &, float *) = {
        attend_rows<T, 1>, attend_rows<T, 2>, attend_rows<T, 3>, attend_rows<T, 4>,
        attend_rows<T, 5>, attend_rows<T, 6>, attend_rows<T, 7>, attend_rows<T, 8>};
    kOfRows[in.rows - 1](kv, in, scratch);
}

static void attend(const KvLayer &kv, const Queries &in, float *scratch) {
    if (kv.kv_format == PL_FP32) attend_any<float>(kv, in, scratch);
    else attend_any<uint16_t>(kv, in, scratch);
}

}  // namespace PL_ISA_NS
