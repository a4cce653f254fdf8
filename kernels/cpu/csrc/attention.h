// Paged attention. K and V are read back from the cache for every row, prefill included; reductions run over fixed
// tiles of 16 absolute positions in ascending order, so a row's result is the same in any batch and any chunking.
#pragma once
#include <algorithm>

#include "kernel_table.h"
#include "reduce.h"

namespace PL_ISA_NS {

PL_INLINE const uint8_t *block_of(const KvLayer &kv, const int32_t *table, int position) {
    return kv.blocks + table[position / kv.block_tokens] * kv.block_bytes;
}

// Sixteen values from `x` on as bf16, or as many as are left of the head.
PL_INLINE void to_bf16(const float *x, int left, uint16_t (&half)[PL_LANES]) {
    if (left >= PL_LANES) return store_bf16(half, load(x));
    float lanes[PL_LANES] = {};
    std::memcpy(lanes, x, left * sizeof(float));
    store_bf16(half, load(lanes));
}

// Keys lie dimension by dimension, 16 positions side by side.
static void store_key(const KvLayer &kv, const int32_t *table, int position, int kv_head, const float *k) {
    const int at = position % kv.block_tokens, dim = kv.head_dim;
    const int64_t first = ((int64_t)kv_head * kv.block_tokens + at / PL_LANES * PL_LANES) * dim + at % PL_LANES;
    uint8_t *keys = const_cast<uint8_t *>(block_of(kv, table, position)) + kv.k_offset;
    if (kv.kv_format == PL_FP32) {
        for (int d = 0; d < dim; d++) ((float *)keys)[first + (int64_t)d * PL_LANES] = k[d];
        return;
    }
    for (int d = 0; d < dim; d += PL_LANES) {
        uint16_t half[PL_LANES];
        to_bf16(k + d, dim - d, half);
        for (int i = 0; i < std::min(dim - d, PL_LANES); i++)
            ((uint16_t *)keys)[first + (int64_t)(d + i) * PL_LANES] = half[i];
    }
}

static void store_value(const KvLayer &kv, const int32_t *table, int position, int kv_head, const float *v) {
    const int dim = kv.head_dim;
    const int64_t first = ((int64_t)kv_head * kv.block_tokens + position % kv.block_tokens) * dim;
    uint8_t *values = const_cast<uint8_t *>(block_of(kv, table, position)) + kv.v_offset;
    if (kv.kv_format == PL_FP32) {
        std::memcpy((float *)values + first, v, dim * sizeof(float));
        return;
    }
    int d = 0;
    for (; d + PL_LANES <= dim; d += PL_LANES) store_bf16((uint16_t *)values + first + d, load(v + d));
    if (d == dim) return;
    uint16_t half[PL_LANES];
    to_bf16(v + d, dim - d, half);
    std::memcpy((uint16_t *)values + first + d, half, (dim - d) * sizeof(uint16_t));
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

// Sixteen of these, wherever they begin, hide some lanes below or above.
struct Shown {
    alignas(64) float bound[3 * PL_LANES];
    constexpr Shown() : bound() {
        for (int i = 0; i < 3 * PL_LANES; i++)
            bound[i] = i / PL_LANES == 1 ? __builtin_inff() : -__builtin_inff();
    }
};
static constexpr Shown kShown;

// Scores of lanes [first, end) as they are, minus infinity for the others, whatever they hold.
PL_INLINE F show_only(F scores, int first, int end) {
    first = first < 0 ? 0 : first > PL_LANES ? PL_LANES : first, end = end < 0 ? 0 : end > PL_LANES ? PL_LANES : end;
    scores = min(scores, load(kShown.bound + PL_LANES - first));
    return min(scores, load(kShown.bound + 2 * PL_LANES - end));
}

// scores[r][position] for N tiles of 16 positions from `tile` on, masked to what row r sees.
template <typename T, int R, int N>
PL_INLINE void score_tiles(const KvLayer &kv, const Queries &in, int tile, float *const (&scores)[R]) {
    const int dim = kv.head_dim;
    const T *k[N];
    F sum[N][R];
    for (int n = 0; n < N; n++) {
        const int position = (tile + n) * PL_LANES;
        k[n] = (const T *)(block_of(kv, in.table, position) + kv.k_offset) + (int64_t)in.kv_head * kv.block_tokens * dim +
               (int64_t)(position % kv.block_tokens) * dim;
        for (int r = 0; r < R; r++) sum[n][r] = set1(0.0f);
    }
    for (int d = 0; d < dim; d++) {
        F keys[N];
        for (int n = 0; n < N; n++) keys[n] = load_kv(k[n] + (int64_t)d * PL_LANES);
        for (int r = 0; r < R; r++) {
            const F query = set1(in.q[r][d]);
            for (int n = 0; n < N; n++) sum[n][r] = fma(keys[n], query, sum[n][r]);
        }
    }
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) {
            const int position = (tile + n) * PL_LANES, last = in.position[r], first = in.window ? last - in.window + 1 : 0;
            F score = mul(sum[n][r], set1(in.scale));
            if (position + PL_LANES - 1 > last || position < first)
                score = show_only(score, first - position, last + 1 - position);
            store(scores[r] + position, score);
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
    constexpr int kTiles = R <= 2 ? 4 : R <= 4 ? 2 : 1;  // sums enough to hide how long each takes
    int t = first_tile;
    for (; t + kTiles <= tiles; t += kTiles) {
        for (int next = t + kTiles; next < std::min(t + 2 * kTiles, tiles); next++) fetch_tile<T>(kv, in, next);
        score_tiles<T, R, kTiles>(kv, in, t, scores);
    }
    for (; t < tiles; t++) score_tiles<T, R, 1>(kv, in, t, scores);
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
