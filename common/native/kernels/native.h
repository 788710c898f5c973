/* The forward on processors: types, and arithmetic that files share.
 *
 * Blocks are those of PaLM (attention and SwiGLU side by side) and of Llama (one after the other), with
 * what their relatives have beside: see `layer` and `model`.
 *
 * `common/native/library.py` compiles all files as one, with HEADS, KV_HEADS, HEAD_DIM,
 * ROTARY (and BF16) defined, so that inner loops have constant length. Every row is computed alone and in
 * one order: its result depends neither on the batch it is in nor on the number of threads.
 *
 * `real` is the type of weights, activations between products, and the cache. All sums are fp32,
 * and so are the residual stream, softmax and log-probabilities.
 */
#pragma once
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define GROUP (HEADS / KV_HEADS) /* query heads that read one head of keys and values */
#define HALF (ROTARY / 2)        /* pairs of dimensions that positions turn */

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

#if defined(BF16) && defined(__AVX512BF16__)
#include <immintrin.h>
#define DOT /* one instruction multiplies and adds 32 pairs of bf16 into 16 fp32 sums */
typedef real weight;
#else
typedef float weight;
#endif

#ifdef DOT
/* 2^z in 16 lanes to within 1.1e-4, enough for what keeps 8 bits; 0 for z far below. */
static inline __m512 rough_exp2(__m512 z) {
    __m512 n = _mm512_roundscale_ps(z, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(z, n);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.05511586f), f, _mm512_set1_ps(0.24260645f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69327125f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99992865f));
    return _mm512_scalef_ps(p, n);
}
#endif

/* out [count] = x, rounded. */
static inline void narrow_all(const float *x, real *out, int64_t count) {
    int64_t i = 0;
#ifdef DOT
    for (; i + 16 <= count; i += 16) {
        __m256i bits = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
        _mm256_storeu_si256((__m256i *)(out + i), bits);
    }
#endif
    for (; i < count; i++) out[i] = narrow(x[i]);
}

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

/* A weight matrix for a product: panels of PANEL columns (`products.c`). */
#define PANEL 64

/* Where a panel has its column c at the inner dimension's k. */
static inline int64_t place_of(int64_t k, int64_t c) {
#ifdef DOT
    return (k / 2) * 2 * PANEL + c * 2 + k % 2;
#else
    return k * PANEL + c;
#endif
}

static inline float weight_at(const weight *panel, int64_t k, int64_t c) {
#ifdef DOT
    return wide(panel[place_of(k, c)]);
#else
    return panel[place_of(k, c)];
#endif
}

typedef struct {
    const weight *data;
    int64_t panels;
} packed;

typedef struct {
    const float *norm, *second; /* [dim]; the second before SwiGLU, NULL where both read the first */
    packed query, keyvalue, forward;
    packed outward, down; /* of attention and of SwiGLU; `outward` of both side by side, without `down` */
    const float *bias;    /* [(HEADS + 2 KV_HEADS) HEAD_DIM] of queries, keys and values, or NULL */
    const float *norm_q, *norm_k; /* [HEAD_DIM], of each head before it is turned, or NULL */
    const float *cos_q, *sin_q, *cos_k, *sin_k; /* [context, HALF] */
    int64_t window;      /* positions that are attended to, the own included; 0 is all */
    real *keys, *values; /* of the cache's first block: [KV_HEADS, block, HEAD_DIM] */
} layer;

typedef struct {
    int64_t layers, dim, ff, vocabulary;
    int64_t block;   /* positions of a block of the cache, a multiple of 16 */
    int64_t apart;   /* numbers between two blocks of the cache */
    int64_t longest; /* blocks of a slot at most */
    int64_t dim_stride, mixed_stride, ff_stride; /* row lengths of activations, even */
    int64_t centred; /* whether norms take the mean away: LayerNorm, else RMSNorm */
    float eps;       /* of norms */
    float scale;     /* of queries */
    float logits_scale;
    const layer *layer;
    const float *norm, *scaled_norm; /* [dim], the last; for states, and for logits */
    const real *embedding; /* [vocabulary, dim], or NULL: it is in `logits` */
    packed logits;
} model;

/* Rows of a step: first those whose states are wanted, then earlier tokens of their slots. */
typedef struct {
    int64_t rows, used;
    const int64_t *tokens, *slots, *positions; /* [rows] */
    const int32_t *table; /* [slots, longest]: the blocks of each slot */
    int64_t alone; /* whether no row reads keys and values of another row */
    int64_t copies;
    const int64_t *copy; /* triples of blocks and positions: (source, target, positions) */
} step;

/* Room for a step, of at least `rows` rows; all but `x` and `fused` are zero beyond their width. */
typedef struct {
    float *x;     /* [rows, dim] */
    real *normed; /* [rows, dim_stride] */
    real *fused;  /* [rows, (query.panels + keyvalue.panels) * PANEL]: q | padding | k | v */
    real *mixed;  /* [rows, mixed_stride]: of attention */
    real *ff;     /* [rows, ff_stride]: of SwiGLU; behind `mixed` in the same rows, without `down` */
} scratch;
