/* Searches for the grids of ggml's block types: the twin of core/fitting.py in C, with more candidates.
 *
 * Rows are cut into groups of K values, and S groups into a super-block. The error is sum(w * (fake - x)^2), where w
 * is the importance of a column. Levels q run from lo to hi; fake = step * q + low. All results are float32 values
 * that are exact in the file's precision.
 */
#include <math.h>
#include <stddef.h>

#define INLINE static inline __attribute__((always_inline))
#define MOST 16 /* groups in a super-block */
#define KEPT 3  /* super-scales that are refined exactly */

typedef struct { float w, wx, wxx, wq, wqq, wqx; } Moments;

INLINE float half(float x) { return (float)(_Float16)x; }
INLINE float inverse(float x) { return x == 0.0f ? 0.0f : 1.0f / x; }
INLINE float clampf(float x, float lo, float hi) { return x < lo ? lo : x > hi ? hi : x; }
INLINE float level(float x, float low, float inv, float lo, float hi) { return clampf(rintf((x - low) * inv), lo, hi); }

INLINE Moments base(const float *x, const float *w, int K) {
    float a = 0, b = 0, c = 0;
    for (int i = 0; i < K; i++) { a += w[i]; b += w[i] * x[i]; c += w[i] * x[i] * x[i]; }
    return (Moments){a, b, c, 0, 0, 0};
}

INLINE void levels(Moments *m, const float *x, const float *w, int K, float step, float low, float lo, float hi) {
    const float inv = inverse(step);
    float a = 0, b = 0, c = 0;
    for (int i = 0; i < K; i++) {
        const float q = level(x[i], low, inv, lo, hi), wq = w[i] * q;
        a += wq; b += wq * q; c += wq * x[i];
    }
    m->wq = a; m->wqq = b; m->wqx = c;
}

INLINE float exact(const float *x, const float *w, int K, float step, float low, float lo, float hi) {
    const float inv = inverse(step);
    float error = 0;
    for (int i = 0; i < K; i++) {
        const float d = step * level(x[i], low, inv, lo, hi) + low - x[i];
        error += w[i] * d * d;
    }
    return error;
}

INLINE float predicted(const Moments *m, float step, float low) {
    return m->wxx + step * (step * m->wqq - 2 * m->wqx) + low * (low * m->w + 2 * step * m->wq - 2 * m->wx);
}

INLINE float best_step(const Moments *m, float low) { return m->wqq > 0 ? (m->wqx - low * m->wq) / m->wqq : 0; }

/* Least squares of step and low; low is at most `most`. */
INLINE void line(const Moments *m, float most, float *step, float *low) {
    const float det = m->w * m->wqq - m->wq * m->wq;
    if (det > 1e-6f * m->w * m->wqq) {
        *step = (m->w * m->wqx - m->wx * m->wq) / det;
        *low = (m->wqq * m->wx - m->wq * m->wqx) / det;
    } else {
        *step = 0;
        *low = m->w > 0 ? m->wx / m->w : 0;
    }
    if (*low > most) { *low = most; *step = best_step(m, most); }
}

typedef struct { float step, low, error; Moments m; } Grid;

INLINE void offer_line(Grid *g, const float *x, const float *w, int K, float step, float low, float most, float hi) {
    Moments m = g->m;
    float s, l;
    levels(&m, x, w, K, step, low, 0, hi);
    line(&m, most, &s, &l);
    const float e = predicted(&m, s, l);
    if (e < g->error) *g = (Grid){s, l, e, m};
}

INLINE Grid fit_line(const float *x, const float *w, int K, float most, float hi, int sweeps, float reach, int shifts) {
    float low = x[0], high = x[0];
    for (int i = 1; i < K; i++) { low = fminf(low, x[i]); high = fmaxf(high, x[i]); }
    low = fminf(low, most);
    const float spread = fmaxf(high - low, 0);
    Grid g = {spread / hi, low, INFINITY, base(x, w, K)};
    for (int j = 0; j <= shifts; j++)
        for (int i = 0; i < sweeps; i++) {
            const float from = low + j * 0.1f * spread;
            const float step = (high - from) / (hi - reach + 2 * reach * i / (sweeps - 1));
            offer_line(&g, x, w, K, step, fminf(from, most), most, hi);
        }
    for (int i = 0; i < 3; i++) offer_line(&g, x, w, K, g.step, g.low, most, hi);
    return g;
}

/* Without an offset, the error of the best step falls with wqx^2 / wqq, which is `gain`. */
INLINE void offer_step(Grid *g, float *gain, const float *x, const float *w, int K, float step, float lo, float hi) {
    const float inv = inverse(step);
    float b = 0, c = 0;
    for (int i = 0; i < K; i++) {
        const float q = clampf(rintf(x[i] * inv), lo, hi), wq = w[i] * q;
        b += wq * q; c += wq * x[i];
    }
    if (c * c > *gain * b) { *gain = c * c / b; g->step = c / b; g->m.wqq = b; g->m.wqx = c; }
}

