/* Types, conversions, random numbers, the thread pool, what an op says to arguments that cannot be. */
#include "tests/kernels/harness.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "kernels/cpu/convert.h"
#include "kernels/philox.h"

static void test_names(void **state)
{
    (void)state;
    assert_int_equal(kernel_type_size(TYPE_F32), 4);
    assert_int_equal(kernel_type_size(TYPE_BF16), 2);
    assert_int_equal(kernel_type_size(TYPE_F16), 2);
    assert_int_equal(kernel_type_size(TYPE_I32), 4);
    assert_string_equal(kernel_type_name(TYPE_BF16), "bfloat16");
    assert_string_equal(kernel_type_name((enum kernel_type)99), "unknown");
    for (int status = KERNEL_DEVICE_LOST - 1; status <= 1; status++)
        assert_non_null(kernel_status_text(status));
}

/* Random123's known answers for philox4x32 with 10 rounds. */
static void test_philox(void **state)
{
    (void)state;
    static const struct {
        uint32_t counter[4], key[2], expected[4];
    } answers[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof(answers) / sizeof(answers[0]); i++) {
        uint32_t words[4];
        philox_block(answers[i].key, answers[i].counter, words);
        assert_memory_equal(words, answers[i].expected, sizeof(words));
    }
    assert_true(philox_uniform(0, 0) == (float)(0x6627e8d5 >> 8) * 0x1p-24f);

    const uint32_t key[2] = {0x11, 0x22}, counter[4] = {0x33, 0x44, 0, 0};
    uint32_t words[4];
    philox_block(key, counter, words);
    assert_true(philox_uniform(0x2200000011, 0x4400000033) == (float)(words[0] >> 8) * 0x1p-24f);

    double sum = 0;
    for (uint64_t i = 0; i < 100000; i++) {
        float u = philox_uniform(42, i);
        assert_true(u >= 0 && u < 1);
        sum += (double)u;
    }
    assert_true(fabs(sum / 100000 - 0.5) < 0.004);
}

static void test_half_conversions(void **state)
{
    (void)state;
    static const struct {
        float value;
        uint16_t f16, bf16;
    } known[] = {
        {0.0f, 0x0000, 0x0000},           {-0.0f, 0x8000, 0x8000},
        {1.0f, 0x3c00, 0x3f80},           {-2.0f, 0xc000, 0xc000},
        {65504.0f, 0x7bff, 0x4780},       {65519.0f, 0x7bff, 0x4780},
        {65520.0f, 0x7c00, 0x4780},       {0x1p-14f, 0x0400, 0x3880},
        {0x1p-24f, 0x0001, 0x3380},       {0x1p-25f, 0x0000, 0x3300},
        {0x1.8p-24f, 0x0002, 0x33c0},     {0x1.000002p-25f, 0x0001, 0x3300},
        {INFINITY, 0x7c00, 0x7f80},       {-INFINITY, 0xfc00, 0xff80},
        {1.00048828125f, 0x3c00, 0x3f80}, {1.00146484375f, 0x3c02, 0x3f80},
        {1.00390625f, 0x3c04, 0x3f80},    {1.01171875f, 0x3c0c, 0x3f82},
        {3.4e38f, 0x7c00, 0x7f80},        {0x1p-140f, 0x0000, 0x0000 + (1 << 16 >> 16 >> 7)},
    };
    for (size_t i = 0; i + 1 < sizeof(known) / sizeof(known[0]); i++) {
        assert_int_equal(f16_from_float(known[i].value), known[i].f16);
        assert_int_equal(bf16_from_float(known[i].value), known[i].bf16);
    }
    for (uint32_t h = 0; h < 0x10000; h++) { /* every value of either type comes back */
        float f = f16_to_float((uint16_t)h), b = bf16_to_float((uint16_t)h);
        if (isnan(f))
            assert_true(isnan(f16_to_float(f16_from_float(f))));
        else
            assert_int_equal(f16_from_float(f), h);
        if (isnan(b))
            assert_true(isnan(bf16_to_float(bf16_from_float(b))));
        else
            assert_int_equal(bf16_from_float(b), h);
    }
}

