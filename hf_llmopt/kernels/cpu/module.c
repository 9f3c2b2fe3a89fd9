/* The Python module `_C`: pointers and sizes in, nothing out. Argument checks are the caller's (ops.py).
 *
 * Every operation is called with a level and a format, which index a table of compiled variants. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#ifdef __x86_64__
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18
#endif
#endif

#include "activation.h"
#include "argmax.h"
#include "attention.h"
#include "conv1d.h"
#include "layer.h"
#include "leaders.h"
#include "linear.h"
#include "norm.h"
#include "pages.h"

typedef int kernel(const void *arguments, int threads); /* not 0: no memory */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define X86_LEVELS 1
#define LEVELS 6
#define DECLARE_LEVELS(op, format)                                                                                     \
    extern kernel op##_##format##_portable, op##_##format##_avx2, op##_##format##_avx512, op##_##format##_avx512vnni,     \
        op##_##format##_avx512bf16, op##_##format##_amx;
#define LIST_LEVELS(op, format)                                                                                        \
    {                                                                                                                  \
        op##_##format##_portable, op##_##format##_avx2, op##_##format##_avx512, op##_##format##_avx512vnni,            \
            op##_##format##_avx512bf16, op##_##format##_amx                                                            \
    }
#else
#define LEVELS 1
#define DECLARE_LEVELS(op, format) extern kernel op##_##format##_portable;
#define LIST_LEVELS(op, format) { op##_##format##_portable }
#endif
#define TABLE(op)                                                                                                      \
    DECLARE_LEVELS(op, f32) DECLARE_LEVELS(op, bf16) DECLARE_LEVELS(op, f16)                                           \
    static kernel *const op##_table[3][LEVELS] = {LIST_LEVELS(op, f32), LIST_LEVELS(op, bf16), LIST_LEVELS(op, f16)};
TABLE(activation)
TABLE(argmax)
TABLE(attention)
TABLE(conv1d)
TABLE(dequantize)
TABLE(layers)
TABLE(leaders)
TABLE(linear)
TABLE(norm)
TABLE(pack_rows)

