/* A window's rows into chunks, in their stored order, and the sums of what they hold by group: one look at each
 * row, which lies far from the processor, and all the rest of the work on the chunk, which lies near. */
#include "kernels.h"

enum { CHUNK = 64, GROUPS = 8, TILE = 1024, AHEAD = 4 };

/* Whether every row that `order` asks for is there, and its group too. */
static int in_range(const Py_buffer *order, const Py_buffer *group)
{
    Py_ssize_t tokens = order->len / 8, rows = group->len / 8;
    for (Py_ssize_t token = 0; token < tokens; token++) {
        int64_t row = ((int64_t *)order->buf)[token];
        if (row < 0 || row >= rows || ((int64_t *)group->buf)[row] < 0 || ((int64_t *)group->buf)[row] >= GROUPS)
            return 0;
    }
    return 1;
}

/* Rows of `bytes` bytes; zeros behind the last. */
static void gather(const char *from, Py_ssize_t bytes, const int64_t *order, Py_ssize_t tokens, char *chunk)
{
    for (Py_ssize_t token = 0; token < tokens; token++) {
        if (token + AHEAD < tokens)
            fetch(from + order[token + AHEAD] * bytes, bytes);
        memcpy(chunk + token * bytes, from + order[token] * bytes, bytes);
    }
    memset(chunk + tokens * bytes, 0, (CHUNK - tokens) * bytes);
}

/* One block of a row; the product has 19 digits at most and is exact. */
INLINE void add_codes(const int8_t *restrict codes, float step, int n, double *restrict sums)
{
    for (int i = 0; i < n; i++)
        sums[i] += (double)((float)codes[i] * step);
}

INLINE void add_rows(const int8_t *codes, const uint16_t *scale, Py_ssize_t width, int block, const int64_t *order,
                     Py_ssize_t tokens, const int64_t *group, double *sums)
{
    for (Py_ssize_t start = 0; start < width; start += TILE)
        for (Py_ssize_t token = 0; token < tokens; token++) {
            double *sum = sums + group[order[token]] * width;
            const int8_t *row = codes + token * width;
            const uint16_t *steps = scale + token * n_blocks(width, block);
            Py_ssize_t at = start, end = start + TILE < width ? start + TILE : width;
            for (; at + block <= end; at += block)
                add_codes(row + at, half_to_float(steps[at / block]), block, sum + at);
            if (at < end)
                add_codes(row + at, half_to_float(steps[at / block]), (int)(end - at), sum + at);
        }
}

/* Each with a block that the compiler knows. */
WIDEST static void add_narrow(const int8_t *codes, const uint16_t *scale, Py_ssize_t width, const int64_t *order,
                              Py_ssize_t tokens, const int64_t *group, double *sums)
{
    add_rows(codes, scale, width, NARROW_BLOCK, order, tokens, group, sums);
}

WIDEST static void add_wide(const int8_t *codes, const uint16_t *scale, Py_ssize_t width, const int64_t *order,
                            Py_ssize_t tokens, const int64_t *group, double *sums)
{
    add_rows(codes, scale, width, WIDE_BLOCK, order, tokens, group, sums);
}

WIDEST static void split_row(const uint16_t *restrict bits, Py_ssize_t width, uint8_t *restrict low,
                             uint8_t *restrict high)
{
    for (Py_ssize_t i = 0; i < width; i++) {
        low[i] = (uint8_t)bits[i];
        high[i] = (uint8_t)(bits[i] >> 8);
    }
}

WIDEST static void add_row(const uint16_t *restrict bits, Py_ssize_t width, double *restrict sums)
{
    for (Py_ssize_t i = 0; i < width; i++)
        sums[i] += (double)float_of((uint32_t)bits[i] << 16);
}

/* Rows of all chunks that `order` fills, the last one perhaps in part. */
static Py_ssize_t rows_of(const Py_buffer *order)
{
    return (order->len / 8 + CHUNK - 1) / CHUNK * CHUNK;
}

static PyObject *finish(Py_buffer *buffers, int number, int fit)
{
    release(buffers, number);
    if (fit)
        return Py_NewRef(Py_None);
    PyErr_SetString(PyExc_ValueError, DO_NOT_FIT);
    return NULL;
}

