/* What is done with a row of numbers between two products. */
#pragma once

#include "slots.h"

static inline Floats gated(Floats gate, Floats up) { /* up * gate * sigmoid(gate) */
    Floats one = everywhere(1), power = power_of_two(times(gate, everywhere(-1.44269504f)));
    return times(up, divide(gate, add(one, power)));
}

/* What RMSNorm multiplies with. */
static inline float root(const float *numbers, int64_t width, float epsilon) {
    Floats squares = zeros();
    for (int64_t i = 0; i < width; i += LANES) {
        Floats part = load(numbers + i);
        squares = add_product(part, part, squares);
    }
    return 1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(sum_of(squares) / width + epsilon)));
}

static inline Floats normalised(const float *hidden, Floats factor, const float *weight) {
    return times(times(load(hidden), factor), load(weight));
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
