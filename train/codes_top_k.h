/* The largest pre-activations of each token. */
#include "codes_threads.h"

enum { KEYS = 16 };

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

/* Leave in `kept` the k largest that are positive of x (width), at ascending places; `size`: its room less KEYS. */
INLINE void keep_of_row(const float *x, size_t width, size_t k, struct kept *kept, size_t size)
{
    int32_t wanted = 1;
    kept->n = 0;
    for (size_t at = 0; at < width; at += KEYS) {
        int32_t keys[KEYS] = {0}, reached = 0;
        size_t filled = least(KEYS, width - at);
        if (filled == KEYS)
            for (size_t i = 0; i < KEYS; i++)
                keys[i] = key_of(x + at + i);
        else
            for (size_t i = 0; i < filled; i++)
                keys[i] = key_of(x + at + i);
        for (size_t i = 0; i < KEYS; i++)
            reached |= keys[i] >= wanted;
        if (!reached)
            continue;
        for (size_t i = 0; i < KEYS; i++) {
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
}

/* The k largest of relu(x), at ascending latents; latents: of x, or NULL where they are its places. Zeros fill up, at
 * the first latents that are free. */
INLINE void top_of_row(const float *x, const int32_t *latents, size_t width, size_t k, struct kept *kept, size_t size,
                       int32_t *columns, float *values)
{
    keep_of_row(x, width, k, kept, size);
    int32_t zero = 0;
    for (size_t n = 0, next = 0, zeros = k - kept->n; n < k; n++) {
        int32_t place = next < kept->n ? kept->places[next] : 0;
        int32_t latent = next < kept->n ? (latents ? latents[place] : place) : INT32_MAX;
        int is_zero = zeros && zero < latent;
        columns[n] = is_zero ? zero : latent;
        values[n] = is_zero ? 0.0f : x[place];
        zero += is_zero || zero == latent;
        zeros -= (size_t)is_zero;
        next += (size_t)!is_zero;
    }
}

enum { MANY = 64 };

/* Of rows of x (row, width); with starts, of rows of as many values as they say, whose latents are told. */
struct choosing {
    struct work work; /* items: MANY rows */
    const float *x;
    const int32_t *starts, *latents;
    int32_t *columns;
    float *values;
    size_t rows, width, k;
};

WIDEST static void top_of_rows(const struct choosing *all, struct kept *kept, size_t size, size_t first)
{
    for (size_t row = first; row < least(first + MANY, all->rows); row++) {
        size_t begin = all->starts ? (size_t)all->starts[row] : row * all->width;
        size_t n = all->starts ? (size_t)all->starts[row + 1] - begin : all->width;
        top_of_row(all->x + begin, all->starts ? all->latents + begin : NULL, n, all->k, kept, size,
                   all->columns + row * all->k, all->values + row * all->k);
    }
}

static void choose(void *argument)
{
    struct choosing *all = argument;
    size_t size = 4 * all->k + 64, bytes = (size + 2 * KEYS) * sizeof(int32_t);
    struct kept kept = {malloc(bytes), malloc(bytes), 0};
    if (!kept.keys || !kept.places)
        fail(&all->work, MEMORY);
    else
        for (size_t item; (item = take(&all->work)) < all->work.items;)
            top_of_rows(all, &kept, size, item * MANY);
    free(kept.keys);
    free(kept.places);
}