static PyObject *gather_codes(PyObject *module, PyObject *arguments)
{
    enum { CODES, SCALE, ORDER, GROUP, CHUNK_CODES, CHUNK_SCALE, SUMS, ALL };
    Py_buffer at[ALL] = {{0}};
    Py_ssize_t width;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*y*ny*y*w*w*w*", &at[CODES], &at[SCALE], &width, &at[ORDER], &at[GROUP],
                          &at[CHUNK_CODES], &at[CHUNK_SCALE], &at[SUMS]))
        return NULL;
    Py_ssize_t rows = at[GROUP].len / 8, tokens = at[ORDER].len / 8;
    int block = width > 0 ? block_of(&at[SCALE], rows, width) : 0;
    Py_ssize_t scales = block ? 2 * n_blocks(width, block) : 0;
    int fit = block && holds(&at[CODES], rows, width, 1)
              && holds(&at[GROUP], rows, 1, 8) && holds(&at[ORDER], tokens, 1, 8)
              && holds(&at[CHUNK_CODES], rows_of(&at[ORDER]), width, 1)
              && holds(&at[CHUNK_SCALE], rows_of(&at[ORDER]), scales, 1)
              && holds(&at[SUMS], GROUPS, width, sizeof(double)) && in_range(&at[ORDER], &at[GROUP]);
    if (fit) {
        Py_BEGIN_ALLOW_THREADS;
        for (Py_ssize_t start = 0; start < tokens; start += CHUNK) {
            Py_ssize_t here = tokens - start < CHUNK ? tokens - start : CHUNK;
            const int64_t *order = (int64_t *)at[ORDER].buf + start;
            char *codes = (char *)at[CHUNK_CODES].buf + start * width;
            char *steps = (char *)at[CHUNK_SCALE].buf + start * scales;
            gather(at[CODES].buf, width, order, here, codes);
            gather(at[SCALE].buf, scales, order, here, steps);
            (block == NARROW_BLOCK ? add_narrow : add_wide)((int8_t *)codes, (uint16_t *)steps, width, order, here,
                                                            at[GROUP].buf, at[SUMS].buf);
        }
        Py_END_ALLOW_THREADS;
    }
    return finish(at, ALL, fit);
}

static PyObject *gather_planes(PyObject *module, PyObject *arguments)
{
    enum { BITS, ORDER, GROUP, LOW, HIGH, SUMS, ALL };
    Py_buffer at[ALL] = {{0}};
    Py_ssize_t width;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*ny*y*w*w*w*", &at[BITS], &width, &at[ORDER], &at[GROUP], &at[LOW],
                          &at[HIGH], &at[SUMS]))
        return NULL;
    Py_ssize_t rows = at[GROUP].len / 8, tokens = at[ORDER].len / 8;
    int fit = width > 0 && holds(&at[BITS], rows, width, 2) && holds(&at[GROUP], rows, 1, 8)
              && holds(&at[ORDER], tokens, 1, 8) && holds(&at[LOW], rows_of(&at[ORDER]), width, 1)
              && holds(&at[HIGH], rows_of(&at[ORDER]), width, 1)
              && holds(&at[SUMS], GROUPS, width, sizeof(double)) && in_range(&at[ORDER], &at[GROUP]);
    if (fit) {
        uint8_t *low = at[LOW].buf, *high = at[HIGH].buf;
        Py_BEGIN_ALLOW_THREADS;
        for (Py_ssize_t token = 0; token < tokens; token++) {
            int64_t row = ((int64_t *)at[ORDER].buf)[token], group = ((int64_t *)at[GROUP].buf)[row];
            const uint16_t *bits = (uint16_t *)at[BITS].buf + row * width;
            split_row(bits, width, low + token * width, high + token * width);
            add_row(bits, width, (double *)at[SUMS].buf + group * width);
        }
        memset(low + tokens * width, 0, (rows_of(&at[ORDER]) - tokens) * width);
        memset(high + tokens * width, 0, (rows_of(&at[ORDER]) - tokens) * width);
        Py_END_ALLOW_THREADS;
    }
    return finish(at, ALL, fit);
}

static PyMethodDef methods[] = {
    {"gather_codes", gather_codes, METH_VARARGS, NULL},
    {"gather_planes", gather_planes, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "_gather", .m_methods = methods};

PyMODINIT_FUNC PyInit__gather(void)
{
    return PyModuleDef_Init(&definition);
}
