/* Drawing a token: temperature, filters, inverse CDF. Every row alone and in one order. */
#include "thread_pool.c"

#define BLOCK 64     /* as in common.logprobs.draw */
#define BUCKETS 1025 /* of scores: 32 for each nat below the largest, and one for all that is further */
#define NEAR 256     /* buckets that are looked at first: few tokens are so near, and the cut mostly is */

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

/* A row's scores [vocabulary] and weights, with the largest of each block. */
typedef struct {
    const float *scores, *weights, *peaks;
    int64_t vocabulary;
    float top;
    double total; /* of the weights */
} row_of;

/* The tokens whose scores are at least so large, in their order; returns their number. */
static int64_t gather(const row_of *row, float least, entry *found) {
    int64_t count = 0;
    for (int64_t begin = 0, b = 0; begin < row->vocabulary; begin += BLOCK, b++) {
        if (row->peaks[b] < least) continue;
        int64_t end = begin + BLOCK < row->vocabulary ? begin + BLOCK : row->vocabulary;
        for (int64_t i = begin; i < end; i++)
            if (row->scores[i] >= least) found[count++] = (entry){row->scores[i], i};
    }
    return count;
}

/* Those of one bucket, most probable first, as a stable sort has them; returns their number. */
static int64_t sorted_bucket(const entry *found, int64_t count, float top, int64_t bucket,
                             entry *some) {
    int64_t size = 0;
    for (int64_t i = 0; i < count; i++)
        if (bucket_of(found[i].score, top) == bucket) some[size++] = found[i];
    qsort(some, size, sizeof(entry), by_score);
    return size;
}

/* What top-k and top-p keep of a row, if it ends before the last of `near` buckets; whether it does. */
static int cut_within(const row_of *row, const sampling *how, int64_t near, entry *found,
                      entry *some, cut *kept) {
    int64_t counts[BUCKETS] = {0}, most = how->top_k < row->vocabulary ? how->top_k : 0;
    double masses[BUCKETS] = {0.0}, mass = 0.0, total = row->total;
    int64_t count = gather(row, near < BUCKETS ? row->top - near / 32.0f : -FLT_MAX, found);
    for (int64_t i = 0; i < count; i++) {
        int64_t b = bucket_of(found[i].score, row->top);
        counts[b]++, masses[b] += row->weights[found[i].token];
    }
    int64_t last = near - (near < BUCKETS ? 2 : 1), room = row->vocabulary, before = 0;
    if (most) {
        int64_t b = 0;
        for (; b <= last && before + counts[b] < most; b++) before += counts[b];
        if (b > last) return 0;
        last = b, room = most - before; /* in the last bucket that is kept */
        sorted_bucket(found, count, row->top, last, some);
        *kept = some[room - 1];
        masses[last] = 0.0;
        for (int64_t i = 0; i < room; i++) masses[last] += row->weights[some[i].token];
        total = 0.0;
        for (b = 0; b <= last; b++) total += masses[b];
    }
    if (how->top_p >= 1.0f) return 1;
    for (int64_t b = 0; b <= last; mass += masses[b++]) {
        if (mass + masses[b] < how->top_p * total) continue;
        int64_t size = sorted_bucket(found, count, row->top, b, some);
        if (b == last && room < size) size = room;
        for (int64_t i = 0; i < size && mass < how->top_p * total; i++) {
            *kept = some[i];
            mass += row->weights[kept->token];
        }
        return 1;
    }
    return most || near == BUCKETS; /* rounding may leave all of them in */
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
        float *scores = malloc(vocabulary * sizeof(float)), *peaks = malloc(blocks * sizeof(float));
        double *sums = malloc(blocks * sizeof(double));
        entry *found = selects ? malloc(2 * vocabulary * sizeof(entry)) : NULL;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const float *at = logits + row * vocabulary;
            for (int64_t i = 0; i < vocabulary; i++) scores[i] = at[i] * inverse;
            if (positions[row] < how->min_tokens)
                for (int64_t e = 0; e < how->count; e++) scores[how->endings[e]] = -FLT_MAX;
            float top = -FLT_MAX;
            for (int64_t b = 0; b < blocks; b++) {
                int64_t end = (b + 1) * BLOCK < vocabulary ? (b + 1) * BLOCK : vocabulary;
                float peak = -FLT_MAX;
#pragma omp simd reduction(max : peak)
                for (int64_t i = b * BLOCK; i < end; i++) peak = scores[i] > peak ? scores[i] : peak;
                peaks[b] = peak;
                top = peak > top ? peak : top;
            }
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
                    row_of this = {scores, weights, peaks, vocabulary, top, all};
                    if (selects && !cut_within(&this, how, NEAR, found, found + vocabulary, &kept))
                        cut_within(&this, how, BUCKETS, found, found + vocabulary, &kept);
                    float least = how->min_p > 0.0f ? top + logf(how->min_p) : -FLT_MAX;
                    least = kept.score > least ? kept.score : least;
                    for (int64_t i = 0; i < vocabulary; i++)
                        weights[i] = scores[i] < least ? 0.0f : weights[i];
                    for (int64_t i = kept.token + 1; i < vocabulary; i++)
                        weights[i] = scores[i] == kept.score ? 0.0f : weights[i];
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
        free(peaks);
        free(sums);
        free(found);
    }
}
