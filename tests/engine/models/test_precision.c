/* test_precision.c: training in tf32, bf16 and fp16 on a GPU: the official curves within 1% of fp32's losses, the same
 * bits every time and at every level of recomputation, the plan as large as what is allocated. */
#include "tests/engine/models/support.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_STEPS = 20 };

struct precision {
    const char *name;
    enum kernel_type act;
    bool tf32;
    float scale; /* of the loss */
};
static const struct precision precisions[] = {
    {"tf32", TYPE_F32, true, 1}, {"bf16", TYPE_BF16, false, 1}, {"fp16", TYPE_F16, false, 1024}};
enum { N_PRECISIONS = sizeof precisions / sizeof *precisions };

static double number(const json_t *json, const char *key)
{
    return json_number_value(json_object_get(json, key));
}

static struct adapter *curve_adapter(struct model *model, bool full)
{
    struct error error = {0};
    struct adapter *adapter = NULL;
    if (!full)
        return adapter_of_curve(model);
    check_ok(adapter_create(model, ADAPT_FULL, NULL, 0, &adapter, &error), &error);
    return adapter;
}

/* Train along a curve; the losses go to `losses`. */
static void train(struct model *model, const json_t *json, bool full, const struct precision *precision,
                  int64_t level, double losses[MAX_STEPS])
{
    struct error error = {0};
    const struct kernel_ops *ops = model_ops(model);
    struct adapter *adapter = curve_adapter(model, full);
    const json_t *batches = json_object_get(json, "batches"), *betas = json_object_get(json, "betas");
    struct param_slice *slices = calloc((size_t)adapter->n_parameters, sizeof *slices);
    struct adamw_args adamw = {.slices = slices,
                               .n_slices = (int32_t)adapter->n_parameters,
                               .lr = (float)number(json, "lr"),
                               .beta1 = (float)json_number_value(json_array_get(betas, 0)),
                               .beta2 = (float)json_number_value(json_array_get(betas, 1)),
                               .eps = (float)number(json, "eps"),
                               .weight_decay = (float)number(json, "weight_decay"),
                               .grad_scale = 1 / precision->scale};
    struct pass *pass = NULL;
    assert_non_null(slices);
    for (size_t step = 0; step < json_array_size(batches); step++) {
        struct batch *batch = curve_batch(json_array_get(batches, step));
        const struct plan_request request = {.max_tokens = batch->n_tokens,
                                             .max_seqs = batch->n_seqs,
                                             .act = precision->act,
                                             .tf32 = precision->tf32,
                                             .recompute = level};
        if (!pass)
            check_ok(pass_create(model, adapter, &request, &pass, &error), &error);
        for (int64_t i = 0; i < adapter->n_parameters; i++)
            slices[i] = adapter->parameters[i].slice;
        struct pass_options options = {
            .backward = true, .first = true, .grad_scale = precision->scale / (float)batch->n_targets};
        struct pass_result result;
        check_ok(pass_run(pass, batch, &options, &error), &error);
        check_ok(pass_collect(pass, NULL, 0, &result, &error), &error);
        losses[step] = result.loss_sum / (double)result.n_targets;
        adamw.step = (int64_t)step + 1;
        assert_int_equal(ops->adamw(model_device(model), &adamw), 0);
        drop_batch(batch);
    }
    pass_free(pass);
    adapter_free(adapter);
    free(slices);
}

static void check_curves(struct backend *backend, const char *vectors, bool full)
{
    struct model *model = open_model(backend, "models/hatchling");
    json_t *json = load_json(vectors);
    const json_t *expected = json_object_get(json, "losses");
    size_t n_steps = json_array_size(expected);
    assert_true(n_steps <= MAX_STEPS);
    for (int p = 0; p < N_PRECISIONS; p++) {
        double losses[MAX_STEPS], again[MAX_STEPS], worst = 0;
        train(model, json, full, &precisions[p], 0, losses);
        for (size_t step = 0; step < n_steps; step++) {
            double official = json_number_value(json_array_get(expected, step));
            double off = fabs(losses[step] - official) / official;
            worst = off > worst || isnan(off) ? off : worst;
        }
        printf("%s %s: losses within %.3f%% of fp32's\n", full ? "full" : "lora", precisions[p].name,
               100 * worst);
        assert_true(worst < 0.01);
        const int64_t levels[] = {0, 7, model_recompute_levels(model)};
        for (int i = 0; i < 3; i++) {
            train(model, json, full, &precisions[p], levels[i], again);
            assert_memory_equal(losses, again, n_steps * sizeof *losses);
        }
    }
    json_decref(json);
    model_close(model);
}

static void test_lora_curves(void **state)
{
    check_curves(*state, "tests/vectors/hatchling_train_lora.json", false);
}

