/* Rotation, the cache and attention. A head of keys and values serves GROUP query heads.
 *
 * A slot's positions are in blocks of the cache, which slots may share. A block has keys and values of
 * all layers. Those of a layer and head lie so that attention reads them front to back: of 16 keys all
 * 16 for one dimension (one pair of dimensions, where there is an instruction for pairs) after another;
 * values position by position (in pairs of positions).
 */
#include "thread_pool.c"

#if defined(DOT) && HEAD_DIM % 16 == 0
#define PAIRS
#endif

/* Query heads whose sums are in registers at once; what is left of a group comes after. */
#if GROUP < 4
#define HEADS_AT_ONCE GROUP
#elif GROUP % 4 && GROUP % 3 == 0
#define HEADS_AT_ONCE 3
#else
#define HEADS_AT_ONCE 4
#endif
#define LEFT_OVER (GROUP % HEADS_AT_ONCE)
#define EACH_GROUP(call)                                                 \
    do {                                                                 \
        for (int h = 0; h + HEADS_AT_ONCE <= GROUP; h += HEADS_AT_ONCE) { \
            const int heads = HEADS_AT_ONCE;                             \
            call;                                                        \
        }                                                                \
        if (LEFT_OVER) {                                                 \
            const int heads = LEFT_OVER, h = GROUP - LEFT_OVER;          \
            call;                                                        \
        }                                                                \
    } while (0)
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

/* out [HEAD_DIM] = in with its bias and its norm, turned by a position's angles, times `scale`. */
static inline void turn(const model *m, const real *in, const float *bias, const float *norm,
                        const float *cosine, const float *sine, float scale, float *out) {
    float x[HEAD_DIM];
    for (int i = 0; i < HEAD_DIM; i++) x[i] = wide(in[i]);
    if (bias)
        for (int i = 0; i < HEAD_DIM; i++) x[i] += bias[i];
    if (norm) {
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int i = 0; i < HEAD_DIM; i++) squares += x[i] * x[i];
        float inverse = 1.0f / sqrtf(squares / HEAD_DIM + m->eps);
        for (int i = 0; i < HEAD_DIM; i++) x[i] *= inverse * norm[i];
    }
    for (int i = 0; i < HALF; i++) {
        float left = x[i], right = x[i + HALF];
        out[i] = (left * cosine[i] - right * sine[i]) * scale;
        out[i + HALF] = (right * cosine[i] + left * sine[i]) * scale;
    }
    for (int i = ROTARY; i < HEAD_DIM; i++) out[i] = x[i] * scale;
}

/* Turn a row's keys and write them and its values to its slot's blocks; kv begins with the keys. */
static inline void store_row(const model *m, const layer *at, const real *kv, const int32_t *blocks,
                             int64_t position) {
    int64_t begin = blocks[position / m->block] * m->apart, place = position % m->block;
    const float *cosine = at->cos_k + position * HALF, *sine = at->sin_k + position * HALF;
    const float *bias_k = at->bias ? at->bias + HEADS * HEAD_DIM : NULL;
    const float *bias_v = at->bias ? bias_k + KV_HEADS * HEAD_DIM : NULL;
    for (int g = 0; g < KV_HEADS; g++) {
        int64_t own = begin + g * m->block * HEAD_DIM;
        real *keys = at->keys + own, *values = at->values + own;
        const real *value = kv + (KV_HEADS + g) * HEAD_DIM;
        float turned[HEAD_DIM];
        real key[HEAD_DIM];
        turn(m, kv + g * HEAD_DIM, bias_k ? bias_k + g * HEAD_DIM : NULL, at->norm_k, cosine, sine,
             1.0f, turned);
        narrow_all(turned, key, HEAD_DIM);
#ifdef PAIRS
        for (int i = 0; i < HEAD_DIM; i += 2) /* two dimensions in one write */
            memcpy(keys + key_at(place, i), key + i, 2 * sizeof(real));
#else
        for (int i = 0; i < HEAD_DIM; i++) keys[key_at(place, i)] = key[i];
#endif
        for (int i = 0; i < HEAD_DIM; i++)
            values[value_at(place, i)] =
                bias_v ? narrow(wide(value[i]) + bias_v[g * HEAD_DIM + i]) : value[i];
    }
}

