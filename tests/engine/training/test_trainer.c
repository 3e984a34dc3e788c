/* test_trainer.c: what a job does, step by step, and what it refuses. */
#include "tests/engine/training/tiny.h"

#include "base/file.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct tiny tiny;

static int setup(void **unused)
{
    (void)unused;
    tiny_open(&tiny, false);
    return 0;
}

static int teardown(void **unused)
{
    (void)unused;
    tiny_close(&tiny);
    return 0;
}

static struct run_log *run_logged(struct trainer_options *options)
{
    struct run_log *log = calloc(1, sizeof *log);
    assert_non_null(log);
    run_log_attach(log, options);
    run_whole(options);
    return log;
}

static int count_steps(const struct run_log *log)
{
    int steps = 0;
    while (steps + 1 < TINY_MAX_STEPS && log->reported[steps + 1])
        steps++;
    return steps;
}

/* ---- learning ---- */

static void assert_learns(struct trainer_options *options)
{
    options->spec.n_epochs = 12;
    struct run_log *log = run_logged(options);
    int steps = count_steps(log);
    assert_int_equal(steps, 36); /* 11 examples: 2 + 2, 2 + 2, 2 + 1 */
    assert_true(log->metrics[steps].train_loss < 0.7 * log->metrics[1].train_loss);
    assert_true(log->metrics[steps].valid_loss < 0.8 * log->metrics[3].valid_loss);
    assert_true(log->metrics[steps].train_accuracy > log->metrics[1].train_accuracy);
    assert_true(log->metrics[1].has_valid == false && log->metrics[3].has_valid);
    assert_int_equal(log->metrics[3].epoch, 1);
    assert_int_equal(log->metrics[4].epoch, 2);
    assert_true(log->metrics[steps].tokens_per_second > 0);
    free(log);
}

static void test_lora_learns(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    assert_learns(&options);
    struct adapter *adapter = NULL;
    char path[1024];
    snprintf(path, sizeof path, "%s/adapter", tiny.job);
    assert_int_equal(adapter_load(tiny.model, path, false, &adapter, NULL), 0);
    assert_int_equal(adapter->n_parameters, 8);
    adapter_free(adapter);
    snprintf(path, sizeof path, "%s/checkpoints/step-3", tiny.job);
    assert_int_equal(adapter_load(tiny.model, path, false, &adapter, NULL), 0);
    adapter_free(adapter);
}

static void test_full_learns(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    options.spec.adaptation = ADAPT_FULL;
    options.spec.learning_rate = 0.003f;
    assert_learns(&options);
    static const char *const folders[] = {"adapter", "checkpoints/step-36"};
    for (int i = 0; i < 2; i++) {
        struct model *model = NULL;
        char path[1024];
        snprintf(path, sizeof path, "%s/%s", tiny.job, folders[i]);
        assert_int_equal(model_open(path, kernels_cpu(), tiny.device, &model, NULL), 0);
        model_close(model);
    }
}

static void assert_close(double a, double b, double tolerance)
{
    if (!(fabs(a - b) <= tolerance * fmax(fabs(a), fabs(b))))
        fail_msg("%.12g and %.12g differ by more than %g of them", a, b, tolerance);
}

/* Micro-batches of different numbers of targets: a mean of means would be another gradient. */
static void test_accumulation(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    options.spec.eps = 1; /* AdamW then is as sensitive to the scale of gradients as plain descent */
    options.spec.learning_rate = 2;
    struct run_log *twice = run_logged(&options);
    options = tiny_options(&tiny);
    options.spec.eps = 1;
    options.spec.learning_rate = 2;
    options.spec.batch_size = 4;
    options.spec.gradient_accumulation_steps = 1;
    struct run_log *once = run_logged(&options);
    assert_int_equal(count_steps(twice), 6);
    assert_int_equal(count_steps(once), 6);
    for (int step = 1; step <= 6; step++) {
        assert_close(twice->metrics[step].train_loss, once->metrics[step].train_loss, 1e-6);
        assert_close(twice->metrics[step].grad_norm, once->metrics[step].grad_norm, 1e-5);
        assert_int_equal(twice->metrics[step].trained_tokens, once->metrics[step].trained_tokens);
    }
    free(once);
    free(twice);
}

