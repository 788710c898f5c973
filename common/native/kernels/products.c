/* Products of activations with packed weights, each with what follows it on the tile, in registers
 * where there is an instruction for pairs.
 *
 * A panel holds PANEL columns of the weights, row by row of the product's inner dimension (in pairs
 * where there is an instruction for pairs), so that the inner loop reads it front to back. Between
 * the two sides of SwiGLU a panel has 32 columns of `up` and the same 32 of `gate`.
 */
#include "thread_pool.c"

#define ROWS 6 /* rows of a tile: 6 x 4 vectors of sums, and the weights, fill the registers */
#define STRETCH 32 /* of a product's inner dimension between two fetches */
#define CHUNK 66 /* rows of a task; twice as many where there are enough panels to divide */

/* What becomes of a product. */
typedef enum { REAL, FLOAT, ADD, SWIGLU } finish;

/* Where a tile goes: rows of `left` columns that are real, `apart` bytes from each other. */
typedef struct {
    char *to;
    int64_t apart, left;
} place;

/* What is read after a product: pieces of so many bytes at an offset, from two places. Memory is idle
 * while a product computes, so each task fetches a part of that into the caches, a few lines at a time:
 * many at once would delay the weights. */
typedef struct {
    int64_t rows;
    const int64_t *first; /* [rows + 1]: a row's pieces are first[row] .. first[row + 1] - 1 */
    const int64_t *offset, *bytes;
    const char *place[2];
} prefetch;

/* What one task fetches of it, and where it is. */
typedef struct {
    const prefetch *of;
    int64_t piece, last, byte, lines; /* the next line's piece and byte; lines at a time */
    int place;
} prefetch_share;

INLINE prefetch_share shared(const prefetch *of, const task *t, int64_t stride) {
    prefetch_share mine = {of, 0, 0, 0, 0, 0};
    if (!of || t->first >= of->rows) return mine;
    int64_t begin = of->first[t->first], lines = 0;
    int64_t pieces = of->first[t->last < of->rows ? t->last : of->rows] - begin;
    int64_t times = (t->end - t->begin + ROWS - 1) / ROWS * ((stride + STRETCH - 1) / STRETCH);
    mine.piece = begin + pieces * t->index / t->count;
    mine.last = begin + pieces * (t->index + 1) / t->count;
    for (int64_t p = mine.piece; p < mine.last; p++) lines += 2 * (of->bytes[p] + 63) / 64;
    mine.lines = (lines + times - 1) / times;
    return mine;
}

INLINE void fetch(prefetch_share *mine) {
    const prefetch *of = mine->of;
    for (int64_t line = 0; line < mine->lines && mine->piece < mine->last; line++) {
        __builtin_prefetch(of->place[mine->place] + of->offset[mine->piece] + mine->byte, 0, 2);
        mine->byte += 64;
        if (mine->byte < of->bytes[mine->piece]) continue;
        mine->byte = 0, mine->piece += mine->place, mine->place ^= 1;
    }
}

#ifdef DOT
/* silu(gate) * up; an inverse to within 2^-14 is enough for 8 bits. */
INLINE __m512 gated(__m512 up, __m512 gate) {
    __m512 power = rough_exp2(_mm512_mul_ps(gate, _mm512_set1_ps(-1.44269504f)));
    __m512 sum = _mm512_add_ps(_mm512_set1_ps(1.0f), power);
    return _mm512_mul_ps(_mm512_mul_ps(gate, up), _mm512_rcp14_ps(sum));
}

INLINE void put_pair(char *to, __m512 left, __m512 right) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(right, left));
}

/* A row of a tile into its place. */
INLINE void end_row(const finish how, const __m512 *sum, char *to, int64_t left) {
    int64_t columns = how == SWIGLU ? PANEL / 2 : PANEL;
    char part[PANEL * sizeof(float)], *out = left < columns ? part : to;
    int64_t item = how == FLOAT || how == ADD ? sizeof(float) : sizeof(real);
    if (how == ADD && out == part) memcpy(part, to, left * item);
    if (how == REAL) {
        put_pair(out, sum[0], sum[1]);
        put_pair(out + 64, sum[2], sum[3]);
    } else if (how == SWIGLU) {
        put_pair(out, gated(sum[0], sum[2]), gated(sum[1], sum[3]));
    } else {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            float *at = (float *)out + 16 * j;
            _mm512_storeu_ps(at, how == ADD ? _mm512_add_ps(_mm512_loadu_ps(at), sum[j]) : sum[j]);
        }
    }
    if (out == part) memcpy(to, part, left * item);
}

INLINE void tile(const int rows, const finish how, const real *a, int64_t stride, const weight *b,
                 prefetch_share *ahead, place out) {
    __m512 sum[ROWS][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[r][j] = _mm512_setzero_ps();
    for (int64_t k = 0; k < stride;) {
        int64_t end = k + STRETCH < stride ? k + STRETCH : stride;
        fetch(ahead);
        for (; k < end; k += 2) {
            __m512bh w[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                w[j] = (__m512bh)_mm512_loadu_si512(b + k * PANEL + j * 32);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                int32_t pair;
                memcpy(&pair, a + r * stride + k, 4);
                __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], x, w[j]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) end_row(how, sum[r], out.to + r * out.apart, out.left);
}
#else
#ifdef __AVX512F__
#define LANES 16
#define VECTORS 4
#elif defined(__AVX__)
#define LANES 8
#define VECTORS 2
#else
#define LANES 4
#define VECTORS 4
#endif
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));

