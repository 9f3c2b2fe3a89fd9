/* The products of linear.c on quantized weights: w[n, k] = scale[n, g] * (code[n, k] - zero[n, g]), g the group of input k.
 *
 * weight   sixteen outputs stand in the lanes of a vector, four bytes each, inputs side by side. [outputs / 16] blocks of
 *            4 bits            [laid / 8][16][4]: the low halves are inputs 0 to 3, the high ones 4 to 7
 *            8 bits, float8    [laid / 4][16][4]
 * scales   [outputs / 16][laid / group][16]; zeros likewise, or NULL where all are `zero`
 * order    [laid]: which input stands there, -1 for none (groups are filled up to eights); or NULL: each in its place
 *
 * share    x is rounded to int8 with a scale for each row and `share` inputs, and codes are multiplied as integers, which is
 *          exact; or 0: codes become floats and x stays as it is.
 * scratch  x as the tiles read it: for T rows of a tile, [laid / 4][T][4] int8, or [laid][T] floats; after all int8 tiles, for
 *          each of them scales and sums, [laid / share][T] each, as floats
 *
 * The order of a row's additions is that of its groups, within a float group that of CHAINS interleaved sums: it does not
 * depend on the tile. */
#ifndef LLMOPT_QUANTIZED
#define LLMOPT_QUANTIZED
#include "tiles.h"
#include "types.h"
#define OUT 16
#define PANEL (1 << 18) /* bytes of x that stay in a cache of the core while the weights pass */
#define AHEAD 2048      /* bytes of weights that are fetched ahead */
#define MAGIC 0x4B000000 /* 2^23: its last bits count ones */
typedef struct {
    const linear *a;
    const void *x; /* of the tile's rows; so are steps (scales of x) and sums */
    const float *steps, *sums;
    const uint8_t *weight; /* of the first block of outputs; so are scales and zeros */
    const float *scales;
    const uint8_t *zeros;
    long next, side; /* to the second block: bytes of weights, and scales; 0 where there is none */
} tile;
#define AT(name) PASTE(name, any, LEVEL)
#define SELF "quantized.c"
#include "levels.h"
#elif defined(FORMAT)
#include "finish.h"
#include "rounding.h"

/* Tiles: rows at most, of integers and of floats; blocks of outputs at a time; sums that hide each other's latency; parts of
 * 16 integers that fit a register. */
#undef INTEGER_ROWS
#undef FLOAT_ROWS
#undef BLOCKS
#undef CHAINS
#undef OFFSET
#undef PARTS
#ifdef __AVX512F__
#define PARTS 1
#define INTEGER_ROWS 8
#define FLOAT_ROWS 4
#define BLOCKS 2
#define CHAINS 2
#else
#ifdef __AVX2__
#define PARTS 2
#else
#define PARTS 4
#endif
#define INTEGER_ROWS 4
#define FLOAT_ROWS 2
#define BLOCKS 1
#define CHAINS 1
#endif
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
#define OFFSET 128 /* taken off codes of 8 bits: pairs of unsigned ones overflow */
#else
#define OFFSET 0
#endif

#ifdef HAS_AMX
extern void FN(tiles_prepare)(const linear *);
extern void FN(tiles_share)(const linear *, long, long);
#endif

#if DTYPE == 0 /* what follows does not depend on the format */
INLINE ivec AT(codes)(const uint8_t *p) {
    ivec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vec AT(zeros)(const linear *a, const uint8_t *zeros, long side) {
    typedef uint8_t bytes __attribute__((vector_size(WIDTH)));
    bytes v;
    if (!zeros) return a->zero - (vec){0};
    memcpy(&v, zeros + side, sizeof v);
    return __builtin_convertvector(v, vec);
}

typedef int32_t AT(part) __attribute__((vector_size(4 * WIDTH / PARTS)));

/* Four codes of each lane times four bytes of x, added to the lanes. */
INLINE AT(part) AT(dot)(AT(part) sum, AT(part) codes, int32_t x, const int kind) {
#if defined(__AVX512VNNI__)
    (void)kind;
    return (AT(part))_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(x));
#elif defined(__AVX512F__)
    __m512i w = (__m512i)codes, all = _mm512_set1_epi32(x), ones = _mm512_set1_epi16(1);
    if (kind == EIGHT_BITS) { /* |w| times x with w's sign */
        all = _mm512_mask_sub_epi8(all, _mm512_movepi8_mask(w), _mm512_setzero_si512(), all);
        w = _mm512_abs_epi8(w);
    }
    return (AT(part))_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16(_mm512_maddubs_epi16(w, all), ones));
#elif defined(__AVX2__)
    __m256i w = (__m256i)codes, all = _mm256_set1_epi32(x), ones = _mm256_set1_epi16(1);
    if (kind == EIGHT_BITS) all = _mm256_sign_epi8(all, w), w = _mm256_abs_epi8(w);
    return (AT(part))_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, all), ones));
