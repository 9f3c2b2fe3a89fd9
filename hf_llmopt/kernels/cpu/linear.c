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
                for (int i = 0; i < M; i++)                                                                            \
                    for (int j = 0; j < N; j++) FN(finish)(a, m + i, n + part + j, whole, sums[i * N + j]);            \
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

void FN(linear)(const void *arguments, int threads) {
    const linear *a = arguments;
#if defined(HAS_BF16_DOT) && DTYPE == 1
    const FN(element) *x = a->x;
#else
    const FN(element) *x = a->scratch;
    for (long i = 0; i < a->rows * a->inputs; i++) a->scratch[i] = FN(get)((const E *)a->x + i);
#endif
    long blocks = (a->outputs + OUT - 1) / OUT;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#ifdef _OPENMP
        long t = omp_get_thread_num(), n = omp_get_num_threads();
#else
        long t = 0, n = 1;
#endif
        long from = blocks * t / n * OUT, to = blocks * (t + 1) / n * OUT;
        FN(block)(a, x, from, to < a->outputs ? to : a->outputs);
    }
}
#undef OUT
#undef CHUNK
#undef WEIGHTS
#undef FETCH
#undef DOT
#endif
