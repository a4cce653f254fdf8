// Gumbel noise of seeded sampling; server/decoding/noise.py says what it is and has the same in torch.
#pragma once
#include <bit>
#include <cstdint>

namespace PL_ISA_NS {

// A 52-bit number as a double, and the other way round: what vectorises on every instruction set.
static constexpr uint64_t kTwo52Bits = 0x4330000000000000ull;
static constexpr double kTwo52 = 4503599627370496.0;

// Natural logarithm of a positive normal double, below 1 ulp: fdlibm's, with the range reduced to [sqrt(1/2), sqrt(2)).
static inline double log_positive(double x) {
    constexpr uint64_t kOne = 0x3ff0000000000000ull, kSqrtHalf = 0x3fe6a09e667f3bcdull, kMantissa = 0x000fffffffffffffull;
    const uint64_t bits = std::bit_cast<uint64_t>(x) + (kOne - kSqrtHalf);
    const double exponent = std::bit_cast<double>((bits >> 52) | kTwo52Bits) - (kTwo52 + 1023.0);
    const double f = std::bit_cast<double>((bits & kMantissa) + kSqrtHalf) - 1.0;
    const double half = 0.5 * f * f, s = f / (2.0 + f), z = s * s, w = z * z;
    const double even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
    const double odd = z * (6.666666666666735130e-01 +
                            w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
    return s * (half + (odd + even)) + exponent * 1.90821492927058770002e-10 - half + f +
           exponent * 6.93147180369123816490e-01;
}

// SplitMix64 stream of `key`, token by token -> uniforms (k + 1/2) / 2^52 -> -log(-log(uniform)).
static void gumbel(uint64_t key, const int32_t *ids, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) {
        uint64_t word = key + (uint64_t)(ids ? ids[i] : i) * 0x9E3779B97F4A7C15ull;
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9ull;
        word = (word ^ (word >> 27)) * 0x94D049BB133111EBull;
        word ^= word >> 31;
        const double uniform = (std::bit_cast<double>((word >> 12) | kTwo52Bits) - kTwo52 + 0.5) * 0x1p-52;
        out[i] = (float)-log_positive(-log_positive(uniform));
    }
}

}  // namespace PL_ISA_NS
