// One model's part of a forward: its activations, what its linears multiply, and what happens to one row or one group of
// heads of it. Knows nothing of threads and phases.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "linear_phase.h"
#include "workspace.h"

namespace {

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

class Member {
public:
    Member(const pl_model &m, const pl_batch &b, const KernelTable &k, Workspace &w, int threads)
        : m_(m), b_(b), k_(k), q_width_(m.heads * m.head_dim), kv_width_(m.kv_heads * m.head_dim),
          qkv_width_(q_width_ + 2 * kv_width_),
          inputs_(w, b.rows, std::max({m.hidden, m.ffn, q_width_, m.fc.out ? 2 * m.hidden : 0}), threads) {
        x_ = w.x.get((int64_t)b.rows * m.hidden);
        joined_ = m.fc.out ? w.joined.get((int64_t)b.rows * 2 * m.hidden) : nullptr;
        qkv_ = w.qkv.get((int64_t)b.rows * qkv_width_);
        attended_ = w.attended.get((int64_t)b.rows * q_width_);
        gated_stride_ = (m.ffn + PL_LANES - 1) / PL_LANES * PL_LANES;
        gated_ = w.gated.get((int64_t)b.rows * gated_stride_);
        cos_ = w.cos.get((int64_t)b.rows * (m.head_dim / 2));
        sin_ = w.sin.get((int64_t)b.rows * (m.head_dim / 2));
        list_rows(w, threads);
    }

    int rows() const { return b_.rows; }
    int attend_items() const { return num_items_ * m_.kv_heads; }
    int state_items() const { return wanted_states() + (m_.state_offset < 0 ? 0 : b_.rows); }

    // What a phase multiplies. A model without an fc has no rows there.
    Product fc() const { return product(m_.fc, {joined_, 2 * m_.hidden}, {Output::kStore, x_, m_.hidden}, m_.fc.out ? b_.rows : 0); }
    Product qkv(int layer) const {
        return product(at(layer).qkv, {x_, m_.hidden, at(layer).attention_norm}, {Output::kStore, qkv_, qkv_width_}, b_.rows);
    }
    Product output(int layer) const {
        return product(at(layer).output, {attended_, q_width_}, {Output::kAdd, x_, m_.hidden}, b_.rows);
    }
    Product gate_up(int layer) const {
        return product(at(layer).gate_up, {x_, m_.hidden, at(layer).mlp_norm}, {Output::kGated, gated_, gated_stride_}, b_.rows);
    }
    Product down(int layer) const {
        return product(at(layer).down, {gated_, gated_stride_}, {Output::kAdd, x_, m_.hidden}, b_.rows);
    }
    Product logits() const {
        return product(m_.head, {x_, m_.hidden, m_.final_norm, b_.wanted_rows}, {Output::kStore, b_.logits, m_.head.out}, b_.wanted);
    }

    void embed(int row) {
        set_angles(row);
        if (m_.fc.out) join(row);
        else read_embedding(row, x_ + (int64_t)row * m_.hidden);
    }

    void rotate_and_store(int layer, int row) {
        const pl_layer &l = at(layer);
        const KvLayer kv = kv_layer(layer);
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

    void attend(int layer, int item, int thread) {
        const Queries asked = queries(items_[item / m_.kv_heads], item % m_.kv_heads, at(layer).window);
        k_.attend(kv_layer(layer), asked, scratch_ + thread * scratch_size_);
    }

    // States of the wanted rows for the caller, then those that the blocks keep.
    void store_states(int item) {
        const int wanted = wanted_states(), row = item < wanted ? b_.wanted_rows[item] : item - wanted;
        const float *x = x_ + (int64_t)row * m_.hidden;
        if (item < wanted) store_state(x, PL_FP32, b_.states + (int64_t)item * m_.hidden);
        else store_state(x, m_.kv_format, kept_state(row));
    }

private:
    void list_rows(Workspace &w, int threads) {
        const int group = m_.heads / m_.kv_heads;
        sequence_of_ = w.sequence_of.get(b_.rows);
        items_ = w.items.get((int64_t)b_.rows * group);
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
        scratch_ = w.scratch.get(scratch_size_ * threads);
    }

    int position(int row) const {
        const int s = sequence_of_[row];
        return b_.start[s] + row - b_.first_row[s];
    }
    const int32_t *table(int row) const { return b_.tables + b_.table_start[sequence_of_[row]]; }

    const pl_layer &at(int layer) const { return m_.layers[layer]; }
    int wanted_states() const { return b_.states ? b_.wanted : 0; }
    Product product(const pl_linear &l, const Rows &rows, const Output &out, int count) const {
        return {&l, &inputs_, rows, m_.eps, out, count};
    }

    void store_state(const float *x, int32_t format, void *out) {
        k_.store_state(x, m_.final_norm, m_.eps, m_.hidden, format, out);
    }

    void *kept_state(int row) const { return state_at(m_, table(row), position(row)); }

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
    const KernelTable &k_;
    const int q_width_, kv_width_, qkv_width_;
    Inputs inputs_;
    float *x_, *joined_, *qkv_, *attended_, *gated_, *cos_, *sin_, *scratch_;
    int64_t gated_stride_, scratch_size_;
    int32_t *sequence_of_;
    AttendItem *items_;
    int num_items_;
};

}  // namespace
