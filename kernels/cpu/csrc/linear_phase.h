// Linear layers as phases of a job: who prepares its input, how its tiles are claimed by the threads, what each will read
// first, and what follows a claim on the same thread.
#pragma once
#include <algorithm>

#include "kernel_table.h"
#include "pool.h"
#include "tiles.h"
#include "workspace.h"

// Tiles that are claimed together, unless a product says otherwise: gated layers need pairs.
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
    int chunk_tiles = kTilesPerChunk;
    bool is_made = false;  // the phase before made its input ready

    // Whether its rows are prepared once for all threads.
    bool shares_rows() const { return !is_made && !inputs->are_private(); }
    int chunks() const { return count ? (num_tiles(*linear) + chunk_tiles - 1) / chunk_tiles : 0; }

    // Makes a row ready for the linear: its norm, in the form that the linear reads.
    void prepare(const KernelTable &k, int thread, int row) const { prepare(k, thread, row, norm_scale(k, row)); }
    // The scales of at most kPrivateRows rows first: each is a chain of sums, and chains of several rows run side by side.
    void prepare_all(const KernelTable &k, int thread) const {
        float scales[kPrivateRows];
        fetch_rows();
        for (int row = 0; row < count; row++) scales[row] = norm_scale(k, row);
        for (int row = 0; row < count; row++) prepare(k, thread, row, scales[row]);
    }

private:
    void prepare(const KernelTable &k, int thread, int row, float scale) const {
        k.prepare_row(at(row), rows.norm, scale, *linear, inputs->row(*linear, thread, row));
    }
    float norm_scale(const KernelTable &k, int row) const {
        return rows.norm ? k.rms_scale(at(row), eps, linear->in) : 1.0f;
    }
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

// Where nothing follows a claim.
struct NothingAfter {
    void operator()(int, int, int) const {}
};

// The first claim that a thread will make, as far as it is of one layer, if it is one of the first two threads.
static inline Lookahead first_claim(const Products &products, int thread, int threads) {
    if (thread > 1) return {};
    const int claim = claim_size(products.chunks(), threads);
    for (int i = 0; i < products.count; i++) {
        const Product &p = products.of[thread == 0 ? i : products.count - 1 - i];
        if (!p.count) continue;
        const int tiles = num_tiles(*p.linear), own = std::min(tiles, claim * p.chunk_tiles), first = thread == 0 ? 0 : tiles - own;
        const auto *data = (const uint8_t *)p.linear->data;
        const int64_t begin = tile_start(*p.linear, first), end = tile_start(*p.linear, first + own);
        return {data + begin, data + std::min(end, begin + kMostAheadBytes)};
    }
    return {};
}

// y = x W^T for each product. Few rows are prepared by every thread for itself, with its first claim: a claim that was
// granted keeps the phase, and with it what the rows are made from, as it is. `after(i, begin, end)` follows a claim of
// tiles [begin, end) of product i, on its thread. `ahead` is fetched while the thread waits.
template <typename After>
void linear_phase(Worker &worker, const KernelTable &k, const Products &products, const After &after, Lookahead *ahead) {
    const int thread = worker.thread();
    bool is_ready[PL_MOST_TOGETHER];
    int shared = 0;
    for (int i = 0; i < products.count; i++) {
        const Product &p = products.of[i];
        is_ready[i] = p.is_made || p.shares_rows();
        if (p.shares_rows()) shared += p.count;
    }
    worker.each_item(shared, [&](int row) {
        const Product *p = products.of;
        for (;; p++) {
            if (!p->shares_rows()) continue;
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
            const int first_tile = begin * p.chunk_tiles, end_tile = std::min(end * p.chunk_tiles, num_tiles(*p.linear));
            if (!is_ready[i]) {
                fetch_start(*p.linear, first_tile);
                p.prepare_all(k, thread);
                is_ready[i] = true;
            }
            k.linear_tiles(*p.linear, p.inputs->all(thread), p.out, p.count, first_tile, end_tile, next * p.chunk_tiles);
            after(i, first_tile, end_tile);
        }
    }, ahead);
}
