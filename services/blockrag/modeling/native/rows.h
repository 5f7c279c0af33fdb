/* What is done with a row of numbers between two products. */
#pragma once

#include "slots.h"

static inline __m512 widened(const uint16_t *from) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline __m512 rotated(__m512 pairs, __m512 phases) {
    __m512 crossed = _mm512_mul_ps(_mm512_permute_ps(pairs, 0xB1), _mm512_movehdup_ps(phases));
    return _mm512_fmaddsub_ps(pairs, _mm512_moveldup_ps(phases), crossed);
}

static inline __m512 gated(__m512 gate, __m512 up) { /* up * gate * sigmoid(gate) */
    __m512 one = _mm512_set1_ps(1), power = power_of_two(_mm512_mul_ps(gate, _mm512_set1_ps(-1.44269504f)));
    return _mm512_mul_ps(up, _mm512_div_ps(gate, _mm512_add_ps(one, power)));
}

/* What RMSNorm multiplies with. */
static inline float root(const float *numbers, int64_t width, float epsilon) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += LANES) {
        __m512 part = _mm512_loadu_ps(numbers + i);
        squares = _mm512_fmadd_ps(part, part, squares);
    }
    return 1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(_mm512_reduce_add_ps(squares) / width + epsilon)));
}

static inline void normalise(const float *hidden, const float *weight, int64_t width, float epsilon, uint16_t *out) {
    __m512 factor = _mm512_set1_ps(root(hidden, width, epsilon));
    for (int64_t i = 0; i < width; i += LANES)
        store_narrow(out + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(hidden + i), factor),
                                            _mm512_loadu_ps(weight + i)));
}

/* A head from the model's order, normalised if ``weight`` is there, to ``pairs`` in pair order, rotated. */
static inline void rotate(const float *head, const float *weight, const float *phases, int64_t width, float epsilon,
                   float *pairs) {
    float factor = weight ? root(head, width, epsilon) : 1;
    for (int64_t i = 0, half = width / 2; i < half; i++) {
        float real = head[i] * factor, imaginary = head[i + half] * factor;
        if (weight) real *= weight[i], imaginary *= weight[i + half];
        float cosine = phases[2 * i], sine = phases[2 * i + 1];
        pairs[2 * i] = real * cosine - imaginary * sine;
        pairs[2 * i + 1] = real * sine + imaginary * cosine;
    }
}