static void test_clipping(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    options.spec.max_grad_norm = 0;
    struct run_log *free_run = run_logged(&options);
    options = tiny_options(&tiny);
    options.spec.max_grad_norm = 1e6f;
    struct run_log *loose = run_logged(&options);
    options = tiny_options(&tiny);
    options.spec.max_grad_norm = 1e-9f; /* eps of AdamW then dwarfs the gradient: hardly a move */
    struct run_log *tight = run_logged(&options);
    assert_same_runs(free_run, loose);
    assert_close(tight->metrics[1].grad_norm, loose->metrics[1].grad_norm, 1e-12); /* as it was before */
    assert_true(tight->metrics[6].train_loss > loose->metrics[6].train_loss);
    free(tight);
    free(loose);
    free(free_run);
}

static void test_seed(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    options.spec.lora.dropout = 0.5f;
    struct run_log *a = run_logged(&options);
    options = tiny_options(&tiny);
    options.spec.lora.dropout = 0.5f;
    struct run_log *b = run_logged(&options);
    assert_same_runs(a, b);
    options = tiny_options(&tiny);
    options.spec.lora.dropout = 0.5f;
    options.spec.seed++;
    struct run_log *c = run_logged(&options);
    assert_true(a->metrics[6].train_loss != c->metrics[6].train_loss);
    free(c);
    free(b);
    free(a);
}

/* ---- the schedule ---- */

static void test_max_steps(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    options.spec.n_epochs = 1;
    options.spec.max_steps = 8; /* into the third epoch of 3 steps */
    struct run_log *log = run_logged(&options);
    assert_int_equal(count_steps(log), 8);
    assert_int_equal(log->metrics[8].epoch, 3);
    assert_int_equal(log->metrics[8].total_steps, 8);
    assert_true(log->metrics[3].has_valid && log->metrics[6].has_valid && log->metrics[8].has_valid);
    assert_int_equal(log->n_checkpoints, 3);
    assert_int_equal(log->checkpoints[2].step, 8);
    free(log);
}

static void test_keep_checkpoints(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    char folder[1024];
    options.validation_file = NULL;
    options.spec.checkpoint_steps = 1;
    options.spec.keep_checkpoints = 2;
    struct run_log *log = run_logged(&options);
    assert_int_equal(log->n_checkpoints, 6);
    assert_int_equal(log->n_dropped, 4);
    for (int i = 0; i < 4; i++)
        assert_int_equal(log->dropped[i], i + 1);
    assert_true(isnan(log->checkpoints[0].valid_loss));
    snprintf(folder, sizeof folder, "%s/checkpoints", tiny.job);
    assert_int_equal(count_entries(folder), 2);
    assert_true(path_exists("%s/step-5", folder) && path_exists("%s/step-6", folder));
    free(log);
}

static void write_text(const char *path, const char *text)
{
    assert_int_equal(file_write_whole(path, text, strlen(text), NULL), 0);
}

/* The untrained model, its head tied, likes to repeat itself; training drives that out. So a validation set
 * of repetitions gets worse and worse. */
static struct trainer_options worsening_job(void)
{
    static char path[512];
    struct trainer_options options = tiny_options(&tiny);
    snprintf(path, sizeof path, "%s/other.jsonl", tiny.folder);
    write_text(path, "{\"prompt\": \"ada 1:\", \"completion\": \"::::::::\"}\n");
    options.validation_file = path;
    options.spec.eval_steps = 1;
    options.spec.checkpoint_steps = 2;
    options.spec.keep_checkpoints = 1;
    options.spec.n_epochs = 4;
    return options;
}

static int64_t best_step(const struct run_log *log)
{
    int64_t best = 1;
    for (int step = 1; step <= count_steps(log); step++)
        if (log->metrics[step].valid_loss < log->metrics[best].valid_loss)
            best = step;
    return best;
}

