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
#ifdef __AVX512F__ /* GCC would widen the halves one by one */
    return (vec)((uvec)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#else
    return (vec)(__builtin_convertvector(h, uvec) << 16);
#endif
#else
    halfvec h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, vec);
#endif
}

#if DTYPE == 1
/* The bits of v in the upper halves, rounded to nearest even; the lower ones are 0. */
INLINE uvec FN(bits)(vec v) {
    uvec bits = (uvec)v, nan = (uvec)(v != v);
    return ((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000 & ~nan) | (nan & 0x7fc00000);
}
#endif

INLINE void FN(store)(E *p, vec v) {
#if DTYPE == 0
    memcpy(p, &v, sizeof v);
#elif DTYPE == 1
    hvec h = __builtin_convertvector(FN(bits)(v) >> 16, hvec);
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
#elif DTYPE == 1
    return (vec)FN(bits)(v);
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

/* The second where one of the two is NaN. */
INLINE vec FN(max)(vec a, vec b) {
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    ivec larger = a > b;
    return (vec)(((ivec)a & larger) | ((ivec)b & ~larger));
#endif
}

/* e^x for x clamped to [-87, 88], within 2 units in the last place: x = n ln 2 + r, a polynomial for e^r (Cephes), n into
 * the exponent. */
INLINE vec FN(exp)(vec x) {
    x = -FN(max)(FN(splat)(-88.0f), -FN(max)(FN(splat)(-87.0f), x)); /* in this order NaN stays NaN */
    vec n = x * 1.44269504f + 12582912.0f - 12582912.0f; /* adding 1.5 * 2^23 rounds to the nearest integer */
    vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
    vec p = FN(splat)(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
#ifdef __AVX512F__
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return p * (vec)power;
#endif
}

#ifdef HAS_BF16_DOT
/* 2^x within 3 millionths, for what is rounded to bf16: scalef takes the whole part of x, a polynomial the rest (fitted here
 * for the least relative error on [0, 1]). */
INLINE vec FN(exp2_rough)(vec x) {
    vec r = (vec)_mm512_reduce_ps((__m512)x, 9); /* x - floor(x) */
    vec p = FN(splat)(1.353417e-2f);
    p = p * r + 5.201147e-2f;
    p = p * r + 2.4144275e-1f;
    p = p * r + 6.9300384e-1f;
    p = p * r + 1.0f;
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)x);
}
#endif

/* x / (1 + e^-x), a division being slower than the rest: Newton's steps for the reciprocal and for the remainder. */
INLINE vec FN(silu)(vec x) {
    vec d = FN(exp)(-x) + 1.0f;
#ifdef __AVX512F__
    vec r = (vec)_mm512_rcp14_ps((__m512)d);
    r += r * (1.0f - d * r);
    vec q = x * r, exact = q + r * (x - q * d);
    ivec finite = (q - q) == 0.0f;
    return (vec)(((ivec)exact & finite) | ((ivec)q & ~finite));
#else
    return x / d;
#endif
}

/* cap tanh(x / cap), by tanh(u) = 1 - 2 / (e^2u + 1). */
INLINE vec FN(capped)(vec x, float cap) {
    return (1.0f - 2.0f / (FN(exp)(x * (2.0f / cap)) + 1.0f)) * cap;
}

/* The largest lane. */
INLINE float FN(top)(vec v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)v);
#else
    float lane[WIDTH];
    memcpy(lane, &v, sizeof v);
    for (int step = WIDTH / 2; step; step /= 2)
        for (int i = 0; i < step; i++) lane[i] = lane[i] > lane[i + step] ? lane[i] : lane[i + step];
    return lane[0];
#endif
}

