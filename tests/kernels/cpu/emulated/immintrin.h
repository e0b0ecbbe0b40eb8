/* What `avx512.c` and `tiles.h` take of AVX-512 and AMX, in plain C after the pseudocode of Intel's manual: for machines
 * without it. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define __asm__(...) ((void)0) /* the barriers, which name registers */

typedef uint16_t __mmask16;
typedef uint32_t __mmask32;
typedef uint64_t __mmask64;
typedef struct { float lane[16]; } __m512;
typedef struct { uint8_t byte[64]; } __m512i;
typedef struct { uint8_t byte[32]; } __m256i;
#define __m512bh __m512
typedef struct { uint16_t half[16]; } __m256bh;

#define EMULATED static inline __attribute__((unused))

EMULATED __m512 _mm512_loadu_ps(const void *from) { __m512 v; memcpy(&v, from, 64); return v; }
EMULATED void _mm512_storeu_ps(void *to, __m512 v) { memcpy(to, &v, 64); }
EMULATED __m512i _mm512_loadu_si512(const void *from) { __m512i v; memcpy(&v, from, 64); return v; }
EMULATED void _mm512_storeu_si512(void *to, __m512i v) { memcpy(to, &v, 64); }
EMULATED __m512i _mm512_load_si512(const void *from) {
    if ((uintptr_t)from % 64) abort();
    return _mm512_loadu_si512(from);
}
EMULATED __m512 _mm512_load_ps(const void *from) {
    if ((uintptr_t)from % 64) abort();
    return _mm512_loadu_ps(from);
}
EMULATED __m512 _mm512_castsi512_ps(__m512i v) { __m512 result; memcpy(&result, &v, 64); return result; }
EMULATED __m256i _mm512_castsi512_si256(__m512i v) { __m256i half; memcpy(&half, &v, 32); return half; }
EMULATED __m256i _mm512_extracti64x4_epi64(__m512i v, int half) {
    __m256i result;
    memcpy(&result, v.byte + 32 * (half & 1), 32);
    return result;
}

EMULATED __m512 _mm512_set1_ps(float value) {
    __m512 v;
    for (int i = 0; i < 16; i++) v.lane[i] = value;
    return v;
}
EMULATED __m512 _mm512_setzero_ps(void) { return _mm512_set1_ps(0); }
EMULATED __m512i _mm512_setzero_si512(void) { return (__m512i){{0}}; }
EMULATED __m512 _mm512_add_ps(__m512 a, __m512 b) {
    for (int i = 0; i < 16; i++) a.lane[i] += b.lane[i];
    return a;
}
EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    for (int i = 0; i < 16; i++) c.lane[i] = (float)((double)a.lane[i] * b.lane[i] + c.lane[i]);
    return c;
}
EMULATED __m512 _mm512_mul_ps(__m512 a, __m512 b) {
    for (int i = 0; i < 16; i++) a.lane[i] *= b.lane[i];
    return a;
}
EMULATED float _mm512_reduce_add_ps(__m512 v) {
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; i++) v.lane[i] += v.lane[i + step];
    return v.lane[0];
}

/* VEXPANDPS, VPEXPANDW, VPEXPANDB: where a bit of the mask is set, the next element; that of v elsewhere. */
EMULATED __m512 _mm512_mask_expand_ps(__m512 v, __mmask16 mask, __m512 a) {
    for (int j = 0, k = 0; j < 16; j++)
        if (mask >> j & 1) v.lane[j] = a.lane[k++];
    return v;
}
EMULATED __m512i _mm512_mask_expand_epi16(__m512i v, __mmask32 mask, __m512i a) {
    for (int j = 0, k = 0; j < 32; j++)
        if (mask >> j & 1) memcpy(v.byte + 2 * j, a.byte + 2 * k++, 2);
    return v;
}

EMULATED __m512i _mm512_mask_expand_epi8(__m512i v, __mmask64 mask, __m512i a) {
    for (int j = 0, k = 0; j < 64; j++)
        if (mask >> j & 1) v.byte[j] = a.byte[k++];
    return v;
}

/* VPERMB: byte j is byte index[j] (6 bits) of a; zero where the mask's bit is. */
EMULATED __m512i _mm512_maskz_permutexvar_epi8(__mmask64 mask, __m512i index, __m512i a) {
    __m512i v = {{0}};
    for (int j = 0; j < 64; j++)
        if (mask >> j & 1) v.byte[j] = a.byte[index.byte[j] & 63];
    return v;
}

EMULATED __m512i _mm512_permutexvar_epi8(__m512i index, __m512i a) {
    return _mm512_maskz_permutexvar_epi8(UINT64_MAX, index, a);
}

/* VPERMI2B: the same of two vectors, by 7 bits. */
EMULATED __m512i _mm512_maskz_permutex2var_epi8(__mmask64 mask, __m512i a, __m512i index, __m512i b) {
    __m512i v = {{0}};
    for (int j = 0; j < 64; j++)
        if (mask >> j & 1) v.byte[j] = (index.byte[j] & 64 ? b : a).byte[index.byte[j] & 63];
    return v;
}
EMULATED __m512i _mm512_permutex2var_epi8(__m512i a, __m512i index, __m512i b) {
    return _mm512_maskz_permutex2var_epi8(UINT64_MAX, a, index, b);
}

