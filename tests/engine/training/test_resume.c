/* test_resume.c: a run that is interrupted anywhere and resumed equals the one that was not, bit for bit. */
#include "tests/engine/training/tiny.h"

#include "base/file.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum how { KILLED, PAUSED };

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

/* Run for `advances` more, then stop as told. Returns false when the run ended before. */
static bool run_part(struct trainer_options *options, const struct run_log *log, int advances, enum how how)
{
    struct trainer *trainer = NULL;
    struct error error = {0};
    int code = TRAINER_MORE;
    char from[4096];
    snprintf(from, sizeof from, "%s", log->newest);
    options->resume_from = from[0] ? from : NULL;
    trainer_open(options, &trainer, &error);
    assert_string_equal(error.message, "");
    for (int i = 0; i < advances && code == TRAINER_MORE; i++)
        code = trainer_advance(trainer, &error);
    if (code == TRAINER_MORE && how == PAUSED)
        assert_int_equal(trainer_checkpoint(trainer, &error), 0);
    assert_string_equal(error.message, "");
    trainer_close(trainer);
    return code == TRAINER_MORE;
}

/* The undisturbed run against runs that are stopped after every possible number of advances. */
static void interrupt_everywhere(struct trainer_options *options, const char *file)
{
    struct run_log *whole = calloc(1, sizeof *whole), *broken = calloc(1, sizeof *broken);
    char kept[512], made[512];
    assert_non_null(whole);
    assert_non_null(broken);
    run_log_attach(whole, options);
    options->resume_from = NULL;
    int advances = run_whole(options);
    snprintf(kept, sizeof kept, "%s/kept", tiny.folder);
    snprintf(made, sizeof made, "%s/adapter/%s", tiny.job, file);
    assert_int_equal(rename(made, kept), 0);
    for (int cut = 0; cut < advances; cut++) {
        for (int how = KILLED; how <= PAUSED; how++) {
            assert_int_equal(file_remove_tree(tiny.job, NULL), 0);
            memset(broken, 0, sizeof *broken);
            run_log_attach(broken, options);
            assert_true(run_part(options, broken, cut, (enum how)how));
            assert_false(run_part(options, broken, 10000, KILLED));
            assert_same_runs(whole, broken);
            assert_same_files(made, kept);
        }
    }
    unlink(kept);
    free(broken);
    free(whole);
}

static void test_lora(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    options.spec.lora.dropout = 0.2f;
    options.spec.eval_steps = 2;
    options.spec.checkpoint_steps = 3;
    options.spec.load_best_at_end = true;
    options.spec.keep_checkpoints = 1;
    options.spec.n_epochs = 3;
    options.spec.early_stopping_patience = 2; /* which its memory of the best keeps from happening */
    interrupt_everywhere(&options, "adapter_model.safetensors");
}

static void test_lora_everywhere_packed(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    options.spec.lora = (struct lora_config){TARGETS_ALL, 2, 4, 0.1f, true};
    options.spec.packing = true;
    options.spec.batch_size = 1;
    options.spec.gradient_accumulation_steps = 3;
    options.spec.early_stopping_patience = 2;
    options.spec.early_stopping_min_delta = 100;
    options.spec.n_epochs = 5;
    interrupt_everywhere(&options, "adapter_model.safetensors");
}

static void test_full(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    options.spec.adaptation = ADAPT_FULL;
    options.spec.learning_rate = 0.002f;
    options.spec.weight_decay = 0.1f;
    options.spec.eval_steps = 3;
    options.spec.checkpoint_steps = 2;
    interrupt_everywhere(&options, "model.safetensors");
}

static void test_interrupted_all_the_time(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    struct run_log *whole = calloc(1, sizeof *whole), *broken = calloc(1, sizeof *broken);
    options.spec.eval_steps = 1;
    run_log_attach(whole, &options);
    run_whole(&options);
    for (int how = KILLED; how <= PAUSED; how++) {
        options = tiny_options(&tiny);
        options.spec.eval_steps = 1;
        options.spec.checkpoint_steps = how == KILLED ? 1 : 0;
        memset(broken, 0, sizeof *broken);
        run_log_attach(broken, &options);
        int parts = 1;
        while (run_part(&options, broken, 6, (enum how)how))
            assert_true(++parts < 100);
        assert_true(parts > 3);
        assert_same_runs(whole, broken);
    }
    free(broken);
    free(whole);
}

/* ---- what is refused ---- */

/* A checkpoint of step 2 in tiny.job, its folder in path. */
static struct trainer_options paused_job(struct run_log *log)
{
    struct trainer_options options = tiny_options(&tiny);
    memset(log, 0, sizeof *log);
    run_log_attach(log, &options);
    assert_true(run_part(&options, log, 4, PAUSED));
    assert_int_equal(log->n_checkpoints, 1);
    assert_int_equal(log->checkpoints[0].step, 2);
    assert_true(log->checkpoints[0].resumable_only);
    options.resume_from = log->newest;
    return options;
}

