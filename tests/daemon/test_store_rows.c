/* test_store_rows.c: what each kind of row means: round trips, lists and their pages, ends of jobs, events said
 * twice, checkpoints, recovery, answers, keys. */
#include "fixture.h"

#include <math.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- files ---- */

static void copy_file(void *arg, int code, const struct file_resource *file)
{
    assert_int_equal(code, 0);
    *(struct file_resource *)arg = *file;
}

static void expect_code(void *arg, int code, const struct file_resource *file)
{
    assert_null(file);
    *(int *)arg = code;
}

static void test_file_round_trip(void **state)
{
    struct fixture *fixture = *state;
    struct file_resource file = make_file("file-1"), back = {0};
    file.bytes = INT64_MAX;
    file.expires_at = 1800000000;
    snprintf(file.status_details, sizeof file.status_details, "it's; DROP TABLE files; --");
    struct told told = {0};
    int code = 0;
    store_file_insert(fixture->store, &file, NULL, tell, &told);
    fixture_run(fixture);
    assert_int_equal(told.code, 0);
    fixture_reopen(fixture);
    store_file_get(fixture->store, "file-1", copy_file, &back);
    store_file_get(fixture->store, "file-2", expect_code, &code);
    fixture_run(fixture);
    assert_string_equal(back.id, file.id);
    assert_true(back.bytes == file.bytes);
    assert_int_equal(back.created_at, file.created_at);
    assert_int_equal(back.expires_at, file.expires_at);
    assert_string_equal(back.filename, file.filename);
    assert_string_equal(back.purpose, file.purpose);
    assert_string_equal(back.status, file.status);
    assert_string_equal(back.status_details, file.status_details);
    assert_string_equal(back.sha256, file.sha256);
    assert_int_equal(code, ERROR_NOT_FOUND);
}

struct listed {
    int code, calls;
    size_t count;
    bool has_more;
    char ids[400][ID_BYTES];
};

static void on_files(void *arg, int code, const struct file_resource *items, size_t count, bool has_more)
{
    struct listed *listed = arg;
    listed->calls++;
    listed->code = code;
    listed->has_more = has_more;
    for (size_t i = 0; i < count; i++)
        memcpy(listed->ids[listed->count++], items[i].id, ID_BYTES);
}

static void test_file_pages(void **state)
{
    struct fixture *fixture = *state;
    enum { N = 300 };
    for (int i = 0; i < N; i++) {
        char id[ID_BYTES];
        snprintf(id, sizeof id, "file-%03d", i);
        struct file_resource file = make_file(id);
        snprintf(file.purpose, sizeof file.purpose, i % 3 ? "fine-tune" : "fine-tune-results");
        store_file_insert(fixture->store, &file, NULL, NULL, NULL);
    }
    store_file_delete(fixture->store, "file-007", NULL, NULL);
    struct told told = {0};
    store_file_delete(fixture->store, "file-008", tell, &told);
    fixture_run(fixture);
    assert_int_equal(told.code, 0);

    for (int way = 0; way < 4; way++) {
        static struct listed listed;
        memset(&listed, 0, sizeof listed);
        struct list_query query = {.limit = 33, .ascending = way & 1};
        snprintf(query.purpose, sizeof query.purpose, "%s", way & 2 ? "fine-tune" : "");
        char expected[N][ID_BYTES];
        size_t n = 0;
        for (int i = 0; i < N; i++) {
            int number = way & 1 ? i : N - 1 - i;
            if (number != 7 && number != 8 && (!(way & 2) || number % 3))
                snprintf(expected[n++], ID_BYTES, "file-%03d", number);
        }
        do {
            size_t before = listed.count;
            store_file_list(fixture->store, &query, on_files, &listed);
            fixture_run(fixture);
            assert_int_equal(listed.code, 0);
            assert_true(listed.count > before);
            assert_int_equal(listed.has_more, listed.count < n);
            snprintf(query.after, sizeof query.after, "%s", listed.ids[listed.count - 1]);
        } while (listed.has_more);
        assert_int_equal(listed.count, n);
        for (size_t i = 0; i < n; i++)
            assert_string_equal(listed.ids[i], expected[i]);
        /* Behind the last one there is nothing, and that is no error. */
        store_file_list(fixture->store, &query, on_files, &listed);
        fixture_run(fixture);
        assert_int_equal(listed.code, 0);
        assert_int_equal(listed.count, n);
        assert_false(listed.has_more);
    }
    static struct listed exact, missing;
    struct list_query query = {.limit = 298};
    store_file_list(fixture->store, &query, on_files, &exact);
    snprintf(query.after, sizeof query.after, "file-007");
    store_file_list(fixture->store, &query, on_files, &missing);
    fixture_run(fixture);
    assert_int_equal(exact.count, 298);
    assert_false(exact.has_more);
    assert_int_equal(missing.code, ERROR_NOT_FOUND);
    assert_int_equal(missing.count, 0);
}

