/* The algorithms, written once over the primitives of an instruction set. A unit defines, then includes this file:
 *
 *   UNIT            its name
 *   start           fills its tables
 *   LANES           floats in a vector `vec`: v_zero, v_load, v_store, v_fma(a, b, sum), v_sum
 *   STEP            weights that are expanded together, 8 or more; `step_mask` takes their mask, a `mask_t`, out of 64
 *                   bits, `count_bits` counts what it keeps
 *   TILE_ROWS, BLOCK_TOKENS   of `some`: as many sums fit the registers
 *   expand_32, expand_bf16, expand_16(values, mask, vec weights[STEP / LANES]): the kept values, of which as many as
 *                   STEP may be read, at their places, zeros between them
 *   expand_2_bytes(values, mask, out): the same for 16-bit values, as they are
 *   expand_int8(values, word, step, vec weights[INTEGER_STEP / LANES]): the same for bytes, of INTEGER_STEP columns,
 *                   whose mask is part `step` of 64 bits; times INTEGER_UNIT they are the integers. Gives how many
 *                   are kept
 *   expand_alike(dtype, values, word, vec weights[64 / LANES]), are_alike(bits, words): only where it is faster to know
 *                   that each byte of the mask keeps 4. The first of 64 columns, of any dtype but pairs; INT4 and INT8 as
 *                   `expand_int8` or as integers are
 *   load_whole(dtype, values, vec weights[STEP / LANES]): only where it is faster than to expand what a mask keeps whole
 *   v_dot(a, b, sum), expand_pairs(values, mask, vec weights[STEP / LANES / 2]): only where the instruction set
 *                   multiplies pairs of bfloat16: each lane holds two, and so does each lane of x
 *   expand_integer_pairs(halves, values, odd, word, vec weights[64 / LANES / 2]), order_pairs(x): where that is the
 *                   faster way for integers, too; the first takes 64 of them in the order that the second gives 64
 *                   bfloat16. `halves`: of bytes, from half number `odd` on. 64 bytes may be read
 */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

enum { PARTS = STEP / LANES, COLUMNS = 512, PIECE = 16, VECTORS = BLOCK / LANES, PANEL = 256, AHEAD = 4 };
/* Of `few`: independent sums of a row and token; how far on lies, in bytes, what is to be read soon. */
enum { CHAINS = 4, SOON = 2048 };
/* As a dtype: bfloat16 that is multiplied in pairs; either type of integers, where it is asked only when it runs which;
 * the same, multiplied in pairs.
 * HALVES: bfloat16 as `few` and `some` multiply it. */
enum { DOTS = -1, INTEGERS = -2, INTEGER_DOTS = -3 };
#ifdef v_dot
enum { HALVES = DOTS, HAS_DOTS = 1 };
#else
enum { HALVES = BFLOAT16, HAS_DOTS = 0 };
#endif

#ifdef expand_int4
enum { HAS_INT4 = 1 };
#else
enum { HAS_INT4 = 0 };
#endif

/* How many numbers of x, or weights to be multiplied with it, a lane holds. */
INLINE int in_lane(int32_t dtype) { return dtype == DOTS || dtype == INTEGER_DOTS ? 2 : 1; }

INLINE float half_to_float(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#elif defined(__aarch64__)
    union { uint16_t bits; __fp16 value; } narrow = {half};
    return narrow.value;
#else
    /* Exponents are rebased by a multiplication, which is exact; infinities and NaN keep their exponent of ones. */
    union { uint32_t bits; float value; } wide = {(uint32_t)(half & 0x7fff) << 13}, scale = {0x77800000};
    wide.value *= scale.value; /* 2^112 */
    if ((half & 0x7c00) == 0x7c00) wide.bits |= 0x7f800000;
    wide.bits |= (uint32_t)(half & 0x8000) << 16;
    return wide.value;
#endif
}

INLINE uint16_t float_to_half(float value) {
    /* Round to nearest, ties to even: Fabian Giesen's conversion. */
    union { uint32_t bits; float value; } wide = {0}, magic = {0x3f000000};
    wide.value = value;
    uint16_t sign = (uint16_t)(wide.bits >> 16 & 0x8000);
    wide.bits &= 0x7fffffff;
    if (wide.bits > 0x7f800000) return sign | 0x7e00;
    if (wide.bits >= 0x477ff000) return sign | 0x7c00;
    if (wide.bits < 0x38800000) { /* subnormal: the adder rounds */
        wide.value += magic.value;
        return sign | (uint16_t)(wide.bits - magic.bits);
    }
    wide.bits += 0xc8000fff + (wide.bits >> 13 & 1);
    return sign | (uint16_t)(wide.bits >> 13);
}

INLINE float load_number(int32_t dtype, const void *from, int64_t index) {
    union { uint32_t bits; float value; } wide = {0};
    if (dtype == FLOAT32) return ((const float *)from)[index];
    if (dtype == FLOAT16) return half_to_float(((const uint16_t *)from)[index]);
    wide.bits = (uint32_t)((const uint16_t *)from)[index] << 16;
    return wide.value;
}

