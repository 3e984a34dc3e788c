/* test_answers.c: resources, problems and completions as JSON. */
#include "api/completion.h"
#include "api/text.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static json_t *parse(const char *text)
{
    char *copy = strdup(text);
    assert_non_null(copy);
    for (char *c = copy; *c; c++)
        if (*c == '\'')
            *c = '"';
    json_error_t error;
    json_t *json = json_loads(copy, JSON_DECODE_ANY, &error);
    if (!json)
        fail_msg("%s: %s", copy, error.text);
    free(copy);
    return json;
}

/* Consumes got. Numbers compare as jansson reads them. */
static void json_is(json_t *got, const char *expected_text)
{
    assert_non_null(got);
    json_t *expected = parse(expected_text);
    if (!json_equal(got, expected)) {
        char *text = json_dumps(got, JSON_ENCODE_ANY);
        print_message("%s\n", text);
        free(text);
        fail();
    }
    json_decref(expected);
    json_decref(got);
}

static void text_mending(void **state)
{
    (void)state;
    json_t *mended = text_json("a\xff\xe2\x82z\xed\xa0\x80");
    assert_string_equal(json_string_value(mended),
                        "a\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbdz\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd");
    json_decref(mended);
    struct buffer out = {0};
    text_write_json(&out, "q\"\\\n\x01\xe2\x82\xac\xc0", 9);
    assert_string_equal(out.data, "\"q\\\"\\\\\\n\\u0001\xe2\x82\xac\xef\xbf\xbd\"");
    buffer_free(&out);
    assert_int_equal(text_count("a\xe2\x82\xac", 4), 2);
}

static void problems(void **state)
{
    (void)state;
    struct problem problem;
    assert_int_equal(problem_set(&problem, 404, "model_not_found", "model", "no %s", "x\xff"), -1);
    char *body = problem_encode(&problem);
    assert_string_equal(body,
                        "{\"error\":{\"message\":\"no x\xef\xbf\xbd\",\"type\":\"not_found_error\",\"param\":"
                        "\"model\",\"code\":\"model_not_found\"}}");
    free(body);
    static const struct {
        int status;
        const char *type;
    } types[] = {{400, "invalid_request_error"}, {401, "authentication_error"},
                 {405, "invalid_request_error"}, {413, "invalid_request_error"},
                 {429, "rate_limit_error"},      {500, "server_error"},
                 {503, "server_error"}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        problem_set(&problem, types[i].status, NULL, NULL, "x");
        assert_string_equal(problem.type, types[i].type);
    }
    body = problem_encode(&problem);
    assert_non_null(strstr(body, "\"param\":null,\"code\":null"));
    free(body);
}

