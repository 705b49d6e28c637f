/* The products of codes on a CPU, in float32; cpu_codes.py calls them.
 *
 * A tile of 64 channels goes through all codes before the next one, so that what is read again and again, a tile
 * of some thousand rows, lies in the second-level cache. Every sum has one order, whichever thread forms it: of a
 * token's channels that of its codes, of a latent's that of its tokens, of a code's that of the channels. Products
 * may be fused with additions, so that last bits depend on the processor, and on nothing else.
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE /* RTLD_DEFAULT */
#include <Python.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Where the loader can choose, each of these functions is compiled three times and the widest is taken. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif
#define INLINE static inline __attribute__((always_inline))

enum { TILE = 64, LANES = 16, VECTORS = TILE / LANES, ROWS_AT_ONCE = 2048, ROW_COST = 8, MANY = 64 };

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float half_vector __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef float quarter_vector __attribute__((vector_size(LANES), aligned(4), may_alias));
typedef union {
    vector whole;
    half_vector half[2];
} halves;
typedef union {
    half_vector whole;
    quarter_vector half[2];
} quarters;

INLINE float sum_lanes(vector values)
{
    halves eight = {values};
    quarters four = {eight.half[0] + eight.half[1]};
    quarter_vector sum = four.half[0] + four.half[1];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* A row's tile, in `padded` with zeros behind where the row ends within it. */
INLINE const float *tile_of(const float *row, size_t filled, float *padded)
{
    if (filled == TILE)
        return row;
    memcpy(padded, row, filled * sizeof *row);
    memset(padded + filled, 0, (TILE - filled) * sizeof *row);
    return padded;
}

/* What threads do together: each calls `run`, and takes items until there are none. */
struct work {
    void (*run)(void *);
    size_t items;
    atomic_size_t taken;
    _Atomic(const char *) fault;
};

static const char MEMORY[] = "there is no memory for a step's products";
static const char SIZES[] = "the buffers' sizes, or the numbers in them, do not belong together";

static size_t take(struct work *work) { return atomic_fetch_add(&work->taken, 1); }
static void fail(struct work *work, const char *fault) { atomic_store(&work->fault, fault); }

static void *run_in_thread(void *all)
{
    ((struct work *)all)->run(all);
    return NULL;
}

/* all: a struct that begins with its work. torch's own team of threads does it where that is libgomp's: its threads
 * wait for their next work in a loop, and would be in the way of others. */
static void together(void *all, size_t threads)
{
    enum { MOST = 256 };
    struct work *work = all;
    static void (*_Atomic parallel)(void (*)(void *), void *, unsigned, unsigned);
    if (!parallel)
        parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (threads > 1 && parallel) {
        parallel(work->run, all, (unsigned)threads, 0);
        return;
    }
    pthread_t others[MOST];
    size_t started = 0;
    while (started + 1 < threads && started < MOST && !pthread_create(others + started, NULL, run_in_thread, all))
        started++;
    work->run(all);
    while (started)
        pthread_join(others[--started], NULL);
}

struct codes {
    const int32_t *starts, *columns;
    const float *values;
    size_t rows;
};

/* Of one row and tile: sum + its codes from `at` on, as long as their columns are among the n from `begin` on, which
 * are `packed`; where the next of its codes is. */
INLINE size_t add_row(const struct codes *codes, size_t row, size_t at, size_t begin, size_t n, const float *packed,
                      vector *sum)
{
    size_t last = (size_t)codes->starts[row + 1];
    for (; at < last && (size_t)codes->columns[at] - begin < n; at++) {
        const vector *read = (const vector *)(packed + ((size_t)codes->columns[at] - begin) * TILE);
        for (int v = 0; v < VECTORS; v++)
            sum[v] += codes->values[at] * read[v];
    }
    return at;
}

/* out (row, width) += codes (row, column) times weight (column, width). */
struct decoding {
    struct work work; /* items: tiles */
    struct codes codes;
    const float *weight;
    float *out;
    size_t columns, width;
};

/* Of one tile. next (row): room for where each row's codes go on; packed (ROWS_AT_ONCE, TILE). Whether all columns
 * were found, as they are where they ascend in each row. */
WIDEST static int decode_tile(const struct decoding *all, size_t at, int32_t *next, float *packed)
{
    const struct codes *codes = &all->codes;
    size_t width = all->width, filled = least(TILE, width - at), missed = 0;
    memcpy(next, codes->starts, codes->rows * sizeof *next);
    for (size_t begin = 0; begin < all->columns; begin += ROWS_AT_ONCE) {
        size_t n = least(all->columns - begin, ROWS_AT_ONCE);
        for (size_t i = 0; i < n; i++) {
            float padded[TILE];
            const float *row = all->weight + (begin + i) * width + at;
            memcpy(packed + i * TILE, tile_of(row, filled, padded), sizeof padded);
        }
        for (size_t row = 0; row < codes->rows; row++) {
            size_t from = (size_t)next[row];
            if (from == (size_t)codes->starts[row + 1] || (size_t)codes->columns[from] - begin >= n)
                continue;
            float *written = all->out + row * width + at, padded[TILE];
            vector sum[VECTORS];
            memcpy(sum, tile_of(written, filled, padded), sizeof sum);
            next[row] = (int32_t)add_row(codes, row, from, begin, n, packed, sum);
            memcpy(written, sum, filled * sizeof *written);
        }
    }
    for (size_t row = 0; row < codes->rows; row++)
        missed += next[row] != codes->starts[row + 1];
    return !missed;
}

static void decode_tiles(void *argument)
{
    struct decoding *all = argument;
    int32_t *next = malloc((all->codes.rows + 1) * sizeof *next);
    float *packed = malloc(ROWS_AT_ONCE * TILE * sizeof *packed);
    if (!next || !packed)
        fail(&all->work, MEMORY);
    else
        for (size_t tile; (tile = take(&all->work)) < all->work.items;)
            if (!decode_tile(all, tile * TILE, next, packed))
                fail(&all->work, SIZES);
    free(packed);
    free(next);
}

/* tiles (tile, row, TILE) of rows (row, width), zeros behind the last channel. */
struct tiling {
    struct work work; /* items: tiles */
    const float *rows;
    float *tiles;
    size_t n_rows, width;
};

static void cut_tiles(void *argument)
{
    struct tiling *all = argument;
    for (size_t tile; (tile = take(&all->work)) < all->work.items;) {
        size_t at = tile * TILE, filled = least(TILE, all->width - at);
        for (size_t row = 0; row < all->n_rows; row++) {
            float padded[TILE];
            memcpy(all->tiles + (tile * all->n_rows + row) * TILE,
                   tile_of(all->rows + row * all->width + at, filled, padded), sizeof padded);
        }
    }
}

/* weight_grad (latent, width) of the transpose, `codes`, and tiles of its columns' rows, written or added; code_grad
 * (code), added: each code's latent's row of weight times its token's row. order: places of the transpose's codes
 * in values and code_grad. weight, code_grad: or NULL. */
struct differentiating {
    struct work work; /* items: stretches of latents */
    struct codes codes;
    const int32_t *order;
    const float *tiles, *weight;
    float *weight_grad, *code_grad;
    size_t tokens, width;
    int add;
};

/* Of latents [first, end), with values and products in the transpose's order. */
WIDEST static void both_gradients(const struct differentiating *all, const float *values, float *products,
                                  size_t first, size_t end)
{
    const int32_t *starts = all->codes.starts, *columns = all->codes.columns;
    for (size_t at = 0; at < all->width; at += TILE) {
        const float *tile = all->tiles + at * all->tokens;
        size_t filled = least(TILE, all->width - at);
        for (size_t latent = first; latent < end; latent++) {
            float *written = all->weight_grad + latent * all->width + at, padded[TILE];
            vector sum[VECTORS] = {{0}}, own[VECTORS];
            if (all->add)
                memcpy(sum, tile_of(written, filled, padded), sizeof sum);
            size_t code = (size_t)starts[latent], last = (size_t)starts[latent + 1];
            if (!all->weight)
                for (; code < last; code++) {
                    const vector *read = (const vector *)(tile + (size_t)columns[code] * TILE);
                    for (int v = 0; v < VECTORS; v++)
                        sum[v] += values[code] * read[v];
                }
            else {
                const float *row = all->weight + latent * all->width + at;
                if (latent + 1 < end)
                    for (size_t ahead = all->width; ahead < all->width + filled; ahead += LANES) {
                        __builtin_prefetch(row + ahead);
                        __builtin_prefetch(written + ahead, 1);
                    }
                memcpy(own, tile_of(row, filled, padded), sizeof own);
                for (; code < last; code++) {
                    const vector *read = (const vector *)(tile + (size_t)columns[code] * TILE);
                    vector product = {0};
                    for (int v = 0; v < VECTORS; v++) {
                        sum[v] += values[code] * read[v];
                        product += own[v] * read[v];
                    }
                    products[code] += sum_lanes(product);
                }
            }
            memcpy(written, sum, filled * sizeof *written);
        }
    }
}

/* The first latent before which a share of all work lies: that of their codes, and of rows that are written. */
static size_t latent_at(const struct differentiating *all, size_t part)
{
    size_t low = 0, high = all->codes.rows;
    size_t whole = (size_t)all->codes.starts[high] + ROW_COST * high, wanted = whole * part / all->work.items;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if ((size_t)all->codes.starts[middle] + ROW_COST * middle < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void differentiate(void *argument)
{
    struct differentiating *all = argument;
    for (size_t part; (part = take(&all->work)) < all->work.items;) {
        size_t first = latent_at(all, part), end = latent_at(all, part + 1);
        size_t begin = (size_t)all->codes.starts[first], n = (size_t)all->codes.starts[end] - begin;
        const int32_t *order = all->order + begin;
        float *values = malloc((n + 1) * sizeof *values), *products = calloc(n + 1, sizeof *products);
        if (values && products) {
            for (size_t i = 0; i < n; i++)
                values[i] = all->codes.values[order[i]];
            both_gradients(all, values - begin, products - begin, first, end);
            for (size_t i = 0; i < n && all->code_grad; i++)
                all->code_grad[order[i]] += products[i];
        } else {
            fail(&all->work, MEMORY);
        }
        free(values);
        free(products);
    }
}

/* The order of relu(x) as integers; a NaN is above all, so that it is never lost. */
INLINE int32_t key_of(const float *x)
{
    int32_t bits;
    memcpy(&bits, x, sizeof bits);
    if ((bits & 0x7FFFFFFF) > 0x7F800000)
        return INT32_MAX;
    return bits < 0 ? 0 : bits;
}

struct kept {
    int32_t *keys, *places;
    size_t n;
};

/* Keep the k largest; of equal ones those that come first. The smallest that is kept. */
INLINE int32_t keep_largest(struct kept *kept, size_t k)
{
    int32_t smallest = 0;
    for (int32_t bit = 1 << 30; bit; bit >>= 1) {
        int32_t reached = 0, tried = smallest | bit;
        for (size_t i = 0; i < kept->n; i++)
            reached += kept->keys[i] >= tried;
        smallest = (size_t)reached >= k ? tried : smallest;
    }
    size_t above = 0, n = 0;
    for (size_t i = 0; i < kept->n; i++)
        above += kept->keys[i] > smallest;
    for (size_t i = 0, equal = k - above; i < kept->n; i++) {
        int32_t key = kept->keys[i];
        int is_kept = key > smallest || (key == smallest && equal);
        equal -= key == smallest && is_kept;
        kept->keys[n] = key;
        kept->places[n] = kept->places[i];
        n += (size_t)is_kept;
    }
    kept->n = n;
    return smallest;
}

/* The k largest of relu(x) (width), at ascending places. room: for `kept`, `size` of them and LANES more. */
INLINE void top_of_row(const float *x, size_t width, size_t k, struct kept *kept, size_t size, int32_t *columns,
                       float *values)
{
    int32_t wanted = 1;
    kept->n = 0;
    for (size_t at = 0; at < width; at += LANES) {
        int32_t keys[LANES] = {0}, reached = 0;
        size_t filled = least(LANES, width - at);
        if (filled == LANES)
            for (size_t i = 0; i < LANES; i++)
                keys[i] = key_of(x + at + i);
        else
            for (size_t i = 0; i < filled; i++)
                keys[i] = key_of(x + at + i);
        for (size_t i = 0; i < LANES; i++)
            reached |= keys[i] >= wanted;
        if (!reached)
            continue;
        for (size_t i = 0; i < LANES; i++) {
            kept->keys[kept->n] = keys[i];
            kept->places[kept->n] = (int32_t)(at + i);
            kept->n += keys[i] >= wanted;
        }
        if (kept->n > size) {
            int32_t smallest = keep_largest(kept, k);
            wanted = smallest < INT32_MAX ? smallest + 1 : smallest; /* an equal one comes too late */
        }
    }
    if (kept->n > k)
        keep_largest(kept, k);
    size_t zeros = k - kept->n, next = 0;
    for (size_t place = 0, n = 0; n < k; place++) { /* zeros fill up, at the first places that are free */
        int is_kept = next < kept->n && (size_t)kept->places[next] == place;
        if (!is_kept && !zeros) {
            place = (size_t)kept->places[next] - 1;
            continue;
        }
        columns[n] = (int32_t)place;
        values[n++] = is_kept ? x[place] : 0.0f;
        next += (size_t)is_kept;
        zeros -= (size_t)!is_kept;
    }
}

struct choosing {
    struct work work; /* items: MANY rows */
    const float *x;
    int32_t *columns;
    float *values;
    size_t rows, width, k;
};

WIDEST static void top_of_rows(const struct choosing *all, struct kept *kept, size_t size, size_t first)
{
    for (size_t row = first; row < least(first + MANY, all->rows); row++)
        top_of_row(all->x + row * all->width, all->width, all->k, kept, size, all->columns + row * all->k,
                   all->values + row * all->k);
}

static void choose(void *argument)
{
    struct choosing *all = argument;
    size_t size = 4 * all->k + 64, bytes = (size + 2 * LANES) * sizeof(int32_t);
    struct kept kept = {malloc(bytes), malloc(bytes), 0};
    if (!kept.keys || !kept.places)
        fail(&all->work, MEMORY);
    else
        for (size_t item; (item = take(&all->work)) < all->work.items;)
            top_of_rows(all, &kept, size, item * MANY);
    free(kept.keys);
    free(kept.places);
}

/* Rows of int8 codes in blocks of `block` with a step each, minus mean, over scale. */
struct standardising {
    struct work work; /* items: MANY rows */
    const int8_t *codes;
    const float *steps, *mean;
    float *out, scale;
    size_t rows, width, block;
};

WIDEST static void standardise_rows(const struct standardising *all, size_t first)
{
    size_t width = all->width, blocks = (width + all->block - 1) / all->block;
    float inverse = 1.0f / all->scale;
    for (size_t row = first; row < least(first + MANY, all->rows); row++)
        for (size_t nth = 0; nth < blocks; nth++) {
            const int8_t *codes = all->codes + row * width;
            float step = all->steps[row * blocks + nth], *out = all->out + row * width;
            for (size_t i = nth * all->block; i < least(width, (nth + 1) * all->block); i++)
                out[i] = (step * codes[i] - all->mean[i]) * inverse;
        }
}

static void standardise_all(void *argument)
{
    struct standardising *all = argument;
    for (size_t item; (item = take(&all->work)) < all->work.items;)
        standardise_rows(all, item * MANY);
}

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
        || count(weight_grad) != latents * (size_t)width
        || (weight->obj && (count(weight) != count(weight_grad) || count(code_grad) != n)))
        return finish(&b, SIZES);
    struct differentiating all = {{differentiate, threads > 1 ? (size_t)threads : 1, 0, NULL},
                                  {starts->buf, tokens->buf, values->buf, latents},
                                  order->buf,
                                  tiles->buf,
                                  weight->buf,
                                  weight_grad->buf,
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
    Py_buffer *x = b.all, *columns = b.all + 1, *values = b.all + 2;
    Py_ssize_t width, k, threads;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "nnny*w*w*", &width, &k, &threads, x, columns, values))
        return NULL;
    size_t rows = width > 0 ? count(x) / (size_t)width : 0;
    if (k <= 0 || k > width || count(x) != rows * (size_t)width || count(columns) != rows * (size_t)k
        || count(values) != count(columns))
        return finish(&b, SIZES);
    struct choosing all = {{choose, parts_of(rows, MANY), 0, NULL}, x->buf, columns->buf, values->buf, rows,
                           (size_t)width, (size_t)k};
    return finish_together(&b, &all, threads);
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
    struct standardising all = {{standardise_all, parts_of(rows, MANY), 0, NULL}, codes->buf, steps->buf,
                                mean->buf, out->buf, scale, rows, width, (size_t)block};
    return finish_together(&b, &all, threads);
}

static PyMethodDef methods[] = {
    {"decode", decode, METH_VARARGS, NULL},       {"tiled", tiled, METH_VARARGS, NULL},
    {"gradients", gradients, METH_VARARGS, NULL}, {"transpose", transpose, METH_VARARGS, NULL},
    {"top_k", top_k, METH_VARARGS, NULL},         {"standardise", standardise, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_codes", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__codes(void)
{
    return PyModuleDef_Init(&definition);
}
