/* backend.c: the table of the CPU backend for one instruction set. What has no vectorised form is the reference's. */
#include "kernels/cpu/device.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/reference.h"

#if defined(__AVX512F__)
static const enum cpu_isa table_isa = CPU_AVX512;
#elif defined(__AVX2__)
static const enum cpu_isa table_isa = CPU_AVX2;
#else
static const enum cpu_isa table_isa = CPU_PLAIN;
#endif

static int device_open(int index, int threads, struct kernel_device **ret_device)
{
    int status = cpu_device_open(index, threads, ret_device);
    if (status == KERNEL_OK)
        (*ret_device)->isa = table_isa;
    return status;
}

const struct kernel_ops *CPU_NAME(cpu_ops)(void)
{
    static const struct kernel_ops ops = {
        .name = "cpu",
        .device_open = device_open,
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
        .cast = CPU_NAME(cpu_cast),
        .synchronize = cpu_synchronize,
        .mark = cpu_mark,
        .mark_seconds = cpu_mark_seconds,
        .gemm = CPU_NAME(cpu_gemm),
        .lora_forward = CPU_NAME(cpu_lora_forward),
        .linear_workspace = CPU_NAME(cpu_linear_workspace),
        .linear_forward = CPU_NAME(cpu_linear_forward),
        .linear_backward = CPU_NAME(cpu_linear_backward),
        .embedding_forward = CPU_NAME(cpu_embedding_forward),
        .embedding_backward = CPU_NAME(cpu_embedding_backward),
        .rmsnorm_forward = CPU_NAME(cpu_rmsnorm_forward),
        .rmsnorm_backward_workspace = CPU_NAME(cpu_rmsnorm_backward_workspace),
        .rmsnorm_backward = CPU_NAME(cpu_rmsnorm_backward),
        .conv_forward = CPU_NAME(cpu_conv_forward),
        .conv_backward = CPU_NAME(cpu_conv_backward),
        .scan_prepare = reference_scan_prepare,
        .scan_forward = CPU_NAME(cpu_scan_forward),
        .scan_backward_workspace = CPU_NAME(cpu_scan_backward_workspace),
        .scan_backward = CPU_NAME(cpu_scan_backward),
        .head_workspace = CPU_NAME(cpu_head_workspace),
        .head = CPU_NAME(cpu_head),
        .adamw = CPU_NAME(cpu_adamw),
        .grad_norm = CPU_NAME(cpu_grad_norm),
        .sample = CPU_NAME(cpu_sample),
    };
    return &ops;
}
