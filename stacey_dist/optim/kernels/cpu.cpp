// The update rule of rule.py, power.py and rounding.py for float32 arithmetic on CPUs: the same operations, hence the
// same bits. Names and comment lines are those of the Python files, to be read side by side.
//
// Compiled once for each instruction set, always without a compiler's own contraction to fused multiply-adds
// (-ffp-contract=off), and without a header of torch's: Python hands over pointers, sizes and settings (cpu.py).
//
// Elements go through the rule a tile at a time, in short stages whose results lie in buffers that stay in the L1 cache.
// A processor looks some hundred instructions ahead, so it finds independent work only where the chain of operations from
// loading an element to storing it is short. Each vector of a tile takes the same path, the last, incomplete one
// through a padded copy, so an element's bits do not depend on its position, on the alignment, or on how many threads
// there are.

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define WIDTH 16
#define DEPTH 4
#elif defined(__AVX2__)
#include <immintrin.h>
#define WIDTH 8
#define DEPTH 2
#else
#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <immintrin.h>
#endif
#define WIDTH 4
#define DEPTH 2
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

// ---------------------------------------------------------------------------------------- what Python hands over

enum Variant : int32_t { P2, PP, TWO_P };
enum Power : int32_t { ONE, ROOT, SAME, GENERAL };  // |x|^0, ^(1/2), ^1, ^exponent
enum Dtype : int32_t { FLOAT32, BFLOAT16 };

// A number as float32, and as a sum whose first term times an exponent is exact.
struct Factor {
    float high, low, value;
};

// cpu.py has the same fields. The floats up to `inverse_scale` are those of constants.float_constants, in its order.
struct Settings {
    int32_t variant, power, mirror_is_plain, alpha_is_zero, stochastic, has_scale;
    int32_t weight_dtype, gradient_dtype, state_dtype;
    uint64_t seed;
    float primal_rate, pull, alpha, tau, beta1, beta1_rest, beta2, beta2_rest, eps;
    Factor exponent, inner, root;  // (p - 2) / (p - 1), p - 1, 1 / (p - 1)
    float log_alpha_whole, log_alpha_fraction;
    float inverse_scale;
};

// A parameter, or a part of one: elements that lie side by side in all four tensors.
struct Tensors {
    void *weight;
    const void *gradient;
    void *z, *m;
    int64_t *step;  // is incremented
    int64_t size;
};

// ------------------------------------------------------------------------------------------------------ vectors

// DEPTH registers. Each operation is issued for all of them, so that independent operations hide its latency.
constexpr int LANES = DEPTH * WIDTH;

typedef float FloatRegister __attribute__((vector_size(4 * WIDTH)));
typedef int32_t IntRegister __attribute__((vector_size(4 * WIDTH)));  // also a mask: all bits, or none
typedef uint32_t UnsignedRegister __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t HalfRegister __attribute__((vector_size(2 * WIDTH)));

template <class Register>
struct Vector {
    Register of[DEPTH];
};
using Float = Vector<FloatRegister>;
using Int = Vector<IntRegister>;

#define EACH for (int i = 0; i < DEPTH; i++)

// Of two vectors, or of a vector and a number. Comparisons give masks.
#define OPERATOR(op)                                                    \
    template <class Register>                                           \
    INLINE auto operator op(Vector<Register> a, Vector<Register> b) {   \
        Vector<decltype(a.of[0] op b.of[0])> result;                    \
        EACH result.of[i] = a.of[i] op b.of[i];                         \
        return result;                                                  \
    }                                                                   \
    template <class Register, class Number>                             \
    INLINE auto operator op(Vector<Register> a, Number b) {             \
        Vector<decltype(a.of[0] op b)> result;                          \
        EACH result.of[i] = a.of[i] op b;                               \
        return result;                                                  \
    }

OPERATOR(+)
OPERATOR(-)
OPERATOR(*)
OPERATOR(/)
OPERATOR(&)
OPERATOR(|)
OPERATOR(^)
OPERATOR(<<)
OPERATOR(>>)
OPERATOR(==)
OPERATOR(!=)
OPERATOR(<)

