/* Arguments of `leaders`; see leaders.c. */
#ifndef LLMOPT_LEADERS_H
#define LLMOPT_LEADERS_H
#include <stdint.h>

typedef struct {
    const float *estimates, *error, *spread, *slack;
    void *logits;
    int64_t *found;
    long rows, width, most, parts;
    float spacing, tiny;
} leaders;
#endif
