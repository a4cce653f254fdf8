// What the executor calls, one table of functions per ISA. Plain structs only: this header is shared by translation
// units compiled for different ISAs.
#pragma once
#include "paceline_cpu.h"

#define PL_MAX_QUERIES 8
#define PL_SUM_CHUNK 512  // a multiple of 16

// Rows as a linear layer reads them. int8: values in [-127, 127], one scale and one correction (-128 * sum of the
// group's values, which cancels the weights' offset of 128) per group. Otherwise fp32, padded to in_padded.
struct Input {
    const float *fp32;
    const int8_t *int8;
    const float *scales;
    const int32_t *corrections;
};

struct Output {
    enum Mode { kStore, kAdd, kGated } mode;
    float *data;
    int64_t stride;  // elements from row to row
};

// Where one row's prepared input goes; the same layouts as Input.
struct InputRow {
    float *fp32;
    int8_t *int8;
    float *scales;
    int32_t *corrections;
};

// One layer's K and V of one member, and how a block is laid out.
struct KvLayer {
    uint8_t *blocks;
    int64_t block_bytes, k_offset, v_offset;
    int32_t kv_format, block_tokens, kv_heads, head_dim;
};

// Query rows that read the same K and V: heads of one group, rows of one sequence.
struct Queries {
    const float *q[PL_MAX_QUERIES];
    float *out[PL_MAX_QUERIES];
    int32_t position[PL_MAX_QUERIES];  // ascending
    int32_t rows, kv_head, window;
    const int32_t *table;
    float scale;
};

struct KernelTable {
    // `next`: the tile that this thread will probably ask for after these.
    void (*linear_tiles)(const pl_linear &, const Input &, const Output &, int rows, int begin, int end, int next);
    // What the norm of a row multiplies by, beside its weights.
    float (*rms_scale)(const float *x, float eps, int n);
    // Norm with that scale (weight NULL: none), then into the form that `next` reads.
    void (*prepare_row)(const float *x, const float *weight, float scale, const pl_linear &next, const InputRow &);
    // n values -> int8 groups as prepare_row makes them without a norm; zeros past the end.
    void (*quantize)(const float *x, int n, int groups, const InputRow &out);
    // Norm (weight NULL: none), then stored as fp32 or bf16.
    void (*store_state)(const float *x, const float *weight, float eps, int n, int32_t format, void *out);
    void (*norm)(float *x, const float *weight, float eps, int n);
    void (*rotate)(float *head, const float *cos, const float *sin, int head_dim);
    void (*store_key)(const KvLayer &, const int32_t *table, int position, int kv_head, const float *k);
    void (*store_value)(const KvLayer &, const int32_t *table, int position, int kv_head, const float *v);
    // Scratch: PL_MAX_QUERIES rows of (context + PL_LANES) floats.
    void (*attend)(const KvLayer &, const Queries &, float *scratch);
    int32_t (*argmax)(const float *x, int64_t n);
    void (*read)(const uint8_t *memory, int64_t bytes);
    // Noise of the tokens `ids`, or of the first n where it is NULL.
    void (*gumbel)(uint64_t key, const int32_t *ids, int64_t n, float *out);
    // out = e^(x - max x), and the sums of chunks of PL_SUM_CHUNK of them.
    void (*softmax_weights)(const float *x, int64_t n, float *out, float *sums);
    // The sums of chunks of x.
    void (*add_up)(const float *x, int64_t n, float *sums);
    // out = (x - top) * scale; and out = e^x.
    void (*rescale)(const float *x, int64_t n, float top, float scale, float *out);
    void (*exp)(const float *x, int64_t n, float *out);
};

extern const KernelTable kPortableKernels;
#ifdef PL_HAVE_X86
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
// The AMX table is the AVX-512 one with these linears.
void amx_linear_tiles(const pl_linear &, const Input &, const Output &, int rows, int begin, int end, int next);
#endif
