/* What is done to rows one by one: embedding and norms. */
#include "thread_pool.c"

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
