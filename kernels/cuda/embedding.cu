/* embedding.cu: rows of the token table, with the adapter's low-rank path.
 *
 * Backward without atomics: the block of a token does nothing unless it is the first one with its id; then it adds
 * the gradients of all tokens with that id, in their order, and owns the id's row and column. Looking for equal ids
 * compares T^2/2 pairs, which stays below a millisecond for any batch that fits a step. */
#include "kernels/cuda/common.cuh"

enum {
    THREADS = 256,
    RANKS_AT_ONCE = 8,  /* accumulators in registers */
    CHUNK_TOKENS = 256, /* of B's gradient, which a second kernel adds in order */
    CHUNKS_MOST = 64,
};

template <typename T, typename W, int N>
static __global__ void forward_kernel(const int32_t *__restrict__ ids, const W *__restrict__ table,
                                      const float *__restrict__ lora_a, const float *__restrict__ lora_b,
                                      int64_t rank, float scale, T *__restrict__ y, int64_t vocab, int64_t d)
{
    int64_t id = ids[blockIdx.x];
    y += (int64_t)blockIdx.x * d;
    table += id * d;
    for (int64_t i = (int64_t)threadIdx.x * N; i < d; i += THREADS * N) {
        float v[N];
        load_pack(table + i, v);
        if (lora_a != NULL) {
#pragma unroll
            for (int j = 0; j < N; j++) {
                float sum = 0.0f;
                for (int64_t r = 0; r < rank; r++)
                    sum = fmaf(lora_b[(i + j) * rank + r], lora_a[r * vocab + id], sum);
                v[j] = fmaf(scale, sum, v[j]);
            }
        }
        store_pack(y + i, v);
    }
}

template <typename T, typename W>
static void launch_forward(struct kernel_device *device, const struct embedding_forward_args *a)
{
    constexpr int N = pack<T>::COUNT > pack<W>::COUNT ? pack<T>::COUNT : pack<W>::COUNT;
    const W *table = (const W *)a->table;
    T *y = (T *)a->y;
    unsigned grid = (unsigned)a->tokens;
    if (cuda_aligned(table, a->d_model) && cuda_aligned(y, a->d_model) && a->d_model % N == 0)
        forward_kernel<T, W, N><<<grid, THREADS, 0, device->stream>>>(
            a->ids, table, a->lora_a, a->lora_b, a->rank, a->scale, y, a->vocab, a->d_model);
    else
        forward_kernel<T, W, 1><<<grid, THREADS, 0, device->stream>>>(
            a->ids, table, a->lora_a, a->lora_b, a->rank, a->scale, y, a->vocab, a->d_model);
}

int cuda_embedding_forward(struct kernel_device *device, const struct embedding_forward_args *a)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    if (a->tokens < 0 || a->vocab < 0 || a->d_model < 0 || (a->lora_a != NULL && a->rank <= 0))
        return KERNEL_INVALID;
    if (!cuda_is_float(a->act) || !cuda_is_float(a->table_type) || a->tokens > INT32_MAX)
        return KERNEL_UNSUPPORTED;
    if (a->tokens == 0 || a->d_model == 0)
        return KERNEL_OK;
    CUDA_WITH_TYPE(a->act, T, CUDA_WITH_TYPE(a->table_type, W, launch_forward<T, W>(device, a)));
    return cuda_launched(device);
}

/* ---- backward of the table and of the adapter's A ---- */

struct rows_args {
    const int32_t *ids;
    int64_t tokens, vocab, d;
    float *dtable, *da;
    const float *lora_b;
    int64_t rank;
    float scale;
};

/* Whether a token before this one has the same id. */
static __device__ bool seen_before(const int32_t *ids, int64_t token, int32_t id)
{
    for (int64_t first = 0; first < token; first += THREADS) {
        int64_t other = first + threadIdx.x;
        if (__syncthreads_or(other < token && ids[other] == id))
            return true;
    }
    return false;
}

/* sums: [d] in shared memory, the gradient of the id's row. */
template <typename T> static __global__ void rows_kernel(const T *__restrict__ dy, struct rows_args a)
{
    extern __shared__ float sums[];
    __shared__ unsigned equal[THREADS / WARP];
    int64_t token = blockIdx.x;
    int32_t id = a.ids[token];
    if (seen_before(a.ids, token, id))
        return;
    for (int64_t i = threadIdx.x; i < a.d; i += THREADS)
        sums[i] = 0.0f;
    for (int64_t first = token; first < a.tokens; first += THREADS) {
        int64_t other = first + threadIdx.x;
        unsigned mask = __ballot_sync(0xffffffffu, other < a.tokens && a.ids[other] == id);
        if (threadIdx.x % WARP == 0)
            equal[threadIdx.x / WARP] = mask;
        __syncthreads();
        for (int word = 0; word < THREADS / WARP; word++) {
            for (unsigned left = equal[word]; left != 0; left &= left - 1) {
                const T *row = dy + (first + word * WARP + __ffs((int)left) - 1) * a.d;
                for (int64_t i = threadIdx.x; i < a.d; i += THREADS)
                    sums[i] += to_float(row[i]);
            }
        }
        __syncthreads();
    }
    if (a.dtable != NULL)
        for (int64_t i = threadIdx.x; i < a.d; i += THREADS)
            a.dtable[id * a.d + i] += sums[i];
    for (int64_t r = 0; a.da != NULL && r < a.rank; r++) {
        float sum = 0.0f;
        for (int64_t i = threadIdx.x; i < a.d; i += THREADS)
            sum = fmaf(sums[i], a.lora_b[i * a.rank + r], sum);
        sum = block_sum<THREADS>(sum);
        if (threadIdx.x == 0)
            a.da[r * a.vocab + id] += a.scale * sum;
    }
}

