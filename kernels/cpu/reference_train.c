/* reference_train.c: RMSNorm with residual, head with its loss, AdamW, gradient norm. See reference.c. */
#include <math.h>
#include <string.h>

#include "kernels/cpu/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/reference.h"

int reference_rmsnorm_forward(struct kernel_device *device, const struct rmsnorm_forward_args *n)
{
    (void)device;
    int status = check_rmsnorm_forward(n);
    if (status != KERNEL_OK)
        return status;
    const float *x = n->x;
    float *y = n->y, *kept = n->kept;
    for (int64_t t = 0; t < n->rows; t++) {
        const float *r = n->residual != NULL ? n->residual_out + t * n->d : x + t * n->d;
        double squares = 0;
        for (int64_t i = 0; i < n->d; i++) {
            int64_t at = t * n->d + i;
            if (n->residual != NULL)
                n->residual_out[at] = n->residual[at] + (x != NULL ? x[at] : 0.0f);
            if (kept != NULL)
                kept[at] = r[i];
            squares += (double)r[i] * (double)r[i];
        }
        double rstd = 1.0 / sqrt(squares / (double)n->d + (double)n->eps);
        for (int64_t i = 0; i < n->d; i++)
            y[t * n->d + i] = (float)((double)r[i] * rstd * (double)n->weight[i]);
        if (n->rstd != NULL)
            n->rstd[t] = (float)rstd;
    }
    return KERNEL_OK;
}

int64_t reference_rmsnorm_backward_workspace(int64_t rows, int64_t d)
{
    (void)rows;
    (void)d;
    return 0;
}

/* With h = r rstd and g = dy weight:  dr = rstd (g - h mean(g h)),  dweight = sum over rows of dy h. */
int reference_rmsnorm_backward(struct kernel_device *device, const struct rmsnorm_backward_args *n)
{
    (void)device;
    int status = check_rmsnorm_backward(n);
    if (status != KERNEL_OK)
        return status;
    const float *dy = n->dy;
    for (int64_t t = 0; t < n->rows; t++) {
        const float *r = (const float *)n->r + t * n->d;
        double rstd = (double)n->rstd[t], mean = 0;
        for (int64_t i = 0; i < n->d; i++)
            mean += (double)dy[t * n->d + i] * (double)n->weight[i] * (double)r[i] * rstd;
        mean /= (double)n->d;
        for (int64_t i = 0; i < n->d; i++) {
            double g = (double)dy[t * n->d + i] * (double)n->weight[i];
            float *out = &n->dresidual[t * n->d + i];
            *out = (float)((double)*out + rstd * (g - (double)r[i] * rstd * mean));
        }
    }
    for (int64_t i = 0; n->dweight != NULL && i < n->d; i++) {
        double sum = 0;
        for (int64_t t = 0; t < n->rows; t++)
            sum +=
                (double)dy[t * n->d + i] * (double)((const float *)n->r)[t * n->d + i] * (double)n->rstd[t];
        n->dweight[i] = (float)((double)n->dweight[i] + sum);
    }
    if (n->dx != NULL)
        memcpy(n->dx, n->dresidual, (size_t)(n->rows * n->d) * sizeof(float));
    return KERNEL_OK;
}

int64_t reference_head_workspace(int64_t rows, int64_t d_model, int64_t vocab, bool backward)
{
    (void)rows;
    (void)d_model;
    (void)backward;
    return vocab * (int64_t)sizeof(float);
}

static double log_sum_exp(const float *logits, int64_t count)
{
    double highest = -INFINITY, sum = 0;
    for (int64_t i = 0; i < count; i++)
        highest = fmax(highest, (double)logits[i]);
    for (int64_t i = 0; i < count; i++)
        sum += exp((double)logits[i] - highest);
    return highest + log(sum);
}

/* The id that follows `previous` in descending order of logit, ties to the lowest id; previous < 0 asks for
 * the first. */
static int32_t next_best(const float *logits, int64_t vocab, int32_t previous)
{
    int32_t best = -1;
    for (int32_t i = 0; i < vocab; i++) {
        bool after =
            previous < 0 || logits[i] < logits[previous] || (logits[i] == logits[previous] && i > previous);
        if (after && (best < 0 || logits[i] > logits[best]))
            best = i;
    }
    return best < 0 ? 0 : best;
}

static void head_row_outputs(const struct head_args *h, int64_t t, const float *logits, double total)
{
    int32_t target = h->targets[t];
    if (h->logprobs != NULL)
        h->logprobs[t] = target < 0 ? 0.0f : (float)((double)logits[target] - total);
    if (h->argmax != NULL)
        h->argmax[t] = next_best(logits, h->vocab, -1);
    if (h->loss_sum != NULL && target >= 0)
        *h->loss_sum -= (double)logits[target] - total;
    if (h->n_correct != NULL && target >= 0)
        *h->n_correct += next_best(logits, h->vocab, -1) == target;
    int32_t id = -1;
    for (int32_t i = 0; h->top_ids != NULL && i < h->n_top; i++) {
        id = target < 0 ? 0 : next_best(logits, h->vocab, id);
        h->top_ids[t * h->n_top + i] = id;
        h->top_logprobs[t * h->n_top + i] = target < 0 ? 0.0f : (float)((double)logits[id] - total);
    }
}