/* tell(), and how often a closing event was handed over. */
static int closings;
static void tell_end(void *arg, int code, const struct error *error, const struct event_resource *closing)
{
    tell(arg, code, error);
    if (closing) {
        assert_int_equal(code, 0);
        assert_true(closing->sequence > 0);
        closings++;
    }
}

static void set_status(struct fixture *fixture, const char *id, enum job_status status, int expected)
{
    struct job_resource job = make_job(id);
    struct told told = {0};
    job.status = status;
    if (job_status_is_final(status))
        store_job_finish(fixture->store, &job, NULL, NULL, "the end", tell_end, &told);
    else
        store_job_update(fixture->store, &job, tell, &told);
    fixture_run(fixture);
    assert_int_equal(told.calls, 1);
    assert_int_equal(told.code, expected);
}

static void test_files_in_use_stay(void **state)
{
    struct fixture *fixture = *state;
    struct told told = {0};
    static struct listed expired, later;
    struct file_resource file = make_file("file-old");
    file.expires_at = 100;
    store_file_insert(fixture->store, &file, NULL, NULL, NULL);
    file = make_file("file-training");
    file.expires_at = 100;
    store_file_insert(fixture->store, &file, NULL, NULL, NULL);
    assert_int_equal(insert_file(fixture, "file-forever"), 0);
    assert_int_equal(insert_job(fixture, "ftjob-1"), 0);
    for (int status = JOB_VALIDATING; status <= JOB_PAUSED; status++) {
        set_status(fixture, "ftjob-1", (enum job_status)status, 0);
        store_file_delete(fixture->store, "file-training", tell, &told);
        fixture_run(fixture);
        assert_int_equal(told.code, ERROR_BUSY);
    }
    store_file_expired(fixture->store, 99, on_files, &later);
    store_file_expired(fixture->store, 100, on_files, &expired);
    fixture_run(fixture);
    assert_int_equal(later.count, 0);
    assert_int_equal(expired.count, 1);
    assert_string_equal(expired.ids[0], "file-old");
    set_status(fixture, "ftjob-1", JOB_CANCELLED, 0);
    store_file_expired(fixture->store, 100, on_files, &expired);
    store_file_delete(fixture->store, "file-training", tell, &told);
    fixture_run(fixture);
    assert_int_equal(expired.count, 3);
    assert_int_equal(told.code, 0);
    store_file_delete(fixture->store, "file-training", tell, &told);
    fixture_run(fixture);
    assert_int_equal(told.code, ERROR_NOT_FOUND);
}

/* ---- jobs ---- */

struct job_back {
    int code;
    struct job_resource job; /* job_free */
};

static void copy_job(void *arg, int code, const struct job_resource *job)
{
    struct job_back *back = arg;
    back->code = code;
    if (code)
        return;
    back->job = *job;
    back->job.hyperparameters = job->hyperparameters ? strdup(job->hyperparameters) : NULL;
    back->job.metadata = job->metadata ? strdup(job->metadata) : NULL;
}

static struct job_back get_job(struct fixture *fixture, const char *id)
{
    struct job_back back = {.code = 1};
    store_job_get(fixture->store, id, copy_job, &back);
    fixture_run(fixture);
    return back;
}

