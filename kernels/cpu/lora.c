/* lora.c: the low-rank path beside a linear layer. Called by the thread that owns the device; the work runs on
 * its pool.
 *
 * Forward and the first half of the backward go over blocks of rows, so that a block of x or dy is read from
 * memory once; the gradients of A and B sum over all rows and go over blocks of columns instead, each sum in
 * row order. B is turned to [rank,out] once an op (it is small), in the shared part of the owner's scratch.
 *
 * The dropout mask is a function of (seed, counter): it is drawn again wherever it is needed and never stored. */
#include "kernels/cpu/linear.h"

#include "kernels/cpu/device.h"
#include "kernels/cpu/gemm_small.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/vector.h"

enum {
    BLOCK_ROWS = 64,
    BLOCK_COLUMNS = 48,
    FEW_ROWS = 4, /* up to here turning B costs more than it saves */
};

static int64_t at_most(int64_t a, int64_t limit)
{
    return a < limit ? a : limit;
}

static int64_t blocks_of(int64_t count, int64_t block)
{
    return (count + block - 1) / block;
}

/* turned[r][o] = b[o][r] */
static void turn_b(const float *b, int64_t out, int64_t rank, float *turned)
{
    for (int64_t o = 0; o < out; o += VEC_LANES) {
        int64_t outs = at_most(out - o, VEC_LANES);
        for (int64_t r = 0; r < rank; r += VEC_LANES) {
            int64_t ranks = at_most(rank - r, VEC_LANES);
            vec block[VEC_LANES];
            for (int64_t i = 0; i < VEC_LANES; i++)
                block[i] = i < outs ? vec_load_n(b + (o + i) * rank + r, ranks) : vec_set1(0);
            vec_transpose(block);
            for (int64_t i = 0; i < ranks; i++)
                vec_store_n(turned + (r + i) * out + o, block[i], outs);
        }
    }
}

/* ---- dropout ---- */

/* High and low words of a[i] * m. */
VEC_INLINE void multiply_wide(vec_uint a, uint32_t m, vec_uint *high, vec_uint *low)
{
#if defined(__AVX512F__)
    __m512i even = _mm512_mul_epu32((__m512i)a, _mm512_set1_epi32((int)m));
    __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), _mm512_set1_epi32((int)m));
    *low = (vec_uint)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
    *high = (vec_uint)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
    __m256i even = _mm256_mul_epu32((__m256i)a, _mm256_set1_epi32((int)m));
    __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), _mm256_set1_epi32((int)m));
    *low = (vec_uint)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    *high = (vec_uint)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
    for (int i = 0; i < VEC_LANES; i++) {
        uint64_t product = (uint64_t)a[i] * m;
        (*high)[i] = (uint32_t)(product >> 32);
        (*low)[i] = (uint32_t)product;
    }
#endif
}

/* philox_uniform(seed, counter + lane) for every lane. */
VEC_INLINE vec uniform_from(uint64_t seed, uint64_t counter)
{
    vec_uint c0, c1, c2 = {0}, c3 = {0};
    for (int i = 0; i < VEC_LANES; i++) {
        c0[i] = (uint32_t)(counter + (uint64_t)i);
        c1[i] = (uint32_t)((counter + (uint64_t)i) >> 32);
    }
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        vec_uint high0, low0, high1, low1;
        multiply_wide(c0, 0xD2511F53u, &high0, &low0);
        multiply_wide(c2, 0xCD9E8D57u, &high1, &low1);
        c0 = high1 ^ c1 ^ k0;
        c2 = high0 ^ c3 ^ k1;
        c1 = low1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return __builtin_convertvector((vec_int)(c0 >> 8), vec) * 0x1p-24f;
}

struct dropout {
    float p;
    uint64_t seed, offset;
    int64_t in; /* columns of the whole x, which number its elements */
};

/* to = from with the mask of x's part at (row, column) and the factor 1 / (1 - p), added when `add`. */
static void drop(const struct dropout *d, int64_t row, int64_t column, int64_t rows, int64_t columns,
                 const float *from, int64_t from_stride, float *to, int64_t to_stride, bool add)
{
    vec keep = vec_set1(1.0f / (1.0f - d->p)), p = vec_set1(d->p);
    for (int64_t i = 0; i < rows; i++, from += from_stride, to += to_stride) {
        uint64_t counter = d->offset + (uint64_t)(row + i) * (uint64_t)d->in + (uint64_t)column;
        for (int64_t j = 0; j < columns; j += VEC_LANES) {
            int64_t n = at_most(columns - j, VEC_LANES);
            vec old = add ? vec_load_n(to + j, n) : vec_set1(0);
            vec_int where = uniform_from(d->seed, counter + (uint64_t)j) >= p;
            vec_store_n(to + j, old + vec_select(where, vec_load_n(from + j, n) * keep, vec_set1(0)), n);
        }
    }
}

