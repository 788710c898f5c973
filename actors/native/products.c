/* Products of activations with packed weights, each with what follows it on the tile in registers.
 *
 * A panel holds PANEL columns of the weights, row by row of the product's inner dimension (in pairs
 * where there is an instruction for pairs), so that the inner loop reads it front to back. Between
 * the two sides of SwiGLU a panel has 32 columns of `up` and the same 32 of `gate`.
 */
#include "native.h"

#define ROWS 6 /* rows of a tile: 6 x 4 vectors of sums, and the weights, fill the registers */
#define CHUNK 66

#define INLINE static inline __attribute__((always_inline))

#ifdef DOT
INLINE void tile(const int rows, const real *a, int64_t stride, const weight *b, int64_t inner,
                 float out[ROWS][PANEL]) {
    __m512 sum[ROWS][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[r][j] = _mm512_setzero_ps();
    for (int64_t k = 0; k < inner; k += 2) {
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
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) _mm512_storeu_ps(out[r] + 16 * j, sum[r][j]);
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

INLINE void tile(const int rows, const real *a, int64_t stride, const weight *b, int64_t inner,
                 float out[ROWS][PANEL]) {
    for (int at = 0; at < PANEL; at += LANES * VECTORS) {
        vector sum[ROWS][VECTORS];
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) sum[r][j] = (vector){0};
        for (int64_t k = 0; k < inner; k++) {
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
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++)
                *(vector *)(out[r] + at + j * LANES) = sum[r][j];
    }
}
#endif

static void some_rows(int rows, const real *a, int64_t stride, const weight *b, int64_t inner,
                      float out[ROWS][PANEL]) {
    switch (rows) {
    case 1: tile(1, a, stride, b, inner, out); break;
    case 2: tile(2, a, stride, b, inner, out); break;
    case 3: tile(3, a, stride, b, inner, out); break;
    case 4: tile(4, a, stride, b, inner, out); break;
    case 5: tile(5, a, stride, b, inner, out); break;
    default: tile(6, a, stride, b, inner, out);
    }
}

/* out [PANEL / 2] = silu(gate) * up. */
INLINE void swiglu(const float *up, const float *gate, real *out) {
#ifdef DOT
    /* The result keeps 8 bits: 2^z to within 1.1e-4 and an inverse to within 2^-14 are enough. */
    for (int i = 0; i < PANEL / 2; i += 16) {
        __m512 g = _mm512_loadu_ps(gate + i), u = _mm512_loadu_ps(up + i);
        __m512 z = _mm512_mul_ps(g, _mm512_set1_ps(-1.44269504f));
        __m512 n = _mm512_roundscale_ps(z, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        __m512 f = _mm512_sub_ps(z, n);
        __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.05511586f), f, _mm512_set1_ps(0.24260645f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69327125f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99992865f));
        __m512 sum = _mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(p, n));
        __m512 made = _mm512_mul_ps(_mm512_mul_ps(g, u), _mm512_rcp14_ps(sum));
        __m256i bits = (__m256i)_mm512_cvtneps_pbh(made);
        memcpy(out + i, &bits, sizeof bits);
    }
#else
    for (int i = 0; i < PANEL / 2; i++)
        out[i] = narrow(gate[i] / (1.0f + fast_exp(-gate[i])) * up[i]);
#endif
}

/* What becomes of a product. */
typedef enum { REAL, FLOAT, ADD, SWIGLU } finish;

/* A row of a tile into its place; `left` of its columns are real. */
INLINE void end_row(finish how, const float *sums, char *to, int64_t left) {
    if (how == REAL) {
        real *out = (real *)to;
        for (int64_t i = 0; i < left; i++) out[i] = narrow(sums[i]);
    } else if (how == FLOAT) {
        memcpy(to, sums, left * sizeof(float));
    } else if (how == ADD) {
        float *out = (float *)to;
        for (int64_t i = 0; i < left; i++) out[i] += sums[i];
    } else {
        real made[PANEL / 2];
        swiglu(sums, sums + PANEL / 2, made);
        memcpy(to, made, left * sizeof(real));
    }
}

/* Bytes that will be read after a product: the product computes while memory is idle, so each task
 * of it fetches its share of them, some lines with every tile. */
typedef struct {
    int64_t runs; /* as many */
    const char *const *begin;
    const int64_t *bytes;
} soon;

INLINE void fetch(const soon *next, int64_t first, int64_t last, int64_t share, int64_t shares) {
    for (int64_t run = first; run < last; run++) {
        int64_t lines = (next->bytes[run] + 63) / 64;
        for (int64_t line = lines * share / shares; line < lines * (share + 1) / shares; line++)
            __builtin_prefetch(next->begin[run] + line * 64, 0, 2);
    }
}

/* Some columns of a product and where they go, [rows, stride] of `columns`. */
typedef struct {
    packed weights;
    finish how;
    void *out;
    int64_t stride, columns;
} part;

/* a [rows, stride] times the weights of all parts, in one loop: more tasks, better shared out. */
static void product(const real *a, int64_t stride, int64_t rows, const part *parts, int64_t count,
                    const soon *next) {
    int64_t chunks = (rows + CHUNK - 1) / CHUNK, panels = 0;
    for (int64_t i = 0; i < count; i++) panels += parts[i].weights.panels;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t task = 0; task < panels * chunks; task++) {
        int64_t panel = task / chunks, begin = task % chunks * CHUNK;
        int64_t end = begin + CHUNK < rows ? begin + CHUNK : rows;
        const part *p = parts;
        for (; panel >= p->weights.panels; p++) panel -= p->weights.panels;
        int64_t item = p->how == FLOAT || p->how == ADD ? sizeof(float) : sizeof(real);
        int64_t step = p->how == SWIGLU ? PANEL / 2 : PANEL;
        int64_t left = p->columns - panel * step < step ? p->columns - panel * step : step;
        const weight *weights = p->weights.data + panel * stride * PANEL;
        float sums[ROWS][PANEL];
        for (int64_t row = begin; row < end; row += ROWS) {
            int some = end - row < ROWS ? end - row : ROWS;
            some_rows(some, a + row * stride, stride, weights, stride, sums);
            for (int i = 0; i < some; i++) {
                int64_t at = (row + i) * p->stride + panel * step;
                end_row(p->how, sums[i], (char *)p->out + at * item, left);
            }
            if (next)
                fetch(next, next->runs * task / (panels * chunks),
                      next->runs * (task + 1) / (panels * chunks), (row - begin) / ROWS,
                      (end - begin + ROWS - 1) / ROWS);
        }
    }
}

int64_t weight_bytes(void) { return sizeof(weight); }

/* Lay out columns of a product for `tile`: column c of all panels is row columns[c] of w
 * [any, length], or zeros where that is negative; `inner` >= length is the rows' padded length. */
void pack(const real *w, int64_t length, int64_t inner, const int64_t *columns, int64_t panels,
          weight *out) {
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t c = 0; c < PANEL; c++) {
            int64_t from = columns[panel * PANEL + c];
            for (int64_t k = 0; k < inner; k++) {
                real value = from < 0 || k >= length ? narrow(0.0f) : w[from * length + k];
                weight *to = out + panel * inner * PANEL;
#ifdef DOT
                to[(k / 2) * 2 * PANEL + c * 2 + k % 2] = value;
#else
                to[k * PANEL + c] = wide(value);
#endif
            }
        }
}
