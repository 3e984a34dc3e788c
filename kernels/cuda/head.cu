/* head.cu: the output layer and its loss, whatever the types; head_fused.cu does the frequent ones on Hopper.
 *
 * Rows go through in chunks: fp32 logits by one product into the workspace; a block a row for the scores, which leaves
 * the gradient of the logits in their place, narrowed to the type of the activations; then the products for d_hidden and
 * d_weight. Ignored rows go along with a gradient of zero: which they are is known to the device alone. So is a target
 * out of range, whose row gets NaN and no gradient. */
#include "kernels/cuda/head.cuh"
#include "kernels/cuda/keys.cuh"

namespace
{

enum {
    ROW_THREADS = 512,
    CHUNK_ROWS_LEAST = 64,
};
constexpr int64_t CHUNK_BYTES = (int64_t)192 << 20; /* of logits, at least */
/* The gradient of the logits is kept times this, and the products multiply by grad_scale over it, so that what F16 can
 * hold of it (2^-32 of a probability and more) does not depend on grad_scale. */
constexpr float GRADIENT_UNIT = 256.0f;

/* As many as have their logits in so many bytes. */
int64_t chunk_rows(int64_t rows, int64_t vocab, int64_t bytes)
{
    int64_t chunk = bytes / (vocab * (int64_t)sizeof(float));
    chunk -= chunk % CHUNK_ROWS_LEAST;
    if (chunk < CHUNK_ROWS_LEAST)
        chunk = CHUNK_ROWS_LEAST;
    return rows < chunk ? rows : chunk;
}

/* ---- one row ---- */

/* dlogits = GRADIENT_UNIT (softmax - one at the target), in the first halves of the logits' own bytes when T is narrower:
 * every element is read before the write that covers it, since a write never runs ahead of the reads. */
template <typename T, int N>
__device__ void write_gradient(float *logits, int64_t vocab, int32_t target, float max, float sum)
{
    T *to = (T *)(void *)logits;
    bool zero = target < 0 || target >= vocab;
    float scale = GRADIENT_UNIT / sum;
    for (int64_t base = 0; base < vocab; base += ROW_THREADS * N) {
        int64_t j = base + threadIdx.x * N;
        float g[N] = {};
        if (j < vocab && !zero) {
            load_pack(logits + j, g);
#pragma unroll
            for (int i = 0; i < N; i++) {
                g[i] = scale * __expf(g[i] - max);
                if (j + i == target)
                    g[i] -= GRADIENT_UNIT;
            }
        }
        if (sizeof(T) < sizeof(float))
            __syncthreads();
        if (j < vocab)
            store_pack(to + j, g);
    }
}

/* logits: [gridDim.x,vocab], rows from first_row on of the caller's. N: elements at a time. */
template <typename T, int N>
__global__ void __launch_bounds__(ROW_THREADS, 1024 / ROW_THREADS)
    row_kernel(struct head_args h, struct head_scores scores, float *all_logits, int64_t first_row)
{
    int64_t row = first_row + blockIdx.x, vocab = h.vocab;
    float *logits = all_logits + blockIdx.x * vocab;
    int32_t target = h.targets[row];
    bool gradient = h.d_hidden != NULL || h.d_weight != NULL;
    bool scored = target >= 0 && target < vocab;

    /* Largest logit and sum of exponentials in one pass. */
    float max = -INFINITY, sum = 0.0f;
    int32_t id = -1;
#pragma unroll 3
    for (int32_t j = (int32_t)threadIdx.x * N; j < vocab; j += ROW_THREADS * N) {
        float v[N], before = max;
        load_pack(logits + j, v);
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (v[i] > max || (id < 0 && v[i] == max)) {
                max = v[i];
                id = j + i;
            }
        }
        if (max > before)
            sum *= __expf(before - max);
#pragma unroll
        for (int i = 0; i < N; i++)
            sum += v[i] == max ? 1.0f : __expf(v[i] - max);
    }
    word own = id >= 0 ? key_of(max, id) : 0, best = block_highest<ROW_THREADS>(own);
    float highest = best != 0 ? logit_of(best) : -INFINITY;
    if (max != highest)
        sum *= __expf(max - highest);
    sum = block_sum<ROW_THREADS>(sum);
    float log_sum = logf(sum);