INLINE void store_number(int32_t dtype, void *to, int64_t index, float value) {
    union { uint32_t bits; float value; } wide = {0};
    wide.value = value;
    if (dtype == FLOAT32) ((float *)to)[index] = value;
    else if (dtype == FLOAT16) ((uint16_t *)to)[index] = float_to_half(value);
    else if (value != value) ((uint16_t *)to)[index] = 0x7fc0;
    else ((uint16_t *)to)[index] = (uint16_t)((wide.bits + 0x7fff + (wide.bits >> 16 & 1)) >> 16);
}

INLINE int64_t size_of(int32_t dtype) { return dtype == FLOAT32 ? 4 : dtype <= INTEGERS ? 1 : 2; }

/* The dtype of x and y where the values are of `dtype`. */
INLINE int32_t dtype_of_x(int32_t dtype, const struct weight *w) { return dtype <= INTEGERS ? w->x_dtype : dtype; }

INLINE int64_t row_start(const struct weight *w, int64_t row) { return w->starts ? w->starts[row] : row * w->per_row; }

/* Where a row's values must end, once its bits are read: they may have changed since `starts` was counted. */
INLINE void check_end(const struct product *p, int64_t row, int64_t offset) {
    const struct weight *w = &p->w;
    const int64_t left = (row + 1 < w->out_features ? row_start(w, row + 1) : w->num_values) - offset;
    const int half_unused = w->dtype == INT4 && left == 1 && (!w->starts || row + 1 == w->out_features);
    if (left && !half_unused) *p->failed = WRONG_MASK;
}

INLINE void expand(int32_t dtype, const char *values, mask_t mask, vec *weights) {
    if (dtype == FLOAT32) expand_32(values, mask, weights);
#ifdef v_dot
    else if (dtype == DOTS) expand_pairs(values, mask, weights);
#endif
    else if (dtype == BFLOAT16) expand_bf16(values, mask, weights);
    else expand_16(values, mask, weights);
}

/* Up to 8 bytes of a row's mask, of which `bytes` are left; those behind its end are zero. */
INLINE uint64_t load_bits(const uint8_t *bits, int64_t bytes) {
    uint64_t word = 0;
    if (bytes > 0) memcpy(&word, bits, bytes < 8 ? bytes : 8);
    return word;
}

/* How many bytes of a row's mask there are from a column on. */
INLINE int64_t mask_left(const struct weight *w, int64_t column) { return (w->in_features + 7) / 8 - column / 8; }

/* Where the values from `offset` on may be read STEP at a time: in place, or, near the end of them, a copy. */
INLINE const char *readable(const struct weight *w, int32_t dtype, int64_t offset, char *copy) {
    const int64_t size = size_of(dtype), left = w->num_values - offset;
    if (left >= STEP) return (const char *)w->values + offset * size;
    if (left > 0) memcpy(copy, (const char *)w->values + offset * size, left * size);
    return copy;
}

INLINE vec multiply_add(int32_t dtype, vec a, vec b, vec sum) {
#ifdef v_dot
    if (in_lane(dtype) == 2) return v_dot(a, b, sum);
#endif
    (void)dtype;
    return v_fma(a, b, sum);
}

/* sums[chains][tokens] += `parts` vectors of weights times x, from chain `chain` on. */
INLINE void multiply(int32_t dtype, int tokens, int parts, int chains, int chain, const float *x, int64_t stride,
                     const vec *weights, vec *sums) {
    for (int part = 0; part < parts; part++)
        for (int token = 0; token < tokens; token++) {
            vec *sum = sums + (chain + part) % chains * tokens + token;
            *sum = multiply_add(dtype, weights[part], v_load(x + token * stride + part * LANES), *sum);
        }
}

/* The last of the offsets: that of the last row, unless a mask lies. */
INLINE int64_t last_of(const int64_t *offset, int rows) {
    int64_t last = offset[0];
    for (int r = 1; r < rows; r++) last = offset[r] > last ? offset[r] : last;
    return last;
}

/* out[rows][tokens] from independent sums [rows][chains][tokens] of each. */
INLINE void add_chains(int rows, int tokens, int chains, const vec *sums, float *out) {
    for (int r = 0; r < rows; r++)
        for (int token = 0; token < tokens; token++) {
            vec sum = sums[r * chains * tokens + token];
            for (int chain = 1; chain < chains; chain++)
                sum = v_add(sum, sums[(r * chains + chain) * tokens + token]);
            out[r * tokens + token] = v_sum(sum);
        }
}

/* How many rows are looked at together, which takes less time than one after the other. */
INLINE int64_t rows_to_ask(const struct weight *w, int64_t row, int64_t end) {
    const int64_t rows = w->row_bytes < 512 ? 2048 / (w->row_bytes + 1) / 4 * 4 : 4;
    return end - row < rows ? end - row : rows;
}

