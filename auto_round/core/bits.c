/* Packing of codes of 2 to 8 bits into 32-bit words and back: the twins of core/bits.py and of AWQ's packing.
 *
 * Codes lie in `lines` of `count` bytes, `stride` bytes apart. Word j of line m is words[m * across + j * down], so the
 * same functions serve layouts that store the matrix as it is and those that store it transposed.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define TILE 16 /* lines at a time: their words fill a line of the cache when they lie side by side */

static inline uint64_t eight(const uint8_t *codes) {
    uint64_t x;
    memcpy(&x, codes, 8);
    return x;
}

/* Bytes of 4 bits each to half as many full ones: pairs, then pairs of pairs. */
static inline uint32_t nibbles(uint64_t x) {
    x = (x | x >> 4) & 0x00ff00ff00ff00ffu;
    x = (x | x >> 8) & 0x0000ffff0000ffffu;
    return (uint32_t)(x | x >> 16);
}

static inline uint32_t crumbs(uint64_t x) {
    x = (x | x >> 6) & 0x000f000f000f000fu;
    x = (x | x >> 12) & 0x000000ff000000ffu;
    return (uint32_t)((x | x >> 24) & 0xffff);
}

static inline uint32_t bytes(const uint8_t *codes) {
    uint32_t word;
    memcpy(&word, codes, 4);
    return word;
}

/* Widths that divide a byte. `each` words of a line, of `n` lines. */
#define EVEN(NAME, CODES, WORD)                                                                              \
    static void NAME(const uint8_t *codes, int n, ptrdiff_t each, ptrdiff_t stride, uint32_t *words,        \
                     ptrdiff_t across, ptrdiff_t down) {                                                     \
        for (ptrdiff_t j = 0; j < each; j++)                                                                 \
            for (int m = 0; m < n; m++) {                                                                    \
                const uint8_t *at = codes + m * stride + j * CODES;                                          \
                words[m * across + j * down] = WORD;                                                         \
            }                                                                                                \
    }
EVEN(pack2, 16, crumbs(eight(at)) | crumbs(eight(at + 8)) << 16)
EVEN(pack4, 8, nibbles(eight(at)))
EVEN(pack8, 4, bytes(at))

static void pack_line(const uint8_t *codes, int bits, ptrdiff_t each, uint32_t *words, ptrdiff_t down) {
    uint64_t rest = 0; /* `held` bits of codes that were read and not written */
    int held = 0;
    for (ptrdiff_t j = 0; j < each; j++, rest >>= 32, held -= 32) {
        for (; held < 32; held += bits) rest |= (uint64_t)*codes++ << held;
        words[j * down] = (uint32_t)rest;
    }
}

void pack(const uint8_t *codes, ptrdiff_t lines, ptrdiff_t count, ptrdiff_t stride, int bits, uint32_t *words,
          ptrdiff_t across, ptrdiff_t down) {
    const ptrdiff_t each = count * bits / 32;
    for (ptrdiff_t m = 0; m < lines; m += TILE, codes += TILE * stride, words += TILE * across) {
        const int n = (int)(lines - m < TILE ? lines - m : TILE);
        if (bits == 2) pack2(codes, n, each, stride, words, across, down);
        else if (bits == 4) pack4(codes, n, each, stride, words, across, down);
        else if (bits == 8) pack8(codes, n, each, stride, words, across, down);
        else
            for (int i = 0; i < n; i++) pack_line(codes + i * stride, bits, each, words + i * across, down);
    }
}

/* The inverse of `nibbles`, and of it for pairs of bits. */
static inline uint64_t from_nibbles(uint64_t x) {
    x = (x | x << 16) & 0x0000ffff0000ffffu;
    x = (x | x << 8) & 0x00ff00ff00ff00ffu;
    return (x | x << 4) & 0x0f0f0f0f0f0f0f0fu;
}

