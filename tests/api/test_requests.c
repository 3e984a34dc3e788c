/* test_requests.c: bodies and queries into structs, and every refusal by its field and its words. */
#include "api/requests.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* Literals in these tests are written with ' for ". */
static json_t *parse(const char *text)
{
    char *copy = strdup(text);
    assert_non_null(copy);
    for (char *c = copy; *c; c++)
        if (*c == '\'')
            *c = '"';
    json_t *object = NULL;
    struct problem problem = {0};
    if (body_decode(copy, strlen(copy), &object, &problem))
        fail_msg("%s: %s", text, problem.message);
    free(copy);
    return object;
}

static void check_problem(const struct problem *problem, const char *text, const char *param,
                          const char *words)
{
    if (problem->status != 400 || strcmp(problem->param, param) || !strstr(problem->message, words))
        fail_msg("%s: got %d, %s: %s", text, problem->status, problem->param, problem->message);
}

/* ---- bodies ---- */

static void body_refused(const char *body, size_t length, const char *words)
{
    json_t *object = NULL;
    struct problem problem = {0};
    assert_int_equal(body_decode(body, length, &object, &problem), -1);
    assert_null(object);
    check_problem(&problem, body, "", words);
}

static void bodies(void **state)
{
    (void)state;
    body_refused("", 0, "empty");
    body_refused("{", 1, "line 1");
    body_refused("[1]", 3, "must be a JSON object");
    body_refused("{\"a\":1,\n\"a\":2}", 15, "line 2");
    body_refused("{\"a\":1} x", 9, "column");
    body_refused("{\"a\":\"\\u0000\"}", 14, "not valid JSON");
    body_refused("{\"a\":\"\xff\"}", 9, "not valid JSON");
    body_refused("{\"a\":NaN}", 9, "not valid JSON");
    body_refused("{\"a\":99999999999999999999}", 26, "not valid JSON");
    body_refused("{\"a\0\":1}", 9, "not valid JSON");
    char deep[200];
    memset(deep, '[', sizeof deep);
    memcpy(deep, "{\"a\":\n", 6);
    body_refused(deep, sizeof deep, "64 levels (line 2, column 64)");
    json_t *object =
        parse("{'a':'[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\\\\'}");
    json_decref(object);
}

/* ---- lists ---- */

