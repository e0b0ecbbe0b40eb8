/* `some` with x of bfloat16 in tiles of AMX: 16 rows of 64 bytes. `tdpbf16ps` adds the products of 32 columns of 16
 * expanded rows of the weight and of 16 tokens, in pairs, to 16 x 16 floats. Only functions with this attribute touch
 * tiles: a flag for the whole file would be unknown to older compilers. */
#define WITH_TILES __attribute__((target("amx-tile,amx-bf16")))

/* Numbers of a side of a tile, and columns of bfloat16; rows and columns of the weight that are expanded together, the
 * former where all tokens are multiplied at once and where they are not; tokens that are multiplied at once. */
enum { SIDE = 16, WIDTH = 32, FEW_ROWS = 32, ROWS = 128, WIDE = 512, AT_ONCE = 32 };
/* Between expanded rows: not a power of two, at which they would share few places of the first cache. */
enum { NEXT_ROW = WIDE + WIDTH };

/* Rows of 16 numbers of 32 bits to columns. */
INLINE void transpose_side(const __m512i *from, __m512i *to) {
    __m512i a[SIDE], b[SIDE];
    for (int i = 0; i < SIDE; i += 2) {
        a[i] = _mm512_unpacklo_epi32(from[i], from[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(from[i], from[i + 1]);
    }
    for (int i = 0; i < SIDE; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        const __m512i even[2] = {_mm512_shuffle_i32x4(b[i], b[4 + i], 0x88), _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88)};
        const __m512i odd[2] = {_mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd), _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd)};
        to[i] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
        to[4 + i] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        to[8 + i] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
        to[12 + i] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
    }
}

/* x as tiles [tokens / 16][in / 32] of 16 pairs of columns by 16 tokens, filled up by zeros. */
static void make_tiles(const struct product *p, int64_t tiles, int64_t groups, __m512i *x) {
    const int64_t features = p->w.in_features;
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t group = 0; group < groups; group++, x += SIDE) {
            const int64_t left = features - group * WIDTH;
            const __mmask32 mask = left < WIDTH ? ((__mmask32)1 << left) - 1 : ~(__mmask32)0;
            __m512i rows[SIDE];
            for (int i = 0; i < SIDE; i++) {
                const int64_t token = tile * SIDE + i;
                const uint16_t *from = (const uint16_t *)p->raw + token * features + group * WIDTH;
                rows[i] = token < p->tokens ? _mm512_maskz_loadu_epi16(mask, from) : _mm512_setzero_si512();
            }
            transpose_side(rows, x);
        }
}

