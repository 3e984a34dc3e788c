/* test_curves.c: two fine-tunes of hatchling, step by step, against the official losses. On the fast backend
 * alone: the plain reference would take minutes. */
#include "tests/engine/models/support.h"

#include <math.h>
#include <string.h>

/* The batches' documents are rows of equal length; the loss is the mean over rows x (length - 1) targets. */
static struct batch *batch_of(const json_t *rows)
{
    size_t n_rows = json_array_size(rows), length = json_array_size(json_array_get(rows, 0));
    struct batch *batch = new_batch((int64_t)(n_rows * length), (int32_t)n_rows);
    int32_t ids[256];
    assert_true(length <= 256);
    for (size_t r = 0; r < n_rows; r++) {
        for (size_t t = 0; t < length; t++)
            ids[t] = (int32_t)json_integer_value(json_array_get(json_array_get(rows, r), t));
        batch_add(batch, ids, NULL, (int32_t)length);
    }
    return batch;
}

static double number(const json_t *json, const char *key)
{
    return json_number_value(json_object_get(json, key));
}

static void check_first_norms(struct adapter *adapter, const json_t *norms)
{
    assert_int_equal(json_object_size(norms), adapter->n_parameters);
    for (int64_t i = 0; i < adapter->n_parameters; i++) {
        const struct parameter *parameter = &adapter->parameters[i];
        const json_t *value = json_object_get(norms, parameter->name);
        if (!value)
            fail_msg("no expected norm of %s", parameter->name);
        double expected = json_number_value(value), sum;
        struct grad_norm_args args = {.slices = &parameter->slice, .n_slices = 1, .ret_sum = &sum};
        assert_int_equal(model_ops(adapter->model)->grad_norm(model_device(adapter->model), &args), 0);
        if (!(fabs(sqrt(sum) - expected) <= 1e-3 * expected))
            fail_msg("%s: gradient norm %g, expected %g", parameter->name, sqrt(sum), expected);
    }
}

static void check_curve(const struct backend *backend, const char *vectors, struct adapter *adapter)
{
    struct error error = {0};
    json_t *json = load_json(vectors), *batches = json_object_get(json, "batches");
    json_t *losses = json_object_get(json, "losses"), *betas = json_object_get(json, "betas");
    struct param_slice *slices = calloc((size_t)adapter->n_parameters, sizeof *slices);
    assert_non_null(slices);
    for (int64_t i = 0; i < adapter->n_parameters; i++)
        slices[i] = adapter->parameters[i].slice;
    struct adamw_args adamw = {.slices = slices,
                               .n_slices = (int32_t)adapter->n_parameters,
                               .lr = (float)number(json, "lr"),
                               .beta1 = (float)json_number_value(json_array_get(betas, 0)),
                               .beta2 = (float)json_number_value(json_array_get(betas, 1)),
                               .eps = (float)number(json, "eps"),
                               .weight_decay = (float)number(json, "weight_decay"),
                               .grad_scale = 1};
    struct pass *pass = NULL;
    size_t n_steps = json_array_size(batches);
#ifdef __SANITIZE_ADDRESS__
    n_steps = 4; /* instrumented, a step takes seconds; what they look for is in every one of them */
#endif
    for (size_t step = 0; step < n_steps; step++) {
        struct batch *batch = batch_of(json_array_get(batches, step));
        const struct plan_request request = {.max_tokens = batch->n_tokens, .max_seqs = batch->n_seqs};
        if (!pass)
            check_ok(pass_create(adapter->model, adapter, &request, &pass, &error), &error);
        struct pass_options options = {.backward = true, .grad_scale = 1.0f / (float)batch->n_targets};
        struct pass_result result;
        check_ok(pass_run(pass, batch, &options, &error), &error);
        check_ok(pass_collect(pass, &result, &error), &error);
        double loss = result.loss_sum / (double)result.n_targets;
        double expected = json_number_value(json_array_get(losses, step));
        if (!(fabs(loss - expected) < 1e-3 * expected))
            fail_msg("step %zu: loss %.6f, expected %.6f", step + 1, loss, expected);
        if (step == 0)
            check_first_norms(adapter, json_object_get(json, "first_step_grad_norms"));
        adamw.step = (int64_t)step + 1;
        assert_int_equal(backend->ops->adamw(backend->device, &adamw), 0);
        drop_batch(batch);
    }
    pass_free(pass);
    free(slices);
    json_decref(json);
}

static void test_lora_curve(void **state)
{
    struct error error = {0};
    const struct lora_config lora = {
        .targets = TARGET_IN_PROJ | TARGET_X_PROJ | TARGET_DT_PROJ | TARGET_OUT_PROJ, .rank = 8, .alpha = 16};
    struct model *model = open_model(*state, "models/hatchling");
    struct safetensors *init = open_vector("tests/vectors/hatchling_train_lora_init.safetensors");
    struct adapter *adapter = NULL;
    check_ok(adapter_create(model, ADAPT_LORA, &lora, 0, &adapter, &error), &error);
    assert_int_equal(safetensors_count(init), adapter->n_parameters);
    for (int64_t i = 0; i < adapter->n_parameters; i++) {
        float *values = copy_floats(init, adapter->parameters[i].name, NULL);
        write_device(model, adapter->parameters[i].slice.param, values, adapter->parameters[i].slice.count);
        free(values);
    }
    check_curve(*state, "tests/vectors/hatchling_train_lora.json", adapter);
    adapter_free(adapter);
    safetensors_close(init);
    model_close(model);
}

static void test_full_curve(void **state)
{
    struct error error = {0};
    struct model *model = open_model(*state, "models/hatchling");
    struct adapter *adapter = NULL;
    check_ok(adapter_create(model, ADAPT_FULL, NULL, 0, &adapter, &error), &error);
    check_curve(*state, "tests/vectors/hatchling_train_full.json", adapter);
    adapter_free(adapter);
    model_close(model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_lora_curve), cmocka_unit_test(test_full_curve)};
    return cmocka_run_group_tests_name("cpu", tests, open_cpu, close_backend);
}
