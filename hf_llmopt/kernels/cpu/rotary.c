/* Rotary position embedding (Su et al., 2021) of the queries in place and of the keys on their way into the pages,
 * with the roundings of the eager modules: R(R(x cos) + R(rotated x sin)), or R(x cos + rotated x sin) where cosine and sine are
 * float32 beside another format (OLMo, Ernie).
 *
 * query    [tokens, heads, key_dim]        strides `token` and `head`; changed in place
 * key      [tokens, kv_heads, key_dim]     likewise; changed in place, then copied to its slot
 * value    [tokens, kv_heads, value_dim]   strides `token` and `value_head`; copied to its slot
 * cosine   [tokens, rotated]               float if `wide`; NULL for no rotation; sine alike
 * slots    [tokens]                        where keys and values go
 * keys     [slots, kv_heads, key_dim], values [slots, kv_heads, value_dim]; or both as pages.h says
 *
 * Of each head the first `rotated` elements turn: elements (i, i + rotated / 2) by their entries of
 * cosine and sine (pairs 0), elements (2i, 2i + 1) by theirs (pairs 1), or both by entry i (pairs 2). */
#ifndef LLMOPT_ROTARY
#define LLMOPT_ROTARY
#include "attention.h"
#include "rotary.h"
#define SELF "rotary.c"
#include "levels.h"
#elif defined(FORMAT)
#include "pages.h"

/* x[i] and x[j] by entries p and q. */
INLINE void FN(turn)(E *x, const float *cosine, const float *sine, long i, long j, long p, long q, int wide) {
    float a = FN(get)(x + i), b = FN(get)(x + j);
    E part[4];
    float full[4] = {a * cosine[p], -b * sine[p], b * cosine[q], a * sine[q]};
    if (!wide)
        for (int n = 0; n < 4; n++) FN(put)(part + n, full[n]), full[n] = FN(get)(part + n);
    FN(put)(x + i, full[0] + full[1]);
    FN(put)(x + j, full[2] + full[3]);
}

INLINE vec FN(maybe_rounded)(vec v, int wide) {
    return wide ? v : FN(rounded)(v);
}

LOCAL void FN(turn_head)(const rotary *a, E *x, const float *cosine, const float *sine) {
    long half = a->rotated / 2, i = 0;
    if (a->pairs) {
        for (; i < half; i++)
            FN(turn)(x, cosine, sine, 2 * i, 2 * i + 1, a->pairs == 1 ? 2 * i : i, a->pairs == 1 ? 2 * i + 1 : i, a->wide);
        return;
    }
    for (; i + WIDTH <= half; i += WIDTH) {
        vec low = FN(load)(x + i), high = FN(load)(x + half + i), turn[4];
        memcpy(turn, cosine + i, sizeof *turn), memcpy(turn + 1, sine + i, sizeof *turn);
        memcpy(turn + 2, cosine + half + i, sizeof *turn), memcpy(turn + 3, sine + half + i, sizeof *turn);
        FN(store)(x + i, FN(maybe_rounded)(low * turn[0], a->wide) + FN(maybe_rounded)(-high * turn[1], a->wide));
        FN(store)(x + half + i, FN(maybe_rounded)(high * turn[2], a->wide) + FN(maybe_rounded)(low * turn[3], a->wide));
    }
    for (; i < half; i++) FN(turn)(x, cosine, sine, i, half + i, i, half + i, a->wide);
}

/* Head h of token t: the queries' heads come first, then those of the keys, whose values go along. */
void FN(rotary_head)(const rotary *a, long t, long h) {
    long k = h - a->heads;
    E *x = k < 0 ? (E *)a->query + t * a->token + h * a->head : (E *)a->key + t * a->token + k * a->head;
    if (a->wide)
        FN(turn_head)(a, x, (const float *)a->cosine + t * a->rotated, (const float *)a->sine + t * a->rotated);
    else if (a->cosine) {
        float cosine[MAX_DIM], sine[MAX_DIM];
        for (long i = 0; i < a->rotated; i++) {
            cosine[i] = FN(get)((const E *)a->cosine + t * a->rotated + i);
            sine[i] = FN(get)((const E *)a->sine + t * a->rotated + i);
        }
        FN(turn_head)(a, x, cosine, sine);
    }
    if (k < 0) return;
    long slot = a->slots[t], row = slot * a->kv_heads + k;
    if (a->form) {
        FN(pack_head)(x, (uint8_t *)a->keys + slot * page_row(a->form, a->kv_heads, a->key_dim), a->form,
                      a->form == INT4_PAGES, a->kv_heads, a->key_dim, k);
        FN(pack_head)((const E *)a->value + t * a->token + k * a->value_head,
                      (uint8_t *)a->values + slot * page_row(a->form, a->kv_heads, a->value_dim), a->form, 0, a->kv_heads,
                      a->value_dim, k);
        return;
    }
    memcpy((E *)a->keys + row * a->key_dim, x, (size_t)a->key_dim * sizeof(E));
    memcpy((E *)a->values + row * a->value_dim, (const E *)a->value + t * a->token + k * a->value_head,
           (size_t)a->value_dim * sizeof(E));
}
#endif
