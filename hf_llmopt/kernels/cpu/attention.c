/* Attention of short spans over pages: single tokens, or the tokens of one request that are verified together.
 *
 * One work item is a query token and a key head with the query heads that share it. Keys stream through once, in blocks
 * of WIDTH tokens, with the online softmax of Milakov and Gimelshein (2018): running maximum m, sum l and weighted values.
 * A long context is split into parts of SPLIT tokens, so that all threads have work; the split depends on the context's
 * length alone, so a request's result does not depend on its neighbours.
 *
 * query   [tokens, heads, key_dim]           any strides between tokens and heads
 * keys    [slots, kv_heads, key_dim]         contiguous
 * values  [slots, kv_heads, value_dim]       contiguous
 * table   [rows, pages]                      page ids of each request
 * items   [tokens, 3]                        row of the table, first visible token, end of the visible tokens
 * output  [tokens, heads, value_dim]         contiguous */
#ifndef LLMOPT_ATTENTION
#define LLMOPT_ATTENTION
#include "attention.h"
#define SMALL 65536 /* multiplications below which waking a thread costs more than it saves */
#define SELF "attention.c"
#include "levels.h"
#elif defined(FORMAT)

/* Scores of up to WIDTH tokens against `heads` queries: each sum has one accumulator and one order. */
INLINE void FN(scores)(const attention *a, const float *query, int heads, const E *const *key, int count,
                       float (*score)[WIDTH]) {
    long dim = a->key_dim, tail = dim % WIDTH;
    for (int t = 0; t < count; t++) {
        vec sums[MAX_GROUP];
        for (int g = 0; g < heads; g++) sums[g] = FN(splat)(0);
        for (long d = 0; d + WIDTH <= dim; d += WIDTH) {
            vec k = FN(load)(key[t] + d);
            for (int g = 0; g < heads; g++) {
                vec q;
                memcpy(&q, query + g * dim + d, sizeof q);
                sums[g] += k * q;
            }
        }
        if (tail) {
            vec k = FN(load_part)(key[t] + dim - tail, tail);
            for (int g = 0; g < heads; g++) {
                vec q = {0};
                memcpy(&q, query + g * dim + dim - tail, (size_t)tail * 4);
                sums[g] += k * q;
            }
        }
        for (int g = 0; g < heads; g++) score[g][t] = FN(sum)(sums[g]);
    }
}

/* Tokens [from, to) of one item: m, l and unnormalised values of each head into `state`. */
LOCAL void FN(part)(const attention *a, const int32_t *pages, long kv_head, const float *query, int heads, long from,
                    long to, float *m, float *l, float *acc) {
    const E *keys = (const E *)a->keys + kv_head * a->key_dim, *values = (const E *)a->values + kv_head * a->value_dim;
    long key_stride = a->kv_heads * a->key_dim, value_stride = a->kv_heads * a->value_dim, dim = a->value_dim;
    for (int g = 0; g < heads; g++) m[g] = -INFINITY, l[g] = 0;
    memset(acc, 0, (size_t)(heads * dim) * 4);
    for (long start = from; start < to; start += WIDTH) {
        int count = (int)(to - start < WIDTH ? to - start : WIDTH);
        const E *key[WIDTH], *value[WIDTH];
        float score[MAX_GROUP][WIDTH];
        for (int t = 0; t < count; t++) {
            long token = start + t, slot = (long)pages[token / a->page_size] * a->page_size + token % a->page_size;
            key[t] = keys + slot * key_stride;
            value[t] = values + slot * value_stride;
        }
        FN(scores)(a, query, heads, key, count, score);
        for (int g = 0; g < heads; g++) {
            float best = m[g];
            for (int t = 0; t < count; t++) {
                float s = score[g][t] * a->scaling;
                if (a->softcap > 0) s = tanhf(s / a->softcap) * a->softcap;
                score[g][t] = s;
                if (s > best) best = s;
            }
            for (int t = count; t < WIDTH; t++) score[g][t] = -INFINITY;
            vec s;
            memcpy(&s, score[g], sizeof s);
            vec weights = FN(exp)(s - best);
            memcpy(score[g], &weights, sizeof weights);
            for (int t = count; t < WIDTH; t++) score[g][t] = 0; /* the clamp in exp leaves 1e-38 there */
            memcpy(&weights, score[g], sizeof weights);
            float shrink = m[g] == best ? 1.0f : expf(m[g] - best);
            m[g] = best;
            l[g] = l[g] * shrink + FN(sum)(weights);
            if (shrink != 1.0f)
                for (long d = 0; d < dim; d++) acc[g * dim + d] *= shrink;
        }
        long d = 0;
        for (; d + 4 * WIDTH <= dim; d += 4 * WIDTH) /* four vectors of a value row serve all heads */
            for (int g = 0; g < heads; g++) {
                vec sum[4];
                memcpy(sum, acc + g * dim + d, sizeof sum);
                for (int t = 0; t < count; t++)
                    for (int j = 0; j < 4; j++) sum[j] += FN(load)(value[t] + d + j * WIDTH) * score[g][t];
                memcpy(acc + g * dim + d, sum, sizeof sum);
            }
        for (; d < dim; d += WIDTH) {
            long n = dim - d < WIDTH ? dim - d : WIDTH;
            for (int g = 0; g < heads; g++) {
                vec sum = {0};
                memcpy(&sum, acc + g * dim + d, (size_t)n * 4);
                for (int t = 0; t < count; t++) {
                    vec v = n == WIDTH ? FN(load)(value[t] + d) : FN(load_part)(value[t] + d, n);
                    sum += v * score[g][t];
                }
                memcpy(acc + g * dim + d, &sum, (size_t)n * 4);
            }
        }
    }
}

