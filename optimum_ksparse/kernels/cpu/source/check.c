/* Whether a unit computes what plain C does, asked once when the library is loaded: compilers and virtual machines err,
 * and not every instruction set could be tried where this was written. */
#include "ksparse.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { OUT = 5, IN = 150, ROW = (IN + 7) / 8, GROUP = 64, GROUPS = 3, TOKENS = 40, MOST = TOKENS * IN };

/* Of one unit; there is room for floats, whatever the dtype. */
struct results { float y[TOKENS * OUT], grad_x[TOKENS * IN], dense[OUT * IN]; };

static int32_t serial(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void *), void *context) {
    (void)grain;
    body(begin, end, context);
    return 0;
}

static uint32_t next(uint32_t *state) { return *state = *state * 1664525 + 1013904223; }

/* Numbers of either sign between 1/32 and 1; integers of any size. */
static void fill(int32_t dtype, uint32_t *state, int64_t count, void *to) {
    for (int64_t i = 0; i < count; i++) {
        const uint32_t bits = next(state), exponent = next(state) >> 16;
        if (dtype >= INT8) ((uint8_t *)to)[i] = bits >> 24;
        else if (dtype == FLOAT32) ((uint32_t *)to)[i] = (bits & 0x807fffff) | (122 + exponent % 5) << 23;
        else if (dtype == BFLOAT16) ((uint16_t *)to)[i] = (bits >> 16 & 0x807f) | (122 + exponent % 5) << 7;
        else ((uint16_t *)to)[i] = (bits >> 16 & 0x83ff) | (10 + exponent % 5) << 10;
    }
}

/* Integers come with x of either dtype, for few tokens as for many. */
static int32_t x_dtype_of(int32_t dtype, int64_t tokens) {
    return dtype < INT8 ? dtype : (dtype + tokens) % 2 ? BFLOAT16 : FLOAT32;
}

static int32_t compute(int32_t unit, int32_t dtype, int64_t tokens, struct results *results) {
    const int32_t x_dtype = x_dtype_of(dtype, tokens);
    uint32_t state = 1 + dtype, values[OUT * IN], x[MOST], grad[TOKENS * OUT], bias[OUT], scales[OUT * GROUPS];
    uint8_t bits[OUT * ROW];
    int64_t starts[OUT];
    for (int i = 0; i < OUT * ROW; i++) bits[i] = (next(&state) >> 24) & (i % ROW == ROW - 1 ? 0x3f : 0xff);
    ksparse_row_starts(bits, OUT, ROW, starts);
    int64_t kept = starts[OUT - 1];
    for (int i = (OUT - 1) * ROW; i < OUT * ROW; i++) kept += __builtin_popcount(bits[i]);
    fill(dtype, &state, OUT * IN, values);
    fill(x_dtype, &state, MOST, x);
    fill(x_dtype, &state, TOKENS * OUT, grad);
    fill(x_dtype, &state, OUT, bias);
    fill(x_dtype, &state, OUT * GROUPS, scales);
    if (dtype == INT4) kept += kept % 2;
    const struct weight w = {values, bits, starts, kept, 0, OUT, IN, ROW, dtype, x_dtype, scales, GROUPS, GROUP};
    memset(results, 0, sizeof(*results));
    return ksparse_linear(serial, unit, &w, x, tokens, bias, results->y) ||
           ksparse_grad_input(serial, unit, &w, grad, tokens, results->grad_x) ||
           ksparse_expand(serial, unit, &w, 0, OUT, results->dense);
}

static int differ(int32_t dtype, const void *some, const void *others, int64_t count) {
    float one[MOST], other[MOST];
    unit_portable.widen(dtype, some, count, one);
    unit_portable.widen(dtype, others, count, other);
    float largest = 0;
    for (int64_t i = 0; i < count; i++) largest = fmaxf(largest, fabsf(other[i]));
    /* In tiles integers times their scales are rounded to bfloat16, which shows where large products cancel out. */
    for (int64_t i = 0; i < count; i++)
        if (!(fabsf(one[i] - other[i]) <= fabsf(other[i]) / 64 + largest / 256 + 1e-3f)) return 1;
    return 0;
}

/* 1 where unit `index` agrees with plain C; 0 where it does not, or memory ran out. */
EXPORT int32_t ksparse_check(int32_t index) {
    int32_t portable = 0, runs, agrees = 1;
    while (ksparse_unit(portable + 1, &runs)) portable++;
    struct results *results = malloc(2 * sizeof(struct results)), *expected = results + 1;
    static const int64_t counts[] = {1, 4, 7, TOKENS}; /* few, some, many */
    for (int32_t dtype = 0; dtype <= INT4 && results; dtype++)
        for (int i = 0; i < 4 && agrees; i++) {
            const int64_t tokens = counts[i];
            const int32_t x_dtype = x_dtype_of(dtype, tokens);
            agrees = !compute(index, dtype, tokens, results) && !compute(portable, dtype, tokens, expected) &&
                     !differ(x_dtype, results->y, expected->y, tokens * OUT) &&
                     !differ(x_dtype, results->grad_x, expected->grad_x, tokens * IN) &&
                     !differ(x_dtype, results->dense, expected->dense, OUT * IN);
        }
    agrees = agrees && results;
    free(results);
    return agrees;
}
