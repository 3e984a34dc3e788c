/* test_worker_device.c: a worker whose device is too small, or fails. */
#include "peer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- memory ---- */

static int64_t capacity; /* of the device below, in the worker's process */

/* A device of that size, on which nobody else is. */
static int query_small_device(struct kernel_device *device, struct kernel_device_info *ret_info)
{
    int status = kernels_cpu()->device_query(device, ret_info);
    ret_info->total_bytes = capacity;
    ret_info->free_bytes = capacity > ret_info->allocated_bytes ? capacity - ret_info->allocated_bytes : 0;
    return status;
}

static void peer_start_small(struct peer *peer, int64_t bytes)
{
    static struct kernel_ops ops;
    ops = *kernels_cpu();
    ops.device_query = query_small_device;
    capacity = bytes;
    peer_start_on(peer, &ops);
}

static json_t *plan_json(const char *training_file, int batch_size, int max_seq_len)
{
    json_t *payload = job_json("planned", training_file);
    json_t *spec = json_object_get(payload, "hyperparameters");
    json_object_set_new(spec, "batch_size", json_integer(batch_size));
    json_object_set_new(spec, "max_seq_len", json_integer(max_seq_len));
    json_object_set_new(spec, "packing", json_true());
    return payload;
}

static void test_what_cannot_fit_is_told_beforehand(void **state)
{
    (void)state;
    struct peer peer;
    char small[128], large[128];
    struct buffer text = {0};
    write_examples("small.jsonl", small);
    for (int i = 0; i < 20000; i++)
        buffer_printf(&text, "{\"text\": \"The %dth dog barks at the %dth cat, and so on.\"}\n", i, i);
    write_work_file("large.jsonl", text.data, large);
    buffer_free(&text);
    peer_start_small(&peer, (int64_t)400 << 20);

    /* Fits whatever the data is: they are not looked at. */
    peer_send(&peer, FRAME_JOB_PLAN, 1, plan_json("/nowhere.jsonl", 2, 64));
    json_t *planned = peer_expect(&peer, FRAME_JOB_PLANNED, 1);
    assert_true(integer_of(planned, "planned_bytes") > 1 << 20);
    json_decref(planned);
    /* Fits because there is so little data. */
    peer_send(&peer, FRAME_JOB_PLAN, 2, plan_json(small, 256, 512));
    json_decref(peer_expect(&peer, FRAME_JOB_PLANNED, 2));
    peer_send(&peer, FRAME_JOB_PLAN, 3, plan_json(large, 256, 512));
    json_t *failed = peer_expect(&peer, FRAME_FAILED, 3);
    assert_string_equal(text_of(failed, "code"), "no_memory");
    long long needed, weights, available;
    int batch_size, accumulation;
    if (sscanf(text_of(failed, "message"),
               "the job needs %lld bytes beyond the model's %lld, with all recomputed that can be; %lld are "
               "free; "
               "batch_size %d with gradient_accumulation_steps %d fits",
               &needed, &weights, &available, &batch_size, &accumulation) != 5)
        fail_msg("%s", text_of(failed, "message"));
    json_decref(failed);
    assert_true(needed > available && available < 400 << 20 && batch_size >= 1);
    assert_int_equal(batch_size * accumulation, 256 * 2);
    /* And what it says is so, the same as validation finds. */
    peer_send(&peer, FRAME_JOB_PLAN, 4, plan_json(large, batch_size, 512));
    json_decref(peer_expect(&peer, FRAME_JOB_PLANNED, 4));
    peer_send(&peer, FRAME_JOB_VALIDATE, 5, plan_json(large, batch_size, 512));
    json_decref(peer_expect(&peer, FRAME_JOB_VALIDATED, 5));
    peer_send(&peer, FRAME_JOB_VALIDATE, 6, plan_json(large, 2 * batch_size, 512));
    json_t *invalid = peer_expect(&peer, FRAME_JOB_INVALID, 6);
    assert_string_equal(text_of(invalid, "code"), "no_memory");
    json_decref(invalid);
    /* Not even one row of so many tokens. */
    peer_send(&peer, FRAME_JOB_PLAN, 7, plan_json(large, 8, 1 << 17));
    failed = peer_expect(&peer, FRAME_FAILED, 7);
    assert_non_null(strstr(text_of(failed, "message"), "; max_seq_len "));
    json_decref(failed);
    peer_stop(&peer);

    /* The model itself. */
    peer_start_small(&peer, 4 << 20);
    peer_send(&peer, FRAME_LOAD, 1, json_pack("{s:o}", "model", model_json()));
    failed = peer_expect(&peer, FRAME_FAILED, 1);
    assert_string_equal(text_of(failed, "code"), "no_memory");
    assert_non_null(strstr(text_of(failed, "message"), "bytes of weights"));
    json_decref(failed);
    peer_stop(&peer);
}

