/* What cpu_codes.py calls: products of codes, top-k and standard values, in float32.
 *
 * Every sum has one order, whichever thread forms it: of a token's channels that of its codes, of a latent's that of its
 * tokens, of a code's that of the channels. Products may be fused with additions, so that last bits depend on the
 * processor, and on nothing else.
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE /* RTLD_DEFAULT */
#include <Python.h>

#include "codes_products.h"
#include "codes_screen.h"
#include "codes_values.h"

/* The calls from Python. All arrays are contiguous, int32 or float32 unless said otherwise. */

enum { MOST_BUFFERS = 8 };

struct buffers {
    Py_buffer all[MOST_BUFFERS];
};

static PyObject *finish(struct buffers *buffers, const char *fault)
{
    for (int nth = 0; nth < MOST_BUFFERS; nth++)
        PyBuffer_Release(&buffers->all[nth]);
    if (fault) {
        PyErr_SetString(fault == MEMORY ? PyExc_MemoryError : PyExc_ValueError, fault);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *finish_together(struct buffers *buffers, void *all, Py_ssize_t threads)
{
    struct work *work = all;
    Py_BEGIN_ALLOW_THREADS;
    together(all, threads > 1 ? (size_t)threads : 1);
    Py_END_ALLOW_THREADS;
    return finish(buffers, work->fault);
}

static size_t count(const Py_buffer *buffer) { return (size_t)buffer->len / 4; }
static size_t parts_of(size_t n, size_t most) { return (n + most - 1) / most; }

/* Whether starts are those of n codes, and columns below `below`: then nothing is read or written outside. */
static int are_starts(const Py_buffer *starts, size_t n)
{
    const int32_t *start = starts->buf;
    size_t rows = count(starts);
    if (!rows || start[0] != 0 || (size_t)start[rows - 1] != n)
        return 0;
    for (size_t row = 1; row < rows; row++)
        if (start[row] < start[row - 1])
            return 0;
    return 1;
}

WIDEST static int are_below(const Py_buffer *columns, size_t below)
{
    const int32_t *column = columns->buf;
    size_t n = count(columns);
    int32_t largest = -1, smallest = 0;
    for (size_t i = 0; i < n; i++) {
        largest = column[i] > largest ? column[i] : largest;
        smallest = column[i] < smallest ? column[i] : smallest;
    }
    return smallest >= 0 && (largest < 0 || (size_t)largest < below);
}

static PyObject *decode(PyObject *module, PyObject *arguments)
{
    struct buffers b = {0};
    Py_buffer *starts = b.all, *columns = b.all + 1, *values = b.all + 2, *weight = b.all + 3, *out = b.all + 4;
    Py_ssize_t width, threads;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "nny*y*y*y*w*", &width, &threads, starts, columns, values, weight, out))
        return NULL;
    size_t rows = count(starts) - 1, latents = width > 0 ? count(weight) / (size_t)width : 0;
    if (width <= 0 || !are_starts(starts, count(columns)) || count(values) != count(columns)
        || count(out) != rows * (size_t)width || count(weight) != latents * (size_t)width)
        return finish(&b, SIZES);
    struct decoding all = {{decode_tiles, parts_of((size_t)width, TILE), 0, NULL},
                           {starts->buf, columns->buf, values->buf, rows},
                           weight->buf,
                           out->buf,
                           latents,
                           (size_t)width};
    return finish_together(&b, &all, threads);
}

static PyObject *tiled(PyObject *module, PyObject *arguments)
{
    struct buffers b = {0};
    Py_buffer *rows = b.all, *tiles = b.all + 1;
    Py_ssize_t width, threads;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "nny*w*", &width, &threads, rows, tiles))
        return NULL;
    size_t n_rows = width > 0 ? count(rows) / (size_t)width : 0, n_tiles = parts_of((size_t)width, TILE);
    if (width <= 0 || count(rows) != n_rows * (size_t)width || count(tiles) != n_rows * n_tiles * TILE)
        return finish(&b, SIZES);
    struct tiling all = {{cut_tiles, n_tiles, 0, NULL}, rows->buf, tiles->buf, n_rows, (size_t)width};
    return finish_together(&b, &all, threads);
}