static void lists(void **state)
{
    (void)state;
    struct list_query query;
    struct problem problem = {0};
    assert_int_equal(list_query_decode(LIST_JOBS, NULL, 0, &query, &problem), 0);
    assert_int_equal(query.limit, 20);
    assert_false(query.ascending);
    assert_null(query.metadata);
    assert_int_equal(list_query_decode(LIST_FILES, NULL, 0, &query, &problem), 0);
    assert_int_equal(query.limit, 10000);
    assert_int_equal(list_query_decode(LIST_CHECKPOINTS, NULL, 0, &query, &problem), 0);
    assert_int_equal(query.limit, 10);

    const struct query_argument full[] = {{"after", "ftjob-9"},      {"limit", "100"},    {"order", "asc"},
                                          {"metadata[team]", "red"}, {"metadata[k]", ""}, {"surprise", "1"}};
    assert_int_equal(list_query_decode(LIST_JOBS, full, 6, &query, &problem), 0);
    assert_string_equal(query.after, "ftjob-9");
    assert_int_equal(query.limit, 100);
    assert_true(query.ascending);
    assert_string_equal(json_string_value(json_object_get(query.metadata, "team")), "red");
    assert_string_equal(json_string_value(json_object_get(query.metadata, "k")), "");
    json_decref(query.metadata);
    const struct query_argument stream = {"stream", "true"};
    assert_int_equal(list_query_decode(LIST_EVENTS, &stream, 1, &query, &problem), 0);
    assert_true(query.stream);

    static const struct {
        enum list_kind kind;
        struct query_argument argument;
        const char *param, *words;
    } bad[] = {
        {LIST_JOBS, {"limit", "0"}, "limit", "from 1 to 100"},
        {LIST_JOBS, {"limit", "101"}, "limit", "from 1 to 100"},
        {LIST_JOBS, {"limit", "ten"}, "limit", "not ten"},
        {LIST_JOBS, {"limit", ""}, "limit", "from 1"},
        {LIST_JOBS, {"limit", " 5"}, "limit", "from 1"},
        {LIST_JOBS, {"limit", "99999999999999999999"}, "limit", "from 1"},
        {LIST_FILES, {"limit", "10001"}, "limit", "from 1 to 10000"},
        {LIST_JOBS, {"order", "up"}, "order", "asc or desc"},
        {LIST_JOBS, {"metadata[]", "x"}, "metadata", "metadata[KEY]=VALUE"},
        {LIST_JOBS, {"metadata[a", "x"}, "metadata", "metadata[KEY]=VALUE"},
        {LIST_JOBS, {"after", "\xff"}, "after", "no id"},
        {LIST_EVENTS, {"stream", "perhaps"}, "stream", "true or false"},
        {LIST_FILES, {"purpose", "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}, "purpose", "no purpose"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(list_query_decode(bad[i].kind, &bad[i].argument, 1, &query, &problem), -1);
        check_problem(&problem, bad[i].argument.value, bad[i].param, bad[i].words);
    }
}

/* ---- files ---- */

static void files(void **state)
{
    (void)state;
    struct file_resource file = {0};
    struct problem problem = {0};
    assert_int_equal(file_fields_check("fine-tune", "a b.jsonl", "created_at", "3600", 1000, &file, &problem),
                     0);
    assert_int_equal(file.expires_at, 4600);
    assert_int_equal(file.created_at, 1000);
    assert_string_equal(file.filename, "a b.jsonl");
    assert_string_equal(file.status, "processed");
    assert_int_equal(file_fields_check("user_data", "x", NULL, NULL, 1000, &file, &problem), 0);
    assert_int_equal(file.expires_at, 0);

    char long_name[FILENAME_BYTES + 1];
    memset(long_name, 'n', sizeof long_name);
    long_name[FILENAME_BYTES] = '\0';
    const struct {
        const char *purpose, *filename, *anchor, *seconds, *param, *words;
    } bad[] = {
        {NULL, "x", NULL, NULL, "purpose", "required"},
        {"fine-tune", NULL, NULL, NULL, "file", "no part named file"},
        {"finetune", "x", NULL, NULL, "purpose", "fine-tune"},
        {"fine-tune", "", NULL, NULL, "file", "1 to 255"},
        {"fine-tune", long_name, NULL, NULL, "file", "1 to 255"},
        {"fine-tune", "a\nb", NULL, NULL, "file", "control"},
        {"fine-tune", "a\xff", NULL, NULL, "file", "UTF-8"},
        {"fine-tune", "x", "created_at", NULL, "expires_after[seconds]", "both"},
        {"fine-tune", "x", NULL, "3600", "expires_after[anchor]", "both"},
        {"fine-tune", "x", "now", "3600", "expires_after[anchor]", "created_at"},
        {"fine-tune", "x", "created_at", "3599", "expires_after[seconds]", "from 3600 to 2592000"},
        {"fine-tune", "x", "created_at", "2592001", "expires_after[seconds]", "from 3600 to 2592000"},
        {"fine-tune", "x", "created_at", "-5", "expires_after[seconds]", "from 3600"},
        {"fine-tune", "x", "created_at", "1e9", "expires_after[seconds]", "from 3600"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(file_fields_check(bad[i].purpose, bad[i].filename, bad[i].anchor, bad[i].seconds, 0,
                                           &file, &problem),
                         -1);
        check_problem(&problem, bad[i].words, bad[i].param, bad[i].words);
    }
}

/* ---- jobs ---- */

#define NEEDED "'model':'hatchling','training_file':'file-1'"

static struct job_request job(const char *text)
{
    struct job_request request = {0};
    struct problem problem = {0};
    json_t *body = parse(text);
    if (job_request_decode(body, &request, &problem))
        fail_msg("%s: %s", text, problem.message);
    json_decref(body);
    return request;
}

static void job_refused(const char *text, const char *param, const char *words)
{
    struct job_request request = {0};
    struct problem problem = {0};
    json_t *body = parse(text);
    assert_int_equal(job_request_decode(body, &request, &problem), -1);
    assert_null(request.hyperparameters);
    check_problem(&problem, text, param, words);
    json_decref(body);
}

static double number(const struct job_request *request, const char *key)
{
    const json_t *value = json_object_get(request->hyperparameters, key);
    assert_true(json_is_number(value));
    return json_number_value(value);
}

static void job_defaults(void **state)
{
    (void)state;
    struct job_request request = job("{" NEEDED "}");
    assert_string_equal(request.model, "hatchling");
    assert_string_equal(request.training_file, "file-1");
    assert_string_equal(request.validation_file, "");
    assert_string_equal(request.suffix, "");
    assert_false(request.has_seed);
    assert_null(request.metadata);
    json_t *expected = parse(
        "{'n_epochs':3,'batch_size':8,'learning_rate_multiplier':1.0,'learning_rate':0.001,'max_steps':0,"
        "'gradient_accumulation_steps':1,'max_seq_len':512,'packing':true,'truncate_long_examples':false,'"
        "precision':'auto'"
        ","
        "'adaptation':'lora','lora':{'rank':8,'alpha':16.0,'dropout':0.0,'targets':['in_proj','x_proj'],"
        "'rslora':false},'optimizer':{'betas':[0.9,0.999],'eps':1e-8,'weight_decay':0.0},'lr_schedule':'"
        "linear',"
        "'warmup_steps':0,'max_grad_norm':1.0,'eval_steps':0,'checkpoint_steps':0,'keep_checkpoints':3,"
        "'early_stopping':null,'load_best_at_end':false}");
    assert_true(json_equal(request.hyperparameters, expected));
    json_decref(expected);
    job_request_free(&request);
}

static void job_values(void **state)
{
    (void)state;
    struct job_request request =
        job("{" NEEDED ",'validation_file':'file-2','suffix':'My.run-1_x','seed':7,'metadata':{'a':'b'},"
            "'integrations':null,'method':{'type':'supervised','supervised':{'hyperparameters':{'n_epochs':'"
            "auto',"
            "'batch_size':4,'learning_rate_multiplier':2,'lora':{'rank':4,'targets':'sll'},'early_stopping':"
            "{'patience':2},'precision':'bf16','eval_steps':10.0}}}}");
    assert_string_equal(request.validation_file, "file-2");
    assert_string_equal(request.suffix, "My.run-1_x");
    assert_true(request.has_seed && request.seed == 7);
    assert_int_equal(json_object_size(request.metadata), 1);
    assert_true(number(&request, "n_epochs") == 3 && number(&request, "batch_size") == 4);
    assert_true(number(&request, "learning_rate") == 0.002);
    assert_true(number(&request, "eval_steps") == 10);
    json_t *lora = json_object_get(request.hyperparameters, "lora");
    json_t *expected = parse("{'rank':4,'alpha':8.0,'dropout':0.0,'targets':['embeddings','in_proj','x_proj',"
                             "'out_proj'],'rslora':false}");
    assert_true(json_equal(lora, expected));
    json_decref(expected);
    job_request_free(&request);

    /* extra_body puts our keys beside model; older clients use hyperparameters. */
    request = job("{" NEEDED ",'learning_rate':0.0005,'adaptation':'full','hyperparameters':{'n_epochs':1,"
                  "'batch_size':'auto'},'max_steps':30,'n_epochs':1}");
    assert_true(number(&request, "n_epochs") == 1 && number(&request, "batch_size") == 8);
    assert_true(number(&request, "learning_rate") == 0.0005 && number(&request, "max_steps") == 30);
    job_request_free(&request);
    request = job("{" NEEDED ",'adaptation':'full'}");
    assert_true(number(&request, "learning_rate") == 0.0001);
    job_request_free(&request);

    /* What a job echoes is itself a valid request. */
    request =
        job("{" NEEDED ",'validation_file':'f','lora':{'targets':['dt_proj','x_proj']},'early_stopping':{}}");
    json_t *again = json_pack("{s:s, s:s, s:s, s:O}", "model", "m", "training_file", "f", "validation_file",
                              "v", "hyperparameters", request.hyperparameters);
    struct job_request second = {0};
    struct problem problem = {0};
    assert_int_equal(job_request_decode(again, &second, &problem), 0);
    assert_true(json_equal(request.hyperparameters, second.hyperparameters));
    json_decref(again);
    job_request_free(&second);
    job_request_free(&request);
}

#define METHOD(inner)                                                                                        \
    "{" NEEDED ",'method':{'type':'supervised','supervised':{'hyperparameters':{" inner "}}}}"
#define AT "method.supervised.hyperparameters."

static void job_refusals(void **state)
{
    (void)state;
    static const struct {
        const char *text, *param, *words;
    } bad[] = {
        {"{'training_file':'f'}", "model", "required"},
        {"{'model':'m'}", "training_file", "required"},
        {"{'model':7,'training_file':'f'}", "model", "must be a string, not 7"},
        {"{'model':'','training_file':'f'}", "model", "1 to 255"},
        {"{" NEEDED ",'training_fil':'x'}", "training_fil", "Unknown parameter"},
        {"{" NEEDED ",'method':'supervised'}", "method", "must be an object"},
        {"{" NEEDED ",'method':{}}", "method.type", "required"},
        {"{" NEEDED ",'method':{'type':'dpo'}}", "method.type", "\"supervised\", not \"dpo\""},
        {"{" NEEDED ",'method':{'type':'supervised','dpo':{}}}", "method.dpo",
         "Unknown parameter: method.dpo"},
        {"{" NEEDED ",'method':{'type':'supervised','supervised':{'lr':1}}}", "method.supervised.lr",
         "Unknown"},
        {METHOD("'learning_rte':1"), AT "learning_rte", "Unknown parameter"},
        {"{" NEEDED ",'hyperparameters':{'epochs':1}}", "hyperparameters.epochs", "Unknown parameter"},
        {"{" NEEDED ",'hyperparameters':[]}", "hyperparameters", "must be an object, not an array"},
        {"{" NEEDED ",'n_epochs':1,'hyperparameters':{'n_epochs':2}}", "hyperparameters.n_epochs",
         "another value"},
        {METHOD("'n_epochs':0"), AT "n_epochs", "from 1 to 1000, not 0"},
        {METHOD("'n_epochs':'many'"), AT "n_epochs", "\"auto\" or an integer from 1 to 1000"},
        {METHOD("'n_epochs':1.5"), AT "n_epochs", "not 1.5"},
        {METHOD("'n_epochs':true"), AT "n_epochs", "not true"},
        {METHOD("'batch_size':1025"), AT "batch_size", "from 1 to 1024, not 1025"},
        {METHOD("'learning_rate_multiplier':0"), AT "learning_rate_multiplier", "at least 0.001"},
        {METHOD("'learning_rate_multiplier':'x'"), AT "learning_rate_multiplier", "must be a number"},
        {METHOD("'learning_rate':2"), AT "learning_rate", "at most 1, not 2"},
        {METHOD("'learning_rate':0.5,'learning_rate_multiplier':3"), AT "learning_rate_multiplier", "1.5"},
        {METHOD("'max_steps':-1"), AT "max_steps", "from 0"},
        {METHOD("'gradient_accumulation_steps':0"), AT "gradient_accumulation_steps", "from 1 to 1024"},
        {METHOD("'max_seq_len':1"), AT "max_seq_len", "from 2 to 1048576"},
        {METHOD("'packing':1"), AT "packing", "true or false"},
        {METHOD("'truncate_long_examples':'yes'"), AT "truncate_long_examples", "true or false"},
        {METHOD("'precision':'fp8'"), AT "precision",
         "\"auto\", \"fp32\", \"tf32\", \"bf16\", \"fp16\", not \"fp8\""},
        {METHOD("'adaptation':'qlora'"), AT "adaptation", "\"lora\", \"full\""},
        {METHOD("'lora':4"), AT "lora", "must be an object, not 4"},
        {METHOD("'lora':{'r':4}"), AT "lora.r", "Unknown parameter"},
        {METHOD("'lora':{'rank':0}"), AT "lora.rank", "from 1 to 1024"},
        {METHOD("'lora':{'alpha':0}"), AT "lora.alpha", "at most 65536"},
        {METHOD("'lora':{'dropout':1}"), AT "lora.dropout", "at most 0.95"},
        {METHOD("'lora':{'rslora':0}"), AT "lora.rslora", "true or false"},
        {METHOD("'lora':{'targets':'most'}"), AT "lora.targets", ", not most"},
        {METHOD("'lora':{'targets':[]}"), AT "lora.targets", "at least one name"},
        {METHOD("'lora':{'targets':['q_proj']}"), AT "lora.targets", "\"q_proj\" is none of in_proj"},
        {METHOD("'lora':{'targets':['in_proj','in_proj']}"), AT "lora.targets", "in_proj twice"},
        {METHOD("'lora':{'targets':{}}"), AT "lora.targets", "array of"},
        {METHOD("'optimizer':{'lr':1}"), AT "optimizer.lr", "Unknown parameter"},
        {METHOD("'optimizer':{'betas':[0.9]}"), AT "optimizer.betas", "two numbers"},
        {METHOD("'optimizer':{'betas':[0.9,1]}"), AT "optimizer.betas", "two numbers"},
        {METHOD("'optimizer':{'betas':0.9}"), AT "optimizer.betas", "two numbers"},
        {METHOD("'optimizer':{'eps':0}"), AT "optimizer.eps", "at most 1"},
        {METHOD("'optimizer':{'weight_decay':-1}"), AT "optimizer.weight_decay", "at least 0"},
        {METHOD("'lr_schedule':'step'"), AT "lr_schedule", "\"constant\", \"linear\", \"cosine\""},
        {METHOD("'warmup_steps':-1"), AT "warmup_steps", "from 0"},
        {METHOD("'max_grad_norm':-1"), AT "max_grad_norm", "at least 0"},
        {METHOD("'eval_steps':0.5"), AT "eval_steps", "from 0"},
        {METHOD("'checkpoint_steps':'all'"), AT "checkpoint_steps", "from 0"},
        {METHOD("'keep_checkpoints':0"), AT "keep_checkpoints", "from 1 to 1000"},
        {METHOD("'early_stopping':{}"), AT "early_stopping", "validation_file"},
        {METHOD("'early_stopping':{'patience':0}"), AT "early_stopping.patience", "from 1 to 1000"},
        {METHOD("'early_stopping':{'min_delta':-1}"), AT "early_stopping.min_delta", "at least 0"},
        {METHOD("'early_stopping':{'wait':1}"), AT "early_stopping.wait", "Unknown parameter"},
        {METHOD("'load_best_at_end':true"), AT "load_best_at_end", "validation_file"},
        {"{" NEEDED ",'suffix':'a b'}", "suffix", "letters, digits"},
        {"{" NEEDED ",'suffix':'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'}",
         "suffix", "1 to 64"},
        {"{" NEEDED ",'seed':-1}", "seed", "from 0"},
        {"{" NEEDED ",'metadata':{'a':1}}", "metadata", "must be a string"},
        {"{" NEEDED ",'metadata':{'':'x'}}", "metadata", "1 to 64"},
        {"{" NEEDED
         ",'metadata':{'a':'','b':'','c':'','d':'','e':'','f':'','g':'','h':'','i':'','j':'','k':'',"
         "'l':'','m':'','n':'','o':'','p':'','q':''}}",
         "metadata", "at most 16 pairs; it has 17"},
        {"{" NEEDED ",'integrations':[{'type':'wandb'}]}", "integrations", "leave it out"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        job_refused(bad[i].text, bad[i].param, bad[i].words);
}

/* ---- completions ---- */

static const struct completion_limits limits = {
    .max_prompts = 4, .max_choices = 8, .max_tokens = 2048, .max_stop = 3};

static struct completion_request completion(const char *text, bool chat)
{
    struct completion_request request = {0};
    struct problem problem = {0};
    json_t *body = parse(text);
    if (completion_request_decode(body, chat, &limits, &request, &problem))
        fail_msg("%s: %s", text, problem.message);
    json_decref(body);
    return request;
}

static void work_is(const struct completion_request *request, const char *expected_text)
{
    json_t *expected = parse(expected_text);
    if (!json_equal(request->work, expected)) {
        char *got = json_dumps(request->work, 0);
        print_message("%s\n", got);
        free(got);
        fail();
    }
    json_decref(expected);
}

static void completions(void **state)
{
    (void)state;
    struct completion_request request =
        completion("{'model':'m','prompt':'Hi','user':'u','store':false}", false);
    assert_string_equal(request.model, "m");
    assert_true(request.n_prompts == 1 && request.n == 1 && !request.stream && !request.has_logprobs);
    work_is(&request,
            "{'prompts':['Hi'],'chat':false,'n':1,'max_tokens':16,'temperature':1.0,'top_p':1.0,"
            "'min_p':0.0,'top_k':0,'repetition_penalty':1.0,'presence_penalty':0.0,"
            "'frequency_penalty':0.0,'logit_bias':{},'stop':[],'seed':null,'logprobs':null,'echo':false,"
            "'ignore_eos':false,'stream':false}");
    completion_request_free(&request);

    /* What lm-evaluation-harness sends. */
    request = completion(
        "{'model':'m','prompt':[[1,2],[3]],'temperature':0,'max_tokens':1,'logprobs':1,'seed':1234,"
        "'echo':true}",
        false);
    assert_true(request.n_prompts == 2 && request.has_logprobs && request.echo);
    work_is(&request,
            "{'prompts':[[1,2],[3]],'chat':false,'n':1,'max_tokens':1,'temperature':0.0,'top_p':1.0,"
            "'min_p':0.0,'top_k':0,'repetition_penalty':1.0,'presence_penalty':0.0,"
            "'frequency_penalty':0.0,'logit_bias':{},'stop':[],'seed':1234,'logprobs':1,'echo':true,"
            "'ignore_eos':false,'stream':false}");
    completion_request_free(&request);

    request = completion(
        "{'adapter':'ft:m','prompt':[5,6],'n':3,'best_of':3,'stream':true,'stream_options':"
        "{'include_usage':true,'include_obfuscation':false},'stop':['a','','b'],'top_k':-1,'logit_bias':"
        "{'50256':-100,'1':2.5},'suffix':null,'logprobs':null,'max_tokens':null,'ignore_eos':true}",
        false);
    assert_string_equal(request.model, "");
    assert_string_equal(request.adapter, "ft:m");
    assert_true(request.n == 3 && request.n_prompts == 1 && request.stream && request.include_usage);
    json_t *stop = json_object_get(request.work, "stop");
    assert_int_equal(json_array_size(stop), 2);
    assert_int_equal(json_array_size(json_object_get(request.work, "prompts")), 1);
    assert_int_equal(json_object_size(json_object_get(request.work, "logit_bias")), 2);
    assert_int_equal(json_integer_value(json_object_get(request.work, "top_k")), 0);
    completion_request_free(&request);

    request = completion("{'prompt':['a','b'],'stop':'x','echo':true,'max_tokens':0}", false);
    assert_int_equal(request.n_prompts, 2);
    assert_int_equal(json_integer_value(json_object_get(request.work, "max_tokens")), 0);
    completion_request_free(&request);
    request = completion("{'prompt':null}", false);
    assert_string_equal(json_string_value(json_array_get(json_object_get(request.work, "prompts"), 0)), "");
    completion_request_free(&request);
}

static void chats(void **state)
{
    (void)state;
    struct completion_request request = completion(
        "{'model':'m','messages':[{'role':'developer','content':'be kind'},{'role':'user','content':"
        "[{'type':'text','text':'a'},{'type':'text','text':'b'}]},{'role':'assistant','content':null}],"
        "'logprobs':true,'top_logprobs':2,'max_completion_tokens':9,'tools':[],'response_format':"
        "{'type':'text'}}",
        true);
    assert_true(request.chat && request.has_logprobs && request.n_prompts == 1);
    json_t *expected = parse("{'m':[{'role':'system','content':'be kind'},{'role':'user','content':'ab'},"
                             "{'role':'assistant','content':''}]}");
    assert_true(json_equal(json_object_get(request.work, "messages"), json_object_get(expected, "m")));
    json_decref(expected);
    assert_int_equal(json_array_size(json_object_get(request.work, "prompts")), 0);
    assert_int_equal(json_integer_value(json_object_get(request.work, "max_tokens")), 9);
    assert_int_equal(json_integer_value(json_object_get(request.work, "logprobs")), 2);
    completion_request_free(&request);
}

static void completion_refusals(void **state)
{
    (void)state;
    static const struct {
        bool chat;
        const char *text, *param, *words;
    } bad[] = {
        {false, "{'model':'m'}", "prompt", "required"},
        {false, "{'prompt':[]}", "prompt", "empty array"},
        {false, "{'prompt':{}}", "prompt", "a string, an array"},
        {false, "{'prompt':5}", "prompt", "a string, an array"},
        {false, "{'prompt':[1,'a']}", "prompt", "token id 1"},
        {false, "{'prompt':[1,-2]}", "prompt", "from 0 to 2147483647"},
        {false, "{'prompt':[1.5]}", "prompt", "token id 0"},
        {false, "{'prompt':['a',[1]]}", "prompt", "element 1 must be a string"},
        {false, "{'prompt':[[1],'a']}", "prompt", "element 1 must be an array"},
        {false, "{'prompt':[[1],['a']]}", "prompt", "token id 0"},
        {false, "{'prompt':[null]}", "prompt", "element 0"},
        {false, "{'prompt':['a','b','c','d','e']}", "prompt", "at most 4 prompts; it has 5"},
        {false, "{'prompt':'a','model':[]}", "model", "must be a string"},
        {false, "{'prompt':'a','suffix':'x'}", "suffix", "not supported"},
        {false, "{'prompt':'a','max_tokens':0}", "max_tokens", "from 1 to 2048, not 0"},
        {false, "{'prompt':'a','max_tokens':2049}", "max_tokens", "from 1 to 2048"},
        {false, "{'prompt':'a','temperature':2.1}", "temperature", "at least 0 and at most 2"},
        {false, "{'prompt':'a','temperature':'hot'}", "temperature", "not \"hot\""},
        {false, "{'prompt':'a','top_p':1.1}", "top_p", "at most 1"},
        {false, "{'prompt':'a','top_p':0}", "top_p", "greater than 0"},
        {false, "{'prompt':'a','min_p':-0.1}", "min_p", "at least 0"},
        {false, "{'prompt':'a','top_k':-2}", "top_k", "from -1"},
        {false, "{'prompt':'a','repetition_penalty':0}", "repetition_penalty", "greater than 0"},
        {false, "{'prompt':'a','presence_penalty':3}", "presence_penalty", "at most 2"},
        {false, "{'prompt':'a','frequency_penalty':-3}", "frequency_penalty", "at least -2"},
        {false, "{'prompt':'a','n':9}", "n", "from 1 to 8"},
        {false, "{'prompt':['a','b'],'n':5}", "n", "makes 10 choices"},
        {false, "{'prompt':'a','best_of':2}", "best_of", "equals n"},
        {false, "{'prompt':'a','logprobs':21}", "logprobs", "from 0 to 20"},
        {false, "{'prompt':'a','logprobs':true}", "logprobs", "not true"},
        {false, "{'prompt':'a','stop':5}", "stop", "null, a string"},
        {false, "{'prompt':'a','stop':['a',1]}", "stop", "null, a string"},
        {false, "{'prompt':'a','stop':['a','b','c','d']}", "stop", "at most 3"},
        {false, "{'prompt':'a','logit_bias':{'x':1}}", "logit_bias", "token ids, not \"x\""},
        {false, "{'prompt':'a','logit_bias':{'5':101}}", "logit_bias", "-100 to 100"},
        {false, "{'prompt':'a','logit_bias':[]}", "logit_bias", "an object"},
        {false, "{'prompt':'a','seed':1.5}", "seed", "integer"},
        {false, "{'prompt':'a','stream':1}", "stream", "true or false"},
        {false, "{'prompt':'a','echo':1}", "echo", "true or false"},
        {false, "{'prompt':'a','stream_options':{}}", "stream_options", "\"stream\": true"},
        {false, "{'prompt':'a','stream':true,'stream_options':{'include_usage':1}}",
         "stream_options.include_usage", "true or false"},
        {true, "{}", "messages", "at least one"},
        {true, "{'messages':[]}", "messages", "at least one"},
        {true, "{'messages':['hi']}", "messages", "message 0"},
        {true, "{'messages':[{'role':'robot','content':'x'}]}", "messages", "role is system"},
        {true, "{'messages':[{'role':'user','content':5}]}", "messages", "content of message 0"},
        {true, "{'messages':[{'role':'user','content':[{'type':'image_url'}]}]}", "messages", "not text"},
        {true, "{'messages':[{'role':'user','content':'x'}],'tools':[{}]}", "tools", "not supported"},
        {true, "{'messages':[{'role':'user','content':'x'}],'response_format':{'type':'json_object'}}",
         "response_format", "text"},
        {true, "{'messages':[{'role':'user','content':'x'}],'logprobs':3}", "logprobs", "true or false"},
        {true, "{'messages':[{'role':'user','content':'x'}],'top_logprobs':3}", "top_logprobs", "needs"},
        {true, "{'messages':[{'role':'user','content':'x'}],'echo':true}", "echo", "alone"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct completion_request request = {0};
        struct problem problem = {0};
        json_t *body = parse(bad[i].text);
        assert_int_equal(completion_request_decode(body, bad[i].chat, &limits, &request, &problem), -1);
        assert_null(request.work);
        check_problem(&problem, bad[i].text, bad[i].param, bad[i].words);
        json_decref(body);
    }
}

/* ---- tokenizer ---- */

static void tokenizer(void **state)
{
    (void)state;
    struct tokenize_request tokenize;
    struct detokenize_request detokenize;
    struct problem problem = {0};
    json_t *body = parse("{'prompt':'test','add_special_tokens':false}");
    assert_int_equal(tokenize_request_decode(body, &tokenize, &problem), 0);
    assert_int_equal(tokenize.length, 4);
    assert_string_equal(tokenize.text, "test");
    assert_string_equal(tokenize.model, "");
    json_decref(body);
    body = parse("{'prompt':[1]}");
    assert_int_equal(tokenize_request_decode(body, &tokenize, &problem), -1);
    check_problem(&problem, "prompt", "prompt", "a string");
    json_decref(body);
    body = parse("{'tokens':[0,7],'model':'m'}");
    assert_int_equal(detokenize_request_decode(body, &detokenize, &problem), 0);
    assert_int_equal(json_array_size(detokenize.tokens), 2);
    assert_string_equal(detokenize.model, "m");
    json_decref(body);
    static const char *const bad[] = {"{}", "{'tokens':'x'}", "{'tokens':[-1]}", "{'tokens':[1.0]}",
                                      "{'tokens':[4294967296]}"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        body = parse(bad[i]);
        assert_int_equal(detokenize_request_decode(body, &detokenize, &problem), -1);
        check_problem(&problem, bad[i], "tokens", "");
        json_decref(body);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bodies),       cmocka_unit_test(lists),      cmocka_unit_test(files),
        cmocka_unit_test(job_defaults), cmocka_unit_test(job_values), cmocka_unit_test(job_refusals),
        cmocka_unit_test(completions),  cmocka_unit_test(chats),      cmocka_unit_test(completion_refusals),
        cmocka_unit_test(tokenizer),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
