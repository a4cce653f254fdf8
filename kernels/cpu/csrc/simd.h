// Sixteen lanes of floats or ints, three times: AVX-512, AVX2, portable. Kernels are written once over these.
// Included by one translation unit per ISA, which defines PL_ISA_NS and one of PL_USE_AVX512, PL_USE_AVX2 (or none).
// Everything is in that namespace, so that no ISA's code can be linked into another's.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(PL_USE_AVX512) || defined(PL_USE_AVX2)
#include <immintrin.h>
#endif

namespace PL_ISA_NS {

#define PL_INLINE static inline __attribute__((always_inline))
#define PL_MEMBER inline __attribute__((always_inline))

#if defined(PL_USE_AVX512)

struct F { __m512 v; };
struct I { __m512i v; };
PL_INLINE F set1(float x) { return {_mm512_set1_ps(x)}; }
PL_INLINE F load(const float *p) { return {_mm512_loadu_ps(p)}; }
PL_INLINE void store(float *p, F a) { _mm512_storeu_ps(p, a.v); }
PL_INLINE F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
PL_INLINE F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
PL_INLINE F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
PL_INLINE F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
PL_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PL_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
PL_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
PL_INLINE F abs(F a) { return {_mm512_abs_ps(a.v)}; }
PL_INLINE F load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
PL_INLINE void store_bf16(uint16_t *p, F a) {  // round to nearest even
    __m512i x = _mm512_castps_si512(a.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    x = _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(x));
}
PL_INLINE F expand_fp32(const float *p, uint16_t mask) { return {_mm512_maskz_expand_ps(mask, _mm512_loadu_ps(p))}; }
// bf16 weights of 16 rows x 2 inputs.
struct W2 { __m512i v; };
PL_INLINE W2 load_pairs(const uint16_t *p) { return {_mm512_loadu_si512(p)}; }
PL_INLINE W2 expand_pairs(const uint16_t *p, uint32_t mask) {
    return {_mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(p))};
}
PL_INLINE F first_of(W2 w) { return {_mm512_castsi512_ps(_mm512_slli_epi32(w.v, 16))}; }
PL_INLINE F second_of(W2 w) {
    return {_mm512_castsi512_ps(_mm512_and_si512(w.v, _mm512_set1_epi32(0xffff0000)))};
}
PL_INLINE I set1i(int32_t x) { return {_mm512_set1_epi32(x)}; }
PL_INLINE I load(const int32_t *p) { return {_mm512_loadu_si512(p)}; }
PL_INLINE I add(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
PL_INLINE I sub(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
PL_INLINE F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
PL_INLINE I round_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }
PL_INLINE F pow2(I n) {  // 2^n for -126 <= n <= 127
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.v, _mm512_set1_epi32(127)), 23))};
}
// Weights of 16 rows x 4 inputs, and the dot product with 4 activations: acc[row] += sum_i w[row][i] * x[i].
struct W4 { __m512i v; };
struct X4 { __m512i v; };
PL_INLINE W4 load_weights(const uint8_t *p) { return {_mm512_loadu_si512(p)}; }
PL_INLINE W4 expand_weights(const uint8_t *p, uint64_t mask) {
    return {_mm512_mask_expand_epi8(_mm512_set1_epi8(-128), mask, _mm512_loadu_si512(p))};
}
PL_INLINE void store_weights(uint8_t *p, W4 w) { _mm512_storeu_si512(p, w.v); }
PL_INLINE X4 load_inputs(const int8_t *p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return {_mm512_set1_epi32(x)};
}
// Not the intrinsic: gcc 12 wraps every one in two register moves and a spill, which doubles the inner loop.
PL_INLINE I dot4(I acc, W4 w, X4 x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(x.v));
    return acc;
}
// 64 values in [-127, 127] as int8; lanes whose total is their sum.
PL_INLINE I store_group(int8_t *p, const I (&a)[4]) {
    const __m512i words[] = {_mm512_packs_epi32(a[0].v, a[1].v), _mm512_packs_epi32(a[2].v, a[3].v)};
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const X4 bytes{_mm512_permutexvar_epi32(order, _mm512_packs_epi16(words[0], words[1]))};
    _mm512_storeu_si512(p, bytes.v);
    return dot4(set1i(0), W4{_mm512_set1_epi8(1)}, bytes);
}
// The same with inputs that are used once: repeated by the instruction itself, which spares a wide load (Zen 4: a
// fifth off five rows of a sparse layer).
PL_INLINE I dot4(I acc, W4 w, const int8_t *inputs) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(w.v), "m"(*(const int32_t *)inputs));
    return acc;
}
PL_INLINE void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }

