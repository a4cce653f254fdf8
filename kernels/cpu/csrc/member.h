// One model's part of a forward: its activations, what its linears multiply, and what happens to one row or one group of
// heads of it. Knows nothing of threads and phases.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

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
          inputs_(Inputs::prepared(w.inputs, b.rows, std::max({m.hidden, m.ffn, q_width_, m.fc.out ? 2 * m.hidden : 0}), threads)),
          made_(Inputs::made(w.made, b.rows, std::max(m.ffn, q_width_))) {
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
        Product p = product(at(layer).qkv, {x_, m_.hidden, at(layer).attention_norm}, {Output::kStore, qkv_, qkv_width_}, b_.rows);
        p.chunk_tiles = std::lcm(m_.head_dim, kTilesPerChunk * PL_LANES) / PL_LANES;  // whole heads
        return p;
    }
    Product output(int layer) const {
        Product p = product(at(layer).output, {attended_, q_width_}, {Output::kAdd, x_, m_.hidden}, b_.rows);
        return makes_attended(layer) ? made(p) : p;
    }
    Product gate_up(int layer) const {
        Product p = product(at(layer).gate_up, {x_, m_.hidden, at(layer).mlp_norm}, {Output::kGated, gated_, gated_stride_}, b_.rows);
        if (makes_gated(layer)) p.chunk_tiles = kGatedTiles;
        return p;
    }
    Product down(int layer) const {
        Product p = product(at(layer).down, {gated_, gated_stride_}, {Output::kAdd, x_, m_.hidden}, b_.rows);
        return makes_gated(layer) ? made(p) : p;
    }
    Product logits() const {
        return product(m_.head, {x_, m_.hidden, m_.final_norm, b_.wanted_rows}, {Output::kStore, b_.logits, m_.head.out}, b_.wanted);
    }

    void embed(int row) {
        set_angles(row);
        if (m_.fc.out) join(row);
        else read_embedding(row, x_ + (int64_t)row * m_.hidden);
    }

    // The heads in tiles [begin, end) of `qkv`'s outputs, of all rows: queries and keys are normed and rotated, keys and
    // values stored.
    void take_heads(int layer, int begin, int end) {
        const int first = begin * PL_LANES / m_.head_dim, past = std::min(end * PL_LANES, qkv_width_) / m_.head_dim;
        for (int row = 0; row < b_.rows; row++)
            for (int h = first; h < past; h++) take_head(layer, row, h);
    }

    // What the heads read, and that as the input of `output`, if whole groups of it are heads.
    void attend(int layer, int item, int thread) {
        const AttendItem &some = items_[item / m_.kv_heads];
        const int kv_head = item % m_.kv_heads;
        k_.attend(kv_layer(layer), queries(some, kv_head, at(layer).window), scratch_ + thread * scratch_size_);
        if (!makes_attended(layer)) return;
        const int groups = m_.head_dim / PL_GROUP;
        for (int i = 0; i < some.count; i++) {
            const int row = row_of(some, i), head = head_of(some, i, kv_head);
            k_.quantize(attended_at(row, head), m_.head_dim, groups, made_.row_from(at(layer).output, row, head * groups));
        }
    }

    // The outputs of tiles [begin, end) of `gate_up`, gated, as the input of `down`.
    void take_gated(int layer, int begin, int end) {
        if (!makes_gated(layer)) return;
        const int first = begin / kGatedTiles, groups = (end - begin + kGatedTiles - 1) / kGatedTiles;
        for (int row = 0; row < b_.rows; row++)
            k_.quantize(gated_ + row * gated_stride_ + first * PL_GROUP, m_.ffn - first * PL_GROUP, groups,
                        made_.row_from(at(layer).down, row, first));
    }

    // States of the wanted rows for the caller, then those that the blocks keep.
    void store_states(int item) {
        const int wanted = wanted_states(), row = item < wanted ? b_.wanted_rows[item] : item - wanted;
        const float *x = x_ + (int64_t)row * m_.hidden;
        if (item < wanted) store_state(x, PL_FP32, b_.states + (int64_t)item * m_.hidden);
        else store_state(x, m_.kv_format, kept_state(row));
    }

private:
    static constexpr int kGatedTiles = 2 * PL_GROUP / PL_LANES;  // of gate_up, for one group of down's input

    // Whether a phase quantizes what it makes for the next one, while it is at hand.
    bool makes_attended(int layer) const { return at(layer).output.format == PL_INT8 && m_.head_dim % PL_GROUP == 0; }
    bool makes_gated(int layer) const { return at(layer).down.format == PL_INT8; }
    Product made(Product p) const {
        p.inputs = &made_;
        p.is_made = true;
        return p;
    }

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

    // Queries come first among the heads, then keys, then values.
    void take_head(int layer, int row, int head) {
        float *x = qkv_ + (int64_t)row * qkv_width_ + (int64_t)head * m_.head_dim;
        const int key = head - m_.heads, value = key - m_.kv_heads, half = m_.head_dim / 2;
        if (value >= 0) return k_.store_value(kv_layer(layer), table(row), position(row), value, x);
        const float *norm = key < 0 ? at(layer).q_norm : at(layer).k_norm;
        if (norm) k_.norm(x, norm, m_.eps, m_.head_dim);
        k_.rotate(x, cos_ + (int64_t)row * half, sin_ + (int64_t)row * half, m_.head_dim);
        if (key >= 0) k_.store_key(kv_layer(layer), table(row), position(row), key, x);
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

    int row_of(const AttendItem &item, int i) const {
        return b_.first_row[item.sequence] + (item.first + i) / (m_.heads / m_.kv_heads);
    }
    int head_of(const AttendItem &item, int i, int kv_head) const {
        const int group = m_.heads / m_.kv_heads;
        return kv_head * group + (item.first + i) % group;
    }
    float *attended_at(int row, int head) const {
        return attended_ + (int64_t)row * q_width_ + (int64_t)head * m_.head_dim;
    }

    Queries queries(const AttendItem &item, int kv_head, int window) const {
        Queries in;
        for (int i = 0; i < item.count; i++) {
            const int row = row_of(item, i), head = head_of(item, i, kv_head);
            in.q[i] = qkv_ + (int64_t)row * qkv_width_ + (int64_t)head * m_.head_dim;
            in.out[i] = attended_at(row, head);
            in.position[i] = position(row);
        }
        in.rows = item.count;
        in.kv_head = kv_head;
        in.window = window;
        in.table = table(row_of(item, 0));
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
    Inputs inputs_, made_;
    float *x_, *joined_, *qkv_, *attended_, *gated_, *cos_, *sin_, *scratch_;
    int64_t gated_stride_, scratch_size_;
    int32_t *sequence_of_;
    AttendItem *items_;
    int num_items_;
};

}  // namespace