INLINE Float operator-(Float x) {
    EACH x.of[i] = -x.of[i];
    return x;
}

INLINE Int operator~(Int x) {
    EACH x.of[i] = ~x.of[i];
    return x;
}

template <class Result, class Number>
INLINE Result all(Number x) {
    Result result;
    EACH result.of[i] = x - decltype(result.of[i] + result.of[i]){};
    return result;
}
INLINE Float all(float x) { return all<Float>(x); }

template <class Register>
INLINE Vector<Register> select(Int where, Vector<Register> a, Vector<Register> b) {
    EACH a.of[i] = where.of[i] ? a.of[i] : b.of[i];
    return a;
}

INLINE Int bits(Float x) {
    Int result;
    EACH result.of[i] = (IntRegister)x.of[i];
    return result;
}

INLINE Float number(Int bits) {
    Float result;
    EACH result.of[i] = (FloatRegister)bits.of[i];
    return result;
}

INLINE Float converted(Int x) {
    Float result;
    EACH result.of[i] = __builtin_convertvector(x.of[i], FloatRegister);
    return result;
}

INLINE Int upper(Int x) {  // the upper 16 bits, moved down
    EACH x.of[i] = (IntRegister)((UnsignedRegister)x.of[i] >> 16);
    return x;
}

INLINE Float size_of(Float x) { return number(bits(x) & INT32_MAX); }
INLINE Int sign_of(Float x) { return bits(x) & INT32_MIN; }

// a * b + c, rounded once.
INLINE FloatRegister multiply_add(FloatRegister a, FloatRegister b, FloatRegister c) {
#if defined(__AVX512F__)
    return (FloatRegister)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (FloatRegister)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (FloatRegister)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    FloatRegister result;
#if defined(__SSE2__)
    // In double precision the product is exact, and rounding twice does harm only where the first result lies in the
    // middle between two floats, or where the second is subnormal.
    auto rounded = [](__m128 a, __m128 b, __m128 c) {
        return _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(a), _mm_cvtps_pd(b)), _mm_cvtps_pd(c));
    };
    auto upper_half = [](FloatRegister x) { return _mm_movehl_ps((__m128)x, (__m128)x); };
    const __m128d first = rounded((__m128)a, (__m128)b, (__m128)c);
    const __m128d second = rounded(upper_half(a), upper_half(b), upper_half(c));
    result = (FloatRegister)_mm_movelh_ps(_mm_cvtpd_ps(first), _mm_cvtpd_ps(second));
    const IntRegister low = (IntRegister)_mm_shuffle_ps((__m128)first, (__m128)second, 0x88);
    const IntRegister high = (IntRegister)_mm_shuffle_ps((__m128)first, (__m128)second, 0xdd);
    const FloatRegister size = (FloatRegister)((IntRegister)result & INT32_MAX);
    const IntRegister middle = (low & 0x1fffffff) == 0x10000000;
    const IntRegister subnormal = (size < 0x1p-126f) & ((high & INT32_MAX) != 0);
    if (__builtin_expect(_mm_movemask_ps((__m128)(middle | subnormal)) == 0, 1)) return result;
#endif
    for (int lane = 0; lane < WIDTH; lane++) result[lane] = std::fmaf(a[lane], b[lane], c[lane]);
    return result;
#endif
}
INLINE Float multiply_add(Float a, Float b, Float c) {
    EACH a.of[i] = multiply_add(a.of[i], b.of[i], c.of[i]);
    return a;
}
INLINE Float multiply_add(Float a, float b, Float c) { return multiply_add(a, all(b), c); }
INLINE Float multiply_add(Float a, Float b, float c) { return multiply_add(a, b, all(c)); }
INLINE Float multiply_add(Float a, float b, float c) { return multiply_add(a, all(b), all(c)); }

