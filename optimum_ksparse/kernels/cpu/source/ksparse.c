/* Products of packed sparse weights on a CPU. Called from Python by ctypes; runs on torch's threads. */
#include "ksparse.h"

#include <stdlib.h>
#include <string.h>

/* What the Python side was written for: it refuses another number. */
EXPORT int32_t ksparse_version(void) { return 6; }

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

static int runs_avx512bf16(void) {
    uint32_t a, b, c, d;
    return runs_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}

#ifdef HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>

static int runs_avx512amx(void) {
    uint32_t a, b, c, d;
    const uint32_t bf16 = 1u << 22, tiles = 1u << 24;
    const long request_permission = 0x1023, tile_data = 18; /* of arch_prctl: a process must ask for these registers */
    if (!runs_avx512bf16() || !keeps(0x600e6) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return (d & bf16) && (d & tiles) && !syscall(SYS_arch_prctl, request_permission, tile_data);
}
#endif
#endif

#if defined(__aarch64__)
#if defined(__APPLE__)
#include <sys/sysctl.h>

static int runs_neonbf16(void) {
    int has = 0;
    size_t size = sizeof(has);
    return !sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, NULL, 0) && has;
}
#else
#include <sys/auxv.h>

static int runs_neonbf16(void) { return getauxval(AT_HWCAP2) >> 14 & 1; } /* HWCAP2_BF16 */
#endif
#endif

static int always(void) { return 1; }

/* The fastest first. */
static const struct { const struct unit *unit; int (*runs)(void); } units[] = {
#if defined(__x86_64__)
#ifdef HAS_AMX
    {&unit_avx512amx, runs_avx512amx},
#endif
    {&unit_avx512bf16, runs_avx512bf16},
    {&unit_avx512, runs_avx512},
    {&unit_avx2, runs_avx2},
#elif defined(__aarch64__)
    {&unit_neonbf16, runs_neonbf16},
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
};

/* From SOME tokens on only kept weights are multiplied, but where bfloat16 is in pairs. SLAB tokens are multiplied at a
 * time; GRAIN multiplications make it worth waking another thread. */
enum { SOME = 24, SLAB = 512, GRAIN = 1 << 15 };

static int64_t size_of(int32_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

static int64_t grain(int64_t work) { return (GRAIN / (work + 1) / 8 + 1) * 8; }

static int are_many(const struct unit *unit, const struct weight *w, int64_t tokens) {
    return tokens >= SOME && !(w->x_dtype == BFLOAT16 && unit->pairs > (w->dtype != BFLOAT16));
}

static void multiply_rows(int64_t begin, int64_t end, void *context) {
    const struct task *task = context;
    const struct unit *unit = task->unit;
    const struct product *p = &task->product;
    (p->x ? unit->many : p->tokens <= FEW ? unit->few : unit->some)(p, begin, end);
}

static void input_columns(int64_t begin, int64_t end, void *context) {
    const struct task *task = context;
    task->unit->grad_input(&task->product, begin, end);
}

static void expand_rows(int64_t begin, int64_t end, void *context) {
    const struct task *task = context;
    task->unit->expand(&task->product, begin, end);
}

struct gathering {
    const struct weight *w;
    const char *dense; /* rows from first_row on */
    int64_t first_row;
    char *values;
    int32_t *failed;
};

static void gather_rows(int64_t begin, int64_t end, void *context) {
    const struct gathering *g = context;
    const struct weight *w = g->w;
    const int64_t size = size_of(w->x_dtype);
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *bits = w->bits + row * w->row_bytes;
        const char *dense = g->dense + (row - g->first_row) * w->in_features * size;
        int64_t offset = w->starts ? w->starts[row] : row * w->per_row;
        for (int64_t column = 0; column < w->in_features; column += 64) {
            uint64_t word = 0;
            const int64_t left = w->in_features - column;
            memcpy(&word, bits + column / 8, left < 64 ? (left + 7) / 8 : 8);
            if (left < 64) word &= ((uint64_t)1 << left) - 1; /* bits behind the row are no columns */
            if (offset + __builtin_popcountll(word) > w->num_values) {
                *g->failed = WRONG_MASK;
                return;
            }
            for (; word; word &= word - 1, offset++) {
                const int64_t from = column + __builtin_ctzll(word);
                if (size == 4) ((uint32_t *)g->values)[offset] = ((const uint32_t *)dense)[from];
                else ((uint16_t *)g->values)[offset] = ((const uint16_t *)dense)[from];
            }
        }
        const int64_t next = row + 1 == w->out_features ? w->num_values : w->starts ? w->starts[row + 1] : (row + 1) * w->per_row;
        if (offset != next) *g->failed = WRONG_MASK;
    }
}

static int64_t padded(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

/* Tokens [count, features] of a dtype on their way to floats, transposed. */
struct copying {
    const struct unit *unit;
    int32_t dtype;
    const char *from;
    int64_t count, features, stride;
    float *to;
};

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
            const char *from = c->from + place * size_of(c->dtype);
            /* Of the next piece: the rows of 64 tokens are more streams than the CPU follows by itself. */
            for (int64_t ahead = 64; ahead < 128; ahead += 64 / size_of(c->dtype))
                __builtin_prefetch(from + ahead * size_of(c->dtype));
            c->unit->widen(c->dtype, from, features, piece[t]);
        }
        float *to = c->to + block * c->stride + feature * width;
        /* Zero behind the features, where a mask that lies may point, and behind the tokens. */
        for (int64_t t = 0; t < width; t++)
            memset(t < tokens ? piece[t] + features : piece[t], 0, (t < tokens ? 64 - features : 64) * sizeof(float));
        for (int64_t f = 0; f < 64; f += 4)
            for (int64_t t = 0; t < width; t += 4)
                for (int i = 0; i < 4; i++)
                    for (int j = 0; j < 4; j++) to[(f + i) * width + t + j] = piece[t + j][f + i];
    }
}