/* The next STATUS: allocated bytes, and how many models are loaded. */
static int64_t read_status(struct peer *peer, size_t *ret_models)
{
    peer_send(peer, FRAME_CONFIGURE, 0,
              json_pack("{s:i, s:i, s:i}", "max_seqs", 4, "prefill_tokens", 64, "heartbeat_ms", 3600000));
    struct frame frame = peer_receive_any(peer);
    assert_int_equal(frame.type, FRAME_STATUS);
    int64_t bytes = integer_of(frame.payload, "allocated_bytes");
    *ret_models = json_array_size(json_object_get(frame.payload, "models"));
    json_decref(frame.payload);
    return bytes;
}

static void load(struct peer *peer, const char *id)
{
    peer_send(peer, FRAME_LOAD, 1, json_pack("{s:o}", "model", folder_json(id, model_folder)));
    json_decref(peer_expect(peer, FRAME_LOADED, 1));
}

/* Run a job; the most memory that the device had given out, and what was planned of it. */
static int64_t run_job(struct peer *peer, const char *job, const char *data, int64_t *ret_planned)
{
    struct job_report report = {0};
    int64_t most = 0;
    peer_send(peer, FRAME_JOB_START, 0, start_json(job, data, NULL));
    for (bool more = true; more;) {
        struct frame frame = peer_receive(peer);
        more = job_report_add(&report, &frame, job);
        if (frame.type == FRAME_JOB_METRICS) {
            most = integer_of(frame.payload, "peak_memory_bytes");
            *ret_planned = integer_of(frame.payload, "planned_memory_bytes");
        }
        json_decref(frame.payload);
    }
    assert_string_equal(report.status, "succeeded");
    return most;
}

/* Rather than fail, or recompute, a job takes the room of a model that nobody uses; and afterwards all its memory is
 * back. */
static void test_idle_models_make_room_for_a_job(void **state)
{
    (void)state;
    struct peer peer;
    size_t n_models;
    char data[128];
    write_examples("train.jsonl", data);
    peer_start(&peer);
    load(&peer, "hatchling");
    int64_t alone = read_status(&peer, &n_models);
    load(&peer, "twin");
    int64_t both = read_status(&peer, &n_models);
    assert_int_equal(n_models, 2);
    int64_t planned = 0, most = run_job(&peer, "roomy", data, &planned);
    assert_true(most > both && planned > 0 && most - both < planned);
    assert_true(read_status(&peer, &n_models) < both + (both - alone) / 8); /* what ops keep */
    assert_int_equal(n_models, 2);
    peer_stop(&peer);

    peer_start_small(&peer, most - (1 << 20));
    load(&peer, "hatchling");
    load(&peer, "twin");
    run_job(&peer, "tight", data, &planned);
    read_status(&peer, &n_models);
    assert_int_equal(n_models, 1);
    peer_stop(&peer);
}

/* Whether a model that has no room beside the job that trains has any is for later to tell, once that is over. */
static void test_a_model_without_room_beside_a_job_waits(void **state)
{
    (void)state;
    struct peer peer;
    struct job_report report = {0};
    char data[128];
    int64_t planned;
    write_examples("train.jsonl", data);
    peer_start(&peer);
    int64_t most = run_job(&peer, "spacious", data, &planned);
    peer_stop(&peer);

    peer_start_small(&peer, most + (1 << 20));
    json_t *start = start_json("crowded", data, NULL), *other = job_json("other", data);
    json_object_set_new(other, "model", folder_json("twin", model_folder));
    peer_send(&peer, FRAME_JOB_START, 0, start);
    peer_send(&peer, FRAME_JOB_VALIDATE, 1, json_incref(other));
    bool answered = false;
    for (bool more = true; more;) {
        struct frame frame = peer_receive(&peer);
        if (frame.id == 1) {
            assert_int_equal(frame.type, FRAME_FAILED);
            assert_string_equal(text_of(frame.payload, "code"), "busy");
            answered = true;
        } else {
            more = job_report_add(&report, &frame, "crowded");
        }
        json_decref(frame.payload);
    }
    assert_true(answered);
    assert_string_equal(report.status, "succeeded");
    peer_send(&peer, FRAME_JOB_VALIDATE, 2, other);
    json_decref(peer_expect(&peer, FRAME_JOB_VALIDATED, 2));
    peer_stop(&peer);
}

