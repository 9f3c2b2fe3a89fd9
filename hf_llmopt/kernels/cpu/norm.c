/* RMSNorm (Zhang and Sennrich, 2019) and LayerNorm (Ba et al., 2016) over the last axis, with the roundings of the
 * eager modules.
 *
 * x, y      [rows, width]   contiguous
 * weight    [width] or NULL
 * bias      [width] or NULL
 *
 * variant (RMSNorm), with r = 1 / sqrt(mean(x^2) + epsilon) and R() a rounding to the storage format:
 *   0   R(w * R(x r))          Llama, Qwen, Mistral, Phi-3 ...
 *   1   R((1 + w) * (x r))     Gemma; of LayerNorm, Nemotron
 *   2   R(w * (x r))           OLMo 2, gpt-oss */
#ifndef LLMOPT_NORM
#define LLMOPT_NORM
#include "norm.h"
#define SELF "norm.c"
#include "levels.h"
#elif defined(FORMAT)

/* One row; x and y may be the same. */
void FN(norm_row)(const norm *a, const void *from, void *to) {
    const E *x = from;
    E *y = to;
    const E *weight = a->weight, *bias = a->bias;
    long width = a->width, tail = width % WIDTH, whole = width - tail;
    float mean = 0;
    if (a->centre) {
        vec sum = {0};
        for (long i = 0; i < whole; i += WIDTH) sum += FN(load)(x + i);
        if (tail) sum += FN(load_part)(x + whole, tail);
        mean = FN(sum)(sum) / (float)width;
    }
    vec squares = {0};
    for (long i = 0; i < whole; i += WIDTH) {
        vec v = FN(load)(x + i) - mean;
        squares += v * v;
    }
    float total = FN(sum)(squares);
    for (long i = whole; i < width; i++) total += (FN(get)(x + i) - mean) * (FN(get)(x + i) - mean);
    float r = 1.0f / sqrtf(total / (float)width + a->epsilon);
    for (long i = 0; i < width; i += WIDTH) {
        long n = width - i < WIDTH ? width - i : WIDTH;
        vec v = ((n == WIDTH ? FN(load)(x + i) : FN(load_part)(x + i, n)) - mean) * r;
        if (weight) {
            vec w = n == WIDTH ? FN(load)(weight + i) : FN(load_part)(weight + i, n);
            if (a->variant == 1)
                v = v * (w + 1.0f);
            else if (a->centre || a->variant == 2)
                v = v * w;
            else
                v = FN(rounded)(v) * w;
        }
        if (bias) v += n == WIDTH ? FN(load)(bias + i) : FN(load_part)(bias + i, n);
        if (n == WIDTH)
            FN(store)(y + i, v);
        else
            FN(store_part)(y + i, v, n);
    }
}

int FN(norm)(const void *arguments, int threads) {
    const norm *a = arguments;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && a->rows * a->width > 65536)
    for (long row = 0; row < a->rows; row++)
        FN(norm_row)(a, (const E *)a->x + row * a->width, (E *)a->y + row * a->width);
    return 0;
}
#endif
