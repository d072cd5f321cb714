/* Column after column of a layer, for many rows at once: the twin of stacks/columns.py, which says what is computed.
 *
 * Rows do not depend on one another: TILE of them lie side by side, so that every operation is one on whole vectors and
 * a matrix that all rows share is read once for all of them. A tile's columns stay in the cache.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define TILE 64   /* rows; columns.py has the same number */
#define NEAR 16   /* rows that are turned into columns at once: a line of the cache */
#define COLUMNS 6 /* whose sums are in registers at once */
#ifdef __AVX512F__
#define WIDTH 16
#define VECTORS 4
#elif defined(__AVX__)
#define WIDTH 8 /* 16 registers: 12 sums, two of values, one of a number for all */
#define VECTORS 2
#else
#define WIDTH 4
#define VECTORS 4
#endif
#define LANES (WIDTH * VECTORS)
typedef float Vector __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

/* sums[c][r] = sum over k in from..to of matrix[c][k] * values[k][r]; `matrix` has a pointer per column. */
INLINE void products(const float *const *matrix, const float *values, ptrdiff_t from, ptrdiff_t to, float *sums) {
    for (int lane = 0; lane < TILE; lane += LANES) {
        Vector acc[COLUMNS][VECTORS];
        for (int c = 0; c < COLUMNS; c++)
            for (int v = 0; v < VECTORS; v++) acc[c][v] = (Vector){0};
        for (ptrdiff_t k = from; k < to; k++) {
            const Vector *x = (const Vector *)(values + k * TILE + lane);
#pragma GCC unroll 6
            for (int c = 0; c < COLUMNS; c++) {
                const float number = matrix[c][k];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) acc[c][v] += number * x[v];
            }
        }
        for (int c = 0; c < COLUMNS; c++)
            for (int v = 0; v < VECTORS; v++) ((Vector *)(sums + c * TILE + lane))[v] = acc[c][v];
    }
}

/* The lines of `matrix`, `stride` values long, of `count` columns from `start` on; the last stands in for missing ones. */
INLINE void lines(const float *matrix, ptrdiff_t stride, ptrdiff_t start, ptrdiff_t count, const float **found) {
    for (int c = 0; c < COLUMNS; c++) found[c] = matrix + (c < count ? start + c : start + count - 1) * stride;
}

/* Values of `columns` columns of TILE rows side by side, from rows that lie one after the other; missing rows are 0. */
static void gather(const float *rows, ptrdiff_t count, ptrdiff_t columns, const int64_t *order, float *tile) {
    for (ptrdiff_t first = 0; first < TILE; first += NEAR)
        for (ptrdiff_t j = 0; j < columns; j++) {
            const float *from = rows + (order ? order[j] : j);
            for (ptrdiff_t r = first; r < first + NEAR; r++) tile[j * TILE + r] = r < count ? from[r * columns] : 0.0f;
        }
}

static void scatter(const float *tile, ptrdiff_t count, ptrdiff_t columns, const int64_t *order, float *rows) {
    for (ptrdiff_t first = 0; first < count; first += NEAR) {
        const ptrdiff_t end = first + NEAR < count ? first + NEAR : count;
        for (ptrdiff_t j = 0; j < columns; j++)
            for (ptrdiff_t r = first; r < end; r++) rows[r * columns + order[j]] = tile[j * TILE + r];
    }
}

/* low + step * level, level an integer from least to most or, with a mantissa, a small float within them. */
typedef struct {
    const float *step, *low, *least, *most; /* (groups, wide), or TILE numbers that are the same for all groups */
    ptrdiff_t lows, leasts, mosts;          /* 1, or 0 where they are the same */
    int32_t mantissa, smallest, largest;    /* bits, -1 for integers; exponents of the lowest and the highest binade */
} Ruler;

INLINE void snap(const Ruler *g, ptrdiff_t at, const float *x, float *restrict snapped) {
    const float *step = g->step + at, *low = g->low + at * g->lows;
    const float *least = g->least + at * g->leasts, *most = g->most + at * g->mosts;
    for (int r = 0; r < TILE; r++) {
        const float inverse = step[r] == 0.0f ? 0.0f : 1.0f / step[r];
        float level = (x[r] - low[r]) * inverse;
        if (g->mantissa >= 0) {
            int32_t bits;
            memcpy(&bits, &level, 4);
            int32_t exponent = (bits >> 23) & 0xff;
            exponent = exponent < g->smallest + 127 ? g->smallest + 127 : exponent;
            exponent = exponent > g->largest + 127 ? g->largest + 127 : exponent;
            /* The distance of neighbours there is a power of two: made, like its inverse, of the exponent. */
            const int32_t distance = (exponent - g->mantissa) << 23, inverted = (254 + g->mantissa - exponent) << 23;
            float apart, per;
            memcpy(&apart, &distance, 4);
            memcpy(&per, &inverted, 4);
            level = rintf(level * per) * apart;
        } else {
            level = rintf(level);
        }
        level = level < least[r] ? least[r] : level;
        level = level > most[r] ? most[r] : level;
        snapped[r] = level * step[r] + low[r];
    }
}

/* What each weight is when it is its turn. weight, start, wanted: (rows, columns); start NULL: nothing is rounded before
 * its turn, and `takes` is 0 from the diagonal on. takes: (columns, columns) in the order of columns. places: the group
 * of each column in that order. wide: rows that the ruler has, from `first` on. tiles: room for 2 x columns x TILE. */
