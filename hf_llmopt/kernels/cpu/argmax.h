/* Arguments of `argmax`; see argmax.c. */
#ifndef LLMOPT_ARGMAX_H
#define LLMOPT_ARGMAX_H
#include <stdint.h>

typedef struct {
    const void *x;
    int64_t *best;
    long rows, width, stride; /* elements from one row of x to the next */
} argmax;
#endif
