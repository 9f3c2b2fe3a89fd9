/* The long spans of attention.c, after FlashAttention (Dao et al. 2022): no matrix of scores is stored.
 *
 * A tile is ROWS query rows of one span and one key head, a row being a token and a query head. It sees the keys block by
 * block, which some neighbouring tiles share, with the online softmax of Milakov and Gimelshein (2018). Rows stand in the
 * lanes of vectors, so that maxima and sums need no exchange between lanes. Blocks count from the request's first token, and
 * one that a row does not see leaves it as it is: its result does not depend on its tile.
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
#define TILES FLASH_TILES
#define EACH 8 /* groups of tiles that a thread has at least, so that none waits long */
typedef struct {
    long token, row, rows, kv_head; /* the span's first token, and the tiles' rows in it */
} flash_tiles;
#define SELF "flash.c"
#include "levels.h"
#elif defined(FORMAT)
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

#include "outer.h"
#include "pages.h"

/* A tile: its rows in the span, which tokens they see, the sums so far, and the tokens that any and that all of them see. */
typedef struct FN(flash_tile) {
    vec *query, *output, best[MOST], sum[MOST];
    ivec first[MOST], end[MOST], bits[MOST];
    long row, rows, low, high, all_first, all_end;
} FN(flash_tile);

/* What a thread works with. */
typedef struct FN(flash_room) {
    FN(flash_tile) tiles[TILES];
    vec score[BLOCK * MOST];
    uint32_t *key, *value, *turned; /* turned: the values, where tiles multiply; or NULL */
    long key_units, value_room; /* of a key; of an output, in whole vectors */
} FN(flash_room);

