/* AVX2 with FMA and F16C: Intel since 2013, AMD since 2015.
 *
 * Eight weights at a time: a byte of the mask chooses a row of a table that shuffles the kept values to their places.
 * A bfloat16 value goes into the upper half of its lane, which makes a float of it. */
#include <immintrin.h>

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

/* By mask: places in bytes of the values in 32-bit lanes, upper half; in 16-bit lanes; of 8-bit values in 32-bit
 * lanes, highest byte; and numbers of the values, negative for none. Filled by `start`. */
static uint8_t upper_halves[256][32] __attribute__((aligned(64)));
static uint8_t halves[256][16] __attribute__((aligned(64)));
static uint8_t top_bytes[256][32] __attribute__((aligned(64)));
static int8_t words[256][8] __attribute__((aligned(64)));

static void start(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int lane = 0, kept = 0; lane < 8; lane++) {
            const int keep = mask >> lane & 1;
            for (int byte = 0; byte < 2; byte++) {
                upper_halves[mask][4 * lane + byte] = 0x80;
                upper_halves[mask][4 * lane + 2 + byte] = keep ? 2 * kept + byte : 0x80;
                halves[mask][2 * lane + byte] = keep ? 2 * kept + byte : 0x80;
            }
            for (int byte = 0; byte < 4; byte++) top_bytes[mask][4 * lane + byte] = keep && byte == 3 ? kept : 0x80;
            words[mask][lane] = keep ? kept : -1;
            kept += keep;
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

static inline void expand_bf16(const void *values, mask_t mask, vec *weights) {
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(values));
    weights[0] = _mm256_castsi256_ps(_mm256_shuffle_epi8(both, *(const __m256i *)((const char *)upper_halves + mask)));
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

#include "product.h"