static void test_best(void **unused)
{
    (void)unused;
    struct trainer_options options = worsening_job();
    options.spec.load_best_at_end = true;
    struct run_log *log = run_logged(&options);
    int64_t best = best_step(log);
    char adapter[1024], checkpoint[1024];
    assert_int_equal(count_steps(log), 12);
    assert_in_range(best, 1, 6);
    assert_non_null(strstr(log->messages, "the lowest validation loss"));
    snprintf(adapter, sizeof adapter, "%s/adapter/adapter_model.safetensors", tiny.job);
    snprintf(checkpoint, sizeof checkpoint, "%s/checkpoints/step-%d/adapter_model.safetensors", tiny.job,
             (int)best);
    assert_same_files(adapter, checkpoint);
    for (int i = 0; i < log->n_checkpoints; i++) {
        int64_t step = log->checkpoints[i].step;
        bool improved = true;
        for (int64_t earlier = 1; earlier < step; earlier++)
            improved &= log->metrics[step].valid_loss < log->metrics[earlier].valid_loss;
        assert_int_equal(log->checkpoints[i].best, improved);
        assert_true(improved || step % 2 == 0);
    }
    snprintf(checkpoint, sizeof checkpoint, "%s/checkpoints", tiny.job);
    assert_int_equal(count_entries(checkpoint), 2); /* the best and the newest */
    assert_true(path_exists("%s/step-12", checkpoint));
    free(log);
}

static void test_early_stopping(void **unused)
{
    (void)unused;
    struct trainer_options options = worsening_job();
    options.spec.early_stopping_patience = 2;
    options.spec.early_stopping_min_delta = 50; /* nothing improves by so much */
    struct run_log *log = run_logged(&options);
    assert_int_equal(count_steps(log), 3); /* the first evaluation, and two that do not improve on it */
    assert_int_equal(log->checkpoints[log->n_checkpoints - 1].step, 3);
    assert_false(log->checkpoints[log->n_checkpoints - 1].resumable_only);
    assert_non_null(strstr(log->messages, "stopped early at step 3"));
    assert_true(path_exists("%s/adapter/adapter_config.json", tiny.job));
    free(log);
}

static void test_pause_and_go_on(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    struct run_log *whole = run_logged(&options), *paused = calloc(1, sizeof *paused);
    options = tiny_options(&tiny);
    run_log_attach(paused, &options);
    struct trainer *trainer = NULL;
    int code;
    assert_int_equal(trainer_open(&options, &trainer, NULL), 0);
    do {
        assert_int_equal(trainer_checkpoint(trainer, NULL), 0);
        assert_int_equal(trainer_checkpoint(trainer, NULL), 0); /* the second finds it done */
        code = trainer_advance(trainer, NULL);
    } while (code == TRAINER_MORE);
    assert_int_equal(code, TRAINER_FINISHED);
    struct trainer_status status;
    trainer_status(trainer, &status);
    assert_int_equal(status.step, 6);
    assert_int_equal(status.trained_tokens, paused->metrics[6].trained_tokens);
    assert_true(status.peak_bytes >= status.planned_bytes && status.bytes_per_token > 0);
    assert_true(status.eta_seconds >= 0);
    trainer_close(trainer);
    assert_same_runs(whole, paused);
    /* 0 to 6 for the pauses; 3 and 6 once more as what the schedule wants, after their evaluations */
    assert_int_equal(paused->n_checkpoints, 9);
    char folder[1024];
    snprintf(folder, sizeof folder, "%s/checkpoints", tiny.job);
    assert_int_equal(count_entries(folder), 2);
    assert_true(path_exists("%s/step-3", folder) && path_exists("%s/step-6", folder));
    free(paused);
    free(whole);
}

/* ---- failures ---- */

static void test_divergence(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    struct run_log *log = calloc(1, sizeof *log);
    struct trainer *trainer = NULL;
    struct error error = {0};
    options.spec.checkpoint_steps = 2;
    run_log_attach(log, &options);
    assert_int_equal(trainer_open(&options, &trainer, &error), 0);
    while (!log->n_checkpoints)
        assert_int_equal(trainer_advance(trainer, &error), TRAINER_MORE);
    float *weight = model_weight(tiny.model, model_weight_count(tiny.model) - 1)->data, kept = *weight;
    *weight = INFINITY;
    int code;
    while ((code = trainer_advance(trainer, &error)) == TRAINER_MORE)
        ; /* losses are looked at once a step */
    assert_int_equal(code, ERROR_DIVERGED);
    assert_non_null(strstr(error.message, "step 3"));
    *weight = kept;
    assert_int_equal(trainer_advance(trainer, &error), ERROR_DIVERGED);
    assert_int_equal(trainer_checkpoint(trainer, &error), ERROR_DIVERGED);
    trainer_close(trainer);
    assert_true(path_exists("%s/checkpoints/step-2/optimizer.safetensors", tiny.job));
    assert_false(path_exists("%s/adapter", tiny.job));
    options.resume_from = log->newest;
    run_whole(&options);
    free(log);
}