void in_turn(const float *weight, const float *start, ptrdiff_t rows, ptrdiff_t columns, const int64_t *order,
             const float *takes, const int64_t *places, const float *step, const float *low, const float *least,
             const float *most, ptrdiff_t lows, ptrdiff_t leasts, ptrdiff_t mosts, ptrdiff_t first, ptrdiff_t wide,
             int mantissa, int smallest, int largest, float *tiles, float *wanted) {
    const Ruler ruler = {step, low, least, most, lows, leasts, mosts, mantissa, smallest, largest};
    float *values = tiles, *errors = tiles + columns * TILE;
    for (ptrdiff_t begin = 0; begin < rows; begin += TILE) {
        const ptrdiff_t count = rows - begin < TILE ? rows - begin : TILE;
        gather(weight + begin * columns, count, columns, order, values);
        if (start) {
            gather(start + begin * columns, count, columns, order, errors);
            for (ptrdiff_t i = 0; i < columns * TILE; i++) errors[i] = values[i] - errors[i];
        } else {
            memset(errors, 0, (size_t)columns * TILE * 4);
        }
        for (ptrdiff_t at = 0; at < columns; at += COLUMNS) {
            const ptrdiff_t these = columns - at < COLUMNS ? columns - at : COLUMNS;
            const float *matrix[COLUMNS];
            float sums[COLUMNS * TILE], moves[COLUMNS * TILE], snapped[TILE];
            lines(takes, columns, at, these, matrix);
            products(matrix, errors, 0, start ? columns : at, sums);
            for (ptrdiff_t c = 0; c < these; c++) {
                float *x = values + (at + c) * TILE, *error = errors + (at + c) * TILE, before[TILE];
                memcpy(before, x, sizeof before);
                for (int r = 0; r < TILE; r++) x[r] += sums[c * TILE + r];
                for (ptrdiff_t d = 0; d < c; d++) /* what has moved since the sums were made */
                    for (int r = 0; r < TILE; r++) x[r] += matrix[c][at + d] * moves[d * TILE + r];
                snap(&ruler, places[at + c] * wide + first + begin, x, snapped);
                for (int r = 0; r < TILE; r++) {
                    const float now = before[r] - snapped[r];
                    moves[c * TILE + r] = now - error[r];
                    error[r] = now;
                }
            }
        }
        scatter(values, count, columns, order, wanted + begin * columns);
    }
}

/* F gram F' (rows, U, U) and F gram d' (rows, U) of rows whose errors are d, with U = parts x groups lines in F.
 *
 * parts[p]: (rows, columns / spans[p]), each value for spans[p] columns side by side. grams[p]: (columns, columns /
 * spans[p]), the Gram matrix with such columns added up. size: columns of a group, a multiple of every span except for
 * the last group. tiles: room for (parts + 1) x columns x TILE + U x TILE. */
void normal_equations(const float *error, const float *const *parts, const float *const *grams, const ptrdiff_t *spans,
                      int count, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t size, float *tiles, float *system,
                      float *slope) {
    const ptrdiff_t groups = (columns + size - 1) / size, unknowns = groups * count;
    float *values = tiles, *errors = tiles + (ptrdiff_t)count * columns * TILE, *line = errors + columns * TILE;
    for (ptrdiff_t begin = 0; begin < rows; begin += TILE) {
        const ptrdiff_t here = rows - begin < TILE ? rows - begin : TILE;
        gather(error + begin * columns, here, columns, NULL, errors);
        for (int p = 0; p < count; p++) {
            const ptrdiff_t apart = (columns + spans[p] - 1) / spans[p];
            gather(parts[p] + begin * apart, here, apart, NULL, values + p * columns * TILE);
        }
        for (int p = 0; p < count; p++)
            for (ptrdiff_t g = 0; g < groups; g++) {
                const ptrdiff_t end = (g + 1) * size < columns ? (g + 1) * size : columns;
                const ptrdiff_t from = g * size / spans[p], to = (end + spans[p] - 1) / spans[p];
                const ptrdiff_t stride = (columns + spans[p] - 1) / spans[p], u = p * groups + g;
                float sum[TILE] = {0};
                memset(line, 0, (size_t)unknowns * TILE * 4);
                for (ptrdiff_t start = 0; start < columns; start += COLUMNS) {
                    const ptrdiff_t these = columns - start < COLUMNS ? columns - start : COLUMNS;
                    const float *matrix[COLUMNS];
                    float sums[COLUMNS * TILE];
                    lines(grams[p], stride, start, these, matrix);
                    products(matrix, values + p * columns * TILE, from, to, sums);
                    for (ptrdiff_t c = 0; c < these; c++) {
                        const float *seen = sums + c * TILE, *x = errors + (start + c) * TILE;
                        for (int r = 0; r < TILE; r++) sum[r] += seen[r] * x[r];
                        for (int q = 0; q < count; q++) {
                            const float *other = values + (q * columns + (start + c) / spans[q]) * TILE;
                            float *to_add = line + (q * groups + (start + c) / size) * TILE;
                            for (int r = 0; r < TILE; r++) to_add[r] += seen[r] * other[r];
                        }
                    }
                }
                for (ptrdiff_t r = 0; r < here; r++) {
                    slope[(begin + r) * unknowns + u] = sum[r];
                    float *to_fill = system + ((begin + r) * unknowns + u) * unknowns;
                    for (ptrdiff_t v = 0; v < unknowns; v++) to_fill[v] = line[v * TILE + r];
                }
            }
    }
}
