/* Fake quantize and histograms on the CPU: the range of a tensor, its rounding to a grid of integers, and the gradient.
 *
 * Values are those of torch.fake_quantize_per_tensor_affine and ..._per_channel_affine, bit for bit:
 *     q = round(x * (1 / scale)) + zero_point,    y = (clamp(q, quant_min, quant_max) - zero_point) * scale,
 * all in float32, rounding half to even, NaN to quant_min. The gradient is that of y if q is within the range, else 0
 * (the straight-through estimator of Bengio et al. 2013, https://arxiv.org/abs/1308.3432).
 *
 * Compile without contraction of a * b + c, which would round once where torch rounds twice. Tensors are dense; whoever
 * calls holds the memory, and does not call for 0 elements.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Below this number of elements a second thread costs more than it saves (torch's own grain size). */
#define GRAIN 32768
/* Values whose bins are found at a time. */
#define BLOCK 256

/* How floats become integers and back. */
typedef struct {
    int32_t quant_min, quant_max;
    int32_t symmetric;             /* zero_point is `middle`, and the range is as wide on both sides */
    int32_t middle;
    float eps;                     /* the least scale */
    float averaging;               /* weight of the newest range in the average; 1: no memory */
    float least, most;             /* x is clamped to these first, as ReLU and hardtanh do; -inf and inf: not */
} Grid;

/* NaN stays. */
static inline float clamp(float x, float least, float most) {
    x = x < least ? least : x;
    return x > most ? most : x;
}

typedef uint16_t bf16;

static inline float from_float(float x) { return x; }
static inline float from_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}
static inline float to_float(float x) { return x; }
/* Rounds half to even, as c10::BFloat16 does. What is rounded here is never NaN, except a gradient. */
static inline bf16 to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7FC0;
    return (bf16)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

/* The scale and the zero point of a range, by the formulas of torch's observers (UniformQuantizationObserverBase). */
static void qparams(const Grid *grid, float low, float high, float *scale, int32_t *zero_point) {
    float steps = (float)(grid->quant_max - grid->quant_min);
    if (!(low <= high)) { /* nothing was seen yet */
        *scale = 1;
        *zero_point = 0;
        return;
    }
    if (low > 0) low = 0;
    if (high < 0) high = 0;
    if (grid->symmetric) {
        float most = -low > high ? -low : high;
        float s = most / (steps / 2);
        *scale = s > grid->eps ? s : grid->eps;
        *zero_point = grid->middle;
        return;
    }
    float s = (high - low) / steps;
    s = s > grid->eps ? s : grid->eps;
    float z = (float)grid->quant_min - nearbyintf(low / s);
    if (z < (float)grid->quant_min) z = (float)grid->quant_min;
    if (z > (float)grid->quant_max) z = (float)grid->quant_max;
    *scale = s;
    *zero_point = (int32_t)z;
}

/* Move the average towards a range. The first range is taken as it is, and one that is not finite not at all. */
static void follow(const Grid *grid, const float *range, float *low, float *high) {
    if (!(isfinite(range[0]) && isfinite(range[1]))) return;
    if (grid->averaging == 1.0f || isinf(*low)) {
        *low = range[0];
        *high = range[1];
        return;
    }
    *low = *low + grid->averaging * (range[0] - *low);
    *high = *high + grid->averaging * (range[1] - *high);
}

#define DEFINE(T, LOAD, STORE, SUFFIX)                                                                                \
                                                                                                                      \
/* Widen `range` (min, max) to what x shows; NaN, where x has one that is not finite. */                              \
static void widen_##SUFFIX(const T *x, int64_t n, const Grid *grid, float *range) {                                   \
    float low = INFINITY, high = -INFINITY, check = 0, least = grid->least, most = grid->most;                        \
    int64_t i;                                                                                                        \
    _Pragma("omp simd reduction(min:low) reduction(max:high) reduction(+:check)")                                     \
    for (i = 0; i < n; i++) {                                                                                         \
        float v = clamp(LOAD(x[i]), least, most);                                                                     \
        low = v < low ? v : low;                                                                                      \
        high = v > high ? v : high;                                                                                   \
        check += v * 0.0f; /* NaN from then on */                                                                     \
    }                                                                                                                 \
    range[0] = (low < range[0] ? low : range[0]) + check;                                                             \
    range[1] = (high > range[1] ? high : range[1]) + check;                                                           \
}                                                                                                                     \
                                                                                                                      \
