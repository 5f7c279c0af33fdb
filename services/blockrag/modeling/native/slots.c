/* Slots of bfloat16 on processors with AVX-512 BF16: placing blocks into a prompt, and attention over its slots.
 *
 * What each function must compute is said where Python calls it (kernels.py). Keys are in pair order: the two numbers
 * that are rotated together are neighbours. A plane is what one KV head of one layer holds: [slots, width].
 * Attention is the usual blocked one: a tile of slots is repacked for vdpbf16ps (which adds products of neighbouring
 * pairs to float32), then used by all rows, so that scores never leave the first-level cache. Weights are powers of two
 * of scores without the row's maximum subtracted; the caller is told how many sums that did not suit.
 */
#include "rows.h"
#include "slots.h"

#include <string.h>

enum {
    TILE = 64,     /* slots that are repacked at a time */
    PARTS = TILE / LANES,
    PAIRS = TILE / 2,
};

static inline __m512 whole_numbers(const int8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}

/* A plane of keys in eight bits: ``steps`` and ``middles`` of its channels. */
static void place_narrow_keys(const int8_t *from, int64_t numbers, int64_t width, const uint16_t *steps,
                              const uint16_t *middles, const float *phase, uint16_t *to) {
    for (int64_t slot = 0; slot < numbers; slot += width)
        for (int64_t i = 0; i < width; i += LANES) {
            __m512 pairs = _mm512_fmadd_ps(whole_numbers(from + slot + i), widened(steps + i), widened(middles + i));
            store_narrow(to + slot + i, rotated(pairs, _mm512_loadu_ps(phase + slot + i)));
        }
}

/* A plane of values in eight bits: a step for each slot. */
static void place_narrow_values(const int8_t *from, int64_t numbers, int64_t width, const uint16_t *steps,
                                uint16_t *to) {
    for (int64_t slot = 0; slot < numbers; slot += width, steps++) {
        __m512 step = _mm512_castsi512_ps(_mm512_set1_epi32((int32_t)((uint32_t)*steps << 16)));
        for (int64_t i = 0; i < width; i += LANES)
            store_narrow(to + slot + i, _mm512_mul_ps(whole_numbers(from + slot + i), step));
    }
}

void place_slots(int64_t blocks, const void *const *sources, const int64_t *source_planes,
                 const uint16_t *const *key_scales, const uint16_t *const *value_scales, const int64_t *starts,
                 int64_t key_planes, int64_t width, const float *phases, int64_t threads, uint16_t *out,
                 int64_t out_plane) {
    int64_t planes = 2 * key_planes;
#pragma omp parallel for schedule(dynamic, key_planes) num_threads(threads)
    for (int64_t part = 0; part < blocks * planes; part++) { /* a block's planes follow each other in memory */
        int64_t block = part / planes, plane = part % planes;
        uint16_t *to = out + plane * out_plane + starts[block] * width;
        const float *phase = phases + starts[block] * width;
        int64_t numbers = (starts[block + 1] - starts[block]) * width, value = plane - key_planes;
        if (key_scales[block]) {
            const int8_t *from = (const int8_t *)sources[block] + plane * source_planes[block];
            const uint16_t *steps = key_scales[block] + plane * width;
            if (value < 0) place_narrow_keys(from, numbers, width, steps, steps + key_planes * width, phase, to);
            else place_narrow_values(from, numbers, width, value_scales[block] + value * (source_planes[block] / width), to);
            continue;
        }
        const uint16_t *from = (const uint16_t *)sources[block] + plane * source_planes[block];
        if (value >= 0) {
            memcpy(to, from, numbers * sizeof *to);
            continue;
        }
        for (int64_t i = 0; i < numbers; i += LANES)
            store_narrow(to + i, rotated(widened(from + i), _mm512_loadu_ps(phase + i)));
    }
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

/* ``parts`` times 16 slots from ``slot``, zeros from ``end``: keys with one pair of numbers of 16 slots per register,
 * [part, pair], values with one number of both slots of a pair, [chunk, pair of slots, half of the chunk]. */
static inline __attribute__((always_inline)) void repack(const uint16_t *keys, const uint16_t *values, int64_t slot,
                                                         int64_t parts, int64_t end, int64_t width,
                                                         __m512i *tile_keys, __m512i *tile_values) {
    const __m512i first_half = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                                                6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second_half = _mm512_add_epi16(first_half, _mm512_set1_epi16(LANES));
    int64_t chunks = width / CHUNK;
    for (int64_t part = 0; part < parts; part++)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            __m512i *rows = tile_keys + (part * chunks + chunk) * LANES;
            for (int64_t i = 0; i < LANES; i++)
                rows[i] = slot_or_zero(keys, slot + part * LANES + i, end, width, chunk);
            transpose(rows);
        }
    for (int64_t pair = 0; pair < parts * LANES / 2; pair++)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            __m512i even = slot_or_zero(values, slot + 2 * pair, end, width, chunk);
            __m512i odd = slot_or_zero(values, slot + 2 * pair + 1, end, width, chunk);
            __m512i *to = tile_values + (chunk * PAIRS + pair) * 2;
            to[0] = _mm512_permutex2var_epi16(even, first_half, odd);
            to[1] = _mm512_permutex2var_epi16(even, second_half, odd);
        }
}

