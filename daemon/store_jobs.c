/* store_jobs.c: rows of fine-tuning jobs, and what closes one. run functions: the store's threads; the rest:
 * the loop's. */
#include "daemon/store_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define OPEN "status IN ('validating_files', 'queued', 'running', 'paused')"
#define COLUMNS                                                                                              \
    "id, created_at, started_at, finished_at, model, fine_tuned_model, suffix, status, training_file, "      \
    "validation_file, result_file, seed, hyperparameters, metadata, trained_tokens, error_code, "            \
    "error_param, "                                                                                          \
    "error_message, attempt, step, total_steps, tokens_per_second, loss, eta_seconds, peak_memory_bytes, "   \
    "bytes_per_token, device, planned_memory_bytes, skipped_steps, kind, parent, evaluations"
/* Those, and what was made of what `evaluations` names. */
#define SELECTED                                                                                             \
    COLUMNS ", CASE WHEN evaluations IS NOT NULL THEN (SELECT json_group_array(json_object('id', id, "       \
            "'model', model)) FROM (SELECT id, model FROM jobs AS made WHERE made.parent <> '' AND "         \
            "made.parent = jobs.id ORDER BY made.sequence)) END"
#define OF_KIND "kind = ? AND "
/* Every wanted pair is among the job's. */
#define HAS_METADATA                                                                                         \
    "NOT EXISTS (SELECT 1 FROM json_each(?) AS wanted WHERE NOT EXISTS (SELECT 1 FROM "                      \
    "json_each(jobs.metadata) "                                                                              \
    "AS had WHERE had.key = wanted.key AND had.value = wanted.value)) AND "

/* ---- rows ---- */

static int job_copy(const struct job_resource *from, struct job_resource *ret_job)
{
    struct job_resource job = *from;
    job.hyperparameters = from->hyperparameters ? strdup(from->hyperparameters) : NULL;
    job.metadata = from->metadata ? strdup(from->metadata) : NULL;
    job.evaluations = from->evaluations ? strdup(from->evaluations) : NULL;
    job.evaluation_jobs = NULL; /* no part of the row */
    if ((from->hyperparameters && !job.hyperparameters) || (from->metadata && !job.metadata) ||
        (from->evaluations && !job.evaluations)) {
        job_free(&job);
        return ERROR_NO_MEMORY;
    }
    *ret_job = job;
    return 0;
}

/* job is zeroed; on failure it may own something (job_free). */
static int job_from_row(const struct query *query, void *item, struct error *error)
{
    struct job_resource *job = item;
    char status[32], kind[32];
    column_text(query, 0, job->id, sizeof job->id);
    job->created_at = column_int(query, 1);
    job->started_at = column_int(query, 2);
    job->finished_at = column_int(query, 3);
    column_text(query, 4, job->model, sizeof job->model);
    column_text(query, 5, job->fine_tuned_model, sizeof job->fine_tuned_model);
    column_text(query, 6, job->suffix, sizeof job->suffix);
    column_text(query, 7, status, sizeof status);
    int known = job_status_from_name(status);
    if (known < 0)
        return error_set(error, ERROR_CORRUPT, "job '%s' has the unknown status '%s'", job->id, status);
    job->status = (enum job_status)known;
    column_text(query, 8, job->training_file, sizeof job->training_file);
    column_text(query, 9, job->validation_file, sizeof job->validation_file);
    column_text(query, 10, job->result_file, sizeof job->result_file);
    job->seed = (uint64_t)column_int(query, 11);
    int code;
    if ((code = column_copy(query, 12, &job->hyperparameters, error)) ||
        (code = column_copy(query, 13, &job->metadata, error)))
        return code;
    job->trained_tokens = column_int(query, 14);
    column_text(query, 15, job->error_code, sizeof job->error_code);
    column_text(query, 16, job->error_param, sizeof job->error_param);
    column_text(query, 17, job->error_message, sizeof job->error_message);
    job->attempt = column_int(query, 18);
    job->step = column_int(query, 19);
    job->total_steps = column_int(query, 20);
    job->tokens_per_second = column_real(query, 21);
    job->loss = column_real(query, 22);
    job->eta_seconds = column_real(query, 23);
    job->peak_memory_bytes = column_int(query, 24);
    job->bytes_per_token = column_real(query, 25);
    column_text(query, 26, job->device, sizeof job->device);
    job->planned_memory_bytes = column_int(query, 27);
    job->skipped_steps = column_int(query, 28);
    column_text(query, 29, kind, sizeof kind);
    job->kind = strcmp(kind, job_kind_name(JOB_EVALUATION)) ? JOB_FINE_TUNING : JOB_EVALUATION;
    column_text(query, 30, job->parent, sizeof job->parent);
    job->queue_position = -1;
    code = column_copy(query, 31, &job->evaluations, error);
    return code ? code : column_copy(query, 32, &job->evaluation_jobs, error);
}

