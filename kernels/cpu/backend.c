/* backend.c: the table of the CPU backend. Called by the thread that owns the device. */
#include "kernels/cpu/device.h"
#include "kernels/cpu/reference.h"

const struct kernel_ops *kernels_cpu(void)
{
    static const struct kernel_ops ops = {
        .name = "cpu",
        .device_open = cpu_device_open,
        .device_close = cpu_device_close,
        .device_query = cpu_device_query,
        .memory_alloc = cpu_memory_alloc,
        .memory_free = cpu_memory_free,
        .copy_in = cpu_memory_copy,
        .copy_out = cpu_memory_copy,
        .copy = cpu_memory_copy,
        .zero = cpu_memory_zero,
        .cast = reference_cast,
        .synchronize = cpu_synchronize,
        .gemm = reference_gemm,
        .lora_forward = reference_lora_forward,
        .lora_backward = reference_lora_backward,
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