/* The same for all rows, kv [rows, stride]. */
static void store(worker *me, const model *m, const layer *at, const step *s, const real *kv,
                  int64_t stride, int64_t first, int64_t rows) {
    cursor tasks = begin_phase(me);
    for (task t; next_task(&tasks, rows, SOME_ROWS, 1, &t);)
        for (int64_t row = t.begin; row < t.end; row++) {
            const int32_t *blocks = s->table + s->slots[first + row] * m->longest;
            store_row(m, at, kv + row * stride, blocks, s->positions[first + row]);
        }
}

/* Give a block the first positions of another. */
static void copy_block(const model *m, const layer *at, int64_t source, int64_t target,
                       int64_t positions) {
    int64_t whole = positions / 16 * 16; /* of keys and of values */
    size_t bytes = whole * HEAD_DIM * sizeof(real);
    for (int g = 0; g < KV_HEADS; g++) {
        int64_t head = g * m->block * HEAD_DIM;
        int64_t from = source * m->apart + head, to = target * m->apart + head;
        memcpy(at->keys + to, at->keys + from, bytes);
        memcpy(at->values + to, at->values + from, bytes);
        for (int64_t p = whole; p < positions; p++)
            for (int i = 0; i < HEAD_DIM; i++) {
                at->keys[to + key_at(p, i)] = at->keys[from + key_at(p, i)];
                at->values[to + value_at(p, i)] = at->values[from + value_at(p, i)];
            }
    }
}

/* The positions of a slot that a row attends to: begin .. begin + length - 1, in its blocks. */
typedef struct {
    const int32_t *blocks;
    int64_t begin, length;  /* begin is a multiple of 16 */
    int64_t size, apart;    /* positions of a block, numbers between blocks */
    const int32_t *ahead;   /* the blocks of what is read next */
    int64_t further;        /* numbers from these blocks' begin to what is read there */
} reading;

/* A run of positions in one block: from `at` on, after `done` others; `ahead` is what comes next. */
typedef struct {
    int64_t done, count, at, ahead;
} run;

INLINE run run_at(const reading *of, int64_t done) {
    int64_t position = of->begin + done, index = position / of->size;
    int64_t place = position % of->size, left = of->length - done, room = of->size - place;
    return (run){done, left < room ? left : room,
                 of->blocks[index] * of->apart + place * HEAD_DIM,
                 of->ahead[index] * of->apart + of->further + place * HEAD_DIM};
}

#define NOTHING -1e30f /* the score of what is not attended to */

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

/* Scores of `heads` heads from h on and 16 x blocks positions from t; `ahead` is what comes next. */
INLINE void score_blocks(const int blocks, const int heads, int h, const real *q, const real *keys,
                         int64_t t, int64_t reach, const real *ahead, float *scores) {
    __m512 sum[2][HEADS_AT_ONCE]; /* enough sums that none waits for its last addition */
#pragma GCC unroll 2
    for (int b = 0; b < blocks; b++)
#pragma GCC unroll 4
        for (int g = 0; g < heads; g++) sum[b][g] = _mm512_setzero_ps();
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
        for (int g = 0; g < heads; g++) {
            __m512bh pair = broadcast(q + (h + g) * HEAD_DIM + i);
#pragma GCC unroll 2
            for (int b = 0; b < blocks; b++)
                sum[b][g] = _mm512_dpbf16_ps(sum[b][g], key[b], pair);
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < heads; g++)
#pragma GCC unroll 2
        for (int b = 0; b < blocks; b++)
            _mm512_storeu_ps(scores + (h + g) * reach + t + 16 * b, sum[b][g]);
}

/* scores [GROUP, reach] of a query [GROUP, HEAD_DIM] against keys. */
static inline void score(const real *q, const real *cache, const reading *of, int64_t reach,
                         float *scores) {
    for (run r = run_at(of, 0);; r = run_at(of, r.done + r.count)) {
        const real *keys = cache + r.at, *ahead = cache + r.ahead;
        float *to = scores + r.done;
        int64_t t = 0;
        for (; t + 16 < r.count; t += 32)
            EACH_GROUP(score_blocks(2, heads, h, q, keys, t, reach, ahead, to));
        if (t < r.count) EACH_GROUP(score_blocks(1, heads, h, q, keys, t, reach, ahead, to));
        if (r.done + r.count == of->length) break;
    }
}

