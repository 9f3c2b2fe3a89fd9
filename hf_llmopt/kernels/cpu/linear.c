/* y = x W^T + bias (+ residual) for few rows, on the weight as nn.Linear keeps it.
 *
 * x         [rows, inputs]       contiguous
 * weight    [outputs, inputs]    contiguous, streamed once for all rows
 * bias      [outputs] or NULL
 * residual  [rows, outputs] or NULL; added after y was rounded to its format, as stock does
 * y         [rows, outputs]
 *
 * Every (row, output) has one accumulator over `inputs` and one order of the final sum, whatever the tile: a row's result does
 * not depend on how many rows there are. Threads split the outputs. */
#ifndef LLMOPT_LINEAR
#define LLMOPT_LINEAR
#include "linear.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#define SMALL 32768 /* weights below which waking a thread costs more than it saves */
#define SELF "linear.c"
#include "levels.h"
#elif defined(FORMAT)

#define OUT 16 /* outputs of a block: the sums of 16 accumulators are formed together */

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

#if defined(HAS_BF16_DOT) && DTYPE == 1
/* Pairs of bf16 products summed into float by one instruction. */
typedef uint16_t FN(element);
#define CHUNK 32
#define WEIGHTS __m512bh
#define FETCH(p) ((__m512bh)_mm512_loadu_si512(p))
#define DOT(sum, x, w) ((vec)_mm512_dpbf16_ps((__m512)(sum), x, w))
#else
typedef float FN(element);
#define CHUNK WIDTH
#define WEIGHTS vec
#define FETCH(p) FN(load)(p)
#define DOT(sum, x, w) ((sum) + (x) * (w))
#endif

#define ROWS_BY_OUTPUTS(M, N)                                                                                          \
    INLINE void FN(tile_##M##_##N)(const FN(element) * x, const E *w, long inputs, long whole, vec *sums) {            \
        vec a[16];                                                                                                     \
        for (int i = 0; i < 16; i++) a[i] = FN(splat)(0);                                                              \
        for (long k = 0; k < whole; k += CHUNK) {                                                                      \
            WEIGHTS wide[N];                                                                                           \
            _Pragma("GCC unroll 16") for (int n = 0; n < N; n++) {                                                     \
                wide[n] = FETCH(w + n * inputs + k);                                                                   \
                __builtin_prefetch((const char *)(w + n * inputs + k) + N * inputs * (long)sizeof(E));                 \
            }                                                                                                          \
            _Pragma("GCC unroll 16") for (int m = 0; m < M; m++) {                                                     \
                WEIGHTS row;                                                                                           \
                memcpy(&row, x + m * inputs + k, sizeof row);                                                          \
                _Pragma("GCC unroll 16") for (int n = 0; n < N; n++) a[m * N + n] = DOT(a[m * N + n], row, wide[n]);   \
            }                                                                                                          \
        }                                                                                                              \
        *sums = FN(sums)(a);                                                                                           \
    }
ROWS_BY_OUTPUTS(1, 8)
ROWS_BY_OUTPUTS(2, 8)
ROWS_BY_OUTPUTS(4, 4)
ROWS_BY_OUTPUTS(8, 2)
#undef ROWS_BY_OUTPUTS

/* What the vectors leave over, then bias, rounding and residual. */
LOCAL void FN(finish)(const linear *a, long m, long n, long whole, float sum) {
    const E *x = (const E *)a->x + m * a->inputs, *w = (const E *)a->weight + n * a->inputs;
    for (long k = whole; k < a->inputs; k++) sum += FN(get)(x + k) * FN(get)(w + k);
    if (a->bias) sum += FN(get)((const E *)a->bias + n);
    E *y = (E *)a->y + m * a->outputs + n;
    FN(put)(y, sum);
    if (a->residual) FN(put)(y, FN(get)(y) + FN(get)((const E *)a->residual + m * a->outputs + n));
}

/* The sums of `count` neighbouring outputs of one row. */
INLINE void FN(finish_all)(const linear *a, long m, long n, long whole, const float *sums, int count) {
    if (whole == a->inputs && !a->bias && !a->residual) {
        vec v = {0};
        memcpy(&v, sums, (size_t)count * 4);
        FN(store_part)((E *)a->y + m * a->outputs + n, v, count);
    } else
        for (int i = 0; i < count; i++) FN(finish)(a, m, n + i, whole, sums[i]);
}

/* One output: the same accumulator and the same order as in a tile. */
LOCAL void FN(single)(const linear *a, const FN(element) * x, long m, long n, long whole) {
    vec sums[16];
    for (int i = 0; i < 16; i++) sums[i] = FN(splat)(0);
    for (long k = 0; k < whole; k += CHUNK) {
        WEIGHTS row;
        memcpy(&row, x + m * a->inputs + k, sizeof row);
        sums[0] = DOT(sums[0], row, FETCH((const E *)a->weight + n * a->inputs + k));
    }
    FN(finish)(a, m, n, whole, FN(sums)(sums)[0]);
}