INLINE Grid fit_step(const float *x, const float *w, int K, float lo, float hi, int sweeps, float from, float to) {
    float low = x[0], high = x[0];
    for (int i = 1; i < K; i++) { low = fminf(low, x[i]); high = fmaxf(high, x[i]); }
    const float extreme = high > -low ? high : low;
    Grid g = {0, 0, 0, base(x, w, K)};
    float gain = 0;
    for (int i = 0; i < sweeps; i++) {
        const float d = from + (to - from) * i / (sweeps - 1);
        offer_step(&g, &gain, x, w, K, extreme / (lo + d), lo, hi);
        offer_step(&g, &gain, x, w, K, extreme / (-lo - d), lo, hi);
    }
    for (int i = 0; i < 2; i++) offer_step(&g, &gain, x, w, K, g.step, lo, hi);
    return g;
}

/* One super-block in storage precision. */
typedef struct { float d, dmin, s[MOST], m[MOST], each[MOST], error; } Super;
typedef struct { int K, S; float lo, hi, s_lo, s_hi, m_hi; } Kind;

INLINE float low_of(const Super *p, int j) { return -(p->dmin * p->m[j]); }

/* Neighbouring integers of every group, on the exact error. */
INLINE void neighbours(Super *p, const float *x, const float *w, Kind k, int reach) {
    p->error = 0;
    for (int j = 0; j < k.S; j++) {
        const float *xj = x + j * k.K, *wj = w + j * k.K;
        const float s0 = p->s[j], m0 = p->m[j];
        float best = exact(xj, wj, k.K, p->d * s0, low_of(p, j), k.lo, k.hi), s1 = s0, m1 = m0;
        const int across = k.m_hi > 0 ? reach : 0;
        for (int dm = -across; dm <= across; dm++)
            for (int ds = -reach; ds <= reach; ds++) {
                const float s = s0 + ds, m = m0 + dm;
                if (s < k.s_lo || s > k.s_hi || m < 0 || m > k.m_hi || (ds == 0 && dm == 0)) continue;
                const float e = exact(xj, wj, k.K, p->d * s, -(p->dmin * m), k.lo, k.hi);
                if (e < best) { best = e; s1 = s; m1 = m; }
            }
        p->s[j] = s1; p->m[j] = m1; p->each[j] = best; p->error += best;
    }
}

/* Least squares of both super-scales for the levels that the integers give; kept when the exact error falls. */
INLINE void refit(Super *p, const float *x, const float *w, Kind k) {
    float dd = 0, dx = 0, mm = 0, mx = 0, dm = 0;
    for (int j = 0; j < k.S; j++) {
        Moments m = base(x + j * k.K, w + j * k.K, k.K);
        const float s = p->s[j], o = p->m[j];
        levels(&m, x + j * k.K, w + j * k.K, k.K, p->d * s, low_of(p, j), k.lo, k.hi);
        dd += s * s * m.wqq; dx += s * m.wqx; mm += o * o * m.w; mx -= o * m.wx; dm -= s * o * m.wq;
    }
    Super q = *p;
    const float det = dd * mm - dm * dm;
    if (det > 1e-6f * dd * mm && mm > 0) {
        q.d = half((mm * dx - dm * mx) / det);
        q.dmin = half(fmaxf((dd * mx - dm * dx) / det, 0));
    } else if (dd > 0) {
        q.d = half(dx / dd);
    }
    q.error = 0;
    for (int j = 0; j < k.S; j++) {
        q.each[j] = exact(x + j * k.K, w + j * k.K, k.K, q.d * q.s[j], low_of(&q, j), k.lo, k.hi);
        q.error += q.each[j];
    }
    if (q.error < p->error) *p = q;
}

INLINE float widest(const float *x, int n, float lo, float hi) {
    float low = x[0], high = x[0];
    for (int i = 1; i < n; i++) { low = fminf(low, x[i]); high = fmaxf(high, x[i]); }
    if (lo < 0) return (high > -low ? high : low) / lo;
    return high / hi;
}

INLINE void keep(Super *best, const Super *p) {
    for (int i = 0; i < KEPT; i++)
        if (p->error < best[i].error) {
            for (int j = KEPT - 1; j > i; j--) best[j] = best[j - 1];
            best[i] = *p;
            return;
        }
}

