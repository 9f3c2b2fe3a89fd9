/* Arguments of `linear`; see linear.c for the layouts. */
#ifndef LLMOPT_LINEAR_H
#define LLMOPT_LINEAR_H
typedef struct {
    const void *x, *weight, *bias, *residual;
    void *y, *scratch; /* scratch: linear_scratch(rows, inputs) bytes */
    long rows, outputs, inputs, stride; /* elements from one row of y (and of the residual) to the next */
    float factor;                       /* on the product, before the residual is added */
} linear;

#define linear_scratch(rows, inputs) (4 * (size_t)(rows) * (size_t)(inputs))
#endif
