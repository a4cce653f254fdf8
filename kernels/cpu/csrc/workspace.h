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

// Up to so many rows every thread prepares all of a linear's input for itself: that takes less than meeting the other
// threads once more (a norm and quantization take 0.3 us a row, a meeting of two threads about 1 us).
static constexpr int kPrivateRows = 5;

// One linear's input for all rows, prepared by `prepare_row`; every thread has its own where there are few rows.
class Inputs {
public:
    Inputs(Workspace &w, int rows, int widest, int threads)
        : private_(rows <= kPrivateRows), copies_(private_ ? threads : 1),
          groups_((int64_t)rows * ((widest + PL_GROUP - 1) / PL_GROUP)),
          stride_((groups_ + kLine - 1) / kLine * kLine),
          fp32_(w.fp32.get(copies_ * stride_ * PL_GROUP)),
          int8_(w.int8.get(copies_ * stride_ * PL_GROUP)),
          scales_(w.scales.get(copies_ * stride_)),
          corrections_(w.corrections.get(copies_ * stride_)) {}

    bool are_private() const { return private_; }

    InputRow row(const pl_linear &l, int thread, int row) const {
        const int64_t copy = place(thread), at = copy * PL_GROUP + (int64_t)row * l.in_padded;
        const int64_t group = copy + (int64_t)row * (l.in_padded / PL_GROUP);
        return {fp32_ + at, int8_ + at, scales_ + group, corrections_ + group};
    }
    Input all(int thread) const {
        const int64_t copy = place(thread), at = copy * PL_GROUP;
        return {fp32_ + at, int8_ + at, scales_ + copy, corrections_ + copy};
    }

private:
    static constexpr int64_t kLine = 16;  // scales per 64 bytes: threads write to lines of their own

    int64_t place(int thread) const { return private_ ? thread * stride_ : 0; }

    bool private_;
    int64_t copies_, groups_, stride_;
    float *fp32_;
    int8_t *int8_;
    float *scales_;
    int32_t *corrections_;
};