/* Rows of a tile, transposed; scores are scaled afterwards, so that nothing is rounded. Missing rows are 0. */
INLINE void FN(flash_query)(const attention *a, const flash_tiles *all, const FN(flash_tile) * tile, long units, const int N) {
    long group = a->heads / a->kv_heads, rows = tile->rows;
    for (int n = 0; n < N; n++) {
        FN(element) line[WIDTH][MAX_DIM + PAIR * WIDTH] = {0};
        for (long i = 0; i < WIDTH && n * WIDTH + i < rows; i++) {
            long row = tile->row + n * WIDTH + i, head = all->kv_head * group + row % group;
            FN(query_row)(a, all->token + row / group, head, line[i]);
        }
        for (long k = 0; k < units; k += WIDTH) {
            ivec lanes[WIDTH];
            for (int i = 0; i < WIDTH; i++) memcpy(lanes + i, line[i] + k * PAIR, sizeof *lanes);
            FN(transpose)(lanes);
            for (long i = 0; i < WIDTH && k + i < units; i++) tile->query[(k + i) * N + n] = (vec)lanes[i];
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

/* Whether scores are kept as products, of which the largest is the largest score. */
INLINE int FN(scaled_later)(const attention *a) {
    return a->softcap <= 0 && a->scaling > 0;
}

/* Scores of a block become weights, and pairs of them units; `shrink` is what the output so far is worth now. */
INLINE void FN(flash_softmax)(const attention *a, vec *score, long from, const ivec *first, const ivec *end,
                              const ivec *bits, int whole, vec *best, vec *sum, vec *shrink, const int N) {
    const int plain = FN(scaled_later)(a);
    const float scaling = plain ? a->scaling : 1.0f;
    for (int n = 0; n < N; n++) {
        vec top = FN(splat)(-3.4e38f), total = {0};
        for (int t = 0; t < BLOCK; t++) {
            vec s = score[t * N + n];
            if (!plain) s *= a->scaling;
            if (a->softcap > 0) s = FN(capped)(s, a->softcap);
            if (!whole) {
                ivec at = (int32_t)(from + t) - (ivec){0}, seen = (at >= first[n]) & (at < end[n]), back = end[n] - 1 - at;
                if (a->tree) seen &= (back >= BITS) | ((bits[n] >> (back & (BITS - 1)) & 1) != 0);
                s = (vec)(((ivec)s & seen) | ((ivec)FN(splat)(-INFINITY) & ~seen));
            }
            if (!plain || !whole) score[t * N + n] = s;
            top = FN(max)(top, s);
        }
        top = FN(max)(best[n], top);
        /* Differences are scaled, not scores: the largest is 0 then, however large the scores are. */
#if PAIR == 2
        const float base_2 = scaling * 1.44269504f;
        for (int t = 0; t < BLOCK; t += 2) {
            vec w[2];
            for (int i = 0; i < 2; i++) {
                vec s = score[(t + i) * N + n];
                w[i] = FN(exp2_rough)((s - top) * base_2);
                if (!whole) w[i] = (vec)((ivec)w[i] & (s != -INFINITY));
                total += w[i];
            }
            const uvec low = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, places = low | (low + 16) << 16;
            __m512bh both = _mm512_cvtne2ps_pbh((__m512)w[1], (__m512)w[0]);
            score[t / 2 * N + n] = (vec)_mm512_permutexvar_epi16((__m512i)places, (__m512i)both);
        }
#else
        for (int t = 0; t < BLOCK; t++) {
            vec s = score[t * N + n], w = FN(exp)((s - top) * scaling);
            if (!whole) w = (vec)((ivec)w & (s != -INFINITY));
            score[t * N + n] = w;
            total += w;
        }
#endif
        shrink[n] = FN(exp)((best[n] - top) * scaling);
        best[n] = top, sum[n] = sum[n] * shrink[n] + total;
    }
}

INLINE void FN(begin_rows)(const attention *a, const flash_tiles *all, FN(flash_tile) * tile, const FN(flash_room) * room, const int N) {
    long group = a->heads / a->kv_heads;
    int32_t limits[3][ROWS] = {0};
    tile->low = INT32_MAX, tile->high = 0, tile->all_first = 0, tile->all_end = INT32_MAX;
    for (long i = 0; i < tile->rows; i++) {
        const long token = all->token + (tile->row + i) / group;
        const int32_t *item = a->items + 3 * token;
        long first = limits[0][i] = item[1], end = limits[1][i] = item[2];
        if (first < tile->low) tile->low = first;
        if (first > tile->all_first) tile->all_first = first;
        if (end > tile->high) tile->high = end;
        limits[2][i] = a->tree ? a->tree[token] : SEES_ALL;
        if (limits[2][i] != SEES_ALL) end -= BITS;
        if (end < tile->all_end) tile->all_end = end;
    }
    memcpy(tile->first, limits[0], sizeof tile->first);
    memcpy(tile->end, limits[1], sizeof tile->end);
    memcpy(tile->bits, limits[2], sizeof tile->bits);
    for (int n = 0; n < N; n++) tile->best[n] = FN(splat)(-3.4e38f), tile->sum[n] = (vec){0};
    memset(tile->output, 0, (size_t)(room->value_room * N) * sizeof *tile->output);
    FN(flash_query)(a, all, tile, room->key_units, N);
}

/* Whether any of a block's factors is not 1: later ones seldom bring a larger score. */
INLINE int FN(differs)(vec factor) {
    ivec not_one = factor != 1.0f, any = {0};
    return memcmp(&not_one, &any, sizeof any) != 0;
}

/* The block at `from`, whose keys and values are there. */
INLINE void FN(step_rows)(const attention *a, FN(flash_tile) * tile, FN(flash_room) * room, long from, const int N) {
    int whole = from >= tile->all_first && from + BLOCK <= tile->all_end;
    vec *score = room->score, shrink[MOST];
#ifdef HAS_TILES
    if (room->turned) {
        for (int t = 0; t < BLOCK; t += WIDTH)
            FN(outer_tiles)(score + t * N, room->key + t * room->key_units, room->key_units, tile->query, room->key_units, 0, N);
    } else
#endif
    {
        for (int t = 0; t < BLOCK; t += M)
            FN(outer)(score + t * N, room->key + t * room->key_units, room->key_units, 1, tile->query, room->key_units, 0, N);
    }
    FN(flash_softmax)(a, score, from, tile->first, tile->end, tile->bits, whole, tile->best, tile->sum, shrink, N);
    for (int n = 0; n < N; n++)
        if (FN(differs)(shrink[n]))
            for (long d = 0; d < room->value_room; d++) tile->output[d * N + n] *= shrink[n];
#ifdef HAS_TILES
    for (long d = 0; room->turned && d < room->value_room; d += WIDTH)
        FN(outer_tiles)(tile->output + d * N, room->turned + d * (BLOCK / PAIR), BLOCK / PAIR, score, BLOCK / PAIR, 1, N);
    if (room->turned) return;
#endif
    for (long d = 0; d < room->value_room; d += M)
        FN(outer)(tile->output + d * N, room->value + d, 1, room->value_room, score, BLOCK / PAIR, 1, N);
}

INLINE void FN(end_rows)(const attention *a, const flash_tiles *all, const FN(flash_tile) * tile, const int N) {
    long group = a->heads / a->kv_heads, rows = tile->rows;
    for (int n = 0; n < N; n++) {
        vec factor, best = tile->best[n] * (FN(scaled_later)(a) ? a->scaling : 1.0f), total = tile->sum[n];
        if (a->sinks) { /* a sink takes part in the softmax and has no value */
            vec sink = {0}, top;
            for (long i = 0; i < WIDTH; i++) sink[i] = a->sinks[all->kv_head * group + (tile->row + n * WIDTH + i) % group];
            top = FN(max)(best, sink);
            total = total * FN(exp)(best - top) + FN(exp)(sink - top);
            factor = FN(exp)(best - top) / total;
        } else
            factor = 1.0f / total;
        for (long d = 0; d < a->value_dim; d += WIDTH) {
            ivec lanes[WIDTH];
            for (int i = 0; i < WIDTH; i++) lanes[i] = (ivec)(tile->output[(d + i) * N + n] * factor);
            FN(transpose)(lanes);
            for (long i = 0; i < WIDTH && n * WIDTH + i < rows; i++) {
                long row = tile->row + n * WIDTH + i, head = all->kv_head * group + row % group;
                E *to = (E *)a->output + ((all->token + row / group) * a->heads + head) * a->value_dim + d;
                if (a->value_dim - d >= WIDTH)
                    FN(store)(to, (vec)lanes[i]);
                else
                    FN(store_part)(to, (vec)lanes[i], a->value_dim - d);
            }
        }
    }
}

/* What is compiled for the vectors that a tile has. */
#define BY_VECTORS(CALL)                                                                                               \
    if (tile->rows <= WIDTH) {                                                                                         \
        const int N = 1;                                                                                               \
        CALL;                                                                                                          \
    } else if (tile->rows <= 2 * WIDTH) {                                                                              \
        const int N = 2;                                                                                               \
        CALL;                                                                                                          \
    } else {                                                                                                           \
        const int N = MOST;                                                                                            \
        CALL;                                                                                                          \
    }
LOCAL void FN(flash_begin)(const attention *a, const flash_tiles *all, FN(flash_tile) * tile, const FN(flash_room) * room) {
    BY_VECTORS(FN(begin_rows)(a, all, tile, room, N))
}

LOCAL void FN(flash_step)(const attention *a, FN(flash_tile) * tile, FN(flash_room) * room, long from) {
    BY_VECTORS(FN(step_rows)(a, tile, room, from, N))
}

LOCAL void FN(flash_end)(const attention *a, const flash_tiles *all, const FN(flash_tile) * tile) {
    BY_VECTORS(FN(end_rows)(a, all, tile, N))
}
#undef BY_VECTORS

LOCAL void FN(flash_rows)(const attention *a, const flash_tiles *all, FN(flash_room) * room) {
    long low = INT32_MAX, high = 0, count = (all->rows + ROWS - 1) / ROWS;
    const int32_t *pages = a->table + a->items[3 * all->token] * a->table_width;
    for (long i = 0; i < count; i++) {
        FN(flash_tile) *tile = room->tiles + i;
        tile->row = all->row + i * ROWS, tile->rows = all->rows - i * ROWS < ROWS ? all->rows - i * ROWS : ROWS;
        FN(flash_begin)(a, all, tile, room);
        low = tile->low < low ? tile->low : low, high = tile->high > high ? tile->high : high;
    }
    for (long from = low / BLOCK * BLOCK; from < high; from += BLOCK) {
        FN(flash_block)(a, pages, all->kv_head, room, from, low, high);
#ifdef HAS_TILES
        if (room->turned) FN(turn)(room->value, room->value_room, room->turned);
#endif
        for (long i = 0; i < count; i++)
            if (from + BLOCK > room->tiles[i].low && from < room->tiles[i].high) FN(flash_step)(a, room->tiles + i, room, from);
    }
    for (long i = 0; i < count; i++) FN(flash_end)(a, all, room->tiles + i);
}

/* Group i of `together` tiles of all, counted from the last: those see most keys, and come first. */
LOCAL int FN(flash_tiles_at)(const attention *a, long i, long together, flash_tiles *tiles) {
    long group = a->heads / a->kv_heads, most = together * ROWS;
    for (long end = a->tokens, token; end > a->leading; end = token) {
        token = attention_begin(a, end);
        long rows = (end - token) * group, groups = (rows + most - 1) / most;
        if (i >= groups * a->kv_heads) {
            i -= groups * a->kv_heads;
            continue;
        }
        long row = (groups - 1 - i / a->kv_heads) * most;
        *tiles = (flash_tiles){token, row, rows - row < most ? rows - row : most, i % a->kv_heads};
        return 1;
    }
    return 0;
}

/* Groups of all spans. */
LOCAL long FN(flash_groups)(const attention *a, long together) {
    long found = 0, most = together * ROWS;
    for (long token = a->leading, end; token < a->tokens; token = end) {
        end = attention_span(a, token);
        found += ((end - token) * (a->heads / a->kv_heads) + most - 1) / most * a->kv_heads;
    }
    return found;
}

/* Called by every thread of a team; all have finished when it returns. */
void FN(flash_team)(const attention *a) {
    FN(flash_room) room;
    room.key_units = (a->key_dim + PAIR - 1) / PAIR, room.value_room = (a->value_dim + WIDTH - 1) / WIDTH * WIDTH;
    uintptr_t memory = ((uintptr_t)(a->states + team_thread() * flash_room(a)) + 63) / 64 * 64;
    vec *next = (vec *)memory;
    for (long i = 0; i < TILES; i++) {
        room.tiles[i].query = next, room.tiles[i].output = next + room.key_units * MOST;
        next = room.tiles[i].output + room.value_room * MOST;
    }
    room.value = (uint32_t *)next;
    room.key = room.value + room.value_room * BLOCK / PAIR;
    room.turned = NULL;
#ifdef HAS_TILES /* pairs leave room for the values once more */
    if (room.key_units % WIDTH == 0) {
        const long full[8] = {16, 16, 16, 16, 16, 16, 16, 16}, bytes[8] = {64, 64, 64, 64, 64, 64, 64, 64};
        room.turned = room.key + room.key_units * BLOCK;
        FN(shape_tiles)(full, bytes);
    }
#endif
    /* With AMX making a block takes long beside its products, and the second cache holds 2 MB. */
    long together = room.turned ? TILES : TILES / 4, groups;
    while ((groups = FN(flash_groups)(a, together)) < EACH * team_size() && together > 1) together /= 2;
#pragma omp for schedule(dynamic, 1)
    for (long i = 0; i < groups; i++) {
        flash_tiles tiles;
        if (FN(flash_tiles_at)(a, i, together, &tiles)) FN(flash_rows)(a, &tiles, &room);
    }
#ifdef HAS_TILES
    if (room.turned) _tile_release();
#endif
}
#undef M
#undef CHAIN
#endif
