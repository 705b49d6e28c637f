/* A window's rows into chunks, in their stored order, and the sums of what they hold by group: one look at each
 * row, which lies far from the processor. A chunk's rows of one group are added up in float32, in their order, and
 * these sums to the window's in float64. */
#include "kernels.h"

enum { CHUNK = 64, GROUPS = 8, TILE = 4096, SOME = 128, TOGETHER = 2, BITS = 0 };

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

/* Places in a chunk sorted by group, those of a group in their order. */
struct sorted {
    int number[GROUPS], place[CHUNK + TOGETHER];
};

static struct sorted sort_by_group(const int64_t *order, int tokens, const int64_t *group)
{
    struct sorted sorted = {{0}, {0}};
    int next[GROUPS] = {0};
    for (int place = 0; place < tokens; place++)
        sorted.number[group[order[place]]]++;
    for (int nth = 1; nth < GROUPS; nth++)
        next[nth] = next[nth - 1] + sorted.number[nth - 1];
    for (int place = 0; place < tokens; place++)
        sorted.place[next[group[order[place]]]++] = place;
    return sorted;
}

/* A window's rows, which of them a chunk takes, and where that is put together. */
struct chunk {
    const void *rows;
    const uint16_t *scale; /* of codes */
    Py_ssize_t width;
    const int64_t *order;
    uint8_t *low, *high; /* codes, or the bytes of bits */
};

INLINE const void *row_of(const struct chunk *chunk, int place, int bytes)
{
    return (const char *)chunk->rows + chunk->order[place] * chunk->width * bytes;
}

/* Numbers of some rows, in steps of one block, to their places and added to `sums`; a code times its step has 19
 * digits at most and is exact. Few bytes at a time: memcpy of a whole row may be slow, as files.py says. */
INLINE void add_codes(const int8_t *const *codes, const float *step, int rows, int n, int8_t *const *to,
                      float *restrict sums)
{
    for (int nth = 0; nth < rows; nth++)
        memcpy(to[nth], codes[nth], n);
    for (int i = 0; i < n; i++) {
        float sum = sums[i];
        for (int nth = 0; nth < rows; nth++)
            sum += (float)codes[nth][i] * step[nth];
        sums[i] = sum;
    }
}

/* Numbers [start, start + n) of rows. */
INLINE void take_codes(const struct chunk *chunk, int block, const int *place, int rows, Py_ssize_t start, int n,
                       float *restrict sums)
{
    const int8_t *codes[TOGETHER], *next[TOGETHER];
    int8_t *to[TOGETHER];
    const uint16_t *steps[TOGETHER];
    float step[TOGETHER];
    for (int nth = 0; nth < rows; nth++) {
        codes[nth] = (const int8_t *)row_of(chunk, place[nth], 1) + start;
        next[nth] = (const int8_t *)row_of(chunk, place[rows + nth], 1) + start;
        steps[nth] = chunk->scale + chunk->order[place[nth]] * n_blocks(chunk->width, block) + start / block;
        to[nth] = (int8_t *)chunk->low + place[nth] * chunk->width + start;
    }
    for (int at = 0; at < n; at += block) {
        for (int nth = 0; nth < rows; nth++) {
            if (at % 64 == 0)
                fetch(next[nth] + at, 64);
            step[nth] = half_to_float(*steps[nth]++);
        }
        if (n - at < block)
            add_codes(codes, step, rows, n - at, to, sums + at);
        else
            add_codes(codes, step, rows, block, to, sums + at);
        for (int nth = 0; nth < rows; nth++)
            codes[nth] += block, to[nth] += block;
    }
}

INLINE void split(const uint16_t *restrict bits, int n, uint8_t *restrict low, uint8_t *restrict high)
{
    for (int i = 0; i < n; i++) {
        low[i] = (uint8_t)bits[i];
        high[i] = (uint8_t)(bits[i] >> 8);
    }
}

INLINE void add_bits(const uint16_t *const *bits, int rows, int n, float *restrict sums)
{
    for (int i = 0; i < n; i++) {
        float sum = sums[i];
        for (int nth = 0; nth < rows; nth++)
            sum += float_of((uint32_t)bits[nth][i] << 16);
        sums[i] = sum;
    }
}

INLINE void take_bits(const struct chunk *chunk, const int *place, int rows, Py_ssize_t start, int n,
                      float *restrict sums)
{
    for (int at = 0; at < n; at += SOME) {
        const uint16_t *bits[TOGETHER];
        int some = n - at < SOME ? n - at : SOME;
        for (int nth = 0; nth < rows; nth++) {
            Py_ssize_t to = place[nth] * chunk->width + start + at;
            bits[nth] = (const uint16_t *)row_of(chunk, place[nth], 2) + start + at;
            fetch((const uint16_t *)row_of(chunk, place[rows + nth], 2) + start + at, 2 * SOME);
            split(bits[nth], some, chunk->low + to, chunk->high + to);
        }
        add_bits(bits, rows, some, sums + at);
    }
}

