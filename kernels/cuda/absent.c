/* absent.c: a build without CUDA. */
#include "kernels/kernels.h"

const struct kernel_ops *kernels_cuda(void)
{
    return NULL;
}
