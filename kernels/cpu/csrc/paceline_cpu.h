// The plain C interface of Paceline's CPU kernels. Loaded with ctypes; knows nothing of Python, torch or requests.
//
// A model is a tree of structs that point into memory owned by the caller, which keeps it alive. One call of
// pl_forward runs one ragged batch: prefill chunks, decodes and verify blocks alike. Units: counts are elements,
// rows are tokens, offsets say what they are offsets of.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PL_ABI_VERSION 11
#define PL_LANES 16  // output rows per weight tile, positions per K tile
#define PL_GROUP 64  // inputs that share one activation scale (int8)
#define PL_MOST_TOGETHER 8  // models in one forward
#define PL_VECTORS 16  // 64-byte vectors of weights per group of a sparse tile

enum { PL_FP32 = 0, PL_BF16 = 1, PL_INT8 = 2 };
enum { PL_GREEDY = 0, PL_SEEDED = 1, PL_SAMPLED = 2 };
enum { PL_ISA_PORTABLE = 0, PL_ISA_AVX2 = 1, PL_ISA_AVX512 = 2, PL_ISA_AMX = 3 };

// y = x W^T + bias. `data` holds tiles of PL_LANES output rows, one after another, rows padded with zeros:
//   fp32 [tile][in][lane]; bf16 [tile][in/2][lane][2]; int8 [tile][in/4][lane][4], weight + 128 as uint8,
// with `in` padded to `in_padded` (a multiple of 4 for fp32 and bf16, of PL_GROUP for int8).
// Sparse: the same tiles cut into vectors of 64 bytes, as they are when dense. A group of PL_VECTORS of them is their masks,
// one bit per value, least significant first, and then the values of the set bits; 0 (int8: a weight of 0) stands where
// no bit is set. `in_padded` makes whole groups. Behind the last value 64 bytes more can be read.
// Picked (int8 only): each row keeps `picks` weights of every PL_GROUP inputs, the same number everywhere. A group is
// picks / 4 pairs of vectors [lane][4]: the weights as int8, and the numbers of their inputs in the group as uint8. A fourth
// pair has no numbers: its lowest, middle and highest two bits are the highest of the first, second and third pair's.
typedef struct {
    int32_t format, out, in, in_padded;
    const void *data;
    const int64_t *tile_starts;  // [tiles + 1] bytes from `data` to each tile; NULL: dense
    const float *scale;  // int8: [tiles * PL_LANES], one per output row
    const float *bias;   // [tiles * PL_LANES] or NULL
    int32_t picks;       // 4, 8, 12 or 16; 0: not picked
} pl_linear;

typedef struct {
    const float *attention_norm, *mlp_norm;  // [hidden]; attention_norm NULL: none
    const float *q_norm, *k_norm;            // [head_dim] or NULL
    pl_linear qkv;                           // q heads, k heads, v heads
    pl_linear output;
    pl_linear gate_up;  // tiles alternate: gate, up
    pl_linear down;
    int32_t window;  // positions seen, own included; 0 = all
} pl_layer;

typedef struct {
    int32_t num_layers, hidden, ffn, heads, kv_heads, head_dim;
    int32_t embedding_format;  // fp32 or bf16
    int32_t kv_format;         // fp32 or bf16
    int32_t block_tokens;      // a multiple of PL_LANES
    float eps, rope_scale;
    const float *inv_freq;     // [head_dim / 2]
    const void *embedding;     // [token ids][hidden]
    const float *final_norm;   // [hidden], or NULL: none
    const pl_layer *layers;
    pl_linear head;            // one row per logit
    const int32_t *vocab_ids;  // [head.out] token id of each head row, ascending, or NULL: the row itself; for pl_draft_blocks only
    uint8_t *kv;               // blocks of block_bytes; in a block, per layer: K then V,
    int64_t block_bytes;       // K [kv_head][block_tokens / 16][head_dim][16], V [kv_head][block_tokens][head_dim]
    int64_t state_offset;      // bytes from a block's start to its states [block_tokens][hidden] in kv_format, or -1:
                               // every row's state (what the head reads) is kept there for a draft that reads states
    pl_linear fc;              // out 0: none. A draft that reads states: its blocks get fc([embedding, feature])
} pl_model;

typedef struct {
    int32_t rows, sequences, wanted;
    const int32_t *tokens;      // [rows]
    const int32_t *first_row;   // [sequences]
    const int32_t *count;       // [sequences]
    const int32_t *start;       // [sequences] position of the first row
    const int32_t *table_start; // [sequences] where the sequence's blocks begin in `tables`
    const int32_t *tables;      // block numbers
    const int32_t *wanted_rows; // [wanted]
    float *logits;              // [wanted][head.out]
    const float *features;      // [rows][hidden] if the model has an fc
    float *states;              // [wanted][hidden] out, after the final norm; or NULL
} pl_batch;

// What a request's penalties and biases do to one logit x: x += bias; then x / penalty, or x * penalty where x <= 0; then
// x += shift.
typedef struct {
    int32_t column;
    int32_t counted;  // whether `shift` has the presence penalty already
    float bias, penalty, shift;
} pl_edit;

