/* The forward pass of a chunk policy for one prompt, in float32 with AVX-512: one call for what are about sixty
 * operations of torch, each with memory of its own that is cold between requests.
 *
 * What it computes is written in torch in ``blockrag.modeling.refrag.policy``; how the weights are laid out, in
 * ``policy_kernel`` beside it. Every product is of ROWS rows with a panel of PANEL columns, whose sums stand in
 * registers: a linear layer's weights are panels, and so are keys (transposed) and values. Rows are padded with zeros
 * to whole blocks of ROWS, keys to whole panels, whose weight in the attention is zero.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum {
    LANES = 16, /* float32 in a register */
    ROWS = 8,
    PANEL = 2 * LANES,
};

typedef struct {
    int64_t encoder_width; /* a multiple of LANES */
    int64_t features;      /* how many of each chunk's the policy sees */
    int64_t width;         /* a multiple of PANEL, as are a head's width and hidden */
    int64_t heads, hidden, layers, query;
    float epsilon; /* of the normalisations */
} Sizes;

typedef struct {
    __m512 sums[ROWS][2];
} Tile;

static inline int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

static inline Tile same_rows(const float *row) {
    Tile tile;
    for (int r = 0; r < ROWS; r++)
        for (int h = 0; h < 2; h++) tile.sums[r][h] = row ? _mm512_loadu_ps(row + h * LANES) : _mm512_setzero_ps();
    return tile;
}

/* Add the product of ROWS rows [depth], ``stride`` apart, with a panel [depth, PANEL]. */
static inline __attribute__((always_inline)) Tile add_product(Tile tile, const float *rows, int64_t stride,
                                                              const float *panel, int64_t depth) {
    for (int64_t i = 0; i < depth; i++) {
        __m512 left = _mm512_loadu_ps(panel + i * PANEL), right = _mm512_loadu_ps(panel + i * PANEL + LANES);
        for (int r = 0; r < ROWS; r++) {
            __m512 number = _mm512_set1_ps(rows[r * stride + i]);
            tile.sums[r][0] = _mm512_fmadd_ps(number, left, tile.sums[r][0]);
            tile.sums[r][1] = _mm512_fmadd_ps(number, right, tile.sums[r][1]);
        }
    }
    return tile;
}

static inline void store_tile(Tile tile, float *to, int64_t stride) {
    for (int r = 0; r < ROWS; r++)
        for (int h = 0; h < 2; h++) _mm512_storeu_ps(to + r * stride + h * LANES, tile.sums[r][h]);
}

static inline void add_tile(Tile tile, float *to, int64_t stride) {
    for (int r = 0; r < ROWS; r++)
        for (int h = 0; h < 2; h++) {
            float *place = to + r * stride + h * LANES;
            _mm512_storeu_ps(place, _mm512_add_ps(_mm512_loadu_ps(place), tile.sums[r][h]));
        }
}

/* A linear layer is its bias [columns], then its panels. */
static inline int64_t linear_size(int64_t depth, int64_t columns) { return columns * (1 + depth); }

static inline __attribute__((always_inline)) Tile linear(const float *layer, int64_t columns, int64_t column,
                                                         const float *rows, int64_t stride, int64_t depth) {
    return add_product(same_rows(layer + column), rows, stride, layer + columns + column * depth, depth);
}

/* Mean 0 and variance 1; ``to`` may be ``from``. The scale that is learned is part of the layer that follows. */
static inline void normalise(const float *from, int64_t width, float epsilon, float *to) {
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += LANES) sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + i));
    __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
    for (int64_t i = 0; i < width; i += LANES) {
        __m512 off = _mm512_sub_ps(_mm512_loadu_ps(from + i), mean);
        squares = _mm512_fmadd_ps(off, off, squares);
    }
    __m512 variance = _mm512_set1_ps(_mm512_reduce_add_ps(squares) / width + epsilon);
    __m512 scale = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(variance));
    for (int64_t i = 0; i < width; i += LANES)
        _mm512_storeu_ps(to + i, _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(from + i), mean), scale));
}

