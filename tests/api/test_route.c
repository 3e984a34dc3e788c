/* test_route.c: paths and methods to endpoints. */
#include "api/route.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static struct route found(const char *method, const char *path)
{
    struct route route = {0};
    struct problem problem = {0};
    if (route_find(method, path, &route, NULL, &problem))
        fail_msg("%s %s: %s", method, path, problem.message);
    return route;
}

static struct problem refused(const char *method, const char *path, const char **allow)
{
    struct route route = {0};
    struct problem problem = {0};
    assert_int_equal(route_find(method, path, &route, allow, &problem), -1);
    assert_int_equal(route.endpoint, ENDPOINT_NONE);
    return problem;
}

static void every_endpoint(void **state)
{
    (void)state;
    static const struct {
        const char *method, *path;
        enum endpoint endpoint;
        const char *id;
    } cases[] = {
        {"POST", "/v1/files", ENDPOINT_FILE_CREATE, ""},
        {"GET", "/v1/files", ENDPOINT_FILE_LIST, ""},
        {"GET", "/v1/files/file-1", ENDPOINT_FILE_GET, "file-1"},
        {"GET", "/v1/files/file-1/content", ENDPOINT_FILE_CONTENT, "file-1"},
        {"DELETE", "/v1/files/file-1", ENDPOINT_FILE_DELETE, "file-1"},
        {"POST", "/v1/fine_tuning/jobs", ENDPOINT_JOB_CREATE, ""},
        {"GET", "/v1/fine_tuning/jobs", ENDPOINT_JOB_LIST, ""},
        {"GET", "/v1/fine_tuning/jobs/ftjob-1", ENDPOINT_JOB_GET, "ftjob-1"},
        {"POST", "/v1/fine_tuning/jobs/ftjob-1/cancel", ENDPOINT_JOB_CANCEL, "ftjob-1"},
        {"POST", "/v1/fine_tuning/jobs/ftjob-1/pause", ENDPOINT_JOB_PAUSE, "ftjob-1"},
        {"POST", "/v1/fine_tuning/jobs/ftjob-1/resume", ENDPOINT_JOB_RESUME, "ftjob-1"},
        {"GET", "/v1/fine_tuning/jobs/ftjob-1/events", ENDPOINT_JOB_EVENTS, "ftjob-1"},
        {"GET", "/v1/fine_tuning/jobs/ftjob-1/checkpoints", ENDPOINT_JOB_CHECKPOINTS, "ftjob-1"},
        {"GET", "/v1/models", ENDPOINT_MODEL_LIST, ""},
        {"GET", "/v1/models/hatchling", ENDPOINT_MODEL_GET, "hatchling"},
        {"DELETE", "/v1/models/x", ENDPOINT_MODEL_DELETE, "x"},
        {"GET", "/v1/models/x/adapter", ENDPOINT_MODEL_ADAPTER, "x"},
        {"POST", "/v1/completions", ENDPOINT_COMPLETION, ""},
        {"POST", "/v1/chat/completions", ENDPOINT_CHAT_COMPLETION, ""},
        {"GET", "/tokenizer_info", ENDPOINT_TOKENIZER_INFO, ""},
        {"POST", "/tokenize", ENDPOINT_TOKENIZE, ""},
        {"POST", "/detokenize", ENDPOINT_DETOKENIZE, ""},
        {"GET", "/healthz", ENDPOINT_HEALTHZ, ""},
        {"GET", "/readyz", ENDPOINT_READYZ, ""},
        {"GET", "/version", ENDPOINT_VERSION, ""},
        {"GET", "/metrics", ENDPOINT_METRICS, ""},
        {"GET", "/openapi.yaml", ENDPOINT_OPENAPI, ""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct route route = found(cases[i].method, cases[i].path);
        assert_int_equal(route.endpoint, cases[i].endpoint);
        assert_string_equal(route.id, cases[i].id);
        bool open = !strcmp(cases[i].path, "/healthz") || !strcmp(cases[i].path, "/readyz") ||
                    !strcmp(cases[i].path, "/version") || !strcmp(cases[i].path, "/openapi.yaml");
        assert_int_equal(route.open, open);
    }
    assert_int_equal(found("HEAD", "/v1/models").endpoint, ENDPOINT_MODEL_LIST);
    assert_string_equal(found("GET", "/v1/files/file-1").name, "/v1/files/{id}");
}

static void ids_are_decoded_after_splitting(void **state)
{
    (void)state;
    assert_string_equal(found("GET", "/v1/models/ft:hatchling:org:my-suffix:abc").id,
                        "ft:hatchling:org:my-suffix:abc");
    assert_string_equal(found("GET", "/v1/models/ft%3Ahatchling%3aorg").id, "ft:hatchling:org");
    assert_string_equal(found("GET", "/v1/models/state-spaces%2Fmamba-130m").id, "state-spaces/mamba-130m");
    assert_int_equal(found("GET", "/v1/models/a%2Fadapter").endpoint, ENDPOINT_MODEL_GET);
    assert_string_equal(found("GET", "/v1/models/a%2Fb:1/adapter").id, "a/b:1");
    assert_string_equal(found("GET", "/v1/models/a+b%20c").id, "a+b c");
    assert_string_equal(found("GET", "/v1/models/%E2%82%AC").id, "\xe2\x82\xac");
}

static void bad_escapes(void **state)
{
    (void)state;
    static const char *const paths[] = {"/v1/models/%", "/v1/models/%4", "/v1/models/%zz", "/v1/models/%00",
                                        "/v1/models/a%2/adapter"};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
        assert_int_equal(refused("GET", paths[i], NULL).status, 400);
}

static void unknown_paths(void **state)
{
    (void)state;
    static const char *const paths[] = {"",
                                        "/",
                                        "/v1",
                                        "/v1/",
                                        "/v1/filesx",
                                        "/v1/files/",
                                        "/v1/files//content",
                                        "/v1/files/a/b",
                                        "/v1/models/a/adapter/",
                                        "/v2/models",
                                        "/v1/fine_tuning/jobs/j/stop"};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        struct problem problem = refused("GET", paths[i], NULL);
        assert_int_equal(problem.status, 404);
        assert_string_equal(problem.type, "not_found_error");
    }
    char path[1024];
    memset(path, 'a', sizeof path);
    memcpy(path, "/v1/models/", 11);
    path[sizeof path - 1] = '\0';
    assert_int_equal(refused("GET", path, NULL).status, 404);
}

static void wrong_methods(void **state)
{
    (void)state;
    const char *allow = NULL;
    assert_int_equal(refused("PUT", "/v1/files", &allow).status, 405);
    assert_string_equal(allow, "GET, HEAD, POST");
    refused("POST", "/v1/files/x", &allow);
    assert_string_equal(allow, "GET, HEAD, DELETE");
    refused("GET", "/v1/completions", &allow);
    assert_string_equal(allow, "POST");
    refused("OPTIONS", "/healthz", &allow);
    assert_string_equal(allow, "GET, HEAD");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_endpoint), cmocka_unit_test(ids_are_decoded_after_splitting),
        cmocka_unit_test(bad_escapes),    cmocka_unit_test(unknown_paths),
        cmocka_unit_test(wrong_methods),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
