/* How often each byte occurs, of many more than it takes to know that: an eighth of them is counted. Those that are
 * far from zero, or scarce, are looked for in all: what occurs must have a code. */

enum {
    PIECE = 64,     /* bytes */
    SHARE = 8,      /* one piece of so many is counted, by turns that no row's length goes along with */
    TOGETHER = 128, /* bytes that are looked through at once for what is rare */
    TABLES = 8,     /* that count in turn: one byte is often like the last, whose count is on its way still */
    SCARCE = 4,     /* one of so many may be missing in that share though it may occur */
    NARROWEST = 16, /* a range around zero that is worth it */
};

typedef uint32_t counts[TABLES][SYMBOLS];

INLINE void count_some(const uint8_t *from, size_t size, counts counts)
{
    size_t at = 0;
    for (; at + TABLES <= size; at += TABLES) {
        uint64_t word = word_at(from + at);
        for (int nth = 0; nth < TABLES; nth++)
            counts[nth][word >> 8 * nth & 0xFF]++;
    }
    for (; at < size; at++)
        counts[0][from[at]]++;
}

static void add_up(counts counts, uint32_t *count)
{
    for (int symbol = 0; symbol < SYMBOLS; symbol++) {
        count[symbol] = 0;
        for (int nth = 0; nth < TABLES; nth++)
            count[symbol] += counts[nth][symbol];
    }
}

static void count_all(const uint8_t *from, size_t size, uint32_t *count)
{
    counts counts = {{0}};
    count_some(from, size, counts);
    add_up(counts, count);
}

static void count_share(const uint8_t *from, size_t pieces, uint32_t *count)
{
    counts counts = {{0}};
    uint32_t turn = 1;
    for (size_t nth = 0; nth + SHARE <= pieces; nth += SHARE) {
        turn = turn * 1664525u + 1013904223u; /* a linear congruence, whose upper bits look random */
        count_some(from + (nth + (turn >> 29)) * PIECE, PIECE, counts);
    }
    add_up(counts, count);
}

/* The largest number of which both signs were found, with few missing below it. */
static int range_of(const uint32_t *count)
{
    int range = 0, missing = !count[0];
    for (int size = 1; size < SYMBOLS / 2 && missing * SCARCE <= size; size++) {
        int found = !!count[size] + !!count[SYMBOLS - size];
        missing += 2 - found;
        range = found == 2 ? size : range;
    }
    return range;
}

/* Whether a byte, as a signed number, lies outside. */
INLINE uint8_t is_outside(uint8_t byte, uint8_t range)
{
    return (uint8_t)(byte + range) > (uint8_t)(2 * range);
}

INLINE void count_outside_here(const uint8_t *from, uint8_t range, uint32_t *count)
{
    uint8_t outside[TOGETHER];
    for (int nth = 0; nth < TOGETHER; nth++)
        outside[nth] = is_outside(from[nth], range);
    for (int nth = 0; nth < TOGETHER; nth += 8)
        for (uint64_t some = word_at(outside + nth); some; some &= some - 1)
            count[from[nth + __builtin_ctzll(some) / 8]]++;
}

WIDEST static void count_outside(const uint8_t *from, size_t size, uint8_t range, uint32_t *count)
{
    size_t at = 0;
    for (; at + TOGETHER <= size; at += TOGETHER) {
        uint8_t any = 0;
        for (int nth = 0; nth < TOGETHER; nth++)
            any |= is_outside(from[at + nth], range);
        if (any)
            count_outside_here(from + at, range, count);
    }
    for (; at < size; at++)
        count[from[at]] += is_outside(from[at], range);
}

/* Exact, or in proportion; of a number within the range that the share missed: 1. */
static void count_bytes(const uint8_t *from, size_t size, uint32_t *count)
{
    int range = 0;
    if (size / PIECE >= SYMBOLS) {
        count_share(from, size / PIECE, count);
        range = range_of(count);
    }
    if (range < NARROWEST) {
        count_all(from, size, count);
        return;
    }
    for (int symbol = 0; symbol < SYMBOLS; symbol++) {
        uint32_t found = count[symbol] ? SHARE * count[symbol] : 1;
        count[symbol] = is_outside((uint8_t)symbol, (uint8_t)range) ? 0 : found;
    }
    count_outside(from, size, (uint8_t)range, count);
}