#else
    (void)kind;
    for (int j = 0; j < 4; j++) sum += (codes >> 8 * j & 255) * (int32_t)(int8_t)((uint32_t)x >> 8 * j);
    return sum;
#endif
}

/* T rows times BLOCKS blocks of outputs. */
INLINE void AT(integer_tile)(const tile *t, vec *result, const int T, const int kind) {
    long share = t->a->share, runs = t->a->laid / share, per_group = t->a->group / share, next = t->next;
    const int8_t *x = t->x;
    const uint8_t *w = t->weight, *zeros = t->zeros;
    const float *scales = t->scales, *steps = t->steps, *sums = t->sums;
    vec total[16] = {0}, scale[BLOCKS], zero[BLOCKS];
    for (long run = 0, left = 0; run < runs; run++, left--, steps += T, sums += T) {
        AT(part) s[2][16 * PARTS] = {0}; /* the second serves few rows, to hide latency */
        long ahead = AHEAD + ((runs - run) * share * (kind == FOUR_BITS ? 8 : 16) <= AHEAD ? next : 0);
        for (long k = 0; k < share; k += 8, x += 8 * T, w += kind == FOUR_BITS ? 64 : 128) {
            AT(part) low[BLOCKS * PARTS], high[BLOCKS * PARTS];
            _Pragma("GCC unroll 4") for (int i = 0; i < BLOCKS * PARTS; i++) {
                const uint8_t *p = w + i / PARTS * next + i % PARTS * (long)sizeof *low;
                __builtin_prefetch(p + ahead);
                memcpy(low + i, p, sizeof *low);
                if (kind == FOUR_BITS) {
                    high[i] = low[i] >> 4 & 0x0f0f0f0f;
                    low[i] &= 0x0f0f0f0f;
                } else {
                    __builtin_prefetch(p + ahead + 64);
                    memcpy(high + i, p + 64, sizeof *high);
                    if (OFFSET) low[i] ^= (int32_t)0x80808080, high[i] ^= (int32_t)0x80808080;
                }
            }
            _Pragma("GCC unroll 8") for (int m = 0; m < T; m++) {
                int32_t four[2];
                memcpy(four, x + 4 * m, 4);
                memcpy(four + 1, x + 4 * (T + m), 4);
                _Pragma("GCC unroll 4") for (int b = 0; b < BLOCKS * PARTS; b++) {
                    int i = m * BLOCKS * PARTS + b;
                    s[0][i] = AT(dot)(s[0][i], low[b], four[0], kind);
                    s[T < 4][i] = AT(dot)(s[T < 4][i], high[b], four[1], kind);
                }
            }
        }
        if (!left) { /* the weights' next group */
            left = per_group;
            for (int b = 0; b < BLOCKS; b++) {
                memcpy(scale + b, scales + b * t->side, sizeof *scale);
                zero[b] = AT(zeros)(t->a, zeros, b * t->side) - (kind == EIGHT_BITS ? (float)OFFSET : 0.0f);
            }
            scales += OUT, zeros += zeros ? OUT : 0;
        }
        _Pragma("GCC unroll 8") for (int m = 0; m < T; m++)
            _Pragma("GCC unroll 2") for (int b = 0; b < BLOCKS; b++) {
                int i = m * BLOCKS + b;
                ivec whole, second;
                memcpy(&whole, s[0] + i * PARTS, sizeof whole);
                memcpy(&second, s[1] + i * PARTS, sizeof second);
                vec product = __builtin_convertvector(T < 4 ? whole + second : whole, vec) - zero[b] * sums[m];
                total[i] += product * (scale[b] * steps[m]);
            }
    }
    memcpy(result, total, (size_t)(T * BLOCKS) * sizeof *total);
}

/* Code j of 8 as a float: 2^23 + code - (2^23 + zero). */
INLINE vec AT(decode)(const ivec *v, vec zero, const int j, const int kind) {
    uvec codes = (uvec)v[kind == FOUR_BITS ? 0 : j / 4];
    if (kind == FOUR_BITS) return (vec)((codes >> (8 * (j % 4) + j / 4 * 4) & 15) | MAGIC) - zero;
    if (kind == EIGHT_BITS) return (vec)((codes >> 8 * (j % 4) & 255) | MAGIC) - zero;
    /* 1 sign, 4 exponent and 3 mantissa bits where a float has them; its exponent counts from 127 instead of 7 */
    return (vec)((ivec)(codes << (24 - 8 * (j % 4))) >> 4 & (int32_t)0x87f00000) * 0x1p120f;
}

