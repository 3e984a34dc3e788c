/* head.cu: the output layer and its loss. Rows go through in chunks: fp32 logits by one product into the workspace;
 * a block a row for the scores, which leaves the gradient of the logits in their place, narrowed to the type of the
 * activations; then the products for d_hidden and d_weight. Ignored rows go along with a gradient of zero: which they
 * are is known to the device alone. So is a target out of range, whose row gets NaN and no gradient. */
#include "kernels/cuda/common.cuh"

namespace
{

enum {
    ROW_THREADS = 512,
    CHUNK_ROWS_LEAST = 64,
};
constexpr int64_t CHUNK_BYTES = (int64_t)192 << 20; /* of logits, wanted */

int64_t chunk_rows(int64_t rows, int64_t vocab)
{
    int64_t chunk = CHUNK_BYTES / (vocab * (int64_t)sizeof(float));
    chunk -= chunk % CHUNK_ROWS_LEAST;
    if (chunk < CHUNK_ROWS_LEAST)
        chunk = CHUNK_ROWS_LEAST;
    return rows < chunk ? rows : chunk;
}

/* ---- one row ---- */

/* The better of two (logit, id): the higher, of equals the lower id; id -1 is none. */
struct candidate {
    float logit;
    int32_t id;
};

__device__ __forceinline__ bool better(const struct candidate &a, const struct candidate &b)
{
    return b.id < 0 || (a.id >= 0 && (a.logit > b.logit || (a.logit == b.logit && a.id < b.id)));
}

/* The best of the block's candidates, for every thread. */
__device__ struct candidate block_best(struct candidate best)
{
    __shared__ struct candidate warps[ROW_THREADS / WARP];
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        struct candidate other = {__shfl_xor_sync(0xffffffffu, best.logit, step),
                                  __shfl_xor_sync(0xffffffffu, best.id, step)};
        if (better(other, best))
            best = other;
    }
    __syncthreads(); /* an earlier call's readers are done */
    if (threadIdx.x % WARP == 0)
        warps[threadIdx.x / WARP] = best;
    __syncthreads();
    best = warps[0];
    for (int i = 1; i < ROW_THREADS / WARP; i++)
        if (better(warps[i], best))
            best = warps[i];
    return best;
}

/* The id that follows `previous` in descending order of logit; previous.id < 0 asks for the first. */
__device__ struct candidate next_best(const float *logits, int64_t vocab, struct candidate previous)
{
    struct candidate best = {0.0f, -1};
    for (int32_t j = (int32_t)threadIdx.x; j < vocab; j += ROW_THREADS) {
        struct candidate one = {logits[j], j};
        if ((previous.id < 0 || better(previous, one)) && one.id != previous.id && better(one, best))
            best = one;
    }
    return block_best(best);
}

/* dlogits = grad_scale (softmax - one at the target), in the first halves of the logits' own bytes when T is narrower:
 * every element is read before the write that covers it, since a write never runs ahead of the reads. */
template <typename T>
__device__ void write_gradient(float *logits, int64_t vocab, int32_t target, float max, float scale,
                               float grad_scale)
{
    T *to = (T *)(void *)logits;
    bool zero = target < 0 || target >= vocab;
    for (int64_t base = 0; base < vocab; base += ROW_THREADS) {
        int64_t j = base + threadIdx.x;
        float g = 0.0f;
        if (j < vocab && !zero) {
            g = scale * __expf(logits[j] - max);
            if (j == target)
                g -= grad_scale;
        }
        if (sizeof(T) < sizeof(float))
            __syncthreads();
        if (j < vocab)
            to[j] = from_float<T>(g);
    }
}

/* logits: [gridDim.x,vocab], rows from first_row on of the caller's. */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS)
    row_kernel(struct head_args h, float *all_logits, int64_t first_row)
{
    int64_t row = first_row + blockIdx.x, vocab = h.vocab;
    float *logits = all_logits + blockIdx.x * vocab;
    int32_t target = h.targets[row];
    bool gradient = h.d_hidden != NULL || h.d_weight != NULL;
    bool scored = target >= 0 && target < vocab;

    /* Largest logit and sum of exponentials in one pass. */
    struct candidate best = {0.0f, -1};
    float max = -INFINITY, sum = 0.0f;
    for (int32_t j = (int32_t)threadIdx.x; j < vocab; j += ROW_THREADS) {
        struct candidate one = {logits[j], j};
        if (better(one, best))
            best = one;
        if (one.logit > max) {
            sum = sum * __expf(max - one.logit) + 1.0f;
            max = one.logit;
        } else {
            sum += one.logit == max ? 1.0f : __expf(one.logit - max);
        }
    }
    best = block_best(best);
    if (sum > 0.0f && max != best.logit)
        sum *= __expf(max - best.logit);
    max = best.logit;
    sum = block_sum<ROW_THREADS>(sum);
    float log_sum = logf(sum);

    if (threadIdx.x == 0) {
        if (h.argmax != NULL)
            h.argmax[row] = best.id < 0 ? 0 : best.id;
        if (h.logprobs != NULL)
            h.logprobs[row] = scored ? (logits[target] - max) - log_sum : target < 0 ? 0.0f : NAN;
    }
    struct candidate top = {0.0f, -1};
    for (int32_t i = 0; h.top_ids != NULL && i < h.n_top; i++) {
        if (scored)
            top = i == 0 ? best : next_best(logits, vocab, top);
        if (threadIdx.x == 0) {
            h.top_ids[row * h.n_top + i] = scored && top.id >= 0 ? top.id : 0;
            h.top_logprobs[row * h.n_top + i] = scored ? (top.logit - max) - log_sum : 0.0f;
        }
    }
    if (gradient) {
        __syncthreads(); /* thread 0 has read the target's logit */
        write_gradient<T>(logits, vocab, target, max, h.grad_scale / sum, h.grad_scale);
    }
}

