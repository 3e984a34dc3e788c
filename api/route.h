/* route.h: which endpoint a method and a path name. */
#ifndef API_ROUTE_H
#define API_ROUTE_H

#include "api/problem.h"

#include <stdbool.h>

enum endpoint {
    ENDPOINT_NONE,
    ENDPOINT_FILE_CREATE,
    ENDPOINT_FILE_LIST,
    ENDPOINT_FILE_GET,
    ENDPOINT_FILE_CONTENT,
    ENDPOINT_FILE_DELETE,
    ENDPOINT_JOB_CREATE,
    ENDPOINT_JOB_LIST,
    ENDPOINT_JOB_GET,
    ENDPOINT_JOB_CANCEL,
    ENDPOINT_JOB_PAUSE,
    ENDPOINT_JOB_RESUME,
    ENDPOINT_JOB_EVENTS,
    ENDPOINT_JOB_CHECKPOINTS,
    ENDPOINT_EVALUATION_CREATE,
    ENDPOINT_EVALUATION_LIST,
    ENDPOINT_EVALUATION_GET,
    ENDPOINT_EVALUATION_CANCEL,
    ENDPOINT_EVALUATION_PAUSE,
    ENDPOINT_EVALUATION_RESUME,
    ENDPOINT_EVALUATION_EVENTS,
    ENDPOINT_EVALUATION_RESULTS,
    ENDPOINT_EVALUATION_REPORT,
    ENDPOINT_MODEL_LIST,
    ENDPOINT_MODEL_GET,
    ENDPOINT_MODEL_DELETE,
    ENDPOINT_MODEL_ADAPTER,
    ENDPOINT_COMPLETION,
    ENDPOINT_CHAT_COMPLETION,
    ENDPOINT_TOKENIZER_INFO,
    ENDPOINT_TOKENIZE,
    ENDPOINT_DETOKENIZE,
    ENDPOINT_HEALTHZ,
    ENDPOINT_READYZ,
    ENDPOINT_VERSION,
    ENDPOINT_METRICS,
    ENDPOINT_OPENAPI,
};

struct route {
    enum endpoint endpoint;
    char id[256];     /* the path's {id}, percent-decoded after splitting; "" where there is none */
    bool open;        /* needs no key: /healthz, /readyz, /version, /openapi.yaml */
    const char *name; /* the path's template, for metrics and logs: "/v1/files/{id}" */
};

/* Returns 0, or -1 with 404, or 405 (then ret_allow, when not NULL, gets the methods as an Allow value), or
 * 400 for a bad escape. HEAD is matched as GET. path is what stands before '?'. */
int route_find(const char *method, const char *path, struct route *ret_route, const char **ret_allow,
               struct problem *problem);

#endif
