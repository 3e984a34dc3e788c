/* gemm_small.c: see gemm_small.h. Pure functions of their arguments; any thread. */
#include "kernels/cpu/gemm_small.h"

#include "kernels/cpu/vector.h"

/* Accumulators that fit the register file beside their operands: 32 registers with AVX-512, 16 otherwise. */
#if defined(__AVX512F__)
enum { COLUMN_ROWS = 8, COLUMN_VECS = 3, DOT_ROWS = 4 };
#else
enum { COLUMN_ROWS = 4, COLUMN_VECS = 3, DOT_ROWS = 2 };
#endif
enum { DOT_COLUMNS = 4, GEMV_COLUMNS = 8 };

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

/* rows x columns dot products; rows, columns and type are constants. */
VEC_INLINE void dots_tile(const struct small_gemm *g, int64_t i, int64_t j, int rows, int columns,
                          enum kernel_type type)
{
    enum { MOST = DOT_ROWS * DOT_COLUMNS > GEMV_COLUMNS ? DOT_ROWS * DOT_COLUMNS : GEMV_COLUMNS };
    int64_t size = type == TYPE_F32 ? 4 : 2, l = 0;
    const float *a = g->a + i * g->a_row;
    const char *b = (const char *)g->b + j * g->b_stride * size;
    vec sum[MOST] = {0}, left[DOT_ROWS];
    for (; l + VEC_LANES <= g->k; l += VEC_LANES) {
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

/* B's rows are the outer loop: each is read from memory once and is in the first-level cache for all of A's.
 */
VEC_INLINE void dots_all(const struct small_gemm *g, enum kernel_type type)
{
    int64_t j = 0;
    if (g->m == 1)
        for (; j + GEMV_COLUMNS <= g->n; j += GEMV_COLUMNS)
            dots_tile(g, 0, j, 1, GEMV_COLUMNS, type);
    for (; j + DOT_COLUMNS <= g->n; j += DOT_COLUMNS) {
        int64_t i = 0;
        for (; i + DOT_ROWS <= g->m; i += DOT_ROWS)
            dots_tile(g, i, j, DOT_ROWS, DOT_COLUMNS, type);
        for (; i < g->m; i++)
            dots_tile(g, i, j, 1, DOT_COLUMNS, type);
    }
    for (; j < g->n; j++)
        for (int64_t i = 0; i < g->m; i++)
            dots_tile(g, i, j, 1, 1, type);
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
