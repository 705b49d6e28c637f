/* The codec's int8 codes, bit for bit those of int8.py, a row at a time while it lies in the first-level cache.
 *
 * Nothing here may depend on the processor: sums run in an order that is written down, products are not fused
 * with additions (the build says -ffp-contract=off), and vectors come from plain loops that the compiler widens.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Where the loader can choose, each of these functions is compiled three times and the widest is taken. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

enum { BLOCK = 64, SUMMED_AT_ONCE = 128, SUMS = 8 };

static const float LARGEST_STEP = 65504.0f;
static const float TO_INTEGER = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, ties to even */

INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Sum of |x| as numpy adds up to SUMMED_AT_ONCE numbers: in eight running sums. */
WIDEST static float sum_few(const float *x, size_t n)
{
    float sum[SUMS] = {0}, total;
    size_t at = 0;
    for (; at + SUMS <= n; at += SUMS)
        for (int nth = 0; nth < SUMS; nth++)
            sum[nth] += fabsf(x[at + nth]);
    total = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    for (; at < n; at++)
        total += fabsf(x[at]);
    return total;
}

/* numpy halves what is longer. */
static float sum_sizes(const float *x, size_t n)
{
    size_t half = n / 2 - n / 2 % SUMS;
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

INLINE float half_to_float(uint16_t half)
{
    return half < 0x400 ? (float)half * 0x1p-24f : float_of(((uint32_t)half << 13) + (112u << 23));
}

/* What the statistics ask of a row; the sums are kept in eight parts, so that they add up as vectors. */
struct told {
    double noise[SUMS], square[SUMS];
    float peak;
};

/* One block of a row, BLOCK values; told: NULL where nobody asks. */
INLINE uint16_t quantise_block(const float *x, float wanted, int8_t *codes, struct told *told)
{
    uint32_t largest = 0; /* bits of non-negative floats are ordered as the floats are, NaN last */
    for (int i = 0; i < BLOCK; i++) {
        uint32_t size = bits_of(x[i]) & 0x7FFFFFFF;
        largest = size > largest ? size : largest;
    }
    float peak = float_of(largest), step = peak / 127.0f;
    uint16_t half = round_up_to_half(step < wanted ? wanted : step);
    float stored = half_to_float(half), inverse = half ? 1.0f / stored : 0.0f;
    for (int i = 0; i < BLOCK; i++)
        codes[i] = (int8_t)bits_of(x[i] * inverse + TO_INTEGER);
    if (!told)
        return half;
    float lost[BLOCK];
    int32_t square[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        float exact = x[i] * inverse, rounded = exact + TO_INTEGER - TO_INTEGER;
        lost[i] = (rounded - exact) * (rounded - exact);
        square[i] = codes[i] * codes[i];
    }
    for (int width = BLOCK / 2; width >= SUMS; width /= 2)
        for (int i = 0; i < width; i++) {
            lost[i] += lost[i + width];
            square[i] += square[i + width];
        }
    double area = (double)stored * stored;
    for (int i = 0; i < SUMS; i++) {
        told->noise[i] += area * lost[i];
        told->square[i] += area * square[i];
    }
    float most = (peak * inverse + TO_INTEGER - TO_INTEGER) * stored;
    told->peak = most > told->peak ? most : told->peak;
    return half;
}

/* Whether the row could be stored. */
INLINE int quantise_row(const float *x, size_t width, float factor, int8_t *codes, uint16_t *scale,
                        struct told *told)
{
    float wanted = sum_sizes(x, width) / (float)width * factor;
    uint16_t largest = 0;
    wanted = wanted < LARGEST_STEP ? wanted : LARGEST_STEP;
    for (size_t at = 0; at < width; at += BLOCK) {
        if (width - at >= BLOCK) {
            *scale = quantise_block(x + at, wanted, codes + at, told);
        } else { /* zeros behind a narrow last block change nothing */
            float padded[BLOCK] = {0};
            int8_t padded_codes[BLOCK];
            memcpy(padded, x + at, (width - at) * sizeof *x);
            *scale = quantise_block(padded, wanted, padded_codes, told);
            memcpy(codes + at, padded_codes, width - at);
        }
        largest = *scale > largest ? *scale : largest;
        scale++;
    }
    return largest < 0x7C00;
}

/* The first row that cannot be stored, or -1. */
WIDEST static Py_ssize_t quantise_rows(const float *x, size_t rows, size_t width, float factor, int8_t *codes,
                                       uint16_t *scale)
{
    for (size_t row = 0; row < rows; row++)
        if (!quantise_row(x + row * width, width, factor, codes + row * width,
                          scale + row * ((width + BLOCK - 1) / BLOCK), NULL))
            return (Py_ssize_t)row;
    return -1;
}

INLINE double total(const double *sum)
{
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

WIDEST static Py_ssize_t measure_rows(const float *x, size_t rows, size_t width, float factor, int8_t *codes,
                                      uint16_t *scale, float *noise, double *square, float *peak)
{
    for (size_t row = 0; row < rows; row++) {
        struct told told = {0};
        if (!quantise_row(x + row * width, width, factor, codes + row * width,
                          scale + row * ((width + BLOCK - 1) / BLOCK), &told))
            return (Py_ssize_t)row;
        noise[row] = (float)total(told.noise);
        square[row] = total(told.square);
        peak[row] = told.peak;
    }
    return -1;
}

static PyObject *quantise(PyObject *module, PyObject *arguments)
{
    Py_buffer x = {0}, codes = {0}, scale = {0}, noise = {0}, square = {0}, peak = {0};
    Py_ssize_t width, rows, fault = -1;
    float factor;
    PyObject *answer = NULL;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*nfw*w*|w*w*w*", &x, &width, &factor, &codes, &scale, &noise, &square,
                          &peak))
        return NULL;
    rows = width > 0 ? x.len / (width * (Py_ssize_t)sizeof(float)) : 0;
    if (width <= 0 || x.len != rows * width * (Py_ssize_t)sizeof(float) || codes.len != rows * width
        || scale.len != rows * ((width + BLOCK - 1) / BLOCK) * (Py_ssize_t)sizeof(uint16_t)
        || (noise.obj && (noise.len != rows * (Py_ssize_t)sizeof(float) || peak.len != noise.len
                          || square.len != rows * (Py_ssize_t)sizeof(double)))) {
        PyErr_SetString(PyExc_ValueError, "quantise: the buffers' sizes do not belong together");
    } else {
        Py_BEGIN_ALLOW_THREADS;
        if (noise.obj)
            fault = measure_rows(x.buf, rows, width, factor, codes.buf, scale.buf, noise.buf, square.buf, peak.buf);
        else
            fault = quantise_rows(x.buf, rows, width, factor, codes.buf, scale.buf);
        Py_END_ALLOW_THREADS;
        answer = PyLong_FromSsize_t(fault);
    }
    Py_buffer *all[] = {&x, &codes, &scale, &noise, &square, &peak};
    for (size_t nth = 0; nth < sizeof all / sizeof *all; nth++)
        PyBuffer_Release(all[nth]);
    return answer;
}

static PyMethodDef methods[] = {
    {"quantise", quantise, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_quantise", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__quantise(void)
{
    return PyModuleDef_Init(&definition);
}
