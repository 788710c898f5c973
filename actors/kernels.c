/* What a decode step does between its matrix products, for processors without a GPU.
 *
 * One call per layer and purpose, each a loop over rows that share nothing: a row's result does not
 * depend on the batch it is in, nor on the number of threads. `actors/decoder.py` has the same in
 * PyTorch, which a test compares it with.
 *
 * Compiled by `actors/kernels.py` with HEADS, HEAD_DIM (and BF16) defined, so that the inner
 * loops have constant length. `real` is the type of weights, products and cache; all arithmetic
 * is fp32.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define HALF (HEAD_DIM / 2)
#define BLOCK 64 /* as in common.logprobs.draw */

#ifdef BF16
typedef uint16_t real;
static inline float wide(real x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
static inline real narrow(float x) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (real)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#else
typedef float real;
static inline float wide(real x) { return x; }
static inline real narrow(float x) { return x; }
#endif

/* exp for x <= 88, within 2 ulp; loops over it vectorise (Cephes' polynomial). */
static inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t power = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &power, 4);
    return p * scale;
}

static inline void rotate(const real *in, const float *cosine, const float *sine, float *out) {
    for (int i = 0; i < HALF; i++) {
        float left = wide(in[i]), right = wide(in[i + HALF]);
        out[i] = left * cosine[i] - right * sine[i];
        out[i + HALF] = right * cosine[i] + left * sine[i];
    }
}

/* Attention of one row over the first `length` keys of its slot. */
static void attend_row(const float *q, const real *keys, const real *values, int64_t length,
                       real *out) {
    float scores[HEADS][(length + 15) & ~15ll];
    float top[HEADS], sum[HEADS], mixed[HEADS][HEAD_DIM];
    for (int h = 0; h < HEADS; h++) top[h] = -FLT_MAX;
    for (int64_t t = 0; t < length; t++) {
        float key[HEAD_DIM];
        for (int i = 0; i < HEAD_DIM; i++) key[i] = wide(keys[t * HEAD_DIM + i]);
        for (int h = 0; h < HEADS; h++) {
            float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int i = 0; i < HEAD_DIM; i++) dot += q[h * HEAD_DIM + i] * key[i];
            scores[h][t] = dot;
            top[h] = dot > top[h] ? dot : top[h];
        }
    }
    for (int h = 0; h < HEADS; h++) {
        float total = 0.0f;
#pragma omp simd reduction(+ : total)
        for (int64_t t = 0; t < length; t++) {
            scores[h][t] = fast_exp(scores[h][t] - top[h]);
            total += scores[h][t];
        }
        sum[h] = total;
    }
    memset(mixed, 0, sizeof mixed);
    for (int64_t t = 0; t < length; t++) {
        float value[HEAD_DIM];
        for (int i = 0; i < HEAD_DIM; i++) value[i] = wide(values[t * HEAD_DIM + i]);
        for (int h = 0; h < HEADS; h++)
            for (int i = 0; i < HEAD_DIM; i++) mixed[h][i] += scores[h][t] * value[i];
    }
    for (int h = 0; h < HEADS; h++) {
        float scale = 1.0f / sum[h];
        for (int i = 0; i < HEAD_DIM; i++) out[h * HEAD_DIM + i] = narrow(mixed[h][i] * scale);
    }
}

/* Rotate keys and write them and values to the cache; kv [rows, width] begins with the key. */
void store(const real *kv, int64_t width, int64_t rows, const int64_t *slots,
           const int64_t *positions, const float *cos_k, const float *sin_k, real *keys,
           real *values, int64_t context) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const real *key = kv + row * width;
        int64_t at = positions[row], place = (slots[row] * context + at) * HEAD_DIM;
        float turned[HEAD_DIM];
        rotate(key, cos_k + at * HALF, sin_k + at * HALF, turned);
        for (int i = 0; i < HEAD_DIM; i++) keys[place + i] = narrow(turned[i]);
        memcpy(values + place, key + HEAD_DIM, HEAD_DIM * sizeof(real));
    }
}

/* Store, copy shared prefixes, attend.
 * fused [rows, width]: q | k | v | ...; tables [context, HALF]; keys, values [slots, context,
 * HEAD_DIM] of this layer; copies: triples (source, target, positions); out [rows, out_width]. */
