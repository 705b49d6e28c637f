/* Bytes that are noise but for their frequencies, as zstd frames (RFC 8878) of Huffman codes alone: what any zstd
 * reads, made without a search for matches. A frame has one code for all its blocks. */
#include "kernels.h"
#include "huffman_code.h"
#include "huffman_weights.h"
#include "xxh64.h"
#include "huffman_counts.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "frames are little-endian, and words go into them as they are"
#endif

enum {
    BLOCK = 1 << 17,         /* bytes of a frame's block, at most */
    FRAME = 13,              /* bytes around a frame's blocks: magic number, descriptor, size, checksum */
    HEADER = 3,              /* of a block */
    LITERALS = 5,            /* header of a block's literals, in its longest form */
    JUMPS = 6,               /* where the second to fourth stream begin */
    FEWEST = 64,             /* bytes of a block that is worth encoding */
    PAIRS = SYMBOLS * SYMBOLS,
    RAW = 0, REPEATED = 1, COMPRESSED = 2, TREELESS = 3,
};

/* What some frames have in common. */
struct coder {
    struct code code;
    uint32_t pair[PAIRS]; /* by the two bytes as they lie in memory: their codes, the second one's first, over the
                             number of their bits in the lowest byte */
    int described; /* bytes of the description; 0: the bytes are stored as they are */
    uint8_t description[1 + 4 * SYMBOLS];
};

WIDEST static void pair_codes(struct coder *coder)
{
    const uint32_t *bits = coder->code.bits, *length = coder->code.length;
    for (int second = 0; second < SYMBOLS; second++) {
        uint32_t later = bits[second], by = length[second], *pair = coder->pair + second * SYMBOLS;
        for (int first = 0; by && first < SYMBOLS; first++)
            pair[first] = (bits[first] << by | later) << 8 | (by + length[first]);
    }
}

/* Codes on their way to memory, from a stream's last byte to its first. */
struct stream {
    const uint8_t *end;
    uint8_t *to;
    uint64_t held;
    uint64_t number; /* of bits held, in the lowest byte; what lies above means nothing */
};

INLINE void put_pair(struct stream *stream, const uint32_t *pairs)
{
    uint16_t bytes;
    stream->end -= 2;
    memcpy(&bytes, stream->end, 2);
    uint32_t pair = pairs[bytes];
    stream->held |= (uint64_t)(pair >> 8) << (stream->number & 63);
    stream->number += pair;
}

INLINE void put_one(struct stream *stream, const struct code *code)
{
    uint8_t symbol = *--stream->end;
    stream->held |= (uint64_t)code->bits[symbol] << (stream->number & 63);
    stream->number += code->length[symbol];
}

/* Whole bytes to memory. */
INLINE void flush(struct stream *stream)
{
    memcpy(stream->to, &stream->held, 8);
    stream->to += stream->number >> 3 & 7;
    stream->held >>= stream->number & 56;
    stream->number &= 7;
}

/* Four codes of LONGEST bits and seven bits that wait fit into one word; mostly there is room for two more. */
INLINE void put_six(struct stream *stream, const struct coder *coder)
{
    put_pair(stream, coder->pair);
    put_pair(stream, coder->pair);
    if ((uint8_t)stream->number > 63 - 2 * LONGEST)
        flush(stream);
    put_pair(stream, coder->pair);
    flush(stream);
}

/* A mark behind the last code, which is where a decoder begins. */
INLINE uint8_t *end_stream(struct stream *stream)
{
    *stream->to = (uint8_t)(stream->held | 1u << stream->number);
    return stream->to + 1;
}

/* Two neighbours at a time, for one waits for its own last code all the time; the first is no shorter. Answers with
 * the second's end, and in `middle` with the first's. `to` has room for both at their longest. */
WIDEST static uint8_t *put_two_streams(const uint8_t *from, size_t first, size_t second, const struct coder *coder,
                                       uint8_t *to, uint8_t **middle)
{
    uint8_t *apart = to + first * LONGEST / 8 + 8;
    struct stream one = {from + first, to, 0, 0}, other = {from + first + second, apart, 0, 0};
    for (; other.end - from - first >= 6;) {
        put_six(&one, coder);
        put_six(&other, coder);
    }
    for (; one.end > from; flush(&one))
        put_one(&one, &coder->code);
    for (; other.end > from + first; flush(&other))
        put_one(&other, &coder->code);
    *middle = end_stream(&one);
    size_t size = (size_t)(end_stream(&other) - apart);
    memmove(*middle, apart, size);
    return *middle + size;
}

static uint8_t *put_number(uint8_t *to, uint64_t value, int bytes)
{
    for (int nth = 0; nth < bytes; nth++)
        to[nth] = (uint8_t)(value >> 8 * nth);
    return to + bytes;
}

/* The four streams of `size` bytes and where they begin. */
static uint8_t *put_streams(const uint8_t *from, size_t size, const struct coder *coder, uint8_t *to)
{
    size_t quarter = (size + 3) / 4;
    uint8_t *ends[4], *begin = to + JUMPS;
    ends[1] = put_two_streams(from, quarter, quarter, coder, begin, &ends[0]);
    ends[3] = put_two_streams(from + 2 * quarter, quarter, size - 3 * quarter, coder, ends[1], &ends[2]);
    for (int nth = 0; nth < 3; begin = ends[nth++])
        to = put_number(to, (uint64_t)(ends[nth] - begin), 2);
    return ends[3];
}

static uint8_t *put_header(uint8_t *to, int last, int type, size_t size)
{
    return put_number(to, (uint64_t)last | (uint64_t)type << 1 | (uint64_t)size << 3, HEADER);
}

