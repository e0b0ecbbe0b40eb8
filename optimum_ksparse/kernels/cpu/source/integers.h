/* Values that are integers, each times the scale of its row and group of columns: included by `product.h`.
 *
 * `few` sums the integers of 64 columns times x, then multiplies the sum with their scale. All else takes the weights as
 * floats. Integers of half a byte become whole bytes first, in a buffer that stays in the first cache. */

/* Columns of a row that are read at a time; rows that share the columns of x, which then stay in the first cache. */
enum { SPAN = 4096, TOGETHER = 32 };

static void widen(int32_t dtype, const void *from, int64_t count, float *to);

/* Columns of some rows: in words of the mask, 64 columns each; the groups that they are of, how many words each has, and
 * how many the first one has; how far on lies, in bytes, what is to be read soon. */
struct columns { int64_t first, words, group, groups, in_group, in_first, ahead; };

/* What one row has there. */
struct span {
    const uint8_t *bits;
    const char *values; /* bytes; as many may be read as there are columns */
    float scales[SPAN / 64 + 1]; /* of the groups */
    uint8_t last_bits[SPAN / 8];
    char copy[SPAN + 64];
};

/* 16 bytes of two integers each to 32 bytes of one. */
INLINE void bytes_of_halves(const char *from, char *to) {
    typedef uint8_t pairs __attribute__((vector_size(16)));
    typedef uint16_t words __attribute__((vector_size(32)));
    typedef uint8_t bytes __attribute__((vector_size(32)));
    pairs loaded;
    memcpy(&loaded, from, 16);
    const words wide = __builtin_convertvector(loaded, words);
    const bytes integers = (((bytes)(wide | wide << 4) & 15) ^ 8) - 8; /* the highest bit of a half is its sign */
    memcpy(to, &integers, 32);
}

/* `count` integers of half a byte from `offset` on as bytes, zero behind the last one; `to` has room for 64 more. */
INLINE const char *as_bytes(const struct weight *w, int64_t offset, int64_t count, int64_t ahead, char *to) {
    const int64_t first = offset / 2, size = (offset % 2 + count + 1) / 2, left = w->num_values / 2 - first;
    const char *from = (const char *)w->values + first;
    int64_t i = 0;
    for (; i < size && i + 16 <= left; i += 16) {
        __builtin_prefetch(from + i + ahead);
        bytes_of_halves(from + i, to + 2 * i);
    }
    for (; i < size; i += 16) {
        char copy[16] = {0};
        if (left > i) memcpy(copy, from + i, left - i < 16 ? left - i : 16);
        bytes_of_halves(copy, to + 2 * i);
    }
    return to + offset % 2;
}

/* The same of any integers; in place where they are bytes, `most` of which may then be read. */
INLINE const char *load_bytes(const struct weight *w, int64_t offset, int64_t count, int64_t most, int64_t ahead,
                              char *copy) {
    if (w->dtype == INT4) return as_bytes(w, offset, count, ahead, copy);
    const int64_t left = w->num_values - offset;
    if (left >= most) return (const char *)w->values + offset;
    memset(copy, 0, most);
    if (left > 0) memcpy(copy, (const char *)w->values + offset, left);
    return copy;
}

INLINE struct columns columns_of(const struct weight *w, int64_t first, int64_t most) {
    const int64_t left = w->in_features - first, words = ((left < most ? left : most) + 63) / 64;
    const int64_t in_group = w->group_size / 64, group = first / w->group_size;
    const int64_t in_first = (group + 1) * in_group - first / 64, after = words > in_first ? words - in_first : 0;
    const int64_t row = w->num_values / w->out_features, ahead = words * 64 >= w->in_features ? 1024 : row;
    return (struct columns){first, words, group, 1 + (after + in_group - 1) / in_group, in_group, in_first,
                            w->dtype == INT4 && ahead == row ? row / 2 : ahead};
}

INLINE void load_span(const struct weight *w, int64_t row, const struct columns *c, int64_t offset, struct span *span) {
    const int64_t words = c->words, bytes = w->row_bytes - c->first / 8;
    const void *scales = (const char *)w->scales + (row * w->groups + c->group) * size_of(w->x_dtype);
    int64_t kept = 0;
    span->bits = w->bits + row * w->row_bytes + c->first / 8;
    if (bytes < 8 * words) {
        memset(span->last_bits, 0, 8 * words);
        span->bits = memcpy(span->last_bits, span->bits, bytes);
    }
    widen(w->x_dtype, scales, c->groups, span->scales);
    for (int64_t word = 0; word < words && w->dtype == INT4; word++)
        kept += __builtin_popcountll(load_bits(span->bits + 8 * word, 8));
    span->values = load_bytes(w, offset, kept, 64 * words, c->ahead, span->copy);
}