static void assert_not_resumed(const struct trainer_options *options, int code, const char *param)
{
    struct trainer *trainer = NULL;
    struct error error = {0};
    assert_int_equal(trainer_open(options, &trainer, &error), code);
    assert_null(trainer);
    assert_string_equal(error.param, param);
    assert_true(path_exists("%s/trainer_state.json", options->resume_from));
}

static void test_other_run(void **unused)
{
    (void)unused;
    struct run_log *log = calloc(1, sizeof *log);
    struct trainer_options options = paused_job(log), other = options;
    other.spec.learning_rate *= 2;
    assert_not_resumed(&other, ERROR_INVALID, "learning_rate");
    other = options;
    other.spec.seed++;
    assert_not_resumed(&other, ERROR_INVALID, "seed");
    other = options;
    other.spec.lora.rank = 2;
    assert_not_resumed(&other, ERROR_INVALID, "lora");
    other = options;
    other.validation_file = tiny.train;
    assert_not_resumed(&other, ERROR_INVALID, "validation_file");
    other = options;
    other.training_file = tiny.valid;
    assert_not_resumed(&other, ERROR_INVALID, "training_file");
    float *weight = model_weight(tiny.model, 1)->data, kept = *weight;
    *weight += 1;
    assert_not_resumed(&options, ERROR_INVALID, "model");
    *weight = kept;
    run_whole(&options);
    free(log);
}

static void overwrite(const char *folder, const char *name, long offset, const char *bytes, size_t length)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "r+");
    assert_non_null(file);
    assert_int_equal(fseek(file, offset, offset < 0 ? SEEK_END : SEEK_SET), 0);
    assert_int_equal(fwrite(bytes, 1, length, file), length);
    assert_int_equal(fclose(file), 0);
}

static void test_damaged(void **unused)
{
    (void)unused;
    struct run_log *log = calloc(1, sizeof *log);
    struct trainer_options options = paused_job(log);
    char path[4200];
    overwrite(log->newest, "optimizer.safetensors", -3, "!", 1);
    assert_not_resumed(&options, ERROR_CORRUPT, "");
    options = paused_job(log);
    snprintf(path, sizeof path, "%s/optimizer.safetensors", log->newest);
    assert_int_equal(truncate(path, 1000), 0);
    assert_not_resumed(&options, ERROR_CORRUPT, "");
    options = paused_job(log);
    snprintf(path, sizeof path, "%s/trainer_state.json", log->newest);
    assert_int_equal(truncate(path, 100), 0);
    assert_not_resumed(&options, ERROR_CORRUPT, "");
    free(log);
}

static void make_file(const char *folder, const char *name)
{
    char path[4200];
    assert_int_equal(file_make_dirs(folder, NULL), 0);
    snprintf(path, sizeof path, "%s/%s", folder, name);
    assert_int_equal(file_write_whole(path, "half", 4, NULL), 0);
}

static void test_debris(void **unused)
{
    (void)unused;
    struct run_log *log = calloc(1, sizeof *log);
    struct trainer_options options = paused_job(log);
    char half[1024], later[1024], adapter[1024];
    snprintf(half, sizeof half, "%s/checkpoints/.step-4.tmp", tiny.job);
    snprintf(later, sizeof later, "%s/checkpoints/step-4", tiny.job);
    snprintf(adapter, sizeof adapter, "%s/.adapter.tmp", tiny.job);
    make_file(half, "adapter_model.safetensors");
    make_file(later, "trainer_state.json");
    make_file(adapter, "adapter_model.safetensors");
    assert_true(run_part(&options, log, 0, KILLED));
    assert_false(path_exists("%s", half));
    assert_false(path_exists("%s", later));
    assert_true(path_exists("%s", log->newest));
    assert_false(run_part(&options, log, 10000, KILLED));
    assert_false(path_exists("%s", adapter));
    assert_true(path_exists("%s/adapter/adapter_config.json", tiny.job));

    /* A run from the start leaves nothing of what was there. */
    options.resume_from = NULL;
    memset(log, 0, sizeof *log);
    assert_true(run_part(&options, log, 0, KILLED));
    assert_false(path_exists("%s/adapter", tiny.job));
    snprintf(half, sizeof half, "%s/checkpoints", tiny.job);
    assert_int_equal(count_entries(half), 0);
    free(log);
}

static void test_superseded(void **unused)
{
    (void)unused;
    struct run_log *whole = calloc(1, sizeof *whole), *log = calloc(1, sizeof *log);
    struct trainer_options options = tiny_options(&tiny);
    run_log_attach(whole, &options);
    run_whole(&options);
    options = paused_job(log);
    char newer[512], gone[512];
    snprintf(newer, sizeof newer, "%s/checkpoints/step-2", tiny.job);
    snprintf(gone, sizeof gone, "%s/checkpoints/step-1", tiny.job);
    options.resume_from = gone; /* was there, until step-2 took its place */
    run_whole(&options);
    for (int step = 3; step < TINY_MAX_STEPS && whole->reported[step]; step++)
        assert_memory_equal(&log->metrics[step].train_loss, &whole->metrics[step].train_loss, sizeof(double));
    assert_int_equal(file_remove_tree(tiny.job, NULL), 0);
    struct trainer *trainer = NULL;
    struct error error = {0};
    assert_int_equal(trainer_open(&options, &trainer, &error), ERROR_NOT_FOUND);
    free(log);
    free(whole);
}