/* sums [2][tiles] of `halves` tiles each += 2 tiles of rows times tokens, over `groups` of 32 columns. */
WITH_TILES INLINE void multiply_tiles(int halves, const uint16_t *weights, const __m512i *x, int64_t next_x, int64_t groups,
                                      float *sums, int64_t next_sums) {
    __asm__ volatile("" ::: "memory"); /* loads of tiles do not tell the compiler that they read memory */
    _tile_loadd(0, sums, 64);
    _tile_loadd(2, sums + next_sums, 64);
    if (halves == 2) _tile_loadd(1, sums + SIDE * SIDE, 64);
    if (halves == 2) _tile_loadd(3, sums + next_sums + SIDE * SIDE, 64);
    for (int64_t group = 0; group < groups; group++, weights += WIDTH, x += SIDE) {
        _tile_loadd(4, weights, NEXT_ROW * 2);
        _tile_loadd(6, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, weights + SIDE * NEXT_ROW, NEXT_ROW * 2);
        _tile_dpbf16ps(2, 5, 6);
        if (halves == 2) _tile_loadd(7, x + next_x, 64);
        if (halves == 2) _tile_dpbf16ps(1, 4, 7);
        if (halves == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(2, sums + next_sums, 64);
    if (halves == 2) _tile_stored(1, sums + SIDE * SIDE, 64);
    if (halves == 2) _tile_stored(3, sums + next_sums + SIDE * SIDE, 64);
}

/* Columns of a row from `column` on as bfloat16; gives the offset behind them. */
static int64_t expand_to_tiles(const struct weight *w, int64_t row, int64_t column, int64_t columns, int64_t offset,
                               int64_t ahead, uint16_t *out) {
    if (w->dtype == BFLOAT16) return expand_row(DOTS, w, row, column, columns, offset, ahead, (float *)out);
    float wide[WIDE];
    offset = expand_integers(w, row, column, columns, offset, wide);
    for (int64_t i = 0; i < columns; i += WIDTH) {
        const __m512bh halves = _mm512_cvtne2ps_pbh(v_load(wide + i + LANES), v_load(wide + i));
        memcpy(out + i, &halves, sizeof(halves));
    }
    return offset;
}

/* 16 rows of y from their sums [tiles][16 rows][16 tokens]. */
static void finish_tiles(const struct product *p, int64_t row, int64_t rows, int64_t tiles, const float *sums) {
    float bias[SIDE] = {0};
    for (int64_t r = 0; p->bias && r < rows; r++) bias[r] = load_number(BFLOAT16, p->bias, row + r);
    for (int64_t tile = 0; tile < tiles; tile++, sums += SIDE * SIDE) {
        __m512i by_row[SIDE], by_token[SIDE];
        for (int r = 0; r < SIDE; r++) by_row[r] = _mm512_loadu_si512(sums + r * SIDE);
        transpose_side(by_row, by_token);
        for (int64_t t = 0; t < SIDE && tile * SIDE + t < p->tokens; t++) {
            const __m256bh halves = _mm512_cvtneps_pbh(v_add(_mm512_castsi512_ps(by_token[t]), v_load(bias)));
            uint16_t *y = (uint16_t *)p->y + (tile * SIDE + t) * p->w.out_features + row;
            if (rows == SIDE) memcpy(y, &halves, sizeof(halves));
            else memcpy(y, &halves, rows * sizeof(uint16_t));
        }
    }
}

WITH_TILES static void tile_rows(const struct product *p, int64_t begin, int64_t end, int64_t most_rows, int64_t tiles,
                                 __m512i *x, float *sums, uint16_t *weights) {
    const struct weight *w = &p->w;
    const int64_t groups = (w->in_features + WIDTH - 1) / WIDTH, next_sums = tiles * SIDE * SIDE;
    make_tiles(p, tiles, groups, x);
    for (int64_t row = begin; row < end; row += most_rows) {
        const int64_t rows = end - row < most_rows ? end - row : most_rows, filled = (rows + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
        int64_t offset[ROWS];
        memset(sums, 0, filled / SIDE * next_sums * sizeof(float));
        memset(weights + rows * NEXT_ROW, 0, (filled - rows) * NEXT_ROW * sizeof(uint16_t));
        for (int64_t r = 0; r < rows; r++) offset[r] = row_start(w, row + r);
        for (int64_t column = 0; column < w->in_features; column += WIDE) {
            const int64_t left = (w->in_features - column + 63) / 64 * 64, columns = left < WIDE ? left : WIDE;
            for (int64_t r = 0; r < rows; r++)
                offset[r] = expand_to_tiles(w, row + r, column, columns, offset[r], most_rows, weights + r * NEXT_ROW);
            const int64_t all = groups - column / WIDTH, here = all < WIDE / WIDTH ? all : WIDE / WIDTH;
            for (int64_t tile = 0; tile < tiles; tile += 2)
                for (int64_t r = 0; r < filled; r += 2 * SIDE) {
                    const __m512i *from = x + (tile * groups + column / WIDTH) * SIDE;
                    float *to = sums + r / SIDE * next_sums + tile * SIDE * SIDE;
                    if (tile + 1 < tiles)
                        multiply_tiles(2, weights + r * NEXT_ROW, from, groups * SIDE, here, to, next_sums);
                    else multiply_tiles(1, weights + r * NEXT_ROW, from, 0, here, to, next_sums);
                }
        }
        for (int64_t r = 0; r < rows; r++) check_end(p, row + r, offset[r]);
        for (int64_t r = 0; r < rows; r += SIDE)
            finish_tiles(p, row + r, rows - r < SIDE ? rows - r : SIDE, tiles, sums + r / SIDE * next_sums);
    }
}

/* Rows [begin, end) of a product with x of bfloat16. Tiles are left as they were found, for torch has them set up. */
WITH_TILES static void some_in_tiles(const struct product *p, int64_t begin, int64_t end) {
    static const struct { uint8_t palette, start, zeros[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } tile_config = {
        1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE}};
    const int64_t tiles = (p->tokens + SIDE - 1) / SIDE, rows = tiles > 2 ? ROWS : FEW_ROWS;
    const int64_t of_x = tiles * ((p->w.in_features + WIDTH - 1) / WIDTH) * SIDE * sizeof(__m512i);
    const int64_t of_sums = rows * tiles * SIDE * sizeof(float), of_weights = rows * NEXT_ROW * sizeof(uint16_t);
    char *memory = NULL, before[64] __attribute__((aligned(64)));
    if (posix_memalign((void **)&memory, 64, of_x + of_sums + of_weights)) {
        *p->failed = NO_MEMORY;
        return;
    }
    _tile_storeconfig(before);
    _tile_loadconfig(&tile_config);
    tile_rows(p, begin, end, rows, tiles, (__m512i *)memory, (float *)(memory + of_x),
              (uint16_t *)(memory + of_x + of_sums));
    _tile_loadconfig(before);
    free(memory);
}

static void some_or_tiles(const struct product *p, int64_t begin, int64_t end) {
    (p->w.x_dtype == BFLOAT16 ? some_in_tiles : some)(p, begin, end);
}
