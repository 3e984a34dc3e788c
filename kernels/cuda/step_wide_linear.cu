/* step_wide_linear.cu: the products of mamba_step for many rows, on the matrix units of Hopper.
 *
 * A block makes a tile of outputs by rows over its share of k; the blocks of a cluster share k. One warp has the copy
 * engine fill a ring of stages, 64 columns of the weights and of the rows each: the weights before the wait for the kernel
 * in front, the rows after it. Two warpgroups multiply, and what they have goes through shared memory. In a cluster each
 * block sends every other one the sums of the rows that that one finishes, and adds up what it gets in the order of k.
 *
 * Two shapes of tile. Large weights are read once: 128 outputs by 64 rows, a warpgroup 64 outputs. Small ones may be read
 * again by every few rows, from the second-level cache and ahead of time: 64 outputs by 16 or 32 rows, a warpgroup every
 * other stage, so that few sums or none have to travel.
 *
 * The A of an adapter that all rows share comes with the rows, and one more product, 64 rows by 8, makes u of them; its
 * sums travel with the others, and who finishes a row adds u B^T.
 *
 * A thread finishes 4 neighbouring outputs of a few rows; a row's outputs lie in one warp (64 outputs: half of it). */
#include "kernels/cuda/step_wide_product.cuh"

/* One adapter to a product: its part of the results, and of what the next product is fed. Ranks are 0 where there is
 * none. */
struct adapter_use {
    int rank, next_rank;
    float scale;
    const float *b, *next_a;
};

static __device__ __forceinline__ struct adapter_use use_of(const struct step_wide_linear &p, int adapter,
                                                            int target, int next_target)
{
    struct adapter_use use = {};
    if (adapter < 0)
        return use;
    use.b = p.lora[adapter].b[target];
    use.rank = use.b != NULL ? p.lora[adapter].rank : 0;
    use.scale = p.lora[adapter].scale;
    if (p.next_lora != NULL) {
        use.next_a = p.next_lora[adapter].a[next_target];
        use.next_rank = use.next_a != NULL ? p.next_lora[adapter].rank : 0;
    }
    return use;
}

/* What the rows' adapters' A made of them. 8 lanes a row, or 16 or 32 where there are few: one load after the other is
 * what this must not be. main: the adapter that main_use is of. */
static __device__ __forceinline__ void gather_u(const struct step_wide_linear &p, int target, int n0, int own,
                                                const int *row_adapter, int main,
                                                const struct adapter_use &main_use, int most, float *u)
{
    const int lanes = own > CONSUMERS / 16 ? 1 : own > CONSUMERS / 32 ? 2 : 4;
    const int share = (int)threadIdx.x / 8 % lanes, parts = p.u.count;
#pragma unroll 1
    for (int first_row = 0; first_row < own; first_row += CONSUMERS / 8 / lanes) {
        const int local = first_row + (int)threadIdx.x / 8 / lanes;
        const int adapter = local < own ? row_adapter[local] : -1;
        const int rank = adapter < 0       ? 0
                         : adapter == main ? main_use.rank
                                           : use_of(p, adapter, target, target).rank;
#pragma unroll 1
        for (int first = 0; first < most; first += 8) {
            const int j = first + (int)threadIdx.x % 8;
            const float *from = p.u.values + (int64_t)(n0 + local) * STEP_RANK + j;
            float sum = 0.0f;
            if (j < rank)
                sum = sum_strided<8>(from, (int64_t)p.rows * STEP_RANK, share, parts, lanes);
            if (lanes > 1)
                sum += __shfl_xor_sync(0xffffffffu, sum, 8);
            if (lanes > 2)
                sum += __shfl_xor_sync(0xffffffffu, sum, 16);
            if (share == 0 && j < rank)
                u[local * STEP_RANK + j] = sum;
        }
    }
}

/* 4 bytes as step_copy. */
static __device__ __forceinline__ void copy_one(float *to, const float *from)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
                 "l"(from)
                 : "memory");
}

