/* handlers_evaluations.c: /v1/evaluations, but for what it has in common with fine-tuning jobs. Loop thread only. */
#include "daemon/handlers.h"

#include "daemon/reply.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PAGE_EXAMPLES = 64 };

static void reply_no_evaluation(struct http_request *request, int code)
{
    char words[300];
    snprintf(words, sizeof words, "evaluation '%.255s'", request->route.id);
    reply_store_error(request, code, NULL, words);
}

/* ---- create, list ---- */

static const struct kept_answer *keep(void *arg, const struct job_resource *job)
{
    struct http_request *request = arg;
    return reply_keep(request, 200, handlers_encode_job(request->context, job));
}

static void on_created(void *arg, const struct job_resource *job, const struct problem *problem)
{
    struct http_request *request = arg;
    if (job)
        reply_json(request, 200, handlers_encode_job(request->context, job));
    else
        reply_problem(request, problem);
}

void handle_evaluation_create(struct server *server, struct http_request *request)
{
    struct evaluation_request evaluation;
    struct problem problem;
    json_t *body = NULL;
    if (body_decode(request->body, request->length, &body, &problem) ||
        evaluation_request_decode(body, &evaluation, &problem)) {
        json_decref(body);
        reply_problem(request, &problem);
        return;
    }
    request->context = server;
    scheduler_create_evaluation(server->scheduler, &evaluation, keep, on_created, request);
    evaluation_request_free(&evaluation);
    json_decref(body);
}

static json_t *encode_listed(const struct http_request *request, const void *item)
{
    const struct server *server = request->context;
    const struct job_resource *job = item, *live = scheduler_find(server->scheduler, job->id);
    return handlers_encode_job(server, live ? live : job);
}

static void on_evaluations(void *arg, int code, const struct job_resource *items, size_t count, bool has_more)
{
    reply_list(arg, code, "there is no such evaluation", items, count, sizeof *items, has_more,
               encode_listed);
}

void handle_evaluation_list(struct server *server, struct http_request *request)
{
    struct list_query query;
    struct problem problem;
    if (list_query_decode(LIST_EVALUATIONS, request->arguments, request->n_arguments, &query, &problem)) {
        reply_problem(request, &problem);
        return;
    }
    request->context = server;
    store_job_list(server->store, &query, on_evaluations, request);
    json_decref(query.metadata);
}

/* ---- get, report: the row and its units together ---- */

struct reading {
    struct server *server;
    struct http_request *request;
    bool report;
    struct evaluation_unit_resource *units;
    size_t count;
};

static void answer_reading(struct reading *reading, const struct job_resource *job)
{
    reply_json(reading->request, 200,
               reading->report ? evaluation_report_encode(job, reading->units, reading->count)
                               : evaluation_encode(job, reading->units, reading->count, (int64_t)time(NULL)));
    free(reading->units);
    free(reading);
}

static void on_row(void *arg, int code, const struct job_resource *job)
{
    struct reading *reading = arg;
    if (!code) {
        answer_reading(reading, job);
        return;
    }
    reply_no_evaluation(reading->request, code);
    free(reading->units);
    free(reading);
}

static void on_units(void *arg, int code, const struct evaluation_unit_resource *items, size_t count)
{
    struct reading *reading = arg;
    struct server *server = reading->server;
    reading->units = code ? NULL : calloc(count + 1, sizeof *items);
    if (!reading->units) {
        reply_no_evaluation(reading->request, code ? code : ERROR_NO_MEMORY);
        free(reading);
        return;
    }
    if (count)
        memcpy(reading->units, items, count * sizeof *items);
    reading->count = count;
    const struct job_resource *live = scheduler_find(server->scheduler, reading->request->route.id);
    if (live)
        answer_reading(reading, live);
    else
        store_job_get(server->store, reading->request->route.id, on_row, reading);
}

