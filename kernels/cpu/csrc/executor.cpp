// One call per ragged forward: embedding, blocks, final norm, head. Every thread runs the whole plan, phase by phase, and
// claims work item by item. While a thread waits for the end of a phase it fetches the weights that it will read next,
// so that memory does not rest during the small phases. No allocation once the workspace has grown to the largest
// batch seen.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "isa.h"
#include "linear_phase.h"
#include "pool.h"
#include "workspace.h"

namespace {

// The engine thread makes all forwards, so one workspace per thread is one workspace.
thread_local Workspace workspace;

void widen(const uint16_t *bf16, float *out, int n) {
    for (int i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)bf16[i] << 16;
        std::memcpy(out + i, &bits, 4);
    }
}

// Where a model keeps the state of a position.
uint8_t *state_at(const pl_model &m, const int32_t *table, int position) {
    const int64_t bytes = (int64_t)m.hidden * (m.kv_format == PL_FP32 ? 4 : 2);
    return m.kv + table[position / m.block_tokens] * m.block_bytes + m.state_offset + position % m.block_tokens * bytes;
}

class Forward {
public:
    Forward(const pl_model &m, const pl_batch &b, pl_pool &pool, const KernelTable &k)
        : m_(m), b_(b), pool_(pool), k_(k), w_(workspace), q_width_(m.heads * m.head_dim),
          kv_width_(m.kv_heads * m.head_dim), qkv_width_(q_width_ + 2 * kv_width_),
          inputs_(w_, b.rows, std::max({m.hidden, m.ffn, q_width_, m.fc.out ? 2 * m.hidden : 0}), pool.threads()) {
        x_ = w_.x.get((int64_t)b.rows * m.hidden);
        joined_ = m.fc.out ? w_.joined.get((int64_t)b.rows * 2 * m.hidden) : nullptr;
        qkv_ = w_.qkv.get((int64_t)b.rows * qkv_width_);
        attended_ = w_.attended.get((int64_t)b.rows * q_width_);
        gated_stride_ = (m.ffn + PL_LANES - 1) / PL_LANES * PL_LANES;
        gated_ = w_.gated.get((int64_t)b.rows * gated_stride_);
        cos_ = w_.cos.get((int64_t)b.rows * (m.head_dim / 2));
        sin_ = w_.sin.get((int64_t)b.rows * (m.head_dim / 2));
        list_rows();
    }

    void run() {
        pool_.run([this](Worker &worker) { on_thread(worker); });
    }

private:
    void list_rows() {
        const int group = m_.heads / m_.kv_heads;
        sequence_of_ = w_.sequence_of.get(b_.rows);
        items_ = w_.items.get((int64_t)b_.rows * group);
        num_items_ = 0;
        int longest = 0;
        for (int s = 0; s < b_.sequences; s++) {
            longest = std::max(longest, b_.start[s] + b_.count[s]);
            for (int i = 0; i < b_.count[s]; i++) sequence_of_[b_.first_row[s] + i] = s;
            const int pairs = b_.count[s] * group;
            for (int i = 0; i < pairs;) {
                const int calls = (pairs - i + PL_MAX_QUERIES - 1) / PL_MAX_QUERIES;
                const int take = (pairs - i + calls - 1) / calls;
                items_[num_items_++] = {s, i, take};
                i += take;
            }
        }
        scratch_size_ = (int64_t)PL_MAX_QUERIES * (longest + PL_LANES);
        scratch_ = w_.scratch.get(scratch_size_ * pool_.threads());
    }

    int position(int row) const {
        const int s = sequence_of_[row];
        return b_.start[s] + row - b_.first_row[s];
    }
    const int32_t *table(int row) const { return b_.tables + b_.table_start[sequence_of_[row]]; }

    // What a linear's rows are made of, `stride` apart from `x` on, and the norm before it (NULL: none).
    struct Rows {
        const float *x;
        int64_t stride;
        const float *norm;
    };

    // A worker and the weights that it is about to read.
    struct Thread {
        Worker &worker;
        Lookahead ahead;
    };

