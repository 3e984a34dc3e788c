/* handlers_operating.c: health, version, metrics and the API's own description. Loop thread only. */
#include "daemon/handlers.h"

#include "daemon/reply.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void handle_healthz(struct server *server, struct http_request *request)
{
    (void)server;
    reply_json(request, 200, json_pack("{s:s}", "status", "ok"));
}

void handle_readyz(struct server *server, struct http_request *request)
{
    char reason[256];
    if (server_is_ready(server, reason)) {
        reply_json(request, 200, json_pack("{s:s}", "status", "ready"));
        return;
    }
    struct problem problem;
    problem_set(&problem, 503, "not_ready", NULL, "%s", reason);
    reply_problem(request, &problem);
}

void handle_version(struct server *server, struct http_request *request)
{
    (void)server;
    reply_json(request, 200, json_pack("{s:s, s:s}", "name", "adderd", "version", ADDERD_VERSION));
}

/* ---- metrics ---- */

struct job_gauges {
    struct buffer rate, loss;
};

/* Both families are gathered side by side: one family's lines must stand together. */
static void add_job_gauges(void *arg, const struct job_resource *job)
{
    struct job_gauges *gauges = arg;
    char label[2 * ID_BYTES];
    if (job->status != JOB_RUNNING)
        return;
    metrics_label(label, sizeof label, "job", job->id);
    if (isfinite(job->tokens_per_second))
        metrics_gauge(&gauges->rate, "adder_job_tokens_per_second", "Training speed of a running job.", label,
                      job->tokens_per_second, !gauges->rate.length);
    if (isfinite(job->loss))
        metrics_gauge(&gauges->loss, "adder_job_loss", "Last training loss of a running job.", label,
                      job->loss, !gauges->loss.length);
}

static void write_workers(const struct server *server, struct buffer *text)
{
    struct buffer memory = {0};
    int64_t running = 0, waiting = (int64_t)worker_calls_waiting(server->calls);
    for (size_t i = 0; i < worker_pool_count(server->pool); i++) {
        struct worker_info info;
        char label[128];
        worker_info(worker_pool_at(server->pool, i), &info);
        metrics_label(label, sizeof label, "device", info.device);
        metrics_gauge(text, "adder_worker_up", "Is the device's worker up?", label, info.up, i == 0);
        size_t used = strlen(label);
        const struct {
            const char *kind;
            int64_t bytes;
        } kinds[] = {{"total", info.total_bytes},
                     {"free", info.free_bytes},
                     {"resident", info.resident_bytes},
                     {"allocated", info.allocated_bytes}};
        for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
            snprintf(label + used, sizeof label - used, ",kind=\"%s\"", kinds[k].kind);
            metrics_gauge(&memory, "adder_device_memory_bytes", "Memory of the device, and the worker's own.",
                          label, info.up ? (double)kinds[k].bytes : 0, !memory.length);
        }
        running += info.up ? info.running : 0;
        waiting += info.up ? info.waiting : 0;
    }
    buffer_append(text, memory.data ? memory.data : "", memory.length);
    text->failed |= memory.failed;
    buffer_free(&memory);
    metrics_gauge(text, "adder_requests_running", "Sequences that are being generated.", NULL,
                  (double)running, 1);
    metrics_gauge(text, "adder_requests_waiting", "Sequences and requests that wait for their turn.", NULL,
                  (double)waiting, 1);
}

void handle_metrics(struct server *server, struct http_request *request)
{
    struct buffer text = {0};
    struct job_gauges gauges = {0};
    metrics_write(server->metrics, &text);
    write_workers(server, &text);
    for (int status = 0; status < JOB_STATUS_COUNT; status++) {
        char label[64];
        metrics_label(label, sizeof label, "status", job_status_name((enum job_status)status));
        metrics_gauge(&text, "adder_jobs", "Fine-tuning jobs and evaluations, ended ones too.", label,
                      (double)scheduler_count(server->scheduler, (enum job_status)status), status == 0);
    }
    scheduler_each(server->scheduler, add_job_gauges, &gauges);
    buffer_append(&text, gauges.rate.data ? gauges.rate.data : "", gauges.rate.length);
    buffer_append(&text, gauges.loss.data ? gauges.loss.data : "", gauges.loss.length);
    text.failed |= gauges.rate.failed || gauges.loss.failed;
    buffer_free(&gauges.rate);
    buffer_free(&gauges.loss);
    size_t length = 0;
    char *body = buffer_take(&text, &length);
    if (body)
        http_answer(request, 200, "text/plain; version=0.0.4; charset=utf-8", body, length);
    else
        reply_refuse(request, 503, "out_of_memory", NULL, "The server is out of memory.");
}

void handle_openapi(struct server *server, struct http_request *request)
{
    char *body = malloc(openapi_length);
    (void)server;
    if (body) {
        memcpy(body, openapi_text, openapi_length);
        http_answer(request, 200, "application/yaml", body, openapi_length);
    } else {
        reply_refuse(request, 503, "out_of_memory", NULL, "The server is out of memory.");
    }
}
