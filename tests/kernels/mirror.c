#include "tests/kernels/mirror.h"

#include <stdio.h>

enum { SENTINEL_16 = 0x7fc5 }; /* the upper half of the harness's: a NaN in BF16 and in F16 */

static struct kernel_device *the_device;
static struct session *current;

static void close_the_device(void)
{
    kernels_cuda()->device_close(the_device);
}

bool mirror_wanted(void)
{
    const char *asked = getenv("ADDERD_TEST_CUDA");
    if (asked == NULL || strcmp(asked, "1") != 0)
        return false;
    if (the_device != NULL)
        return true;
    const char *reason = "this build has no CUDA backend";
    if (kernels_cuda() != NULL) {
        int status = kernels_cuda()->device_open(0, 0, &the_device);
        if (status == KERNEL_OK) {
            atexit(close_the_device);
            return true;
        }
        reason = status == KERNEL_UNSUPPORTED ? "no NVIDIA driver, or one too old, or no GPU"
                                              : kernel_status_text(status);
    }
    printf("skipped: %s\n", reason);
    fflush(stdout);
    exit(77);
}

static int open_device(int index, int threads, struct kernel_device **ret_device)
{
    (void)index;
    (void)threads;
    *ret_device = the_device;
    return KERNEL_OK;
}

static void close_device(struct kernel_device *device)
{
    (void)device;
}

void mirror_enter(struct session *session)
{
    current = session;
}

/* ---- one array ---- */

static void cast(enum kernel_type to_type, void *to, enum kernel_type from_type, const void *from,
                 size_t count)
{
    assert_int_equal(kernels_reference()->cast(NULL, to, to_type, from, from_type, (int64_t)count),
                     KERNEL_OK);
}

static size_t element_bytes(const struct block *block)
{
    return kernel_type_size(block->device_type);
}

/* Elements with both guards. */
static size_t block_elements(const struct block *block)
{
    return (block->bytes + 2 * GUARD_BYTES) / kernel_type_size(block->type);
}

static void to_device_type(const struct block *block, unsigned char *to)
{
    size_t count = block_elements(block);
    if (block->device_type == block->type) {
        memcpy(to, block->raw, block->bytes + 2 * GUARD_BYTES);
        return;
    }
    cast(block->device_type, to, TYPE_F32, block->raw, count);
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, block->raw + 4 * i, 4);
        if (bits == SENTINEL)
            memcpy(to + 2 * i, &(uint16_t){SENTINEL_16}, 2);
    }
}

static void from_device_type(struct block *block, const unsigned char *from)
{
    size_t count = block_elements(block);
    if (block->device_type == block->type) {
        memcpy(block->raw, from, block->bytes + 2 * GUARD_BYTES);
        return;
    }
    cast(TYPE_F32, block->raw, block->device_type, from, count);
    for (size_t i = 0; i < count; i++) {
        uint16_t half;
        memcpy(&half, from + 2 * i, 2);
        if (half == SENTINEL_16)
            memcpy(block->raw + 4 * i, &(uint32_t){SENTINEL}, 4);
    }
}

static void upload(struct block *block, enum kernel_type type)
{
    const struct kernel_ops *cuda = kernels_cuda();
    block->device_type = type;
    block->device_bytes = block_elements(block) * element_bytes(block);
    size_t shift = (size_t)(block->raw - block->allocation);
    void *allocation = NULL;
    assert_int_equal(cuda->memory_alloc(the_device, block->device_bytes + shift, &allocation), KERNEL_OK);
    block->device_allocation = allocation;
    block->device = block->device_allocation + shift;
    block->uploaded = malloc(block->device_bytes);
    assert_non_null(block->uploaded);
    to_device_type(block, block->uploaded);
    assert_int_equal(cuda->copy_in(the_device, block->device, block->uploaded, block->device_bytes),
                     KERNEL_OK);
}

static void download(struct block *block)
{
    const struct kernel_ops *cuda = kernels_cuda();
    unsigned char *now = malloc(block->device_bytes);
    assert_non_null(now);
    assert_int_equal(cuda->copy_out(the_device, now, block->device, block->device_bytes), KERNEL_OK);
    if (block->kind != BLOCK_INPUT)
        from_device_type(block, now);
    else if (memcmp(now, block->uploaded, block->device_bytes) != 0)
        fail_msg("%s: the input %s was written", current->label, block->name);
    free(now);
    free(block->uploaded);
    cuda->memory_free(the_device, block->device_allocation);
    block->device_allocation = block->device = block->uploaded = NULL;
}