static void test_job_round_trip(void **state)
{
    struct fixture *fixture = *state;
    char metadata[] = "{\"who\":\"me\"}";
    struct told told = {0};
    assert_int_equal(insert_file(fixture, "file-training"), 0);
    assert_int_equal(insert_file(fixture, "file-validation"), 0);
    struct job_resource job = make_job("ftjob-1");
    job.metadata = metadata;
    snprintf(job.validation_file, sizeof job.validation_file, "file-validation");
    store_job_insert(fixture->store, &job, NULL, tell, &told);
    fixture_run(fixture);
    assert_int_equal(told.code, 0);
    struct job_back back = get_job(fixture, "ftjob-1");
    assert_int_equal(back.code, 0);
    assert_string_equal(back.job.id, "ftjob-1");
    assert_int_equal(back.job.created_at, job.created_at);
    assert_int_equal(back.job.started_at, 0);
    assert_string_equal(back.job.model, "hatchling");
    assert_string_equal(back.job.suffix, "frog");
    assert_int_equal(back.job.status, JOB_QUEUED);
    assert_string_equal(back.job.training_file, "file-training");
    assert_string_equal(back.job.validation_file, "file-validation");
    assert_true(back.job.seed == UINT64_MAX - 1);
    assert_string_equal(back.job.hyperparameters, "{\"n_epochs\":3}");
    assert_string_equal(back.job.metadata, metadata);
    assert_int_equal(back.job.trained_tokens, -1);
    assert_true(isnan(back.job.tokens_per_second));
    assert_true(back.job.loss == 2.5);
    assert_true(isnan(back.job.eta_seconds));
    assert_true(back.job.bytes_per_token == 0.1);
    assert_int_equal(back.job.queue_position, -1);
    job_free(&back.job);

    job.status = JOB_RUNNING;
    job.started_at = 5;
    job.attempt = 2;
    job.step = 7;
    job.planned_memory_bytes = INT64_C(5) << 40;
    job.skipped_steps = 2;
    job.total_steps = 70;
    job.tokens_per_second = 1e5;
    job.peak_memory_bytes = (int64_t)1 << 40;
    job.loss = (double)NAN;
    snprintf(job.device, sizeof job.device, "cuda:1");
    snprintf(job.error_message, sizeof job.error_message, "not really");
    store_job_update(fixture->store, &job, tell, &told);
    fixture_run(fixture);
    assert_int_equal(told.code, 0);
    fixture_reopen(fixture);
    back = get_job(fixture, "ftjob-1");
    assert_int_equal(back.job.status, JOB_RUNNING);
    assert_int_equal(back.job.started_at, 5);
    assert_int_equal(back.job.attempt, 2);
    assert_int_equal(back.job.step, 7);
    assert_int_equal(back.job.total_steps, 70);
    assert_true(back.job.tokens_per_second == 1e5);
    assert_true(back.job.peak_memory_bytes == (int64_t)1 << 40);
    assert_true(back.job.planned_memory_bytes == INT64_C(5) << 40);
    assert_int_equal(back.job.skipped_steps, 2);
    assert_true(isnan(back.job.loss));
    assert_string_equal(back.job.device, "cuda:1");
    assert_string_equal(back.job.error_message, "not really");
    job_free(&back.job);
    assert_int_equal(get_job(fixture, "ftjob-2").code, ERROR_NOT_FOUND);
    assert_int_equal(insert_job(fixture, "ftjob-1"), ERROR_INVALID);
}

static void on_jobs(void *arg, int code, const struct job_resource *items, size_t count, bool has_more)
{
    struct listed *listed = arg;
    listed->calls++;
    listed->code = code;
    listed->has_more = has_more;
    for (size_t i = 0; i < count; i++) {
        assert_non_null(items[i].hyperparameters);
        memcpy(listed->ids[listed->count++], items[i].id, ID_BYTES);
    }
}

static void test_job_pages_and_metadata(void **state)
{
    struct fixture *fixture = *state;
    enum { N = 240 };
    assert_int_equal(insert_file(fixture, "file-training"), 0);
    for (int i = 0; i < N; i++) {
        char id[ID_BYTES], metadata[128];
        snprintf(id, sizeof id, "ftjob-%03d", i);
        /* Keys that would break a path expression. */
        snprintf(metadata, sizeof metadata, "{\"kind\":\"%s\",\"a.\\\"b[0]\":\"%d\"}", i % 2 ? "odd" : "even",
                 i % 5);
        struct job_resource job = make_job(id);
        job.metadata = i % 10 == 9 ? NULL : metadata;
        store_job_insert(fixture->store, &job, NULL, NULL, NULL);
    }
    fixture_run(fixture);
    static struct listed all;
    memset(&all, 0, sizeof all);
    struct list_query query = {.limit = 100};
    do {
        store_job_list(fixture->store, &query, on_jobs, &all);
        fixture_run(fixture);
        assert_int_equal(all.code, 0);
        snprintf(query.after, sizeof query.after, "%s", all.ids[all.count - 1]);
    } while (all.has_more && all.calls < 10);
    assert_int_equal(all.calls, 3);
    assert_int_equal(all.count, N);
    for (int i = 0; i < N; i++) {
        char id[ID_BYTES];
        snprintf(id, sizeof id, "ftjob-%03d", N - 1 - i);
        assert_string_equal(all.ids[i], id);
    }

    for (int ascending = 0; ascending < 2; ascending++) {
        static struct listed some;
        memset(&some, 0, sizeof some);
        query = (struct list_query){.limit = 7, .ascending = ascending};
        query.metadata = json_pack("{s:s, s:s}", "kind", "odd", "a.\"b[0]", "3");
        do {
            store_job_list(fixture->store, &query, on_jobs, &some);
            fixture_run(fixture);
            assert_int_equal(some.code, 0);
            snprintf(query.after, sizeof query.after, "%s", some.ids[some.count - 1]);
        } while (some.has_more && some.calls < 10);
        json_decref(query.metadata);
        assert_int_equal(some.count, N / 10);
        assert_int_equal(some.calls, 4);
        for (int i = 0; i < N / 10; i++) {
            char id[ID_BYTES];
            snprintf(id, sizeof id, "ftjob-%03d", 3 + 10 * (ascending ? i : N / 10 - 1 - i));
            assert_string_equal(some.ids[i], id);
        }
    }
    static struct listed none, missing;
    query = (struct list_query){.limit = 7};
    query.metadata = json_pack("{s:s}", "kind", "strange");
    store_job_list(fixture->store, &query, on_jobs, &none);
    json_decref(query.metadata);
    query.metadata = NULL;
    snprintf(query.after, sizeof query.after, "ftjob-none");
    store_job_list(fixture->store, &query, on_jobs, &missing);
    fixture_run(fixture);
    assert_int_equal(none.code, 0);
    assert_int_equal(none.count, 0);
    assert_int_equal(missing.code, ERROR_NOT_FOUND);
}