/* VPERMPS: lane j is lane index[j] (4 bits) of a. */
EMULATED __m512 _mm512_permutexvar_ps(__m512i index, __m512 a) {
    __m512 v;
    for (int j = 0; j < 16; j++) v.lane[j] = a.lane[index.byte[4 * j] & 15];
    return v;
}

/* VPMULTISHIFTQB: byte j is the 8 bits of its quadword of a that begin at bit control[j], round its end. */
EMULATED __m512i _mm512_multishift_epi64_epi8(__m512i control, __m512i a) {
    __m512i v;
    for (int j = 0; j < 64; j++) {
        uint64_t quad;
        memcpy(&quad, a.byte + j / 8 * 8, 8);
        const int shift = control.byte[j] & 63;
        v.byte[j] = (uint8_t)(shift ? quad >> shift | quad << (64 - shift) : quad);
    }
    return v;
}

EMULATED __m512i _mm512_srli_epi32(__m512i a, unsigned count) {
    for (int j = 0; j < 16; j++) {
        uint32_t lane;
        memcpy(&lane, a.byte + 4 * j, 4);
        lane = count < 32 ? lane >> count : 0;
        memcpy(a.byte + 4 * j, &lane, 4);
    }
    return a;
}

/* VPUNPCKLBW, VPUNPCKHBW: in each 16 bytes the lower or upper ones of a and b by turns. */
EMULATED __m512i unpacked(__m512i a, __m512i b, int high) {
    __m512i v;
    for (int j = 0; j < 64; j++) v.byte[j] = (j % 2 ? b : a).byte[j / 16 * 16 + 8 * high + j % 16 / 2];
    return v;
}
EMULATED __m512i _mm512_unpacklo_epi8(__m512i a, __m512i b) { return unpacked(a, b, 0); }
EMULATED __m512i _mm512_unpackhi_epi8(__m512i a, __m512i b) { return unpacked(a, b, 1); }

EMULATED __m512i _mm512_set1_epi8(int byte) {
    __m512i v;
    memset(v.byte, byte, 64);
    return v;
}
EMULATED __m512i _mm512_abs_epi8(__m512i a) {
    for (int j = 0; j < 64; j++) a.byte[j] = a.byte[j] & 128 ? -a.byte[j] : a.byte[j];
    return a;
}
EMULATED __mmask64 _mm512_test_epi8_mask(__m512i a, __m512i b) {
    __mmask64 mask = 0;
    for (int j = 0; j < 64; j++) mask |= (uint64_t)!!(a.byte[j] & b.byte[j]) << j;
    return mask;
}

/* VPTERNLOGQ: bit 4 a + 2 b + c of `table`. */
EMULATED __m512i _mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int table) {
    for (int j = 0; j < 512; j++) {
        const int bit = j % 8, of_a = a.byte[j / 8] >> bit & 1, of_b = b.byte[j / 8] >> bit & 1;
        const int of_c = c.byte[j / 8] >> bit & 1, is = table >> (4 * of_a + 2 * of_b + of_c) & 1;
        a.byte[j / 8] = (uint8_t)((a.byte[j / 8] & ~(1 << bit)) | is << bit);
    }
    return a;
}

/* VDPBF16PS, whose sums are rounded after each product; subnormal numbers count as zero. */
EMULATED float widened_bf16(uint32_t bits) {
    float value;
    if (!(bits & 0x7f80)) bits &= 0x8000;
    bits <<= 16;
    memcpy(&value, &bits, 4);
    return value;
}
EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512 a, __m512 b) {
    for (int j = 0; j < 16; j++)
        for (int part = 1; part >= 0; part--) {
            uint32_t one, other;
            memcpy(&one, &a.lane[j], 4), memcpy(&other, &b.lane[j], 4);
            const int shift = 16 * part;
            const float product = widened_bf16(one >> shift & 0xffff) * widened_bf16(other >> shift & 0xffff);
            sum.lane[j] += fabsf(product) < 0x1p-126f ? 0 : product;
        }
    return sum;
}

/* VCVTDQ2PS. */
EMULATED __m512 _mm512_cvtepi32_ps(__m512i a) {
    __m512 v;
    for (int j = 0; j < 16; j++) {
        int32_t integer;
        memcpy(&integer, a.byte + 4 * j, 4);
        v.lane[j] = (float)integer;
    }
    return v;
}

/* VCVTPH2PS. */
EMULATED __m512 _mm512_cvtph_ps(__m256i a) {
    __m512 v;
    for (int j = 0; j < 16; j++) {
        uint16_t half;
        memcpy(&half, a.byte + 2 * j, 2);
        const int exponent = half >> 10 & 31, fraction = half & 1023;
        float size = ldexpf((float)(fraction + (exponent ? 1024 : 0)), (exponent ? exponent : 1) - 25);
        if (exponent == 31) size = fraction ? NAN : INFINITY;
        v.lane[j] = half & 0x8000 ? -size : size;
    }
    return v;
}

