/* Attention over pages. Short spans are served here, query by query; flash.c serves the longer ones behind them.
 *
 * One work item is a query token and a key head with the query heads that share it. Keys stream through once, in blocks
 * of BLOCK tokens, with the online softmax of Milakov and Gimelshein (2018): running maximum m, sum l and weighted values.
 * A long context is split into parts of SPLIT tokens, so that all threads have work; the split depends on the context's
 * length alone, so a request's result does not depend on its neighbours.
 *
 * query   [tokens, heads, key_dim]           any strides between tokens and heads
 * keys    [slots, kv_heads, key_dim]         contiguous
 * values  [slots, kv_heads, value_dim]       contiguous; or both as pages.h says: a block is then unpacked first
 * table   [rows, pages]                      page ids of each request
 * items   [tokens, 3]                        row of the table, first visible token, end of the visible tokens; those with
 *                                            the same row follow one another and are a span, the shortest first
 * tree    [tokens]                           bits: which of the last tokens are seen, where guesses form a tree; or NULL
 * output  [tokens, heads, value_dim]         contiguous */
#ifndef LLMOPT_ATTENTION
#define LLMOPT_ATTENTION
#include "attention.h"
#include "types.h"
#define SMALL 65536 /* multiplications below which waking a thread costs more than it saves */
#define BLOCK 64    /* tokens between two looks at the maximum */
#define SELF "attention.c"
#include "levels.h"
#elif defined(FORMAT)
#include "pages.h"

extern void FN(flash_team)(const attention *);

/* Dot products of one query with WIDTH keys, a lane each. */
INLINE vec FN(scores)(const FN(element) * query, const E **key, long dim) {
    vec a[WIDTH];
    _Pragma("GCC unroll 16") for (int t = 0; t < WIDTH; t++) a[t] = FN(splat)(0);
    long d = 0;
    WEIGHTS q;
    for (; d + CHUNK <= dim; d += CHUNK) {
        memcpy(&q, query + d, sizeof q);
        _Pragma("GCC unroll 16") for (int t = 0; t < WIDTH; t++) a[t] = DOT(a[t], q, FETCH(key[t] + d));
    }
    if (d < dim) { /* the query is padded with zeros */
        memcpy(&q, query + d, sizeof q);
        for (int t = 0; t < WIDTH; t++) a[t] = DOT(a[t], q, FETCH_PART(key[t] + d, dim - d));
    }
    return FN(sums)(a);
}

