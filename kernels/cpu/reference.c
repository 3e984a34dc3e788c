/* reference.c: the table of the plain backend. Scalar, one thread, sums in double, written to be read: every
 * other backend is compared with it. The ops are in reference_*.c; the device is the CPU's. */
#include "kernels/cpu/reference.h"

#include "kernels/cpu/convert.h"
#include "kernels/cpu/device.h"

static int reference_device_open(int index, int threads, struct kernel_device **ret_device)
{
    (void)threads;
    return cpu_device_open(index, 1, ret_device);
}

int reference_cast(struct kernel_device *device, void *to, enum kernel_type to_type, const void *from,
                   enum kernel_type from_type, int64_t count)
{
    if (count < 0)
        return KERNEL_INVALID;
    if (to_type == from_type)
        return cpu_memory_copy(device, to, from, (size_t)count * kernel_type_size(to_type));
    if (to_type == TYPE_I32 || from_type == TYPE_I32)
        return KERNEL_UNSUPPORTED;
    for (int64_t i = 0; i < count; i++)
        store_from_float(to, to_type, i, load_as_float(from, from_type, i));
    return KERNEL_OK;
}

const struct kernel_ops *kernels_reference(void)
{
    static const struct kernel_ops ops = {
        .name = "reference",
        .device_open = reference_device_open,
        .device_close = cpu_device_close,
        .device_query = cpu_device_query,
        .device_reset_peak = cpu_device_reset_peak,
        .device_fault = cpu_device_fault,
        .memory_alloc = cpu_memory_alloc,
        .memory_free = cpu_memory_free,
        .copy_in = cpu_memory_copy,
        .copy_out = cpu_memory_copy,
        .copy = cpu_memory_copy,
        .zero = cpu_memory_zero,
        .cast = reference_cast,
        .synchronize = cpu_synchronize,
        .mark = cpu_mark,
        .mark_seconds = cpu_mark_seconds,
        .gemm = reference_gemm,
        .lora_forward = reference_lora_forward,
        .linear_workspace = reference_linear_workspace,
        .linear_forward = reference_linear_forward,
        .linear_backward = reference_linear_backward,
        .embedding_forward = reference_embedding_forward,
        .embedding_backward = reference_embedding_backward,
        .rmsnorm_forward = reference_rmsnorm_forward,
        .rmsnorm_backward_workspace = reference_rmsnorm_backward_workspace,
        .rmsnorm_backward = reference_rmsnorm_backward,
        .conv_forward = reference_conv_forward,
        .conv_backward = reference_conv_backward,
        .scan_prepare = reference_scan_prepare,
        .scan_forward = reference_scan_forward,
        .scan_backward_workspace = reference_scan_backward_workspace,
        .scan_backward = reference_scan_backward,
        .head_workspace = reference_head_workspace,
        .head = reference_head,
        .adamw = reference_adamw,
        .grad_norm = reference_grad_norm,
        .sample = reference_sample,
    };
    return &ops;
}