/* ---- chunks ---- */

cudaDataType_t blas_type(enum kernel_type type)
{
    return type == TYPE_BF16 ? CUDA_R_16BF : type == TYPE_F16 ? CUDA_R_16F : CUDA_R_32F;
}

struct matrix {
    const void *p;
    int64_t stride;
    bool transposed;
};

/* Row-major C[m,n] = op(A) op(B) + beta C, A and B of one type, C of another. See gemm.cu. */
int product(struct kernel_device *device, int64_t m, int64_t n, int64_t k, struct matrix a, struct matrix b,
            enum kernel_type type, void *c, enum kernel_type c_type, float beta)
{
    const float alpha = 1.0f;
    return cuda_check_blas(
        device, device->cublas->gemm_ex(device->blas, b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
                                        a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N, n, m, k, &alpha, b.p,
                                        blas_type(type), b.stride, a.p, blas_type(type), a.stride, &beta, c,
                                        blas_type(c_type), n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

/* weight: of the type of the activations. */
int chunk_run(struct kernel_device *device, const struct head_args *h, const void *weight, int64_t first,
              int64_t rows)
{
    int64_t size = (int64_t)kernel_type_size(h->act), d = h->d_model, vocab = h->vocab;
    const void *hidden = (const char *)h->hidden + first * d * size;
    float *logits = (float *)h->workspace;
    int status = product(device, rows, vocab, d, {hidden, d, false}, {weight, d, true}, h->act, logits,
                         TYPE_F32, 0.0f);
    if (status != KERNEL_OK)
        return status;
    CUDA_WITH_TYPE(h->act, T,
                   row_kernel<T><<<(unsigned)rows, ROW_THREADS, 0, device->stream>>>(*h, logits, first));
    status = cuda_launched(device);
    int64_t grad_stride = vocab * (int64_t)sizeof(float) / size; /* the gradients keep the logits' rows */
    if (h->d_hidden != NULL && status == KERNEL_OK)
        status = product(device, rows, d, vocab, {logits, grad_stride, false}, {weight, d, false}, h->act,
                         (char *)h->d_hidden + first * d * size, h->act, 0.0f);
    if (h->d_weight != NULL && status == KERNEL_OK)
        status = product(device, vocab, d, rows, {logits, grad_stride, true}, {hidden, d, false}, h->act,
                         h->d_weight, TYPE_F32, 1.0f);
    return status;
}

} // namespace

int64_t cuda_head_workspace(int64_t rows, int64_t d_model, int64_t vocab, bool backward)
{
    (void)d_model;
    (void)backward;
    return chunk_rows(rows, vocab) * vocab * (int64_t)sizeof(float);
}

int cuda_head(struct kernel_device *device, const struct head_args *h)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    if (h->rows < 0 || h->d_model < 0 || h->vocab <= 0 || h->vocab > INT32_MAX || h->n_top < 0 ||
        h->n_top > KERNEL_TOP_MAX || (h->top_ids != NULL && h->n_top > h->vocab) ||
        h->workspace_bytes < cuda_head_workspace(h->rows, h->d_model, h->vocab, h->d_hidden != NULL))
        return KERNEL_INVALID;
    if (!cuda_is_float(h->act) || !cuda_is_float(h->weight_type) || h->d_model == 0)
        return KERNEL_UNSUPPORTED;
    if (h->rows == 0)
        return KERNEL_OK;
    const void *weight = h->weight;
    if (h->weight_type != h->act) {
        void *converted;
        int64_t count = h->vocab * h->d_model;
        status =
            cuda_scratch(device, CUDA_SCRATCH_GEMM, (size_t)count * kernel_type_size(h->act), &converted);
        if (status == KERNEL_OK)
            status = cuda_cast(device, converted, h->act, h->weight, h->weight_type, count);
        weight = converted;
    }
    int64_t chunk = chunk_rows(h->rows, h->vocab);
    for (int64_t first = 0; first < h->rows && status == KERNEL_OK; first += chunk)
        status = chunk_run(device, h, weight, first, h->rows - first < chunk ? h->rows - first : chunk);
    return status;
}
