/* Rotation, the cache and attention. One key and value head serves all query heads.
 *
 * The cache of a slot lies so that attention reads it front to back: keys in blocks of 16
 * positions, all 16 for one dimension (one pair of dimensions, where there is an instruction for
 * pairs) after another; values position by position (in pairs of positions).
 */
#include "thread_pool.c"

#if defined(DOT) && HEAD_DIM % 16 == 0
#define PAIRS
#endif

#if HEADS % 4 == 0
#define HEADS_AT_ONCE 4
#elif HEADS % 3 == 0
#define HEADS_AT_ONCE 3
#elif HEADS % 2 == 0
#define HEADS_AT_ONCE 2
#else
#define HEADS_AT_ONCE 1
#endif
#define ATTEND_ROWS 4 /* of a task */

static inline int64_t key_at(int64_t position, int64_t i) {
#ifdef PAIRS
    return position / 16 * 16 * HEAD_DIM + i / 2 * 32 + position % 16 * 2 + i % 2;
#else
    return position / 16 * 16 * HEAD_DIM + i * 16 + position % 16;
#endif
}

static inline int64_t value_at(int64_t position, int64_t i) {
#ifdef PAIRS
    return position / 2 * 2 * HEAD_DIM + i * 2 + position % 2;
#else
    return position * HEAD_DIM + i;
#endif
}

/* out [HEAD_DIM] = in turned by a position's angles, times `scale`. */
static inline void rotate(const real *in, const float *cosine, const float *sine, float scale,
                          float *out) {
    for (int i = 0; i < HALF; i++) {
        float left = wide(in[i]), right = wide(in[i + HALF]);
        out[i] = (left * cosine[i] - right * sine[i]) * scale;
        out[i + HALF] = (right * cosine[i] + left * sine[i]) * scale;
    }
}

/* Rotate a row's key and write it and its value to the cache; kv begins with the key. */
static inline void store_row(const model *m, const layer *at, const real *kv, int64_t slot,
                             int64_t position) {
    real *keys = at->keys + slot * m->context * HEAD_DIM;
    real *values = at->values + slot * m->context * HEAD_DIM;
    float turned[HEAD_DIM];
    real key[HEAD_DIM];
    rotate(kv, m->cos_k + position * HALF, m->sin_k + position * HALF, 1.0f, turned);
    narrow_all(turned, key, HEAD_DIM);
#ifdef PAIRS
    for (int i = 0; i < HEAD_DIM; i += 2) /* two dimensions in one write */
        memcpy(keys + key_at(position, i), key + i, 2 * sizeof(real));
#else
    for (int i = 0; i < HEAD_DIM; i++) keys[key_at(position, i)] = key[i];
#endif
    for (int i = 0; i < HEAD_DIM; i++) values[value_at(position, i)] = kv[HEAD_DIM + i];
}

/* The same for all rows, kv [rows, stride]. */
static void store(worker *me, const model *m, const layer *at, const real *kv, int64_t stride,
                  int64_t rows, const int64_t *slots, const int64_t *positions) {
    cursor tasks = begin_phase(me);
    for (task t; next_task(&tasks, rows, SOME_ROWS, 1, &t);)
        for (int64_t row = t.begin; row < t.end; row++)
            store_row(m, at, kv + row * stride, slots[row], positions[row]);
}

/* Give a slot the first positions of another; what the target has behind them stays. */
static void copy_slot(const model *m, const layer *at, int64_t source, int64_t target,
               int64_t positions) {
    int64_t from = source * m->context * HEAD_DIM, to = target * m->context * HEAD_DIM;
    int64_t whole = positions / 16 * 16; /* of keys and of values */
    size_t bytes = whole * HEAD_DIM * sizeof(real);
    memcpy(at->keys + to, at->keys + from, bytes);
    memcpy(at->values + to, at->values + from, bytes);
    for (int64_t p = whole; p < positions; p++)
        for (int i = 0; i < HEAD_DIM; i++) {
            at->keys[to + key_at(p, i)] = at->keys[from + key_at(p, i)];
            at->values[to + value_at(p, i)] = at->values[from + value_at(p, i)];
        }
}

#ifdef PAIRS
#if HEAD_DIM <= 64
#define WIDTH HEAD_DIM /* dimensions of the mixed values in registers at once */
#elif HEAD_DIM % 64 == 0
#define WIDTH 64
#else
#define WIDTH 16
#endif

static inline __m512bh broadcast(const real *pair) {
    int32_t both;
    memcpy(&both, pair, 4);
    return (__m512bh)_mm512_set1_epi32(both);
}

