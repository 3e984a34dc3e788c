/* reference_linear.c: matrix product, low-rank path, linear layer, embedding. See reference.c. */
#include "kernels/cpu/convert.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/reference.h"

int reference_gemm(struct kernel_device *device, const struct gemm_args *g)
{
    (void)device;
    int status = check_gemm(g);
    if (status != KERNEL_OK)
        return status;
    float *c = g->c;
    const int64_t a_row = g->transpose_a ? 1 : g->a_stride, a_step = g->transpose_a ? g->a_stride : 1;
    const int64_t b_column = g->transpose_b ? g->b_stride : 1, b_step = g->transpose_b ? 1 : g->b_stride;
    for (int64_t i = 0; i < g->m; i++) {
        for (int64_t j = 0; j < g->n; j++) {
            const float *a = (const float *)g->a + i * a_row;
            double sum = 0;
            for (int64_t l = 0; l < g->k; l++)
                sum +=
                    (double)a[l * a_step] * (double)load_as_float(g->b, g->b_type, j * b_column + l * b_step);
            float *out = &c[i * g->c_stride + j];
            double old = g->beta == 0.0f ? 0.0 : (double)g->beta * (double)*out;
            *out = (float)((double)g->alpha * sum + old);
        }
    }
    return KERNEL_OK;
}

/* What dropout makes of the element at (row, column): 0 or 1 / (1 - p). */
static double keep_factor(float p, uint64_t seed, uint64_t offset, int64_t index)
{
    if (p == 0.0f)
        return 1.0;
    return philox_uniform(seed, offset + (uint64_t)index) >= p ? 1.0 / (1.0 - (double)p) : 0.0;
}

int reference_lora_forward(struct kernel_device *device, const struct lora_forward_args *l)
{
    (void)device;
    int status = check_lora_forward(l);
    if (status != KERNEL_OK)
        return status;
    const float *x = l->x;
    float *y = l->y;
    for (int64_t t = 0; t < l->rows; t++) {
        float *u = l->u + t * l->rank;
        for (int64_t r = 0; r < l->rank; r++) {
            double sum = 0;
            for (int64_t i = 0; i < l->in; i++)
                sum += (double)x[t * l->x_stride + i] *
                       keep_factor(l->dropout, l->seed, l->offset, t * l->in + i) *
                       (double)l->a[r * l->in + i];
            u[r] = (float)sum;
        }
        for (int64_t o = 0; o < l->out; o++) {
            double sum = 0;
            for (int64_t r = 0; r < l->rank; r++)
                sum += (double)u[r] * (double)l->b[o * l->rank + r];
            float *out = &y[t * l->y_stride + o];
            *out = (float)((double)*out + (double)l->scale * sum);
        }
    }
    return KERNEL_OK;
}

static void lora_backward_du(const struct lora_backward_args *l)
{
    const float *dy = l->dy;
    for (int64_t t = 0; t < l->rows; t++) {
        for (int64_t r = 0; r < l->rank; r++) {
            double sum = 0;
            for (int64_t o = 0; o < l->out; o++)
                sum += (double)dy[t * l->dy_stride + o] * (double)l->b[o * l->rank + r];
            l->du[t * l->rank + r] = (float)((double)l->scale * sum);
        }
    }
}

static void lora_backward_db(const struct lora_backward_args *l)
{
    const float *dy = l->dy;
    for (int64_t o = 0; o < l->out; o++) {
        for (int64_t r = 0; r < l->rank; r++) {
            double sum = 0;
            for (int64_t t = 0; t < l->rows; t++)
                sum += (double)dy[t * l->dy_stride + o] * (double)l->u[t * l->rank + r];
            float *out = &l->db[o * l->rank + r];
            *out = (float)((double)*out + (double)l->scale * sum);
        }
    }
}

static void lora_backward_da(const struct lora_backward_args *l)
{
    const float *x = l->x;
    for (int64_t r = 0; r < l->rank; r++) {
        for (int64_t i = 0; i < l->in; i++) {
            double sum = 0;
            for (int64_t t = 0; t < l->rows; t++)
                sum += (double)l->du[t * l->rank + r] * (double)x[t * l->x_stride + i] *
                       keep_factor(l->dropout, l->seed, l->offset, t * l->in + i);
            float *out = &l->da[r * l->in + i];
            *out = (float)((double)*out + sum);
        }
    }
}

static void lora_backward_dx(const struct lora_backward_args *l)
{
    float *dx = l->dx;
    for (int64_t t = 0; t < l->rows; t++) {
        for (int64_t i = 0; i < l->in; i++) {
            double sum = 0;
            for (int64_t r = 0; r < l->rank; r++)
                sum += (double)l->du[t * l->rank + r] * (double)l->a[r * l->in + i];
            float *out = &dx[t * l->dx_stride + i];
            *out = (float)((double)*out + sum * keep_factor(l->dropout, l->seed, l->offset, t * l->in + i));
        }
    }
}

