// One linear layer as phases of a job: who prepares its input, how its tiles are claimed by the threads, and what each
// will read first.
#pragma once
#include <algorithm>

#include "kernel_table.h"
#include "pool.h"
#include "tiles.h"
#include "workspace.h"

// Tiles that are claimed together: gated layers need pairs.
static constexpr int kTilesPerChunk = 2;
// What is fetched ahead must still be there when it is read: a part of the smallest L2.
static constexpr int64_t kMostAheadBytes = 256 << 10;

// The first claim that a thread will make of a layer, if it is one of the first two threads.
static inline Lookahead first_claim(const pl_linear &l, int thread, int threads) {
    const int tiles = num_tiles(l), chunks = (tiles + kTilesPerChunk - 1) / kTilesPerChunk;
    const int claim = std::min(tiles, claim_size(chunks, threads) * kTilesPerChunk);
    const auto *data = (const uint8_t *)l.data;
    if (thread > 1) return {};
    const int first = thread == 0 ? 0 : tiles - claim;
    const int64_t begin = tile_start(l, first), end = tile_start(l, first + claim);
    return {data + begin, data + std::min(end, begin + kMostAheadBytes)};
}

// y = x W^T for `rows` rows, which prepare(row, where) makes ready. Few rows are prepared by every thread for itself, with
// its first claim: a claim that was granted keeps the phase, and with it what the rows are made from, as it is.
// `ahead` is fetched while the thread waits.
template <typename Prepare>
static inline void linear_phase(Worker &worker, const KernelTable &k, const pl_linear &l, const Inputs &inputs,
                                const Prepare &prepare, const Output &out, int rows, Lookahead *ahead) {
    const int thread = worker.thread();
    const auto ready = [&](int row) { prepare(row, inputs.row(l, thread, row)); };
    bool waits = inputs.are_private();
    if (!waits) worker.each_item(rows, ready);
    worker.each(num_tiles(l), kTilesPerChunk, [&](const Claim &c) {
        if (waits) {
            fetch_start(l, c.begin);
            for (int row = 0; row < rows; row++) ready(row);
            waits = false;
        }
        k.linear_tiles(l, inputs.all(thread), out, rows, c.begin, c.end, c.next);
    }, ahead);
}
