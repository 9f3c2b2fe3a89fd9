/* Types that do not depend on level or format. */
#ifndef LLMOPT_TYPES_H
#define LLMOPT_TYPES_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#define team_thread() ((long)omp_get_thread_num())
#define team_size() ((long)omp_get_num_threads())
#else
#define team_thread() 0L
#define team_size() 1L
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

/* Memory lies in lines, and what crosses one is read twice. */
#define LINE 64
static inline void *next_line(void *p) {
    return (void *)(((uintptr_t)p + LINE - 1) / LINE * LINE);
}

#define WIDTH 16 /* floats in a vector */
typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t hvec __attribute__((vector_size(2 * WIDTH)));
typedef _Float16 half;
typedef half halfvec __attribute__((vector_size(2 * WIDTH)));

#define INLINE static inline __attribute__((always_inline, unused))
#define LOCAL static __attribute__((unused))
#endif