#elif defined(PL_USE_AVX2)

struct F { __m256 lo, hi; };
struct I { __m256i lo, hi; };
PL_INLINE F set1(float x) { __m256 v = _mm256_set1_ps(x); return {v, v}; }
PL_INLINE F load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
PL_INLINE void store(float *p, F a) { _mm256_storeu_ps(p, a.lo); _mm256_storeu_ps(p + 8, a.hi); }
PL_INLINE F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
PL_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
PL_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
PL_INLINE F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
PL_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
PL_INLINE F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
PL_INLINE F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
PL_INLINE F abs(F a) {
    __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(a.lo, mask), _mm256_and_ps(a.hi, mask)};
}
PL_INLINE __m256 widen_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
PL_INLINE F load_bf16(const uint16_t *p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
PL_INLINE __m256i narrow_bf16(__m256 a) {
    __m256i x = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}
PL_INLINE void store_bf16(uint16_t *p, F a) {
    __m256i packed = _mm256_packus_epi32(narrow_bf16(a.lo), narrow_bf16(a.hi));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
PL_INLINE F expand_fp32(const float *p, uint16_t mask) {
    float lanes[16] = {};
    for (; mask; mask &= mask - 1) lanes[__builtin_ctz(mask)] = *p++;
    return load(lanes);
}
// Where the i-th of 8 elements comes from among those packed for a mask of 8 bits; 0x80 (which shuffles to zero): nowhere.
struct Sources {
    alignas(16) uint8_t of[256][8];
    constexpr Sources() : of() {
        for (int mask = 0; mask < 256; mask++)
            for (int i = 0, from = 0; i < 8; i++) of[mask][i] = mask >> i & 1 ? from++ : 0x80;
    }
};
static constexpr Sources kSources;
PL_INLINE __m128i sources(uint8_t mask) { return _mm_loadl_epi64((const __m128i *)kSources.of[mask]); }
struct W2 { __m256i lo, hi; };
PL_INLINE W2 load_pairs(const uint16_t *p) {
    return {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 16))};
}
PL_INLINE __m128i expand8_bf16(const uint16_t *&p, uint8_t mask) {
    const __m128i from = sources(mask), twice = _mm_unpacklo_epi8(from, from);
    // Byte numbers 2 i and 2 i + 1; with saturation, what comes from nowhere keeps its highest bit.
    const __m128i bytes = _mm_adds_epu8(_mm_adds_epu8(twice, twice), _mm_set1_epi16(0x100));
    const __m128i packed = _mm_loadu_si128((const __m128i *)p);
    p += __builtin_popcount(mask);
    return _mm_shuffle_epi8(packed, bytes);
}
PL_INLINE W2 expand_pairs(const uint16_t *p, uint32_t mask) {
    const __m128i a = expand8_bf16(p, mask), b = expand8_bf16(p, mask >> 8);
    const __m128i c = expand8_bf16(p, mask >> 16), d = expand8_bf16(p, mask >> 24);
    return {_mm256_set_m128i(b, a), _mm256_set_m128i(d, c)};
}
PL_INLINE F first_of(W2 w) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(w.lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(w.hi, 16))};
}
PL_INLINE F second_of(W2 w) {
    const __m256i mask = _mm256_set1_epi32(0xffff0000);
    return {_mm256_castsi256_ps(_mm256_and_si256(w.lo, mask)), _mm256_castsi256_ps(_mm256_and_si256(w.hi, mask))};
}
PL_INLINE I set1i(int32_t x) { __m256i v = _mm256_set1_epi32(x); return {v, v}; }
PL_INLINE I add(I a, I b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
PL_INLINE I sub(I a, I b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
PL_INLINE I load(const int32_t *p) {
    return {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 8))};
}
PL_INLINE F to_float(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
PL_INLINE I round_int(F a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
PL_INLINE void store_int8(int8_t *p, I a) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)p, bytes);
}
PL_INLINE F pow2(I n) {
    __m256i bias = _mm256_set1_epi32(127);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.lo, bias), 23)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.hi, bias), 23))};
}
// The u8 x s8 pair instruction saturates at 16 bits, so both sides are widened first: sums equal AVX-512's exactly.
struct W4 { __m256i lo, hi; };
struct X4 { __m256i v; };  // four int16, repeated
PL_INLINE W4 load_weights(const uint8_t *p) {
    return {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32))};
}
PL_INLINE __m128i expand16_weights(const uint8_t *&p, uint16_t mask) {
    const int low = __builtin_popcount(mask & 0xff);
    const __m128i packed = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *)p), _mm_loadl_epi64((const __m128i *)(p + low)));
    const __m128i from = _mm_add_epi8(_mm_unpacklo_epi64(sources(mask), sources(mask >> 8)), _mm_set_epi64x(0x0808080808080808, 0));
    p += __builtin_popcount(mask);
    return _mm_or_si128(_mm_shuffle_epi8(packed, from), _mm_and_si128(from, _mm_set1_epi8(-128)));
}
PL_INLINE W4 expand_weights(const uint8_t *p, uint64_t mask) {
    const __m128i a = expand16_weights(p, mask), b = expand16_weights(p, mask >> 16);
    const __m128i c = expand16_weights(p, mask >> 32), d = expand16_weights(p, mask >> 48);
    return {_mm256_set_m128i(b, a), _mm256_set_m128i(d, c)};
}
PL_INLINE X4 load_inputs(const int8_t *p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return {_mm256_cvtepi8_epi16(_mm_set1_epi32(x))};
}
PL_INLINE __m256i dot4_half(__m256i w, __m256i x) {
    __m256i a = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(w)), x);
    __m256i b = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(w, 1)), x);
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8);
}
PL_INLINE I dot4(I acc, W4 w, X4 x) {
    return {_mm256_add_epi32(acc.lo, dot4_half(w.lo, x.v)), _mm256_add_epi32(acc.hi, dot4_half(w.hi, x.v))};
}
PL_INLINE I dot4(I acc, W4 w, const int8_t *inputs) { return dot4(acc, w, load_inputs(inputs)); }
PL_INLINE void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }

