/* gemm_small.c: see gemm_small.h. Pure functions of their arguments; any thread. */
#include "kernels/cpu/gemm_small.h"

#include "kernels/cpu/vector.h"

/* Accumulators that fit the register file beside their operands: 32 registers with AVX-512, 16 otherwise. */
#if defined(__AVX512F__)
enum { COLUMN_ROWS = 8, COLUMN_VECS = 3, DOT_ROWS = 4 };
#else
enum { COLUMN_ROWS = 4, COLUMN_VECS = 3, DOT_ROWS = 2 };
#endif
enum { DOT_COLUMNS = 4 };

VEC_INLINE vec blend_c(const struct small_gemm *g, vec sum, vec c)
{
    sum = sum * g->alpha;
    return g->beta == 0.0f ? sum : vec_fma(vec_set1(g->beta), c, sum);
}

/* ---- vectors along n ---- */

/* rows x (vecs vectors), the last `tail` lanes wide; rows, vecs and masked are constants. */
VEC_INLINE void columns_tile(const struct small_gemm *g, int64_t i, int64_t j, int rows, int vecs,
                             bool masked, int64_t tail)
{
    const float *a = g->a + i * g->a_row, *b = (const float *)g->b + j;
    vec sum[COLUMN_ROWS][COLUMN_VECS] = {0};
    for (int64_t l = 0; l < g->k; l++) {
        vec column[COLUMN_VECS];
        for (int v = 0; v < vecs; v++)
            column[v] = masked ? vec_load_n(b, tail) : vec_load(b + v * VEC_LANES);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vecs; v++)
                sum[r][v] = vec_fma(vec_set1(a[r * g->a_row]), column[v], sum[r][v]);
        a += g->a_column;
        b += g->b_stride;
    }
    for (int r = 0; r < rows; r++) {
        float *c = g->c + (i + r) * g->c_stride + j;
        for (int v = 0; v < vecs; v++, c += VEC_LANES) {
            if (masked)
                vec_store_n(c, blend_c(g, sum[r][v], g->beta == 0.0f ? vec_set1(0) : vec_load_n(c, tail)),
                            tail);
            else
                vec_store(c, blend_c(g, sum[r][v], g->beta == 0.0f ? vec_set1(0) : vec_load(c)));
        }
    }
}

VEC_INLINE void columns_strip(const struct small_gemm *g, int64_t j, int vecs, bool masked, int64_t tail)
{
    int64_t i = 0;
    for (; i + COLUMN_ROWS <= g->m; i += COLUMN_ROWS)
        columns_tile(g, i, j, COLUMN_ROWS, vecs, masked, tail);
    for (; i + COLUMN_ROWS / 2 <= g->m; i += COLUMN_ROWS / 2)
        columns_tile(g, i, j, COLUMN_ROWS / 2, vecs, masked, tail);
    for (; i < g->m; i++)
        columns_tile(g, i, j, 1, vecs, masked, tail);
}

int64_t CPU_NAME(gemm_panel_width)(int64_t n)
{
    int64_t vecs = n / VEC_LANES;
    if (vecs == 0)
        return n;
    return vecs == 1 ? VEC_LANES : vecs == 2 || vecs == 4 ? 2 * VEC_LANES : COLUMN_VECS * VEC_LANES;
}

void CPU_NAME(gemm_small_columns)(const struct small_gemm *g)
{
    for (int64_t j = 0, width; j < g->n; j += width) {
        width = CPU_NAME(gemm_panel_width)(g->n - j);
        if (width == COLUMN_VECS * VEC_LANES)
            columns_strip(g, j, COLUMN_VECS, false, 0);
        else if (width == 2 * VEC_LANES)
            columns_strip(g, j, 2, false, 0);
        else if (width == VEC_LANES)
            columns_strip(g, j, 1, false, 0);
        else
            columns_strip(g, j, 1, true, width);
    }
}

/* ---- vectors along k ---- */

/* rows x columns dot products; rows, columns and type are constants. On the way it asks for `fetch_step` bytes
 * from `fetch` on at each step along k. */