/* What follows id and created_at in COLUMNS and may change: all up to the kind. */
static void bind_job(struct query *query, const struct job_resource *job)
{
    query_int(query, job->started_at);
    query_int(query, job->finished_at);
    query_text(query, job->model);
    query_text(query, job->fine_tuned_model);
    query_text(query, job->suffix);
    query_text(query, job_status_name(job->status));
    query_text(query, job->training_file);
    query_text(query, job->validation_file);
    query_text(query, job->result_file);
    query_int(query, (int64_t)job->seed);
    query_text(query, job->hyperparameters);
    query_text(query, job->metadata);
    query_int(query, job->trained_tokens);
    query_text(query, job->error_code);
    query_text(query, job->error_param);
    query_text(query, job->error_message);
    query_int(query, job->attempt);
    query_int(query, job->step);
    query_int(query, job->total_steps);
    query_real(query, job->tokens_per_second);
    query_real(query, job->loss);
    query_real(query, job->eta_seconds);
    query_int(query, job->peak_memory_bytes);
    query_real(query, job->bytes_per_token);
    query_text(query, job->device);
    query_int(query, job->planned_memory_bytes);
    query_int(query, job->skipped_steps);
}

/* ---- insert, update ---- */

struct job_write {
    struct store_request request;
    struct job_resource job;
    struct kept_answer *answer; /* of an insertion, or NULL */
};

static void release_write(struct store_request *request)
{
    struct job_write *write = (struct job_write *)request;
    job_free(&write->job);
    free(write->answer);
}

static void write_job(struct store *store, const struct job_resource *job, const struct kept_answer *answer,
                      int (*run)(struct connection *, struct store_request *, struct error *),
                      store_written done, void *arg)
{
    struct job_write *write = request_new_write(sizeof *write, run, done, arg);
    if (!write)
        return;
    if (answer)
        write->answer = answer_copy(answer);
    write->request.release = release_write;
    if (job_copy(job, &write->job) || (answer && !write->answer))
        request_refuse(&write->request, ERROR_NO_MEMORY, "no memory for a job");
    store_write(store, &write->request);
}

static int check_file(struct connection *connection, const char *id, const char *param, struct error *error)
{
    int found = id[0] ? query_finds(connection, "SELECT 1 FROM files WHERE id = ?", id, NULL, error) : 1;
    if (found == 0)
        return error_set_param(error, ERROR_NOT_FOUND, param, "no file has the id '%s'", id);
    return found < 0 ? found : 0;
}

static int run_insert(struct connection *connection, struct store_request *request, struct error *error)
{
    const struct job_write *write = (const struct job_write *)request;
    const struct job_resource *job = &write->job;
    int code;
    if ((code = check_file(connection, job->training_file, "training_file", error)) ||
        (code = check_file(connection, job->validation_file, "validation_file", error)))
        return code;
    struct query query = query_begin(connection, "INSERT INTO jobs (" COLUMNS
                                                 ") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, "
                                                 "?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)");
    query_text(&query, job->id);
    query_int(&query, job->created_at);
    bind_job(&query, job);
    query_text(&query, job_kind_name(job->kind));
    query_text(&query, job->parent);
    query_text(&query, job->evaluations);
    code = query_run(&query, NULL, error);
    return code || !write->answer ? code : answer_row_insert(connection, write->answer, error);
}

void store_job_insert(struct store *store, const struct job_resource *job, const struct kept_answer *answer,
                      store_written done, void *arg)
{
    write_job(store, job, answer, run_insert, done, arg);
}