template <typename T>
static int backward_rows(struct kernel_device *device, const struct embedding_backward_args *a)
{
    struct rows_args args = {};
    args.ids = a->ids;
    args.tokens = a->tokens;
    args.vocab = a->vocab;
    args.d = a->d_model;
    args.dtable = a->dtable;
    args.da = a->da;
    args.lora_b = a->lora_b;
    args.rank = a->rank;
    args.scale = a->scale;
    size_t shared = (size_t)a->d_model * sizeof(float);
    if (shared + 1024 > (size_t)device->shared_bytes)
        return KERNEL_UNSUPPORTED;
    int status =
        cuda_check(device, cudaFuncSetAttribute(rows_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                (int)shared));
    if (status != KERNEL_OK)
        return status;
    rows_kernel<T><<<(unsigned)a->tokens, THREADS, shared, device->stream>>>((const T *)a->dy, args);
    return cuda_launched(device);
}

/* ---- backward of the adapter's B ---- */

/* partial[chunk][i][r] = sum over the chunk's tokens of dy[t,i] A[r,id_t]. */
template <typename T>
static __global__ void b_kernel(const int32_t *__restrict__ ids, const T *__restrict__ dy,
                                const float *__restrict__ lora_a, float *__restrict__ partial, int64_t tokens,
                                int64_t chunk_tokens, int64_t vocab, int64_t d, int64_t rank)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, first_rank = (int64_t)blockIdx.z * RANKS_AT_ONCE;
    if (i >= d)
        return;
    int64_t first = blockIdx.y * chunk_tokens;
    int64_t end = first + chunk_tokens < tokens ? first + chunk_tokens : tokens;
    float sums[RANKS_AT_ONCE] = {};
    for (int64_t t = first; t < end; t++) {
        float g = to_float(dy[t * d + i]);
        int64_t id = ids[t];
#pragma unroll
        for (int r = 0; r < RANKS_AT_ONCE; r++)
            if (first_rank + r < rank)
                sums[r] = fmaf(g, lora_a[(first_rank + r) * vocab + id], sums[r]);
    }
#pragma unroll
    for (int r = 0; r < RANKS_AT_ONCE; r++)
        if (first_rank + r < rank)
            partial[((int64_t)blockIdx.y * d + i) * rank + first_rank + r] = sums[r];
}

static __global__ void b_reduce_kernel(const float *__restrict__ partial, float *__restrict__ db,
                                       int64_t chunks, int64_t count, float scale)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= count)
        return;
    float sum = 0.0f;
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        sum += partial[chunk * count + i];
    db[i] = fmaf(scale, sum, db[i]);
}

template <typename T>
static int backward_b(struct kernel_device *device, const struct embedding_backward_args *a)
{
    int64_t chunk_tokens = divide_up(a->tokens, CHUNKS_MOST);
    chunk_tokens = chunk_tokens > CHUNK_TOKENS ? chunk_tokens : CHUNK_TOKENS;
    int64_t chunks = divide_up(a->tokens, chunk_tokens), count = a->d_model * a->rank;
    void *partial = NULL;
    int status = cuda_scratch(device, CUDA_SCRATCH_OP, (size_t)(chunks * count) * sizeof(float), &partial);
    if (status != KERNEL_OK)
        return status;
    dim3 grid((unsigned)divide_up(a->d_model, THREADS), (unsigned)chunks,
              (unsigned)divide_up(a->rank, RANKS_AT_ONCE));
    b_kernel<T><<<grid, THREADS, 0, device->stream>>>(a->ids, (const T *)a->dy, a->lora_a, (float *)partial,
                                                      a->tokens, chunk_tokens, a->vocab, a->d_model, a->rank);
    b_reduce_kernel<<<(unsigned)divide_up(count, THREADS), THREADS, 0, device->stream>>>(
        (const float *)partial, a->db, chunks, count, a->scale);
    return cuda_launched(device);
}

int cuda_embedding_backward(struct kernel_device *device, const struct embedding_backward_args *a)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    bool lora = a->da != NULL || a->db != NULL;
    if (a->tokens < 0 || a->vocab < 0 || a->d_model < 0 || (lora && a->rank <= 0))
        return KERNEL_INVALID;
    if (!cuda_is_float(a->act) || a->tokens > INT32_MAX)
        return KERNEL_UNSUPPORTED;
    if (a->tokens == 0 || a->d_model == 0)
        return KERNEL_OK;
    if (a->dtable != NULL || a->da != NULL)
        CUDA_WITH_TYPE(a->act, T, status = backward_rows<T>(device, a));
    if (status == KERNEL_OK && a->db != NULL)
        CUDA_WITH_TYPE(a->act, T, status = backward_b<T>(device, a));
    return status;
}
