/* A whole step of a Llama-like decoder for a few tokens: one call, one team of threads, weights of eight bits.
 *
 * What is computed is said where Python calls it (step.py). A product's weights lie as they are read: 32 rows are a
 * block, and a block holds, for each group of 32 inputs, a cache line of the rows' scales in bfloat16, and then one for
 * each pair of neighbouring inputs: the first input's weights of rows 0 to 15, the second's, and both of rows 16 to 31.
 * Whole numbers to 127 are exact in bfloat16, so a line becomes operands (lanes.h) without rounding; the scales are
 * applied to the group's sum. Of gate and up, 16 rows each make a block. Hidden states stay float32 from layer to
 * layer; what is multiplied is rounded to bfloat16.
 *
 * Between two parts of a layer the threads wait for each other by spinning: waking them takes longer than a part.
 */
#include "step.h"

#include "rows.h"
#include "slots.h"

#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>

enum {
    AHEAD = 24,  /* lines that are asked for before they are needed */
    SPINS = 4096,      /* until a thread that waits lets others run: the cores may be shared */
};

enum Ending { STORE, ADD, GATED };

typedef struct {
    _Atomic int64_t *counters; /* how many threads arrived, in all; then how many tasks of each part were taken */
    int64_t threads, meetings, part;
} Team;

/* Wait until all threads have come here; then the next part begins. */
static void meet(Team *team) {
    int64_t all = ++team->meetings * team->threads;
    team->part++;
    atomic_fetch_add_explicit(team->counters, 1, memory_order_acq_rel);
    for (int64_t spins = 0; atomic_load_explicit(team->counters, memory_order_acquire) < all; spins++)
        if (spins < SPINS) _mm_pause();
        else sched_yield();
}

/* The next task of this part that nobody has taken. */
static int64_t take(Team *team) {
    return atomic_fetch_add_explicit(team->counters + 1 + team->part, 1, memory_order_relaxed);
}

/* Sums of a block's rows for ``tokens`` tokens, of ``halves`` of them from the half ``first``; weights of eight bits, or
 * widened ones beside them. */
static inline __attribute__((always_inline)) void add_up(const int8_t *lines, const Operand *operands,
                                                         const Number *input, int64_t inputs, int tokens, int first,
                                                         int halves, Floats (*sums)[2]) {
    Floats total[TOKENS][2];
    int last = first + halves - 1;
    for (int t = 0; t < tokens; t++) total[t][0] = total[t][1] = zeros();
    for (int64_t group = 0; group < inputs / GROUP; group++, lines += GROUP_LINES * LINE) {
        Floats part[TOKENS][2];
        for (int t = 0; t < tokens; t++) part[t][0] = part[t][1] = zeros();
        if (!operands) _mm_prefetch((const char *)lines + AHEAD * LINE, _MM_HINT_T0);
        for (int64_t pair = 0; pair < GROUP / 2; pair++) {
            const int8_t *line = lines + (1 + pair) * LINE;
            const Operand *wide = operands + group * GROUP + 2 * pair;
            if (!operands) _mm_prefetch((const char *)line + AHEAD * LINE, _MM_HINT_T0);
#pragma GCC unroll 2
            for (int i = 0; i < 2; i += PER_LANE) {
                Operand low = operands ? wide[first] : operand_of_weights(line + first * LINE / 2 + i * LANES);
                Operand high = operands ? wide[last] : operand_of_weights(line + last * LINE / 2 + i * LANES);
                for (int t = 0; t < tokens; t++) {
                    Operand numbers = operand(input + t * inputs + group * GROUP + 2 * pair + i);
                    part[t][0] = add_products(part[t][0], numbers, low);
                    if (halves == 2) part[t][1] = add_products(part[t][1], numbers, high);
                }
            }
        }
        Floats low = widened((const uint16_t *)(lines + first * LINE / 2));
        Floats high = widened((const uint16_t *)(lines + last * LINE / 2));
        for (int t = 0; t < tokens; t++) {
            total[t][0] = add_product(part[t][0], low, total[t][0]);
            if (halves == 2) total[t][1] = add_product(part[t][1], high, total[t][1]);
        }
    }
    for (int t = 0; t < tokens; t++) {
        sums[t][first] = total[t][0];
        if (halves == 2) sums[t][last] = total[t][1];
    }
}

#ifndef __AVX512BF16__
/* The same, to the last bit, of one half and of widened weights, those of a half behind one another. */
static inline __attribute__((always_inline)) void add_up_widened(const int8_t *lines, const Operand *operands,
                                                                 const Number *input, int64_t inputs, int tokens,
                                                                 int half, Floats (*sums)[2]) {
    Floats total[TOKENS];
    for (int t = 0; t < tokens; t++) total[t] = zeros();
    for (int64_t group = 0; group < inputs / GROUP; group++, lines += GROUP_LINES * LINE) {
        Floats part[TOKENS];
        for (int t = 0; t < tokens; t++) part[t] = zeros();
#pragma GCC unroll 4
        for (int64_t i = group * GROUP; i < (group + 1) * GROUP; i++)
            for (int t = 0; t < tokens; t++)
                part[t] = add_products(part[t], operand(input + t * inputs + i), operands[half * inputs + i]);
        Floats scales = widened((const uint16_t *)(lines + half * LINE / 2));
        for (int t = 0; t < tokens; t++) total[t] = add_product(part[t], scales, total[t]);
    }
    for (int t = 0; t < tokens; t++) sums[t][half] = total[t];
}
#endif

