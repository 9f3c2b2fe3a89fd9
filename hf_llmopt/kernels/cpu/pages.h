/* Quantized pages (PageFormat in arguments.py), for the format E at the present level.
 *
 * A slot is a row of bytes: the codes of all heads, then the parts of all heads: a scale, with 4 bits a lowest value too. */
#ifndef LLMOPT_PAGES_H
#define LLMOPT_PAGES_H
#include "attention.h"
enum { DENSE_PAGES, INT8_PAGES, FP8_PAGES, INT4_PAGES };
typedef struct {
    const void *x; /* [tokens, kv_heads, width] */
    void *rows;    /* [tokens, bytes] */
    long tokens, kv_heads, width, token, head; /* elements of x from one token, and from one head, to the next */
    int form, rotates;
} pack;

#define page_codes(form, width) ((form) == INT4_PAGES ? (width) / 2 : (width))
#define page_parts(form) ((form) == INT4_PAGES ? 2L : 1L)
#define page_row(form, kv_heads, width) ((kv_heads) * (page_codes(form, width) + 2 * page_parts(form)))
#endif

#ifdef FORMAT
/* x times a Hadamard matrix over the root of its size: reference.hadamard. */
INLINE void FN(hadamard)(float *x, long width) {
    long size = width & -width;
    float factor = 1.0f / sqrtf((float)size);
    for (long step = 1; step < size; step *= 2)
        for (long i = 0; i < width; i += 2 * step)
            for (long j = i; j < i + step; j++) {
                float low = x[j], high = x[j + step];
                x[j] = low + high, x[j + step] = low - high;
            }
    for (long i = 0; i < width; i++) x[i] *= factor;
}

/* A query as the dot products take it, rotated as the keys are. */
INLINE void FN(query_row)(const attention *a, long token, long head, FN(element) * to) {
    const E *from = (const E *)a->query + token * a->query_token + head * a->query_head;
    if (a->form != INT4_PAGES) {
        FN(widen)(to, from, a->key_dim);
        return;
    }
    float wide[MAX_DIM];
    E line[MAX_DIM];
    for (long i = 0; i < a->key_dim; i++) wide[i] = FN(get)(from + i);
    FN(hadamard)(wide, a->key_dim);
    for (long i = 0; i < a->key_dim; i++) FN(put)(line + i, wide[i]);
    FN(widen)(to, line, a->key_dim);
}

/* What the dot products take, as floats. */
INLINE void FN(elements)(const FN(element) * from, long n, float *to) {
#if defined(HAS_BF16_DOT) && DTYPE == 1
    for (long i = 0; i < n; i++) to[i] = FN(get)(from + i);
#else
    memcpy(to, from, (size_t)n * sizeof *to);
#endif
}

/* A part of a head, bf16. */
INLINE float FN(page_part)(const uint8_t *row, int form, long kv_heads, long width, long head, long part) {
    uint16_t bits;
    memcpy(&bits, row + kv_heads * page_codes(form, width) + 2 * (head * page_parts(form) + part), 2);
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* Up to sixteen codes of a head, from the i-th on, as floats. */
INLINE vec FN(page_codes)(const uint8_t *codes, const int form, long width, long i, long count) {
    typedef int8_t signed_bytes __attribute__((vector_size(WIDTH), unused));
    typedef uint8_t bytes __attribute__((vector_size(WIDTH)));
    bytes b = {0};
    int high = form == INT4_PAGES && i >= width / 2;
    if (high) i -= width / 2;
    if (count < WIDTH)
        memcpy(&b, codes + i, (size_t)count);
    else
        memcpy(&b, codes + i, sizeof b);
#ifdef __AVX512F__ /* GCC would widen parts one by one */
    if (form == INT8_PAGES) return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)b));
    ivec wide = (ivec)_mm512_cvtepu8_epi32((__m128i)b);
#else
    if (form == INT8_PAGES) return __builtin_convertvector(__builtin_convertvector((signed_bytes)b, ivec), vec);
    ivec wide = __builtin_convertvector(b, ivec);
#endif
    if (form == INT4_PAGES) return __builtin_convertvector(high ? wide >> 4 : wide & 15, vec);
    /* e4m3: 1 sign, 4 exponent and 3 mantissa bits where a float has them */
    return (vec)(wide << 24 >> 4 & (int32_t)0x87f00000) * 0x1p120f;
}

/* All codes of a head, to places that hold them exactly: a bf16 number is the upper half of a float. */
#define EACH_CODE(KIND, T, CONVERT)                                                                                    \
    INLINE void FN(open_##KIND)(const uint8_t *codes, const int form, long width, T *to) {                             \
        long part = form == INT4_PAGES ? width / 2 : width;                                                            \
        for (long from = 0; from < width; from += part)                                                                \
            for (long i = 0; i < part; i += WIDTH) {                                                                   \
                long count = part - i < WIDTH ? part - i : WIDTH;                                                      \
                vec v = FN(page_codes)(codes, form, width, from + i, count);                                           \
                CONVERT(to + from + i, v);                                                                             \
            }                                                                                                          \
    }
