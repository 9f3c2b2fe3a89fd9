/* Arguments of `rotary_head`; see rotary.c for the layouts. */
#ifndef LLMOPT_ROTARY_H
#define LLMOPT_ROTARY_H
#include <stdint.h>

typedef struct {
    void *query, *key;
    const void *value, *cosine, *sine;
    const int64_t *slots;
    void *keys, *values;
    long heads, kv_heads, key_dim, value_dim, rotated;
    long token, head; /* elements from one token, and from one head, of query, key and value to the next */
    long value_head;
    int pairs; /* which elements turn together */
    int form;  /* of quantized pages, see pages.h */
    int wide;  /* cosine and sine are float whatever the format, and nothing is rounded in between */
} rotary;
#endif
