// What dense and sparse int8 tiles share: the products of one group of 64 inputs, from their start to the rows' sums.
#pragma once
#include "kernel_table.h"
#include "simd.h"

namespace PL_ISA_NS {

// R tiles of T rows.
template <int R, int T>
struct Int8Group {
    I dot[R][T];

    PL_MEMBER void start(const Input &x, int row, int groups, int g) {
        for (int t = 0; t < T; t++) {
            I correction = set1i(x.corrections[(int64_t)(row + t) * groups + g]);
            for (int r = 0; r < R; r++) dot[r][t] = correction;
        }
    }

    PL_MEMBER void multiply(int t, const W4 (&weights)[R], X4 inputs) {
        for (int r = 0; r < R; r++) dot[r][t] = dot4(dot[r][t], weights[r], inputs);
    }

    PL_MEMBER void take_up(const Input &x, int row, int groups, int g, F (&sum)[R][T]) const {
        for (int t = 0; t < T; t++) {
            F scale = set1(x.scales[(int64_t)(row + t) * groups + g]);
            for (int r = 0; r < R; r++) {
                sum[r][t] = fma(to_float(dot[r][t]), scale, sum[r][t]);
                if constexpr (kSumsInMemory) __asm__("" : "+m"(sum[r][t]));
            }
        }
    }

private:
    // Where products and sums together would not fit into 32 registers the sums, which are touched once per group, stay in
    // memory: left to itself the compiler spills products.
    static constexpr bool kSumsInMemory = R > 1 && 2 * R * T + R + 1 > 32;
};

}  // namespace PL_ISA_NS