/* Room for `tokens` tokens, or SLAB of them, as floats, in blocks. */
static float *room(int64_t tokens, int64_t features) {
    void *memory = NULL;
    const int64_t most = padded(tokens < SLAB ? tokens : SLAB, BLOCK);
    return posix_memalign(&memory, 64, most * padded(features, 64) * sizeof(float)) ? NULL : memory;
}

static int32_t transpose(parallel_for run, struct copying c) {
    c.stride = padded(c.features, 64);
    return run(0, padded(c.count, BLOCK) / BLOCK * (c.stride / 64), 8, transpose_tokens, &c);
}

/* A product of tokens, SLAB at a time. */
struct call {
    parallel_for run;
    const struct unit *unit;
    const struct weight *w;
    int64_t tokens;
    const char *x; /* [tokens, x_features] */
    int64_t x_features;
    int transposed; /* whether `body` takes them as floats, transposed */
    const void *bias;
    char *y;
    int64_t y_bytes; /* of a token */
};

/* `body` over `items` of each slab, at least `least` of them in a thread. 0, or one of `failure`. */
static int32_t compute(const struct call *call, void (*body)(int64_t, int64_t, void *), int64_t items, int64_t least) {
    const struct weight *w = call->w;
    const int64_t size = size_of(w->x_dtype);
    float *x = call->transposed ? room(call->tokens, call->x_features) : NULL;
    int32_t error = call->transposed && !x ? NO_MEMORY : 0;
    for (int64_t token = 0; token < call->tokens && !error; token += SLAB) {
        const int64_t count = call->tokens - token < SLAB ? call->tokens - token : SLAB;
        const char *raw = call->x + token * call->x_features * size;
        if (x && transpose(call->run, (struct copying){call->unit, w->x_dtype, raw, count, call->x_features, 0, x}))
            error = NO_MEMORY;
        struct task task = {call->unit, {*w, raw, x, count, padded(call->x_features, 64), call->bias,
                                         call->y + token * call->y_bytes, 0, &error}};
        if (!error && call->run(0, items, least, body, &task)) error = NO_MEMORY;
    }
    free(x);
    return error;
}

/* y [tokens, out] = x [tokens, in] · Wᵀ + bias, x, bias and y of x_dtype. */
EXPORT int32_t ksparse_linear(parallel_for run, int32_t unit, const struct weight *w, const void *x, int64_t tokens,
                              const void *bias, void *y) {
    const int many = are_many(units[unit].unit, w, tokens);
    const struct call call = {run, units[unit].unit, w, tokens, x, w->in_features, many, bias, y,
                              w->out_features * size_of(w->x_dtype)};
    const int64_t work = w->in_features * (tokens < 8 ? tokens : 8);
    return compute(&call, multiply_rows, w->out_features, grain(work));
}

/* grad_x [tokens, in] = grad [tokens, out] · W, both of x_dtype. */
EXPORT int32_t ksparse_grad_input(parallel_for run, int32_t unit, const struct weight *w, const void *grad,
                                  int64_t tokens, void *grad_x) {
    const struct call call = {run, units[unit].unit, w, tokens, grad, w->out_features, 1, NULL, grad_x,
                              w->in_features * size_of(w->x_dtype)};
    return compute(&call, input_columns, padded(w->in_features, 64) / 64, 1);
}

/* Values of rows [begin, end) = dense [end - begin, in] at the mask, both of x_dtype; `values` are those of all rows. */
EXPORT int32_t ksparse_gather(parallel_for run, int32_t unit, const struct weight *w, int64_t begin, int64_t end,
                              const void *dense, void *values) {
    (void)unit;
    int32_t error = 0;
    struct gathering gathering = {w, dense, begin, values, &error};
    return run(begin, end, grain(w->in_features), gather_rows, &gathering) ? NO_MEMORY : error;
}

/* starts [out]: how many weights the rows before keep. */
EXPORT void ksparse_row_starts(const uint8_t *bits, int64_t out_features, int64_t row_bytes, int64_t *starts) {
    int64_t kept = 0;
    for (int64_t row = 0; row < out_features; row++) {
        starts[row] = kept;
        for (int64_t byte = 0; byte < row_bytes; byte++) kept += __builtin_popcount(*bits++);
    }
}

/* out [end - begin, in]: rows of the dense weight in x_dtype. */
EXPORT int32_t ksparse_expand(parallel_for run, int32_t unit, const struct weight *w, int64_t begin, int64_t end,
                              void *out) {
    int32_t error = 0;
    struct task task = {units[unit].unit, {.w = *w, .y = out, .first_row = begin, .failed = &error}};
    return run(begin, end, grain(w->in_features), expand_rows, &task) ? NO_MEMORY : error;
}