void attend(const real *fused, int64_t width, int64_t rows, const int64_t *slots,
            const int64_t *positions, const float *cos_q, const float *sin_q, const float *cos_k,
            const float *sin_k, real *keys, real *values, int64_t context, const int64_t *copies,
            int64_t copied, real *out, int64_t out_width) {
    store(fused + HEADS * HEAD_DIM, width, rows, slots, positions, cos_k, sin_k, keys, values,
          context);
    for (int64_t c = 0; c < copied; c++) { /* in order: a target may be a later source */
        int64_t from = copies[3 * c] * context * HEAD_DIM, to = copies[3 * c + 1] * context * HEAD_DIM;
        size_t bytes = copies[3 * c + 2] * HEAD_DIM * sizeof(real);
        memcpy(keys + to, keys + from, bytes);
        memcpy(values + to, values + from, bytes);
    }
    float scale = 1.0f / sqrtf(HEAD_DIM);
#pragma omp parallel for schedule(dynamic, 4)
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = positions[row], place = slots[row] * context * HEAD_DIM;
        float q[HEADS * HEAD_DIM];
        for (int h = 0; h < HEADS; h++)
            rotate(fused + row * width + h * HEAD_DIM, cos_q + at * HALF, sin_q + at * HALF,
                   q + h * HEAD_DIM);
        for (int i = 0; i < HEADS * HEAD_DIM; i++) q[i] *= scale;
        attend_row(q, keys + place, values + place, at + 1, out + row * out_width);
    }
}

/* SwiGLU: out = silu(gate) * up, each [rows, ff] inside wider rows. */
void activate(const real *up, const real *gate, int64_t width, int64_t rows, int64_t ff, real *out,
              int64_t out_width) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const real *u = up + row * width, *g = gate + row * width;
        real *o = out + row * out_width;
        for (int64_t i = 0; i < ff; i++) {
            float x = wide(g[i]);
            o[i] = narrow(x / (1.0f + fast_exp(-x)) * wide(u[i]));
        }
    }
}

/* x += y (when there is one), out = LayerNorm(x) * weight; x is fp32 [rows, dim]. */
void add_norm(float *x, const real *y, const float *weight, int64_t rows, int64_t dim, real *out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float *at = x + row * dim, sum = 0.0f, squares = 0.0f;
        if (y)
            for (int64_t i = 0; i < dim; i++) at[i] += wide(y[row * dim + i]);
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < dim; i++) sum += at[i];
        float mean = sum / dim;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < dim; i++) squares += (at[i] - mean) * (at[i] - mean);
        float scale = 1.0f / sqrtf(squares / dim + 1e-5f);
        for (int64_t i = 0; i < dim; i++)
            out[row * dim + i] = narrow((at[i] - mean) * scale * weight[i]);
    }
}

/* Inverse-CDF sampling as common.logprobs.draw, for logits without a filter. */
void draw(const real *logits, int64_t rows, int64_t vocabulary, float temperature,
          const double *uniforms, int64_t *tokens, float *logprobs) {
    int64_t blocks = (vocabulary + BLOCK - 1) / BLOCK;
#pragma omp parallel
    {
        float *weights = calloc(blocks * BLOCK, sizeof(float));
        double *sums = malloc(blocks * sizeof(double));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const real *at = logits + row * vocabulary;
            float top = -FLT_MAX, inverse = 1.0f / temperature;
#pragma omp simd reduction(max : top)
            for (int64_t i = 0; i < vocabulary; i++) {
                weights[i] = wide(at[i]) * inverse;
                top = weights[i] > top ? weights[i] : top;
            }
            for (int64_t i = 0; i < vocabulary; i++) weights[i] = fast_exp(weights[i] - top);
            double total = 0.0;
            for (int64_t b = 0; b < blocks; b++) {
                float part = 0.0f;
#pragma omp simd reduction(+ : part)
                for (int i = 0; i < BLOCK; i++) part += weights[b * BLOCK + i];
                sums[b] = part;
                total += part;
            }
            double rest = uniforms[row] * total;
            int64_t block = 0;
            while (block < blocks - 1 && rest >= sums[block]) rest -= sums[block++];
            double inner = 0.0;
            int64_t token = block * BLOCK, last = vocabulary - 1;
            for (; token < last; token++) {
                inner += weights[token];
                if (inner > rest) break;
            }
            tokens[row] = token;
            logprobs[row] = wide(at[token]) * inverse - top - (float)log(total);
        }
        free(weights);
        free(sums);
    }
}