// How one sequence's draft tokens are chosen from its logits: edits, temperature, top_k, top_p, min_p, in this order.
// Greedy takes the argmax after the edits, seeded the argmax of scores + Gumbel noise, sampled a draw by its uniforms.
typedef struct {
    int32_t sequence;  // its index in the batch
    int32_t length;    // tokens to draft, at least 1; blocks for their K and V are there
    int32_t mode;      // PL_GREEDY, PL_SEEDED or PL_SAMPLED
    int32_t top_k;     // 0: off
    float temperature, top_p, min_p;        // top_p 1 and min_p 0: off
    float repetition, presence, frequency;  // penalties of the draft tokens themselves, for those after them
    int32_t edits;                          // count
    const pl_edit *edit;
    uint64_t noise;          // seeded: the noise stream, into which the position goes
    int64_t position;        // seeded: of the first draft token
    const double *uniforms;  // sampled: [length] in [0, 1)
    float *probs;            // sampled: [length][columns] out, the distributions that the tokens were drawn from
} pl_draw;

// Which sequences of a batch draft, in the order of its wanted rows (one per drafting sequence, its last).
typedef struct {
    int32_t drafts;
    int32_t columns;  // logits that may be drawn: the first ones of the head
    int32_t stride;
    const pl_draw *draw;  // [drafts]
    int32_t *tokens;      // [drafts][stride] out, token ids
    const pl_model *target;  // kept the states before the batch's rows, which are their features; NULL: the batch has them
    const int32_t *target_table_start, *target_tables;  // its blocks, by sequence of the batch
} pl_draft;

// A block of draft tokens of an unseeded sampled choice, with the target's scores: row first_row + j is the position after
// j draft tokens. Without draft tokens it is a plain draw.
typedef struct {
    int32_t first_row, length;
    int64_t width;
    const int32_t *tokens;    // [length]
    const float *q;           // [length][width] what the tokens were drawn from; NULL: one-hot
    const int64_t *columns;   // [width] token id of each column of q, ascending; NULL: the first ones
    const double *uniforms;   // [length + 1] in [0, 1): one per draft token, then that of the token after them
    int32_t accepted, token;  // out
} pl_block;

typedef struct pl_pool pl_pool;

#define PL_API __attribute__((visibility("default")))

PL_API int32_t pl_abi_version(void);
PL_API int32_t pl_best_isa(void);                      // of this CPU, among those compiled in
PL_API pl_pool *pl_pool_create(int32_t threads);       // threads - 1 workers; the caller is one more
PL_API void pl_pool_destroy(pl_pool *pool);

// Runs a batch of each of `count` models of as many layers, phase by phase together; each row's bits are those it would
// have alone. Returns 0, or -1 if memory for the activations could not be had, -2 for an ISA that is not here, -3 for
// models that cannot go together.
PL_API int32_t pl_forward(const pl_model *const *models, const pl_batch *const *batches, int32_t count, pl_pool *pool,
                          int32_t isa);

// Drafts: runs the batch, then one row per drafting sequence and forward until all lengths are reached. K and V
// of all but each sequence's last draft token are written. A draft with an fc gets the batch's features from the caller
// or from its target; later rows read the state of the row before. Returns as pl_forward.
PL_API int32_t pl_draft_blocks(const pl_model *model, const pl_batch *first, const pl_draft *draft, pl_pool *pool,
                               int32_t isa);

// States that forwards of a model with a state_offset kept: out fp32 [rows][hidden]. Of the batch only rows, sequences,
// first_row, count, start and the tables count; a start may be -1: zeros stand before the first position.
PL_API void pl_read_states(const pl_model *model, const pl_batch *batch, float *out);

// Linears on their own, one after another as a forward has them, for tests and benches. Each reads the first `in` of
// x fp32 [rows][width] and writes y fp32 [rows][out], which needs room for the widest.
PL_API int32_t pl_linears_forward(const pl_linear *linears, int32_t count, const float *x, int32_t rows, int32_t width,
                                  float *y, pl_pool *pool, int32_t isa);

// Packing, once at load: w fp32 [out][in] -> data (sized by pl_packed_bytes); for int8 also scale.
// Rows of gate and up come interleaved tile by tile from the caller.
PL_API int64_t pl_packed_bytes(int32_t format, int32_t out, int32_t in);
PL_API int32_t pl_pack(int32_t format, const float *w, int32_t out, int32_t in, void *data, float *scale, pl_pool *pool);

// Gumbel noise of seeded rows, on the calling thread: keys [rows] -> out [rows][n].
PL_API void pl_gumbel(const int64_t *keys, int32_t rows, int64_t n, float *out, int32_t isa);

// Index of the greatest value of each row, the lowest among equals: x [rows][columns].
PL_API void pl_argmax(const float *x, int32_t rows, int64_t columns, int32_t *index, pl_pool *pool, int32_t isa);

// Verifies blocks by the block rule (2403.10444) or token-wise (2211.17192): scores [rows][vocab], p = softmax of a row.
// Returns as pl_forward.
PL_API int32_t pl_verify(const float *scores, int64_t vocab, pl_block *blocks, int32_t count, int32_t by_block,
                         pl_pool *pool, int32_t isa);

// Reads memory once with all threads (whole MiB): timing it gives the bandwidth ceiling of benches.
PL_API void pl_read(const void *memory, int64_t bytes, pl_pool *pool, int32_t isa);

#ifdef __cplusplus
}
#endif
