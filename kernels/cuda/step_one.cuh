/* step_one.cuh: inside of step_one.cu: what every block has of a step, and the warps that multiply nothing: they bring
 * weights and small parameters, and add up what the blocks make parts of. */
#ifndef KERNELS_CUDA_STEP_ONE_CUH
#define KERNELS_CUDA_STEP_ONE_CUH

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/step.cuh"
#include "kernels/cuda/vector.cuh"

#include <stddef.h>

enum {
    MATH_WARPS = 8, /* a share of k each */
    MATH_THREADS = MATH_WARPS * WARP,
    COPY_WARP = MATH_WARPS,
    TOUCH_WARP,
    SUM_WARP,
    SEND_WARP,
    THREADS = (MATH_WARPS + 4) * WARP, /* whole warpgroups, which share registers unevenly */
    MATH_REGISTERS = 208,
    OTHER_REGISTERS = 88,
    TILE = 8, /* outputs; of in_proj x and z of CHANNELS channels */
    CHANNELS = 4,
    LANES = 4, /* that share a channel of the scan */
    LANE_STATES = STEP_STATE / LANES,
    LANE_RANKS = TILE / LANES,
    GROUP = 4,      /* stages that a warp multiplies at once */
    HEAD_TILES = 8, /* of the head between two looks at the sums */
    SUMS = 24,      /* most tiles of a product */
    RANKS = STEP_ONE_TILES * TILE,
    U_WORDS = STEP_ONE_BLOCKS * TILE / 2, /* of mail for 8 ranks of x A^T: two of a block in each */
    SLOTS_MOST = 32,
    SPREAD = 64,        /* bytes that rows in shared memory are longer than a multiple of 128 */
    PATIENCE = 1 << 22, /* polls: seconds, only where a block is missing, which the launch excludes */
};

/* ---- what is where ---- */

/* A row of d weights is STAGES stages of 8 warps' KB blocks of 32. */
template <int KB, int STAGES> struct shape {
    enum {
        D = 256 * KB * STAGES,
        INNER = 2 * D,
        BYTES = 512 * KB,        /* of a row in a stage */
        STRIDE = BYTES + SPREAD, /* between rows */
        SLOT = TILE * STRIDE,
    };
};

/* The parts of the mail; returns how many words it is. */
static int64_t lay_out_mail(struct step_one *p, int d, int inner)
{
    uint64_t *at = p->mail;
    p->h = at;
    p->squares = p->h + d / 2;
    p->xc = p->squares + STEP_ONE_BLOCKS;
    p->x_dbl = p->xc + inner / 2;
    p->y = p->x_dbl + p->rank + 2 * STEP_STATE + RANKS;
    p->u_in = p->y + inner / 2;
    p->u_out = p->u_in + STEP_ONE_TILES * U_WORDS;
    return p->u_out + STEP_ONE_TILES * U_WORDS - at;
}

/* What a block of n has of `count`: one more for the first, or for the last of them. */
struct share {
    int begin, count;
};
static __host__ __device__ inline struct share share_first(int count, int block, int n)
{
    int least = count / n, more = count % n;
    return {block * least + min(block, more), least + (block < more)};
}
static __host__ __device__ inline struct share share_last(int count, int block, int n)
{
    int least = count / n, more = count % n, plain = n - more;
    return {block * least + max(0, block - plain), least + (block >= plain)};
}

static __host__ __device__ inline int x_tiles_of(const struct step_one &p)
{
    return (p.rank + 2 * STEP_STATE) / TILE;
}

/* What of an adapter is in shared memory at once, RANKS floats each. */
enum { USE_IN, USE_OUT, USES };

/* Returns the bytes of shared memory. */
static int lay_out_room(struct step_one *p, int inner, int in_tiles, int ring_bytes)
{
    const int f = (int)sizeof(float);
    struct step_one_room *r = &p->room;
    r->x = ring_bytes;
    r->sums = r->x + 2 * inner;
    r->x_dbl = r->sums + MATH_WARPS * SUMS * TILE * f;
    r->own_x = r->x_dbl + (p->rank + 2 * STEP_STATE + RANKS) * f;
    r->own_z = r->own_x + in_tiles * CHANNELS * f;
    r->own_y = r->own_z + in_tiles * CHANNELS * f;
    r->own_h = r->own_y + in_tiles * CHANNELS * f;
    r->u = r->own_h + WARP * f;
    return r->u + (p->lora_rank > 0 ? USES * RANKS * f : 0);
}

