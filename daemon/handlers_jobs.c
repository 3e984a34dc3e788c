/* handlers_jobs.c: /v1/fine_tuning/jobs, but for its events; and cancel, pause, resume of evaluations. Loop thread only. */
#include "daemon/handlers.h"

#include "daemon/reply.h"

#include <stdio.h>
#include <time.h>

json_t *handlers_encode_job(const struct server *server, const struct job_resource *job)
{
    if (job->kind == JOB_EVALUATION)
        return evaluation_encode(job, NULL, 0, (int64_t)time(NULL));
    return job_encode(job, server->config->organization, (int64_t)time(NULL));
}

static const struct kept_answer *keep(void *arg, const struct job_resource *job)
{
    struct http_request *request = arg;
    return reply_keep(request, 200, handlers_encode_job(request->context, job));
}

/* What the scheduler says of a job. */
static void on_scheduled(void *arg, const struct job_resource *job, const struct problem *problem)
{
    struct http_request *request = arg;
    if (job)
        reply_json(request, 200, handlers_encode_job(request->context, job));
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
    scheduler_create_job(server->scheduler, &job, keep, on_scheduled, request);
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
        reply_json(request, 200, handlers_encode_job(request->context, job));
}

void handle_job_get(struct server *server, struct http_request *request)
{
    const struct job_resource *live = scheduler_find(server->scheduler, request->route.id);
    request->context = server;
    if (live)
        reply_json(request, 200, handlers_encode_job(server, live));
    else
        store_job_get(server->store, request->route.id, on_job, request);
}

/* ---- lists ---- */

/* The live row knows more than the stored one: the queue, the last metrics. */
static json_t *encode_listed(const struct http_request *request, const void *item)
{
    const struct server *server = request->context;
    const struct job_resource *job = item, *live = scheduler_find(server->scheduler, job->id);
    return handlers_encode_job(server, live ? live : job);
}

static void on_jobs(void *arg, int code, const struct job_resource *items, size_t count, bool has_more)
{
    reply_list(arg, code, "there is no such job", items, count, sizeof *items, has_more, encode_listed);
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

static json_t *encode_checkpoint(const struct http_request *request, const void *item)
{
    (void)request;
    return checkpoint_encode(item);
}

static void on_checkpoints(void *arg, int code, const struct checkpoint_resource *items, size_t count,
                           bool has_more)
{
    reply_list(arg, code, "the job has no such checkpoint", items, count, sizeof *items, has_more,
               encode_checkpoint);
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
