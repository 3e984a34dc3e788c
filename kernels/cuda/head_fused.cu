/* head_fused.cu: the output layer and its loss on Hopper in BF16 and F16, where logits never reach memory.
 *
 * With l the logits of a row, t its target and c = l[t] (from a product of its own, in fp32),
 *
 *     e[j] = exp(l[j] - c),  S = sum of e[j] over j != t,
 *     -log p(t) = log(1 + S),  d(hidden) = grad_scale / (1 + S) (sum of e[j] W[j] over j != t  -  S W[t]).
 *
 * So what divides comes after the second product, and e can be written by the first product's own kernel: each
 * of its tiles of 128 rows x 256 ids leaves e and, of each row, the sum of e and the highest logit. A small kernel adds
 * those up in order, puts -S in the target's place, and the second product runs over e. Nothing cancels: the loss
 * of a row that is nearly certain, and its gradient, are as exact as those of any other.
 *
 * In BF16 e has the range of a float, and is cut off at 2^100. Where that happens, at a probability of 1e-30 and less, the
 * loss is taken to be the distance to the highest logit, too small by the logarithm of how many are near it.
 *
 * F16 cannot hold that e. There a tile writes it relative to the row's highest logit in the tile, and once the row's sum is
 * known, one more pass over e makes that F16_UNIT e / S, and -F16_UNIT of the target, which fits whatever the logits are.
 *
 * The kernel of the first product: one block a multiprocessor goes through tiles; one thread of it has the copy engine
 * bring pieces of 64 columns of both matrices into a ring of STAGES, two warpgroups multiply 64 rows each. One of them
 * begins a little later, so that its products fill the time in which the other works on its finished tile. */
#include "kernels/cuda/head.cuh"
#include "kernels/cuda/hopper.cuh"

namespace
{

enum {
    TILE_ROWS = 128,
    TILE_IDS = 256,
    PIECE = 64, /* columns of a piece: 128 bytes, the width of the swizzle */
    STAGES = 4,
    GROUP = 128, /* threads of a warpgroup */
    TILE_THREADS = 3 * GROUP,
    PIECE_BYTES_A = TILE_ROWS * PIECE * 2,
    PIECE_BYTES_B = TILE_IDS * PIECE * 2,
    STAGE_BYTES = PIECE_BYTES_A + PIECE_BYTES_B,
    SHARED_BYTES = STAGES * STAGE_BYTES + 1024, /* to be aligned as the swizzle wants */
    THREADS = 256,
    ROWS_A_BLOCK = THREADS / WARP, /* of the kernels with a warp a row */
    TILES_OF_A_WAVE = 132,         /* what the second product does at once on an H200 */
};
constexpr float LOG2_E = 1.44269504089f;
constexpr float EXPONENT_MOST = 100.0f; /* of e in BF16, to the base of 2 */
constexpr float F16_UNIT = 32768.0f;

template <typename T> constexpr bool by_tile = std::is_same<T, __half>::value;

/* What a tile says about a row. 16 bytes. */
struct tile_result {
    float sum; /* of e, but for the target's; then, by tile, what its e is multiplied by */
    float highest;
    int32_t id;  /* of the highest logit, or -1: all are NaN or minus infinity */
    float shift; /* by tile: what e is relative to, times log2 e */
};

/* Some rows of the whole. */
struct chunk {
    int64_t rows, vocab, e_stride;
    const int32_t *targets;
    float *shifts;               /* [rows]: c log2 e */
    float *factors;              /* [rows]: 1 / (1 + S), by tile S / (1 + S); 0 where there is no gradient */
    struct tile_result *results; /* [rows,n_tiles] */
    void *e;                     /* [rows,e_stride] */
    float *sums; /* [rows,d]: d(hidden) without what divides; then hidden times what divides */
    int32_t m_tiles, n_tiles, pieces;
};

/* ---- the first product ---- */

#if CUDA_HOPPER

__device__ __forceinline__ float exp2_approximate(float v)
{
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v));
    return e;
}