struct events_back {
    int code;
    size_t count;
    bool has_more;
    struct event_resource events[300]; /* event_free */
};

static void copy_events(void *arg, int code, const struct event_resource *items, size_t count, bool has_more)
{
    struct events_back *back = arg;
    back->code = code;
    back->has_more = has_more;
    for (size_t i = 0; i < count; i++) {
        struct event_resource *event = &back->events[back->count++];
        *event = items[i];
        event->message = strdup(items[i].message);
        event->data = items[i].data ? strdup(items[i].data) : NULL;
    }
}

static void free_events(struct events_back *back)
{
    for (size_t i = 0; i < back->count; i++)
        event_free(&back->events[i]);
    memset(back, 0, sizeof *back);
}

static void test_job_ends_once(void **state)
{
    struct fixture *fixture = *state;
    struct told told = {0};
    static struct events_back events;
    assert_int_equal(insert_job(fixture, "ftjob-1"), 0);
    store_resume_point_set(fixture->store, "ftjob-1", 3, "/data/resume", NULL, NULL);
    struct job_resource job = make_job("ftjob-1");
    closings = 0;
    job.status = JOB_RUNNING;
    store_job_finish(fixture->store, &job, NULL, NULL, "no end", tell_end, &told);
    fixture_run(fixture);
    assert_int_equal(told.code, ERROR_INVALID);

    job.status = JOB_SUCCEEDED;
    job.finished_at = 99;
    snprintf(job.fine_tuned_model, sizeof job.fine_tuned_model, "ft:hatchling:me:frog:1");
    struct adapter_row model = make_model("ft:hatchling:me:frog:1", "ftjob-1", -1);
    struct file_resource result = make_file("file-result");
    /* All or nothing: a result file that cannot be kept leaves the job open. */
    struct file_resource broken = result;
    broken.bytes = -1;
    store_job_finish(fixture->store, &job, &model, &broken, "done", tell_end, &told);
    fixture_run(fixture);
    assert_int_equal(told.code, ERROR_INVALID);
    struct job_back back = get_job(fixture, "ftjob-1");
    assert_int_equal(back.job.status, JOB_QUEUED);
    job_free(&back.job);

    store_job_finish(fixture->store, &job, &model, &result, "done", tell_end, &told);
    fixture_run(fixture);
    assert_int_equal(told.code, 0);
    assert_int_equal(closings, 1);
    /* Saying it again changes nothing, not even what differs. */
    job.finished_at = 100;
    store_job_finish(fixture->store, &job, &model, &result, "done", tell_end, &told);
    fixture_run(fixture);
    assert_int_equal(told.code, 0);
    assert_int_equal(closings, 1);
    /* Nothing reopens it or gives it another end. */
    for (int status = 0; status < JOB_STATUS_COUNT; status++) {
        job.status = (enum job_status)status;
        store_job_update(fixture->store, &job, tell, &told);
        fixture_run(fixture);
        assert_int_equal(told.code, ERROR_INVALID);
    }
    set_status(fixture, "ftjob-1", JOB_CANCELLED, ERROR_INVALID);
    set_status(fixture, "ftjob-none", JOB_CANCELLED, ERROR_NOT_FOUND);
    back = get_job(fixture, "ftjob-1");
    assert_int_equal(back.job.status, JOB_SUCCEEDED);
    assert_int_equal(back.job.finished_at, 99);
    job_free(&back.job);

    struct list_query query = {.limit = 10};
    struct file_resource file = {0};
    store_event_list(fixture->store, "ftjob-1", &query, copy_events, &events);
    store_file_get(fixture->store, "file-result", copy_file, &file);
    fixture_run(fixture);
    assert_string_equal(file.id, "file-result");
    assert_int_equal(events.count, 1);
    assert_string_equal(events.events[0].message, "done");
    assert_string_equal(events.events[0].level, "info");
    free_events(&events);
    struct adapter_row *models = NULL;
    size_t count = 0;
    assert_int_equal(store_load_models(fixture->store, &models, &count, NULL), 0);
    assert_int_equal(count, 1);
    assert_string_equal(models[0].model.id, model.model.id);
    assert_string_equal(models[0].path, model.path);
    assert_string_equal(models[0].job, "ftjob-1");
    assert_int_equal(models[0].step, -1);
    free(models);
}