/* The sums of 16 vectors: a tree of four pairings of neighbours; lane i is the sum of a[i]. */
INLINE vec FN(sums)(const vec *a) {
    vec b[8], c[4], d[2];
    for (int i = 0; i < 8; i++) {
        ivec even = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
        ivec odd = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
        b[i] = __builtin_shuffle(a[2 * i], a[2 * i + 1], even) + __builtin_shuffle(a[2 * i], a[2 * i + 1], odd);
    }
    for (int i = 0; i < 4; i++) {
        ivec low = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
        ivec high = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
        c[i] = __builtin_shuffle(b[2 * i], b[2 * i + 1], low) + __builtin_shuffle(b[2 * i], b[2 * i + 1], high);
    }
    for (int i = 0; i < 2; i++) {
        ivec low = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
        ivec high = {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31};
        d[i] = __builtin_shuffle(c[2 * i], c[2 * i + 1], low) + __builtin_shuffle(c[2 * i], c[2 * i + 1], high);
    }
    ivec low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    ivec high = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
    return __builtin_shuffle(d[0], d[1], low) + __builtin_shuffle(d[0], d[1], high);
}

/* 16 x 16 numbers, rows and columns exchanged: Eklundh's exchanges at distance 1, 2, 4, 8. */
INLINE void FN(transpose)(ivec *r) {
#define KEEP(j, s) ((j) & s ? 16 + (j) - s : (j))
#define SWAP(j, s) ((j) & s ? 16 + (j) : (j) + s)
#define ALL(F, s)                                                                                                      \
    {F(0, s), F(1, s), F(2, s),  F(3, s),  F(4, s),  F(5, s),  F(6, s),  F(7, s),                                      \
     F(8, s), F(9, s), F(10, s), F(11, s), F(12, s), F(13, s), F(14, s), F(15, s)}
#define EXCHANGE(s)                                                                                                    \
    _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) if (!(i & s)) {                                              \
        ivec a = r[i], b = r[i + s];                                                                                   \
        r[i] = __builtin_shuffle(a, b, (ivec)ALL(KEEP, s));                                                            \
        r[i + s] = __builtin_shuffle(a, b, (ivec)ALL(SWAP, s));                                                        \
    }
    EXCHANGE(1)
    EXCHANGE(2)
    EXCHANGE(4)
    EXCHANGE(8)
#undef KEEP
#undef SWAP
#undef ALL
#undef EXCHANGE
}

/* Products of CHUNK neighbouring elements of two rows, added to the lanes of a float vector. One row, read again and again,
 * is kept as `element`s; the other is read where it lies. */
#undef CHUNK
#undef WEIGHTS
#undef FETCH
#undef FETCH_PART
#undef DOT
#if defined(HAS_BF16_DOT) && DTYPE == 1
typedef uint16_t FN(element); /* one instruction sums pairs of bf16 products into float */
#define CHUNK 32
#define WEIGHTS __m512bh
#define FETCH(p) ((__m512bh)_mm512_loadu_si512(p))
#define FETCH_PART(p, n) ((__m512bh)_mm512_maskz_loadu_epi16(((__mmask32)1 << (n)) - 1, p))
#define DOT(sum, x, w) ((vec)_mm512_dpbf16_ps((__m512)(sum), x, w))
#else
typedef float FN(element);
#define CHUNK WIDTH
#define WEIGHTS vec
#define FETCH(p) FN(load)(p)
#define FETCH_PART(p, n) FN(load_part)(p, n)
#define DOT(sum, x, w) ((sum) + (x) * (w))
#endif

/* Elements as the dot products take them. */
INLINE void FN(widen)(FN(element) * to, const E *from, long n) {
#if DTYPE == 0 || (defined(HAS_BF16_DOT) && DTYPE == 1)
    memcpy(to, from, (size_t)n * sizeof *to);
#else
    for (long i = 0; i < n; i++) to[i] = FN(get)(from + i);
#endif
}

#ifdef HAS_AMX
/* The shapes of tiles 0 to 7. */
LOCAL void FN(shape_tiles)(const long *rows, const long *bytes) {
    volatile struct { /* GCC does not know that the instruction reads all of it */
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = (uint16_t)bytes[i], shape.rows[i] = (uint8_t)rows[i];
    _tile_loadconfig((const void *)&shape);
}
#define TILES_READ() __asm__ volatile("" ::: "memory") /* nor which memory tiles are loaded from */
#endif
