/* Arguments of `norm`; see norm.c for the layouts. */
#ifndef LLMOPT_NORM_H
#define LLMOPT_NORM_H

typedef struct {
    const void *x, *weight, *bias;
    void *y;
    long rows, width;
    float epsilon;
    int centre;   /* 1: LayerNorm, 0: RMSNorm */
    int variant;  /* how the model rounds; see norm.c */
} norm;
#endif
