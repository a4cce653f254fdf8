// One call per ragged forward: embedding, blocks, final norm, head. Every thread runs the whole plan and meets the
// others at a barrier after each phase; inside a phase work is claimed item by item. No allocation once the workspace
// has grown to the largest batch seen.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "isa.h"
#include "pool.h"

namespace {

// Rows per claim in the row phases, tiles per claim in the linear phases (a multiple of 4: kernels take 4 at a time;
// about 20-100 kB of weights, so that the two claims' cost vanishes and the last claim is short).
constexpr int kRowsPerClaim = 1;
constexpr int kTilesPerClaim = 8;

// Memory that only grows, 64-byte aligned.
template <typename T>
class Buffer {
public:
    ~Buffer() { std::free(data_); }
    T *get(int64_t size) {
        if (size > size_) {
            std::free(data_);
            data_ = (T *)std::aligned_alloc(64, ((size_t)size * sizeof(T) + 127) / 64 * 64);
            size_ = data_ ? size : 0;
            if (!data_) throw std::bad_alloc();
        }
        return data_;
    }

private:
    T *data_ = nullptr;
    int64_t size_ = 0;
};

struct Workspace {
    Buffer<float> x, qkv, attended, gated, fp32, scales, cos, sin, scratch;
    Buffer<int8_t> int8;
    Buffer<int32_t> corrections, sequence_of, items;
};

// The engine thread makes all forwards, so one workspace per thread is one workspace.
thread_local Workspace workspace;

// One linear's input for all rows, prepared by `prepare`.
class Inputs {
public:
    Inputs(Workspace &w, int rows, int widest)
        : groups_((widest + PL_GROUP - 1) / PL_GROUP),
          fp32_(w.fp32.get((int64_t)rows * groups_ * PL_GROUP)),
          int8_(w.int8.get((int64_t)rows * groups_ * PL_GROUP)),
          scales_(w.scales.get((int64_t)rows * groups_)),
          corrections_(w.corrections.get((int64_t)rows * groups_)) {}

    InputRow row(const pl_linear &l, int row) const {
        const int64_t at = (int64_t)row * l.in_padded, group = (int64_t)row * (l.in_padded / PL_GROUP);
        return {fp32_ + at, int8_ + at, scales_ + group, corrections_ + group};
    }
    Input all() const { return {fp32_, int8_, scales_, corrections_}; }

private:
    int groups_;
    float *fp32_;
    int8_t *int8_;
    float *scales_;
    int32_t *corrections_;
};

class Forward {
public:
    Forward(const pl_model &m, const pl_batch &b, pl_pool &pool, const KernelTable &k)
        : m_(m), b_(b), pool_(pool), k_(k), w_(workspace), q_width_(m.heads * m.head_dim),
          kv_width_(m.kv_heads * m.head_dim), qkv_width_(q_width_ + 2 * kv_width_),
          inputs_(w_, b.rows, std::max({m.hidden, m.ffn, q_width_})) {
        x_ = w_.x.get((int64_t)b.rows * m.hidden);
        qkv_ = w_.qkv.get((int64_t)b.rows * qkv_width_);
        attended_ = w_.attended.get((int64_t)b.rows * q_width_);
        gated_stride_ = (m.ffn + PL_LANES - 1) / PL_LANES * PL_LANES;
        gated_ = w_.gated.get((int64_t)b.rows * gated_stride_);
        cos_ = w_.cos.get((int64_t)b.rows * (m.head_dim / 2));
        sin_ = w_.sin.get((int64_t)b.rows * (m.head_dim / 2));
        list_rows();
    }

    void run() {
        pool_.run([this](int thread) { on_thread(thread); });
    }

private:
    // Query rows that share one attend call: at most max_query_rows of one sequence.
    void list_rows() {
        sequence_of_ = w_.sequence_of.get(b_.rows);
        items_ = w_.items.get(2 * (int64_t)b_.rows);
        num_items_ = 0;
        int longest = 0;
        for (int s = 0; s < b_.sequences; s++) {
            longest = std::max(longest, b_.start[s] + b_.count[s]);
            for (int i = 0; i < b_.count[s]; i++) sequence_of_[b_.first_row[s] + i] = s;
            for (int i = 0; i < b_.count[s]; i += k_.max_query_rows) {
                items_[2 * num_items_] = b_.first_row[s] + i;
                items_[2 * num_items_ + 1] = std::min(k_.max_query_rows, b_.count[s] - i);
                num_items_++;
            }
        }
        scratch_size_ = (int64_t)k_.max_query_rows * (longest + PL_LANES);
        scratch_ = w_.scratch.get(scratch_size_ * pool_.threads());
    }

    int position(int row) const {
        const int s = sequence_of_[row];
        return b_.start[s] + row - b_.first_row[s];
    }
    const int32_t *table(int row) const { return b_.tables + b_.table_start[sequence_of_[row]]; }

    void on_thread(int thread) {
        each_row([&](int row) { embed(row); });
        for (int i = 0; i < m_.num_layers; i++) layer(m_.layers[i], i, thread);
        head();
    }

