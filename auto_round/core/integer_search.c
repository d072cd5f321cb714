/* Searches for the grids of integer codes: the twin of core/integer_search.py, one group after the other, so that a
 * group is read from memory once and tried from the cache.
 *
 * code = clamp(round(x / scale) + zero, 0, top); fake = scale * (code - zero). Scales are float32 values that their
 * storage can hold. Sums are vectorized, so a tie between two grids may go another way than in torch.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define RUN 256 /* values whose error is summed in float32 */
enum { FLOAT32, BFLOAT16, FLOAT16 };

/* What the codes can be, and how scales are stored. A symmetric grid has its zero in the middle. */
typedef struct {
    float top, least, least_zero;
    int32_t sym, storage;
} Spec;

typedef struct { float scale, zero; } Grid;
typedef struct { const float *x, *w; ptrdiff_t size; } Group;
typedef struct { Grid grid; float a, b; double error; } Best;

INLINE float middle(const Spec *s) { return (s->top + 1.0f) / 2.0f; }

INLINE float stored(float scale, const Spec *s) {
    if (s->storage == FLOAT16) {
        scale = (float)(_Float16)scale;
    } else if (s->storage == BFLOAT16) {
        uint32_t bits;
        memcpy(&bits, &scale, 4);
        bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000; /* to nearest, ties to even */
        memcpy(&scale, &bits, 4);
    }
    return scale < 0 ? fminf(scale, -s->least) : fmaxf(scale, s->least);
}

INLINE Grid symmetric(float extreme, const Spec *s) { return (Grid){stored(-extreme / middle(s), s), middle(s)}; }

INLINE Grid between(float low, float high, const Spec *s) {
    float scale = stored((high - low) / s->top, s);
    if (rintf(-low / scale) < s->least_zero) {
        low = -high / (s->top - 1.0f);
        scale = stored((high - low) / s->top, s);
    }
    return (Grid){scale, fminf(fmaxf(rintf(-low / scale), s->least_zero), s->top)};
}

/* code - zero. Comparisons and not fminf, which has an answer for NaN and so is not one instruction. */
INLINE float level(float x, float inverse, Grid g, float top) {
    const float l = rintf(x * inverse), low = -g.zero, high = top - g.zero;
    return l < low ? low : l > high ? high : l;
}

INLINE double error_of(Group v, Grid g, float top) {
    const float inverse = 1.0f / g.scale;
    double total = 0;
    for (ptrdiff_t at = 0; at < v.size; at += RUN) {
        const ptrdiff_t end = at + RUN < v.size ? at + RUN : v.size;
        float sum = 0;
        if (v.w != NULL) {
            for (ptrdiff_t i = at; i < end; i++) {
                const float d = level(v.x[i], inverse, g, top) * g.scale - v.x[i];
                sum += v.w[i] * d * d;
            }
        } else {
            for (ptrdiff_t i = at; i < end; i++) {
                const float d = level(v.x[i], inverse, g, top) * g.scale - v.x[i];
                sum += d * d;
            }
        }
        total += sum;
    }
    return total;
}

INLINE void offer(Best *best, Group v, Grid g, float a, float b, const Spec *s) {
    const double error = error_of(v, g, s->top);
    if (error < best->error) *best = (Best){g, a, b, error};
}

/* Least squares of the scale for the codes that there are. */
static void refit(Best *best, Group v, const Spec *s) {
    const Grid g = best->grid;
    const float inverse = 1.0f / g.scale;
    double power = 0, product = 0;
    for (ptrdiff_t at = 0; at < v.size; at += RUN) {
        const ptrdiff_t end = at + RUN < v.size ? at + RUN : v.size;
        float p = 0, q = 0;
        for (ptrdiff_t i = at; i < end; i++) {
            const float l = level(v.x[i], inverse, g, s->top), wl = v.w == NULL ? l : v.w[i] * l;
            p += wl * l;
            q += wl * v.x[i];
        }
        power += p;
        product += q;
    }
    const float scale = (float)(product / fmax(power, 1e-30));
    /* Where every code is the zero point, any scale fits as well: the old one stays. */
    if (power > 0 && scale != 0) offer(best, v, (Grid){stored(scale, s), g.zero}, best->a, best->b, s);
}

static void sweep_symmetric(Best *best, Group v, float low, float high, const Spec *s, const float *coarse, int ncoarse,
                            const float *fine, int nfine) {
    const float own = high >= -low ? high : low; /* a tie goes to the high end */
    offer(best, v, symmetric(own, s), 1.0f, 0, s);
    for (float sign = 1.0f; sign >= -1.0f; sign -= 2.0f)
        for (int i = 0; i < ncoarse; i++)
            offer(best, v, symmetric(own * (sign * coarse[i]), s), sign * coarse[i], 0, s);
    const float center = best->a;
    for (int i = 0; i < nfine; i++) offer(best, v, symmetric(own * (center + fine[i]), s), center + fine[i], 0, s);
}