static inline uint64_t from_crumbs(uint64_t x) {
    x = (x | x << 24) & 0x000000ff000000ffu;
    x = (x | x << 12) & 0x000f000f000f000fu;
    return (x | x << 6) & 0x0303030303030303u;
}

/* The codes of one word, 32 / bits of them. */
static inline void spread(uint32_t word, int bits, uint8_t *to) {
    if (bits == 8) {
        memcpy(to, &word, 4);
    } else if (bits == 4) {
        const uint64_t x = from_nibbles(word);
        memcpy(to, &x, 8);
    } else {
        const uint64_t low = from_crumbs(word & 0xffff), high = from_crumbs(word >> 16);
        memcpy(to, &low, 8), memcpy(to + 8, &high, 8);
    }
}

static void unpack_line(const uint32_t *words, int bits, ptrdiff_t each, ptrdiff_t down, uint8_t *codes) {
    const uint64_t mask = (1u << bits) - 1;
    uint64_t rest = 0;
    int held = 0;
    for (ptrdiff_t j = 0; j < each; j++) {
        rest |= (uint64_t)words[j * down] << held;
        for (held += 32; held >= bits; held -= bits, rest >>= bits) *codes++ = (uint8_t)(rest & mask);
    }
}

void unpack(const uint32_t *words, ptrdiff_t lines, ptrdiff_t count, ptrdiff_t across, ptrdiff_t down, int bits,
            uint8_t *codes) {
    const ptrdiff_t each = count * bits / 32;
    const int even = bits == 2 || bits == 4 || bits == 8;
    for (ptrdiff_t m = 0; m < lines; m += TILE, codes += TILE * count, words += TILE * across) {
        const int n = (int)(lines - m < TILE ? lines - m : TILE);
        if (even) {
            for (ptrdiff_t j = 0; j < each; j++)
                for (int i = 0; i < n; i++) spread(words[i * across + j * down], bits, codes + i * count + j * 32 / bits);
        } else {
            for (int i = 0; i < n; i++) unpack_line(words + i * across, bits, each, down, codes + i * count);
        }
    }
}

/* AWQ: word (k, j) has the codes k of lines 8 j to 8 j + 7, the even ones below. words: (count, lines / 8). */
static const int ORDER[8] = {0, 2, 4, 6, 1, 3, 5, 7};

#define RUN 64

void pack_awq(const uint8_t *codes, ptrdiff_t lines, ptrdiff_t count, ptrdiff_t stride, uint32_t *words) {
    uint32_t tile[TILE][RUN];
    const ptrdiff_t width = lines / 8;
    for (ptrdiff_t j = 0; j < width; j += TILE) {
        const int across = (int)(width - j < TILE ? width - j : TILE);
        for (ptrdiff_t k = 0; k < count; k += RUN) {
            const int down = (int)(count - k < RUN ? count - k : RUN);
            memset(tile, 0, sizeof tile);
            for (int m = 0; m < across; m++)
                for (int i = 0; i < 8; i++) {
                    const uint8_t *line = codes + ((j + m) * 8 + ORDER[i]) * stride + k;
                    for (int d = 0; d < down; d++) tile[m][d] |= (uint32_t)line[d] << (4 * i);
                }
            for (int d = 0; d < down; d++)
                for (int m = 0; m < across; m++) words[(k + d) * width + j + m] = tile[m][d];
        }
    }
}

void unpack_awq(const uint32_t *words, ptrdiff_t lines, ptrdiff_t count, uint8_t *codes) {
    const ptrdiff_t width = lines / 8;
    for (ptrdiff_t j = 0; j < width; j += TILE) {
        const int across = (int)(width - j < TILE ? width - j : TILE);
        for (ptrdiff_t k = 0; k < count; k++)
            for (int m = 0; m < across; m++)
                for (int i = 0; i < 8; i++)
                    codes[((j + m) * 8 + ORDER[i]) * count + k] = words[k * width + j + m] >> (4 * i) & 0xf;
    }
}
