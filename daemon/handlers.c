/* handlers.c: from an endpoint to its handler. Loop thread only. */
#include "daemon/handlers.h"

#include "daemon/reply.h"

#include <string.h>
#include <time.h>

typedef void (*handler)(struct server *server, struct http_request *request);

static const struct {
    handler handle;
    enum http_body body;
} endpoints[] = {
    [ENDPOINT_FILE_CREATE] = {handle_file_create, HTTP_BODY_FORM},
    [ENDPOINT_FILE_LIST] = {handle_file_list, HTTP_BODY_NONE},
    [ENDPOINT_FILE_GET] = {handle_file_get, HTTP_BODY_NONE},
    [ENDPOINT_FILE_CONTENT] = {handle_file_content, HTTP_BODY_NONE},
    [ENDPOINT_FILE_DELETE] = {handle_file_delete, HTTP_BODY_NONE},
    [ENDPOINT_JOB_CREATE] = {handle_job_create, HTTP_BODY_JSON},
    [ENDPOINT_JOB_LIST] = {handle_job_list, HTTP_BODY_NONE},
    [ENDPOINT_JOB_GET] = {handle_job_get, HTTP_BODY_NONE},
    [ENDPOINT_JOB_CANCEL] = {handle_job_cancel, HTTP_BODY_NONE},
    [ENDPOINT_JOB_PAUSE] = {handle_job_pause, HTTP_BODY_NONE},
    [ENDPOINT_JOB_RESUME] = {handle_job_resume, HTTP_BODY_NONE},
    [ENDPOINT_JOB_EVENTS] = {handle_job_events, HTTP_BODY_NONE},
    [ENDPOINT_JOB_CHECKPOINTS] = {handle_job_checkpoints, HTTP_BODY_NONE},
    [ENDPOINT_EVALUATION_CREATE] = {handle_evaluation_create, HTTP_BODY_JSON},
    [ENDPOINT_EVALUATION_LIST] = {handle_evaluation_list, HTTP_BODY_NONE},
    [ENDPOINT_EVALUATION_GET] = {handle_evaluation_get, HTTP_BODY_NONE},
    [ENDPOINT_EVALUATION_CANCEL] = {handle_job_cancel, HTTP_BODY_NONE},
    [ENDPOINT_EVALUATION_PAUSE] = {handle_job_pause, HTTP_BODY_NONE},
    [ENDPOINT_EVALUATION_RESUME] = {handle_job_resume, HTTP_BODY_NONE},
    [ENDPOINT_EVALUATION_EVENTS] = {handle_job_events, HTTP_BODY_NONE},
    [ENDPOINT_EVALUATION_RESULTS] = {handle_evaluation_results, HTTP_BODY_NONE},
    [ENDPOINT_EVALUATION_REPORT] = {handle_evaluation_report, HTTP_BODY_NONE},
    [ENDPOINT_MODEL_LIST] = {handle_model_list, HTTP_BODY_NONE},
    [ENDPOINT_MODEL_GET] = {handle_model_get, HTTP_BODY_NONE},
    [ENDPOINT_MODEL_DELETE] = {handle_model_delete, HTTP_BODY_NONE},
    [ENDPOINT_MODEL_ADAPTER] = {handle_model_adapter, HTTP_BODY_NONE},
    [ENDPOINT_COMPLETION] = {handle_completion, HTTP_BODY_JSON},
    [ENDPOINT_CHAT_COMPLETION] = {handle_chat_completion, HTTP_BODY_JSON},
    [ENDPOINT_TOKENIZER_INFO] = {handle_tokenizer_info, HTTP_BODY_NONE},
    [ENDPOINT_TOKENIZE] = {handle_tokenize, HTTP_BODY_JSON},
    [ENDPOINT_DETOKENIZE] = {handle_detokenize, HTTP_BODY_JSON},
    [ENDPOINT_HEALTHZ] = {handle_healthz, HTTP_BODY_NONE},
    [ENDPOINT_READYZ] = {handle_readyz, HTTP_BODY_NONE},
    [ENDPOINT_VERSION] = {handle_version, HTTP_BODY_NONE},
    [ENDPOINT_METRICS] = {handle_metrics, HTTP_BODY_NONE},
    [ENDPOINT_OPENAPI] = {handle_openapi, HTTP_BODY_NONE},
};

int handlers_admit(void *arg, struct http_request *request, enum http_body *ret_body, const char **ret_allow,
                   struct problem *problem)
{
    struct server *server = arg;
    if (route_find(request->method, request->path, &request->route, ret_allow, problem))
        return -1;
    *ret_body = endpoints[request->route.endpoint].body;
    if (request->route.open)
        return 0;
    if (auth_check(server->auth, http_header(request, "authorization"), request->key_id, problem))
        return -1;
    int64_t now = (int64_t)time(NULL);
    if (request->key_id[0] && auth_note_use(server->auth, request->key_id, now))
        store_key_used(server->store, request->key_id, now);
    return 0;
}

/* Fine-tuning jobs and evaluations are kept alike, but neither is found where the other is asked for. */
static bool is_of_other_kind(const struct route *route)
{
    const bool of_evaluation = !strncmp(route->id, "eval-", 5);
    if (route->endpoint >= ENDPOINT_JOB_GET && route->endpoint <= ENDPOINT_JOB_CHECKPOINTS)
        return of_evaluation;
    if (route->endpoint >= ENDPOINT_EVALUATION_GET && route->endpoint <= ENDPOINT_EVALUATION_REPORT)
        return !of_evaluation;
    return false;
}

void handlers_handle(void *arg, struct http_request *request)
{
    struct server *server = arg;
    if (server->stopping && !request->route.open) {
        struct problem problem;
        problem_set(&problem, 503, "shutting_down", NULL, "The server is shutting down.");
        reply_problem(request, &problem);
        return;
    }
    if (is_of_other_kind(&request->route)) {
        reply_refuse(request, 404, "not_found", NULL, "There is nothing '%.255s' here.", request->route.id);
        return;
    }
    reply_once(server, request, endpoints[request->route.endpoint].handle);
}
