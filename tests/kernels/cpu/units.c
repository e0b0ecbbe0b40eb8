/* Every function of one unit on random weights, compared with sums in double precision.
 *
 * `units NAME ROUNDS`: prints nothing and gives 0, or says what differs and gives 1; 77 where the CPU lacks it. Each array ends where a page begins
 * that may not be touched, and behind a byte that must not change. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "ksparse.h"

enum { PAGE = 1 << 16, ARRAYS = 64 };

static struct { char *base; size_t size, used; } arrays[ARRAYS];
static int count, failures, tiles; /* whether the unit multiplies in tiles, where weights are rounded to bfloat16 */
static uint64_t state = 88172645463325252u;

static uint64_t random_bits(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static int64_t below(int64_t limit) { return (int64_t)(random_bits() >> 20) % limit; }

/* Memory in front of a page that may not be touched; freed by `release`. */
static void *array(size_t bytes) {
    const size_t size = (bytes + 64 + PAGE - 1) / PAGE * PAGE;
    char *base = mmap(NULL, size + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect(base + size, PAGE, PROT_NONE) || count == ARRAYS) abort();
    memset(base, 0xa5, size);
    arrays[count].base = base, arrays[count].size = size, arrays[count++].used = bytes;
    return base + size - bytes;
}

static void fail(const char *what, double is, double should) {
    if (failures++ < 20) printf("%s: %.9g, not %.9g\n", what, is, should);
}

static void release(void) {
    for (; count; count--) {
        const char *base = arrays[count - 1].base;
        const size_t size = arrays[count - 1].size, before = size - arrays[count - 1].used;
        for (size_t i = before - 64; i < before; i++)
            if (base[i] != (char)0xa5) fail("a byte in front of an array changed", base[i], 0xa5);
        munmap((void *)base, size + PAGE);
    }
}

static double number(int32_t dtype, const void *from, int64_t index) {
    if (dtype == INT8) return ((const int8_t *)from)[index];
    if (dtype == INT4) return (int)((((const uint8_t *)from)[index / 2] >> index % 2 * 4 & 15) ^ 8) - 8;
    if (dtype == FLOAT32) return ((const float *)from)[index];
    const int bits = ((const uint16_t *)from)[index], fraction_bits = dtype == FLOAT16 ? 10 : 7;
    const int exponent = (bits & 0x7fff) >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
    const int highest = dtype == FLOAT16 ? 31 : 255, bias = highest / 2 + fraction_bits;
    double size = ldexp(fraction + (exponent ? 1 << fraction_bits : 0), (exponent ? exponent : 1) - bias);
    if (exponent == highest) size = fraction ? NAN : INFINITY;
    return bits & 0x8000 ? -size : size;
}

/* Random numbers from 1/16 to 1, some of them zero or tiny, of either sign; integers, of INT4 an even number of them. */
static void *numbers(int32_t dtype, int64_t length) {
    void *to = array(dtype == INT4 ? length / 2 : dtype == INT8 ? length : length * (dtype == FLOAT32 ? 4 : 2));
    for (int64_t i = 0; i < (dtype == INT4 ? length / 2 : length); i++) {
        if (dtype >= INT8) {
            const int8_t integer = below(256) - 128;
            ((uint8_t *)to)[i] = dtype == INT8 ? (uint8_t)integer : (uint8_t)below(256);
            continue;
        }
        const float value = (float)ldexp(1 + below(128) / 128.0, -(int)below(5)) * (below(2) ? 0.5f : -0.5f);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        if (dtype == FLOAT32) ((float *)to)[i] = below(20) ? value : 0;
        else if (dtype == BFLOAT16) ((uint16_t *)to)[i] = below(20) ? bits >> 16 : below(2);
        else ((uint16_t *)to)[i] = below(20) ? (bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112 << 10)) : below(2);
    }
    return to;
}

static int32_t serial(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void *), void *context) {
    /* In uneven parts, as threads would. */
    for (int64_t part; begin < end; begin += part) {
        part = grain * (1 + below(3));
        if (part > end - begin) part = end - begin;
        body(begin, begin + part, context);
    }
    return 0;
}

static void compare(const char *what, int32_t dtype, double is, double should, double size) {
    const double epsilon = dtype == FLOAT32 ? 0 : dtype == BFLOAT16 ? 0x1p-8 : 0x1p-11;
    const double allowed = epsilon * fabs(should) * 1.001 + 1e-6 * size + (dtype == FLOAT16 ? 0x1p-25 : 0x1p-126);
    if (!(fabs(is - should) <= allowed)) fail(what, is, should);
}

/* A weight with a random mask of `kind`: n:m (0), any (1), any with rows that are empty, full or 2:4 (2), one that lies (3,
 * 4). */