static void test_recovery_and_counts(void **state)
{
    struct fixture *fixture = *state;
    for (int i = 0; i < JOB_STATUS_COUNT; i++) {
        char id[ID_BYTES];
        snprintf(id, sizeof id, "ftjob-%d", i);
        assert_int_equal(insert_job(fixture, id), 0);
        set_status(fixture, id, (enum job_status)i, 0);
    }
    struct checkpoint_resource checkpoint = {.id = "ftckpt-1", .job = "ftjob-2", .step = 20};
    struct adapter_row model = make_model("m:ckpt-step-20", "ftjob-2", 20);
    store_checkpoint_insert(fixture->store, &checkpoint, &model, NULL, NULL);
    store_resume_point_set(fixture->store, "ftjob-2", 10, "/resume/10", NULL, NULL);
    store_resume_point_set(fixture->store, "ftjob-3", 4, "/resume/4", NULL, NULL);
    store_resume_point_set(fixture->store, "ftjob-3", 5, "/resume/5", NULL, NULL);
    fixture_reopen(fixture);

    int64_t counts[JOB_STATUS_COUNT];
    assert_int_equal(store_count_jobs(fixture->store, counts, NULL), 0);
    for (int i = 0; i < JOB_STATUS_COUNT; i++)
        assert_int_equal(counts[i], 1);
    struct job_recovery *items = NULL;
    size_t count = 0;
    assert_int_equal(store_load_unfinished(fixture->store, &items, &count, NULL), 0);
    assert_int_equal(count, 4);
    const enum job_status expected[] = {JOB_VALIDATING, JOB_QUEUED, JOB_RUNNING, JOB_PAUSED};
    const char *paths[] = {"", "", model.path, "/resume/5"};
    for (size_t i = 0; i < count; i++) {
        assert_int_equal(items[i].job.status, expected[i]);
        assert_string_equal(items[i].resume_from, paths[i]);
        assert_string_equal(items[i].job.hyperparameters, "{\"n_epochs\":3}");
        job_free(&items[i].job);
    }
    assert_int_equal(items[2].resume_step, 20);
    assert_int_equal(items[3].resume_step, 5);
    free(items);
}

/* ---- events ---- */

static void on_event(void *arg, int code, const struct event_resource *event)
{
    assert_int_equal(code, 0);
    *(int64_t *)arg = event ? event->sequence : -1;
}

static void test_metrics_are_said_once(void **state)
{
    struct fixture *fixture = *state;
    assert_int_equal(insert_job(fixture, "ftjob-1"), 0);
    assert_int_equal(insert_job(fixture, "ftjob-2"), 0);
    int64_t sequences[6] = {0};
    struct store *store = fixture->store;
    store_event_append(store, "ftjob-1", "info", "metrics", "step 2", "{\"loss\":1}", 2, on_event,
                       &sequences[0]);
    store_event_append(store, "ftjob-1", "info", "metrics", "step 1", "{\"loss\":2}", 1, on_event,
                       &sequences[1]);
    store_event_append(store, "ftjob-1", "info", "metrics", "again", "{\"loss\":3}", 2, on_event,
                       &sequences[2]);
    store_event_append(store, "ftjob-2", "info", "metrics", "other job", NULL, 2, on_event, &sequences[3]);
    store_event_append(store, "ftjob-1", "warn", "message", "step 2", NULL, 2, on_event, &sequences[4]);
    store_event_append(store, "ftjob-1", "warn", "message", "step 2", NULL, 2, on_event, &sequences[5]);
    fixture_run(fixture);
    assert_int_equal(sequences[2], -1);
    assert_true(0 < sequences[0] && sequences[0] < sequences[1] && sequences[1] < sequences[3]);
    assert_true(sequences[3] < sequences[4] && sequences[4] < sequences[5]);
    static struct events_back metrics;
    store_metrics_list(store, "ftjob-1", copy_events, &metrics);
    fixture_run(fixture);
    assert_int_equal(metrics.count, 2);
    assert_string_equal(metrics.events[0].data, "{\"loss\":2}");
    assert_string_equal(metrics.events[1].data, "{\"loss\":1}");
    free_events(&metrics);
}

