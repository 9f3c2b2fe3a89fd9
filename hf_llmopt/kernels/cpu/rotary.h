/* Arguments of `rotary`; see rotary.c for the layouts. */
#ifndef LLMOPT_ROTARY_H
#define LLMOPT_ROTARY_H
#include <stdint.h>

typedef struct {
    void *query;
    void *key;
    const void *value, *cosine, *sine;
    const int64_t *slots;
    void *keys, *values;
    long tokens, heads, kv_heads, key_dim, value_dim, rotated;
    int interleaved;
} rotary;
#endif
