/* Arguments of `attention`; see attention.c for the layouts. */
#ifndef LLMOPT_ATTENTION_H
#define LLMOPT_ATTENTION_H
#include <stdint.h>

#define MAX_GROUP 8 /* query heads that share one pass over the keys */
#define MAX_DIM 512
#define SPLIT 1024 /* tokens of a part */

typedef struct {
    const void *query, *keys, *values;
    const int32_t *table, *items;
    const float *sinks; /* [heads], or NULL */
    void *output;
    long tokens, heads, kv_heads, key_dim, value_dim, page_size, table_width, query_token, query_head, most_parts,
        longest; /* visible tokens of the longest item */
    float scaling, softcap; /* softcap 0: none */
} attention;
#endif