static const char *const level_names[] = {"portable", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"};

/* Numbers of a call, read one after the other. */
typedef struct {
    PyObject *const *items;
    Py_ssize_t count, next;
} reader;

static long long number(reader *r) {
    r->next++;
    return r->next <= r->count ? PyLong_AsLongLong(r->items[r->next - 1]) : 0;
}

/* Of a head: kernels hold rows of MAX_DIM numbers, and a wider one makes the call malformed. */
static long long width(reader *r) {
    long long n = number(r);
    if (n < 0 || n > MAX_DIM) r->count = -1;
    return n;
}

static void *pointer(reader *r) {
    return (void *)(intptr_t)number(r);
}

/* A pointer that a call may end with. */
static void *last_pointer(reader *r) {
    return r->next < r->count ? pointer(r) : NULL;
}

static float real(reader *r) {
    r->next++;
    return r->next <= r->count ? (float)PyFloat_AsDouble(r->items[r->next - 1]) : 0;
}

/* level, format, threads come first; `filled` is the operation's struct, read after them. */
static PyObject *run(kernel *const table[3][LEVELS], const reader *r, long long level, long long format, int threads,
                     const void *filled) {
    if (PyErr_Occurred()) return NULL;
    if (r->next != r->count || level < 0 || level >= LEVELS || format < 0 || format > 2 || threads < 1) {
        PyErr_SetString(PyExc_ValueError, "hf_llmopt: malformed kernel call");
        return NULL;
    }
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = table[format][level](filled, threads);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

#define OPEN                                                                                                           \
    reader r = {items, count, 0};                                                                                      \
    long long level = number(&r), format = number(&r);                                                                 \
    int threads = (int)number(&r);

/* Parts of operations, in the order in which ops.py lists them. */
static norm read_norm(reader *r) {
    norm a = {0};
    a.weight = pointer(r), a.bias = pointer(r), a.width = number(r);
    a.epsilon = real(r);
    a.centre = (int)number(r), a.variant = (int)number(r);
    return a;
}

static linear read_linear(reader *r) {
    linear a = {0};
    a.weight = pointer(r), a.bias = pointer(r), a.outputs = number(r), a.inputs = number(r);
    a.factor = real(r), a.kind = (int)number(r), a.laid = a.inputs;
    if (a.kind) {
        a.scales = pointer(r), a.zeros = pointer(r), a.order = pointer(r);
        a.zero = real(r), a.laid = number(r), a.group = number(r), a.share = number(r);
    }
    return a;
}

static attention read_attention(reader *r) {
    attention a = {0};
    a.keys = pointer(r), a.values = pointer(r), a.table = pointer(r), a.items = pointer(r), a.sinks = pointer(r);
    a.tokens = number(r), a.heads = number(r), a.kv_heads = number(r), a.key_dim = width(r);
    a.value_dim = width(r), a.page_size = number(r), a.table_width = number(r), a.longest = number(r);
    a.tiled = number(r);
    a.scaling = real(r), a.softcap = real(r), a.form = (int)number(r);
    return a;
}

static PyObject *py_attention(PyObject *self, PyObject *const *items, Py_ssize_t count) {
    (void)self;
    OPEN
    attention a = read_attention(&r);
    a.query = pointer(&r), a.query_token = number(&r), a.query_head = number(&r), a.output = pointer(&r);
    a.tree = last_pointer(&r);
    return run(attention_table, &r, level, format, threads, &a);
}

static PyObject *py_linear(PyObject *self, PyObject *const *items, Py_ssize_t count) {
    (void)self;
    OPEN
    linear a = read_linear(&r);
    a.stride = a.outputs;
    a.x = pointer(&r), a.residual = pointer(&r), a.y = pointer(&r), a.rows = number(&r);
    return run(linear_table, &r, level, format, threads, &a);
}

static PyObject *py_dequantize(PyObject *self, PyObject *const *items, Py_ssize_t count) {
    (void)self;
    OPEN
    linear a = read_linear(&r);
    a.y = pointer(&r);
    return run(dequantize_table, &r, level, format, threads, &a);
}

static PyObject *py_conv1d(PyObject *self, PyObject *const *items, Py_ssize_t count) {
    (void)self;
    OPEN
    conv1d a = {0};
    a.x = pointer(&r), a.weight = pointer(&r), a.bias = pointer(&r), a.y = pointer(&r);
    a.rows = number(&r), a.outputs = number(&r), a.inputs = number(&r);
    return run(conv1d_table, &r, level, format, threads, &a);
}

static PyObject *py_norm(PyObject *self, PyObject *const *items, Py_ssize_t count) {
    (void)self;
    OPEN
    norm a = read_norm(&r);
    a.x = pointer(&r), a.y = pointer(&r), a.rows = number(&r);
    return run(norm_table, &r, level, format, threads, &a);
}

static PyObject *py_pack_rows(PyObject *self, PyObject *const *items, Py_ssize_t count) {
    (void)self;
    OPEN
    pack a = {0};
    a.x = pointer(&r), a.rows = pointer(&r), a.tokens = number(&r), a.kv_heads = number(&r), a.width = number(&r);
    a.token = number(&r), a.head = number(&r), a.form = (int)number(&r), a.rotates = (int)number(&r);
    return run(pack_rows_table, &r, level, format, threads, &a);
}

static PyObject *py_activation(PyObject *self, PyObject *const *items, Py_ssize_t count) {
    (void)self;
    OPEN
    activation a = {0};
    a.gate = pointer(&r), a.up = pointer(&r), a.y = pointer(&r);
    a.rows = number(&r), a.width = number(&r), a.stride = number(&r);
    a.kind = (int)number(&r);
    return run(activation_table, &r, level, format, threads, &a);
}

static PyObject *py_argmax(PyObject *self, PyObject *const *items, Py_ssize_t count) {
    (void)self;
    OPEN
    argmax a = {0};
    a.x = pointer(&r), a.best = pointer(&r), a.rows = number(&r), a.width = number(&r), a.stride = number(&r);
    return run(argmax_table, &r, level, format, threads, &a);
}

static PyObject *py_leaders(PyObject *self, PyObject *const *items, Py_ssize_t count) {
    (void)self;
    OPEN
    leaders a = {0};
    a.estimates = pointer(&r), a.error = pointer(&r), a.spread = pointer(&r), a.slack = pointer(&r);
    a.logits = pointer(&r), a.found = pointer(&r);
    a.rows = number(&r), a.width = number(&r), a.most = number(&r), a.parts = number(&r);
    a.spacing = real(&r), a.tiny = real(&r);
    return run(leaders_table, &r, level, format, threads, &a);
}

static layer read_layer(reader *r) {
    layer a = {0};
    norm *norms[] = {&a.before_attention, &a.query_norm, &a.key_norm, &a.after_attention, &a.before_mlp, &a.after_mlp};
    for (int i = 0; i < 6; i++) *norms[i] = read_norm(r);
    linear *products[] = {&a.query, &a.key, &a.value, &a.output, &a.gate, &a.up, &a.down};
    for (int i = 0; i < 7; i++) *products[i] = read_linear(r);
    a.attention = read_attention(r);
    a.turns.cosine = pointer(r), a.turns.sine = pointer(r), a.turns.slots = pointer(r);
    a.turns.rotated = width(r), a.turns.pairs = (int)number(r), a.turns.wide = (int)number(r);
    a.turns.key = pointer(r), a.turns.value = pointer(r), a.turns.head = number(r), a.turns.value_head = number(r);
    a.turns.keys = (void *)a.attention.keys, a.turns.values = (void *)a.attention.values;
    a.turns.form = a.attention.form;
    a.turns.heads = a.attention.heads, a.turns.kv_heads = a.attention.kv_heads;
    a.turns.key_dim = a.attention.key_dim, a.turns.value_dim = a.attention.value_dim;
    a.kind = (int)number(r), a.parallel = (int)number(r);
    return a;
}

static PyObject *py_layers(PyObject *self, PyObject *const *items, Py_ssize_t count) {
    (void)self;
    OPEN
    stack all = {0};
    all.x = pointer(&r), all.y = pointer(&r), all.spent = pointer(&r);
    all.tokens = number(&r), all.hidden = number(&r), all.count = number(&r);
    if (all.count < 1 || all.count > count) r.next = -1; /* refused below */
    all.layers = r.next < 0 ? NULL : PyMem_Calloc((size_t)all.count, sizeof(layer));
    if (r.next >= 0 && !all.layers) return PyErr_NoMemory();
    for (long i = 0; all.layers && i < all.count; i++) all.layers[i] = read_layer(&r);
    for (long i = 0; all.layers && i < all.count; i++) all.layers[i].attention.tree = last_pointer(&r);
    PyObject *result = run(layers_table, &r, level, format, threads, &all);
    PyMem_Free(all.layers);
    return result;
}

#ifdef X86_LEVELS
/* AMX's tiles are 8 KiB of state that the kernel hands to a process on request. */
static int has_amx(void) {
#ifdef __linux__
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 13) != 13) return 0; /* bf16, tile, int8 */
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}
#endif