static void test_full_curves(void **state)
{
    check_curves(*state, "tests/vectors/hatchling_train_full.json", true);
}

static int64_t replayed, stale;

/* Something else of the process takes memory that ops share: what was recorded before is no longer good. */
static void move_shared_memory(struct kernel_device *device)
{
    enum { ROWS = 8, SIZE = 4096 }; /* a weight to be converted that is larger than any before */
    const struct kernel_ops *ops = kernels_cuda();
    struct gemm_args gemm = {
        .m = ROWS, .n = SIZE, .k = SIZE, .alpha = 1, .act = TYPE_BF16, .b_type = TYPE_F32};
    const size_t bytes = (SIZE + 2 * ROWS) * SIZE * sizeof(float);
    void *memory = NULL;
    gemm.a_stride = gemm.b_stride = gemm.c_stride = SIZE;
    gemm.c_type = TYPE_BF16;
    assert_int_equal(ops->memory_alloc(device, bytes, &memory), 0);
    assert_int_equal(ops->zero(device, memory, bytes), 0);
    gemm.b = memory;
    gemm.a = (float *)memory + SIZE * SIZE;
    gemm.c = (float *)memory + (SIZE + ROWS) * SIZE;
    assert_int_equal(ops->gemm(device, &gemm), 0);
    ops->memory_free(device, memory);
}

static int count_replay(struct kernel_device *device, const struct kernel_recording *recording)
{
    if (++replayed == 40) /* in the second pass that runs what was recorded */
        move_shared_memory(device);
    int status = kernels_cuda()->record_run(device, recording);
    stale += status == KERNEL_UNSUPPORTED;
    return status;
}

/* Layers that are recorded and run again give the bits that they give op by op. */
static void test_replay(void **state)
{
    struct backend *backend = *state;
    struct kernel_ops counting = *backend->ops, plain = *backend->ops;
    counting.record_run = count_replay;
    plain.record_begin = NULL;
    for (int full = 0; full < 2; full++) {
        json_t *json = load_json(full ? "tests/vectors/hatchling_train_full.json"
                                      : "tests/vectors/hatchling_train_lora.json");
        struct model *one = open_model(&(struct backend){&plain, backend->device}, "models/hatchling");
        struct model *other = open_model(&(struct backend){&counting, backend->device}, "models/hatchling");
        for (int p = 0; p < N_PRECISIONS; p++) {
            double losses[MAX_STEPS] = {0}, again[MAX_STEPS] = {0};
            replayed = 0;
            train(one, json, full, &precisions[p], 0, losses);
            assert_int_equal(replayed, 0);
            train(other, json, full, &precisions[p], 0, again);
            assert_true(replayed >= 2 * model_config(other)->n_layers);
            assert_memory_equal(losses, again, sizeof losses);
        }
        model_close(one);
        model_close(other);
        json_decref(json);
    }
    assert_true(stale > 0);
}

/* What the plan says is what is taken from the device, converted weights included. */
static void test_plan(void **state)
{
    struct backend *backend = *state;
    struct error error = {0};
    struct model *model = open_model(backend, "models/hatchling");
    for (int full = 0; full < 2; full++) {
        for (int p = 0; p < N_PRECISIONS; p++) {
            const struct plan_request request = {
                .adaptation = full ? ADAPT_FULL : ADAPT_LORA,
                .lora = {.targets = TARGETS_ALL, .rank = 8, .alpha = 8},
                .max_tokens = 300,
                .max_seqs = 4,
                .act = precisions[p].act,
                .tf32 = precisions[p].tf32,
            };
            struct kernel_device_info before, after;
            struct memory_plan plan;
            struct adapter *adapter = NULL;
            struct pass *pass = NULL;
            check_ok(model_plan(model, &request, &plan, &error), &error);
            assert_int_equal(backend->ops->device_query(backend->device, &before), 0);
            check_ok(adapter_create(model, request.adaptation, &request.lora, 1, &adapter, &error), &error);
            check_ok(pass_create(model, adapter, &request, &pass, &error), &error);
            assert_int_equal(backend->ops->device_query(backend->device, &after), 0);
            assert_int_equal(after.allocated_bytes - before.allocated_bytes, plan.total_bytes);
            pass_free(pass);
            adapter_free(adapter);
        }
    }
    model_close(model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_lora_curves), cmocka_unit_test(test_full_curves),
                                       cmocka_unit_test(test_replay), cmocka_unit_test(test_plan)};
    if (!cuda_wanted()) {
        printf("skipped: ADDERD_TEST_CUDA=1 asks for a GPU, the CPU computes in fp32 alone\n");
        return 77;
    }
    return cmocka_run_group_tests_name("cuda", tests, open_cuda, close_backend);
}
