/* The products of packed sparse weights on a CPU: what `ksparse.c` offers, and what each unit gives it. */
#ifndef KSPARSE_H
#define KSPARSE_H

#include <stdint.h>

/* What a call gives: memory ran out; a row's bits keep another number of weights than it has values. */
enum failure { NO_MEMORY = 1, WRONG_MASK = 2 };

enum dtype { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 };

/* torch_parallel_for of libtorch_cpu: splits a range over torch's own threads. */
typedef int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void *),
                                void *context);

/* A packed weight (table in `packing.py`): values, row-major; bits [out, row_bytes], little-endian; row r begins at
 * value starts[r], or at r * per_row where starts is NULL. Nothing is read beyond values[num_values], whatever the
 * bits say. Where row_bytes is 0 all rows have the bits of the first one, as those of a dense weight.
 *
 * Values may be integers; INT4 are two in a byte, the lower half first, and behind those of a row of n:m, or behind the
 * last of other ones, half a byte may be unused: per_row and num_values count it. An integer times the scale
 * [out, groups] of its row and of its group_size columns, a multiple of 64, is the weight. */
struct weight {
    const void *values;
    const uint8_t *bits;
    const int64_t *starts;
    int64_t num_values, per_row, out_features, in_features, row_bytes;
    int32_t dtype, x_dtype; /* of the values; of x, y, bias and scales, which differs where values are integers */
    const void *scales;
    int64_t groups, group_size;
};

/* y [tokens, out] = x · Wᵀ + bias; tokens, bias and y of x_dtype. */
struct product {
    struct weight w;
    const void *raw; /* x [tokens, in] as it came: for `few` and `some` */
    const float *x; /* the same as floats, transposed */
    int64_t tokens, stride; /* stride: the features of x, filled up to a multiple of 64 */
    const void *bias;
    void *y;
    int64_t first_row; /* of `expand` */
    int32_t *failed; /* set to one of `failure` where something fails */
};

/* A unit: the same functions compiled for one instruction set. All take rows [begin, end). */
struct unit {
    const char *name;
    /* Whether `few` and `some` multiply bfloat16 as it is, instead of floats; 2: with integers `some` does, too. */
    int32_t pairs;
    /* Once, before the others. Nothing of a unit may run before the CPU was asked, so no constructors. */
    void (*start)(void);
    /* Up to FEW tokens: each row's packed weights are read once, straight into the sums. */
    void (*few)(const struct product *, int64_t begin, int64_t end);
    /* More: small tiles are expanded once for all tokens. */
    void (*some)(const struct product *, int64_t begin, int64_t end);
    /* Many: x lies transposed, [blocks of BLOCK tokens][in][BLOCK] (the last block BLOCK, / 2 or / 4 wide, whichever
     * holds it), and only kept weights are multiplied. */
    void (*many)(const struct product *, int64_t begin, int64_t end);
    /* Backward, over blocks of 64 columns: y [tokens, in] = x · W, x [tokens, out] transposed as for `many`. */
    void (*grad_input)(const struct product *, int64_t begin, int64_t end);
    /* Rows of the dense weight in x_dtype: y [rows from first_row on, in]; without x. */
    void (*expand)(const struct product *, int64_t begin, int64_t end);
    /* count numbers of a dtype to floats. */
    void (*widen)(int32_t dtype, const void *from, int64_t count, float *to);
};

enum { FEW = 4, BLOCK = 64 };

extern const struct unit unit_portable;
#if defined(__x86_64__)
extern const struct unit unit_avx2, unit_avx512, unit_avx512bf16, unit_avx512amx;
/* The compiler knows the instructions, and the way to ask the system for their registers is this one. */
#if defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define HAS_AMX
#endif
#endif
#elif defined(__aarch64__)
extern const struct unit unit_neon, unit_neonbf16;
#endif

#define EXPORT __attribute__((visibility("default")))

EXPORT const char *ksparse_unit(int32_t index, int32_t *runs);
EXPORT int32_t ksparse_check(int32_t index);
EXPORT int32_t ksparse_linear(parallel_for, int32_t unit, const struct weight *, const void *x, int64_t tokens,
                              const void *bias, void *y);
EXPORT int32_t ksparse_grad_input(parallel_for, int32_t unit, const struct weight *, const void *grad, int64_t tokens,
                                  void *grad_x);
EXPORT int32_t ksparse_gather(parallel_for, int32_t unit, const struct weight *, int64_t begin, int64_t end,
                              const void *dense, void *values);
EXPORT void ksparse_row_starts(const uint8_t *bits, int64_t out_features, int64_t row_bytes, int64_t *starts);
EXPORT int32_t ksparse_expand(parallel_for, int32_t unit, const struct weight *, int64_t begin, int64_t end,
                              void *out);

#endif