/* The device's pointer for one of the host's. */
static void *mirrored(const void *pointer, bool activation)
{
    const unsigned char *at = pointer;
    for (int i = 0; at != NULL && i < current->n_blocks; i++) {
        struct block *block = &current->blocks[i];
        if (at < block->raw || at > block->raw + block->bytes + 2 * GUARD_BYTES)
            continue;
        enum kernel_type type = activation ? current->act : block->type;
        if (block->device == NULL)
            upload(block, type);
        assert_int_equal(block->device_type, type);
        return block->device +
               (size_t)(at - block->raw) / kernel_type_size(block->type) * element_bytes(block);
    }
    if (at != NULL)
        fail_msg("%s: an op was handed memory of no array", current->label);
    return NULL;
}

static bool is_activation(const void *pointer)
{
    for (int i = 0; i < current->n_blocks; i++)
        if (current->blocks[i].raw + GUARD_BYTES == pointer)
            return current->blocks[i].activation;
    return false;
}

static int finish(int status)
{
    int waited = kernels_cuda()->synchronize(the_device);
    for (int i = 0; i < current->n_blocks; i++)
        if (current->blocks[i].device != NULL)
            download(&current->blocks[i]);
    return status == KERNEL_OK ? waited : status;
}

/* ---- the ops: R for what has the same type everywhere, A for activations ---- */

#define R(member) (m.member = mirrored(m.member, false))
#define A(member) (m.member = mirrored(m.member, true))
#define MIRROR(op, ...)                                                                                      \
    static int mirror_##op(struct kernel_device *device, const struct op##_args *args)                       \
    {                                                                                                        \
        struct op##_args m = *args;                                                                          \
        m.act = args->act == TYPE_F32 ? current->act : args->act;                                            \
        __VA_ARGS__;                                                                                         \
        return finish(kernels_cuda()->op(device, &m));                                                       \
    }

MIRROR(lora_forward, A(x), R(a), R(b), R(u), A(y))
MIRROR(linear_forward, A(x), R(layer.weight), R(layer.bias), R(layer.a), R(layer.b), A(u), A(y), R(workspace))
MIRROR(linear_backward, A(x), A(dy), A(u), A(du), A(dx), R(layer.weight), R(layer.a), R(layer.b), R(dweight),
       R(dbias), R(da), R(db), R(workspace))
MIRROR(embedding_forward, R(ids), R(table), R(lora_a), R(lora_b), A(y))
MIRROR(embedding_backward, R(ids), A(dy), R(dtable), R(lora_a), R(lora_b), R(da), R(db))
MIRROR(rmsnorm_forward, A(x), R(residual), R(weight), R(residual_out), A(kept), A(y), R(rstd))
MIRROR(rmsnorm_backward, A(dy), A(r), R(rstd), R(weight), R(dresidual), A(dx), R(dweight), R(workspace))
MIRROR(conv_forward, A(x), R(weight), R(bias), R(initial.pool), R(final.pool), A(y))
MIRROR(conv_backward, A(x), R(weight), R(bias), A(dy), A(dx), R(dweight), R(dbias))
MIRROR(scan_forward, A(x), A(dt), R(a), A(b), A(c), R(d), R(dt_bias), A(z), R(initial.pool), R(final.pool),
       R(chunk_states), A(y))
MIRROR(scan_backward, A(x), A(dt), A(b), A(c), A(z), R(a), R(d), R(dt_bias), R(chunk_states), A(dy), A(dx),
       A(ddt), A(dz), A(db), A(dc), A(y), R(da_log), R(dd), R(ddt_bias), R(workspace))
MIRROR(head, A(hidden), R(weight), R(targets), R(logprobs), R(argmax), R(top_ids), R(top_logprobs),
       R(loss_sum), R(n_correct), A(d_hidden), R(d_weight), R(workspace))