__device__ __forceinline__ float min_with_nan(float a, float b)
{
    float v;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}

template <typename T> __device__ __forceinline__ uint32_t pack_pair(float low, float high)
{
    uint32_t v;
    if constexpr (by_tile<T>)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}

__device__ __forceinline__ void store_words(void *to, const uint32_t (&w)[4])
{
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(w[0]), "r"(w[1]), "r"(w[2]),
                 "r"(w[3])
                 : "memory");
}

/* Word k of lane q of four becomes word q of lane k. */
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4], int q)
{
    bool odd = q & 1, upper = q & 2;
    uint32_t a = __shfl_xor_sync(0xffffffffu, odd ? w[0] : w[1], 1);
    uint32_t b = __shfl_xor_sync(0xffffffffu, odd ? w[2] : w[3], 1);
    uint32_t x0 = odd ? a : w[0], x1 = odd ? w[1] : a, y0 = odd ? b : w[2], y1 = odd ? w[3] : b;
    a = __shfl_xor_sync(0xffffffffu, upper ? x0 : y0, 2);
    b = __shfl_xor_sync(0xffffffffu, upper ? x1 : y1, 2);
    w[0] = upper ? a : x0;
    w[1] = upper ? b : x1;
    w[2] = upper ? y0 : a;
    w[3] = upper ? y1 : b;
}

/* One of the thread's two rows of a tile. target, limit: ids of the tile. */
struct tile_row {
    int64_t row;
    bool inside;
    float shift;
    int32_t target;
    float target_logit; /* where the thread holds it, or minus infinity */
};

/* The first of the ids with the highest logit, over the four threads of a row. */
__device__ __forceinline__ void take_higher(float &highest, int32_t &id, float other, int32_t other_id)
{
    if (other_id >= 0 && (id < 0 || other > highest || (other == highest && other_id < id))) {
        highest = other;
        id = other_id;
    }
}

/* What e of the row is relative to in this tile, times log2 e. */
template <int H> __device__ __forceinline__ float tile_shift(const float (&logits)[128])
{
    float most = -INFINITY;
#pragma unroll
    for (int i = 0; i < 64; i++)
        most = fmaxf(most, logits[i / 2 * 4 + 2 * H + i % 2]);
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    return most > -INFINITY ? most * LOG2_E : 0.0f;
}

template <typename T, bool STORE, int H>
__device__ __forceinline__ void finish_row(const struct chunk &chunk, const float (&logits)[128],
                                           const struct tile_row &own, int32_t n_tile, int limit, int q)
{
    float sum = 0.0f, highest = -INFINITY, shift = own.shift;
    int32_t id = -1;
    T *e = (T *)chunk.e + own.row * chunk.e_stride + (int64_t)n_tile * TILE_IDS + 8 * q;
    if constexpr (by_tile<T>)
        shift = tile_shift<H>(logits);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        uint32_t words[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float pair[2];
#pragma unroll
            for (int b = 0; b < 2; b++) {
                float l = logits[(4 * i + k) * 4 + 2 * H + b];
                if (l > highest) {
                    highest = l;
                    id = 8 * (4 * i + k) + b;
                }
                float exponent = fmaf(l, LOG2_E, -shift);
                if constexpr (!by_tile<T>)
                    exponent = min_with_nan(exponent, EXPONENT_MOST);
                pair[b] = exp2_approximate(exponent);
                sum += pair[b];
            }
            words[k] = pack_pair<T>(pair[0], pair[1]);
        }
        if (STORE) {
            transpose_quad(words, q);
            if (own.inside && 32 * i + 8 * q < limit)
                store_words(e + 32 * i, words);
        }
    }
    if (id >= 0)
        id += 2 * q;
    if (own.target_logit > -INFINITY)
        take_higher(highest, id, own.target_logit, own.target);
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
        float other = __shfl_xor_sync(0xffffffffu, highest, step);
        int32_t other_id = __shfl_xor_sync(0xffffffffu, id, step);
        take_higher(highest, id, other, other_id);
    }
    if (q == 0 && own.inside) {
        int32_t result = id < 0 ? -1 : id + n_tile * TILE_IDS;
        *reinterpret_cast<uint4 *>(chunk.results + own.row * chunk.n_tiles + n_tile) = make_uint4(
            __float_as_uint(sum), __float_as_uint(highest), (uint32_t)result, __float_as_uint(shift));
    }
}