#define AS_FLOATS(to, v) memcpy(to, &v, sizeof v)
#if DTYPE == 1 && defined(__AVX512F__)
#define AS_ELEMENTS(to, v) _mm256_storeu_si256((__m256i *)(to), _mm512_cvtepi32_epi16((__m512i)((uvec)v >> 16)))
#elif DTYPE == 1
#define AS_ELEMENTS(to, v)                                                                                             \
    {                                                                                                                  \
        hvec h = __builtin_convertvector((uvec)v >> 16, hvec);                                                         \
        memcpy(to, &h, sizeof h);                                                                                      \
    }
#else
#define AS_ELEMENTS FN(store)
#endif
EACH_CODE(floats, float, AS_FLOATS)
EACH_CODE(elements, E, AS_ELEMENTS)
#undef EACH_CODE
#undef AS_FLOATS
#undef AS_ELEMENTS

/* The same for keys. One instruction rounds two vectors to bf16, which changes none of these numbers; cutting floats in
 * half takes five. */
INLINE void FN(open_key)(const uint8_t *codes, const int form, long width, E *to) {
#if defined(HAS_BF16_DOT) && DTYPE == 1
    if ((form == INT4_PAGES ? width / 2 : width) % CHUNK == 0) {
        for (long i = 0; i < width; i += CHUNK) {
            vec low = FN(page_codes)(codes, form, width, i, WIDTH), high = FN(page_codes)(codes, form, width, i + WIDTH, WIDTH);
            _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
        }
        return;
    }
#endif
    FN(open_elements)(codes, form, width, to);
}

/* The head itself, rounded to the format; `to` has room for whole vectors behind it. */
LOCAL void FN(unpack)(const uint8_t *row, int form, long kv_heads, long width, long head, E *to) {
    float wide[MAX_DIM + WIDTH], scale = FN(page_part)(row, form, kv_heads, width, head, 0), low = 0;
    const uint8_t *codes = row + head * page_codes(form, width);
    if (form == INT8_PAGES)
        FN(open_floats)(codes, INT8_PAGES, width, wide);
    else if (form == FP8_PAGES)
        FN(open_floats)(codes, FP8_PAGES, width, wide);
    else {
        FN(open_floats)(codes, INT4_PAGES, width, wide);
        low = FN(page_part)(row, form, kv_heads, width, head, 1);
    }
    for (long i = 0; i < width; i += WIDTH) {
        vec v;
        memcpy(&v, wide + i, sizeof v);
        FN(store)(to + i, v * scale + low);
    }
}

/* A float as bf16, away from zero where it is positive. */
INLINE float FN(rounded_up)(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + (x > 0 ? 0xffffu : 0)) & 0xffff0000u;
    memcpy(&x, &bits, 4);
    return x;
}

/* The nearest e4m3 number, ties to even; |x| is at most 448. */
INLINE uint8_t FN(to_float8)(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
    if (size < 0x3c800000) return (uint8_t)(sign | (uint32_t)nearbyintf(fabsf(x) * 512.0f)); /* below 2^-6 steps are 2^-9 */
    return (uint8_t)(sign | (((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3)));
}

/* reference.pack_rows for one head. */
LOCAL void FN(pack_head)(const E *x, uint8_t *row, int form, int rotates, long kv_heads, long width, long head) {
    float wide[MAX_DIM], part[2] = {0}, least = INFINITY, most = -INFINITY;
    for (long i = 0; i < width; i++) wide[i] = FN(get)(x + i);
    if (rotates) FN(hadamard)(wide, width);
    for (long i = 0; i < width; i++) {
        least = wide[i] < least ? wide[i] : least, most = wide[i] > most ? wide[i] : most;
        if (wide[i] != wide[i]) least = most = NAN;
    }
    uint8_t *codes = row + head * page_codes(form, width);
    if (form == INT4_PAGES) {
        part[1] = -FN(rounded_up)(-least), part[0] = FN(rounded_up)((most - part[1]) / 15.0f);
        for (long i = 0; i < width; i++) {
            float code = part[0] > 0 ? nearbyintf((wide[i] - part[1]) / part[0]) : 0;
            uint8_t whole = (uint8_t)(code > 15 ? 15 : code > 0 ? code : 0);
            if (i < width / 2)
                codes[i] = whole;
            else
                codes[i - width / 2] |= (uint8_t)(whole << 4);
        }
    } else {
        part[0] = FN(rounded_up)(fabsf(fmaxf(most, -least)) / (form == INT8_PAGES ? 127.0f : 448.0f));
        for (long i = 0; i < width; i++) {
            float code = part[0] > 0 ? wide[i] / part[0] : 0;
            codes[i] = form == INT8_PAGES ? (uint8_t)(int8_t)nearbyintf(code) : FN(to_float8)(code);
        }
    }
    uint8_t *parts = row + kv_heads * page_codes(form, width) + 2 * head * page_parts(form);
    for (int i = 0; i < page_parts(form); i++) {
        uint32_t bits;
        memcpy(&bits, part + i, 4);
        uint16_t upper = (uint16_t)(bits >> 16);
        memcpy(parts + 2 * i, &upper, 2);
    }
}
#endif
