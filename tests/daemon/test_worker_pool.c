/* The worker pool against workers that misbehave. The pool starts its own executable with the argument
 * "worker": so this program is its own worker, and what it does then is told by the device's name. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "daemon/worker_pool.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- the worker ---- */

static void say(enum frame_type type, uint64_t id, json_t *payload)
{
    struct buffer out = {0};
    if (frame_encode(type, id, payload, &out) || write(3, out.data, out.length) < 0)
        _exit(9);
    buffer_free(&out);
}

static struct frame hear(struct buffer *in)
{
    struct frame frame;
    for (;;) {
        int got = frame_decode(in, &frame, NULL);
        if (got == 1)
            return frame;
        char bytes[4096];
        ssize_t n = got < 0 ? 0 : read(3, bytes, sizeof bytes);
        if (n <= 0)
            _exit(got < 0 ? 8 : 0);
        buffer_append(in, bytes, (size_t)n);
    }
}

static json_t *hello(int version)
{
    return json_pack("{s:i,s:s,s:s,s:i,s:i,s:I,s:I}", "version", version, "device", "test", "device_name",
                     "test", "pid", (int)getpid(), "threads", 1, "total_bytes", (json_int_t)1000,
                     "free_bytes", (json_int_t)400);
}

static int worker_main(const char *device)
{
    struct buffer in = {0};
    if (!strcmp(device, "dies"))
        return 7;
    if (!strcmp(device, "silent"))
        pause();
    if (!strcmp(device, "absent")) {
        say(FRAME_FAULT, 0, json_pack("{s:s}", "reason", "there is no such GPU"));
        return 1;
    }
    say(FRAME_HELLO, 0, hello(strcmp(device, "old") ? PROTOCOL_VERSION : PROTOCOL_VERSION + 1));
    if (!strcmp(device, "garbage") && write(3, "this is no frame, not at all", 28) < 0)
        return 9;
    for (;;) {
        struct frame frame = hear(&in);
        if (frame.type == FRAME_SHUTDOWN && strcmp(device, "stubborn")) {
            say(FRAME_JOB_ENDED, 0, json_pack("{s:s,s:s}", "job", "last words", "status", "paused"));
            json_decref(frame.payload);
            buffer_free(&in);
            return 0;
        }
        if (frame.type == FRAME_COMPLETE && !strcmp(device, "loads")) {
            say(FRAME_STATUS, 0, json_pack("{s:i,s:i}", "grace_ms", 1500, "running", 0));
            usleep(1000000); /* the pool's patience is 400 ms */
        }
        if (frame.type == FRAME_COMPLETE && !strcmp(device, "crashes"))
            abort();
        if (frame.type == FRAME_COMPLETE && !strcmp(device, "faulty")) {
            say(FRAME_FAULT, 0, json_pack("{s:s}", "reason", "an illegal address"));
            pause(); /* a driver may hang */
        }
        if (frame.type == FRAME_COMPLETE) {
            say(FRAME_CHUNK, frame.id, json_pack("{s:i}", "index", 0));
            say(FRAME_CHUNK, frame.id, json_pack("{s:i}", "index", 1));
            say(FRAME_DONE, frame.id, json_object());
        }
        json_decref(frame.payload);
    }
}

/* ---- the tests ---- */

struct scene {
    uv_loop_t loop;
    struct config config;
    struct worker_pool *pool;
    int ups, downs, job_frames;
    char reason[200], job[64];
    int chunks, answers;
    enum frame_type last;
    char message[300];
    int after_up; /* what to do once a worker is up */
    int stop_after_downs;
    bool stopped;
};
enum { THEN_STOP, THEN_REQUEST, THEN_CANCEL, THEN_NOTHING };

static void on_stopped(void *arg)
{
    struct scene *scene = arg;
    scene->stopped = true;
    worker_pool_free(scene->pool);
}

static void stop(struct scene *scene)
{
    worker_pool_stop(scene->pool, 300, on_stopped, scene);
}

static void on_answer(void *arg, enum frame_type type, const json_t *payload)
{
    struct scene *scene = arg;
    if (type == FRAME_CHUNK) {
        scene->chunks++;
        return;
    }
    scene->answers++;
    scene->last = type;
    const char *message = json_string_value(json_object_get(payload, "message"));
    snprintf(scene->message, sizeof scene->message, "%s", message ? message : "");
    if (type == FRAME_DONE)
        stop(scene);
}

static void on_up(void *arg, struct worker *worker)
{
    struct scene *scene = arg;
    struct worker_info info;
    worker_info(worker, &info);
    assert_true(info.up);
    assert_int_equal(info.free_bytes, 400);
    if (scene->ups++)
        return;
    if (scene->after_up == THEN_STOP) {
        stop(scene);
    } else if (scene->after_up != THEN_NOTHING) {
        uint64_t id = worker_request(worker, FRAME_COMPLETE, json_object(), on_answer, scene);
        assert_true(id > 0);
        if (scene->after_up == THEN_CANCEL) {
            worker_request_cancel(worker, id);
            worker_request_cancel(worker, id + 1000);
            assert_true(worker_request(worker, FRAME_COMPLETE, json_object(), on_answer, scene) > id);
        }
    }
}

static void on_down(void *arg, struct worker *worker, const char *reason)
{
    struct scene *scene = arg;
    struct worker_info info;
    worker_info(worker, &info);
    assert_false(info.up);
    assert_int_equal(worker_request(worker, FRAME_COMPLETE, json_object(), on_answer, scene), 0);
    snprintf(scene->reason, sizeof scene->reason, "%s", reason);
    if (++scene->downs == scene->stop_after_downs)
        stop(scene);
}

