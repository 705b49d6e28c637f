/* The checksum of zstd's frames: XXH64 with seed 0, as its specification says. */

static const uint64_t PRIME_1 = 0x9E3779B185EBCA87u, PRIME_2 = 0xC2B2AE3D27D4EB4Fu, PRIME_3 = 0x165667B19E3779F9u,
                      PRIME_4 = 0x85EBCA77C2B2AE63u, PRIME_5 = 0x27D4EB2F165667C5u;

INLINE uint64_t rotate(uint64_t word, int by)
{
    return word << by | word >> (64 - by);
}

INLINE uint64_t mix_lane(uint64_t lane, uint64_t word)
{
    return rotate(lane + word * PRIME_2, 31) * PRIME_1;
}

INLINE uint64_t merge_lane(uint64_t hash, uint64_t lane)
{
    return (hash ^ mix_lane(0, lane)) * PRIME_1 + PRIME_4;
}

INLINE uint64_t word_at(const uint8_t *from)
{
    uint64_t word; /* little-endian, as whatever compiles this */
    memcpy(&word, from, sizeof word);
    return word;
}

/* What does not fill the four lanes. */
static uint64_t hash_rest(uint64_t hash, const uint8_t *from, size_t size)
{
    for (; size >= 8; from += 8, size -= 8)
        hash = rotate(hash ^ mix_lane(0, word_at(from)), 27) * PRIME_1 + PRIME_4;
    if (size >= 4) {
        uint32_t half;
        memcpy(&half, from, sizeof half);
        hash = rotate(hash ^ half * PRIME_1, 23) * PRIME_2 + PRIME_3;
        from += 4;
        size -= 4;
    }
    for (; size > 0; from++, size--)
        hash = rotate(hash ^ *from * PRIME_5, 11) * PRIME_1;
    hash = (hash ^ hash >> 33) * PRIME_2;
    hash = (hash ^ hash >> 29) * PRIME_3;
    return hash ^ hash >> 32;
}

static uint64_t xxh64(const uint8_t *from, size_t size)
{
    uint64_t hash = PRIME_5, lane[4] = {PRIME_1 + PRIME_2, PRIME_2, 0, -PRIME_1};
    size_t rest = size;
    for (; rest >= 32; rest -= 32, from += 32)
        for (int nth = 0; nth < 4; nth++)
            lane[nth] = mix_lane(lane[nth], word_at(from + 8 * nth));
    if (size >= 32) {
        hash = rotate(lane[0], 1) + rotate(lane[1], 7) + rotate(lane[2], 12) + rotate(lane[3], 18);
        for (int nth = 0; nth < 4; nth++)
            hash = merge_lane(hash, lane[nth]);
    }
    return hash_rest(hash + size, from, rest);
}
