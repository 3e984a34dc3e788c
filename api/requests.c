/* requests.c: bodies, list queries, uploads' fields and the tokenizer's requests; see requests.h. Any thread.
 * Jobs are decoded in job_request.c, completions in completion_request.c. */
#include "api/requests.h"

#include "api/decode.h"
#include "api/text.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BODY_MAX_DEPTH = 64 };

/* Where the nesting of a body first goes too deep, counted without parsing it: jansson's own limit is fixed
 * at 2048. NULL when it does not. */
static const char *find_too_deep(const char *body, size_t length)
{
    int depth = 0;
    bool in_string = false;
    for (size_t i = 0; i < length; i++) {
        char c = body[i];
        if (in_string && c == '\\')
            i++;
        else if (c == '"')
            in_string = !in_string;
        else if (in_string)
            continue;
        else if (c == '[' || c == '{') {
            if (++depth > BODY_MAX_DEPTH)
                return body + i;
        } else if (c == ']' || c == '}') {
            depth--;
        }
    }
    return NULL;
}

int body_decode(const char *body, size_t length, json_t **ret_object, struct problem *problem)
{
    if (!length)
        return problem_set(problem, 400, "invalid_json", NULL,
                           "The request body is empty; a JSON object is due.");
    const char *deep = find_too_deep(body, length);
    if (deep) {
        int line = 1, column = 1;
        for (const char *c = body; c < deep; c++, column++)
            if (*c == '\n') {
                line++;
                column = 0;
            }
        return problem_set(problem, 400, "invalid_json", NULL,
                           "The body is nested deeper than %d levels (line %d, column %d).", BODY_MAX_DEPTH,
                           line, column);
    }
    json_error_t error;
    json_t *json = json_loadb(body, length, JSON_REJECT_DUPLICATES, &error);
    if (!json && json_error_code(&error) == json_error_out_of_memory)
        return problem_set(problem, 503, "out_of_memory", NULL, "The server is out of memory.");
    if (!json)
        return problem_set(problem, 400, "invalid_json", NULL,
                           "The body is not valid JSON: %s (line %d, column %d).", error.text, error.line,
                           error.column);
    if (!json_is_object(json)) {
        json_decref(json);
        return problem_set(problem, 400, "invalid_json", NULL,
                           "The body must be a JSON object, not an array (line 1, column 1).");
    }
    *ret_object = json;
    return 0;
}

/* ---- list queries ---- */

static const struct {
    int64_t fallback, max;
} list_limits[] = {
    [LIST_FILES] = {10000, 10000}, [LIST_JOBS] = {20, 100},        [LIST_EVALUATIONS] = {20, 100},
    [LIST_EVENTS] = {20, 100},     [LIST_CHECKPOINTS] = {10, 100},
};

static int limit_decode(const char *value, int64_t max, int64_t *ret_limit, struct problem *problem)
{
    char *end;
    errno = 0;
    long long number = strtoll(value, &end, 10);
    if (*value < '0' || *value > '9' || *end || errno || number < 1 || number > max)
        return problem_set(problem, 400, "invalid_value", "limit",
                           "limit: must be an integer from 1 to %lld, not %.40s.", (long long)max, value);
    *ret_limit = number;
    return 0;
}

/* metadata[KEY]=VALUE, any number of them. */
static int metadata_filter_decode(const char *argument, const char *value, json_t **metadata,
                                  struct problem *problem)
{
    const char *key = argument + strlen("metadata[");
    size_t length = strcspn(key, "]");
    if (!length || strcmp(key + length, "]"))
        return problem_set(problem, 400, "invalid_value", "metadata",
                           "metadata: a filter reads metadata[KEY]=VALUE.");
    if (!text_is_utf8(key, length) || !text_is_utf8(value, strlen(value)))
        return problem_set(problem, 400, "invalid_value", "metadata",
                           "metadata: a filter must be valid UTF-8.");
    if (!*metadata)
        *metadata = json_object();
    char name[512];
    snprintf(name, sizeof name, "%.*s", (int)(length < sizeof name ? length : sizeof name - 1), key);
    if (!*metadata || json_object_set_new_nocheck(*metadata, name, json_string(value)))
        return problem_set(problem, 503, "out_of_memory", NULL, "The server is out of memory.");
    return 0;
}

int list_query_decode(enum list_kind kind, const struct query_argument *arguments, size_t count,
                      struct list_query *ret_query, struct problem *problem)
{
    struct list_query query = {.limit = list_limits[kind].fallback,
                               .job_kind = kind == LIST_EVALUATIONS ? JOB_EVALUATION : JOB_FINE_TUNING};
    for (size_t i = 0; i < count; i++) {
        const char *key = arguments[i].key, *value = arguments[i].value;
        int failed = 0;
        if (!strcmp(key, "after")) {
            if (strlen(value) >= sizeof query.after || !text_is_utf8(value, strlen(value)))
                failed = problem_set(problem, 400, "invalid_value", "after", "after: no id is like that.");
            snprintf(query.after, sizeof query.after, "%s", value);
        } else if (!strcmp(key, "limit")) {
            failed = limit_decode(value, list_limits[kind].max, &query.limit, problem);
        } else if (!strcmp(key, "order")) {
            query.ascending = !strcmp(value, "asc");
            if (!query.ascending && strcmp(value, "desc"))
                failed = problem_set(problem, 400, "invalid_value", "order",
                                     "order: must be asc or desc, not %.40s.", value);
        } else if (!strcmp(key, "purpose") && kind == LIST_FILES) {
            if (strlen(value) >= sizeof query.purpose || !text_is_utf8(value, strlen(value)))
                failed = problem_set(problem, 400, "invalid_value", "purpose",
                                     "purpose: no purpose is like that.");
            snprintf(query.purpose, sizeof query.purpose, "%s", value);
        } else if (!strncmp(key, "metadata[", strlen("metadata[")) &&
                   (kind == LIST_JOBS || kind == LIST_EVALUATIONS)) {
            failed = metadata_filter_decode(key, value, &query.metadata, problem);
        } else if (!strcmp(key, "stream") && kind == LIST_EVENTS) {
            query.stream = !strcmp(value, "true") || !strcmp(value, "1");
            if (!query.stream && strcmp(value, "false") && strcmp(value, "0"))
                failed = problem_set(problem, 400, "invalid_value", "stream",
                                     "stream: must be true or false, not %.40s.", value);
        }
        if (failed) {
            json_decref(query.metadata);
            return -1;
        }
    }
    *ret_query = query;
    return 0;
}

