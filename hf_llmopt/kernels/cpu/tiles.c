/* The integer products of quantized.c by AMX: tiles of 16 rows times 16 outputs.
 *
 * A tile product takes `depth` inputs at a time, a part of those that share a scale, at most 64:
 *   x        [depth / 64 of a line][rows of a block]: a row's inputs are its line of 64 bytes; tiles.h says where it stands
 *   weight   [depth / 4][16 outputs][4]: as quantized.c has it, but signed and less its zero. A few hundred inputs of 32
 *            outputs are brought into this form at a time, stay in the nearest cache, and meet all rows of a panel.
 *
 * Integers are exact, and what follows them is in the order of quantized.c: a row has the same bits by either. */
#ifndef LLMOPT_TILES
#define LLMOPT_TILES
#include "tiles.h"
#include "types.h"
#define OUT 16
#define BLOCKS 2              /* of rows, and of outputs: four products for four loads */
#define CHUNK_INPUTS 512      /* whose weights are in the nearest cache */
#define PANEL_ROWS 256        /* at most: sums of 32 outputs each */
#define PANEL_BYTES (5 << 18) /* of x, which stays in a cache of the core while the weights pass */
#define AHEAD 4096            /* bytes of weights that are fetched ahead */
#define AT(name) PASTE(name, any, LEVEL)
#define SELF "tiles.c"
#include "levels.h"
#elif defined(FORMAT) && defined(HAS_AMX)
#include "finish.h"

#if DTYPE == 0 /* what follows does not depend on the format */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} AT(shape);

/* Sums are tiles 0 to 3 (of rows: 0, 0, 1, 1), x 4 and 5, weights 6 and 7. */
LOCAL void AT(set_shape)(long above, long below, long depth) {
    volatile AT(shape) shape = {.palette = 1}; /* GCC does not know that all of it is read */
    const long rows[8] = {above, above, below, below, above, below, depth / 4, depth / 4};
    for (int i = 0; i < 8; i++) {
        shape.bytes[i] = (uint16_t)(i == 4 || i == 5 ? depth : 64);
        shape.rows[i] = (uint8_t)rows[i];
    }
    _tile_loadconfig((const void *)&shape);
}

/* Inputs [k, k + count) of a block of outputs, less their zeros; every other tile of `to` is another block's. */
LOCAL void AT(signed_codes)(const linear *a, long b, long k, long count, long depth, int8_t *to) {
    const long bytes = a->kind == FOUR_BITS ? 8 : 16, block = a->laid * bytes, groups = a->laid / a->group;
    const uint8_t *w = (const uint8_t *)a->weight + b * block + k * bytes;
    const long ahead = AHEAD + ((a->laid - k) * bytes <= AHEAD ? block : 0);
    const __m512i half = _mm512_set1_epi8(15);
    __m512i zero = _mm512_set1_epi8((char)(int)a->zero);
    for (long i = 0, place = 0; i < count; i += 8, w += 8 * bytes) {
        if (a->zeros && !tiles_corrected(a) && (i == 0 || (k + i) % a->group == 0)) {
            __m128i each = _mm_loadu_si128((const __m128i *)(a->zeros + (b * groups + (k + i) / a->group) * OUT));
            zero = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(each), _mm512_set1_epi32(0x01010101));
        }
        __m512i low = _mm512_loadu_si512(w), high;
        __builtin_prefetch(w + ahead);
        if (a->kind == FOUR_BITS) {
            high = _mm512_and_si512(_mm512_srli_epi16(low, 4), half);
            low = _mm512_and_si512(low, half);
        } else {
            high = _mm512_loadu_si512(w + 64);
            __builtin_prefetch(w + ahead + 64);
        }
        _mm512_storeu_si512(to, _mm512_sub_epi8(low, zero));
        _mm512_storeu_si512(to + 64, _mm512_sub_epi8(high, zero));
        to += 128, place += 8;
        if (place == depth) place = 0, to += depth * OUT;
    }
}

/* Sums of one run of inputs that share a scale: [rows' block][outputs' block][16][16]. */
INLINE void AT(multiply_run)(const int8_t **x, const long *rows, const int8_t *w, long pieces, long depth,
                             int32_t (*sums)[OUT * OUT], const int both) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long i = 0; i < pieces; i++, w += 2 * depth * OUT) {
        _tile_loadd(4, x[0] + i * rows[0] * 64, 64);
        _tile_loadd(6, w, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, w + depth * OUT, 64);
        _tile_dpbssd(1, 4, 7);
        if (both) {
            _tile_loadd(5, x[1] + i * rows[1] * 64, 64);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if (both) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }
}

/* Adds a run's sums of some rows, times the scales of both, to what they have so far. */
INLINE void AT(add_run)(vec (*total)[BLOCKS], int32_t (*sums)[OUT * OUT], long rows, const float *steps,
                        const float *row_sums, const vec *scale, const vec *zero, const int corrected) {
    for (long m = 0; m < rows; m++)
        _Pragma("GCC unroll 2") for (int b = 0; b < BLOCKS; b++) {
            ivec whole;
            memcpy(&whole, sums[b] + m * OUT, sizeof whole);
            vec product = __builtin_convertvector(whole, vec);
            if (corrected) product -= zero[b] * row_sums[m];
            total[m][b] += product * (scale[b] * steps[m]);
        }
}