static void test_event_pages(void **state)
{
    struct fixture *fixture = *state;
    enum { N = 250 };
    static int64_t sequences[N];
    static struct events_back back;
    assert_int_equal(insert_job(fixture, "ftjob-1"), 0);
    assert_int_equal(insert_job(fixture, "ftjob-2"), 0);
    for (int i = 0; i < N; i++) {
        char message[32];
        snprintf(message, sizeof message, "event %d", i);
        store_event_append(fixture->store, "ftjob-1", "info", "message", message, NULL, -1, on_event,
                           &sequences[i]);
        store_event_append(fixture->store, "ftjob-2", "info", "message", message, NULL, -1, NULL, NULL);
    }
    fixture_run(fixture);
    for (int ascending = 0; ascending < 2; ascending++) {
        struct list_query query = {.limit = 100, .ascending = ascending};
        for (int page = 0; page < 3; page++) {
            store_event_list(fixture->store, "ftjob-1", &query, copy_events, &back);
            fixture_run(fixture);
            assert_int_equal(back.code, 0);
            assert_int_equal(back.count, page < 2 ? 100 * (page + 1) : N);
            assert_int_equal(back.has_more, page < 2);
            snprintf(query.after, sizeof query.after, "ftevent-%lld",
                     (long long)back.events[back.count - 1].sequence);
        }
        for (int i = 0; i < N; i++) {
            char message[32];
            int number = ascending ? i : N - 1 - i;
            snprintf(message, sizeof message, "event %d", number);
            assert_string_equal(back.events[i].message, message);
            assert_int_equal(back.events[i].sequence, sequences[number]);
            assert_string_equal(back.events[i].job, "ftjob-1");
            assert_null(back.events[i].data);
        }
        free_events(&back);
    }
    /* Of no event, of another job's, and misspelt. */
    char other[64], zeros[64];
    snprintf(other, sizeof other, "ftevent-%lld", (long long)sequences[0] + 1);
    snprintf(zeros, sizeof zeros, "ftevent-0%lld", (long long)sequences[0]);
    const char *bad[] = {
        "ftevent-999999", other, zeros, "ftevent-", "event", "ftevent-99999999999999999999999", "ftevent-1x"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct list_query query = {.limit = 10};
        snprintf(query.after, sizeof query.after, "%s", bad[i]);
        store_event_list(fixture->store, "ftjob-1", &query, copy_events, &back);
        fixture_run(fixture);
        assert_int_equal(back.code, ERROR_NOT_FOUND);
    }
    struct list_query query = {.limit = 10};
    store_event_list(fixture->store, "ftjob-none", &query, copy_events, &back);
    fixture_run(fixture);
    assert_int_equal(back.code, 0);
    assert_int_equal(back.count, 0);
}

/* ---- checkpoints and models ---- */

struct checkpoints_back {
    int code;
    size_t count;
    bool has_more;
    struct checkpoint_resource items[20];
};

static void copy_checkpoints(void *arg, int code, const struct checkpoint_resource *items, size_t count,
                             bool has_more)
{
    struct checkpoints_back *back = arg;
    back->code = code;
    back->has_more = has_more;
    back->count = count;
    if (count)
        memcpy(back->items, items, count * sizeof *items);
}

static void put_checkpoint(struct fixture *fixture, const char *id, int64_t step, double loss)
{
    struct told told = {0};
    struct checkpoint_resource checkpoint = {.job = "ftjob-1",
                                             .created_at = 5,
                                             .step = step,
                                             .train_loss = loss,
                                             .train_accuracy = 0.5,
                                             .valid_loss = (double)NAN,
                                             .valid_accuracy = (double)NAN};
    char model_id[MODEL_ID_BYTES];
    snprintf(checkpoint.id, sizeof checkpoint.id, "%s", id);
    snprintf(model_id, sizeof model_id, "ft:x:ckpt-step-%lld", (long long)step);
    snprintf(checkpoint.model, sizeof checkpoint.model, "%s", model_id);
    struct adapter_row model = make_model(model_id, "ftjob-1", step);
    store_checkpoint_insert(fixture->store, &checkpoint, &model, tell, &told);
    fixture_run(fixture);
    assert_int_equal(told.code, 0);
}

