/* scan_backward.cuh: what the two kernels of the selective scan's backward agree on. */
#ifndef KERNELS_CUDA_SCAN_BACKWARD_CUH
#define KERNELS_CUDA_SCAN_BACKWARD_CUH

#include "kernels/cuda/scan.cuh"

enum { SCAN_PARTS_CHANNELS = 64 }; /* whose dB and dC are added up at once, where there are 16 states */

/* Where the results go that are not yet sums of everything. */
struct scan_parts {
    float *tokens;   /* [channel blocks][tokens][dB | dC], a shape's STATES of each */
    float *channels; /* [spans][dA_log (channels x d_state) | dD | dbias] */
};

/* Whether the kernel of scan_backward_bf16.cu takes this; rows are aligned. */
bool cuda_scan_backward_tiles_fit(const struct kernel_device *device, const struct scan_backward_args &a);

/* gradients: [spans][d_state][channels], of the state at each span's end, from later spans; NULL unless split. sums: those
 * over tokens are wanted. */
int cuda_scan_backward_tiles(struct kernel_device *device, const struct scan_backward_args &a,
                             const struct scan_spans &spans, const float *gradients,
                             const struct scan_parts &parts, bool sums);

#endif
