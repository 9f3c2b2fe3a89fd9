/* Arguments of `attention`; see attention.c for the layouts. */
#ifndef LLMOPT_ATTENTION_H
#define LLMOPT_ATTENTION_H
#include <stdint.h>

#define MAX_GROUP 8 /* query heads that share one pass over the keys */
#define MAX_DIM 512
#define SPLIT 256 /* tokens of a part */
#define SEES_ALL (-1)
#define BITS 32 /* tokens before those are seen */

typedef struct {
    const void *query, *keys, *values;
    const int32_t *table, *items;
    const float *sinks; /* [heads], or NULL */
    const int32_t *tree; /* [tokens], or NULL: bit j says whether a query sees the token j before its last; or SEES_ALL */
    void *output;
    float *states; /* attention_states(threads) floats */
    long tiled, leading; /* tokens of a span from which on it goes to flash.c; tokens of the spans before, which are shorter */
    long tokens, heads, kv_heads, key_dim, value_dim, page_size, table_width, query_token, query_head,
        longest; /* visible tokens of the longest item */
    int form; /* of quantized pages, see pages.h */
    float scaling, softcap; /* softcap 0: none */
} attention;

/* A span is items with the same row of the table, and no others have it: its ends are found by halving. Where the span ends
 * that begins at `token`, and where the one begins that ends at `end`. */
static inline long attention_span(const attention *a, long token) {
    long low = token + 1, high = a->tokens;
    while (low < high) {
        long middle = (low + high) / 2;
        if (a->items[3 * middle] == a->items[3 * token])
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}
static inline long attention_begin(const attention *a, long end) {
    long low = a->leading, high = end - 1;
    while (low < high) {
        long middle = (low + high) / 2;
        if (a->items[3 * middle] == a->items[3 * end - 3])
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}
static inline long attention_leading(const attention *a) {
    long token = 0, end;
    for (; token < a->tokens; token = end)
        if ((end = attention_span(a, token)) - token >= a->tiled) break;
    return token;
}

/* A job is a query token, a key head and up to MAX_GROUP of the query heads that share it. */
static inline long attention_blocks(const attention *a) {
    return (a->heads / a->kv_heads + MAX_GROUP - 1) / MAX_GROUP;
}
static inline long attention_parts(const attention *a) {
    return a->longest > SPLIT ? (a->longest + SPLIT - 1) / SPLIT : 1;
}
static inline long attention_room(const attention *a) { /* floats of a part's maxima, sums and values */
    return MAX_GROUP * (2 + (a->value_dim + 15) / 16 * 16);
}
static inline long attention_jobs(const attention *a) {
    return a->leading * a->kv_heads * attention_blocks(a);
}
/* With jobs enough for all threads, each does whole jobs and keeps the parts of one only. */
static inline int attention_many(const attention *a, int threads) {
    return attention_jobs(a) >= 4L * threads;
}
#define FLASH_ROWS 64  /* of a tile */
#define FLASH_TILES 16 /* that share what was made of a block of keys, at most */
#define FLASH_BLOCK 64 /* keys that a tile sees at a time */
static inline long flash_room(const attention *a) { /* floats of a thread: query and output, keys and values; alignment */
    long key = (a->key_dim + 15) / 16 * 16, value = (a->value_dim + 15) / 16 * 16;
    return (key + value) * (FLASH_TILES * FLASH_ROWS + FLASH_BLOCK) + 16;
}
static inline long attention_states(const attention *a, int threads) {
    long jobs = (attention_many(a, threads) ? threads : attention_jobs(a)) * attention_parts(a) * attention_room(a);
    long tiles = a->leading < a->tokens ? threads * flash_room(a) : 0;
    return jobs > tiles ? jobs : tiles;
}
#endif