/* scores [HEADS, reach] of 16 x blocks positions from t; `ahead` is what the next row will read. */
static inline __attribute__((always_inline)) void score_blocks(const int blocks, const real *q,
                                                               const real *keys, int64_t t,
                                                               int64_t reach, const real *ahead,
                                                               float *scores) {
    for (int h = 0; h < HEADS; h += HEADS_AT_ONCE) {
        __m512 sum[2][HEADS_AT_ONCE]; /* enough sums that none waits for its last addition */
#pragma GCC unroll 2
        for (int b = 0; b < blocks; b++)
#pragma GCC unroll 4
            for (int g = 0; g < HEADS_AT_ONCE; g++) sum[b][g] = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int i = 0; i < HEAD_DIM; i += 2) {
            __m512bh key[2];
#pragma GCC unroll 2
            for (int b = 0; b < blocks; b++) {
                int64_t at = (t + 16 * b) * HEAD_DIM + i * 16;
                key[b] = (__m512bh)_mm512_loadu_si512(keys + at);
                if (h == 0) __builtin_prefetch(ahead + at);
            }
#pragma GCC unroll 4
            for (int g = 0; g < HEADS_AT_ONCE; g++) {
                __m512bh pair = broadcast(q + (h + g) * HEAD_DIM + i);
#pragma GCC unroll 2
                for (int b = 0; b < blocks; b++)
                    sum[b][g] = _mm512_dpbf16_ps(sum[b][g], key[b], pair);
            }
        }
#pragma GCC unroll 4
        for (int g = 0; g < HEADS_AT_ONCE; g++)
#pragma GCC unroll 2
            for (int b = 0; b < blocks; b++)
                _mm512_storeu_ps(scores + (h + g) * reach + t + 16 * b, sum[b][g]);
    }
}

/* scores [HEADS, reach] of a query [HEADS, HEAD_DIM] against the keys of a slot. */
static inline void score(const real *q, const real *keys, int64_t reach, const real *ahead,
                         float *scores) {
    int64_t t = 0;
    for (; t + 32 <= reach; t += 32) score_blocks(2, q, keys, t, reach, ahead, scores);
    if (t < reach) score_blocks(1, q, keys, t, reach, ahead, scores);
}

/* out [HEADS, HEAD_DIM]: values weighted by weights [HEADS, reach], times `scale` [HEADS]. */
static inline void mix(const real *weights, const real *values, int64_t length, int64_t reach,
                       const real *ahead, const float *scale, real *out) {
    for (int h = 0; h < HEADS; h += HEADS_AT_ONCE)
        for (int i = 0; i < HEAD_DIM; i += WIDTH) {
            __m512 sum[HEADS_AT_ONCE][WIDTH / 16];
#pragma GCC unroll 4
            for (int g = 0; g < HEADS_AT_ONCE; g++)
#pragma GCC unroll 4
                for (int j = 0; j < WIDTH / 16; j++) sum[g][j] = _mm512_setzero_ps();
            for (int64_t t = 0; t < length; t += 2) {
                __m512i value[WIDTH / 16];
#pragma GCC unroll 4
                for (int j = 0; j < WIDTH / 16; j++) {
                    int64_t at = t * HEAD_DIM + (i + 16 * j) * 2;
                    value[j] = _mm512_loadu_si512(values + at);
                    if (h == 0) __builtin_prefetch(ahead + at);
                }
                if (t + 1 == length) /* the other of the pair is what another text left there */
#pragma GCC unroll 4
                    for (int j = 0; j < WIDTH / 16; j++)
                        value[j] = _mm512_and_si512(value[j], _mm512_set1_epi32(0xffff));
#pragma GCC unroll 4
                for (int g = 0; g < HEADS_AT_ONCE; g++) {
                    __m512bh weight = broadcast(weights + (h + g) * reach + t);
#pragma GCC unroll 4
                    for (int j = 0; j < WIDTH / 16; j++)
                        sum[g][j] = _mm512_dpbf16_ps(sum[g][j], weight, (__m512bh)value[j]);
                }
            }
#pragma GCC unroll 4
            for (int g = 0; g < HEADS_AT_ONCE; g++)
#pragma GCC unroll 4
                for (int j = 0; j < WIDTH / 16; j++) {
                    __m512 mixed = _mm512_mul_ps(sum[g][j], _mm512_set1_ps(scale[h + g]));
                    __m256i bits = (__m256i)_mm512_cvtneps_pbh(mixed);
                    memcpy(out + (h + g) * HEAD_DIM + i + 16 * j, &bits, sizeof bits);
                }
        }
}

/* weights [reach] = exp(scores - the largest), zero from `length` on; the inverse of their sum, as
 * they are used: rounded. */