LOCAL void FN(block)(const linear *a, const FN(element) * x, long n0, long n1) {
    long inputs = a->inputs, whole = inputs - inputs % CHUNK;
    for (long n = n0; n < n1; n += OUT) {
        long m = 0;
#define TILES(M, N)                                                                                                    \
    for (; a->rows - m >= M; m += M)                                                                                   \
        for (long part = 0; part < OUT; part += N) {                                                                   \
            vec sums;                                                                                                  \
            if (n + part + N <= n1) {                                                                                  \
                FN(tile_##M##_##N)(x + m * inputs, (const E *)a->weight + (n + part) * inputs, inputs, whole, &sums);  \
                float lanes[WIDTH];                                                                                    \
                memcpy(lanes, &sums, sizeof sums);                                                                     \
                for (int i = 0; i < M; i++) FN(finish_all)(a, m + i, n + part, whole, lanes + i * N, N);               \
            } else                                                                                                     \
                for (int i = 0; i < M; i++)                                                                            \
                    for (long j = n + part; j < n1; j++) FN(single)(a, x, m + i, j, whole);                            \
        }
        TILES(8, 2)
        TILES(4, 4)
        TILES(2, 8)
        TILES(1, 8)
#undef TILES
    }
}

#if defined(HAS_AMX) && DTYPE == 1
/* Tiles multiply 16 outputs x 32 inputs of the weight, as it lies, with 32 inputs x 16 rows of x, so that every weight is read
 * once for up to 16 rows. x is laid out in pairs beforehand: packed[k / 2][row][2]. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} FN(tiles);

LOCAL void FN(tile_blocks)(const linear *a, const uint16_t *packed, long first, long rows, long from, long to) {
    FN(tiles) shape = {.palette = 1};
    for (int i = 0; i < 6; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    _tile_loadconfig(&shape);
    long inputs = a->inputs, whole = inputs - inputs % 32;
    const uint16_t *weight = a->weight;
    for (long n = from; n < to; n += 32) { /* two blocks of outputs at a time hide the latency of a product */
        int both = n + 32 <= to;
        const uint16_t *low = weight + n * inputs, *high = both ? low + 16 * inputs : low;
        float sums[2][16][16];
        _tile_zero(0);
        _tile_zero(1);
        for (long k = 0; k < whole; k += 32) {
            _tile_loadd(2, packed + k * 16, 64);
            _tile_loadd(3, low + k, inputs * 2);
            _tile_dpbf16ps(0, 3, 2);
            if (both) {
                _tile_loadd(4, high + k, inputs * 2);
                _tile_dpbf16ps(1, 4, 2);
            }
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        for (int b = 0; b <= both; b++)
            for (long m = 0; m < rows; m++) {
                float line[16];
                for (int i = 0; i < 16; i++) line[i] = sums[b][i][m];
                FN(finish_all)(a, first + m, n + 16 * b, whole, line, 16);
            }
    }
    _tile_release();
}

LOCAL int FN(linear_tiles)(const linear *a, int threads) {
    long blocks = a->outputs / 16, rest = blocks * 16, whole = a->inputs - a->inputs % 32;
    uint16_t *packed = calloc((size_t)((a->rows + 15) / 16 * 16 * whole), 2); /* [groups of 16 rows][inputs / 2][16][2] */
    if (!packed) return 1;
    const uint16_t *x = a->x;
    for (long m = 0; m < a->rows; m++)
        for (long k = 0; k < whole; k += 2)
            memcpy(packed + (m / 16) * 16 * whole + k * 16 + m % 16 * 2, x + m * a->inputs + k, 4);
#pragma omp parallel num_threads(threads) if (threads > 1 && a->outputs * a->inputs > SMALL)
    {
#ifdef _OPENMP
        long t = omp_get_thread_num(), n = omp_get_num_threads();
#else
        long t = 0, n = 1;
#endif
        for (long m = 0; m < a->rows; m += 16)
            FN(tile_blocks)(a, packed + m * whole, m, a->rows - m < 16 ? a->rows - m : 16, blocks * t / n * 16,
                            blocks * (t + 1) / n * 16);
        if (t == n - 1)
            for (long m = 0; m < a->rows; m++)
                for (long j = rest; j < a->outputs; j++) FN(single)(a, x, m, j, whole);
    }
    free(packed);
    return 0;
}
#endif

int FN(linear)(const void *arguments, int threads) {
    const linear *a = arguments;
#if defined(HAS_AMX) && DTYPE == 1
    if (a->inputs >= 32 && a->outputs >= 16) return FN(linear_tiles)(a, threads);
#endif
    float *wide = NULL;
#if DTYPE == 0 || (defined(HAS_BF16_DOT) && DTYPE == 1)
    const FN(element) *x = a->x;
#else
    wide = malloc((size_t)(a->rows * a->inputs) * sizeof *wide);
    if (!wide) return 1;
    for (long i = 0; i < a->rows * a->inputs; i++) wide[i] = FN(get)((const E *)a->x + i);
    const FN(element) *x = wide;
#endif
    long blocks = (a->outputs + OUT - 1) / OUT;
#pragma omp parallel num_threads(threads) if (threads > 1 && a->outputs * a->inputs > SMALL)
    {
#ifdef _OPENMP
        long t = omp_get_thread_num(), n = omp_get_num_threads();
#else
        long t = 0, n = 1;
#endif
        long from = blocks * t / n * OUT, to = blocks * (t + 1) / n * OUT;
        FN(block)(a, x, from, to < a->outputs ? to : a->outputs);
    }
    free(wide);
    return 0;
}
#undef OUT
#undef CHUNK
#undef WEIGHTS
#undef FETCH
#undef DOT
#endif
