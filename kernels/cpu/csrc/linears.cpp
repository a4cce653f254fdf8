// Linear layers on their own, without a decoder around them: for tests and benches.
#include <algorithm>
#include <new>

#include "isa.h"
#include "linear_phase.h"
#include "pool.h"
#include "workspace.h"

static thread_local Workspace workspace;

int32_t pl_linears_forward(const pl_linear *linears, int32_t count, const float *x, int32_t rows, int32_t width, float *y,
                           pl_pool *pool, int32_t isa) {
    const KernelTable *kernels = kernels_for(isa);
    if (!kernels) return -2;
    try {
        int widest = 0;
        for (int i = 0; i < count; i++) widest = std::max(widest, linears[i].in_padded);
        const Inputs inputs = Inputs::prepared(workspace.inputs, rows, widest, pool->threads());
        pool->run([&](Worker &worker) {
            const auto product = [&](const pl_linear &l) {
                return Products{{{&l, &inputs, {x, width}, 0.0f, {Output::kStore, y, l.out}, rows}}, 1};
            };
            for (int i = 0; i < count; i++) {
                Lookahead ahead = first_claim(product(linears[(i + 1) % count]), worker.thread(), pool->threads());
                linear_phase(worker, *kernels, product(linears[i]), NothingAfter{}, &ahead);
            }
        });
    } catch (const std::bad_alloc &) {
        return -1;
    }
    return 0;
}