/* What the block needs of one adapter behind the product: B's rows, as [rank][M], and A's columns of the next one. */
template <int M>
static __device__ __forceinline__ void copy_factors(const struct adapter_use &use, int first_row, int m,
                                                    int columns, float *b, float *a)
{
    for (int i = threadIdx.x; i < min(M, m - first_row) * use.rank; i += CONSUMERS)
        copy_one(b + i % use.rank * M + i / use.rank, use.b + (int64_t)first_row * use.rank + i);
    const int own = min(M, columns - first_row) / 4;
    if (own > 0)
        for (int i = threadIdx.x; i < use.next_rank * own; i += CONSUMERS) {
            int j = i / own, at = i % own * 4;
            step_copy(a + j * M + at, use.next_a + (int64_t)j * columns + first_row + at);
        }
}

/* B's rows of the adapter that all rows share, as [SHARED][M], with zeros where there is no rank. */
template <int M>
static __device__ __forceinline__ void copy_shared(const float *b, int rank, int first_row, int m, float *to)
{
    for (int i = threadIdx.x; i < M * SHARED; i += CONSUMERS) {
        const int out = i / SHARED, j = i % SHARED;
        if (b != NULL && j < rank && first_row + out < m)
            copy_one(to + j * M + out, b + (int64_t)(first_row + out) * rank + j);
        else
            to[j * M + out] = 0.0f;
    }
}

/* The convolution's weights of a tile, [STEP_CONV][M], and behind them its bias. */
template <int M>
static __device__ __forceinline__ void copy_filter(const struct step_wide_linear &p, int first_row,
                                                   float *filter)
{
    const int own = min(M, p.inner - first_row);
    for (int i = threadIdx.x; i < own * STEP_CONV; i += CONSUMERS)
        copy_one(filter + i % STEP_CONV * M + i / STEP_CONV, p.conv + (int64_t)first_row * STEP_CONV + i);
    for (int i = threadIdx.x; i < own; i += CONSUMERS) {
        if (p.conv_bias != NULL)
            copy_one(filter + STEP_CONV * M + i, p.conv_bias + first_row + i);
        else
            filter[STEP_CONV * M + i] = 0.0f;
    }
}

