/* test_curves.c: two fine-tunes of hatchling, step by step, against the official losses. On the fast backend
 * alone: the plain reference would take minutes. */
#include "tests/engine/models/support.h"

#include <math.h>
#include <string.h>

static double number(const json_t *json, const char *key)
{
    return json_number_value(json_object_get(json, key));
}

static void check_first_norms(struct pass *pass, struct adapter *adapter, const json_t *norms)
{
    assert_int_equal(json_object_size(norms), adapter->n_parameters);
    for (int64_t i = 0; i < adapter->n_parameters; i++) {
        const struct parameter *parameter = &adapter->parameters[i];
        const json_t *value = json_object_get(norms, parameter->name);
        if (!value)
            fail_msg("no expected norm of %s", parameter->name);
        double expected = json_number_value(value), sum;
        struct error error = {0};
        check_ok(pass_squares(pass, &parameter->slice, 1, &sum, &error), &error);
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
        struct batch *batch = curve_batch(json_array_get(batches, step));
        const struct plan_request request = {.max_tokens = batch->n_tokens, .max_seqs = batch->n_seqs};
        if (!pass)
            check_ok(pass_create(adapter->model, adapter, &request, &pass, &error), &error);
        struct pass_options options = {
            .backward = true, .first = true, .grad_scale = 1.0f / (float)batch->n_targets};
        struct pass_result result;
        check_ok(pass_run(pass, batch, &options, &error), &error);
        check_ok(pass_collect(pass, NULL, 0, &result, &error), &error);
        double loss = result.loss_sum / (double)result.n_targets;
        double expected = json_number_value(json_array_get(losses, step));
        if (!(fabs(loss - expected) < 1e-3 * expected))
            fail_msg("step %zu: loss %.6f, expected %.6f", step + 1, loss, expected);
        if (step == 0)
            check_first_norms(pass, adapter, json_object_get(json, "first_step_grad_norms"));
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
    struct model *model = open_model(*state, "models/hatchling");
    struct adapter *adapter = adapter_of_curve(model);
    check_curve(*state, "tests/vectors/hatchling_train_lora.json", adapter);
    adapter_free(adapter);
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
    return run_on_fast(tests);
}