/* Two blocks of outputs from b on: inputs [k, k + count) of up to 32 rows from `first` on, added to their totals. */
INLINE void AT(rows_by_outputs)(const linear *a, long first, long end, long b, long step, long k, long count, long depth,
                                const int8_t *w, vec (*total)[BLOCKS], const int both, const int corrected) {
    const long runs = a->laid / a->share, side = a->laid / a->group * OUT, pieces = a->share / depth;
    const long below = first + OUT < end ? first + OUT : first;
    const long rows[BLOCKS] = {tiles_rows(a, first), tiles_rows(a, below)};
    const float *steps = tiles_steps(a), *row_sums = steps + a->rows * runs;
    int32_t sums[2][BLOCKS * BLOCKS][OUT * OUT] __attribute__((aligned(64)));
    vec scale[BLOCKS], zero[BLOCKS] = {0};
    const int8_t *x[BLOCKS] = {tiles_x(a, first, k), tiles_x(a, below, k)};
    for (long i = 0, last = count / a->share; i <= last; i++) { /* a run's sums are scaled while the next are multiplied */
        if (i < last) {
            AT(multiply_run)(x, rows, w + i * a->share * BLOCKS * OUT, pieces, depth, sums[i % 2], both);
            for (int j = 0; j < BLOCKS; j++) x[j] += pieces * rows[j] * 64;
        }
        if (i) {
            long run = k / a->share + i - 1, group = run * a->share / a->group * OUT;
            for (int j = 0; j < BLOCKS; j++) {
                memcpy(scale + j, a->scales + (b + j * step) * side + group, sizeof *scale);
                if (corrected) {
                    const uint8_t *each = a->zeros + (b + j * step) * side + group;
                    for (int n = 0; n < OUT; n++) zero[j][n] = (float)each[n] - a->zero;
                }
            }
            for (int j = 0; j <= both; j++) {
                long at = (j ? below : first) * runs + run * rows[j];
                AT(add_run)(total + j * OUT, sums[(i - 1) % 2] + j * BLOCKS, rows[j], steps + at, row_sums + at, scale, zero, corrected);
            }
        }
    }
}

#define VARIANT(BOTH, CORRECTED)                                                                                       \
    static __attribute__((noinline)) void AT(product_##BOTH##_##CORRECTED)(                                            \
        const linear *a, long first, long end, long b, long step, long k, long count, long depth, const int8_t *w,    \
        vec (*total)[BLOCKS]) {                                                                                        \
        AT(rows_by_outputs)(a, first, end, b, step, k, count, depth, w, total, BOTH, CORRECTED);                       \
    }
VARIANT(0, 0) VARIANT(0, 1) VARIANT(1, 0) VARIANT(1, 1)
#undef VARIANT

/* The products of the rows [top, end) with two blocks of outputs from b on (or twice with one, step 0). */
LOCAL void AT(tiles_panel)(const linear *a, long top, long end, long b, long step, vec (*total)[BLOCKS]) {
    int8_t w[CHUNK_INPUTS * BLOCKS * OUT] __attribute__((aligned(64)));
    const long depth = tiles_depth(a->share), chunk = CHUNK_INPUTS / a->share * a->share;
    long above = 0, below = 0;
    memset(total, 0, (size_t)(end - top) * sizeof *total);
    for (long k = 0, count; k < a->laid; k += count) {
        count = a->laid - k < chunk ? a->laid - k : chunk;
        for (long j = 0; j < BLOCKS; j++) AT(signed_codes)(a, b + j * step, k, count, depth, w + j * depth * OUT);
        __asm__ volatile("" ::: "memory"); /* GCC does not know that tiles are loaded from it */
        for (long first = top; first < end; first += BLOCKS * OUT) {
            long second = first + OUT < end ? tiles_rows(a, first + OUT) : OUT;
            if (above != tiles_rows(a, first) || below != second)
                AT(set_shape)(above = tiles_rows(a, first), below = second, depth);
            int both = first + OUT < end;
            (both ? tiles_corrected(a) ? AT(product_1_1) : AT(product_1_0)
                  : tiles_corrected(a) ? AT(product_0_1) : AT(product_0_0))(a, first, end, b, step, k, count, depth, w,
                                                                           total + first - top);
        }
    }
}
#endif

/* The outputs [from, to), once all rows are laid out. */
void FN(tiles_share)(const linear *a, long from, long to) {
    vec total[PANEL_ROWS][BLOCKS];
    long panel = PANEL_BYTES / tiles_row_bytes(a) / OUT * OUT;
    panel = panel < OUT ? OUT : panel < PANEL_ROWS ? panel : PANEL_ROWS;
    for (long top = 0; top < a->rows; top += panel)
        for (long n = from; n < to; n += BLOCKS * OUT) {
            long end = top + panel < a->rows ? top + panel : a->rows, step = n + OUT < to;
            AT(tiles_panel)(a, top, end, n / OUT, step, total);
            for (long m = top; m < end; m++)
                for (long j = 0; j <= step; j++) {
                    long left = to - n - j * OUT;
                    FN(finish)(a, m, n + j * OUT, total[m - top][j], left < OUT ? left : OUT);
                }
        }
    if (from < to) _tile_release();
}
#endif