static void resources(void **state)
{
    (void)state;
    struct file_resource file = {.id = "file-1",
                                 .bytes = 5,
                                 .created_at = 9,
                                 .filename = "a.jsonl",
                                 .purpose = "fine-tune",
                                 .status = "processed"};
    json_is(file_encode(&file),
            "{'id':'file-1','object':'file','bytes':5,'created_at':9,'expires_at':null,'filename':"
            "'a.jsonl','purpose':'fine-tune','status':'processed','status_details':null}");
    struct model_resource model = {
        .id = "ft:m:o::1", .created = 3, .owned_by = "o", .root = "m", .parent = "m"};
    json_is(model_encode(&model),
            "{'id':'ft:m:o::1','object':'model','created':3,'owned_by':'o','root':'m','parent':"
            "'m'}");
    struct event_resource event = {.sequence = 7,
                                   .created_at = 1,
                                   .level = "info",
                                   .type = "metrics",
                                   .message = (char *)(uintptr_t) "Step 1",
                                   .data = (char *)(uintptr_t) "{\"step\":1}"};
    json_is(event_encode(&event),
            "{'id':'ftevent-7','object':'fine_tuning.job.event','created_at':1,'level':'info',"
            "'message':'Step 1','type':'metrics','data':{'step':1}}");
    struct checkpoint_resource checkpoint = {.id = "ftckpt-1",
                                             .job = "ftjob-1",
                                             .created_at = 2,
                                             .step = 10,
                                             .model = "ft:m:o::1:ckpt-step-10",
                                             .train_loss = 0.5,
                                             .train_accuracy = 0.75,
                                             .valid_loss = NAN,
                                             .valid_accuracy = NAN};
    json_is(
        checkpoint_encode(&checkpoint),
        "{'id':'ftckpt-1','object':'fine_tuning.job.checkpoint','created_at':2,'fine_tuned_model_checkpoint':"
        "'ft:m:o::1:ckpt-step-10','fine_tuning_job_id':'ftjob-1','step_number':10,'metrics':{'step':10,"
        "'train_loss':0.5,'train_mean_token_accuracy':0.75,'valid_loss':null,'valid_mean_token_accuracy':"
        "null,"
        "'full_valid_loss':null,'full_valid_mean_token_accuracy':null}}");
    json_is(list_encode(json_array(), false),
            "{'object':'list','data':[],'first_id':null,'last_id':null,'has_more':"
            "false}");
    json_is(list_encode(parse("[{'id':'a'},{'id':'b'}]"), true),
            "{'object':'list','data':[{'id':'a'},{'id':'b'}],'first_id':'a','last_id':'b','has_more':true}");
    json_is(deleted_encode("x", "file"), "{'id':'x','object':'file','deleted':true}");
}

static void jobs(void **state)
{
    (void)state;
    struct job_resource job = {.id = "ftjob-1",
                               .created_at = 10,
                               .model = "m",
                               .status = JOB_QUEUED,
                               .training_file = "file-1",
                               .seed = 3,
                               .hyperparameters = (char *)(uintptr_t) "{\"n_epochs\":3}",
                               .trained_tokens = -1,
                               .tokens_per_second = NAN,
                               .loss = NAN,
                               .eta_seconds = NAN,
                               .queue_position = 2};
    json_is(job_encode(&job, "org", 100),
            "{'id':'ftjob-1','object':'fine_tuning.job','created_at':10,'started_at':null,'finished_at':null,"
            "'model':"
            "'m','fine_tuned_model':null,'organization_id':'org','status':'queued','result_files':[],'"
            "trained_tokens':"
            "null,'training_file':'file-1','validation_file':null,'hyperparameters':{'n_epochs':3},'method':{"
            "'type':"
            "'supervised','supervised':{'hyperparameters':{'n_epochs':3}}},'evaluations':null,'seed':3,'"
            "metadata':null,"
            "'estimated_finish':null,'error':null,'integrations':[],'progress':{'step':0,'total_steps':null,"
            "'tokens_per_second':null,'loss':null,'eta_seconds':null,'skipped_steps':0,'planned_memory_bytes'"
            ":null,'peak_memory_bytes':null,'bytes_per_"
            "token':null,"
            "'queue_position':2,'device':null}}");
    job.status = JOB_RUNNING;
    job.started_at = 20;
    job.step = 4;
    job.total_steps = 8;
    job.loss = 1.5;
    job.eta_seconds = 2.5;
    job.tokens_per_second = 1000;
    job.planned_memory_bytes = 4000;
    job.peak_memory_bytes = 4096;
    job.skipped_steps = 1;
    job.bytes_per_token = 2;
    job.queue_position = -1;
    job.trained_tokens = 12;
    job.metadata = (char *)(uintptr_t) "{\"a\":\"b\"}";
    snprintf(job.device, sizeof job.device, "cpu");
    json_t *json = job_encode(&job, "org", 100);
    assert_int_equal(json_integer_value(json_object_get(json, "estimated_finish")), 103);
    json_is(json_incref(json_object_get(json, "progress")),
            "{'step':4,'total_steps':8,'tokens_per_second':1000.0,'loss':1.5,'eta_seconds':2.5,'skipped_"
            "steps':1,'planned_memory_bytes':4000,"
            "'peak_memory_bytes':4096,'bytes_per_token':2.0,'queue_position':null,'device':'cpu'}");
    json_is(json_incref(json_object_get(json, "metadata")), "{'a':'b'}");
    json_decref(json);
    job.status = JOB_FAILED;
    snprintf(job.error_code, sizeof job.error_code, "diverged");
    snprintf(job.error_message, sizeof job.error_message, "the loss is NaN at step 4");
    snprintf(job.result_file, sizeof job.result_file, "file-9");
    json = job_encode(&job, "org", 100);
    json_is(json_incref(json_object_get(json, "error")),
            "{'code':'diverged','message':'the loss is NaN at step 4','param':null}");
    json_is(json_incref(json_object_get(json, "result_files")), "['file-9']");
    assert_true(json_is_null(json_object_get(json, "estimated_finish")));
    json_decref(json);

    for (int status = 0; status < JOB_STATUS_COUNT; status++)
        assert_int_equal(job_status_from_name(job_status_name((enum job_status)status)), status);
    assert_int_equal(job_status_from_name("done"), -1);
    assert_true(job_status_is_final(JOB_CANCELLED) && !job_status_is_final(JOB_PAUSED));
}