/* What a kernel is compiled for: its code has to fit the cache of instructions. */
enum adapted { PLAIN, RANK_8, ANY_RANK };

#if CUDA_HOPPER

/* ---- shared memory ---- */

static __shared__ uint64_t ring_full[SLOTS_MOST], ring_empty[SLOTS_MOST];
static __shared__ float row_scale;  /* 1/rms */
static __shared__ int layers_begun; /* by the math warps: what the touching warp follows */

static __device__ __forceinline__ unsigned char *shared_at(int at)
{
    extern __shared__ __align__(128) unsigned char shared[];
    return shared + at;
}
static __device__ __forceinline__ float *floats_at(int at)
{
    return reinterpret_cast<float *>(shared_at(at));
}

/* The ring's barriers by their addresses, which compilers otherwise work out again at each. */
static __device__ __forceinline__ void barrier_wait_at(uint32_t barrier, unsigned parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra through;\n"
                 "bra again;\n"
                 "through:\n"
                 "}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}
static __device__ __forceinline__ void barrier_arrive_at(uint32_t barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* The block's numbered barriers: of the math warps; of those with the summing warp, for its sums before in_proj's results
 * and before out_proj's; and of that with those who have y and h. */
enum { BARRIER_MATH = 1, BARRIER_IN, BARRIER_OUT, BARRIER_Y, BARRIER_H };

static __device__ __forceinline__ void math_sync()
{
    numbered_wait(BARRIER_MATH, MATH_THREADS);
}

/* ---- mail ---- */

static __device__ __forceinline__ void mail_send(uint64_t *to, uint32_t value, uint32_t tag)
{
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"((uint64_t)tag << 32 | value)
                 : "memory");
}

/* `words` of them, two at a time, to shared memory. */
template <int AT_ONCE>
static __device__ __forceinline__ void mail_gather(const uint64_t *from, int words, unsigned char *to,
                                                   uint32_t tag)
{
    const int pairs = words / 2;
    ulonglong2 v[AT_ONCE];
    bool there = false;
    for (int polls = 0; !there; polls++) {
        there = true;
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            const int i = (int)threadIdx.x + u * MATH_THREADS;
            v[u].x = v[u].y = (uint64_t)tag << 32;
            if (i < pairs)
                asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                             : "=l"(v[u].x), "=l"(v[u].y)
                             : "l"(from + 2 * i)
                             : "memory");
        }
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++)
            there = there && (uint32_t)(v[u].x >> 32) == tag && (uint32_t)(v[u].y >> 32) == tag;
        if (polls > PATIENCE)
            __trap();
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
        const int i = (int)threadIdx.x + u * MATH_THREADS;
        if (i < pairs)
            *reinterpret_cast<uint2 *>(to + 8 * i) = make_uint2((uint32_t)v[u].x, (uint32_t)v[u].y);
    }
}

/* The sum of `count` parts, by one warp. */
static __device__ __forceinline__ float mail_sum(const uint64_t *from, int count, uint32_t tag)
{
    enum { AT_ONCE = STEP_ONE_BLOCKS / WARP };
    uint64_t v[AT_ONCE];
    bool there = false;
    for (int polls = 0; !there; polls++) {
        there = true;
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            const int i = (int)threadIdx.x % WARP + u * WARP;
            v[u] = (uint64_t)tag << 32;
            if (i < count)
                asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v[u]) : "l"(from + i) : "memory");
        }
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++)
            there = there && (uint32_t)(v[u] >> 32) == tag;
        if (polls > PATIENCE)
            __trap();
    }
    float sum = 0.0f;
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++)
        sum += __uint_as_float((uint32_t)v[u]);
    return warp_sum(sum);
}

static __device__ __forceinline__ ulonglong2 mail_read_two(const uint64_t *from)
{
    ulonglong2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(v.x), "=l"(v.y)
                 : "l"(from)
                 : "memory");
    return v;
}
static __device__ __forceinline__ bool mail_is_there(const ulonglong2 &v, uint32_t tag)
{
    return (uint32_t)(v.x >> 32) == tag && (uint32_t)(v.y >> 32) == tag;
}

