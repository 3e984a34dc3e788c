/* route.c: see route.h. Any thread.
 *
 * Paths are split at '/' before anything is decoded, so that an id may carry an encoded slash, and ':' may
 * stand raw. One row a path, in no order: no two templates match one path. */
#include "api/route.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

struct path_row {
    const char *path; /* {id} stands for one segment */
    enum endpoint get, post, delete;
    bool open;
    const char *allow;
};

#define ALLOW_GET        "GET, HEAD"
#define ALLOW_POST       "POST"
#define ALLOW_GET_POST   "GET, HEAD, POST"
#define ALLOW_GET_DELETE "GET, HEAD, DELETE"

static const struct path_row rows[] = {
    {"/v1/files", .get = ENDPOINT_FILE_LIST, .post = ENDPOINT_FILE_CREATE, .allow = ALLOW_GET_POST},
    {"/v1/files/{id}", .get = ENDPOINT_FILE_GET, .delete = ENDPOINT_FILE_DELETE, .allow = ALLOW_GET_DELETE},
    {"/v1/files/{id}/content", .get = ENDPOINT_FILE_CONTENT, .allow = ALLOW_GET},
    {"/v1/fine_tuning/jobs", .get = ENDPOINT_JOB_LIST, .post = ENDPOINT_JOB_CREATE, .allow = ALLOW_GET_POST},
    {"/v1/fine_tuning/jobs/{id}", .get = ENDPOINT_JOB_GET, .allow = ALLOW_GET},
    {"/v1/fine_tuning/jobs/{id}/cancel", .post = ENDPOINT_JOB_CANCEL, .allow = ALLOW_POST},
    {"/v1/fine_tuning/jobs/{id}/pause", .post = ENDPOINT_JOB_PAUSE, .allow = ALLOW_POST},
    {"/v1/fine_tuning/jobs/{id}/resume", .post = ENDPOINT_JOB_RESUME, .allow = ALLOW_POST},
    {"/v1/fine_tuning/jobs/{id}/events", .get = ENDPOINT_JOB_EVENTS, .allow = ALLOW_GET},
    {"/v1/fine_tuning/jobs/{id}/checkpoints", .get = ENDPOINT_JOB_CHECKPOINTS, .allow = ALLOW_GET},
    {"/v1/evaluations", .get = ENDPOINT_EVALUATION_LIST, .post = ENDPOINT_EVALUATION_CREATE,
     .allow = ALLOW_GET_POST},
    {"/v1/evaluations/{id}", .get = ENDPOINT_EVALUATION_GET, .allow = ALLOW_GET},
    {"/v1/evaluations/{id}/cancel", .post = ENDPOINT_EVALUATION_CANCEL, .allow = ALLOW_POST},
    {"/v1/evaluations/{id}/pause", .post = ENDPOINT_EVALUATION_PAUSE, .allow = ALLOW_POST},
    {"/v1/evaluations/{id}/resume", .post = ENDPOINT_EVALUATION_RESUME, .allow = ALLOW_POST},
    {"/v1/evaluations/{id}/events", .get = ENDPOINT_EVALUATION_EVENTS, .allow = ALLOW_GET},
    {"/v1/evaluations/{id}/results", .get = ENDPOINT_EVALUATION_RESULTS, .allow = ALLOW_GET},
    {"/v1/evaluations/{id}/report", .get = ENDPOINT_EVALUATION_REPORT, .allow = ALLOW_GET},
    {"/v1/models", .get = ENDPOINT_MODEL_LIST, .allow = ALLOW_GET},
    {"/v1/models/{id}", .get = ENDPOINT_MODEL_GET, .delete = ENDPOINT_MODEL_DELETE,
     .allow = ALLOW_GET_DELETE},
    {"/v1/models/{id}/adapter", .get = ENDPOINT_MODEL_ADAPTER, .allow = ALLOW_GET},
    {"/v1/completions", .post = ENDPOINT_COMPLETION, .allow = ALLOW_POST},
    {"/v1/chat/completions", .post = ENDPOINT_CHAT_COMPLETION, .allow = ALLOW_POST},
    {"/tokenizer_info", .get = ENDPOINT_TOKENIZER_INFO, .allow = ALLOW_GET},
    {"/tokenize", .post = ENDPOINT_TOKENIZE, .allow = ALLOW_POST},
    {"/detokenize", .post = ENDPOINT_DETOKENIZE, .allow = ALLOW_POST},
    {"/healthz", .get = ENDPOINT_HEALTHZ, .open = true, .allow = ALLOW_GET},
    {"/readyz", .get = ENDPOINT_READYZ, .open = true, .allow = ALLOW_GET},
    {"/version", .get = ENDPOINT_VERSION, .open = true, .allow = ALLOW_GET},
    {"/metrics", .get = ENDPOINT_METRICS, .allow = ALLOW_GET},
    {"/openapi.yaml", .get = ENDPOINT_OPENAPI, .open = true, .allow = ALLOW_GET},
};

