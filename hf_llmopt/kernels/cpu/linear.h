/* Arguments of `linear`; see linear.c and quantized.c for the layouts. */
#ifndef LLMOPT_LINEAR_H
#define LLMOPT_LINEAR_H
#include <stdint.h>

enum { DENSE, FOUR_BITS, EIGHT_BITS, FLOAT8 };

typedef struct {
    const void *x, *weight, *bias, *residual;
    void *y, *scratch; /* scratch: linear_scratch(rows, laid) bytes */
    long rows, outputs, inputs, stride; /* elements from one row of y (and of the residual) to the next */
    float factor;                       /* on the product, before the residual is added */
    int kind;                           /* of the weight's numbers */
    long laid;                          /* inputs as x is laid out: padded, if the weight is quantized */
    /* Of a quantized weight alone. */
    const float *scales;
    const uint8_t *zeros;
    const int32_t *order;
    float zero;
    long group, share;
} linear;

#define linear_scratch(rows, laid) (4 * (size_t)(rows) * (size_t)(laid))

/* Whether two products read the same x in the same layout. */
#define linear_alike(a, b)                                                                                             \
    (!(a)->kind == !(b)->kind && (a)->laid == (b)->laid && (a)->share == (b)->share && (a)->order == (b)->order)
#endif