static struct weight make_weight(int kind, int32_t dtype, int32_t x_dtype, int64_t out, int64_t in) {
    struct weight w = {.out_features = out, .in_features = in, .row_bytes = (in + 7) / 8, .dtype = dtype,
                       .x_dtype = x_dtype, .group_size = 64 * (1 + below(4))};
    uint8_t *bits = array(out * w.row_bytes);
    int64_t *starts = array(out * 8), kept = 0;
    const int64_t density = 1 + below(8), of_four = kind == 0 ? 1 + below(2) : 2;
    w.per_row = kind == 0 || kind == 3 ? in / 4 * of_four : 0;
    memset(bits, 0, out * w.row_bytes);
    for (int64_t row = 0; row < out; row++) {
        const int64_t all = kind == 2 ? below(4) : 1;
        const int by_four = kind == 0 || kind == 3 || all == 3;
        starts[row] = kept;
        for (int64_t column = 0, left = 0; column < in; column++) {
            if (column % 4 == 0) left = in - column >= 4 ? of_four : 0;
            int keep = by_four ? below(4 - column % 4) < left : all == 0 ? 0 : all == 2 ? 1 : below(8) < density;
            left -= keep, kept += keep;
            bits[row * w.row_bytes + column / 8] |= keep << column % 8;
        }
    }
    if (kind == 3) /* more bits than values, in the padding too */
        for (int64_t row = 0; row < out; row++)
            memset(bits + row * w.row_bytes, (const int[]){0, 255, 0x33}[below(3)], w.row_bytes);
    if (dtype == INT4) w.per_row += w.per_row % 2; /* half a byte is unused */
    w.num_values = kind == 0 ? out * w.per_row : kind == 3 ? out * w.per_row / 2 : kind == 4 ? below(kept + 1) : kept;
    if (kind == 3) w.per_row /= 2;
    w.starts = kind == 0 || kind == 3 ? NULL : starts;
    if (dtype == INT4) w.num_values += w.num_values % 2;
    w.groups = (in + w.group_size - 1) / w.group_size;
    w.scales = numbers(x_dtype, out * w.groups);
    w.values = numbers(dtype, w.num_values), w.bits = bits;
    return w;
}

static int64_t count_kept(const struct weight *w) {
    int64_t kept = 0;
    for (int64_t byte = 0; byte < w->out_features * w->row_bytes; byte++) kept += __builtin_popcount(w->bits[byte]);
    return kept;
}

static void check_round(int32_t unit, int kind, int32_t dtype, int64_t out, int64_t in, int64_t tokens) {
    const int32_t values_dtype = dtype, quantised = dtype >= INT8;
    if (quantised) dtype = (int32_t)below(3);
    const struct weight w = make_weight(kind, values_dtype, dtype, out, in);
    const int64_t size = dtype == FLOAT32 ? 4 : 2;
    const void *x = numbers(dtype, tokens * in), *grad = numbers(dtype, tokens * out);
    const void *bias = below(2) ? numbers(dtype, out) : NULL;
    void *y = array(tokens * out * size), *grad_x = array(tokens * in * size), *same = array(out * in * size);
    void *gathered = array(w.num_values * size), *lower = array((out - out / 2) * in * size);
    /* A mask that lies is told, wherever it is used as a whole. */
    const int64_t kept = count_kept(&w), stored = values_dtype == INT4 ? kept + kept % 2 : kept;
    const int32_t expected = kind == 0 || (w.num_values == stored && kind != 3) ? 0 : WRONG_MASK;
    if (ksparse_linear(serial, unit, &w, x, tokens, bias, y) != expected) fail("linear", 1, 0);
    if (ksparse_grad_input(serial, unit, &w, grad, tokens, grad_x) != expected) fail("grad_input", 1, 0);
    if (ksparse_expand(serial, unit, &w, 0, out, same) != expected) fail("expand", 1, 0);
    const char *upper_half = (const char *)same + out / 2 * in * size;
    if (!quantised && ksparse_gather(serial, unit, &w, 0, out, same, gathered) != expected) fail("gather", 1, 0);
    if (!quantised && ksparse_gather(serial, unit, &w, out / 2, out, upper_half, gathered) && !expected) fail("gather", 1, 0);
    if (!quantised && !expected && memcmp(gathered, w.values, w.num_values * size)) fail("gather", 0, 0);
    if (ksparse_expand(serial, unit, &w, out / 2, out, lower) && !expected) fail("expand", 1, 0);
    double *sum = calloc(3 * tokens * (out + in), sizeof(double)), *size_of_sum = sum + tokens * (out + in);
    for (int64_t row = 0, index; row < out && kind < 3; row++) {
        index = w.starts ? w.starts[row] : row * w.per_row;
        for (int64_t column = 0; column < in; column++) {
            const int keep = w.bits[row * w.row_bytes + column / 8] >> column % 8 & 1;
            const double scale = quantised ? number(dtype, w.scales, row * w.groups + column / w.group_size) : 1;
            const double weight = keep ? number(values_dtype, w.values, index) * scale : 0;
            const int32_t rounded = quantised ? dtype : FLOAT32;
            compare("expand", rounded, number(dtype, same, row * in + column), weight, 0);
            const int64_t place = (row - out / 2) * in + column;
            if (row >= out / 2) compare("expand a part", rounded, number(dtype, lower, place), weight, 0);
            if (!keep) continue;
            for (int64_t t = 0; t < tokens; t++) {
                const double g = number(dtype, grad, t * out + row), one = number(dtype, x, t * in + column);
                sum[t * out + row] += weight * one, size_of_sum[t * out + row] += fabs(weight * one);
                sum[tokens * out + t * in + column] += weight * g;
                size_of_sum[tokens * out + t * in + column] += fabs(weight * g);
            }
            index++;
        }
    }
    for (int64_t i = 0; i < tokens * out && kind < 3; i++) {
        const double added = bias ? number(dtype, bias, i % out) : 0;
        double magnitude = size_of_sum[i] + fabs(added);
        /* Integers with their scales are rounded, and products that are subnormal count as zero. */
        if (tiles && quantised && dtype == BFLOAT16) magnitude += (size_of_sum[i] * 0x1p-9 + in * 0x1p-126) / 1e-6;
        compare("linear", dtype, number(dtype, y, i), sum[i] + added, magnitude);
    }
    for (int64_t i = 0; i < tokens * in && kind < 3; i++)
        compare("grad_input", dtype, number(dtype, grad_x, i), sum[tokens * out + i], size_of_sum[tokens * out + i]);
    free(sum);
    release();
    if (failures) printf("^ mask %d, dtype %d of %d, %d x %d, tokens %d\n", kind, dtype, values_dtype, (int)out, (int)in, (int)tokens);
}

