/* The long spans of attention.c, after FlashAttention (Dao et al. 2022): no matrix of scores is stored.
 *
 * A tile is ROWS query rows of one span and one key head, a row being a token and a query head. It sees the keys block by
 * block, with the online softmax of Milakov and Gimelshein (2018). Rows stand in the lanes of vectors, so that maxima and
 * sums need no exchange between lanes. Blocks count from the request's first token, and one that a row does not see leaves
 * it as it is: its result does not depend on its tile.
 *
 * unit      4 bytes: a float, or a pair of bf16 numbers, which one instruction multiplies and sums
 * query     [key_dim units][ROWS]     of a tile
 * key       [BLOCK][key_dim units]    of a block
 * value     [BLOCK units][value_dim]  of a block
 * output    [value_dim][ROWS]         of a tile, floats */
#ifndef LLMOPT_FLASH
#define LLMOPT_FLASH
#include "attention.h"
#include "types.h"
#define ROWS FLASH_ROWS
#define BLOCK FLASH_BLOCK
#define MOST (ROWS / WIDTH) /* vectors of a tile */
typedef struct {
    long token, row, rows, kv_head; /* the span's first token, and the tile's rows in it */
} flash_tile;
#define SELF "flash.c"
#include "levels.h"
#elif defined(FORMAT)
#include "pages.h"
#undef PAIR
#if defined(HAS_BF16_DOT) && DTYPE == 1
#define PAIR 2 /* elements of a unit */
#else
#define PAIR 1
#endif
#undef HAS_TILES
#if defined(HAS_AMX) && PAIR == 2
#define HAS_TILES 1
#endif

/* sum + rows times one unit. */
INLINE vec FN(multiply)(vec sum, vec rows, uint32_t unit) {
#if PAIR == 2
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)rows, (__m512bh)_mm512_set1_epi32((int)unit));
#else
    float x;
    memcpy(&x, &unit, 4);
    return sum + rows * x;
#endif
}

/* M rows of `sum` [..][N] get += a [M][count units] b [count units][N]; a unit lies at m * across + k * along. The products of
 * CHAIN units are summed first: the error of a sum grows with its length. */
#define M 4
#define CHAIN 64
INLINE void FN(outer)(vec *sum, const uint32_t *a, long across, long along, const vec *b, long count, const int N) {
    for (long from = 0; from < count; from += CHAIN) {
        vec s[M * MOST] = {0};
        for (long k = from; k < count && k < from + CHAIN; k++) {
            vec rows[MOST];
            memcpy(rows, b + k * N, (size_t)N * sizeof *rows);
            _Pragma("GCC unroll 4") for (int m = 0; m < M; m++)
                _Pragma("GCC unroll 4") for (int n = 0; n < N; n++)
                    s[m * N + n] = FN(multiply)(s[m * N + n], rows[n], a[m * across + k * along]);
        }
        _Pragma("GCC unroll 16") for (int i = 0; i < M * N; i++) sum[i] += s[i];
    }
}

#ifdef HAS_TILES
/* The same for 16 rows of a [16][count units]: tiles 0 to 3 are sums, 4 of a, 5 and 6 of b. */
LOCAL void FN(outer_tiles)(vec *sum, const uint32_t *a, long across, const vec *b, long count, const int N) {
    int32_t parts[MOST][WIDTH][WIDTH] __attribute__((aligned(64)));
    TILES_READ();
    for (long from = 0; from < count; from += CHAIN) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (long k = from; k < count && k < from + CHAIN; k += WIDTH) {
            const vec *rows = b + k * N;
            _tile_loadd(4, a + k, across * 4);
#define COLUMN(n, B)                                                                                                   \
    if (n < N) {                                                                                                       \
        _tile_loadd(B, rows + n, N * 64);                                                                              \
        _tile_dpbf16ps(n, 4, B);                                                                                       \
    }
            COLUMN(0, 5)
            COLUMN(1, 6)
            COLUMN(2, 5)
            COLUMN(3, 6)
#undef COLUMN
        }
        _tile_stored(0, parts[0], 64);
        if (N > 1) _tile_stored(1, parts[1], 64);
        if (N > 2) _tile_stored(2, parts[2], 64);
        if (N > 3) _tile_stored(3, parts[3], 64);
        for (int m = 0; m < WIDTH; m++)
            for (int n = 0; n < N; n++) {
                vec part;
                memcpy(&part, parts[n][m], sizeof part);
                sum[m * N + n] += part;
            }
    }
}