static int round_##SUFFIX(const T *x, T *y, uint8_t *mask, int64_t n, const Grid *grid, float scale, int32_t zero) {  \
    float inverse = 1.0f / scale, offset = (float)zero, least = grid->least, most = grid->most;                       \
    float first = (float)grid->quant_min, last = (float)grid->quant_max;                                              \
    int clipped = 0;                                                                                                  \
    int64_t i;                                                                                                        \
    /* two loops: gcc vectorises neither when one asks for the mask inside, and takes fourteen times as long */       \
    if (mask) {                                                                                                       \
        _Pragma("omp simd reduction(|:clipped)")                                                                      \
        for (i = 0; i < n; i++) {                                                                                     \
            float v = LOAD(x[i]);                                                                                     \
            float q = nearbyintf(clamp(v, least, most) * inverse) + offset;                                           \
            float c = q > first ? q : first;                                                                          \
            c = c < last ? c : last;                                                                                  \
            int passes = (c == q) & (v > least) & (v < most);                                                         \
            mask[i] = passes;                                                                                         \
            clipped |= !passes;                                                                                       \
            y[i] = STORE((c - offset) * scale);                                                                       \
        }                                                                                                             \
    } else {                                                                                                          \
        _Pragma("omp simd reduction(|:clipped)")                                                                      \
        for (i = 0; i < n; i++) {                                                                                     \
            float v = LOAD(x[i]);                                                                                     \
            float q = nearbyintf(clamp(v, least, most) * inverse) + offset;                                           \
            float c = q > first ? q : first;                                                                          \
            c = c < last ? c : last;                                                                                  \
            clipped |= !((c == q) & (v > least) & (v < most));                                                        \
            y[i] = STORE((c - offset) * scale);                                                                       \
        }                                                                                                             \
    }                                                                                                                 \
    return clipped;                                                                                                   \
}                                                                                                                     \
                                                                                                                      \
/* The range of x (n elements) into `range`: min and max, NaN where something is not finite. */                       \
void lq_range_##SUFFIX(const T *x, int64_t n, const Grid *grid, float *range, int threads) {                          \
    float low = INFINITY, high = -INFINITY, check = 0;                                                                \
    int64_t blocks = (n + GRAIN - 1) / GRAIN, b;                                                                      \
    _Pragma("omp parallel for num_threads(threads) reduction(min:low) reduction(max:high) reduction(+:check) if (blocks > 1)")\
    for (b = 0; b < blocks; b++) {                                                                                    \
        float found[2] = {INFINITY, -INFINITY};                                                                       \
        int64_t start = b * GRAIN, size = n - start < GRAIN ? n - start : GRAIN;                                      \
        widen_##SUFFIX(x + start, size, grid, found);                                                                 \
        low = found[0] < low ? found[0] : low;                                                                        \
        high = found[1] > high ? found[1] : high;                                                                     \
        check += found[0] * 0.0f;                                                                                     \
    }                                                                                                                 \
    range[0] = low + check;                                                                                           \
    range[1] = high + check;                                                                                          \
}                                                                                                                     \
                                                                                                                      \
/* One scale for x (n elements). low, high: the average range, moved if `observe`; scale, zero_point: written.        \
 * y: written, unless NULL. mask: 1 where the gradient passes, unless NULL. Returns whether it does not somewhere. */ \
int lq_per_tensor_##SUFFIX(const T *x, T *y, uint8_t *mask, int64_t n, const Grid *grid, int observe, float *low,     \
                           float *high, float *scale, int32_t *zero_point, int threads) {                             \
    int64_t blocks = (n + GRAIN - 1) / GRAIN, b;                                                                      \
    int clipped = 0;                                                                                                  \
    if (observe) {                                                                                                    \
        float range[2];                                                                                               \
        lq_range_##SUFFIX(x, n, grid, range, threads);                                                                \
        follow(grid, range, low, high);                                                                               \
    }                                                                                                                 \
    qparams(grid, *low, *high, scale, zero_point);                                                                    \
    if (!y) return 0;                                                                                                 \
    _Pragma("omp parallel for num_threads(threads) reduction(|:clipped) if (blocks > 1)")                             \
    for (b = 0; b < blocks; b++) {                                                                                    \
        int64_t start = b * GRAIN, size = n - start < GRAIN ? n - start : GRAIN;                                      \
        clipped |= round_##SUFFIX(x + start, y + start, mask ? mask + start : 0, size, grid, *scale, *zero_point);    \
    }                                                                                                                 \
    return clipped;                                                                                                   \
}                                                                                                                     \
                                                                                                                      \
/* One scale for each channel of x (outer, channels, inner); low, high, scale, zero_point: (channels). */             \
int lq_per_channel_##SUFFIX(const T *x, T *y, uint8_t *mask, int64_t outer, int64_t channels, int64_t inner,          \
                            const Grid *grid, int observe, float *low, float *high, float *scale,                     \
                            int32_t *zero_point, int threads) {                                                       \
    int64_t c;                                                                                                        \
    int clipped = 0;                                                                                                  \
    _Pragma("omp parallel for num_threads(threads) reduction(|:clipped) if (outer * channels * inner > GRAIN)")       \
    for (c = 0; c < channels; c++) {                                                                                  \
        int64_t o;                                                                                                    \
        if (observe) {                                                                                                \
            float range[2] = {INFINITY, -INFINITY};                                                                   \
            for (o = 0; o < outer; o++) widen_##SUFFIX(x + (o * channels + c) * inner, inner, grid, range);           \
            follow(grid, range, low + c, high + c);                                                                   \
        }                                                                                                             \
        qparams(grid, low[c], high[c], scale + c, zero_point + c);                                                    \
        for (o = 0; y && o < outer; o++) {                                                                            \
            int64_t start = (o * channels + c) * inner;                                                               \
            uint8_t *passed = mask ? mask + start : 0;                                                                \
            clipped |= round_##SUFFIX(x + start, y + start, passed, inner, grid, scale[c], zero_point[c]);            \
        }                                                                                                             \
    }                                                                                                                 \
    return clipped;                                                                                                   \
}                                                                                                                     \
                                                                                                                      \