    void on_thread(Worker &worker) {
        const pl_linear &first = m_.fc.out ? m_.fc : m_.num_layers ? m_.layers[0].qkv : m_.head;
        Thread t{worker, first_claim(first, worker.thread(), pool_.threads())};
        embed(t);
        for (int i = 0; i < m_.num_layers; i++) layer(t, i);
        head(t);
    }

    void embed(Thread &t) {
        each_row(t, b_.rows, [&](int row) {
            set_angles(row);
            if (m_.fc.out) join(row);
            else read_embedding(row, x_ + (int64_t)row * m_.hidden);
        });
        if (!m_.fc.out) return;
        const pl_linear &next = m_.num_layers ? m_.layers[0].qkv : m_.head;
        linear(t, m_.fc, {joined_, 2 * m_.hidden, nullptr}, {Output::kStore, x_, m_.hidden}, b_.rows, next);
    }

    void layer(Thread &t, int index) {
        const pl_layer &l = m_.layers[index];
        const KvLayer kv = kv_layer(index);
        linear(t, l.qkv, {x_, m_.hidden, l.attention_norm}, {Output::kStore, qkv_, qkv_width_}, b_.rows, l.output);
        each_row(t, b_.rows, [&](int row) { rotate_and_store(l, kv, row); });
        attend(t, l, kv);
        linear(t, l.output, {attended_, q_width_, nullptr}, {Output::kAdd, x_, m_.hidden}, b_.rows, l.gate_up);
        linear(t, l.gate_up, {x_, m_.hidden, l.mlp_norm}, {Output::kGated, gated_, gated_stride_}, b_.rows, l.down);
        const pl_linear &next = index + 1 < m_.num_layers ? m_.layers[index + 1].qkv : m_.head;
        linear(t, l.down, {gated_, gated_stride_, nullptr}, {Output::kAdd, x_, m_.hidden}, b_.rows, next);
    }

    void head(Thread &t) {
        const int wanted = b_.states ? b_.wanted : 0, kept = m_.state_offset < 0 ? 0 : b_.rows;
        each_row(t, wanted + kept, [&](int item) {
            const int row = item < wanted ? b_.wanted_rows[item] : item - wanted;
            const float *x = x_ + (int64_t)row * m_.hidden;
            if (item < wanted) store_state(x, PL_FP32, b_.states + (int64_t)item * m_.hidden);
            else store_state(x, m_.kv_format, kept_state(row));
        });
        if (b_.wanted == 0) return;
        linear_of(t, m_.head, {Output::kStore, b_.logits, m_.head.out}, b_.wanted, m_.head, [&](int index) {
            return x_ + (int64_t)b_.wanted_rows[index] * m_.hidden;
        }, m_.final_norm);
    }

    void store_state(const float *x, int32_t format, void *out) {
        k_.store_state(x, m_.final_norm, m_.eps, m_.hidden, format, out);
    }

    void *kept_state(int row) const { return state_at(m_, table(row), position(row)); }

    template <typename Body>
    void each_row(Thread &t, int rows, const Body &body) {
        t.worker.each_item(rows, body, &t.ahead);
    }

    void linear(Thread &t, const pl_linear &l, const Rows &rows, const Output &out, int count, const pl_linear &next) {
        linear_of(t, l, out, count, next, [&](int row) { return rows.x + row * rows.stride; }, rows.norm);
    }

    // Rows from anywhere: row(i) says where. While a thread waits for the end, it fetches its first part of `next`.
    template <typename Row>
    void linear_of(Thread &t, const pl_linear &l, const Output &out, int count, const pl_linear &next, const Row &row,
                   const float *norm) {
        t.ahead = first_claim(next, t.worker.thread(), pool_.threads());
        const auto prepare = [&](int i, const InputRow &to) { k_.prepare_row(row(i), norm, m_.eps, l, to); };
        linear_phase(t.worker, k_, l, inputs_, prepare, out, count, &t.ahead);
    }

    void join(int row) {
        float *joined = joined_ + (int64_t)row * 2 * m_.hidden;
        read_embedding(row, joined);
        std::memcpy(joined + m_.hidden, b_.features + (int64_t)row * m_.hidden, m_.hidden * sizeof(float));
    }