/* ---- files ---- */

/* OpenAI's purposes. Jobs take fine-tune alone. */
static const char *const purposes[] = {"assistants", "batch", "evals", "fine-tune", "user_data", "vision"};
enum { EXPIRES_MIN_SECONDS = 3600, EXPIRES_MAX_SECONDS = 30 * 86400 };

int file_fields_check(const char *purpose, const char *filename, const char *expires_anchor,
                      const char *expires_seconds, int64_t now, struct file_resource *ret_file,
                      struct problem *problem)
{
    struct file_resource file = {.created_at = now};
    if (!filename)
        return problem_set(problem, 400, "missing_parameter", "file",
                           "file: the form has no part named file with a file name.");
    if (!purpose)
        return problem_set(problem, 400, "missing_parameter", "purpose",
                           "purpose: is required, \"fine-tune\" say.");
    if (!decode_name_in(purpose, purposes, sizeof purposes / sizeof *purposes))
        return problem_set(
            problem, 400, "invalid_value", "purpose",
            "purpose: must be one of assistants, batch, evals, fine-tune, user_data, vision, not %.40s.",
            purpose);
    size_t length = strlen(filename);
    if (!length || length >= sizeof file.filename || !text_is_utf8(filename, length))
        return problem_set(problem, 400, "invalid_value", "file",
                           "file: its name must be 1 to %zu bytes of UTF-8.", sizeof file.filename - 1);
    for (size_t i = 0; i < length; i++)
        if ((unsigned char)filename[i] < 0x20 || filename[i] == 0x7f)
            return problem_set(problem, 400, "invalid_value", "file",
                               "file: its name holds a control character.");
    if (!expires_anchor != !expires_seconds)
        return problem_set(problem, 400, "missing_parameter",
                           expires_anchor ? "expires_after[seconds]" : "expires_after[anchor]",
                           "expires_after: needs both anchor and seconds.");
    if (expires_anchor) {
        if (strcmp(expires_anchor, "created_at"))
            return problem_set(problem, 400, "invalid_value", "expires_after[anchor]",
                               "expires_after[anchor]: must be created_at, not %.40s.", expires_anchor);
        char *end;
        errno = 0;
        long long seconds = strtoll(expires_seconds, &end, 10);
        if (*expires_seconds < '0' || *expires_seconds > '9' || *end || errno ||
            seconds < EXPIRES_MIN_SECONDS || seconds > EXPIRES_MAX_SECONDS)
            return problem_set(problem, 400, "invalid_value", "expires_after[seconds]",
                               "expires_after[seconds]: must be an integer from %d to %d, not %.40s.",
                               EXPIRES_MIN_SECONDS, EXPIRES_MAX_SECONDS, expires_seconds);
        file.expires_at = now + seconds;
    }
    snprintf(file.purpose, sizeof file.purpose, "%s", purpose);
    snprintf(file.filename, sizeof file.filename, "%s", filename);
    /* Nothing is done to a file before a job reads it. */
    snprintf(file.status, sizeof file.status, "processed");
    *ret_file = file;
    return 0;
}

/* ---- tokenizer ---- */

int tokenize_request_decode(const json_t *body, struct tokenize_request *ret_request, struct problem *problem)
{
    struct decoder decoder = {body, "", problem};
    struct tokenize_request request = {0};
    const char *model = "";
    if (decode_string(&decoder, "model", MODEL_ID_BYTES - 1, &model) ||
        decode_bool(&decoder, "add_special_tokens", &request.add_special_tokens))
        return -1;
    const json_t *prompt = decode_get(&decoder, "prompt");
    if (!json_is_string(prompt))
        return decode_refuse(&decoder, "prompt", "must be a string.");
    snprintf(request.model, sizeof request.model, "%s", model);
    request.text = json_string_value(prompt);
    request.length = json_string_length(prompt);
    *ret_request = request;
    return 0;
}

int detokenize_request_decode(const json_t *body, struct detokenize_request *ret_request,
                              struct problem *problem)
{
    struct decoder decoder = {body, "", problem};
    struct detokenize_request request = {0};
    const char *model = "";
    if (decode_string(&decoder, "model", MODEL_ID_BYTES - 1, &model))
        return -1;
    request.tokens = decode_get(&decoder, "tokens");
    if (!json_is_array(request.tokens))
        return decode_refuse(&decoder, "tokens", "must be an array of token ids.");
    for (size_t i = 0; i < json_array_size(request.tokens); i++) {
        const json_t *id = json_array_get(request.tokens, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) > INT32_MAX)
            return decode_refuse(&decoder, "tokens", "element %zu must be an integer from 0 to %d.", i,
                                 INT32_MAX);
    }
    snprintf(request.model, sizeof request.model, "%s", model);
    *ret_request = request;
    return 0;
}