INLINE Super fit_super(const float *x, const float *w, Kind k, const Grid *g, int rounds, int reach) {
    float step[MOST], off[MOST];
    for (int j = 0; j < k.S; j++) { step[j] = g[j].step; off[j] = -g[j].low; }
    const float d0 = widest(step, k.S, k.s_lo, k.s_hi), m0 = k.m_hi > 0 ? widest(off, k.S, 0, k.m_hi) : 0;
    Super best[KEPT], p;
    for (int i = 0; i < KEPT; i++) best[i].error = INFINITY;
    for (int a = 0; a < (k.m_hi > 0 ? 9 : 1); a++) {
        p.dmin = half(m0 * (k.m_hi > 0 ? 0.84f + 0.035f * a : 1));
        const float minv = inverse(p.dmin);
        float wanted[MOST];
        for (int j = 0; j < k.S; j++) {
            p.m[j] = k.m_hi > 0 ? clampf(rintf(off[j] * minv), 0, k.m_hi) : 0;
            wanted[j] = best_step(&g[j].m, low_of(&p, j));
        }
        for (int b = 0; b < 13; b++) {
            p.d = half(d0 * (0.82f + 0.02f * b));
            const float inv = inverse(p.d);
            p.error = 0;
            for (int j = 0; j < k.S; j++) {
                p.s[j] = clampf(rintf(wanted[j] * inv), k.s_lo, k.s_hi);
                p.error += predicted(&g[j].m, p.d * p.s[j], low_of(&p, j));
            }
            keep(best, &p);
        }
    }
    Super *winner = &best[0];
    for (int i = 0; i < KEPT; i++) {
        if (!(best[i].error < INFINITY)) continue;
        for (int r = 0; r < rounds; r++) {
            neighbours(&best[i], x, w, k, r == 0 ? reach : 1);
            refit(&best[i], x, w, k);
        }
        if (best[i].error < winner->error || i == 0) winner = &best[i];
    }
    return *winner;
}

INLINE void super_rows(const float *x, const float *w, ptrdiff_t rows, ptrdiff_t columns, float *d, float *dmin,
                       float *s, float *m, Kind k, int sweeps, float from, float to, int shifts, int rounds, int reach) {
    const ptrdiff_t size = (ptrdiff_t)k.K * k.S;
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t c = 0; c < columns; c += size) {
            const float *xb = x + r * columns + c, *wb = w + c;
            Grid g[MOST];
            for (int j = 0; j < k.S; j++)
                g[j] = k.m_hi > 0 ? fit_line(xb + j * k.K, wb + j * k.K, k.K, 0, k.hi, sweeps, to, shifts)
                                  : fit_step(xb + j * k.K, wb + j * k.K, k.K, k.lo, k.hi, sweeps, from, to);
            const Super p = fit_super(xb, wb, k, g, rounds, reach);
            *d++ = p.d;
            *dmin++ = p.dmin;
            for (int j = 0; j < k.S; j++) { *s++ = p.s[j]; *m++ = p.m[j]; }
        }
}

#define SUPER(name, ...) \
    void name(const float *x, const float *w, ptrdiff_t rows, ptrdiff_t columns, float *d, float *dmin, float *s, \
              float *m) { super_rows(x, w, rows, columns, d, dmin, s, m, __VA_ARGS__); }

/*            group, groups, levels, sub-scales, sub-offset    candidates: count, from, to, shifts; rounds, reach */
SUPER(q2_k, ((Kind){16, 16, 0, 3, 0, 15, 15}), 8, 0, 1.4f, 2, 2, 1)
SUPER(q3_k, ((Kind){16, 16, -4, 3, -32, 31, 0}), 8, -1.2f, 2.0f, 0, 2, 2)
SUPER(q4_k, ((Kind){32, 8, 0, 15, 0, 63, 63}), 11, 0, 2.5f, 1, 2, 1)
SUPER(q5_k, ((Kind){32, 8, 0, 31, 0, 63, 63}), 11, 0, 3.0f, 1, 2, 1)
SUPER(q6_k, ((Kind){16, 16, -32, 31, -128, 127, 0}), 6, -2.0f, 5.0f, 0, 1, 1)

/* Types of one level: float16 scale, and low where `line` is set. */
INLINE void plain_rows(const float *x, const float *w, ptrdiff_t rows, ptrdiff_t columns, float *scale, float *low,
                       float lo, float hi, int sweeps, float from, float to, int shifts) {
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t c = 0; c < columns; c += 32) {
            const float *xb = x + r * columns + c, *wb = w + c;
            Grid g = low ? fit_line(xb, wb, 32, INFINITY, hi, sweeps, to, shifts)
                         : fit_step(xb, wb, 32, lo, hi, sweeps, from, to);
            float l = low ? half(g.low) : 0, s = half(best_step(&g.m, l));
            float error = exact(xb, wb, 32, s, l, lo, hi);
            for (int i = 0; i < 3; i++) {
                float s1, l1 = 0;
                levels(&g.m, xb, wb, 32, s, l, lo, hi);
                if (low) { line(&g.m, INFINITY, &s1, &l1); l1 = half(l1); }
                s1 = half(best_step(&g.m, l1));
                const float e = exact(xb, wb, 32, s1, l1, lo, hi);
                if (e >= error) break;
                error = e; s = s1; l = l1;
            }
            *scale++ = s;
            if (low) *low++ = l;
        }
}

#define PLAIN(name, ...) \
    void name(const float *x, const float *w, ptrdiff_t rows, ptrdiff_t columns, float *scale, float *low) { \
        plain_rows(x, w, rows, columns, scale, low, __VA_ARGS__); }

PLAIN(q4_0, -8, 7, 17, -3.0f, 5.5f, 0)
PLAIN(q5_0, -16, 15, 17, -3.0f, 6.0f, 0)
PLAIN(q8_0, -127, 127, 2, 0.0f, 1.0f, 0)
PLAIN(q4_1, 0, 15, 17, 0, 2.0f, 1)
PLAIN(q5_1, 0, 31, 17, 0, 2.6f, 1)