/* Values weighted by the weights of `heads` heads from h on, dimensions from i on. */
INLINE void mix_heads(const int heads, int h, int i, const real *weights, const real *cache,
                      const reading *of, int64_t reach, const float *scale, real *out) {
    __m512 sum[HEADS_AT_ONCE][WIDTH / 16];
#pragma GCC unroll 4
    for (int g = 0; g < heads; g++)
#pragma GCC unroll 4
        for (int j = 0; j < WIDTH / 16; j++) sum[g][j] = _mm512_setzero_ps();
    for (run r = run_at(of, 0);; r = run_at(of, r.done + r.count)) {
        const real *values = cache + r.at, *ahead = cache + r.ahead, *from = weights + r.done;
        for (int64_t t = 0; t < r.count; t += 2) {
            __m512i value[WIDTH / 16];
#pragma GCC unroll 4
            for (int j = 0; j < WIDTH / 16; j++) {
                int64_t at = t * HEAD_DIM + (i + 16 * j) * 2;
                value[j] = _mm512_loadu_si512(values + at);
                if (h == 0) __builtin_prefetch(ahead + at);
            }
            if (t + 1 == r.count) /* the other of the pair is what another text left there */
#pragma GCC unroll 4
                for (int j = 0; j < WIDTH / 16; j++)
                    value[j] = _mm512_and_si512(value[j], _mm512_set1_epi32(0xffff));
#pragma GCC unroll 4
            for (int g = 0; g < heads; g++) {
                __m512bh weight = broadcast(from + (h + g) * reach + t);
#pragma GCC unroll 4
                for (int j = 0; j < WIDTH / 16; j++)
                    sum[g][j] = _mm512_dpbf16_ps(sum[g][j], weight, (__m512bh)value[j]);
            }
        }
        if (r.done + r.count == of->length) break;
    }
#pragma GCC unroll 4
    for (int g = 0; g < heads; g++)
#pragma GCC unroll 4
        for (int j = 0; j < WIDTH / 16; j++) {
            __m512 mixed = _mm512_mul_ps(sum[g][j], _mm512_set1_ps(scale[h + g]));
            __m256i bits = (__m256i)_mm512_cvtneps_pbh(mixed);
            memcpy(out + (h + g) * HEAD_DIM + i + 16 * j, &bits, sizeof bits);
        }
}

/* out [GROUP, HEAD_DIM]: values weighted by weights [GROUP, reach], times `scale` [GROUP]. */
static inline void mix(const real *weights, const real *cache, const reading *of, int64_t reach,
                       const float *scale, real *out) {
    for (int i = 0; i < HEAD_DIM; i += WIDTH)
        EACH_GROUP(mix_heads(heads, h, i, weights, cache, of, reach, scale, out));
}

/* weights [reach] = exp(scores - the largest), zero before `skip` and from `length` on; the inverse of
 * their sum, as they are used: rounded. */
static inline float softmax_weights(float *scores, int64_t skip, int64_t length, int64_t reach,
                                    real *weights) {
    for (int64_t t = 0; t < skip; t++) scores[t] = NOTHING;
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
INLINE void score_block(const int heads, int h, const float *q, const real *keys, int64_t t,
                        int64_t reach, float *scores) {
    float sum[HEADS_AT_ONCE][16] = {{0.0f}};
    for (int i = 0; i < HEAD_DIM; i++)
        for (int g = 0; g < heads; g++)
            for (int l = 0; l < 16; l++)
                sum[g][l] += q[(h + g) * HEAD_DIM + i] * wide(keys[t * HEAD_DIM + i * 16 + l]);
    for (int g = 0; g < heads; g++) memcpy(scores + (h + g) * reach + t, sum[g], sizeof sum[g]);
}

static inline void score(const float *q, const real *cache, const reading *of, int64_t reach,
                         float *scores) {
    for (int64_t done = 0; done < of->length;) {
        run r = run_at(of, done);
        for (int64_t t = 0; t < r.count; t += 16)
            EACH_GROUP(score_block(heads, h, q, cache + r.at, t, reach, scores + done));
        done += r.count;
    }
}

static inline void mix(const real *weights, const real *cache, const reading *of, int64_t reach,
                       const float *scale, real *out) {
    float mixed[GROUP * HEAD_DIM] = {0.0f};
    for (int64_t done = 0; done < of->length;) {
        run r = run_at(of, done);
        for (int64_t t = 0; t < r.count; t++)
            for (int h = 0; h < GROUP; h++) {
                float weight = wide(weights[h * reach + done + t]);
                for (int i = 0; i < HEAD_DIM; i++)
                    mixed[h * HEAD_DIM + i] += weight * wide(cache[r.at + value_at(t, i)]);
            }
        done += r.count;
    }
    for (int h = 0; h < GROUP; h++)
        for (int i = 0; i < HEAD_DIM; i++)
            out[h * HEAD_DIM + i] = narrow(mixed[h * HEAD_DIM + i] * scale[h]);
}

static inline float softmax_weights(float *scores, int64_t skip, int64_t length, int64_t reach,
                                    real *weights) {
    float top = -FLT_MAX, total = 0.0f;
    for (int64_t t = 0; t < skip; t++) scores[t] = NOTHING;
    for (int64_t t = length; t < reach; t++) scores[t] = -FLT_MAX;
#pragma omp simd reduction(max : top)
    for (int64_t t = 0; t < reach; t++) top = scores[t] > top ? scores[t] : top;
    for (int64_t block = 0; block < reach; block += 16)
        for (int64_t t = block; t < block + 16; t++) weights[t] = narrow(fast_exp(scores[t] - top));
    for (int64_t t = 0; t < skip; t++) weights[t] = narrow(0.0f);
    for (int64_t t = length; t < reach; t++) weights[t] = narrow(0.0f);
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < reach; t++) total += wide(weights[t]);
    return 1.0f / total;
}
#endif