/* Whether each byte of the mask of these rows keeps 4, as those of 2:4 and 4:8 do, where that helps. */
INLINE int all_alike(const struct weight *w, int64_t row, int64_t rows) {
#ifdef expand_alike
    return w->row_bytes && w->in_features % 64 == 0 && are_alike(w->bits + row * w->row_bytes, rows * w->row_bytes / 8);
#else
    (void)w, (void)row, (void)rows;
    return 0;
#endif
}

/* `few_rows` where all are alike, and `in_features` values may be read behind them. */
INLINE void alike_rows(int32_t dtype, int rows, int tokens, const struct product *p, int64_t row, float *out) {
#ifdef expand_alike
    const struct weight *w = &p->w;
    const int64_t size = size_of(dtype), start = row_start(w, row), kept = w->in_features / 2;
    const char *values = (const char *)w->values + start * size;
    const uint8_t *bits = w->bits + row * w->row_bytes, *end = bits + w->row_bytes;
    const int chains = rows * tokens > 2 ? 1 : CHAINS;
    vec sums[4 * CHAINS * FEW];
    for (int i = 0; i < rows * tokens * chains; i++) sums[i] = v_zero();
    for (const float *x = p->x; bits < end; bits += 8, values += 32 * size, x += 64)
        for (int r = 0; r < rows; r++) {
            const char *from = values + r * kept * size;
            vec weights[64 / LANES];
            for (int64_t line = 0; line < 32 * size; line += 64)
                __builtin_prefetch(from + SOON + (rows - 1) * kept * size + line);
            expand_alike(dtype, from, load_bits(bits + r * w->row_bytes, 8), weights);
            multiply(dtype, tokens, 64 / LANES, chains, 0, x, p->stride, weights, sums + r * chains * tokens);
        }
    for (int r = 0; r < rows; r++) check_end(p, row + r, start + (r + 1) * kept);
    add_chains(rows, tokens, chains, sums, out);
#else
    (void)dtype, (void)rows, (void)tokens, (void)p, (void)row, (void)out;
#endif
}

/* STEP weights, and how many of them there were; `whole`: their mask keeps all. */
INLINE int64_t next_weights(int32_t dtype, int whole, const char *values, mask_t mask, vec *weights) {
#ifdef load_whole
    if (whole) {
        load_whole(dtype, values, weights);
        return STEP;
    }
#endif
    (void)whole;
    expand(dtype, values, mask, weights);
    return count_bits(mask);
}

/* sums[rows][tokens] of a few rows, whose steps alternate, so that each load of x serves them all. `whole`: they have no
 * zeros. */
INLINE void few_rows(int32_t dtype, int rows, int tokens, int whole, const struct product *p, int64_t row, float *out) {
    const struct weight *w = &p->w;
    const int64_t size = size_of(dtype), stride = p->stride / in_lane(dtype);
    const char *values = w->values;
    int64_t offset[4];
    const uint8_t *bits[4];
    vec sums[4 * CHAINS * FEW];
    const int chains = rows * tokens > 2 ? 1 : CHAINS, parts = PARTS / in_lane(dtype);
    /* What is read a little later, in this row or, when several are read, behind them all. */
    const int64_t soon = SOON + (row_start(w, row + rows - 1) - row_start(w, row)) * size;
    for (int i = 0; i < rows * tokens * chains; i++) sums[i] = v_zero();
    for (int r = 0; r < rows; r++) offset[r] = row_start(w, row + r), bits[r] = w->bits + (row + r) * w->row_bytes;
    int64_t column = 0;
    for (; column + 64 <= w->in_features && last_of(offset, rows) + 64 <= w->num_values; column += 64) {
        for (int r = 0; r < rows; r++) {
            for (int64_t line = 0; line < (whole ? 64 : 32) * size; line += 64)
                __builtin_prefetch(values + offset[r] * size + soon + line);
            uint64_t word = load_bits(bits[r] + column / 8, 8);
            for (int step = 0; step < 64 / STEP; step++) {
                mask_t mask = step_mask(word, step);
                vec weights[PARTS];
                offset[r] += next_weights(dtype, whole, values + offset[r] * size, mask, weights);
                multiply(dtype, tokens, parts, chains, step * parts, p->x + (column + step * STEP) / in_lane(dtype), stride,
                         weights, sums + r * chains * tokens);
            }
        }
    }
    for (; column < w->in_features; column += STEP)
        for (int r = 0; r < rows; r++) {
            char copy[STEP * 4] = {0};
            vec weights[PARTS];
            mask_t mask = step_mask(load_bits(bits[r] + column / 8, mask_left(w, column)), 0);
            expand(dtype, readable(w, dtype, offset[r], copy), mask, weights);
            offset[r] += count_bits(mask);
            multiply(dtype, tokens, parts, chains, 0, p->x + column / in_lane(dtype), stride, weights,
                     sums + r * chains * tokens);
        }
    for (int r = 0; r < rows; r++) check_end(p, row + r, offset[r]);
    add_chains(rows, tokens, chains, sums, out);
}

INLINE void finish(int32_t dtype, const struct product *p, int64_t row, int64_t token, float sum) {
    dtype = dtype_of_x(dtype, &p->w);
    if (p->bias) sum += load_number(dtype, p->bias, row);
    store_number(dtype, p->y, token * p->w.out_features + row, sum);
}