    if (threadIdx.x == 0) {
        float logprob = scored ? (logits[target] - highest) - log_sum : target < 0 ? 0.0f : NAN;
        id = best != 0 ? id_of(best) : 0;
        if (h.argmax != NULL)
            h.argmax[row] = id;
        if (h.logprobs != NULL)
            h.logprobs[row] = logprob;
        scores.logprobs[row] = logprob;
        scores.right[row] = id == target;
    }
    if (h.top_ids != NULL) {
        extern __shared__ word list[];
        __shared__ word top[KERNEL_TOP_MAX];
        if (scored)
            block_top<ROW_THREADS>(logits, vocab, own, h.n_top, list, top);
        int32_t i = (int32_t)threadIdx.x;
        if (i < h.n_top) {
            bool there = scored && top[i] != 0;
            h.top_ids[row * h.n_top + i] = there ? id_of(top[i]) : 0;
            h.top_logprobs[row * h.n_top + i] = there    ? (logit_of(top[i]) - highest) - log_sum
                                                : scored ? NAN
                                                         : 0.0f;
        }
    }
    if (gradient) {
        __syncthreads(); /* thread 0 has read the target's logit */
        write_gradient<T, N>(logits, vocab, target, highest, sum);
    }
}

/* One block, so that the order of the sum follows from the number of rows alone. */
__global__ void __launch_bounds__(ROW_THREADS)
    sum_kernel(struct head_scores scores, int64_t rows, double *loss_sum, int64_t *n_correct)
{
    double loss = 0;
    int64_t right = 0;
    for (int64_t row = threadIdx.x; row < rows; row += ROW_THREADS) {
        loss -= (double)scores.logprobs[row];
        right += scores.right[row];
    }
    loss = block_sum<ROW_THREADS>(loss);
    right = block_sum<ROW_THREADS>(right);
    if (threadIdx.x == 0 && loss_sum != NULL)
        *loss_sum += loss;
    if (threadIdx.x == 0 && n_correct != NULL)
        *n_correct += right;
}

/* ---- chunks ---- */

template <typename T, int N>
int launch_rows(struct kernel_device *device, const struct head_args *h, float *logits, int64_t first,
                int64_t rows)
{
    size_t shared =
        h->top_ids != NULL ? block_top_bytes(h->n_top, divide_up(h->vocab, (int64_t)ROW_THREADS * N) * N) : 0;
    if (shared + 8192 > (size_t)device->shared_bytes)
        return KERNEL_UNSUPPORTED;
    int status =
        cuda_check(device, cudaFuncSetAttribute(row_kernel<T, N>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                (int)shared));
    if (status != KERNEL_OK)
        return status;
    row_kernel<T, N>
        <<<(unsigned)rows, ROW_THREADS, shared, device->stream>>>(*h, head_scores_of(h), logits, first);
    return cuda_launched(device);
}

template <typename T>
int score_rows(struct kernel_device *device, const struct head_args *h, float *logits, int64_t first,
               int64_t rows)
{
    constexpr int N = 8;
    bool whole = h->vocab % N == 0 && cuda_aligned(logits, h->vocab);
    return whole ? launch_rows<T, N>(device, h, logits, first, rows)
                 : launch_rows<T, 1>(device, h, logits, first, rows);
}

