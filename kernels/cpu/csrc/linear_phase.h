// Linear layers as phases of a job: who prepares its input, how its tiles are claimed by the threads, and what each
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

// What a linear's rows are made of: row i lies `stride` apart from the one before, from `x` on, or at index[i]; and the norm
// before the linear (NULL: none).
struct Rows {
    const float *x;
    int64_t stride;
    const float *norm = nullptr;
    const int32_t *index = nullptr;
};

// One linear layer over `count` rows of one member; without rows there is nothing to do.
struct Product {
    const pl_linear *linear;
    const Inputs *inputs;
    Rows rows;
    float eps;
    Output out;
    int count;

    int chunks() const { return count ? (num_tiles(*linear) + kTilesPerChunk - 1) / kTilesPerChunk : 0; }

    // Makes a row ready for the linear: its norm, in the form that the linear reads.
    void prepare(const KernelTable &k, int thread, int row) const {
        k.prepare_row(at(row), rows.norm, eps, *linear, inputs->row(*linear, thread, row));
    }
    void prepare_all(const KernelTable &k, int thread) const {
        fetch_rows();
        for (int row = 0; row < count; row++) prepare(k, thread, row);
    }

private:
    const float *at(int row) const { return rows.x + (rows.index ? rows.index[row] : row) * rows.stride; }
    // Half of the rows' lines were written by other threads and lie in their caches: asked for into L2, all at once, they
    // come in the time of a few.
    void fetch_rows() const {
        for (int row = 0; row < count; row++)
            for (int i = 0; i < linear->in; i += 16) __builtin_prefetch(at(row) + i, 0, 2);
    }
};

// The products of a phase, one per member. None reads what another writes.
struct Products {
    Product of[PL_MOST_TOGETHER];
    int count = 0;

    int chunks() const {
        int all = 0;
        for (int i = 0; i < count; i++) all += of[i].chunks();
        return all;
    }
    bool any() const {
        return std::any_of(of, of + count, [](const Product &p) { return p.count > 0; });
    }
};

// The first claim that a thread will make, as far as it is of one layer, if it is one of the first two threads.
static inline Lookahead first_claim(const Products &products, int thread, int threads) {
    if (thread > 1) return {};
    const int claim = claim_size(products.chunks(), threads) * kTilesPerChunk;
    for (int i = 0; i < products.count; i++) {
        const Product &p = products.of[thread == 0 ? i : products.count - 1 - i];
        if (!p.count) continue;
        const int tiles = num_tiles(*p.linear), own = std::min(tiles, claim), first = thread == 0 ? 0 : tiles - own;
        const auto *data = (const uint8_t *)p.linear->data;
        const int64_t begin = tile_start(*p.linear, first), end = tile_start(*p.linear, first + own);
        return {data + begin, data + std::min(end, begin + kMostAheadBytes)};
    }
    return {};
}

// y = x W^T for each product. Few rows are prepared by every thread for itself, with its first claim: a claim that was
// granted keeps the phase, and with it what the rows are made from, as it is. `ahead` is fetched while the thread waits.
static inline void linear_phase(Worker &worker, const KernelTable &k, const Products &products, Lookahead *ahead) {
    const int thread = worker.thread();
    bool is_ready[PL_MOST_TOGETHER];
    int shared = 0;  // rows that are prepared once for all threads
    for (int i = 0; i < products.count; i++) {
        is_ready[i] = !products.of[i].inputs->are_private();
        if (is_ready[i]) shared += products.of[i].count;
    }
    worker.each_item(shared, [&](int row) {
        const Product *p = products.of;
        for (;; p++) {
            if (p->inputs->are_private()) continue;
            if (row < p->count) break;
            row -= p->count;
        }
        p->prepare(k, thread, row);
    });
    worker.each(products.chunks(), 1, [&](const Claim &c) {
        int first = 0;  // the product's first chunk among the phase's
        for (int i = 0; i < products.count; i++) {
            const Product &p = products.of[i];
            const int chunks = p.chunks(), begin = std::max(c.begin - first, 0), end = std::min(c.end - first, chunks);
            const int next = std::clamp(c.next - first, 0, std::max(chunks - 1, 0));
            first += chunks;
            if (begin >= end) continue;
            if (!is_ready[i]) {
                fetch_start(*p.linear, begin * kTilesPerChunk);
                p.prepare_all(k, thread);
                is_ready[i] = true;
            }
            k.linear_tiles(*p.linear, p.inputs->all(thread), p.out, p.count, begin * kTilesPerChunk,
                           std::min(end * kTilesPerChunk, num_tiles(*p.linear)), next * kTilesPerChunk);
        }
    }, ahead);
}
