/* The integer products of quantized.c by AMX: up to 16 rows times 16 outputs in a tile.
 *
 * x        where tiles.h says: a line of 64 bytes for each row and `depth` inputs
 * weight   [inputs / share][2 blocks of outputs][share / 4][16][4]: as quantized.c has it, but signed and less its zero. Some
 *            hundred inputs of 32 outputs are brought into this form, stay in the nearest cache, and meet all rows of a panel;
 *            or are read where quantized.c has them, see tiles_direct.
 *
 * Integers are exact, and what follows them is in the order of quantized.c: a row has the same bits by either. */
#ifndef LLMOPT_TILES
#define LLMOPT_TILES
#include "tiles.h"
#include "types.h"
#define OUT 16
#define BLOCKS 2              /* of outputs at a time */
#define CHUNK_INPUTS 512      /* whose weights are in the nearest cache */
#define RUNS (CHUNK_INPUTS / 32) /* of inputs that share a scale, at most */
#define PANEL_ROWS 512        /* at most: of 32 outputs each row has sums */
#define PANEL_BYTES (5 << 18) /* of x, which stays in a cache of the core while the weights pass */
#define LAID_RUNS 8           /* of a row, which a thread lays out at a time */
#define AT(name) PASTE(name, any, LEVEL)
#define SELF "tiles.c"
#include "levels.h"
#elif defined(FORMAT) && defined(HAS_AMX)
#include "finish.h"
#include "rounding.h"

#if DTYPE == 0 /* what follows does not depend on the format */
/* Sums are tiles 0 to 3, x 4 and 5, weights 6 and 7. */
LOCAL void AT(set_shape)(long rows, long depth) {
    FN(shape_tiles)((long[]){rows, rows, rows, rows, rows, rows, depth / 4, depth / 4}, (long[]){64, 64, 64, 64, depth, depth, 64, 64});
}

/* Some inputs of two blocks of outputs, whose following weights are fetched, `lines` of either for each run of a block of rows. */
typedef struct {
    int8_t filled[CHUNK_INPUTS * BLOCKS * OUT];
    vec scales[RUNS][BLOCKS], zeros[RUNS][BLOCKS];
    const void *weight[BLOCKS];
    const uint8_t *next;
    long stride, runs, depth, lines, side; /* stride: bytes from a run to the next one */
} AT(chunk) __attribute__((aligned(64)));

/* Blocks of rows, and how far it is from the end of one's inputs to the next one's. */
typedef struct {
    const int8_t *x;
    const float *steps, *row_sums;
    vec (*total)[BLOCKS * OUT];
    long rows, blocks, gap, steps_gap;
} AT(span);

/* Inputs [k, k + count) of a block of outputs, less their zeros. */
LOCAL void AT(signed_codes)(const linear *a, long b, long k, long count, int8_t *to) {
    const long bytes = a->kind == FOUR_BITS ? 8 : 16, groups = a->laid / a->group;
    const uint8_t *w = (const uint8_t *)a->weight + (b * a->laid + k) * bytes;
    const __m512i half = _mm512_set1_epi8(15);
    __m512i zero = _mm512_set1_epi8((char)(int)a->zero);
    for (long run = 0; run < count; run += a->share, to += a->share * OUT) {
        if (a->zeros) {
            __m128i each = _mm_loadu_si128((const __m128i *)(a->zeros + (b * groups + (k + run) / a->group) * OUT));
            zero = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(each), _mm512_set1_epi32(0x01010101));
        }
        for (long i = 0; i < a->share; i += 8, w += 8 * bytes, to += 128) {
            __m512i low = _mm512_loadu_si512(w), high;
            if (a->kind == FOUR_BITS) {
                high = _mm512_and_si512(_mm512_srli_epi16(low, 4), half);
                low = _mm512_and_si512(low, half);
            } else
                high = _mm512_loadu_si512(w + 64);
            _mm512_store_si512(to, _mm512_sub_epi8(low, zero));
            _mm512_store_si512(to + 64, _mm512_sub_epi8(high, zero));
        }
    }
}

