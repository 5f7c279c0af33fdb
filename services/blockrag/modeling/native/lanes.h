/* Sixteen float32 and what is done with them, for each kind of processor that the C files are compiled for.
 *
 * What is multiplied in sums of products is rounded to bfloat16 everywhere: a Number. Where the processor multiplies
 * bfloat16 (AVX-512 BF16) it is one, and each lane of an Operand has a pair of them, whose products vdpbf16ps adds at
 * once. Elsewhere (AVX2 with FMA) it is the float32 that it stands for, since every use of a narrow one would widen it.
 * There a vector is two registers, of which there are sixteen: sums of twelve leave room for what is multiplied.
 */
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum {
    LANES = 16, /* float32 in a vector */
    CHUNK = 32, /* widths are multiples of it */
};

#ifdef __AVX512BF16__

enum {
    PER_LANE = 2,     /* numbers in a lane of an operand */
    ROWS = 8,         /* rows of attention whose sums stand in registers, */
    SIDE_BY_SIDE = 2, /* so many of each, */
    FEW_ROWS = 0,     /* or of so many rows two each, where there are no more */
    TILE = 64,        /* slots that are repacked at a time */
    BATCH = 128,      /* most rows of attention that share a repacked tile */
    TOKENS = 8,       /* of a product, whose sums stand in registers */
};

typedef __m512 Floats;
typedef __m512i Operand;
typedef uint16_t Number;

static inline Floats zeros(void) { return _mm512_setzero_ps(); }
static inline Floats everywhere(float number) { return _mm512_set1_ps(number); }
static inline Floats load(const float *from) { return _mm512_loadu_ps(from); }
static inline void store(float *to, Floats numbers) { _mm512_storeu_ps(to, numbers); }
static inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
static inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
static inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
static inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
static inline Floats add_product(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
static inline Floats nearest_whole(Floats x) { return _mm512_roundscale_ps(x, 0); }
static inline Floats times_power(Floats x, Floats whole) { return _mm512_scalef_ps(x, whole); } /* x * 2^whole */
static inline float sum_of(Floats numbers) { return _mm512_reduce_add_ps(numbers); }

static inline Floats widened(const uint16_t *from) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline Floats whole_numbers(const int8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}

static inline void store_narrow(uint16_t *to, Floats numbers) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(numbers));
}

static inline void store_numbers(Number *to, Floats numbers) { store_narrow(to, numbers); }

/* Zeros behind the first ``count`` lanes, of which there may be none, or more than there are. */
static inline Floats first_lanes(Floats numbers, int64_t count) {
    __mmask16 visible = count >= LANES ? 0xffff : count <= 0 ? 0 : (1 << count) - 1;
    return _mm512_maskz_mov_ps(visible, numbers);
}

/* Neighbours as complex numbers, times those of ``phases``. */
static inline Floats rotated(Floats pairs, Floats phases) {
    __m512 crossed = _mm512_mul_ps(_mm512_permute_ps(pairs, 0xB1), _mm512_movehdup_ps(phases));
    return _mm512_fmaddsub_ps(pairs, _mm512_moveldup_ps(phases), crossed);
}

/* The same numbers in each lane. */
static inline Operand operand(const Number *from) {
    int32_t numbers;
    memcpy(&numbers, from, sizeof numbers);
    return _mm512_set1_epi32(numbers);
}

static inline Floats add_products(Floats sum, Operand a, Operand b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

/* Weights of eight bits of 16 rows, behind them those of the same rows for the next input. */
static inline Operand operand_of_weights(const int8_t *from) {
    __m512i first = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128((const __m128i *)from))));
    __m512i second =
        _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128((const __m128i *)from + 1))));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(first, 16), second);
}

