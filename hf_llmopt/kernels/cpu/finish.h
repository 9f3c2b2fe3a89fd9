/* What follows every product, for the format E at the present level. */
#include "linear.h"

/* Bias, rounding, factor and residual of `count` neighbouring outputs n, n + 1 ... of row m, whose sums are in v. */
INLINE void FN(finish)(const linear *a, long m, long n, vec v, long count) {
    const E *bias = a->bias, *residual = a->residual;
    if (bias) v += count == WIDTH ? FN(load)(bias + n) : FN(load_part)(bias + n, count);
    if (a->factor != 1.0f) v = FN(rounded)(v) * a->factor;
    if (residual) {
        residual += m * a->stride + n;
        v = FN(rounded)(v) + (count == WIDTH ? FN(load)(residual) : FN(load_part)(residual, count));
    }
    E *y = (E *)a->y + m * a->stride + n;
    if (count == WIDTH)
        FN(store)(y, v);
    else
        FN(store_part)(y, v, count);
}