/* Values of a block with the units of a number side by side, as tiles of rows read them. */
LOCAL void FN(turn)(const uint32_t *value, long room, uint32_t *to) {
    for (long t = 0; t < BLOCK / PAIR; t += WIDTH)
        for (long d = 0; d < room; d += WIDTH) {
            ivec lanes[WIDTH];
            for (int i = 0; i < WIDTH; i++) memcpy(lanes + i, value + (t + i) * room + d, sizeof *lanes);
            FN(transpose)(lanes);
            for (int i = 0; i < WIDTH; i++) memcpy(to + (d + i) * (BLOCK / PAIR) + t, lanes + i, sizeof *lanes);
        }
}
#endif

/* What a thread works with. */
typedef struct FN(flash_room) {
    vec *query, *output, score[BLOCK * MOST];
    uint32_t *key, *value, *turned; /* turned: the values, where tiles multiply; or NULL */
    long key_units, value_room; /* of a key; of an output, in whole vectors */
} FN(flash_room);

/* Rows of a tile, transposed; scores are scaled afterwards, so that nothing is rounded. Missing rows are 0. */
LOCAL void FN(flash_query)(const attention *a, const flash_tile *tile, FN(flash_room) * room, const int N) {
    long group = a->heads / a->kv_heads, rows = tile->rows, units = room->key_units;
    for (int n = 0; n < N; n++) {
        FN(element) line[WIDTH][MAX_DIM + PAIR * WIDTH] = {0};
        for (long i = 0; i < WIDTH && n * WIDTH + i < rows; i++) {
            long row = tile->row + n * WIDTH + i, head = tile->kv_head * group + row % group;
            FN(query_row)(a, tile->token + row / group, head, line[i]);
        }
        for (long k = 0; k < units; k += WIDTH) {
            ivec lanes[WIDTH];
            for (int i = 0; i < WIDTH; i++) memcpy(lanes + i, line[i] + k * PAIR, sizeof *lanes);
            FN(transpose)(lanes);
            for (long i = 0; i < WIDTH && k + i < units; i++) room->query[(k + i) * N + n] = (vec)lanes[i];
        }
    }
}

/* Keys and values of the block at `from`, of tokens [low, high) alone: what the others' pages hold is not this request's. */
LOCAL void FN(flash_block)(const attention *a, const int32_t *pages, long kv_head, FN(flash_room) * room, long from,
                           long low, long high) {
    long units = room->key_units, dim = a->value_dim;
    for (long t = 0; t < BLOCK; t += PAIR) {
        const E *value[2] = {0};
        E unpacked[3][MAX_DIM];
        for (int i = 0; i < PAIR; i++) {
            FN(element) *key = (FN(element) *)(room->key + (t + i) * units);
            long token = from + t + i;
            if (token < low || token >= high) {
                memset(key, 0, (size_t)units * 4);
                continue;
            }
            long slot = (long)pages[token / a->page_size] * a->page_size + token % a->page_size;
            if (a->form) {
                const uint8_t *rows[2] = {a->keys, a->values};
                rows[0] += slot * page_row(a->form, a->kv_heads, a->key_dim), rows[1] += slot * page_row(a->form, a->kv_heads, dim);
                FN(unpack)(rows[0], a->form, a->kv_heads, a->key_dim, kv_head, unpacked[2]);
                FN(unpack)(rows[1], a->form, a->kv_heads, dim, kv_head, unpacked[i]);
                FN(widen)(key, unpacked[2], a->key_dim);
                value[i] = unpacked[i];
            } else {
                FN(widen)(key, (const E *)a->keys + (slot * a->kv_heads + kv_head) * a->key_dim, a->key_dim);
                value[i] = (const E *)a->values + (slot * a->kv_heads + kv_head) * dim;
            }
            if (PAIR * units > a->key_dim) key[a->key_dim] = 0;
        }
        uint32_t *to_value = room->value + t / PAIR * room->value_room;
        for (long d = 0; d < dim; d += WIDTH) {
            long n = dim - d < WIDTH ? dim - d : WIDTH;
            vec v[2] = {0};
            for (int i = 0; i < PAIR; i++)
                if (value[i]) v[i] = n == WIDTH ? FN(load)(value[i] + d) : FN(load_part)(value[i] + d, n);
            if (PAIR == 2) v[0] = (vec)((uvec)v[0] >> 16 | (uvec)v[1]);
            memcpy(to_value + d, v, sizeof *v);
        }
    }
}

