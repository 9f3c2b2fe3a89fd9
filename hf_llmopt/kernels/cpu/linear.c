/* y = x W^T + bias (or residual + factor (x W^T + bias)) for few rows, on the weight as nn.Linear keeps it; quantized
 * weights are quantized.c's.
 *
 * x         [rows, inputs]       contiguous
 * weight    [outputs, inputs]    contiguous, streamed once for all rows
 * bias      [outputs] or NULL
 * residual  [rows, outputs] or NULL; added after y was rounded to its format, as stock does
 * y         [rows, outputs]      rows `stride` elements apart; the residual's likewise
 *
 * Every (row, output) has one accumulator over `inputs` and one order of the final sum, whatever the tile: a row's result does
 * not depend on how many rows there are. Threads split the outputs.
 *
 * A team of threads calls `linear_prepare`, where they meet, and then each thread `linear_share`. */
#ifndef LLMOPT_LINEAR
#define LLMOPT_LINEAR
#include "linear.h"
#include "types.h"
#define SMALL 32768 /* weights below which waking a thread costs more than it saves */
#define OUT 16      /* outputs of a block: the sums of 16 accumulators are formed together */
#define PANEL 16384 /* bytes of x that stay in the nearest cache beside the weights */
#define SELF "linear.c"
#include "levels.h"
#elif defined(FORMAT)
#include "finish.h"

extern void FN(quantized_prepare)(const linear *);
extern void FN(quantized_share)(const linear *, long, long);

/* Adds `count` inputs to the vectors of M rows and N outputs, which lie in `sums` between the panels, and asks for its
 * share of the weights `ahead` elements on, so that memory is busy while other rows are computed. After the last panel, the sums go to `lines` [rows][OUT]. */
#define ROWS_BY_OUTPUTS(M, N)                                                                                          \
    INLINE void FN(tile_##M##_##N)(const FN(element) * x, const E *w, long inputs, long count, long ahead, int share,  \
                                   int shares, int first, int last, vec *sums, float *lines) {                         \
        vec a[16] = {0};                                                                                               \
        if (!first) memcpy(a, sums, M * N * sizeof *a);                                                                \
        for (long k = 0; k < count; k += CHUNK) {                                                                      \
            WEIGHTS wide[N];                                                                                           \
            _Pragma("GCC unroll 16") for (int n = 0; n < N; n++) wide[n] = FETCH(w + n * inputs + k);                  \
            for (int n = share; n < N; n += shares) __builtin_prefetch(w + n * inputs + k + ahead);                    \
            _Pragma("GCC unroll 16") for (int m = 0; m < M; m++) {                                                     \
                WEIGHTS row;                                                                                           \
                memcpy(&row, x + m * inputs + k, sizeof row);                                                          \
                _Pragma("GCC unroll 16") for (int n = 0; n < N; n++) a[m * N + n] = DOT(a[m * N + n], row, wide[n]);   \
            }                                                                                                          \
        }                                                                                                              \
        if (!last) {                                                                                                   \
            memcpy(sums, a, M * N * sizeof *a);                                                                        \
            return;                                                                                                    \
        }                                                                                                              \
        vec sum = FN(sums)(a);                                                                                         \
        float lanes[WIDTH];                                                                                            \
        memcpy(lanes, &sum, sizeof sum);                                                                               \
        for (int m = 0; m < M; m++) memcpy(lines + m * OUT, lanes + m * N, N * 4);                                     \
    }
ROWS_BY_OUTPUTS(1, 8)
ROWS_BY_OUTPUTS(2, 8)
ROWS_BY_OUTPUTS(4, 4)
#undef ROWS_BY_OUTPUTS

/* What the vectors leave over of `count` neighbouring outputs of one row, and what follows a product. */
INLINE void FN(complete)(const linear *a, long m, long n, long whole, const float *sums, long count) {
    float line[WIDTH] = {0};
    memcpy(line, sums, (size_t)count * 4);
    for (long k = whole; k < a->inputs; k++)
        for (long i = 0; i < count; i++)
            line[i] += FN(get)((const E *)a->x + m * a->inputs + k) * FN(get)((const E *)a->weight + (n + i) * a->inputs + k);
    vec v;
    memcpy(&v, line, sizeof v);
    FN(finish)(a, m, n, v, count);
}

