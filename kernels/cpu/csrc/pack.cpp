// Packs weights into tiles of 16 output rows, once at load. Quantization to int8 is symmetric per output row.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "paceline_cpu.h"
#include "pool.h"

static int32_t padded(int32_t n, int32_t to) { return (n + to - 1) / to * to; }
static int32_t in_padding(int32_t format) { return format == PL_INT8 ? PL_GROUP : 4; }
static int32_t element_bytes(int32_t format) { return format == PL_INT8 ? 1 : format == PL_BF16 ? 2 : 4; }

int64_t pl_packed_bytes(int32_t format, int32_t out, int32_t in) {
    return (int64_t)padded(out, PL_LANES) * padded(in, in_padding(format)) * element_bytes(format);
}

static uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (uint16_t)((bits + ((bits >> 16) & 1) + 0x7fff) >> 16);
}

static void pack_row_int8(const float *w, int32_t in, int32_t in_padded, uint8_t *tile, int lane, float *scale) {
    float top = 0.0f;
    for (int i = 0; i < in; i++) top = std::max(top, std::fabs(w[i]));
    *scale = top / 127.0f;
    const float inverse = top > 0.0f ? 127.0f / top : 0.0f;
    for (int i = 0; i < in_padded; i++) {
        const int value = i < in ? (int)std::lrintf(w[i] * inverse) : 0;
        tile[(i / 4 * PL_LANES + lane) * 4 + i % 4] = (uint8_t)(value + 128);
    }
}

static void pack_row(int32_t format, const float *w, int32_t in, int32_t in_padded, void *tile, int lane, float *scale) {
    if (format == PL_INT8) {
        pack_row_int8(w, in, in_padded, (uint8_t *)tile, lane, scale);
    } else if (format == PL_BF16) {
        uint16_t *to = (uint16_t *)tile;
        for (int i = 0; i < in; i++) to[(i / 2 * PL_LANES + lane) * 2 + i % 2] = to_bf16(w[i]);
    } else {
        float *to = (float *)tile;
        for (int i = 0; i < in; i++) to[i * PL_LANES + lane] = w[i];
    }
}

int32_t pl_pack(int32_t format, const float *w, int32_t out, int32_t in, void *data, float *scale, pl_pool *pool) {
    const int32_t in_padded = padded(in, in_padding(format)), tiles = padded(out, PL_LANES) / PL_LANES;
    const int64_t tile_bytes = (int64_t)PL_LANES * in_padded * element_bytes(format);
    pool->run([&](Worker &worker) {
        worker.each_item(tiles, [&](int index) {
            uint8_t *tile = (uint8_t *)data + index * tile_bytes;
            std::memset(tile, format == PL_INT8 ? 128 : 0, tile_bytes);
            for (int lane = 0; lane < PL_LANES; lane++) {
                const int row = index * PL_LANES + lane;
                if (row < out) pack_row(format, w + (int64_t)row * in, in, in_padded, tile, lane, scale + row);
                else if (format == PL_INT8) scale[row] = 0.0f;
            }
        });
    });
    return 0;
}
