/* Loads, stores and functions on vectors, for the format E at the present level. */
#include "types.h"

/* One element to float and back. bf16 rounds to nearest even, as torch does. */
INLINE float FN(get)(const E *p) {
#if DTYPE == 1
    uint32_t bits = (uint32_t)*p << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
#else
    return (float)*p;
#endif
}

INLINE void FN(put)(E *p, float value) {
#if DTYPE == 1
    uint32_t bits;
    memcpy(&bits, &value, 4);
    *p = value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#else
    *p = (E)value;
#endif
}

INLINE vec FN(load)(const E *p) {
#if DTYPE == 0
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
#elif DTYPE == 1
    hvec h;
    memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
#else
    halfvec h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, vec);
#endif
}

INLINE void FN(store)(E *p, vec v) {
#if DTYPE == 0
    memcpy(p, &v, sizeof v);
#elif DTYPE == 1
    uvec bits = (uvec)v;
    uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uvec nan = (uvec)(v != v);
    hvec h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), hvec);
    memcpy(p, &h, sizeof h);
#else
    halfvec h = __builtin_convertvector(v, halfvec);
    memcpy(p, &h, sizeof h);
#endif
}

/* The first n < WIDTH elements; the others are 0. */
INLINE vec FN(load_part)(const E *p, long n) {
    E full[WIDTH] = {0};
    memcpy(full, p, (size_t)n * sizeof(E));
    return FN(load)(full);
}

INLINE void FN(store_part)(E *p, vec v, long n) {
    E full[WIDTH];
    FN(store)(full, v);
    memcpy(p, full, (size_t)n * sizeof(E));
}

/* A value as it reads after a round trip through the storage format: stock rounds between its operations. */
INLINE vec FN(rounded)(vec v) {
#if DTYPE == 0
    return v;
#else
    E full[WIDTH];
    FN(store)(full, v);
    return FN(load)(full);
#endif
}

INLINE vec FN(splat)(float x) {
    return x - (vec){0};
}

/* The sum of the lanes, in one fixed order. */
INLINE float FN(sum)(vec v) {
    float lane[WIDTH];
    memcpy(lane, &v, sizeof v);
    for (int step = WIDTH / 2; step; step /= 2)
        for (int i = 0; i < step; i++) lane[i] += lane[i + step];
    return lane[0];
}

INLINE vec FN(max)(vec a, vec b) {
    ivec larger = a > b;
    return (vec)(((ivec)a & larger) | ((ivec)b & ~larger));
}

/* e^x for x clamped to [-87, 88], within 2 units in the last place: x = n ln 2 + r, a polynomial for e^r (Cephes), n into
 * the exponent. */
INLINE vec FN(exp)(vec x) {
    x = -FN(max)(-FN(max)(x, FN(splat)(-87.0f)), FN(splat)(-88.0f));
    vec n = x * 1.44269504f + 12582912.0f - 12582912.0f; /* adding 1.5 * 2^23 rounds to the nearest integer */
    vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
    vec p = FN(splat)(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return p * (vec)power;
}