INLINE Float root_of(Float x) {
#if defined(__AVX512F__)
    EACH x.of[i] = (FloatRegister)_mm512_sqrt_ps((__m512)x.of[i]);
#elif defined(__AVX2__)
    EACH x.of[i] = (FloatRegister)_mm256_sqrt_ps((__m256)x.of[i]);
#else
    EACH for (int lane = 0; lane < WIDTH; lane++) x.of[i][lane] = __builtin_sqrtf(x.of[i][lane]);
#endif
    return x;
}

// ------------------------------------------------------------------------------------------------------ power.py

[[maybe_unused]] constexpr float ZERO_EXPONENT = -0x1p20f;
[[maybe_unused]] constexpr int32_t ZERO_EXPONENT_BITS = (int32_t)0xc9800000;
constexpr float MAGIC = 0x1.8p23f;

constexpr float LOG2[] = {1.4426898956298828f,  -0.7211660742759705f,  0.47868552803993225f, -0.3473072350025177f,
                               0.24187606573104858f, -0.13753284513950348f, 0.05206507816910744f, -0.009310458786785603f};
constexpr float LOG2_NEAR_ONE[] = {1.4426963329315186f,  -0.72132807970047f,    0.48062604665756226f, -0.36156418919563293f,
                                   0.29827117919921875f, -0.24252602458000183f, 0.11968280375003815f};
constexpr float EXP2[] = {0.6931469440460205f, 0.24022284150123596f, 0.055508024990558624f, 0.00966894906014204f,
                          0.0013235454680398107f};

template <int COUNT>
INLINE Float polynomial(Float x, const float (&coefficients)[COUNT]) {
    Float result = multiply_add(x, coefficients[COUNT - 1], coefficients[COUNT - 2]);
    for (int i = COUNT - 3; i >= 0; i--) result = multiply_add(result, x, coefficients[i]);
    return result;
}

struct Log2 {
    Float whole, fraction;
};

#if defined(__AVX512F__)
INLINE Float exponent_of(Float x) {
    EACH x.of[i] = (FloatRegister)_mm512_getexp_ps((__m512)x.of[i]);
    return x;
}

template <_MM_MANTISSA_NORM_ENUM RANGE>
INLINE Float mantissa_of(Float x) {
    EACH x.of[i] = (FloatRegister)_mm512_getmant_ps((__m512)x.of[i], RANGE, _MM_MANT_SIGN_zero);
    return x;
}
#endif

// The base-2 logarithm of a finite |x| > 0 as (whole, fraction).
INLINE Log2 log2_parts(Float x) {
#if defined(__AVX512F__)
    Float whole = exponent_of(x), r = mantissa_of<_MM_MANT_NORM_1_2>(x) - 1.0f;
#else
    // Subnormal numbers are scaled up by 2^24 to have a full mantissa.
    x = size_of(x);
    Int small = x < 0x1p-126f;
    Int scaled = bits(select(small, x * 0x1p24f, x));
    Float whole = converted((scaled >> 23) - (small & 24) - 127);
    Float r = number((scaled & 0x007fffff) | 0x3f800000) - 1.0f;
#endif
    return {whole, polynomial(r, LOG2) * r};
}

// `whole` of a logarithm of x, but ZERO_EXPONENT where x is zero.
INLINE Float whole_or_zero(Float whole, [[maybe_unused]] Float x) {
#if defined(__AVX512F__)
    // It is -infinity, the only negative number here whose bits are above those of ZERO_EXPONENT. An integer operation
    // leaves the adders to additions.
    EACH whole.of[i] = (FloatRegister)_mm512_min_epu32((__m512i)whole.of[i], _mm512_set1_epi32(ZERO_EXPONENT_BITS));
    return whole;
#else
    return select(x == 0.0f, all(ZERO_EXPONENT), whole);
#endif
}