#include "integers.h"

INLINE void few_of(int32_t dtype, int tokens, const struct product *p, int64_t begin, int64_t end) {
    /* Rows alternate where x does not stay in the first cache. */
    const int together = tokens == 1 && p->w.row_bytes && p->w.in_features > 6144 ? 4 : 1;
    float sums[4 * FEW];
    int64_t row = begin, asked = begin;
    int alike = 0;
    if (dtype <= INTEGERS) few_integers(dtype, tokens, p, row, end), row = end;
    while (row < end) {
        const int rows = together == 4 && row + 4 <= end && row_start(&p->w, row + 3) <= p->w.num_values ? 4 : 1;
        if (row + rows > asked) {
            const int64_t more = rows_to_ask(&p->w, row, end);
            alike = all_alike(&p->w, row, more);
            asked = row + more;
        }
        const int at_end = row_start(&p->w, row) + (rows + 2) * (p->w.in_features / 2) > p->w.num_values;
        if (rows == 4 && alike && !at_end) alike_rows(dtype, 4, 1, p, row, sums);
        else if (rows == 4) few_rows(dtype, 4, 1, 0, p, row, sums);
        else if (alike && !at_end) alike_rows(dtype, 1, tokens, p, row, sums);
        else if (!p->w.row_bytes) few_rows(dtype, 1, tokens, 1, p, row, sums);
        else few_rows(dtype, 1, tokens, 0, p, row, sums);
        for (int r = 0; r < rows; r++)
            for (int token = 0; token < tokens; token++) finish(dtype, p, row + r, token, sums[r * tokens + token]);
        row += rows;
    }
}

/* Each thread makes what it needs of x: fetching it from another processor's cache would take longer. */
static void widen(int32_t dtype, const void *from, int64_t count, float *to) {
    if (dtype == FLOAT32) memcpy(to, from, count * sizeof(float));
    else if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++) to[i] = load_number(BFLOAT16, from, i);
    else
        for (int64_t i = 0; i < count; i++) to[i] = load_number(FLOAT16, from, i);
}

/* `features` of x, from `column` of a token on, as they are multiplied, and zeros up to `most`. */
INLINE void copy_features(int32_t dtype, const struct product *p, int64_t token, int64_t column, int64_t most, float *to) {
    const int64_t size = size_of(p->w.x_dtype), to_size = 4 / in_lane(dtype), left = p->w.in_features - column;
    const int64_t features = token >= p->tokens || left < 0 ? 0 : left < most ? left : most;
    const char *from = (const char *)p->raw + (token * p->w.in_features + column) * size;
    if (in_lane(dtype) == 2) memcpy(to, from, features * size);
    else if (features) widen(dtype_of_x(dtype, &p->w), from, features, to);
    memset((char *)to + features * to_size, 0, (most - features) * to_size);
}

INLINE void few_in(int32_t dtype, struct product p, int64_t begin, int64_t end) {
    const int32_t x_dtype = dtype_of_x(dtype, &p.w);
    const int ordered = dtype == INTEGER_DOTS || (HAS_INT4 && dtype == INTEGERS && p.w.dtype == INT4);
    const int as_it_is = !ordered && (dtype == DOTS || x_dtype == FLOAT32) && p.stride == p.w.in_features;
    float *x = NULL;
    if (as_it_is) p.x = p.raw;
    else if (posix_memalign((void **)&x, 64, p.tokens * p.stride * sizeof(float))) {
        *p.failed = NO_MEMORY;
        return;
    } else {
        p.x = x;
        for (int64_t token = 0; token < p.tokens; token++)
            copy_features(dtype, &p, token, 0, p.stride, x + token * p.stride / in_lane(dtype));
#ifdef expand_int4
        for (int64_t i = 0; i < p.tokens * p.stride && dtype == INTEGERS && p.w.dtype == INT4; i += 64) order_int4(x + i);
#endif
#ifdef expand_integer_pairs
        for (int64_t i = 0; i < p.tokens * p.stride && dtype == INTEGER_DOTS; i += 64) order_pairs(x + i / 2);
#endif
    }
    if (p.tokens == 1) few_of(dtype, 1, &p, begin, end);
    else if (p.tokens == 2) few_of(dtype, 2, &p, begin, end);
    else if (p.tokens == 3) few_of(dtype, 3, &p, begin, end);
    else few_of(dtype, 4, &p, begin, end);
    free(x);
}

static void few(const struct product *p, int64_t begin, int64_t end) {
    if (p->w.dtype == FLOAT32) few_in(FLOAT32, *p, begin, end);
    else if (p->w.dtype == BFLOAT16) few_in(HALVES, *p, begin, end);
    else if (p->w.dtype == FLOAT16) few_in(FLOAT16, *p, begin, end);
#ifdef expand_integer_pairs
    else if (p->w.x_dtype == BFLOAT16) few_in(INTEGER_DOTS, *p, begin, end);
#endif
    else few_in(INTEGERS, *p, begin, end);
}