static void test_overflow_is_not_kept(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    struct trainer *trainer = NULL;
    struct error error = {0};
    int code;
    options.spec.adaptation = ADAPT_FULL;
    options.spec.learning_rate = 1e38f;
    options.spec.weight_decay = 1e3f;
    options.spec.schedule = SCHEDULE_CONSTANT;
    options.spec.checkpoint_steps = 1;
    assert_int_equal(trainer_open(&options, &trainer, &error), 0);
    while ((code = trainer_advance(trainer, &error)) == TRAINER_MORE)
        ;
    assert_int_equal(code, ERROR_DIVERGED);
    assert_non_null(strstr(error.message, "step 1"));
    trainer_close(trainer);
    assert_false(path_exists("%s/checkpoints/step-1", tiny.job));
}

static void assert_inspection(const struct trainer_options *options, int code, const char *param)
{
    struct trainer_inspection inspection;
    struct trainer_bad_lines bad;
    struct trainer *trainer = NULL;
    struct error error = {0};
    assert_int_equal(trainer_inspect(options, &inspection, &bad, &error), code);
    assert_string_equal(error.param, param);
    assert_int_equal(trainer_open(options, &trainer, &error), code);
    assert_string_equal(error.param, param);
    assert_null(trainer);
}

static void test_refused(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    options.spec.precision = PRECISION_BF16;
    assert_inspection(&options, ERROR_UNSUPPORTED, "precision");
    options = tiny_options(&tiny);
    options.validation_file = NULL;
    options.spec.load_best_at_end = true;
    assert_inspection(&options, ERROR_INVALID, "load_best_at_end");
    options.spec.load_best_at_end = false;
    options.spec.early_stopping_patience = 1;
    assert_inspection(&options, ERROR_INVALID, "early_stopping");
    options = tiny_options(&tiny);
    options.training_file = "/nonexistent";
    struct error error = {0};
    struct trainer *trainer = NULL;
    assert_true(trainer_open(&options, &trainer, &error) < 0);
    assert_string_equal(error.param, "training_file");

    /* A tokenizer of a larger vocabulary than the model's. */
    char path[1024];
    struct tokenizer *other = NULL;
    assert_non_null(getenv("ADDERD_SOURCE"));
    snprintf(path, sizeof path, "%s/models/hatchling/tokenizer.json", getenv("ADDERD_SOURCE"));
    assert_int_equal(tokenizer_load(path, &other, NULL), 0);
    options = tiny_options(&tiny);
    options.tokenizer = other;
    assert_inspection(&options, ERROR_INVALID, "model");
    tokenizer_free(other);
}

static void test_bad_lines(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    struct trainer_inspection inspection;
    struct trainer_bad_lines bad;
    struct error error = {0};
    char path[1024];
    snprintf(path, sizeof path, "%s/bad.jsonl", tiny.folder);
    write_text(path, "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\"}\nnonsense\n");
    options.training_file = path;
    assert_int_equal(trainer_inspect(&options, &inspection, &bad, &error), ERROR_INVALID);
    assert_string_equal(error.param, "training_file");
    assert_string_equal(bad.file, "training_file");
    assert_int_equal(bad.n_line_errors, 2);
    assert_int_equal(bad.line_errors[0].line, 2);
    assert_int_equal(bad.line_errors[1].line, 3);
    options = tiny_options(&tiny);
    options.validation_file = path;
    assert_int_equal(trainer_inspect(&options, &inspection, &bad, &error), ERROR_INVALID);
    assert_string_equal(bad.file, "validation_file");
    write_text(path, "");
    assert_int_equal(trainer_inspect(&options, &inspection, &bad, &error), ERROR_INVALID);
    assert_string_equal(error.param, "validation_file");
    assert_int_equal(bad.n_line_errors, 0);
}

