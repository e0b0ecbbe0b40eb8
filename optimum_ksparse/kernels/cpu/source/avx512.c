/* AVX-512 F, BW, VL, VBMI and VBMI2: Intel since 2019 (Ice Lake), AMD since 2022 (Zen 4).
 *
 * 32 weights at a time: `vpexpandw` puts the kept 16-bit values at their places, then two vectors of 16 floats are made
 * of them. A bfloat16 value goes into the upper half of its lane, which makes a float of it. With BF16 (another unit)
 * `vdpbf16ps` multiplies pairs as they are: twice as many at once; subnormal numbers count as zero there. */
#include <immintrin.h>

#include <string.h>

#include "ksparse.h"

#ifndef UNIT
#define UNIT avx512
#endif
#define LANES 16
#define STEP 32
#define TILE_ROWS 6
#define BLOCK_TOKENS 4

typedef __m512 vec;
typedef uint32_t mask_t;
#define step_mask(word, step) (mask_t)((word) >> (step) * STEP)

#define v_zero() _mm512_setzero_ps()
#define v_load(from) _mm512_loadu_ps(from)
#define v_store(to, value) _mm512_storeu_ps(to, value)
#define v_fma(a, b, sum) _mm512_fmadd_ps(a, b, sum)
#define v_add(a, b) _mm512_add_ps(a, b)
#define v_sum(value) _mm512_reduce_add_ps(value)
#define v_splat(value) _mm512_set1_ps(value)
#define count_bits(mask) __builtin_popcount(mask)

/* For each byte of 16 lanes of 32 bits the byte of 16-bit value `lane` that `vpermb` puts there; the lower half of a
 * lane is masked away. The other 16 values lie 32 bytes behind. `top_bytes`: of 8-bit values. */
static uint8_t upper_halves[2][64] __attribute__((aligned(64))), top_bytes[4][64] __attribute__((aligned(64)));

/* For 8 halves of bytes the 5 bytes that they may be in, and the bits that they begin at; by half a byte the integer. */
static uint8_t five_bytes[64] __attribute__((aligned(64))), shifts[2][64] __attribute__((aligned(64)));
static float integers[16] __attribute__((aligned(64)));

#ifdef __AVX512BF16__
/* Of `expand_integer_pairs`: the bytes of bfloat16 by the size of an integer (128 is the first one), and by half a byte,
 * lower ones and upper ones. */
static uint8_t of_sizes[2][128] __attribute__((aligned(64))), of_halves[2][64] __attribute__((aligned(64)));
#endif

static void start(void) {
    for (int part = 0; part < 2; part++)
        for (int byte = 0; byte < 64; byte++) upper_halves[part][byte] = 32 * part + byte / 4 * 2 + byte % 2;
    for (int part = 0; part < 4; part++)
        for (int byte = 0; byte < 64; byte++) top_bytes[part][byte] = 16 * part + byte / 4;
    for (int i = 0; i < 64; i++) {
        five_bytes[i] = i / 8 * 4 + i % 8 % 5;
        for (int odd = 0; odd < 2; odd++) shifts[odd][i] = i % 8 * 4 + odd * 4;
        integers[i % 16] = (i % 16 ^ 8) - 8;
    }
#ifdef __AVX512BF16__
    for (int i = 0; i < 128; i++)
        for (int part = 0; part < 2; part++) {
            const union { float value; uint8_t byte[4]; } size = {i ? i : 128}, half = {integers[i % 16]};
            of_sizes[part][i] = size.byte[2 + part];
            of_halves[part][i % 64] = half.byte[2 + part];
        }
#endif
}

/* On Zen 4 an expansion waits for the register that it writes, zeros or not, unless that was just cleared. */
static inline __m512i cleared(void) {
    __m512i zero = _mm512_setzero_si512();
    __asm__("vpxord %0, %0, %0" : "=v"(zero));
    return zero;
}

/* In a register: expanding from memory is done by microcode on Zen 4. */
static inline __m512i loaded(const void *values) {
    __m512i kept = _mm512_loadu_si512(values);
    __asm__("" : "+v"(kept));
    return kept;
}

static inline __m512i expand_32_halves(const void *values, mask_t mask) {
    return _mm512_mask_expand_epi16(cleared(), mask, loaded(values));
}

static inline vec expand_16_floats(const float *values, __mmask16 mask) {
    return _mm512_mask_expand_ps(_mm512_castsi512_ps(cleared()), mask, _mm512_castsi512_ps(loaded(values)));
}

static inline void expand_bf16(const void *values, mask_t mask, vec *weights) {
    const __mmask64 upper = 0xcccccccccccccccc;
    const __m512i halves = expand_32_halves(values, mask);
    for (int part = 0; part < 2; part++) {
        const __m512i places = _mm512_load_si512(upper_halves[part]);
        weights[part] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi8(upper, places, halves));
    }
}

