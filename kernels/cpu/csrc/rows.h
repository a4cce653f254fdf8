// What happens to single rows between the linear layers: norm, activation quantization, rotation.
#pragma once
#include "kernel_table.h"
#include "reduce.h"

namespace PL_ISA_NS {

static float rms_scale(const float *x, float eps, int n) {
    F sum = set1(0.0f);
    int i = 0;
    for (; i + 16 <= n; i += 16) sum = fma(load(x + i), load(x + i), sum);
    float total = reduce_add(sum);
    for (; i < n; i++) total += x[i] * x[i];
    return 1.0f / std::sqrt(total / (float)n + eps);
}

static void norm(float *x, const float *weight, float eps, int n) {
    float scale = rms_scale(x, eps, n);
    int i = 0;
    for (; i + 16 <= n; i += 16) store(x + i, mul(mul(load(x + i), set1(scale)), load(weight + i)));
    for (; i < n; i++) x[i] = x[i] * scale * weight[i];
}

// 64 values -> int8 with one scale; also -128 times their sum.
PL_INLINE void quantize_group(const F (&x)[PL_GROUP / 16], int8_t *q, float *scale, int32_t *correction) {
    F peak = set1(0.0f);
    for (F part : x) peak = max(peak, abs(part));
    const float top = reduce_max(peak), inverse = top > 0.0f ? 127.0f / top : 0.0f;
    I rounded[PL_GROUP / 16];
    for (int i = 0; i < PL_GROUP / 16; i++) rounded[i] = round_int(mul(x[i], set1(inverse)));
    *scale = top / 127.0f;
    *correction = -128 * reduce_add(store_group(q, rounded));
}

// Sixteen of a row's values from `at` on, scaled and weighted (NULL: neither); zeros past its end.
PL_INLINE F prepared(const float *x, const float *weight, float scale, int at, int n) {
    float values[16] = {}, weights[16] = {};
    if (at + 16 > n) {
        if (at >= n) return set1(0.0f);
        std::memcpy(values, x + at, (n - at) * sizeof(float));
        if (weight) std::memcpy(weights, weight + at, (n - at) * sizeof(float));
        x = values, weight = weight ? weights : nullptr, at = 0;
    }
    return weight ? mul(mul(load(x + at), set1(scale)), load(weight + at)) : load(x + at);
}

// A row's n values as int8 groups, scaled and weighted (NULL: neither); zeros past its end.
PL_INLINE void quantize_groups(const float *x, const float *weight, float scale, int n, int groups, const InputRow &out) {
    for (int g = 0; g < groups; g++) {
        F group[PL_GROUP / 16];
        for (int i = 0; i < PL_GROUP / 16; i++) group[i] = prepared(x, weight, scale, g * PL_GROUP + 16 * i, n);
        quantize_group(group, out.int8 + g * PL_GROUP, out.scales + g, out.corrections + g);
    }
}

static void quantize(const float *x, int n, int groups, const InputRow &out) {
    quantize_groups(x, nullptr, 1.0f, n, groups, out);
}

// `scale`: what the norm multiplies by, if there is a norm.
static void prepare_row(const float *x, const float *weight, float scale, const pl_linear &next, const InputRow &out) {
    const int n = next.in, padded = next.in_padded;
    if (next.format != PL_INT8) {
        for (int i = 0; i < n; i++) out.fp32[i] = weight ? x[i] * scale * weight[i] : x[i];
        for (int i = n; i < padded; i++) out.fp32[i] = 0.0f;
        return;
    }
    quantize_groups(x, weight, scale, n, padded / PL_GROUP, out);
}

static void store_state(const float *x, const float *weight, float eps, int n, int32_t format, void *out) {
    const float scale = weight ? rms_scale(x, eps, n) : 1.0f;
    for (int i = 0; i < n; i += 16) {
        const int width = n - i < 16 ? n - i : 16;
        float lanes[16] = {};
        for (int j = 0; j < width; j++) lanes[j] = weight ? x[i + j] * scale * weight[i + j] : x[i + j];
        if (format == PL_FP32) {
            std::memcpy((float *)out + i, lanes, width * sizeof(float));
        } else {
            uint16_t half[16];
            store_bf16(half, load(lanes));
            std::memcpy((uint16_t *)out + i, half, width * sizeof(uint16_t));
        }
    }
}

// Rotate-half: cos, sin [head_dim / 2].
static void rotate(float *head, const float *cos, const float *sin, int head_dim) {
    const int half = head_dim / 2;
    int i = 0;
    for (; i + 16 <= half; i += 16) {
        const F a = load(head + i), b = load(head + half + i), c = load(cos + i), s = load(sin + i);
        store(head + i, sub(mul(a, c), mul(b, s)));
        store(head + half + i, add(mul(b, c), mul(a, s)));
    }
    for (; i < half; i++) {
        float a = head[i], b = head[half + i];
        head[i] = a * cos[i] - b * sin[i];
        head[half + i] = b * cos[i] + a * sin[i];
    }
}

static void rescale(const float *x, int64_t n, float top, float scale, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = (x[i] - top) * scale;
}

static void exp(const float *x, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, exp(load(x + i)));
    if (i == n) return;
    float rest[16] = {};
    std::memcpy(rest, x + i, (n - i) * sizeof(float));
    store(rest, exp(load(rest)));
    std::memcpy(out + i, rest, (n - i) * sizeof(float));
}

