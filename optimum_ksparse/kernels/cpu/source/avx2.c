/* AVX2 with FMA and F16C: Intel since 2013, AMD since 2015.
 *
 * Eight weights at a time: a byte of the mask chooses a row of a table that shuffles the kept values to their places.
 * A bfloat16 value goes into the upper half of its lane, which makes a float of it. */
#include <immintrin.h>

#include <string.h>

#include "ksparse.h"

#define UNIT avx2
#define LANES 8
#define STEP 8
#define TILE_ROWS 6
#define BLOCK_TOKENS 2

typedef __m256 vec;
/* A byte of the mask times 32: where its row begins in a table of rows of 32 bytes. That is two instructions, and has as
 * many bits. */
typedef uint64_t mask_t;
#define step_mask(word, step) ((step) ? (word) >> (8 * (step) - 5) & 0x1fe0 : (word) << 5 & 0x1fe0)

/* By mask: places in bytes of the values in 32-bit lanes, upper half, the first value being the first or the fifth one;
 * in 16-bit lanes; of 8-bit values in 32-bit lanes, highest byte; and numbers of the values, negative for none. By half a
 * byte: the bytes of a bfloat16. Filled by `start`. */
static uint8_t upper_halves[2][256][32] __attribute__((aligned(64)));
static uint8_t halves[256][16] __attribute__((aligned(64)));
static uint8_t top_bytes[256][32] __attribute__((aligned(64)));
static int8_t words[256][8] __attribute__((aligned(64)));
static uint8_t of_halves[2][32] __attribute__((aligned(64)));

static void start(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int lane = 0, kept = 0; lane < 8; lane++) {
            const int keep = mask >> lane & 1;
            for (int byte = 0; byte < 2; byte++) {
                for (int fifth = 0; fifth < 2; fifth++) {
                    upper_halves[fifth][mask][4 * lane + byte] = 0x80;
                    upper_halves[fifth][mask][4 * lane + 2 + byte] = keep ? (2 * (kept + 4 * fifth) + byte) & 15 : 0x80;
                }
                halves[mask][2 * lane + byte] = keep ? 2 * kept + byte : 0x80;
            }
            for (int byte = 0; byte < 4; byte++) top_bytes[mask][4 * lane + byte] = keep && byte == 3 ? kept : 0x80;
            words[mask][lane] = keep ? kept : -1;
            kept += keep;
        }
    for (int i = 0; i < 64; i++) {
        const union { float value; uint8_t byte[4]; } half = {(i % 16 ^ 8) - 8};
        of_halves[i / 32][i % 32] = half.byte[2 + i / 32];
    }
}

#define v_zero() _mm256_setzero_ps()
#define v_load(from) _mm256_loadu_ps(from)
#define v_store(to, value) _mm256_storeu_ps(to, value)
#define v_fma(a, b, sum) _mm256_fmadd_ps(a, b, sum)
#define v_add(a, b) _mm256_add_ps(a, b)
#define v_splat(value) _mm256_set1_ps(value)
#define count_bits(mask) __builtin_popcountll(mask)

static inline float v_sum(vec v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* 8 weights of 8 bfloat16, which lie in either half of `both`, from the first or the fifth one on. */
static inline vec expand_8_bf16(__m256i both, int fifth, mask_t mask) {
    const __m256i places = *(const __m256i *)((const char *)upper_halves[fifth] + mask);
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, places));
}

static inline void expand_bf16(const void *values, mask_t mask, vec *weights) {
    weights[0] = expand_8_bf16(_mm256_broadcastsi128_si256(_mm_loadu_si128(values)), 0, mask);
}

static inline __m128i expand_8_halves(const void *values, mask_t mask) {
    return _mm_shuffle_epi8(_mm_loadu_si128(values), *(const __m128i *)((const char *)halves + mask / 2));
}

static inline void expand_16(const void *values, mask_t mask, vec *weights) {
    weights[0] = _mm256_cvtph_ps(expand_8_halves(values, mask));
}