/* Why an update of an open job touched no row. *ret_status: what the job is. */
static int explain_closed(struct connection *connection, const char *id, int *ret_status, struct error *error)
{
    struct query query = query_begin(connection, "SELECT status FROM jobs WHERE id = ?");
    query_text(&query, id);
    int code = query_next(&query, error);
    if (code == 0)
        return error_set(error, ERROR_NOT_FOUND, "no job has the id '%s'", id);
    if (code < 0)
        return code;
    char status[32];
    column_text(&query, 0, status, sizeof status);
    query_end(&query);
    *ret_status = job_status_from_name(status);
    return error_set(error, ERROR_INVALID, "job '%s' has already ended: %s", id, status);
}

/* ret_status may be NULL; it is set when the answer is ERROR_INVALID because the job has ended. */
static int update_row(struct connection *connection, const struct job_resource *job, int *ret_status,
                      struct error *error)
{
    struct query query = query_begin(
        connection,
        "UPDATE jobs SET started_at = ?, finished_at = ?, model = ?, fine_tuned_model = ?, suffix = ?, "
        "status = ?, training_file = ?, validation_file = ?, result_file = ?, seed = ?, hyperparameters = ?, "
        "metadata = ?, trained_tokens = ?, error_code = ?, error_param = ?, error_message = ?, attempt = ?, "
        "step = ?, total_steps = ?, tokens_per_second = ?, loss = ?, eta_seconds = ?, peak_memory_bytes = ?, "
        "bytes_per_token = ?, device = ?, planned_memory_bytes = ?, skipped_steps = ? WHERE id = ? "
        "AND " OPEN);
    bind_job(&query, job);
    query_text(&query, job->id);
    int64_t changes = 0;
    int code = query_run(&query, &changes, error);
    int status = -1;
    if (!code && !changes)
        code = explain_closed(connection, job->id, &status, error);
    if (ret_status)
        *ret_status = status;
    return code;
}

static int run_update(struct connection *connection, struct store_request *request, struct error *error)
{
    return update_row(connection, &((struct job_write *)request)->job, NULL, error);
}

void store_job_update(struct store *store, const struct job_resource *job, store_written done, void *arg)
{
    write_job(store, job, NULL, run_update, done, arg);
}

/* ---- the end ---- */

struct job_finish {
    struct store_request request;
    struct job_resource job;
    struct adapter_row model;
    struct file_resource result_file;
    struct event_resource event;
    bool has_model, has_result_file, inserted; /* inserted: the event was, now */
    store_job_finished done;
};

static int run_finish(struct connection *connection, struct store_request *request, struct error *error)
{
    struct job_finish *finish = (struct job_finish *)request;
    const struct job_resource *job = &finish->job;
    if (!job_status_is_final(job->status))
        return error_set(error, ERROR_INVALID, "'%s' is no end of a job", job_status_name(job->status));
    finish->inserted = false;
    int status = -1;
    int code = update_row(connection, job, &status, error);
    if (code == ERROR_INVALID && status == (int)job->status)
        return 0; /* said before, and done then */
    if (!code && finish->has_result_file)
        code = file_row_insert(connection, &finish->result_file, error);
    if (!code && finish->has_model)
        code = model_row_insert(connection, &finish->model, error);
    if (!code)
        code = event_row_insert(connection, &finish->event, -1, &finish->inserted, error);
    if (!code)
        code = resume_point_forget(connection, job->id, error);
    return code;
}

static void deliver_finish(struct store_request *request)
{
    struct job_finish *finish = (struct job_finish *)request;
    int code = request->code;
    if (finish->done)
        finish->done(request->arg, code, code ? &request->error : NULL,
                     !code && finish->inserted ? &finish->event : NULL);
}

static void release_finish(struct store_request *request)
{
    struct job_finish *finish = (struct job_finish *)request;
    job_free(&finish->job);
    event_free(&finish->event);
}