/* Rows first … first + rows - 1 of a KV head, where row r is token r / group and query head r % group of it. */
static inline __attribute__((always_inline)) int64_t attend_batch(const float *query, const uint16_t *keys,
                                                                  const uint16_t *values, int64_t first, int64_t rows,
                                                                  int64_t group, int64_t heads, int64_t width,
                                                                  int64_t before, float scale, float least, float most,
                                                                  float *out) {
    int64_t padded = (rows + ROWS - 1) / ROWS * ROWS, chunks = width / CHUNK, half = width / 2;
    int64_t end = before + (first + rows - 1) / group + 1, unsuited = 0;
    /* of the widest head's size, a third of a megabyte in all; a narrower one uses the beginning of each */
    __m512i tile_keys[PARTS * WIDEST / CHUNK * LANES], tile_values[WIDEST / CHUNK * PAIRS * 2];
    int64_t seen[BATCH]; /* how many slots */
    __m512 sums[BATCH], attended[BATCH * WIDEST / LANES];
    int32_t scaled[BATCH * WIDEST / 2] __attribute__((aligned(64))); /* pairs of bfloat16 */
    int32_t weights[ROWS * PAIRS] __attribute__((aligned(64)));
    memset(sums, 0, padded * sizeof *sums);
    memset(attended, 0, padded * width * sizeof(float));
    memset(scaled, 0, padded * half * sizeof *scaled);
    for (int64_t row = 0; row < padded; row++) seen[row] = before + (first + row) / group + 1;
    for (int64_t row = 0; row < rows; row++) {
        const float *from = query + ((first + row) / group * heads + (first + row) % group) * width;
        for (int64_t i = 0; i < width; i += LANES)
            store_narrow(scaled + row * half + i / 2, _mm512_mul_ps(_mm512_loadu_ps(from + i), _mm512_set1_ps(scale)));
    }
    for (int64_t slot = 0; slot < end; slot += TILE) {
        int64_t parts = (end - slot + 2 * LANES - 1) / (2 * LANES) * 2; /* two at a time share a load of the queries */
        if (parts > PARTS) parts = PARTS;
        repack(keys, values, slot, parts, end, width, tile_keys, tile_values);
        for (int64_t row = 0; row < padded; row += ROWS) {
            for (int64_t part = 0; part < parts; part += 2) {
                __m512 scores[ROWS][2];
                for (int r = 0; r < ROWS; r++)
                    for (int h = 0; h < 2; h++) scores[r][h] = _mm512_setzero_ps();
                const __m512i *packed = tile_keys + part * half;
#pragma GCC unroll 4 /* measured at width 128: a fifth */
                for (int64_t pair = 0; pair < half; pair++)
                    for (int r = 0; r < ROWS; r++) {
                        __m512bh number = (__m512bh)_mm512_set1_epi32(scaled[(row + r) * half + pair]);
                        for (int h = 0; h < 2; h++)
                            scores[r][h] = _mm512_dpbf16_ps(scores[r][h], number, (__m512bh)packed[h * half + pair]);
                    }
                for (int r = 0; r < ROWS; r++)
                    for (int h = 0; h < 2; h++) {
                        int64_t left = seen[row + r] - slot - (part + h) * LANES;
                        __mmask16 visible = left >= LANES ? 0xffff : left <= 0 ? 0 : (1 << left) - 1;
                        __m512 weight = _mm512_maskz_mov_ps(visible, power_of_two(scores[r][h]));
                        sums[row + r] = _mm512_add_ps(sums[row + r], weight);
                        store_narrow(weights + r * PAIRS + (part + h) * LANES / 2, weight);
                    }
            }
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                __m512 total[ROWS][2], *kept = attended + row * width / LANES + 2 * chunk;
                for (int r = 0; r < ROWS; r++)
                    for (int h = 0; h < 2; h++) total[r][h] = kept[r * 2 * chunks + h];
                for (int64_t pair = 0; pair < parts * LANES / 2; pair++) {
                    const __m512i *slots = tile_values + (chunk * PAIRS + pair) * 2;
                    for (int r = 0; r < ROWS; r++) {
                        __m512bh weight = (__m512bh)_mm512_set1_epi32(weights[r * PAIRS + pair]);
                        for (int h = 0; h < 2; h++)
                            total[r][h] = _mm512_dpbf16_ps(total[r][h], weight, (__m512bh)slots[h]);
                    }
                }
                for (int r = 0; r < ROWS; r++)
                    for (int h = 0; h < 2; h++) kept[r * 2 * chunks + h] = total[r][h];
            }
        }
    }
    for (int64_t row = 0; row < rows; row++) {
        float sum = _mm512_reduce_add_ps(sums[row]);
        unsuited += !(sum > least && sum < most);
        float *to = out + ((first + row) / group * heads + (first + row) % group) * width;
        for (int64_t i = 0; i < width / LANES; i++)
            _mm512_storeu_ps(to + i * LANES, _mm512_div_ps(attended[row * width / LANES + i], _mm512_set1_ps(sum)));
    }
    return unsuited;
}