/* Takes what is no id, and the target, out of the sums: their e is 0. */
__device__ __forceinline__ void mask(float (&logits)[128], struct tile_row (&own)[2], int limit, int q)
{
    bool some = limit < TILE_IDS || (unsigned)own[0].target < TILE_IDS || (unsigned)own[1].target < TILE_IDS;
    if (!__any_sync(0xffffffffu, some))
        return;
#pragma unroll
    for (int i = 0; i < 128; i++) {
        int column = i / 4 * 8 + 2 * q + i % 2;
        struct tile_row &row = own[i / 2 % 2];
        if (column == row.target)
            row.target_logit = logits[i];
        if (column == row.target || column >= limit)
            logits[i] = -INFINITY;
    }
}

struct tile_shared {
    char *stages;
    uint64_t *full, *empty; /* [STAGES] */
};

__device__ __forceinline__ void load_tiles(const CUtensorMap *hidden, const CUtensorMap *weight,
                                           const struct chunk &chunk, const struct tile_shared &shared)
{
    uint32_t step = 0;
    for (int32_t tile = (int32_t)blockIdx.x; tile < chunk.m_tiles * chunk.n_tiles;
         tile += (int32_t)gridDim.x) {
        int32_t m_tile = tile % chunk.m_tiles, n_tile = tile / chunk.m_tiles;
        for (int32_t piece = 0; piece < chunk.pieces; piece++, step++) {
            uint32_t stage = step % STAGES;
            char *at = shared.stages + stage * STAGE_BYTES;
            barrier_wait(&shared.empty[stage], (step / STAGES & 1) ^ 1);
            barrier_expect(&shared.full[stage], STAGE_BYTES);
            tile_load(at, hidden, piece * PIECE, m_tile * TILE_ROWS, &shared.full[stage]);
            tile_load(at + PIECE_BYTES_A, weight, piece * PIECE, n_tile * TILE_IDS, &shared.full[stage]);
        }
    }
}