static __device__ __forceinline__ uint32_t round_pair(float low, float high)
{
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&pair);
}

static __device__ __forceinline__ float low_half(uint64_t word)
{
    return __uint_as_float((uint32_t)word << 16);
}
static __device__ __forceinline__ float high_half(uint64_t word)
{
    return __uint_as_float((uint32_t)word & 0xffff0000u);
}

/* The sums over `count` blocks of 8 ranks' parts, times `scale`, to shared memory, by one warp: two lanes a block. */
static __device__ __forceinline__ void mail_sum_ranks(const uint64_t *from, int count, uint32_t tag,
                                                      float scale, float *to)
{
    enum { AT_ONCE = STEP_ONE_BLOCKS / (WARP / 2) };
    const int lane = threadIdx.x % WARP;
    ulonglong2 v[AT_ONCE];
    int polls = 0;
    for (bool there = false; !there; polls++) {
        there = true;
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            const int i = lane + u * WARP;
            v[u].x = v[u].y = (uint64_t)tag << 32;
            if (i < 2 * count)
                v[u] = mail_read_two(from + 2 * i);
        }
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++)
            there = there && mail_is_there(v[u], tag);
        if (polls > PATIENCE)
            __trap();
    }
    float sum[4] = {};
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
        sum[0] += low_half(v[u].x);
        sum[1] += high_half(v[u].x);
        sum[2] += low_half(v[u].y);
        sum[3] += high_half(v[u].y);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int step = 2; step < WARP; step *= 2)
            sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], step);
    }
    if (lane < 2)
        *reinterpret_cast<float4 *>(to + 4 * lane) =
            make_float4(scale * sum[0], scale * sum[1], scale * sum[2], scale * sum[3]);
}

/* ---- the block ---- */

struct block {
    struct share in, out; /* tiles of in_proj and out_proj */
    int x;                /* tile of x_proj, behind which come those of its adapter's A; or -1 */
    __device__ __forceinline__ int scan_warps() const
    {
        return (in.count * CHANNELS * LANES + WARP - 1) / WARP;
    }
    /* The block's number among those that have outputs of out_proj: the last ones, if not all. */
    template <int OUTPUTS> __device__ __forceinline__ int sender() const
    {
        return (int)blockIdx.x - max((int)gridDim.x - OUTPUTS / TILE, 0);
    }
};

template <int KB, int STAGES>
static __device__ __forceinline__ struct block block_of(const struct step_one &p)
{
    using S = shape<KB, STAGES>;
    const int b = (int)blockIdx.x, n = (int)gridDim.x, x_tiles = x_tiles_of(p) + p.u_tiles[STEP_X];
    const int x =
        STAGES > 1 ? b : b - (n - x_tiles); /* where rows are short, blocks with fewer of in_proj's */
    return {share_first(S::INNER / CHANNELS, b, n), share_last(S::D / TILE, b, n), x < x_tiles ? x : -1};
}

/* Where the ring goes on. */
struct ring_at {
    int offset;        /* of the slot */
    uint32_t barriers; /* of the slot, from the first's */
    unsigned parity;
    template <int SLOT> __device__ __forceinline__ void next(int slots)
    {
        offset += SLOT;
        barriers += 8;
        if (barriers == 8 * (uint32_t)slots) {
            offset = 0;
            barriers = 0;
            parity ^= 1;
        }
    }
};

/* ---- weights ---- */

static __device__ __forceinline__ void copy_row(void *to, const void *from, unsigned bytes, uint32_t barrier,
                                                uint64_t policy)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
}

