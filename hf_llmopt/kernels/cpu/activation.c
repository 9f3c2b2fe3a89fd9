/* y = act(gate) * up, the middle of a gated MLP (Shazeer, 2020), or act(gate) alone; act is rounded before the product, as
 * the eager modules do.
 *
 * gate   [rows, width]   `stride` elements from row to row (gate and up may be halves of one joined product)
 * up     [rows, width]   likewise, or NULL
 * y      [rows, width]   contiguous
 *
 * kind: 0 SiLU, 1 GELU with tanh, 2 GELU with erf, 3 ReLU, 4 ReLU squared */
#ifndef LLMOPT_ACTIVATION
#define LLMOPT_ACTIVATION
#include "activation.h"
#define SELF "activation.c"
#include "levels.h"
#elif defined(FORMAT)

INLINE vec FN(act)(vec x, int kind) {
    vec zero = {0}, positive = FN(max)(x, zero);
    switch (kind) {
    case 0: return FN(silu)(x);
    case 1: { /* tanh(u) = 1 - 2 / (e^2u + 1) */
        vec u = (x + x * x * x * 0.044715f) * 0.7978845608f;
        return x * (1.0f - 1.0f / (FN(exp)(u * 2.0f) + 1.0f));
    }
    case 2: {
        vec y;
        for (int i = 0; i < WIDTH; i++) y[i] = x[i] * 0.5f * (1.0f + erff(x[i] * 0.7071067812f));
        return y;
    }
    case 3: return positive;
    default: return FN(rounded)(positive) * FN(rounded)(positive);
    }
}

/* `count` neighbouring elements of one row; y may be gate or up itself. */
void FN(activation_part)(const void *gates, const void *ups, void *to, long count, int kind) {
    const E *gate = gates, *up = ups;
    E *y = to;
    for (long i = 0; i < count; i += WIDTH) {
        long n = count - i < WIDTH ? count - i : WIDTH;
        vec v = FN(rounded)(FN(act)(n == WIDTH ? FN(load)(gate + i) : FN(load_part)(gate + i, n), kind));
        if (up) v *= n == WIDTH ? FN(load)(up + i) : FN(load_part)(up + i, n);
        if (n == WIDTH)
            FN(store)(y + i, v);
        else
            FN(store_part)(y + i, v, n);
    }
}

int FN(activation)(const void *arguments, int threads) {
    const activation *a = arguments;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && a->rows * a->width > 65536)
    for (long row = 0; row < a->rows; row++)
        FN(activation_part)((const E *)a->gate + row * a->stride, a->up ? (const E *)a->up + row * a->stride : 0,
                            (E *)a->y + row * a->width, a->width, a->kind);
    return 0;
}
#endif
