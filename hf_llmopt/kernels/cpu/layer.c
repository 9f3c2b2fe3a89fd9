/* Decoder layers in one parallel region: its threads meet a dozen times a layer instead of being woken as often.
 *
 *   a = x + after_attention(output(attention(rotary(query, key, value of before_attention(x)))))
 *   y = a + after_mlp(down(act(gate(z)) * up(z)))    with z = before_mlp(a)       (parallel 0)
 *                                                         z = before_mlp(x)       (parallel 1)
 *                                                         z = before_attention(x) (parallel 2)
 *
 * x, y   [tokens, hidden]   contiguous; every operation rounds as its own file says */
#ifndef LLMOPT_LAYER
#define LLMOPT_LAYER
#include "layer.h"
#include "types.h"
#ifdef _OPENMP
#define now() omp_get_wtime()
#else
#include <time.h>
#define now() ((double)clock() / CLOCKS_PER_SEC)
#endif
enum { PRODUCTS, ATTENTION, OTHERS };
#define SMALL 32768 /* weights below which waking a thread costs more than it saves */
#define SELF "layer.c"
#include "levels.h"
#elif defined(FORMAT)

extern void FN(norm_row)(const norm *, const void *, void *);
extern void FN(linear_prepare)(const linear *);
extern void FN(linear_range)(const linear *, long, long, long *, long *);
extern void FN(linear_share)(const linear *, long, long);
extern void FN(rotary_head)(const rotary *, long, long);
extern void FN(attention_team)(const attention *, int);
extern void FN(activation_part)(const void *, const void *, void *, long, int);

/* What the first thread did since `*since` counts as `part`. */
INLINE void FN(count)(double *spent, double *since, int part) {
    if (!spent || team_thread()) return;
    double time = now();
    spent[part] += time - *since;
    *since = time;
}

/* y = x + after(product(z)), or without the norm. */
INLINE void FN(add_product)(const linear *product, const norm *after, double *spent, double *since) {
    FN(linear_prepare)(product);
    FN(linear_share)(product, team_thread(), team_size());
#pragma omp barrier
    FN(count)(spent, since, PRODUCTS);
    if (!after->width) return;
#pragma omp for schedule(static)
    for (long m = 0; m < product->rows; m++) {
        E *y = (E *)after->y + m * after->width;
        FN(norm_row)(after, (const E *)product->y + m * after->width, y);
        for (long i = 0; i < after->width; i++) FN(put)(y + i, FN(get)(y + i) + FN(get)((const E *)after->x + m * after->width + i));
    }
}

/* The product's input: normed rows of `from`, laid out for the product. */
INLINE void FN(normed)(const norm *before, const E *from, const linear *product) {
    if (before->width) {
#pragma omp for schedule(static)
        for (long m = 0; m < product->rows; m++)
            FN(norm_row)(before, from + m * product->inputs, (E *)product->x + m * product->inputs);
    }
    FN(linear_prepare)(product);
}

/* A product after another one of the same x, which is laid out again only if it has to lie otherwise. */
INLINE void FN(share_after)(const linear *before, const linear *product) {
    if (!linear_alike(before, product)) {
#pragma omp barrier
        FN(linear_prepare)(product);
    }
    FN(linear_share)(product, team_thread(), team_size());
}

LOCAL void FN(layer_team)(const layer *a, int threads, double *spent) {
    double since = spent ? now() : 0;
    long t = team_thread(), n = team_size(), tokens = a->query.rows, heads = a->turns.heads + a->turns.kv_heads;
    FN(normed)(&a->before_attention, a->x, &a->query);
    FN(count)(spent, &since, OTHERS);
    FN(linear_share)(&a->query, t, n);
    if (a->key.weight) {
        FN(share_after)(&a->query, &a->key);
        FN(share_after)(&a->key, &a->value);
    }
#pragma omp barrier
    FN(count)(spent, &since, PRODUCTS);
    const rotary *turns = &a->turns;
    int whole = a->query_norm.width > turns->key_dim || a->key_norm.width > turns->key_dim;
    if (whole) { /* norms over all heads of a token at once */
#pragma omp for schedule(static)
        for (long i = 0; i < 2 * tokens; i++) {
            E *row = (E *)(i < tokens ? turns->query : turns->key) + i % tokens * turns->token;
            FN(norm_row)(i < tokens ? &a->query_norm : &a->key_norm, row, row);
        }
    }
#pragma omp for schedule(static)
    for (long i = 0; i < tokens * heads; i++) {
        long token = i / heads, h = i % heads, k = h - turns->heads;
        const norm *over = k < 0 ? &a->query_norm : &a->key_norm;
        E *head = k < 0 ? (E *)turns->query + token * turns->token + h * turns->head
                        : (E *)turns->key + token * turns->token + k * turns->head;
        if (over->width && !whole) FN(norm_row)(over, head, head);
        FN(rotary_head)(turns, token, h);
    }
    FN(count)(spent, &since, OTHERS);
    FN(attention_team)(&a->attention, threads);
    FN(count)(spent, &since, ATTENTION);
    FN(add_product)(&a->output, &a->after_attention, spent, &since);
    FN(normed)(&a->before_mlp, a->parallel ? a->x : a->after_mlp.x, &a->gate);
    FN(count)(spent, &since, OTHERS);
    FN(linear_share)(&a->gate, t, n);
    if (a->up.weight) FN(share_after)(&a->gate, &a->up);
    FN(count)(spent, &since, PRODUCTS);
    long from, to; /* a thread's outputs of gate and up are the same */
    FN(linear_range)(&a->gate, t, n, &from, &to);
    for (long m = 0; m < tokens && from < to; m++) {
        E *gate = (E *)a->gate.y + m * a->gate.stride + from;
        FN(activation_part)(gate, a->up.weight ? (const E *)a->up.y + m * a->up.stride + from : 0, gate, to - from, a->kind);
    }
#pragma omp barrier
    FN(count)(spent, &since, OTHERS);
    FN(add_product)(&a->down, &a->after_mlp, spent, &since);
    FN(count)(spent, &since, OTHERS);
}