template <typename T, bool STORE>
__device__ __forceinline__ void multiply_tiles(const struct chunk &chunk, const struct tile_shared &shared,
                                               int group)
{
    int lane = (int)threadIdx.x % WARP, q = lane % 4, warp = (int)threadIdx.x % GROUP / WARP;
    uint32_t step = 0;
    float logits[128];
    bool first = true;
    if (group == 1 && (int32_t)blockIdx.x < chunk.m_tiles * chunk.n_tiles)
        numbered_wait(1, 2 * GROUP);
    for (int32_t tile = (int32_t)blockIdx.x; tile < chunk.m_tiles * chunk.n_tiles;
         tile += (int32_t)gridDim.x) {
        int32_t m_tile = tile % chunk.m_tiles, n_tile = tile / chunk.m_tiles;
        struct tile_row own[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int64_t row = (int64_t)m_tile * TILE_ROWS + group * 64 + warp * 16 + lane / 4 + 8 * h;
            bool inside = row < chunk.rows;
            own[h] = {row, inside, inside ? chunk.shifts[row] : 0.0f,
                      inside ? chunk.targets[row] - n_tile * TILE_IDS : -1, -INFINITY};
        }
        for (int32_t piece = 0; piece < chunk.pieces; piece++, step++) {
            uint32_t stage = step % STAGES;
            const char *a = shared.stages + stage * STAGE_BYTES + group * 64 * 128;
            const char *b = shared.stages + stage * STAGE_BYTES + PIECE_BYTES_A;
            barrier_wait(&shared.full[stage], step / STAGES & 1);
            product_begin();
#pragma unroll
            for (int k = 0; k < PIECE / 16; k++)
                product_64x256<T>(logits, tile_descriptor(a + 32 * k), tile_descriptor(b + 32 * k),
                                  piece + k > 0);
            product_commit();
            if (first && group == 0 && piece == (chunk.pieces > 2 ? 2 : 0)) {
                numbered_arrive(1, 2 * GROUP);
                first = false;
            }
            product_wait<1>();
            if (piece > 0 && lane == 0)
                barrier_arrive(&shared.empty[(step - 1) % STAGES]);
        }
        product_wait<0>();
        product_take(logits);
        if (lane == 0)
            barrier_arrive(&shared.empty[(step - 1) % STAGES]);
        int limit = (int)(chunk.vocab - (int64_t)n_tile * TILE_IDS < TILE_IDS
                              ? chunk.vocab - (int64_t)n_tile * TILE_IDS
                              : TILE_IDS);
        mask(logits, own, limit, q);
        finish_row<T, STORE, 0>(chunk, logits, own[0], n_tile, limit, q);
        finish_row<T, STORE, 1>(chunk, logits, own[1], n_tile, limit, q);
    }
}

#endif

template <typename T, bool STORE>
__global__ void __launch_bounds__(TILE_THREADS, 1)
    tile_kernel(const __grid_constant__ CUtensorMap hidden, const __grid_constant__ CUtensorMap weight,
                const __grid_constant__ struct chunk chunk)
{
#if CUDA_HOPPER
    extern __shared__ char dynamic[];
    __shared__ uint64_t full[STAGES], empty[STAGES];
    struct tile_shared shared = {(char *)(((uintptr_t)dynamic + 1023) / 1024 * 1024), full, empty};
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], 2 * GROUP / WARP);
        }
        barrier_inits_done();
    }
    __syncthreads();
    if (threadIdx.x < GROUP) {
        registers_fewer<40>();
        if (threadIdx.x == 0)
            load_tiles(&hidden, &weight, chunk, shared);
    } else {
        registers_more<232>();
        multiply_tiles<T, STORE>(chunk, shared, (int)threadIdx.x / GROUP - 1);
    }
#endif
}

/* ---- around it ---- */

/* c of each row. */
template <typename T>
__global__ void __launch_bounds__(THREADS)
    shift_kernel(const T *__restrict__ hidden, const T *__restrict__ weight, struct chunk chunk, int64_t d)
{
    constexpr int N = pack<T>::COUNT;
    int64_t row = (int64_t)blockIdx.x * ROWS_A_BLOCK + threadIdx.x / WARP;
    if (row >= chunk.rows)
        return;
    int32_t target = chunk.targets[row];
    float sum = 0.0f;
    if (target >= 0 && target < chunk.vocab) {
        for (int64_t i = (int64_t)(threadIdx.x % WARP) * N; i < d; i += WARP * N) {
            float a[N], b[N];
            load_pack(hidden + row * d + i, a);
            load_pack(weight + target * d + i, b);
#pragma unroll
            for (int j = 0; j < N; j++)
                sum = fmaf(a[j], b[j], sum);
        }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0)
        chunk.shifts[row] = sum * LOG2_E;
}

