/* Rotary position embedding (Su et al., 2021, eq. 34) of the queries in place and of the keys on their way into the pages,
 * with the roundings of the eager modules: R(R(x cos) + R(rotated x sin)).
 *
 * query    [tokens, heads, key_dim]        contiguous, changed in place
 * key      [tokens, kv_heads, key_dim]     contiguous, changed in place, then copied to its slot
 * value    [tokens, kv_heads, value_dim]   contiguous
 * cosine   [tokens, rotated]               or NULL for no rotation; sine alike
 * slots    [tokens]                        where keys and values go
 * keys     [slots, kv_heads, key_dim], values [slots, kv_heads, value_dim]
 *
 * Of each head the first `rotated` elements turn: pairs (i, i + rotated / 2), or (2i, 2i + 1) if interleaved. */
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

INLINE void FN(turn)(E *x, const E *cosine, const E *sine, long i, long j) {
    float a = FN(get)(x + i), b = FN(get)(x + j);
    FN(put)(x + i, FN(round_one)(a * FN(get)(cosine + i)) + FN(round_one)(-b * FN(get)(sine + i)));
    FN(put)(x + j, FN(round_one)(b * FN(get)(cosine + j)) + FN(round_one)(a * FN(get)(sine + j)));
}

LOCAL void FN(turn_head)(const rotary *a, E *x, const E *cosine, const E *sine) {
    long half = a->rotated / 2, i = 0;
    if (a->interleaved) {
        for (; i < half; i++) FN(turn)(x, cosine, sine, 2 * i, 2 * i + 1);
        return;
    }
    for (; i + WIDTH <= half; i += WIDTH) {
        vec low = FN(load)(x + i), high = FN(load)(x + half + i);
        FN(store)(x + i, FN(rounded)(low * FN(load)(cosine + i)) + FN(rounded)(-high * FN(load)(sine + i)));
        FN(store)(x + half + i, FN(rounded)(high * FN(load)(cosine + half + i)) +
                                    FN(rounded)(low * FN(load)(sine + half + i)));
    }
    for (; i < half; i++) FN(turn)(x, cosine, sine, i, half + i);
}

int FN(rotary)(const void *arguments, int threads) {
    const rotary *a = arguments;
    (void)threads; /* a few thousand elements: not worth waking a thread */
    for (long t = 0; t < a->tokens; t++) {
        const E *cosine = (const E *)a->cosine + t * a->rotated, *sine = (const E *)a->sine + t * a->rotated;
        E *query = (E *)a->query + t * a->heads * a->key_dim, *key = (E *)a->key + t * a->kv_heads * a->key_dim;
        if (a->cosine) {
            for (long h = 0; h < a->heads; h++) FN(turn_head)(a, query + h * a->key_dim, cosine, sine);
            for (long h = 0; h < a->kv_heads; h++) FN(turn_head)(a, key + h * a->key_dim, cosine, sine);
        }
        size_t key_size = (size_t)(a->kv_heads * a->key_dim), value_size = (size_t)(a->kv_heads * a->value_dim);
        memcpy((E *)a->keys + (size_t)a->slots[t] * key_size, key, key_size * sizeof(E));
        memcpy((E *)a->values + (size_t)a->slots[t] * value_size, (const E *)a->value + (size_t)t * value_size,
               value_size * sizeof(E));
    }
    return 0;
}
#endif
