// One linear layer as a phase of a job: how its tiles are claimed by the threads, and what each will read first.
#pragma once
#include <algorithm>

#include "kernel_table.h"
#include "pool.h"
#include "tiles.h"

// Tiles per claim of a linear layer, a power of two: kernels take up to 4 at a time, gated layers need pairs. What counts
// is the thread with the most work: whole claims, each of which costs about as much as reading kClaimBytes.
static constexpr int kMostTilesPerClaim = 8, kFewestTilesPerClaim = 2;
static constexpr int64_t kClaimBytes = 2048;

static inline int tiles_per_claim(const pl_linear &l, int threads) {
    const int64_t tiles = num_tiles(l), tile_bytes = weight_bytes(l) / tiles;
    int best = kMostTilesPerClaim;
    int64_t least = INT64_MAX;
    for (int chunk = kMostTilesPerClaim; chunk >= kFewestTilesPerClaim; chunk /= 2) {
        const int64_t claims = (tiles + chunk - 1) / chunk, most = (claims + threads - 1) / threads;
        const int64_t cost = most * (chunk * tile_bytes + kClaimBytes);
        if (cost < least) least = cost, best = chunk;
    }
    return best;
}

// The first claim that a thread will make of a layer, if it is one of the first two threads.
static inline Lookahead first_claim(const pl_linear &l, int thread, int threads) {
    const int tiles = num_tiles(l), claim = std::min(tiles, tiles_per_claim(l, threads));
    const auto *data = (const uint8_t *)l.data;
    if (thread == 0) return {data, data + tile_start(l, claim)};
    if (thread == 1) return {data + tile_start(l, tiles - claim), data + weight_bytes(l)};
    return {};
}

static inline void linear_phase(Worker &worker, const KernelTable &k, const pl_linear &l, const Input &input,
                                const Output &out, int rows, int threads, Lookahead *ahead = nullptr) {
    const int chunk = tiles_per_claim(l, threads), step = worker.from_back() ? -chunk : chunk;
    worker.each(num_tiles(l), chunk,
                [&](int begin, int end) { k.linear_tiles(l, input, out, rows, begin, end, std::max(0, begin + step)); }, ahead);
}