VEC_INLINE void dots_tile(const struct small_gemm *g, int64_t i, int64_t j, int rows, int columns,
                          enum kernel_type type, const char *fetch, int64_t fetch_step)
{
    enum { MOST = DOT_ROWS * DOT_COLUMNS };
    int64_t size = type == TYPE_F32 ? 4 : 2, l = 0;
    const float *a = g->a + i * g->a_row;
    const char *b = (const char *)g->b + j * g->b_stride * size;
    vec sum[MOST] = {0}, left[DOT_ROWS];
    for (; l + VEC_LANES <= g->k; l += VEC_LANES) {
        for (int64_t byte = 0; byte < fetch_step; byte += 64)
            __builtin_prefetch(fetch + byte);
        fetch += fetch_step;
        for (int r = 0; r < rows; r++)
            left[r] = vec_load(a + r * g->a_row + l);
        for (int c = 0; c < columns; c++) {
            vec right = vec_load_as(b + (c * g->b_stride + l) * size, type);
            for (int r = 0; r < rows; r++)
                sum[r * columns + c] = vec_fma(left[r], right, sum[r * columns + c]);
        }
    }
    if (l < g->k) {
        for (int r = 0; r < rows; r++)
            left[r] = vec_load_n(a + r * g->a_row + l, g->k - l);
        for (int c = 0; c < columns; c++) {
            vec right = vec_load_as_n(b + (c * g->b_stride + l) * size, type, g->k - l);
            for (int r = 0; r < rows; r++)
                sum[r * columns + c] = vec_fma(left[r], right, sum[r * columns + c]);
        }
    }
    float sums[MOST + VEC_LANES];
    if (rows * columns >= VEC_LANES / 2) {
        for (int s = 0; s < rows * columns; s += VEC_LANES) {
            vec group[VEC_LANES];
            for (int v = 0; v < VEC_LANES; v++)
                group[v] = s + v < rows * columns ? sum[s + v] : vec_set1(0);
            vec_store(sums + s, vec_sum_each(group));
        }
    } else {
        for (int s = 0; s < rows * columns; s++)
            sums[s] = vec_sum(sum[s]);
    }
    for (int r = 0; r < rows; r++) {
        float *c_row = g->c + (i + r) * g->c_stride + j;
        for (int c = 0; c < columns; c++) {
            float value = g->alpha * sums[r * columns + c];
            c_row[c] = g->beta == 0.0f ? value : value + g->beta * c_row[c];
        }
    }
}

/* One row of A. B's rows one after the other: the memory behind them is read as one stream, which is what the
 * processor fetches ahead best; rows side by side reach a third of it. */
VEC_INLINE void dots_row(const struct small_gemm *g, enum kernel_type type)
{
    int64_t size = type == TYPE_F32 ? 4 : 2;
    for (int64_t j = 0; j < g->n; j += VEC_LANES) {
        int64_t columns = g->n - j < VEC_LANES ? g->n - j : VEC_LANES;
        vec sums[VEC_LANES];
        for (int64_t c = 0; c < VEC_LANES; c++)
            sums[c] = vec_set1(0);
        for (int64_t c = 0; c < columns; c++) {
            const char *b = (const char *)g->b + (j + c) * g->b_stride * size;
            vec sum[4] = {0};
            int64_t l = 0;
            for (; l + 4 * VEC_LANES <= g->k; l += 4 * VEC_LANES)
                for (int v = 0; v < 4; v++) {
                    int64_t at = l + v * VEC_LANES;
                    sum[v] = vec_fma(vec_load(g->a + at), vec_load_as(b + at * size, type), sum[v]);
                }
            for (; l + VEC_LANES <= g->k; l += VEC_LANES)
                sum[0] = vec_fma(vec_load(g->a + l), vec_load_as(b + l * size, type), sum[0]);
            if (l < g->k)
                sum[1] = vec_fma(vec_load_n(g->a + l, g->k - l), vec_load_as_n(b + l * size, type, g->k - l),
                                 sum[1]);
            sums[c] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
        vec old = g->beta == 0.0f ? vec_set1(0) : vec_load_n(g->c + j, columns);
        vec_store_n(g->c + j, blend_c(g, vec_sum_each(sums), old), columns);
    }
}

/* B's rows are the outer loop: each is read from memory once and is in the first-level cache for all of A's.
 * The next DOT_COLUMNS rows are asked for meanwhile, evenly over the work: four short streams side by side are
 * not what the processor recognises by itself, and all requests at once stall it. */
VEC_INLINE void dots_all(const struct small_gemm *g, enum kernel_type type)
{
    int64_t j = 0, size = type == TYPE_F32 ? 4 : 2;
    if (g->m == 1) {
        dots_row(g, type);
        return;
    }
    int64_t tiles = g->m / DOT_ROWS + g->m % DOT_ROWS;
    int64_t fetch_step = g->b_stride == g->k ? DOT_COLUMNS * VEC_LANES * size / tiles : 0;
    for (; j + DOT_COLUMNS <= g->n; j += DOT_COLUMNS) {
        const char *fetch = (const char *)g->b + (j + DOT_COLUMNS) * g->k * size;
        int64_t i = 0;
        for (; i + DOT_ROWS <= g->m; i += DOT_ROWS, fetch += g->k / VEC_LANES * fetch_step)
            dots_tile(g, i, j, DOT_ROWS, DOT_COLUMNS, type, fetch, fetch_step);
        for (; i < g->m; i++, fetch += g->k / VEC_LANES * fetch_step)
            dots_tile(g, i, j, 1, DOT_COLUMNS, type, fetch, fetch_step);
    }
    for (; j < g->n; j++)
        for (int64_t i = 0; i < g->m; i++)
            dots_tile(g, i, j, 1, 1, type, NULL, 0);
}

void CPU_NAME(gemm_small_dots)(const struct small_gemm *g)
{
    if (g->b_type == TYPE_BF16)
        dots_all(g, TYPE_BF16);
    else if (g->b_type == TYPE_F16)
        dots_all(g, TYPE_F16);
    else
        dots_all(g, TYPE_F32);
}