static void test_finished_twice(void **unused)
{
    (void)unused;
    struct run_log *log = calloc(1, sizeof *log);
    struct trainer_options options = tiny_options(&tiny);
    char made[512], kept[512], newest[4096];
    run_log_attach(log, &options);
    run_whole(&options);
    snprintf(made, sizeof made, "%s/adapter/adapter_model.safetensors", tiny.job);
    snprintf(kept, sizeof kept, "%s/kept", tiny.folder);
    assert_int_equal(link(made, kept), 0);
    int checkpoints = log->n_checkpoints;
    snprintf(newest, sizeof newest, "%s", log->newest);
    options.resume_from = newest;
    assert_int_equal(run_whole(&options), 1);
    assert_same_files(made, kept);
    assert_int_equal(log->n_checkpoints, checkpoints);
    unlink(kept);
    free(log);
}

/* Run until n_checkpoints have been reported; the disk is full when the next one is due. */
static void run_into_full_disk(const struct trainer_options *options, const struct run_log *log,
                               int n_checkpoints)
{
    struct trainer *trainer = NULL;
    struct error error = {0};
    struct rlimit kept, small;
    int code = TRAINER_MORE;
    assert_int_equal(trainer_open(options, &trainer, &error), 0);
    while (log->n_checkpoints < n_checkpoints)
        assert_int_equal(trainer_advance(trainer, &error), TRAINER_MORE);
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &kept), 0);
    small = kept;
    small.rlim_cur = 1000;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    while (code == TRAINER_MORE)
        code = trainer_advance(trainer, &error);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &kept), 0);
    trainer_close(trainer);
    assert_int_equal(code, ERROR_IO);
}

/* A disk that is full when the second checkpoint is due: the first stays, and nothing of the second. */
static void test_disk_full(void **unused)
{
    (void)unused;
    struct run_log *log = calloc(1, sizeof *log);
    struct trainer_options options = tiny_options(&tiny);
    char folder[512];
    options.spec.checkpoint_steps = 2;
    run_log_attach(log, &options);
    run_into_full_disk(&options, log, 1);
    snprintf(folder, sizeof folder, "%s/checkpoints", tiny.job);
    assert_int_equal(count_entries(folder), 1);
    assert_true(path_exists("%s/step-2", folder));
    options.resume_from = log->newest;
    run_whole(&options);
    free(log);
}

/* The old best is not dropped before the new one is whole: the checkpoint in between still names it. */
static void test_best_lost_on_the_way(void **unused)
{
    (void)unused;
    struct run_log *log = calloc(1, sizeof *log);
    struct trainer_options options = tiny_options(&tiny);
    options.spec.eval_steps = 2;
    options.spec.checkpoint_steps = 1;
    options.spec.keep_checkpoints = 1;
    options.spec.load_best_at_end = true;
    run_log_attach(log, &options);
    run_into_full_disk(&options, log, 3);
    assert_true(log->checkpoints[1].best && log->metrics[4].valid_loss < log->metrics[2].valid_loss);
    assert_true(path_exists("%s/checkpoints/step-2", tiny.job));
    char newest[4096];
    snprintf(newest, sizeof newest, "%s", log->newest);
    options.resume_from = newest;
    run_whole(&options);
    assert_false(path_exists("%s/checkpoints/step-2", tiny.job));
    free(log);
}

/* ---- one worker at a time ---- */

static void let_go(void *arg)
{
    struct trainer **first = arg;
    trainer_close(*first);
    *first = NULL;
}

static void test_lock(void **unused)
{
    (void)unused;
    struct trainer_options options = tiny_options(&tiny);
    struct trainer *first = NULL, *second = NULL;
    struct error error = {0};
    assert_int_equal(trainer_open(&options, &first, &error), 0);
    options.callbacks.yield = let_go;
    options.callbacks.arg = &first;
    assert_int_equal(trainer_open(&options, &second, &error), 0);
    assert_null(first); /* the second had to wait until the first was gone */
    trainer_close(second);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lora),           cmocka_unit_test(test_lora_everywhere_packed),
        cmocka_unit_test(test_full),           cmocka_unit_test(test_interrupted_all_the_time),
        cmocka_unit_test(test_other_run),      cmocka_unit_test(test_damaged),
        cmocka_unit_test(test_debris),         cmocka_unit_test(test_superseded),
        cmocka_unit_test(test_finished_twice), cmocka_unit_test(test_lock),
        cmocka_unit_test(test_disk_full),      cmocka_unit_test(test_best_lost_on_the_way),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