static inline void expand_16(const void *values, mask_t mask, vec *weights) {
    const __m512i halves = expand_32_halves(values, mask);
    weights[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    weights[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
}

static inline void expand_2_bytes(const void *values, mask_t mask, uint16_t *out) {
    _mm512_storeu_si512(out, expand_32_halves(values, mask));
}

static inline void expand_32(const void *values, mask_t mask, vec *weights) {
    const __mmask16 low = (__mmask16)mask;
    weights[0] = expand_16_floats(values, low);
    weights[1] = expand_16_floats((const float *)values + count_bits(low), (__mmask16)(mask >> 16));
}

/* `vpermb` puts an integer into the highest byte of its lane: 2^24 times its number. */
#define INTEGER_UNIT 0x1p-24f

#define INTEGER_STEP 64

static inline int64_t expand_int8(const char *values, uint64_t word, int step, vec *weights) {
    (void)step;
    const __mmask64 top = 0x8888888888888888;
    const __m512i bytes = _mm512_mask_expand_epi8(cleared(), word, loaded(values));
    for (int part = 0; part < 4; part++) {
        const __m512i places = _mm512_load_si512(top_bytes[part]);
        weights[part] = _mm512_cvtepi32_ps(_mm512_maskz_permutexvar_epi8(top, places, bytes));
    }
    return __builtin_popcountll(word);
}

/* 64 integers from half a byte on, the first or the second one, each in the lower half of a byte. */
static inline __m512i halves_to_bytes(__m512i halves, int odd) {
    const __m512i words = _mm512_permutexvar_epi8(_mm512_load_si512(five_bytes), halves);
    return _mm512_multishift_epi64_epi8(_mm512_load_si512(shifts[odd]), words);
}

/* `vpermps` reads the lowest 4 bits of a lane, so it takes integers to weights, whatever else is in their bytes. */
#define scaled_integers(scale) _mm512_mul_ps(_mm512_load_ps(integers), v_splat(scale))

static inline void expand_int4(const char *values, int odd, uint64_t mask, vec table, vec *weights) {
    const __m512i all = _mm512_mask_expand_epi8(cleared(), mask, halves_to_bytes(loaded(values), odd));
    for (int part = 0; part < 4; part++)
        weights[part] = _mm512_permutexvar_ps(_mm512_srli_epi32(all, 8 * part), table);
}

/* 64 floats: first every fourth one. */
static inline void order_int4(float *x) {
    float from[64];
    memcpy(from, x, sizeof(from));
    for (int i = 0; i < 64; i++) x[i] = from[i % 16 * 4 + i / 16];
}
#define expand_int4 expand_int4

#ifdef __AVX512BF16__
#define v_dot(a, b, sum) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))
static inline void expand_pairs(const void *values, mask_t mask, vec *weights) {
    weights[0] = _mm512_castsi512_ps(expand_32_halves(values, mask));
}

/* 64 integers as bfloat16, in the order of `order_pairs`; tables have its lower and upper bytes. */
static inline void expand_integer_pairs(int halves, const char *values, int odd, uint64_t mask, vec *weights) {
    __m512i kept = loaded(values), low, high;
    if (halves) kept = halves_to_bytes(kept, odd);
    const __m512i all = _mm512_mask_expand_epi8(cleared(), mask, kept);
    if (halves) {
        low = _mm512_permutexvar_epi8(all, _mm512_load_si512(of_halves[0]));
        high = _mm512_permutexvar_epi8(all, _mm512_load_si512(of_halves[1]));
    } else {
        /* `vpermi2b` takes a size of 128 for 0: the tables have it there, and zeros are masked away. */
        const __m512i size = _mm512_abs_epi8(all), *table = (const __m512i *)of_sizes;
        const __mmask64 any = _mm512_test_epi8_mask(all, all);
        low = _mm512_permutex2var_epi8(table[0], size, table[1]);
        high = _mm512_maskz_permutex2var_epi8(any, table[2], size, table[3]);
        high = _mm512_ternarylogic_epi64(high, all, _mm512_set1_epi8(-128), 0xf8); /* high | (all & sign) */
    }
    weights[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi8(low, high));
    weights[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi8(low, high));
}

/* 64 bfloat16, 8 at a time: first the ones with even numbers. */
static inline void order_pairs(void *x) {
    uint64_t from[16], *to = x;
    memcpy(from, x, sizeof(from));
    for (int i = 0; i < 16; i++) to[i / 2 % 2 * 8 + i / 4 * 2 + i % 2] = from[i];
}
#define expand_integer_pairs expand_integer_pairs
#endif

#include "product.h"
