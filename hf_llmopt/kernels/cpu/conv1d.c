/* y = x W + bias for few rows, on a weight kept as [inputs, outputs] (GPT-2's Conv1D).
 *
 * x         [rows, inputs]       contiguous
 * weight    [inputs, outputs]    contiguous, streamed once for all rows
 * bias      [outputs] or NULL
 * y         [rows, outputs]
 *
 * Threads split the outputs; each adds eight inputs at a time to float sums that stay in its cache. A sum's order is that of the
 * inputs, whatever the number of rows. */
#ifndef LLMOPT_CONV1D
#define LLMOPT_CONV1D
#include "conv1d.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#define SMALL 32768 /* weights below which waking a thread costs more than it saves */
#define STEPS 8 /* inputs at a time */
#define SELF "conv1d.c"
#include "levels.h"
#elif defined(FORMAT)

/* Outputs [from, to) of all rows; sums[row][output]. */
LOCAL void FN(columns)(const conv1d *a, long from, long to, float *sums) {
    long width = to - from;
    const E *x = a->x, *weight = a->weight, *bias = a->bias;
    for (long m = 0; m < a->rows; m++)
        for (long n = 0; n < width; n++) sums[m * width + n] = bias ? FN(get)(bias + from + n) : 0.0f;
    for (long k = 0; k < a->inputs; k += STEPS) {
        int steps = (int)(a->inputs - k < STEPS ? a->inputs - k : STEPS);
        const E *w = weight + k * a->outputs + from;
        long n = 0;
        for (; steps == STEPS && n + WIDTH <= width; n += WIDTH) {
            vec wide[STEPS];
            _Pragma("GCC unroll 8") for (int i = 0; i < STEPS; i++) {
                wide[i] = FN(load)(w + i * a->outputs + n);
                if (n * (long)sizeof(E) % 64 == 0) __builtin_prefetch(w + (STEPS + i) * a->outputs + n);
            }
            for (long m = 0; m < a->rows; m++) {
                vec sum;
                memcpy(&sum, sums + m * width + n, sizeof sum);
                _Pragma("GCC unroll 8") for (int i = 0; i < STEPS; i++) sum += wide[i] * FN(get)(x + m * a->inputs + k + i);
                memcpy(sums + m * width + n, &sum, sizeof sum);
            }
        }
        for (; n < width; n++)
            for (long m = 0; m < a->rows; m++)
                for (int i = 0; i < steps; i++)
                    sums[m * width + n] += FN(get)(w + i * a->outputs + n) * FN(get)(x + m * a->inputs + k + i);
    }
    for (long m = 0; m < a->rows; m++)
        for (long n = 0; n < width; n++) FN(put)((E *)a->y + m * a->outputs + from + n, sums[m * width + n]);
}

int FN(conv1d)(const void *arguments, int threads) {
    const conv1d *a = arguments;
    float *sums = malloc((size_t)(a->rows * a->outputs) * sizeof *sums);
    if (!sums) return 1;
    long blocks = (a->outputs + WIDTH - 1) / WIDTH;
#pragma omp parallel num_threads(threads) if (threads > 1 && a->outputs * a->inputs > SMALL)
    {
#ifdef _OPENMP
        long t = omp_get_thread_num(), n = omp_get_num_threads();
#else
        long t = 0, n = 1;
#endif
        long from = blocks * t / n * WIDTH, to = blocks * (t + 1) / n * WIDTH;
        if (to > a->outputs) to = a->outputs;
        if (from < to) FN(columns)(a, from, to, sums + a->rows * from);
    }
    free(sums);
    return 0;
}
#endif