/* Turn 16 rows of 16 into 16 columns, in place. */
static inline void transpose(__m512i *rows) {
    __m512i other[LANES];
    for (int i = 0; i < LANES; i += 2) {
        other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        other[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        other[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        other[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        other[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
        rows[i + 4] = _mm512_shuffle_i32x4(other[i + 4], other[i + 12], 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(other[i + 4], other[i + 12], 0xdd);
    }
}

static inline __m512i slot_or_zero(const uint16_t *plane, int64_t slot, int64_t end, int64_t width, int64_t chunk) {
    return slot < end ? _mm512_loadu_si512(plane + slot * width + chunk * CHUNK) : _mm512_setzero_si512();
}

/* A chunk of 16 slots from ``slot``, zeros from ``end``: an operand for each pair of numbers, a lane for each slot. */
static inline void repack_keys(const uint16_t *plane, int64_t slot, int64_t end, int64_t width, int64_t chunk,
                               Operand *to) {
    for (int64_t i = 0; i < LANES; i++) to[i] = slot_or_zero(plane, slot + i, end, width, chunk);
    transpose(to);
}

/* A chunk of a pair of slots: operands with a lane for each number. */
static inline void repack_values(const uint16_t *plane, int64_t slot, int64_t end, int64_t width, int64_t chunk,
                                 Operand *to) {
    const __m512i first_half = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                                                6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second_half = _mm512_add_epi16(first_half, _mm512_set1_epi16(LANES));
    __m512i even = slot_or_zero(plane, slot, end, width, chunk);
    __m512i odd = slot_or_zero(plane, slot + 1, end, width, chunk);
    to[0] = _mm512_permutex2var_epi16(even, first_half, odd);
    to[1] = _mm512_permutex2var_epi16(even, second_half, odd);
}

#else

enum {
    PER_LANE = 1,
    ROWS = 6,
    SIDE_BY_SIDE = 1,
    FEW_ROWS = 3,
    TILE = 32,
    BATCH = 96,
    TOKENS = 6,
};

typedef struct {
    __m256 low, high;
} Floats;
typedef Floats Operand;
typedef float Number;

static inline Floats both(__m256 half) { return (Floats){half, half}; }
static inline Floats zeros(void) { return both(_mm256_setzero_ps()); }
static inline Floats everywhere(float number) { return both(_mm256_set1_ps(number)); }
static inline Floats load(const float *from) { return (Floats){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
static inline void store(float *to, Floats numbers) {
    _mm256_storeu_ps(to, numbers.low), _mm256_storeu_ps(to + 8, numbers.high);
}

#define EACH(NAME, FUNCTION) \
    static inline Floats NAME(Floats a, Floats b) { return (Floats){FUNCTION(a.low, b.low), FUNCTION(a.high, b.high)}; }
EACH(add, _mm256_add_ps)
EACH(subtract, _mm256_sub_ps)
EACH(times, _mm256_mul_ps)
EACH(divide, _mm256_div_ps)
#undef EACH

static inline Floats add_product(Floats a, Floats b, Floats sum) {
    return (Floats){_mm256_fmadd_ps(a.low, b.low, sum.low), _mm256_fmadd_ps(a.high, b.high, sum.high)};
}

static inline Floats nearest_whole(Floats x) {
    return (Floats){_mm256_round_ps(x.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                    _mm256_round_ps(x.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

/* Powers beyond those of ordinary float32 are their least and largest: nothing here needs them told apart. */
static inline __m256 times_half_power(__m256 x, __m256 whole) {
    whole = _mm256_min_ps(_mm256_max_ps(whole, _mm256_set1_ps(-127)), _mm256_set1_ps(127));
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

static inline Floats times_power(Floats x, Floats whole) {
    return (Floats){times_half_power(x.low, whole.low), times_half_power(x.high, whole.high)};
}

static inline float sum_of(Floats numbers) {
    __m256 eight = _mm256_add_ps(numbers.low, numbers.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

static inline __m256 widened_half(const uint16_t *from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16));
}

static inline Floats widened(const uint16_t *from) { return (Floats){widened_half(from), widened_half(from + 8)}; }

static inline __m256 half_of_whole_numbers(const int8_t *from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
}

static inline Floats whole_numbers(const int8_t *from) {
    return (Floats){half_of_whole_numbers(from), half_of_whole_numbers(from + 8)};
}

/* bfloat16 in the upper halves of lanes, whose lower ones are undefined: the nearest, of two the even one, as
 * vcvtneps2bf16 rounds. What is not a number is cut: where arithmetic has made it, that leaves it none. */
static inline __m256i nearest(__m256 numbers) {
    __m256i bits = _mm256_castps_si256(numbers), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i none = _mm256_castps_si256(_mm256_cmp_ps(numbers, numbers, _CMP_UNORD_Q));
    return _mm256_add_epi32(bits, _mm256_andnot_si256(none, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))));
}

static inline void store_narrow(uint16_t *to, Floats numbers) {
    __m256i low = _mm256_srli_epi32(nearest(numbers.low), 16), high = _mm256_srli_epi32(nearest(numbers.high), 16);
    _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8));
}

static inline __m256 upper_halves(__m256i lanes) {
    return _mm256_castsi256_ps(_mm256_and_si256(lanes, _mm256_set1_epi32((int32_t)0xffff0000)));
}

static inline void store_numbers(Number *to, Floats numbers) {
    store(to, (Floats){upper_halves(nearest(numbers.low)), upper_halves(nearest(numbers.high))});
}

static inline Floats first_lanes(Floats numbers, int64_t count) {
    if (count >= LANES) return numbers;
    const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    __m256i limit = _mm256_set1_epi32(count <= 0 ? 0 : (int32_t)count);
    __m256i low = _mm256_cmpgt_epi32(limit, lanes);
    __m256i high = _mm256_cmpgt_epi32(limit, _mm256_add_epi32(lanes, _mm256_set1_epi32(8)));
    return (Floats){_mm256_and_ps(numbers.low, _mm256_castsi256_ps(low)),
                    _mm256_and_ps(numbers.high, _mm256_castsi256_ps(high))};
}

static inline __m256 half_rotated(__m256 pairs, __m256 phases) {
    __m256 crossed = _mm256_mul_ps(_mm256_permute_ps(pairs, 0xB1), _mm256_movehdup_ps(phases));
    return _mm256_fmaddsub_ps(pairs, _mm256_moveldup_ps(phases), crossed);
}

static inline Floats rotated(Floats pairs, Floats phases) {
    return (Floats){half_rotated(pairs.low, phases.low), half_rotated(pairs.high, phases.high)};
}

static inline Operand operand(const Number *from) { return everywhere(*from); }
static inline Floats add_products(Floats sum, Operand a, Operand b) { return add_product(a, b, sum); }
static inline Operand operand_of_weights(const int8_t *from) { return whole_numbers(from); }

/* Turn 8 rows of 8 into 8 columns. */
static inline void transpose(__m256i *rows) {
    __m256i other[8];
    for (int i = 0; i < 8; i += 2) {
        other[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        other[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        rows[i] = _mm256_unpacklo_epi64(other[i], other[i + 2]);
        rows[i + 1] = _mm256_unpackhi_epi64(other[i], other[i + 2]);
        rows[i + 2] = _mm256_unpacklo_epi64(other[i + 1], other[i + 3]);
        rows[i + 3] = _mm256_unpackhi_epi64(other[i + 1], other[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m256i low = rows[i], high = rows[i + 4];
        rows[i] = _mm256_permute2x128_si256(low, high, 0x20);
        rows[i + 4] = _mm256_permute2x128_si256(low, high, 0x31);
    }
}

/* A chunk of 16 slots from ``slot``, zeros from ``end``: an operand for each number, a lane for each slot. */
static inline void repack_keys(const uint16_t *plane, int64_t slot, int64_t end, int64_t width, int64_t chunk,
                               Operand *to) {
    for (int64_t half = 0; half < 2; half++)
        for (int64_t part = 0; part < CHUNK; part += 16) {
            __m256i rows[8];
            for (int64_t i = 0; i < 8; i++) {
                int64_t own = slot + half * 8 + i;
                const uint16_t *from = plane + own * width + chunk * CHUNK + part;
                _mm_prefetch((const char *)(from + TILE * width), _MM_HINT_T0);
                rows[i] = own < end ? _mm256_loadu_si256((const __m256i *)from) : _mm256_setzero_si256();
            }
            transpose(rows);
            for (int64_t i = 0; i < 8; i++) {
                Operand *pair = to + part + 2 * i;
                __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(rows[i], 16)), second = upper_halves(rows[i]);
                if (half) pair[0].high = first, pair[1].high = second;
                else pair[0].low = first, pair[1].low = second;
            }
        }
}

/* A chunk of a slot: operands with a lane for each number. */
static inline void repack_values(const uint16_t *plane, int64_t slot, int64_t end, int64_t width, int64_t chunk,
                                 Operand *to) {
    _mm_prefetch((const char *)(plane + (slot + TILE) * width + chunk * LANES), _MM_HINT_T0);
    *to = slot < end ? widened(plane + slot * width + chunk * LANES) : zeros();
}

#endif

/* 2^x: x = whole + part, and the polynomial of part within 3e-6 of its power. */
static inline Floats power_of_two(Floats x) {
    static const float coefficients[] = {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
    Floats whole = nearest_whole(x), part = subtract(x, whole), y = everywhere(1.3333558e-3f);
    for (int i = 0; i < 5; i++) y = add_product(y, part, everywhere(coefficients[i]));
    return times_power(y, whole);
}
