// Drafting: a whole draft block for every sequence in one call, forward after forward without leaving C.
#include <algorithm>
#include <new>
#include <vector>

#include "draw.h"
#include "isa.h"
#include "pool.h"

namespace {

// One sequence that still drafts: its place among the drafts and in the last forward's wanted rows, its block table, the
// position of its next row.
struct Active {
    int32_t draft, row, table_start, position, token;
};

// Logits of the drafting sequences' newest rows -> their next tokens, taken into `out`.
void take_tokens(std::vector<Active> &active, std::vector<Drawer> &drawers, float *logits, const pl_model &m,
                 const pl_draft &d, int32_t step, pl_pool &pool) {
    pool.run([&](Worker &worker) {
        worker.each_item((int)active.size(), [&](int i) {
            Active &a = active[i];
            a.row = i;
            const int32_t column = drawers[a.draft].choose(logits + (int64_t)i * m.head.out, step);
            // Ids ascend with the head's rows, so that among equal logits the lowest id wins here too.
            a.token = m.vocab_ids ? m.vocab_ids[column] : column;
            d.tokens[(int64_t)a.draft * d.stride + step] = a.token;
        });
    });
}

// What the target kept of the positions before the batch's rows.
std::vector<float> states_before(const pl_batch &rows, const pl_draft &d) {
    std::vector<float> states((size_t)rows.rows * d.target->hidden);
    std::vector<int32_t> starts(rows.start, rows.start + rows.sequences);
    for (int32_t &start : starts) start--;
    pl_batch before = rows;
    before.start = starts.data(), before.table_start = d.target_table_start, before.tables = d.target_tables;
    pl_read_states(d.target, &before, states.data());
    return states;
}

}  // namespace

int32_t pl_draft_blocks(const pl_model *model, const pl_batch *first, const pl_draft *d, pl_pool *pool, int32_t isa) {
    const KernelTable *kernels = kernels_for(isa);
    if (!kernels) return -2;
    try {
        const int32_t n = d->drafts;
        std::vector<float> logits((size_t)n * model->head.out);
        const bool reads_states = model->fc.out > 0;
        const int64_t hidden = model->hidden;
        std::vector<float> states(reads_states ? n * hidden : 0), features(states.size()), before;
        std::vector<int32_t> tokens(n), rows(n), ones(n, 1), starts(n), table_starts(n);
        std::vector<Active> active;
        std::vector<Drawer> drawers;
        for (int32_t i = 0; i < n; i++) {
            const int32_t s = d->draw[i].sequence;
            active.push_back({i, i, first->table_start[s], first->start[s] + first->count[s], 0});
            drawers.emplace_back(d->draw[i], d->columns, model->vocab_ids, *kernels);
            rows[i] = i;
        }
        pl_batch batch = *first;
        batch.logits = logits.data();
        batch.states = reads_states ? states.data() : nullptr;
        if (d->target) before = states_before(*first, *d), batch.features = before.data();
        for (int32_t step = 0; !active.empty(); step++) {
            const pl_batch *now = &batch;
            const int32_t status = pl_forward(&model, &now, 1, pool, isa);
            if (status) return status;
            take_tokens(active, drawers, logits.data(), *model, *d, step, *pool);
            active.erase(std::remove_if(active.begin(), active.end(),
                                        [&](const Active &a) { return d->draw[a.draft].length <= step + 1; }),
                         active.end());
            const int32_t left = (int32_t)active.size();
            for (int32_t i = 0; i < left; i++) {
                tokens[i] = active[i].token;
                starts[i] = active[i].position++;
                table_starts[i] = active[i].table_start;
                if (reads_states)
                    std::copy_n(states.begin() + active[i].row * hidden, hidden, features.begin() + i * hidden);
            }
            batch = {left, left, left, tokens.data(), rows.data(), ones.data(), starts.data(), table_starts.data(),
                     first->tables, rows.data(), logits.data(), features.data(), batch.states};
        }
    } catch (const std::bad_alloc &) {
        return -1;
    }
    return 0;
}
