/* Values to the numbers that are stored, bit for bit those of int8.py and bf16.py, and what the statistics ask of
 * each vector; a row at a time, while it lies in the first-level cache. */
#include "kernels.h"

enum { SUMMED_AT_ONCE = 128 };

static const float LARGEST_STEP = 65504.0f;
static const float TO_INTEGER = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, ties to even */
static const int32_t INTEGER_ZERO = 0x4B400000; /* its bits */

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

INLINE float inverse_of(float step)
{
    return step > 0 ? 1.0f / step : 0.0f;
}

/* What the statistics ask of a row; a sum is kept in eight parts. */
struct told {
    doubles noise, square;
    float peak;
};

INLINE float largest_of(const float *x)
{
    uint32_t largest = 0; /* bits of non-negative floats are ordered as the floats are, NaN last */
    for (int i = 0; i < BLOCK; i++) {
        uint32_t size = bits_of(x[i]) & 0x7FFFFFFF;
        largest = size > largest ? size : largest;
    }
    return float_of(largest);
}

/* BLOCK values in units of `step`; told: NULL where nobody asks. */
INLINE void encode_block(const float *restrict x, float step, int8_t *restrict codes, struct told *told)
{
    float inverse = inverse_of(step);
    floats lost = {0};
    integers square = {0};
    for (int i = 0; i < BLOCK; i++)
        codes[i] = (int8_t)bits_of(x[i] * inverse + TO_INTEGER);
    if (!told)
        return;
    for (int i = 0; i < BLOCK; i += WIDE) {
        floats exact = *(const floats *)(x + i) * inverse, shifted = exact + TO_INTEGER;
        floats off = shifted - TO_INTEGER - exact;
        integers code = (integers)shifted - INTEGER_ZERO;
        lost += off * off;
        square += code * code;
    }
    double area = (double)step * step;
    told->noise += __builtin_convertvector(lost, doubles) * area;
    told->square += __builtin_convertvector(square, doubles) * area;
}

/* Steps first, then codes: one block's divisions do not wait for the other's. Whether the row could be stored. */
INLINE int quantise_row(const float *restrict x, size_t width, float factor, int8_t *restrict codes,
                        uint16_t *restrict scale, struct told *told)
{
    float wanted = sum_sizes(x, width) / (float)width * factor;
    float padded[BLOCK] = {0}; /* zeros behind a narrow last block change nothing */
    int8_t padded_codes[BLOCK];
    size_t whole = width / BLOCK, rest = width % BLOCK;
    uint16_t largest = 0;
    wanted = wanted < LARGEST_STEP ? wanted : LARGEST_STEP;
    memcpy(padded, x + whole * BLOCK, rest * sizeof *x);
    for (size_t block = 0; block < whole + (rest > 0); block++) {
        float peak = largest_of(block < whole ? x + block * BLOCK : padded), step = peak / 127.0f;
        scale[block] = round_up_to_half(step < wanted ? wanted : step);
        largest = scale[block] > largest ? scale[block] : largest;
        if (told) {
            float stored = half_to_float(scale[block]);
            float most = (peak * inverse_of(stored) + TO_INTEGER - TO_INTEGER) * stored;
            told->peak = most > told->peak ? most : told->peak;
        }
    }
    if (largest >= 0x7C00)
        return 0;
    for (size_t block = 0; block < whole; block++)
        encode_block(x + block * BLOCK, half_to_float(scale[block]), codes + block * BLOCK, told);
    if (rest) {
        encode_block(padded, half_to_float(scale[whole]), padded_codes, told);
        memcpy(codes + whole * BLOCK, padded_codes, rest);
    }
    return 1;
}

/* The first row that cannot be stored, or -1; chosen: which rows of x, NULL for all in turn. */
WIDEST static Py_ssize_t quantise_rows(const float *x, const int64_t *chosen, Py_ssize_t rows, Py_ssize_t width,
                                       float factor, int8_t *codes, uint16_t *scale)
{
    for (Py_ssize_t row = 0; row < rows; row++)
        if (!quantise_row(x + (chosen ? chosen[row] : row) * width, width, factor, codes + row * width,
                          scale + row * n_blocks(width), NULL))
            return row;
    return -1;
}

WIDEST static Py_ssize_t measure_rows(const float *x, const int64_t *chosen, Py_ssize_t rows, Py_ssize_t width,
                                      float factor, int8_t *codes, uint16_t *scale, float *noise, double *square,
                                      float *peak)
{
    for (Py_ssize_t row = 0; row < rows; row++) {
        struct told told = {{0}, {0}, 0};
        if (!quantise_row(x + (chosen ? chosen[row] : row) * width, width, factor, codes + row * width,
                          scale + row * n_blocks(width), &told))
            return row;
        noise[row] = (float)total(&told.noise);
        square[row] = total(&told.square);
        peak[row] = told.peak;
    }
    return -1;
}

