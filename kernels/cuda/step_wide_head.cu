/* step_wide_head.cu: the last product of mamba_step for many rows: hidden states and logits. */
#include "kernels/cuda/step_wide_product.cuh"

/* The head: no cluster; a block takes every gridDim.x-th tile of 128 outputs over the whole of k, the ring running on from
 * one to the next. The hidden states on the way. */
template <bool RESIDENT>
static __global__ void __launch_bounds__(CONSUMERS + WARP, 1)
    wide_head_kernel(const __grid_constant__ struct step_wide_linear p)
{
#if CUDA_HOPPER
    using L = layout<true, GROUP, RESIDENT>;
    extern __shared__ unsigned char memory[];
    __shared__ uint64_t full[STAGES_MOST], empty[STAGES_MOST];
    __shared__ float row_scale[GROUP];
    unsigned char *tiles = memory + (1024 - shared_address(memory) % 1024) % 1024;
    const struct ring ring = {tiles, tiles + p.stages * L::STAGE, full, empty, p.stages};
    const int n0 = blockIdx.y * GROUP, all = (p.m + L::M - 1) / L::M, stride = (int)gridDim.x;
    const int own = (all - (int)blockIdx.x + stride - 1) / stride, count = (p.k + TILE_K - 1) / TILE_K;
    step_release();
    if (threadIdx.x == CONSUMERS) {
        ring_open(ring, CONSUMERS / WARP);
        barrier_inits_done();
    }
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        if (threadIdx.x == CONSUMERS)
            fill<L, RESIDENT>(p, ring, {(int)blockIdx.x * L::M, stride * L::M, own, 0, count});
        return;
    }

    step_wait();
    const int rows = min(p.header->rows - n0, (int)GROUP);
    gather_scale(p, n0, rows, row_scale);
    numbered_wait(1, CONSUMERS);
    for (int local = blockIdx.x; local < rows; local += stride) {
        const int64_t from = (int64_t)(n0 + local) * p.k;
        for (int i = threadIdx.x; i < p.k; i += CONSUMERS)
            p.h[from + i] = from_float<step_type>(p.r[from + i] * row_scale[local] * p.norm[i]);
    }
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    struct place at = {0, 0};
    for (int i = 0; i < own; i++) {
        float acc[32], none[4];
        multiply<L, RESIDENT>(acc, none, ring, at, count);
        const int out = ((int)blockIdx.x + i * stride) * L::M + warp * 16 + lane / 4;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int local = 8 * j + lane % 4 * 2 + e % 2, m = out + e / 2 * 8;
                if (local < rows && m < p.m)
                    p.y[(int64_t)(n0 + local) * p.m + m] = acc[4 * j + e] * row_scale[local];
            }
    }
#endif
}

/* ---- launch ---- */

template <bool RESIDENT> static int launch(struct kernel_device *device, struct step_wide_linear *p)
{
    using L = layout<true, GROUP, RESIDENT>;
    const int tiles = (int)divide_up(p->m, L::M), groups = (int)divide_up(p->rows, GROUP);
    const int most = device->multiprocessors / groups, k_blocks = (int)divide_up(p->k, TILE_K);
    const int resident = RESIDENT ? k_blocks * L::X : 0, room = device->shared_bytes - 2048 - resident;
    if (RESIDENT && room < 4 * L::STAGE)
        return launch<false>(device, p);
    p->stages = room / L::STAGE < STAGES_MOST ? room / L::STAGE : STAGES_MOST;
    const size_t shared = (size_t)(p->stages * L::STAGE + resident) + 1024;
    auto kernel = wide_head_kernel<RESIDENT>;
    int status = cuda_check(
        device, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    if (status != KERNEL_OK)
        return status;
    dim3 grid((unsigned)(tiles < most ? tiles : most), (unsigned)groups);
    return step_launch(device, kernel, grid, CONSUMERS + WARP, shared, 1, true, *p);
}

int step_wide_launch_head(struct kernel_device *device, struct step_wide_linear *p)
{
    return launch<true>(device, p);
}
