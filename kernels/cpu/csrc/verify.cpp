// Verification of unseeded sampled choices: which draft tokens stay, and a draw of the token after them. The rules and
// their sources are in server/decoding/verify.py, whose torch versions are the oracle.
#include <algorithm>
#include <new>
#include <vector>

#include "categorical.h"
#include "isa.h"
#include "pool.h"

namespace {

// One row of the target: p = weights / total.
struct Row : Categorical {
    const float *scores;
};

// One block, its rows' weights made: K + 1 of them.
class Verification {
public:
    Verification(pl_block &block, const Row *rows, const KernelTable &kernels) : b_(block), rows_(rows), kernels_(kernels) {}

    void run(bool by_block) {
        double scale = 1.0;
        b_.accepted = by_block ? longest_kept(scale) : first_refused();
        Row row = rows_[b_.accepted];
        if (b_.accepted < b_.length) subtract(row, scale);
        b_.token = row.draw(b_.uniforms[b_.length]);
    }

private:
    double p(int32_t i, int32_t token) const { return rows_[i].weights[token] / rows_[i].total(); }

    // Ids that q of position i may be positive at, and its values there.
    int64_t width() const { return b_.q ? b_.width : 1; }
    int64_t id(int32_t i, int64_t column) const {
        return !b_.q ? b_.tokens[i] : b_.columns ? b_.columns[column] : column;
    }
    float q_at(int32_t i, int64_t column) const { return b_.q ? b_.q[i * b_.width + column] : 1.0f; }

    double q(int32_t i, int32_t token) const {
        if (!b_.q) return 1.0;
        if (!b_.columns) return token < b_.width ? b_.q[i * b_.width + token] : 0.0f;
        const int64_t *end = b_.columns + b_.width, *at = std::lower_bound(b_.columns, end, token);
        return at != end && *at == token ? b_.q[i * b_.width + (at - b_.columns)] : 0.0f;
    }

    // p / q of draft token i; one that q cannot have drawn is refused.
    double ratio(int32_t i) const {
        const double drafted = q(i, b_.tokens[i]);
        return drafted > 0.0 ? p(i, b_.tokens[i]) / drafted : 0.0;
    }

    // Token-wise: 2211.17192, algorithm 1.
    int32_t first_refused() const {
        int32_t i = 0;
        while (i < b_.length && b_.uniforms[i] < ratio(i)) i++;
        return i;
    }

    // Block verification: 2403.10444, algorithm 2. `scale` becomes the accepted prefix's P.
    int32_t longest_kept(double &scale) const {
        int32_t kept = 0;
        double joint = 1.0;
        for (int32_t i = 0; i < b_.length; i++) {
            joint = std::min(joint * ratio(i), 1.0);
            double h = joint;
            if (i + 1 < b_.length) {
                const double more = surplus(i + 1, joint), missing = more + 1.0 - joint;
                h = missing > 0.0 ? more / missing : 1.0;
            }
            if (b_.uniforms[i] < h) kept = i + 1, scale = joint;
        }
        return kept;
    }

    // sum_v max(scale p_i(v) - q_i(v), 0): all of p outside of q's ids counts whole.
    double surplus(int32_t i, double scale) const {
        const double share = scale / rows_[i].total();
        double inside = 0.0, above = 0.0;
        for (int64_t c = 0; c < width(); c++) {
            const double target = share * rows_[i].weights[id(i, c)];
            inside += target;
            above += std::max(target - q_at(i, c), 0.0);
        }
        return std::max(scale - inside, 0.0) + above;
    }

    // The row's weights become those of max(scale p - q, 0). Where that is zero everywhere, p equals q, only rounding
    // can have refused, and p is the limit.
    void subtract(Row &row, double scale) const {
        const int32_t i = b_.accepted;
        const double unit = row.total() / scale;
        for (int64_t c = 0; c < width(); c++) {
            float &weight = row.weights[id(i, c)];
            weight = (float)std::max(weight - q_at(i, c) * unit, 0.0);
        }
        kernels_.add_up(row.weights, row.n, row.sums);
        if (row.total() <= 0.0) kernels_.softmax_weights(row.scores, row.n, row.weights, row.sums);
    }

    pl_block &b_;
    const Row *rows_;
    const KernelTable &kernels_;
};

}  // namespace

int32_t pl_verify(const float *scores, int64_t vocab, pl_block *blocks, int32_t count, int32_t by_block, pl_pool *pool,
                  int32_t isa) {
    const KernelTable *kernels = kernels_for(isa);
    if (!kernels) return -2;
    try {
        thread_local std::vector<float> weights, sums;  // kept: one thread verifies, step after step
        std::vector<Row> rows;
        std::vector<int32_t> firsts;
        const int64_t chunks = Categorical::chunks(vocab);
        for (int32_t b = 0; b < count; b++) {
            firsts.push_back((int32_t)rows.size());
            for (int32_t i = 0; i <= blocks[b].length; i++)
                rows.push_back({{nullptr, nullptr, vocab}, scores + (blocks[b].first_row + i) * vocab});
        }
        weights.resize(std::max(weights.size(), rows.size() * vocab));
        sums.resize(std::max(sums.size(), rows.size() * chunks));
        for (size_t i = 0; i < rows.size(); i++) {
            rows[i].weights = weights.data() + i * vocab;
            rows[i].sums = sums.data() + i * chunks;
        }
        pool->run([&](Worker &worker) {
            worker.each_item((int)rows.size(), [&](int i) {
                kernels->softmax_weights(rows[i].scores, vocab, rows[i].weights, rows[i].sums);
            });
            worker.each_item(count, [&](int b) {
                Verification(blocks[b], rows.data() + firsts[b], *kernels).run(by_block);
            });
        });
    } catch (const std::bad_alloc &) {
        return -1;
    }
    return 0;
}