/* ---- forward ---- */

struct forward {
    const struct lora_forward_args *args;
    struct kernel_device *device;
    struct dropout dropout;
    const float *turned; /* [rank,out], or NULL for few rows */
    int64_t shared;      /* floats of scratch before a thread's own */
};

static void forward_task(void *arg, int64_t index, int thread)
{
    const struct forward *f = arg;
    const struct lora_forward_args *g = f->args;
    int64_t row = index * BLOCK_ROWS, rows = at_most(g->rows - row, BLOCK_ROWS);
    const float *x = (const float *)g->x + row * g->x_stride;
    int64_t x_stride = g->x_stride;
    if (g->dropout > 0.0f) {
        float *dropped = (float *)cpu_scratch(f->device, thread) + f->shared;
        drop(&f->dropout, row, 0, rows, g->in, x, x_stride, dropped, g->in, false);
        x = dropped;
        x_stride = g->in;
    }
    struct small_gemm down = {.m = rows, .n = g->rank, .k = g->in, .alpha = 1.0f};
    down.a = x, down.a_row = x_stride, down.a_column = 1;
    down.b = g->a, down.b_stride = g->in;
    down.c = g->u + row * g->rank, down.c_stride = g->rank;
    CPU_NAME(gemm_small_dots)(&down);

    struct small_gemm up = {.m = rows, .n = g->out, .k = g->rank, .alpha = g->scale, .beta = 1.0f};
    up.a = down.c, up.a_row = g->rank, up.a_column = 1;
    up.c = (float *)g->y + row * g->y_stride, up.c_stride = g->y_stride;
    if (f->turned != NULL) {
        up.b = f->turned, up.b_stride = g->out;
        CPU_NAME(gemm_small_columns)(&up);
    } else {
        up.b = g->b, up.b_stride = g->rank;
        CPU_NAME(gemm_small_dots)(&up);
    }
}

int CPU_NAME(cpu_lora_forward)(struct kernel_device *device, const struct lora_forward_args *g)
{
    int status = check_lora_forward(g);
    if (status != KERNEL_OK)
        return status;
    struct forward f = {.args = g, .device = device, .dropout = {g->dropout, g->seed, g->offset, g->in}};
    bool turn = g->rows > FEW_ROWS;
    f.shared = turn ? g->rank * g->out : 0;
    int64_t own = g->dropout > 0.0f ? BLOCK_ROWS * g->in : 0;
    status = cpu_scratch_reserve(device, (size_t)(f.shared + own) * sizeof(float));
    if (status != KERNEL_OK)
        return status;
    if (turn) {
        turn_b(g->b, g->out, g->rank, cpu_scratch(device, 0));
        f.turned = cpu_scratch(device, 0);
    }
    cpu_parallel(device, blocks_of(g->rows, BLOCK_ROWS), forward_task, &f);
    return KERNEL_OK;
}

/* ---- backward ---- */

struct backward {
    const struct lora_backward_args *args;
    struct kernel_device *device;
    struct dropout dropout;
    const float *turned;
    int64_t shared;
};

/* du = scale * dy B for a block of rows, and dx += du A under the mask. */
static void rows_task(void *arg, int64_t index, int thread)
{
    const struct backward *f = arg;
    const struct lora_backward_args *g = f->args;
    int64_t row = index * BLOCK_ROWS, rows = at_most(g->rows - row, BLOCK_ROWS);
    struct small_gemm down = {.m = rows, .n = g->rank, .k = g->out, .alpha = g->scale};
    down.a = (const float *)g->dy + row * g->dy_stride, down.a_row = g->dy_stride, down.a_column = 1;
    down.b = f->turned, down.b_stride = g->out;
    down.c = g->du + row * g->rank, down.c_stride = g->rank;
    CPU_NAME(gemm_small_dots)(&down);
    if (g->dx == NULL)
        return;

    float *dx = (float *)g->dx + row * g->dx_stride;
    struct small_gemm back = {.m = rows, .n = g->in, .k = g->rank, .alpha = 1.0f, .beta = 1.0f};
    back.a = down.c, back.a_row = g->rank, back.a_column = 1;
    back.b = g->a, back.b_stride = g->in;
    back.c = dx, back.c_stride = g->dx_stride;
    if (g->dropout > 0.0f) {
        float *whole = (float *)cpu_scratch(f->device, thread) + f->shared;
        back.beta = 0.0f, back.c = whole, back.c_stride = g->in;
        CPU_NAME(gemm_small_columns)(&back);
        drop(&f->dropout, row, 0, rows, g->in, whole, g->in, dx, g->dx_stride, true);
    } else {
        CPU_NAME(gemm_small_columns)(&back);
    }
}