/* x = g where the mask is 1, and g * 0 elsewhere, as torch has it. */                                                \
void lq_gradient_##SUFFIX(const T *g, const uint8_t *mask, T *x, int64_t n, int threads) {                            \
    int64_t blocks = (n + GRAIN - 1) / GRAIN, b;                                                                      \
    _Pragma("omp parallel for num_threads(threads) if (blocks > 1)")                                                  \
    for (b = 0; b < blocks; b++) {                                                                                    \
        int64_t i, end = (b + 1) * GRAIN < n ? (b + 1) * GRAIN : n;                                                   \
        for (i = b * GRAIN; i < end; i++) x[i] = STORE(LOAD(g[i]) * (float)mask[i]);                                  \
    }                                                                                                                 \
}

DEFINE(float, from_float, to_float, float32)
DEFINE(bf16, from_bf16, to_bf16, bfloat16)

/* A histogram: `counts` (2 * half), the bin i is [i - half, i - half + 1) * 2 ** exponent; how many values were 0; and the
 * least and the greatest of all. */
typedef struct {
    double *counts, *zeros;
    float *low, *high;
    int64_t *exponent;
    int64_t half;
} Histogram;

/* Let each 2 ** doublings bins become one. */
static void coarsen(double *counts, int64_t half, int64_t doublings) {
    int64_t i, k = doublings < 62 ? doublings : 62;
    for (i = 1; i < half; i++) {
        double above = counts[half + i], below = counts[half - 1 - i];
        counts[half + i] = counts[half - 1 - i] = 0;
        counts[half + (i >> k)] += above;
        counts[half - 1 - (i >> k)] += below;
    }
}

/* Count `samples` of the n elements of x (n < 2 ** 48), each as n / samples: one from each of as many stretches of equal
 * length, at a place that differs from stretch to stretch and with `seed` (multiples of the golden ratio, as in Weyl's
 * sequence). Returns 1, and does nothing, if an element is not finite. */
#define DEFINE_COUNT(T, LOAD, SUFFIX)                                                                                 \
int lq_count_##SUFFIX(const T *x, int64_t n, int64_t samples, uint32_t seed, const Histogram *into, int threads) {    \
    static const Grid everything = {.least = -INFINITY, .most = INFINITY};                                            \
    double stretch = (double)n / (double)samples, *counts = into->counts + into->half;                                \
    uint64_t length = (uint64_t)n / (uint64_t)samples; /* at least */                                                 \
    float first = (float)-into->half, last = (float)(into->half - 1), range[2], most, inverse;                        \
    int64_t i;                                                                                                        \
    lq_range_##SUFFIX(x, n, &everything, range, threads);                                                             \
    if (!(isfinite(range[0]) && isfinite(range[1]))) return 1;                                                        \
    most = -range[0] > range[1] ? -range[0] : range[1];                                                               \
    if (most > 0) {                                                                                                   \
        int needed;                                                                                                   \
        frexpf(most / (float)into->half, &needed);                                                                    \
        if (needed > *into->exponent) {                                                                               \
            coarsen(into->counts, into->half, needed - *into->exponent);                                              \
            *into->exponent = needed;                                                                                 \
        }                                                                                                             \
    }                                                                                                                 \
    if (range[0] < *into->low) *into->low = range[0];                                                                 \
    if (range[1] > *into->high) *into->high = range[1];                                                               \
    inverse = ldexpf(1.0f, (int)-*into->exponent);                                                                    \
    for (i = 0; i < samples; i += BLOCK) {                                                                            \
        int32_t bins[BLOCK];                                                                                          \
        int j, size = samples - i < BLOCK ? (int)(samples - i) : BLOCK;                                               \
        for (j = 0; j < size; j++) {                                                                                  \
            uint32_t drawn = ((uint32_t)(i + j) + seed) * 0x9E3779B9u;                                                \
            int64_t place = (int64_t)((double)(i + j) * stretch) + (int64_t)((drawn * length) >> 32);                 \
            float v = LOAD(x[place]);                                                                                 \
            bins[j] = v == 0 ? INT32_MAX : (int32_t)clamp(floorf(v * inverse), first, last);                          \
        }                                                                                                             \
        for (j = 0; j < size; j++) *(bins[j] == INT32_MAX ? into->zeros : counts + bins[j]) += stretch;               \
    }                                                                                                                 \
    return 0;                                                                                                         \
}

DEFINE_COUNT(float, from_float, float32)
DEFINE_COUNT(bf16, from_bf16, bfloat16)
