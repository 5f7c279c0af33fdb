/* What a step is told: step.py makes the same structures. Sizes are in numbers unless said. */
#pragma once

#include "lanes.h"

enum {
    BLOCK = 32, /* rows of a product that are computed together */
    LINE = 64,  /* bytes of a pair of inputs of a block, and of a group's scales */
    GROUP = 32, /* inputs that share a row's scale */
    GROUP_LINES = 1 + GROUP / 2,
};

typedef struct {
    const int8_t *weights; /* [blocks, inputs / GROUP, GROUP_LINES, LINE], from a cache line's beginning */
    int64_t blocks, inputs;
} Product;

typedef struct {
    Product attention, output, gate_up, down;
    const float *attention_norm, *mlp_norm; /* [width] */
    const float *bias;                      /* of attention, as its rows; or none */
    const float *query_norm, *key_norm;     /* [head_dim]; or none */
} Layer;

typedef struct {
    int64_t layers, width, heads, kv_heads, head_dim, inner;
    float epsilon, scale, least, most;
    const Layer *layer;
    const float *norm; /* [width] */
    Product head;
} Decoder;

typedef struct {
    uint16_t *keys, *values;      /* of layer 0, [kv_heads, plane] each */
    int64_t plane, before, start, tokens; /* numbers of a KV head's slots; slots in use; where the tokens are */
} Segment;

typedef struct {
    float *hidden;      /* [tokens, width]: the tokens' embeddings */
    const float *phases; /* [tokens, head_dim] */
    float *projected;   /* [tokens, (heads + 2 kv_heads) head_dim] */
    float *query;       /* [tokens, heads, head_dim] */
    float *attended;    /* the same */
    Number *narrow;     /* [tokens, max(heads head_dim, inner)]: input of output and down */
    Number *normed;     /* [threads, tokens, width] */
    Operand *widened;   /* [threads, max inputs * BLOCK numbers] */
    int64_t *counters;  /* [2 + 6 layers], zeros */
    float *trace;       /* [layers, tokens, width]; or none */
    float *logits;      /* [segments, head.blocks * BLOCK] */
} Buffers;

/* How many of attention's sums of weights were unsuited; the logits are of no use if there are any. */
int64_t step(const Decoder *decoder, const Segment *segments, int64_t count, int64_t tokens, const Buffers *buffers,
             int64_t threads);
