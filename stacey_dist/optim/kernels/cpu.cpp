// The update rule of rule.py, power.py and rounding.py for float32 arithmetic on CPUs: the same operations, hence the
// same bits. Names and comment lines are those of the Python files, to be read side by side.
//
// Compiled once for each instruction set, always without contraction to fused multiply-adds (-ffp-contract=off), and
// without a header of torch's: Python hands over pointers, sizes and settings (cpu.py). Each LANES elements take the
// same road, the last, incomplete ones through a padded copy, so an element's bits do not depend on its position, on
// the alignment, or on how many threads there are.

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define WIDTH 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define DEPTH 8

#define INLINE inline __attribute__((always_inline))

namespace {

// ---------------------------------------------------------------------------------------- what Python hands over

enum Variant : int32_t { P2, PP, TWO_P };
enum Power : int32_t { ONE, ROOT, SAME, GENERAL };  // |x|^0, ^(1/2), ^1, ^exponent
enum Dtype : int32_t { FLOAT32, BFLOAT16 };

struct Settings {
    int32_t variant, power, mirror_is_plain, alpha_is_zero, stochastic, has_scale;
    int32_t weight_dtype, gradient_dtype, z_dtype, m_dtype;
    uint64_t seed;
    float primal_rate, pull, alpha, tau, beta1, beta1_rest, beta2, beta2_rest, eps;
    float exponent_high, exponent_low, exponent;
    float inner_high, inner_low, inner;  // p - 1
    float root_high, root_low, root;     // 1 / (p - 1)
    float log_alpha_whole, log_alpha_fraction;
    float inverse_scale;
};

// A parameter, or a part of one: elements that lie side by side in all four tensors.
struct Tensors {
    void *weight;
    const void *gradient;
    void *z, *m;
    int64_t *step;  // is counted up
    int64_t size;
};

// ------------------------------------------------------------------------------------------------------ vectors

// LANES elements as DEPTH registers that go through each operation one after the other: a single one would spend most
// of its time waiting for its own last result.
constexpr int LANES = DEPTH * WIDTH;

typedef float FloatRegister __attribute__((vector_size(4 * WIDTH)));
typedef int32_t IntRegister __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t UnsignedRegister __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t HalfRegister __attribute__((vector_size(2 * WIDTH)));

struct Float {
    FloatRegister of[DEPTH];
};
struct Int {
    IntRegister of[DEPTH];
};
struct Mask {  // all bits, or none
    IntRegister of[DEPTH];
};

#define EACH for (int i = 0; i < DEPTH; i++)
#define OPERATOR(Result, Type, op)                      \
    INLINE Result operator op(Type a, Type b) {         \
        Result result;                                  \
        EACH result.of[i] = a.of[i] op b.of[i];         \
        return result;                                  \
    }
#define OPERATOR_WITH_NUMBER(Result, Type, Number, op)  \
    INLINE Result operator op(Type a, Number b) {       \
        Result result;                                  \
        EACH result.of[i] = a.of[i] op b;               \
        return result;                                  \
    }

OPERATOR(Float, Float, +)
OPERATOR(Float, Float, -)
OPERATOR(Float, Float, *)
OPERATOR(Float, Float, /)
OPERATOR(Mask, Float, ==)
OPERATOR_WITH_NUMBER(Float, Float, float, +)
OPERATOR_WITH_NUMBER(Float, Float, float, -)
OPERATOR_WITH_NUMBER(Float, Float, float, *)
OPERATOR_WITH_NUMBER(Mask, Float, float, <)
OPERATOR_WITH_NUMBER(Mask, Float, float, >)
OPERATOR_WITH_NUMBER(Mask, Float, float, !=)
OPERATOR(Int, Int, +)
OPERATOR(Int, Int, -)
OPERATOR(Int, Int, |)
OPERATOR(Int, Int, ^)
OPERATOR_WITH_NUMBER(Int, Int, int32_t, +)
OPERATOR_WITH_NUMBER(Int, Int, int32_t, -)
OPERATOR_WITH_NUMBER(Int, Int, int32_t, *)
OPERATOR_WITH_NUMBER(Int, Int, int32_t, &)
OPERATOR_WITH_NUMBER(Int, Int, int32_t, ^)
OPERATOR_WITH_NUMBER(Int, Int, int32_t, <<)
OPERATOR_WITH_NUMBER(Int, Int, int32_t, >>)

template <class Vector, class Number>
INLINE Vector all(Number x) {
    Vector result;
    EACH result.of[i] = x - decltype(result.of[i] + result.of[i]){};
    return result;
}

INLINE Int operator~(Int x) {
    EACH x.of[i] = ~x.of[i];
    return x;
}

template <class Vector>
INLINE Vector select(Mask where, Vector a, Vector b) {
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

INLINE Int upper(Int x) {  // the upper 16 bits, moved down
    EACH x.of[i] = (IntRegister)((UnsignedRegister)x.of[i] >> 16);
    return x;
}

INLINE Float size_of(Float x) { return number(bits(x) & 0x7fffffff); }
INLINE Int sign_of(Float x) { return bits(x) & INT32_MIN; }

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

constexpr float ZERO_EXPONENT = -0x1p20f;

struct Log2 {
    Float whole, fraction;
};

// Base-2 logarithm of a finite |x| > 0 as (whole, fraction).
INLINE Log2 log2_parts(Float x) {
    Float whole, mantissa;  // in [3/4, 3/2)
#if defined(__AVX512F__)
    EACH mantissa.of[i] =
        (FloatRegister)_mm512_getmant_ps((__m512)x.of[i], _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
    EACH whole.of[i] = (FloatRegister)_mm512_getexp_ps((__m512)x.of[i]) -
                       (FloatRegister)_mm512_getexp_ps((__m512)mantissa.of[i]);
#else
    // Subnormal numbers are scaled up by 2^24 (times 1.0 otherwise) to have a full mantissa.
    x = size_of(x);
    Int subnormal = (bits(x) - 0x00800000) >> 31;
    Float scale = number((subnormal & (24 << 23)) + (127 << 23));
    Int normal_bits = bits(scale * x);
    Int exponent = normal_bits - 0x3f400000;
    mantissa = number(normal_bits - (exponent & (int32_t)0xff800000));
    exponent = (exponent >> 23) - (subnormal & 24);
    EACH whole.of[i] = __builtin_convertvector(exponent.of[i], FloatRegister);
#endif
    // log2(m) = s (a0 + s^2 (a1 + s^2 a2)), s = (m - 1) / (m + 1)
    Float s = (mantissa - 1.0f) / (mantissa + 1.0f), square = s * s;
    return {whole, ((square * 0.6027452945709229f + 0.9614068269729614f) * square + 2.8853909969329834f) * s};
}

// x = 0 gets a whole of ZERO_EXPONENT.
INLINE Float whole_or_zero(Float whole, [[maybe_unused]] Float x) {
#if defined(__AVX512F__)
    EACH whole.of[i] = (FloatRegister)_mm512_max_ps((__m512)whole.of[i], _mm512_set1_ps(ZERO_EXPONENT));
    return whole;
#else
    return select(x != 0.0f, whole, all<Float>(ZERO_EXPONENT));
#endif
}

// 2^(high + low), high exact and low small beside it; 0 below the range, infinity above it, but NaN for a high of
// -infinity.
INLINE Float exp2_sum(Float high, Float low, [[maybe_unused]] bool high_is_finite = true) {
    // k = round(high + low), t = (high - k) + low in [-1/2, 1/2]
    Float k = high + low;
#if defined(__AVX512F__)
    k = (k + 0x1.8p23f) - 0x1.8p23f;
    Float t = (high - k) + low;
#else
    k = select(k < -250.0f, all<Float>(-250.0f), k);
    k = select(k > 250.0f, all<Float>(250.0f), k);
    k = (k + 0x1.8p23f) - 0x1.8p23f;
    Float t = (high - k) + low;
    t = select(t < -1.0f, all<Float>(-1.0f), t);  // matters only where k was clamped
    t = select(t > 1.0f, all<Float>(1.0f), t);
#endif
    // 2^t = 1 + t (b1 + t (b2 + t (b3 + t (b4 + t b5))))
    Float result = t * 0.001326472731307149f + 0.009671512991189957f;
    result = result * t + 0.05550733581185341f;
    result = result * t + 0.24022242426872253f;
    result = result * t + 0.6931470036506653f;
    result = result * t + 1.0f;
#if defined(__AVX512F__)
    // vscalefps makes 0 of NaN 2^-infinity.
    if (!high_is_finite) EACH k.of[i] = (FloatRegister)_mm512_max_ps((__m512)k.of[i], _mm512_set1_ps(-300.0f));
    EACH result.of[i] = (FloatRegister)_mm512_scalef_ps((__m512)result.of[i], (__m512)k.of[i]);
    return result;
#else
    // 2^k as a product of two powers, the first of which is exact, since k alone may lie outside the exponents.
    Int whole;
    EACH whole.of[i] = __builtin_convertvector(k.of[i], IntRegister);
    Int half = whole >> 1;
    return result * number((half + 127) << 23) * number((whole - half + 127) << 23);
#endif
}

// ------------------------------------------------------------------------------------------------------- rule.py

// beta m + (1 - beta) g, from the nearer end
INLINE Float interpolate(Float m, Float g, float beta, float rest) {
    return beta >= 0.5f ? (g - m) * rest + m : (m - g) * beta + g;
}

// s(x) = x / (|x|^((p-2)/(p-1)) + eps), and s(0) = 0; log2_x is of |x|, where POWER is GENERAL
template <Power POWER>
INLINE Float steepest_direction(Float x, Log2 log2_x, const Settings &s) {
    Float power = all<Float>(1.0f);
    if (POWER == ROOT) power = root_of(size_of(x));
    if (POWER == SAME) power = size_of(x);
    if (POWER == GENERAL) {
        power = exp2_sum(log2_x.whole * s.exponent_high, log2_x.whole * s.exponent_low + log2_x.fraction * s.exponent);
#if !defined(__AVX512F__)  // with it, infinity and NaN have come out as such by themselves
        power = power + (x - x);
#endif
    }
    // 0 over any positive number is 0.
    return x / select(x != 0.0f, power + s.eps, all<Float>(1.0f));
}

// The dual step of (p,p) and (2,p): u = |z|^(p-2) z - alpha c,  z' = sign(u) |u|^(1/(p-1)).
//     z' = z (1 + t)^r                        where |z|^(p-1) >= alpha |c|
//     z' = -sign(c) (alpha |c|)^r (1 + t)^r   elsewhere,             r = 1 / (p - 1)
INLINE Float mirror_step(Float z, Float c, Log2 log2_c, const Settings &s) {
    Log2 log2_z = log2_parts(z);
    log2_z.whole = whole_or_zero(log2_z.whole, z);
    Float c_whole = log2_c.whole + s.log_alpha_whole, c_fraction = log2_c.fraction + s.log_alpha_fraction;
    // gap = log2(|z|^(p-1)) - log2(alpha |c|);  |t| = 2^-|gap|
    Float gap_high = log2_z.whole * s.inner_high - c_whole;
    Float gap_low = (log2_z.whole * s.inner_low + log2_z.fraction * s.inner) - c_fraction;
    Mask c_larger = gap_high + gap_low < 0.0f;
    Int toward_larger = select(c_larger, all<Int>(0), all<Int>(INT32_MIN));  // the sign of -gap
    Float t = exp2_sum(number(bits(gap_high) ^ toward_larger), number(bits(gap_low) ^ toward_larger), false);
    // The two terms of u are z's and -c's; t is negative where they oppose each other.
    t = number(bits(t) | (~(bits(z) ^ bits(c)) & INT32_MIN));
    // |z'| = larger^r (1 + t)^r = [|z| or 1] * 2^(r log2(1 + t) + [0 or r log2(alpha |c|)])
    t = t + 1.0f;
    Log2 ratio = log2_parts(t);
    ratio.whole = whole_or_zero(ratio.whole, t);
    Float whole = select(c_larger, ratio.whole + c_whole, ratio.whole);
    Float fraction = select(c_larger, ratio.fraction + c_fraction, ratio.fraction);
    Float growth = exp2_sum(whole * s.root_high, whole * s.root_low + fraction * s.root);
    Float size = growth * select(c_larger, all<Float>(1.0f), size_of(z));
    Float z_new = number(bits(size) ^ select(c_larger, ~bits(c) & INT32_MIN, sign_of(z)));
#if defined(__AVX512F__)
    return z_new + 0.0f;  // NaN and infinity have come out as NaN by themselves
#else
    return z_new + (z - z) + (c - c);
#endif
}

// --------------------------------------------------------------------------------------------------- rounding.py

// A key from (seed, step count, STATES or WEIGHT): splitmix64's finalizer over the three.
INLINE int32_t round_key(uint64_t seed, uint64_t step, uint64_t which) {
    uint64_t x = seed * 0x9E3779B97F4A7C15u + step * 0xBF58476D1CE4E5B9u + which * 0x94D049BB133111EBu;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return (int32_t)(x ^ (x >> 31));
}

// Twice 16 random bits an element: a hash of two numbers of it and a key; 0 where their sum is NaN.
struct Random {
    Int upper, lower;
};

INLINE Random random_bits(Float first, Float second, int32_t key) {
    // The second is turned by 16 bits, so that bits that seldom change meet bits that do.
    Int turned = (bits(second) << 16) | upper(bits(second));
    Int h = (turned ^ bits(first) ^ key) * (int32_t)0x9E3779B1;
    Float sum = first + second;
    Mask number = sum == sum;
    Int high = upper(h);
    return {select(number, high, all<Int>(0)), select(number, (h ^ high) & 0xffff, all<Int>(0))};
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

// The processor's own prefetching does not get far enough ahead of seven streams.
constexpr int64_t AHEAD = 320;

INLINE void prefetch(const void *from, int64_t index, int32_t dtype) {
    const int size = dtype == FLOAT32 ? 4 : 2;
    const char *at = (const char *)from + size * (index + AHEAD);
    for (int i = 0; i < size * LANES; i += 64) __builtin_prefetch(at + i);
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

struct Keys {
    int32_t states, weight;
};

// One step of STACEY(p,2), (p,p) or (2,p), algorithms 2, 3 and 4, for the elements from `index` on.
template <Variant VARIANT, Power POWER>
INLINE void update(const Tensors &t, int64_t index, Keys keys, const Settings &s) {
    prefetch(t.weight, index, s.weight_dtype), prefetch(t.gradient, index, s.gradient_dtype);
    prefetch(t.z, index, s.z_dtype), prefetch(t.m, index, s.m_dtype);
    Float m_new, c;
    {
        Float g = load(t.gradient, index, s.gradient_dtype);
        if (s.has_scale) g = g * s.inverse_scale;
        Float m = load(t.m, index, s.m_dtype);
        // c = beta1 m + (1 - beta1) g        m' = beta2 m + (1 - beta2) g
        c = interpolate(m, g, s.beta1, s.beta1_rest);
        m_new = interpolate(m, g, s.beta2, s.beta2_rest);
    }
    Log2 log2_c{};
    if (VARIANT != P2 || POWER == GENERAL) log2_c = log2_parts(c);
    if (VARIANT != P2) log2_c.whole = whole_or_zero(log2_c.whole, c);

    // dual step     z' = z - alpha c        or, for (p,p) and (2,p), the mirror step
    Float z = load(t.z, index, s.z_dtype);
    Float z_new;
    if (VARIANT == P2 || s.mirror_is_plain) {
        z_new = z - c * s.alpha;
    } else if (s.alpha_is_zero) {
        z_new = z + c * 0.0f;
    } else {
        z_new = mirror_step(z, c, log2_c, s);
    }
    if (s.z_dtype == FLOAT32) {
        store(t.z, index, z_new), store(t.m, index, m_new);
    } else if (s.stochastic) {
        Random random = random_bits(z_new, m_new, keys.states);
        store_upper(t.z, index, round_stochastic(z_new, random.upper));
        store_upper(t.m, index, round_stochastic(m_new, random.lower));
    } else {
        store_upper(t.z, index, round_nearest(z_new)), store_upper(t.m, index, round_nearest(m_new));
    }

    // primal step   eta s(c)    or, for (2,p),    eta c
    Float direction = VARIANT == TWO_P ? c : steepest_direction<POWER>(c, log2_c, s);
    Float primal_step = direction * s.primal_rate;

    // coupling      theta' = theta + [tau z' - (tau + eta lambda) theta - (1 - tau) eta s]
    Float theta = load(t.weight, index, s.weight_dtype);
    Float change = z_new * s.tau - theta * s.pull - primal_step;
    Float weight_new = change + theta;
    if (s.weight_dtype == FLOAT32) {
        store(t.weight, index, weight_new);
    } else if (s.stochastic) {
        Float g = load(t.gradient, index, s.gradient_dtype);
        if (s.has_scale) g = g * s.inverse_scale;
        Random random = random_bits(weight_new, g, keys.weight);
        store_upper(t.weight, index, round_stochastic(weight_new, random.upper));
    } else {
        store_upper(t.weight, index, round_nearest(weight_new));
    }
}

inline int64_t bytes(int32_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

template <Variant VARIANT, Power POWER>
void update_range(const Tensors &whole, int64_t start, int64_t stop, Keys keys, const Settings &shared) {
    const Settings s = shared;  // a copy that no store can change
    const Tensors t = whole;
    int64_t index = start;
    for (; index + LANES <= stop; index += LANES) update<VARIANT, POWER>(t, index, keys, s);
    if (int64_t left = stop - index) {
        float weight[LANES] = {}, gradient[LANES] = {}, z[LANES] = {}, m[LANES] = {};
        Tensors padded{weight, gradient, z, m, nullptr, LANES};
        auto copy = [&](void *to, const void *from, int32_t dtype) { memcpy(to, from, left * bytes(dtype)); };
        auto at = [&](const void *tensor, int32_t dtype) { return (char *)tensor + index * bytes(dtype); };
        copy(weight, at(t.weight, s.weight_dtype), s.weight_dtype);
        copy(gradient, at(t.gradient, s.gradient_dtype), s.gradient_dtype);
        copy(z, at(t.z, s.z_dtype), s.z_dtype);
        copy(m, at(t.m, s.m_dtype), s.m_dtype);
        update<VARIANT, POWER>(padded, 0, keys, s);
        copy(at(t.weight, s.weight_dtype), weight, s.weight_dtype);
        copy(at(t.z, s.z_dtype), z, s.z_dtype);
        copy(at(t.m, s.m_dtype), m, s.m_dtype);
    }
}

using Update = void (*)(const Tensors &, int64_t, int64_t, Keys, const Settings &);

template <Variant VARIANT>
Update choose(int32_t power) {
    switch (power) {
        case ONE: return update_range<VARIANT, ONE>;
        case ROOT: return update_range<VARIANT, ROOT>;
        case SAME: return update_range<VARIANT, SAME>;
        default: return update_range<VARIANT, GENERAL>;
    }
}

Update choose(const Settings &s) {
    switch (s.variant) {
        case P2: return choose<P2>(s.power);
        case PP: return choose<PP>(s.power);
        default: return update_range<TWO_P, GENERAL>;
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
    const Update update = choose(s);
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
                update(t, start, stop, {round_key(s.seed, step, 1), round_key(s.seed, step, 2)}, s);
            }
            before += t.size;
        }
    }
}
