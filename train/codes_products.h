/* The products of codes: a tile of 64 channels goes through all codes before the next one, so that what is read again
 * and again, a tile of some thousand rows, lies in the second-level cache. */
#include "codes_threads.h"

enum { TILE = 64, LANES = 8, LINE = 16, VECTORS = TILE / LANES, ROWS_AT_ONCE = 2048, ROW_COST = 8 };

/* 32 bytes: gcc keeps wider ones in memory where the processor has none. LINE: floats that are fetched together. */
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float half_vector __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef union {
    vector whole;
    half_vector half[2];
} halves;

INLINE float sum_lanes(vector values)
{
    halves eight = {values};
    half_vector sum = eight.half[0] + eight.half[1];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

/* A row's tile, in `padded` with zeros behind where the row ends within it. */
INLINE const float *tile_of(const float *row, size_t filled, float *padded)
{
    if (filled == TILE)
        return row;
    memcpy(padded, row, filled * sizeof *row);
    memset(padded + filled, 0, (TILE - filled) * sizeof *row);
    return padded;
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
 * in values and code_grad. weight, code_grad: or NULL; weight_grad: or NULL, where only the codes' is wanted. */
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
            size_t here = latent * all->width + at;
            float unwanted[TILE], padded[TILE], *written = all->weight_grad ? all->weight_grad + here : unwanted;
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
                const float *row = all->weight + here;
                if (latent + 1 < end && all->weight_grad)
                    for (size_t ahead = all->width; ahead < all->width + filled; ahead += LINE) {
                        __builtin_prefetch(row + ahead);
                        __builtin_prefetch(written + ahead, 1);
                    }
                memcpy(own, tile_of(row, filled, padded), sizeof own);
                for (; code < last; code++) {
                    const vector *read = (const vector *)(tile + (size_t)columns[code] * TILE);
                    vector product[2] = {{0}, {0}};
                    for (int v = 0; v < VECTORS; v++) {
                        sum[v] += values[code] * read[v];
                        product[v % 2] += own[v] * read[v];
                    }
                    products[code] += sum_lanes(product[0] + product[1]);
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
