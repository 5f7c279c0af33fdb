/* Calls the functions of slots.c, step.c and between.c on buffers of exactly the sizes that they may touch, for the sanitizers to watch.
 *
 * Prints how many calls it made. With an argument the last call is told of one slot more than there is: that it is
 * found shows that overruns are.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../../services/blockrag/modeling/native/between.h"
#include "../../../services/blockrag/modeling/native/step.h"

void place_slots(int64_t, const void *const *, const int64_t *, const uint16_t *const *, const uint16_t *const *,
                 const int64_t *, int64_t, int64_t, const float *, int64_t, uint16_t *, int64_t);
int64_t attend(const float *, const uint16_t *, const uint16_t *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
               float, float, float, int64_t, float *);

static uint16_t *narrow(int64_t count) {
    uint16_t *made = malloc(count * sizeof *made);
    for (int64_t i = 0; i < count; i++) made[i] = 0x3c00 + i * 37 % 512 + (i % 2 << 15);
    return made;
}

static float *wide(int64_t count) {
    float *made = malloc(count * sizeof *made);
    for (int64_t i = 0; i < count; i++) made[i] = (i * 31 % 64 - 32) / 32.0f;
    return made;
}

static void attended(int64_t tokens, int64_t kv_heads, int64_t group, int64_t width, int64_t total, int64_t slots,
                     int64_t threads) {
    int64_t numbers = tokens * kv_heads * group * width;
    float *query = wide(numbers), *out = wide(numbers);
    uint16_t *keys = narrow(kv_heads * slots * width), *values = narrow(kv_heads * slots * width);
    int64_t unsuited = attend(query, keys, values, tokens, kv_heads * group, kv_heads, width, total, slots * width, 0.1f,
                              1e-20f, 1e20f, threads, out);
    for (int64_t i = 0; i < numbers; i++)
        if (unsuited || !isfinite(out[i])) abort();
    free(query), free(out), free(keys), free(values);
}

static void placed(int64_t blocks, int64_t key_planes, int64_t width, int64_t threads) {
    const void *sources[8];
    const uint16_t *key_scales[8], *value_scales[8];
    uint16_t *held[8], *held_keys[8], *held_values[8];
    int64_t source_planes[8], starts[9] = {0};
    for (int64_t i = 0; i < blocks; i++) {
        int64_t slots = 1 + i * 5 % 7, skipped = i % 2; /* every other one is a slice to its block's end */
        int64_t all = slots + skipped, eight = i % 3 == 2; /* numbers of eight bits fill half of as many of sixteen */
        held[i] = narrow(2 * key_planes * all * width / (1 + eight));
        held_keys[i] = narrow(2 * key_planes * width), held_values[i] = narrow(key_planes * all);
        sources[i] = (const char *)held[i] + skipped * width * (2 - eight);
        key_scales[i] = eight ? held_keys[i] : NULL, value_scales[i] = eight ? held_values[i] + skipped : NULL;
        source_planes[i] = (slots + skipped) * width;
        starts[i + 1] = starts[i] + slots;
    }
    int64_t whole = starts[blocks];
    uint16_t *out = narrow(2 * key_planes * whole * width);
    float *phases = wide(whole * width);
    place_slots(blocks, sources, source_planes, key_scales, value_scales, starts, key_planes, width, phases, threads, out,
                whole * width);
    for (int64_t i = 0; i < blocks; i++) free(held[i]), free(held_keys[i]), free(held_values[i]);
    free(out), free(phases);
}

static void *aligned(int64_t bytes) { /* to the byte at its end, as torch's own memory at its beginning */
    void *made;
    if (posix_memalign(&made, 64, bytes)) abort();
    memset(made, 0, bytes);
    return made;
}

