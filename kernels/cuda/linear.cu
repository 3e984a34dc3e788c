/* linear.cu: a linear layer with its bias, its adapter and its gradients.
 *
 *     y = x W^T + bias + s u B^T,  u = dropout(x) A^T
 *     du = s dy B,  dx = dy W + mask * (du A),  dW += dy^T x,  dB += s dy^T u,  dA += du^T dropout(x)
 *
 * Where one side is narrow and the rank small, on Hopper in 16 bits, narrow.cu and widen.cu do all of a forward or a
 * backward in one pass. The wide products are cuBLAS's, and on Hopper in 16 bits joint.cu's, which adds the adapter's
 * part of y or dx on the way. Elsewhere that part is written first, which costs no reading, and the wide product adds
 * itself to it. u, du, dB and dA read a matrix of activations for a few columns: skinny.cu does so at the speed of
 * memory for small ranks in 16 bits; other ranks and types are products like all others; under dropout lora.cu draws
 * the mask again for each of them.
 *
 * Adapters are fp32 and are rounded to the type of the activations on the way into a product. */
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/joint.cuh"
#include "kernels/cuda/low_rank.cuh"
#include "kernels/cuda/narrow.cuh"
#include "kernels/cuda/skinny.cuh"
#include "kernels/cuda/vector.cuh"

#include "kernels/linear.h"

namespace
{

enum {
    THREADS = 256,
    DBIAS_PARTS = 64,
    JOINT_COLUMNS_LEAST = 256, /* of C: for fewer, a pass over it costs little and wide tiles are wasted */
};

int64_t round_up(int64_t bytes)
{
    return divide_up(bytes, 256) * 256;
}

int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* ---- the workspace ---- */

struct workspace {
    void *factor; /* A or B in the type of the activations */
    void *du;     /* [rows,rank], likewise */
    void *parts;  /* skinny.cu's and narrow.cu's */
};

struct workspace workspace_of(void *base, int64_t rows, const struct linear_layer *l)
{
    struct workspace w;
    char *at = (char *)base;
    w.factor = at;
    at += round_up(larger(l->in, l->out) * l->rank * (int64_t)sizeof(float));
    w.du = at;
    at += round_up(rows * l->rank * (int64_t)sizeof(float));
    w.parts = at;
    return w;
}

/* ---- factors ---- */

template <typename T>
__global__ void __launch_bounds__(THREADS) pack_kernel(const float *from, float scale, T *to, int64_t count)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < count)
        to[i] = from_float<T>(scale * from[i]);
}

/* scale times a factor as an operand of a product: a copy in the type of the activations. */
void pack(struct kernel_device *device, const float *factor, float scale, int64_t count, enum kernel_type act,
          void *copy)
{
    unsigned blocks = (unsigned)divide_up(count, THREADS);
    if (count > 0)
        CUDA_WITH_TYPE(act, T,
                       pack_kernel<<<blocks, THREADS, 0, device->stream>>>(factor, scale, (T *)copy, count));
}

/* ---- bias ---- */

template <typename T>
__global__ void __launch_bounds__(THREADS)
    bias_kernel(T *y, int64_t stride, int64_t rows, int64_t columns, const float *bias)
{
    int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    for (int64_t row = blockIdx.y; row < rows && c < columns; row += gridDim.y)
        y[row * stride + c] = from_float<T>(bias[c]);
}

/* The sums over part_rows rows each. */
template <typename T>
__global__ void __launch_bounds__(THREADS)
    dbias_kernel(const T *dy, int64_t stride, int64_t rows, int64_t columns, int64_t part_rows, float *parts)
{
    int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    int64_t row = blockIdx.y * part_rows, end = min(row + part_rows, rows);
    float sum = 0.0f;
    for (; row < end && c < columns; row++)
        sum += to_float(dy[row * stride + c]);
    if (c < columns)
        parts[blockIdx.y * columns + c] = sum;
}

void write_bias(struct kernel_device *device, const struct linear_forward_args *f)
{
    dim3 grid((unsigned)divide_up(f->layer.out, THREADS), (unsigned)(f->rows < 1024 ? f->rows : 1024));
    CUDA_WITH_TYPE(f->act, T,
                   bias_kernel<<<grid, THREADS, 0, device->stream>>>((T *)f->y, f->y_stride, f->rows,
                                                                     f->layer.out, f->layer.bias));
}

