/* test_http.c: the HTTP server by itself, with a handler of the tests' own: bodies, forms, streams, files, and
 * clients that leave. The loop runs here; the client is a blocking socket in a thread. */
#include "base/buffer.h"
#include "base/file.h"
#include "daemon/http.h"

#include <dirent.h>
#include <netinet/in.h>
#include <pthread.h>
#include <setjmp.h>
#include <sodium.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cmocka.h>

enum { MAX_BODY = 1000, MAX_UPLOAD = 4 << 20 };

struct fixture {
    uv_loop_t loop;
    struct http_server *server;
    uv_async_t client_done;
    uv_timer_t timer;
    char folder[64], uploads[80], target[80];

    /* What the handler does, and what it saw. */
    void (*handle)(struct fixture *fixture, struct http_request *request);
    struct http_request *held;
    int n_handled, n_gone, n_finished, last_status, n_written;
    char seen[2048], request_id[64], sha256[65];
    bool cut;

    /* The client: sends, reads to the end of the connection unless it is to leave. */
    uint16_t port;
    const char *request;
    size_t length, leave_after; /* leave_after: bytes of the answer; SIZE_MAX = read all; 0 = do not read */
    struct buffer answer;
};

/* ---- the client ---- */

static void *client(void *arg)
{
    struct fixture *fixture = arg;
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(fixture->port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct timeval patience = {.tv_sec = 20};
    char chunk[4096];
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (!connect(fd, (struct sockaddr *)&address, sizeof address)) {
        size_t sent = 0;
        while (sent < fixture->length) {
            ssize_t n = send(fd, fixture->request + sent, fixture->length - sent, MSG_NOSIGNAL);
            if (n <= 0)
                break;
            sent += (size_t)n;
        }
        while (fixture->answer.length < fixture->leave_after) {
            ssize_t n = recv(fd, chunk, sizeof chunk, 0);
            if (n <= 0)
                break;
            buffer_append(&fixture->answer, chunk, (size_t)n);
        }
        if (!fixture->leave_after)
            usleep(200000);
    }
    close(fd);
    uv_async_send(&fixture->client_done);
    return NULL;
}

static void on_client_done(uv_async_t *async)
{
    uv_stop(async->loop);
}

static void on_nothing(uv_timer_t *timer)
{
    uv_stop(timer->loop);
}

/* Run the loop for a while more. */
static void settle(struct fixture *fixture, unsigned ms)
{
    uv_timer_start(&fixture->timer, on_nothing, ms, 0);
    uv_run(&fixture->loop, UV_RUN_DEFAULT);
    uv_timer_stop(&fixture->timer);
}

/* Let the client speak; what it was answered is in fixture->answer, NUL-terminated. */
static const char *talk(struct fixture *fixture, const char *request, size_t length, size_t leave_after)
{
    pthread_t thread;
    buffer_clear(&fixture->answer);
    buffer_append(&fixture->answer, "", 0);
    fixture->request = request;
    fixture->length = length;
    fixture->leave_after = leave_after;
    assert_int_equal(pthread_create(&thread, NULL, client, fixture), 0);
    uv_run(&fixture->loop, UV_RUN_DEFAULT);
    pthread_join(thread, NULL);
    return fixture->answer.data;
}

static const char *say(struct fixture *fixture, const char *request)
{
    return talk(fixture, request, strlen(request), SIZE_MAX);
}

static void has(const char *answer, const char *words)
{
    if (!strstr(answer, words))
        fail_msg("no \"%s\" in: %.600s", words, answer);
}

/* ---- the server's callbacks ---- */

static int on_admit(void *arg, struct http_request *request, enum http_body *ret_body, const char **ret_allow,
                    struct problem *problem)
{
    (void)arg;
    if (route_find(request->method, request->path, &request->route, ret_allow, problem))
        return -1;
    *ret_body = request->route.endpoint == ENDPOINT_FILE_CREATE  ? HTTP_BODY_FORM
                : request->route.endpoint == ENDPOINT_COMPLETION ? HTTP_BODY_JSON
                                                                 : HTTP_BODY_NONE;
    return 0;
}

static void on_handle(void *arg, struct http_request *request)
{
    struct fixture *fixture = arg;
    fixture->n_handled++;
    request->context = fixture;
    fixture->handle(fixture, request);
}

static void on_finished(void *arg, const struct http_request *request, int status, double seconds)
{
    struct fixture *fixture = arg;
    (void)seconds;
    fixture->n_finished++;
    fixture->last_status = status;
    snprintf(fixture->request_id, sizeof fixture->request_id, "%s", request->id);
}

static void on_gone(struct http_request *request)
{
    struct fixture *fixture = request->context;
    fixture->n_gone++;
    fixture->held = NULL;
}

/* ---- set up ---- */

static int setup(void **state)
{
    struct fixture *fixture = calloc(1, sizeof *fixture);
    struct error error;
    assert_non_null(fixture);
    assert_true(sodium_init() >= 0);
    snprintf(fixture->folder, sizeof fixture->folder, "/tmp/adderd-http-XXXXXX");
    assert_non_null(mkdtemp(fixture->folder));
    snprintf(fixture->uploads, sizeof fixture->uploads, "%s/uploads", fixture->folder);
    snprintf(fixture->target, sizeof fixture->target, "%s/target", fixture->folder);
    assert_int_equal(file_make_dirs(fixture->uploads, NULL), 0);
    assert_int_equal(uv_loop_init(&fixture->loop), 0);
    uv_async_init(&fixture->loop, &fixture->client_done, on_client_done);
    uv_timer_init(&fixture->loop, &fixture->timer);
    fixture->timer.data = fixture;
    struct http_options options = {
        .loop = &fixture->loop,
        .host = "127.0.0.1",
        .max_connections = 64,
        .max_body_bytes = MAX_BODY,
        .max_upload_bytes = MAX_UPLOAD,
        .upload_folder = fixture->uploads,
        .callbacks = {.arg = fixture, .admit = on_admit, .handle = on_handle, .finished = on_finished}};
    if (http_start(&options, &fixture->server, &error))
        fail_msg("%s", error.message);
    fixture->port = http_port(fixture->server);
    *state = fixture;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *fixture = *state;
    http_stop(fixture->server);
    uv_close((uv_handle_t *)&fixture->client_done, NULL);
    uv_close((uv_handle_t *)&fixture->timer, NULL);
    uv_run(&fixture->loop, UV_RUN_DEFAULT);
    assert_int_equal(uv_loop_close(&fixture->loop), 0);
    buffer_free(&fixture->answer);
    file_remove_tree(fixture->folder, NULL);
    free(fixture);
    return 0;
}

/* ---- plain requests ---- */

/* Says what it was asked. */
static void echo(struct fixture *fixture, struct http_request *request)
{
    struct buffer seen = {0};
    buffer_printf(&seen, "%s %s", request->method, request->path);
    for (size_t i = 0; i < request->n_arguments; i++)
        buffer_printf(&seen, " %s=%s", request->arguments[i].key, request->arguments[i].value);
    buffer_printf(&seen, " [%zu]%s", request->length, request->body);
    snprintf(fixture->seen, sizeof fixture->seen, "%s", seen.data);
    size_t length;
    char *body = buffer_take(&seen, &length);
    http_answer(request, 200, "application/json", body, length);
}

static void bodies(void **state)
{
    struct fixture *fixture = *state;
    fixture->handle = echo;
    const char *answer = say(fixture, "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                                      "Content-Length: 7\r\n\r\n{\"a\":1}");
    has(answer, "HTTP/1.1 200 OK\r\n");
    has(answer, "x-request-id: req_");
    has(answer, "Content-Type: application/json\r\n");
    has(answer, "\r\n\r\nPOST /v1/completions [7]{\"a\":1}");
    answer =
        say(fixture,
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            "Transfer-Encoding: chunked\r\nx-request-id: mine.1\r\n\r\n3\r\n{\"a\r\n4\r\n\":1}\r\n0\r\n\r\n");
    has(answer, "x-request-id: mine.1\r\n");
    has(answer, "[7]{\"a\":1}");
    assert_string_equal(fixture->request_id, "mine.1");
    answer = say(fixture, "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                          "x-request-id: not sane\r\nContent-Length: 0\r\n\r\n");
    has(answer, "x-request-id: req_");
    answer = say(fixture, "HEAD /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    has(answer, "200 OK");
    assert_null(strstr(answer, "HEAD /healthz"));
    assert_int_equal(fixture->n_finished, 4);
    assert_int_equal(http_open(fixture->server), 0);
}

static void queries(void **state)
{
    struct fixture *fixture = *state;
    fixture->handle = echo;
    const char *answer =
        say(fixture, "GET /v1/files?after=a%20b+c&&limit&metadata%5Bk%5D=%C3%A9 HTTP/1.1\r\nHost: x\r\n"
                     "Connection: close\r\n\r\n");
    has(answer, "GET /v1/files after=a b c limit= metadata[k]=\xc3\xa9 [0]");
    has(say(fixture, "GET /v1/files?after=%zz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
        "invalid_query");
    has(say(fixture, "GET /v1/files?after=%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
        "invalid_query");
    has(say(fixture, "GET /v1/models/a%2Fb:c HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
        "/v1/models/a%2Fb:c");
}

static void pipelined(void **state)
{
    struct fixture *fixture = *state;
    fixture->handle = echo;
    const char *answer = say(fixture, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
                                      "GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    has(answer, "GET /healthz");
    has(answer, "GET /version");
    assert_int_equal(fixture->n_handled, 2);
}

static void refusals(void **state)
{
    struct fixture *fixture = *state;
    char request[4096];
    fixture->handle = echo;
    has(say(fixture, "GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"), "404 Not Found");
    const char *answer = say(
        fixture, "PUT /v1/files HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc");
    has(answer, "405 Method Not Allowed");
    has(answer, "Allow: GET, HEAD, POST\r\n");
    /* Too long: by its own words, in chunks, and for a client that asks first. */
    int n = snprintf(
        request, sizeof request,
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2000\r\n\r\n%2000s",
        "");
    has(talk(fixture, request, (size_t)n, SIZE_MAX), "413 ");
    n = snprintf(request, sizeof request,
                 "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: "
                 "chunked\r\n\r\n7d0\r\n%2000s\r\n0\r\n\r\n",
                 "");
    has(talk(fixture, request, (size_t)n, SIZE_MAX), "413 ");
    answer = say(
        fixture,
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2000\r\n\r\n");
    has(answer, "HTTP/1.1 413 ");
    has(answer, "\"code\":\"body_too_large\"");
    assert_int_equal(fixture->n_handled, 0);
}

/* ---- forms ---- */

static void on_committed(void *arg, int code, const struct error *error)
{
    struct http_request *request = arg;
    struct fixture *fixture = request->context;
    struct buffer text = {0};
    snprintf(fixture->sha256, sizeof fixture->sha256, "%s", upload_sha256(request->upload));
    buffer_printf(&text, "%s %s %s %lld %d%s", upload_purpose(request->upload),
                  upload_filename(request->upload),
                  upload_expires_seconds(request->upload) ? upload_expires_seconds(request->upload) : "-",
                  (long long)upload_bytes(request->upload), code, error ? error->message : "");
    size_t length;
    char *body = buffer_take(&text, &length);
    http_answer(request, 200, "text/plain", body, length);
}

static void commit(struct fixture *fixture, struct http_request *request)
{
    upload_commit(request->upload, fixture->target, on_committed, request);
}

static int count_entries(const char *folder)
{
    DIR *dir = opendir(folder);
    int count = -2; /* . and .. */
    assert_non_null(dir);
    while (readdir(dir))
        count++;
    closedir(dir);
    return count;
}

/* A whole request with a file of size bytes; missing: bytes that are left off its end. */
static char *form(size_t size, size_t missing, size_t *ret_length)
{
    struct buffer body = {0}, request = {0};
    buffer_append_string(
        &body, "--line\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n"
               "--line\r\nContent-Disposition: form-data; name=\"expires_after[seconds]\"\r\n\r\n3600\r\n"
               "--line\r\nContent-Disposition: form-data; name=\"other\"\r\n\r\nignored\r\n"
               "--line\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a b.jsonl\"\r\n"
               "Content-Type: application/octet-stream\r\n\r\n");
    for (size_t i = 0; i < size; i++)
        buffer_append(&body, (char[]){(char)(i * 7 + i / 251)}, 1);
    buffer_append_string(&body, "\r\n--line--\r\n");
    buffer_printf(
        &request,
        "POST /v1/files HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: multipart/form-data; "
        "boundary=line\r\nContent-Length: %zu\r\n\r\n",
        body.length);
    buffer_append(&request, body.data, body.length - missing);
    buffer_free(&body);
    return buffer_take(&request, ret_length);
}

static void uploads(void **state)
{
    struct fixture *fixture = *state;
    static const size_t sizes[] = {0, 1, 5000, UPLOAD_CHUNK, (3 << 20) + 17};
    fixture->handle = commit;
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        size_t length, read;
        char *request = form(sizes[s], 0, &length), *data, expected[128], hex[65];
        unsigned char digest[crypto_hash_sha256_BYTES];
        const char *answer = talk(fixture, request, length, SIZE_MAX);
        snprintf(expected, sizeof expected, "fine-tune a b.jsonl 3600 %zu 0", sizes[s]);
        has(answer, expected);
        assert_int_equal(file_read(fixture->target, MAX_UPLOAD, &data, &read, NULL), 0);
        assert_int_equal(read, sizes[s]);
        for (size_t i = 0; i < read; i++)
            if (data[i] != (char)(i * 7 + i / 251))
                fail_msg("byte %zu differs", i);
        crypto_hash_sha256(digest, (unsigned char *)data, read);
        sodium_bin2hex(hex, sizeof hex, digest, sizeof digest);
        assert_string_equal(hex, fixture->sha256);
        assert_int_equal(count_entries(fixture->uploads), 0);
        free(data);
        free(request);
        unlink(fixture->target);
    }
}

static void bad_uploads(void **state)
{
    struct fixture *fixture = *state;
    size_t length;
    fixture->handle = commit;
    has(say(fixture, "POST /v1/files HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: text/plain\r\n"
                     "Content-Length: 2\r\n\r\nhi"),
        "must be multipart/form-data");
    has(say(fixture,
            "POST /v1/files HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: multipart/form-data\r\n"
            "Content-Length: 2\r\n\r\nhi"),
        "names no boundary");
    has(say(fixture,
            "POST /v1/files HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: multipart/form-data; "
            "boundary=line\r\nContent-Length: 69\r\n\r\n--line\r\nContent-Disposition: form-data; "
            "name=\"purpose\"\r\n\r\nfine-tune\r\n"),
        "malformed");
    char *request = form(MAX_UPLOAD + 1, 0, &length);
    has(talk(fixture, request, length, SIZE_MAX), "HTTP/1.1 413 ");
    free(request);
    /* The client leaves in the middle, once before and once after something was written. */
    static const size_t sizes[] = {1000, 3 << 20};
    for (int i = 0; i < 2; i++) {
        request = form(sizes[i], 500, &length);
        talk(fixture, request, length, 0);
        free(request);
    }
    settle(fixture, 200);
    assert_int_equal(fixture->n_handled, 0);
    assert_int_equal(count_entries(fixture->uploads), 0);
    assert_int_equal(access(fixture->target, F_OK), -1);
    assert_int_equal(http_open(fixture->server), 0);
}

/* ---- streams ---- */

static void on_tick(uv_timer_t *timer)
{
    struct fixture *fixture = timer->data;
    char event[64];
    if (!fixture->held)
        return;
    int n = snprintf(event, sizeof event, "data: %d\n\n", fixture->n_written++);
    if (http_stream_write(fixture->held, event, (size_t)n)) {
        fixture->cut = true;
        fixture->held = NULL;
    } else if (fixture->n_written == 5) {
        http_stream_end(fixture->held);
        fixture->held = NULL;
    }
}

static void tick(struct fixture *fixture, struct http_request *request)
{
    request->on_gone = on_gone;
    fixture->held = request;
    http_stream_begin(request);
    uv_timer_start(&fixture->timer, on_tick, 5, 5);
}

static void streams(void **state)
{
    struct fixture *fixture = *state;
    fixture->handle = tick;
    const char *answer =
        say(fixture, "GET /v1/fine_tuning/jobs/j/events HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    has(answer, "Content-Type: text/event-stream\r\n");
    for (int i = 0; i < 5; i++) {
        char event[32];
        snprintf(event, sizeof event, "data: %d\n\n", i);
        has(answer, event);
    }
    has(answer, "\r\n0\r\n\r\n");
    assert_int_equal(fixture->n_gone, 0);
    assert_int_equal(fixture->last_status, 200);
}

static void quiet(struct fixture *fixture, struct http_request *request)
{
    request->on_gone = on_gone;
    fixture->held = request;
    http_stream_begin(request);
    http_stream_write(request, ": hello\n\n", 9);
}

static void wait_for_ever(struct fixture *fixture, struct http_request *request)
{
    request->on_gone = on_gone;
    fixture->held = request;
}

static void clients_that_leave(void **state)
{
    struct fixture *fixture = *state;
    static const char request[] = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
    /* In a stream that has nothing to say, and before any answer. */
    fixture->handle = quiet;
    talk(fixture, request, sizeof request - 1, 50);
    settle(fixture, 200);
    assert_int_equal(fixture->n_gone, 1);
    fixture->handle = wait_for_ever;
    talk(fixture, request, sizeof request - 1, 0);
    settle(fixture, 200);
    assert_int_equal(fixture->n_gone, 2);
    assert_int_equal(fixture->last_status, 499);
    assert_int_equal(http_unanswered(fixture->server), 0);
    assert_int_equal(http_open(fixture->server), 0);
}

/* Answers when asked to, whether or not somebody is still there. */
static void hold(struct fixture *fixture, struct http_request *request)
{
    fixture->held = request;
}

static void late_answers(void **state)
{
    struct fixture *fixture = *state;
    static const char request[] = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
    fixture->handle = hold;
    talk(fixture, request, sizeof request - 1, 0);
    settle(fixture, 200);
    assert_int_equal(http_unanswered(fixture->server), 1);
    http_answer(fixture->held, 200, "text/plain", strdup("x"), 1);
    assert_int_equal(http_unanswered(fixture->server), 0);
    assert_int_equal(http_open(fixture->server), 0);
}

static void on_flood(uv_timer_t *timer)
{
    struct fixture *fixture = timer->data;
    static char block[256 << 10];
    memset(block, 'x', sizeof block);
    for (int i = 0; i < 8 && fixture->held; i++)
        if (http_stream_write(fixture->held, block, sizeof block)) {
            fixture->cut = true;
            fixture->held = NULL;
        }
}

static void flood(struct fixture *fixture, struct http_request *request)
{
    request->on_gone = on_gone;
    fixture->held = request;
    http_stream_begin(request);
    uv_timer_start(&fixture->timer, on_flood, 1, 1);
}

static void slow_readers_are_cut(void **state)
{
    struct fixture *fixture = *state;
    static const char request[] = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
    fixture->handle = flood;
    talk(fixture, request, sizeof request - 1, 0);
    assert_true(fixture->cut);
    assert_int_equal(fixture->n_gone, 0);
    settle(fixture, 100);
    assert_int_equal(http_open(fixture->server), 0);
}

/* ---- files ---- */

enum { FILE_BYTES = (1 << 20) + 321 };

static void send_file(struct fixture *fixture, struct http_request *request)
{
    struct file_body *body = file_body_create();
    int fd;
    int64_t size;
    assert_int_equal(file_body_open(fixture->target, &fd, &size, NULL), 0);
    assert_int_equal(file_body_add_bytes(body, "<<", 2), 0);
    assert_int_equal(file_body_add_file(body, fd, size), 0);
    assert_int_equal(file_body_add_bytes(body, "", 0), 0);
    assert_int_equal(file_body_add_bytes(body, ">>", 2), 0);
    http_answer_file(request, "application/octet-stream", "a \"b\".bin", body);
}

static void files(void **state)
{
    struct fixture *fixture = *state;
    char *data = malloc(FILE_BYTES);
    for (int i = 0; i < FILE_BYTES; i++)
        data[i] = (char)(i * 31 + i / 997);
    assert_int_equal(file_write_whole(fixture->target, data, FILE_BYTES, NULL), 0);
    fixture->handle = send_file;
    const char *answer =
        say(fixture, "GET /v1/files/f/content HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    has(answer, "Content-Length: 1048901\r\n");
    has(answer, "filename=\"a _b_.bin\"");
    const char *body = strstr(answer, "\r\n\r\n") + 4;
    assert_int_equal(fixture->answer.length - (size_t)(body - answer), FILE_BYTES + 4);
    assert_memory_equal(body, "<<", 2);
    assert_memory_equal(body + 2, data, FILE_BYTES);
    assert_memory_equal(body + 2 + FILE_BYTES, ">>", 2);
    /* A client that leaves early. */
    static const char request[] = "GET /v1/files/f/content HTTP/1.1\r\nHost: x\r\n\r\n";
    talk(fixture, request, sizeof request - 1, 1000);
    settle(fixture, 100);
    assert_int_equal(http_open(fixture->server), 0);
    free(data);
}

/* ---- the end ---- */

static void draining(void **state)
{
    struct fixture *fixture = *state;
    fixture->handle = echo;
    has(say(fixture, "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"), "200 OK");
    http_drain(fixture->server);
    assert_string_equal(say(fixture, "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"), "");
}

static void stopped_with_requests_open(void **state)
{
    struct fixture *fixture = *state;
    static const char request[] = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
    pthread_t thread;
    fixture->handle = wait_for_ever;
    fixture->request = request;
    fixture->length = sizeof request - 1;
    fixture->leave_after = SIZE_MAX;
    assert_int_equal(pthread_create(&thread, NULL, client, fixture), 0);
    while (!fixture->n_handled)
        settle(fixture, 10);
    http_stop(fixture->server);
    assert_int_equal(fixture->n_gone, 1);
    pthread_join(thread, NULL);
    settle(fixture, 10);
    /* teardown stops a server, too */
    struct http_options options = {
        .loop = &fixture->loop, .host = "127.0.0.1", .max_connections = 1, .upload_folder = fixture->uploads};
    assert_int_equal(http_start(&options, &fixture->server, NULL), 0);
}

static void taken_ports(void **state)
{
    struct fixture *fixture = *state;
    struct http_server *second = NULL;
    struct error error = {0};
    struct http_options options = {.loop = &fixture->loop,
                                   .host = "127.0.0.1",
                                   .port = fixture->port,
                                   .max_connections = 1,
                                   .upload_folder = fixture->uploads};
    assert_int_equal(http_start(&options, &second, &error), ERROR_IO);
    assert_non_null(strstr(error.message, "cannot listen on 127.0.0.1"));
    options.host = "no such host";
    assert_int_equal(http_start(&options, &second, &error), ERROR_INVALID);
    assert_null(second);
}

#define WITH_SERVER(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        WITH_SERVER(bodies),       WITH_SERVER(queries),
        WITH_SERVER(pipelined),    WITH_SERVER(refusals),
        WITH_SERVER(uploads),      WITH_SERVER(bad_uploads),
        WITH_SERVER(streams),      WITH_SERVER(clients_that_leave),
        WITH_SERVER(late_answers), WITH_SERVER(slow_readers_are_cut),
        WITH_SERVER(files),        WITH_SERVER(draining),
        WITH_SERVER(taken_ports),  WITH_SERVER(stopped_with_requests_open),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
