/* What the C files share. What each function must compute is said where Python calls it (kernels.py, step.py). */
#pragma once

#include "lanes.h"

enum { WIDEST = 256 }; /* head dimension */

/* Attention of rows first ... first + rows - 1 of one KV head, at most BATCH, where row r is token r / group and query
 * head r % group of it; ``before`` slots stand before the first token. How many sums of weights were unsuited. */
int64_t attend_rows(const float *query, const uint16_t *keys, const uint16_t *values, int64_t first, int64_t rows,
                    int64_t group, int64_t heads, int64_t width, int64_t before, float scale, float least, float most,
                    float *out);

/* How many of a KV head's rows make a task. */
int64_t rows_at_once(int64_t rows, int64_t kv_heads, int64_t threads);