/* What the tiles of each row come to. first: the caller's row. */
template <typename T, bool STORE>
__global__ void __launch_bounds__(THREADS)
    result_kernel(struct chunk chunk, struct head_args h, struct head_scores scores, int64_t first)
{
    int64_t row = (int64_t)blockIdx.x * ROWS_A_BLOCK + threadIdx.x / WARP;
    if (row >= chunk.rows)
        return;
    struct tile_result *results = chunk.results + row * chunk.n_tiles;
    float sum = 0.0f, highest = -INFINITY, most = -INFINITY;
    int32_t id = -1, lane = (int32_t)threadIdx.x % WARP;
    if constexpr (by_tile<T>) {
        for (int32_t tile = lane; tile < chunk.n_tiles; tile += WARP)
            if (results[tile].sum != 0.0f)
                most = fmaxf(most, results[tile].shift);
        most = warp_max(most);
    }
    for (int32_t tile = lane; tile < chunk.n_tiles; tile += WARP) {
        struct tile_result result = results[tile];
        if (!by_tile<T>)
            sum += result.sum;
        else if (result.sum != 0.0f)
            sum = fmaf(result.sum, exp2f(result.shift - most), sum);
        if (result.id >= 0 && (id < 0 || result.highest > highest)) {
            highest = result.highest;
            id = result.id;
        }
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, highest, step);
        int32_t other_id = __shfl_xor_sync(0xffffffffu, id, step);
        if (other_id >= 0 && (id < 0 || other > highest || (other == highest && other_id < id))) {
            highest = other;
            id = other_id;
        }
    }
    int32_t target = chunk.targets[row];
    bool scored = target >= 0 && target < chunk.vocab;
    if constexpr (STORE && by_tile<T>) {
        float unit = scored && sum > 0.0f ? F16_UNIT / sum : 0.0f;
        for (int32_t tile = lane; tile < chunk.n_tiles; tile += WARP)
            results[tile].sum = results[tile].sum != 0.0f ? unit * exp2f(results[tile].shift - most) : 0.0f;
    }
    if (lane != 0)
        return;
    float shift = chunk.shifts[row], others, above; /* S, and about its logarithm to the base of 2 */
    if constexpr (by_tile<T>) {
        others = sum * exp2f(most - shift);
        above = most + log2f(sum) - shift;
    } else {
        others = isnan(shift) ? NAN : sum;
        above = highest * LOG2_E - shift;
    }
    float loss = above > EXPONENT_MOST && !isnan(others) ? above / LOG2_E : log1pf(others);
    float logprob = scored ? -loss : target < 0 ? 0.0f : NAN;
    if (h.argmax != NULL)
        h.argmax[first + row] = id < 0 ? 0 : id;
    if (h.logprobs != NULL)
        h.logprobs[first + row] = logprob;
    scores.logprobs[first + row] = logprob;
    scores.right[first + row] = id == target;
    chunk.factors[row] = !scored ? 0.0f : by_tile<T> ? 1.0f / (1.0f + 1.0f / others) : 1.0f / (1.0f + others);
    if constexpr (STORE && !by_tile<T>)
        if (scored)
            ((T *)chunk.e)[row * chunk.e_stride + target] = from_float<T>(-others);
}

/* Makes e of each tile what result_kernel found that it must be. A block a row. */
template <typename T> __global__ void __launch_bounds__(THREADS) rescale_kernel(struct chunk chunk)
{
    constexpr int N = pack<T>::COUNT;
    int64_t row = blockIdx.x;
    int32_t target = chunk.targets[row];
    T *e = (T *)chunk.e + row * chunk.e_stride;
    for (int64_t j = (int64_t)threadIdx.x * N; j < chunk.vocab; j += THREADS * N) {
        float v[N], scale = chunk.results[row * chunk.n_tiles + j / TILE_IDS].sum;
        load_pack(e + j, v);
#pragma unroll
        for (int i = 0; i < N; i++)
            v[i] = j + i == target ? -F16_UNIT : v[i] * scale;
        store_pack(e + j, v);
    }
}

