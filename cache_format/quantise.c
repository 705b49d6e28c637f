/* Values to the numbers that are stored, bit for bit those of int8.py and bf16.py, and what the statistics ask of
 * each vector; a row at a time, while it lies in the first-level cache. */
#define _GNU_SOURCE /* for RTLD_DEFAULT */
#include "kernels.h"

#include "openmp.h"
#include "quantise_bf16.h"
#include "quantise_int8.h"

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

enum { SHARE = 64 }; /* rows that a thread takes at a time */

struct shared {
    const struct rows *all;
    Py_ssize_t (*quantise)(const struct rows *, float);
    float factor;
    int block;
    Py_ssize_t next, fault; /* changed by all threads */
};

static void take_shares(void *of)
{
    struct shared *shared = of;
    const struct rows *all = shared->all;
    Py_ssize_t at;
    while ((at = __atomic_fetch_add(&shared->next, SHARE, __ATOMIC_RELAXED)) < all->number) {
        struct rows some = rows_from(all, at, SHARE, shared->block);
        Py_ssize_t fault = shared->quantise(&some, shared->factor);
        if (fault >= 0)
            __atomic_store_n(&shared->fault, at + fault, __ATOMIC_RELAXED);
    }
}

/* A row that cannot be stored, or -1. */
static Py_ssize_t quantise_all(const struct rows *all, int block, float factor, int threads)
{
    struct shared shared = {all, NULL, factor, block, 0, -1};
    if (all->noise)
        shared.quantise = block == NARROW_BLOCK ? measure_narrow : measure_wide;
    else
        shared.quantise = block == NARROW_BLOCK ? quantise_narrow : quantise_wide;
    if (threads <= 1 || all->number <= SHARE)
        return shared.quantise(all, factor);
    work_together(take_shares, &shared, (unsigned)threads);
    return shared.fault;
}

static PyObject *quantise(PyObject *module, PyObject *arguments)
{
    enum { X, CODES, SCALE, NOISE, SQUARE, PEAK, CHOSEN, ALL };
    Py_buffer at[ALL] = {{0}};
    Py_ssize_t width, rows, fault = -1;
    float factor;
    int threads;
    PyObject *answer = NULL;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*nfiw*w*|w*w*w*y*", &at[X], &width, &factor, &threads, &at[CODES],
                          &at[SCALE], &at[NOISE], &at[SQUARE], &at[PEAK], &at[CHOSEN]))
        return NULL;
    int measured = at[PEAK].obj != NULL;
    rows = width > 0 ? at[CODES].len / width : 0;
    int block = width > 0 ? block_of(&at[SCALE], rows, width) : 0;
    if (!block || !has_rows(&at[X], &at[CHOSEN], rows, width) || !holds(&at[CODES], rows, width, 1)
        || (at[NOISE].obj && !measured)
        || (measured && !(holds(&at[NOISE], rows, 1, sizeof(float)) && holds(&at[PEAK], rows, 1, sizeof(float))
                          && holds(&at[SQUARE], rows, 1, sizeof(double))))) {
        PyErr_SetString(PyExc_ValueError, DO_NOT_FIT);
    } else {
        struct rows all = {at[X].buf,     at[CHOSEN].obj ? at[CHOSEN].buf : NULL, rows, width, at[CODES].buf,
                           at[SCALE].buf, at[NOISE].buf, at[SQUARE].buf, at[PEAK].buf};
        Py_BEGIN_ALLOW_THREADS;
        fault = quantise_all(&all, block, factor, threads);
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
