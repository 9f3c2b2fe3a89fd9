/* Rotary position embedding (Su et al., 2021, eq. 34) of the queries in place and of the keys on their way into the pages,
 * with the roundings of the eager modules: R(R(x cos) + R(rotated x sin)).
 *
 * query    [tokens, heads, key_dim]        strides `token` and `head`; changed in place
 * key      [tokens, kv_heads, key_dim]     likewise; changed in place, then copied to its slot
 * value    [tokens, kv_heads, value_dim]   strides `token` and `value_head`; copied to its slot
 * cosine   [tokens, rotated]               or NULL for no rotation; sine alike
 * slots    [tokens]                        where keys and values go
 * keys     [slots, kv_heads, key_dim], values [slots, kv_heads, value_dim]
 *
 * Of each head the first `rotated` elements turn: elements (i, i + rotated / 2) by their entries of
 * cosine and sine (pairs 0), elements (2i, 2i + 1) by theirs (pairs 1), or both by entry i (pairs 2). */
#ifndef LLMOPT_ROTARY
#define LLMOPT_ROTARY
#include "rotary.h"
#define SELF "rotary.c"
#include "levels.h"
#elif defined(FORMAT)

INLINE float FN(round_one)(float v) {
    E stored;
    FN(put)(&stored, v);
    return FN(get)(&stored);
}

/* Elements i and j by entries p and q. */
INLINE void FN(turn)(E *x, const E *cosine, const E *sine, long i, long j, long p, long q) {
    float a = FN(get)(x + i), b = FN(get)(x + j);
    FN(put)(x + i, FN(round_one)(a * FN(get)(cosine + p)) + FN(round_one)(-b * FN(get)(sine + p)));
    FN(put)(x + j, FN(round_one)(b * FN(get)(cosine + q)) + FN(round_one)(a * FN(get)(sine + q)));
}

LOCAL void FN(turn_head)(const rotary *a, E *x, const E *cosine, const E *sine) {
    long half = a->rotated / 2, i = 0;
    if (a->pairs) {
        for (; i < half; i++)
            FN(turn)(x, cosine, sine, 2 * i, 2 * i + 1, a->pairs == 1 ? 2 * i : i, a->pairs == 1 ? 2 * i + 1 : i);
        return;
    }
    for (; i + WIDTH <= half; i += WIDTH) {
        vec low = FN(load)(x + i), high = FN(load)(x + half + i);
        FN(store)(x + i, FN(rounded)(low * FN(load)(cosine + i)) + FN(rounded)(-high * FN(load)(sine + i)));
        FN(store)(x + half + i, FN(rounded)(high * FN(load)(cosine + half + i)) +
                                    FN(rounded)(low * FN(load)(sine + half + i)));
    }
    for (; i < half; i++) FN(turn)(x, cosine, sine, i, half + i, i, half + i);
}

/* Head h of token t: the queries' heads come first, then those of the keys, whose values go along. */
void FN(rotary_head)(const rotary *a, long t, long h) {
    long k = h - a->heads;
    E *x = k < 0 ? (E *)a->query + t * a->token + h * a->head : (E *)a->key + t * a->token + k * a->head;
    if (a->cosine)
        FN(turn_head)(a, x, (const E *)a->cosine + t * a->rotated, (const E *)a->sine + t * a->rotated);
    if (k < 0) return;
    long row = a->slots[t] * a->kv_heads + k;
    memcpy((E *)a->keys + row * a->key_dim, x, (size_t)a->key_dim * sizeof(E));
    memcpy((E *)a->values + row * a->value_dim, (const E *)a->value + t * a->token + k * a->value_head,
           (size_t)a->value_dim * sizeof(E));
}
#endif