/* NaN and infinity survive every conversion at every place in a vector. */
static void test_cast_not_finite(void **state)
{
    (void)state;
    static const enum kernel_type types[] = {TYPE_F32, TYPE_BF16, TYPE_F16};
    struct session s;
    for (enum cpu_isa isa = CPU_PLAIN; isa <= cpu_isa_detect(); isa++) {
        session_open(&s, cpu_ops_of(isa), 2);
        for (int i = 0; i < 9; i++) {
            float values[37] = {0}, back[37];
            uint32_t mid[37], to[37];
            for (int at = 0; at < 37; at++) {
                uint32_t payload = 0xff800001; /* a signalling NaN whose payload lies in the low bits */
                memcpy(&values[at], &payload, 4);
                values[(at + 1) % 37] = -INFINITY;
                assert_int_equal(s.ops->cast(s.device, mid, types[i % 3], values, TYPE_F32, 37), KERNEL_OK);
                assert_int_equal(s.ops->cast(s.device, to, types[i / 3], mid, types[i % 3], 37), KERNEL_OK);
                assert_int_equal(s.ops->cast(s.device, back, TYPE_F32, to, types[i / 3], 37), KERNEL_OK);
                for (int j = 0; j < 37; j++)
                    assert_true(j == at              ? isnan(back[j])
                                : j == (at + 1) % 37 ? back[j] == -INFINITY
                                                     : back[j] == 0);
                values[at] = values[(at + 1) % 37] = 0;
            }
        }
        session_close(&s);
    }
}

static void test_chunk_count(void **state)
{
    (void)state;
    const int32_t lengths[] = {0, 0, 1, 64, 129, 193};
    assert_int_equal(scan_chunk_count(lengths, 5), 0 + 1 + 1 + 2 + 1);
    assert_int_equal(scan_chunk_count(lengths, 0), 0);
}

enum { TASKS = 1000 };
struct tally {
    int32_t counts[TASKS], threads[TASKS];
    _Atomic int32_t running[8];
    _Atomic bool overlap;
    int n_threads;
};

static void tally_task(void *arg, int64_t index, int thread)
{
    struct tally *tally = arg;
    if (thread < 0 || thread >= tally->n_threads || atomic_fetch_add(&tally->running[thread], 1) != 0)
        atomic_store(&tally->overlap, true);
    tally->counts[index]++;
    tally->threads[index] = thread;
    atomic_fetch_sub(&tally->running[thread], 1);
}

/* Every index once, whatever the number of tasks and threads, awake or asleep. */
static void test_parallel(void **state)
{
    (void)state;
    static const int64_t sizes[] = {0, 1, 2, 3, 7, 100, TASKS};
    for (int threads = 1; threads <= 5; threads++) {
        struct session s;
        session_open(&s, kernels_cpu(), threads);
        for (int round = 0; round < 400; round++) {
            struct tally tally = {.n_threads = threads};
            int64_t n = sizes[round % 7];
            if (round % 80 == 0)
                nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
            cpu_parallel(s.device, n, tally_task, &tally);
            for (int64_t i = 0; i < TASKS; i++)
                assert_int_equal(tally.counts[i], i < n);
            assert_false(atomic_load(&tally.overlap));
        }
        session_close(&s);
    }
}

static void slow_task(void *arg, int64_t index, int thread)
{
    (void)index;
    (void)thread;
    nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    atomic_fetch_add((_Atomic int *)arg, 1);
}

/* The owner sleeps while others work, and comes back. */
static void test_parallel_slow_tasks(void **state)
{
    (void)state;
    struct session s;
    session_open(&s, kernels_cpu(), 3);
    for (int round = 0; round < 10; round++) {
        _Atomic int done = 0;
        cpu_parallel(s.device, 4, slow_task, &done);
        assert_int_equal(atomic_load(&done), 4);
    }
    session_close(&s);
}