static Product product(int64_t rows, int64_t inputs) {
    int64_t blocks = (rows + BLOCK - 1) / BLOCK;
    int64_t groups = blocks * inputs / GROUP, size = GROUP_LINES * LINE;
    int8_t *weights = aligned(groups * size);
    for (int64_t i = 0; i < groups * size; i++) weights[i] = i * 29 % 255 - 127;
    for (int64_t i = 0; i < groups; i++)
        for (int64_t row = 0; row < BLOCK; row++) /* about 1e-3 */
            ((uint16_t *)(weights + i * size))[row] = 0x3a00 + (i * 31 + row) % 128;
    return (Product){weights, blocks, inputs};
}

static void drop(Product product) { free((void *)product.weights); }

static void stepped(int64_t first, int64_t second, int64_t before, int64_t kv_heads, int64_t group, int64_t head_dim,
                    int64_t extra, int64_t threads, int64_t missing) {
    enum { LAYERS = 2, WIDTH = 64, INNER = 96 };
    int64_t heads = kv_heads * group, attended = heads * head_dim, rows = attended + 2 * kv_heads * head_dim;
    int64_t count = second ? 2 : 1, tokens = first + second, most = attended > WIDTH ? attended : WIDTH;
    Layer layers[LAYERS];
    for (int i = 0; i < LAYERS; i++)
        layers[i] = (Layer){product(rows, WIDTH), product(WIDTH, attended), product(2 * INNER, WIDTH),
                            product(WIDTH, INNER), wide(WIDTH), wide(WIDTH),
                            extra ? wide(rows) : NULL, extra ? wide(head_dim) : NULL, extra ? wide(head_dim) : NULL};
    Decoder decoder = {LAYERS, WIDTH, heads, kv_heads, head_dim, INNER, 1e-5f, 0.1f, 1e-20f, 1e20f,
                       layers, wide(WIDTH), product(70, WIDTH)};
    Segment segments[2];
    for (int64_t s = 0; s < count; s++) {
        int64_t own = s ? second : first, room = before + own + s - missing;
        segments[s] = (Segment){narrow(LAYERS * kv_heads * room * head_dim), narrow(LAYERS * kv_heads * room * head_dim),
                                room * head_dim, before, s * first, own};
    }
    Buffers buffers = {
        .hidden = wide(tokens * WIDTH),
        .phases = wide(tokens * head_dim),
        .projected = wide(tokens * rows),
        .query = wide(tokens * attended),
        .attended = wide(tokens * attended),
        .narrow = malloc(tokens * (attended > INNER ? attended : INNER) * sizeof(Number)),
        .normed = malloc(threads * tokens * WIDTH * sizeof(Number)),
        .widened = aligned(threads * most * BLOCK * sizeof(Number)),
        .counters = aligned((2 + 6 * LAYERS) * sizeof(int64_t)),
        .trace = extra ? wide(LAYERS * tokens * WIDTH) : NULL,
        .logits = wide(count * decoder.head.blocks * BLOCK),
    };
    int64_t unsuited = step(&decoder, segments, count, tokens, &buffers, threads);
    for (int64_t i = 0; i < count * decoder.head.blocks * BLOCK; i++)
        if (unsuited || !isfinite(buffers.logits[i])) abort();
    for (int64_t s = 0; s < count; s++) free(segments[s].keys), free(segments[s].values);
    for (int i = 0; i < LAYERS; i++) {
        drop(layers[i].attention), drop(layers[i].output), drop(layers[i].gate_up), drop(layers[i].down);
        free((void *)layers[i].attention_norm), free((void *)layers[i].mlp_norm), free((void *)layers[i].bias);
        free((void *)layers[i].query_norm), free((void *)layers[i].key_norm);
    }
    drop(decoder.head), free((void *)decoder.norm), free(buffers.hidden), free((void *)buffers.phases);
    free(buffers.projected), free(buffers.query), free(buffers.attended), free(buffers.narrow), free(buffers.normed);
    free(buffers.widened), free(buffers.counters), free(buffers.trace), free(buffers.logits);
}