/* VPUNPCKLDQ, VPUNPCKHDQ, VPUNPCKLQDQ, VPUNPCKHQDQ: in each 16 bytes the lower or upper words of a and b by turns. */
EMULATED __m512i unpacked_words(__m512i a, __m512i b, int bytes, int high) {
    __m512i v;
    for (int j = 0; j < 64; j += bytes)
        memcpy(v.byte + j, (j / bytes % 2 ? b : a).byte + j / 16 * 16 + 8 * high + j % 16 / bytes / 2 * bytes, bytes);
    return v;
}
EMULATED __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return unpacked_words(a, b, 4, 0); }
EMULATED __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return unpacked_words(a, b, 4, 1); }
EMULATED __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return unpacked_words(a, b, 8, 0); }
EMULATED __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return unpacked_words(a, b, 8, 1); }

/* VSHUFI32X4: two of the four 16 bytes of a, then two of b, by 2 bits each. */
EMULATED __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int places) {
    __m512i v;
    for (int j = 0; j < 4; j++) memcpy(v.byte + 16 * j, (j < 2 ? a : b).byte + 16 * (places >> 2 * j & 3), 16);
    return v;
}

/* VMOVDQU16: what is masked away is not read. */
EMULATED __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void *from) {
    __m512i v = {{0}};
    for (int j = 0; j < 32; j++)
        if (mask >> j & 1) memcpy(v.byte + 2 * j, (const uint8_t *)from + 2 * j, 2);
    return v;
}

/* VCVTNEPS2BF16, VCVTNE2PS2BF16: to the nearest, to an even one of two; subnormal numbers count as zero. */
EMULATED uint16_t rounded_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (isnan(value)) return bits >> 16 | 0x40;
    if (!(bits & 0x7f800000)) return bits >> 31 << 15;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
EMULATED __m256bh _mm512_cvtneps_pbh(__m512 a) {
    __m256bh v;
    for (int j = 0; j < 16; j++) v.half[j] = rounded_bf16(a.lane[j]);
    return v;
}
EMULATED __m512bh _mm512_cvtne2ps_pbh(__m512 upper, __m512 lower) {
    const __m256bh halves[2] = {_mm512_cvtneps_pbh(lower), _mm512_cvtneps_pbh(upper)};
    __m512 v;
    memcpy(&v, halves, 64);
    return v;
}

/* AMX: LDTILECFG, STTILECFG, TILELOADD, TILESTORED and TDPBF16PS, whose products are added as VDPBF16PS adds them. */
struct emulated_tiles {
    struct { uint8_t palette, start, zeros[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config;
    uint8_t tile[8][16][64];
};
EMULATED struct emulated_tiles *emulated_tiles(void) { static _Thread_local struct emulated_tiles tiles; return &tiles; }
EMULATED void _tile_loadconfig(const void *from) {
    struct emulated_tiles *tiles = emulated_tiles();
    memcpy(&tiles->config, from, 64);
    if (tiles->config.palette > 1) abort();
    memset(tiles->tile, 0, sizeof(tiles->tile));
}
EMULATED void _tile_storeconfig(void *to) { memcpy(to, &emulated_tiles()->config, 64); }
EMULATED void moved_tile(int tile, char *memory, int64_t stride, int load) {
    struct emulated_tiles *tiles = emulated_tiles();
    if (!tiles->config.palette) abort();
    for (int row = 0; row < tiles->config.rows[tile]; row++) {
        const int bytes = tiles->config.row_bytes[tile];
        if (load) memcpy(tiles->tile[tile][row], memory + row * stride, bytes);
        else memcpy(memory + row * stride, tiles->tile[tile][row], bytes);
    }
}
#define _tile_loadd(tile, from, stride) moved_tile(tile, (char *)(from), stride, 1)
#define _tile_stored(tile, to, stride) moved_tile(tile, (char *)(to), stride, 0)
EMULATED void _tile_dpbf16ps(int to, int a, int b) {
    struct emulated_tiles *tiles = emulated_tiles();
    if (!tiles->config.palette || tiles->config.rows[a] != tiles->config.rows[to]) abort();
    for (int row = 0; row < tiles->config.rows[a]; row++)
        for (int pair = 0; pair < tiles->config.row_bytes[a] / 4; pair++) {
            __m512 sum, one, other;
            uint32_t bits;
            memcpy(&bits, tiles->tile[a][row] + 4 * pair, 4);
            for (int j = 0; j < 16; j++) memcpy(&one.lane[j], &bits, 4);
            memcpy(&sum, tiles->tile[to][row], 64);
            memcpy(&other, tiles->tile[b][pair], 64);
            sum = _mm512_dpbf16_ps(sum, one, other);
            memcpy(tiles->tile[to][row], &sum, 64);
        }
}
