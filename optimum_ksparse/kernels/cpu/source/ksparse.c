/* Products of packed sparse weights on a CPU. Called from Python by ctypes; runs on torch's threads. */
#include "ksparse.h"

#include <stdlib.h>
#include <string.h>

/* What the Python side was written for: it refuses another number. */
EXPORT int32_t ksparse_version(void) { return 1; }

#if defined(__x86_64__)
#include <cpuid.h>

/* Whether the operating system keeps these parts of the registers (XCR0). */
static int keeps(uint32_t parts) {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & parts) == parts;
}

static int runs_avx2(void) {
    uint32_t a, b, c, d;
    const uint32_t fma = 1u << 12, popcnt = 1u << 23, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    const uint32_t needed = fma | popcnt | osxsave | avx | f16c;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needed) != needed || !keeps(6)) return 0;
    const uint32_t bmi = 1u << 3, avx2 = 1u << 5, bmi2 = 1u << 8;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bmi) && (b & avx2) && (b & bmi2);
}

static int runs_avx512(void) {
    uint32_t a, b, c, d;
    const uint32_t f = 1u << 16, bw = 1u << 30, vl = 1u << 31, vbmi = 1u << 1, vbmi2 = 1u << 6;
    if (!runs_avx2() || !keeps(0xe6) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return (b & f) && (b & bw) && (b & vl) && (c & vbmi) && (c & vbmi2);
}
#endif

static int always(void) { return 1; }

/* The fastest first. */
static const struct { const struct unit *unit; int (*runs)(void); } units[] = {
#if defined(__x86_64__)
    {&unit_avx512, runs_avx512},
    {&unit_avx2, runs_avx2},
#elif defined(__aarch64__)
    {&unit_neon, always},
#endif
    {&unit_portable, always},
};

/* The name of unit `index`, NULL behind the last one; whether this CPU runs it, which then is ready. */
EXPORT const char *ksparse_unit(int32_t index, int32_t *runs) {
    if (index < 0 || (size_t)index >= sizeof(units) / sizeof(units[0])) return NULL;
    *runs = units[index].runs();
    if (*runs) units[index].unit->start();
    return units[index].unit->name;
}

struct task {
    const struct unit *unit;
    struct product product;
    int32_t as_float;
    char *out;              /* of `expand` */
    int64_t first_row;      /* of `expand` */
    const float *gradient;  /* of `grad_values` */
};

/* From SOME tokens on only kept weights are multiplied. SLAB tokens are widened at a time; GRAIN multiplications make
 * it worth waking another thread. */
enum { SOME = 24, SLAB = 512, GRAIN = 1 << 15 };

static int64_t size_of(int32_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

static int64_t grain(int64_t work) { return (GRAIN / (work + 1) / 8 + 1) * 8; }

static void multiply_rows(int64_t begin, int64_t end, void *context) {
    const struct task *task = context;
    const int64_t tokens = task->product.tokens;
    (tokens <= FEW ? task->unit->few : tokens < SOME ? task->unit->some : task->unit->many)(&task->product, begin, end);
}

static void input_columns(int64_t begin, int64_t end, void *context) {
    const struct task *task = context;
    task->unit->grad_input(&task->product, begin, end);
}

static void value_rows(int64_t begin, int64_t end, void *context) {
    const struct task *task = context;
    task->unit->grad_values(&task->product, task->gradient, begin, end);
}

static void expand_rows(int64_t begin, int64_t end, void *context) {
    const struct task *task = context;
    const struct weight *w = &task->product.w;
    const int64_t row = w->in_features * (task->as_float ? 4 : size_of(w->dtype));
    task->unit->expand(w, begin, end, task->as_float, task->out + (begin - task->first_row) * row);
}

/* Tokens [count, features] of a dtype on their way to floats. */
struct copying {
    const struct unit *unit;
    int32_t dtype;
    const char *from;
    int64_t count, features, stride;
    float *to;
};

/* Tokens [begin, end), one after the other, zero behind the features: for `few` and `some`. */
static void widen_tokens(int64_t begin, int64_t end, void *context) {
    const struct copying *c = context;
    for (int64_t token = begin; token < end; token++) {
        float *row = c->to + token * c->stride;
        c->unit->widen(c->dtype, c->from + token * c->features * size_of(c->dtype), c->features, row);
        memset(row + c->features, 0, (c->stride - c->features) * sizeof(float));
    }
}

/* Pieces [begin, end) of 64 features of a block of tokens, transposed: for `many` and the gradients. */
static void transpose_tokens(int64_t begin, int64_t end, void *context) {
    const struct copying *c = context;
    const int64_t pieces = c->stride / 64;
    float piece[BLOCK][64];
    for (int64_t part = begin; part < end; part++) {
        const int64_t block = part / pieces * BLOCK, feature = part % pieces * 64;
        const int64_t left = c->count - block, tokens = left < BLOCK ? left : BLOCK;
        const int64_t width = tokens > BLOCK / 2 ? BLOCK : tokens > BLOCK / 4 ? BLOCK / 2 : BLOCK / 4;
        const int64_t features = c->features - feature < 64 ? c->features - feature : 64;
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t place = (block + t) * c->features + feature;
            c->unit->widen(c->dtype, c->from + place * size_of(c->dtype), features, piece[t]);
        }
        float *to = c->to + block * c->stride + feature * width;
        for (int64_t f = 0; f < 64; f++) /* zero behind the features, where a mask that lies may point */
            for (int64_t t = 0; t < width; t++) to[f * width + t] = t < tokens && f < features ? piece[t][f] : 0;
    }
}

static int64_t padded(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

/* Room for `tokens` tokens, or SLAB of them, as floats. */
static float *room(int64_t tokens, int64_t features) {
    void *memory = NULL;
    const int64_t most = padded(tokens < SLAB ? tokens : SLAB, tokens < SOME ? 1 : BLOCK);
    return posix_memalign(&memory, 64, most * padded(features, 64) * sizeof(float)) ? NULL : memory;
}

static int32_t copy_tokens(parallel_for run, struct copying c, int transposed) {
    c.stride = padded(c.features, 64);
    if (transposed) return run(0, padded(c.count, BLOCK) / BLOCK * (c.stride / 64), 8, transpose_tokens, &c);
    return run(0, c.count, grain(c.features) , widen_tokens, &c);
}

/* y [tokens, out] = x [tokens, in] · Wᵀ + bias, x, bias and y of the weight's dtype. 0; else memory ran out. */
EXPORT int32_t ksparse_linear(parallel_for run, int32_t unit, const struct weight *w, const void *x, int64_t tokens,
                              const void *bias, void *y) {
    float *wide = room(tokens, w->in_features);
    int32_t error = !wide, failed = 0;
    for (int64_t token = 0; token < tokens && !error; token += SLAB) {
        const int64_t count = tokens - token < SLAB ? tokens - token : SLAB, size = size_of(w->dtype);
        struct copying c = {units[unit].unit, w->dtype, (const char *)x + token * w->in_features * size, count,
                            w->in_features, 0, wide};
        struct product p = {*w, wide, count, padded(w->in_features, 64), bias,
                            (char *)y + token * w->out_features * size, &failed};
        struct task task = {units[unit].unit, p, 0, NULL, 0, NULL};
        error = copy_tokens(run, c, count >= SOME);
        if (!error) error = run(0, w->out_features, grain(w->in_features * (count < 8 ? count : 8)), multiply_rows, &task) || failed;
    }
    free(wide);
    return error;
}

/* grad_x [tokens, in] = grad [tokens, out] · W, all of the weight's dtype. 0; else memory ran out. */
EXPORT int32_t ksparse_grad_input(parallel_for run, int32_t unit, const struct weight *w, const void *grad,
                                  int64_t tokens, void *grad_x) {
    float *wide = room(padded(tokens, BLOCK), w->out_features);
    int32_t error = !wide, failed = 0;
    for (int64_t token = 0; token < tokens && !error; token += SLAB) {
        const int64_t count = tokens - token < SLAB ? tokens - token : SLAB, size = size_of(w->dtype);
        struct copying c = {units[unit].unit, w->dtype, (const char *)grad + token * w->out_features * size, count,
                            w->out_features, 0, wide};
        struct product p = {*w, wide, count, padded(w->out_features, 64), NULL,
                            (char *)grad_x + token * w->in_features * size, &failed};
        struct task task = {units[unit].unit, p, 0, NULL, 0, NULL};
        error = copy_tokens(run, c, 1);
        if (!error) error = run(0, padded(w->in_features, 64) / 64, 1, input_columns, &task) || failed;
    }
    free(wide);
    return error;
}

/* grads, floats in the places of the values, += gradᵀ [out, tokens] · x [tokens, in] at the mask. */
EXPORT int32_t ksparse_grad_values(parallel_for run, int32_t unit, const struct weight *w, const void *grad,
                                   const void *x, int64_t tokens, float *grads) {
    float *wide = room(padded(tokens, BLOCK), w->in_features), *gradient = room(padded(tokens, BLOCK), w->out_features);
    int32_t error = !wide || !gradient, failed = 0;
    for (int64_t token = 0; token < tokens && !error; token += SLAB) {
        const int64_t count = tokens - token < SLAB ? tokens - token : SLAB, size = size_of(w->dtype);
        struct copying c = {units[unit].unit, w->dtype, (const char *)x + token * w->in_features * size, count,
                            w->in_features, 0, wide};
        struct copying g = {units[unit].unit, w->dtype, (const char *)grad + token * w->out_features * size, count,
                            w->out_features, 0, gradient};
        struct product p = {*w, wide, count, padded(w->in_features, 64), NULL, grads, &failed};
        struct task task = {units[unit].unit, p, 0, NULL, 0, gradient};
        error = copy_tokens(run, c, 1);
        if (!error) error = copy_tokens(run, g, 1);
        if (!error) error = run(0, w->out_features, 8, value_rows, &task) || failed;
    }
    free(wide);
    free(gradient);
    return error;
}

/* starts [out]: how many weights the rows before keep. */
EXPORT void ksparse_row_starts(const uint8_t *bits, int64_t out_features, int64_t row_bytes, int64_t *starts) {
    int64_t kept = 0;
    for (int64_t row = 0; row < out_features; row++) {
        starts[row] = kept;
        for (int64_t byte = 0; byte < row_bytes; byte++) kept += __builtin_popcount(*bits++);
    }
}

/* out [end - begin, in]: rows of the dense weight, as floats or in its own dtype. */
EXPORT int32_t ksparse_expand(parallel_for run, int32_t unit, const struct weight *w, int64_t begin, int64_t end,
                              int32_t as_float, void *out) {
    struct product p = {*w, NULL, 0, 0, NULL, NULL, NULL};
    struct task task = {units[unit].unit, p, as_float, out, begin, NULL};
    return run(begin, end, grain(w->in_features), expand_rows, &task);
}
