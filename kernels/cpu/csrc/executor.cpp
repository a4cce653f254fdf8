// One call per ragged forward: embedding, blocks, final norm, head. Every thread runs the whole plan, phase by phase, and
// claims work item by item. While a thread waits for the end of a phase it fetches the weights that it will read next,
// so that memory does not rest during the small phases. Models of as many layers go forward together: a phase then has
// the items of all of them, and ends once. No allocation once the workspaces have grown to the largest batches seen.
#include <algorithm>
#include <new>
#include <vector>

#include "isa.h"
#include "member.h"
#include "pool.h"

namespace {

// The engine thread makes all forwards, so a workspace per thread and place in a call is one per place.
thread_local Workspace workspaces[PL_MOST_TOGETHER];
thread_local std::vector<Member> members;

class Forward {
public:
    Forward(std::vector<Member> &members, int num_layers, pl_pool &pool, const KernelTable &k)
        : members_(members), num_layers_(num_layers), pool_(pool), k_(k) {}

    void run() {
        pool_.run([this](Worker &worker) { on_thread(worker); });
    }

private:
    // A worker and the weights that it is about to read.
    struct Thread {
        Worker &worker;
        Lookahead ahead;
    };

    void on_thread(Worker &worker) {
        Thread t{worker, {}};
        embed(t);
        for (int i = 0; i < num_layers_; i++) layer(t, i);
        head(t);
    }

    void embed(Thread &t) {
        const Products fc = products([](Member &m) { return m.fc(); }), first = qkv_or_head(0);
        look_ahead(t, fc.any() ? fc : first);
        each(t, [](Member &m) { return m.rows(); }, [](Member &m, int row) { m.embed(row); });
        linear(t, fc, first);
    }

    void layer(Thread &t, int i) {
        const Products output = products([&](Member &m) { return m.output(i); });
        const Products gate_up = products([&](Member &m) { return m.gate_up(i); });
        const Products down = products([&](Member &m) { return m.down(i); });
        const int thread = t.worker.thread();
        linear(t, qkv_or_head(i), output, [&](int member, int begin, int end) { members_[member].take_heads(i, begin, end); });
        each(t, [](Member &m) { return m.attend_items(); }, [&](Member &m, int item) { m.attend(i, item, thread); });
        linear(t, output, gate_up);
        linear(t, gate_up, down, [&](int member, int begin, int end) { members_[member].take_gated(i, begin, end); });
        linear(t, down, qkv_or_head(i + 1));
    }

    void head(Thread &t) {
        each(t, [](Member &m) { return m.state_items(); }, [](Member &m, int item) { m.store_states(item); });
        const Products logits = qkv_or_head(num_layers_);
        linear(t, logits, logits);
    }

    // What is multiplied at the start of a layer, or behind the last one.
    Products qkv_or_head(int layer) {
        return products([&](Member &m) { return layer < num_layers_ ? m.qkv(layer) : m.logits(); });
    }

    template <typename Of>
    Products products(const Of &of) {
        Products all;
        for (Member &m : members_) all.of[all.count++] = of(m);
        return all;
    }

    // A phase over count(member) items of each member, one member's after the other's.
    template <typename Count, typename Body>
    void each(Thread &t, const Count &count, const Body &body) {
        int total = 0;
        for (Member &m : members_) total += count(m);
        t.worker.each_item(total, [&](int item) {
            Member *m = members_.data();
            for (; item >= count(*m); m++) item -= count(*m);
            body(*m, item);
        }, &t.ahead);
    }

    void look_ahead(Thread &t, const Products &next) const {
        t.ahead = first_claim(next, t.worker.thread(), pool_.threads());
    }

    template <typename After = NothingAfter>
    void linear(Thread &t, const Products &products, const Products &next, const After &after = {}) {
        if (!products.any()) return;
        look_ahead(t, next);
        linear_phase(t.worker, k_, products, after, &t.ahead);
    }

    std::vector<Member> &members_;
    const int num_layers_;
    pl_pool &pool_;
    const KernelTable &k_;
};

}  // namespace

int32_t pl_abi_version(void) { return PL_ABI_VERSION; }
pl_pool *pl_pool_create(int32_t threads) { return new pl_pool(threads); }
void pl_pool_destroy(pl_pool *pool) { delete pool; }

int32_t pl_forward(const pl_model *const *models, const pl_batch *const *batches, int32_t count, pl_pool *pool, int32_t isa) {
    const KernelTable *kernels = kernels_for(isa);
    if (!kernels) return -2;
    if (count < 1 || count > PL_MOST_TOGETHER) return -3;
    for (int i = 1; i < count; i++)
        if (models[i]->num_layers != models[0]->num_layers) return -3;
    try {
        members.clear();
        for (int i = 0; i < count; i++)
            members.emplace_back(*models[i], *batches[i], *kernels, workspaces[i], pool->threads());
        Forward(members, models[0]->num_layers, *pool, *kernels).run();
    } catch (const std::bad_alloc &) {
        return -1;
    }
    return 0;
}

void pl_read_states(const pl_model *m, const pl_batch *b, float *out) {
    for (int s = 0; s < b->sequences; s++) {
        for (int i = 0; i < b->count[s]; i++) {
            float *to = out + (int64_t)(b->first_row[s] + i) * m->hidden;
            const int position = b->start[s] + i;
            const uint8_t *from = position < 0 ? nullptr : state_at(*m, b->tables + b->table_start[s], position);
            if (!from) std::fill(to, to + m->hidden, 0.0f);
            else if (m->kv_format == PL_FP32) std::memcpy(to, from, m->hidden * sizeof(float));
            else widen((const uint16_t *)from, to, m->hidden);
        }
    }
}

void pl_argmax(const float *x, int32_t rows, int64_t columns, int32_t *index, pl_pool *pool, int32_t isa) {
    const KernelTable *kernels = kernels_for(isa);
    pool->run([&](Worker &worker) {
        worker.each_item(rows, [&](int row) { index[row] = kernels->argmax(x + row * columns, columns); });
    });
}

void pl_gumbel(const int64_t *keys, int32_t rows, int64_t n, float *out, int32_t isa) {
    const KernelTable *kernels = kernels_for(isa);
    for (int row = 0; row < rows; row++) kernels->gumbel((uint64_t)keys[row], nullptr, n, out + row * n);
}

void pl_read(const void *memory, int64_t bytes, pl_pool *pool, int32_t isa) {
    const KernelTable *kernels = kernels_for(isa);
    constexpr int64_t kChunk = 1 << 20;
    pool->run([&](Worker &worker) {
        worker.each_item((int)(bytes / kChunk), [&](int chunk) {
            kernels->read((const uint8_t *)memory + chunk * kChunk, kChunk);
        });
    });
}
