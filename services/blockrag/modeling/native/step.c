/* A whole step of a Llama-like decoder for a few tokens: one call, one team of threads, weights of eight bits.
 *
 * What is computed is said where Python calls it (step.py). A product's weights lie as they are read: 32 rows are a
 * block, and a block holds, for each group of 32 inputs, a cache line of the rows' scales in bfloat16, and then one for
 * each pair of neighbouring inputs: the first input's weights of rows 0 to 15, the second's, and both of rows 16 to 31.
 * Whole numbers to 127 are exact in bfloat16, so a line becomes the operand of vdpbf16ps without rounding; the scales
 * are applied to the group's sum. Of gate and up, 16 rows each make a block. Hidden states stay float32 from layer to
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
    TOKENS = 8,        /* whose sums stand in registers */
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

static inline __m512i pairs_of(const int8_t *line) {
    __m512i first = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128((const __m128i *)line))));
    __m512i second =
        _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128((const __m128i *)line + 1))));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(first, 16), second);
}

static inline __m512 scales_of(const int8_t *line) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i *)line));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* Sums of a block's rows for ``tokens`` tokens; weights of eight bits, or widened ones beside them. */
static inline __attribute__((always_inline)) void add_up(const int8_t *lines, const __m512i *widened,
                                                         const uint16_t *input, int64_t inputs, int tokens,
                                                         __m512 (*sums)[2]) {
    __m512 total[TOKENS][2];
    for (int t = 0; t < tokens; t++) total[t][0] = total[t][1] = _mm512_setzero_ps();
    for (int64_t group = 0; group < inputs / GROUP; group++, lines += GROUP_LINES * LINE) {
        __m512 part[TOKENS][2];
        for (int t = 0; t < tokens; t++) part[t][0] = part[t][1] = _mm512_setzero_ps();
        if (!widened) _mm_prefetch((const char *)lines + AHEAD * LINE, _MM_HINT_T0);
        for (int64_t pair = 0; pair < GROUP / 2; pair++) {
            const int8_t *line = lines + (1 + pair) * LINE;
            const __m512i *wide = widened + group * GROUP + 2 * pair;
            if (!widened) _mm_prefetch((const char *)line + AHEAD * LINE, _MM_HINT_T0);
            __m512bh low = (__m512bh)(widened ? wide[0] : pairs_of(line));
            __m512bh high = (__m512bh)(widened ? wide[1] : pairs_of(line + LINE / 2));
            for (int t = 0; t < tokens; t++) {
                int32_t numbers;
                memcpy(&numbers, input + t * inputs + group * GROUP + 2 * pair, sizeof numbers);
                __m512bh both = (__m512bh)_mm512_set1_epi32(numbers);
                part[t][0] = _mm512_dpbf16_ps(part[t][0], both, low);
                part[t][1] = _mm512_dpbf16_ps(part[t][1], both, high);
            }
        }
        __m512 low = scales_of(lines), high = scales_of(lines + LINE / 2);
        for (int t = 0; t < tokens; t++) {
            total[t][0] = _mm512_fmadd_ps(part[t][0], low, total[t][0]);
            total[t][1] = _mm512_fmadd_ps(part[t][1], high, total[t][1]);
        }
    }
    for (int t = 0; t < tokens; t++) sums[t][0] = total[t][0], sums[t][1] = total[t][1];
}

static inline void sum(const int8_t *lines, const __m512i *widened, const uint16_t *input, int64_t inputs, int tokens,
                       __m512 (*sums)[2]) {
    switch (tokens) { /* a number that the compiler knows keeps the sums in registers */
#define CASE(N) case N: add_up(lines, widened, input, inputs, N, sums); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
}

/* Blocks of ``product`` until none is left. ``input`` [tokens, inputs]; ``out`` [tokens, stride], bfloat16 if GATED. */
static void multiply(Team *team, const Product *product, const uint16_t *input, int64_t tokens, enum Ending ending,
                     const float *bias, void *out, int64_t stride, __m512i *wide) {
    int64_t inputs = product->inputs;
    for (int64_t block; (block = take(team)) < product->blocks;) {
        const int8_t *lines = product->weights + block * inputs / GROUP * GROUP_LINES * LINE;
        if (tokens > TOKENS)
            for (int64_t half = 0; half < inputs; half++) /* behind each group's scales */
                wide[half] = pairs_of(lines + (half / GROUP + 1) * LINE + half * LINE / 2);
        for (int64_t token = 0; token < tokens; token += TOKENS) {
            int64_t taken = tokens - token < TOKENS ? tokens - token : TOKENS;
            __m512 sums[TOKENS][2];
            sum(lines, tokens > TOKENS ? wide : NULL, input + token * inputs, inputs, (int)taken, sums);
            for (int64_t t = 0; t < taken; t++) {
                if (ending == GATED) {
                    store_narrow((uint16_t *)out + (token + t) * stride + block * LANES, gated(sums[t][0], sums[t][1]));
                    continue;
                }
                for (int64_t half = 0; half < 2; half++) {
                    float *to = (float *)out + (token + t) * stride + block * BLOCK + half * LANES;
                    __m512 sum = sums[t][half];
                    if (ending == ADD) sum = _mm512_add_ps(sum, _mm512_loadu_ps(to));
                    if (bias) sum = _mm512_add_ps(sum, _mm512_loadu_ps(bias + block * BLOCK + half * LANES));
                    _mm512_storeu_ps(to, sum);
                }
            }
        }
    }
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
            store_narrow(keys + to + i, _mm512_loadu_ps(turned + i));
            store_narrow(values + to + i, _mm512_loadu_ps(value + i));
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
            store_narrow(buffers->narrow + from + i, _mm512_loadu_ps(buffers->attended + from + i));
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
    uint16_t *normed = buffers->normed + thread * tokens * width;
    __m512i *wide = (__m512i *)buffers->widened + thread * most_inputs;
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
