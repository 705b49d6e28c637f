/* float32 rows to int8 codes and float16 steps, as int8.py says. */

enum {
    SUMMED_AT_ONCE = 128,
    MEASURED_AT_ONCE = 64, /* blocks: sums of so many codes' squares are exact as floats */
};

static const float LARGEST_STEP = 65504.0f;
static const float TO_INTEGER = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, ties to even */

/* Sum of |x| as numpy adds up to SUMMED_AT_ONCE numbers: in eight running sums. */
WIDEST static float sum_few(const float *x, size_t n)
{
    floats sum = {0};
    size_t at = 0;
    for (; at + WIDE <= n; at += WIDE)
        sum += (floats)(*(const integers *)(x + at) & 0x7FFFFFFF);
    float all = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    for (; at < n; at++)
        all += fabsf(x[at]);
    return all;
}

/* numpy halves what is longer. */
static float sum_sizes(const float *x, size_t n)
{
    size_t half = n / 2 - n / 2 % WIDE;
    return n <= SUMMED_AT_ONCE ? sum_few(x, n) : sum_sizes(x, half) + sum_sizes(x + half, n - half);
}

/* The smallest float16 that is not below step >= 0; infinity where there is none, or for a NaN. */
INLINE uint16_t round_up_to_half(float step)
{
    if (!(step <= LARGEST_STEP))
        return 0x7C00;
    if (step < 0x1p-14f) /* float16 is a multiple of 2^-24 there */
        return (uint16_t)ceilf(step * 0x1p24f);
    return (uint16_t)((bits_of(step) - (112u << 23) + 0x1FFF) >> 13);
}

/* A block's step as it is stored, its value, and one over it. */
struct step {
    uint16_t half;
    float size, inverse;
};

INLINE struct step step_from(float least)
{
    struct step step = {round_up_to_half(least), 0, 0};
    step.size = half_to_float(step.half);
    step.inverse = step.size > 0 ? 1.0f / step.size : 0.0f;
    return step;
}

/* What the statistics ask of a row; or of some of its blocks, in units of their step. */
struct told {
    struct sums noise, square;
    float peak;
};
struct told_blocks {
    floats noise, square;
    integers peak; /* bits of floats that are not negative, which are ordered as the floats are, NaN last */
    int number;
};

/* In each lane the larger one. */
INLINE void keep_largest(integers *kept, integers others)
{
    int32_t *largest = (int32_t *)kept;
    for (int lane = 0; lane < WIDE; lane++)
        largest[lane] = others[lane] > largest[lane] ? others[lane] : largest[lane];
}

INLINE void find_sizes(const float *x, int block, integers *largest)
{
    for (int i = 0; i < block; i += WIDE)
        keep_largest(largest, *(const integers *)(x + i) & 0x7FFFFFFF);
}

INLINE int all_below(integers sizes, float limit)
{
    longs large = (longs)(sizes >= (int32_t)bits_of(limit));
    return !(large[0] | large[1] | large[2] | large[3]);
}

INLINE float largest_of(integers sizes)
{
    int32_t largest = 0;
    for (int lane = 0; lane < WIDE; lane++)
        largest = sizes[lane] > largest ? sizes[lane] : largest;
    return float_of((uint32_t)largest);
}

/* Values in units of `step`. */
INLINE void encode_block(const float *restrict x, int block, struct step step, int8_t *restrict codes)
{
    for (int i = 0; i < block; i++)
        codes[i] = (int8_t)bits_of(x[i] * step.inverse + TO_INTEGER);
}

/* And what is told of them. */
INLINE void measure_block(const float *restrict x, int block, struct step step, integers sizes,
                          struct told_blocks *told)
{
    for (int i = 0; i < block; i += WIDE) {
        floats exact = *(const floats *)(x + i) * step.inverse;
        floats rounded = exact + TO_INTEGER - TO_INTEGER, off = rounded - exact;
        told->noise += off * off;
        told->square += rounded * rounded;
    }
    keep_largest(&told->peak, sizes);
    told->number++;
}

/* Blocks of one step to their row's, and from the beginning. */
INLINE void tell(struct told_blocks *blocks, struct step step, struct told *told)
{
    double area = (double)step.size * step.size;
    struct sums noise = as_doubles(blocks->noise), square = as_doubles(blocks->square);
    told->noise.low += noise.low * area;
    told->noise.high += noise.high * area;
    told->square.low += square.low * area;
    told->square.high += square.high * area;
    float most = (largest_of(blocks->peak) * step.inverse + TO_INTEGER - TO_INTEGER) * step.size;
    told->peak = most > told->peak ? most : told->peak;
    *blocks = (struct told_blocks){0};
}

/* A step of its own, where the row's is too small. */
INLINE struct step step_of_block(integers sizes, float wanted)
{
    float least = largest_of(sizes) / 127.0f;
    return step_from(least < wanted ? wanted : least);
}