/* QUADS: a thread finishes its four outputs of up to so many rows. */
template <int MODE, bool LARGE, int ROWS, int QUADS, enum step_adapted ADAPTED>
static __global__ void __launch_bounds__(CONSUMERS + WARP, 2)
    wide_kernel(const __grid_constant__ struct step_wide_linear p)
{
#if CUDA_HOPPER
    constexpr bool MIXED = ADAPTED == STEP_MIXED, SHARES = ADAPTED == STEP_SHARED;
    using L = layout<LARGE, ROWS, false, SHARES>;
    constexpr int RANKS = MIXED ? (int)STEP_RANK : SHARES ? (int)SHARED : 0; /* of a row of u */
    constexpr int TARGET = MODE == STEP_MODE_IN ? STEP_IN : MODE == STEP_MODE_X ? STEP_X : STEP_OUT;
    constexpr int NEXT_TARGET = MODE == STEP_MODE_IN ? STEP_X : STEP_IN;
    constexpr bool FEEDS = MODE != STEP_MODE_X; /* an adapter's x A^T */
    extern __shared__ unsigned char memory[];
    __shared__ uint64_t full[STAGES_MOST], empty[STAGES_MOST], arrived;
    __shared__ __align__(16) float filter[MODE == STEP_MODE_IN ? (STEP_CONV + 1) * L::M : 1];
    __shared__ __align__(16) float row_scale[QUADS * L::ROWS_AT_ONCE],
        row_u[QUADS * L::ROWS_AT_ONCE * RANKS + 4];
    __shared__ int row_adapter[MIXED ? QUADS * L::ROWS_AT_ONCE : 1];
    const struct ring ring = {memory + (1024 - shared_address(memory) % 1024) % 1024, NULL, full, empty,
                              p.stages};
    float *sums =
        reinterpret_cast<float *>(ring.tiles);  /* [OVER_K][ROWS][STRIDE], when the ring has been read */
    float *u_sums = sums + L::OVER_K * L::SUMS; /* [OVER_K][ROWS][SHARED] */
    float *parts =
        reinterpret_cast<float *>(ring.tiles + p.parts); /* [splits-1][own][STRIDE], of the others */
    float *u_parts = reinterpret_cast<float *>(ring.tiles + p.u_parts); /* [splits-1][own][SHARED] */
    const int splits = p.splits, split = (int)blockIdx.x % splits, tile = (int)blockIdx.x / splits,
              first_row = tile * L::M;

    if (p.first)
        step_wait();
    step_release();

    const int room = min(p.rows, ROWS), own_first = split * p.own, own = min(p.own, room - own_first);
    const int n0 = (int)blockIdx.y * ROWS + own_first;
    if (threadIdx.x >= CONSUMERS) {
        if (threadIdx.x == CONSUMERS) {
            ring_open(ring, CONSUMERS / WARP / L::OVER_K);
            barrier_init(&arrived, 1);
            barrier_inits_done();
            barrier_expect(&arrived, (splits - 1) * max(own, 0) * (L::M + (SHARES ? (int)SHARED : 0)) *
                                         (int)sizeof(float));
        }
        __syncwarp();
        cluster_arrive();
        cluster_wait();
        if (threadIdx.x == CONSUMERS) {
            const int k_blocks = (p.k + TILE_K - 1) / TILE_K, begin = share_of(k_blocks, split, splits);
            fill<L, false>(p, ring, {first_row, 0, 1, begin, share_of(k_blocks, split + 1, splits) - begin});
        }
        return;
    }
    cluster_arrive();

    /* What the chain does not write. */
    const int row0 = (int)threadIdx.x / L::LANES, m = (int)threadIdx.x % L::LANES * 4, out = first_row + m;
    const int rows = p.header->rows,
              columns = MODE == STEP_MODE_IN ? p.inner : p.m; /* fed to the next product */
    const bool inside = out < p.m, convolves = MODE == STEP_MODE_IN && out < p.inner;
    struct quad norm = {}, before[QUADS][STEP_CONV - 1];
    if (MODE == STEP_MODE_IN && first_row < p.inner)
        copy_filter<L::M>(p, first_row, filter);
    /* The convolution's state: to registers, or as far as the second-level cache where the rows are many. */
    int slots[QUADS];
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        const int local = row0 + i * L::ROWS_AT_ONCE;
        slots[i] = convolves && local < own && n0 + local < rows ? p.header->slots[n0 + local] : -1;
    }
    auto each_state = [&](auto use) {
#pragma unroll
        for (int i = 0; i < QUADS; i++)
#pragma unroll
            for (int k = 0; k < STEP_CONV - 1; k++)
                if (slots[i] >= 0)
                    use(i, k, p.states + slots[i] * p.slot_stride + k * (int64_t)p.inner + out);
    };
    auto load_state = [&](int i, int k, const float *from) { before[i][k] = load_quad(from); };
    if (MODE == STEP_MODE_IN && !LARGE)
        each_state(load_state);
    if (MODE == STEP_MODE_IN && LARGE)
        each_state([&](int, int, const float *from) {
            if (m % 32 == 0)
                asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
        });
    if (MODE == STEP_MODE_OUT && inside)
        norm = load_quad(p.norm + out);
    float *factors_b = reinterpret_cast<float *>(ring.tiles + p.factors), *factors_a = factors_b + L::FACTORS;
    int main = -1, most_rank = 0;
    struct adapter_use main_use = {};
    if (SHARES) {
        main_use = use_of(p, p.header->main, TARGET, NEXT_TARGET);
        copy_shared<L::M>(main_use.b, main_use.rank, first_row, p.m, factors_b);
    }
    if (MIXED) {
        most_rank = p.header->rank;
        main = p.header->main;
        if (main >= 0 && p.lora[main].rank > STEP_AHEAD)
            main = -1;
        main_use = use_of(p, main, TARGET, NEXT_TARGET);
        copy_factors<L::M>(main_use, first_row, p.m, columns, factors_b, factors_a);
        if ((int)threadIdx.x < own)
            row_adapter[threadIdx.x] =
                n0 + (int)threadIdx.x < rows ? p.header->adapters[n0 + threadIdx.x] : -1;
        numbered_wait(1, CONSUMERS);
    }
    cluster_wait();

    if (!p.first)
        step_wait();
    if (MODE == STEP_MODE_OUT) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            int local = row0 + i * L::ROWS_AT_ONCE, n = n0 + local;
            if (local < own && n < rows && inside)
                before[i][0] = load_quad(p.r + (int64_t)n * p.m + out);
        }
    }
    if (MODE == STEP_MODE_IN)
        gather_scale(p, n0, own, row_scale);
    if (MIXED)
        gather_u(p, TARGET, n0, own, row_adapter, main, main_use, most_rank, row_u);

    float acc[ROWS / 2], u_acc[4];
    struct place at = {0, 0};
    const int k_blocks = (p.k + TILE_K - 1) / TILE_K;
    multiply<L, false>(acc, u_acc, ring, at,
                       share_of(k_blocks, split + 1, splits) - share_of(k_blocks, split, splits));
    step_copies_wait();
    numbered_wait(1, CONSUMERS); /* the ring has been read */

    /* Rows of sums, then to whom they belong. */
    {
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        float *to = sums + warp / 4 / L::OVER_M * L::SUMS + lane % 4 * 2 * L::STRIDE +
                    warp % (4 * L::OVER_M) * 16 + lane / 4;
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                to[(8 * j + i % 2) * L::STRIDE + i / 2 * 8] = acc[4 * j + i];
        const int row = warp % 4 * 16 + lane / 4, over_k = warp / 4 / L::OVER_M;
        if (SHARES && warp / 4 % L::OVER_M == 0)
#pragma unroll
            for (int h = 0; h < 2; h++)
                if (row + 8 * h < ROWS)
                    *reinterpret_cast<float2 *>(u_sums + over_k * L::U_SUMS + (row + 8 * h) * SHARED +
                                                lane % 4 * 2) = make_float2(u_acc[2 * h], u_acc[2 * h + 1]);
    }
    numbered_wait(1, CONSUMERS);
    if (MODE == STEP_MODE_IN && LARGE)
        each_state(load_state);
    auto sum_of = [&](int row) { /* of this block */
                                 struct quad sum = load_quad(sums + row * L::STRIDE + m);
                                 if (L::OVER_K == 2) {
                                     struct quad other = load_quad(sums + L::SUMS + row * L::STRIDE + m);
#pragma unroll
                                     for (int e = 0; e < 4; e++)
                                         sum.v[e] += other.v[e];
                                 }
                                 return sum;
    };
    auto u_of = [&](int row, int at) { /* of this block, 4 ranks */
                                       struct quad sum = load_quad(u_sums + row * SHARED + at);
                                       if (L::OVER_K == 2) {
                                           struct quad other =
                                               load_quad(u_sums + L::U_SUMS + row * SHARED + at);
#pragma unroll
                                           for (int e = 0; e < 4; e++)
                                               sum.v[e] += other.v[e];
                                       }
                                       return sum;
    };
    const int u_row = (int)threadIdx.x / 2,
              u_at = (int)threadIdx.x % 2 * 4; /* of ranks, what a thread moves */
    if (splits > 1) {
        if (SHARES && u_row < room && u_row * p.owner_scale >> 16 != split) {
            const int owner = u_row * p.owner_scale >> 16, slot = split < owner ? split : split - 1;
            send_quad(u_parts + (slot * p.own + u_row - owner * p.own) * SHARED + u_at, &arrived, owner,
                      u_of(u_row, u_at));
        }
        constexpr int TURNS = ROWS / L::ROWS_AT_ONCE;
#pragma unroll 4
        for (int i = 0; i < TURNS; i++) { /* not all to the same block at once */
            const int row = row0 + (i + split) % TURNS * L::ROWS_AT_ONCE, owner = row * p.owner_scale >> 16;
            const int slot = split < owner ? split : split - 1;
            if (row < room && owner != split)
                send_quad(parts + (slot * p.own + row - owner * p.own) * L::STRIDE + m, &arrived, owner,
                          sum_of(row));
        }
        barrier_wait(&arrived, 0);
    }
    if (SHARES) {
        if (u_row < own) {
            struct quad u = {};
            for (int s = 0; s < splits; s++) {
                const struct quad part =
                    s == split
                        ? u_of(own_first + u_row, u_at)
                        : load_quad(u_parts + ((s < split ? s : s - 1) * p.own + u_row) * SHARED + u_at);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    u.v[e] += part.v[e];
            }
#pragma unroll
            for (int e = 0; e < 4; e++)
                u.v[e] *= main_use.scale;
            store_quad(row_u + u_row * SHARED + u_at, u);
        }
        numbered_wait(1, CONSUMERS);
    }