template <int KB, int STAGES> struct copier {
    using S = shape<KB, STAGES>;
    const struct step_one &p;
    uint32_t full, empty;
    struct ring_at at;
    uint64_t once, keep; /* policies of the second-level cache */

    /* A tile whose row of this lane begins at `row`, `stages` of it, `rows` rows. */
    __device__ __forceinline__ void tile(const void *row, int rows, int stages, uint64_t policy)
    {
        const int lane = threadIdx.x % WARP;
        const unsigned char *from = static_cast<const unsigned char *>(row);
#pragma unroll 1
        for (int s = 0; s < stages; s++, from += S::BYTES) {
            barrier_wait_at(empty + at.barriers, at.parity ^ 1);
            if (lane == 0)
                asm volatile(
                    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + at.barriers),
                    "r"(rows * S::BYTES)
                    : "memory");
            __syncwarp();
            if (lane < rows)
                copy_row(shared_at(at.offset + lane * S::STRIDE), from, S::BYTES, full + at.barriers, policy);
            at.next<S::SLOT>(p.ring);
        }
    }

    /* A tile of x_proj: of the weights, or of its adapter's A. */
    __device__ __forceinline__ void x_tile(int layer, int t)
    {
        const int lane = threadIdx.x % WARP, tiles = x_tiles_of(p), first = (t - tiles) * TILE;
        if (t < tiles) {
            const step_type *w = static_cast<const step_type *>(p.layer[layer].x_proj);
            tile(w + (int64_t)(t * TILE + lane) * S::INNER, TILE, 2 * STAGES, once);
        } else {
            const float *a = p.lora[layer * STEP_ADAPTERS].a[STEP_X];
            tile(a + (int64_t)(first + lane) * S::INNER, min((int)TILE, p.lora_rank - first), 4 * STAGES,
                 keep);
        }
    }

    __device__ __forceinline__ void run()
    {
        const struct block own = block_of<KB, STAGES>(p);
        const int lane = threadIdx.x % WARP;
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
        asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(keep));
        auto row_of = [&](const void *weight, int row, int k) {
            return static_cast<const step_type *>(weight) + (int64_t)(row + lane) * k;
        };
#pragma unroll 1
        for (int layer = 0; layer < p.layers; layer++) {
            const struct mamba_step_layer &l = p.layer[layer];
#pragma unroll 1
            for (int t = 0; t < own.in.count; t++)
                tile(row_of(l.in_proj,
                            (own.in.begin + t) * CHANNELS + (lane < CHANNELS ? 0 : S::INNER - CHANNELS),
                            S::D),
                     TILE, STAGES, once);
            if (own.x >= 0)
                x_tile(layer, own.x);
#pragma unroll 1
            for (int t = 0; t < own.out.count; t++)
                tile(row_of(l.out_proj, (own.out.begin + t) * TILE, S::INNER), TILE, 2 * STAGES, once);
        }
        const struct share head = share_first((p.vocab + TILE - 1) / TILE, (int)blockIdx.x, (int)gridDim.x);
#pragma unroll 1
        for (int t = head.begin; t < head.begin + head.count; t++)
            tile(row_of(p.head, t * TILE, S::D), min((int)TILE, p.vocab - t * TILE), STAGES, once);
    }
};

/* ---- small parameters ahead of their use ---- */

/* An array that the block needs a part of, in every layer: where its address is, and what of it. */
struct small {
    const char *address; /* of the first layer's; NULL: of the states, which lie at p.states */
    int step;            /* from layer to layer */
    int64_t first;       /* byte */
    int rows, bytes, stride;
};

