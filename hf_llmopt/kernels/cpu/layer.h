/* Arguments of `layers`; see layer.c. */
#ifndef LLMOPT_LAYER_H
#define LLMOPT_LAYER_H
#include "attention.h"
#include "linear.h"
#include "norm.h"
#include "rotary.h"

typedef struct {
    const void *x;
    void *y;
    /* Norms that the model lacks have width 0. */
    norm before_attention, query_norm, key_norm, after_attention, before_mlp, after_mlp;
    linear query, key, value;  /* key and value without weight: query gives all three */
    linear output, gate, up, down; /* up without weight: no gate, `gate` is the MLP's first product */
    rotary turns; /* its key and value count from the first product's output, in elements, if that gives all three */
    attention attention;
    int kind;     /* of the activation */
    int parallel; /* the MLP reads: 0 x + attention, 1 x, 2 what the attention reads */
} layer;

typedef struct {
    layer *layers; /* filled in while they run */
    long count;
    const void *x; /* of the first */
    void *y;       /* of every one, so that the next reads it */
    double *spent; /* seconds of products, attention and small operations are added to these three; or NULL */
    long tokens, hidden;
} stack;
#endif