// The base-2 logarithm of a normal x as (whole, fraction), exact to a relative error also near x = 1.
INLINE Log2 log2_near_one(Float x) {
#if defined(__AVX512F__)
    Float mantissa = mantissa_of<_MM_MANT_NORM_p75_1p5>(x);
    Float whole = exponent_of(x) - exponent_of(mantissa), r = mantissa - 1.0f;
#else
    Int exponent = bits(x) - 0x3f400000;
    Float r = number(bits(x) - (exponent & (int32_t)0xff800000)) - 1.0f;  // mantissas are in [3/4, 3/2)
    Float whole = converted(exponent >> 23);
#endif
    return {whole_or_zero(whole, x), polynomial(r, LOG2_NEAR_ONE) * r};
}

// An integer within 1/2, and a rounding error, of factor * x, where that is below 2^22 in size.
INLINE Float nearest_integer(Float x, float factor) { return multiply_add(x, factor, MAGIC) - MAGIC; }

#if defined(__AVX512F__)
INLINE Float scaled(Float x, Float k) {  // x 2^k
    EACH x.of[i] = (FloatRegister)_mm512_scalef_ps((__m512)x.of[i], (__m512)k.of[i]);
    return x;
}
#else
// Two powers of two whose product is 2^k, since k alone may lie outside the exponents of float32.
struct TwoPowers {
    Float first, second;
};

INLINE TwoPowers two_powers(Float k) {
    Int whole;
    k = select(k < -250.0f, all(-250.0f), k);
    EACH whole.of[i] = __builtin_convertvector(k.of[i], IntRegister);
    Int half = whole >> 1;
    return {number((half + 127) << 23), number((whole - half + 127) << 23)};
}
#endif

// 2^(k + t), rounded once where it is subnormal: k an integer, at most 250, and t in [-1/2, 1/2].
INLINE Float exp2_parts(Float k, Float t) {
    Float power = multiply_add(polynomial(t, EXP2), t, 1.0f);
#if defined(__AVX512F__)
    return scaled(power, k);
#else
    TwoPowers powers = two_powers(k);  // the product with the first is exact
    return power * powers.first * powers.second;
#endif
}

// x 2^(k + t), which is nearer to the true value the nearer the power is to one.
INLINE Float exp2_times(Float x, Float k, Float t) {
#if defined(__AVX512F__)
    Float product = scaled(x, k);
#else
    TwoPowers powers = two_powers(k);
    Float product = powers.first * powers.second * x;
#endif
    return multiply_add(product, polynomial(t, EXP2) * t, product);
}

// factor (whole + fraction) - k, a small difference of large terms, with about one rounding error.
INLINE Float product_less(Log2 x, Factor factor, Float k) {
    Float t = multiply_add(x.whole, factor.high, -k);
    return multiply_add(x.fraction, factor.value, multiply_add(x.whole, factor.low, t));
}

// factor (whole + fraction) as an integer and what is left, within [-1/2, 1/2].
struct Parts {
    Float k, t;
};

INLINE Parts product_parts(Log2 x, Factor factor) {
    Float k = nearest_integer(x.whole + x.fraction, factor.value);
    return {k, product_less(x, factor, k)};
}

// --------------------------------------------------------------------------------------------------- rounding.py

// A key from (seed, step count, STATES or WEIGHT): splitmix64's finalizer over the three.
INLINE int32_t round_key(uint64_t seed, uint64_t step, uint64_t which) {
    uint64_t x = seed * 0x9E3779B97F4A7C15u + step * 0xBF58476D1CE4E5B9u + which * 0x94D049BB133111EBu;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return (int32_t)(x ^ (x >> 31));
}

// Twice 16 random bits an element: a hash of two numbers of it and a key; 0 where one is NaN.
struct Random {
    Int upper, lower;
};

