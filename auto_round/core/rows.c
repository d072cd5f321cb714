/* What rounding costs per weight: the range of each group, and its codes. The twins of a few lines of torch that make
 * a pass over memory for every operation, bit for bit: the same operations in the same order on float32.
 *
 * A matrix has `rows` rows of `columns` values, `stride` values apart, cut into groups of `size`; the last group of a
 * row is filled up with zeros. Groups are numbered along the rows.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

#define RUN 1024 /* values that are float32 at a time: they stay in the first-level cache */
enum { FLOAT32, BFLOAT16, FLOAT16 };
static const int WIDTH[] = {4, 2, 2};

static void widen(const void *from, int kind, ptrdiff_t n, float *restrict to) {
    if (kind == FLOAT32) {
        memcpy(to, from, (size_t)n * 4);
    } else if (kind == BFLOAT16) {
        const uint16_t *restrict x = from;
        uint32_t *restrict bits = (uint32_t *)to;
        for (ptrdiff_t i = 0; i < n; i++) bits[i] = (uint32_t)x[i] << 16;
    } else {
        const _Float16 *x = from;
        ptrdiff_t i = 0;
#ifdef __F16C__
        for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
#endif
        for (; i < n; i++) to[i] = (float)x[i];
    }
}

/* Integers in the order of the floats with these bits; it is its own inverse. */
static int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
#define INFINITE 0x7f800000

/* Smallest and largest value of every group. 1 when a value is NaN or infinite: what torch makes of those is for torch. */
int ranges(const void *w, int kind, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t stride, ptrdiff_t size, float *low,
           float *high) {
    float x[RUN];
    for (ptrdiff_t r = 0; r < rows; r++) {
        const char *row = (const char *)w + r * stride * WIDTH[kind];
        for (ptrdiff_t begin = 0; begin < columns; begin += size) {
            const ptrdiff_t end = begin + size < columns ? begin + size : columns;
            int32_t least = INT32_MAX, most = INT32_MIN;
            for (ptrdiff_t at = begin; at < end; at += RUN) {
                const ptrdiff_t n = end - at < RUN ? end - at : RUN;
                widen(row + at * WIDTH[kind], kind, n, x);
                for (ptrdiff_t i = 0; i < n; i++) {
                    int32_t key;
                    memcpy(&key, x + i, 4);
                    key = ordered(key);
                    least = key < least ? key : least;
                    most = key > most ? key : most;
                }
            }
            if (most >= INFINITE || least <= ordered((int32_t)(0x80000000u | INFINITE))) return 1;
            least = ordered(least), most = ordered(most);
            memcpy(low++, &least, 4);
            memcpy(high++, &most, 4);
        }
    }
    return 0;
}

static float within(float x, float lo, float hi) { return x < lo ? lo : x > hi ? hi : x; }

/* clamp(round(w / scale) + zero, 0, top), padding included. `zeros`: one for every group, or NULL for `middle`. */
void integers(const void *w, int kind, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t stride, ptrdiff_t size,
              const float *scales, const float *zeros, float middle, float top, uint8_t *restrict codes) {
    float x[RUN];
    for (ptrdiff_t r = 0; r < rows; r++) {
        const char *row = (const char *)w + r * stride * WIDTH[kind];
        for (ptrdiff_t begin = 0; begin < columns; begin += size) {
            const float scale = *scales++, zero = zeros ? *zeros++ : middle;
            const ptrdiff_t end = begin + size < columns ? begin + size : columns;
            for (ptrdiff_t at = begin; at < end; at += RUN) {
                const ptrdiff_t n = end - at < RUN ? end - at : RUN;
                widen(row + at * WIDTH[kind], kind, n, x);
                for (ptrdiff_t i = 0; i < n; i++)
                    codes[i] = (uint8_t)(int32_t)within(rintf(x[i] / scale) + zero, 0.0f, top);
                codes += n;
            }
            for (ptrdiff_t i = end; i < begin + size; i++) *codes++ = (uint8_t)(int32_t)within(zero, 0.0f, top);
        }
    }
}

/* Codes of small floats, sign | exponent | mantissa: the nearest to w / scale, ties to even, saturating.
 *
 * mantissa: bits of it. least: exponent of the smallest normal value. largest: code of the largest value. sign: the
 * sign's bit, 0 for types without. Padding is +0. */
void elements(const void *w, int kind, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t stride, ptrdiff_t size,
              const float *scales, int mantissa, int least, int largest, int sign, uint8_t *restrict codes) {
    float x[RUN];
    const int32_t lowest = least + 127;
    const float most = (float)(2 << mantissa);
    for (ptrdiff_t r = 0; r < rows; r++) {
        const char *row = (const char *)w + r * stride * WIDTH[kind];
        for (ptrdiff_t begin = 0; begin < columns; begin += size) {
            const float scale = *scales++;
            const ptrdiff_t end = begin + size < columns ? begin + size : columns;
            for (ptrdiff_t at = begin; at < end; at += RUN) {
                const ptrdiff_t n = end - at < RUN ? end - at : RUN;
                widen(row + at * WIDTH[kind], kind, n, x);
                for (ptrdiff_t i = 0; i < n; i++) {
                    const float ratio = x[i] / scale;
                    int32_t bits, code;
                    memcpy(&bits, &ratio, 4);
                    int32_t exponent = (bits >> 23) & 0xff;
                    exponent = exponent < lowest ? lowest : exponent;
                    /* 1 / the distance of neighbours: a power of two, made of its exponent. */
                    const int32_t inverse = (254 + mantissa - exponent) << 23;
                    float per;
                    memcpy(&per, &inverse, 4);
                    /* In units of that distance; one too many for the binade gives the code of the next, as it should. */
                    float units = rintf(fabsf(ratio) * per);
                    units = units > most ? most : units; /* of infinite ratios; they come from the smallest scales */
                    code = ((exponent - lowest) << mantissa) + (int32_t)units;
                    code = code > largest ? largest : code;
                    codes[i] = (uint8_t)(code | ((bits >> 31) & sign));
                }
                codes += n;
            }
            for (ptrdiff_t i = end; i < begin + size; i++) *codes++ = 0;
        }
    }
}
