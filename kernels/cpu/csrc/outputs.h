// What a linear layer does with its sums: scale, bias, and where they go. Shared by every way of making the sums.
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

}  // namespace PL_ISA_NS
