/* Values that are integers, each times the scale of its row and group of columns: included by `product.h`.
 *
 * `few` sums the integers of a group times x, then multiplies the sum with their scale. Where the unit has
 * `expand_integer_pairs` and x is bfloat16, they are multiplied as such, which is exact; else as floats, and integers of
 * half a byte become whole bytes first, in a buffer that stays in the first cache. All but `few` takes the weights as
 * floats. */

/* Columns of a row that are read at a time. */
enum { SPAN = 4096, MOST_GROUPS = SPAN / 64 };

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
    const int halves = w->dtype == INT4; /* shifts, for a division takes as long as dozens of weights */
    const int64_t first = offset >> halves, left = (w->num_values >> halves) - first;
    const int64_t most = (64 * words >> halves) + 64 * halves;
    const char *values = (const char *)w->values + first;
    if (left >= most) return values;
    memset(copy, 0, most);
    if (left > 0) memcpy(copy, values, left);
    return copy;
}

/* `to_bytes`: whether halves of bytes become whole ones. */
INLINE void load_span(int to_bytes, const struct weight *w, int64_t row, int64_t column, int64_t columns, int64_t offset,
                      struct span *span) {
    const int64_t left = w->in_features - column, words = ((left < columns ? left : columns) + 63) / 64;
    const int64_t bytes = mask_left(w, column), group = column ? column / w->group_size : 0; /* it takes time */
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
    if (to_bytes) {
        int64_t kept = 0;
        for (int64_t word = 0; word < words; word++) kept += __builtin_popcountll(load_bits(span->bits + 8 * word, 8));
        span->values = as_bytes(w, offset, kept, span->copy);
    } else span->values = readable_integers(w, offset, words, span->copy);
}

/* sums[chains][tokens] += the weights of 64 columns, divided by the unit, times x. `halves`: where they are halves of
 * bytes, from half number `odd` on; `table`: their weights by integer, where the unit takes it. Gives how many are kept. */
INLINE int64_t multiply_word(int32_t dtype, int alike, int halves, int tokens, int chains, uint64_t mask,
                             const char *values, int odd, vec table, const float *x, int64_t stride, vec *sums) {
    vec weights[64 / LANES];
    (void)alike, (void)halves, (void)odd, (void)table;
#ifdef expand_integer_pairs
    if (dtype == INTEGER_DOTS) {
        expand_integer_pairs(halves, values, odd, mask, weights);
        multiply(dtype, tokens, 64 / LANES / 2, chains, 0, x, stride, weights, sums);
        return __builtin_popcountll(mask);
    }
#endif
#ifdef expand_int4
    if (halves) {
        expand_int4(values, odd, mask, table, weights);
        multiply(dtype, tokens, 64 / LANES, chains, 0, x, stride, weights, sums);
        return __builtin_popcountll(mask);
    }
#endif
#ifdef expand_alike
    if (alike) {
        expand_alike(halves ? INT4 : INT8, values, mask, weights);
        multiply(dtype, tokens, 64 / LANES, chains, 0, x, stride, weights, sums);
        return 32;
    }
#endif
    enum { PARTS_OF_STEP = INTEGER_STEP / LANES };
    int64_t kept = 0;
    for (int step = 0; step < 64 / INTEGER_STEP; step++) {
        kept += expand_int8(values + kept, mask, step, weights);
        multiply(dtype, tokens, PARTS_OF_STEP, chains, step * PARTS_OF_STEP, x + step * INTEGER_STEP, stride, weights, sums);
    }
    return kept;
}

/* totals[tokens] += a span, divided by the unit, times x. `single`: where each word is a group. Gives how many weights it
 * keeps. */