/* 2^x: x = whole + part, and the polynomial of part within 3e-7 of its power. */
static inline __m512 power_of_two(__m512 x) {
    static const float coefficients[] = {1.32764666e-3f, 9.67554096e-3f, 5.55071346e-2f,
                                         0.240221202f,  0.693146944f,  1.0f};
    __m512 whole = _mm512_roundscale_ps(x, 0), part = _mm512_sub_ps(x, whole), y = _mm512_set1_ps(coefficients[0]);
    for (int i = 1; i < 6; i++) y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(coefficients[i]));
    return _mm512_scalef_ps(y, whole);
}

/* Scores [ROWS, padded] of ``count`` keys to powers of two of them, zeros beyond; their sums' inverses. */
static inline void weigh(float *scores, int64_t count, int64_t padded, float inverses[ROWS]) {
    for (int r = 0; r < ROWS; r++) {
        float *row = scores + r * padded;
        int64_t whole = count / LANES * LANES;
        __mmask16 rest = (1 << (count - whole)) - 1;
        __m512 least = _mm512_set1_ps(-__builtin_inff()), most = least, sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < whole; i += LANES) most = _mm512_max_ps(most, _mm512_loadu_ps(row + i));
        if (rest) most = _mm512_max_ps(most, _mm512_mask_loadu_ps(least, rest, row + whole));
        most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
        for (int64_t i = 0; i < padded; i += LANES) {
            __mmask16 here = i < whole ? 0xffff : i == whole ? rest : 0;
            __m512 weight = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(row + i), most));
            weight = _mm512_maskz_mov_ps(here, weight);
            sum = _mm512_add_ps(sum, weight);
            _mm512_storeu_ps(row + i, weight);
        }
        inverses[r] = 1.0f / _mm512_reduce_add_ps(sum);
    }
}

static inline void scale_rows(Tile *tile, const float factors[ROWS]) {
    for (int r = 0; r < ROWS; r++)
        for (int h = 0; h < 2; h++) tile->sums[r][h] = _mm512_mul_ps(tile->sums[r][h], _mm512_set1_ps(factors[r]));
}

static inline int64_t widest(const Sizes *sizes) {
    int64_t most = sizes->encoder_width > sizes->hidden ? sizes->encoder_width : sizes->hidden;
    return most > sizes->width ? most : sizes->width;
}

/* Floats that ``rate_chunks`` needs to work in, for so many chunks and chunks of the question together. */
int64_t rate_chunks_room(const Sizes *sizes, int64_t tokens) {
    int64_t keys_padded = round_up(tokens, PANEL);
    return keys_padded * (4 * sizes->width + ROWS) + sizes->width + 2 * ROWS * widest(sizes);
}

/* Walks over the embeddings of several passages. */
typedef struct {
    const float *const *parts;
    const int64_t *counts; /* rows of each part */
    int64_t row;           /* of the present part */
} Walk;

static inline const float *next_row(Walk *walk, int64_t width) {
    while (walk->row == *walk->counts) {
        walk->parts++, walk->counts++;
        walk->row = 0;
    }
    return *walk->parts + width * walk->row++;
}

/* own[ROWS, width] = embed(normalised rows), of which the next ``count`` are there. */
static void embed_rows(const Sizes *sizes, const float *embed, Walk *from, int64_t count, float *normed, float *own) {
    int64_t depth = sizes->encoder_width;
    for (int64_t r = 0; r < count; r++)
        normalise(next_row(from, depth), depth, sizes->epsilon, normed + r * depth);
    memset(normed + count * depth, 0, (ROWS - count) * depth * sizeof(float));
    for (int64_t column = 0; column < sizes->width; column += PANEL)
        store_tile(linear(embed, sizes->width, column, normed, depth, depth), own + column, sizes->width);
}

/* Queries [rows, width], keys [head, panel of keys, number, key of the panel], values [panel of numbers, key, number]
 * of ROWS rows from ``row``. */
