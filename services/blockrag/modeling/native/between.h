/* What a pass over many tokens does between its products: pass.py makes the same structure. */
#pragma once

#include <stdint.h>

typedef struct {
    const uint16_t *keys, *values; /* of a layer, rotated: [kv_heads, plane] each */
    int64_t plane, total, start, tokens; /* numbers of a KV head's slots; slots in use, with the tokens; where they are */
} Attended;

/* Add ``added`` to ``hidden`` [tokens, width] if there is any, and normalise the sums into ``out``. */
void add_and_normalise(float *hidden, const uint16_t *added, const float *weight, int64_t tokens, int64_t width,
                       float epsilon, uint16_t *out, int64_t threads);

/* ``projected`` [tokens, heads + 2 kv_heads, width]: queries, rotated, to ``query`` [tokens, heads, width], keys to
 * ``keys`` and rotated to ``turned``, values to ``values``, each [kv_heads, tokens, width], keys in pair order. */
void split_and_rotate(const uint16_t *projected, const float *query_norm, const float *key_norm, const float *phases,
                      int64_t tokens, int64_t heads, int64_t kv_heads, int64_t width, float epsilon, float *query,
                      uint16_t *keys, uint16_t *turned, uint16_t *values, int64_t threads);

/* Attention of every segment's tokens, to ``out`` [tokens, heads, width]; ``attended`` is as large, in float32.
 * How many sums of weights were unsuited. */
int64_t attend_segments(const float *query, const Attended *segments, int64_t count, int64_t heads, int64_t kv_heads,
                        int64_t width, float scale, float least, float most, int64_t threads, float *attended,
                        uint16_t *out);

/* up * silu(gate) of rows [gate, up] of ``inner`` numbers each. */
void gate(const uint16_t *rows, int64_t tokens, int64_t inner, uint16_t *out, int64_t threads);
