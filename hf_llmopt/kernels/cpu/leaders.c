/* Which outputs of a head may be the largest of a row, by estimates of known error.
 *
 * estimates [parts, rows, width]   an estimate is the sum of its 1 or 2 parts
 * error     [width]                times spread [rows], and slack [rows] besides: how far it may be off
 * logits    [rows, width]          the estimates
 * found     [1 + most]             how many outputs may be the largest of some row, and which, in order; -1 if they are
 *                                  more than `most`, or no number bounds them
 * spacing, tiny                    of the format, relative and at 0: what is rounded to the same number counts as equal */
#ifndef LLMOPT_LEADERS
#define LLMOPT_LEADERS
#include "leaders.h"
#include "types.h"
#define RUN 1024 /* outputs of which one bound is kept */
#define LEAST 1e-15f /* norm: squares of numbers in smaller ones may vanish */
#define SELF "leaders.c"
#include "levels.h"
#elif defined(FORMAT)

/* The largest upper and lower bounds of a run, and its logits. */
LOCAL void FN(bound_run)(const leaders *a, long row, long start, long end, float *upper, float *lower) {
    const float *first = a->estimates + row * a->width, *second = a->parts > 1 ? first + a->rows * a->width : NULL;
    E *logits = (E *)a->logits + row * a->width;
    vec above = FN(splat)(-INFINITY), below = above, spread = FN(splat)(a->spread[row]);
    long i = start;
    for (; i + WIDTH <= end; i += WIDTH) {
        vec x, y = {0}, error;
        memcpy(&x, first + i, sizeof x), memcpy(&error, a->error + i, sizeof error);
        if (second) memcpy(&y, second + i, sizeof y);
        FN(store)(logits + i, x + y);
        above = FN(max)(x + y + error * spread, above);
        below = FN(max)(x + y - error * spread, below);
    }
    *upper = FN(top)(above), *lower = FN(top)(below);
    for (; i < end; i++) {
        float x = first[i] + (second ? second[i] : 0), error = a->error[i] * a->spread[row];
        FN(put)(logits + i, x);
        *upper = fmaxf(x + error, *upper), *lower = fmaxf(x - error, *lower);
    }
}

int FN(leaders)(const void *arguments, int threads) {
    const leaders *a = arguments;
    long runs = (a->width + RUN - 1) / RUN, count = 0;
    float *upper = malloc(2 * (size_t)(a->rows * runs + a->rows) * sizeof *upper);
    if (!upper) return 1;
    float *lower = upper + a->rows * runs, *bar = lower + a->rows * runs;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && a->rows * a->width > 65536)
    for (long run = 0; run < runs; run++)
        for (long row = 0; row < a->rows; row++) {
            long end = (run + 1) * RUN < a->width ? (run + 1) * RUN : a->width, i = row * runs + run;
            FN(bound_run)(a, row, run * RUN, end, upper + i, lower + i);
        }
    for (long row = 0; row < a->rows && count >= 0; row++) {
        float most = -INFINITY, least = -INFINITY;
        for (long i = row * runs; i < (row + 1) * runs; i++) {
            if (upper[i] > most) most = upper[i];
            if (lower[i] > least) least = lower[i];
        }
        float largest = fmaxf(fabsf(least), fabsf(most));
        bar[row] = least - 2 * a->slack[row] - a->spacing * largest - 2 * a->tiny;
        if (!isfinite(bar[row]) || a->spread[row] < LEAST || (DTYPE == 2 && largest >= 65504)) count = -1;
    }
    for (long run = 0; run < runs && count >= 0; run++) {
        int leads = 0;
        for (long row = 0; row < a->rows; row++) leads |= upper[row * runs + run] >= bar[row];
        for (long i = run * RUN; leads && i < (run + 1) * RUN && i < a->width && count >= 0; i++)
            for (long row = 0; row < a->rows; row++) {
                const float *first = a->estimates + row * a->width + i;
                float x = first[0] + (a->parts > 1 ? first[a->rows * a->width] : 0);
                if (x + a->error[i] * a->spread[row] < bar[row]) continue;
                if (count < a->most) a->found[1 + count++] = i;
                else count = -1;
                break;
            }
    }
    a->found[0] = count;
    free(upper);
    return 0;
}
#endif