/* to = from times the row's factor and scale. */
template <typename From, typename To>
__global__ void __launch_bounds__(THREADS)
    scale_kernel(const From *__restrict__ from, To *__restrict__ to, const float *__restrict__ factors,
                 int64_t rows, int64_t d, float scale)
{
    constexpr int N = pack<To>::COUNT;
    int64_t row = (int64_t)blockIdx.x * ROWS_A_BLOCK + threadIdx.x / WARP;
    if (row >= rows)
        return;
    float factor = factors[row];
    for (int64_t i = (int64_t)(threadIdx.x % WARP) * N; i < d; i += WARP * N) {
        float v[N];
        load_pack(from + row * d + i, v);
#pragma unroll
        for (int j = 0; j < N; j++)
            v[j] = factor == 0.0f ? 0.0f : v[j] * factor * scale;
        store_pack(to + row * d + i, v);
    }
}

/* ---- chunks ---- */

int64_t round_up(int64_t bytes)
{
    return divide_up(bytes, 256) * 256;
}

/* Rows of e begin where lines of the cache do. */
int64_t padded(int64_t vocab)
{
    return divide_up(vocab, PIECE) * PIECE;
}

/* As many rows as keep every multiprocessor at one tile of the second product. */
int64_t chunk_rows(int64_t rows, int64_t d_model)
{
    int64_t m_tiles = TILES_OF_A_WAVE / divide_up(d_model > 0 ? d_model : 1, TILE_IDS);
    int64_t chunk = (m_tiles > 4 ? m_tiles : 4) * TILE_ROWS;
    return rows < chunk ? rows : chunk;
}

/* Hands out the workspace; without a chunk it only counts. */
int64_t carve(struct chunk *chunk, void *workspace, int64_t rows, int64_t d, int64_t vocab, bool backward)
{
    char *base = (char *)workspace;
    int64_t n_tiles = divide_up(vocab, TILE_IDS);
    int64_t shifts = 0, factors = shifts + round_up(rows * 4), results = factors + round_up(rows * 4);
    int64_t e = results + round_up(rows * n_tiles * (int64_t)sizeof(struct tile_result));
    int64_t sums = e + (backward ? round_up(rows * padded(vocab) * 2) : 0);
    if (chunk != NULL) {
        chunk->shifts = (float *)(base + shifts);
        chunk->factors = (float *)(base + factors);
        chunk->results = (struct tile_result *)(base + results);
        chunk->e = base + e;
        chunk->sums = (float *)(base + sums);
    }
    return sums + (backward ? round_up(rows * d * 4) : 0);
}

template <typename T, bool STORE>
int first_product(struct kernel_device *device, const struct head_args *h, const T *hidden,
                  const struct chunk &chunk, int64_t first)
{
    CUtensorMap hidden_map, weight_map;
    int status = cuda_tile_map(&hidden_map, hidden, chunk.rows, h->d_model, h->d_model, TILE_ROWS, h->act);
    if (status == KERNEL_OK)
        status = cuda_tile_map(&weight_map, h->weight, chunk.vocab, h->d_model, h->d_model, TILE_IDS, h->act);
    if (status == KERNEL_OK)
        status = cuda_check(device,
                            cudaFuncSetAttribute(tile_kernel<T, STORE>,
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES));
    if (status != KERNEL_OK)
        return status;
    unsigned by_row = (unsigned)divide_up(chunk.rows, ROWS_A_BLOCK);
    int64_t tiles = (int64_t)chunk.m_tiles * chunk.n_tiles;
    unsigned blocks = (unsigned)(tiles < device->multiprocessors ? tiles : device->multiprocessors);
    shift_kernel<<<by_row, THREADS, 0, device->stream>>>(hidden, (const T *)h->weight, chunk, h->d_model);
    tile_kernel<T, STORE>
        <<<blocks, TILE_THREADS, SHARED_BYTES, device->stream>>>(hidden_map, weight_map, chunk);
    result_kernel<T, STORE><<<by_row, THREADS, 0, device->stream>>>(chunk, *h, head_scores_of(h), first);
    if constexpr (STORE && by_tile<T>)
        rescale_kernel<T><<<(unsigned)chunk.rows, THREADS, 0, device->stream>>>(chunk);
    return cuda_launched(device);
}

