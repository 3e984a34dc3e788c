/* test_spec.c: hyperparameters from JSON, and the schedules against their closed forms. */
#include "engine/training/loss_scale.h"

#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static const char whole[] =
    "{\"n_epochs\": 3, \"batch_size\": 8, \"learning_rate_multiplier\": 1, \"learning_rate\": 0.001,"
    " \"max_steps\": 0, \"gradient_accumulation_steps\": 2, \"max_seq_len\": 512, \"packing\": true,"
    " \"truncate_long_examples\": false, \"precision\": \"fp32\", \"adaptation\": \"lora\","
    " \"lora\": {\"rank\": 8, \"alpha\": 16, \"dropout\": 0.1, \"targets\": [\"in_proj\", \"embeddings\"],"
    "   \"rslora\": true},"
    " \"optimizer\": {\"betas\": [0.9, 0.999], \"eps\": 1e-8, \"weight_decay\": 0.01},"
    " \"lr_schedule\": \"cosine\", \"warmup_steps\": 10, \"max_grad_norm\": 1, \"eval_steps\": 20,"
    " \"checkpoint_steps\": 30, \"keep_checkpoints\": 3,"
    " \"early_stopping\": {\"patience\": 4, \"min_delta\": 0.5}, \"load_best_at_end\": true}";

static json_t *parse(const char *text)
{
    json_t *json = json_loads(text, JSON_DECODE_ANY, NULL);
    assert_non_null(json);
    return json;
}

static void test_decode(void **unused)
{
    (void)unused;
    json_t *json = parse(whole);
    struct training_spec spec = {0}, again = {0};
    struct error error = {0};
    assert_int_equal(training_spec_decode(json, &spec, &error), 0);
    assert_int_equal(spec.n_epochs, 3);
    assert_int_equal(spec.max_steps, 0);
    assert_int_equal(spec.batch_size, 8);
    assert_int_equal(spec.gradient_accumulation_steps, 2);
    assert_int_equal(spec.max_seq_len, 512);
    assert_true(spec.packing);
    assert_false(spec.truncate);
    assert_int_equal(spec.adaptation, ADAPT_LORA);
    assert_int_equal(spec.lora.targets, TARGET_IN_PROJ | TARGET_EMBEDDINGS);
    assert_int_equal(spec.lora.rank, 8);
    assert_true(spec.lora.alpha == 16 && spec.lora.dropout == 0.1f && spec.lora.rslora);
    assert_true(spec.learning_rate == 0.001f && spec.beta1 == 0.9f && spec.beta2 == 0.999f);
    assert_true(spec.eps == 1e-8f && spec.weight_decay == 0.01f && spec.max_grad_norm == 1);
    assert_int_equal(spec.schedule, SCHEDULE_COSINE);
    assert_int_equal(spec.warmup_steps, 10);
    assert_int_equal(spec.eval_steps, 20);
    assert_int_equal(spec.checkpoint_steps, 30);
    assert_int_equal(spec.keep_checkpoints, 3);
    assert_int_equal(spec.early_stopping_patience, 4);
    assert_true(spec.early_stopping_min_delta == 0.5f && spec.load_best_at_end);
    json_decref(json);

    json = training_spec_encode(&spec);
    assert_int_equal(training_spec_decode(json, &again, &error), 0);
    json_t *json_again = training_spec_encode(&again);
    assert_true(json_equal(json, json_again));
    json_decref(json_again);
    json_decref(json);
}

static void test_nulls(void **unused)
{
    (void)unused;
    json_t *json = parse(whole);
    struct training_spec spec = {0};
    struct error error = {0};
    json_object_set_new(json, "early_stopping", json_null());
    json_object_set_new(json, "max_steps", json_null());
    assert_int_equal(training_spec_decode(json, &spec, &error), 0);
    assert_int_equal(spec.early_stopping_patience, 0);
    assert_int_equal(spec.max_steps, 0);
    json_object_set_new(json, "lora", json_null());
    assert_int_equal(training_spec_decode(json, &spec, &error), ERROR_INVALID);
    assert_string_equal(error.param, "lora");
    json_object_set_new(json, "adaptation", json_string("full"));
    assert_int_equal(training_spec_decode(json, &spec, &error), 0);
    assert_int_equal(spec.adaptation, ADAPT_FULL);
    json_decref(json);
}

static void test_presets(void **unused)
{
    (void)unused;
    json_t *json = parse(whole);
    struct training_spec spec = {0};
    json_object_set_new(json_object_get(json, "lora"), "targets", json_string("sll"));
    assert_int_equal(training_spec_decode(json, &spec, NULL), 0);
    assert_int_equal(spec.lora.targets, TARGETS_SLL);
    json_object_set_new(json_object_get(json, "lora"), "targets", json_string("all"));
    assert_int_equal(training_spec_decode(json, &spec, NULL), 0);
    assert_int_equal(spec.lora.targets, TARGETS_ALL);
    json_decref(json);
}

/* Put value (JSON) at path ("lora.rank") and expect to be told so. */
static void assert_refused(const char *path, const char *value, const char *reason)
{
    json_t *json = parse(whole), *object = json;
    struct training_spec spec = {.n_epochs = 99};
    struct error error = {0};
    const char *key = strchr(path, '.');
    char outer[64];
    if (key) {
        snprintf(outer, sizeof outer, "%.*s", (int)(key - path), path);
        object = json_object_get(json, outer);
        key++;
    } else {
        key = path;
    }
    if (value)
        json_object_set_new(object, key, parse(value));
    else
        json_object_del(object, key);
    assert_int_equal(training_spec_decode(json, &spec, &error), ERROR_INVALID);
    assert_string_equal(error.param, path);
    assert_non_null(strstr(error.message, path));
    assert_non_null(strstr(error.message, reason));
    assert_int_equal(spec.n_epochs, 99);
    json_decref(json);
}

