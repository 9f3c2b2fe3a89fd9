/* Arguments of `conv1d`; see conv1d.c for the layouts. */
#ifndef LLMOPT_CONV1D_H
#define LLMOPT_CONV1D_H

typedef struct {
    const void *x, *weight, *bias;
    void *y;
    long rows, outputs, inputs;
} conv1d;
#endif