/* Joins the parts of one job and writes its heads. A sink takes part in the softmax and has no value. */
LOCAL void FN(join)(const attention *a, long first_head, int heads, long parts, const float *state, long size,
                    E *output) {
    long dim = a->value_dim;
    for (int g = 0; g < heads; g++) {
        float best = a->sinks ? a->sinks[first_head + g] : -INFINITY;
        for (long p = 0; p < parts; p++) best = fmaxf(best, state[p * size + g]);
        float total = a->sinks ? expf(a->sinks[first_head + g] - best) : 0.0f;
        for (long p = 0; p < parts; p++) total += state[p * size + heads + g] * expf(state[p * size + g] - best);
        for (long d = 0; d < dim; d++) {
            float sum = 0;
            for (long p = 0; p < parts; p++)
                sum += state[p * size + 2 * heads + g * dim + d] * expf(state[p * size + g] - best);
            FN(put)(output + g * dim + d, sum / total);
        }
    }
}

LOCAL long FN(parts_of)(const attention *a, long token) {
    return (a->items[3 * token + 2] - a->items[3 * token + 1] + SPLIT - 1) / SPLIT;
}

/* A job is a query token, a key head and up to MAX_GROUP of the query heads that share it. */
int FN(attention)(const void *arguments, int threads) {
    const attention *a = arguments;
    long group = a->heads / a->kv_heads, blocks = (group + MAX_GROUP - 1) / MAX_GROUP;
    long jobs = a->tokens * a->kv_heads * blocks, most = a->most_parts;
    long room = MAX_GROUP * (2 + a->value_dim); /* of a part's m, l and values */
    float *states = malloc((size_t)(jobs * most * room) * sizeof *states);
    if (!states) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1 && jobs * most > 1 && a->tokens * a->heads * a->longest * a->key_dim > SMALL)
    {
#pragma omp for schedule(dynamic, 1)
        for (long index = 0; index < jobs * most; index++) {
            long job = index / most, p = index % most, token = job / (a->kv_heads * blocks);
            long kv_head = job / blocks % a->kv_heads, first = kv_head * group + job % blocks * MAX_GROUP;
            int heads = (int)((kv_head + 1) * group - first);
            if (heads > MAX_GROUP) heads = MAX_GROUP;
            if (p >= FN(parts_of)(a, token)) continue;
            const int32_t *item = a->items + 3 * token;
            long from = item[1] + p * SPLIT, to = from + SPLIT < item[2] ? from + SPLIT : item[2];
            float query[MAX_GROUP * MAX_DIM], *state = states + index * room;
            for (int g = 0; g < heads; g++) {
                const E *q = (const E *)a->query + token * a->query_token + (first + g) * a->query_head;
                for (long d = 0; d < a->key_dim; d++) query[g * a->key_dim + d] = FN(get)(q + d);
            }
            FN(part)(a, a->table + item[0] * a->table_width, kv_head, query, heads, from, to, state, state + heads,
                     state + 2 * heads);
        }
#pragma omp for schedule(static)
        for (long job = 0; job < jobs; job++) {
            long token = job / (a->kv_heads * blocks);
            long kv_head = job / blocks % a->kv_heads, first = kv_head * group + job % blocks * MAX_GROUP;
            int heads = (int)((kv_head + 1) * group - first);
            if (heads > MAX_GROUP) heads = MAX_GROUP;
            E *output = (E *)a->output + (token * a->heads + first) * a->value_dim;
            FN(join)(a, first, heads, FN(parts_of)(a, token), states + job * most * room, room, output);
        }
    }
    free(states);
    return 0;
}
#endif
