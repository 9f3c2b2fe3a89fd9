/* Arguments of `linear`; see linear.c for the layouts. */
#ifndef LLMOPT_LINEAR_H
#define LLMOPT_LINEAR_H

typedef struct {
    const void *x, *weight, *bias, *residual;
    void *y;
    long rows, outputs, inputs;
} linear;
#endif