static void sweep_asymmetric(Best *best, Group v, float low, float high, const Spec *s, const float *coarse, int ncoarse,
                             const float *fine, int nfine) {
    offer(best, v, between(low, high, s), 1.0f, 1.0f, s);
    for (int i = 0; i < ncoarse; i++)
        for (int j = 0; j < ncoarse; j++)
            offer(best, v, between(low * coarse[i], high * coarse[j], s), coarse[i], coarse[j], s);
    for (int i = 0; i < nfine; i++)
        for (int move = 0; move < 4; move++) {
            const float step = move % 2 ? fine[i] : -fine[i];
            const float a = best->a + (move < 2 ? step : 0.0f), b = best->b + (move < 2 ? 0.0f : step);
            offer(best, v, between(low * a, high * b, s), a, b, s);
        }
}

/* The grid of least weighted error of each of `groups` groups of `size` values `x`. w: their weights, or NULL.
 * coarse, fine: factors that are tried on the ends of the range, and steps around the best of them. */
void sweep(const float *x, const float *w, ptrdiff_t groups, ptrdiff_t size, const Spec *s, const float *coarse,
           int ncoarse, const float *fine, int nfine, int refits, float *scale, float *zero) {
    for (ptrdiff_t g = 0; g < groups; g++) {
        const Group v = {x + g * size, w == NULL ? NULL : w + g * size, size};
        float low = 0, high = 0; /* zero is always inside */
        for (ptrdiff_t i = 0; i < size; i++) {
            low = fminf(low, v.x[i]);
            high = fmaxf(high, v.x[i]);
        }
        Best best = {{0, 0}, 1, 1, INFINITY};
        (s->sym ? sweep_symmetric : sweep_asymmetric)(&best, v, low, high, s, coarse, ncoarse, fine, nfine);
        for (int i = 0; i < refits; i++) refit(&best, v, s);
        scale[g] = best.grid.scale;
        zero[g] = best.grid.zero;
    }
}

#define LANES 8
#define TOGETHER 7 /* products that have room in the registers */
#define MOST 14    /* candidates for a scale */
#define WIDEST 256 /* values of a group */
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4)));

/* y[c] = d[c] own for `count` rows d; own: (size, size). */
static void products(float d[][WIDEST], int count, const float *own, int size, float y[][WIDEST]) {
    for (int first = 0; first < count; first += TOGETHER)
        for (int at = 0; at < size; at += LANES) {
            Lanes sums[TOGETHER] = {0};
            for (int k = 0; k < size; k++) {
                const Lanes row = *(const Lanes *)(own + (ptrdiff_t)k * size + at);
                for (int c = 0; c < TOGETHER; c++) sums[c] += d[first + c][k] * row;
            }
            for (int c = 0; c < TOGETHER; c++) *(Lanes *)(y[first + c] + at) = sums[c];
        }
}

INLINE float dot(const float *a, const float *b, int size) {
    float sum = 0;
    for (int i = 0; i < size; i++) sum += a[i] * b[i];
    return sum;
}

/* The scale of least output error of one group in each of `rows` rows, given the errors of the rows' other groups.
 *
 * x: the group's values (rows, size); own: (size, size), the Gram matrix of its inputs; outside: (rows, size), what the
 * other groups add to the gradient. error: fake - x as it is, (rows, size), and scale: (rows); both are updated.
 * Tried are the least-squares scale of the codes and the present one times `factors`, at most MOST - 1 of them. */
void refine(const float *x, const float *own, const float *outside, ptrdiff_t rows, int size, const Spec *s,
            const float *factors, int nfactors, const float *zero, float *scale, float *error) {
    float d[MOST][WIDEST] = {{0}}, y[MOST][WIDEST], tried[MOST];
    for (ptrdiff_t r = 0; r < rows; r++) {
        const float *v = x + r * size, *o = outside + r * size;
        float *kept = error + r * size;
        const float old = scale[r];
        for (int i = 0; i < size; i++) {
            d[0][i] = kept[i];
            d[1][i] = (kept[i] + v[i]) / old; /* the codes less their zero point */
        }
        products(d, 2, own, size, y);
        float lowest = dot(y[0], kept, size) + 2.0f * dot(o, kept, size);
        tried[0] = (dot(y[1], v, size) - dot(o, d[1], size)) / fmaxf(dot(y[1], d[1], size), 1e-30f);
        for (int c = 0; c < nfactors; c++) tried[c + 1] = old * factors[c];
        for (int c = 0; c <= nfactors; c++) {
            /* A scale of zero or of the other sign would turn all codes around: the old one stands in for it. */
            tried[c] = stored(tried[c] * old > 0 ? tried[c] : old, s);
            const Grid g = {tried[c], zero[r]};
            const float inverse = 1.0f / g.scale;
            for (int i = 0; i < size; i++) d[c][i] = level(v[i], inverse, g, s->top) * g.scale - v[i];
        }
        products(d, nfactors + 1, own, size, y);
        int best = -1;
        for (int c = 0; c <= nfactors; c++) {
            const float cost = dot(y[c], d[c], size) + 2.0f * dot(o, d[c], size);
            if (cost < lowest) {
                lowest = cost;
                best = c;
            }
        }
        if (best >= 0) {
            scale[r] = tried[best];
            memcpy(kept, d[best], (size_t)size * sizeof(float));
        }
    }
}