/* sums[tokens] = the integers of 64 columns, divided by INTEGER_UNIT, times x. Gives how many there are. */
INLINE int64_t multiply_word(int tokens, uint64_t mask, const char *values, const float *x, int64_t stride, vec *sums) {
    enum { PARTS_OF_STEP = INTEGER_STEP / LANES };
    vec halves[2 * FEW]; /* of each sum */
    int64_t kept = 0;
    for (int i = 0; i < 2 * tokens; i++) halves[i] = v_zero();
    for (int step = 0; step < 64 / INTEGER_STEP; step++) {
        vec weights[PARTS_OF_STEP];
        kept += expand_int8(values + kept, mask, step, weights);
        for (int part = 0; part < PARTS_OF_STEP; part++)
            for (int token = 0; token < tokens; token++) {
                vec *sum = halves + (step * PARTS_OF_STEP + part) % 2 * tokens + token;
                *sum = v_fma(weights[part], v_load(x + token * stride + step * INTEGER_STEP + part * LANES), *sum);
            }
    }
    for (int token = 0; token < tokens; token++) sums[token] = v_add(halves[token], halves[tokens + token]);
    return kept;
}

/* totals[tokens] += a span, divided by INTEGER_UNIT, times x. Gives how many integers it has. */
INLINE int64_t add_span(int tokens, const struct span *span, const struct columns *c, const float *x, int64_t stride,
                        vec *totals) {
    const char *values = span->values;
    vec total[FEW], sums[FEW];
    for (int token = 0; token < tokens; token++) total[token] = totals[token];
    for (int64_t word = 0, end = c->in_first, group = 0; word < c->words; end += c->in_group, group++) {
        const vec scale = v_splat(span->scales[group]);
        for (; word < end && word < c->words; word++, x += 64) {
            __builtin_prefetch(values + c->ahead);
            values += multiply_word(tokens, load_bits(span->bits + 8 * word, 8), values, x, stride, sums);
            for (int token = 0; token < tokens; token++) total[token] = v_fma(sums[token], scale, total[token]);
        }
    }
    for (int token = 0; token < tokens; token++) totals[token] = total[token];
    return values - span->values;
}

INLINE void few_integers(int tokens, const struct product *p, int64_t begin, int64_t end) {
    const struct weight *w = &p->w;
    const int64_t most = tokens == 1 ? SPAN : SPAN / 4;
    for (int64_t row = begin; row < end; row += TOGETHER) {
        const int rows = end - row < TOGETHER ? (int)(end - row) : TOGETHER;
        vec totals[TOGETHER * FEW];
        int64_t offset[TOGETHER];
        for (int i = 0; i < rows * tokens; i++) totals[i] = v_zero();
        for (int r = 0; r < rows; r++) offset[r] = row_start(w, row + r);
        for (int64_t column = 0; column < w->in_features; column += most) {
            const struct columns columns = columns_of(w, column, most);
            for (int r = 0; r < rows; r++) {
                struct span span;
                load_span(w, row + r, &columns, offset[r], &span);
                offset[r] += add_span(tokens, &span, &columns, p->x + column, p->stride, totals + r * tokens);
            }
        }
        for (int r = 0; r < rows; r++) {
            check_end(p, row + r, offset[r]);
            for (int token = 0; token < tokens; token++)
                finish(INTEGERS, p, row + r, token, v_sum(totals[r * tokens + token]) * INTEGER_UNIT);
        }
    }
}

/* As `expand_row`: the weights as floats. */
static int64_t expand_integers(const struct weight *w, int64_t row, int64_t column, int64_t most, int64_t offset,
                               float *out) {
    struct span span;
    const struct columns c = columns_of(w, column, most);
    load_span(w, row, &c, offset, &span);
    const char *values = span.values;
    for (int64_t word = 0, end = c.in_first, group = 0; word < c.words; end += c.in_group, group++)
        for (; word < end && word < c.words; word++)
            for (int step = 0; step < 64 / INTEGER_STEP; step++) {
                vec weights[INTEGER_STEP / LANES];
                values += expand_int8(values, load_bits(span.bits + 8 * word, 8), step, weights);
                for (int part = 0; part < INTEGER_STEP / LANES; part++, out += LANES) {
                    const vec integers = v_fma(weights[part], v_splat(INTEGER_UNIT), v_zero());
                    v_store(out, v_fma(integers, v_splat(span.scales[group]), v_zero()));
                }
            }
    return offset + (values - span.values);
}

/* The dense weights of a row in x_dtype. */
static int64_t expand_integer_row(const struct weight *w, int64_t row, void *out) {
    int64_t offset = row_start(w, row);
    for (int64_t column = 0; column < w->in_features; column += COLUMNS) {
        const int64_t left = w->in_features - column, columns = left < COLUMNS ? left : COLUMNS;
        float tile[COLUMNS];
        offset = expand_integers(w, row, column, columns, offset, tile);
        for (int64_t i = 0; i < columns; i++) store_number(w->x_dtype, out, column + i, tile[i]);
    }
    return offset;
}

/* The weights [count], at most 64, that a row keeps from `column` on, as floats. */
static void load_weights(const struct weight *w, int64_t row, int64_t column, int64_t offset, int64_t count, float *to) {
    char copy[128];
    const int8_t *integers = (const int8_t *)load_bytes(w, offset, count, count, 1024, copy);
    const float scale = load_number(w->x_dtype, w->scales, row * w->groups + column / w->group_size);
    for (int64_t i = 0; i < count; i++) to[i] = integers[i] * scale;
}
