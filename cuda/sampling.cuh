// The arithmetic of choosing tokens, to the bit of the host's (src/llama/sampling): logarithm and
// exponential from IEEE operations alone, Philox and Gumbel numbers, exact sums of e^x, and the
// order of candidates. Each function names its twin.
#pragma once

#include <math_constants.h>
#include <stdint.h>

namespace sampling {

// elementary.rs. ln 2 in two parts, the first of 32 bits.
constexpr double kLn2 = 0.693147180559945309417232121458;
constexpr double kLn2High = 0x1.62e42feep-1;
constexpr double kLn2Low = (kLn2 - kLn2High) + 2.3190468138462996e-17;
constexpr double kLog2E = 1.44269504088896340735992468100;
constexpr double kSqrt2 = 1.41421356237309504880168872421;

// elementary::ln_1p_series
__device__ __forceinline__ double ln_1p_series(double f) {
    const double s = __ddiv_rn(f, __dadd_rn(2.0, f));
    const double square = __dmul_rn(s, s);
    double sum = 0.0;
#pragma unroll
    for (int k = 11; k >= 1; k--) sum = __dmul_rn(__dadd_rn(sum, 1.0 / (2 * k + 1)), square);
    return __dadd_rn(__dmul_rn(2.0, s), __dmul_rn(__dmul_rn(2.0, s), sum));
}

// elementary::ln, of a positive normal number.
__device__ __forceinline__ double ln(double x) {
    const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x));
    int exponent = static_cast<int>(bits >> 52) - 1023;
    const uint64_t fraction = (bits & 0xfffffffffffffull) | 0x3ff0000000000000ull;
    double mantissa = __longlong_as_double(static_cast<long long>(fraction));
    if (mantissa > kSqrt2) {
        mantissa = __dmul_rn(mantissa, 0.5);
        exponent++;
    }
    const double e = exponent;
    const double low = __dadd_rn(__dmul_rn(e, kLn2Low), ln_1p_series(__dsub_rn(mantissa, 1.0)));
    return __dadd_rn(__dmul_rn(e, kLn2High), low);
}

// elementary::neg_ln_1m
__device__ __forceinline__ double neg_ln_1m(double w) {
    return w < 0.25 ? -ln_1p_series(-w) : -ln(__dsub_rn(1.0, w));
}

// philox::philox4x32, of which the first two words are wanted.
__device__ __forceinline__ uint2 philox(uint4 words, uint2 key) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t first = 0xd2511f53u * words.x, second = 0xcd9e8d57u * words.z;
        const uint32_t first_high = __umulhi(0xd2511f53u, words.x);
        const uint32_t second_high = __umulhi(0xcd9e8d57u, words.z);
        words = make_uint4(second_high ^ words.y ^ key.x, second, first_high ^ words.w ^ key.y,
                           first);
        key = make_uint2(key.x + 0x9e3779b9u, key.y + 0xbb67ae85u);
    }
    return make_uint2(words.x, words.y);
}

// gumbel::Gumbel
struct Gumbel {
    uint64_t seed, draw;

    __device__ __forceinline__ uint64_t bits(uint32_t id) const {
        const uint4 counter = make_uint4(id, 0, static_cast<uint32_t>(draw),
                                         static_cast<uint32_t>(draw >> 32));
        const uint2 key = make_uint2(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
        const uint2 words = philox(counter, key);
        return uint64_t{words.y} << 32 | words.x;
    }

    static __device__ __forceinline__ double fraction(uint64_t n) {
        return __dmul_rn(__dadd_rn(__ull2double_rn(n), 0.5), 0x1p-64);
    }

    static __device__ __forceinline__ double from_bits(uint64_t bits) {
        const double exponential =
            bits >> 63 == 0 ? neg_ln_1m(fmin(fraction(bits), 0.5)) : -ln(fraction(~bits));
        return -ln(exponential);
    }

    // Gumbel::perturb_above: `l` and the number of `id`, unless that is certainly below `best`.
    __device__ __forceinline__ bool perturb_above(double l, uint32_t id, double best,
                                                  double *value) const {
        if (__dadd_rn(l, 45.06) < best) return false;
        const uint64_t n = bits(id);
        const double bound = __dmul_rn(static_cast<double>(__clzll(static_cast<long long>(n)) + 1), 0.7);
        if (!(__dadd_rn(l, bound) >= best)) return false;
        *value = __dadd_rn(l, from_bits(n));
        return true;
    }
};

// mass::Mass
struct Mass {
    double place;
    uint64_t digits[4];

    static __device__ __forceinline__ Mass empty() {
        Mass mass = {};
        mass.place = -CUDART_INF;
        return mass;
    }

    // mass::lowered, by the distance of two places, which is not negative.
    __device__ __forceinline__ void lower(double distance) {
        const uint32_t places = static_cast<uint32_t>(fmin(distance, 4.0));
        // One at a time, so that indices are constants and the digits stay in registers.
#pragma unroll
        for (uint32_t step = 0; step < 4; step++) {
            if (step < places) {
                digits[3] = digits[2];
                digits[2] = digits[1];
                digits[1] = digits[0];
                digits[0] = 0;
            }
        }
    }

    // Mass::add
    __device__ __forceinline__ void add(Mass other) {
        if (other.place > place) {
            lower(__dsub_rn(other.place, place));
            place = other.place;
        } else if (other.place < place) {
            other.lower(__dsub_rn(place, other.place));
        }
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) digits[i] += other.digits[i];
    }

    // Mass::add_exp, with elementary::exp_parts
    __device__ __forceinline__ void add_exp(double x) {
        const double binary = __dmul_rn(x, kLog2E);
        const double exponent = rint(binary);
        const double r = __dmul_rn(__dsub_rn(binary, exponent), kLn2);
        double mantissa = 1.0;
#pragma unroll
        for (int n = 14; n >= 1; n--) {
            mantissa = __dadd_rn(1.0, __dmul_rn(__dmul_rn(mantissa, r), 1.0 / n));
        }
        Mass one = empty();
        one.place = floor(__dmul_rn(exponent, 0.03125));
        const uint32_t shift =
            static_cast<uint32_t>(__dsub_rn(exponent, __dmul_rn(32.0, one.place))) + 11;
        // Below 2^54, and up to 42 places to the left: three digits of 32 bits.
        const uint64_t whole = static_cast<uint64_t>(__dmul_rn(mantissa, 0x1p53));
        const uint64_t low = whole << shift;
        one.digits[0] = static_cast<uint32_t>(whole >> (64 - shift));
        one.digits[1] = low >> 32;
        one.digits[2] = static_cast<uint32_t>(low);
        add(one);
    }
};

// record::Candidate: sorts by logit, greater first, then by id.
constexpr uint64_t kNoCandidate = ~uint64_t{0};

__device__ __forceinline__ uint64_t candidate(float logit, uint32_t id) {
    const uint32_t bits = __float_as_uint(__fadd_rn(logit, 0.0f));
    const uint32_t sign = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31);
    const uint32_t ascending = bits ^ (sign | 0x80000000u);
    return uint64_t{~ascending} << 32 | id;
}

}  // namespace sampling