/* Literals alone: no sequences follow. Answers with `to` where the bytes as they are take no more room. */
static uint8_t *put_compressed(const uint8_t *from, size_t size, int last, const struct coder *coder, int described,
                               uint8_t *to)
{
    uint8_t *begin = to + HEADER + LITERALS, *end = begin;
    if (!described)
        memcpy(end, coder->description, (size_t)coder->described), end += coder->described;
    end = put_streams(from, size, coder, end);
    size_t stored = (size_t)(end - begin);
    if (stored + LITERALS + 1 >= size)
        return to;
    *end++ = 0;
    put_header(to, last, COMPRESSED, (size_t)(end - to) - HEADER);
    uint64_t type = described ? TREELESS : COMPRESSED, long_form = 3;
    put_number(to + HEADER, type | long_form << 2 | (uint64_t)size << 4 | (uint64_t)stored << 22, LITERALS);
    return end;
}

static uint8_t *put_blocks(const uint8_t *from, size_t size, const struct coder *coder, uint8_t *to)
{
    int described = 0;
    for (size_t some; size > 0; from += some, size -= some) {
        some = size < BLOCK ? size : BLOCK;
        uint8_t *end = to;
        if (coder->described && some >= FEWEST)
            end = put_compressed(from, some, some == size, coder, described, to);
        if (end == to) {
            end = put_header(to, some == size, RAW, some);
            memcpy(end, from, some), end += some;
        } else
            described = 1;
        to = end;
    }
    return to;
}

/* Blocks of one byte that is repeated. */
static uint8_t *put_repeated(uint8_t symbol, size_t size, uint8_t *to)
{
    for (size_t some; size > 0; size -= some) {
        some = size < BLOCK ? size : BLOCK;
        to = put_header(to, some == size, REPEATED, some);
        *to++ = symbol;
    }
    return to;
}

/* One frame of `size` > 0 bytes; its end. */
static uint8_t *put_frame(const uint8_t *from, size_t size, int checksum, const struct coder *coder, uint8_t *to)
{
    to = put_number(to, 0xFD2FB528u, 4);
    to = put_number(to, checksum ? 0xA4 : 0xA0, 1); /* one segment, whose size takes four bytes */
    to = put_number(to, size, 4);
    to = coder->code.longest ? put_blocks(from, size, coder, to) : put_repeated(*from, size, to);
    return checksum ? put_number(to, xxh64(from, size), 4) : to;
}

static void make_coder(const uint8_t *from, size_t size, struct coder *coder)
{
    uint32_t count[SYMBOLS];
    count_bytes(from, size, count);
    struct occurring all = sort_by_count(count);
    coder->code.longest = 0;
    if (all.number == 1)
        return;
    coder->code = make_code(&all);
    coder->described = describe_code(&coder->code, coder->description);
    pair_codes(coder);
}

/* Bytes that frames of `size` bytes may take, and on the way there: streams lie apart while they are made. Their coder
 * lies behind them. */
static Py_ssize_t room_for(Py_ssize_t frames, Py_ssize_t size)
{
    Py_ssize_t block = size < BLOCK ? size : BLOCK;
    return frames * (size + FRAME + HEADER * (size / BLOCK + 1)) + block * LONGEST / 8 + 4 * SYMBOLS
           + (Py_ssize_t)(sizeof(struct coder) + _Alignof(struct coder));
}

static PyObject *room(PyObject *module, PyObject *arguments)
{
    Py_ssize_t frames, size;
    (void)module;
    return PyArg_ParseTuple(arguments, "nn", &frames, &size) ? PyLong_FromSsize_t(room_for(frames, size)) : NULL;
}

static PyObject *encode(PyObject *module, PyObject *arguments)
{
    enum { BYTES, SIZES, TO, ALL };
    Py_buffer at[ALL] = {{0}};
    int checksum;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*pw*w*", &at[BYTES], &checksum, &at[SIZES], &at[TO]))
        return NULL;
    Py_ssize_t frames = at[SIZES].len / 8, size = frames ? at[BYTES].len / frames : 0;
    int fit = size > 0 && size < INT32_MAX && holds(&at[BYTES], frames, size, 1) && holds(&at[SIZES], frames, 1, 8)
              && at[TO].len >= room_for(frames, size);
    uint8_t *to = at[TO].buf, *begin = to;
    if (fit) {
        Py_BEGIN_ALLOW_THREADS;
        uintptr_t behind = (uintptr_t)to + (size_t)at[TO].len - sizeof(struct coder);
        struct coder *coder = (struct coder *)(behind - behind % _Alignof(struct coder));
        make_coder(at[BYTES].buf, (size_t)at[BYTES].len, coder);
        for (Py_ssize_t nth = 0; nth < frames; nth++) {
            uint8_t *end = put_frame((const uint8_t *)at[BYTES].buf + nth * size, (size_t)size, checksum, coder,
                                     to);
            ((int64_t *)at[SIZES].buf)[nth] = end - to;
            to = end;
        }
        Py_END_ALLOW_THREADS;
    }
    Py_ssize_t used = to - begin;
    release(at, ALL);
    if (fit)
        return PyLong_FromSsize_t(used);
    PyErr_SetString(PyExc_ValueError, DO_NOT_FIT);
    return NULL;
}

static PyMethodDef methods[] = {
    {"encode", encode, METH_VARARGS, NULL},
    {"room", room, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "_huffman", .m_methods = methods};

PyMODINIT_FUNC PyInit__huffman(void)
{
    return PyModuleDef_Init(&definition);
}