static float greatest(const float *x, int64_t n) {
    F best[4] = {set1(-INFINITY), set1(-INFINITY), set1(-INFINITY), set1(-INFINITY)};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (int j = 0; j < 4; j++) best[j] = max(best[j], load(x + i + 16 * j));
    float top = reduce_max(max(max(best[0], best[1]), max(best[2], best[3])));
    for (; i < n; i++) top = x[i] > top ? x[i] : top;
    return top;
}

static void softmax_weights(const float *x, int64_t n, float *out, float *sums) {
    const F top = set1(greatest(x, n));
    for (int64_t begin = 0; begin < n; begin += PL_SUM_CHUNK) {
        const int64_t end = begin + PL_SUM_CHUNK < n ? begin + PL_SUM_CHUNK : n;
        F sum = set1(0.0f);
        int64_t i = begin;
        for (; i + 16 <= end; i += 16) {
            const F weight = exp(sub(load(x + i), top));
            store(out + i, weight);
            sum = add(sum, weight);
        }
        float total = reduce_add(sum);
        if (i < end) {
            float rest[16];
            for (int64_t j = 0; j < 16; j++) rest[j] = i + j < end ? x[i + j] : -INFINITY;
            store(rest, exp(sub(load(rest), top)));
            for (int64_t j = i; j < end; j++) total += out[j] = rest[j - i];
        }
        sums[begin / PL_SUM_CHUNK] = total;
    }
}

static void add_up(const float *x, int64_t n, float *sums) {
    for (int64_t begin = 0; begin < n; begin += PL_SUM_CHUNK) {
        const int64_t end = begin + PL_SUM_CHUNK < n ? begin + PL_SUM_CHUNK : n;
        F even = set1(0.0f), odd = even;
        int64_t i = begin;
        for (; i + 32 <= end; i += 32) even = add(even, load(x + i)), odd = add(odd, load(x + i + 16));
        float total = reduce_add(add(even, odd));
        for (; i < end; i++) total += x[i];
        sums[begin / PL_SUM_CHUNK] = total;
    }
}

// The first of the greatest, sought in the first chunk that has one.
static int32_t argmax(const float *x, int64_t n) {
    float top = -INFINITY;
    int64_t chunk = 0;
    for (int64_t begin = 0; begin < n; begin += PL_SUM_CHUNK) {
        const float best = greatest(x + begin, begin + PL_SUM_CHUNK < n ? PL_SUM_CHUNK : n - begin);
        if (best > top) top = best, chunk = begin;
    }
    for (int64_t i = chunk; i < n; i++)
        if (x[i] == top) return (int32_t)i;
    return 0;
}

}  // namespace PL_ISA_NS