/* A job that has no room beside a model in use waits until nobody uses it any more; it may be stopped before. */
static void test_a_job_waits_for_models_in_use(void **state)
{
    (void)state;
    struct peer peer;
    char data[128];
    int64_t planned;
    write_examples("train.jsonl", data);
    peer_start(&peer);
    int64_t most = run_job(&peer, "lonely", data, &planned);
    peer_stop(&peer);

    for (int stopped = 0; stopped < 2; stopped++) {
        struct job_report report = {0};
        bool answered = false, waited = false;
        peer_start_small(&peer, most + (1 << 20));
        json_t *request = complete_json("The dog", 200, true);
        json_object_set_new(request, "model", folder_json("twin", model_folder));
        json_object_set_new(request, "ignore_eos", json_true());
        peer_send(&peer, FRAME_COMPLETE, 7, request);
        peer_send(&peer, FRAME_JOB_START, 0, start_json("patient", data, NULL));
        if (stopped)
            peer_send(&peer, FRAME_JOB_STOP, 0,
                      json_pack("{s:s, s:i, s:s}", "job", "patient", "attempt", 1, "reason", "cancel"));
        for (bool more = true; more || !answered;) {
            struct frame frame = peer_receive(&peer);
            if (frame.id == 7)
                answered |= frame.type != FRAME_CHUNK;
            else
                more = job_report_add(&report, &frame, "patient");
            waited |= answered && more;
            if (frame.id == 7 && frame.type == FRAME_FAILED)
                fail_msg("%s", text_of(frame.payload, "message"));
            json_decref(frame.payload);
        }
        assert_string_equal(report.status, stopped ? "cancelled" : "succeeded");
        assert_true(stopped || waited);
        peer_stop(&peer);
    }
}

static json_t *evaluation_json(const char *name)
{
    char definition[128], documents[128];
    write_work_file(
        "ends.json",
        "{\"task\": \"ends\", \"splits\": {\"test\": [{\"file\": \"ends.jsonl\", \"format\": "
        "\"jsonl\"}]}, \"documents\": \"test\", \"fewshot\": {\"from\": [\"test\"]}, \"context\": "
        "\"{start}\", \"choices\": [\"barks\", \"sings\"], \"gold\": \"{gold}\", \"metrics\": "
        "[\"acc\"]}",
        definition);
    write_work_file("ends.jsonl",
                    "{\"start\": \"The dog\", \"gold\": 0}\n{\"start\": \"The bird\", \"gold\": 1}\n",
                    documents);
    return json_pack("{s:s, s:i, s:[{s:s, s:o, s:n}], s:[s], s:[{s:s, s:s}], s:[i], s:n, s:n, s:b, s:i, s:n, "
                     "s:{s:s}, s:i, s:{}}",
                     "job", name, "attempt", 1, "models", "name", "hatchling", "model", model_json(),
                     "adapter", "precisions", "auto", "tasks", "name", "ends", "definition", definition,
                     "num_fewshot", 0, "limit", "max_length", "share", 1, "seed", 1, "data_dir", "files",
                     "ends.jsonl", documents, "total_steps", 2, "done");
}

/* The same for an evaluation. */
static void test_an_evaluation_waits_for_models_in_use(void **state)
{
    (void)state;
    struct peer peer;
    size_t n_models;
    peer_start(&peer);
    load(&peer, "hatchling");
    const int64_t of_one = read_status(&peer, &n_models);
    peer_stop(&peer);

    for (int stopped = 0; stopped < 2; stopped++) {
        bool answered = false, ended = false;
        int n_results = 0;
        peer_start_small(&peer, of_one + (1 << 20));
        json_t *request = complete_json("The dog", 200, true);
        json_object_set_new(request, "model", folder_json("twin", model_folder));
        json_object_set_new(request, "ignore_eos", json_true());
        peer_send(&peer, FRAME_COMPLETE, 7, request);
        peer_send(&peer, FRAME_EVALUATION_START, 0, evaluation_json("patient"));
        if (stopped)
            peer_send(&peer, FRAME_JOB_STOP, 0,
                      json_pack("{s:s, s:i, s:s}", "job", "patient", "attempt", 1, "reason", "cancel"));
        while (!answered || !ended) {
            struct frame frame = peer_receive(&peer);
            if (frame.type == FRAME_EVALUATION_RESULTS) {
                assert_true(answered);
                n_results += (int)json_array_size(json_object_get(frame.payload, "results"));
            } else if (frame.type == FRAME_JOB_ENDED) {
                assert_string_equal(text_of(frame.payload, "status"), stopped ? "cancelled" : "succeeded");
                ended = true;
            } else {
                assert_int_equal(frame.id, 7);
                assert_int_not_equal(frame.type, FRAME_FAILED);
                answered |= frame.type == FRAME_DONE;
            }
            json_decref(frame.payload);
        }
        assert_int_equal(n_results, stopped ? 0 : 2);
        peer_stop(&peer);
    }
}