/* All numbers of 16 bits, one in each row, times one; `dots`: of a unit that multiplies them in pairs. */
static void check_numbers(int32_t unit, int32_t dtype, int dots) {
    uint16_t *values = array(65536 * 2), *y = array(65536 * 2), one = dtype == BFLOAT16 ? 0x3f80 : 0x3c00;
    uint8_t *bits = array(65536);
    for (int i = 0; i < 65536; i++) values[i] = i;
    memset(bits, 1, 65536);
    const struct weight w = {values, bits, NULL, 65536, 1, 65536, 1, 1, dtype, dtype, NULL, 0, 0};
    if (ksparse_linear(serial, unit, &w, &one, 1, NULL, y)) fail("linear", 1, 0);
    for (int i = 0; i < 65536; i++) {
        const double should = number(dtype, values, i), is = number(dtype, y, i);
        const int flushed = dots && is == 0 && fabs(should) < 0x1p-126; /* pairs that small count as zero */
        if (isnan(should) ? !isnan(is) : is != should && !flushed) fail("a number", is, should);
    }
    release();
}

int main(int argc, char **argv) {
    static const int64_t few[] = {1, 2, 3, 4, 5, 6, 9, 16, 23, 24, 33, 48, 64, 70, 130, 513};
    int32_t unit = 0, runs;
    if (argc < 3) return 2;
    const int rounds = atoi(argv[2]);
    while (ksparse_unit(unit, &runs) && strcmp(ksparse_unit(unit, &runs), argv[1])) unit++;
    if (!ksparse_unit(unit, &runs)) return printf("there is no unit %s\n", argv[1]), 2;
#ifdef FORCED /* a unit that this CPU need not run */
    FORCED.start();
#else
    if (!runs) return printf("this CPU does not run %s\n", argv[1]), 77;
#endif
    setvbuf(stdout, NULL, _IOLBF, 0); /* what was said stays, should this crash */
    if (!ksparse_check(unit)) fail("ksparse_check", 0, 1);
    tiles = !!strstr(argv[1], "amx");
    check_numbers(unit, BFLOAT16, tiles || strstr(argv[1], "bf16"));
    check_numbers(unit, FLOAT16, 0);
    for (int round = 0; round < rounds && !failures; round++) {
        const int long_rows = round % 16 == 15;
        const int64_t tokens = long_rows ? 1 + below(2) : few[below(round % 8 ? 13 : 16)];
        int64_t in = long_rows ? 6145 + below(300) : 1 + below(round % 3 ? 150 : 600);
        if (below(2)) in = (in + 63) / 64 * 64;
        check_round(unit, round % 5, round / 5 % 5, 1 + below(round % 8 == 7 ? 12 : tokens > 64 ? 20 : 70), in, tokens);
    }
    return failures != 0;
}