static void test_device(void **state)
{
    (void)state;
    const struct kernel_ops *ops = kernels_cpu();
    struct kernel_device *device = NULL;
    assert_int_equal(ops->device_open(1, 1, &device), KERNEL_INVALID);
    assert_int_equal(ops->device_open(0, -1, &device), KERNEL_INVALID);
    assert_null(device);
    assert_int_equal(ops->device_open(0, 0, &device), KERNEL_OK);
    struct kernel_device_info info;
    assert_int_equal(ops->device_query(device, &info), KERNEL_OK);
    assert_true(info.threads >= 1 && info.is_host);
    assert_true(info.total_bytes > 0 && info.free_bytes > 0 && info.free_bytes <= info.total_bytes);
    assert_memory_equal(info.name, "cpu (", 5);

    double seconds = -1;
    assert_int_equal(ops->mark(device, 0), KERNEL_OK);
    assert_int_equal(ops->mark(device, KERNEL_MARKS - 1), KERNEL_OK);
    assert_int_equal(ops->mark_seconds(device, 0, KERNEL_MARKS - 1, &seconds), KERNEL_OK);
    assert_true(seconds >= 0 && seconds < 10);
    assert_int_equal(ops->mark(device, KERNEL_MARKS), KERNEL_INVALID);
    assert_int_equal(ops->mark_seconds(device, -1, 0, &seconds), KERNEL_INVALID);

    void *pointer = NULL;
    assert_int_equal(ops->memory_alloc(device, 1001, &pointer), KERNEL_OK);
    assert_int_equal((uintptr_t)pointer % 64, 0);
    assert_int_equal(ops->zero(device, pointer, 1001), KERNEL_OK);
    assert_int_equal(ops->copy_in(device, pointer, "adder", 5), KERNEL_OK);
    char text[6] = {0};
    assert_int_equal(ops->copy_out(device, text, pointer, 5), KERNEL_OK);
    assert_string_equal(text, "adder");
    int64_t before = info.allocated_bytes;
    assert_int_equal(ops->device_query(device, &info), KERNEL_OK);
    assert_true(info.allocated_bytes >= before + 1001 && info.peak_bytes >= info.allocated_bytes);
    ops->memory_free(device, pointer);
    assert_int_equal(ops->device_query(device, &info), KERNEL_OK);
    assert_int_equal(info.allocated_bytes, before);
    assert_true(info.peak_bytes >= before + 1001);
    ops->device_reset_peak(device);
    assert_int_equal(ops->device_query(device, &info), KERNEL_OK);
    assert_int_equal(info.peak_bytes, before);
    void *none = NULL;
    assert_int_equal(ops->memory_alloc(device, 0, &pointer), KERNEL_OK);
    ops->memory_free(device, pointer);
    assert_int_equal(ops->memory_alloc(device, SIZE_MAX - 1, &none), KERNEL_NO_MEMORY);
    assert_null(none);
    assert_int_equal(ops->synchronize(device), KERNEL_OK);
    ops->device_close(device);
    ops->device_close(NULL);
}

/* The host's array is the caller's again when copy_in returns, whether it was small or not. */
static void test_copies(void **state)
{
    (void)state;
    enum { MOST = 3 << 20, ROUNDS = 40 };
    static const size_t sizes[] = {1, 255, 4096, 256 << 10, (256 << 10) + 1, 1 << 20, 100000};
    struct session s;
    session_open(&s, best_backend(), 2);
    struct kernel_device_info before, now;
    void *device = NULL;
    unsigned char *host = malloc(MOST), *expected = calloc(1, MOST);
    assert_non_null(host);
    assert_non_null(expected);
    assert_int_equal(s.ops->device_query(s.device, &before), KERNEL_OK);
    assert_int_equal(s.ops->memory_alloc(s.device, MOST, &device), KERNEL_OK);
    assert_int_equal(s.ops->device_query(s.device, &now), KERNEL_OK);
    assert_true(now.allocated_bytes >= before.allocated_bytes + MOST &&
                now.peak_bytes >= now.allocated_bytes);
    assert_int_equal(s.ops->zero(s.device, device, MOST), KERNEL_OK);
    for (int round = 0; round < ROUNDS; round++) {
        size_t size = sizes[round % 7], at = random_next(&s) % (MOST - size);
        memset(host, round + 1, size);
        memset(expected + at, round + 1, size);
        assert_int_equal(s.ops->copy_in(s.device, (char *)device + at, host, size), KERNEL_OK);
        memset(host, 0xee, size);
        if (round % 5 == 4) {
            assert_int_equal(s.ops->copy_out(s.device, host, (char *)device + at, size), KERNEL_OK);
            assert_memory_equal(host, expected + at, size);
        }
    }
    assert_int_equal(s.ops->copy_out(s.device, host, device, MOST), KERNEL_OK);
    assert_memory_equal(host, expected, MOST);
    s.ops->memory_free(s.device, device);
    s.ops->device_reset_peak(s.device);
    assert_int_equal(s.ops->device_query(s.device, &now), KERNEL_OK);
    assert_true(now.allocated_bytes < before.allocated_bytes + MOST && now.peak_bytes == now.allocated_bytes);
    free(expected);
    free(host);
    session_close(&s);
}