static void between(int64_t first, int64_t second, int64_t earlier, int64_t kv_heads, int64_t group, int64_t head_dim,
                    int64_t extra, int64_t threads, int64_t missing) {
    enum { WIDTH = 80, INNER = 48 };
    int64_t heads = kv_heads * group, tokens = first + second, count = second ? 2 : 1, numbers = tokens * heads * head_dim;
    float *hidden = wide(tokens * WIDTH), *weight = wide(WIDTH), *query = wide(numbers), *attended = wide(numbers);
    float *phases = wide(tokens * head_dim), *norm = extra ? wide(head_dim) : NULL;
    uint16_t *added = extra ? narrow(tokens * WIDTH) : NULL, *normed = narrow(tokens * WIDTH), *out = narrow(numbers);
    uint16_t *projected = narrow(tokens * (heads + 2 * kv_heads) * head_dim), *kept[3];
    uint16_t *rows = narrow(tokens * 2 * INNER), *gated = narrow(tokens * INNER);
    for (int i = 0; i < 3; i++) kept[i] = narrow(kv_heads * tokens * head_dim);
    add_and_normalise(hidden, added, weight, tokens, WIDTH, 1e-5f, normed, threads);
    split_and_rotate(projected, norm, norm, phases, tokens, heads, kv_heads, head_dim, 1e-5f, query, kept[0], kept[1],
                     kept[2], threads);
    gate(rows, tokens, INNER, gated, threads);
    Attended segments[2];
    for (int64_t s = 0; s < count; s++) {
        int64_t own = s ? second : first, room = earlier + own + s - missing;
        segments[s] = (Attended){narrow(kv_heads * room * head_dim), narrow(kv_heads * room * head_dim),
                                 room * head_dim, earlier + own, s * first, own};
    }
    int64_t unsuited = attend_segments(query, segments, count, heads, kv_heads, head_dim, 0.01f, 1e-20f, 1e20f, threads,
                                       attended, out);
    for (int64_t i = 0; i < numbers; i++)
        if (unsuited || !isfinite(attended[i])) abort();
    for (int64_t s = 0; s < count; s++) free((void *)segments[s].keys), free((void *)segments[s].values);
    for (int i = 0; i < 3; i++) free(kept[i]);
    free(hidden), free(weight), free(query), free(attended), free(phases), free(norm), free(added), free(normed);
    free(out), free(projected), free(rows), free(gated);
}

int main(int count, char **arguments) {
    static const int64_t widths[] = {32, 64, 96, 128, 256}, tokens[] = {1, 2, 9, 40, 129}, before[] = {0, 1, 31, 63, 200};
    int64_t calls = 0;
    for (int w = 0; w < 5; w++)
        for (int64_t threads = 1; threads <= 2; threads++) {
            for (int64_t blocks = 1; blocks <= 8; blocks += 7, calls++) placed(blocks, 3, widths[w], threads);
            for (int t = 0; t < 5; t++)
                for (int b = 0; b < 5; b++, calls++) {
                    int64_t total = tokens[t] + before[b];
                    attended(tokens[t], 1 + b % 3, 1 + t % 4, widths[w], total, total + t % 2, threads);
                }
        }
    for (int64_t threads = 1; threads <= 3; threads++)
        for (int64_t first = 1; first <= 41; first += 8)
            for (int64_t extra = 0; extra < 2; extra++, calls++)
                stepped(first, extra * 3, 13 * extra, 1 + extra, 3, extra ? 32 : 64, extra, threads, 0);
    for (int w = 0; w < 5; w++)
        for (int64_t threads = 1; threads <= 2; threads++)
            for (int t = 0; t < 5; t++, calls++)
                between(tokens[t], w % 2 * 3, before[t], 1 + t % 3, 1 + w % 4, widths[w], t % 2, threads, 0);
    if (count > 1 && !strcmp(arguments[1], "between")) between(2, 0, 5, 1, 1, 32, 0, 1, 1);
    if (count > 1 && !strcmp(arguments[1], "step")) stepped(2, 0, 5, 1, 1, 32, 0, 1, 1);
    if (count > 1) attended(2, 1, 1, 32, 8, 7, 1);
    printf("%d calls\n", (int)calls);
    return 0;
}