/* ---- faults ---- */

enum { FAULTY_STEP = 6 };
static const char driver_words[] = "an illegal memory access was encountered";
static int steps_until_fault, fault_status;

/* A backend whose optimizer fails at one step. What is counted here is counted in the worker's process. */
static int failing_adamw(struct kernel_device *device, const struct adamw_args *args)
{
    return --steps_until_fault ? kernels_cpu()->adamw(device, args) : fault_status;
}

static const char *failing_fault(const struct kernel_device *device)
{
    (void)device;
    return steps_until_fault <= 0 && fault_status == KERNEL_DEVICE_LOST ? driver_words : NULL;
}

/* A worker whose device fails in the middle of a job says why and ends, without a word about the job's end; another
 * one goes on from its checkpoint, and the losses are those of the undisturbed run. */
static void fault_and_resume(const char *job, int status, const char *words)
{
    struct peer peer;
    struct job_report report = {0}, alone = {0};
    char data[128], undisturbed[64];
    struct kernel_ops ops = *kernels_cpu();
    ops.adamw = failing_adamw;
    ops.device_fault = failing_fault;
    steps_until_fault = FAULTY_STEP;
    fault_status = status;
    write_examples("train.jsonl", data);
    peer_start_on(&peer, &ops);
    peer_send(&peer, FRAME_JOB_START, 0, start_json(job, data, NULL));
    for (bool more = true; more;) {
        struct frame frame = peer_receive(&peer);
        if (frame.type == FRAME_FAULT) {
            if (!strstr(text_of(frame.payload, "reason"), words))
                fail_msg("%s", text_of(frame.payload, "reason"));
            more = false;
        } else {
            assert_true(job_report_add(&report, &frame, job));
        }
        json_decref(frame.payload);
    }
    assert_int_equal(peer_wait(&peer), 1);
    assert_int_equal(report.n_metrics, FAULTY_STEP - 1);

    peer_start(&peer);
    peer_send(&peer, FRAME_JOB_START, 0, start_json(job, data, report.checkpoint));
    job_report_read(&report, &peer, job);
    assert_string_equal(report.status, "succeeded");
    snprintf(undisturbed, sizeof undisturbed, "%s-undisturbed", job);
    peer_send(&peer, FRAME_JOB_START, 0, start_json(undisturbed, data, NULL));
    job_report_read(&alone, &peer, undisturbed);
    assert_memory_equal(report.losses, alone.losses, sizeof alone.losses);
    peer_stop(&peer);
}

static void test_a_lost_device_ends_it(void **state)
{
    (void)state;
    fault_and_resume("lost", KERNEL_DEVICE_LOST, driver_words);
}

static void test_memory_that_runs_out_ends_it(void **state)
{
    (void)state;
    fault_and_resume("starved", KERNEL_NO_MEMORY, "out of memory");
}

static void test_a_device_that_does_not_open_is_told(void **state)
{
    (void)state;
    struct peer peer;
    peer_fork(&peer, "cuda:999", NULL);
    struct frame frame = peer_receive_any(&peer);
    assert_int_equal(frame.type, FRAME_FAULT);
    assert_non_null(strstr(text_of(frame.payload, "reason"), kernels_cuda() ? "cuda:999" : "no CUDA"));
    json_decref(frame.payload);
    assert_int_equal(peer_wait(&peer), 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_what_cannot_fit_is_told_beforehand),
        cmocka_unit_test(test_idle_models_make_room_for_a_job),
        cmocka_unit_test(test_a_model_without_room_beside_a_job_waits),
        cmocka_unit_test(test_a_job_waits_for_models_in_use),
        cmocka_unit_test(test_an_evaluation_waits_for_models_in_use),
        cmocka_unit_test(test_a_lost_device_ends_it),
        cmocka_unit_test(test_memory_that_runs_out_ends_it),
        cmocka_unit_test(test_a_device_that_does_not_open_is_told),
    };
    return cmocka_run_group_tests(tests, peer_setup, peer_teardown);
}
