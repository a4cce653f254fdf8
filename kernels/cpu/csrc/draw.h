// From one row of draft logits to a token, as a request's sampling parameters ask for it.
#pragma once
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "categorical.h"

// SplitMix64's finaliser: server/decoding/noise.py absorbs seed and choice with it, this file the position.
inline uint64_t mix64(uint64_t word) {
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9ull;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBull;
    return word ^ (word >> 31);
}

// One drafting sequence's way of choosing; owns its edits, which grow with the tokens that it draws.
class Drawer {
public:
    Drawer(const pl_draw &how, int64_t columns, const int32_t *vocab_ids, const KernelTable &kernels)
        : how_(how), edits_(how.edit, how.edit + how.edits), columns_(columns), vocab_ids_(vocab_ids), kernels_(kernels),
          cuts_k_(how.top_k > 0 && how.top_k < columns), cuts_p_(how.top_p < 1.0f) {
        // All memory is taken here: choosing runs on the pool's threads, where nothing could be done about its lack.
        edits_.reserve(how.edits + how.length);
        if (how.mode == PL_SEEDED) weights_.resize(columns), noise_.resize(columns);
        if (how.mode == PL_SAMPLED) sums_.resize(Categorical::chunks(columns));
        if (how.mode != PL_GREEDY && (cuts_k_ || cuts_p_)) order_.resize(columns);
    }

    // Chooses the column of draft token `step`; the logits are used up.
    int32_t choose(float *logits, int32_t step) {
        for (const pl_edit &edit : edits_) apply(edit, logits[edit.column]);
        const int32_t best = kernels_.argmax(logits, columns_);
        const int32_t chosen = how_.mode == PL_GREEDY ? best : draw(logits, logits[best], step);
        if (how_.repetition != 1.0f || how_.presence != 0.0f || how_.frequency != 0.0f) count(chosen);
        return chosen;
    }

private:
    static void apply(const pl_edit &edit, float &x) {
        x += edit.bias;
        x = x > 0.0f ? x / edit.penalty : x * edit.penalty;
        x += edit.shift;
    }

    void count(int32_t column) {
        auto found = std::find_if(edits_.begin(), edits_.end(), [&](const pl_edit &e) { return e.column == column; });
        if (found == edits_.end()) found = edits_.insert(found, {column, 0, 0.0f, 1.0f, 0.0f});
        found->penalty = how_.repetition;
        found->shift -= how_.frequency + (found->counted ? 0.0f : how_.presence);
        found->counted = 1;
    }

    int32_t draw(float *scores, float top, int32_t step) {
        constexpr float kMinTemperature = 1e-30f;  // that of server/decoding/sampler.py
        const bool sampled = how_.mode == PL_SAMPLED;
        float *weights = sampled ? how_.probs + step * columns_ : weights_.data();
        kernels_.rescale(scores, columns_, top, 1.0f / std::max(how_.temperature, kMinTemperature), scores);
        kernels_.exp(scores, columns_, weights);
        if (cuts_k_ || cuts_p_) keep_leading(scores, weights);
        if (how_.min_p > 0.0f)
            for (int64_t i = 0; i < columns_; i++) weights[i] = weights[i] < how_.min_p ? 0.0f : weights[i];
        return sampled ? invert(weights, how_.uniforms[step]) : add_noise(scores, weights, step);
    }

    // Zero weight for what top_k and top_p remove; ties keep the lower column.
    void keep_leading(const float *scores, float *weights) {
        const auto begin = order_.begin(), end = order_.end(), kept = cuts_k_ ? begin + how_.top_k : end;
        const auto later = [&](int32_t a, int32_t b) { return scores[a] != scores[b] ? scores[a] < scores[b] : a > b; };
        std::iota(begin, end, 0);
        if (cuts_k_) std::nth_element(begin, kept, end, [&](int32_t a, int32_t b) { return later(b, a); });
        auto first = begin;
        if (cuts_p_) {
            double missing = 0.0;
            for (auto at = begin; at != kept; ++at) missing += weights[*at];
            missing *= how_.top_p;
            std::make_heap(begin, kept, later);
            first = kept;
            do {
                std::pop_heap(begin, first, later);
                missing -= weights[*--first];
            } while (first != begin && missing > 0.0);
        }
        for (auto at = begin; at != first; ++at) weights[*at] = 0.0f;
        for (auto at = kept; at != end; ++at) weights[*at] = 0.0f;
    }

    // A draw by inversion of the cumulative sum; the weights become probabilities.
    int32_t invert(float *weights, double uniform) {
        const Categorical q{weights, sums_.data(), columns_};
        kernels_.add_up(weights, columns_, q.sums);
        const int32_t at = q.draw(uniform);
        const float share = (float)(1.0 / q.total());
        for (int64_t i = 0; i < columns_; i++) weights[i] *= share;
        return at;
    }

    // The argmax of scores + noise among what has weight.
    int32_t add_noise(float *scores, const float *weights, int32_t step) {
        constexpr uint64_t kGamma = 0x9E3779B97F4A7C15ull;
        const uint64_t key = mix64((how_.noise + kGamma) ^ (uint64_t)(how_.position + step));
        kernels_.gumbel(key, vocab_ids_, columns_, noise_.data());
        for (int64_t i = 0; i < columns_; i++) scores[i] = weights[i] > 0.0f ? scores[i] + noise_[i] : -INFINITY;
        return kernels_.argmax(scores, columns_);
    }

    const pl_draw &how_;
    std::vector<pl_edit> edits_;
    const int64_t columns_;
    const int32_t *vocab_ids_;
    const KernelTable &kernels_;
    const bool cuts_k_, cuts_p_;
    std::vector<float> weights_, noise_, sums_;
    std::vector<int32_t> order_;
};
