/* Slots of bfloat16: placing blocks into a prompt, and attention over its slots.
 *
 * What each function must compute is said where Python calls it (kernels.py). Keys are in pair order: the two numbers
 * that are rotated together are neighbours. A plane is what one KV head of one layer holds: [slots, width].
 * Attention is the usual blocked one: a tile of slots is repacked as operands (lanes.h), then used by all rows, so that
 * scores never leave the first-level cache. Weights are powers of two of scores without the row's maximum subtracted;
 * the caller is told how many sums that did not suit.
 */
#include "rows.h"
#include "slots.h"

#include <string.h>

enum {
    PARTS = TILE / LANES,
    OPERANDS = TILE / PER_LANE, /* with one number of each of a tile's slots */
    APART = PER_LANE == 2 ? 1 : OPERANDS, /* operands of a slot's neighbouring numbers */
};

/* A plane of keys in eight bits: ``steps`` and ``middles`` of its channels. */
static void place_narrow_keys(const int8_t *from, int64_t numbers, int64_t width, const uint16_t *steps,
                              const uint16_t *middles, const float *phase, uint16_t *to) {
    for (int64_t slot = 0; slot < numbers; slot += width)
        for (int64_t i = 0; i < width; i += LANES) {
            Floats pairs = add_product(whole_numbers(from + slot + i), widened(steps + i), widened(middles + i));
            store_narrow(to + slot + i, rotated(pairs, load(phase + slot + i)));
        }
}

/* A plane of values in eight bits: a step for each slot. */
static void place_narrow_values(const int8_t *from, int64_t numbers, int64_t width, const uint16_t *steps,
                                uint16_t *to) {
    for (int64_t slot = 0; slot < numbers; slot += width, steps++) {
        uint32_t bits = (uint32_t)*steps << 16;
        float step;
        memcpy(&step, &bits, sizeof step);
        for (int64_t i = 0; i < width; i += LANES)
            store_narrow(to + slot + i, times(whole_numbers(from + slot + i), everywhere(step)));
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
            store_narrow(to + i, rotated(widened(from + i), load(phase + i)));
    }
}

/* ``parts`` times 16 slots from ``slot``, zeros from ``end``, as operands: keys [part, numbers in one's lanes], values
 * [span of numbers, slots in one's lanes, part of the span]. */
static inline __attribute__((always_inline)) void repack(const uint16_t *keys, const uint16_t *values, int64_t slot,
                                                         int64_t parts, int64_t end, int64_t width,
                                                         Operand *tile_keys, Operand *tile_values) {
    int64_t chunks = width / CHUNK;
    for (int64_t part = 0; part < parts; part++)
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            repack_keys(keys, slot + part * LANES, end, width, chunk,
                        tile_keys + (part * chunks + chunk) * (CHUNK / PER_LANE));
    for (int64_t i = 0; i < parts * LANES / PER_LANE; i++)
        for (int64_t span = 0; span < width / LANES / PER_LANE; span++)
            repack_values(values, slot + PER_LANE * i, end, width, span, tile_values + (span * OPERANDS + i) * PER_LANE);
}

/* Rows first … first + rows - 1 of a KV head, where row r is token r / group and query head r % group of it. The sums
 * of ``together`` rows stand in registers, each row's ``side`` by side: they share what is read. */
