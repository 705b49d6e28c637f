/* float32 rows to bf16 bits, as bf16.py says. */

enum { SQUARED_AT_ONCE = 64 };

/* Nearest, ties to even; a NaN keeps its upper payload, or gets one. */
WIDEST static void round_values(const uint32_t *restrict x, Py_ssize_t n, uint16_t *restrict out)
{
    for (Py_ssize_t i = 0; i < n; i++) {
        uint32_t kept = x[i] >> 16, rounded = (x[i] + 0x7FFF + (kept & 1)) >> 16;
        uint32_t nan = kept & 0x7F ? kept : kept | 0x40;
        out[i] = (uint16_t)((x[i] & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded);
    }
}

INLINE void square_block(const uint16_t *restrict bits, struct sums *sum)
{
    for (int i = 0; i < SQUARED_AT_ONCE; i += WIDE) {
        halves narrow = *(const halves *)(bits + i);
        integers wide = __builtin_convertvector(narrow, integers) << 16;
        struct sums value = as_doubles((floats)wide), *to = &sum[i / WIDE % 2];
        to->low += value.low * value.low;
        to->high += value.high * value.high;
    }
}

/* Squared norm and largest size of a bf16 row, in numbers where no channel swallows the digits of the others. */
WIDEST static void measure_bits(const uint16_t *restrict bits, Py_ssize_t width, double *square, float *peak)
{
    struct sums sum[2] = {0};
    uint16_t padded[SQUARED_AT_ONCE] = {0}, largest = 0;
    Py_ssize_t whole = width - width % SQUARED_AT_ONCE;
    for (Py_ssize_t i = 0; i < width; i++) {
        uint16_t size = bits[i] & 0x7FFF;
        largest = size > largest ? size : largest;
    }
    for (Py_ssize_t at = 0; at < whole; at += SQUARED_AT_ONCE)
        square_block(bits + at, sum);
    memcpy(padded, bits + whole, (width - whole) * sizeof *bits);
    square_block(padded, sum);
    sum[0].low += sum[1].low;
    sum[0].high += sum[1].high;
    *square = total(sum[0]);
    *peak = float_of((uint32_t)largest << 16);
}