INLINE void AT(floats_tile)(const tile *t, vec *result, const int T, const int kind) {
    long group = t->a->group, groups = t->a->laid / group, next = t->next;
    const float *x = t->x, *scales = t->scales;
    const uint8_t *w = t->weight, *zeros = t->zeros;
    vec total[8] = {0}, zero[BLOCKS];
    for (long g = 0; g < groups; g++, scales += OUT, zeros += zeros ? OUT : 0) {
        vec s[16] = {0};
        for (int b = 0; b < BLOCKS; b++) zero[b] = AT(zeros)(t->a, zeros, b * t->side) + 8388608.0f;
        for (long k = 0; k < group; k += 8, x += 8 * T, w += kind == FOUR_BITS ? 64 : 128) {
            ivec v[BLOCKS][2];
            for (int b = 0; b < BLOCKS; b++)
                for (int half = 0; half < (kind == FOUR_BITS ? 1 : 2); half++) {
                    __builtin_prefetch(w + b * next + 64 * half + AHEAD);
                    v[b][half] = AT(codes)(w + b * next + 64 * half);
                }
            _Pragma("GCC unroll 8") for (int j = 0; j < 8; j++)
                _Pragma("GCC unroll 2") for (int b = 0; b < BLOCKS; b++) {
                    vec weight = AT(decode)(v[b], zero[b], j, kind);
                    _Pragma("GCC unroll 4") for (int m = 0; m < T; m++)
                        s[(m * BLOCKS + b) * CHAINS + j % CHAINS] += weight * x[j * T + m];
                }
        }
        for (int b = 0; b < BLOCKS; b++) {
            vec scale;
            memcpy(&scale, scales + b * t->side, sizeof scale);
            _Pragma("GCC unroll 4") for (int m = 0; m < T; m++) {
                int i = m * BLOCKS + b;
                total[i] += (CHAINS == 2 ? s[2 * i] + s[2 * i + 1] : s[i]) * scale;
            }
        }
    }
    memcpy(result, total, (size_t)(T * BLOCKS) * sizeof *total);
}

#undef EVERY
#define FEW(DO, T)                                                                                                     \
    DO(integer, T, FOUR_BITS) DO(integer, T, EIGHT_BITS)                                                               \
    DO(floats, T, FOUR_BITS) DO(floats, T, EIGHT_BITS) DO(floats, T, FLOAT8)
