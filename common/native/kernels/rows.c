/* What is done to rows one by one: embedding, norms, drawing a token. */
#include "thread_pool.c"

#define BLOCK 64 /* as in common.logprobs.draw */

/* x [rows, dim] = the tokens' embeddings. Where they are the weights of the logits, those are read: one
 * row in scattered places costs less than its own copy in memory. */
static void embed(worker *me, const model *m, const int64_t *tokens, int64_t rows, float *x) {
    int64_t dim = m->dim;
    cursor tasks = begin_phase(me);
    for (task t; next_task(&tasks, rows, SOME_ROWS, 1, &t);)
        for (int64_t row = t.begin; row < t.end; row++) {
            int64_t token = tokens[row];
            float *to = x + row * dim;
            if (m->embedding) {
                for (int64_t i = 0; i < dim; i++) to[i] = wide(m->embedding[token * dim + i]);
                continue;
            }
            const weight *panel = m->logits.data + token / PANEL * m->dim_stride * PANEL;
            for (int64_t i = 0; i < dim; i++) to[i] = weight_at(panel, i, token % PANEL);
        }
}

/* out [rows, dim_stride] = states [rows, dim] as the logits' product reads them. */
static void scale_rows(worker *me, const model *m, const float *states, int64_t rows, real *out) {
    int64_t dim = m->dim;
    float scaled[dim];
    cursor tasks = begin_phase(me);
    for (task t; next_task(&tasks, rows, SOME_ROWS, 1, &t);)
        for (int64_t row = t.begin; row < t.end; row++) {
            for (int64_t i = 0; i < dim; i++) scaled[i] = states[row * dim + i] * m->logits_scale;
            narrow_all(scaled, out + row * m->dim_stride, dim);
        }
}

/* LayerNorm or RMSNorm of x [rows, dim], times weight: to out [rows, dim_stride], or to states
 * [rows, dim] in fp32. */
static void norm_rows(worker *me, const model *m, const float *x, const float *weight, int64_t rows,
                      real *out, float *states) {
    int64_t dim = m->dim;
    float normed[dim];
    cursor tasks = begin_phase(me);
    for (task t; next_task(&tasks, rows, SOME_ROWS, 1, &t);)
        for (int64_t row = t.begin; row < t.end; row++) {
            const float *at = x + row * dim;
            float sum = 0.0f, squares = 0.0f;
            if (m->centred) {
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < dim; i++) sum += at[i];
            }
            float mean = sum / dim;
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < dim; i++) squares += (at[i] - mean) * (at[i] - mean);
            float scale = 1.0f / sqrtf(squares / dim + m->eps);
            for (int64_t i = 0; i < dim; i++) normed[i] = (at[i] - mean) * scale * weight[i];
            if (states) memcpy(states + row * dim, normed, dim * sizeof(float));
            else narrow_all(normed, out + row * m->dim_stride, dim);
        }
}

/* Inverse-CDF sampling as common.logprobs.draw, for logits without a filter. */
void draw(const float *logits, int64_t rows, int64_t vocabulary, float temperature,
          const double *uniforms, int64_t *tokens, float *logprobs) {
    int64_t blocks = (vocabulary + BLOCK - 1) / BLOCK;
#pragma omp parallel
    {
        float *weights = calloc(blocks * BLOCK, sizeof(float));
        double *sums = malloc(blocks * sizeof(double));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const float *at = logits + row * vocabulary;
            float top = -FLT_MAX, inverse = 1.0f / temperature;
#pragma omp simd reduction(max : top)
            for (int64_t i = 0; i < vocabulary; i++) {
                weights[i] = at[i] * inverse;
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
            logprobs[row] = at[token] * inverse - top - (float)log(total);
        }
        free(weights);
        free(sums);
    }
}
