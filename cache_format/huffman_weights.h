/* How a frame describes its Huffman code (RFC 8878, 4.2.1.1): a weight for each symbol but the last, which follows
 * from the others; four bits each where they are few, otherwise FSE (4.1), with two states that take turns. */

enum { STATES_LOG = 6, STATES = 1 << STATES_LOG, WEIGHTS = LONGEST + 2, MOST_DIRECT = 128, MOST_DESCRIPTION = 127 };

struct bits {
    uint8_t *to;
    uint64_t held;
    int number;
};

INLINE void put_bits(struct bits *bits, uint32_t value, int number)
{
    bits->held |= (uint64_t)value << bits->number;
    for (bits->number += number; bits->number >= 8; bits->number -= 8, bits->held >>= 8)
        *bits->to++ = (uint8_t)bits->held;
}

INLINE uint8_t *end_bits(struct bits *bits)
{
    if (bits->number)
        *bits->to++ = (uint8_t)bits->held;
    return bits->to;
}

INLINE int floor_log2(uint32_t value)
{
    return 31 - __builtin_clz(value);
}

/* Shares of STATES, as counted, at least one for each weight that occurs; what rounding leaves goes to the most
 * frequent one. */
static void share_states(const int *count, int all, int *share)
{
    int left = STATES, most = 0;
    for (int weight = 0; weight < WEIGHTS; weight++) {
        share[weight] = count[weight] * STATES / all;
        share[weight] += count[weight] && !share[weight];
        left -= share[weight];
        most = count[weight] > count[most] ? weight : most;
    }
    share[most] += left;
}

/* 4.1.1: each share plus one, in as few bits as what is left of STATES needs; after a zero, how many more follow. */
static void put_shares(struct bits *bits, const int *share)
{
    put_bits(bits, STATES_LOG - 5, 4);
    for (int weight = 0, left = STATES; left > 0; weight++) {
        int largest = left + 1, length = floor_log2((uint32_t)largest) + 1, value = share[weight] + 1;
        int short_ones = (1 << length) - 1 - largest;
        if (value < short_ones)
            put_bits(bits, (uint32_t)value, length - 1);
        else
            put_bits(bits, (uint32_t)(value < 1 << (length - 1) ? value : value + short_ones), length);
        left -= share[weight];
        if (share[weight])
            continue;
        int zeros = 0;
        while (!share[weight + 1 + zeros])
            zeros++;
        weight += zeros;
        for (; zeros >= 3; zeros -= 3)
            put_bits(bits, 3, 2);
        put_bits(bits, (uint32_t)zeros, 2);
    }
}

/* A decoder's states (4.1.1): the weight that each tells, and the states that may come next. */
struct state {
    int bits, base; /* base to base + 2^bits - 1 */
};
struct states {
    struct state is[STATES];
    uint8_t first[WEIGHTS];          /* state of a weight with most bits, at least one */
    uint8_t before[WEIGHTS][STATES]; /* state of this weight that may be followed by that state */
};

static void lay_out(const int *share, struct states *states)
{
    uint8_t weight_of[STATES];
    int at = 0, seen[WEIGHTS] = {0};
    for (int weight = 0; weight < WEIGHTS; weight++)
        for (int nth = 0; nth < share[weight]; nth++, at = (at + STATES / 2 + STATES / 8 + 3) % STATES)
            weight_of[at] = (uint8_t)weight;
    for (int nth = 0; nth < STATES; nth++) {
        int weight = weight_of[nth], number = share[weight] + seen[weight]++;
        int bits = STATES_LOG - floor_log2((uint32_t)number), base = (number << bits) - STATES;
        states->is[nth] = (struct state){bits, base};
        if (seen[weight] == 1)
            states->first[weight] = (uint8_t)nth;
        memset(states->before[weight] + base, nth, (size_t)1 << bits);
    }
}

/* Backwards, as a decoder reads from the end; it stops where bits are missing, so the last two have some. */
static void put_weights(struct bits *bits, const uint8_t *weights, int number, const struct states *states)
{
    int state[2] = {states->first[weights[number - 2]], states->first[weights[number - 1]]};
    if (number % 2) {
        int last = state[0];
        state[0] = state[1];
        state[1] = last;
    }
    for (int nth = number - 3; nth >= 0; nth--) {
        int next = state[nth % 2], now = states->before[weights[nth]][next];
        put_bits(bits, (uint32_t)(next - states->is[now].base), states->is[now].bits);
        state[nth % 2] = now;
    }
    put_bits(bits, (uint32_t)state[1], STATES_LOG);
    put_bits(bits, (uint32_t)state[0], STATES_LOG);
    put_bits(bits, 1, 1);
}

/* Bytes of the description at `to`, which has room for 1 + 4 * SYMBOLS; 0 where there is none. */
static int describe_code(const struct code *code, uint8_t *to)
{
    uint8_t weights[SYMBOLS + 1] = {0};
    int number = code->last, count[WEIGHTS] = {0}, share[WEIGHTS + 1], most = 0;
    for (int symbol = 0; symbol < number; symbol++) {
        weights[symbol] = (uint8_t)(code->length[symbol] ? code->longest + 1 - (int)code->length[symbol] : 0);
        int found = ++count[weights[symbol]];
        most = found > most ? found : most;
    }
    if (number <= MOST_DIRECT) {
        to[0] = (uint8_t)(MOST_DESCRIPTION + number);
        for (int nth = 0; nth < number; nth += 2)
            to[1 + nth / 2] = (uint8_t)(weights[nth] << 4 | weights[nth + 1]);
        return 1 + (number + 1) / 2;
    }
    if (most == number)
        return 0; /* all bytes are as frequent, and FSE cannot tell one weight alone */
    share_states(count, number, share);
    struct bits bits = {to + 1, 0, 0};
    share[WEIGHTS] = 1;
    put_shares(&bits, share);
    bits = (struct bits){end_bits(&bits), 0, 0};
    struct states states;
    lay_out(share, &states);
    put_weights(&bits, weights, number, &states);
    int size = (int)(end_bits(&bits) - to);
    to[0] = (uint8_t)(size - 1);
    return size - 1 <= MOST_DESCRIPTION ? size : 0;
}