static int mirror_gemm(struct kernel_device *device, const struct gemm_args *args)
{
    struct gemm_args m = *args;
    m.act = args->act == TYPE_F32 ? current->act : args->act;
    m.b_type = is_activation(args->b) ? m.act : args->b_type;
    m.c_type = is_activation(args->c) ? m.act : TYPE_F32;
    A(a);
    m.b = mirrored(args->b, is_activation(args->b));
    m.c = mirrored(args->c, is_activation(args->c));
    return finish(kernels_cuda()->gemm(device, &m));
}

static int mirror_scan_prepare(struct kernel_device *device, const struct scan_prepare_args *args)
{
    struct scan_prepare_args m = *args;
    R(a_log);
    R(a);
    return finish(kernels_cuda()->scan_prepare(device, &m));
}

static int mirror_cast(struct kernel_device *device, void *to, enum kernel_type to_type, const void *from,
                       enum kernel_type from_type, int64_t count)
{
    return finish(
        kernels_cuda()->cast(device, mirrored(to, false), to_type, mirrored(from, false), from_type, count));
}

/* The parts of a slice that an op uses, for the sake of tests whose slices are no arrays of a session. */
static struct param_slice *mirrored_slices(const struct param_slice *slices, int32_t count)
{
    struct param_slice *copies = calloc((size_t)count + 1, sizeof(*copies));
    assert_non_null(copies);
    for (int32_t i = 0; i < count; i++) {
        struct param_slice m = slices[i];
        R(param);
        R(m);
        R(v);
        R(grad);
        R(copy);
        copies[i] = m;
    }
    return copies;
}

static int mirror_adamw(struct kernel_device *device, const struct adamw_args *args)
{
    struct adamw_args m = *args;
    struct param_slice *slices = mirrored_slices(args->slices, args->n_slices);
    m.slices = slices;
    int status = kernels_cuda()->adamw(device, &m);
    free(slices);
    return finish(status);
}

static int mirror_grad_norm(struct kernel_device *device, const struct grad_norm_args *args)
{
    struct grad_norm_args m = *args;
    struct param_slice *slices = mirrored_slices(args->slices, args->n_slices);
    m.slices = slices;
    R(sum);
    int status = kernels_cuda()->grad_norm(device, &m);
    free(slices);
    return finish(status);
}

/* Only the logits are on the device, and they need not be an array of the session. */
static int mirror_sample(struct kernel_device *device, const struct sample_args *args)
{
    const struct kernel_ops *cuda = kernels_cuda();
    struct sample_args m = *args;
    size_t bytes = args->rows > 0 ? (size_t)((args->rows - 1) * args->logits_stride + args->vocab) * 4 : 0;
    void *logits = NULL;
    assert_int_equal(cuda->memory_alloc(device, bytes, &logits), KERNEL_OK);
    assert_int_equal(cuda->copy_in(device, logits, args->logits, bytes), KERNEL_OK);
    m.logits = logits;
    int status = cuda->sample(device, &m);
    cuda->memory_free(device, logits);
    return status;
}

const struct kernel_ops *mirror_ops(void)
{
    static struct kernel_ops ops;
    if (kernels_cuda() == NULL)
        return NULL;
    ops = *kernels_cuda();
    ops.device_open = open_device;
    ops.device_close = close_device;
    ops.cast = mirror_cast;
    ops.gemm = mirror_gemm;
    ops.lora_forward = mirror_lora_forward;
    ops.linear_forward = mirror_linear_forward;
    ops.linear_backward = mirror_linear_backward;
    ops.embedding_forward = mirror_embedding_forward;
    ops.embedding_backward = mirror_embedding_backward;
    ops.rmsnorm_forward = mirror_rmsnorm_forward;
    ops.rmsnorm_backward = mirror_rmsnorm_backward;
    ops.conv_forward = mirror_conv_forward;
    ops.conv_backward = mirror_conv_backward;
    ops.scan_prepare = mirror_scan_prepare;
    ops.scan_forward = mirror_scan_forward;
    ops.scan_backward = mirror_scan_backward;
    ops.head = mirror_head;
    ops.adamw = mirror_adamw;
    ops.grad_norm = mirror_grad_norm;
    ops.sample = mirror_sample;
    return &ops;
}
