/* Between the products of a pass over many tokens. What each function must compute is said in between.h; it stands for
 * what transformers' modules do, which is the reference in the tests (pass.py). Rows are shared out among threads.
 */
#include "between.h"

#include "rows.h"
#include "slots.h"

void add_and_normalise(float *hidden, const uint16_t *added, const float *weight, int64_t tokens, int64_t width,
                       float epsilon, uint16_t *out, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t token = 0; token < tokens; token++) {
        float *row = hidden + token * width;
        if (added)
            for (int64_t i = 0; i < width; i += LANES)
                store(row + i, add(load(row + i), widened(added + token * width + i)));
        Floats factor = everywhere(root(row, width, epsilon));
        for (int64_t i = 0; i < width; i += LANES)
            store_narrow(out + token * width + i, normalised(row + i, factor, weight + i));
    }
}

static void widen(const uint16_t *from, int64_t numbers, float *to) {
    for (int64_t i = 0; i < numbers; i += LANES) store(to + i, widened(from + i));
}

static void narrow(const float *from, int64_t numbers, uint16_t *to) {
    for (int64_t i = 0; i < numbers; i += LANES) store_narrow(to + i, load(from + i));
}

/* A head from the model's order to pair order, normalised if ``weight`` is there. */
static void pair(const float *head, const float *weight, int64_t width, float epsilon, float *pairs) {
    float factor = weight ? root(head, width, epsilon) : 1;
    for (int64_t i = 0, half = width / 2; i < half; i++) {
        pairs[2 * i] = weight ? head[i] * factor * weight[i] : head[i];
        pairs[2 * i + 1] = weight ? head[i + half] * factor * weight[i + half] : head[i + half];
    }
}

void split_and_rotate(const uint16_t *projected, const float *query_norm, const float *key_norm, const float *phases,
                      int64_t tokens, int64_t heads, int64_t kv_heads, int64_t width, float epsilon, float *query,
                      uint16_t *keys, uint16_t *turned, uint16_t *values, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t token = 0; token < tokens; token++) {
        const uint16_t *from = projected + token * (heads + 2 * kv_heads) * width;
        const float *phase = phases + token * width;
        float head[WIDEST], pairs[WIDEST];
        for (int64_t h = 0; h < heads; h++, from += width) {
            widen(from, width, head);
            rotate(head, query_norm, phase, width, epsilon, query + (token * heads + h) * width);
        }
        for (int64_t h = 0; h < kv_heads; h++, from += width) {
            int64_t to = (h * tokens + token) * width;
            widen(from, width, head);
            pair(head, key_norm, width, epsilon, pairs);
            narrow(pairs, width, keys + to);
            for (int64_t i = 0; i < width; i += LANES) /* as a prompt rotates them: the rounded ones */
                store_narrow(turned + to + i, rotated(widened(keys + to + i), load(phase + i)));
        }
        for (int64_t h = 0; h < kv_heads; h++, from += width)
            for (int64_t i = 0; i < width; i += LANES)
                _mm256_storeu_si256((__m256i *)(values + (h * tokens + token) * width + i),
                                    _mm256_loadu_si256((const __m256i *)(from + i)));
    }
}

int64_t attend_segments(const float *query, const Attended *segments, int64_t count, int64_t heads, int64_t kv_heads,
                        int64_t width, float scale, float least, float most, int64_t threads, float *attended,
                        uint16_t *out) {
    int64_t group = heads / kv_heads, unsuited = 0, tasks = 0;
    for (int64_t s = 0; s < count; s++) tasks += kv_heads * ((segments[s].tokens * group + BATCH - 1) / BATCH);
#pragma omp parallel for schedule(dynamic) reduction(+ : unsuited) num_threads(threads)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t left = task;
        const Attended *segment = segments;
        for (;; segment++) {
            int64_t own = kv_heads * ((segment->tokens * group + BATCH - 1) / BATCH);
            if (left < own) break;
            left -= own;
        }
        int64_t rows = segment->tokens * group, batches = (rows + BATCH - 1) / BATCH;
        int64_t head = left % kv_heads, first = (batches - 1 - left / kv_heads) * BATCH; /* the longest first */
        int64_t taken = rows - first < BATCH ? rows - first : BATCH;
        int64_t offset = (segment->start * heads + head * group) * width;
        unsuited += attend_rows(query + offset, segment->keys + head * segment->plane,
                                segment->values + head * segment->plane, first, taken, group, heads, width,
                                segment->total - segment->tokens, scale, least, most, attended + offset);
        for (int64_t row = first; row < first + taken; row++) {
            int64_t from = offset + (row / group * heads + row % group) * width;
            narrow(attended + from, width, out + from);
        }
    }
    return unsuited;
}

void gate(const uint16_t *rows, int64_t tokens, int64_t inner, uint16_t *out, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t i = 0; i < inner; i += LANES) {
            const uint16_t *row = rows + 2 * token * inner + i;
            store_narrow(out + token * inner + i, gated(widened(row), widened(row + inner)));
        }
}