static inline void sum(const int8_t *lines, const Operand *wide, const Number *input, int64_t inputs, int tokens,
                       Floats (*sums)[2]) {
    switch (tokens) { /* a number that the compiler knows keeps the sums in registers */
#ifdef __AVX512BF16__
#define CASE(N) case N: add_up(lines, wide, input, inputs, N, 0, 2, sums); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#else
#define CASE(N) \
    case N: \
        for (int half = 0; wide && half < 2; half++) add_up_widened(lines, wide, input, inputs, N, half, sums); \
        if (!wide && 2 * N <= TOKENS) add_up(lines, NULL, input, inputs, N, 0, 2, sums); \
        for (int half = 0; !wide && 2 * N > TOKENS && half < 2; half++) \
            add_up(lines, NULL, input, inputs, N, half, 1, sums); \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#endif
#undef CASE
    }
}

/* Blocks of ``product`` until none is left. ``input`` [tokens, inputs]; ``out`` [tokens, stride], Number if GATED. */
static void multiply(Team *team, const Product *product, const Number *input, int64_t tokens, enum Ending ending,
                     const float *bias, void *out, int64_t stride, Operand *wide) {
    int64_t inputs = product->inputs;
    for (int64_t block; (block = take(team)) < product->blocks;) {
        const int8_t *lines = product->weights + block * inputs / GROUP * GROUP_LINES * LINE;
        if (tokens > TOKENS)
            for (int64_t half = 0; half < inputs; half++) { /* behind each group's scales */
                const int8_t *from = lines + (half / GROUP + 1) * LINE + half * LINE / 2;
                for (int64_t i = 0; i < 2; i += PER_LANE)
                    wide[PER_LANE == 2 ? half : half % 2 * inputs + half / 2 * 2 + i] =
                        operand_of_weights(from + i * LANES);
            }
        for (int64_t token = 0; token < tokens; token += TOKENS) {
            int64_t taken = tokens - token < TOKENS ? tokens - token : TOKENS;
            Floats sums[TOKENS][2];
            sum(lines, tokens > TOKENS ? wide : NULL, input + token * inputs, inputs, (int)taken, sums);
            for (int64_t t = 0; t < taken; t++) {
                if (ending == GATED) {
                    store_numbers((Number *)out + (token + t) * stride + block * LANES, gated(sums[t][0], sums[t][1]));
                    continue;
                }
                for (int64_t half = 0; half < 2; half++) {
                    float *to = (float *)out + (token + t) * stride + block * BLOCK + half * LANES;
                    Floats sum = sums[t][half];
                    if (ending == ADD) sum = add(sum, load(to));
                    if (bias) sum = add(sum, load(bias + block * BLOCK + half * LANES));
                    store(to, sum);
                }
            }
        }
    }
}

static void normalise(const float *hidden, const float *weight, int64_t width, float epsilon, Number *out) {
    Floats factor = everywhere(root(hidden, width, epsilon));
    for (int64_t i = 0; i < width; i += LANES) store_numbers(out + i, normalised(hidden + i, factor, weight + i));
}

/* Rotate a segment's queries of a KV head, and put its keys and values behind those that are there. */
static void place(const Decoder *decoder, const Layer *layer, const Segment *segment, const Buffers *buffers,
                  int64_t head, uint16_t *keys, uint16_t *values) {
    int64_t width = decoder->head_dim, group = decoder->heads / decoder->kv_heads;
    int64_t row = (decoder->heads + 2 * decoder->kv_heads) * width;
    float turned[WIDEST];
    for (int64_t t = 0; t < segment->tokens; t++) {
        int64_t token = segment->start + t;
        const float *from = buffers->projected + token * row, *phases = buffers->phases + token * width;
        for (int64_t q = head * group; q < (head + 1) * group; q++)
            rotate(from + q * width, layer->query_norm, phases, width, decoder->epsilon,
                   buffers->query + (token * decoder->heads + q) * width);
        rotate(from + (decoder->heads + head) * width, layer->key_norm, phases, width, decoder->epsilon, turned);
        const float *value = from + (decoder->heads + decoder->kv_heads + head) * width;
        for (int64_t i = 0, to = (segment->before + t) * width; i < width; i += LANES) {
            store_narrow(keys + to + i, load(turned + i));
            store_narrow(values + to + i, load(value + i));
        }
    }
}