/* Room for what lies between the operations, one after the other; NULL while only its size is counted. */
typedef struct FN(space) {
    char *start;
    size_t used;
} *FN(space);

INLINE void *FN(take)(FN(space) space, size_t bytes) {
    void *room = space->start ? space->start + space->used : NULL;
    space->used += (bytes + LINE - 1) / LINE * LINE;
    return room;
}

/* Where a layer's operations read and write, in memory that every layer uses anew. */
LOCAL void FN(place)(layer *a, const stack *all, int threads, FN(space) space) {
    attention *seen = &a->attention;
    linear *products[] = {&a->query, &a->key, &a->value, &a->output, &a->gate, &a->up, &a->down};
    long tokens = all->tokens, hidden = all->hidden, widest = 0;
    long joined = a->query.outputs + a->key.outputs + a->value.outputs;
    for (int i = 0; i < 7; i++)
        if (products[i]->laid > widest) widest = products[i]->laid;
    size_t row = (size_t)tokens * sizeof(E);
    E *normed = FN(take)(space, row * (size_t)hidden), *made = FN(take)(space, row * (size_t)hidden);
    E *sum = FN(take)(space, row * (size_t)hidden), *qkv = FN(take)(space, row * (size_t)joined);
    E *attended = FN(take)(space, row * (size_t)a->output.inputs);
    E *gate = FN(take)(space, row * (size_t)a->gate.outputs), *up = FN(take)(space, row * (size_t)a->up.outputs);
    void *scratch = FN(take)(space, linear_scratch(tokens, widest));
    seen->leading = attention_leading(seen);
    seen->states = FN(take)(space, (size_t)attention_states(seen, threads) * sizeof(float));
    if (!space->start) return;
    E *inner = a->before_attention.width ? normed : (E *)a->x;
    a->query.x = a->key.x = a->value.x = inner;
    a->query.y = qkv, a->key.y = qkv + a->query.outputs, a->value.y = (E *)a->key.y + a->key.outputs;
    a->query.stride = a->key.stride = a->value.stride = a->turns.token = seen->query_token = joined;
    a->turns.query = qkv;
    a->turns.key = a->key.weight ? a->key.y : qkv + (intptr_t)a->turns.key;
    a->turns.value = a->value.weight ? a->value.y : qkv + (intptr_t)a->turns.value;
    seen->query = qkv, seen->query_head = a->turns.head, seen->output = attended;
    a->output.x = attended, a->gate.y = gate, a->down.x = gate, a->up.y = up;
    a->output.residual = a->after_attention.width ? NULL : a->x;
    a->output.y = a->after_attention.width ? made : sum;
    a->after_attention.x = a->x, a->after_attention.y = sum;
    a->gate.x = a->up.x = a->parallel == 2 ? inner : a->before_mlp.width ? normed : sum;
    a->down.residual = a->after_mlp.width ? NULL : sum;
    a->down.y = a->after_mlp.width ? made : a->y;
    a->after_mlp.x = sum, a->after_mlp.y = a->y;
    for (int i = 0; i < 7; i++) {
        products[i]->rows = tokens, products[i]->scratch = scratch;
        if (i >= 3) products[i]->stride = products[i]->outputs;
    }
}

int FN(layers)(const void *arguments, int threads) {
    const stack *all = arguments;
    size_t most = 0;
    for (long i = 0; i < all->count; i++) { /* how much, then where */
        struct FN(space) space = {0};
        FN(place)(all->layers + i, all, threads, &space);
        if (space.used > most) most = space.used;
    }
    void *memory = malloc(most + LINE);
    if (!memory) return 1;
    char *start = next_line(memory);
    for (long i = 0; i < all->count; i++) {
        struct FN(space) space = {start, 0};
        all->layers[i].x = i ? all->y : all->x, all->layers[i].y = all->y;
        FN(place)(all->layers + i, all, threads, &space);
    }
#pragma omp parallel num_threads(threads) if (threads > 1 && all->hidden * all->layers->gate.outputs > SMALL)
    for (long i = 0; i < all->count; i++) FN(layer_team)(all->layers + i, threads, all->spent);
    free(memory);
    return 0;
}
#endif
