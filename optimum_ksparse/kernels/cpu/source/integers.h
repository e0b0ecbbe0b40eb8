/* Values that are integers, each times the scale of its row and group of columns: included by `product.h`.
 *
 * `few` sums the integers of a group times x, then multiplies the sum with their scale. Where the unit has
 * `expand_integer_pairs` and x is bfloat16, they are multiplied as such, which is exact; else as floats, and integers of
 * half a byte become whole bytes first, in a buffer that stays in the first cache. All but `few` takes the weights as
 * floats. */

/* Columns of a row that are read at a time; how far on lies, in bytes, what is to be read soon. */
enum { SPAN = 4096, MOST_GROUPS = SPAN / 64, SOON = 2048 };

static void widen(int32_t dtype, const void *from, int64_t count, float *to);

/* Up to SPAN columns of a row: in words of the mask, 64 columns each; how many words a group has, and how many the first
 * one has there. */
struct span {
    int64_t words, in_group, in_first;
    const uint8_t *bits;
    const char *values; /* as many bytes may be read as there are columns */
    float scales[MOST_GROUPS];
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
    int64_t i = 0;
    for (; i < size && i + 16 <= left; i += 16) {
        __builtin_prefetch(from + i + SOON);
        bytes_of_halves(from + i, to + 2 * i);
    }
    for (; i < size; i += 16) {
        char copy[16] = {0};
        if (left > i) memcpy(copy, from + i, left - i < 16 ? left - i : 16);
        bytes_of_halves(copy, to + 2 * i);
    }
    return to + offset % 2;
}

/* Where `words` times 64 integers from `offset` on may be read 64 bytes at a time: in place, or, near the end of them, a
 * copy. */
INLINE const char *readable_integers(const struct weight *w, int64_t offset, int64_t words, char *copy) {
    const int64_t in_byte = w->dtype == INT4 ? 2 : 1, most = 64 * words / in_byte + 64 * (in_byte - 1);
    const int64_t left = (w->num_values - offset + offset % in_byte) / in_byte;
    const char *values = (const char *)w->values + offset / in_byte;
    if (left >= most) return values;
    memset(copy, 0, most);
    if (left > 0) memcpy(copy, values, left);
    return copy;
}

INLINE void load_span(int32_t dtype, const struct weight *w, int64_t row, int64_t column, int64_t columns,
                      int64_t offset, struct span *span) {
    const int64_t left = w->in_features - column, words = ((left < columns ? left : columns) + 63) / 64;
    const int64_t bytes = w->row_bytes - column / 8, group = column ? column / w->group_size : 0; /* it takes time */
    const void *scales = (const char *)w->scales + (row * w->groups + group) * size_of(w->x_dtype);
    const int64_t groups = w->groups - group < MOST_GROUPS ? w->groups - group : MOST_GROUPS;
    span->words = words, span->in_group = w->group_size / 64;
    span->in_first = (group + 1) * span->in_group - column / 64;
    span->bits = w->bits + row * w->row_bytes + column / 8;
    if (bytes < 8 * words) {
        memset(span->last_bits, 0, 8 * words);
        span->bits = memcpy(span->last_bits, span->bits, bytes);
    }
    widen(w->x_dtype, scales, groups, span->scales);
    if (dtype == INTEGERS && w->dtype == INT4) {
        int64_t kept = 0;
        for (int64_t word = 0; word < words; word++) kept += __builtin_popcountll(load_bits(span->bits + 8 * word, 8));
        span->values = as_bytes(w, offset, kept, span->copy);
    } else span->values = readable_integers(w, offset, words, span->copy);
}

/* sums[tokens][chains] += the integers of 64 columns, divided by the unit, times x. `halves`: where they are halves of
 * bytes. Gives how many there are. */
