/* Arguments of `activation`; see activation.c for the layouts. */
#ifndef LLMOPT_ACTIVATION_H
#define LLMOPT_ACTIVATION_H

typedef struct {
    const void *gate, *up;
    void *y;
    long rows, width, stride; /* elements from one row of gate and up to the next */
    int kind;                 /* see activation.c */
} activation;
#endif