#if INTEGER_ROWS == 8
#define EVERY(DO) FEW(DO, 1) FEW(DO, 2) FEW(DO, 4) DO(integer, 8, FOUR_BITS) DO(integer, 8, EIGHT_BITS)
#else
#define EVERY(DO) FEW(DO, 1) FEW(DO, 2) DO(integer, 4, FOUR_BITS) DO(integer, 4, EIGHT_BITS)
#endif
enum { AT(integer) = 0, AT(floats) = 8 };
#define TILE(WAY, T, KIND)                                                                                             \
    static __attribute__((noinline)) void AT(WAY##_##T##_##KIND)(const tile *t, vec *result) {                         \
        AT(WAY##_tile)(t, result, T, KIND);                                                                            \
    }
EVERY(TILE)
#define CASE(WAY, T, KIND)                                                                                             \
    case 16 * T + AT(WAY) + KIND: AT(WAY##_##T##_##KIND)(t, result); break;

LOCAL void AT(multiply)(const tile *t, long rows, vec *result) {
    switch (16 * rows + (t->a->share ? AT(integer) : AT(floats)) + t->a->kind) { EVERY(CASE) }
}
#undef FEW
#undef TILE
#undef CASE
#endif

/* The tile in which row m stands: its first row, and how many it has. Those that do not fill one are in smaller ones. */
INLINE long FN(tile_rows)(const linear *a, long m, long *first) {
    long most = a->share ? INTEGER_ROWS : FLOAT_ROWS, rows = most;
    *first = m - m % most;
    while (*first + rows > a->rows || *first + rows <= m) {
        if (*first + rows > a->rows)
            rows /= 2;
        else
            *first += rows;
    }
    return rows;
}

/* x of a row and `share` inputs, where integer tiles read it. */
INLINE void FN(lay_fours)(const linear *a, long m, long run) {
    long first, rows = FN(tile_rows)(a, m, &first), runs = a->laid / a->share;
    int8_t *line = (int8_t *)a->scratch + first * a->laid + run * a->share * rows + 4 * (m - first), codes[MOST];
    float *steps = (float *)((int8_t *)a->scratch + a->rows * a->laid) + first * runs + run * rows + m - first;
    FN(quantize)(a, m, run, codes, steps, steps + a->rows * runs);
    for (long i = 0; i < a->share; i += 4) memcpy(line + i * rows, codes + i, 4);
}

/* Called by every thread of a team, which meets here. */
void FN(quantized_prepare)(const linear *a) {
#ifdef HAS_AMX
    if (tiles_serve(a)) {
        FN(tiles_prepare)(a);
        return;
    }
#endif
    long count = a->share ? a->share : 8; /* a group is some eights */
#pragma omp for schedule(static)
    for (long i = 0; i < a->laid / count * a->rows; i++) { /* rows of a tile share lines: threads split the inputs */
        long m = i % a->rows, k = i / a->rows * count, first, rows;
        if (a->share) {
            FN(lay_fours)(a, m, i / a->rows);
            continue;
        }
        vec x;
        FN(gather)(a, m, k, count, &x);
        rows = FN(tile_rows)(a, m, &first);
        for (long j = 0; j < count; j++) ((float *)a->scratch)[first * a->laid + (k + j) * rows + m - first] = x[j];
    }
}

/* The outputs [from, to), once all rows are laid out. */
void FN(quantized_share)(const linear *a, long from, long to) {
#ifdef HAS_AMX
    if (tiles_serve(a)) {
        FN(tiles_share)(a, from, to);
        return;
    }
#endif
    long most = a->share ? INTEGER_ROWS : FLOAT_ROWS, element = a->share ? 1 : 4, runs = a->share ? a->laid / a->share : 0;
    long block = a->laid * (a->kind == FOUR_BITS ? OUT / 2 : OUT), side = a->laid / a->group * OUT, rows;
    long panel = PANEL / (a->laid * element) / most * most;
    if (panel < most) panel = most;
    const float *steps = (const float *)((const int8_t *)a->scratch + a->rows * a->laid), *sums = steps + a->rows * runs;
    for (long top = 0; top < a->rows; top += panel)
        for (long n = from; n < to; n += OUT * BLOCKS) {
            long b = n / OUT, end = top + panel < a->rows ? top + panel : a->rows;
            int both = BLOCKS == 2 && n + OUT < to;
            for (long m = top; m < end; m += rows) {
                vec result[16];
                rows = FN(tile_rows)(a, m, &(long){0});
                const tile t = {a, (const int8_t *)a->scratch + m * a->laid * element, steps + m * runs, sums + m * runs,
                                (const uint8_t *)a->weight + b * block, a->scales + b * side,
                                a->zeros ? a->zeros + b * side : NULL, both ? block : 0, both ? side : 0};
                AT(multiply)(&t, rows, result);
                for (long i = 0; i < rows; i++)
                    for (long j = 0; j <= both; j++) {
                        long left = to - n - j * OUT;
                        FN(finish)(a, m + i, n + j * OUT, result[i * BLOCKS + j], left < OUT ? left : OUT);
                    }
            }
        }
}

/* The weight itself, [outputs, inputs] in y. */
int FN(dequantize)(const void *arguments, int threads) {
    const linear *a = arguments;
    long block = a->laid * (a->kind == FOUR_BITS ? OUT / 2 : OUT), side = a->laid / a->group * OUT;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long n = 0; n < a->outputs; n += OUT) {
        const uint8_t *w = (const uint8_t *)a->weight + n / OUT * block;
        long rows = a->outputs - n < OUT ? a->outputs - n : OUT;
        for (long k = 0; k < a->laid; k += OUT) {
            long count = a->laid - k < OUT ? a->laid - k : OUT;
            ivec lanes[OUT] = {0};
            for (long j = 0; j < count; j += 8, w += a->kind == FOUR_BITS ? 64 : 128) {
                ivec codes[2] = {AT(codes)(w)};
                if (a->kind != FOUR_BITS) codes[1] = AT(codes)(w + 64);
                long at = n / OUT * side + (k + j) / a->group * OUT;
                vec zero = AT(zeros)(a, a->zeros, at) + 8388608.0f, scale;
                memcpy(&scale, a->scales + at, sizeof scale);
                _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++)
                    lanes[j + i] = (ivec)(scale * (a->kind == FOUR_BITS    ? AT(decode)(codes, zero, i, FOUR_BITS)
                                                   : a->kind == EIGHT_BITS ? AT(decode)(codes, zero, i, EIGHT_BITS)
                                                                           : AT(decode)(codes, zero, i, FLOAT8)));
            }
            FN(transpose)(lanes);
            for (long m = 0; m < rows; m++) {
                E *y = (E *)a->y + (n + m) * a->inputs;
                if (a->order) {
                    for (long j = 0; j < count; j++)
                        if (a->order[k + j] >= 0) FN(put)(y + a->order[k + j], ((vec)lanes[m])[j]);
                } else if (count == OUT)
                    FN(store)(y + k, (vec)lanes[m]);
                else
                    FN(store_part)(y + k, (vec)lanes[m], count);
            }
        }
    }
    return 0;
}
#undef EVERY
#endif