int add_dbias(struct kernel_device *device, const struct linear_backward_args *b)
{
    int64_t columns = b->layer.out, part_rows = divide_up(b->rows, DBIAS_PARTS);
    int64_t n_parts = divide_up(b->rows, part_rows);
    void *parts;
    int status = cuda_scratch(device, CUDA_SCRATCH_OP, (size_t)(n_parts * columns) * sizeof(float), &parts);
    if (status != KERNEL_OK)
        return status;
    dim3 grid((unsigned)divide_up(columns, THREADS), (unsigned)n_parts);
    CUDA_WITH_TYPE(b->act, T,
                   dbias_kernel<<<grid, THREADS, 0, device->stream>>>((const T *)b->dy, b->dy_stride, b->rows,
                                                                      columns, part_rows, (float *)parts));
    return cuda_add_parts(device, (const float *)parts, n_parts, columns, columns, b->dbias);
}

/* ---- products with the narrow matrices ---- */

/* C = scale * wide op(factor) [rows,rank], or with `factor` in rows of rank. */
struct gemm_args narrow_product(const void *wide, int64_t stride, int64_t rows, int64_t columns, int64_t rank,
                                enum kernel_type act, bool tf32)
{
    struct gemm_args g = {};
    g.m = rows, g.n = rank, g.k = columns;
    g.alpha = 1.0f;
    g.a = wide, g.a_stride = stride;
    g.c_stride = rank;
    g.act = g.b_type = g.c_type = act;
    g.tf32 = tf32;
    return g;
}

/* gradient += scale * left^T right, over `rows`. */
int add_gradient(struct kernel_device *device, const void *left, int64_t left_stride, int64_t left_columns,
                 const void *right, int64_t right_stride, int64_t right_columns, int64_t rows, float scale,
                 float *gradient, enum kernel_type act, bool tf32)
{
    struct gemm_args g = {};
    g.m = left_columns, g.n = right_columns, g.k = rows;
    g.transpose_a = true;
    g.alpha = scale, g.beta = 1.0f;
    g.a = left, g.a_stride = left_stride;
    g.b = right, g.b_stride = right_stride;
    g.c = gradient, g.c_stride = right_columns;
    g.act = g.b_type = act;
    g.c_type = TYPE_F32;
    g.tf32 = tf32;
    return cuda_gemm(device, &g);
}

/* C = low's product (and what C holds, if its beta says so) + main's: in one go where joint.cu can, one on top of the
 * other otherwise. */
int add_products(struct kernel_device *device, const struct gemm_args *main, const struct gemm_args *low)
{
    struct joint_product p = {};
    p.m = main->m, p.n = main->n, p.k = main->k, p.k2 = low->k;
    p.a = main->a, p.a_stride = main->a_stride;
    p.b = main->b, p.b_stride = main->b_stride;
    p.a2 = low->a, p.a2_stride = low->a_stride;
    p.b2 = low->b, p.b2_stride = low->b_stride;
    p.c = main->c, p.c_stride = main->c_stride;
    p.transposed = main->transpose_b;
    p.accumulate = low->beta != 0.0f;
    p.act = main->act;
    if (main->b_type == main->act && main->n >= JOINT_COLUMNS_LEAST && cuda_joint_can(device, &p))
        return cuda_joint_product(device, &p);
    int status = cuda_gemm(device, low);
    return status == KERNEL_OK ? cuda_gemm(device, main) : status;
}

/* ---- forward ---- */

/* u, and scale * B in w->factor. */
int make_u(struct kernel_device *device, const struct linear_forward_args *f, const struct workspace *w)
{
    const struct linear_layer *l = &f->layer;
    int64_t count = l->out * l->rank;
    int status = KERNEL_OK;
    if (l->dropout > 0.0f) {
        status = cuda_low_rank_project(device, f);
    } else if (cuda_skinny_can(device, f->x, f->x_stride, l->in, l->rank, f->act)) {
        struct skinny s = {};
        s.rows = f->rows, s.columns = l->in, s.rank = l->rank;
        s.wide = f->x, s.stride = f->x_stride, s.act = f->act;
        s.scale = 1.0f;
        s.weights = l->a;
        s.low_out = f->u;
        s.workspace = w->parts;
        s.pack = l->b, s.pack_to = w->factor, s.pack_scale = l->scale, s.pack_count = count;
        return cuda_skinny(device, &s);
    } else {
        struct gemm_args g = narrow_product(f->x, f->x_stride, f->rows, l->in, l->rank, f->act, f->tf32);
        pack(device, l->a, 1.0f, l->rank * l->in, f->act, w->factor);
        g.transpose_b = true;
        g.b = w->factor, g.b_stride = l->in;
        g.c = f->u;
        status = cuda_gemm(device, &g);
    }
    pack(device, l->b, l->scale, count, f->act, w->factor);
    return status;
}