static inline float softmax_weights(const float *scores, int64_t length, int64_t reach,
                                    real *weights) {
    int64_t whole = length / 16 * 16;
    __mmask16 rest = (__mmask16)((1u << (length - whole)) - 1);
    __m512 low = _mm512_set1_ps(-FLT_MAX), top = low, total = _mm512_setzero_ps();
    for (int64_t t = 0; t < whole; t += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(scores + t));
    if (rest) top = _mm512_max_ps(top, _mm512_mask_loadu_ps(low, rest, scores + whole));
    const __m512 steep = _mm512_set1_ps(1.44269504f);
    __m512 zero = _mm512_set1_ps(_mm512_reduce_max_ps(top) * 1.44269504f);
    for (int64_t t = 0; t < reach; t += 16) {
        __m512 power = rough_exp2(_mm512_fmsub_ps(_mm512_loadu_ps(scores + t), steep, zero));
        if (t == whole) power = _mm512_maskz_mov_ps(rest, power);
        __m256i bits = (__m256i)_mm512_cvtneps_pbh(power);
        _mm256_storeu_si256((__m256i *)(weights + t), bits);
        __m512i used = _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
        total = _mm512_add_ps(total, _mm512_castsi512_ps(used));
    }
    return 1.0f / _mm512_reduce_add_ps(total);
}
#else
static inline void score(const float *q, const real *keys, int64_t reach, const real *ahead,
                         float *scores) {
    (void)ahead;
    for (int64_t t = 0; t < reach; t += 16)
        for (int h = 0; h < HEADS; h += HEADS_AT_ONCE) {
            float sum[HEADS_AT_ONCE][16] = {{0.0f}};
            for (int i = 0; i < HEAD_DIM; i++)
                for (int g = 0; g < HEADS_AT_ONCE; g++)
                    for (int l = 0; l < 16; l++)
                        sum[g][l] += q[(h + g) * HEAD_DIM + i] *
                                     wide(keys[t * HEAD_DIM + i * 16 + l]);
            for (int g = 0; g < HEADS_AT_ONCE; g++)
                memcpy(scores + (h + g) * reach + t, sum[g], sizeof sum[g]);
        }
}

static inline void mix(const real *weights, const real *values, int64_t length, int64_t reach,
                       const real *ahead, const float *scale, real *out) {
    (void)ahead;
    float mixed[HEADS * HEAD_DIM] = {0.0f};
    for (int64_t t = 0; t < length; t++)
        for (int h = 0; h < HEADS; h++) {
            float weight = wide(weights[h * reach + t]);
            for (int i = 0; i < HEAD_DIM; i++)
                mixed[h * HEAD_DIM + i] += weight * wide(values[value_at(t, i)]);
        }
    for (int h = 0; h < HEADS; h++)
        for (int i = 0; i < HEAD_DIM; i++)
            out[h * HEAD_DIM + i] = narrow(mixed[h * HEAD_DIM + i] * scale[h]);
}

static inline float softmax_weights(float *scores, int64_t length, int64_t reach, real *weights) {
    float top = -FLT_MAX, total = 0.0f;
    for (int64_t t = length; t < reach; t++) scores[t] = -FLT_MAX;
#pragma omp simd reduction(max : top)
    for (int64_t t = 0; t < reach; t++) top = scores[t] > top ? scores[t] : top;
    for (int64_t block = 0; block < reach; block += 16)
        for (int64_t t = block; t < block + 16; t++) weights[t] = narrow(fast_exp(scores[t] - top));
    for (int64_t t = length; t < reach; t++) weights[t] = narrow(0.0f);
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < reach; t++) total += wide(weights[t]);
    return 1.0f / total;
}
#endif

/* Attention of one row [HEADS, HEAD_DIM] at the last of `length` positions of its slot; the next row
 * reads what lies `ahead` of its keys and values, in elements. */
static void attend_row(const model *m, const real *row, const real *keys, const real *values,
                       int64_t length, int64_t ahead, real *out) {
    int64_t reach = (length + 15) / 16 * 16;
    const float *cosine = m->cos_q + (length - 1) * HALF, *sine = m->sin_q + (length - 1) * HALF;
    float turned[HEADS * HEAD_DIM], scores[HEADS * reach], inverse[HEADS];
    real weights[HEADS * reach];
    for (int h = 0; h < HEADS; h++)
        rotate(row + h * HEAD_DIM, cosine, sine, 1.0f / sqrtf(HEAD_DIM), turned + h * HEAD_DIM);
#ifdef PAIRS
    real q[HEADS * HEAD_DIM];
    narrow_all(turned, q, HEADS * HEAD_DIM);
#else
    const float *q = turned;
#endif
    score(q, keys, reach, keys + ahead, scores);
    for (int h = 0; h < HEADS; h++)
        inverse[h] = softmax_weights(scores + h * reach, length, reach, weights + h * reach);
    mix(weights, values, length, reach, values + ahead, inverse, out);
}

/* Rows [rows, stride] of queries, and of keys and values from `kv` on, to out [rows, out_stride].
 * `storing`: each row first writes its own key and value; all others it needs are in the cache. */
static void attend(worker *me, const model *m, const layer *at, const step *s, int64_t rows,
                   const real *fused, int64_t stride, int64_t kv, int storing, real *out,
                   int64_t out_stride) {
    int64_t each = m->context * HEAD_DIM; /* of a slot */
    cursor tasks = begin_phase(me);
    for (task t; next_task(&tasks, rows, ATTEND_ROWS, 1, &t);)
        for (int64_t row = t.begin; row < t.end; row++) {
            const real *asked = fused + row * stride;
            int64_t slot = s->slots[row], position = s->positions[row];
            int64_t next = s->slots[row + 1 < rows ? row + 1 : row] - slot;
            if (storing) store_row(m, at, asked + kv, slot, position);
            attend_row(m, asked, at->keys + slot * each, at->values + slot * each, position + 1,
                       next * each, out + row * out_stride);
        }
}