static PyObject *gradients(PyObject *module, PyObject *arguments)
{
    struct buffers b = {0};
    Py_buffer *starts = b.all, *tokens = b.all + 1, *order = b.all + 2, *values = b.all + 3, *tiles = b.all + 4;
    Py_buffer *weight_grad = b.all + 5, *weight = b.all + 6, *code_grad = b.all + 7;
    Py_ssize_t width, threads;
    int add;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "npny*y*y*y*y*w*|y*w*", &width, &add, &threads, starts, tokens, order, values,
                          tiles, weight_grad, weight, code_grad))
        return NULL;
    size_t n = count(values), latents = count(starts) - 1, n_tiles = parts_of((size_t)width, TILE);
    size_t rows = width > 0 ? count(tiles) / (n_tiles * TILE) : 0;
    if (width <= 0 || !are_starts(starts, n) || count(tokens) != n || !are_below(tokens, rows) || count(order) != n
        || !are_below(order, n) || count(tiles) != rows * n_tiles * TILE
        || (count(weight_grad) && count(weight_grad) != latents * (size_t)width) || (!count(weight_grad) && add)
        || (weight->obj && (count(weight) != latents * (size_t)width || count(code_grad) != n)))
        return finish(&b, SIZES);
    struct differentiating all = {{differentiate, threads > 1 ? (size_t)threads : 1, 0, NULL},
                                  {starts->buf, tokens->buf, values->buf, latents},
                                  order->buf,
                                  tiles->buf,
                                  weight->buf,
                                  count(weight_grad) ? weight_grad->buf : NULL,
                                  code_grad->buf,
                                  rows,
                                  (size_t)width,
                                  add};
    return finish_together(&b, &all, threads);
}

/* Codes by latent, in a sort by counting: in one thread, it reads little. */
static PyObject *transpose(PyObject *module, PyObject *arguments)
{
    struct buffers b = {0};
    Py_buffer *starts = b.all, *columns = b.all + 1, *by_latent = b.all + 2, *tokens = b.all + 3, *order = b.all + 4;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*y*w*w*w*", starts, columns, by_latent, tokens, order))
        return NULL;
    size_t n = count(columns), latents = count(by_latent) - 1;
    if (!count(by_latent) || count(tokens) != n || count(order) != n || !are_starts(starts, n)
        || !are_below(columns, latents))
        return finish(&b, SIZES);
    const int32_t *start = starts->buf, *column = columns->buf;
    int32_t *token = tokens->buf, *place = order->buf, *next = calloc(latents + 1, sizeof *next);
    if (!next)
        return finish(&b, MEMORY);
    for (size_t i = 0; i < n; i++)
        next[column[i] + 1]++;
    for (size_t latent = 0; latent < latents; latent++)
        next[latent + 1] += next[latent];
    memcpy(by_latent->buf, next, (latents + 1) * sizeof *next);
    for (size_t row = 0; row + 1 < count(starts); row++)
        for (int32_t i = start[row]; i < start[row + 1]; i++) {
            int32_t to = next[column[i]]++;
            token[to] = (int32_t)row;
            place[to] = i;
        }
    free(next);
    return finish(&b, NULL);
}

static PyObject *top_k(PyObject *module, PyObject *arguments)
{
    struct buffers b = {0};
    Py_buffer *x = b.all, *columns = b.all + 1, *values = b.all + 2, *starts = b.all + 3, *latents = b.all + 4;
    Py_ssize_t width, k, threads;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "nnny*w*w*|y*y*", &width, &k, &threads, x, columns, values, starts, latents))
        return NULL;
    size_t rows = starts->obj ? count(starts) - 1 : width > 0 ? count(x) / (size_t)width : 0;
    if (k <= 0 || k > width || count(columns) != rows * (size_t)k || count(values) != count(columns)
        || (starts->obj ? count(latents) != count(x) || !are_starts(starts, count(x)) : count(x) != rows * (size_t)width))
        return finish(&b, SIZES);
    struct choosing all = {{choose, parts_of(rows, MANY), 0, NULL}, x->buf, starts->buf, latents->buf, columns->buf,
                           values->buf, rows, (size_t)width, (size_t)k};
    return finish_together(&b, &all, threads);
}