/* ---- completions ---- */

static void add(struct completion *completion, const char *chunk_text, const char *expected_events)
{
    json_t *chunk = parse(chunk_text);
    char *events = NULL;
    assert_int_equal(completion_add(completion, chunk, expected_events ? &events : NULL), 0);
    if (expected_events)
        assert_string_equal(events, expected_events);
    free(events);
    json_decref(chunk);
}

static void finish_is(struct completion *completion, const char *expected)
{
    char *body = completion_finish(completion, 3, 2);
    assert_non_null(body);
    assert_string_equal(body, expected);
    free(body);
    completion_free(completion);
}

#define HEAD  "{\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":5,\"model\":\"m\""
#define USAGE "\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2,\"total_tokens\":5}"

static void collected(void **state)
{
    (void)state;
    struct completion_request request = {.n_prompts = 2, .n = 1};
    struct completion *completion = completion_create(&request, "cmpl-1", "m", 5);
    add(completion, "{'index':1,'text':'wo','finish_reason':null}", NULL);
    add(completion, "{'index':0,'text':'one\\n','finish_reason':'length'}", NULL);
    assert_null(completion_finish(completion, 3, 2)); /* choice 1 is not over */
    add(completion, "{'index':1,'text':'rd','finish_reason':'stop'}", NULL);
    finish_is(completion,
              HEAD ",\"choices\":[{\"index\":0,\"text\":\"one\\n\",\"logprobs\":null,\"finish_reason\":"
                   "\"length\"},{\"index\":1,\"text\":\"word\",\"logprobs\":null,\"finish_reason\":"
                   "\"stop\"}]," USAGE "}");
}

static void scored(void **state)
{
    (void)state;
    struct completion_request request = {.n_prompts = 1, .n = 1, .has_logprobs = true, .echo = true};
    struct completion *completion = completion_create(&request, "cmpl-1", "m", 5);
    /* The first has no score; two bytes of one character; a text that two ids share; -inf. 0.1 and -1.1 are
     * sent as the doubles of floats. */
    add(completion,
        "{'index':0,'text':'\xc3\xa9\xe2\x82\xac.','finish_reason':'stop','tokens':["
        "{'id':1,'text':'\xc3\xa9','logprob':null,'top':[]},"
        "{'id':2,'text':'\xef\xbf\xbd','bytes':[226,130],'logprob':-1.10000002384185791,'top':[['a',-0.5],['"
        "a',-0.25]]},"
        "{'id':3,'text':'\xef\xbf\xbd','bytes':[172],'logprob':-3.0,'top':[['\xef\xbf\xbd',-0.1]]},"
        "{'id':4,'text':'.','logprob':-9999,'top':[['x',-1e-9]]},"
        "{'id':5,'text':'!','logprob':-0.333333343267440796,'top':[['!',-0.333333343267440796]]}]}",
        NULL);
    finish_is(
        completion, HEAD
        ",\"choices\":[{\"index\":0,\"text\":\"\xc3\xa9\xe2\x82\xac.\",\"logprobs\":{\"tokens\":["
        "\"\xc3\xa9\","
        "\"\xef\xbf\xbd\",\"\xef\xbf\xbd\",\".\",\"!\"],\"token_logprobs\":[null,-1.1,-3,-9999,-0.33333334],"
        "\"top_logprobs\":[null,{\"a\":-0.25,\"\xef\xbf\xbd\":-1.1},{\"\xef\xbf\xbd\":-0.1},{\"x\":-1e-09,"
        "\".\":-9999},{\"!\":-0.33333334}],\"text_offset\":[0,1,2,2,3]},\"finish_reason\":\"stop\"}]," USAGE
        "}");
}

