/* hopper.cu: the host's side of the copy engine. */
#include "kernels/cuda/hopper.cuh"

#include <cudaTypedefs.h>

int cuda_tile_map(CUtensorMap *ret_map, const void *matrix, int64_t rows, int64_t columns, int64_t stride,
                  int box_rows, enum kernel_type type)
{
    static PFN_cuTensorMapEncodeTiled_v12000 encode;
    if (encode == NULL) { /* of the driver, which is not linked */
        void *function = NULL;
        cudaDriverEntryPointQueryResult found;
        if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                             &found) != cudaSuccess ||
            found != cudaDriverEntryPointSuccess)
            return KERNEL_UNSUPPORTED;
        encode = (PFN_cuTensorMapEncodeTiled_v12000)function;
    }
    const cuuint64_t sizes[2] = {(cuuint64_t)columns, (cuuint64_t)rows};
    const cuuint64_t strides[1] = {(cuuint64_t)stride * 2};
    const cuuint32_t box[2] = {64, (cuuint32_t)box_rows}, steps[2] = {1, 1};
    CUtensorMapDataType element =
        type == TYPE_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    CUresult result = encode(ret_map, element, 2, (void *)matrix, sizes, strides, box, steps,
                             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? KERNEL_OK : KERNEL_INVALID;
}
