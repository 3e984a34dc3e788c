/* evaluation_requests.c: POST /v1/evaluations, and what workers are told of an evaluation. Part of scheduler.h; loop thread only.
 *
 * A row's settings hold, beyond the request's, where its tasks and documents come from, so that a resumed evaluation reads what the
 * first attempt read: "definitions": {task: the file's id, or the name of a definition in the tasks folder}, "files": {name:
 * id of an uploaded file}. */
#include "daemon/live_job.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_FILES = 1000 };

static const char file_prefix[] = "file-";

struct creation {
    struct scheduler *scheduler;
    struct job_resource job;
    json_t *settings;
    scheduler_keeper keep;
    scheduler_answer done;
    void *arg;
};

static void creation_free(struct creation *creation)
{
    json_decref(creation->settings);
    free(creation);
}

static void refuse(struct creation *creation, int status, const char *code, const char *param,
                   const char *format, ...) __attribute__((format(printf, 5, 6)));
static void refuse(struct creation *creation, int status, const char *code, const char *param,
                   const char *format, ...)
{
    struct problem problem = {0};
    char message[sizeof problem.message];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    problem_set(&problem, status, code, param, "%s", message);
    creation->done(creation->arg, NULL, &problem);
    job_free(&creation->job);
    creation_free(creation);
}

/* ---- creating one ---- */

const char *evaluation_refused_precision(const struct scheduler *scheduler, const json_t *settings)
{
    const json_t *precision;
    size_t i;
    json_array_foreach(json_object_get(settings, "precisions"), i, precision)
    {
        const char *name = json_string_value(precision);
        if (!scheduler->has_gpu && strcmp(name, "auto") && strcmp(name, "fp32"))
            return name;
    }
    return NULL;
}

static void on_inserted(void *arg, int code, const struct error *error)
{
    struct creation *creation = arg;
    struct scheduler *scheduler = creation->scheduler;
    if (code) {
        refuse(creation, code == ERROR_INVALID ? 400 : 503, "store_error", NULL,
               "The evaluation could not be stored: %s", error ? error->message : "");
        return;
    }
    struct live_job *live = live_job_add(scheduler, &creation->job);
    if (!live) { /* the row stands: the next start takes it up */
        refuse(creation, 503, "no_memory", NULL,
               "The evaluation is stored and will run after the next start.");
        return;
    }
    scheduler->counts[JOB_VALIDATING]++;
    creation->done(creation->arg, &live->job, NULL);
    creation_free(creation);
    live_job_say(live, "info", "Created evaluation: %s", live->job.id);
    scheduler_run(scheduler);
}

static bool is_definition(const char *filename)
{
    size_t length = strlen(filename);
    return length > 5 && !strcmp(filename + length - 5, ".json");
}