void store_job_finish(struct store *store, const struct job_resource *job, const struct adapter_row *model,
                      const struct file_resource *result_file, const char *message, store_job_finished done,
                      void *arg)
{
    struct job_finish *finish = request_new(sizeof *finish);
    if (!finish) {
        struct error error;
        error_set(&error, ERROR_NO_MEMORY, "no memory for the end of a job");
        if (done)
            done(arg, error.code, &error, NULL);
        return;
    }
    finish->request.run = run_finish;
    finish->request.deliver = deliver_finish;
    finish->request.release = release_finish;
    finish->request.arg = arg;
    finish->done = done;
    if (model) {
        finish->model = *model;
        finish->has_model = true;
    }
    if (result_file) {
        finish->result_file = *result_file;
        finish->has_result_file = true;
    }
    struct event_resource *event = &finish->event;
    snprintf(event->job, sizeof event->job, "%s", job->id);
    snprintf(event->level, sizeof event->level, "%s", job->status == JOB_FAILED ? "error" : "info");
    snprintf(event->type, sizeof event->type, "message");
    event->created_at = time(NULL);
    event->message = strdup(message);
    if (job_copy(job, &finish->job) || !event->message)
        request_refuse(&finish->request, ERROR_NO_MEMORY, "no memory for the end of a job");
    store_write(store, &finish->request);
}

/* ---- reads ---- */

struct job_read {
    struct store_request request;
    char id[ID_BYTES];
    struct job_resource job;
    store_job_read done;
};

static int run_get(struct connection *connection, struct store_request *request, struct error *error)
{
    struct job_read *read = (struct job_read *)request;
    struct query query = query_begin(connection, "SELECT " SELECTED " FROM jobs WHERE id = ?");
    query_text(&query, read->id);
    int code = query_next(&query, error);
    if (code == 0)
        return error_set(error, ERROR_NOT_FOUND, "no job has the id '%s'", read->id);
    if (code < 0)
        return code;
    code = job_from_row(&query, &read->job, error);
    query_end(&query);
    return code;
}

static void deliver_get(struct store_request *request)
{
    struct job_read *read = (struct job_read *)request;
    read->done(request->arg, request->code, request->code ? NULL : &read->job);
}

static void release_get(struct store_request *request)
{
    job_free(&((struct job_read *)request)->job);
}

void store_job_get(struct store *store, const char *id, store_job_read done, void *arg)
{
    struct job_read *read = request_new(sizeof *read);
    if (!read) {
        done(arg, ERROR_NO_MEMORY, NULL);
        return;
    }
    read->request.run = run_get;
    read->request.deliver = deliver_get;
    read->request.release = release_get;
    read->request.arg = arg;
    read->done = done;
    snprintf(read->id, sizeof read->id, "%s", id);
    store_read(store, &read->request);
}

struct job_list {
    struct store_request request;
    struct page page;
    enum job_kind kind;
    char *metadata; /* JSON text, or NULL: any */
    struct rows rows;
    bool has_more;
    store_jobs_read done;
};

static int run_list(struct connection *connection, struct store_request *request, struct error *error)
{
    struct job_list *list = (struct job_list *)request;
    int64_t start;
    int code =
        page_start(connection, &list->page, "SELECT sequence FROM jobs WHERE id = ?", NULL, &start, error);
    if (code)
        return code;
    bool any = !list->metadata;
    const char *sql = list->page.ascending ? (any ? LIST_ASCENDING(SELECTED, "jobs", OF_KIND)
                                                  : LIST_ASCENDING(SELECTED, "jobs", OF_KIND HAS_METADATA))
                                           : (any ? LIST_DESCENDING(SELECTED, "jobs", OF_KIND)
                                                  : LIST_DESCENDING(SELECTED, "jobs", OF_KIND HAS_METADATA));
    struct query query = query_begin(connection, sql);
    query_text(&query, job_kind_name(list->kind));
    if (!any)
        query_text(&query, list->metadata);
    page_bind(&query, &list->page, start);
    return rows_collect(&list->rows, &query, list->page.limit, job_from_row, &list->has_more, error);
}

static void deliver_list(struct store_request *request)
{
    struct job_list *list = (struct job_list *)request;
    if (request->code)
        list->done(request->arg, request->code, NULL, 0, false);
    else
        list->done(request->arg, 0, list->rows.items, list->rows.count, list->has_more);
}

static void free_item(void *item)
{
    job_free(item);
}