INLINE int64_t add_span(int32_t dtype, int alike, int halves, int single, int tokens, const struct span *span,
                        int64_t first, const float *x, int64_t stride, vec *totals) {
    const int scaled = HAS_INT4 && halves && dtype == INTEGERS;
    const int chains = tokens > 2 ? 1 : dtype == INTEGER_DOTS || (single && !scaled) ? 2 : CHAINS;
    const char *values = span->values;
    const uint8_t *bits = span->bits, *end = bits + 8 * span->words, *next_group = bits + 8 * span->in_first;
    const int apart = tokens * (single ? chains : 1); /* sums of groups that are added at the end */
    int64_t at = first;
    vec total[CHAINS * FEW], sums[CHAINS * FEW], table = v_zero();
    for (int i = 0; i < tokens * chains; i++) total[i] = i < tokens ? totals[i] : v_zero(), sums[i] = v_zero();
    for (const float *scale = span->scales; bits < end; next_group += 8 * span->in_group, scale++) {
        const uint8_t *of_group = single ? bits + 8 : next_group < end ? next_group : end;
#ifdef expand_int4
        table = scaled_integers(*scale);
#endif
        do {
            const char *from = values + (halves ? at >> 1 : at);
            __builtin_prefetch(from + SOON);
            at += multiply_word(dtype, alike, halves, tokens, chains, load_bits(bits, 8), from, alike ? 0 : at & 1, table, x,
                                stride, sums);
            bits += 8, x += 64 / in_lane(dtype);
        } while (!single && bits < of_group);
        for (int i = 0; i < tokens * chains && !scaled; i++) {
            total[i % apart] = v_fma(sums[i], v_splat(*scale), total[i % apart]);
            sums[i] = v_zero();
        }
    }
    for (int i = 0; i < tokens; i++) totals[i] = total[i];
    for (int i = scaled ? 0 : tokens; i < (scaled ? tokens * chains : apart); i++)
        totals[i % tokens] = v_add(totals[i % tokens], scaled ? sums[i] : total[i]);
    return at - first;
}

INLINE void few_integers(int32_t dtype, int tokens, const struct product *p, int64_t begin, int64_t end) {
    const struct weight *w = &p->w;
    const int64_t stride = p->stride / in_lane(dtype);
    const int single = w->group_size == 64;
    int64_t asked = begin;
    int all = 0;
    for (int64_t row = begin; row < end; row++) {
        int64_t offset = row_start(w, row);
        if (row >= asked) {
            const int64_t more = rows_to_ask(w, row, end);
            all = all_alike(w, row, more);
            asked = row + more;
        }
        const int alike = all && (w->dtype == INT8 || offset % 2 == 0);
        const int halves = w->dtype == INT4 && (HAS_INT4 || dtype == INTEGER_DOTS || alike);
        const float unit = dtype == INTEGER_DOTS || halves ? 1 : INTEGER_UNIT;
        vec totals[FEW];
        for (int token = 0; token < tokens; token++) totals[token] = v_zero();
        for (int64_t column = 0; column < w->in_features; column += SPAN) {
            const float *x = p->x + column / in_lane(dtype);
            const int odd = halves && offset % 2;
            struct span span;
            load_span(w->dtype == INT4 && !halves, w, row, column, SPAN, offset, &span);
            if (halves && alike && single) offset += add_span(dtype, 1, 1, 1, tokens, &span, 0, x, stride, totals);
            else if (halves && alike) offset += add_span(dtype, 1, 1, 0, tokens, &span, 0, x, stride, totals);
            else if (halves && single) offset += add_span(dtype, 0, 1, 1, tokens, &span, odd, x, stride, totals);
            else if (halves) offset += add_span(dtype, 0, 1, 0, tokens, &span, odd, x, stride, totals);
            else if (alike) offset += add_span(dtype, 1, 0, 0, tokens, &span, 0, x, stride, totals);
            else if (single) offset += add_span(dtype, 0, 0, 1, tokens, &span, 0, x, stride, totals);
            else offset += add_span(dtype, 0, 0, 0, tokens, &span, 0, x, stride, totals);
        }
        check_end(p, row, offset);
        for (int token = 0; token < tokens; token++) finish(dtype, p, row, token, v_sum(totals[token]) * unit);
    }
}

/* As `expand_row`: the weights as floats. */
static int64_t expand_integers(const struct weight *w, int64_t row, int64_t column, int64_t most, int64_t offset,
                               float *out) {
    struct span span;
    load_span(w->dtype == INT4, w, row, column, most, offset, &span);
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
