// Where the tiles of a linear layer lie.
#pragma once
#include "paceline_cpu.h"

static inline int num_tiles(const pl_linear &l) { return (l.out + PL_LANES - 1) / PL_LANES; }

// Bytes from the layer's data to a tile, or to the end of the last one.
static inline int64_t tile_start(const pl_linear &l, int tile) {
    if (l.tile_starts) return l.tile_starts[tile];
    return pl_packed_bytes(l.format, l.out, l.in) / num_tiles(l) * tile;
}

static inline int64_t weight_bytes(const pl_linear &l) { return tile_start(l, num_tiles(l)); }

// Asks memory for the beginning of a tile, as much as comes before the hardware has seen the stream.
static inline void fetch_start(const pl_linear &l, int tile) {
    constexpr int kBytes = 2048;
    const uint8_t *at = (const uint8_t *)l.data + tile_start(l, tile);
    for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(at + i);
}