static void test_refused(void **unused)
{
    (void)unused;
    const char *key;
    json_t *value, *json = parse(whole);
    json_object_foreach(json, key, value) if (strcmp(key, "learning_rate_multiplier"))
        assert_refused(key, NULL, "missing");
    json_decref(json);
    assert_refused("n_epochs", "0", "1..");
    assert_refused("n_epochs", "1.5", "integer");
    assert_refused("batch_size", "\"auto\"", "integer");
    assert_refused("learning_rate", "0", "it must be in");
    assert_refused("learning_rate", "\"x\"", "number");
    assert_refused("packing", "1", "true or false");
    assert_refused("precision", "\"int8\"", "fp32 tf32 bf16 fp16");
    assert_refused("lr_schedule", "7", "constant linear cosine");
    assert_refused("lora", "[]", "object");
    assert_refused("lora.rank", "0", "1..");
    assert_refused("lora.dropout", "1", "it must be in");
    assert_refused("lora.targets", "[\"in_proj\", \"q_proj\"]", "in_proj, x_proj");
    assert_refused("lora.targets", "[]", "at least one");
    assert_refused("lora.targets", "\"most\"", "at least one");
    assert_refused("optimizer.betas", "[0.9]", "two numbers");
    assert_refused("optimizer.betas", "[0.9, 1]", "it must be in");
    assert_refused("optimizer.eps", "null", "number");
    assert_refused("early_stopping.patience", NULL, "missing");
    assert_refused("early_stopping.min_delta", "-1", "it must be in");
    assert_int_equal(training_spec_decode(NULL, &(struct training_spec){0}, NULL), ERROR_INVALID);
}

static void assert_rate(const struct training_spec *spec, int64_t step, int64_t total, double expected)
{
    assert_true(fabs((double)training_learning_rate(spec, step, total) - expected) < 1e-9);
}

static void test_schedules(void **unused)
{
    (void)unused;
    struct training_spec spec = {.learning_rate = 0.01f, .schedule = SCHEDULE_CONSTANT};
    const double peak = (double)spec.learning_rate;
    const int64_t total = 50;
    for (int64_t step = 1; step <= total; step++)
        assert_rate(&spec, step, total, peak);
    spec.schedule = SCHEDULE_LINEAR;
    for (int64_t step = 1; step <= total; step++)
        assert_rate(&spec, step, total, peak * (double)(total - step + 1) / (double)total);
    spec.schedule = SCHEDULE_COSINE;
    for (int64_t step = 1; step <= total; step++)
        assert_rate(&spec, step, total, peak * pow(cos(M_PI / 2 * (double)(step - 1) / (double)total), 2));
    for (int schedule = SCHEDULE_CONSTANT; schedule <= SCHEDULE_COSINE; schedule++) {
        spec.schedule = (enum lr_schedule)schedule;
        spec.warmup_steps = 10;
        for (int64_t step = 1; step <= 10; step++)
            assert_rate(&spec, step, total, peak * (double)step / 10);
        assert_rate(&spec, 11, total, peak);
        assert_true(training_learning_rate(&spec, total, total) > 0);
        spec.warmup_steps = 100; /* longer than the run */
        assert_rate(&spec, total, total, peak / 2);
        spec.warmup_steps = 0;
    }
}

static void test_loss_scale(void **unused)
{
    (void)unused;
    struct loss_scale none = loss_scale_start(PRECISION_BF16), scale = loss_scale_start(PRECISION_FP16);
    assert_true(loss_scale_factor(&none, 1000) == 1);
    loss_scale_keep(&none);
    assert_false(loss_scale_skip(&none));
    assert_true(none.scale == 0 && !none.good_steps && !none.skipped_steps);
    /* Of the mean over the step's tokens, up to a power of two. */
    assert_true(loss_scale_factor(&scale, 1) == 65536);
    assert_true(loss_scale_factor(&scale, 1023) == 128);
    assert_true(loss_scale_factor(&scale, 1024) == 64);
    for (int i = 0; i < LOSS_SCALE_PATIENCE - 1; i++)
        loss_scale_keep(&scale);
    assert_true(scale.scale == 65536);
    loss_scale_keep(&scale);
    assert_true(scale.scale == 131072 && scale.good_steps == 0);
    loss_scale_keep(&scale);
    assert_true(loss_scale_skip(&scale));
    assert_true(scale.scale == 65536 && scale.good_steps == 0 && scale.skipped_steps == 1);
    for (int i = 0; i < 16; i++)
        assert_true(loss_scale_skip(&scale));
    assert_true(scale.scale == 1 && scale.skipped_steps == 17);
    assert_false(loss_scale_skip(&scale)); /* the floor: the run has diverged */
    assert_int_equal(scale.skipped_steps, 17);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_decode),  cmocka_unit_test(test_nulls),     cmocka_unit_test(test_presets),
        cmocka_unit_test(test_refused), cmocka_unit_test(test_schedules), cmocka_unit_test(test_loss_scale),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