template <typename T>
int chunk_run(struct kernel_device *device, const struct head_args *h, int64_t first, int64_t rows)
{
    struct chunk chunk = {};
    int64_t d = h->d_model;
    const T *hidden = (const T *)h->hidden + first * d;
    bool backward = h->d_hidden != NULL || h->d_weight != NULL;
    carve(&chunk, (char *)h->workspace + head_scores_bytes(h->rows), chunk_rows(h->rows, d), d, h->vocab,
          backward);
    chunk.rows = rows;
    chunk.vocab = h->vocab;
    chunk.e_stride = padded(h->vocab);
    chunk.targets = h->targets + first;
    chunk.m_tiles = (int32_t)divide_up(rows, TILE_ROWS);
    chunk.n_tiles = (int32_t)divide_up(h->vocab, TILE_IDS);
    chunk.pieces = (int32_t)(d / PIECE);
    int status = backward ? first_product<T, true>(device, h, hidden, chunk, first)
                          : first_product<T, false>(device, h, hidden, chunk, first);
    unsigned by_row = (unsigned)divide_up(rows, ROWS_A_BLOCK);
    float scale = by_tile<T> ? h->grad_scale / F16_UNIT : h->grad_scale;
    struct head_matrix e = {chunk.e, chunk.e_stride, false, h->act};
    if (h->d_hidden != NULL && status == KERNEL_OK) {
        status = head_product(device, rows, d, h->vocab, e, {h->weight, d, false, h->act}, false, 1.0f,
                              chunk.sums, TYPE_F32, 0.0f);
        scale_kernel<<<by_row, THREADS, 0, device->stream>>>(chunk.sums, (T *)h->d_hidden + first * d,
                                                             chunk.factors, rows, d, scale);
    }
    if (h->d_weight != NULL && status == KERNEL_OK) {
        T *scaled = (T *)chunk.sums;
        scale_kernel<<<by_row, THREADS, 0, device->stream>>>(hidden, scaled, chunk.factors, rows, d, 1.0f);
        e.transposed = true;
        status = head_product(device, h->vocab, d, rows, e, {scaled, d, false, h->act}, false, scale,
                              h->d_weight, TYPE_F32, 1.0f);
    }
    return status == KERNEL_OK ? cuda_launched(device) : status;
}

} // namespace

bool head_fused_can(const struct kernel_device *device, const struct head_args *h)
{
    return device->hopper && (h->act == TYPE_BF16 || h->act == TYPE_F16) && h->weight_type == h->act &&
           h->top_ids == NULL && h->d_model % PIECE == 0 && h->vocab % pack<__nv_bfloat16>::COUNT == 0 &&
           (uintptr_t)h->hidden % 16 == 0 && (uintptr_t)h->weight % 16 == 0 &&
           (uintptr_t)h->d_hidden % 16 == 0 && (uintptr_t)h->workspace % 16 == 0;
}

int64_t head_fused_workspace(int64_t rows, int64_t d_model, int64_t vocab, bool backward)
{
    return carve(NULL, NULL, chunk_rows(rows, d_model), d_model, vocab, backward);
}

int head_fused(struct kernel_device *device, const struct head_args *h)
{
    int64_t chunk = chunk_rows(h->rows, h->d_model);
    int status = KERNEL_OK;
    for (int64_t first = 0; first < h->rows && status == KERNEL_OK; first += chunk) {
        int64_t rows = h->rows - first < chunk ? h->rows - first : chunk;
        status = h->act == TYPE_F16 ? chunk_run<__half>(device, h, first, rows)
                                    : chunk_run<__nv_bfloat16>(device, h, first, rows);
    }
    return status;
}
