/* The checksum of models/shards.py: a polynomial down each column of 64-bit words, modulo 2^64. */
#include <stddef.h>
#include <stdint.h>

void fold(const uint64_t *data, ptrdiff_t rows, ptrdiff_t columns, uint64_t step, uint64_t *restrict sums) {
    for (ptrdiff_t r = 0; r < rows; r++, data += columns)
        for (ptrdiff_t c = 0; c < columns; c++) sums[c] = sums[c] * step + data[c];
}