static inline void expand_2_bytes(const void *values, mask_t mask, uint16_t *out) {
    _mm_storeu_si128((__m128i *)out, expand_8_halves(values, mask));
}

static inline void expand_32(const void *values, mask_t mask, vec *weights) {
    __m256i lanes = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)((const char *)words + mask / 4)));
    __m256 kept = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lanes);
    weights[0] = _mm256_blendv_ps(kept, _mm256_setzero_ps(), _mm256_castsi256_ps(lanes));
}

/* The shuffle puts an integer into the highest byte of its lane: 2^24 times its number. */
#define INTEGER_UNIT 0x1p-24f

#define INTEGER_STEP 8

static inline int64_t expand_int8(const char *values, uint64_t word, int step, vec *weights) {
    const mask_t mask = step_mask(word, step);
    const __m256i all = _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)values));
    const __m256i places = *(const __m256i *)((const char *)top_bytes + mask);
    weights[0] = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(all, places));
    return count_bits(mask);
}

/* 32 integers of half a byte as bfloat16: of 8 at a time two copies. */
static inline void halves_to_bf16(const char *values, __m256i *both) {
    const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)values));
    const __m256i all = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(15));
    const __m256i low = _mm256_shuffle_epi8(*(const __m256i *)of_halves[0], all);
    const __m256i high = _mm256_shuffle_epi8(*(const __m256i *)of_halves[1], all);
    for (int half = 0; half < 2; half++) {
        const __m256i eights = half ? _mm256_unpackhi_epi8(low, high) : _mm256_unpacklo_epi8(low, high);
        both[half] = _mm256_permute4x64_epi64(eights, 0x44);
        both[2 + half] = _mm256_permute4x64_epi64(eights, 0xee);
    }
}

static inline void expand_alike(int32_t dtype, const char *values, uint64_t word, vec *weights) {
    __m256i both[4];
    if (dtype == INT4) halves_to_bf16(values, both);
    for (int i = 0; i < 4 && dtype == BFLOAT16; i++)
        both[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values + i));
    for (int step = 0; step < 8; step++) {
        const mask_t mask = step_mask(word, step);
        if (dtype == BFLOAT16 || dtype == INT4) weights[step] = expand_8_bf16(both[step / 2], step % 2, mask);
        else if (dtype == FLOAT32) expand_32(values + 16 * step, mask, weights + step);
        else if (dtype == FLOAT16) expand_16(values + 8 * step, mask, weights + step);
        else expand_int8(values + 4 * step, word, step, weights + step);
    }
}

/* Whether each byte of some words of a mask keeps 4. */
static __attribute__((noinline)) int are_alike(const uint8_t *bits, int64_t words) {
    const __m256i kept = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i lower = _mm256_set1_epi8(15), lacking = _mm256_sub_epi8(_mm256_set1_epi8(4), kept);
    __m256i wrong = _mm256_setzero_si256();
    for (int64_t word = 0; word < words; word += 4) {
        __m256i masks = lower;
        if (words - word >= 4) masks = _mm256_loadu_si256((const __m256i *)(bits + 8 * word));
        else memcpy(&masks, bits + 8 * word, 8 * (words - word));
        const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(masks, 4), lower);
        const __m256i of_lower = _mm256_shuffle_epi8(kept, _mm256_and_si256(masks, lower));
        wrong = _mm256_or_si256(wrong, _mm256_xor_si256(of_lower, _mm256_shuffle_epi8(lacking, upper)));
        if (word == 0 && !_mm256_testz_si256(wrong, wrong)) return 0; /* of other masks hardly more is read */
    }
    return _mm256_testz_si256(wrong, wrong);
}
#define expand_alike expand_alike

/* 8 weights of a row without zeros. */
static inline void load_whole(int32_t dtype, const void *values, vec *weights) {
    const __m128i eight = _mm_loadu_si128(values);
    if (dtype == FLOAT32) weights[0] = _mm256_loadu_ps(values);
    else if (dtype == FLOAT16) weights[0] = _mm256_cvtph_ps(eight);
    else weights[0] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
}
#define load_whole load_whole

#include "product.h"
