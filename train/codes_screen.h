/* Which latents can be among the k largest, from products in bfloat16 and bounds of what their rounding changed. */
#include "codes_top_k.h"

#include <math.h>

static const float ROUNDED_UP = 1.0001f; /* more than a sum of squares may lose */

/* bfloat16 numbers are the upper halves of float32 ones. */
INLINE float widened(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint16_t rounded(const float *x)
{
    uint32_t bits;
    memcpy(&bits, x, sizeof bits);
    uint32_t even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : even);
}

/* One value's half; the squares of the value, and of what is lost, are added. */
INLINE void round_value(const float *x, uint16_t *half, float *square, float *lost)
{
    *half = rounded(x);
    float less = *x - widened(*half);
    *square += *x * *x;
    *lost += less * less;
}

/* halves (row, width) of rows (row, width); norms (2, row): of each, and of what rounding took from it, at least. */
struct rounding {
    struct work work; /* items: MANY rows */
    const float *rows;
    uint16_t *halves;
    float *norms;
    size_t n_rows, width;
};

WIDEST static void round_rows(const struct rounding *all, size_t first)
{
    for (size_t row = first; row < least(first + MANY, all->n_rows); row++) {
        const float *read = all->rows + row * all->width;
        uint16_t *written = all->halves + row * all->width;
        float squares[KEYS] = {0}, lost[KEYS] = {0};
        size_t at = 0;
        for (; at + KEYS <= all->width; at += KEYS)
            for (size_t i = 0; i < KEYS; i++)
                round_value(read + at + i, written + at + i, squares + i, lost + i);
        for (size_t i = 0; at + i < all->width; i++)
            round_value(read + at + i, written + at + i, squares + i, lost + i);
        for (size_t i = 1; i < KEYS; i++) {
            squares[0] += squares[i];
            lost[0] += lost[i];
        }
        all->norms[row] = sqrtf(squares[0]) * ROUNDED_UP;
        all->norms[all->n_rows + row] = sqrtf(lost[0]) * ROUNDED_UP;
    }
}

static void round_all(void *argument)
{
    struct rounding *all = argument;
    for (size_t item; (item = take(&all->work)) < all->work.items;)
        round_rows(all, item * MANY);
}

/* columns (row, most), counts (row): the latents that may be among the k largest of relu(x w + bias), ascending; a count
 * is -1 where they are more than most. products (row, width): x w in bfloat16, of rounded x and w; norms of x (2, row)
 * and w (2, width). By Cauchy and Schwarz each is within |x - x'| |w| + |x'| |w - w'| of the exact one, and what sums and
 * the product's own rounding add. */
struct screening {
    struct work work; /* items: MANY rows */
    const uint16_t *products;
    const float *bias, *row_norms, *weight_norms;
    int32_t *columns, *counts;
    size_t rows, width, k, most;
    float of_sums;
};

WIDEST static void screen_rows(const struct screening *all, size_t first, float *low, float *high,
                               struct kept *kept, size_t size)
{
    const float *norms = all->weight_norms, *lost = norms + all->width;
    for (size_t row = first; row < least(first + MANY, all->rows); row++) {
        const uint16_t *read = all->products + row * all->width;
        float norm = all->row_norms[row], gone = all->row_norms[all->rows + row];
        float of_norm = gone + all->of_sums * (norm + gone), of_lost = norm + gone;
        for (size_t i = 0; i < all->width; i++) {
            float product = widened(read[i]), value = product + all->bias[i];
            float margin = of_norm * norms[i] + of_lost * lost[i] + fabsf(product) * 0x1p-8f + fabsf(value) * 0x1p-22f;
            low[i] = value - margin;
            high[i] = value + margin;
        }
        keep_of_row(low, all->width, all->k, kept, size);
        int32_t wanted = kept->n == all->k ? INT32_MAX : 1, n = 0, *columns = all->columns + row * all->most;
        for (size_t i = 0; i < kept->n && kept->n == all->k; i++)
            wanted = kept->keys[i] < wanted ? kept->keys[i] : wanted;
        for (size_t at = 0; at < all->width && n >= 0; at += KEYS) {
            int32_t reached = 0;
            size_t filled = least(KEYS, all->width - at);
            if (filled == KEYS)
                for (size_t i = 0; i < KEYS; i++)
                    reached |= key_of(high + at + i) >= wanted;
            else
                reached = 1;
            for (size_t i = 0; reached && i < filled; i++)
                if (key_of(high + at + i) >= wanted) {
                    if ((size_t)n == all->most) {
                        n = -1;
                        break;
                    }
                    columns[n++] = (int32_t)(at + i);
                }
        }
        all->counts[row] = n;
    }
}

static void screen_all(void *argument)
{
    struct screening *all = argument;
    size_t size = 4 * all->k + 64, bytes = (size + 2 * KEYS) * sizeof(int32_t);
    struct kept kept = {malloc(bytes), malloc(bytes), 0};
    float *low = malloc(all->width * sizeof *low), *high = malloc(all->width * sizeof *high);
    if (!kept.keys || !kept.places || !low || !high)
        fail(&all->work, MEMORY);
    else
        for (size_t item; (item = take(&all->work)) < all->work.items;)
            screen_rows(all, item * MANY, low, high, &kept, size);
    free(kept.keys);
    free(kept.places);
    free(low);
    free(high);
}