static void project(const Sizes *sizes, const float *layer, const float *normed, int64_t row, int64_t keys_padded,
                    float *queries, float *keys, float *values) {
    int64_t width = sizes->width, head_width = width / sizes->heads;
    for (int64_t column = 0; column < 3 * width; column += PANEL) {
        Tile tile = linear(layer, 3 * width, column, normed, width, width);
        int64_t own = column % width; /* among the queries', the keys' or the values' columns */
        if (column < width) {
            store_tile(tile, queries + row * width + own, width);
        } else if (column >= 2 * width) {
            store_tile(tile, values + own * keys_padded + row * PANEL, PANEL);
        } else {
            float rows[ROWS * PANEL] __attribute__((aligned(64)));
            store_tile(tile, rows, PANEL);
            float *to = keys + own / head_width * head_width * keys_padded + row / PANEL * PANEL * head_width +
                        own % head_width * PANEL + row % PANEL;
            for (int64_t i = 0; i < PANEL; i++)
                for (int64_t r = 0; r < ROWS; r++) to[i * PANEL + r] = rows[r * PANEL + i];
        }
    }
}

/* found[ROWS, width]: softmax attention of ROWS rows to all ``count`` keys. */
static void attend_rows(const Sizes *sizes, const float *queries, const float *keys, const float *values,
                        int64_t count, int64_t keys_padded, float *scores, float *found) {
    int64_t width = sizes->width, head_width = width / sizes->heads;
    for (int64_t head = 0; head < sizes->heads; head++) {
        int64_t first = head * head_width;
        float inverses[ROWS];
        for (int64_t key = 0; key < keys_padded; key += PANEL)
            store_tile(add_product(same_rows(0), queries + first, width,
                                   keys + first * keys_padded + key * head_width, head_width),
                       scores + key, keys_padded);
        weigh(scores, count, keys_padded, inverses);
        for (int64_t column = first; column < first + head_width; column += PANEL) {
            Tile tile = add_product(same_rows(0), scores, keys_padded, values + column * keys_padded, count);
            scale_rows(&tile, inverses);
            store_tile(tile, found + column, width);
        }
    }
}

/* What follows attention in a layer, for ROWS rows: both are added to ``rows`` [ROWS, width]. */
static void update_rows(const Sizes *sizes, const float *attended, const float *up, const float *down,
                        const float *found, float *rows, float *normed, float *hidden) {
    int64_t width = sizes->width;
    for (int64_t column = 0; column < width; column += PANEL)
        add_tile(linear(attended, width, column, found, width, width), rows + column, width);
    for (int64_t r = 0; r < ROWS; r++) normalise(rows + r * width, width, sizes->epsilon, normed + r * width);
    for (int64_t column = 0; column < sizes->hidden; column += PANEL) {
        Tile tile = linear(up, sizes->hidden, column, normed, width, width);
        for (int r = 0; r < ROWS; r++)
            for (int h = 0; h < 2; h++) tile.sums[r][h] = _mm512_max_ps(tile.sums[r][h], _mm512_setzero_ps());
        store_tile(tile, hidden + column, sizes->hidden);
    }
    for (int64_t column = 0; column < width; column += PANEL)
        add_tile(linear(down, width, column, hidden, sizes->hidden, sizes->hidden), rows + column, width);
}