template <int KB, int STAGES> struct toucher {
    using S = shape<KB, STAGES>;
    const struct step_one &p;
    const struct block own;
    const int lane;

    __device__ __forceinline__ struct small of_layer(size_t member, int64_t first, int64_t count, int size,
                                                     int rows = 1) const
    {
        return {reinterpret_cast<const char *>(p.layer) + member,
                (int)sizeof(struct mamba_step_layer),
                first * size,
                rows,
                (int)count * size,
                S::INNER * (int)sizeof(float)};
    }
    __device__ __forceinline__ struct small of_lora(size_t member, int target, int64_t first,
                                                    int64_t count) const
    {
        const int f = (int)sizeof(float);
        return {reinterpret_cast<const char *>(p.lora) + member + target * sizeof(float *),
                STEP_ADAPTERS * (int)sizeof(struct step_lora),
                first * f,
                p.lora_rank > 0 ? 1 : 0,
                (int)count * f,
                0};
    }

    /* A lane's. */
    __device__ __forceinline__ struct small item() const
    {
        const int64_t c0 = own.in.begin * CHANNELS, channels = own.in.count * CHANNELS;
        const int64_t o0 = own.out.begin * TILE, outputs = own.out.count * TILE, r = p.lora_rank;
        const int f = (int)sizeof(float), row = S::INNER * f;
        const size_t a = offsetof(struct step_lora, a), b = offsetof(struct step_lora, b);
        switch (lane) {
        case 0:
            return {NULL,
                    (STEP_CONV - 1 + STEP_STATE) * row,
                    c0 * f,
                    STEP_CONV - 1 + STEP_STATE,
                    (int)channels * f,
                    row};
        case 1:
            return of_layer(offsetof(struct mamba_step_layer, conv), c0, channels, STEP_CONV * f);
        case 2:
            return of_layer(offsetof(struct mamba_step_layer, conv_bias), c0, channels, f);
        case 3:
            return of_layer(offsetof(struct mamba_step_layer, in_bias), c0, channels, f);
        case 4:
            return of_layer(offsetof(struct mamba_step_layer, in_bias), S::INNER + c0, channels, f);
        case 5:
            return of_layer(offsetof(struct mamba_step_layer, a), c0, channels, f, STEP_STATE);
        case 6:
            return of_layer(offsetof(struct mamba_step_layer, dt_proj), c0, channels,
                            p.rank * (int)sizeof(step_type));
        case 7:
            return of_layer(offsetof(struct mamba_step_layer, dt_bias), c0, channels, f);
        case 8:
            return of_layer(offsetof(struct mamba_step_layer, d), c0, channels, f);
        case 9:
            return of_layer(offsetof(struct mamba_step_layer, norm), o0, outputs, f);
        case 10:
            return of_layer(offsetof(struct mamba_step_layer, out_bias), o0, outputs, f);
        case 11:
            return of_lora(b, STEP_IN, c0 * r, channels * r);
        case 12:
            return of_lora(b, STEP_IN, (S::INNER + c0) * r, channels * r);
        case 13:
            return of_lora(b, STEP_X, 0, (p.rank + 2 * STEP_STATE) * r);
        case 14:
            return of_lora(a, STEP_DT, 0, r * p.rank);
        case 15:
            return of_lora(b, STEP_DT, c0 * r, channels * r);
        case 16:
            return of_lora(b, STEP_OUT, o0 * r, outputs * r);
        default:
            return {};
        }
    }

    __device__ __forceinline__ void run() const
    {
        enum { ITEMS = 17, SECTOR = 32 };
        __shared__ uint32_t nowhere[WARP];
        const struct small mine = item();
#pragma unroll 1
        for (int layer = 0; layer < p.layers; layer++) {
            while (*(volatile int *)&layers_begun < layer)
                __nanosleep(64);
            const int64_t step = (int64_t)layer * mine.step;
            const char *array =
                mine.address == NULL
                    ? reinterpret_cast<const char *>(p.states) + step
                    : (mine.rows > 0 ? *reinterpret_cast<const char *const *>(mine.address + step) : NULL);
            const char *begin = array != NULL ? array + mine.first : NULL;
#pragma unroll 1
            for (int i = 0; i < ITEMS; i++) {
                const char *from = reinterpret_cast<const char *>(
                    __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(begin), i));
                const int rows = from != NULL ? __shfl_sync(0xffffffffu, mine.rows, i) : 0,
                          bytes = __shfl_sync(0xffffffffu, mine.bytes, i),
                          stride = __shfl_sync(0xffffffffu, mine.stride, i), sectors = bytes / SECTOR + 2;
                /* Copies to nowhere: unlike loads they leave no register to wait for. */
#pragma unroll 1
                for (int row = 0, at = lane; row < rows; at += WARP) {
                    for (; at >= sectors; at -= sectors)
                        row++;
                    const char *first = from + (int64_t)row * stride;
                    const char *sector = first - (uintptr_t)first % SECTOR + at * SECTOR;
                    if (row < rows && sector < first + bytes)
                        asm volatile(
                            "cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(&nowhere[lane])),
                            "l"(sector)
                            : "memory");
                }
            }
        }
    }
};

/* ---- the summing warps ---- */

/* What A, whose rows of `stride` begin with the block's columns, makes of the block's 4 `quads` values of x: a lane every 4th
 * value for one of 8 ranks. */