static void read_evaluation(struct server *server, struct http_request *request, bool report)
{
    struct reading *reading = calloc(1, sizeof *reading);
    if (!reading) {
        reply_refuse(request, 503, "out_of_memory", NULL, "The server is out of memory.");
        return;
    }
    *reading = (struct reading){.server = server, .request = request, .report = report};
    store_evaluation_units(server->store, request->route.id, on_units, reading);
}

void handle_evaluation_get(struct server *server, struct http_request *request)
{
    read_evaluation(server, request, false);
}

void handle_evaluation_report(struct server *server, struct http_request *request)
{
    read_evaluation(server, request, true);
}

/* ---- results: every example, a line each, page by page as the client takes them ---- */

struct download {
    struct download *next; /* in the server's list */
    struct server *server;
    struct http_request *request; /* NULL once the client left */
    char id[ID_BYTES];
    int64_t after; /* sequence of the last line */
    bool begun, reading;
};

static void download_free(struct download *download)
{
    struct download **link = &download->server->downloads;
    while (*link != download)
        link = &(*link)->next;
    *link = download->next;
    free(download);
}

/* The page that is under way frees it. */
static void download_abandon(struct download *download)
{
    download->request = NULL;
    if (!download->reading)
        download_free(download);
}

static void on_download_gone(struct http_request *request)
{
    download_abandon(request->context);
}

/* {"model",...,"doc",...}: the unit's names, then what the worker said. */
static void append_line(const struct evaluation_example *example, struct buffer *out)
{
    json_t *names =
        json_pack("{s:s,s:s,s:s,s:I}", "model", example->unit.model, "precision", example->unit.precision,
                  "task", example->unit.task, "num_fewshot", (json_int_t)example->unit.num_fewshot);
    char *text = json_dumps(names, JSON_COMPACT);
    if (text)
        buffer_printf(out, "%.*s,%s\n", (int)strlen(text) - 1, text, example->detail + 1);
    else
        out->failed = true;
    free(text);
    json_decref(names);
}

static void read_page(struct download *download);

static void on_page_taken(struct http_request *request)
{
    read_page(request->context);
}

static void on_examples(void *arg, int code, const struct evaluation_example *items, size_t count,
                        bool has_more)
{
    struct download *download = arg;
    struct buffer lines = {0};
    download->reading = false;
    if (!download->request) {
        download_free(download);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        append_line(&items[i], &lines);
        download->after = items[i].sequence;
    }
    if ((code || lines.failed) && !download->begun) {
        reply_no_evaluation(download->request, code ? code : ERROR_NO_MEMORY);
        download_free(download);
    } else {
        if (!download->begun)
            http_stream_begin_lines(download->request);
        download->begun = true;
        if (lines.length && http_stream_write(download->request, lines.data, lines.length)) {
            download_abandon(download);
        } else if (has_more && !lines.failed) {
            download->request->on_drained = on_page_taken;
        } else {
            http_stream_end(download->request);
            download_free(download);
        }
    }
    buffer_free(&lines);
}

static void read_page(struct download *download)
{
    download->reading = true;
    store_evaluation_examples(download->server->store, download->id, download->after, PAGE_EXAMPLES,
                              on_examples, download);
}

static void on_row_of_results(void *arg, int code, const struct job_resource *job)
{
    struct http_request *request = arg;
    struct server *server = request->context;
    struct download *download = code ? NULL : calloc(1, sizeof *download);
    if (!download) {
        reply_no_evaluation(request, code ? code : ERROR_NO_MEMORY);
        return;
    }
    *download = (struct download){.next = server->downloads, .server = server, .request = request};
    snprintf(download->id, sizeof download->id, "%s", job->id);
    server->downloads = download;
    request->context = download;
    request->on_gone = on_download_gone;
    read_page(download);
}

void handle_evaluation_results(struct server *server, struct http_request *request)
{
    request->context = server;
    store_job_get(server->store, request->route.id, on_row_of_results, request);
}

void results_drain(struct server *server)
{
    for (struct download *download = server->downloads, *next; download; download = next) {
        next = download->next;
        if (download->begun && download->request) {
            http_stream_end(download->request);
            download_abandon(download);
        }
    }
}