/* A block's scores become weights; maxima and sums follow, and `shrink` is what the output so far is worth. */
INLINE void FN(flash_softmax)(const attention *a, vec *score, long from, const ivec *first, const ivec *end,
                              const ivec *bits, int whole, vec *best, vec *sum, vec *shrink, const int N) {
    for (int n = 0; n < N; n++) {
        vec top = best[n], total = {0};
        for (int t = 0; t < BLOCK; t++) {
            vec s = score[t * N + n] * a->scaling;
            if (a->softcap > 0) s = FN(capped)(s, a->softcap);
            if (!whole) {
                ivec at = (int32_t)(from + t) - (ivec){0}, seen = (at >= first[n]) & (at < end[n]), back = end[n] - 1 - at;
                if (a->tree) seen &= (back >= BITS) | ((bits[n] >> (back & (BITS - 1)) & 1) != 0);
                s = (vec)(((ivec)s & seen) | ((ivec)FN(splat)(-INFINITY) & ~seen));
            }
            score[t * N + n] = s;
            top = FN(max)(top, s);
        }
        for (int t = 0; t < BLOCK; t++) {
            vec s = score[t * N + n], w = FN(exp)(s - top);
            if (!whole) w = (vec)((ivec)w & (s != -INFINITY));
            score[t * N + n] = w;
            total += w;
        }
        shrink[n] = FN(exp)(best[n] - top);
        best[n] = top, sum[n] = sum[n] * shrink[n] + total;
    }
}

INLINE void FN(flash_rows)(const attention *a, const flash_tile *tile, FN(flash_room) * room, const int N) {
    long group = a->heads / a->kv_heads, rows = tile->rows, low = INT32_MAX, high = 0, all_first = 0, all_end = INT32_MAX;
    int32_t limits[3][ROWS] = {0};
    const int32_t *pages = a->table + a->items[3 * tile->token] * a->table_width;
    for (long i = 0; i < rows; i++) {
        const int32_t *item = a->items + 3 * (tile->token + (tile->row + i) / group);
        long first = limits[0][i] = item[1], end = limits[1][i] = item[2];
        low = first < low ? first : low, all_first = first > all_first ? first : all_first;
        high = end > high ? end : high;
        limits[2][i] = a->tree ? a->tree[tile->token + (tile->row + i) / group] : SEES_ALL;
        if (limits[2][i] != SEES_ALL) end -= BITS;
        all_end = end < all_end ? end : all_end;
    }
    ivec first[MOST], end[MOST], bits[MOST];
    memcpy(first, limits[0], sizeof first);
    memcpy(end, limits[1], sizeof end);
    memcpy(bits, limits[2], sizeof bits);
    vec best[MOST], sum[MOST] = {0}, shrink[MOST];
    for (int n = 0; n < N; n++) best[n] = FN(splat)(-3.4e38f);
    memset(room->output, 0, (size_t)(room->value_room * N) * sizeof *room->output);
    FN(flash_query)(a, tile, room, N);
    for (long from = low / BLOCK * BLOCK; from < high; from += BLOCK) {
        int whole = from >= all_first && from + BLOCK <= all_end;
        vec *score = room->score;
        FN(flash_block)(a, pages, tile->kv_head, room, from, low, high);
        memset(score, 0, (size_t)(BLOCK * N) * sizeof *score);
#ifdef HAS_TILES
        if (room->turned) {
            FN(turn)(room->value, room->value_room, room->turned);
            for (int t = 0; t < BLOCK; t += WIDTH)
                FN(outer_tiles)(score + t * N, room->key + t * room->key_units, room->key_units, room->query, room->key_units, N);
        } else
#endif
            for (int t = 0; t < BLOCK; t += M)
                FN(outer)(score + t * N, room->key + t * room->key_units, room->key_units, 1, room->query, room->key_units, N);
        FN(flash_softmax)(a, score, from, first, end, bits, whole, best, sum, shrink, N);
#if PAIR == 2
        for (int t = 0; t < BLOCK; t += 2)
            for (int n = 0; n < N; n++) { /* two weights of a row side by side */
                const uvec low = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, places = low | (low + 16) << 16;
                __m512bh both = _mm512_cvtne2ps_pbh((__m512)score[(t + 1) * N + n], (__m512)score[t * N + n]);
                score[t / 2 * N + n] = (vec)_mm512_permutexvar_epi16((__m512i)places, (__m512i)both);
            }
#endif
        for (long i = 0; i < room->value_room * N; i++) room->output[i] *= shrink[i % N];
#ifdef HAS_TILES
        for (long d = 0; room->turned && d < room->value_room; d += WIDTH)
            FN(outer_tiles)(room->output + d * N, room->turned + d * (BLOCK / PAIR), BLOCK / PAIR, score, BLOCK / PAIR, N);
        if (room->turned) continue;
#endif
        for (long d = 0; d < room->value_room; d += M) {
            FN(outer)(room->output + d * N, room->value + d, 1, room->value_room, score, BLOCK / PAIR, N);
        }
    }
    for (int n = 0; n < N; n++) {
        vec factor, total = sum[n];
        if (a->sinks) { /* a sink takes part in the softmax and has no value */
            vec sink = {0}, top;
            for (long i = 0; i < WIDTH; i++) sink[i] = a->sinks[tile->kv_head * group + (tile->row + n * WIDTH + i) % group];
            top = FN(max)(best[n], sink);
            total = total * FN(exp)(best[n] - top) + FN(exp)(sink - top);
            factor = FN(exp)(best[n] - top) / total;
        } else
            factor = 1.0f / total;
        for (long d = 0; d < a->value_dim; d += WIDTH) {
            ivec lanes[WIDTH];
            for (int i = 0; i < WIDTH; i++) lanes[i] = (ivec)(room->output[(d + i) * N + n] * factor);
            FN(transpose)(lanes);
            for (long i = 0; i < WIDTH && n * WIDTH + i < rows; i++) {
                long row = tile->row + n * WIDTH + i, head = tile->kv_head * group + row % group;
                E *to = (E *)a->output + ((tile->token + row / group) * a->heads + head) * a->value_dim + d;
                if (a->value_dim - d >= WIDTH)
                    FN(store)(to, (vec)lanes[i]);
                else
                    FN(store_part)(to, (vec)lanes[i], a->value_dim - d);
            }
        }
    }
}