/* Arrays of the host that come again, among more of them than a device remembers, with nothing waited for. */
static void test_arrays_that_come_again(void **state)
{
    (void)state;
    enum { LISTS = 41, COUNT = 100, ROUNDS = 3 };
    struct session s;
    session_open(&s, best_backend(), 2);
    /* The pointers here are the device's own, not the mirror's. */
    const struct kernel_ops *ops = best_backend() == kernels_cpu() ? kernels_cpu() : kernels_cuda();
    void *memory = NULL;
    assert_int_equal(ops->memory_alloc(s.device, LISTS * 4 * COUNT * sizeof(float), &memory), KERNEL_OK);
    assert_int_equal(ops->zero(s.device, memory, LISTS * 4 * COUNT * sizeof(float)), KERNEL_OK);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < LISTS; i++) {
            int list = round == 1 ? LISTS - 1 - i : i;
            float *at = (float *)memory + (size_t)list * 4 * COUNT;
            struct param_slice slices[2];
            for (int j = 0; j < 2; j++)
                slices[j] = (struct param_slice){.count = COUNT / 2,
                                                 .param = at + j * COUNT / 2,
                                                 .m = at + COUNT + j * COUNT / 2,
                                                 .v = at + 2 * COUNT + j * COUNT / 2,
                                                 .grad = at + 3 * COUNT + j * COUNT / 2};
            struct adamw_args a = {
                .slices = slices, .n_slices = 1 + list % 2, .lr = 1, .beta1 = 0, .beta2 = 0};
            a.eps = 1, a.step = 1, a.grad_scale = 1;
            float ones[COUNT];
            for (int j = 0; j < COUNT; j++)
                ones[j] = 1.0f;
            assert_int_equal(ops->copy_in(s.device, at + 3 * COUNT, ones, sizeof(ones)), KERNEL_OK);
            assert_int_equal(ops->adamw(s.device, &a), KERNEL_OK);
        }
    }
    for (int list = 0; list < LISTS; list++) { /* each step is by g / (|g| + eps) = 1/2 */
        float p[COUNT];
        assert_int_equal(ops->copy_out(s.device, p, (float *)memory + (size_t)list * 4 * COUNT, sizeof(p)),
                         KERNEL_OK);
        for (int j = 0; j < COUNT; j++)
            assert_true(p[j] == (j < COUNT / 2 || list % 2 == 1 ? -0.5f * ROUNDS : 0.0f));
    }
    ops->memory_free(s.device, memory);
    session_close(&s);
}

/* A recording does again what was recorded, with what memory holds then and host arrays as they were. */
static void test_recording(void **state)
{
    (void)state;
    enum { COUNT = 100, RUNS = 3, MANY = 100000 };
    const struct kernel_ops *ops = best_backend() == kernels_cpu() ? kernels_cpu() : kernels_cuda();
    if (!ops->record_begin)
        skip();
    struct session s;
    session_open(&s, best_backend(), 2);
    struct kernel_device *device = s.device;
    struct kernel_recording *recording = NULL, *refused = NULL;
    void *memory = NULL;
    float values[COUNT];
    for (int i = 0; i < COUNT; i++)
        values[i] = 1.0f;
    assert_int_equal(ops->memory_alloc(device, (MANY + 2) * sizeof(float), &memory), KERNEL_OK);
    assert_int_equal(ops->zero(device, memory, MANY * sizeof(float)), KERNEL_OK);
    float *param = memory, *ones = param + 4 * COUNT;
    struct param_slice slice = {.count = COUNT,
                                .param = param,
                                .m = param + COUNT,
                                .v = param + 2 * COUNT,
                                .grad = param + 3 * COUNT};
    const struct adamw_args adamw = {
        .slices = &slice, .n_slices = 1, .lr = 1, .eps = 1, .step = 1, .grad_scale = 1};
    assert_int_equal(ops->copy_in(device, ones, values, sizeof values), KERNEL_OK);
    assert_int_equal(ops->record_end(device, &recording), KERNEL_INVALID);

    assert_int_equal(ops->record_begin(device), KERNEL_OK);
    assert_int_equal(ops->record_begin(device), KERNEL_INVALID);
    assert_int_equal(ops->record_end(device, &recording), KERNEL_INVALID);
    assert_int_equal(ops->record_begin(device), KERNEL_OK);
    assert_int_equal(ops->copy_in(device, ones, values, sizeof values), KERNEL_INVALID);
    assert_int_equal(ops->record_end(device, &refused), KERNEL_INVALID);
    assert_int_equal(ops->record_begin(device), KERNEL_OK);
    assert_int_equal(ops->copy(device, slice.grad, ones, sizeof values), KERNEL_OK);
    assert_int_equal(ops->adamw(device, &adamw), KERNEL_OK);
    assert_int_equal(ops->record_end(device, &recording), KERNEL_OK);
    slice = (struct param_slice){.count = COUNT};
    for (int run = 0; run < RUNS; run++)
        assert_int_equal(ops->record_run(device, recording), KERNEL_OK);
    assert_int_equal(ops->copy_out(device, values, param, sizeof values), KERNEL_OK);
    for (int i = 0; i < COUNT; i++)
        assert_true(values[i] == -0.5f * RUNS); /* each step is by g / (|g| + eps) = 1/2 */

    slice = (struct param_slice){.count = MANY, .grad = memory};
    const struct grad_norm_args norm = {
        .slices = &slice, .n_slices = 1, .sum = (double *)(void *)(param + MANY)};
    assert_int_equal(ops->grad_norm(device, &norm),
                     KERNEL_OK); /* takes memory that it shares with other ops */
    assert_int_equal(ops->record_run(device, recording), KERNEL_UNSUPPORTED);
    ops->record_free(device, recording);
    ops->memory_free(device, memory);
    session_close(&s);
}

