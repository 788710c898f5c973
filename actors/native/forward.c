/* One step of all slots: the whole forward in one call, so that nothing waits for Python. */
#include <omp.h>

#include "attention.c"
#include "products.c"
#include "rows.c"

/* Seconds by kind of work, added up over calls. */
typedef struct {
    double inward, attention, outward, norms, logits;
} spent;

static double lap(double *since) {
    double now = omp_get_wtime(), took = now - *since;
    *since = now;
    return took;
}

/* What attention will read of the slots' caches in this layer: keys and values of the newest rows. */
static soon cached(const model *m, const layer *at, const step *s, const char **begin,
                   int64_t *bytes) {
    for (int64_t row = 0; row < s->used; row++) {
        int64_t slot = s->slots[row] * m->context * HEAD_DIM;
        begin[2 * row] = (const char *)(at->keys + slot);
        begin[2 * row + 1] = (const char *)(at->values + slot);
        bytes[2 * row] = bytes[2 * row + 1] = (s->positions[row] + 1) * HEAD_DIM * sizeof(real);
    }
    return (soon){2 * s->used, begin, bytes};
}

/* logits [used, vocabulary] after the newest token of each slot. */
void forward(const model *m, const step *s, const scratch *room, float *logits, spent *time) {
    int64_t rows = s->rows, kv = m->layer->query.panels * PANEL;
    int64_t fused = kv + m->layer->keyvalue.panels * PANEL;
    const char **begin = malloc(2 * s->used * sizeof *begin);
    int64_t *bytes = malloc(2 * s->used * sizeof *bytes);
    double since = omp_get_wtime();
    embed(m->embedding, s->tokens, rows, m->dim, room->x);
    for (int64_t index = 0; index < m->layers; index++) {
        const layer *at = m->layer + index;
        layer_norm(room->x, at->norm, rows, m->dim, room->normed, m->dim_stride);
        time->norms += lap(&since);
        if (index == m->layers - 1 && s->used < rows) {
            /* Of a prompt's earlier tokens the last layer owes later ones its keys and values,
             * and nothing else. */
            const real *early = room->normed + s->used * m->dim_stride;
            int64_t count = rows - s->used;
            real *made = room->fused + s->used * fused + kv;
            part only = {at->keyvalue, REAL, made, fused, fused - kv};
            product(early, m->dim_stride, count, &only, 1, NULL);
            time->inward += lap(&since);
            store(m, at, made, fused, count, s->slots + s->used, s->positions + s->used);
            time->attention += lap(&since);
            rows = s->used;
        }
        soon next = cached(m, at, s, begin, bytes);
        part inward[] = {
            {at->query, REAL, room->fused, fused, kv},
            {at->keyvalue, REAL, room->fused + kv, fused, fused - kv},
            {at->forward, SWIGLU, room->both + m->inner, m->both_stride, m->ff},
        };
        product(room->normed, m->dim_stride, rows, inward, 3, &next);
        time->inward += lap(&since);
        attend(m, at, s, rows, room->fused, fused, kv, room->both, m->both_stride);
        time->attention += lap(&since);
        part outward = {at->outward, ADD, room->x, m->dim, m->dim};
        product(room->both, m->both_stride, rows, &outward, 1, NULL);
        time->outward += lap(&since);
    }
    free(begin);
    free(bytes);
    layer_norm(room->x, m->norm, s->used, m->dim, room->normed, m->dim_stride);
    time->norms += lap(&since);
    part all = {m->logits, FLOAT, logits, m->vocabulary, m->vocabulary};
    product(room->normed, m->dim_stride, s->used, &all, 1, NULL);
    time->logits += lap(&since);
}

/* Give a slot the first positions of another in all layers. */
void move(const model *m, int64_t source, int64_t target, int64_t positions) {
    for (int64_t index = 0; index < m->layers; index++)
        copy_slot(m, m->layer + index, source, target, positions);
}
