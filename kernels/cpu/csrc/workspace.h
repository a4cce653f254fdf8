// The activations of a forward: memory that is kept from call to call, and how a linear's input lies in it.
#pragma once
#include <cstdlib>
#include <new>

#include "kernel_table.h"

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

// What shares one attend call: at most PL_MAX_QUERIES of a sequence's (row, head of the group) pairs, rows first.
struct AttendItem {
    int32_t sequence, first, count;
};

struct Workspace {
    Buffer<float> x, joined, qkv, attended, gated, fp32, scales, cos, sin, scratch;
    Buffer<int8_t> int8;
    Buffer<int32_t> corrections, sequence_of;
    Buffer<AttendItem> items;
};

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