static bool has_builtin(const struct scheduler *scheduler, const char *name)
{
    char path[4096];
    if (strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789_") != strlen(name))
        return false;
    snprintf(path, sizeof path, "%s/%s.json", scheduler->options.tasks_dir, name);
    return !access(path, R_OK);
}

/* Where the task's definition is: an uploaded one that is named by its id; else that of the longest beginning of the name that
 * ends before a '_' and has one, in the tasks folder or else uploaded as NAME.json. A new reference, or NULL. */
static json_t *find_definition(const struct scheduler *scheduler, const char *task, const json_t *uploaded)
{
    char name[MODEL_ID_BYTES], filename[sizeof name + 8];
    if (!strncmp(task, file_prefix, strlen(file_prefix)))
        return json_object_get(json_object_get(uploaded, "ids"), task) ? json_string(task) : NULL;
    snprintf(name, sizeof name, "%s", task);
    for (char *cut = name + strlen(name); cut; cut = strrchr(name, '_')) {
        *cut = '\0';
        snprintf(filename, sizeof filename, "%s.json", name);
        json_t *id = json_object_get(json_object_get(uploaded, "names"), filename);
        if (has_builtin(scheduler, name))
            return json_string(name);
        if (id)
            return json_incref(id);
    }
    return NULL;
}

static void insert(struct creation *creation, json_t *uploaded)
{
    json_t *definitions = json_object(), *files = json_object(), *task, *id;
    const char *filename;
    size_t i;
    json_array_foreach(json_object_get(creation->settings, "tasks"), i, task)
    {
        json_t *definition = find_definition(creation->scheduler, json_string_value(task), uploaded);
        if (!definition) {
            json_decref(definitions);
            json_decref(files);
            refuse(creation, 400, "task_not_found", "tasks", EVALUATION_NO_TASK, json_string_value(task));
            return;
        }
        json_object_set_new(definitions, json_string_value(task), definition);
    }
    json_object_foreach(json_object_get(uploaded, "names"), filename, id)
    {
        if (!is_definition(filename))
            json_object_set(files, filename, id);
    }
    if (!json_object_set_new(creation->settings, "definitions", definitions) &&
        !json_object_set_new(creation->settings, "files", files))
        creation->job.hyperparameters = json_dumps(creation->settings, JSON_COMPACT);
    if (!creation->job.hyperparameters) {
        refuse(creation, 503, "no_memory", NULL, "The server is out of memory.");
        return;
    }
    store_job_insert(creation->scheduler->options.store, &creation->job,
                     creation->keep(creation->arg, &creation->job), on_inserted, creation);
}

/* {"names": {a file's name: its id}, "ids": {every id: true}}. The files come newest first: of those with one name the last that was
 * uploaded counts. */
static json_t *uploaded_files(const struct file_resource *items, size_t count)
{
    json_t *names = json_object(), *ids = json_object();
    for (size_t i = 0; i < count; i++) {
        json_object_set_new(ids, items[i].id, json_true());
        if (!json_object_get(names, items[i].filename))
            json_object_set_new(names, items[i].filename, json_string(items[i].id));
    }
    return json_pack("{s:o, s:o}", "names", names, "ids", ids);
}

static void on_files(void *arg, int code, const struct file_resource *items, size_t count, bool has_more)
{
    struct creation *creation = arg;
    (void)has_more;
    if (code) {
        refuse(creation, 503, "store_error", NULL, "The uploaded files could not be looked up.");
        return;
    }
    json_t *uploaded = uploaded_files(items, count);
    insert(creation, uploaded);
    json_decref(uploaded);
}

void scheduler_create_evaluation(struct scheduler *scheduler, const struct evaluation_request *request,
                                 scheduler_keeper keep, scheduler_answer done, void *arg)
{
    struct creation *creation = calloc(1, sizeof *creation);
    struct problem problem = {0};
    if (!creation) {
        problem_set(&problem, 503, "no_memory", NULL, "The server is out of memory.");
        done(arg, NULL, &problem);
        return;
    }
    *creation = (struct creation){.scheduler = scheduler, .keep = keep, .done = done, .arg = arg};
    creation->settings = json_deep_copy(request->settings);
    struct job_resource *job = &creation->job;
    const json_t *models = json_object_get(request->settings, "models");
    job->kind = JOB_EVALUATION;
    store_new_id("eval-", job->id);
    job->created_at = live_job_now();
    snprintf(job->model, sizeof job->model, "%s", json_string_value(json_array_get(models, 0)));
    job->status = JOB_VALIDATING;
    job->trained_tokens = job->queue_position = -1;
    job->loss = job->tokens_per_second = job->eta_seconds = job->bytes_per_token = (double)NAN;
    job->seed = request->seed;
    snprintf(job->parent, sizeof job->parent, "%s", request->parent);
    job->metadata = request->metadata ? json_dumps(request->metadata, JSON_COMPACT) : NULL;
    const json_t *model;
    size_t i;
    json_array_foreach(models, i, model)
    {
        if (registry_find(scheduler->options.registry, json_string_value(model)))
            continue;
        refuse(creation, 400, "model_not_found", "model", "There is no model '%s'.",
               json_string_value(model));
        return;
    }
    const char *refused = evaluation_refused_precision(scheduler, request->settings);
    if (refused) {
        refuse(creation, 400, "unsupported_precision", "precision", EVALUATION_NO_PRECISION, refused);
    } else if (!creation->settings || (request->metadata && !job->metadata)) {
        refuse(creation, 503, "no_memory", NULL, "The server is out of memory.");
    } else if (scheduler->draining) {
        refuse(creation, 503, "shutting_down", NULL, "The server is shutting down.");
    } else {
        const struct list_query query = {.limit = MAX_FILES, .purpose = "evals"};
        store_file_list(scheduler->options.store, &query, on_files, creation);
    }
}

/* ---- of a fine-tuning job ---- */

struct task_check {
    struct scheduler *scheduler;
    json_t *evaluations;
    void (*done)(void *arg, int code, const char *missing);
    void *arg;
};

static void on_files_of_check(void *arg, int code, const struct file_resource *items, size_t count,
                              bool has_more)
{
    struct task_check *check = arg;
    json_t *uploaded = uploaded_files(items, code ? 0 : count), *task;
    const char *missing = NULL;
    size_t i;
    (void)has_more;
    json_array_foreach(json_object_get(json_object_get(check->evaluations, "settings"), "tasks"), i, task)
    {
        json_t *definition = find_definition(check->scheduler, json_string_value(task), uploaded);
        if (!definition && !missing)
            missing = json_string_value(task);
        json_decref(definition);
    }
    check->done(check->arg, code, missing);
    json_decref(uploaded);
    json_decref(check->evaluations);
    free(check);
}

void evaluation_check_tasks(struct scheduler *scheduler, const char *evaluations,
                            void (*done)(void *arg, int code, const char *missing), void *arg)
{
    const struct list_query query = {.limit = MAX_FILES, .purpose = "evals"};
    struct task_check *check = calloc(1, sizeof *check);
    if (!check) {
        done(arg, ERROR_NO_MEMORY, NULL);
        return;
    }
    *check = (struct task_check){scheduler, json_loads(evaluations, 0, NULL), done, arg};
    store_file_list(scheduler->options.store, &query, on_files_of_check, check);
}

/* ---- for workers ---- */

static json_t *folder_payload(const char *id, const char *path)
{
    return json_pack("{s:s,s:s}", "id", id, "path", path);
}

/* A model that was deleted meanwhile has an empty path: the worker says so. */
static json_t *model_payload(struct scheduler *scheduler, const char *id)
{
    const struct model_entry *entry = registry_find(scheduler->options.registry, id);
    const bool is_base = !entry || entry->is_base;
    const struct model_entry *base =
        is_base ? entry : registry_find(scheduler->options.registry, entry->base);
    return json_pack("{s:s,s:o,s:o}", "name", id, "model",
                     folder_payload(base ? base->resource.id : id, base ? base->path : ""), "adapter",
                     is_base ? json_null() : folder_payload(id, entry->path));
}

static json_t *task_payload(const struct scheduler *scheduler, const char *task, const char *definition)
{
    const bool uploaded = !strncmp(definition, file_prefix, strlen(file_prefix));
    const bool by_id = !strncmp(task, file_prefix, strlen(file_prefix));
    return json_pack("{s:o,s:o}", "name", by_id ? json_null() : json_string(task), "definition",
                     uploaded ? json_sprintf("%s/files/%s", scheduler->options.data_dir, definition)
                              : json_sprintf("%s/%s.json", scheduler->options.tasks_dir, definition));
}

/* Settings of before there was a choice say nothing. */
static json_t *precisions_payload(const json_t *settings)
{
    json_t *precisions = json_object_get(settings, "precisions");
    return precisions ? json_incref(precisions) : json_pack("[s]", "auto");
}

json_t *evaluation_payload(struct scheduler *scheduler, const struct job_resource *job)
{
    json_t *settings = json_loads(job->hyperparameters, 0, NULL);
    json_t *models = json_array(), *tasks = json_array(), *files = json_object(), *item;
    const char *folder = scheduler->options.eval_data_dir, *name;
    size_t i;
    json_array_foreach(json_object_get(settings, "models"), i, item)
        json_array_append_new(models, model_payload(scheduler, json_string_value(item)));
    json_array_foreach(json_object_get(settings, "tasks"), i, item)
    {
        const char *task = json_string_value(item);
        const char *definition =
            json_string_value(json_object_get(json_object_get(settings, "definitions"), task));
        json_array_append_new(tasks, task_payload(scheduler, task, definition ? definition : task));
    }
    json_object_foreach(json_object_get(settings, "files"), name, item) json_object_set_new(
        files, name, json_sprintf("%s/files/%s", scheduler->options.data_dir, json_string_value(item)));
    json_t *payload =
        json_pack("{s:s,s:I,s:o,s:o,s:o,s:O?,s:O?,s:O?,s:O?,s:I,s:o,s:o}", "job", job->id, "attempt",
                  (json_int_t)job->attempt, "models", models, "precisions", precisions_payload(settings),
                  "tasks", tasks, "num_fewshot", json_object_get(settings, "num_fewshot"), "limit",
                  json_object_get(settings, "limit"), "max_length", json_object_get(settings, "max_length"),
                  "share", json_object_get(settings, "share"), "seed", (json_int_t)job->seed, "files", files,
                  "data_dir", folder ? json_string(folder) : json_null());
    json_decref(settings);
    return payload;
}

bool evaluation_uses(const struct job_resource *job, const char *model)
{
    json_t *settings = json_loads(job->hyperparameters, 0, NULL), *item;
    size_t i;
    bool found = false;
    json_array_foreach(json_object_get(settings, "models"), i, item) found |=
        !strcmp(json_string_value(item), model);
    json_decref(settings);
    return found;
}