/* All in one pass, where it can. */
bool narrow_forward(struct kernel_device *device, const struct linear_forward_args *f, int *ret_status)
{
    const struct linear_layer *l = &f->layer;
    if (l->dropout > 0.0f || l->bias != NULL || l->weight_type != f->act)
        return false;
    struct narrow_layer n = {};
    n.rows = f->rows, n.k = l->in, n.n = l->out, n.rank = l->rank;
    n.x = f->x, n.x_stride = f->x_stride;
    n.weight = l->weight, n.transposed = true;
    n.y = f->y, n.y_stride = f->y_stride;
    n.first = l->a, n.first_scale = 1.0f;
    n.second = l->b, n.second_scale = l->scale;
    n.middle = f->u;
    n.act = f->act;
    if (!cuda_narrow_can(device, &n))
        return false;
    *ret_status = cuda_narrow(device, &n);
    return true;
}

/* y = x W^T + bias + u (scale B)^T. */
int forward_adapted(struct kernel_device *device, const struct linear_forward_args *f)
{
    const struct linear_layer *l = &f->layer;
    struct workspace w = workspace_of(f->workspace, f->rows, l);
    int status = KERNEL_OK;
    if (narrow_forward(device, f, &status))
        return status;
    status = make_u(device, f, &w);
    if (status != KERNEL_OK)
        return status;
    struct gemm_args main = linear_forward_product(f, 1.0f), low = main;
    low.k = l->rank;
    low.a = f->u, low.a_stride = l->rank;
    low.b = w.factor, low.b_stride = l->rank, low.b_type = f->act;
    low.beta = l->bias != NULL ? 1.0f : 0.0f;
    return add_products(device, &main, &low);
}

/* ---- backward ---- */

/* du and dB, and A in w->factor. */
int make_du(struct kernel_device *device, const struct linear_backward_args *b, const struct workspace *w)
{
    const struct linear_layer *l = &b->layer;
    int64_t count = l->rank * l->in;
    if (cuda_skinny_can(device, b->dy, b->dy_stride, l->out, l->rank, b->act)) {
        struct skinny s = {};
        s.rows = b->rows, s.columns = l->out, s.rank = l->rank;
        s.wide = b->dy, s.stride = b->dy_stride, s.act = b->act;
        s.scale = l->scale;
        s.weights = l->b, s.by_column = true;
        s.low_out = w->du;
        s.low_in = b->u, s.gradient = b->db;
        s.workspace = w->parts;
        s.pack = l->a, s.pack_to = w->factor, s.pack_scale = 1.0f, s.pack_count = count;
        return cuda_skinny(device, &s);
    }
    struct gemm_args g = narrow_product(b->dy, b->dy_stride, b->rows, l->out, l->rank, b->act, b->tf32);
    pack(device, l->b, 1.0f, l->out * l->rank, b->act, w->factor);
    g.alpha = l->scale;
    g.b = w->factor, g.b_stride = l->rank;
    g.c = w->du;
    int status = cuda_gemm(device, &g);
    if (status == KERNEL_OK && b->db != NULL)
        status = add_gradient(device, b->dy, b->dy_stride, l->out, b->u, l->rank, l->rank, b->rows, l->scale,
                              b->db, b->act, b->tf32);
    pack(device, l->a, 1.0f, count, b->act, w->factor);
    return status;
}

int add_da(struct kernel_device *device, const struct linear_backward_args *b, const struct workspace *w)
{
    const struct linear_layer *l = &b->layer;
    if (l->dropout > 0.0f)
        return cuda_low_rank_outer(device, b, w->du);
    if (!cuda_skinny_can(device, b->x, b->x_stride, l->in, l->rank, b->act))
        return add_gradient(device, w->du, l->rank, l->rank, b->x, b->x_stride, l->in, b->rows, 1.0f, b->da,
                            b->act, b->tf32);
    struct skinny s = {};
    s.rows = b->rows, s.columns = l->in, s.rank = l->rank;
    s.wide = b->x, s.stride = b->x_stride, s.act = b->act;
    s.scale = 1.0f;
    s.low_in = w->du, s.gradient = b->da;
    s.workspace = w->parts;
    return cuda_skinny(device, &s);
}

int make_dx(struct kernel_device *device, const struct linear_backward_args *b)
{
    struct gemm_args product = linear_dx_product(b, b->accumulate ? 1.0f : 0.0f);
    return cuda_gemm(device, &product);
}