INLINE void take(const struct chunk *chunk, int block, const int *place, int rows, Py_ssize_t start, int n,
                 float *restrict sums)
{
    if (block == BITS)
        take_bits(chunk, place, rows, start, n, sums);
    else
        take_codes(chunk, block, place, rows, start, n, sums);
}

/* block: BITS where rows are bits. */
INLINE void take_chunk(const struct chunk *chunk, int block, const struct sorted *sorted, double *restrict sums)
{
    for (Py_ssize_t start = 0; start < chunk->width; start += TILE) {
        int n = chunk->width - start < TILE ? (int)(chunk->width - start) : TILE;
        const int *place = sorted->place;
        for (int group = 0; group < GROUPS; group++) {
            float part[TILE];
            const int *end = place + sorted->number[group];
            if (place == end)
                continue;
            memset(part, 0, n * sizeof *part);
            for (; place + TOGETHER <= end; place += TOGETHER)
                take(chunk, block, place, TOGETHER, start, n, part);
            for (; place < end; place++)
                take(chunk, block, place, 1, start, n, part);
            for (int i = 0; i < n; i++)
                sums[group * chunk->width + start + i] += part[i];
        }
    }
}

/* Each with a block that the compiler knows. */
WIDEST static void take_narrow(const struct chunk *chunk, const struct sorted *sorted, double *sums)
{
    take_chunk(chunk, NARROW_BLOCK, sorted, sums);
}

WIDEST static void take_wide(const struct chunk *chunk, const struct sorted *sorted, double *sums)
{
    take_chunk(chunk, WIDE_BLOCK, sorted, sums);
}

WIDEST static void take_planes(const struct chunk *chunk, const struct sorted *sorted, double *sums)
{
    take_chunk(chunk, BITS, sorted, sums);
}

/* All chunks of `order`, one behind the other. */
static void take_all(struct chunk chunk, Py_ssize_t tokens, const int64_t *group, double *sums,
                     void (*take_one)(const struct chunk *, const struct sorted *, double *))
{
    for (; tokens > 0; tokens -= CHUNK) {
        struct sorted sorted = sort_by_group(chunk.order, tokens < CHUNK ? (int)tokens : CHUNK, group);
        take_one(&chunk, &sorted, sums);
        chunk.order += CHUNK;
        chunk.low += CHUNK * chunk.width;
        chunk.high = chunk.high ? chunk.high + CHUNK * chunk.width : NULL;
    }
}

static void take_scale(const char *from, Py_ssize_t bytes, const int64_t *order, Py_ssize_t tokens, char *to)
{
    for (Py_ssize_t token = 0; token < tokens; token++)
        memcpy(to + token * bytes, from + order[token] * bytes, bytes);
}

/* Zeros behind the last token of the last chunk. */
static void clear_rest(void *rows, Py_ssize_t bytes, Py_ssize_t tokens)
{
    memset((char *)rows + tokens * bytes, 0, (CHUNK - tokens % CHUNK) % CHUNK * bytes);
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
        struct chunk chunk = {at[CODES].buf, at[SCALE].buf, width, at[ORDER].buf, at[CHUNK_CODES].buf, NULL};
        take_all(chunk, tokens, at[GROUP].buf, at[SUMS].buf, block == NARROW_BLOCK ? take_narrow : take_wide);
        take_scale(at[SCALE].buf, scales, chunk.order, tokens, at[CHUNK_SCALE].buf);
        clear_rest(at[CHUNK_CODES].buf, width, tokens);
        clear_rest(at[CHUNK_SCALE].buf, scales, tokens);
        Py_END_ALLOW_THREADS;
    }
    return finish(at, ALL, fit);
}

static PyObject *gather_planes(PyObject *module, PyObject *arguments)
{
    enum { ROWS, ORDER, GROUP, LOW, HIGH, SUMS, ALL };
    Py_buffer at[ALL] = {{0}};
    Py_ssize_t width;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*ny*y*w*w*w*", &at[ROWS], &width, &at[ORDER], &at[GROUP], &at[LOW],
                          &at[HIGH], &at[SUMS]))
        return NULL;
    Py_ssize_t rows = at[GROUP].len / 8, tokens = at[ORDER].len / 8;
    int fit = width > 0 && holds(&at[ROWS], rows, width, 2) && holds(&at[GROUP], rows, 1, 8)
              && holds(&at[ORDER], tokens, 1, 8) && holds(&at[LOW], rows_of(&at[ORDER]), width, 1)
              && holds(&at[HIGH], rows_of(&at[ORDER]), width, 1)
              && holds(&at[SUMS], GROUPS, width, sizeof(double)) && in_range(&at[ORDER], &at[GROUP]);
    if (fit) {
        Py_BEGIN_ALLOW_THREADS;
        struct chunk chunk = {at[ROWS].buf, NULL, width, at[ORDER].buf, at[LOW].buf, at[HIGH].buf};
        take_all(chunk, tokens, at[GROUP].buf, at[SUMS].buf, take_planes);
        clear_rest(at[LOW].buf, width, tokens);
        clear_rest(at[HIGH].buf, width, tokens);
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