int64_t attend_rows(const float *query, const uint16_t *keys, const uint16_t *values, int64_t first, int64_t rows,
                    int64_t group, int64_t heads, int64_t width, int64_t before, float scale, float least, float most,
                    float *out) {
#define ATTEND(WIDTH) \
    attend_batch(query, keys, values, first, rows, group, heads, WIDTH, before, scale, least, most, out)
    switch (width) { /* sizes that the compiler knows are unrolled */
        case 32: return ATTEND(32);
        case 64: return ATTEND(64);
        case 128: return ATTEND(128);
        default: return ATTEND(width);
    }
#undef ATTEND
}

int64_t rows_at_once(int64_t rows, int64_t kv_heads, int64_t threads) {
    int64_t shares = (threads + kv_heads - 1) / kv_heads; /* of a head's rows, so that every thread has one */
    int64_t batch = ((rows + shares - 1) / shares + ROWS - 1) / ROWS * ROWS;
    return batch > BATCH ? BATCH : batch;
}

int64_t attend(const float *query, const uint16_t *keys, const uint16_t *values, int64_t tokens, int64_t heads,
               int64_t kv_heads, int64_t width, int64_t total, int64_t plane, float scale, float least, float most,
               int64_t threads, float *out) {
    int64_t group = heads / kv_heads, rows = tokens * group, unsuited = 0;
    int64_t batch = rows_at_once(rows, kv_heads, threads), batches = (rows + batch - 1) / batch;
#pragma omp parallel for schedule(dynamic) reduction(+ : unsuited) num_threads(threads)
    for (int64_t task = 0; task < kv_heads * batches; task++) {
        int64_t head = task % kv_heads, first = (batches - 1 - task / kv_heads) * batch; /* the longest first */
        int64_t count = rows - first < batch ? rows - first : batch, offset = head * group * width;
        unsuited += attend_rows(query + offset, keys + head * plane, values + head * plane, first, count, group, heads,
                                width, total - tokens, scale, least, most, out + offset);
    }
    return unsuited;
}