INLINE Random random_bits(Float first, Float second, int32_t key) {
    // The second is rotated by 16 bits, so that its rarely changing bits meet often changing bits of the first.
    Int turned = (bits(second) << 16) | upper(bits(second));
    Int h = turned ^ bits(first) ^ key;
#if defined(__AVX512F__)
    EACH {
        const __mmask16 ordered = _mm512_cmp_ps_mask((__m512)first.of[i], (__m512)second.of[i], _CMP_ORD_Q);
        h.of[i] = (IntRegister)_mm512_maskz_mullo_epi32(ordered, (__m512i)h.of[i], _mm512_set1_epi32(0x9E3779B1));
    }
#else
    h = h * (int32_t)0x9E3779B1 & (first == first) & (second == second);
#endif
    return {upper(h), (h ^ upper(h)) & 0xffff};
}

// Bits whose upper half is the bfloat16: up or down as 16 random bits say.
INLINE Int round_stochastic(Float value, Int random) { return bits(value) + random; }

INLINE Int round_nearest(Float value) {
    Int b = bits(value);
    return select(value == value, b + (((b >> 16) & 1) + 0x7fff), all<Int>(0x7fc00000));
}

// ------------------------------------------------------------------------------------------------------- memory

INLINE Float load(const void *from, int64_t index, int32_t dtype) {
    Float value;
    if (dtype == FLOAT32) {
        EACH memcpy(&value.of[i], (const float *)from + index + i * WIDTH, sizeof value.of[i]);
        return value;
    }
    HalfRegister half;
#if defined(__AVX512F__)
    const __m512i spread = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4,
                                            0, 3, 0, 2, 0, 1, 0, 0, 0);
#endif
    EACH {
        memcpy(&half, (const uint16_t *)from + index + i * WIDTH, sizeof half);
#if defined(__AVX512F__)
        value.of[i] = (FloatRegister)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, spread,
                                                                    _mm512_castsi256_si512((__m256i)half));
#else
        value.of[i] = (FloatRegister)(__builtin_convertvector(half, IntRegister) << 16);
#endif
    }
    return value;
}

INLINE void store(void *to, int64_t index, Float value) {
    EACH memcpy((float *)to + index + i * WIDTH, &value.of[i], sizeof value.of[i]);
}

INLINE void store_upper(void *to, int64_t index, Int x) {
#if defined(__AVX512F__)
    const __m512i odd = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17,
                                         15, 13, 11, 9, 7, 5, 3, 1);
#endif
    HalfRegister half;
    EACH {
#if defined(__AVX512F__)
        half = (HalfRegister)_mm512_castsi512_si256(_mm512_permutexvar_epi16(odd, (__m512i)x.of[i]));
#else
        half = __builtin_convertvector((UnsignedRegister)x.of[i] >> 16, HalfRegister);
#endif
        memcpy((uint16_t *)to + index + i * WIDTH, &half, sizeof half);
    }
}

// ------------------------------------------------------------------------------------------------------- rule.py

// The buffers of a tile and its elements fill half of an L1 cache of 32 KiB; the processor's own prefetching brings the
// next tile while this one is worked on.
constexpr int GROUPS = 192 / LANES;
constexpr int64_t TILE = GROUPS * LANES;

// The results that a stage passes to later ones. A union names one array twice if later stages reuse it.
struct Buffers {
    Float z[GROUPS], c[GROUPS], m_new[GROUPS], c_whole[GROUPS], c_fraction[GROUPS], direction[GROUPS];
    union {
        Float z_whole[GROUPS], k[GROUPS];
    };
    union {
        Float z_fraction[GROUPS], t[GROUPS], whole[GROUPS], z_new[GROUPS];
    };
    union {
        Float ratio[GROUPS], fraction[GROUPS];
    };
};

#define STAGE __attribute__((noinline)) void
#define EACH_GROUP for (int i = 0; i < groups; i++)

// beta m + (1 - beta) g, from the nearer end
INLINE Float interpolate(Float m, Float g, float beta, float rest) {
    return beta >= 0.5f ? multiply_add(g - m, rest, m) : multiply_add(g - m, -beta, g);
}

INLINE Float gradient_at(const Tensors &t, int64_t index, const Settings &s) {
    Float g = load(t.gradient, index, s.gradient_dtype);
    return s.has_scale ? g * s.inverse_scale : g;
}

