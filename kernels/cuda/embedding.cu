/* embedding.cu: rows of the token table, with the adapter's low-rank path.
 *
 * Backward without float atomics: tokens are sorted by id, stably, by one thread block (a radix sort of 16 bits is two
 * passes). Thread blocks then add stretches of STRETCH sorted tokens. A run of equal ids inside a stretch is written by
 * who added it; the parts of one that goes on in the next are left aside, and a second kernel adds those in order. So
 * the work is even however often an id occurs, and what is added to what follows from the ids alone. */
#include "kernels/cuda/common.cuh"

enum {
    THREADS = 256,
    RANKS_AT_ONCE = 8, /* accumulators in registers */
    TOKENS_AT_ONCE = 16,
    CHUNK_TOKENS = 64, /* of B's gradient, which a second kernel adds in order */
    CHUNKS_MOST = 256,
    CHUNKS_BYTES = 128 << 20, /* of all: plans count no scratch */
    SORT_THREADS = 1024,
    SORT_WARPS = SORT_THREADS / WARP,
    DIGIT_BITS = 8,
    DIGITS = 1 << DIGIT_BITS,
    STRETCH = 32,
    STRETCH_THREADS = 128,
    ROWS_AT_ONCE = 4, /* tokens of a thread whose loads are in flight together */
};

template <typename T, typename W, int N>
static __global__ void forward_kernel(const int32_t *__restrict__ ids, const W *__restrict__ table,
                                      T *__restrict__ y, int64_t d)
{
    int64_t id = ids[blockIdx.x];
    y += (int64_t)blockIdx.x * d;
    table += id * d;
    for (int64_t i = (int64_t)threadIdx.x * N; i < d; i += THREADS * N) {
        float v[N];
        load_pack(table + i, v);
        store_pack(y + i, v);
    }
}

/* With the adapter: a thread has a column and TOKENS_AT_ONCE tokens, whose columns of A are in shared memory. */
template <typename T, typename W>
static __global__ void __launch_bounds__(THREADS) lora_forward_kernel(struct embedding_forward_args a)
{
    __shared__ float columns[RANKS_AT_ONCE][TOKENS_AT_ONCE];
    int64_t i = (int64_t)blockIdx.y * THREADS + threadIdx.x, first = (int64_t)blockIdx.x * TOKENS_AT_ONCE;
    int tokens = (int)(a.tokens - first < TOKENS_AT_ONCE ? a.tokens - first : TOKENS_AT_ONCE);
    float sums[TOKENS_AT_ONCE] = {};
    for (int64_t rank = 0; rank < a.rank; rank += RANKS_AT_ONCE) {
        __syncthreads();
        int r = (int)threadIdx.x / TOKENS_AT_ONCE, t = (int)threadIdx.x % TOKENS_AT_ONCE;
        if (r < RANKS_AT_ONCE)
            columns[r][t] =
                t < tokens && rank + r < a.rank ? a.lora_a[(rank + r) * a.vocab + a.ids[first + t]] : 0.0f;
        __syncthreads();
        for (r = 0; i < a.d_model && r < RANKS_AT_ONCE && rank + r < a.rank; r++) {
            float b = a.lora_b[i * a.rank + rank + r];
#pragma unroll
            for (t = 0; t < TOKENS_AT_ONCE; t++)
                sums[t] = fmaf(b, columns[r][t], sums[t]);
        }
    }
    if (i >= a.d_model)
        return;
#pragma unroll
    for (int t = 0; t < TOKENS_AT_ONCE; t++) {
        if (t >= tokens)
            break;
        float v = to_float(((const W *)a.table)[a.ids[first + t] * a.d_model + i]);
        ((T *)a.y)[(first + t) * a.d_model + i] = from_float<T>(fmaf(a.scale, sums[t], v));
    }
}