static void test_checkpoints(void **state)
{
    struct fixture *fixture = *state;
    struct told told = {0};
    struct checkpoints_back back;
    assert_int_equal(insert_job(fixture, "ftjob-1"), 0);
    for (int step = 10; step <= 50; step += 10) {
        char id[ID_BYTES];
        snprintf(id, sizeof id, "ftckpt-%d", step);
        put_checkpoint(fixture, id, step, 1.0 / step);
    }
    put_checkpoint(fixture, "ftckpt-50-again", 50, 7); /* a resumed run writes it again */
    struct list_query query = {.limit = 3};
    store_checkpoint_list(fixture->store, "ftjob-1", &query, copy_checkpoints, &back);
    fixture_run(fixture);
    assert_int_equal(back.code, 0);
    assert_int_equal(back.count, 3);
    assert_true(back.has_more);
    assert_string_equal(back.items[0].id, "ftckpt-50-again");
    assert_string_equal(back.items[0].model, "ft:x:ckpt-step-50");
    assert_true(back.items[0].train_loss == 7);
    assert_true(isnan(back.items[0].valid_loss));
    assert_int_equal(back.items[2].step, 30);
    snprintf(query.after, sizeof query.after, "%s", back.items[2].id);
    store_checkpoint_list(fixture->store, "ftjob-1", &query, copy_checkpoints, &back);
    fixture_run(fixture);
    assert_int_equal(back.count, 2);
    assert_false(back.has_more);
    store_checkpoint_list(fixture->store, "ftjob-2", &query, copy_checkpoints, &back);
    fixture_run(fixture);
    assert_int_equal(back.code, ERROR_NOT_FOUND); /* after is another job's */

    /* One goes by step, one with its model; each takes both rows. */
    store_checkpoint_delete(fixture->store, "ftjob-1", 20, tell, &told);
    fixture_run(fixture);
    assert_int_equal(told.code, 0);
    store_checkpoint_delete(fixture->store, "ftjob-1", 20, tell, &told);
    fixture_run(fixture);
    assert_int_equal(told.code, ERROR_NOT_FOUND);
    store_model_delete(fixture->store, "ft:x:ckpt-step-40", tell, &told);
    fixture_run(fixture);
    assert_int_equal(told.code, 0);
    query = (struct list_query){.limit = 10, .ascending = true};
    store_checkpoint_list(fixture->store, "ftjob-1", &query, copy_checkpoints, &back);
    fixture_run(fixture);
    assert_int_equal(back.count, 3);
    assert_int_equal(back.items[0].step, 10);
    assert_int_equal(back.items[1].step, 30);
    assert_int_equal(back.items[2].step, 50);
    struct adapter_row *models = NULL;
    size_t count = 0;
    assert_int_equal(store_load_models(fixture->store, &models, &count, NULL), 0);
    assert_int_equal(count, 3);
    for (size_t i = 0; i < count; i++)
        assert_int_equal(models[i].step, back.items[i].step);
    free(models);
}

/* ---- answers ---- */

struct answer_back {
    int code, status;
    char hash[64], body[64];
};

static void copy_answer(void *arg, int code, int status, const char *body_hash, const char *body)
{
    struct answer_back *back = arg;
    back->code = code;
    back->status = status;
    snprintf(back->hash, sizeof back->hash, "%s", body_hash ? body_hash : "");
    snprintf(back->body, sizeof back->body, "%s", body ? body : "");
}

static void test_first_answer_stands_for_a_day(void **state)
{
    struct fixture *fixture = *state;
    struct answer_back back;
    store_answer_get(fixture->store, "key-1 /v1/x", "k", copy_answer, &back);
    fixture_run(fixture);
    assert_int_equal(back.code, ERROR_NOT_FOUND);
    store_answer_put(fixture->store, &(struct kept_answer){"key-1 /v1/x", "k", "h1", 200, "first"}, NULL,
                     NULL);
    store_answer_put(fixture->store, &(struct kept_answer){"key-1 /v1/x", "k", "h2", 400, "second"}, NULL,
                     NULL);
    store_answer_put(fixture->store, &(struct kept_answer){"key-2 /v1/x", "k", "h3", 201, "other scope"},
                     NULL, NULL);
    fixture_run(fixture);
    store_answer_get(fixture->store, "key-1 /v1/x", "k", copy_answer, &back);
    fixture_run(fixture);
    assert_int_equal(back.code, 0);
    assert_int_equal(back.status, 200);
    assert_string_equal(back.hash, "h1");
    assert_string_equal(back.body, "first");

    /* A day later. */
    sqlite3 *db = NULL;
    assert_int_equal(sqlite3_open(fixture->database, &db), SQLITE_OK);
    sqlite3_busy_timeout(db, 5000);
    assert_int_equal(sqlite3_exec(db, "UPDATE answers SET created_at = created_at - 86400", NULL, NULL, NULL),
                     SQLITE_OK);
    sqlite3_close(db);
    store_answer_get(fixture->store, "key-1 /v1/x", "k", copy_answer, &back);
    fixture_run(fixture);
    assert_int_equal(back.code, ERROR_NOT_FOUND);
    store_answer_put(fixture->store, &(struct kept_answer){"key-1 /v1/x", "k", "h4", 200, "new"}, NULL, NULL);
    fixture_run(fixture);
    store_answer_get(fixture->store, "key-1 /v1/x", "k", copy_answer, &back);
    fixture_run(fixture);
    assert_string_equal(back.body, "new");
}