static void release_list(struct store_request *request)
{
    struct job_list *list = (struct job_list *)request;
    rows_free(&list->rows, free_item);
    free(list->metadata);
}

void store_job_list(struct store *store, const struct list_query *query, store_jobs_read done, void *arg)
{
    struct job_list *list = request_new(sizeof *list);
    if (!list) {
        done(arg, ERROR_NO_MEMORY, NULL, 0, false);
        return;
    }
    list->request.run = run_list;
    list->request.deliver = deliver_list;
    list->request.release = release_list;
    list->request.arg = arg;
    list->rows.item_size = sizeof(struct job_resource);
    list->page = page_of(query);
    list->kind = query->job_kind;
    list->done = done;
    if (query->metadata && json_object_size(query->metadata)) {
        list->metadata = json_dumps(query->metadata, JSON_COMPACT);
        if (!list->metadata)
            request_refuse(&list->request, ERROR_NO_MEMORY, "no memory for a list of jobs");
    }
    store_read(store, &list->request);
}

/* ---- start-up ---- */

struct recovery_read {
    struct store_request request;
    struct rows rows;
};

static int resume_point(struct connection *connection, struct job_recovery *item, struct error *error)
{
    /* At one step the resume point was written last. */
    struct query query = query_begin(
        connection,
        "SELECT path, step FROM (SELECT models.path, checkpoints.step, 0 AS preferred FROM checkpoints "
        "JOIN models ON models.id = checkpoints.model WHERE checkpoints.job = ?1 UNION ALL SELECT path, "
        "step, 1 FROM resume_points WHERE job = ?1) ORDER BY step DESC, preferred DESC LIMIT 1");
    query_text(&query, item->job.id);
    int code = query_next(&query, error);
    if (code <= 0)
        return code;
    column_text(&query, 0, item->resume_from, sizeof item->resume_from);
    item->resume_step = column_int(&query, 1);
    query_end(&query);
    return 0;
}

static int run_unfinished(struct connection *connection, struct store_request *request, struct error *error)
{
    struct rows *rows = &((struct recovery_read *)request)->rows;
    struct query query =
        query_begin(connection, "SELECT " SELECTED " FROM jobs WHERE " OPEN " ORDER BY sequence");
    int code;
    while ((code = query_next(&query, error)) > 0) {
        struct job_recovery *item = rows_add(rows);
        if (!item)
            code = error_set(error, ERROR_NO_MEMORY, "no memory for the unfinished jobs");
        else if (!(code = job_from_row(&query, &item->job, error)))
            code = resume_point(connection, item, error);
        if (code)
            break;
    }
    query_end(&query);
    return code;
}

static void free_recovery(void *item)
{
    job_free(&((struct job_recovery *)item)->job);
}

int store_load_unfinished(struct store *store, struct job_recovery **ret_items, size_t *ret_count,
                          struct error *error)
{
    struct recovery_read read = {.request.run = run_unfinished,
                                 .rows.item_size = sizeof(struct job_recovery)};
    int code = store_read_blocking(store, &read.request, error);
    if (code) {
        rows_free(&read.rows, free_recovery);
        return code;
    }
    *ret_items = read.rows.items;
    *ret_count = read.rows.count;
    return 0;
}

struct count_read {
    struct store_request request;
    int64_t counts[JOB_STATUS_COUNT];
};

static int run_count(struct connection *connection, struct store_request *request, struct error *error)
{
    struct count_read *read = (struct count_read *)request;
    struct query query = query_begin(connection, "SELECT status, count(*) FROM jobs GROUP BY status");
    int code;
    while ((code = query_next(&query, error)) > 0) {
        char name[32];
        column_text(&query, 0, name, sizeof name);
        int status = job_status_from_name(name);
        if (status >= 0)
            read->counts[status] = column_int(&query, 1);
    }
    return code;
}

int store_count_jobs(struct store *store, int64_t ret_counts[JOB_STATUS_COUNT], struct error *error)
{
    struct count_read read = {.request.run = run_count};
    int code = store_read_blocking(store, &read.request, error);
    if (!code)
        memcpy(ret_counts, read.counts, sizeof read.counts);
    return code;
}
