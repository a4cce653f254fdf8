// Instantiates every kernel for one ISA; included last by kernels_*.cpp.
#pragma once
#include "attention.h"
#include "linear.h"
#include "noise.h"
#include "rows.h"

namespace PL_ISA_NS {

static void read(const uint8_t *memory, int64_t bytes) {
    F a = set1(0.0f), b = a, c = a, d = a;
    for (int64_t i = 0; i + 256 <= bytes; i += 256) {
        a = max(a, load((const float *)(memory + i)));
        b = max(b, load((const float *)(memory + i + 64)));
        c = max(c, load((const float *)(memory + i + 128)));
        d = max(d, load((const float *)(memory + i + 192)));
    }
    volatile float sink = reduce_max(max(max(a, b), max(c, d)));
    (void)sink;
}

#define PL_TABLE {linear_tiles, rms_scale, prepare_row, quantize, store_state, norm, rotate, store_key, store_value, attend, argmax, read, gumbel, softmax_weights, add_up, rescale, exp}

}  // namespace PL_ISA_NS
