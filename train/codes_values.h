/* Stored numbers, as a step wants them. */
#include "codes_threads.h"

enum { VALUES_AT_ONCE = 64 };

/* Rows of int8 codes in blocks of `block` with a step each, minus mean, over scale. */
struct standardising {
    struct work work; /* items: VALUES_AT_ONCE rows */
    const int8_t *codes;
    const float *steps, *mean;
    float *out, scale;
    size_t rows, width, block;
};

WIDEST static void standardise_rows(const struct standardising *all, size_t first)
{
    size_t width = all->width, blocks = (width + all->block - 1) / all->block;
    float inverse = 1.0f / all->scale;
    for (size_t row = first; row < least(first + VALUES_AT_ONCE, all->rows); row++)
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
        standardise_rows(all, item * VALUES_AT_ONCE);
}
