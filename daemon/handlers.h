/* handlers.h: one function an endpoint, grouped into files by what they are about. Each answers its request
 * exactly once. Loop thread only. */
#ifndef DAEMON_HANDLERS_H
#define DAEMON_HANDLERS_H

#include "daemon/server.h"

/* Names the request's route; checks its key; says what body it has. The callbacks of struct http_callbacks, arg
 * being the server. */
int handlers_admit(void *arg, struct http_request *request, enum http_body *ret_body, const char **ret_allow,
                   struct problem *problem);
void handlers_handle(void *arg, struct http_request *request);

/* ---- handlers_files.c ---- */
void handle_file_create(struct server *server, struct http_request *request);
void handle_file_list(struct server *server, struct http_request *request);
void handle_file_get(struct server *server, struct http_request *request);
void handle_file_content(struct server *server, struct http_request *request);
void handle_file_delete(struct server *server, struct http_request *request);
/* Delete what has expired; called now and then. */
void files_expire(struct server *server);

/* ---- handlers_jobs.c ---- */
void handle_job_create(struct server *server, struct http_request *request);
void handle_job_list(struct server *server, struct http_request *request);
void handle_job_get(struct server *server, struct http_request *request);
void handle_job_cancel(struct server *server, struct http_request *request);
void handle_job_pause(struct server *server, struct http_request *request);
void handle_job_resume(struct server *server, struct http_request *request);
void handle_job_checkpoints(struct server *server, struct http_request *request);

/* Either kind's resource. */
json_t *handlers_encode_job(const struct server *server, const struct job_resource *job);

/* ---- handlers_evaluations.c ---- */
void handle_evaluation_create(struct server *server, struct http_request *request);
void handle_evaluation_list(struct server *server, struct http_request *request);
void handle_evaluation_get(struct server *server, struct http_request *request);
void handle_evaluation_results(struct server *server, struct http_request *request);
void handle_evaluation_report(struct server *server, struct http_request *request);
/* End every download: the server is shutting down. */
void results_drain(struct server *server);

/* ---- handlers_events.c ---- */
void handle_job_events(struct server *server, struct http_request *request);
/* End every stream: the server is shutting down. */
void events_drain(struct server *server);

/* ---- handlers_models.c ---- */
void handle_model_list(struct server *server, struct http_request *request);
void handle_model_get(struct server *server, struct http_request *request);
void handle_model_delete(struct server *server, struct http_request *request);
void handle_model_adapter(struct server *server, struct http_request *request);

/* ---- handlers_completions.c ---- */
void handle_completion(struct server *server, struct http_request *request);
void handle_chat_completion(struct server *server, struct http_request *request);
/* MODEL and ADAPTER (see the worker protocol) for what a client named; both new references. model "" is the
 * default, adapter "" none. Returns 0, or -1 with a problem. */
int completions_resolve(struct server *server, const char *model, const char *adapter, json_t **ret_model,
                        json_t **ret_adapter, struct problem *problem);

/* ---- handlers_tokenizer.c ---- */
void handle_tokenizer_info(struct server *server, struct http_request *request);
void handle_tokenize(struct server *server, struct http_request *request);
void handle_detokenize(struct server *server, struct http_request *request);

/* ---- handlers_operating.c ---- */
void handle_healthz(struct server *server, struct http_request *request);
void handle_readyz(struct server *server, struct http_request *request);
void handle_version(struct server *server, struct http_request *request);
void handle_metrics(struct server *server, struct http_request *request);
void handle_openapi(struct server *server, struct http_request *request);

/* Generated from openapi.yaml. */
extern const char openapi_text[];
extern const size_t openapi_length;

#endif
