/* test_worker_jobs.c: a worker's jobs: checked, trained beside completions, stopped and resumed. */
#include "peer.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void test_validation(void **state)
{
    (void)state;
    struct peer peer;
    char good[128], bad[128];
    write_examples("good.jsonl", good);
    write_work_file("bad.jsonl",
                    "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\"}\n\nnot json\n", bad);
    peer_start(&peer);
    peer_send(&peer, FRAME_JOB_VALIDATE, 5, job_json("job-1", good));
    json_t *valid = peer_expect(&peer, FRAME_JOB_VALIDATED, 5);
    assert_string_equal(text_of(valid, "job"), "job-1");
    assert_int_equal(integer_of(valid, "attempt"), 1);
    assert_int_equal(integer_of(valid, "examples"), EXAMPLES);
    assert_int_equal(integer_of(valid, "total_steps"), STEPS);
    assert_true(integer_of(valid, "planned_bytes") > 0);
    json_decref(valid);

    peer_send(&peer, FRAME_JOB_VALIDATE, 6, job_json("job-2", bad));
    json_t *invalid = peer_expect(&peer, FRAME_JOB_INVALID, 6);
    assert_string_equal(text_of(invalid, "job"), "job-2");
    assert_string_equal(text_of(invalid, "param"), "training_file");
    const json_t *lines = json_object_get(invalid, "lines");
    assert_int_equal(json_array_size(lines), 2);
    assert_int_equal(integer_of(json_array_get(lines, 0), "line"), 2);
    assert_int_equal(integer_of(json_array_get(lines, 1), "line"), 4);
    assert_string_equal(text_of(json_array_get(lines, 1), "file"), "training_file");
    assert_true(strlen(text_of(json_array_get(lines, 1), "reason")) > 5);
    json_decref(invalid);

    json_t *payload = job_json("job-3", good);
    json_object_set_new(json_object_get(payload, "hyperparameters"), "batch_size", json_integer(0));
    peer_send(&peer, FRAME_JOB_VALIDATE, 7, payload);
    invalid = peer_expect(&peer, FRAME_JOB_INVALID, 7);
    assert_string_equal(text_of(invalid, "param"), "batch_size");
    assert_int_equal(json_array_size(json_object_get(invalid, "lines")), 0);
    json_decref(invalid);
    peer_stop(&peer);
}

/* The same job three times: alone; with completions beside it; paused in the middle and resumed by another
 * process. Its losses are the same, bit for bit. */
static void test_a_job_alone_in_company_and_interrupted(void **state)
{
    (void)state;
    struct peer peer;
    char data[128];
    write_examples("train.jsonl", data);
    peer_start(&peer);
    char *base = peer_completion(&peer, 1, complete_json("Number 3 is", 8, false), NULL);
    struct job_report alone = {0};
    peer_send(&peer, FRAME_JOB_START, 0, start_json("alone", data, NULL));
    job_report_read(&alone, &peer, "alone");
    assert_string_equal(alone.status, "succeeded");
    assert_int_equal(alone.n_metrics, STEPS);
    assert_int_equal(alone.step, STEPS);
    assert_true(alone.n_checkpoints >= 4 && alone.n_dropped >= 2);
    assert_true(alone.losses[STEPS] < alone.losses[1]);

    /* Its adapter is served at once, and differs from the base. */
    json_t *payload = complete_json("Number 3 is", 8, false);
    json_object_set_new(payload, "adapter", folder_json("ft:alone", alone.folder));
    char *tuned = peer_completion(&peer, 2, payload, NULL);
    assert_string_not_equal(tuned, base);
    peer_send(&peer, FRAME_UNLOAD, 0, json_pack("{s:s}", "adapter", "ft:alone"));
    payload = complete_json("Number 3 is", 8, false);
    json_object_set_new(payload, "adapter", folder_json("ft:alone", alone.folder));
    char *again = peer_completion(&peer, 3, payload, NULL);
    assert_string_equal(again, tuned);
    free(again);
    free(tuned);
    free(base);

    struct job_report company = {0};
    peer_send(&peer, FRAME_JOB_START, 0, start_json("company", data, NULL));
    for (uint64_t i = 0; i < 4; i++)
        peer_send(&peer, FRAME_COMPLETE, 100 + i, complete_json("The dog", 6, true));
    job_report_read(&company, &peer, "company");
    assert_string_equal(company.status, "succeeded");
    assert_int_equal(company.n_done, 4);
    assert_true(company.n_chunks > 8);
    assert_memory_equal(company.losses, alone.losses, sizeof alone.losses);

    struct job_report paused = {0};
    peer_send(&peer, FRAME_JOB_START, 0, start_json("paused", data, NULL));
    bool more = true, asked = false;
    while (more) {
        struct frame frame = peer_receive(&peer);
        more = job_report_add(&paused, &frame, "paused");
        json_decref(frame.payload);
        if (paused.n_metrics == 3 && !asked) {
            asked = true;
            peer_send(&peer, FRAME_JOB_STOP, 0,
                      json_pack("{s:s, s:i, s:s}", "job", "paused", "attempt", 1, "reason", "pause"));
        }
    }
    assert_string_equal(paused.status, "paused");
    assert_true(paused.resumable);
    assert_true(paused.n_metrics >= 3 && paused.n_metrics < STEPS);
    peer_stop(&peer);
    peer_start(&peer);
    peer_send(&peer, FRAME_JOB_START, 0, start_json("paused", data, paused.checkpoint));
    job_report_read(&paused, &peer, "paused");
    assert_string_equal(paused.status, "succeeded");
    assert_memory_equal(paused.losses, alone.losses, sizeof alone.losses);
    peer_stop(&peer);
}

