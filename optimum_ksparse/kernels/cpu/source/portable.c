/* Plain C: any CPU. */
#include "ksparse.h"

#define UNIT portable
#define LANES 8
#define STEP 8
#define TILE_ROWS 1
#define BLOCK_TOKENS 1

typedef struct { float lane[8]; } vec;
typedef uint8_t mask_t;
#define step_mask(word, step) (mask_t)((word) >> (step) * STEP)

static void start(void) {}

static inline vec v_zero(void) { return (vec){{0}}; }
static inline vec v_load(const float *from) { vec v; for (int i = 0; i < 8; i++) v.lane[i] = from[i]; return v; }
static inline void v_store(float *to, vec v) { for (int i = 0; i < 8; i++) to[i] = v.lane[i]; }
static inline vec v_fma(vec a, vec b, vec sum) {
    for (int i = 0; i < 8; i++) sum.lane[i] += a.lane[i] * b.lane[i];
    return sum;
}
static inline vec v_add(vec a, vec b) { for (int i = 0; i < 8; i++) a.lane[i] += b.lane[i]; return a; }
static inline float v_sum(vec v) {
    return v.lane[0] + v.lane[1] + v.lane[2] + v.lane[3] + v.lane[4] + v.lane[5] + v.lane[6] + v.lane[7];
}
static inline vec v_splat(float value) { vec v; for (int i = 0; i < 8; i++) v.lane[i] = value; return v; }
#define count_bits(mask) __builtin_popcount(mask)

static inline float load_number(int32_t dtype, const void *from, int64_t index);

static inline void expand_any(int32_t dtype, const void *values, mask_t mask, vec *weights) {
    for (int lane = 0, kept = 0; lane < 8; lane++) {
        weights[0].lane[lane] = mask >> lane & 1 ? load_number(dtype, values, kept) : 0;
        kept += mask >> lane & 1;
    }
}

#define expand_32(values, mask, weights) expand_any(FLOAT32, values, mask, weights)
#define expand_bf16(values, mask, weights) expand_any(BFLOAT16, values, mask, weights)
#define expand_16(values, mask, weights) expand_any(FLOAT16, values, mask, weights)

static inline void expand_2_bytes(const void *values, mask_t mask, uint16_t *out) {
    for (int lane = 0, kept = 0; lane < 8; lane++) {
        out[lane] = mask >> lane & 1 ? ((const uint16_t *)values)[kept] : 0;
        kept += mask >> lane & 1;
    }
}

#define INTEGER_UNIT 1
#define INTEGER_STEP 8

static inline int64_t expand_int8(const char *values, uint64_t word, int step, vec *weights) {
    int kept = 0;
    for (int lane = 0; lane < 8; lane++)
        weights[0].lane[lane] = word >> (8 * step + lane) & 1 ? ((const int8_t *)values)[kept++] : 0;
    return kept;
}

#include "product.h"