/* Equal floats are equal text, and every text reads back as the float. */
static void one_formatter(void **state)
{
    (void)state;
    unsigned seed = 1;
    for (int i = 0; i < 2000; i++) {
        seed = seed * 1664525u + 1013904223u;
        float value = -(float)(seed >> 8) / (float)(1 << (i % 24));
        if (value <= -9999.0F)
            continue;
        struct completion_request request = {.n_prompts = 1, .n = 1, .has_logprobs = true};
        struct completion *completion = completion_create(&request, "cmpl-1", "m", 5);
        json_t *chunk =
            json_pack("{s:i, s:s, s:s, s:[{s:s, s:f, s:[[s, f]]}]}", "index", 0, "text", "t", "finish_reason",
                      "stop", "tokens", "text", "t", "logprob", (double)value, "top", "u", (double)value);
        assert_int_equal(completion_add(completion, chunk, NULL), 0);
        json_decref(chunk);
        char *body = completion_finish(completion, 1, 1);
        json_t *json = json_loads(body, 0, NULL);
        json_t *logprobs = json_object_get(json_array_get(json_object_get(json, "choices"), 0), "logprobs");
        double own = json_number_value(json_array_get(json_object_get(logprobs, "token_logprobs"), 0));
        json_t *top = json_array_get(json_object_get(logprobs, "top_logprobs"), 0);
        assert_true((float)own == value);
        assert_true(json_number_value(json_object_get(top, "u")) == own);
        json_decref(json);
        free(body);
        completion_free(completion);
    }
}

static void streamed(void **state)
{
    (void)state;
    struct completion_request request = {
        .n_prompts = 1, .n = 1, .stream = true, .include_usage = true, .has_logprobs = true};
    struct completion *completion = completion_create(&request, "cmpl-1", "m", 5);
    add(completion, "{'index':0,'text':'','finish_reason':null}", "");
    add(completion,
        "{'index':0,'text':'\xe2\x82\xac','finish_reason':null,'tokens':[{'id':1,'text':'\xe2\x82\xac','"
        "logprob':-1,"
        "'top':[]}]}",
        "data: " HEAD
        ",\"choices\":[{\"index\":0,\"text\":\"\xe2\x82\xac\",\"logprobs\":{\"tokens\":[\"\xe2\x82\xac\"],"
        "\"token_logprobs\":[-1],\"top_logprobs\":[{\"\xe2\x82\xac\":-1}],\"text_offset\":[0]},\"finish_"
        "reason\":null}],"
        "\"usage\":null}\n\n");
    add(completion,
        "{'index':0,'text':'b','finish_reason':'length','tokens':[{'id':2,'text':'b','logprob':-2,'top':[]}]"
        "}",
        "data: " HEAD
        ",\"choices\":[{\"index\":0,\"text\":\"b\",\"logprobs\":{\"tokens\":[\"b\"],\"token_logprobs\":[-2],"
        "\"top_logprobs\":[{\"b\":-2}],\"text_offset\":[1]},\"finish_reason\":\"length\"}],\"usage\":null}"
        "\n\n");
    finish_is(completion, "data: " HEAD ",\"choices\":[]," USAGE "}\n\ndata: [DONE]\n\n");
}