/* What cannot be is refused before anything is touched: all pointers here are null. */
static void test_refusals(void **state)
{
    (void)state;
    const struct kernel_ops *const backends[] = {kernels_reference(), kernels_cpu()};
    const int32_t starts[] = {0, 3, 2};
    for (int i = 0; i < 2; i++) {
        struct session s;
        session_open(&s, backends[i], 1);
        struct gemm_args gemm = {.m = 2, .n = 2, .k = 2, .a_stride = 1, .b_stride = 2, .c_stride = 2};
        assert_int_equal(s.ops->gemm(s.device, &gemm), KERNEL_INVALID);
        gemm.a_stride = 2;
        gemm.act = TYPE_BF16;
        assert_int_equal(s.ops->gemm(s.device, &gemm), KERNEL_UNSUPPORTED);
        gemm.act = TYPE_F32;
        gemm.b_type = TYPE_I32;
        assert_int_equal(s.ops->gemm(s.device, &gemm), KERNEL_UNSUPPORTED);
        struct lora_forward_args lora = {
            .rows = 1, .in = 1, .out = 1, .rank = 1, .x_stride = 1, .y_stride = 1};
        lora.dropout = 1.0f;
        assert_int_equal(s.ops->lora_forward(s.device, &lora), KERNEL_INVALID);
        struct linear_forward_args linear = {
            .rows = 1, .layer = {.in = 2, .out = 1}, .x_stride = 1, .y_stride = 1};
        assert_int_equal(s.ops->linear_forward(s.device, &linear), KERNEL_INVALID);
        linear.x_stride = 2;
        linear.act = TYPE_F16;
        assert_int_equal(s.ops->linear_forward(s.device, &linear), KERNEL_UNSUPPORTED);
        struct linear_backward_args back = {.rows = 1, .layer = {.in = 1, .out = 1}, .dy_stride = 1};
        back.dx = &s;
        assert_int_equal(s.ops->linear_backward(s.device, &back), KERNEL_INVALID);
        struct rmsnorm_forward_args norm = {.rows = -1, .d = 4};
        assert_int_equal(s.ops->rmsnorm_forward(s.device, &norm), KERNEL_INVALID);
        struct conv_forward_args conv = {.tokens = 2, .n_seqs = 2, .seq_starts = starts, .width = 4};
        assert_int_equal(s.ops->conv_forward(s.device, &conv), KERNEL_INVALID);
        struct scan_forward_args scan = {
            .tokens = 2, .n_seqs = 2, .seq_starts = starts, .d_state = 4, .b_stride = 4, .c_stride = 4};
        assert_int_equal(s.ops->scan_forward(s.device, &scan), KERNEL_INVALID);
        struct head_args head = {.rows = 1, .d_model = 4, .vocab = 4, .workspace_bytes = 0};
        assert_int_equal(s.ops->head(s.device, &head), KERNEL_INVALID);
        struct adamw_args adamw = {.step = 0};
        assert_int_equal(s.ops->adamw(s.device, &adamw), KERNEL_INVALID);
        assert_int_equal(s.ops->cast(s.device, NULL, TYPE_I32, NULL, TYPE_F32, 1), KERNEL_UNSUPPORTED);
        session_close(&s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_philox),
        cmocka_unit_test(test_half_conversions),
        cmocka_unit_test(test_cast_not_finite),
        cmocka_unit_test(test_chunk_count),
        cmocka_unit_test(test_parallel),
        cmocka_unit_test(test_parallel_slow_tasks),
        cmocka_unit_test(test_device),
        cmocka_unit_test(test_copies),
        cmocka_unit_test(test_arrays_that_come_again),
        cmocka_unit_test(test_recording),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