static __device__ __forceinline__ void send_ranks(const float *a, int stride, int quads, int ranks,
                                                  const float *x, int barrier, int threads, uint64_t *to,
                                                  uint32_t tag)
{
    enum { MOST = MATH_THREADS / (CHANNELS * LANES) };
    const int lane = threadIdx.x % WARP, rank = lane / 4;
    float factor[MOST];
    auto load = [&](int first) {
#pragma unroll
        for (int i = 0; i < MOST; i++)
            factor[i] = i < quads && first + rank < ranks
                            ? a[(int64_t)(first + rank) * stride + 4 * i + lane % 4]
                            : 0.0f;
    };
    load(0);
    numbered_wait(barrier, threads);
#pragma unroll 1
    for (int first = 0;; to += U_WORDS) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < MOST; i++)
            if (i < quads)
                sum = fmaf(factor[i], x[4 * i + lane % 4], sum);
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const uint32_t pair = round_pair(sum, __shfl_down_sync(0xffffffffu, sum, 4));
        if (lane % 8 == 0)
            mail_send(to + lane / 8, pair, tag);
        first += TILE;
        if (first >= ranks)
            break;
        load(first);
    }
}

/* What the blocks make parts of: 1/rms, and the adapter's x A^T. */
template <int KB, int STAGES, bool ADAPTED> struct summer {
    using S = shape<KB, STAGES>;
    const struct step_one &p;
    const struct block own;
    const int lane;

    /* x A^T, two turns a layer: before the results of in_proj and of out_proj. */
    __device__ __forceinline__ void run() const
    {
        const int senders = min((int)gridDim.x, S::D / TILE);
#pragma unroll 1
        for (int turn = 0; turn < 2 * p.layers; turn++) {
            const int layer = turn / 2;
            const bool out = turn % 2 != 0;
            const uint32_t tag = p.tag + (uint32_t)layer;
            if (p.u_tiles[out ? STEP_OUT : STEP_IN] == 0 || (out && own.out.count == 0))
                continue;
            if (out) /* nothing is there before the block itself has come so far */
                numbered_wait(BARRIER_Y, (own.scan_warps() + 2) * WARP);
            if (turn > 0) /* the first one's every block has made */
#pragma unroll 1
                for (int t = 0; t * TILE < p.lora_rank; t++)
                    mail_sum_ranks((out ? p.u_out : p.u_in) + t * U_WORDS, out ? (int)gridDim.x : senders,
                                   tag, p.lora_scale,
                                   floats_at(p.room.u) + (out ? USE_OUT : USE_IN) * RANKS + t * TILE);
            if (out)
                numbered_arrive(BARRIER_OUT, MATH_THREADS + WARP);
            else
                numbered_arrive(BARRIER_IN, MATH_THREADS + 2 * WARP);
        }
    }

    /* Another warp: 1/rms; and this block's parts, of y for out_proj, then of h for the next in_proj. */
    __device__ __forceinline__ void run_sender() const
    {
        const int y_warps = own.scan_warps() + 1 + (own.out.count > 0);
        const int in_warps = 1 + (ADAPTED && p.u_tiles[STEP_IN] > 0),
                  senders = min((int)gridDim.x, S::D / TILE);
#pragma unroll 1
        for (int turn = 0; turn <= 2 * p.layers; turn++) {
            const bool h = turn % 2 != 0;
            const uint32_t tag = p.tag + (uint32_t)((turn + 1) / 2);
            const struct step_lora *lora = p.lora + (turn + 1) / 2 * STEP_ADAPTERS;
            if (!h) {
                if (turn > 0) {
                    const float sum = mail_sum(p.squares, senders, tag);
                    if (lane == 0)
                        row_scale = rsqrtf(fmaf(sum, 1.0f / (float)S::D, p.eps));
                }
                numbered_arrive(BARRIER_IN, MATH_THREADS + (turn < 2 * p.layers ? in_warps : 1) * WARP);
            }
            if (!ADAPTED || turn >= 2 * p.layers - 1)
                continue;
            if (p.u_tiles[h ? STEP_IN : STEP_OUT] == 0 || (h && own.out.count == 0))
                continue;
            send_ranks(
                h ? lora->a[STEP_IN] + own.out.begin * TILE : lora->a[STEP_OUT] + own.in.begin * CHANNELS,
                h ? (int)S::D : (int)S::INNER, h ? own.out.count * (TILE / 4) : own.in.count, p.lora_rank,
                floats_at(h ? p.room.own_h : p.room.own_y), h ? (int)BARRIER_H : (int)BARRIER_Y,
                (h ? 2 : y_warps) * WARP,
                h ? p.u_in + own.template sender<S::D>() * (TILE / 2) : p.u_out + blockIdx.x * (TILE / 2),
                tag);
        }
    }
};

#endif

#endif