/* One output: the same accumulator and the same order as in a tile. */
LOCAL float FN(single)(const linear *a, const FN(element) * x, long m, long n, long whole) {
    vec sums[16] = {0};
    for (long k = 0; k < whole; k += CHUNK) {
        WEIGHTS row;
        memcpy(&row, x + m * a->inputs + k, sizeof row);
        sums[0] = DOT(sums[0], row, FETCH((const E *)a->weight + n * a->inputs + k));
    }
    return FN(sums)(sums)[0];
}

/* Blocks of 16 outputs and up to 16 rows, a panel of inputs at a time: x stays in the nearest cache. */
LOCAL void FN(vector_blocks)(const linear *a, const FN(element) * x, long from, long to) {
    long inputs = a->inputs, whole = inputs - inputs % CHUNK, group = a->rows < OUT ? a->rows : OUT;
    long fitting = PANEL / (group * (long)sizeof *x) / CHUNK * CHUNK, panel = fitting < whole ? fitting : whole;
    for (long n = from; n < to; n += OUT)
        for (long top = 0; top < a->rows; top += OUT) {
            long rows = a->rows - top < OUT ? a->rows - top : OUT, outputs = to - n < OUT ? to - n : OUT, k = 0;
            vec sums[OUT * OUT];
            float lines[OUT * OUT];
            do {
                long count = whole - k < panel ? whole - k : panel, m = 0, part;
                int last = k + count == whole;
                /* of the same outputs, of the next block, or (all rows fit one tile) of the next tile */
                long ahead = !last ? panel : OUT * inputs - k;
                int share = 0, shares = (int)(rows / 4 + rows % 4 / 2 + rows % 2);
                vec *next = sums;
#define TILES(M, N)                                                                                                    \
    for (; rows - m >= M; m += M) {                                                                                    \
        for (part = 0; part + N <= outputs; part += N, next += M * N)                                                  \
            FN(tile_##M##_##N)(x + (top + m) * inputs + k, (const E *)a->weight + (n + part) * inputs + k, inputs,     \
                               count, shares == 1 && panel == whole ? N * inputs : ahead, share, shares, !k, last,     \
                               next, lines + m * OUT + part);                                                          \
        share++;                                                                                                       \
        for (int i = 0; last && i < M; i++)                                                                            \
            for (long j = part; j < outputs; j++)                                                                      \
                lines[(m + i) * OUT + j] = FN(single)(a, x, top + m + i, n + j, whole);                                \
    }
                TILES(4, 4)
                TILES(2, 8)
                TILES(1, 8)
#undef TILES
                k += count;
            } while (k < whole);
            for (long m = 0; m < rows; m++) FN(complete)(a, top + m, n, whole, lines + m * OUT, outputs);
        }
}

#if defined(HAS_AMX) && DTYPE == 1
/* Tiles multiply 16 outputs x 32 inputs of the weight, as it lies, with 32 inputs x up to 16 rows of x, so that every weight
 * is read once for 16 rows. x lies in groups of 16 rows (the last may be smaller), each as [inputs / 2][rows][2]; a single
 * row lies so already. */
#define TILED(a) ((a)->inputs >= 32 && (a)->outputs >= 16)

/* Tiles 0 and 1 are sums, 2 is x, 3 and 4 are weights. */
LOCAL void FN(tile_shape)(long rows) {
    FN(shape_tiles)((long[]){16, 16, 16, 16, 16, 0, 0, 0}, (long[]){4 * rows, 4 * rows, 4 * rows, 64, 64, 0, 0, 0});
}