/* Inputs [k, k + count) of the blocks of outputs b and b + side, for so many blocks of rows. */
LOCAL void AT(fill)(AT(chunk) * c, const linear *a, long b, long side, long k, long count, long blocks) {
    const long bytes = a->kind == FOUR_BITS ? 8 : 16, block = a->laid * bytes, groups = a->laid / a->group, direct = tiles_direct(a);
    const uint8_t *first = (const uint8_t *)a->weight + b * block + k * bytes;
    c->runs = count / a->share, c->depth = tiles_depth(a->share), c->side = side * block;
    c->stride = a->share * OUT * (direct ? 1 : BLOCKS);
    c->next = first + count * bytes + (k + count == a->laid ? block : 0);
    for (long j = 0; j < BLOCKS; j++) {
        c->weight[j] = direct ? first + j * c->side : (const void *)(c->filled + j * a->share * OUT);
        if (!direct) AT(signed_codes)(a, b + j * side, k, count, c->filled + j * a->share * OUT);
        for (long i = 0; i < c->runs; i++) {
            long at = ((b + j * side) * groups + (k + i * a->share) / a->group) * OUT;
            memcpy(&c->scales[i][j], a->scales + at, sizeof(vec));
            for (long n = 0; direct && n < OUT; n++) c->zeros[i][j][n] = a->zeros ? (float)a->zeros[at + n] : a->zero;
        }
    }
    c->lines = (count * bytes / 64 + blocks * c->runs - 1) / (blocks * c->runs);
    TILES_READ();
}

/* Adds a run's sums, times the scales of rows and outputs, to what is there so far. */
INLINE void AT(add_run)(vec *total, int32_t (*sums)[OUT * OUT], long rows, const float *steps, const float *row_sums,
                        const vec *scales, const vec *zeros, const int direct) {
    const vec scale[BLOCKS] = {scales[0], scales[1]}, zero[BLOCKS] = {zeros[0], zeros[1]};
    _Pragma("GCC unroll 16") for (long m = 0; m < rows; m++) {
        const vec step = steps[m] - (vec){0};
        for (int b = 0; b < BLOCKS; b++) {
            ivec whole;
            memcpy(&whole, sums[b] + m * OUT, sizeof whole);
            vec product = __builtin_convertvector(whole, vec);
            if (direct) product -= zero[b] * row_sums[m];
            total[b * OUT + m] += product * (scale[b] * step);
        }
    }
}

/* A run of inputs that share a scale, in one or two parts. */
#define MULTIPLY(SUM, w)                                                                                               \
    _tile_loadd(6, w, 64);                                                                                             \
    _tile_zero(SUM);                                                                                                   \
    if (direct)                                                                                                        \
        _tile_dpbsud(SUM, 4, 6);                                                                                       \
    else                                                                                                               \
        _tile_dpbssd(SUM, 4, 6);                                                                                       \
    if (parts > 1) {                                                                                                   \
        _tile_loadd(7, (w) + part, 64);                                                                                \
        if (direct)                                                                                                    \
            _tile_dpbsud(SUM, 5, 7);                                                                                   \
        else                                                                                                           \
            _tile_dpbssd(SUM, 5, 7);                                                                                   \
    }
#define STORE(FIRST, SECOND, to)                                                                                       \
    _tile_stored(FIRST, (to)[0], 64);                                                                                  \
    _tile_stored(SECOND, (to)[1], 64);

/* Blocks of rows times a chunk. While a run is multiplied, the one before it is stored, and that before it scaled: a core
 * has not enough loads and stores under way to hide the latency of products otherwise. */
INLINE void AT(span_product)(const AT(chunk) * c, const AT(span) * s, const long rows, const int parts, const int direct) {
    int32_t sums[2][BLOCKS][OUT * OUT] __attribute__((aligned(64)));
    const int8_t *x = s->x, *first = c->weight[0], *second = c->weight[1];
    const float *steps = s->steps, *row_sums = s->row_sums;
    const uint8_t *next = c->next;
    vec(*total)[BLOCKS * OUT] = s->total;
    const long part = c->depth * OUT, all = c->runs * s->blocks;
    for (long i = 0, run = 0, scaled = 0; i < all + 2; i++) {
        if (i < all) {
            _tile_loadd(4, x, 64);
            if (parts > 1) _tile_loadd(5, x + rows * 64, 64);
            x += parts * rows * 64;
            if (i % 2) {
                MULTIPLY(2, first)
                MULTIPLY(3, second)
            } else {
                MULTIPLY(0, first)
                MULTIPLY(1, second)
            }
            first += c->stride, second += c->stride;
            if (++run == c->runs) run = 0, first = c->weight[0], second = c->weight[1], x += s->gap;
            for (long j = 0; j < c->lines; j++, next += 64) {
                __builtin_prefetch(next);
                __builtin_prefetch(next + c->side);
            }
        }
        if (i % 2) {
            STORE(0, 1, sums[0])
        } else if (i) {
            STORE(2, 3, sums[1])
        }
        if (i < 2) continue;
        AT(add_run)(*total, sums[i % 2], rows, steps, row_sums, c->scales[scaled], c->zeros[scaled], direct);
        steps += rows, row_sums += rows;
        if (++scaled == c->runs) scaled = 0, total++, steps += s->steps_gap, row_sums += s->steps_gap;
    }
}
#undef MULTIPLY
#undef STORE

