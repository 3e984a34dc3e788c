/* problem.h: the error object every endpoint answers with: {"error":{"message","type","param","code"}}. */
#ifndef API_PROBLEM_H
#define API_PROBLEM_H

struct problem {
    int status;       /* HTTP; 0 = none */
    const char *type; /* static: "invalid_request_error", "authentication_error", "not_found_error",
                         "rate_limit_error", "server_error" */
    const char *code; /* static, or NULL -> null: "model_not_found", "invalid_value" ... */
    char param[128];  /* "" -> null */
    char message[1024];
    int retry_after_seconds; /* > 0: sent as Retry-After */
};

/* Fill *problem and return -1. param may be NULL. type follows from status. */
int problem_set(struct problem *problem, int status, const char *code, const char *param, const char *format,
                ...) __attribute__((format(printf, 5, 6)));
/* The JSON body; free() it. NULL when out of memory. */
char *problem_encode(const struct problem *problem);

#endif
