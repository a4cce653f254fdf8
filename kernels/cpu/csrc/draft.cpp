// Greedy drafting: a whole draft block for every sequence in one call, forward after forward without leaving C.
#include <algorithm>
#include <new>
#include <vector>

#include "paceline_cpu.h"

namespace {

// One sequence that still drafts: its place among the drafts and in the last forward's wanted rows, its block table, the
// position of its next row.
struct Active {
    int32_t draft, row, table_start, position, token;
};

// Logits of the drafting sequences' newest rows -> their next tokens, taken into `out`.
void take_tokens(std::vector<Active> &active, const float *logits, const pl_model &m, const pl_draft &d, int32_t step,
                 std::vector<int32_t> &best, pl_pool *pool, int32_t isa) {
    pl_argmax(logits, (int32_t)active.size(), m.head.out, best.data(), pool, isa);
    for (size_t i = 0; i < active.size(); i++) {
        active[i].row = (int32_t)i;
        // Ids ascend with the head's rows, so that among equal logits the lowest id wins here too.
        active[i].token = m.vocab_ids ? m.vocab_ids[best[i]] : best[i];
        d.tokens[(int64_t)active[i].draft * d.stride + step] = active[i].token;
    }
}

}  // namespace

int32_t pl_draft_greedy(const pl_model *model, const pl_batch *first, const pl_draft *d, pl_pool *pool, int32_t isa) {
    try {
        const int32_t n = d->drafts;
        std::vector<float> logits((size_t)n * model->head.out);
        const bool reads_states = model->fc.out > 0;
        const int64_t hidden = model->hidden;
        std::vector<float> states(reads_states ? n * hidden : 0), features(states.size());
        std::vector<int32_t> best(n), tokens(n), rows(n), ones(n, 1), starts(n), table_starts(n);
        std::vector<Active> active;
        for (int32_t i = 0; i < n; i++) {
            const int32_t s = d->sequence[i];
            active.push_back({i, i, first->table_start[s], first->start[s] + first->count[s], 0});
            rows[i] = i;
        }
        pl_batch batch = *first;
        batch.logits = logits.data();
        batch.states = reads_states ? states.data() : nullptr;
        for (int32_t step = 0; !active.empty(); step++) {
            const int32_t status = pl_forward(model, &batch, pool, isa);
            if (status) return status;
            take_tokens(active, logits.data(), *model, *d, step, best, pool, isa);
            active.erase(std::remove_if(active.begin(), active.end(),
                                        [&](const Active &a) { return d->length[a.draft] <= step + 1; }),
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
