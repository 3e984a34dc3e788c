/* gemm.c: matrix products. Called by the thread that owns the device; the work runs on its pool.
 *
 * Three ways, chosen by shape alone so that the order of every sum is fixed:
 *   - few rows, B a linear layer's weight (decoding): dot products straight from the weight's storage, which
 *     is read once, in blocks of columns;
 *   - few rows, B in rows: vectors along n, in blocks of columns;
 *   - otherwise tiles of C. A task packs the block of B that it needs into its thread's scratch as panels of
 *     fp32, DEPTH deep, and runs A against each. Packing is where BF16 and F16 are widened and transposes
 *     undone; it is spread over the rows of a tile, so it costs a few per cent. Goto and van de Geijn 2008,
 *     "Anatomy of high-performance matrix multiplication", but A stays in its place: a broadcast operand
 *     needs no order of its own.
 *
 * OpenBLAS would serve the last; this is as fast where it was measured (`adderd-bench machine` prints both),
 * reads BF16 without a copy of the weights, and brings no threads of its own. */
#include "kernels/cpu/check.h"
#include "kernels/cpu/device.h"
#include "kernels/cpu/gemm_small.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/vector.h"

enum {
    DOTS_ROWS = 32,  /* up to here dot products win over packing ... */
    DOTS_DEPTH = 64, /* ... unless they are short and there are more than a few */
    DOTS_FEW = 4,
    COLUMNS_ROWS = 16, /* likewise for B in rows */
    DOTS_COLUMNS = 8,  /* a C this narrow is never worth packing */
    STRIP = 64,        /* rows of a task where C is narrow */
    STRIPS_A_THREAD = 4,
    SERIAL_PRODUCTS = 40000, /* multiplications worth waking nobody for: a microsecond */
    TILE_ROWS = 256,
    TILE_ROWS_LEAST = 64,
    TILE_COLUMNS = 192,
    TILES_WANTED = 16, /* so that threads end together */
    DEPTH = 256,
    PANEL_MOST = 3 * VEC_LANES,
};

static int64_t divide_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

struct product {
    const struct gemm_args *args;
    struct kernel_device *device;
    int64_t a_row, a_column;
    int64_t rows, columns; /* of a task's part of C */
    int64_t tiles_across;
};

static const void *b_element(const struct gemm_args *g, int64_t l, int64_t j)
{
    int64_t index = g->transpose_b ? j * g->b_stride + l : l * g->b_stride + j;
    return (const char *)g->b + index * (g->b_type == TYPE_F32 ? 4 : 2);
}

/* The part of C that task `index` makes, with all of k. */
static struct small_gemm part_of(const struct product *p, int64_t index)
{
    const struct gemm_args *g = p->args;
    int64_t i = index / p->tiles_across * p->rows, j = index % p->tiles_across * p->columns;
    return (struct small_gemm){
        .m = smaller(p->rows, g->m - i),
        .n = smaller(p->columns, g->n - j),
        .k = g->k,
        .alpha = g->alpha,
        .beta = g->beta,
        .a = (const float *)g->a + i * p->a_row,
        .a_row = p->a_row,
        .a_column = p->a_column,
        .b = b_element(g, 0, j),
        .b_stride = g->b_stride,
        .b_type = g->b_type,
        .c = (float *)g->c + i * g->c_stride + j,
        .c_stride = g->c_stride,
    };
}

static void dots_task(void *arg, int64_t index, int thread)
{
    (void)thread;
    struct small_gemm part = part_of(arg, index);
    CPU_NAME(gemm_small_dots)(&part);
}

static void columns_task(void *arg, int64_t index, int thread)
{
    (void)thread;
    struct small_gemm part = part_of(arg, index);
    CPU_NAME(gemm_small_columns)(&part);
}

/* ---- packing: panel[l][c] = B(l, c) as fp32 for `width` columns ---- */

VEC_INLINE void pack_rows(const void *b, int64_t stride, enum kernel_type type, int64_t depth, int64_t width,
                          float *panel)
{
    int64_t size = type == TYPE_F32 ? 4 : 2;
    for (int64_t l = 0; l < depth; l++, panel += width) {
        const char *row = (const char *)b + l * stride * size;
        int64_t c = 0;
        for (; c + VEC_LANES <= width; c += VEC_LANES)
            vec_store(panel + c, vec_load_as(row + c * size, type));
        if (c < width)
            vec_store_n(panel + c, vec_load_as_n(row + c * size, type, width - c), width - c);
    }
}

VEC_INLINE void pack_transposed(const void *b, int64_t stride, enum kernel_type type, int64_t depth,
                                int64_t width, float *panel)
{
    int64_t size = type == TYPE_F32 ? 4 : 2;
    for (int64_t c = 0; c < width; c += VEC_LANES) {
        const char *columns = (const char *)b + c * stride * size;
        int64_t lanes = smaller(VEC_LANES, width - c);
        for (int64_t l = 0; l < depth; l += VEC_LANES) {
            int64_t deep = smaller(VEC_LANES, depth - l);
            vec block[VEC_LANES];
            if (lanes == VEC_LANES && deep == VEC_LANES) {
                for (int v = 0; v < VEC_LANES; v++)
                    block[v] = vec_load_as(columns + (v * stride + l) * size, type);
                vec_transpose(block);
                for (int v = 0; v < VEC_LANES; v++)
                    vec_store(panel + (l + v) * width + c, block[v]);
                continue;
            }
            for (int v = 0; v < VEC_LANES; v++)
                block[v] =
                    v < lanes ? vec_load_as_n(columns + (v * stride + l) * size, type, deep) : vec_set1(0);
            vec_transpose(block);
            for (int64_t v = 0; v < deep; v++)
                vec_store_n(panel + (l + v) * width + c, block[v], lanes);
        }
    }
}

