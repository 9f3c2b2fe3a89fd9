/* Keys or values on their way into quantized pages: reference.pack_rows. */
#ifndef LLMOPT_PAGES
#define LLMOPT_PAGES
#include "attention.h"
#include "types.h"
#define SELF "pages.c"
#include "levels.h"
#elif defined(FORMAT)
#include "pages.h"

int FN(pack_rows)(const void *arguments, int threads) {
    const pack *a = arguments;
    long bytes = page_row(a->form, a->kv_heads, a->width);
#pragma omp parallel for num_threads(threads) if (threads > 1 && a->tokens * a->kv_heads * a->width > 65536)
    for (long i = 0; i < a->tokens * a->kv_heads; i++) {
        long token = i / a->kv_heads, head = i % a->kv_heads;
        FN(pack_head)((const E *)a->x + token * a->token + head * a->head, (uint8_t *)a->rows + token * bytes, a->form,
                      a->rotates, a->kv_heads, a->width, head);
    }
    return 0;
}
#endif