/* da[:, column ...] += du^T dropout(x) */
static void add_da(const struct backward *f, int64_t column, float *scratch)
{
    const struct lora_backward_args *g = f->args;
    struct small_gemm sum = {.m = g->rank, .n = at_most(g->in - column, BLOCK_COLUMNS), .k = g->rows};
    sum.alpha = sum.beta = 1.0f;
    sum.a = g->du, sum.a_row = 1, sum.a_column = g->rank;
    sum.b = (const float *)g->x + column, sum.b_stride = g->x_stride;
    sum.c = g->da + column, sum.c_stride = g->in;
    if (g->dropout <= 0.0f) {
        CPU_NAME(gemm_small_columns)(&sum);
        return;
    }
    sum.b = scratch, sum.b_stride = sum.n;
    for (int64_t row = 0; row < g->rows; row += BLOCK_ROWS) {
        sum.k = at_most(g->rows - row, BLOCK_ROWS);
        sum.a = g->du + row * g->rank;
        drop(&f->dropout, row, column, sum.k, sum.n, (const float *)g->x + row * g->x_stride + column,
             g->x_stride, scratch, sum.n, false);
        CPU_NAME(gemm_small_columns)(&sum);
    }
}

/* db[column ..., :] += scale * dy^T u, made as its transpose. */
static void add_db(const struct backward *f, int64_t column, float *scratch)
{
    const struct lora_backward_args *g = f->args;
    struct small_gemm sum = {.m = g->rank, .n = at_most(g->out - column, BLOCK_COLUMNS), .k = g->rows};
    sum.alpha = g->scale;
    sum.a = g->u, sum.a_row = 1, sum.a_column = g->rank;
    sum.b = (const float *)g->dy + column, sum.b_stride = g->dy_stride;
    sum.c = scratch, sum.c_stride = sum.n;
    CPU_NAME(gemm_small_columns)(&sum);
    for (int64_t j = 0; j < sum.n; j++)
        for (int64_t r = 0; r < g->rank; r++)
            g->db[(column + j) * g->rank + r] += scratch[r * sum.n + j];
}

static int64_t da_blocks_of(const struct lora_backward_args *g)
{
    return g->da != NULL ? blocks_of(g->in, BLOCK_COLUMNS) : 0;
}

static void columns_task(void *arg, int64_t index, int thread)
{
    const struct backward *f = arg;
    float *scratch = (float *)cpu_scratch(f->device, thread) + f->shared;
    int64_t da_blocks = da_blocks_of(f->args);
    if (index < da_blocks)
        add_da(f, index * BLOCK_COLUMNS, scratch);
    else
        add_db(f, (index - da_blocks) * BLOCK_COLUMNS, scratch);
}

int CPU_NAME(cpu_lora_backward)(struct kernel_device *device, const struct lora_backward_args *g)
{
    struct backward f = {.args = g, .device = device, .dropout = {g->dropout, g->seed, g->offset, g->in}};
    f.shared = g->rank * g->out;
    int64_t own = BLOCK_COLUMNS * (g->rank > BLOCK_ROWS ? g->rank : BLOCK_ROWS);
    if (g->dropout > 0.0f && own < BLOCK_ROWS * g->in)
        own = BLOCK_ROWS * g->in;
    int status = cpu_scratch_reserve(device, (size_t)(f.shared + own) * sizeof(float));
    if (status != KERNEL_OK)
        return status;
    if (!g->has_du) {
        turn_b(g->b, g->out, g->rank, cpu_scratch(device, 0));
        f.turned = cpu_scratch(device, 0);
        cpu_parallel(device, blocks_of(g->rows, BLOCK_ROWS), rows_task, &f);
    }
    cpu_parallel(device, da_blocks_of(g) + (g->db != NULL ? blocks_of(g->out, BLOCK_COLUMNS) : 0),
                 columns_task, &f);
    return KERNEL_OK;
}