static void test_inspection(void **unused)
{
    (void)unused;
    for (int packing = 0; packing < 2; packing++) {
        struct trainer_options options = tiny_options(&tiny);
        struct trainer_inspection inspection;
        struct trainer_bad_lines bad;
        struct trainer *trainer = NULL;
        struct trainer_status status;
        options.spec.packing = packing;
        assert_int_equal(trainer_inspect(&options, &inspection, &bad, NULL), 0);
        assert_int_equal(bad.n_line_errors, 0);
        assert_int_equal(inspection.examples, 11);
        assert_int_equal(inspection.validation_examples, 5);
        assert_true(inspection.loss_tokens > 0 && inspection.loss_tokens < inspection.tokens);
        assert_false(path_exists("%s", tiny.job));
        assert_int_equal(trainer_open(&options, &trainer, NULL), 0);
        trainer_status(trainer, &status);
        trainer_close(trainer);
        assert_int_equal(status.total_steps, inspection.total_steps);
        assert_int_equal(status.planned_bytes, inspection.planned_bytes);
        struct run_log *log = run_logged(&options);
        assert_int_equal(count_steps(log), inspection.total_steps);
        assert_int_equal(log->metrics[inspection.total_steps].trained_tokens, 2 * inspection.tokens);
        assert_non_null(strstr(log->messages, "trainable parameters; plan"));
        free(log);
    }
}

static int query_a_poor_device(struct kernel_device *device, struct kernel_device_info *ret_info)
{
    int status = kernels_cpu()->device_query(device, ret_info);
    ret_info->free_bytes = 4096;
    return status;
}

/* A job that does not fit is refused by its plan, before it takes what is not there. */
static void test_too_little_memory(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    struct kernel_ops ops = *kernels_cpu();
    struct trainer *trainer = NULL;
    struct error error = {0};
    char folder[512];
    ops.device_query = query_a_poor_device;
    snprintf(folder, sizeof folder, "%s/model", tiny.folder);
    assert_int_equal(model_open(folder, &ops, tiny.device, &options.model, &error), 0);
    assert_int_equal(trainer_open(&options, &trainer, &error), ERROR_NO_MEMORY);
    assert_string_equal(error.param, "batch_size");
    assert_null(trainer);
    model_close(options.model);
}

static void test_dead_adapter(void **unused)
{
    (void)unused;
    struct tiny dead;
    struct trainer *trainer = NULL;
    struct error error = {0};
    int code;
    tiny_open(&dead, true);
    struct trainer_options options = tiny_options(&dead);
    options.spec.lora.targets = TARGET_OUT_PROJ | TARGET_X_PROJ;
    assert_int_equal(trainer_open(&options, &trainer, &error), 0);
    while ((code = trainer_advance(trainer, &error)) == TRAINER_MORE)
        ;
    assert_int_equal(code, TRAINER_FINISHED); /* out_proj's adapter wakes x_proj's up at step 2 */
    trainer_close(trainer);

    for (int steps = 1; steps <= 4; steps += 3) {
        options = tiny_options(&dead);
        options.spec.lora.targets = TARGET_X_PROJ | TARGET_EMBEDDINGS;
        options.spec.max_steps = steps;
        assert_int_equal(trainer_open(&options, &trainer, &error), 0);
        while ((code = trainer_advance(trainer, &error)) == TRAINER_MORE)
            ;
        assert_int_equal(code, ERROR_INVALID);
        assert_string_equal(error.param, "lora.targets");
        assert_non_null(strstr(error.message, "x_proj"));
        trainer_close(trainer);
    }
    tiny_close(&dead);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lora_learns),
        cmocka_unit_test(test_full_learns),
        cmocka_unit_test(test_accumulation),
        cmocka_unit_test(test_clipping),
        cmocka_unit_test(test_seed),
        cmocka_unit_test(test_max_steps),
        cmocka_unit_test(test_keep_checkpoints),
        cmocka_unit_test(test_best),
        cmocka_unit_test(test_early_stopping),
        cmocka_unit_test(test_pause_and_go_on),
        cmocka_unit_test(test_divergence),
        cmocka_unit_test(test_overflow_is_not_kept),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_bad_lines),
        cmocka_unit_test(test_inspection),
        cmocka_unit_test(test_too_little_memory),
        cmocka_unit_test(test_dead_adapter),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