/* The rows that the layers work on: the chunks' behind the question's mean [width] and before its own. */
static void make_rows(const Sizes *sizes, const float *embed, const float *place, const float *product, Walk passages,
                      int64_t chunks, Walk question, int64_t asked, const float *features, int64_t feature_stride,
                      float *first, float *second, float *mean, float *rows) {
    int64_t width = sizes->width;
    float own[ROWS * width], seen[ROWS * sizes->features];
    memset(mean, 0, width * sizeof(float));
    for (int64_t row = 0; row < asked; row += ROWS) {
        const float *mark = product + linear_size(width, width);
        int64_t count = asked - row < ROWS ? asked - row : ROWS;
        embed_rows(sizes, embed, &question, count, first, own);
        for (int64_t r = 0; r < count; r++)
            for (int64_t i = 0; i < width; i++) {
                mean[i] += own[r * width + i] / asked;
                rows[(chunks + row + r) * width + i] = own[r * width + i] + mark[i];
            }
    }
    memset(seen, 0, sizeof seen);
    for (int64_t row = 0; row < chunks; row += ROWS) {
        int64_t count = chunks - row < ROWS ? chunks - row : ROWS;
        embed_rows(sizes, embed, &passages, count, first, own);
        for (int64_t r = 0; r < count; r++)
            memcpy(seen + r * sizes->features, features + (row + r) * feature_stride, sizes->features * sizeof(float));
        for (int64_t i = 0; sizes->query && i < ROWS * width; i++) second[i] = own[i] * mean[i % width];
        for (int64_t column = 0; column < width; column += PANEL) {
            add_tile(linear(place, width, column, seen, sizes->features, sizes->features), own + column, width);
            if (sizes->query) add_tile(linear(product, width, column, second, width, width), own + column, width);
        }
        memcpy(rows + row * width, own, count * width * sizeof(float)); /* the question's rows follow */
    }
}

static inline float dot(const float *left, const float *right, int64_t count) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += LANES) {
        __mmask16 here = count - i < LANES ? (1 << (count - i)) - 1 : 0xffff;
        sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(here, left + i), _mm512_maskz_loadu_ps(here, right + i), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

/* A logit for each chunk of the passages, whose embeddings are ``counts[i]`` rows each; ``asked``: rows of the
 * question's; ``features``: rows of the chunks', ``feature_stride`` apart; ``room``: of the size above. */
void rate_chunks(const Sizes *sizes, const float *weights, const float *const *embeddings, const int64_t *counts,
                 int64_t chunks, const float *question, int64_t asked, const float *features, int64_t feature_stride,
                 float *room, float *logits) {
    int64_t width = sizes->width, tokens = chunks + asked, keys_padded = round_up(tokens, PANEL);
    const float *embed = weights, *place = embed + linear_size(sizes->encoder_width, width);
    const float *product = place + linear_size(sizes->features, width);
    const float *layer = product + (sizes->query ? linear_size(width, width) + width : 0);
    float *rows = room, *queries = rows + keys_padded * width, *keys = queries + keys_padded * width;
    float *values = keys + keys_padded * width, *scores = values + keys_padded * width;
    float *mean = scores + ROWS * keys_padded, *first = mean + width, *second = first + ROWS * widest(sizes);

    memset(rows + tokens * width, 0, (round_up(tokens, ROWS) - tokens) * width * sizeof(float));
    Walk passages = {embeddings, counts, 0}, whole_question = {&question, &asked, 0};
    make_rows(sizes, embed, place, product, passages, chunks, whole_question, asked, features, feature_stride, first,
              second, mean, rows);
    for (int64_t number = 0; number < sizes->layers; number++) {
        const float *attended = layer + linear_size(width, 3 * width), *up = attended + linear_size(width, width);
        const float *down = up + linear_size(width, sizes->hidden);
        for (int64_t row = 0; row < tokens; row += ROWS) {
            for (int64_t r = 0; r < ROWS; r++)
                normalise(rows + (row + r) * width, width, sizes->epsilon, first + r * width);
            project(sizes, layer, first, row, keys_padded, queries, keys, values);
        }
        int64_t needed = number + 1 < sizes->layers ? tokens : chunks;
        for (int64_t row = 0; row < needed; row += ROWS) {
            attend_rows(sizes, queries + row * width, keys, values, tokens, keys_padded, scores, first);
            update_rows(sizes, attended, up, down, first, rows + row * width, second, first);
        }
        layer = down + linear_size(sizes->hidden, width);
    }
    const float *score = layer, *direct = score + width, *bias = direct + sizes->features;
    for (int64_t row = 0; row < chunks; row++) {
        normalise(rows + row * width, width, sizes->epsilon, first);
        logits[row] = *bias + dot(first, score, width) +
                      dot(features + row * feature_stride, direct, sizes->features);
    }
}
