// From lanes to one value, in one fixed tree (halves onto each other), the same on every ISA.
#pragma once
#include "simd.h"

namespace PL_ISA_NS {

#if defined(PL_USE_AVX512) || defined(PL_USE_AVX2)

#if defined(PL_USE_AVX512)
PL_INLINE __m256 low_half(F a) { return _mm512_castps512_ps256(a.v); }
PL_INLINE __m256 high_half(F a) { return _mm512_extractf32x8_ps(a.v, 1); }
PL_INLINE __m256i sum_of_halves(I a) {
    return _mm256_add_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti32x8_epi32(a.v, 1));
}
#else
PL_INLINE __m256 low_half(F a) { return a.lo; }
PL_INLINE __m256 high_half(F a) { return a.hi; }
PL_INLINE __m256i sum_of_halves(I a) { return _mm256_add_epi32(a.lo, a.hi); }
#endif

PL_INLINE float reduce_add(F a) {
    const __m256 eight = _mm256_add_ps(low_half(a), high_half(a));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
PL_INLINE float reduce_max(F a) {
    const __m256 eight = _mm256_max_ps(low_half(a), high_half(a));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
PL_INLINE int32_t reduce_add(I a) {
    const __m256i eight = sum_of_halves(a);
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}

#else

PL_INLINE float reduce_add(F a) {
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; i++) a.v[i] += a.v[i + step];
    return a.v[0];
}
PL_INLINE float reduce_max(F a) {
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; i++) a.v[i] = a.v[i] > a.v[i + step] ? a.v[i] : a.v[i + step];
    return a.v[0];
}
PL_INLINE int32_t reduce_add(I a) {
    int32_t total = 0;
    for (int i = 0; i < 16; i++) total += a.v[i];
    return total;
}

#endif

}  // namespace PL_ISA_NS