#else

#define PL_EACH for (int i = 0; i < 16; i++)
struct F { float v[16]; };
struct I { int32_t v[16]; };
PL_INLINE F set1(float x) { F r; PL_EACH r.v[i] = x; return r; }
PL_INLINE F load(const float *p) { F r; std::memcpy(r.v, p, sizeof r.v); return r; }
PL_INLINE void store(float *p, F a) { std::memcpy(p, a.v, sizeof a.v); }
PL_INLINE F add(F a, F b) { PL_EACH a.v[i] += b.v[i]; return a; }
PL_INLINE F sub(F a, F b) { PL_EACH a.v[i] -= b.v[i]; return a; }
PL_INLINE F mul(F a, F b) { PL_EACH a.v[i] *= b.v[i]; return a; }
PL_INLINE F div(F a, F b) { PL_EACH a.v[i] /= b.v[i]; return a; }
PL_INLINE F fma(F a, F b, F c) { PL_EACH c.v[i] += a.v[i] * b.v[i]; return c; }
PL_INLINE F max(F a, F b) { PL_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
PL_INLINE F min(F a, F b) { PL_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
PL_INLINE F abs(F a) { PL_EACH a.v[i] = std::fabs(a.v[i]); return a; }
PL_INLINE float widen_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
PL_INLINE F load_bf16(const uint16_t *p) { F r; PL_EACH r.v[i] = widen_bf16(p[i]); return r; }
PL_INLINE void store_bf16(uint16_t *p, F a) {
    PL_EACH {
        uint32_t x;
        std::memcpy(&x, &a.v[i], 4);
        p[i] = (uint16_t)((x + ((x >> 16) & 1) + 0x7fff) >> 16);
    }
}
template <typename T, typename Mask>
PL_INLINE void expand_into(T *to, const T *p, Mask mask) {
    for (int i = 0; mask; i++, mask >>= 1)
        if (mask & 1) to[i] = *p++;
}
PL_INLINE F expand_fp32(const float *p, uint16_t mask) {
    F r{};
    expand_into(r.v, p, mask);
    return r;
}
struct W2 { uint16_t v[32]; };
PL_INLINE W2 load_pairs(const uint16_t *p) { W2 r; std::memcpy(r.v, p, sizeof r.v); return r; }
PL_INLINE W2 expand_pairs(const uint16_t *p, uint32_t mask) {
    W2 r{};
    expand_into(r.v, p, mask);
    return r;
}
PL_INLINE F first_of(W2 w) { F r; PL_EACH r.v[i] = widen_bf16(w.v[2 * i]); return r; }
PL_INLINE F second_of(W2 w) { F r; PL_EACH r.v[i] = widen_bf16(w.v[2 * i + 1]); return r; }
PL_INLINE I set1i(int32_t x) { I r; PL_EACH r.v[i] = x; return r; }
PL_INLINE I add(I a, I b) { PL_EACH a.v[i] += b.v[i]; return a; }
PL_INLINE I sub(I a, I b) { PL_EACH a.v[i] -= b.v[i]; return a; }
PL_INLINE I load(const int32_t *p) { I r; std::memcpy(r.v, p, sizeof r.v); return r; }
PL_INLINE F to_float(I a) { F r; PL_EACH r.v[i] = (float)a.v[i]; return r; }
PL_INLINE I round_int(F a) { I r; PL_EACH r.v[i] = (int32_t)std::lrintf(a.v[i]); return r; }
PL_INLINE void store_int8(int8_t *p, I a) { PL_EACH p[i] = (int8_t)a.v[i]; }
PL_INLINE F pow2(I n) {
    F r;
    PL_EACH {
        uint32_t bits = (uint32_t)(n.v[i] + 127) << 23;
        std::memcpy(&r.v[i], &bits, 4);
    }
    return r;
}
struct W4 { uint8_t v[64]; };
struct X4 { const int8_t *p; };
PL_INLINE W4 load_weights(const uint8_t *p) { W4 r; std::memcpy(r.v, p, sizeof r.v); return r; }
PL_INLINE W4 expand_weights(const uint8_t *p, uint64_t mask) {
    W4 r;
    std::memset(r.v, 128, sizeof r.v);
    expand_into(r.v, p, mask);
    return r;
}
PL_INLINE X4 load_inputs(const int8_t *p) { return {p}; }
PL_INLINE I dot4(I acc, W4 w, X4 x) {
    PL_EACH for (int k = 0; k < 4; k++) acc.v[i] += w.v[4 * i + k] * x.p[k];
    return acc;
}
PL_INLINE I dot4(I acc, W4 w, const int8_t *inputs) { return dot4(acc, w, load_inputs(inputs)); }
PL_INLINE void prefetch(const void *) {}
#undef PL_EACH

#endif

#if !defined(PL_USE_AVX512)
PL_INLINE I store_group(int8_t *p, const I (&a)[4]) {
    I sum = set1i(0);
    for (int i = 0; i < 4; i++) {
        store_int8(p + 16 * i, a[i]);
        sum = add(sum, a[i]);
    }
    return sum;
}
#endif

// e^x by range reduction to |r| <= ln(2)/2 and a degree-6 polynomial; below -87 it is 0 (so masked scores vanish).
PL_INLINE F exp(F x) {
    const F low = set1(-87.0f), high = set1(88.0f);
    F c = min(max(x, low), high);
    I n = round_int(mul(c, set1(1.44269504f)));
    F k = to_float(n), r = fma(k, set1(-0.693359375f), c);
    r = fma(k, set1(2.12194440e-4f), r);
    F p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(mul(p, r), r, add(r, set1(1.0f)));
    F y = mul(p, pow2(n));
    // x < low: scale to exactly zero. (x - low) is negative there; its sign picks 0 through min/max arithmetic.
    F inside = min(max(mul(sub(x, low), set1(3.4e38f)), set1(0.0f)), set1(1.0f));
    return mul(y, inside);
}

}  // namespace PL_ISA_NS