INLINE int64_t multiply_word(int32_t dtype, int tokens, int chains, int halves, uint64_t mask, const char *values,
                             int64_t first, const float *x, int64_t stride, vec *sums) {
#ifdef expand_integer_pairs
    if (dtype == INTEGER_DOTS) {
        vec weights[2];
        expand_integer_pairs(halves, values + (halves ? first >> 1 : first), halves && first & 1, mask, weights);
        for (int part = 0; part < 2; part++)
            for (int token = 0; token < tokens; token++) {
                vec *sum = sums + token * chains + part % chains;
                *sum = v_dot(weights[part], v_load(x + token * stride + part * LANES), *sum);
            }
        return __builtin_popcountll(mask);
    }
#endif
    (void)dtype, (void)halves;
    enum { PARTS_OF_STEP = INTEGER_STEP / LANES };
    int64_t kept = 0;
    for (int step = 0; step < 64 / INTEGER_STEP; step++) {
        vec weights[PARTS_OF_STEP];
        kept += expand_int8(values + first + kept, mask, step, weights);
        for (int part = 0; part < PARTS_OF_STEP; part++)
            for (int token = 0; token < tokens; token++) {
                vec *sum = sums + token * chains + (step * PARTS_OF_STEP + part) % chains;
                *sum = v_fma(weights[part], v_load(x + token * stride + step * INTEGER_STEP + part * LANES), *sum);
            }
    }
    return kept;
}

/* totals[tokens] += a span, divided by the unit, times x. Gives how many integers it has. */
INLINE int64_t add_span(int32_t dtype, int tokens, int halves, const struct span *span, int64_t first, const float *x,
                        int64_t stride, vec *totals) {
    enum { CHAINS = 4 };
    const int chains = tokens > 2 ? 1 : dtype == INTEGERS ? CHAINS : 2;
    const char *values = span->values;
    const uint8_t *bits = span->bits, *end = bits + 8 * span->words, *of_group = bits + 8 * span->in_first;
    int64_t at = first;
    vec total[FEW], sums[CHAINS * FEW];
    for (int token = 0; token < tokens; token++) total[token] = totals[token];
    for (const float *scale = span->scales; bits < end; of_group += 8 * span->in_group, scale++) {
        if (of_group > end) of_group = end;
        for (int i = 0; i < tokens * chains; i++) sums[i] = v_zero();
        for (; bits < of_group; bits += 8, x += 64 / in_lane(dtype)) {
            __builtin_prefetch(values + (halves ? at >> 1 : at) + SOON);
            at += multiply_word(dtype, tokens, chains, halves, load_bits(bits, 8), values, at, x, stride, sums);
        }
        for (int token = 0; token < tokens; token++)
            for (int chain = 0; chain < chains; chain++)
                total[token] = v_fma(sums[token * chains + chain], v_splat(*scale), total[token]);
    }
    for (int token = 0; token < tokens; token++) totals[token] = total[token];
    return at - first;
}

INLINE void few_integers(int32_t dtype, int tokens, const struct product *p, int64_t begin, int64_t end) {
    const struct weight *w = &p->w;
    const int64_t stride = p->stride / in_lane(dtype);
    for (int64_t row = begin; row < end; row++) {
        int64_t offset = row_start(w, row);
        vec totals[FEW];
        for (int token = 0; token < tokens; token++) totals[token] = v_zero();
        for (int64_t column = 0; column < w->in_features; column += SPAN) {
            const float *x = p->x + column / in_lane(dtype);
            struct span span;
            load_span(dtype, w, row, column, SPAN, offset, &span);
            if (dtype == INTEGER_DOTS && w->dtype == INT4)
                offset += add_span(dtype, tokens, 1, &span, offset % 2, x, stride, totals);
            else offset += add_span(dtype, tokens, 0, &span, 0, x, stride, totals);
        }
        check_end(p, row, offset);
        for (int token = 0; token < tokens; token++)
            finish(dtype, p, row, token, v_sum(totals[token]) * (dtype == INTEGERS ? INTEGER_UNIT : 1));
    }
}

/* As `expand_row`: the weights as floats. */
static int64_t expand_integers(const struct weight *w, int64_t row, int64_t column, int64_t most, int64_t offset,
                               float *out) {
    struct span span;
    load_span(INTEGERS, w, row, column, most, offset, &span);
    const char *values = span.values;
    for (int64_t word = 0, end = span.in_first, group = 0; word < span.words; end += span.in_group, group++)
        for (; word < end && word < span.words; word++)
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
    const int8_t *integers = (const int8_t *)(w->dtype == INT4 ? as_bytes(w, offset, count, copy)
                                                               : readable_integers(w, offset, 1, copy));
    const float scale = load_number(w->x_dtype, w->scales, row * w->groups + column / w->group_size);
    for (int64_t i = 0; i < count; i++) to[i] = integers[i] * scale;
}