#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        const int local = row0 + i * L::ROWS_AT_ONCE, n = n0 + local;
        const bool live = local < own && n < rows;
        const int adapter = MIXED && live ? row_adapter[local] : -1;
        const struct adapter_use use =
            MIXED && adapter != main ? use_of(p, adapter, TARGET, NEXT_TARGET) : main_use;
        struct quad v = {}, fed = {};
        float squares = 0.0f;
        if (live && inside) {
            const struct quad mine = sum_of(own_first + local);
            v = split == 0 ? mine : load_quad(parts + local * L::STRIDE + m);
#pragma unroll 2
            for (int s = 1; s < splits; s++) {
                struct quad part =
                    s == split ? mine
                               : load_quad(parts + ((s < split ? s : s - 1) * p.own + local) * L::STRIDE + m);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    v.v[e] += part.v[e];
            }
            if (SHARES) {
                const float *u = row_u + local * SHARED;
                const struct quad low = load_quad(u), high = load_quad(u + 4);
#pragma unroll
                for (int j = 0; j < SHARED; j++) {
                    const struct quad factor = load_quad(factors_b + j * L::M + m);
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        v.v[e] = fmaf(j < 4 ? low.v[j % 4] : high.v[j % 4], factor.v[e], v.v[e]);
                }
            }
            if (MIXED && use.rank > 0) {
                const float *u = row_u + local * STEP_RANK;
                struct quad sum = {};
#pragma unroll 2
                for (int j = 0; j < use.rank; j++) {
                    struct quad factor;
                    if (adapter == main) {
                        factor = load_quad(factors_b + j * L::M + m);
                    } else {
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            factor.v[e] = use.b[(int64_t)(out + e) * use.rank + j];
                    }
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        sum.v[e] = fmaf(u[j], factor.v[e], sum.v[e]);
                }
#pragma unroll
                for (int e = 0; e < 4; e++)
                    v.v[e] = fmaf(use.scale, sum.v[e], v.v[e]);
            }
            if (MODE == STEP_MODE_IN) { /* the input, and u, were without 1/rms */
                const float scale = row_scale[local];
#pragma unroll
                for (int e = 0; e < 4; e++)
                    v.v[e] *= scale;
            }
            if (p.bias != NULL) {
                struct quad bias = load_quad(p.bias + out);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    v.v[e] += bias.v[e];
            }
            if (convolves) {
                float *state = p.states + slots[i] * p.slot_stride + out;
                store_quad(state, before[i][1]);
                store_quad(state + p.inner, before[i][2]);
                store_quad(state + 2 * (int64_t)p.inner, v);
                struct quad y = load_quad(filter + STEP_CONV * L::M + m);
#pragma unroll
                for (int k = 0; k < STEP_CONV; k++) {
                    const struct quad w = load_quad(filter + k * L::M + m),
                                      &x = k == STEP_CONV - 1 ? v : before[i][k];
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        y.v[e] = fmaf(w.v[e], x.v[e], y.v[e]);
                }
#pragma unroll
                for (int e = 0; e < 4; e++)
                    y.v[e] = silu(y.v[e]);
                fed = store_rounded(p.xc + (int64_t)n * p.inner + out, y);
            } else if (MODE == STEP_MODE_IN) {
                store_quad(p.z + (int64_t)n * p.inner + out - p.inner, v);
            } else if (MODE == STEP_MODE_X) {
                store_quad(p.y + (int64_t)n * p.m + out, v);
            } else {
                struct quad h;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    v.v[e] += before[i][0].v[e];
                    h.v[e] = v.v[e] * norm.v[e];
                }
                store_quad(p.r + (int64_t)n * p.m + out, v);
                fed = store_rounded(p.h + (int64_t)n * p.m + out, h);
                squares = dot(v, v);
            }
        }
        if (MODE == STEP_MODE_OUT) {
            squares = row_sum<L::LANES>(squares);
            if (live && m == 0)
                p.next_squares.values[(int64_t)tile * p.rows + n] = squares;
        }
        if (MIXED && FEEDS && p.next_lora != NULL && (MODE == STEP_MODE_OUT || first_row < p.inner)) {
            const int next_rank = live ? use.next_rank : 0;
#pragma unroll 1
            for (int first = 0; first < most_rank; first += 8) {
                float products[8];
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    products[j] = 0.0f;
                    if (first + j < next_rank && out < columns)
                        products[j] =
                            dot(fed, load_quad(adapter == main
                                                   ? factors_a + (first + j) * L::M + m
                                                   : use.next_a + (int64_t)(first + j) * columns + out));
                }
                const float sum = scatter_sum<L::LANES>(products);
                const int j = first + scattered_index<L::LANES>();
                if (j < next_rank && (int)threadIdx.x % (L::LANES / 8) == 0)
                    p.next_u.values[((int64_t)tile * p.rows + n) * STEP_RANK + j] = sum;
            }
        }
    }