/* The weights of one row from `column` on, as floats or pairs; gives the offset behind them. What lies `ahead` rows on
 * is to be read soon. */
INLINE int64_t expand_row(int32_t dtype, const struct weight *w, int64_t row, int64_t column, int64_t columns,
                          int64_t offset, int64_t ahead, float *out) {
    if (dtype == INTEGERS) return expand_integers(w, row, column, columns, offset, out);
    const uint8_t *bits = w->bits + row * w->row_bytes;
    const int64_t end = column + columns, size = size_of(dtype);
    vec weights[PARTS];
    const int parts = PARTS / in_lane(dtype);
    const int64_t bytes = row + ahead < w->out_features ? (row_start(w, row + ahead) - row_start(w, row)) * size : 0;
    for (; column + 64 <= end && offset + 64 <= w->num_values && column + 64 <= w->in_features; column += 64) {
        const uint64_t word = load_bits(bits + column / 8, 8);
        for (int64_t line = 0; line < 32 * size; line += 64)
            __builtin_prefetch((const char *)w->values + offset * size + bytes + line, 0, 2);
        __builtin_prefetch(bits + column / 8 + ahead * w->row_bytes, 0, 2);
        for (int step = 0; step < 64 / STEP; step++) {
            mask_t mask = step_mask(word, step);
            expand(dtype, (const char *)w->values + offset * size, mask, weights);
            offset += count_bits(mask);
            for (int part = 0; part < parts; part++, out += LANES) v_store(out, weights[part]);
        }
    }
    for (; column < end; column += STEP) {
        char copy[STEP * 4] = {0};
        mask_t mask = step_mask(load_bits(bits + column / 8, mask_left(w, column)), 0);
        expand(dtype, readable(w, dtype, offset, copy), mask, weights);
        offset += count_bits(mask);
        for (int part = 0; part < parts; part++, out += LANES) v_store(out, weights[part]);
    }
    return offset;
}

/* sums[TILE_ROWS][tokens of the block] += tile · x over `width` lanes of each; x [width / PIECE][tokens][PIECE]. */
INLINE void tile_times_block(int32_t dtype, const float *tile, const float *x, int64_t width, float *sums,
                             int64_t next_row) {
    vec sum[TILE_ROWS * BLOCK_TOKENS];
    for (int r = 0; r < TILE_ROWS; r++)
        for (int token = 0; token < BLOCK_TOKENS; token++)
            sum[r * BLOCK_TOKENS + token] = v_load(sums + r * next_row + token * LANES);
    for (int64_t i = 0; i < width; i += PIECE, tile += PIECE, x += PIECE * BLOCK_TOKENS)
        for (int lane = 0; lane < PIECE; lane += LANES) {
            vec one[BLOCK_TOKENS];
            for (int token = 0; token < BLOCK_TOKENS; token++) one[token] = v_load(x + token * PIECE + lane);
            for (int r = 0; r < TILE_ROWS; r++) {
                const vec weights = v_load(tile + r * COLUMNS + lane);
                for (int token = 0; token < BLOCK_TOKENS; token++)
                    sum[r * BLOCK_TOKENS + token] =
                        multiply_add(dtype, weights, one[token], sum[r * BLOCK_TOKENS + token]);
            }
        }
    for (int r = 0; r < TILE_ROWS; r++)
        for (int token = 0; token < BLOCK_TOKENS; token++)
            v_store(sums + r * next_row + token * LANES, sum[r * BLOCK_TOKENS + token]);
}