#define VARIANTS(DO) DO(1, 0) DO(1, 1) DO(2, 0) DO(2, 1)
#define VARIANT(PARTS, DIRECT)                                                                                         \
    static __attribute__((noinline)) void AT(span_##PARTS##_##DIRECT)(const AT(chunk) * c, const AT(span) * s) {       \
        if (s->rows == OUT)                                                                                            \
            AT(span_product)(c, s, OUT, PARTS, DIRECT);                                                                \
        else                                                                                                           \
            AT(span_product)(c, s, s->rows, PARTS, DIRECT);                                                            \
    }
#define CASE(PARTS, DIRECT)                                                                                            \
    case 2 * PARTS + DIRECT: AT(span_##PARTS##_##DIRECT)(c, s); break;
VARIANTS(VARIANT)

LOCAL void AT(multiply_span)(const AT(chunk) * c, const AT(span) * s, int variant) {
    switch (variant) { VARIANTS(CASE) }
}
#undef VARIANTS
#undef VARIANT
#undef CASE

/* The products of the rows [top, end) with the blocks of outputs b and b + side. */
LOCAL void AT(panel_product)(const linear *a, long top, long end, long b, long side, vec (*total)[BLOCKS * OUT], long *shaped) {
    AT(chunk) c;
    const long share = a->share, all = a->laid / share, blocks = (end - top + OUT - 1) / OUT, most = CHUNK_INPUTS / share * share;
    memset(total, 0, (size_t)blocks * sizeof *total);
    for (long k = 0, count; k < a->laid; k += count) {
        count = a->laid - k < most ? a->laid - k : most;
        AT(fill)(&c, a, b, side, k, count, blocks);
        for (long first = top; first < end;) { /* whole blocks, then what is left */
            long rows = tiles_rows(a, first), here = rows < OUT ? 1 : (end - first) / OUT;
            const float *steps = tiles_steps(a) + first * all + k / share * rows;
            const AT(span) s = {
                tiles_x(a, first, k), steps, steps + a->rows * all, total + (first - top) / OUT, rows, here,
                (a->laid - count) / c.depth * rows * 64, (all - c.runs) * rows,
            };
            if (*shaped != rows) AT(set_shape)(*shaped = rows, c.depth);
            AT(multiply_span)(&c, &s, 2 * (int)(share / c.depth) + tiles_direct(a));
            first += here * OUT, c.next += here * c.runs * c.lines * 64;
        }
    }
}
#endif

/* The inputs of a row that have the scales [run, last). */
INLINE void FN(lay_lines)(const linear *a, long m, long run, long last) {
    const long first = m - m % 16, rows = tiles_rows(a, first), all = a->laid / a->share, share = a->share;
    const long depth = tiles_depth(share), each = a->rows * all;
    int8_t *line = tiles_x(a, first, run * share) + 64 * (m - first), codes[MOST + 64];
    float *steps = tiles_steps(a) + first * all + run * rows + m - first;
    for (; run < last; run++, steps += rows) {
        FN(quantize)(a, m, run, codes, steps, steps + each);
        for (long i = 0; i < share; i += depth, line += 64 * rows) memcpy(line, codes + i, 64); /* all of a line */
    }
}

/* Called by every thread of a team, which meets here. */
void FN(tiles_prepare)(const linear *a) {
    const long runs = a->laid / a->share, some = (runs + LAID_RUNS - 1) / LAID_RUNS;
#pragma omp for schedule(static)
    for (long i = 0; i < a->rows * some; i++) {
        long run = i % some * LAID_RUNS;
        FN(lay_lines)(a, i / some, run, run + LAID_RUNS < runs ? run + LAID_RUNS : runs);
    }
}

/* The outputs [from, to), once all rows are laid out. */
void FN(tiles_share)(const linear *a, long from, long to) {
    vec total[PANEL_ROWS / OUT][BLOCKS * OUT];
    long panel = PANEL_BYTES / tiles_row_bytes(a) / OUT * OUT, shaped = 0;
    panel = panel < OUT ? OUT : panel < PANEL_ROWS ? panel : PANEL_ROWS;
    for (long top = 0; top < a->rows; top += panel)
        for (long n = from; n < to; n += BLOCKS * OUT) {
            long end = top + panel < a->rows ? top + panel : a->rows, side = n + OUT < to;
            AT(panel_product)(a, top, end, n / OUT, side, total, &shaped);
            for (long m = top; m < end; m++)
                for (long j = 0; j <= side; j++) {
                    long left = to - n - j * OUT, i = m - top;
                    FN(finish)(a, m, n + j * OUT, total[i / OUT][j * OUT + i % OUT], left < OUT ? left : OUT);
                }
        }
    if (shaped) _tile_release();
}
#endif