// c = beta1 m + (1 - beta1) g        m' = beta2 m + (1 - beta2) g
template <bool LOGARITHM>
STAGE interpolation(Buffers &b, const Tensors &t, int64_t start, int groups, const Settings &s) {
    EACH_GROUP {
        const int64_t index = start + i * LANES;
        Float g = gradient_at(t, index, s), m = load(t.m, index, s.state_dtype);
        Float c = interpolate(m, g, s.beta1, s.beta1_rest);
        b.c[i] = c;
        b.m_new[i] = interpolate(m, g, s.beta2, s.beta2_rest);
        if (LOGARITHM) {
            Log2 log2_c = log2_parts(c);
            b.c_whole[i] = log2_c.whole, b.c_fraction[i] = log2_c.fraction;
        }
    }
}

// s(x) = x / (|x|^((p-2)/(p-1)) + eps), and s(0) = 0
template <Power POWER>
STAGE steepest_direction(Buffers &b, int groups, const Settings &s) {
    EACH_GROUP {
        Float x = b.c[i], power = all(1.0f);
        if (POWER == ROOT) power = root_of(size_of(x));
        if (POWER == SAME) power = size_of(x);
        if (POWER == GENERAL) {
            Parts parts = product_parts({b.c_whole[i], b.c_fraction[i]}, s.exponent);
            power = exp2_parts(parts.k, parts.t);
#if !defined(__AVX512F__)  // with it, infinity and NaN have come out as such by themselves
            power = power + (x - x);
#endif
        }
        power = power + s.eps;
        // 0 over any positive number is 0.
        if (s.eps == 0.0f) power = select(x != 0.0f, power, all(1.0f));
        b.direction[i] = x / power;
    }
}

STAGE direction_stage(Buffers &b, int groups, const Settings &s) {
    switch (s.variant == TWO_P ? -1 : s.power) {
        case ONE: return steepest_direction<ONE>(b, groups, s);
        case ROOT: return steepest_direction<ROOT>(b, groups, s);
        case SAME: return steepest_direction<SAME>(b, groups, s);
        case GENERAL: return steepest_direction<GENERAL>(b, groups, s);
        default: return;  // c itself
    }
}

// The dual step of (p,p) and (2,p): u = |z|^(p-2) z - alpha c,  z' = sign(u) |u|^(1/(p-1)).
//     z' = z (1 + ratio)^r                        where |z|^(p-1) >= alpha |c|
//     z' = -sign(c) (alpha |c|)^r (1 + ratio)^r   elsewhere,             r = 1 / (p - 1)

STAGE z_stage(Buffers &b, const Tensors &t, int64_t start, int groups, const Settings &s) {
    EACH_GROUP {
        Float z = load(t.z, start + i * LANES, s.state_dtype);
        Log2 log2_z = log2_parts(z);
        b.z[i] = z, b.z_whole[i] = whole_or_zero(log2_z.whole, z), b.z_fraction[i] = log2_z.fraction;
    }
}

// gap = log2(|z|^(p-1)) - log2(alpha |c|) = k + t. Leaves -|gap| as k + t, with the sign of gap in that of k.
STAGE gap_stage(Buffers &b, int groups, const Settings &s) {
    EACH_GROUP {
        Log2 log2_z{b.z_whole[i], b.z_fraction[i]};
        // log2(alpha |c|)
        Float c_whole = whole_or_zero(b.c_whole[i] + s.log_alpha_whole, b.c[i]);
        Float c_fraction = b.c_fraction[i] + s.log_alpha_fraction;
        b.c_whole[i] = c_whole, b.c_fraction[i] = c_fraction;
        Float gap = multiply_add(log2_z.whole + log2_z.fraction, s.inner.value, -(c_whole + c_fraction));
        Float k = (gap + MAGIC) - MAGIC;
        Float t = product_less(log2_z, s.inner, k + c_whole) - c_fraction;
        b.k[i] = number((bits(k) & INT32_MAX) | sign_of(gap));
        b.t[i] = number(bits(t) ^ (~bits(gap) & INT32_MIN));
    }
}