/* Nearest, ties to even; a NaN keeps its upper payload, or gets one. */
WIDEST static void round_values(const uint32_t *restrict x, Py_ssize_t n, uint16_t *restrict out)
{
    for (Py_ssize_t i = 0; i < n; i++) {
        uint32_t kept = x[i] >> 16, rounded = (x[i] + 0x7FFF + (kept & 1)) >> 16;
        uint32_t nan = kept & 0x7F ? kept : kept | 0x40;
        out[i] = (uint16_t)((x[i] & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded);
    }
}

INLINE void square_block(const uint16_t *restrict bits, doubles *sum)
{
    for (int i = 0; i < BLOCK; i += WIDE) {
        halves narrow = *(const halves *)(bits + i);
        integers wide = __builtin_convertvector(narrow, integers) << 16;
        doubles value = __builtin_convertvector((floats)wide, doubles);
        sum[i / WIDE % 2] += value * value;
    }
}

/* Squared norm and largest size of a bf16 row, in numbers where no channel swallows the digits of the others. */
WIDEST static void measure_bits(const uint16_t *restrict bits, Py_ssize_t width, double *square, float *peak)
{
    doubles sum[2] = {{0}, {0}};
    uint16_t padded[BLOCK] = {0}, largest = 0;
    Py_ssize_t whole = width - width % BLOCK;
    for (Py_ssize_t i = 0; i < width; i++) {
        uint16_t size = bits[i] & 0x7FFF;
        largest = size > largest ? size : largest;
    }
    for (Py_ssize_t at = 0; at < whole; at += BLOCK)
        square_block(bits + at, sum);
    memcpy(padded, bits + whole, (width - whole) * sizeof *bits);
    square_block(padded, sum);
    sum[0] += sum[1];
    *square = total(sum);
    *peak = float_of((uint32_t)largest << 16);
}

/* Whether x holds every chosen row of so many; all of them where none is chosen. */
static int has_rows(const Py_buffer *x, const Py_buffer *chosen, Py_ssize_t rows, Py_ssize_t width)
{
    Py_ssize_t given = chosen->obj ? x->len / (Py_ssize_t)sizeof(float) / width : rows;
    if (!holds(x, given, width, sizeof(float)) || (chosen->obj && !holds(chosen, rows, 1, sizeof(int64_t))))
        return 0;
    for (Py_ssize_t row = 0; chosen->obj && row < rows; row++)
        if (((int64_t *)chosen->buf)[row] < 0 || ((int64_t *)chosen->buf)[row] >= given)
            return 0;
    return 1;
}

static PyObject *quantise(PyObject *module, PyObject *arguments)
{
    enum { X, CODES, SCALE, NOISE, SQUARE, PEAK, CHOSEN, ALL };
    Py_buffer at[ALL] = {{0}};
    Py_ssize_t width, rows, fault = -1;
    float factor;
    PyObject *answer = NULL;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*nfw*w*|w*w*w*y*", &at[X], &width, &factor, &at[CODES], &at[SCALE],
                          &at[NOISE], &at[SQUARE], &at[PEAK], &at[CHOSEN]))
        return NULL;
    int measured = at[PEAK].obj != NULL;
    rows = width > 0 ? at[CODES].len / width : 0;
    if (width <= 0 || !has_rows(&at[X], &at[CHOSEN], rows, width) || !holds(&at[CODES], rows, width, 1)
        || !holds(&at[SCALE], rows, n_blocks(width), sizeof(uint16_t)) || (at[NOISE].obj && !measured)
        || (measured && !(holds(&at[NOISE], rows, 1, sizeof(float)) && holds(&at[PEAK], rows, 1, sizeof(float))
                          && holds(&at[SQUARE], rows, 1, sizeof(double))))) {
        PyErr_SetString(PyExc_ValueError, DO_NOT_FIT);
    } else {
        const int64_t *chosen = at[CHOSEN].obj ? at[CHOSEN].buf : NULL;
        Py_BEGIN_ALLOW_THREADS;
        if (measured)
            fault = measure_rows(at[X].buf, chosen, rows, width, factor, at[CODES].buf, at[SCALE].buf, at[NOISE].buf,
                                 at[SQUARE].buf, at[PEAK].buf);
        else
            fault = quantise_rows(at[X].buf, chosen, rows, width, factor, at[CODES].buf, at[SCALE].buf);
        Py_END_ALLOW_THREADS;
        answer = PyLong_FromSsize_t(fault);
    }
    release(at, ALL);
    return answer;
}

static PyObject *round_to_bf16(PyObject *module, PyObject *arguments)
{
    enum { X, BITS, SQUARE, PEAK, ALL };
    Py_buffer at[ALL] = {{0}};
    Py_ssize_t width;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*nw*|w*w*", &at[X], &width, &at[BITS], &at[SQUARE], &at[PEAK]))
        return NULL;
    int measured = at[PEAK].obj != NULL, bits = at[X].len == at[BITS].len;
    Py_ssize_t rows = width > 0 ? at[BITS].len / 2 / width : 0, item = bits ? sizeof(uint16_t) : sizeof(float);
    int fit = width > 0 && holds(&at[X], rows, width, item) && holds(&at[BITS], rows, width, sizeof(uint16_t))
              && (measured ? holds(&at[SQUARE], rows, 1, sizeof(double)) && holds(&at[PEAK], rows, 1, sizeof(float))
                           : !at[SQUARE].obj);
    if (fit) {
        Py_BEGIN_ALLOW_THREADS;
        for (Py_ssize_t row = 0; row < rows; row++) {
            uint16_t *out = (uint16_t *)at[BITS].buf + row * width;
            if (bits)
                memcpy(out, (char *)at[X].buf + row * width * item, width * item);
            else
                round_values((uint32_t *)at[X].buf + row * width, width, out);
            if (measured)
                measure_bits(out, width, (double *)at[SQUARE].buf + row, (float *)at[PEAK].buf + row);
        }
        Py_END_ALLOW_THREADS;
    }
    release(at, ALL);
    if (fit)
        return Py_NewRef(Py_None);
    PyErr_SetString(PyExc_ValueError, DO_NOT_FIT);
    return NULL;
}

static PyMethodDef methods[] = {
    {"quantise", quantise, METH_VARARGS, NULL},
    {"round_to_bf16", round_to_bf16, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "_quantise", .m_methods = methods};

PyMODINIT_FUNC PyInit__quantise(void)
{
    return PyModuleDef_Init(&definition);
}
