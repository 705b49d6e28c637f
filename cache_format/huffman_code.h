/* Huffman codes no longer than LONGEST bits, in the order that zstd's frames ask for (RFC 8878, 4.2.1). */

enum { SYMBOLS = 256, LONGEST = 11, FULL = 1 << LONGEST };

struct code {
    uint32_t bits[SYMBOLS], length[SYMBOLS]; /* length 0: the symbol does not occur */
    int longest, last;                       /* the longest length, the last symbol that occurs */
};

/* Symbols that occur, rarest first. */
struct occurring {
    int number;
    uint8_t symbol[SYMBOLS];
    uint32_t count[SYMBOLS];
};

/* Codes of values around zero come nearly sorted when they are looked at from both ends. */
static struct occurring sort_by_count(const uint32_t *count)
{
    struct occurring all = {0};
    for (int nth = 0; nth < SYMBOLS; nth++) {
        int symbol = nth % 2 ? SYMBOLS / 2 + nth / 2 : SYMBOLS / 2 - 1 - nth / 2, place = all.number;
        if (!count[symbol])
            continue;
        for (; place > 0 && all.count[place - 1] > count[symbol]; place--) {
            all.count[place] = all.count[place - 1];
            all.symbol[place] = all.symbol[place - 1];
        }
        all.count[place] = count[symbol];
        all.symbol[place] = (uint8_t)symbol;
        all.number++;
    }
    return all;
}

/* Depths of Huffman's tree over counts that rise: leaves first, then nodes as they are made, which rise too. */
static void find_depths(const struct occurring *all, int *depth)
{
    uint64_t weight[2 * SYMBOLS];
    int parent[2 * SYMBOLS], leaf = 0, node = all->number, made = all->number, root = 2 * all->number - 2;
    for (int nth = 0; nth < all->number; nth++)
        weight[nth] = all->count[nth];
    for (; made <= root; made++) {
        weight[made] = 0;
        for (int child = 0; child < 2; child++) {
            int lighter = leaf < all->number && (node == made || weight[leaf] <= weight[node]) ? leaf++ : node++;
            weight[made] += weight[lighter];
            parent[lighter] = made;
        }
    }
    depth[root] = 0;
    for (int nth = root - 1; nth >= 0; nth--)
        depth[nth] = depth[parent[nth]] + 1;
}

/* Codes that have to grow by a bit, `used` being Kraft's sum, until a prefix code has room for all: those first that
 * are rare for their length, and none that would free more than is needed while others are left. */
static int lengthen(const struct occurring *all, int *depth, int used)
{
    uint64_t total = 0, limit;
    for (int nth = 0; nth < all->number; nth++)
        total += all->count[nth];
    for (limit = total / 2; used > FULL && limit < 3 * total; limit += total / 16 + 1)
        for (int nth = 0; nth < all->number; nth++)
            if (depth[nth] < LONGEST && FULL >> (depth[nth] + 1) <= used - FULL
                && (uint64_t)all->count[nth] << depth[nth] <= limit)
                used -= FULL >> ++depth[nth];
    for (int longest = LONGEST - 1; used > FULL && longest > 0; longest--)
        for (int nth = 0; nth < all->number && used > FULL; nth++)
            if (depth[nth] == longest)
                used -= FULL >> ++depth[nth];
    return used;
}

/* No depth over LONGEST; what is left of the room goes to the most frequent symbols. */
static void limit_depths(const struct occurring *all, int *depth)
{
    int used = 0;
    for (int nth = 0; nth < all->number; nth++) {
        depth[nth] = depth[nth] < LONGEST ? depth[nth] : LONGEST;
        used += FULL >> depth[nth];
    }
    used = lengthen(all, depth, used);
    while (used < FULL)
        for (int nth = all->number - 1; nth >= 0; nth--)
            for (; depth[nth] > 1 && FULL - used >= FULL >> depth[nth]; depth[nth]--)
                used += FULL >> depth[nth];
}

/* Longest first, then by symbol; each shorter length goes on at half of where the longer one ended. */
static void number_codes(struct code *code)
{
    uint32_t next = 0;
    for (int length = code->longest; length > 0; length--, next = (next + 1) >> 1)
        for (int symbol = 0; symbol <= code->last; symbol++)
            if (code->length[symbol] == (uint32_t)length)
                code->bits[symbol] = next++;
}

/* Of at least two symbols that occur. */
static struct code make_code(const struct occurring *all)
{
    struct code code = {0};
    int depth[2 * SYMBOLS];
    find_depths(all, depth);
    limit_depths(all, depth);
    for (int nth = 0; nth < all->number; nth++) {
        code.length[all->symbol[nth]] = (uint32_t)depth[nth];
        code.longest = depth[nth] > code.longest ? depth[nth] : code.longest;
        code.last = all->symbol[nth] > code.last ? all->symbol[nth] : code.last;
    }
    number_codes(&code);
    return code;
}