// 1 + ratio
STAGE ratio_stage(Buffers &b, int groups) {
    EACH_GROUP {
        // The smaller term of u over the larger one is 2^-|gap|; below 2^-25 it does not change 1 + ratio. The terms
        // are z's and -c's; the ratio is negative where they oppose each other.
        Float k = number(bits(b.k[i]) | INT32_MIN);
#if !defined(__AVX512F__)  // with it, a power takes any k
        k = select(k < -100.0f, all(-100.0f), k);
#endif
        Float ratio = exp2_parts(k, b.t[i]);
        b.ratio[i] = number(bits(ratio) | (~(bits(b.z[i]) ^ bits(b.c[i])) & INT32_MIN)) + 1.0f;
    }
}

// log2(larger (1 + ratio)), or log2(1 + ratio) where z's term is the larger one
STAGE log_ratio_stage(Buffers &b, int groups) {
    EACH_GROUP {
        Log2 log2 = log2_near_one(b.ratio[i]);
        Int c_larger = bits(b.k[i]) < 0;
        b.whole[i] = select(c_larger, log2.whole + b.c_whole[i], log2.whole);
        b.fraction[i] = select(c_larger, log2.fraction + b.c_fraction[i], log2.fraction);
    }
}

// z' = [z or -sign(c)] 2^(r (log2(1 + ratio) + [0 or log2(alpha |c|)]))
STAGE growth_stage(Buffers &b, int groups, const Settings &s) {
    EACH_GROUP {
        Float z = b.z[i], c = b.c[i];
        Parts parts = product_parts({b.whole[i], b.fraction[i]}, s.root);
        Float start = select(bits(b.k[i]) < 0, number((~bits(c) & INT32_MIN) | 0x3f800000), z);
        Float z_new = exp2_times(start, parts.k, parts.t);
#if defined(__AVX512F__)
        b.z_new[i] = z_new + 0.0f;  // NaN and infinity have come out as NaN by themselves
#else
        b.z_new[i] = z_new + (z - z) + (c - c);
#endif
    }
}

struct Keys {
    int32_t states, weight;
};

// coupling      theta' = theta + [tau z' - (tau + eta lambda) theta - (1 - tau) eta s]
template <bool MIRROR>
STAGE coupling_stage(Buffers &b, const Tensors &t, int64_t start, int groups, Keys keys, const Settings &s) {
    const Float *direction = s.variant == TWO_P ? b.c : b.direction;
    EACH_GROUP {
        const int64_t index = start + i * LANES;
        Float z_new, m_new = b.m_new[i];
        if (MIRROR) {
            z_new = b.z_new[i];
        } else {
            Float z = load(t.z, index, s.state_dtype);
            z_new = s.variant != P2 && s.alpha_is_zero && !s.mirror_is_plain ? z + b.c[i] * 0.0f
                                                                              : multiply_add(b.c[i], -s.alpha, z);
        }
        if (s.state_dtype == FLOAT32) {
            store(t.z, index, z_new), store(t.m, index, m_new);
        } else if (s.stochastic) {
            Random random = random_bits(z_new, m_new, keys.states);
            store_upper(t.z, index, round_stochastic(z_new, random.upper));
            store_upper(t.m, index, round_stochastic(m_new, random.lower));
        } else {
            store_upper(t.z, index, round_nearest(z_new)), store_upper(t.m, index, round_nearest(m_new));
        }
        Float theta = load(t.weight, index, s.weight_dtype);
        Float change = multiply_add(theta, -s.pull, z_new * s.tau);
        change = multiply_add(direction[i], -s.primal_rate, change);
        Float weight_new = change + theta;
        if (s.weight_dtype == FLOAT32) {
            store(t.weight, index, weight_new);
        } else if (s.stochastic) {
            Random random = random_bits(weight_new, gradient_at(t, index, s), keys.weight);
            store_upper(t.weight, index, round_stochastic(weight_new, random.upper));
        } else {
            store_upper(t.weight, index, round_nearest(weight_new));
        }
    }
}