/* Tile i of all, counted from the last: those see most keys, and come first. */
LOCAL int FN(flash_tile_at)(const attention *a, long i, flash_tile *tile) {
    long group = a->heads / a->kv_heads;
    for (long end = a->tokens, token; end > a->leading; end = token) {
        token = attention_begin(a, end);
        long rows = (end - token) * group, tiles = (rows + ROWS - 1) / ROWS;
        if (i >= tiles * a->kv_heads) {
            i -= tiles * a->kv_heads;
            continue;
        }
        long row = (tiles - 1 - i / a->kv_heads) * ROWS;
        *tile = (flash_tile){token, row, rows - row < ROWS ? rows - row : ROWS, i % a->kv_heads};
        return 1;
    }
    return 0;
}

/* Called by every thread of a team; all have finished when it returns. */
void FN(flash_team)(const attention *a) {
    FN(flash_room) room;
    room.key_units = (a->key_dim + PAIR - 1) / PAIR, room.value_room = (a->value_dim + WIDTH - 1) / WIDTH * WIDTH;
    uintptr_t memory = ((uintptr_t)(a->states + team_thread() * flash_room(a)) + 63) / 64 * 64;
    room.query = (vec *)memory, room.output = room.query + room.key_units * MOST;
    room.value = (uint32_t *)(room.output + room.value_room * MOST);
    room.key = room.value + room.value_room * BLOCK / PAIR;
    room.turned = NULL;
#ifdef HAS_TILES /* pairs leave room for the values once more */
    if (room.key_units % WIDTH == 0) {
        const long full[8] = {16, 16, 16, 16, 16, 16, 16, 16}, bytes[8] = {64, 64, 64, 64, 64, 64, 64, 64};
        room.turned = room.key + room.key_units * BLOCK;
        FN(shape_tiles)(full, bytes);
    }
#endif
    flash_tile tile;
    long tiles = 0;
    for (long token = a->leading, end; token < a->tokens; token = end) {
        end = attention_span(a, token);
        tiles += ((end - token) * (a->heads / a->kv_heads) + ROWS - 1) / ROWS * a->kv_heads;
    }
#pragma omp for schedule(dynamic, 1)
    for (long i = 0; i < tiles; i++) {
        if (!FN(flash_tile_at)(a, i, &tile)) continue;
        if (tile.rows <= WIDTH)
            FN(flash_rows)(a, &tile, &room, 1);
        else if (tile.rows <= 2 * WIDTH)
            FN(flash_rows)(a, &tile, &room, 2);
        else
            FN(flash_rows)(a, &tile, &room, MOST);
    }
#ifdef HAS_TILES
    if (room.turned) _tile_release();
#endif
}
#undef M
#undef CHAIN
#endif