#define CHAT  "{\"id\":\"c\",\"object\":\"chat.completion\",\"created\":5,\"model\":\"m\""
#define CHUNK "{\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":5,\"model\":\"m\""

static void chat(void **state)
{
    (void)state;
    struct completion_request request = {.chat = true, .n_prompts = 1, .n = 1, .has_logprobs = true};
    struct completion *completion = completion_create(&request, "c", "m", 5);
    add(completion,
        "{'index':0,'text':'hi','finish_reason':'stop','tokens':[{'id':1,'text':'hi','logprob':-0.5,'top':[['"
        "hi',-0.5],"
        "['ho',-0.75]]}]}",
        NULL);
    finish_is(
        completion, CHAT
        ",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"hi\",\"refusal\":null},"
        "\"logprobs\":{\"content\":[{\"token\":\"hi\",\"logprob\":-0.5,\"bytes\":[104,105],\"top_logprobs\":["
        "{\"token\":\"hi\",\"logprob\":-0.5,\"bytes\":[104,105]},{\"token\":\"ho\",\"logprob\":-0.75,"
        "\"bytes\":"
        "[104,111]}]}],\"refusal\":null},\"finish_reason\":\"stop\"}]," USAGE "}");

    request = (struct completion_request){.chat = true, .n_prompts = 1, .n = 1, .stream = true};
    completion = completion_create(&request, "c", "m", 5);
    add(completion, "{'index':0,'text':'a','finish_reason':null}",
        "data: " CHUNK
        ",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"a\"},\"logprobs\":null,"
        "\"finish_reason\":null}]}\n\n");
    add(completion, "{'index':0,'text':'b','finish_reason':null}",
        "data: " CHUNK
        ",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"b\"},\"logprobs\":null,\"finish_reason\":null}]}"
        "\n\n");
    add(completion, "{'index':0,'text':'','finish_reason':'stop'}",
        "data: " CHUNK
        ",\"choices\":[{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":\"stop\"}]}\n\n");
    finish_is(completion, "data: [DONE]\n\n");
}

static void broken_chunks(void **state)
{
    (void)state;
    struct completion_request request = {.n_prompts = 1, .n = 1, .has_logprobs = true};
    struct completion *completion = completion_create(&request, "c", "m", 5);
    static const char *const bad[] = {"{}",
                                      "{'index':1,'text':''}",
                                      "{'index':-1,'text':''}",
                                      "{'index':0}",
                                      "{'index':0,'text':'','tokens':[{}]}",
                                      "{'index':0,'text':'','tokens':[{'text':'a','logprob':'x'}]}",
                                      "{'index':0,'text':'','tokens':[{'text':'a','logprob':1,'top':[1]}]}"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        json_t *chunk = parse(bad[i]);
        assert_int_equal(completion_add(completion, chunk, NULL), -1);
        json_decref(chunk);
    }
    add(completion, "{'index':0,'text':'','finish_reason':'stop'}", NULL);
    json_t *late = parse("{'index':0,'text':'x','finish_reason':null}");
    assert_int_equal(completion_add(completion, late, NULL), -1);
    json_decref(late);
    completion_free(completion);

    struct problem problem;
    problem_set(&problem, 503, "worker_lost", NULL, "The worker died.");
    char *event = completion_error_event(&problem);
    assert_string_equal(
        event, "data: {\"error\":{\"message\":\"The worker died.\",\"type\":\"server_error\",\"param\":null,"
               "\"code\":\"worker_lost\"}}\n\n");
    free(event);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(text_mending),  cmocka_unit_test(problems),  cmocka_unit_test(resources),
        cmocka_unit_test(jobs),          cmocka_unit_test(collected), cmocka_unit_test(scored),
        cmocka_unit_test(one_formatter), cmocka_unit_test(streamed),  cmocka_unit_test(chat),
        cmocka_unit_test(broken_chunks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