#endif
}

/* ---- launch ---- */

/* What a product is cut into. */
struct cut {
    bool large;
    int outputs, rows; /* of a block */
};

/* Bytes of weights that may be read once for every few rows, all reads together: they stay in the second-level cache
 * meanwhile. Of those that are read once, fewer bytes go better by small tiles. */
enum { SMALL_BYTES = 20 << 20, SMALL_BYTES_ONCE = 12 << 20 };

static struct cut cut_of(enum step_mode mode, int64_t m, int64_t k, int rows)
{
    const int few = mode == STEP_MODE_X ? 16 : 32;
    const int64_t reads = divide_up(rows, few), most = reads > 1 ? SMALL_BYTES : SMALL_BYTES_ONCE;
    if (mode == STEP_MODE_HEAD || m * k * (int64_t)sizeof(step_type) * reads > most)
        return {true, 128, GROUP};
    return {false, 64, few};
}

int step_wide_linear_rows(enum step_mode mode, int64_t m, int64_t k, int rows)
{
    const int block = cut_of(mode, m, k, rows).rows;
    return rows < block ? rows : block;
}

int step_wide_linear_outputs(enum step_mode mode, int64_t m, int64_t k, int rows)
{
    return cut_of(mode, m, k, rows).outputs;
}

/* The blocks of a cluster. Small weights: as many as fill the device best. Large ones: the fewest that give every
 * multiprocessor one, since the rows are read again for each tile and few clusters fit beside each other. But each block
 * has something to multiply. */