/* acc[head][dim] += weight[head][token] value[token][dim], for H heads and J vectors at a time; values are E, float or codes. */
#define HEADS_BY_VECTORS(H, J, KIND, T, LOAD, LOAD_PART)                                                               \
    INLINE void FN(KIND##_##H)(float *acc, long room, const float (*weight)[BLOCK], const T **value, int count,        \
                               long dim) {                                                                             \
        long d = 0;                                                                                                    \
        for (; d + J * WIDTH <= dim; d += J * WIDTH) {                                                                 \
            vec sum[H][J];                                                                                             \
            _Pragma("GCC unroll 8") for (int g = 0; g < H; g++) memcpy(sum[g], acc + g * room + d, sizeof sum[g]);     \
            for (int t = 0; t < count; t++)                                                                            \
                _Pragma("GCC unroll 4") for (int j = 0; j < J; j++) {                                                  \
                    vec v = LOAD(value[t] + d + j * WIDTH);                                                            \
                    _Pragma("GCC unroll 8") for (int g = 0; g < H; g++) sum[g][j] += v * weight[g][t];                 \
                }                                                                                                      \
            _Pragma("GCC unroll 8") for (int g = 0; g < H; g++) memcpy(acc + g * room + d, sum[g], sizeof sum[g]);     \
        }                                                                                                              \
        for (; d < dim; d += WIDTH) {                                                                                  \
            long n = dim - d < WIDTH ? dim - d : WIDTH;                                                                \
            for (int t = 0; t < count; t++) {                                                                          \
                vec v = n == WIDTH ? LOAD(value[t] + d) : LOAD_PART(value[t] + d, n), sum;                             \
                for (int g = 0; g < H; g++) {                                                                          \
                    memcpy(&sum, acc + g * room + d, sizeof sum);                                                      \
                    sum += v * weight[g][t];                                                                           \
                    memcpy(acc + g * room + d, &sum, sizeof sum);                                                      \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }
INLINE vec FN(load_floats)(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
#define WHOLE(p, n) FN(load_floats)(p) /* there is room behind */
#define EVERY(J1, J2, J4, J8, ...)                                                                                     \
    HEADS_BY_VECTORS(1, J1, __VA_ARGS__)                                                                               \
    HEADS_BY_VECTORS(2, J2, __VA_ARGS__)                                                                               \
    HEADS_BY_VECTORS(4, J4, __VA_ARGS__)                                                                               \
    HEADS_BY_VECTORS(8, J8, __VA_ARGS__)
EVERY(4, 4, 2, 1, values, E, FN(load), FN(load_part))
EVERY(4, 4, 2, 1, floats, float, FN(load_floats), WHOLE)
#define INT8(p) FN(page_codes)(p, INT8_PAGES, 0, 0, WIDTH)
#define INT8_PART(p, n) FN(page_codes)(p, INT8_PAGES, 0, 0, n)
#define FP8(p) FN(page_codes)(p, FP8_PAGES, 0, 0, WIDTH)
#define FP8_PART(p, n) FN(page_codes)(p, FP8_PAGES, 0, 0, n)
EVERY(4, 4, 2, 1, int8, uint8_t, INT8, INT8_PART)
EVERY(4, 4, 2, 1, fp8, uint8_t, FP8, FP8_PART)
#undef INT8
#undef INT8_PART
#undef FP8
#undef FP8_PART
#undef HEADS_BY_VECTORS
#undef EVERY
#undef WHOLE

/* Tokens [from, to) of one item, which sees those before `end` by its bits: maximum, sum and unnormalised values of each head.
 * `query` and `acc` have rows of whole vectors, `acc` a power of two of them. */
LOCAL void FN(part)(const attention *a, const int32_t *pages, long kv_head, const FN(element) * query, long query_room,
                    int heads, long from, long to, long end, int32_t bits, float *m, float *l, float *acc) {
    const char *keys = a->keys, *values = a->values;
    long bytes[2] = {a->key_dim * (long)sizeof(E), a->value_dim * (long)sizeof(E)}; /* of a head, and from slot to slot */
    long stride[2] = {a->kv_heads * bytes[0], a->kv_heads * bytes[1]};
    if (a->form) {
        bytes[0] = page_codes(a->form, a->key_dim), stride[0] = page_row(a->form, a->kv_heads, a->key_dim);
        bytes[1] = page_codes(a->form, a->value_dim), stride[1] = page_row(a->form, a->kv_heads, a->value_dim);
    }
    long key_room = (a->key_dim + WIDTH - 1) / WIDTH * WIDTH, room = (a->value_dim + WIDTH - 1) / WIDTH * WIDTH;
    E open_keys[a->form ? BLOCK * key_room + WIDTH : 1]; /* no more of the stack than pages need; vectors end behind */
    float open_values[a->form == INT4_PAGES ? BLOCK * room + WIDTH : 1];
    float scales[2][BLOCK] = {0}, lows[2][BLOCK] = {0}, query_sum[MAX_GROUP];
    const float *wide[BLOCK];
    const uint8_t *codes[BLOCK];
    for (int g = 0; g < heads && a->form == INT4_PAGES; g++) {
        float line[MAX_DIM];
        FN(elements)(query + g * query_room, a->key_dim, line);
        query_sum[g] = 0;
        for (long d = 0; d < a->key_dim; d++) query_sum[g] += line[d];
    }
    long page = from / a->page_size, place = from % a->page_size;
    float weight[MAX_GROUP][BLOCK] = {0};
    vec sum[MAX_GROUP], lane;
    for (int i = 0; i < WIDTH; i++) lane[i] = (float)i;
    for (int g = 0; g < MAX_GROUP; g++) m[g] = -INFINITY, sum[g] = FN(splat)(0);
    memset(acc, 0, (size_t)(MAX_GROUP * room) * 4);
    const E *found[2][2][BLOCK]; /* keys and values of this block, and of the next, which is fetched meanwhile */
    for (long start = from, next = from, turn = 0; start < to; start += BLOCK, turn ^= 1) {
        int count = (int)(to - start < BLOCK ? to - start : BLOCK), full = (count + WIDTH - 1) / WIDTH * WIDTH;
        for (; next < to && next < start + 2 * BLOCK; next++) {
            long slot = (long)pages[page] * a->page_size + place, t = (next - from) % BLOCK;
            const char *key = keys + slot * stride[0], *value = values + slot * stride[1];
            long skipped[2] = {kv_head * bytes[0], kv_head * bytes[1]};
            for (long i = 0; i < bytes[0]; i += 64) __builtin_prefetch(key + skipped[0] + i);
            for (long i = 0; i < bytes[1]; i += 64) __builtin_prefetch(value + skipped[1] + i);
            if (a->form) { /* rows begin anywhere in a line, and scales lie behind the codes of all heads */
                __builtin_prefetch(key + skipped[0] + bytes[0] - 1);
                __builtin_prefetch(value + skipped[1] + bytes[1] - 1);
                __builtin_prefetch(key + a->kv_heads * bytes[0] + 2 * kv_head * page_parts(a->form));
                __builtin_prefetch(value + a->kv_heads * bytes[1] + 2 * kv_head * page_parts(a->form));
            }
            found[(next - from) / BLOCK % 2][0][t] = (const E *)(a->form ? key : key + skipped[0]);
            found[(next - from) / BLOCK % 2][1][t] = (const E *)(a->form ? value : value + skipped[1]);
            if (++place == a->page_size) place = 0, page++;
        }
        const E **key = found[turn][0], **value = found[turn][1];
        for (int t = 0; t < count && a->form; t++) {
            const uint8_t *rows[2] = {(const uint8_t *)key[t], (const uint8_t *)value[t]};
            long dims[2] = {a->key_dim, a->value_dim};
            for (int i = 0; i < 2; i++) {
                scales[i][t] = FN(page_part)(rows[i], a->form, a->kv_heads, dims[i], kv_head, 0);
                if (a->form == INT4_PAGES) lows[i][t] = FN(page_part)(rows[i], a->form, a->kv_heads, dims[i], kv_head, 1);
            }
            const uint8_t *of_key = rows[0] + kv_head * bytes[0];
            codes[t] = rows[1] + kv_head * bytes[1];
            E *to = open_keys + t * key_room;
            if (a->form == FP8_PAGES)
                FN(open_key)(of_key, FP8_PAGES, a->key_dim, to);
            else if (a->form == INT4_PAGES) {
                FN(open_key)(of_key, INT4_PAGES, a->key_dim, to);
                FN(open_floats)(codes[t], INT4_PAGES, a->value_dim, open_values + t * room);
                wide[t] = open_values + t * room;
            } else
                FN(open_key)(of_key, INT8_PAGES, a->key_dim, to);
            key[t] = to;
        }
        for (int t = count; t < full; t++) key[t] = key[0]; /* read, and weighted with 0 */
        ivec seen[BLOCK / WIDTH];
        for (int b = 0; b * WIDTH < full; b++) seen[b] = lane < (float)(count - b * WIDTH);
        for (long back = 0; bits != SEES_ALL && back < BITS; back++) { /* likewise */
            long t = end - 1 - back - start;
            if (t >= 0 && t < count && !((uint32_t)bits >> back & 1)) seen[t / WIDTH][t % WIDTH] = 0;
        }
        for (int g = 0; g < heads; g++) {
            vec score[BLOCK / WIDTH], best = FN(splat)(m[g]);
            for (int b = 0; b * WIDTH < full; b++) {
                vec s = FN(scores)(query + g * query_room, key + b * WIDTH, a->key_dim), scale, low;
                if (a->form) {
                    memcpy(&scale, scales[0] + b * WIDTH, sizeof scale);
                    s *= scale;
                }
                if (a->form == INT4_PAGES) {
                    memcpy(&low, lows[0] + b * WIDTH, sizeof low);
                    s += low * query_sum[g];
                }
                s *= a->scaling;
                if (a->softcap > 0) s = FN(capped)(s, a->softcap);
                score[b] = (vec)(((ivec)s & seen[b]) | ((ivec)FN(splat)(-INFINITY) & ~seen[b]));
                best = FN(max)(best, score[b]);
            }
            vec lowest = {0};
            float top = FN(top)(best), shrink = m[g] == top ? 1.0f : expf(m[g] - top);
            sum[g] *= shrink;
            for (int b = 0; b * WIDTH < full; b++) {
                vec w = (vec)((ivec)FN(exp)(score[b] - top) & seen[b]), scale, low;
                sum[g] += w;
                if (a->form) {
                    memcpy(&scale, scales[1] + b * WIDTH, sizeof scale);
                    memcpy(&low, lows[1] + b * WIDTH, sizeof low);
                    lowest += w * low, w *= scale;
                }
                memcpy(weight[g] + b * WIDTH, &w, sizeof w);
            }
            m[g] = top;
            if (shrink != 1.0f)
                for (long d = 0; d < room; d++) acc[g * room + d] *= shrink;
            if (a->form == INT4_PAGES) {
                float shift = FN(sum)(lowest);
                for (long d = 0; d < room; d++) acc[g * room + d] += shift;
            }
        }
#define VALUES(H)                                                                                                      \
    if (!a->form)                                                                                                      \
        FN(values_##H)(acc, room, weight, value, count, a->value_dim);                                                 \
    else if (a->form == INT8_PAGES)                                                                                    \
        FN(int8_##H)(acc, room, weight, codes, count, a->value_dim);                                                \
    else if (a->form == FP8_PAGES)                                                                                     \
        FN(fp8_##H)(acc, room, weight, codes, count, a->value_dim);                                                 \
    else                                                                                                               \
        FN(floats_##H)(acc, room, weight, wide, count, a->value_dim)
        if (heads > 4) {
            VALUES(8);
        } else if (heads > 2) {
            VALUES(4);
        } else if (heads > 1) {
            VALUES(2);
        } else {
            VALUES(1);
        }
#undef VALUES
    }
    for (int g = 0; g < heads; g++) l[g] = FN(sum)(sum[g]);
}

/* Joins the parts of one job and writes its heads. A sink takes part in the softmax and has no value. */
LOCAL void FN(join)(const attention *a, long first_head, int heads, long parts, float *state, E *output) {
    long size = attention_room(a), room = (a->value_dim + WIDTH - 1) / WIDTH * WIDTH;
    for (int g = 0; g < heads; g++) {
        float best = a->sinks ? a->sinks[first_head + g] : -INFINITY;
        for (long p = 0; p < parts; p++) best = fmaxf(best, state[p * size + g]);
        float total = a->sinks ? expf(a->sinks[first_head + g] - best) : 0.0f;
        for (long p = 0; p < parts; p++) {
            state[p * size + g] = expf(state[p * size + g] - best); /* now the part's weight */
            total += state[p * size + MAX_GROUP + g] * state[p * size + g];
        }
        for (long d = 0; d < a->value_dim; d += WIDTH) {
            vec sum = {0};
            for (long p = 0; p < parts; p++) {
                vec v;
                memcpy(&v, state + p * size + 2 * MAX_GROUP + g * room + d, sizeof v);
                sum += v * state[p * size + g];
            }
            if (d + WIDTH <= a->value_dim)
                FN(store)(output + g * a->value_dim + d, sum / total);
            else
                FN(store_part)(output + g * a->value_dim + d, sum / total, a->value_dim - d);
        }
    }
}

/* The query token, key head and query heads of a job. */
typedef struct FN(job) {
    long token, kv_head, first;
    int heads;
} FN(job);

INLINE FN(job) FN(job_at)(const attention *a, long index) {
    long group = a->heads / a->kv_heads, blocks = attention_blocks(a), kv_head = index / blocks % a->kv_heads;
    long first = kv_head * group + index % blocks * MAX_GROUP, left = (kv_head + 1) * group - first;
    return (FN(job)){index / (a->kv_heads * blocks), kv_head, first, (int)(left < MAX_GROUP ? left : MAX_GROUP)};
}

/* Part p of a job, if it has so many. */
LOCAL void FN(job_part)(const attention *a, FN(job) job, long p, float *state) {
    const int32_t *item = a->items + 3 * job.token;
    long from = item[1] + p * SPLIT, to = from + SPLIT < item[2] ? from + SPLIT : item[2];
    if (from >= to) return;
    long query_room = (a->key_dim + CHUNK - 1) / CHUNK * CHUNK;
    FN(element) query[MAX_GROUP * MAX_DIM];
    for (int g = 0; g < job.heads; g++) {
        FN(element) *row = query + g * query_room;
        FN(query_row)(a, job.token, job.first + g, row);
        memset(row + a->key_dim, 0, (size_t)(query_room - a->key_dim) * sizeof *row);
    }
    FN(part)(a, a->table + item[0] * a->table_width, job.kv_head, query, query_room, job.heads, from, to, item[2],
             a->tree ? a->tree[job.token] : SEES_ALL, state, state + MAX_GROUP, state + 2 * MAX_GROUP);
}

LOCAL void FN(job_end)(const attention *a, FN(job) job, float *states) {
    long parts = (a->items[3 * job.token + 2] - a->items[3 * job.token + 1] + SPLIT - 1) / SPLIT;
    FN(join)(a, job.first, job.heads, parts, states, (E *)a->output + (job.token * a->heads + job.first) * a->value_dim);
}

LOCAL void FN(jobs)(const attention *a, int threads) {
    long jobs = attention_jobs(a), most = attention_parts(a), size = attention_room(a);
    if (attention_many(a, threads)) {
        float *states = a->states + team_thread() * most * size;
#pragma omp for schedule(dynamic, 1)
        for (long index = 0; index < jobs; index++) {
            for (long p = 0; p < most; p++) FN(job_part)(a, FN(job_at)(a, index), p, states + p * size);
            FN(job_end)(a, FN(job_at)(a, index), states);
        }
        return;
    }
#pragma omp for schedule(dynamic, 1)
    for (long index = 0; index < jobs * most; index++)
        FN(job_part)(a, FN(job_at)(a, index / most), index % most, a->states + index * size);
#pragma omp for schedule(static)
    for (long index = 0; index < jobs; index++)
        FN(job_end)(a, FN(job_at)(a, index), a->states + index * most * size);
}

/* Called by every thread of a team; all have finished when it returns. */
void FN(attention_team)(const attention *a, int threads) {
    if (a->leading) FN(jobs)(a, threads);
    if (a->leading < a->tokens) FN(flash_team)(a);
}

int FN(attention)(const void *arguments, int threads) {
    attention a = *(const attention *)arguments;
    a.leading = attention_leading(&a);
    a.states = malloc((size_t)attention_states(&a, threads) * sizeof *a.states);
    if (!a.states) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1 && a.tokens * a.heads * a.longest * a.key_dim > SMALL)
    FN(attention_team)(&a, threads);
    free(a.states);
    return 0;
}
#endif