static inline __attribute__((always_inline)) int64_t attend_batch(const float *query, const uint16_t *keys,
                                                                  const uint16_t *values, int64_t first, int64_t rows,
                                                                  int64_t group, int64_t heads, int64_t width,
                                                                  int64_t before, float scale, float least, float most,
                                                                  float *out, int together, int side) {
    int64_t padded = (rows + together - 1) / together * together, operands = width / PER_LANE;
    int64_t vectors = width / LANES, end = before + (first + rows - 1) / group + 1, unsuited = 0;
    /* of the widest head's size, a third of a megabyte in all; a narrower one uses the beginning of each */
    Operand tile_keys[PARTS * WIDEST / PER_LANE], tile_values[WIDEST / LANES * OPERANDS];
    int64_t seen[BATCH]; /* how many slots */
    Floats sums[BATCH], attended[BATCH * WIDEST / LANES];
    Number scaled[BATCH * WIDEST] __attribute__((aligned(64)));
    Number weights[ROWS * TILE] __attribute__((aligned(64)));
    memset(sums, 0, padded * sizeof *sums);
    memset(attended, 0, padded * width * sizeof(float));
    memset(scaled, 0, padded * width * sizeof *scaled);
    for (int64_t row = 0; row < padded; row++) seen[row] = before + (first + row) / group + 1;
    for (int64_t row = 0; row < rows; row++) {
        const float *from = query + ((first + row) / group * heads + (first + row) % group) * width;
        for (int64_t i = 0; i < width; i += LANES)
            store_numbers(scaled + row * width + i, times(load(from + i), everywhere(scale)));
    }
    for (int64_t slot = 0; slot < end; slot += TILE) {
        int64_t parts = (end - slot + side * LANES - 1) / (side * LANES) * side;
        if (parts > PARTS) parts = PARTS;
        repack(keys, values, slot, parts, end, width, tile_keys, tile_values);
        for (int64_t row = 0; row < padded; row += together) {
            for (int64_t part = 0; part < parts; part += side) {
                Floats scores[ROWS][2];
                for (int r = 0; r < together; r++)
                    for (int h = 0; h < side; h++) scores[r][h] = zeros();
                const Operand *packed = tile_keys + part * operands;
#pragma GCC unroll 4 /* measured at width 128: a fifth */
                for (int64_t i = 0; i < operands; i++)
                    for (int r = 0; r < together; r++) {
                        Operand number = operand(scaled + (row + r) * width + i * PER_LANE);
                        for (int h = 0; h < side; h++)
                            scores[r][h] = add_products(scores[r][h], number, packed[h * operands + i]);
                    }
                for (int r = 0; r < together; r++)
                    for (int h = 0; h < side; h++) {
                        int64_t left = seen[row + r] - slot - (part + h) * LANES;
                        Floats weight = first_lanes(power_of_two(scores[r][h]), left);
                        sums[row + r] = add(sums[row + r], weight);
                        store_numbers(weights + r * TILE + (part + h) * LANES, weight);
                    }
            }
            for (int64_t part = 0; part < vectors; part += side) {
                Floats total[ROWS][2], *kept = attended + row * vectors + part;
                for (int r = 0; r < together; r++)
                    for (int h = 0; h < side; h++) total[r][h] = kept[r * vectors + h];
                for (int64_t i = 0; i < parts * LANES / PER_LANE; i++) {
                    const Operand *slots = tile_values + part * OPERANDS + i * PER_LANE;
                    for (int r = 0; r < together; r++) {
                        Operand weight = operand(weights + r * TILE + i * PER_LANE);
                        for (int h = 0; h < side; h++)
                            total[r][h] = add_products(total[r][h], weight, slots[h * APART]);
                    }
                }
                for (int r = 0; r < together; r++)
                    for (int h = 0; h < side; h++) kept[r * vectors + h] = total[r][h];
            }
        }
    }
    for (int64_t row = 0; row < rows; row++) {
        float sum = sum_of(sums[row]);
        unsuited += !(sum > least && sum < most);
        float *to = out + ((first + row) / group * heads + (first + row) % group) * width;
        for (int64_t i = 0; i < vectors; i++)
            store(to + i * LANES, divide(attended[row * vectors + i], everywhere(sum)));
    }
    return unsuited;
}

int64_t attend_rows(const float *query, const uint16_t *keys, const uint16_t *values, int64_t first, int64_t rows,
                    int64_t group, int64_t heads, int64_t width, int64_t before, float scale, float least, float most,
                    float *out) {
#define BATCH_OF(WIDTH, TOGETHER, SIDE) \
    attend_batch(query, keys, values, first, rows, group, heads, WIDTH, before, scale, least, most, out, TOGETHER, SIDE)
#define ATTEND(WIDTH) \
    FEW_ROWS && rows <= FEW_ROWS ? BATCH_OF(WIDTH, FEW_ROWS, 2) : BATCH_OF(WIDTH, ROWS, SIDE_BY_SIDE)
    switch (width) { /* sizes that the compiler knows are unrolled */
        case 32: return ATTEND(32);
        case 64: return ATTEND(64);
        case 128: return ATTEND(128);
        default: return ATTEND(width);
    }
#undef ATTEND
#undef BATCH_OF
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