/* The levels that this machine can run, best last. */
static PyObject *py_levels(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    int best = 0;
#ifdef X86_LEVELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = 1;
    if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        best = 2;
    if (best == 2 && __builtin_cpu_supports("avx512vnni")) best = 3;
    if (best == 3 && __builtin_cpu_supports("avx512bf16")) best = 4;
    if (best == 4 && has_amx()) best = 5;
#endif
    PyObject *names = PyTuple_New(best + 1);
    for (int i = 0; names && i <= best; i++) {
        PyObject *name = PyUnicode_FromString(level_names[i]);
        if (!name) {
            Py_DECREF(names);
            return NULL;
        }
        PyTuple_SET_ITEM(names, i, name);
    }
    return names;
}

#if defined(__GNUC__) && !defined(__clang__) && defined(_OPENMP)
/* From OpenMP 5.0. Weak, because the runtime that runs is the one that torch brings, whichever that is. */
extern int omp_pause_resource_all(int kind) __attribute__((weak));
#define END_THREADS() (omp_pause_resource_all ? omp_pause_resource_all(2 /* omp_pause_hard */) : 0)
#else
#define END_THREADS() 0
#endif

static PyObject *py_rest(PyObject *self, PyObject *none) {
    (void)self;
    (void)none;
    (void)END_THREADS();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"argmax", (PyCFunction)(void (*)(void))py_argmax, METH_FASTCALL, "See argmax.c."},
    {"attention", (PyCFunction)(void (*)(void))py_attention, METH_FASTCALL, "See attention.c."},
    {"conv1d", (PyCFunction)(void (*)(void))py_conv1d, METH_FASTCALL, "See conv1d.c."},
    {"dequantize", (PyCFunction)(void (*)(void))py_dequantize, METH_FASTCALL, "See quantized.c."},
    {"layers", (PyCFunction)(void (*)(void))py_layers, METH_FASTCALL, "See layer.c."},
    {"leaders", (PyCFunction)(void (*)(void))py_leaders, METH_FASTCALL, "See leaders.c."},
    {"linear", (PyCFunction)(void (*)(void))py_linear, METH_FASTCALL, "See linear.c."},
    {"norm", (PyCFunction)(void (*)(void))py_norm, METH_FASTCALL, "See norm.c."},
    {"pack_rows", (PyCFunction)(void (*)(void))py_pack_rows, METH_FASTCALL, "See pages.c."},
    {"activation", (PyCFunction)(void (*)(void))py_activation, METH_FASTCALL, "See activation.c."},
    {"rest", py_rest, METH_NOARGS, "Ends the threads that OpenMP keeps for the calling thread."},
    {"levels", py_levels, METH_NOARGS, "Names of the instruction set levels this machine can run, best last."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Kernels in C.", -1, methods, NULL, NULL, NULL,
                                        NULL};

PyMODINIT_FUNC PyInit__C(void) {
    return PyModule_Create(&definition);
}