/* dlogits = grad_scale (softmax - one at the target);  d_hidden = dlogits W,  d_weight += dlogits^T hidden.
 */
static void head_row_backward(const struct head_args *h, int64_t t, const float *logits, double total)
{
    const float *hidden = (const float *)h->hidden + t * h->d_model;
    float *d_hidden = h->d_hidden != NULL ? (float *)h->d_hidden + t * h->d_model : NULL;
    int32_t target = h->targets[t];
    for (int64_t i = 0; i < h->d_model; i++) {
        double sum = 0;
        for (int64_t j = 0; target >= 0 && j < h->vocab; j++) {
            double dlogit =
                (double)h->grad_scale * (exp((double)logits[j] - total) - (j == target ? 1.0 : 0.0));
            int64_t at = j * h->d_model + i;
            sum += dlogit * (double)load_as_float(h->weight, h->weight_type, at);
            if (h->d_weight != NULL)
                h->d_weight[at] = (float)((double)h->d_weight[at] + dlogit * (double)hidden[i]);
        }
        if (d_hidden != NULL)
            d_hidden[i] = (float)sum;
    }
}

int reference_head(struct kernel_device *device, const struct head_args *h)
{
    (void)device;
    int status = check_head(h, reference_head_workspace(h->rows, h->d_model, h->vocab, h->d_hidden != NULL));
    if (status != KERNEL_OK)
        return status;
    float *logits = h->workspace;
    for (int64_t t = 0; t < h->rows; t++) {
        if (h->targets[t] >= h->vocab)
            return KERNEL_INVALID;
        const float *hidden = (const float *)h->hidden + t * h->d_model;
        for (int64_t j = 0; j < h->vocab; j++) {
            double sum = 0;
            for (int64_t i = 0; i < h->d_model; i++)
                sum +=
                    (double)hidden[i] * (double)load_as_float(h->weight, h->weight_type, j * h->d_model + i);
            logits[j] = (float)sum;
        }
        double total = log_sum_exp(logits, h->vocab);
        head_row_outputs(h, t, logits, total);
        if (h->d_hidden != NULL || h->d_weight != NULL)
            head_row_backward(h, t, logits, total);
    }
    return KERNEL_OK;
}

/* m = b1 m + (1-b1) g,  v = b2 v + (1-b2) g^2,
 * p -= lr (m / (1-b1^step) / (sqrt(v / (1-b2^step)) + eps) + weight_decay p). */
static void adamw_slice(const struct adamw_args *a, const struct param_slice *slice)
{
    double beta1 = (double)a->beta1, beta2 = (double)a->beta2;
    double bias1 = 1.0 - pow(beta1, (double)a->step), bias2 = 1.0 - pow(beta2, (double)a->step);
    double decay = slice->decay ? (double)a->weight_decay : 0.0;
    for (int64_t i = 0; i < slice->count; i++) {
        double g = (double)slice->grad[i] * (double)a->grad_scale;
        double m = beta1 * (double)slice->m[i] + (1.0 - beta1) * g;
        double v = beta2 * (double)slice->v[i] + (1.0 - beta2) * g * g;
        double p = (double)slice->param[i];
        p -= (double)a->lr * (m / bias1 / (sqrt(v / bias2) + (double)a->eps) + decay * p);
        slice->m[i] = (float)m;
        slice->v[i] = (float)v;
        slice->param[i] = (float)p;
        if (!slice->keep_grad)
            slice->grad[i] = 0.0f;
        if (slice->copy != NULL)
            store_from_float(slice->copy, slice->copy_type, i, slice->param[i]);
    }
}

int reference_adamw(struct kernel_device *device, const struct adamw_args *a)
{
    (void)device;
    int status = check_adamw(a);
    for (int32_t s = 0; status == KERNEL_OK && s < a->n_slices; s++)
        adamw_slice(a, &a->slices[s]);
    return status;
}

int reference_grad_norm(struct kernel_device *device, const struct grad_norm_args *a)
{
    (void)device;
    if (a->n_slices < 0)
        return KERNEL_INVALID;
    double sum = 0;
    for (int32_t s = 0; s < a->n_slices; s++)
        for (int64_t i = 0; i < a->slices[s].count; i++)
            sum += (double)a->slices[s].grad[i] * (double)a->slices[s].grad[i];
    *a->sum = sum;
    return KERNEL_OK;
}
