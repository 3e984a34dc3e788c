/* problem.c: see problem.h. Any thread. */
#include "api/problem.h"

#include "api/text.h"

#include <stdarg.h>
#include <stdio.h>

static const char *type_of_status(int status)
{
    switch (status) {
    case 401:
    case 403:
        return "authentication_error";
    case 404:
        return "not_found_error";
    case 429:
        return "rate_limit_error";
    default:
        return status >= 500 ? "server_error" : "invalid_request_error";
    }
}

int problem_set(struct problem *problem, int status, const char *code, const char *param, const char *format,
                ...)
{
    *problem = (struct problem){.status = status, .type = type_of_status(status), .code = code};
    snprintf(problem->param, sizeof problem->param, "%s", param ? param : "");
    va_list args;
    va_start(args, format);
    vsnprintf(problem->message, sizeof problem->message, format, args);
    va_end(args);
    return -1;
}

char *problem_encode(const struct problem *problem)
{
    json_t *error =
        json_pack("{s:{s:o, s:s, s:o, s:s?}}", "error", "message", text_json(problem->message), "type",
                  problem->type, "param", text_json_or_null(problem->param), "code", problem->code);
    char *body = error ? json_dumps(error, JSON_COMPACT) : NULL;
    json_decref(error);
    return body;
}
