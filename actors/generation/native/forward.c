/* One step of all slots: the whole forward in one call, so that no thread waits for Python. */
#include "attention.c"
#include "products.c"
#include "rows.c"

/* Seconds by kind of work, added up over calls. */
typedef struct {
    double inward, attention, outward, norms, logits;
} spent;

#define PHASES 10 /* of a layer at most: the last, with chunks; more than of beginning and end */

/* logits [used, vocabulary] after the newest token of each slot. */
void forward(const model *m, const step *s, const scratch *room, float *logits, spent *time) {
    int64_t kv = m->layer->query.panels * PANEL;
    int64_t fused = kv + m->layer->keyvalue.panels * PANEL;
    int64_t offset[s->used * KV_HEADS], bytes[s->used * KV_HEADS]; /* of the newest rows */
    for (int64_t row = 0; row < s->used; row++)
        for (int g = 0; g < KV_HEADS; g++) {
            offset[row * KV_HEADS + g] = cache_at(m, s->slots[row], g) * sizeof(real);
            bytes[row * KV_HEADS + g] = (s->positions[row] + 1) * HEAD_DIM * sizeof(real);
        }
    int64_t groups = groups_of(s->rows);
    counter *counters = calloc((m->layers + 1) * PHASES * groups, sizeof(counter));
    double since = omp_get_wtime();
#pragma omp parallel
    {
        worker me = join_pool(groups, counters);
        int64_t rows = s->rows;
        embed(&me, m->embedding, s->tokens, rows, m->dim, room->x);
        end_phase(&time->norms, &since);
        for (int64_t index = 0; index < m->layers; index++) {
            const layer *at = m->layer + index;
            norm_rows(&me, m, room->x, at->norm, rows, room->normed);
            end_phase(&time->norms, &since);
            if (index == m->layers - 1 && s->used < rows) {
                /* Of a prompt's earlier tokens the last layer needs only keys and values. */
                const real *early = room->normed + s->used * m->dim_stride;
                int64_t count = rows - s->used;
                real *kept = room->fused + s->used * fused + kv;
                part only = {at->keyvalue, REAL, kept, fused, fused - kv};
                product(&me, early, m->dim_stride, count, &only, 1, NULL);
                end_phase(&time->inward, &since);
                store(&me, m, at, kept, fused, count, s->slots + s->used, s->positions + s->used);
                end_phase(&time->attention, &since);
                rows = s->used;
            }
            prefetch next = {s->used, KV_HEADS, offset, bytes,
                             {(char *)at->keys, (char *)at->values}};
            part inward[] = {
                {at->query, REAL, room->fused, fused, kv},
                {at->keyvalue, REAL, room->fused + kv, fused, fused - kv},
                {at->forward, SWIGLU, room->ff, m->ff_stride, m->ff},
            };
            product(&me, room->normed, m->dim_stride, rows, inward, at->second ? 2 : 3,
                    at->window ? NULL : &next);
            end_phase(&time->inward, &since);
            /* One row of each slot, and what else it needs is in the cache: it stores its own. */
            int storing = rows == s->used && !s->copies;
            if (!storing) {
                store(&me, m, at, room->fused + kv, fused, rows, s->slots, s->positions);
                end_phase(&time->attention, &since);
            }
            if (s->copies) {
                if (omp_get_thread_num() == 0)
                    for (int64_t c = 0; c < s->copies; c++) /* a target may be a later source */
                        copy_slot(m, at, s->copy[3 * c], s->copy[3 * c + 1], s->copy[3 * c + 2]);
                end_phase(&time->attention, &since);
            }
            attend(&me, m, at, s, rows, room->fused, fused, kv, storing, room->mixed,
                   m->mixed_stride);
            end_phase(&time->attention, &since);
            part outward = {at->outward, ADD, room->x, m->dim, m->dim};
            product(&me, room->mixed, m->mixed_stride, rows, &outward, 1, NULL);
            end_phase(&time->outward, &since);
            if (!at->second) continue;
            norm_rows(&me, m, room->x, at->second, rows, room->normed);
            end_phase(&time->norms, &since);
            product(&me, room->normed, m->dim_stride, rows, inward + 2, 1, NULL);
            end_phase(&time->inward, &since);
            part down = {at->down, ADD, room->x, m->dim, m->dim};
            product(&me, room->ff, m->ff_stride, rows, &down, 1, NULL);
            end_phase(&time->outward, &since);
        }
        norm_rows(&me, m, room->x, m->norm, s->used, room->normed);
        end_phase(&time->norms, &since);
        part all = {m->logits, FLOAT, logits, m->vocabulary, m->vocabulary};
        product(&me, room->normed, m->dim_stride, s->used, &all, 1, NULL);
        end_phase(&time->logits, &since);
    }
    free(counters);
}

/* Give a slot the first positions of another in all layers. */
void move(const model *m, int64_t source, int64_t target, int64_t positions) {
    for (int64_t index = 0; index < m->layers; index++)
        copy_slot(m, m->layer + index, source, target, positions);
}
