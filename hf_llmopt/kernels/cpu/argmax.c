/* The first of the largest elements of each row; -1 for a row that contains NaN.
 *
 * x      [rows, width]   rows `stride` elements apart
 * best   [rows] */
#ifndef LLMOPT_ARGMAX
#define LLMOPT_ARGMAX
#include "argmax.h"
#include "types.h"
#define RUN 1024 /* elements whose maximum is formed before it is compared */
#define SELF "argmax.c"
#include "levels.h"
#elif defined(FORMAT)

LOCAL int64_t FN(best_of)(const E *x, long width) {
    long run = 0;
    float best = -INFINITY;
    ivec nan = {0};
    for (long start = 0; start < width; start += RUN) {
        long end = start + RUN < width ? start + RUN : width, i = start;
        vec top[4];
        for (int j = 0; j < 4; j++) top[j] = FN(splat)(-INFINITY);
        for (; i + 4 * WIDTH <= end; i += 4 * WIDTH)
            for (int j = 0; j < 4; j++) {
                vec v = FN(load)(x + i + j * WIDTH);
                nan |= v != v;
                top[j] = FN(max)(v, top[j]);
            }
        float most = FN(top)(FN(max)(FN(max)(top[0], top[1]), FN(max)(top[2], top[3])));
        for (; i < end; i++) {
            float v = FN(get)(x + i);
            if (v != v) return -1;
            if (v > most) most = v;
        }
        if (most > best) best = most, run = start;
    }
    for (int i = 0; i < WIDTH; i++)
        if (nan[i]) return -1;
    for (long i = run; i < width; i++)
        if (FN(get)(x + i) == best) return i;
    return 0; /* not reached: best is one of them */
}

int FN(argmax)(const void *arguments, int threads) {
    const argmax *a = arguments;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && a->rows > 1 && a->rows * a->width > 65536)
    for (long row = 0; row < a->rows; row++)
        a->best[row] = FN(best_of)((const E *)a->x + row * a->stride, a->width);
    return 0;
}
#endif