    void read_embedding(int row, float *x) const {
        const int64_t at = (int64_t)b_.tokens[row] * m_.hidden;
        if (m_.embedding_format == PL_FP32) {
            std::memcpy(x, (const float *)m_.embedding + at, m_.hidden * sizeof(float));
        } else {
            widen((const uint16_t *)m_.embedding + at, x, m_.hidden);
        }
    }

    void set_angles(int row) {
        const int half = m_.head_dim / 2;
        for (int i = 0; i < half; i++) {
            const float angle = (float)position(row) * m_.inv_freq[i];
            cos_[(int64_t)row * half + i] = std::cos(angle) * m_.rope_scale;
            sin_[(int64_t)row * half + i] = std::sin(angle) * m_.rope_scale;
        }
    }

    void rotate_and_store(const pl_layer &l, const KvLayer &kv, int row) {
        const int half = m_.head_dim / 2;
        const float *cos = cos_ + (int64_t)row * half, *sin = sin_ + (int64_t)row * half;
        float *q = qkv_ + (int64_t)row * qkv_width_, *k = q + q_width_, *v = k + kv_width_;
        for (int h = 0; h < m_.heads + m_.kv_heads; h++) {
            float *head = q + (int64_t)h * m_.head_dim;
            if (l.q_norm) k_.norm(head, h < m_.heads ? l.q_norm : l.k_norm, m_.eps, m_.head_dim);
            k_.rotate(head, cos, sin, m_.head_dim);
        }
        for (int h = 0; h < m_.kv_heads; h++)
            k_.store_kv(kv, table(row), position(row), h, k + h * m_.head_dim, v + h * m_.head_dim);
    }

    void attend(Thread &t, const pl_layer &l, const KvLayer &kv) {
        float *scratch = scratch_ + t.worker.thread() * scratch_size_;
        t.worker.each_item(num_items_ * m_.kv_heads, [&](int index) {
            k_.attend(kv, queries(items_[index / m_.kv_heads], index % m_.kv_heads, l.window), scratch);
        }, &t.ahead);
    }

    Queries queries(const AttendItem &item, int kv_head, int window) const {
        const int group = m_.heads / m_.kv_heads, first_row = b_.first_row[item.sequence];
        Queries in;
        for (int i = 0; i < item.count; i++) {
            const int row = first_row + (item.first + i) / group;
            const int64_t head = (int64_t)(kv_head * group + (item.first + i) % group) * m_.head_dim;
            in.q[i] = qkv_ + (int64_t)row * qkv_width_ + head;
            in.out[i] = attended_ + (int64_t)row * q_width_ + head;
            in.position[i] = position(row);
        }
        in.rows = item.count;
        in.kv_head = kv_head;
        in.window = window;
        in.table = table(first_row);
        in.scale = 1.0f / std::sqrt((float)m_.head_dim);
        return in;
    }

    KvLayer kv_layer(int index) const {
        const int64_t size = (int64_t)m_.block_tokens * kv_width_ * (m_.kv_format == PL_FP32 ? 4 : 2);
        return {m_.kv, m_.block_bytes, 2 * index * size, (2 * index + 1) * size, m_.kv_format, m_.block_tokens,
                m_.kv_heads, m_.head_dim};
    }

    const pl_model &m_;
    const pl_batch &b_;
    pl_pool &pool_;
    const KernelTable &k_;
    Workspace &w_;
    const int q_width_, kv_width_, qkv_width_;
    Inputs inputs_;
    float *x_, *joined_, *qkv_, *attended_, *gated_, *cos_, *sin_, *scratch_;
    int64_t gated_stride_, scratch_size_;
    int32_t *sequence_of_;
    AttendItem *items_;
    int num_items_;
};

}  // namespace

int32_t pl_abi_version(void) { return PL_ABI_VERSION; }
pl_pool *pl_pool_create(int32_t threads) { return new pl_pool(threads); }
void pl_pool_destroy(pl_pool *pool) { delete pool; }

int32_t pl_forward(const pl_model *model, const pl_batch *batch, pl_pool *pool, int32_t isa) {
    const KernelTable *kernels = kernels_for(isa);
    if (!kernels) return -2;
    try {
        Forward(*model, *batch, *pool, *kernels).run();
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
