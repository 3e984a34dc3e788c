/* fixture.c: see fixture.h. */
#include "fixture.h"

#include "base/file.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void make_folder(char folder[64])
{
    const char *tmp = getenv("TMPDIR");
    snprintf(folder, 64, "%s/adderd-test-XXXXXX", tmp && strlen(tmp) < 40 ? tmp : "/tmp");
    assert_non_null(mkdtemp(folder));
}

static void count_commit(void *arg, double seconds, int64_t requests)
{
    struct fixture *fixture = arg;
    assert_true(seconds > 0);
    assert_true(requests > 0);
    fixture->commits++;
    fixture->committed += requests;
}

static void open_store(struct fixture *fixture)
{
    struct error error = {0};
    if (store_open(fixture->folder, &fixture->loop, &fixture->store, &error))
        fail_msg("%s", error.message);
    store_observe_commits(fixture->store, count_commit, fixture);
}

int fixture_setup(void **state)
{
    struct fixture *fixture = calloc(1, sizeof *fixture);
    assert_non_null(fixture);
    make_folder(fixture->folder);
    snprintf(fixture->database, sizeof fixture->database, "%s/adderd.db", fixture->folder);
    assert_int_equal(uv_loop_init(&fixture->loop), 0);
    open_store(fixture);
    *state = fixture;
    return 0;
}

void fixture_run(struct fixture *fixture)
{
    uv_run(&fixture->loop, UV_RUN_DEFAULT);
}

int fixture_teardown(void **state)
{
    struct fixture *fixture = *state;
    store_close(fixture->store);
    fixture_run(fixture);
    assert_int_equal(uv_loop_close(&fixture->loop), 0);
    assert_int_equal(file_remove_tree(fixture->folder, NULL), 0);
    free(fixture);
    return 0;
}

void fixture_reopen(struct fixture *fixture)
{
    store_close(fixture->store);
    fixture_run(fixture);
    open_store(fixture);
}

void tell(void *arg, int code, const struct error *error)
{
    struct told *told = arg;
    told->calls++;
    told->code = code;
    assert_int_equal(code != 0, error != NULL);
    if (error) {
        assert_int_equal(error->code, code);
        assert_true(error->message[0]);
        told->error = *error;
    }
}

struct file_resource make_file(const char *id)
{
    struct file_resource file = {
        .bytes = 1234, .created_at = 1700000000, .purpose = "fine-tune", .status = "processed"};
    snprintf(file.id, sizeof file.id, "%s", id);
    snprintf(file.filename, sizeof file.filename, "tränen \"%.100s\".jsonl", id);
    memset(file.sha256, 'a', 64);
    return file;
}

struct job_resource make_job(const char *id)
{
    static char hyperparameters[] = "{\"n_epochs\":3}";
    struct job_resource job = {
        .created_at = 1700000001,
        .model = "hatchling",
        .suffix = "frog",
        .status = JOB_QUEUED,
        .training_file = "file-training",
        .seed = UINT64_MAX - 1,
        .hyperparameters = hyperparameters,
        .trained_tokens = -1,
        .tokens_per_second = (double)NAN,
        .loss = 2.5,
        .eta_seconds = (double)NAN,
        .bytes_per_token = 0.1,
        .queue_position = 3,
    };
    snprintf(job.id, sizeof job.id, "%s", id);
    return job;
}

struct adapter_row make_model(const char *id, const char *job, int64_t step)
{
    struct adapter_row row = {
        .model = {.created = 1700000002, .owned_by = "local", .root = "hatchling", .parent = "hatchling"},
        .step = step};
    snprintf(row.model.id, sizeof row.model.id, "%s", id);
    snprintf(row.path, sizeof row.path, "/data/adapters/%s", id);
    snprintf(row.job, sizeof row.job, "%s", job);
    return row;
}

int insert_file(struct fixture *fixture, const char *id)
{
    struct told told = {0};
    struct file_resource file = make_file(id);
    store_file_insert(fixture->store, &file, NULL, tell, &told);
    fixture_run(fixture);
    assert_int_equal(told.calls, 1);
    return told.code;
}

static void ignore_file(void *arg, int code, const struct file_resource *file)
{
    (void)file;
    *(int *)arg = code;
}

int insert_job(struct fixture *fixture, const char *id)
{
    struct told told = {0};
    struct job_resource job = make_job(id);
    int has_file = 1;
    store_file_get(fixture->store, job.training_file, ignore_file, &has_file);
    fixture_run(fixture);
    if (has_file == ERROR_NOT_FOUND)
        assert_int_equal(insert_file(fixture, job.training_file), 0);
    store_job_insert(fixture->store, &job, NULL, tell, &told);
    fixture_run(fixture);
    assert_int_equal(told.calls, 1);
    return told.code;
}