static void start_and_wait_for_metrics(struct peer *peer, const char *job, const char *data,
                                       struct job_report *report)
{
    *report = (struct job_report){0};
    peer_send(peer, FRAME_JOB_START, 0, start_json(job, data, NULL));
    while (!report->n_metrics) {
        struct frame frame = peer_receive(peer);
        assert_true(job_report_add(report, &frame, job));
        json_decref(frame.payload);
    }
}

static void test_stopping_a_job(void **state)
{
    (void)state;
    struct peer peer;
    struct job_report report;
    char data[128];
    write_examples("train.jsonl", data);
    peer_start(&peer);
    start_and_wait_for_metrics(&peer, "cancelled", data, &report);
    /* Another attempt's, another job's: nothing happens. */
    peer_send(&peer, FRAME_JOB_STOP, 0,
              json_pack("{s:s, s:i, s:s}", "job", "cancelled", "attempt", 9, "reason", "cancel"));
    peer_send(&peer, FRAME_JOB_STOP, 0,
              json_pack("{s:s, s:i, s:s}", "job", "other", "attempt", 1, "reason", "cancel"));
    peer_send(&peer, FRAME_JOB_STOP, 0,
              json_pack("{s:s, s:i, s:s}", "job", "cancelled", "attempt", 1, "reason", "cancel"));
    job_report_read(&report, &peer, "cancelled");
    assert_string_equal(report.status, "cancelled");
    assert_true(report.n_metrics < STEPS);

    /* One that cannot start says so. */
    report = (struct job_report){0};
    peer_send(&peer, FRAME_JOB_START, 0, start_json("broken", "/nowhere.jsonl", NULL));
    job_report_read(&report, &peer, "broken");
    assert_string_equal(report.status, "failed");

    /* SHUTDOWN pauses. */
    start_and_wait_for_metrics(&peer, "shut", data, &report);
    peer_send(&peer, FRAME_SHUTDOWN, 0, json_object());
    job_report_read(&report, &peer, "shut");
    assert_string_equal(report.status, "paused");
    assert_true(report.resumable);
    assert_int_equal(access(report.checkpoint, F_OK), 0);
    assert_int_equal(peer_wait(&peer), 0);
}

static void test_the_end_of_the_stream_ends_it(void **state)
{
    (void)state;
    struct peer peer;
    struct job_report report;
    char data[128];
    write_examples("train.jsonl", data);
    peer_start(&peer);
    close(peer.fd);
    peer.fd = -1;
    assert_int_equal(peer_wait(&peer), 1);

    peer_start(&peer);
    start_and_wait_for_metrics(&peer, "orphan", data, &report);
    close(peer.fd);
    peer.fd = -1;
    assert_int_equal(peer_wait(&peer), 1);
    char adapter[128];
    snprintf(adapter, sizeof adapter, "%s/orphan/adapter", work_folder);
    assert_int_not_equal(access(adapter, F_OK), 0);
}

/* What nobody wants to know any more is not found out, at the cost of the job that trains. */
static void test_a_validation_is_cancelled_before_it_begins(void **state)
{
    (void)state;
    struct peer peer;
    char data[128];
    write_examples("train.jsonl", data);
    peer_start(&peer);
    kill(peer.pid, SIGSTOP); /* it finds all of this at once */
    peer_send(&peer, FRAME_JOB_VALIDATE, 1, job_json("kept", data));
    peer_send(&peer, FRAME_JOB_VALIDATE, 2, job_json("cancelled", data));
    peer_send(&peer, FRAME_CANCEL, 2, json_object());
    peer_send(&peer, FRAME_JOB_VALIDATE, 3, job_json("kept", data));
    kill(peer.pid, SIGCONT);
    expect_failed(&peer, 2, "cancelled", NULL);
    json_decref(peer_expect(&peer, FRAME_JOB_VALIDATED, 1));
    json_decref(peer_expect(&peer, FRAME_JOB_VALIDATED, 3));
    peer_stop(&peer);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_validation),
        cmocka_unit_test(test_a_job_alone_in_company_and_interrupted),
        cmocka_unit_test(test_a_validation_is_cancelled_before_it_begins),
        cmocka_unit_test(test_stopping_a_job),
        cmocka_unit_test(test_the_end_of_the_stream_ends_it),
    };
    return cmocka_run_group_tests(tests, peer_setup, peer_teardown);
}