static PyObject *rounded_rows(PyObject *module, PyObject *arguments)
{
    struct buffers b = {0};
    Py_buffer *rows = b.all, *halves = b.all + 1, *norms = b.all + 2; /* halves: two bytes each */
    Py_ssize_t width, threads;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "nny*w*w*", &width, &threads, rows, halves, norms))
        return NULL;
    size_t n_rows = width > 0 ? count(rows) / (size_t)width : 0;
    if (width <= 0 || count(rows) != n_rows * (size_t)width || (size_t)halves->len != 2 * count(rows)
        || count(norms) != 2 * n_rows)
        return finish(&b, SIZES);
    struct rounding all = {{round_all, parts_of(n_rows, MANY), 0, NULL}, rows->buf, halves->buf, norms->buf, n_rows,
                           (size_t)width};
    return finish_together(&b, &all, threads);
}

static PyObject *screen(PyObject *module, PyObject *arguments)
{
    struct buffers b = {0};
    Py_buffer *products = b.all, *bias = b.all + 1, *row_norms = b.all + 2, *weight_norms = b.all + 3;
    Py_buffer *columns = b.all + 4, *counts = b.all + 5; /* products: two bytes each */
    Py_ssize_t k, threads;
    float of_sums;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "nfny*y*y*y*w*w*", &k, &of_sums, &threads, products, bias, row_norms,
                          weight_norms, columns, counts))
        return NULL;
    size_t rows = count(counts), width = count(bias), most = rows ? count(columns) / rows : 0;
    if (k <= 0 || (size_t)k > width || (size_t)products->len != 2 * rows * width || count(row_norms) != 2 * rows
        || count(weight_norms) != 2 * width || count(columns) != rows * most)
        return finish(&b, SIZES);
    struct screening all = {{screen_all, parts_of(rows, MANY), 0, NULL},
                            products->buf,
                            bias->buf,
                            row_norms->buf,
                            weight_norms->buf,
                            columns->buf,
                            counts->buf,
                            rows,
                            width,
                            (size_t)k,
                            most,
                            of_sums};
    return finish_together(&b, &all, threads);
}

/* Whether the processor multiplies bfloat16 numbers, twice as many at a time as float32 ones. */
static PyObject *has_bfloat16(PyObject *module, PyObject *arguments)
{
    (void)module;
    (void)arguments;
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
    return PyBool_FromLong(__builtin_cpu_supports("avx512bf16"));
#else
    return PyBool_FromLong(0);
#endif
}

static PyObject *standardise(PyObject *module, PyObject *arguments)
{
    struct buffers b = {0};
    Py_buffer *codes = b.all, *steps = b.all + 1, *mean = b.all + 2, *out = b.all + 3; /* codes: int8 */
    Py_ssize_t block, threads;
    float scale;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "fnny*y*y*w*", &scale, &block, &threads, codes, steps, mean, out))
        return NULL;
    size_t width = count(mean), rows = width ? count(out) / width : 0;
    if (block <= 0 || (size_t)codes->len != rows * width || count(out) != rows * width
        || count(steps) != rows * parts_of(width, (size_t)block))
        return finish(&b, SIZES);
    struct standardising all = {{standardise_all, parts_of(rows, VALUES_AT_ONCE), 0, NULL}, codes->buf, steps->buf,
                                mean->buf, out->buf, scale, rows, width, (size_t)block};
    return finish_together(&b, &all, threads);
}

static PyMethodDef methods[] = {
    {"decode", decode, METH_VARARGS, NULL},       {"tiled", tiled, METH_VARARGS, NULL},
    {"gradients", gradients, METH_VARARGS, NULL}, {"transpose", transpose, METH_VARARGS, NULL},
    {"top_k", top_k, METH_VARARGS, NULL},
    {"rounded_rows", rounded_rows, METH_VARARGS, NULL}, {"screen", screen, METH_VARARGS, NULL},
    {"has_bfloat16", has_bfloat16, METH_NOARGS, NULL},         {"standardise", standardise, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_codes", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__codes(void)
{
    return PyModuleDef_Init(&definition);
}