LOCAL void FN(tile_blocks)(const linear *a, const uint16_t *packed, long from, long to) {
    long inputs = a->inputs, whole = inputs - inputs % 32, shaped = 0;
    for (long n = from; n + 16 <= to; n += 32) { /* two blocks of outputs at a time hide the latency of a product */
        int both = n + 32 <= to;
        const uint16_t *low = (const uint16_t *)a->weight + n * inputs, *high = both ? low + 16 * inputs : low;
        for (long first = 0; first < a->rows; first += 16) {
            long rows = a->rows - first < 16 ? a->rows - first : 16;
            const uint16_t *x = packed + first * whole;
            float sums[2][16][16] __attribute__((aligned(64)));
            if (rows != shaped) FN(tile_shape)(shaped = rows);
            TILES_READ();
            _tile_zero(0);
            _tile_zero(1);
            for (long k = 0; k < whole; k += 32) {
                _tile_loadd(2, x + k * rows, 4 * rows);
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
                if (rows == 1) {
                    float line[16];
                    for (int i = 0; i < 16; i++) line[i] = sums[b][i][0];
                    FN(complete)(a, first, n + 16 * b, whole, line, 16);
                } else {
                    FN(transpose)((ivec *)sums[b]);
                    for (long m = 0; m < rows; m++) FN(complete)(a, first + m, n + 16 * b, whole, sums[b][m], 16);
                }
        }
    }
    if (shaped) _tile_release();
}
#endif

/* Called by every thread of a team: lays x out as `linear_share` reads it. */
void FN(linear_prepare)(const linear *a) {
    if (a->kind) {
        FN(quantized_prepare)(a);
        return;
    }
#if defined(HAS_AMX) && DTYPE == 1
    if (TILED(a) && a->rows > 1) {
        long inputs = a->inputs, whole = inputs - inputs % 32, groups = (a->rows + 15) / 16;
#pragma omp for schedule(static)
        for (long k = 0; k < whole; k += 32) /* all rows of a group share a line of memory, so threads split the inputs */
            for (long g = 0; g < groups; g++) {
                long rows = a->rows - 16 * g < 16 ? a->rows - 16 * g : 16;
                uint16_t *packed = (uint16_t *)a->scratch + 16 * g * whole + k * rows;
                ivec block[16] = {0};
                for (long m = 0; m < rows; m++)
                    memcpy(block + m, (const uint16_t *)a->x + (16 * g + m) * inputs + k, sizeof *block);
                FN(transpose)(block);
                for (long i = 0; i < 16; i++)
                    _mm512_mask_storeu_epi32(packed + 2 * i * rows, (__mmask16)((1 << rows) - 1), (__m512i)block[i]);
            }
    }
#elif DTYPE == 0 || defined(HAS_BF16_DOT) && DTYPE == 1
    (void)a;
#else
#pragma omp for schedule(static)
    for (long m = 0; m < a->rows; m++)
        FN(widen)((FN(element) *)a->scratch + m * a->inputs, (const E *)a->x + m * a->inputs, a->inputs);
#endif
}

/* The outputs [from, to) of thread t of n. */
void FN(linear_range)(const linear *a, long t, long n, long *from, long *to) {
    long blocks = (a->outputs + OUT - 1) / OUT;
    *from = blocks * t / n * OUT, *to = blocks * (t + 1) / n * OUT;
    if (*to > a->outputs) *to = a->outputs;
}

/* Thread t's share of n, once all rows are laid out. */
void FN(linear_share)(const linear *a, long t, long n) {
    long from, to;
    FN(linear_range)(a, t, n, &from, &to);
    if (a->kind) {
        FN(quantized_share)(a, from, to);
        return;
    }
#if defined(HAS_AMX) && DTYPE == 1
    if (TILED(a)) {
        FN(tile_blocks)(a, a->rows > 1 ? a->scratch : a->x, from, to);
        for (long m = 0; m < a->rows; m++)
            for (long j = to - to % 16; j < to; j++) {
                float sum = FN(single)(a, a->x, m, j, a->inputs - a->inputs % 32);
                FN(complete)(a, m, j, a->inputs - a->inputs % 32, &sum, 1);
            }
        return;
    }
#endif
#if DTYPE == 0 || (defined(HAS_BF16_DOT) && DTYPE == 1)
    FN(vector_blocks)(a, a->x, from, to);
#else
    FN(vector_blocks)(a, a->scratch, from, to);
#endif
}

int FN(linear)(const void *arguments, int threads) {
    linear a = *(const linear *)arguments;
    void *memory = malloc(linear_scratch(a.rows, a.laid) + LINE);
    if (!memory) return 1;
    a.scratch = next_line(memory);
#pragma omp parallel num_threads(threads) if (threads > 1 && a.outputs * a.inputs > SMALL)
    {
        FN(linear_prepare)(&a);
        FN(linear_share)(&a, team_thread(), team_size());
    }
    free(memory);
    return 0;
}
#undef TILED
#endif