/* Attention of one row [HEADS, HEAD_DIM] at the last of `length` positions of a slot with these blocks;
 * the next row's slot has the blocks `ahead`. */
static void attend_row(const model *m, const layer *at, const real *row, const int32_t *blocks,
                       int64_t length, const int32_t *ahead, real *out) {
    int64_t first = at->window && at->window < length ? length - at->window : 0;
    int64_t begin = first / 16 * 16, skip = first - begin, seen = length - begin;
    int64_t reach = (seen + 15) / 16 * 16, each = m->block * HEAD_DIM;
    const float *cosine = at->cos_q + (length - 1) * HALF, *sine = at->sin_q + (length - 1) * HALF;
    float turned[GROUP * HEAD_DIM], scores[GROUP * reach], inverse[GROUP];
    real weights[GROUP * reach];
    for (int g = 0; g < KV_HEADS; g++) {
        const real *k = at->keys + g * each, *v = at->values + g * each;
        int last = g + 1 == KV_HEADS;
        reading of = {blocks, begin, seen, m->block, m->apart,
                      last ? ahead : blocks, last ? -g * each : each};
        for (int h = 0; h < GROUP; h++) {
            int64_t from = (g * GROUP + h) * HEAD_DIM;
            turn(m, row + from, at->bias ? at->bias + from : NULL, at->norm_q, cosine, sine,
                 m->scale, turned + h * HEAD_DIM);
        }
#ifdef PAIRS
        real q[GROUP * HEAD_DIM];
        narrow_all(turned, q, GROUP * HEAD_DIM);
#else
        const float *q = turned;
#endif
        score(q, k, &of, reach, scores);
        for (int h = 0; h < GROUP; h++)
            inverse[h] =
                softmax_weights(scores + h * reach, skip, seen, reach, weights + h * reach);
        mix(weights, v, &of, reach, inverse, out + g * GROUP * HEAD_DIM);
    }
}

/* Rows [rows, stride] of queries, and of keys and values from `kv` on, to out [rows, out_stride].
 * `storing`: each row first writes its own keys and values; all others it needs are in the cache. */
static void attend(worker *me, const model *m, const layer *at, const step *s, int64_t rows,
                   const real *fused, int64_t stride, int64_t kv, int storing, real *out,
                   int64_t out_stride) {
    cursor tasks = begin_phase(me);
    for (task t; next_task(&tasks, rows, ATTEND_ROWS, 1, &t);)
        for (int64_t row = t.begin; row < t.end; row++) {
            const real *asked = fused + row * stride;
            const int32_t *blocks = s->table + s->slots[row] * m->longest;
            const int32_t *next = s->table + s->slots[row + 1 < rows ? row + 1 : row] * m->longest;
            if (storing) store_row(m, at, asked + kv, blocks, s->positions[row]);
            attend_row(m, at, asked, blocks, s->positions[row] + 1, next, out + row * out_stride);
        }
}
