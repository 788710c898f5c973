/* One step: the whole forward in one call, so that no thread waits for Python. */
#include "attention.c"
#include "products.c"
#include "rows.c"
#include "sampling.c"

/* Seconds by kind of work, added up over calls. */
typedef struct {
    double inward, attention, outward, norms, logits;
} spent;

#define PHASES 10 /* of a layer at most: the last, with chunks; more than of beginning and end */

/* What the wanted rows read of a layer's keys and values. A block that a row and the one before it
 * share is fetched once. */
static prefetch wanted_blocks(const model *m, const step *s) {
    int64_t most = 0, each = m->block * HEAD_DIM * sizeof(real), count = 0;
    for (int64_t row = 0; row < s->used; row++)
        most += s->positions[row] / m->block + KV_HEADS;
    int64_t *memory = malloc((s->used + 1 + 2 * most) * sizeof(int64_t));
    int64_t *first = memory, *offset = first + s->used + 1, *bytes = offset + most;
    const int32_t *before = NULL;
    for (int64_t row = 0; row < s->used; row++) {
        const int32_t *blocks = s->table + s->slots[row] * m->longest;
        int64_t whole = s->positions[row] / m->block, rest = s->positions[row] % m->block + 1;
        first[row] = count;
        for (int64_t b = 0; b < whole; b++) {
            if (before && before[b] == blocks[b]) continue;
            offset[count] = blocks[b] * m->apart * sizeof(real);
            bytes[count++] = KV_HEADS * each;
        }
        for (int g = 0; g < KV_HEADS; g++) {
            offset[count] = blocks[whole] * m->apart * sizeof(real) + g * each;
            bytes[count++] = rest * HEAD_DIM * sizeof(real);
        }
        before = blocks;
    }
    first[s->used] = count;
    return (prefetch){s->used, first, offset, bytes, {NULL, NULL}};
}

/* The wanted rows' logits [used, vocabulary], or without these their states [used, dim]: normed, fp32. */
void forward(const model *m, const step *s, const scratch *room, float *logits, float *states,
             spent *time) {
    int64_t kv = m->layer->query.panels * PANEL;
    int64_t fused = kv + m->layer->keyvalue.panels * PANEL;
    prefetch ahead = {0};
    if (!states) ahead = wanted_blocks(m, s);
    int64_t groups = groups_of(s->rows);
    counter *counters = calloc((m->layers + 1) * PHASES * groups, sizeof(counter));
    double since = omp_get_wtime();
#pragma omp parallel
    {
        worker me = join_pool(groups, counters);
        int64_t rows = s->rows;
        embed(&me, m, s->tokens, rows, room->x);
        end_phase(&time->norms, &since);
        for (int64_t index = 0; index < m->layers; index++) {
            const layer *at = m->layer + index;
            norm_rows(&me, m, room->x, at->norm, rows, room->normed, NULL);
            end_phase(&time->norms, &since);
            if (index == m->layers - 1 && s->used < rows) {
                /* Of a prompt's earlier tokens the last layer needs only keys and values. */
                const real *early = room->normed + s->used * m->dim_stride;
                int64_t count = rows - s->used;
                real *kept = room->fused + s->used * fused + kv;
                part only = {at->keyvalue, REAL, kept, fused, fused - kv};
                product(&me, early, m->dim_stride, count, &only, 1, NULL);
                end_phase(&time->inward, &since);
                store(&me, m, at, s, kept, fused, s->used, count);
                end_phase(&time->attention, &since);
                rows = s->used;
            }
            prefetch next = ahead;
            next.place[0] = (char *)at->keys, next.place[1] = (char *)at->values;
            part inward[] = {
                {at->query, REAL, room->fused, fused, kv},
                {at->keyvalue, REAL, room->fused + kv, fused, fused - kv},
                {at->forward, SWIGLU, room->ff, m->ff_stride, m->ff},
            };
            product(&me, room->normed, m->dim_stride, rows, inward, at->second ? 2 : 3,
                    at->window || states ? NULL : &next);
            end_phase(&time->inward, &since);
            /* One row of a slot, and what else it needs is in the cache: it stores its own. */
            if (!s->alone) {
                store(&me, m, at, s, room->fused + kv, fused, 0, rows);
                end_phase(&time->attention, &since);
            }
            if (s->copies) {
                if (omp_get_thread_num() == 0)
                    for (int64_t c = 0; c < s->copies; c++) /* a target may be a later source */
                        copy_block(m, at, s->copy[3 * c], s->copy[3 * c + 1], s->copy[3 * c + 2]);
                end_phase(&time->attention, &since);
            }
            attend(&me, m, at, s, rows, room->fused, fused, kv, s->alone, room->mixed,
                   m->mixed_stride);
            end_phase(&time->attention, &since);
            part outward = {at->outward, ADD, room->x, m->dim, m->dim};
            product(&me, room->mixed, m->mixed_stride, rows, &outward, 1, NULL);
            end_phase(&time->outward, &since);
            if (!at->second) continue;
            norm_rows(&me, m, room->x, at->second, rows, room->normed, NULL);
            end_phase(&time->norms, &since);
            product(&me, room->normed, m->dim_stride, rows, inward + 2, 1, NULL);
            end_phase(&time->inward, &since);
            part down = {at->down, ADD, room->x, m->dim, m->dim};
            product(&me, room->ff, m->ff_stride, rows, &down, 1, NULL);
            end_phase(&time->outward, &since);
        }
        norm_rows(&me, m, room->x, logits ? m->scaled_norm : m->norm, s->used, room->normed, states);
        end_phase(&time->norms, &since);
        if (logits) {
            part all = {m->logits, FLOAT, logits, m->vocabulary, m->vocabulary};
            product(&me, room->normed, m->dim_stride, s->used, &all, 1, NULL);
            end_phase(&time->logits, &since);
        }
    }
    free(counters);
    free((void *)ahead.first);
}

/* The logits [rows, vocabulary] of rows' states [rows, dim]. */
void read_states(const model *m, const float *states, int64_t rows, const scratch *room,
                 float *logits) {
    int64_t groups = groups_of(rows);
    counter *counters = calloc(2 * groups, sizeof(counter));
#pragma omp parallel
    {
        worker me = join_pool(groups, counters);
        scale_rows(&me, m, states, rows, room->normed);
#pragma omp barrier
        part all = {m->logits, FLOAT, logits, m->vocabulary, m->vocabulary};
        product(&me, room->normed, m->dim_stride, rows, &all, 1, NULL);
    }
    free(counters);
}
