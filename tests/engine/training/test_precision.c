/* test_precision.c: whole jobs on a GPU in every precision: near fp32's losses, the same bits every time and after an
 * interruption, and fp16's scale of the loss. */
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

static struct trainer_options precise_options(enum precision precision, bool full)
{
    struct trainer_options options = tiny_options(&tiny);
    options.spec.precision = precision;
    options.spec.lora.targets = TARGETS_ALL;
    options.spec.checkpoint_steps = 2;
    if (full) {
        options.spec.adaptation = ADAPT_FULL;
        options.spec.learning_rate = 0.002f;
    }
    return options;
}

static struct run_log *new_log(struct trainer_options *options)
{
    struct run_log *log = calloc(1, sizeof *log);
    assert_non_null(log);
    run_log_attach(log, options);
    return log;
}

/* Advance so many times; the log's newest checkpoint is where the next part goes on. */
static void run_part(struct trainer_options *options, const struct run_log *log, int advances)
{
    struct trainer *trainer = NULL;
    struct error error = {0};
    char from[4096];
    snprintf(from, sizeof from, "%s", log->newest);
    options->resume_from = from[0] ? from : NULL;
    trainer_open(options, &trainer, &error);
    assert_string_equal(error.message, "");
    for (int i = 0, code = TRAINER_MORE; i < advances && code == TRAINER_MORE; i++) {
        code = trainer_advance(trainer, &error);
        assert_string_equal(error.message, "");
    }
    trainer_close(trainer);
}

static void check_precision(enum precision precision, bool full, const struct run_log *exact)
{
    struct trainer_options options = precise_options(precision, full);
    struct run_log *whole = new_log(&options), *again, *broken;
    run_whole(&options);
    options = precise_options(precision, full);
    again = new_log(&options);
    run_whole(&options);
    assert_same_runs(whole, again);
    options = precise_options(precision, full);
    broken = new_log(&options);
    run_part(&options, broken, 7);
    run_part(&options, broken, 5);
    run_part(&options, broken, 1000);
    assert_same_runs(whole, broken);
    for (int step = 1; step < TINY_MAX_STEPS && exact && exact->reported[step]; step++) {
        double wanted = exact->metrics[step].train_loss, loss = whole->metrics[step].train_loss;
        if (!(fabs(loss - wanted) <= 0.02 * wanted))
            fail_msg("%s: step %d: loss %g, fp32's is %g", training_precision_name(precision), step, loss,
                     wanted);
    }
    free(whole);
    free(again);
    free(broken);
}

static void check_precisions(bool full)
{
    struct trainer_options options = precise_options(PRECISION_FP32, full);
    struct run_log *exact = new_log(&options);
    run_whole(&options);
    for (int precision = PRECISION_FP32; precision <= PRECISION_FP16; precision++)
        check_precision((enum precision)precision, full, exact);
    free(exact);
}

static void test_lora(void **unused)
{
    (void)unused;
    check_precisions(false);
}

static void test_full(void **unused)
{
    (void)unused;
    check_precisions(true);
}

/* Go on from a checkpoint whose scale is far too high. */
static void run_overflowing(struct run_log *log, struct trainer_status *ret_status)
{
    struct trainer_options options = precise_options(PRECISION_FP16, false);
    struct trainer *trainer = NULL;
    struct error error = {0};
    char path[8192];
    int code;
    options.spec.max_steps = 40;
    memset(log, 0, sizeof *log);
    run_log_attach(log, &options);
    run_part(&options, log, 4);
    snprintf(path, sizeof path, "%s/trainer_state.json", log->newest);
    json_t *state = json_load_file(path, 0, NULL);
    assert_non_null(state);
    assert_int_equal(
        json_object_set_new(json_object_get(state, "loss_scale"), "scale", json_real(ldexp(1, 40))), 0);
    assert_int_equal(json_dump_file(state, path, JSON_REAL_PRECISION(17)), 0);
    json_decref(state);
    options.resume_from = log->newest;
    trainer_open(&options, &trainer, &error);
    assert_string_equal(error.message, "");
    while ((code = trainer_advance(trainer, &error)) == TRAINER_MORE)
        ;
    assert_string_equal(error.message, "");
    assert_int_equal(code, TRAINER_FINISHED);
    trainer_status(trainer, ret_status);
    trainer_close(trainer);
}

static void test_overflow(void **unused)
{
    (void)unused;
    struct run_log *first = calloc(1, sizeof *first), *second = calloc(1, sizeof *second);
    struct trainer_status status;
    assert_true(first && second);
    run_overflowing(first, &status);
    int skipped = 0;
    for (int step = 1; step < TINY_MAX_STEPS && first->reported[step]; step++)
        skipped += isnan(first->metrics[step].grad_norm);
    assert_true(skipped > 5 && skipped < 30);
    assert_int_equal(status.skipped_steps, skipped);
    assert_non_null(strstr(first->messages, "is skipped"));
    run_overflowing(second, &status);
    assert_same_runs(first, second);
    free(first);
    free(second);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_lora), cmocka_unit_test(test_full),
                                       cmocka_unit_test(test_overflow)};
    const char *asked = getenv("ADDERD_TEST_CUDA");
    struct kernel_device *device;
    if (!asked || strcmp(asked, "1") || !kernels_cuda() || kernels_cuda()->device_open(0, 0, &device)) {
        printf("skipped: ADDERD_TEST_CUDA=1 and a GPU are wanted\n");
        return 77;
    }
    kernels_cuda()->device_close(device);
    return cmocka_run_group_tests(tests, setup, teardown);
}
