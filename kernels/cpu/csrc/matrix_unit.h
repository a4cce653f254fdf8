// AMX's tile registers as the int8 linears use them: one group of 64 inputs of 16 output rows lies in memory just as the
// unit wants its right operand (16 lines of 16 outputs x 4 inputs), so packed tiles go in as they are.
// Assembly instead of intrinsics: gcc's do not say that they read memory, and a store before them may then come too late.
#pragma once
#include <cstdint>

namespace PL_ISA_NS {

static constexpr int kTileLines = 16;

// While it lives, the calling thread's registers hold `rows` (at most 16) rows of activations, and products of as many.
class MatrixUnit {
public:
    explicit MatrixUnit(int rows) {
        Shapes shapes;
        shapes.set(kProducts, rows);
        shapes.set(kInputs, rows);
        shapes.set(kWeights, kTileLines);
        __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~MatrixUnit() { __asm__ volatile("tilerelease"); }
    MatrixUnit(const MatrixUnit &) = delete;

    // products [rows][16] = sums over 64 inputs: rows of int8 from `inputs` on, `stride` bytes apart, by 1024 bytes of
    // weights + 128 as uint8. Exact: an int32 holds 64 products.
    void multiply(const int8_t *inputs, int64_t stride, const uint8_t *weights, int32_t *products) const {
        __asm__ volatile(
            "tilezero %%tmm0\n\t"
            "tileloadd (%0,%1,1), %%tmm1\n\t"
            "tileloadd (%2,%3,1), %%tmm2\n\t"
            "tdpbsud %%tmm2, %%tmm1, %%tmm0\n\t"
            "tilestored %%tmm0, (%4,%3,1)"
            ::"r"(inputs), "r"(stride), "r"(weights), "r"((int64_t)64), "r"(products)
            : "memory");
    }

private:
    enum { kProducts = 0, kInputs = 1, kWeights = 2 };  // numbers of registers, as in `multiply`
    struct alignas(64) Shapes {
        uint8_t palette = 1, first_line = 0, reserved[14] = {};
        uint16_t line_bytes[16] = {};
        uint8_t lines[16] = {};
        void set(int number, int count) { line_bytes[number] = 64, lines[number] = (uint8_t)count; }
    };
};

}  // namespace PL_ISA_NS
