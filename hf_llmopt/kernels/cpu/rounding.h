/* Activations as a product with a quantized weight takes them, for the format E at the present level. */
#include "linear.h"
#include "types.h"
#ifndef MOST
#define MOST 128 /* inputs that share a scale at most: sums of 255 * 127 * 128 are exact as floats too */
#endif

/* The sum of lanes that are whole numbers, whose order makes no difference, or NaN. */
INLINE float FN(whole_sum)(vec v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    return FN(sum)(v);
#endif
}

/* Inputs [k, k + count) of row m as they are laid out, as floats; count is at most MOST, and the rest up to whole vectors is 0. */
INLINE void FN(gather)(const linear *a, long m, long k, long count, vec *to) {
    const E *x = (const E *)a->x + m * a->inputs;
    if (!a->order) {
        for (long i = 0; i < count; i += WIDTH)
            to[i / WIDTH] = count - i < WIDTH ? FN(load_part)(x + k + i, count - i) : FN(load)(x + k + i);
        return;
    }
    float line[MOST] = {0};
    for (long i = 0; i < count; i++)
        if (a->order[k + i] >= 0) line[i] = FN(get)(x + a->order[k + i]);
    memcpy(to, line, sizeof(vec) * (size_t)((count + WIDTH - 1) / WIDTH));
}

/* v / step, to the bit: the remainder of a product with the reciprocal corrects it (Markstein 1990). */
INLINE vec FN(divided)(vec v, float step, float reciprocal) {
#ifdef __AVX512F__
    __m512 q = _mm512_mul_ps((__m512)v, _mm512_set1_ps(reciprocal));
    __m512 left = _mm512_fnmadd_ps(q, _mm512_set1_ps(step), (__m512)v);
    return (vec)_mm512_fmadd_ps(left, _mm512_set1_ps(reciprocal), q);
#else
    (void)reciprocal;
    return v / step;
#endif
}

/* x of a row and `share` inputs as integers: largest to 127, rounded to even. What is not finite makes the scale NaN. */
INLINE void FN(quantize)(const linear *a, long m, long run, int8_t *codes, float *step, float *codes_sum) {
    const long count = a->share;
    vec x[MOST / WIDTH], most = {0}, faults = {0}, sum = {0};
    FN(gather)(a, m, run * count, count, x);
    for (long i = 0; i < count; i += WIDTH) {
        vec v = x[i / WIDTH];
        most = FN(max)(most, FN(max)(v, -v));
        faults += v - v;
    }
    const float top = FN(top)(most), scale = (top > 1e-9f ? top : 1e-9f) / 127.0f;
    const float reciprocal = 1.0f / scale;
    for (long i = 0; i < count; i += WIDTH) {
        typedef int8_t bytes __attribute__((vector_size(WIDTH)));
        /* adding 1.5 * 2^23 rounds to the nearest integer */
        vec v = FN(divided)(x[i / WIDTH], scale, reciprocal) + 12582912.0f - 12582912.0f;
        bytes narrow = __builtin_convertvector(__builtin_convertvector(v, ivec), bytes);
        memcpy(codes + i, &narrow, sizeof narrow);
        sum += v;
    }
    *step = scale + FN(whole_sum)(faults), *codes_sum = FN(whole_sum)(sum);
}