/* Attention of rows of a KV head, rounded to where the output product reads it. */
static int64_t attend_narrow(const Decoder *decoder, const Segment *segment, const Buffers *buffers, int64_t head,
                             int64_t first, int64_t rows, const uint16_t *keys, const uint16_t *values) {
    int64_t width = decoder->head_dim, heads = decoder->heads, group = heads / decoder->kv_heads;
    int64_t offset = (segment->start * heads + head * group) * width;
    int64_t unsuited =
        attend_rows(buffers->query + offset, keys, values, first, rows, group, heads, width, segment->before,
                    decoder->scale, decoder->least, decoder->most, buffers->attended + offset);
    for (int64_t row = first; row < first + rows; row++)
        for (int64_t i = 0, from = offset + (row / group * heads + row % group) * width; i < width; i += LANES)
            store_numbers(buffers->narrow + from + i, load(buffers->attended + from + i));
    return unsuited;
}

static int64_t attend_all(Team *team, const Decoder *decoder, int64_t number, const Segment *segments, int64_t count,
                          const Buffers *buffers) {
    int64_t kv_heads = decoder->kv_heads, group = decoder->heads / kv_heads, unsuited = 0, passes = 1;
    for (int64_t s = 0; s < count; s++) /* all of a head's keys must be placed before a part of its rows attends */
        if (segments[s].tokens * group > rows_at_once(segments[s].tokens * group, kv_heads, team->threads)) passes = 2;
    for (int64_t pass = 0; pass < passes; pass++) {
        int64_t task = take(team), passed = 0;
        for (const Segment *segment = segments; segment < segments + count; segment++) {
            int64_t rows = segment->tokens * group, batch = rows_at_once(rows, kv_heads, team->threads);
            int64_t batches = (rows + batch - 1) / batch, tasks = pass ? (batches > 1) * kv_heads * batches : kv_heads;
            for (; task < passed + tasks; task = take(team)) {
                int64_t head = (task - passed) % kv_heads, plane = head * segment->plane;
                int64_t first = (batches - 1 - (task - passed) / kv_heads) * batch * pass; /* the longest first */
                uint16_t *keys = segment->keys + number * kv_heads * segment->plane + plane;
                uint16_t *values = segment->values + number * kv_heads * segment->plane + plane;
                if (!pass) place(decoder, decoder->layer + number, segment, buffers, head, keys, values);
                if (pass || batches == 1)
                    unsuited += attend_narrow(decoder, segment, buffers, head, first,
                                              rows - first < batch ? rows - first : batch, keys, values);
            }
            passed += tasks;
        }
        meet(team);
    }
    return unsuited;
}

static int64_t compute(Team *team, int64_t thread, const Decoder *decoder, const Segment *segments, int64_t count,
                       int64_t tokens, const Buffers *buffers) {
    int64_t width = decoder->width, attended = decoder->heads * decoder->head_dim, unsuited = 0;
    int64_t most_inputs = decoder->inner > width ? decoder->inner : width;
    if (attended > most_inputs) most_inputs = attended;
    Number *normed = buffers->normed + thread * tokens * width;
    Operand *wide = buffers->widened + thread * 2 * most_inputs / PER_LANE;
    for (int64_t number = 0; number < decoder->layers; number++) {
        const Layer *layer = decoder->layer + number;
        for (int64_t t = 0; t < tokens; t++)
            normalise(buffers->hidden + t * width, layer->attention_norm, width, decoder->epsilon, normed + t * width);
        multiply(team, &layer->attention, normed, tokens, STORE, layer->bias, buffers->projected,
                 attended + 2 * decoder->kv_heads * decoder->head_dim, wide);
        meet(team);
        unsuited += attend_all(team, decoder, number, segments, count, buffers);
        multiply(team, &layer->output, buffers->narrow, tokens, ADD, NULL, buffers->hidden, width, wide);
        meet(team);
        for (int64_t t = 0; t < tokens; t++)
            normalise(buffers->hidden + t * width, layer->mlp_norm, width, decoder->epsilon, normed + t * width);
        multiply(team, &layer->gate_up, normed, tokens, GATED, NULL, buffers->narrow, decoder->inner, wide);
        meet(team);
        multiply(team, &layer->down, buffers->narrow, tokens, ADD, NULL, buffers->hidden, width, wide);
        meet(team);
        if (buffers->trace && !thread)
            memcpy(buffers->trace + number * tokens * width, buffers->hidden, tokens * width * sizeof(float));
    }
    for (int64_t s = 0; s < count; s++)
        normalise(buffers->hidden + (segments[s].start + segments[s].tokens - 1) * width, decoder->norm, width,
                  decoder->epsilon, normed + s * width);
    multiply(team, &decoder->head, normed, count, STORE, NULL, buffers->logits, decoder->head.blocks * BLOCK, wide);
    return unsuited;
}

int64_t step(const Decoder *decoder, const Segment *segments, int64_t count, int64_t tokens, const Buffers *buffers,
             int64_t threads) {
    int64_t unsuited = 0;
#pragma omp parallel reduction(+ : unsuited) num_threads(threads)
    {
        Team team = {(_Atomic int64_t *)buffers->counters, omp_get_num_threads(), 0, 0};
        unsuited += compute(&team, omp_get_thread_num(), decoder, segments, count, tokens, buffers);
    }
    return unsuited;
}