/* All in one pass, where it can. */
bool narrow_backward(struct kernel_device *device, const struct linear_backward_args *b,
                     const struct workspace *w, int *ret_status)
{
    const struct linear_layer *l = &b->layer;
    if (l->dropout > 0.0f || l->weight_type != b->act || b->dx == NULL || b->da == NULL || b->db == NULL)
        return false;
    struct narrow_layer n = {};
    n.rows = b->rows, n.k = l->out, n.n = l->in, n.rank = l->rank;
    n.x = b->dy, n.x_stride = b->dy_stride;
    n.weight = l->weight;
    n.accumulate = b->accumulate;
    n.y = b->dx, n.y_stride = b->dx_stride;
    n.first = l->b, n.first_scale = l->scale;
    n.second = l->a, n.second_scale = 1.0f;
    n.other = b->x, n.other_stride = b->x_stride;
    n.middle_in = b->u;
    n.first_gradient = b->db, n.second_gradient = b->da;
    n.act = b->act;
    n.workspace = w->parts;
    if (!cuda_narrow_can(device, &n))
        return false;
    *ret_status = cuda_narrow(device, &n);
    return true;
}

/* dx and the adapter's gradients. */
int backward_adapted(struct kernel_device *device, const struct linear_backward_args *b)
{
    const struct linear_layer *l = &b->layer;
    struct workspace w = workspace_of(b->workspace, b->rows, l);
    int status = KERNEL_OK;
    if (b->du != NULL)
        w.du = b->du;
    if (narrow_backward(device, b, &w, &status))
        return status;
    if (!linear_backward_continues(b))
        status = make_du(device, b, &w);
    if (status == KERNEL_OK && b->da != NULL)
        status = add_da(device, b, &w);
    if (status != KERNEL_OK || b->dx == NULL)
        return status;
    if (l->dropout > 0.0f) {
        status = make_dx(device, b);
        return status == KERNEL_OK ? cuda_low_rank_expand(device, b, w.du) : status;
    }
    struct gemm_args main = linear_dx_product(b, 1.0f), low = main;
    low.k = l->rank;
    low.a = w.du, low.a_stride = l->rank;
    low.b = w.factor, low.b_type = b->act;
    low.beta = b->accumulate ? 1.0f : 0.0f;
    return add_products(device, &main, &low);
}

} // namespace

/* ---- the ops ---- */

int64_t cuda_linear_workspace(int64_t rows, int64_t in, int64_t out, int64_t rank)
{
    if (rank == 0)
        return 0;
    int64_t parts = 0;
    if (rank <= SKINNY_RANK_MOST)
        parts = larger(cuda_skinny_workspace(rows, in, rank), cuda_skinny_workspace(rows, out, rank));
    if (rank <= NARROW_RANKS)
        parts = larger(parts, cuda_narrow_workspace(rows, in, out));
    struct linear_layer layer = {};
    layer.in = in, layer.out = out, layer.rank = rank;
    struct workspace w = workspace_of(NULL, rows, &layer);
    return (int64_t)(uintptr_t)w.parts + parts;
}

int cuda_linear_forward(struct kernel_device *device, const struct linear_forward_args *f)
{
    const struct linear_layer *l = &f->layer;
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    if (!linear_forward_valid(f))
        return KERNEL_INVALID;
    if (!cuda_is_float(f->act) || !cuda_is_float(l->weight_type))
        return KERNEL_UNSUPPORTED;
    if (f->rows == 0 || l->out == 0)
        return KERNEL_OK;
    if (l->bias != NULL)
        write_bias(device, f);
    if (l->rank > 0) {
        status = forward_adapted(device, f);
    } else {
        struct gemm_args product = linear_forward_product(f, l->bias != NULL ? 1.0f : 0.0f);
        status = cuda_gemm(device, &product);
    }
    return status == KERNEL_OK ? cuda_launched(device) : status;
}

int cuda_linear_backward(struct kernel_device *device, const struct linear_backward_args *b)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    if (!linear_backward_valid(b))
        return KERNEL_INVALID;
    if (!cuda_is_float(b->act) || !cuda_is_float(b->layer.weight_type))
        return KERNEL_UNSUPPORTED;
    if (b->dweight != NULL) {
        struct gemm_args product = linear_dweight_product(b);
        status = cuda_gemm(device, &product);
    }
    if (b->rows == 0)
        return status;
    if (status == KERNEL_OK && b->dbias != NULL && b->layer.out > 0)
        status = add_dbias(device, b);
    if (status != KERNEL_OK)
        return status;
    if (b->layer.rank > 0 && (b->dx != NULL || b->da != NULL || b->db != NULL))
        status = backward_adapted(device, b);
    else if (b->dx != NULL)
        status = make_dx(device, b);
    return status == KERNEL_OK ? cuda_launched(device) : status;
}