static int choose_splits(const struct kernel_device *device, bool large, int blocks, int64_t k)
{
    const int slots = device->multiprocessors;
    int best = large ? 2 : 1;
    double best_fill = 0;
    for (int splits = best; splits <= SPLITS_MOST && splits * K_LEAST <= k; splits++) {
        const int all = blocks * splits;
        if (large) {
            best = splits;
            if (all * 100 >= slots * 115)
                break;
            continue;
        }
        const double fill = (double)all / (double)(divide_up(all, slots) * slots);
        if (all <= slots && fill > best_fill + 0.02) {
            best = splits;
            best_fill = fill;
        }
    }
    return best;
}

template <int MODE, bool LARGE, int ROWS, int QUADS, enum step_adapted ADAPTED>
static int launch(struct kernel_device *device, struct step_wide_linear *p)
{
    using L = layout<LARGE, ROWS, false, ADAPTED == STEP_SHARED>;
    const int64_t most = divide_up(divide_up(p->k, TILE_K), p->splits);
    const size_t f = sizeof(float), others = (size_t)(p->splits - 1) * (size_t)p->own;
    const size_t sums = (size_t)(L::OVER_K * (L::SUMS + L::U_SUMS)) * f, parts = others * L::STRIDE * f,
                 u_parts = ADAPTED == STEP_SHARED ? others * SHARED * f : 0,
                 factors = ADAPTED == STEP_MIXED    ? 2 * L::FACTORS * f
                           : ADAPTED == STEP_SHARED ? (size_t)L::M * SHARED * f
                                                    : 0;
    /* Two large blocks to a multiprocessor; a small one beside the scan's. */
    const size_t own_static = ADAPTED == STEP_MIXED ? 12288 : MODE == STEP_MODE_IN ? 6144 : 3072;
    const size_t room =
        LARGE ? (size_t)device->shared_bytes / 2 - own_static : (size_t)device->shared_bytes - 81920;
    p->stages = (int)((room - parts - u_parts - factors) / L::STAGE);
    if (p->stages > most)
        p->stages = (int)most;
    if (p->stages > STAGES_MOST)
        p->stages = STAGES_MOST;
    const size_t ring = (size_t)p->stages * L::STAGE;
    p->parts = (int)(ring > sums ? ring : (sums + 15) / 16 * 16);
    p->u_parts = p->parts + (int)parts;
    p->factors = p->u_parts + (int)u_parts;
    size_t shared = (size_t)p->factors + factors + 1024;
    if (shared < ring + L::BEYOND + 1024)
        shared = ring + L::BEYOND + 1024;
    auto kernel = wide_kernel<MODE, LARGE, ROWS, QUADS, ADAPTED>;
    int status = cuda_check(
        device, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    if (status != KERNEL_OK)
        return status;
    dim3 grid((unsigned)(divide_up(p->m, L::M) * p->splits), (unsigned)divide_up(p->rows, ROWS));
    return step_launch(device, kernel, grid, CONSUMERS + WARP, shared, p->splits, true, *p);
}

template <int MODE, bool LARGE, int ROWS, int QUADS>
static int launch_adapted(struct kernel_device *device, struct step_wide_linear *p)
{
    return p->adapted == STEP_SHARED  ? launch<MODE, LARGE, ROWS, QUADS, STEP_SHARED>(device, p)
           : p->adapted == STEP_MIXED ? launch<MODE, LARGE, ROWS, QUADS, STEP_MIXED>(device, p)
                                      : launch<MODE, LARGE, ROWS, QUADS, STEP_PLAIN>(device, p);
}

template <int MODE, bool LARGE, int ROWS>
static int launch_cut(struct kernel_device *device, struct step_wide_linear *p)
{
    using L = layout<LARGE, ROWS>;
    p->splits = choose_splits(device, LARGE, (int)(divide_up(p->m, L::M) * divide_up(p->rows, ROWS)), p->k);
    p->own = (int)divide_up(p->rows < ROWS ? p->rows : ROWS, p->splits);
    p->owner_scale = 65536 / p->own + 1;
    const int quads = (int)divide_up(p->own, L::ROWS_AT_ONCE);
    if constexpr (LARGE)
        if (quads > 2)
            return launch_adapted<MODE, LARGE, ROWS, 4>(device, p);
    if constexpr (ROWS > 16)
        if (quads > 1)
            return launch_adapted<MODE, LARGE, ROWS, 2>(device, p);
    return launch_adapted<MODE, LARGE, ROWS, 1>(device, p);
}

template <int MODE> static int launch_mode(struct kernel_device *device, struct step_wide_linear *p)
{
    if (cut_of((enum step_mode)MODE, p->m, p->k, p->rows).large)
        return launch_cut<MODE, true, GROUP>(device, p);
    return launch_cut < MODE, false, MODE == STEP_MODE_X ? 16 : 32 > (device, p);
}

int step_wide_launch_linear(struct kernel_device *device, enum step_mode mode, struct step_wide_linear *p)
{
    return mode == STEP_MODE_IN    ? launch_mode<STEP_MODE_IN>(device, p)
           : mode == STEP_MODE_X   ? launch_mode<STEP_MODE_X>(device, p)
           : mode == STEP_MODE_OUT ? launch_mode<STEP_MODE_OUT>(device, p)
                                   : step_wide_launch_head(device, p);
}
