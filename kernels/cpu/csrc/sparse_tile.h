// The stream of a sparse tile: how masks and values lie, and how far ahead of them memory is asked.
#pragma once
#include "kernel_table.h"
#include "simd.h"

namespace PL_ISA_NS {

// The stream of one sparse tile, group by group: the masks, then the values of their bits. Mask: one bit per value of a
// vector of 64 bytes.
template <typename Value, typename Mask>
class SparseTile {
public:
    SparseTile() = default;
    PL_MEMBER SparseTile(const pl_linear &l, int tile) : at_((const uint8_t *)l.data + l.tile_starts[tile]) {}
    PL_MEMBER void begin_group() {
        masks_ = at_;
        at_ += PL_VECTORS * sizeof(Mask);
    }
    PL_MEMBER Mask mask(int vector) const {
        Mask bits;
        std::memcpy(&bits, masks_ + vector * sizeof(Mask), sizeof(Mask));
        return bits;
    }
    // The next values, as many as `bits` has bits; 64 bytes can be read.
    PL_MEMBER const Value *take(Mask bits) {
        const Value *values = (const Value *)at_;
        at_ += __builtin_popcountll(bits) * sizeof(Value);
        return values;
    }
    PL_MEMBER void fetch_ahead() const { prefetch(at_ + kSparsePrefetchBytes); }

private:
    const uint8_t *at_, *masks_;
};

}  // namespace PL_ISA_NS
