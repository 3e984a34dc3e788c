#include "tests/kernels/harness.h"

#include <stdio.h>

#include "tests/kernels/mirror.h"

uint64_t random_next(struct session *session)
{
    uint64_t z = session->random += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

float random_float(struct session *session, float low, float high)
{
    return low + (high - low) * ((float)(random_next(session) >> 40) * 0x1p-24f);
}

void session_open(struct session *session, const struct kernel_ops *ops, int threads)
{
    memset(session, 0, sizeof(*session));
    session->ops = ops;
    session->random = 2024;
    mirror_enter(session);
    assert_int_equal(ops->device_open(0, threads, &session->device), KERNEL_OK);
}

void session_close(struct session *session)
{
    for (int i = 0; i < session->n_blocks; i++) {
        free(session->blocks[i].allocation);
        free(session->blocks[i].before);
    }
    session->ops->device_close(session->device);
}

static void fill_sentinels(unsigned char *at, size_t bytes)
{
    const uint32_t sentinel = SENTINEL;
    for (size_t i = 0; i < bytes; i += 4)
        memcpy(at + i, &sentinel, bytes - i < 4 ? bytes - i : 4);
}

/* Every other array lies 4 bytes off a cache line, unless all are to be aligned: an op is handed slices and may count on
 * nothing better. */
static void *add_block(struct session *session, const char *name, enum block_kind kind, enum kernel_type type,
                       int64_t rows, int64_t columns, int64_t stride)
{
    assert_true(session->n_blocks < BLOCKS_MAX);
    struct block *block = &session->blocks[session->n_blocks++];
    *block = (struct block){
        .name = name, .kind = kind, .type = type, .rows = rows, .columns = columns, .stride = stride};
    int64_t elements = rows > 0 ? (rows - 1) * stride + columns : 0;
    block->bytes = (size_t)elements * kernel_type_size(type);
    size_t total = block->bytes + 2 * GUARD_BYTES;
    block->allocation = aligned_alloc(64, (total + 4 + 63) / 64 * 64);
    assert_non_null(block->allocation);
    bool off = !session->aligned && kind != BLOCK_SCRATCH && session->n_blocks % 2 == 1;
    block->raw = block->allocation + (off ? 4 : 0);
    fill_sentinels(block->raw, total);
    return block->raw + GUARD_BYTES;
}

/* To be called when the content stands. */
static void keep_copy(struct session *session)
{
    struct block *block = &session->blocks[session->n_blocks - 1];
    size_t total = block->bytes + 2 * GUARD_BYTES;
    block->before = malloc(total);
    assert_non_null(block->before);
    memcpy(block->before, block->raw, total);
}

static void cast(void *to, enum kernel_type to_type, const void *from, enum kernel_type from_type,
                 int64_t count)
{
    assert_int_equal(kernels_reference()->cast(NULL, to, to_type, from, from_type, count), KERNEL_OK);
}

/* A row of random numbers in the type of the activations, so that nothing is lost when an array becomes one. */
static void random_row(struct session *session, float *row, int64_t columns, float low, float high)
{
    uint16_t half[256];
    for (int64_t c = 0; c < columns; c++)
        row[c] = random_float(session, low, high);
    for (int64_t c = 0; session->act != TYPE_F32 && c < columns; c += 256) {
        int64_t count = columns - c < 256 ? columns - c : 256;
        cast(half, session->act, row + c, TYPE_F32, count);
        cast(row + c, TYPE_F32, half, session->act, count);
    }
}

float *input_rows(struct session *session, const char *name, int64_t rows, int64_t columns, int64_t stride,
                  float low, float high)
{
    float *data = add_block(session, name, BLOCK_INPUT, TYPE_F32, rows, columns, stride);
    for (int64_t r = 0; r < rows; r++)
        random_row(session, data + r * stride, columns, low, high);
    keep_copy(session);
    return data;
}

float *input_floats(struct session *session, const char *name, int64_t count, float low, float high)
{
    return input_rows(session, name, 1, count, count, low, high);
}

void *input_weights(struct session *session, const char *name, enum kernel_type type, int64_t rows,
                    int64_t columns, int64_t stride, float low, float high)
{
    char *data = add_block(session, name, BLOCK_INPUT, type, rows, columns, stride);
    float *row = malloc((size_t)columns * sizeof *row + 1);
    assert_non_null(row);
    for (int64_t r = 0; r < rows; r++) {
        random_row(session, row, columns, low, high);
        cast(data + (size_t)(r * stride) * kernel_type_size(type), type, row, TYPE_F32, columns);
    }
    free(row);
    keep_copy(session);
    return data;
}

int32_t *input_ids(struct session *session, const char *name, int64_t count, int32_t low, int32_t high)
{
    int32_t *data = add_block(session, name, BLOCK_INPUT, TYPE_I32, 1, count, count);
    for (int64_t i = 0; i < count; i++)
        data[i] = low + (int32_t)(random_next(session) % (uint64_t)(high - low));
    keep_copy(session);
    return data;
}

void mark_activation(struct session *session, const void *array)
{
    for (int i = 0; i < session->n_blocks; i++)
        if (session->blocks[i].raw + GUARD_BYTES == array)
            session->blocks[i].activation = true;
}

void inputs_settle(struct session *session)
{
    for (int i = 0; i < session->n_blocks; i++)
        memcpy(session->blocks[i].before, session->blocks[i].raw, session->blocks[i].bytes + 2 * GUARD_BYTES);
}

float *output_rows(struct session *session, const char *name, int64_t rows, int64_t columns, int64_t stride,
                   double tolerance)
{
    float *data = add_block(session, name, BLOCK_OUTPUT, TYPE_F32, rows, columns, stride);
    session->blocks[session->n_blocks - 1].tolerance = tolerance;
    keep_copy(session);
    return data;
}

float *output_floats(struct session *session, const char *name, int64_t count, double tolerance)
{
    return output_rows(session, name, 1, count, count, tolerance);
}

int32_t *output_ids(struct session *session, const char *name, int64_t count)
{
    int32_t *data = add_block(session, name, BLOCK_OUTPUT, TYPE_I32, 1, count, count);
    keep_copy(session);
    return data;
}

float *accumulated_rows(struct session *session, const char *name, int64_t rows, int64_t columns,
                        int64_t stride, double tolerance)
{
    float *data = input_rows(session, name, rows, columns, stride, -1, 1);
    session->blocks[session->n_blocks - 1].kind = BLOCK_OUTPUT;
    session->blocks[session->n_blocks - 1].tolerance = tolerance;
    return data;
}

void *scratch_bytes(struct session *session, const char *name, int64_t bytes)
{
    int64_t count = (bytes + 3) / 4;
    void *data = add_block(session, name, BLOCK_SCRATCH, TYPE_F32, 1, count, count);
    keep_copy(session);
    return data;
}

int32_t *cut_tokens(struct session *session, enum cut cut, int64_t tokens, int32_t *ret_n_seqs)
{
    static const int32_t lengths[] = {1, 63, 2, 64, 65, 3, 128, 5};
    int32_t *starts = add_block(session, "seq_starts", BLOCK_INPUT, TYPE_I32, 1, tokens + 4, tokens + 4);
    int32_t n = 0;
    starts[0] = 0;
    if (cut == CUT_EMPTY_ENDS)
        starts[++n] = 0;
    while (starts[n] < tokens) {
        int64_t length = tokens;
        if (cut == CUT_SINGLES)
            length = 1;
        else if (cut == CUT_MIXED)
            length = lengths[n % 8];
        else if (cut == CUT_SHORT)
            length = 1 + n % 8;
        int64_t end = starts[n] + length;
        starts[++n] = (int32_t)(end < tokens ? end : tokens);
    }
    if (cut == CUT_EMPTY_ENDS) {
        starts[n + 1] = starts[n];
        n++;
    }
    keep_copy(session);
    *ret_n_seqs = n;
    return starts;
}

int32_t *permuted_slots(struct session *session, int32_t count, bool shared)
{
    int32_t *slots = add_block(session, "slots", BLOCK_INPUT, TYPE_I32, 1, count, count);
    for (int32_t i = 0; i < count; i++)
        slots[i] = i;
    for (int32_t i = count - 1; i > 0; i--) {
        int32_t j = (int32_t)(random_next(session) % (uint64_t)(i + 1));
        int32_t other = slots[j];
        slots[j] = slots[i];
        slots[i] = other;
    }
    for (int32_t i = 1; i < count; i += 3)
        slots[i] = shared && i % 2 ? slots[0] : -1;
    keep_copy(session);
    return slots;
}

/* ---- checks ---- */

/* Bytes begin..end-1 of the block, counted from its first guard, are as they were. */
static void check_bytes(const struct session *session, const struct block *block, size_t begin, size_t end)
{
    if (memcmp(block->raw + begin, block->before + begin, end - begin) == 0)
        return;
    while (block->raw[begin] == block->before[begin])
        begin++;
    fail_msg("%s: byte %td of %s was written", session->label, (ptrdiff_t)begin - GUARD_BYTES, block->name);
}

/* Of what an op may change these are the guards and what lies between rows. */
static void check_block(const struct session *session, const struct block *block)
{
    size_t size = kernel_type_size(block->type), stride = (size_t)block->stride * size;
    size_t row = (size_t)block->columns * size, end = GUARD_BYTES + block->bytes;
    if (block->kind == BLOCK_INPUT || block->bytes == 0) {
        check_bytes(session, block, 0, end + GUARD_BYTES);
        return;
    }
    check_bytes(session, block, 0, GUARD_BYTES);
    for (size_t at = GUARD_BYTES; row < stride && at + stride < end; at += stride)
        check_bytes(session, block, at + row, at + stride);
    check_bytes(session, block, end, end + GUARD_BYTES);
}

static void compare_ids(const struct session *session, const struct block *block,
                        const struct block *expected)
{
    const int32_t *a = (const int32_t *)(block->raw + GUARD_BYTES);
    const int32_t *b = (const int32_t *)(expected->raw + GUARD_BYTES);
    for (int64_t i = 0; i < block->columns; i++)
        if (a[i] != b[i])
            fail_msg("%s: %s[%lld] is %d, not %d", session->label, block->name, (long long)i, a[i], b[i]);
}

static void compare_floats(const struct session *session, const struct block *block,
                           const struct block *expected)
{
    const float *a = (const float *)(block->raw + GUARD_BYTES);
    const float *b = (const float *)(expected->raw + GUARD_BYTES);
    double error = 0, scale = 0;
    for (int64_t r = 0; r < block->rows; r++) {
        for (int64_t c = 0; c < block->columns; c++) {
            double x = (double)a[r * block->stride + c], y = (double)b[r * block->stride + c];
            if (isnan(x) || isnan(y))
                fail_msg("%s: %s[%lld,%lld] is %g, not %g", session->label, block->name, (long long)r,
                         (long long)c, x, y);
            error += (x - y) * (x - y);
            scale += y * y;
        }
    }
    double tolerance = session->act == TYPE_BF16  ? BF16_ERROR
                       : session->act == TYPE_F16 ? F16_ERROR
                                                  : block->tolerance;
    double floor = session->act == TYPE_F16 ? F16_FLOOR * (double)(block->rows * block->columns) : 0;
    if (!(error <= tolerance * scale + floor))
        fail_msg("%s: %s has normalised error %.3g, more than %.3g", session->label, block->name,
                 error / scale, tolerance);
}

static void compare_sessions(const struct session *session, const struct session *expected, bool exactly)
{
    assert_int_equal(session->n_blocks, expected->n_blocks);
    for (int i = 0; i < session->n_blocks; i++) {
        const struct block *a = &session->blocks[i], *b = &expected->blocks[i];
        if (a->kind != BLOCK_OUTPUT)
            continue;
        if (exactly && memcmp(a->raw, b->raw, a->bytes + 2 * GUARD_BYTES) != 0)
            fail_msg("%s: %s differs from %s", session->label, a->name, expected->label);
        if (!exactly && a->type == TYPE_I32 && session->act == TYPE_F32)
            compare_ids(session, a, b);
        else if (!exactly && a->type != TYPE_I32)
            compare_floats(session, a, b);
    }
}

static void run_case(struct session *session, case_function function, const void *param, const char *label,
                     const char *how)
{
    snprintf(session->label, sizeof(session->label), "%s [%s]", label, how);
    mirror_enter(session);
    function(session, param);
    for (int i = 0; i < session->n_blocks; i++)
        check_block(session, &session->blocks[i]);
}

static bool small_wanted(void)
{
    const char *asked = getenv("ADDERD_TEST_SMALL");
    return asked != NULL && strcmp(asked, "1") == 0;
}

/* Whether this case is one of the few of a small run. */
static bool small_has(case_function function)
{
    static struct {
        case_function function;
        int count;
    } seen[32];
    int i = 0;
    while (seen[i].function != NULL && seen[i].function != function)
        i++;
    assert_true(i < 31);
    seen[i].function = function;
    int index = seen[i].count++;
    return (index & (index - 1)) == 0;
}

static void compare_cuda_aligned(case_function function, const void *param, const char *label,
                                 const struct session *reference, bool aligned)
{
    struct session first, second;
    char how[40];
    snprintf(how, sizeof(how), "CUDA, %s%s", kernel_type_name(reference->act), aligned ? ", aligned" : "");
    session_open(&first, mirror_ops(), 1);
    first.act = reference->act;
    first.aligned = aligned;
    run_case(&first, function, param, label, how);
    compare_sessions(&first, reference, false);
    if (!small_wanted()) {
        session_open(&second, mirror_ops(), 1);
        second.act = reference->act;
        second.aligned = aligned;
        run_case(&second, function, param, label, "CUDA again");
        compare_sessions(&second, &first, true);
        session_close(&second);
    }
    session_close(&first);
}

static void compare_cuda(case_function function, const void *param, const char *label)
{
    static const enum kernel_type types[] = {TYPE_F32, TYPE_BF16, TYPE_F16};
    for (int i = 0; i < 3; i++) {
        struct session reference;
        session_open(&reference, kernels_reference(), 1);
        reference.act = types[i];
        run_case(&reference, function, param, label, "reference");
        compare_cuda_aligned(function, param, label, &reference, false);
        compare_cuda_aligned(function, param, label, &reference, true);
        session_close(&reference);
    }
}

__attribute__((constructor)) static void choose_tests(void)
{
    const char *pattern = getenv("ADDERD_TEST_ONLY");
    if (pattern != NULL)
        cmocka_set_test_filter(pattern);
}

const struct kernel_ops *tested_backend(int index)
{
    if (mirror_wanted())
        return index == 0 ? mirror_ops() : NULL;
    return index <= (int)cpu_isa_detect() ? cpu_ops_of((enum cpu_isa)index) : NULL;
}

const struct kernel_ops *best_backend(void)
{
    return mirror_wanted() ? mirror_ops() : kernels_cpu();
}

void compare_backends(case_function function, const void *param, const char *format, ...)
{
    static const char *const isa_names[CPU_ISA_COUNT] = {"plain", "AVX2", "AVX-512"};
    char label[96], how[32];
    va_list args;
    va_start(args, format);
    vsnprintf(label, sizeof(label), format, args);
    va_end(args);

    if (small_wanted() && !small_has(function))
        return;
    if (mirror_wanted()) {
        compare_cuda(function, param, label);
        return;
    }
    struct session reference;
    session_open(&reference, kernels_reference(), 1);
    run_case(&reference, function, param, label, "reference");
    for (enum cpu_isa isa = CPU_PLAIN; isa <= cpu_isa_detect(); isa++) {
        struct session one, more;
        session_open(&one, cpu_ops_of(isa), 1);
        snprintf(how, sizeof(how), "%s, 1 thread", isa_names[isa]);
        run_case(&one, function, param, label, how);
        compare_sessions(&one, &reference, false);
        for (int threads = 2; threads <= 3; threads++) {
            session_open(&more, cpu_ops_of(isa), threads);
            snprintf(how, sizeof(how), "%s, %d threads", isa_names[isa], threads);
            run_case(&more, function, param, label, how);
            compare_sessions(&more, &one, true);
            session_close(&more);
        }
        session_close(&one);
    }
    session_close(&reference);
}