/* A row that a POST with a key makes, and what the POST is answered, commit together or not at all. */
static void test_answer_commits_with_its_row(void **state)
{
    struct fixture *fixture = *state;
    struct answer_back back;
    struct told told = {0};
    const struct kept_answer answer = {"key-1 /v1/fine_tuning/jobs", "k", "h1", 200, "made"};
    struct job_resource job = make_job("ftjob-1");
    store_job_insert(fixture->store, &job, &answer, tell, &told); /* its file does not exist */
    store_answer_get(fixture->store, answer.scope, "k", copy_answer, &back);
    fixture_run(fixture);
    assert_int_equal(told.code, ERROR_NOT_FOUND);
    assert_int_equal(back.code, ERROR_NOT_FOUND);

    const struct kept_answer of_file = {"key-1 /v1/files", "k", "h2", 200, "stored"};
    struct file_resource file = make_file(job.training_file);
    int64_t commits = fixture->commits;
    store_file_insert(fixture->store, &file, &of_file, tell, &told);
    fixture_run(fixture);
    assert_int_equal(told.code, 0);
    store_job_insert(fixture->store, &job, &answer, tell, &told);
    fixture_run(fixture);
    assert_int_equal(told.code, 0);
    assert_int_equal(fixture->commits, commits + 2);
    fixture_reopen(fixture);
    store_answer_get(fixture->store, answer.scope, "k", copy_answer, &back);
    fixture_run(fixture);
    assert_string_equal(back.body, "made");
    store_answer_get(fixture->store, of_file.scope, "k", copy_answer, &back);
    fixture_run(fixture);
    assert_string_equal(back.body, "stored");
}

/* ---- keys ---- */

static void copy_keys(void *arg, int code, const struct key_row *items, size_t count)
{
    assert_int_equal(code, 0);
    assert_int_equal(count, 3);
    memcpy(arg, items, count * sizeof *items);
}

static void test_keys(void **state)
{
    struct fixture *fixture = *state;
    struct error error = {0};
    struct store *beside = NULL; /* what `adderd keys` opens */
    assert_int_equal(store_open(fixture->folder, NULL, &beside, &error), 0);
    struct key_row key = {.id = "key-1", .name = "laptop", .created_at = 1};
    memset(key.hash, 'a', 64);
    assert_int_equal(store_key_insert(beside, &key, &error), 0);
    snprintf(key.id, sizeof key.id, "key-2");
    memset(key.hash, 'b', 64);
    assert_int_equal(store_key_insert(beside, &key, &error), ERROR_INVALID);
    assert_non_null(strstr(error.message, "laptop"));
    snprintf(key.name, sizeof key.name, "server");
    assert_int_equal(store_key_insert(beside, &key, &error), 0);
    assert_int_equal(store_key_revoke(beside, "laptop", 50, &error), 0);
    assert_int_equal(store_key_revoke(beside, "laptop", 51, &error), ERROR_NOT_FOUND);
    assert_int_equal(store_key_revoke(beside, "key-1", 51, &error), ERROR_NOT_FOUND);
    snprintf(key.id, sizeof key.id, "key-3");
    snprintf(key.name, sizeof key.name, "laptop"); /* the name is free again */
    memset(key.hash, 'c', 64);
    assert_int_equal(store_key_insert(beside, &key, &error), 0);
    store_close(beside);

    struct key_row keys[3];
    store_key_used(fixture->store, "key-2", 70);
    store_key_used(fixture->store, "key-2", 60);
    store_key_used(fixture->store, "key-none", 60);
    fixture_run(fixture);
    store_key_list(fixture->store, copy_keys, keys);
    fixture_run(fixture);
    assert_string_equal(keys[0].id, "key-1");
    assert_int_equal(keys[0].revoked_at, 50);
    assert_int_equal(keys[1].revoked_at, 0);
    assert_int_equal(keys[1].last_used_at, 70);
    assert_string_equal(keys[2].name, "laptop");
    assert_int_equal(keys[2].last_used_at, 0);
}

#define WITH_STORE(test) cmocka_unit_test_setup_teardown(test, fixture_setup, fixture_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        WITH_STORE(test_file_round_trip),
        WITH_STORE(test_file_pages),
        WITH_STORE(test_files_in_use_stay),
        WITH_STORE(test_job_round_trip),
        WITH_STORE(test_job_pages_and_metadata),
        WITH_STORE(test_job_ends_once),
        WITH_STORE(test_recovery_and_counts),
        WITH_STORE(test_metrics_are_said_once),
        WITH_STORE(test_event_pages),
        WITH_STORE(test_checkpoints),
        WITH_STORE(test_first_answer_stands_for_a_day),
        WITH_STORE(test_answer_commits_with_its_row),
        WITH_STORE(test_keys),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