/* A row of a tile into its place. */
INLINE void end_row(const finish how, const float *sums, char *to, int64_t left) {
    if (how == FLOAT) {
        memcpy(to, sums, left * sizeof(float));
    } else if (how == ADD) {
        float *out = (float *)to;
        for (int64_t i = 0; i < left; i++) out[i] += sums[i];
    } else if (how == SWIGLU) {
        real gated[PANEL / 2];
        const float *gate = sums + PANEL / 2;
        for (int i = 0; i < PANEL / 2; i++)
            gated[i] = narrow(gate[i] / (1.0f + fast_exp(-gate[i])) * sums[i]);
        memcpy(to, gated, left * sizeof(real));
    } else {
        real *out = (real *)to;
        for (int64_t i = 0; i < left; i++) out[i] = narrow(sums[i]);
    }
}

INLINE void tile(const int rows, const finish how, const real *a, int64_t stride, const weight *b,
                 prefetch_share *ahead, place out) {
    float sums[ROWS][PANEL];
    for (int at = 0; at < PANEL; at += LANES * VECTORS) {
        vector sum[ROWS][VECTORS];
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) sum[r][j] = (vector){0};
        for (int64_t k = 0; k < stride;) {
            int64_t end = k + STRETCH < stride ? k + STRETCH : stride;
            if (at == 0) fetch(ahead);
            for (; k < end; k++) {
                vector w[VECTORS];
#pragma GCC unroll 4
                for (int j = 0; j < VECTORS; j++)
                    w[j] = *(const vector *)(b + k * PANEL + at + j * LANES);
#pragma GCC unroll 6
                for (int r = 0; r < rows; r++) {
                    float x = wide(a[r * stride + k]);
#pragma GCC unroll 4
                    for (int j = 0; j < VECTORS; j++) sum[r][j] += x * w[j];
                }
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++)
                *(vector *)(sums[r] + at + j * LANES) = sum[r][j];
    }
    for (int r = 0; r < rows; r++) end_row(how, sums[r], out.to + r * out.apart, out.left);
}
#endif

/* a [rows, stride] times a panel. */
INLINE void strip(const finish how, const real *a, int64_t stride, int64_t rows,
                  const weight *panel, prefetch_share ahead, place out) {
    for (; rows >= ROWS; rows -= ROWS) {
        tile(ROWS, how, a, stride, panel, &ahead, out);
        a += ROWS * stride, out.to += ROWS * out.apart;
    }
    switch (rows) {
    case 1: tile(1, how, a, stride, panel, &ahead, out); break;
    case 2: tile(2, how, a, stride, panel, &ahead, out); break;
    case 3: tile(3, how, a, stride, panel, &ahead, out); break;
    case 4: tile(4, how, a, stride, panel, &ahead, out); break;
    case 5: tile(5, how, a, stride, panel, &ahead, out);
    }
}

/* Some columns of a product and where they go, [rows, stride] of `columns`. */
typedef struct {
    packed weights;
    finish how;
    void *out;
    int64_t stride, columns;
} part;

/* a [rows, stride] times the weights of all parts, in one phase: more tasks divide better among threads. */
static void product(worker *me, const real *a, int64_t stride, int64_t rows, const part *parts,
                    int64_t count, const prefetch *next) {
    int64_t panels = 0;
    for (int64_t i = 0; i < count; i++) panels += parts[i].weights.panels;
    int64_t size = panels >= 4 * me->threads ? 2 * CHUNK : CHUNK;
    cursor tasks = begin_phase(me);
    for (task t; next_task(&tasks, rows, size, panels, &t);) {
        int64_t panel = t.panel;
        const part *p = parts;
        for (; panel >= p->weights.panels; p++) panel -= p->weights.panels;
        int64_t item = p->how == FLOAT || p->how == ADD ? sizeof(float) : sizeof(real);
        int64_t step = p->how == SWIGLU ? PANEL / 2 : PANEL;
        place out = {(char *)p->out + (t.begin * p->stride + panel * step) * item, p->stride * item,
                     p->columns - panel * step < step ? p->columns - panel * step : step};
        const weight *weights = p->weights.data + panel * stride * PANEL;
        const real *from = a + t.begin * stride;
        int64_t some = t.end - t.begin;
        prefetch_share ahead = shared(next, &t, stride);
        switch (p->how) {
        case REAL: strip(REAL, from, stride, some, weights, ahead, out); break;
        case FLOAT: strip(FLOAT, from, stride, some, weights, ahead, out); break;
        case ADD: strip(ADD, from, stride, some, weights, ahead, out); break;
        case SWIGLU: strip(SWIGLU, from, stride, some, weights, ahead, out);
        }
    }
}

int64_t weight_bytes(void) { return sizeof(weight); }

/* Lay out columns of a product for `tile`: column c of all panels is row columns[c] of w
 * [any, length], or zeros where that is -1, or stays as it is where it is less. Of the inner dimension,
 * `inner` long, w is what begins at `begin`; there are zeros behind it up to `end`. */
void pack(const real *w, int64_t length, int64_t begin, int64_t end, int64_t inner,
          const int64_t *columns, int64_t panels, weight *out) {
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t c = 0; c < PANEL; c++) {
            int64_t from = columns[panel * PANEL + c];
            if (from < -1) continue;
            for (int64_t k = begin; k < end; k++) {
                int64_t at = k - begin;
                real value = from < 0 || at >= length ? narrow(0.0f) : w[from * length + at];
                weight *to = out + panel * inner * PANEL;
#ifdef DOT
                to[place_of(k, c)] = value;
#else
                to[place_of(k, c)] = wide(value);
#endif
            }
        }
}
