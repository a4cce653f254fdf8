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

struct InputBuffers {
    Buffer<float> fp32, scales;
    Buffer<int8_t> int8;
    Buffer<int32_t> corrections;
};

struct Workspace {
    Buffer<float> x, joined, qkv, attended, gated, cos, sin, scratch;
    InputBuffers inputs, made;
    Buffer<int32_t> sequence_of;
    Buffer<AttendItem> items;
};

// Up to so many rows every thread prepares all of a linear's input for itself: that takes less than meeting the other
// threads once more (a norm and quantization take 0.2 us a row, a meeting of two threads about 1 us).
static constexpr int kPrivateRows = 5;

// One linear's input for all rows, prepared from fp32 by `prepare_row`; every thread has its own where there are few rows. Or
// one for all threads, int8, made by the phase before.
class Inputs {
public:
    static Inputs prepared(InputBuffers &b, int rows, int widest, int threads) {
        return Inputs(b, rows, widest, rows <= kPrivateRows, threads, true);
    }
    static Inputs made(InputBuffers &b, int rows, int widest) { return Inputs(b, rows, widest, false, 1, false); }

    bool are_private() const { return private_; }

    InputRow row(const pl_linear &l, int thread, int row) const {
        const int64_t copy = place(thread), at = copy * PL_GROUP + (int64_t)row * l.in_padded;
        const int64_t group = copy + (int64_t)row * (l.in_padded / PL_GROUP);
        return {fp32_ + at, int8_ + at, scales_ + group, corrections_ + group};
    }
    // From its `first` group on, of what is made.
    InputRow row_from(const pl_linear &l, int row, int first) const {
        const int64_t group = (int64_t)row * (l.in_padded / PL_GROUP) + first;
        return {nullptr, int8_ + group * PL_GROUP, scales_ + group, corrections_ + group};
    }
    Input all(int thread) const {
        const int64_t copy = place(thread), at = copy * PL_GROUP;
        return {fp32_ + at, int8_ + at, scales_ + copy, corrections_ + copy};
    }

private:
    Inputs(InputBuffers &b, int rows, int widest, bool is_private, int threads, bool has_floats)
        : private_(is_private), copies_(private_ ? threads : 1),
          groups_((int64_t)rows * ((widest + PL_GROUP - 1) / PL_GROUP)),
          stride_((groups_ + kLine - 1) / kLine * kLine),
          fp32_(b.fp32.get(has_floats ? copies_ * stride_ * PL_GROUP : 0)),
          int8_(b.int8.get(copies_ * stride_ * PL_GROUP)),
          scales_(b.scales.get(copies_ * stride_)),
          corrections_(b.corrections.get(copies_ * stride_)) {}

    static constexpr int64_t kLine = 16;  // scales per 64 bytes: threads write to lines of their own

    int64_t place(int thread) const { return private_ ? thread * stride_ : 0; }

    bool private_;
    int64_t copies_, groups_, stride_;
    float *fp32_;
    int8_t *int8_;
    float *scales_;
    int32_t *corrections_;
};
