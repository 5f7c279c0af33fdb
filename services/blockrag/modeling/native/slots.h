/* What the C files share. What each function must compute is said where Python calls it (kernels.py, step.py). */
#pragma once

#include <immintrin.h>
#include <stdint.h>

enum {
    LANES = 16,  /* float32 in a register */
    CHUNK = 32,  /* bfloat16 in a register; widths are multiples of it */
    ROWS = 8,    /* rows of attention whose sums stand in registers */
    WIDEST = 256, /* head dimension */
    BATCH = 128, /* most rows of attention that share a repacked tile */
};

static inline void store_narrow(void *to, __m512 numbers) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(numbers));
}

/* 2^x: x = whole + part, and the polynomial of part within 3e-6 of its power. */
static inline __m512 power_of_two(__m512 x) {
    static const float coefficients[] = {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
    __m512 whole = _mm512_roundscale_ps(x, 0), part = _mm512_sub_ps(x, whole), y = _mm512_set1_ps(1.3333558e-3f);
    for (int i = 0; i < 5; i++) y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(coefficients[i]));
    return _mm512_scalef_ps(y, whole);
}

/* Attention of rows first ... first + rows - 1 of one KV head, at most BATCH, where row r is token r / group and query
 * head r % group of it; ``before`` slots stand before the first token. How many sums of weights were unsuited. */
int64_t attend_rows(const float *query, const uint16_t *keys, const uint16_t *values, int64_t first, int64_t rows,
                    int64_t group, int64_t heads, int64_t width, int64_t before, float scale, float least, float most,
                    float *out);

/* How many of a KV head's rows make a task. */
int64_t rows_at_once(int64_t rows, int64_t kv_heads, int64_t threads);
