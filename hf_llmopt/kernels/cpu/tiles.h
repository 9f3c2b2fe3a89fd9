/* How x lies for tiles.c: in `scratch`, a line of 64 bytes for each row and `tiles_depth` inputs, [inputs / depth][rows]
 * for each block of 16 rows; after all of them scales and sums, [inputs / share][rows] for each block, as floats. */
#ifndef LLMOPT_TILES_H
#define LLMOPT_TILES_H
#include "linear.h"

/* Inputs of a tile: the largest part of those that share a scale. */
static inline long tiles_depth(long share) {
    long depth = 64;
    while (share % depth) depth -= 8;
    return depth;
}

#define TILES_FEWEST 12 /* rows from which tiles are faster */
#define tiles_serve(a) ((a)->share && (a)->rows >= TILES_FEWEST && tiles_depth((a)->share) >= 32 && tiles_depth((a)->share) * 2 >= (a)->share)
/* Codes of 8 bits are multiplied as they lie, and zeros follow the integers, where few rows share the work of taking zeros off,
 * and where each group has its own: a difference of bytes does not fit a byte. */
#define TILES_DIRECT 64
#define tiles_direct(a) ((a)->kind == EIGHT_BITS && ((a)->zeros || (a)->rows <= TILES_DIRECT))
#define tiles_row_bytes(a) ((a)->laid / tiles_depth((a)->share) * 64)
/* Of the block that begins with row `first`. */
#define tiles_rows(a, first) ((a)->rows - (first) < 16 ? (a)->rows - (first) : 16)
#define tiles_x(a, first, k)                                                                                           \
    ((int8_t *)(a)->scratch + (first) * tiles_row_bytes(a) + (k) / tiles_depth((a)->share) * tiles_rows(a, first) * 64)
#define tiles_steps(a) ((float *)((int8_t *)(a)->scratch + (a)->rows * tiles_row_bytes(a)))
#endif