/* `common`: the row's step, made from `wanted`. Most blocks have it, and are told of together: they add to `blocks`,
 * which the row tells of at its end. Answers with the block's step. */
INLINE uint16_t quantise_block(const float *restrict x, int block, float wanted, struct step common,
                               int8_t *restrict codes, struct told_blocks *blocks, struct told *told)
{
    integers sizes = {0}; /* in each lane the largest */
    find_sizes(x, block, &sizes);
    if (all_below(sizes, 126.0f * wanted)) {
        encode_block(x, block, common, codes);
        if (told)
            measure_block(x, block, common, sizes, blocks);
        if (told && blocks->number == MEASURED_AT_ONCE)
            tell(blocks, common, told);
        return common.half;
    }
    struct step step = step_of_block(sizes, wanted);
    encode_block(x, block, step, codes);
    if (told) {
        struct told_blocks own = {0};
        measure_block(x, block, step, sizes, &own);
        tell(&own, step, told);
    }
    return step.half;
}

/* next: the row that comes after, on its way while this one is done. told: NULL where nobody asks. Whether the row
 * could be stored. */
INLINE int quantise_row(const float *restrict x, const float *next, size_t width, int block, float factor,
                        int8_t *restrict codes, uint16_t *restrict scale, struct told *told)
{
    float wanted = sum_sizes(x, width) / (float)width * factor;
    wanted = wanted < LARGEST_STEP ? wanted : LARGEST_STEP;
    struct step common = step_from(wanted);
    struct told_blocks blocks = {0};
    size_t whole = width / block, rest = width % block;
    uint16_t largest = 0;
    for (size_t nth = 0; nth < whole; nth++) {
        const float *from = x + nth * block;
        fetch(next + nth * block, block * (Py_ssize_t)sizeof *x);
        scale[nth] = quantise_block(from, block, wanted, common, codes + nth * block, &blocks, told);
        largest = scale[nth] > largest ? scale[nth] : largest;
    }
    if (rest) {
        float padded[WIDE_BLOCK] = {0}; /* zeros behind a narrow last block change nothing */
        int8_t padded_codes[WIDE_BLOCK];
        memcpy(padded, x + whole * block, rest * sizeof *x);
        scale[whole] = quantise_block(padded, block, wanted, common, padded_codes, &blocks, told);
        memcpy(codes + whole * block, padded_codes, rest);
        largest = scale[whole] > largest ? scale[whole] : largest;
    }
    if (told)
        tell(&blocks, common, told);
    return largest < 0x7C00;
}

struct rows {
    const float *x;
    const int64_t *chosen; /* which rows of x; NULL: all in turn */
    Py_ssize_t number, width;
    int8_t *codes;
    uint16_t *scale;
    float *noise; /* NULL where nobody asks */
    double *square;
    float *peak;
};

INLINE const float *row_of(const struct rows *all, Py_ssize_t row)
{
    return all->x + (all->chosen ? all->chosen[row] : row) * all->width;
}

/* At most so many of them, from one on; block: as many channels as one step is for. */
INLINE struct rows rows_from(const struct rows *all, Py_ssize_t at, Py_ssize_t number, int block)
{
    Py_ssize_t left = all->number - at;
    struct rows some = *all;
    some.number = number < left ? number : left;
    some.x += all->chosen ? 0 : at * all->width;
    some.chosen += all->chosen ? at : 0;
    some.codes += at * all->width;
    some.scale += at * n_blocks(all->width, block);
    if (all->noise) {
        some.noise += at;
        some.square += at;
        some.peak += at;
    }
    return some;
}

/* The first row that cannot be stored, or -1. */
INLINE Py_ssize_t quantise_rows(const struct rows *all, int block, float factor, int measured)
{
    for (Py_ssize_t row = 0; row < all->number; row++) {
        const float *x = row_of(all, row);
        const float *next = row_of(all, row + 1 < all->number ? row + 1 : row);
        uint16_t *scale = all->scale + row * n_blocks(all->width, block);
        struct told told = {0};
        if (!quantise_row(x, next, all->width, block, factor, all->codes + row * all->width, scale,
                          measured ? &told : NULL))
            return row;
        if (measured) {
            all->noise[row] = (float)total(told.noise);
            all->square[row] = total(told.square);
            all->peak[row] = told.peak;
        }
    }
    return -1;
}

/* Each with a block that the compiler knows. */
WIDEST static Py_ssize_t quantise_narrow(const struct rows *all, float factor)
{
    return quantise_rows(all, NARROW_BLOCK, factor, 0);
}

WIDEST static Py_ssize_t quantise_wide(const struct rows *all, float factor)
{
    return quantise_rows(all, WIDE_BLOCK, factor, 0);
}

WIDEST static Py_ssize_t measure_narrow(const struct rows *all, float factor)
{
    return quantise_rows(all, NARROW_BLOCK, factor, 1);
}

WIDEST static Py_ssize_t measure_wide(const struct rows *all, float factor)
{
    return quantise_rows(all, WIDE_BLOCK, factor, 1);
}