int chunk_run(struct kernel_device *device, const struct head_args *h, int64_t first, int64_t rows)
{
    int64_t size = (int64_t)kernel_type_size(h->act), d = h->d_model, vocab = h->vocab;
    int64_t grad_stride = vocab * (int64_t)sizeof(float) / size; /* the gradients keep the logits' rows */
    float *logits = (float *)((char *)h->workspace + head_scores_bytes(h->rows));
    struct head_matrix hidden = {(const char *)h->hidden + first * d * size, d, false, h->act};
    struct head_matrix weight = {h->weight, d, true, h->weight_type};
    int status = head_product(device, rows, vocab, d, hidden, weight, h->tf32, 1.0f, logits, TYPE_F32, 0.0f);
    if (status != KERNEL_OK)
        return status;
    CUDA_WITH_TYPE(h->act, T, status = score_rows<T>(device, h, logits, first, rows));
    float scale = h->grad_scale / GRADIENT_UNIT;
    struct head_matrix gradient = {logits, grad_stride, false, h->act};
    weight.transposed = false;
    if (h->d_hidden != NULL && status == KERNEL_OK)
        status = head_product(device, rows, d, vocab, gradient, weight, h->tf32, scale,
                              (char *)h->d_hidden + first * d * size, h->act, 0.0f);
    gradient.transposed = true;
    if (h->d_weight != NULL && status == KERNEL_OK)
        status = head_product(device, vocab, d, rows, gradient, hidden, h->tf32, scale, h->d_weight, TYPE_F32,
                              1.0f);
    return status;
}

} // namespace

int head_product(struct kernel_device *device, int64_t m, int64_t n, int64_t k, const struct head_matrix &a,
                 const struct head_matrix &b, bool tf32, float alpha, void *c, enum kernel_type c_type,
                 float beta)
{
    struct gemm_args g = {};
    g.m = m, g.n = n, g.k = k;
    g.transpose_a = a.transposed, g.transpose_b = b.transposed;
    g.alpha = alpha, g.beta = beta;
    g.a = a.p, g.a_stride = a.stride;
    g.b = b.p, g.b_stride = b.stride;
    g.c = c, g.c_stride = n;
    g.act = a.type, g.b_type = b.type, g.c_type = c_type;
    g.tf32 = tf32;
    return cuda_gemm(device, &g);
}

int64_t cuda_head_workspace(int64_t rows, int64_t d_model, int64_t vocab, bool backward)
{
    int64_t logits = chunk_rows(rows, vocab, CHUNK_BYTES) * vocab * (int64_t)sizeof(float);
    int64_t fused = head_fused_workspace(rows, d_model, vocab, backward);
    return head_scores_bytes(rows) + (logits > fused ? logits : fused);
}

int cuda_head(struct kernel_device *device, const struct head_args *h)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    bool backward = h->d_hidden != NULL || h->d_weight != NULL;
    if (h->rows < 0 || h->d_model < 0 || h->vocab <= 0 || h->vocab > INT32_MAX || h->n_top < 0 ||
        h->n_top > KERNEL_TOP_MAX || (h->top_ids != NULL && h->n_top > h->vocab) ||
        h->workspace_bytes < cuda_head_workspace(h->rows, h->d_model, h->vocab, backward))
        return KERNEL_INVALID;
    if (!cuda_is_float(h->act) || !cuda_is_float(h->weight_type) || h->d_model == 0)
        return KERNEL_UNSUPPORTED;
    if (h->rows == 0)
        return KERNEL_OK;
    bool fused = head_fused_can(device, h);
    if (fused)
        status = head_fused(device, h);
    int64_t room = cuda_head_workspace(h->rows, h->d_model, h->vocab, backward) - head_scores_bytes(h->rows);
    bool all = h->rows <= room / (h->vocab * (int64_t)sizeof(float));
    int64_t chunk = all ? h->rows : chunk_rows(h->rows, h->vocab, room);
    for (int64_t first = 0; first < h->rows && !fused && status == KERNEL_OK; first += chunk)
        status = chunk_run(device, h, first, h->rows - first < chunk ? h->rows - first : chunk);
    if (status == KERNEL_OK && (h->loss_sum != NULL || h->n_correct != NULL)) {
        sum_kernel<<<1, ROW_THREADS, 0, device->stream>>>(head_scores_of(h), h->rows, h->loss_sum,
                                                          h->n_correct);
        status = cuda_launched(device);
    }
    return status;
}