template <typename T, typename W>
static void launch_forward(struct kernel_device *device, const struct embedding_forward_args *a)
{
    constexpr int N = pack<T>::COUNT > pack<W>::COUNT ? pack<T>::COUNT : pack<W>::COUNT;
    const W *table = (const W *)a->table;
    T *y = (T *)a->y;
    if (a->lora_a != NULL) {
        dim3 grid((unsigned)divide_up(a->tokens, TOKENS_AT_ONCE), (unsigned)divide_up(a->d_model, THREADS));
        lora_forward_kernel<T, W><<<grid, THREADS, 0, device->stream>>>(*a);
    } else if (cuda_aligned(table, a->d_model) && cuda_aligned(y, a->d_model) && a->d_model % N == 0) {
        forward_kernel<T, W, N>
            <<<(unsigned)a->tokens, THREADS, 0, device->stream>>>(a->ids, table, y, a->d_model);
    } else {
        forward_kernel<T, W, 1>
            <<<(unsigned)a->tokens, THREADS, 0, device->stream>>>(a->ids, table, y, a->d_model);
    }
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

/* ---- backward: tokens in order of their ids ---- */

/* One pass of a stable radix sort: to[] are the tokens of from[] (NULL: 0, 1, 2 ...) by the digit of their id. A warp
 * has a stretch of them; digits of equal value keep the order of stretches, and within one that of its steps and lanes. */
static __device__ void sort_pass(const int32_t *ids, const int32_t *from, int32_t *to, int64_t tokens,
                                 int shift)
{
    __shared__ int32_t places[SORT_WARPS][DIGITS]; /* counts, then where the next one goes */
    __shared__ int32_t totals[DIGITS];
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    int64_t stretch = divide_up(divide_up(tokens, SORT_WARPS), WARP) * WARP, begin = warp * stretch;
    int64_t end = begin + stretch < tokens ? begin + stretch : tokens;
    for (int i = lane; i < DIGITS; i += WARP)
        places[warp][i] = 0;
    __syncwarp();
    for (int pass = 0; pass < 2; pass++) { /* count, then move */
        for (int64_t first = begin; first < end; first += WARP * ROWS_AT_ONCE) {
            int32_t token[ROWS_AT_ONCE];
            int digit[ROWS_AT_ONCE];
#pragma unroll
            for (int k = 0; k < ROWS_AT_ONCE; k++) {
                int64_t i = first + k * WARP + lane;
                token[k] = i < end ? (from != NULL ? from[i] : (int32_t)i) : -1;
            }
#pragma unroll
            for (int k = 0; k < ROWS_AT_ONCE; k++) /* a value of its own where there is no token */
                digit[k] = token[k] >= 0 ? ids[token[k]] >> shift & (DIGITS - 1) : DIGITS + lane;
#pragma unroll
            for (int k = 0; k < ROWS_AT_ONCE; k++) {
                unsigned same = __match_any_sync(0xffffffffu, digit[k]);
                int before = __popc(same & ((1u << lane) - 1));
                if (pass == 1 && token[k] >= 0)
                    to[places[warp][digit[k]] + before] = token[k];
                __syncwarp();
                if (before == 0 && token[k] >= 0)
                    places[warp][digit[k]] += __popc(same);
                __syncwarp();
            }
        }
        __syncthreads();
        if (pass == 1)
            return;
        if (threadIdx.x < DIGITS) {
            int32_t sum = 0;
            for (int w = 0; w < SORT_WARPS; w++) {
                int32_t count = places[w][threadIdx.x];
                places[w][threadIdx.x] = sum;
                sum += count;
            }
            totals[threadIdx.x] = sum;
        }
        __syncthreads();
        int32_t before = 0; /* of smaller digits */
        for (int i = 0; i < (int)threadIdx.x && threadIdx.x < DIGITS; i++)
            before += totals[i];
        for (int w = 0; w < SORT_WARPS && threadIdx.x < DIGITS; w++)
            places[w][threadIdx.x] += before;
        __syncthreads();
    }
}

/* order: [2][tokens], of which one half is the outcome: the second if the number of passes is even. */
static __global__ void __launch_bounds__(SORT_THREADS)
    sort_kernel(const int32_t *__restrict__ ids, int32_t *order, int64_t tokens, int passes)
{
    for (int pass = 0; pass < passes; pass++) {
        const int32_t *from = pass == 0 ? NULL : order + (pass - 1) % 2 * tokens;
        sort_pass(ids, from, order + pass % 2 * tokens, tokens, pass * DIGIT_BITS);
        __syncthreads();
    }
}

static int sort_passes(int64_t vocab)
{
    int passes = 1;
    while (vocab > (int64_t)1 << passes * DIGIT_BITS)
        passes++;
    return passes;
}

/* ---- backward: sums over runs of equal ids ---- */

/* to[id, i] += the sum of the rows of tokens with that id. */
struct run_args {
    const int32_t *ids, *order;
    int64_t tokens, columns;
    float *parts; /* [stretches][2][columns]: of the run that came in, of the run that goes on */
    float *to;
    int64_t id_stride, column_stride;
};

static __device__ __forceinline__ int32_t sorted_id(const struct run_args &a, int64_t i)
{
    return a.ids[a.order[i]];
}

template <int N>
static __device__ __forceinline__ void add_to(const struct run_args &a, int32_t id, int64_t column,
                                              const float (&sums)[N])
{
    float *to = a.to + id * a.id_stride + column * a.column_stride;
#pragma unroll
    for (int j = 0; j < N; j++)
        to[j * a.column_stride] += sums[j];
}

template <typename T, int N>
static __global__ void __launch_bounds__(STRETCH_THREADS)
    run_kernel(const T *__restrict__ rows, struct run_args a)
{
    __shared__ int32_t tokens[STRETCH], ids[STRETCH];
    __shared__ bool comes_in, goes_on;
    int64_t first = (int64_t)blockIdx.x * STRETCH;
    int count = (int)(a.tokens - first < STRETCH ? a.tokens - first : STRETCH);
    if ((int)threadIdx.x < count) {
        tokens[threadIdx.x] = a.order[first + threadIdx.x];
        ids[threadIdx.x] = a.ids[tokens[threadIdx.x]];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        comes_in = first > 0 && sorted_id(a, first - 1) == ids[0];
        goes_on = first + count < a.tokens && sorted_id(a, first + count) == ids[count - 1];
    }
    __syncthreads();
    int64_t column = ((int64_t)blockIdx.y * STRETCH_THREADS + threadIdx.x) * N;
    if (column >= a.columns)
        return;
    float *parts = a.parts + (int64_t)blockIdx.x * 2 * a.columns + column;
    float sums[N] = {};
    bool in_first = true; /* the run is the stretch's first */
    for (int i = 0; i < count; i += ROWS_AT_ONCE) {
        float v[ROWS_AT_ONCE][N];
#pragma unroll
        for (int k = 0; k < ROWS_AT_ONCE; k++)
            if (i + k < count)
                load_pack(rows + tokens[i + k] * a.columns + column, v[k]);
#pragma unroll
        for (int k = 0; k < ROWS_AT_ONCE; k++) {
            if (i + k >= count)
                break;
#pragma unroll
            for (int j = 0; j < N; j++)
                sums[j] += v[k][j];
            bool last = i + k + 1 == count;
            if (!last && ids[i + k + 1] == ids[i + k])
                continue;
            if (in_first && comes_in)
                store_pack<float, N>(parts, sums);
            else if (last && goes_on)
                store_pack<float, N>(parts + a.columns, sums);
            else
                add_to(a, ids[i + k], column, sums);
            in_first = false;
#pragma unroll
            for (int j = 0; j < N; j++)
                sums[j] = 0.0f;
        }
    }
}

/* The run that begins in this block's stretch and goes on in the next ones. */
static __global__ void __launch_bounds__(STRETCH_THREADS) join_kernel(struct run_args a)
{
    int64_t first = (int64_t)blockIdx.x * STRETCH, end = first + STRETCH;
    if (end >= a.tokens)
        return;
    int32_t id = sorted_id(a, end - 1);
    bool begins = sorted_id(a, first) != id || first == 0 || sorted_id(a, first - 1) != id;
    if (!begins || sorted_id(a, end) != id)
        return;
    int64_t last = end, beyond = a.tokens; /* sorted tokens with this id and after it */
    while (beyond - last > 1) {
        int64_t middle = (last + beyond) / 2;
        if (sorted_id(a, middle) == id)
            last = middle;
        else
            beyond = middle;
    }
    int64_t stretches = last / STRETCH - blockIdx.x; /* that it goes on in */
    for (int64_t i = threadIdx.x; i < a.columns; i += STRETCH_THREADS) {
        const float *parts = a.parts + ((int64_t)blockIdx.x * 2 + 1) * a.columns + i;
        float sum = *parts;
#pragma unroll 8
        for (int64_t s = 0; s < stretches; s++)
            sum += parts[(2 * s + 1) * a.columns];
        float sums[1] = {sum};
        add_to(a, id, i, sums);
    }
}

template <typename T>
static int add_runs(struct kernel_device *device, const T *rows, const struct run_args &args)
{
    constexpr int N = pack<T>::COUNT;
    unsigned stretches = (unsigned)divide_up(args.tokens, STRETCH);
    if (cuda_aligned(rows, args.columns) && cuda_aligned(args.parts, args.columns) && args.columns % N == 0) {
        dim3 grid(stretches, (unsigned)divide_up(args.columns, STRETCH_THREADS * N));
        run_kernel<T, N><<<grid, STRETCH_THREADS, 0, device->stream>>>(rows, args);
    } else {
        dim3 grid(stretches, (unsigned)divide_up(args.columns, STRETCH_THREADS));
        run_kernel<T, 1><<<grid, STRETCH_THREADS, 0, device->stream>>>(rows, args);
    }
    join_kernel<<<stretches, STRETCH_THREADS, 0, device->stream>>>(args);
    return cuda_launched(device);
}

/* du[t,r] = scale sum_i dy[t,i] B[i,r]: a warp has ROWS_AT_ONCE tokens and RANKS_AT_ONCE ranks. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    du_kernel(const T *__restrict__ dy, const float *__restrict__ lora_b, float *__restrict__ du,
              int64_t tokens, int64_t d, int64_t rank, float scale)
{
    int64_t token = ((int64_t)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP) * ROWS_AT_ONCE;
    int64_t first = (int64_t)blockIdx.y * RANKS_AT_ONCE;
    float sums[ROWS_AT_ONCE][RANKS_AT_ONCE] = {};
    for (int64_t i = threadIdx.x % WARP; i < d; i += WARP) {
        float b[RANKS_AT_ONCE];
#pragma unroll
        for (int r = 0; r < RANKS_AT_ONCE; r++)
            b[r] = first + r < rank ? lora_b[i * rank + first + r] : 0.0f;
#pragma unroll
        for (int k = 0; k < ROWS_AT_ONCE; k++) {
            float g = token + k < tokens ? to_float(dy[(token + k) * d + i]) : 0.0f;
#pragma unroll
            for (int r = 0; r < RANKS_AT_ONCE; r++)
                sums[k][r] = fmaf(g, b[r], sums[k][r]);
        }
    }
#pragma unroll
    for (int k = 0; k < ROWS_AT_ONCE; k++) {
#pragma unroll
        for (int r = 0; r < RANKS_AT_ONCE; r++) {
            float sum = warp_sum(sums[k][r]);
            if (threadIdx.x % WARP == 0 && token + k < tokens && first + r < rank)
                du[(token + k) * rank + first + r] = scale * sum;
        }
    }
}

/* ---- backward of the table and of the adapter's A ---- */

template <typename T>
static int backward_rows(struct kernel_device *device, const struct embedding_backward_args *a)
{
    int64_t widest = a->dtable != NULL && a->d_model > a->rank ? a->d_model : a->rank;
    size_t order_bytes = (size_t)divide_up(2 * a->tokens * (int64_t)sizeof(int32_t), 256) * 256;
    size_t parts_bytes =
        (size_t)divide_up(divide_up(a->tokens, STRETCH) * 2 * widest * (int64_t)sizeof(float), 256) * 256;
    size_t du_bytes = a->da != NULL ? (size_t)(a->tokens * a->rank) * sizeof(float) : 0;
    void *scratch = NULL;
    int status = cuda_scratch(device, CUDA_SCRATCH_OP, order_bytes + parts_bytes + du_bytes, &scratch);
    if (status != KERNEL_OK)
        return status;
    int32_t *order = (int32_t *)scratch;
    float *du = (float *)((char *)scratch + order_bytes + parts_bytes);
    int passes = sort_passes(a->vocab);
    sort_kernel<<<1, SORT_THREADS, 0, device->stream>>>(a->ids, order, a->tokens, passes);
    struct run_args args = {};
    args.ids = a->ids;
    args.order = order + (passes - 1) % 2 * a->tokens;
    args.tokens = a->tokens;
    args.parts = (float *)((char *)scratch + order_bytes);
    if (a->dtable != NULL) {
        args.columns = a->d_model;
        args.to = a->dtable;
        args.id_stride = a->d_model;
        args.column_stride = 1;
        status = add_runs(device, (const T *)a->dy, args);
    }
    if (a->da != NULL && status == KERNEL_OK) {
        dim3 grid((unsigned)divide_up(a->tokens, THREADS / WARP * ROWS_AT_ONCE),
                  (unsigned)divide_up(a->rank, RANKS_AT_ONCE));
        du_kernel<T><<<grid, THREADS, 0, device->stream>>>((const T *)a->dy, a->lora_b, du, a->tokens,
                                                           a->d_model, a->rank, a->scale);
        args.columns = a->rank;
        args.to = a->da;
        args.id_stride = 1;
        args.column_stride = a->vocab;
        status = add_runs(device, (const float *)du, args);
    }
    return status;
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
#pragma unroll 4
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
#pragma unroll 8
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        sum += partial[chunk * count + i];
    db[i] = fmaf(scale, sum, db[i]);
}

template <typename T>
static int backward_b(struct kernel_device *device, const struct embedding_backward_args *a)
{
    int64_t count = a->d_model * a->rank, most = CHUNKS_BYTES / (count * (int64_t)sizeof(float));
    most = most < 1 ? 1 : most < CHUNKS_MOST ? most : (int64_t)CHUNKS_MOST;
    int64_t chunk_tokens = divide_up(a->tokens, most);
    chunk_tokens = chunk_tokens > CHUNK_TOKENS ? chunk_tokens : CHUNK_TOKENS;
    int64_t chunks = divide_up(a->tokens, chunk_tokens);
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
