// Weights that come with the numbers of their inputs: a group of 64 inputs to pick from, and vectors of 16 rows x 4 weights
// (int8) with where in the group their inputs are. Layout: paceline_cpu.h.
#pragma once
#include "simd.h"

namespace PL_ISA_NS {

static constexpr int kPickedPair = 128;    // bytes of a vector of weights and one of numbers
static constexpr int kNumberedVectors = 3;  // of a group; a fourth one's numbers are in their spare bits

#if defined(PL_USE_AVX512)
struct X64 { __m512i v; };  // + 128 as uint8
struct Picks { X4 weights; __m512i from; };  // of `from`, the lowest six bits count
PL_INLINE X64 load_group(const int8_t *p) {
    return {_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))};
}
PL_INLINE Picks load_picks(const uint8_t *p) { return {{_mm512_loadu_si512(p)}, _mm512_loadu_si512(p + 64)}; }
// The fourth vector of the group from `p` on.
PL_INLINE Picks load_fourth_picks(const uint8_t *p) {
    const auto spare = [&](int pair) { return _mm512_loadu_si512(p + pair * kPickedPair + 64); };
    constexpr int kChoose = 0xca;  // where the first operand has a bit the second, elsewhere the third
    const __m512i low = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x03), _mm512_srli_epi16(spare(0), 6),
                                                  _mm512_srli_epi16(spare(1), 4), kChoose);
    const __m512i from = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x0f), low, _mm512_srli_epi16(spare(2), 2), kChoose);
    return {{_mm512_loadu_si512(p + kNumberedVectors * kPickedPair)}, from};
}
// acc[row] += sum_i w[row][i] * x[from[row][i]], and for each 128 * w, which `dot_offset` adds up alone.
PL_INLINE I dot_picked(I acc, const Picks &w, X64 x) {
    return dot4(acc, W4{_mm512_permutexvar_epi8(w.from, x.v)}, w.weights);
}
PL_INLINE I dot_offset(I acc, const Picks &w) { return dot4(acc, W4{_mm512_set1_epi8(-128)}, w.weights); }
#else
// Without an instruction for it: no offset, so that there is nothing to correct.
struct X64 { const int8_t *p; };
struct Picks { const uint8_t *weights; uint8_t from[64]; };
PL_INLINE X64 load_group(const int8_t *p) { return {p}; }
PL_INLINE Picks load_picks(const uint8_t *p) {
    Picks picks{p, {}};
    for (int i = 0; i < 64; i++) picks.from[i] = p[64 + i] & 63;
    return picks;
}
PL_INLINE Picks load_fourth_picks(const uint8_t *p) {
    Picks picks{p + kNumberedVectors * kPickedPair, {}};
    for (int pair = 0; pair < kNumberedVectors; pair++)
        for (int i = 0; i < 64; i++) picks.from[i] |= p[pair * kPickedPair + 64 + i] >> 6 << 2 * pair;
    return picks;
}
PL_INLINE I dot_picked(I acc, const Picks &w, X64 x) {
    int32_t sums[16] = {};
    for (int i = 0; i < 64; i++) sums[i / 4] += (int8_t)w.weights[i] * x.p[w.from[i]];
    return add(acc, load(sums));
}
PL_INLINE I dot_offset(I acc, const Picks &) { return acc; }
#endif

}  // namespace PL_ISA_NS
