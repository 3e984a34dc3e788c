/* fuzz_api.c: bodies, paths and queries as clients could send them, through every decoder; what is accepted
 * is encoded again. The first byte chooses the decoder. */
#include "fuzz.h"

#include "api/completion.h"
#include "api/route.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static void fuzz_body(int which, const char *text, size_t size)
{
    static const struct completion_limits limits = {
        .max_prompts = 16, .max_choices = 32, .max_tokens = 4096, .max_stop = 16};
    struct problem problem;
    json_t *body = NULL;
    if (body_decode(text, size, &body, &problem)) {
        free(problem_encode(&problem));
        return;
    }
    struct job_request job;
    struct completion_request completion;
    struct tokenize_request tokenize;
    struct detokenize_request detokenize;
    if (which == 0 && !job_request_decode(body, &job, &problem)) {
        job_request_free(&job);
    } else if (which == 1 || which == 2) {
        if (!completion_request_decode(body, which == 2, &limits, &completion, &problem))
            completion_request_free(&completion);
    } else if (which == 3) {
        (void)!tokenize_request_decode(body, &tokenize, &problem);
        (void)!detokenize_request_decode(body, &detokenize, &problem);
    } else if (which == 4) {
        /* The body as a worker's chunk. */
        struct completion_request request = {
            .n_prompts = 2, .n = 1, .has_logprobs = true, .stream = size % 2};
        struct completion *answer = completion_create(&request, "cmpl-1", "m", 1);
        char *events = NULL;
        if (answer && !completion_add(answer, body, request.stream ? &events : NULL))
            free(completion_finish(answer, 1, 1));
        free(events);
        completion_free(answer);
    }
    json_decref(body);
}

static void fuzz_path(char *path)
{
    struct route route;
    struct problem problem;
    const char *allow;
    if (route_find("GET", path, &route, &allow, &problem))
        free(problem_encode(&problem));
}

static void fuzz_query(int kind, char *text)
{
    char *value = strchr(text, '=');
    if (value)
        *value++ = '\0';
    struct query_argument argument = {text, value ? value : ""};
    struct list_query query;
    struct problem problem;
    if (list_query_decode((enum list_kind)kind, &argument, 1, &query, &problem))
        free(problem_encode(&problem));
    else
        json_decref(query.metadata);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!size)
        return 0;
    /* A copy of the exact size: a read past its end is seen. */
    char *text = malloc(size);
    if (!text)
        return 0;
    memcpy(text, data + 1, size - 1);
    text[size - 1] = '\0';
    int which = data[0] % 10;
    if (which < 5)
        fuzz_body(which, text, size - 1);
    else if (which == 5)
        fuzz_path(text);
    else
        fuzz_query(which - 6, text);
    free(text);
    return 0;
}