VEC_INLINE void pack_panel(const struct gemm_args *g, const void *b, enum kernel_type type, int64_t depth,
                           int64_t width, float *panel)
{
    if (g->transpose_b)
        pack_transposed(b, g->b_stride, type, depth, width, panel);
    else
        pack_rows(b, g->b_stride, type, depth, width, panel);
}

static void pack(const struct gemm_args *g, int64_t l, int64_t j, int64_t depth, int64_t width, float *panel)
{
    const void *b = b_element(g, l, j);
    if (g->b_type == TYPE_BF16)
        pack_panel(g, b, TYPE_BF16, depth, width, panel);
    else if (g->b_type == TYPE_F16)
        pack_panel(g, b, TYPE_F16, depth, width, panel);
    else
        pack_panel(g, b, TYPE_F32, depth, width, panel);
}

static void tile_task(void *arg, int64_t index, int thread)
{
    const struct product *p = arg;
    const struct gemm_args *g = p->args;
    struct small_gemm part = part_of(p, index);
    const float *a = part.a;
    float *c = part.c, *panel = cpu_scratch(p->device, thread);
    int64_t first = index % p->tiles_across * p->columns, columns = part.n, l = 0;
    float *a_packed = panel + DEPTH * PANEL_MOST;
    part.b_type = TYPE_F32;
    part.b = panel;
    do { /* once even for k = 0, which leaves beta * C */
        part.k = smaller(DEPTH, g->k - l);
        part.a = a + l * p->a_column;
        if (g->transpose_a) {
            /* Rows of A^T lie a whole matrix apart, in the same few sets of the cache. */
            pack_transposed(part.a, g->a_stride, TYPE_F32, part.m, part.k, a_packed);
            part.a = a_packed;
            part.a_row = part.k;
            part.a_column = 1;
        }
        for (int64_t j = 0; j < columns; j += part.n) {
            part.n = CPU_NAME(gemm_panel_width)(columns - j);
            part.b_stride = part.n;
            part.c = c + j;
            pack(g, l, first + j, part.k, part.n, panel);
            CPU_NAME(gemm_small_columns)(&part);
        }
        part.beta = 1.0f;
        l += DEPTH;
    } while (l < g->k);
}

/* ---- the choice ---- */

static void run(struct product *p, void (*task)(void *, int64_t, int))
{
    const struct gemm_args *g = p->args;
    p->tiles_across = divide_up(g->n, p->columns);
    int64_t n_tasks = divide_up(g->m, p->rows) * p->tiles_across;
    if (g->m * g->n * g->k > SERIAL_PRODUCTS)
        cpu_parallel(p->device, n_tasks, task, p);
    else
        for (int64_t i = 0; i < n_tasks; i++)
            task(p, i, 0);
}

static int run_tiles(struct product *p)
{
    const struct gemm_args *g = p->args;
    p->rows = TILE_ROWS;
    int64_t across = divide_up(g->n, TILE_COLUMNS);
    while (p->rows > TILE_ROWS_LEAST && divide_up(g->m, p->rows) * across < TILES_WANTED)
        p->rows /= 2;
    p->columns = divide_up(divide_up(g->n, across), 16) * 16;
    int64_t floats = DEPTH * (PANEL_MOST + (g->transpose_a ? TILE_ROWS : 0));
    int status = cpu_scratch_reserve(p->device, (size_t)floats * sizeof(float));
    if (status == KERNEL_OK)
        run(p, tile_task);
    return status;
}

int CPU_NAME(cpu_gemm)(struct kernel_device *device, const struct gemm_args *g)
{
    int status = check_gemm(g);
    if (status != KERNEL_OK || g->m == 0 || g->n == 0)
        return status;
    struct product p = {
        .args = g,
        .device = device,
        .a_row = g->transpose_a ? 1 : g->a_stride,
        .a_column = g->transpose_a ? g->a_stride : 1,
    };
    bool few_rows = g->m <= DOTS_ROWS && (g->k >= DOTS_DEPTH || g->m <= DOTS_FEW);
    if (g->transpose_b && !g->transpose_a && (few_rows || g->n <= DOTS_COLUMNS)) {
        /* Elements of C are sums of their own, so here the threads may have a say in the partition: long strips
         * of B are read faster. Multiples of 16 keep every element's place in its vector. */
        p.rows = few_rows ? DOTS_ROWS : STRIP;
        p.columns = divide_up(divide_up(g->n, STRIPS_A_THREAD * device->n_threads), 16) * 16;
        run(&p, dots_task);
        return KERNEL_OK;
    }
    if (!g->transpose_b && g->b_type == TYPE_F32 && g->m <= COLUMNS_ROWS) {
        p.rows = COLUMNS_ROWS;
        p.columns = PANEL_MOST;
        run(&p, columns_task);
        return KERNEL_OK;
    }
    return run_tiles(&p);
}