/* With v = dropout(x), u = v A^T, y += s u B^T:  du = s dy B,  dB += s dy^T u,  dA += du^T v,  dv = du A. */
int reference_lora_backward(struct kernel_device *device, const struct lora_backward_args *l)
{
    (void)device;
    if (!l->has_du)
        lora_backward_du(l);
    if (l->db != NULL)
        lora_backward_db(l);
    if (l->da != NULL)
        lora_backward_da(l);
    if (l->dx != NULL)
        lora_backward_dx(l);
    return KERNEL_OK;
}

int64_t reference_linear_workspace(int64_t rows, int64_t in, int64_t out, int64_t rank)
{
    (void)in;
    (void)out;
    return linear_du_bytes(rows, rank);
}

int reference_linear_forward(struct kernel_device *device, const struct linear_forward_args *f)
{
    const struct linear_layer *layer = &f->layer;
    int status = check_linear_forward(f);
    if (status != KERNEL_OK)
        return status;
    float *y = f->y;
    for (int64_t t = 0; layer->bias != NULL && t < f->rows; t++)
        for (int64_t o = 0; o < layer->out; o++)
            y[t * f->y_stride + o] = layer->bias[o];
    struct gemm_args product = linear_forward_product(f, layer->bias != NULL ? 1.0f : 0.0f);
    status = reference_gemm(device, &product);
    if (status != KERNEL_OK || layer->rank == 0)
        return status;
    struct lora_forward_args lora = linear_forward_lora(f);
    return reference_lora_forward(device, &lora);
}

static void linear_dbias(const struct linear_backward_args *b)
{
    const float *dy = b->dy;
    for (int64_t o = 0; o < b->layer.out; o++) {
        double sum = 0;
        for (int64_t t = 0; t < b->rows; t++)
            sum += (double)dy[t * b->dy_stride + o];
        b->dbias[o] = (float)((double)b->dbias[o] + sum);
    }
}

int reference_linear_backward(struct kernel_device *device, const struct linear_backward_args *b)
{
    int status = check_linear_backward(b);
    if (status != KERNEL_OK)
        return status;
    if (b->dweight != NULL) {
        struct gemm_args product = linear_dweight_product(b);
        status = reference_gemm(device, &product);
    }
    if (status == KERNEL_OK && b->dbias != NULL)
        linear_dbias(b);
    if (status == KERNEL_OK && b->dx != NULL) {
        struct gemm_args product = linear_dx_product(b, b->accumulate ? 1.0f : 0.0f);
        status = reference_gemm(device, &product);
    }
    if (status != KERNEL_OK || b->layer.rank == 0)
        return status;
    struct lora_backward_args lora = linear_backward_lora(b);
    return reference_lora_backward(device, &lora);
}

int reference_embedding_forward(struct kernel_device *device, const struct embedding_forward_args *e)
{
    (void)device;
    int status = check_embedding_forward(e);
    if (status != KERNEL_OK)
        return status;
    float *y = e->y;
    for (int64_t t = 0; t < e->tokens; t++) {
        int64_t id = e->ids[t];
        for (int64_t i = 0; i < e->d_model; i++) {
            double value = (double)load_as_float(e->table, e->table_type, id * e->d_model + i);
            if (e->lora_a != NULL) {
                double sum = 0;
                for (int64_t r = 0; r < e->rank; r++)
                    sum += (double)e->lora_b[i * e->rank + r] * (double)e->lora_a[r * e->vocab + id];
                value += (double)e->scale * sum;
            }
            y[t * e->d_model + i] = (float)value;
        }
    }
    return KERNEL_OK;
}

static void embedding_backward_token(const struct embedding_backward_args *e, const float *dy, int64_t id)
{
    if (e->dtable != NULL)
        for (int64_t i = 0; i < e->d_model; i++)
            e->dtable[id * e->d_model + i] += dy[i];
    for (int64_t r = 0; e->da != NULL && r < e->rank; r++) {
        double sum = 0;
        for (int64_t i = 0; i < e->d_model; i++)
            sum += (double)dy[i] * (double)e->lora_b[i * e->rank + r];
        float *out = &e->da[r * e->vocab + id];
        *out = (float)((double)*out + (double)e->scale * sum);
    }
    for (int64_t i = 0; e->db != NULL && i < e->d_model; i++) {
        for (int64_t r = 0; r < e->rank; r++) {
            float *out = &e->db[i * e->rank + r];
            *out = (float)((double)*out +
                           (double)e->scale * (double)dy[i] * (double)e->lora_a[r * e->vocab + id]);
        }
    }
}

int reference_embedding_backward(struct kernel_device *device, const struct embedding_backward_args *e)
{
    (void)device;
    int status = check_embedding_backward(e);
    if (status != KERNEL_OK)
        return status;
    const float *dy = e->dy;
    for (int64_t t = 0; t < e->tokens; t++)
        embedding_backward_token(e, dy + t * e->d_model, e->ids[t]);
    return KERNEL_OK;
}
