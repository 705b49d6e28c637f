/* What quantise.c, its headers and gather.c share. Sums run in an order that is written down, so that no bit depends
 * on the processor; vectors are of 32 bytes: gcc keeps wider ones in memory where the processor has none. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Where the loader can choose, such a function is compiled three times and the widest is taken. */
#if !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__) && __GNUC__ >= 11
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif
#define INLINE static inline __attribute__((always_inline))

enum { NARROW_BLOCK = 32, WIDE_BLOCK = 64, WIDE = 8 };

typedef float floats __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef int32_t integers __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef int64_t longs __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * WIDE), aligned(2), may_alias));
typedef float few_floats __attribute__((vector_size(2 * WIDE), aligned(4), may_alias));
typedef double doubles __attribute__((vector_size(4 * WIDE), aligned(8), may_alias));

/* WIDE running sums. */
struct sums {
    doubles low, high;
};

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

/* A float16 that is finite and not negative. */
INLINE float half_to_float(uint16_t half)
{
    return half < 0x400 ? (float)half * 0x1p-24f : float_of(((uint32_t)half << 13) + (112u << 23));
}

INLINE struct sums as_doubles(floats values)
{
    float part[WIDE];
    *(floats *)part = values;
    return (struct sums){__builtin_convertvector(*(few_floats *)part, doubles),
                         __builtin_convertvector(*(few_floats *)(part + WIDE / 2), doubles)};
}

INLINE double total(struct sums sum)
{
    return ((sum.low[0] + sum.low[1]) + (sum.low[2] + sum.low[3]))
           + ((sum.high[0] + sum.high[1]) + (sum.high[2] + sum.high[3]));
}

/* Whether a buffer is what its name in the .pyi says: so many rows of so many numbers of so many bytes. */
INLINE int holds(const Py_buffer *buffer, Py_ssize_t rows, Py_ssize_t width, Py_ssize_t item)
{
    return rows <= 0 || width <= 0 ? buffer->len == 0
                                   : width <= PY_SSIZE_T_MAX / item / rows && buffer->len == rows * width * item;
}

INLINE Py_ssize_t n_blocks(Py_ssize_t width, Py_ssize_t block)
{
    return (width + block - 1) / block;
}

/* The block of rows (row, width) whose float16 scales are these; 0 where none fits. */
INLINE int block_of(const Py_buffer *scale, Py_ssize_t rows, Py_ssize_t width)
{
    if (holds(scale, rows, n_blocks(width, NARROW_BLOCK), 2))
        return NARROW_BLOCK;
    return holds(scale, rows, n_blocks(width, WIDE_BLOCK), 2) ? WIDE_BLOCK : 0;
}

/* Have memory on its way that is read soon; processors by themselves stop where a page ends. Not much of it, for it
 * has to stay in the first-level cache. */
INLINE void fetch(const void *from, Py_ssize_t bytes)
{
    for (Py_ssize_t at = 0; at < bytes && at < 4096; at += 64)
        __builtin_prefetch((const char *)from + at);
}

INLINE void release(Py_buffer *buffers, int number)
{
    for (int nth = 0; nth < number; nth++)
        PyBuffer_Release(&buffers[nth]);
}

static const char DO_NOT_FIT[] = "the buffers' sizes do not belong together";