/* x in blocks of tokens, the last one filled up by zeros: [columns / PIECE][BLOCK_TOKENS][PIECE]. */
INLINE void make_blocks(int32_t dtype, const struct product *p, float *x) {
    const int64_t lanes = p->stride / in_lane(dtype);
    for (int64_t token = 0; token < (p->tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS * BLOCK_TOKENS; token++) {
        float *to = x + token / BLOCK_TOKENS * BLOCK_TOKENS * lanes + token % BLOCK_TOKENS * PIECE;
        for (int64_t lane = 0; lane < lanes; lane += PIECE)
            copy_features(dtype, p, token, lane * in_lane(dtype), PIECE * in_lane(dtype), to + lane * BLOCK_TOKENS);
    }
}

/* TILE_ROWS rows at a time: COLUMNS lanes of them are expanded once for all tokens. */
INLINE void some_rows(int32_t dtype, const struct product *p, int64_t begin, int64_t end, float *blocks_of_x,
                      float *sums) {
    const struct weight *w = &p->w;
    const int64_t blocks = (p->tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS, next_row = blocks * BLOCK_TOKENS * LANES;
    const int64_t most = COLUMNS * in_lane(dtype), stride = p->stride / in_lane(dtype);
    float tile[TILE_ROWS * COLUMNS] __attribute__((aligned(64)));
    make_blocks(dtype, p, blocks_of_x);
    for (int64_t row = begin; row < end; row += TILE_ROWS) {
        const int rows = end - row < TILE_ROWS ? (int)(end - row) : TILE_ROWS;
        int64_t offset[TILE_ROWS] = {0};
        memset(sums, 0, TILE_ROWS * next_row * sizeof(float));
        if (rows < TILE_ROWS) memset(tile, 0, sizeof(tile));
        for (int r = 0; r < rows; r++) offset[r] = row_start(w, row + r);
        for (int64_t column = 0; column < w->in_features; column += most) {
            const int64_t left = (w->in_features - column + 63) / 64 * 64, columns = left < most ? left : most;
            const int64_t width = columns / in_lane(dtype);
            for (int r = 0; r < rows; r++)
                offset[r] = expand_row(dtype, w, row + r, column, columns, offset[r], TILE_ROWS, tile + r * COLUMNS);
            const float *x = blocks_of_x + column / in_lane(dtype) * BLOCK_TOKENS;
            for (int64_t block = 0; block < blocks; block++, x += BLOCK_TOKENS * stride)
                tile_times_block(dtype, tile, x, width, sums + block * BLOCK_TOKENS * LANES, next_row);
        }
        for (int r = 0; r < rows; r++) check_end(p, row + r, offset[r]);
        for (int64_t token = 0; token < p->tokens; token++)
            for (int r = 0; r < rows; r++)
                finish(dtype, p, row + r, token, v_sum(v_load(sums + r * next_row + token * LANES)));
    }
}

static void some(const struct product *p, int64_t begin, int64_t end) {
    const int64_t tokens = (p->tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS * BLOCK_TOKENS;
    float *memory = NULL;
    if (posix_memalign((void **)&memory, 64, tokens * (p->stride + TILE_ROWS * LANES) * sizeof(float))) {
        *p->failed = NO_MEMORY;
        return;
    }
    float *sums = memory + tokens * p->stride;
    if (p->w.dtype == FLOAT32) some_rows(FLOAT32, p, begin, end, memory, sums);
    else if (p->w.dtype == BFLOAT16) some_rows(HALVES, p, begin, end, memory, sums);
    else if (p->w.dtype == FLOAT16) some_rows(FLOAT16, p, begin, end, memory, sums);
    else some_rows(INTEGERS, p, begin, end, memory, sums);
    free(memory);
}

/* sums[vectors] += the kept weights of 64 columns, whose mask is `word`, times their rows of xt [64][vectors]. */
INLINE void kept_columns(int32_t dtype, int vectors, const void *values, uint64_t word, const float *xt, float *sums) {
    vec sum[VECTORS];
    for (int v = 0; v < vectors; v++) sum[v] = v_load(sums + v * LANES);
    for (int64_t index = 0; word; index++, word &= word - 1) {
        const float *x = xt + __builtin_ctzll(word) * (vectors * LANES);
        __asm__("" : "+r"(x)); /* one address, not one for each load */
        const vec weight = v_splat(load_number(dtype, values, index));
        for (int v = 0; v < vectors; v++) sum[v] = v_fma(weight, v_load(x + v * LANES), sum[v]);
    }
    for (int v = 0; v < vectors; v++) v_store(sums + v * LANES, sum[v]);
}

/* Rows of one block of tokens, xt [in][vectors * LANES]: 64 columns of x stay in the first cache for PANEL rows. */
INLINE void many_rows(int32_t dtype, int vectors, const struct product *p, int64_t begin, int64_t end, const float *xt,
                      int64_t token, int64_t tokens, float *sums) {
    const struct weight *w = &p->w;
    const int width = vectors * LANES;
    const char *values = w->values;
    const int64_t size = size_of(dtype);
    int64_t offset[PANEL + AHEAD] = {0};
    for (int64_t row = begin; row < end; row += PANEL) {
        const int rows = end - row < PANEL ? (int)(end - row) : PANEL;
        for (int r = 0; r < rows; r++) offset[r] = row_start(w, row + r);
        memset(sums, 0, rows * width * sizeof(float));
        for (int64_t column = 0; column < w->in_features; column += 64)
            for (int r = 0; r < rows; r++) {
                const uint8_t *bits = w->bits + (row + r) * w->row_bytes + column / 8;
                const uint64_t word = load_bits(bits, mask_left(w, column));
                __builtin_prefetch(values + offset[r + AHEAD] * size);
                __builtin_prefetch(values + offset[r + AHEAD] * size + 64);
                __builtin_prefetch(bits + AHEAD * w->row_bytes);
                const int count = __builtin_popcountll(word);
                if (offset[r] + count > w->num_values) {
                    *p->failed = WRONG_MASK;
                    continue;
                }
                const float *x = xt + column * width;
                float weights[64];
                if (dtype == INTEGERS) load_weights(w, row + r, column, offset[r], count, weights);
                if (dtype == INTEGERS) kept_columns(FLOAT32, vectors, weights, word, x, sums + r * width);
                else kept_columns(dtype, vectors, values + offset[r] * size, word, x, sums + r * width);
                offset[r] += count;
            }
        for (int r = 0; r < rows; r++) check_end(p, row + r, offset[r]);
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < rows; r++) finish(dtype, p, row + r, token + t, sums[r * width + t]);
    }
}

/* `body` for each block of transposed tokens, whose width is known when this is compiled. */
#define FOR_BLOCKS_OF(dtype, body, ...)                                                                                \
    for (int64_t token = 0; token < p->tokens; token += BLOCK) {                                                       \
        const int64_t left = p->tokens - token, tokens = left < BLOCK ? left : BLOCK;                                  \
        const float *block = p->x + token * p->stride;                                                                 \
        if (tokens > BLOCK / 2) body(dtype, VECTORS, p, begin, end, block, token, tokens, __VA_ARGS__);                \
        else if (tokens > BLOCK / 4) body(dtype, VECTORS / 2, p, begin, end, block, token, tokens, __VA_ARGS__);       \
        else body(dtype, VECTORS / 4, p, begin, end, block, token, tokens, __VA_ARGS__);                               \
    }
#define FOR_BLOCKS(body, ...)                                                                                          \
    if (p->w.dtype == FLOAT32) { FOR_BLOCKS_OF(FLOAT32, body, __VA_ARGS__) }                                           \
    else if (p->w.dtype == BFLOAT16) { FOR_BLOCKS_OF(BFLOAT16, body, __VA_ARGS__) }                                    \
    else if (p->w.dtype == FLOAT16) { FOR_BLOCKS_OF(FLOAT16, body, __VA_ARGS__) }                                      \
    else { FOR_BLOCKS_OF(INTEGERS, body, __VA_ARGS__) }

static void many(const struct product *p, int64_t begin, int64_t end) {
    float *sums = NULL;
    if (posix_memalign((void **)&sums, 64, PANEL * BLOCK * sizeof(float))) {
        *p->failed = NO_MEMORY;
        return;
    }
    FOR_BLOCKS(many_rows, sums)
    free(sums);
}

/* The values of a row panel that begin at the first column of a thread: those of the columns before are counted. */
INLINE void start_rows(const struct weight *w, int64_t column, int64_t *offset) {
    for (int64_t row = 0; row < w->out_features; row++) {
        const uint8_t *bits = w->bits + row * w->row_bytes;
        offset[row] = row_start(w, row);
        for (int64_t byte = 0; byte < column / 8; byte += 8) offset[row] += __builtin_popcountll(load_bits(bits + byte, 8));
    }
}

/* The transpose of 64 x 64 bits (Hacker's Delight, 7-3): bit r of word c is bit c of word r. */
INLINE void transpose_bits(uint64_t *words) {
    uint64_t mask = 0x00000000ffffffff;
    for (int half = 32; half; half >>= 1, mask ^= mask << half)
        for (int row = 0; row < 64; row = ((row | half) + 1) & ~half) {
            const uint64_t swap = ((words[row] >> half) ^ words[row | half]) & mask;
            words[row] ^= swap << half;
            words[row | half] ^= swap;
        }
}

/* A tile of 64 x 64 weights by column: bits [column], and the kept values of a column after those of the one before. */
INLINE void transpose_tile(int32_t dtype, const struct product *p, int64_t row, int64_t column, int64_t *offset,
                           uint64_t *words, float *values) {
    const struct weight *w = &p->w;
    uint64_t rows[64] = {0};
    const int64_t size = size_of(dtype);
    for (int r = 0; r < 64 && row + r < w->out_features; r++) {
        const uint8_t *bits = w->bits + (row + r) * w->row_bytes + column / 8;
        rows[r] = load_bits(bits, mask_left(w, column));
        if (offset[row + r] + __builtin_popcountll(rows[r]) > w->num_values) {
            *p->failed = WRONG_MASK;
            rows[r] = 0;
        }
        __builtin_prefetch((const char *)w->values + offset[row + r] * size);
        __builtin_prefetch((const char *)w->values + offset[row + r] * size + 64);
    }
    memcpy(words, rows, sizeof(rows));
    transpose_bits(words);
    float *next[64];
    for (int c = 0, kept = 0; c < 64; c++) {
        next[c] = values + kept;
        kept += __builtin_popcountll(words[c]);
    }
    for (int r = 0; r < 64 && row + r < w->out_features; r++) {
        const void *from = (const char *)w->values + offset[row + r] * size;
        const int32_t from_dtype = dtype == INTEGERS ? FLOAT32 : dtype;
        float weights[64];
        int64_t index = 0;
        if (dtype == INTEGERS) {
            load_weights(w, row + r, column, offset[row + r], __builtin_popcountll(rows[r]), weights);
            from = weights;
        }
        for (uint64_t word = rows[r]; word; word &= word - 1) {
            float **place = next + __builtin_ctzll(word);
            *(*place)++ = load_number(from_dtype, from, index++);
        }
        offset[row + r] += index;
    }
}

/* sums [64 columns][vectors] += a transposed tile times the gradient of its rows, gt [64 rows][vectors]. */
INLINE void tile_columns(int vectors, const uint64_t *words, const float *values, const float *gt, float *sums) {
    for (int c = 0; c < 64; c++) {
        kept_columns(FLOAT32, vectors, values, words[c], gt, sums + c * vectors * LANES);
        values += __builtin_popcountll(words[c]);
    }
}

INLINE int block_vectors(int64_t tokens) { return tokens > BLOCK / 2 ? VECTORS : tokens > BLOCK / 4 ? VECTORS / 2 : VECTORS / 4; }

INLINE void input_columns(int32_t dtype, const struct product *p, int64_t column, int64_t *offset, float *sums) {
    const struct weight *w = &p->w;
    float values[64 * 64];
    uint64_t words[64];
    memset(sums, 0, (p->tokens + BLOCK - 1) / BLOCK * BLOCK * 64 * sizeof(float));
    for (int64_t row = 0; row < w->out_features; row += 64) {
        transpose_tile(dtype, p, row, column, offset, words, values);
        for (int64_t token = 0; token < p->tokens; token += BLOCK) {
            const int vectors = block_vectors(p->tokens - token);
            const float *gt = p->x + token * p->stride + row * vectors * LANES;
            float *sum = sums + token * 64;
            if (vectors == VECTORS) tile_columns(VECTORS, words, values, gt, sum);
            else if (vectors == VECTORS / 2) tile_columns(VECTORS / 2, words, values, gt, sum);
            else tile_columns(VECTORS / 4, words, values, gt, sum);
        }
    }
    const int64_t left = w->in_features - column, columns = left < 64 ? left : 64;
    for (int64_t token = 0; token < p->tokens; token++) {
        const int64_t block = token / BLOCK * BLOCK;
        const float *sum = sums + block * 64 + token % BLOCK;
        const int width = block_vectors(p->tokens - block) * LANES;
        for (int64_t c = 0; c < columns; c++)
            store_number(dtype_of_x(dtype, w), p->y, token * w->in_features + column + c, sum[c * width]);
    }
}

/* Blocks of 64 columns [begin, end) of grad_x [tokens, in] = grad · W; p->x is the transposed gradient, p->y grad_x. */
static void grad_input(const struct product *p, int64_t begin, int64_t end) {
    const int32_t dtype = p->w.dtype;
    int64_t *offset = calloc(p->w.out_features, sizeof(int64_t));
    float *sums = NULL;
    if (offset && !posix_memalign((void **)&sums, 64, (p->tokens + BLOCK) * 64 * sizeof(float))) {
        start_rows(&p->w, begin * 64, offset);
        for (int64_t column = begin * 64; column < end * 64 && column < p->w.in_features; column += 64)
            if (dtype == FLOAT32) input_columns(FLOAT32, p, column, offset, sums);
            else if (dtype == BFLOAT16) input_columns(BFLOAT16, p, column, offset, sums);
            else if (dtype == FLOAT16) input_columns(FLOAT16, p, column, offset, sums);
            else input_columns(INTEGERS, p, column, offset, sums);
        for (int64_t row = 0; row < p->w.out_features && end * 64 >= p->w.in_features; row++)
            check_end(p, row, offset[row]);
    } else *p->failed = NO_MEMORY;
    free(offset);
    free(sums);
}

INLINE int64_t expand_floats(const struct weight *w, int64_t row, float *out) {
    const int64_t whole = w->in_features / STEP * STEP;
    int64_t offset = expand_row(FLOAT32, w, row, 0, whole, row_start(w, row), 1, out);
    float rest[STEP];
    if (whole == w->in_features) return offset;
    offset = expand_row(FLOAT32, w, row, whole, STEP, offset, 1, rest);
    memcpy(out + whole, rest, (w->in_features - whole) * sizeof(float));
    return offset;
}

INLINE int64_t expand_halves(const struct weight *w, int64_t row, uint16_t *out) {
    const uint8_t *bits = w->bits + row * w->row_bytes;
    int64_t offset = row_start(w, row);
    for (int64_t column = 0; column < w->in_features; column += STEP) {
        char copy[STEP * 2] = {0};
        uint16_t rest[STEP];
        const int64_t left = w->in_features - column;
        mask_t mask = step_mask(load_bits(bits + column / 8, mask_left(w, column)), 0);
        expand_2_bytes(readable(w, BFLOAT16, offset, copy), mask, left < STEP ? rest : out + column);
        if (left < STEP) memcpy(out + column, rest, left * sizeof(uint16_t));
        offset += count_bits(mask);
    }
    return offset;
}

static void expand_rows(const struct product *p, int64_t begin, int64_t end) {
    const struct weight *w = &p->w;
    for (int64_t row = begin; row < end; row++) {
        void *to = (char *)p->y + (row - p->first_row) * w->in_features * size_of(w->x_dtype);
        check_end(p, row,
                  w->dtype == FLOAT32 ? expand_floats(w, row, to)
                  : w->dtype == BFLOAT16 || w->dtype == FLOAT16 ? expand_halves(w, row, to)
                                                               : expand_integer_row(w, row, to));
    }
}

#define NAME_(unit) #unit
#define NAME(unit) NAME_(unit)
const struct unit JOIN(unit, UNIT) = {
    NAME(UNIT), HAS_DOTS, start, few, some, many, grad_input, expand_rows, widen};
