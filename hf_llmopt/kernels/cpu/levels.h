/* Compiles an operation's file once for every instruction set and number format.
 *
 * A file defines SELF as its own name, includes this header, and is included back with
 *   E, DTYPE   the storage format (float, bf16, f16) and its number 0, 1, 2
 *   FN(name)   the name with format and level appended
 * in scope. Vectors are GCC vectors of 16 floats: the compiler lowers them to whatever the level has, so that one source
 * serves AVX-512, AVX2, SSE2 and NEON, with the same order of additions. */
#define PASTE3(a, b, c) a##_##b##_##c
#define PASTE(a, b, c) PASTE3(a, b, c)
#define FN(name) PASTE(name, FORMAT, LEVEL)

#define LEVEL portable
#include "formats.h"
#undef LEVEL

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define LEVEL avx2
#include "formats.h"
#undef LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define LEVEL avx512
#include "formats.h"
#undef LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#define LEVEL avx512vnni
#include "formats.h"
#undef LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")
#define LEVEL avx512bf16
#define HAS_BF16_DOT 1
#include "formats.h"
#undef LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")
#define LEVEL amx
#define HAS_AMX 1
#include "formats.h"
#undef HAS_AMX
#undef HAS_BF16_DOT
#undef LEVEL
#pragma GCC pop_options
#endif
