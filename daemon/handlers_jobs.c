/* handlers_jobs.c: /v1/fine_tuning/jobs, but for its events. Loop thread only. */
#include "daemon/handlers.h"

#include "daemon/reply.h"

#include <stdio.h>
#include <time.h>

static json_t *encode(const struct server *server, const struct job_resource *job)
{
    return job_encode(job, server->config->organization, (int64_t)time(NULL));
}

/* What the scheduler says of a job. */
static void on_scheduled(void *arg, const struct job_resource *job, const struct problem *problem)
{
    struct http_request *request = arg;
    if (job)
        reply_json(request, 200, encode(request->context, job));
    else
        reply_problem(request, problem);
}

void handle_job_create(struct server *server, struct http_request *request)
{
    struct job_request job;
    struct problem problem;
    json_t *body = NULL;
    if (body_decode(request->body, request->length, &body, &problem) ||
        job_request_decode(body, &job, &problem)) {
        json_decref(body);
        reply_problem(request, &problem);
        return;
    }
    request->context = server;
    scheduler_create_job(server->scheduler, &job, on_scheduled, request);
    job_request_free(&job);
    json_decref(body);
}

void handle_job_cancel(struct server *server, struct http_request *request)
{
    request->context = server;
    scheduler_cancel_job(server->scheduler, request->route.id, on_scheduled, request);
}

void handle_job_pause(struct server *server, struct http_request *request)
{
    request->context = server;
    scheduler_pause_job(server->scheduler, request->route.id, on_scheduled, request);
}

void handle_job_resume(struct server *server, struct http_request *request)
{
    request->context = server;
    scheduler_resume_job(server->scheduler, request->route.id, on_scheduled, request);
}

/* ---- get ---- */

static void reply_no_job(struct http_request *request, int code)
{
    char words[300];
    snprintf(words, sizeof words, "fine-tuning job '%.255s'", request->route.id);
    reply_store_error(request, code, NULL, words);
}

static void on_job(void *arg, int code, const struct job_resource *job)
{
    struct http_request *request = arg;
    if (code)
        reply_no_job(request, code);
    else
        reply_json(request, 200, encode(request->context, job));
}

void handle_job_get(struct server *server, struct http_request *request)
{
    const struct job_resource *live = scheduler_find(server->scheduler, request->route.id);
    request->context = server;
    if (live)
        reply_json(request, 200, encode(server, live));
    else
        store_job_get(server->store, request->route.id, on_job, request);
}

/* ---- lists ---- */

static void on_jobs(void *arg, int code, const struct job_resource *items, size_t count, bool has_more)
{
    struct http_request *request = arg;
    const struct server *server = request->context;
    if (code == ERROR_NOT_FOUND) {
        reply_refuse(request, 400, "invalid_value", "after", "after: there is no such job.");
        return;
    }
    if (code) {
        reply_store_error(request, code, NULL, "job");
        return;
    }
    json_t *data = json_array();
    for (size_t i = 0; i < count; i++) {
        /* The live row knows more than the stored one: the queue, the last metrics. */
        const struct job_resource *live = scheduler_find(server->scheduler, items[i].id);
        json_array_append_new(data, encode(server, live ? live : &items[i]));
    }
    reply_json(request, 200, list_encode(data, has_more));
}

void handle_job_list(struct server *server, struct http_request *request)
{
    struct list_query query;
    struct problem problem;
    if (list_query_decode(LIST_JOBS, request->arguments, request->n_arguments, &query, &problem)) {
        reply_problem(request, &problem);
        return;
    }
    request->context = server;
    store_job_list(server->store, &query, on_jobs, request);
    json_decref(query.metadata);
}

static void on_checkpoints(void *arg, int code, const struct checkpoint_resource *items, size_t count,
                           bool has_more)
{
    struct http_request *request = arg;
    if (code == ERROR_NOT_FOUND) {
        reply_refuse(request, 400, "invalid_value", "after", "after: the job has no such checkpoint.");
        return;
    }
    if (code) {
        reply_store_error(request, code, NULL, "job");
        return;
    }
    json_t *data = json_array();
    for (size_t i = 0; i < count; i++)
        json_array_append_new(data, checkpoint_encode(&items[i]));
    reply_json(request, 200, list_encode(data, has_more));
}

static void on_job_of_checkpoints(void *arg, int code, const struct job_resource *job)
{
    struct http_request *request = arg;
    struct server *server = request->context;
    struct list_query query;
    struct problem problem;
    (void)job;
    if (code)
        reply_no_job(request, code);
    else if (list_query_decode(LIST_CHECKPOINTS, request->arguments, request->n_arguments, &query, &problem))
        reply_problem(request, &problem);
    else
        store_checkpoint_list(server->store, request->route.id, &query, on_checkpoints, request);
}

void handle_job_checkpoints(struct server *server, struct http_request *request)
{
    request->context = server;
    store_job_get(server->store, request->route.id, on_job_of_checkpoints, request);
}