/* Does path match the template? *ret_id is where the {id} segment begins (NULL without one). */
static bool path_matches(const char *template, const char *path, const char **ret_id, size_t *ret_id_length)
{
    *ret_id = NULL;
    *ret_id_length = 0;
    while (*template) {
        if (*template == '{') {
            size_t length = strcspn(path, "/");
            if (!length)
                return false;
            *ret_id = path;
            *ret_id_length = length;
            template += strlen("{id}");
            path += length;
        } else if (*template ++ != *path++) {
            return false;
        }
    }
    return !*path;
}

static int hex_value(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c = (char)(c | 0x20);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static int id_decode(const char *text, size_t length, char *id, size_t capacity, struct problem *problem)
{
    size_t used = 0;
    for (size_t i = 0; i < length; i++) {
        char c = text[i];
        if (c == '%') {
            int high = i + 2 < length ? hex_value(text[i + 1]) : -1;
            int low = i + 2 < length ? hex_value(text[i + 2]) : -1;
            if (high < 0 || low < 0 || (!high && !low))
                return problem_set(problem, 400, "invalid_path", NULL,
                                   "The path holds a percent sign that does not begin a valid escape.");
            c = (char)(high << 4 | low);
            i += 2;
        }
        if (used + 1 >= capacity)
            return problem_set(problem, 404, "not_found", NULL, "No id is as long as the one in this path.");
        id[used++] = c;
    }
    id[used] = '\0';
    return 0;
}

int route_find(const char *method, const char *path, struct route *ret_route, const char **ret_allow,
               struct problem *problem)
{
    const struct path_row *row = NULL;
    const char *id = NULL;
    size_t id_length = 0;
    for (size_t i = 0; i < sizeof rows / sizeof *rows && !row; i++)
        if (path_matches(rows[i].path, path, &id, &id_length))
            row = &rows[i];
    if (!row)
        return problem_set(problem, 404, "unknown_url", NULL, "Unknown request URL: %.20s %.300s.", method,
                           path);

    enum endpoint endpoint = ENDPOINT_NONE;
    if (!strcmp(method, "GET") || !strcmp(method, "HEAD"))
        endpoint = row->get;
    else if (!strcmp(method, "POST"))
        endpoint = row->post;
    else if (!strcmp(method, "DELETE"))
        endpoint = row->delete;
    if (endpoint == ENDPOINT_NONE) {
        if (ret_allow)
            *ret_allow = row->allow;
        return problem_set(problem, 405, "method_not_allowed", NULL, "%.20s is not allowed here; use %s.",
                           method, row->allow);
    }

    struct route route = {.endpoint = endpoint, .open = row->open, .name = row->path};
    if (id && id_decode(id, id_length, route.id, sizeof route.id, problem))
        return -1;
    *ret_route = route;
    return 0;
}
