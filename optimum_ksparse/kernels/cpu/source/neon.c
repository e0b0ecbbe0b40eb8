/* NEON of 64-bit Arm: any of them. With BF16 (another unit) `bfdot` multiplies pairs as they are.
 *
 * Eight weights at a time: a byte of the mask chooses a row of a table that shuffles the kept values to their places.
 * A bfloat16 value goes into the upper half of its lane, which makes a float of it. */
#include <arm_neon.h>

#include "ksparse.h"

#ifndef UNIT
#define UNIT neon
#endif
#define LANES 4
#define STEP 8
#define TILE_ROWS 6
#define BLOCK_TOKENS 4

typedef float32x4_t vec;
typedef uint8_t mask_t;
#define step_mask(word, step) (mask_t)((word) >> (step) * STEP)

/* By mask: the places in bytes of the values in lanes of 16, 32 and 8 bits, 255 for none, which gives zero; and how
 * many there are, which one load gives faster than NEON counts. Filled by `start`. */
static uint8_t halves[256][16] __attribute__((aligned(64)));
static uint8_t words[256][32] __attribute__((aligned(64)));
static uint8_t bytes[256][8] __attribute__((aligned(64)));
static uint8_t counts[256] __attribute__((aligned(64)));

static void start(void) {
    for (int mask = 0; mask < 256; mask++) {
        int kept = 0;
        for (int lane = 0; lane < 8; lane++) {
            const int keep = mask >> lane & 1;
            for (int byte = 0; byte < 2; byte++) halves[mask][2 * lane + byte] = keep ? 2 * kept + byte : 255;
            for (int byte = 0; byte < 4; byte++) words[mask][4 * lane + byte] = keep ? 4 * kept + byte : 255;
            bytes[mask][lane] = keep ? kept : 255;
            kept += keep;
        }
        counts[mask] = kept;
    }
}

#define v_zero() vdupq_n_f32(0)
#define v_load(from) vld1q_f32(from)
#define v_store(to, value) vst1q_f32(to, value)
#define v_fma(a, b, sum) vfmaq_f32(sum, a, b)
#define v_add(a, b) vaddq_f32(a, b)
#define v_sum(value) vaddvq_f32(value)
#define v_splat(value) vdupq_n_f32(value)
#define count_bits(mask) counts[mask]

static inline uint16x8_t expand_8_halves(const void *values, mask_t mask) {
    return vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(values), vld1q_u8(halves[mask])));
}

static inline void expand_bf16(const void *values, mask_t mask, vec *weights) {
    const uint16x8_t zero = vdupq_n_u16(0), kept = expand_8_halves(values, mask);
    weights[0] = vreinterpretq_f32_u16(vzip1q_u16(zero, kept));
    weights[1] = vreinterpretq_f32_u16(vzip2q_u16(zero, kept));
}

static inline void expand_16(const void *values, mask_t mask, vec *weights) {
    const float16x8_t kept = vreinterpretq_f16_u16(expand_8_halves(values, mask));
    weights[0] = vcvt_f32_f16(vget_low_f16(kept));
    weights[1] = vcvt_high_f32_f16(kept);
}

static inline void expand_2_bytes(const void *values, mask_t mask, uint16_t *out) {
    vst1q_u16(out, expand_8_halves(values, mask));
}

static inline void expand_32(const void *values, mask_t mask, vec *weights) {
    const uint8_t *bytes = values;
    const uint8x16x2_t all = {{vld1q_u8(bytes), vld1q_u8(bytes + 16)}};
    weights[0] = vreinterpretq_f32_u8(vqtbl2q_u8(all, vld1q_u8(words[mask])));
    weights[1] = vreinterpretq_f32_u8(vqtbl2q_u8(all, vld1q_u8(words[mask] + 16)));
}

#define INTEGER_UNIT 1
#define INTEGER_STEP 8

static inline int64_t expand_int8(const char *values, uint64_t word, int step, vec *weights) {
    const mask_t mask = step_mask(word, step);
    const int8x16_t kept = vcombine_s8(vld1_s8((const int8_t *)values), vdup_n_s8(0));
    const int16x8_t integers = vmovl_s8(vqtbl1_s8(kept, vld1_u8(bytes[mask])));
    weights[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(integers)));
    weights[1] = vcvtq_f32_s32(vmovl_high_s16(integers));
    return count_bits(mask);
}

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define v_dot(a, b, sum) vbfdotq_f32(sum, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b))
static inline void expand_pairs(const void *values, mask_t mask, vec *weights) {
    weights[0] = vreinterpretq_f32_u16(expand_8_halves(values, mask));
}
#endif

#include "product.h"
