// The categorical distribution that a token is drawn from, not normalised, with the sums of its chunks.
#pragma once
#include <algorithm>

#include "kernel_table.h"

struct Categorical {
    float *weights, *sums;  // [n], [chunks(n)]
    int64_t n;

    static int64_t chunks(int64_t n) { return (n + PL_SUM_CHUNK - 1) / PL_SUM_CHUNK; }

    double total() const {
        double sum = 0.0;
        for (int64_t c = 0; c < chunks(n); c++) sum += sums[c];
        return sum;
    }

    // By inversion: the first index whose cumulative sum exceeds uniform * total; never one of weight zero.
    int32_t draw(double uniform) const {
        double left = uniform * total();
        int64_t chunk = 0;
        for (int64_t c = 0; c < chunks(n); c++) {
            if (sums[c] <= 0.0f) continue;
            chunk = c;
            if (left < sums[c]) break;
            left -= sums[c];
        }
        int64_t index = chunk * PL_SUM_CHUNK;
        for (int64_t i = index; i < std::min(n, (chunk + 1) * PL_SUM_CHUNK); i++) {
            if (weights[i] <= 0.0f) continue;
            index = i;
            if (left < weights[i]) break;
            left -= weights[i];
        }
        return (int32_t)index;
    }
};