static void on_job_frame(void *arg, struct worker *worker, enum frame_type type, const json_t *payload)
{
    (void)worker;
    struct scene *scene = arg;
    assert_int_equal(type, FRAME_JOB_ENDED);
    scene->job_frames++;
    snprintf(scene->job, sizeof scene->job, "%s", json_string_value(json_object_get(payload, "job")));
}

/* Run until the pool has stopped. */
static void play(struct scene *scene, const char *device, int after_up, int stop_after_downs)
{
    memset(scene, 0, sizeof *scene);
    scene->config.devices[0] = device;
    scene->config.n_devices = 1;
    scene->config.heartbeat_timeout_ms = 400;
    scene->after_up = after_up;
    scene->stop_after_downs = stop_after_downs;
    struct worker_pool_callbacks callbacks = {
        .arg = scene, .up = on_up, .down = on_down, .job_frame = on_job_frame};
    assert_int_equal(uv_loop_init(&scene->loop), 0);
    assert_int_equal(worker_pool_create(&scene->loop, &scene->config, &callbacks, &scene->pool, NULL), 0);
    uv_run(&scene->loop, UV_RUN_DEFAULT);
    assert_true(scene->stopped);
    assert_int_equal(uv_loop_close(&scene->loop), 0);
}

static void test_shutdown_lets_last_words_through(void **state)
{
    (void)state;
    struct scene scene;
    play(&scene, "good", THEN_STOP, 0);
    assert_int_equal(scene.ups, 1);
    assert_int_equal(scene.downs, 1);
    assert_string_equal(scene.reason, "exited with status 0");
    assert_int_equal(scene.job_frames, 1);
    assert_string_equal(scene.job, "last words");
}

static void test_stubborn_worker_is_killed(void **state)
{
    (void)state;
    struct scene scene;
    play(&scene, "stubborn", THEN_STOP, 0);
    assert_string_equal(scene.reason, "did not stop in time");
}

static void test_answers_come_in_order(void **state)
{
    (void)state;
    struct scene scene;
    play(&scene, "good", THEN_REQUEST, 0);
    assert_int_equal(scene.chunks, 2);
    assert_int_equal(scene.answers, 1);
    assert_int_equal(scene.last, FRAME_DONE);
}

static void test_cancelled_request_is_never_heard_of_again(void **state)
{
    (void)state;
    struct scene scene;
    play(&scene, "good", THEN_CANCEL, 0);
    assert_int_equal(scene.chunks, 2); /* the second request's */
    assert_int_equal(scene.answers, 1);
}

static void test_death_fails_what_is_in_flight_and_starts_again(void **state)
{
    (void)state;
    struct scene scene;
    play(&scene, "crashes", THEN_REQUEST, 2); /* the second process lives until it has no heartbeat */
    assert_int_equal(scene.ups, 2);
    assert_int_equal(scene.answers, 1);
    assert_int_equal(scene.last, FRAME_FAILED);
    assert_non_null(strstr(scene.message, "killed by signal 6"));
    assert_non_null(strstr(scene.reason, "no heartbeat for 0.4 s"));
}

static void test_last_words_are_the_reason(void **state)
{
    (void)state;
    struct scene scene;
    play(&scene, "absent", THEN_NOTHING, 2);
    assert_int_equal(scene.ups, 0);
    assert_string_equal(scene.reason, "there is no such GPU");
    play(&scene, "faulty", THEN_REQUEST, 1);
    assert_string_equal(scene.reason, "an illegal address");
    assert_int_equal(scene.last, FRAME_FAILED);
    assert_non_null(strstr(scene.message, "an illegal address"));
}

static void test_backoff_grows(void **state)
{
    (void)state;
    struct scene scene;
    uint64_t began = uv_hrtime();
    play(&scene, "dies", THEN_NOTHING, 4); /* after 0, 100, 200 and 400 ms */
    assert_string_equal(scene.reason, "exited with status 7");
    assert_true(uv_hrtime() - began >= 700000000);
}

static void test_silent_worker_is_killed(void **state)
{
    (void)state;
    struct scene scene;
    play(&scene, "silent", THEN_NOTHING, 1);
    assert_int_equal(scene.ups, 0);
    assert_non_null(strstr(scene.reason, "no heartbeat"));
}

static void test_a_worker_that_loads_is_waited_for(void **state)
{
    (void)state;
    struct scene scene;
    play(&scene, "loads", THEN_REQUEST, 0);
    assert_int_equal(scene.downs, 1);
    assert_int_equal(scene.last, FRAME_DONE);
    assert_string_equal(scene.reason, "exited with status 0");
}

static void test_broken_protocol_is_named(void **state)
{
    (void)state;
    struct scene scene;
    play(&scene, "garbage", THEN_NOTHING, 1);
    assert_non_null(strstr(scene.reason, "broke the protocol"));
    play(&scene, "old", THEN_NOTHING, 1);
    assert_non_null(strstr(scene.reason, "broke the protocol: hello"));
}

int main(int argc, char **argv)
{
    if (argc > 3 && !strcmp(argv[1], "worker"))
        return worker_main(argv[3]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shutdown_lets_last_words_through),
        cmocka_unit_test(test_stubborn_worker_is_killed),
        cmocka_unit_test(test_answers_come_in_order),
        cmocka_unit_test(test_cancelled_request_is_never_heard_of_again),
        cmocka_unit_test(test_death_fails_what_is_in_flight_and_starts_again),
        cmocka_unit_test(test_last_words_are_the_reason),
        cmocka_unit_test(test_backoff_grows),
        cmocka_unit_test(test_silent_worker_is_killed),
        cmocka_unit_test(test_a_worker_that_loads_is_waited_for),
        cmocka_unit_test(test_broken_protocol_is_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
