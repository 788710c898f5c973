/* Drawing a token: temperature, filters, inverse CDF. Every row alone and in one order. */
#include "thread_pool.c"

#define BLOCK 64     /* as in common.logprobs.draw */
#define BUCKETS 1025 /* of scores: 32 for each nat below the largest, and one for all that is further */

/* As common.logprobs.Sampling. */
typedef struct {
    float temperature; /* 0 is greedy */
    int64_t top_k;     /* 0 keeps all */
    float top_p, min_p;
    int64_t min_tokens, count; /* before so many tokens none of `count` endings is drawn */
    const int64_t *endings;
} sampling;

typedef struct {
    float score;
    int64_t token;
} entry;

/* What is kept: scores above `score`, and of equal ones those of tokens up to `token`. */
typedef entry cut;

static int by_score(const void *a, const void *b) {
    const entry *x = a, *y = b;
    if (x->score != y->score) return x->score < y->score ? 1 : -1;
    return x->token > y->token ? 1 : -1;
}

static inline int64_t bucket_of(float score, float top) {
    float below = (top - score) * 32.0f;
    return below < BUCKETS - 1 ? (int64_t)below : BUCKETS - 1;
}

/* The tokens of a bucket, most probable first, as a stable sort has them; returns their number. */
static int64_t sorted_bucket(const float *scores, int64_t vocabulary, float top, int64_t bucket,
                             entry *found) {
    int64_t count = 0;
    for (int64_t i = 0; i < vocabulary; i++)
        if (bucket_of(scores[i], top) == bucket) found[count++] = (entry){scores[i], i};
    qsort(found, count, sizeof(entry), by_score);
    return count;
}

/* What top-k and top-p keep of scores [vocabulary] with these weights. */
static cut cut_of(const float *scores, const float *weights, int64_t vocabulary, float top,
                  const sampling *how, entry *found) {
    int64_t counts[BUCKETS] = {0}, last = BUCKETS - 1, room = vocabulary;
    double masses[BUCKETS] = {0.0}, total = 0.0, mass = 0.0;
    for (int64_t i = 0; i < vocabulary; i++) {
        int64_t b = bucket_of(scores[i], top);
        counts[b]++, masses[b] += weights[i];
    }
    cut kept = {-FLT_MAX, vocabulary};
    if (how->top_k && how->top_k < vocabulary) {
        int64_t before = 0;
        for (last = 0; before + counts[last] < how->top_k; last++) before += counts[last];
        room = how->top_k - before; /* in the last bucket that is kept */
        sorted_bucket(scores, vocabulary, top, last, found);
        kept = found[room - 1];
        masses[last] = 0.0;
        for (int64_t i = 0; i < room; i++) masses[last] += weights[found[i].token];
    }
    if (how->top_p >= 1.0f) return kept;
    for (int64_t b = 0; b <= last; b++) total += masses[b];
    for (int64_t b = 0; b <= last; mass += masses[b++]) {
        if (mass + masses[b] < how->top_p * total) continue;
        int64_t count = sorted_bucket(scores, vocabulary, top, b, found);
        if (b == last && room < count) count = room;
        for (int64_t i = 0; i < count && mass < how->top_p * total; i++) {
            kept = found[i];
            mass += weights[kept.token];
        }
        return kept;
    }
    return kept;
}

/* Sums of the weights' blocks, and of all. */
static double add_up(const float *weights, int64_t blocks, double *sums) {
    double total = 0.0;
    for (int64_t b = 0; b < blocks; b++) {
        float part = 0.0f;
#pragma omp simd reduction(+ : part)
        for (int i = 0; i < BLOCK; i++) part += weights[b * BLOCK + i];
        sums[b] = part;
        total += part;
    }
    return total;
}

/* The token at which the sum of weights passes `rest`; one that has a weight, where rounding passes all. */
static int64_t passing(const float *weights, const double *sums, int64_t blocks,
                       int64_t vocabulary, double rest) {
    int64_t block = 0;
    while (block < blocks - 1 && rest >= sums[block]) rest -= sums[block++];
    double inner = 0.0;
    int64_t token = block * BLOCK, last = vocabulary - 1;
    for (; token < last; token++) {
        inner += weights[token];
        if (inner > rest) break;
    }
    while (token > 0 && weights[token] == 0.0f) token--;
    return token;
}

/* Draw a token per row by inverse CDF, as common.logprobs.draw of sampling_logits. `logprobs` are of the
 * distribution that is drawn from, `whole` of the one without filters, at temperature 1 where the most
 * probable token is taken. */
void draw(const float *logits, int64_t rows, int64_t vocabulary, const sampling *how,
          const int64_t *positions, const double *uniforms, int64_t *tokens, float *logprobs,
          float *whole) {
    int64_t blocks = (vocabulary + BLOCK - 1) / BLOCK;
    int selects = (how->top_k && how->top_k < vocabulary) || how->top_p < 1.0f;
    float inverse = how->temperature > 0.0f ? 1.0f / how->temperature : 1.0f;
#pragma omp parallel
    {
        float *weights = calloc(blocks * BLOCK, sizeof(float));
        float *scores = malloc(vocabulary * sizeof(float));
        double *sums = malloc(blocks * sizeof(double));
        entry *found = selects ? malloc(vocabulary * sizeof(entry)) : NULL;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const float *at = logits + row * vocabulary;
            for (int64_t i = 0; i < vocabulary; i++) scores[i] = at[i] * inverse;
            if (positions[row] < how->min_tokens)
                for (int64_t e = 0; e < how->count; e++) scores[how->endings[e]] = -FLT_MAX;
            float top = -FLT_MAX;
#pragma omp simd reduction(max : top)
            for (int64_t i = 0; i < vocabulary; i++) top = scores[i] > top ? scores[i] : top;
            for (int64_t i = 0; i < vocabulary; i++) weights[i] = fast_exp(scores[i] - top);
            if (positions[row] < how->min_tokens)
                for (int64_t e = 0; e < how->count; e++) weights[how->endings[e]] = 0.0f;
            double all = add_up(weights, blocks, sums), total = all;
            int64_t token = 0;
            if (how->temperature == 0.0f) {
                while (scores[token] < top) token++;
                total = 1.0;
            } else {
                if (selects || how->min_p > 0.0f) {
                    cut kept = {-FLT_MAX, vocabulary};
                    if (selects) kept = cut_of(scores, weights, vocabulary, top, how, found);
                    float least = how->min_p > 0.0f ? top + logf(how->min_p) : -FLT_MAX;
                    for (int64_t i = 0; i < vocabulary; i++) {
                        int in = scores[i] > kept.score ||
                                 (scores[i] == kept.score && i <= kept.token);
                        if (!in || scores[i] < least) weights[i] = 0.0f;
                    }
                    total = add_up(weights, blocks, sums);
                }
                token = passing(weights, sums, blocks, vocabulary, uniforms[row] * total);
            }
            tokens[row] = token;
            logprobs[row] = scores[token] - top - (float)log(total);
            whole[row] = scores[token] - top - (float)log(all);
        }
        free(weights);
        free(scores);
        free(sums);
        free(found);
    }
}
