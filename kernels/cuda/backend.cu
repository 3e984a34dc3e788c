/* backend.cu: the table of the CUDA ops. Constant. */
#include "kernels/cuda/common.cuh"

static struct kernel_ops make_ops(void)
{
    struct kernel_ops ops = {};
    ops.name = "cuda";
    ops.device_open = cuda_device_open;
    ops.device_close = cuda_device_close;
    ops.device_query = cuda_device_query;
    ops.device_reset_peak = cuda_device_reset_peak;
    ops.device_fault = cuda_device_fault;
    ops.memory_alloc = cuda_memory_alloc;
    ops.memory_free = cuda_memory_free;
    ops.copy_in = cuda_copy_in;
    ops.copy_out = cuda_copy_out;
    ops.copy = cuda_copy;
    ops.zero = cuda_zero;
    ops.cast = cuda_cast;
    ops.synchronize = cuda_synchronize;
    ops.mark = cuda_mark;
    ops.mark_seconds = cuda_mark_seconds;
    ops.record_begin = cuda_record_begin;
    ops.record_end = cuda_record_end;
    ops.record_run = cuda_record_run;
    ops.record_free = cuda_record_free;
    ops.gemm = cuda_gemm;
    ops.lora_forward = cuda_lora_forward;
    ops.linear_workspace = cuda_linear_workspace;
    ops.linear_forward = cuda_linear_forward;
    ops.linear_backward = cuda_linear_backward;
    ops.embedding_forward = cuda_embedding_forward;
    ops.embedding_backward = cuda_embedding_backward;
    ops.rmsnorm_forward = cuda_rmsnorm_forward;
    ops.rmsnorm_backward_workspace = cuda_rmsnorm_backward_workspace;
    ops.rmsnorm_backward = cuda_rmsnorm_backward;
    ops.conv_forward = cuda_conv_forward;
    ops.conv_backward = cuda_conv_backward;
    ops.scan_prepare = cuda_scan_prepare;
    ops.scan_forward = cuda_scan_forward;
    ops.scan_backward_workspace = cuda_scan_backward_workspace;
    ops.scan_backward = cuda_scan_backward;
    ops.mamba_step_workspace = cuda_mamba_step_workspace;
    ops.mamba_step = cuda_mamba_step;
    ops.head_workspace = cuda_head_workspace;
    ops.head = cuda_head;
    ops.adamw = cuda_adamw;
    ops.grad_norm = cuda_grad_norm;
    ops.sample = cuda_sample;
    return ops;
}

static const struct kernel_ops cuda_ops = make_ops();

extern "C" const struct kernel_ops *kernels_cuda(void)
{
    return &cuda_ops;
}