    void layer(const pl_layer &l, int index, int thread) {
        const KvLayer kv = kv_layer(index);
        each_row([&](int row) { prepare(x_ + (int64_t)row * m_.hidden, l.attention_norm, l.qkv, row); });
        linear(l.qkv, {Output::kStore, qkv_, qkv_width_}, b_.rows);
        each_row([&](int row) { rotate_and_store(l, kv, row); });
        attend(l, kv, thread);
        each_row([&](int row) { prepare(attended_ + (int64_t)row * q_width_, nullptr, l.output, row); });
        linear(l.output, {Output::kAdd, x_, m_.hidden}, b_.rows);
        each_row([&](int row) { prepare(x_ + (int64_t)row * m_.hidden, l.mlp_norm, l.gate_up, row); });
        linear(l.gate_up, {Output::kGated, gated_, gated_stride_}, b_.rows);
        each_row([&](int row) { prepare(gated_ + (int64_t)row * gated_stride_, nullptr, l.down, row); });
        linear(l.down, {Output::kAdd, x_, m_.hidden}, b_.rows);
    }

    void head() {
        int begin, end;
        while (pool_.claim(b_.wanted, kRowsPerClaim, &begin, &end))
            prepare(x_ + (int64_t)b_.wanted_rows[begin] * m_.hidden, m_.final_norm, m_.head, begin);
        pool_.barrier();
        if (b_.wanted) linear(m_.head, {Output::kStore, b_.logits, m_.vocab}, b_.wanted);
    }

    template <typename Body>
    void each_row(const Body &body) {
        int begin, end;
        while (pool_.claim(b_.rows, kRowsPerClaim, &begin, &end)) body(begin);
        pool_.barrier();
    }

    void prepare(const float *x, const float *weight, const pl_linear &next, int row) {
        k_.prepare_row(x, weight, m_.eps, next, inputs_.row(next, row));
    }

    void linear(const pl_linear &l, const Output &out, int rows) {
        const int tiles = (l.out + PL_LANES - 1) / PL_LANES;
        const Input input = inputs_.all();
        int begin, end;
        while (pool_.claim(tiles, kTilesPerClaim, &begin, &end)) k_.linear_tiles(l, input, out, rows, begin, end);
        pool_.barrier();
    }

    void embed(int row) {
        float *x = x_ + (int64_t)row * m_.hidden;
        const int64_t at = (int64_t)b_.tokens[row] * m_.hidden;
        if (m_.embedding_format == PL_FP32) {
            std::memcpy(x, (const float *)m_.embedding + at, m_.hidden * sizeof(float));
        } else {
            const uint16_t *from = (const uint16_t *)m_.embedding + at;
            for (int i = 0; i < m_.hidden; i++) {
                const uint32_t bits = (uint32_t)from[i] << 16;
                std::memcpy(x + i, &bits, 4);
            }
        }
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

    void attend(const pl_layer &l, const KvLayer &kv, int thread) {
        int begin, end;
        while (pool_.claim(num_items_ * m_.heads, 1, &begin, &end)) {
            const int item = begin / m_.heads, head = begin % m_.heads, row = items_[2 * item];
            Queries q;
            q.q = qkv_ + (int64_t)row * qkv_width_ + head * m_.head_dim;
            q.out = attended_ + (int64_t)row * q_width_ + head * m_.head_dim;
            q.q_stride = qkv_width_;
            q.out_stride = q_width_;
            q.rows = items_[2 * item + 1];
            q.start = position(row);
            q.kv_head = head / (m_.heads / m_.kv_heads);
            q.window = l.window;
            q.table = table(row);
            q.scale = 1.0f / std::sqrt((float)m_.head_dim);
            k_.attend(kv, q, scratch_ + thread * scratch_size_);
        }
        pool_.barrier();
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
    float *x_, *qkv_, *attended_, *gated_, *cos_, *sin_, *scratch_;
    int64_t gated_stride_, scratch_size_;
    int32_t *sequence_of_, *items_;
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

int32_t pl_linear_forward(const pl_linear *l, const float *x, int32_t rows, float *y, pl_pool *pool, int32_t isa) {
    const KernelTable *kernels = kernels_for(isa);
    if (!kernels) return -2;
    try {
        const Inputs inputs(workspace, rows, l->in_padded);
        const Output out{Output::kStore, y, l->out};
        const int tiles = (l->out + PL_LANES - 1) / PL_LANES;
        pool->run([&](int) {
            int begin, end;
            while (pool->claim(rows, kRowsPerClaim, &begin, &end))
                kernels->prepare_row(x + (int64_t)begin * l->in, nullptr, 0.0f, *l, inputs.row(*l, begin));
            pool->barrier();
            while (pool->claim(tiles, kTilesPerClaim, &begin, &end))
                kernels->linear_tiles(*l, inputs.all(), out, rows, begin, end);
        });
    } catch (const std::bad_alloc &) {
        return -1;
    }
    return 0;
}

void pl_argmax(const float *x, int32_t rows, int64_t columns, int32_t *index, pl_pool *pool, int32_t isa) {
    const KernelTable *kernels = kernels_for(isa);
    pool->run([&](int) {
        int begin, end;
        while (pool->claim(rows, 1, &begin, &end)) index[begin] = kernels->argmax(x + begin * columns, columns);
    });
}

void pl_read(const void *memory, int64_t bytes, pl_pool *pool, int32_t isa) {
    const KernelTable *kernels = kernels_for(isa);
    constexpr int64_t kChunk = 1 << 20;
    pool->run([&](int) {
        int begin, end;
        while (pool->claim((int)(bytes / kChunk), 1, &begin, &end))
            kernels->read((const uint8_t *)memory + begin * kChunk, kChunk);
    });
}
