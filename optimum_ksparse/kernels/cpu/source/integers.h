/* Values that are integers, each times the scale of its row and group of columns: included by `product.h`.
 *
 * `few` sums the integers of 64 columns times x, then multiplies the sum with their scale. All else takes the weights as
 * floats. Integers of half a byte become whole bytes first, in a buffer that stays in the first cache. */

/* Columns of a row that are read at a time; rows that share the columns of x, which then stay in the first cache. */
enum { SPAN = 4096, TOGETHER = 32 };

/* Words of the mask of one row, 64 columns each, and what belongs to them. */
struct span {
    const uint8_t *bits;
    const char *values; /* bytes; as many may be read as there are columns */
    float scales[SPAN / 64]; /* of the words */
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
INLINE const char *as_bytes(const struct weight *w, int64_t offset, int64_t count, char *to) {
    const int64_t first = offset / 2, size = (offset % 2 + count + 1) / 2, left = w->num_values / 2 - first;
    const char *from = (const char *)w->values + first;
    for (int64_t i = 0; i < size; i += 16) {
        char copy[16] = {0};
        if (left - i < 16 && left > i) memcpy(copy, from + i, left - i);
        bytes_of_halves(left - i < 16 ? copy : from + i, to + 2 * i);
        __builtin_prefetch(from + i + 1024);
    }
    return to + offset % 2;
}

/* The same of any integers; in place where they are bytes, `most` of which may then be read. */
INLINE const char *load_bytes(const struct weight *w, int64_t offset, int64_t count, int64_t most, char *copy) {
    if (w->dtype == INT4) return as_bytes(w, offset, count, copy);
    const int64_t left = w->num_values - offset;
    if (left >= most) return (const char *)w->values + offset;
    memset(copy, 0, most);
    if (left > 0) memcpy(copy, (const char *)w->values + offset, left);
    return copy;
}

INLINE float scale_of(const struct weight *w, int64_t row, int64_t group) {
    return load_number(w->x_dtype, w->scales, row * w->groups + group);
}

INLINE void load_span(const struct weight *w, int64_t row, int64_t column, int64_t words, int64_t offset,
                      struct span *span) {
    const int64_t bytes = w->row_bytes - column / 8, in_group = w->group_size / 64;
    int64_t group = column / w->group_size, end = (group + 1) * in_group - column / 64, kept = 0;
    span->bits = w->bits + row * w->row_bytes + column / 8;
    if (bytes < 8 * words) {
        memset(span->last_bits, 0, 8 * words);
        span->bits = memcpy(span->last_bits, span->bits, bytes);
    }
    for (int64_t word = 0; word < words; group++, end += in_group) {
        const float scale = scale_of(w, row, group);
        for (; word < end && word < words; word++) span->scales[word] = scale;
    }
    for (int64_t word = 0; word < words && w->dtype == INT4; word++)
        kept += __builtin_popcountll(load_bits(span->bits + 8 * word, 8));
    span->values = load_bytes(w, offset, kept, 64 * words, span->copy);
}

/* totals[tokens] += the integers of a span, divided by INTEGER_UNIT, times x. Gives how many there are. */
INLINE int64_t add_span(int tokens, const struct span *span, int64_t words, const float *x, int64_t stride, vec *totals) {
    enum { PARTS_OF_STEP = INTEGER_STEP / LANES };
    const char *values = span->values;
    vec total[FEW];
    for (int token = 0; token < tokens; token++) total[token] = totals[token];
    for (int64_t i = 0; i < words; i++, x += 64) {
        const uint64_t word = load_bits(span->bits + 8 * i, 8);
        vec sums[2 * FEW];
        __builtin_prefetch(values + 1024);
        for (int j = 0; j < 2 * tokens; j++) sums[j] = v_zero();
        for (int step = 0; step < 64 / INTEGER_STEP; step++) {
            vec weights[PARTS_OF_STEP];
            values += expand_int8(values, word, step, weights);
            for (int part = 0; part < PARTS_OF_STEP; part++)
                for (int token = 0; token < tokens; token++) {
                    vec *sum = sums + (step * PARTS_OF_STEP + part) % 2 * tokens + token;
                    *sum = v_fma(weights[part], v_load(x + token * stride + step * INTEGER_STEP + part * LANES), *sum);
                }
        }
        for (int token = 0; token < tokens; token++)
            total[token] = v_fma(v_add(sums[token], sums[tokens + token]), v_splat(span->scales[i]), total[token]);
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
            const int64_t left = w->in_features - column, words = ((left < most ? left : most) + 63) / 64;
            for (int r = 0; r < rows; r++) {
                struct span span;
                load_span(w, row + r, column, words, offset[r], &span);
                offset[r] += add_span(tokens, &span, words, p->x + column, p->stride, totals + r * tokens);
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
static int64_t expand_integers(const struct weight *w, int64_t row, int64_t column, int64_t columns, int64_t offset,
                               float *out) {
    struct span span;
    const int64_t words = (columns + 63) / 64;
    load_span(w, row, column, words, offset, &span);
    const char *values = span.values;
    for (int64_t i = 0; i < words; i++) {
        const uint64_t word = load_bits(span.bits + 8 * i, 8);
        for (int step = 0; step < 64 / INTEGER_STEP; step++) {
            vec weights[INTEGER_STEP / LANES];
            values += expand_int8(values, word, step, weights);
            for (int part = 0; part < INTEGER_STEP / LANES; part++, out += LANES) {
                const vec integers = v_fma(weights[part], v_splat(INTEGER_UNIT), v_zero());
                v_store(out, v_fma(integers, v_splat(span.scales[i]), v_zero()));
            }
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
    const int8_t *integers = (const int8_t *)load_bytes(w, offset, count, count, copy);
    const float scale = scale_of(w, row, column / w->group_size);
    for (int64_t i = 0; i < count; i++) to[i] = integers[i] * scale;
}