// One step of STACEY(p,2), (p,p) or (2,p), algorithms 2, 3 and 4, for at most a tile's groups from `start` on.
void update(Buffers &b, const Tensors &t, int64_t start, int groups, Keys keys, const Settings &s) {
    const bool mirror = s.variant != P2 && !s.mirror_is_plain && !s.alpha_is_zero;
    const bool logarithm = mirror || (s.variant != TWO_P && s.power == GENERAL);
    (logarithm ? interpolation<true> : interpolation<false>)(b, t, start, groups, s);
    direction_stage(b, groups, s);
    if (mirror) {
        z_stage(b, t, start, groups, s);
        gap_stage(b, groups, s);
        ratio_stage(b, groups);
        log_ratio_stage(b, groups);
        growth_stage(b, groups, s);
    }
    (mirror ? coupling_stage<true> : coupling_stage<false>)(b, t, start, groups, keys, s);
}

inline int64_t bytes(int32_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

void update_range(const Tensors &t, int64_t start, int64_t stop, Keys keys, const Settings &s) {
    Buffers buffers;
    int64_t index = start;
    for (; index + LANES <= stop; index += TILE) {
        const int64_t groups = (stop - index) / LANES;
        update(buffers, t, index, groups < GROUPS ? (int)groups : GROUPS, keys, s);
    }
    if (const int64_t left = (stop - start) % LANES) {
        index = stop - left;
        float weight[LANES] = {}, gradient[LANES] = {}, z[LANES] = {}, m[LANES] = {};
        Tensors padded{weight, gradient, z, m, nullptr, LANES};
        auto copy = [&](void *to, const void *from, int32_t dtype) { memcpy(to, from, left * bytes(dtype)); };
        auto at = [&](const void *tensor, int32_t dtype) { return (char *)tensor + index * bytes(dtype); };
        copy(weight, at(t.weight, s.weight_dtype), s.weight_dtype);
        copy(gradient, at(t.gradient, s.gradient_dtype), s.gradient_dtype);
        copy(z, at(t.z, s.state_dtype), s.state_dtype);
        copy(m, at(t.m, s.state_dtype), s.state_dtype);
        update(buffers, padded, 0, 1, keys, s);
        copy(at(t.weight, s.weight_dtype), weight, s.weight_dtype);
        copy(at(t.z, s.state_dtype), z, s.state_dtype);
        copy(at(t.m, s.state_dtype), m, s.state_dtype);
    }
}

constexpr int64_t ALONE = 1 << 14;  // elements that are not worth waking a second thread for

}  // namespace

#ifndef SOURCE
#define SOURCE ""
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

// The digest of this file that the library was compiled from.
EXPORT const char *stacey_source() { return SOURCE; }

// One update of `count` tensors with equal settings, by `threads` threads, each of which takes a contiguous share of
// all their elements.
EXPORT void stacey_step(const Settings *settings, const Tensors *tensors, int64_t count, int64_t threads) {
    const Settings &s = *settings;
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) {
        *tensors[i].step += 1;
        total += tensors[i].size;
    }
    if (total <= ALONE) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int64_t thread = 0; thread < threads; thread++) {
        const int64_t from = total / threads * thread;
        const int64_t to = thread == threads - 1 ? total : total / threads * (thread + 1);
        int64_t before = 0;  // elements of the tensors before
        for (int64_t i = 0; i < count && before < to; i++) {
            const Tensors &t = tensors[i];
            const int64_t start = from > before ? from - before : 0;
            const int64_t stop = to - before < t.size ? to - before : t.size;
            if (start < stop) {
                const uint64_t step = (uint64_t)*t.step;
                update_range(t, start, stop, {round_key(s.seed, step, 1), round_key(s.seed, step, 2)}, s);
            }
            before += t.size;
        }
    }
}
