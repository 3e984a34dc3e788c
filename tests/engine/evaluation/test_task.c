/* Templates, documents and definitions: what they make, and where the fault is when they are refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/file.h"
#include "engine/evaluation/prompts.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

/* ---- templates ---- */

static json_t *parse_json(const char *text)
{
    json_error_t why;
    json_t *value = json_loads(text, 0, &why);
    if (!value)
        fail_msg("%s: %s", text, why.text);
    return value;
}

static int render(const char *text, const char *document, struct buffer *out, struct error *error)
{
    struct template *template;
    json_t *fields = parse_json(document);
    int status = template_parse(text, &template, error);
    if (!status) {
        status = template_text(template, fields, out, error);
        template_free(template);
    }
    json_decref(fields);
    return status;
}

static void test_templates(void **state)
{
    (void)state;
    static const struct {
        const char *template, *document, *text;
    } cases[] = {
        {"", "{}", ""},
        {"Question: {q}\nAnswer:", "{\"q\": \"why?\"}", "Question: why?\nAnswer:"},
        {"{{{a}}}", "{\"a\": 1}", "{1}"},
        {"{a} {b} {c} {d} {e}", "{\"a\": 0.1, \"b\": 2.0, \"c\": true, \"d\": 1e300, \"e\": -3}",
         "0.1 2.0 True 1e+300 -3"},
        {"{a} {b} {c} {d}", "{\"a\": 1e15, \"b\": -1e15, \"c\": 1e16, \"d\": 1e-5}",
         "1000000000000000.0 -1000000000000000.0 1e+16 1e-05"},
        {"{Question Stem|strip}", "{\"Question Stem\": \" \\u00a0x y\\u2003\\u001c\"}", "x y"},
        {"{a.b.1.c}", "{\"a\": {\"b\": [0, {\"c\": \"deep\"}]}}", "deep"},
        {"{a|capitalize}", "{\"a\": \"\\u00e9TAIT McDonald\"}", "\xc3\x89tait mcdonald"},
        {"{a|replace:'  ':' '}", "{\"a\": \"1  2   3    4\"}", "1 2  3  4"},
        {"{a|replace:'''':'|}'}", "{\"a\": \"it's\"}", "it|}s"},
        {"{a|without:'[':']'}", "{\"a\": \"a [b] [c[d]e] [f\\n] [\"}", "a  e] [f\n] ["},
        {"{a|before:'_'}-{a|after:'_'}", "{\"a\": \"x_y_z\"}", "x-y_z"},
        {"{a|before_last:' '}|{a|after_last:' '}", "{\"a\": \"the last word\"}", "the last|word"},
        {"{a|before_last:' '}|{a|after_last:' '}", "{\"a\": \"word\"}", "|word"},
        {"{a|before_last:'xyz'}|{a|after_last:'xyz'}", "{\"a\": \"\"}", "|"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct buffer out = {0};
        struct error error = {0};
        if (render(cases[i].template, cases[i].document, &out, &error))
            fail_msg("%s: %s", cases[i].template, error.message);
        assert_string_equal(out.data ? out.data : "", cases[i].text);
        buffer_free(&out);
    }
}

static void test_templates_that_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *template, *message;
    } cases[] = {
        {"{a", "column 3: '{' is not closed"},
        {"x}", "column 2: a '}' that nothing opened (write }} for a brace)"},
        {"{}", "column 2: a name is missing"},
        {"{a.}", "column 4: a name is missing"},
        {"{a|stripp}", "column 4: no filter is called 'stripp'"},
        {"{a|replace:'x'}", "column 15: replace takes 2 arguments"},
        {"{a|before}", "column 10: before takes 1 arguments"},
        {"{a|before:x}", "column 11: an argument begins with a quote"},
        {"{a|before:''}", "column 13: the first argument of before is empty"},
        {"{a|before:'x}", "column 11: a quote that is not closed"},
        {"{a|strip:'x'}", "column 9: '}' is missing"},
        /* In the document {"a": "text", "l": [1, "x"], "n": null, "o": {}}: */
        {"{b}", "{b}: there is no field 'b'"},
        {"{a.b}", "{a...}: 'b' is asked of what has no fields"},
        {"{l}", "{l}: a list is not text"},
        {"{l.2}", "{l...}: item 2 of a list of 2"},
        {"{n}", "{n}: null is not text"},
        {"{o|strip}", "{o}: strip: an object is not text"},
        {"{a|before:'_'}", "{a}: before: '_' is not in the text"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct buffer out = {0};
        struct error error = {0};
        assert_int_equal(render(cases[i].template,
                                "{\"a\": \"text\", \"l\": [1, \"x\"], \"n\": null, \"o\": {}}", &out, &error),
                         ERROR_INVALID);
        assert_string_equal(error.message, cases[i].message);
        buffer_free(&out);
    }
}

/* A definition may not make texts without bound: by filters, or by fields that repeat one another. */
static void test_texts_are_bounded(void **state)
{
    (void)state;
    char twice[] = "{a|replace:'a':'aaaaaaaaaa'|replace:'a':'aaaaaaaaaa'|replace:'a':'aaaaaaaaaa'|replace:'a'"
                   ":'aaaaaaaaaa'|"
                   "replace:'a':'aaaaaaaaaa'|replace:'a':'aaaaaaaaaa'|replace:'a':'aaaaaaaaaa'|replace:'a':'"
                   "aaaaaaaaaa'}";
    struct buffer out = {0};
    struct error error = {0};
    assert_int_equal(render(twice, "{\"a\": \"a\"}", &out, &error), ERROR_INVALID);
    assert_string_equal(error.message, "{a}: replace: more than 8388608 bytes of text");
    buffer_free(&out);
    struct template *template;
    json_t *document = parse_json("{\"a\": \"aaaaaaaaaaaaaaaa\"}");
    int status = 0, rounds = 0;
    assert_int_equal(template_parse("{a}{a}{a}{a}", &template, NULL), 0);
    while (rounds < 30 && !status) {
        json_t *value;
        status = template_value(template, document, &value, &error);
        if (!status)
            json_object_set_new(document, "a", value);
        rounds++;
    }
    assert_int_equal(status, ERROR_INVALID);
    assert_true(rounds < 12);
    template_free(template);
    json_decref(document);
}

static void test_values(void **state)
{
    (void)state;
    static const struct {
        const char *template, *value;
    } cases[] = {
        {"{q.choices.label}", "[\"A\", \"B\"]"},
        {"{q.choices.text|strip|replace:'x':'y'}", "[\"yy\", \"\"]"},
        {"{n}", "7"},
        {"{n}!", "\"7!\""},
    };
    json_t *document = parse_json("{\"n\": 7, \"q\": {\"choices\": [{\"text\": \" xx \", \"label\": \"A\"}, "
                                  "{\"text\": \"\", \"label\": \"B\"}]}}");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct template *template;
        json_t *value, *wanted = json_loads(cases[i].value, JSON_DECODE_ANY, NULL);
        assert_int_equal(template_parse(cases[i].template, &template, NULL), 0);
        assert_int_equal(template_value(template, document, &value, NULL), 0);
        assert_true(json_equal(value, wanted));
        json_decref(value);
        json_decref(wanted);
        template_free(template);
    }
    json_decref(document);
}

/* Nor take more than linear time, or make a long list of long texts. */
static void test_work_is_bounded(void **state)
{
    (void)state;
    enum { LENGTH = 4 << 20 };
    const struct itimerval limit = {.it_value.tv_sec = 10}, no_limit = {0};
    struct buffer text = {0}, out = {0}, argument = {0};
    struct template *template;
    struct error error = {0};
    for (int i = 0; i < LENGTH / 2; i++)
        buffer_append(&text, "[]", 2);
    buffer_append(&text, "\n", 1);
    for (int i = 0; i < LENGTH / 2; i++)
        buffer_append(&text, "[", 1);
    json_t *document = json_pack("{s:o, s:[]}", "a", json_stringn(text.data, text.length), "l");
    buffer_free(&text);
    assert_int_equal(template_parse("{a|without:'[':']'}", &template, &error), 0);
    setitimer(ITIMER_VIRTUAL, &limit, NULL); /* quadratic, it takes longer */
    assert_int_equal(template_text(template, document, &out, &error), 0);
    assert_int_equal(out.length, 1 + LENGTH / 2);
    template_free(template);
    for (int i = 0; i < 256; i++)
        buffer_append(&argument, "b", 1);
    buffer_printf(&text, "{l|replace:'a':'%s'}", argument.data);
    assert_int_equal(template_parse(text.data, &template, &error), ERROR_INVALID);
    assert_string_equal(error.message, "column 16: an argument of more than 255 bytes");
    buffer_clear(&text);
    buffer_printf(&text, "{l|replace:'a':'%s'}", argument.data + 1);
    assert_int_equal(template_parse(text.data, &template, &error), 0);
    json_t *value;
    for (int i = 0; i < 40000; i++)
        json_array_append_new(json_object_get(document, "l"), json_string("a"));
    assert_int_equal(template_value(template, document, &value, &error), ERROR_INVALID);
    assert_string_equal(error.message, "{l}: replace: more than 8388608 bytes of text");
    setitimer(ITIMER_VIRTUAL, &no_limit, NULL);
    template_free(template);
    json_decref(document);
    buffer_free(&text);
    buffer_free(&out);
    buffer_free(&argument);
}

/* ---- files ---- */

struct folder {
    char path[1024];
};

static int make_folder(void **state)
{
    struct folder *folder = calloc(1, sizeof *folder);
    assert_non_null(folder);
    const char *parent = getenv("TMPDIR");
    snprintf(folder->path, sizeof folder->path, "%s/adderd-task-XXXXXX", parent ? parent : "/tmp");
    assert_non_null(mkdtemp(folder->path));
    *state = folder;
    return 0;
}

static int remove_folder(void **state)
{
    struct folder *folder = *state;
    assert_int_equal(file_remove_tree(folder->path, NULL), 0);
    free(folder);
    return 0;
}

static void put(const struct folder *folder, const char *name, const char *content)
{
    char path[1100];
    snprintf(path, sizeof path, "%s/%s", folder->path, name);
    assert_int_equal(file_write_whole(path, content, strlen(content), NULL), 0);
}

static int find_in_folder(void *arg, const char *name, char **ret_path, struct error *error)
{
    const struct folder *folder = arg;
    (void)error;
    assert_true(asprintf(ret_path, "%s/%s", folder->path, name) > 0);
    if (access(*ret_path, R_OK)) {
        free(*ret_path);
        *ret_path = NULL;
    }
    return 0;
}

static const struct documents_pause none;

static const char *field(const struct documents *documents, int64_t index, const char *name, char *text)
{
    json_t *document;
    assert_int_equal(documents_get(documents, index, &document, NULL), 0);
    snprintf(text, 64, "%s", json_string_value(json_object_get(document, name)));
    json_decref(document);
    return text;
}

static void test_tables(void **state)
{
    const struct folder *folder = *state;
    char path[1100], text[64], a[] = "a", b[] = "b", *columns[] = {a, b};
    struct documents documents;
    struct error error = {0};
    snprintf(path, sizeof path, "%s/x", folder->path);

    put(folder, "x",
        "\xEF\xBB\xBF"
        "q,answer\r\n\"a, \"\"b\"\"\nc\",1\n\n,\"\"\nlast,2");
    assert_int_equal(documents_read(path, DOCUMENTS_CSV, NULL, 0, &none, &documents, &error), 0);
    assert_int_equal(documents.count, 3);
    assert_string_equal(field(&documents, 0, "q", text), "a, \"b\"\nc");
    assert_string_equal(field(&documents, 0, "answer", text), "1");
    assert_string_equal(field(&documents, 1, "q", text), "");
    assert_int_equal(documents.items[0].line, 2);
    assert_int_equal(documents.items[1].line, 5);
    assert_int_equal(documents.items[2].line, 6);
    documents_free(&documents);

    put(folder, "x", "\"quoted\t2\n");
    assert_int_equal(documents_read(path, DOCUMENTS_TSV, columns, 2, &none, &documents, &error), 0);
    assert_string_equal(field(&documents, 0, "a", text), "\"quoted");
    documents_free(&documents);

    static const struct {
        enum document_format format;
        const char *content;
        size_t length;
        const char *message;
    } bad[] = {
#define BYTES(text) text, sizeof text - 1
        {DOCUMENTS_CSV, BYTES("1,2\n3\n"), "line 2 has 1 fields, not 2"},
        {DOCUMENTS_CSV, BYTES("1,2\n3,\"4\n\n"), "line 2: a quote that is not closed"},
        {DOCUMENTS_CSV, BYTES("1,2\n3,4\0005\n"), "line 2: field 2 has a NUL character"},
        {DOCUMENTS_TSV, BYTES("1\t2\t3\n"), "line 1 has 3 fields, not 2"},
        {DOCUMENTS_TSV, BYTES("1\t\xff\n"), "line 1: field 2 is not UTF-8"},
#undef BYTES
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(file_write_whole(path, bad[i].content, bad[i].length, NULL), 0);
        assert_int_equal(documents_read(path, bad[i].format, columns, 2, &none, &documents, &error),
                         ERROR_INVALID);
        assert_string_equal(error.message, bad[i].message);
    }
    put(folder, "x", "a,b\xff\n1,2\n");
    assert_int_equal(documents_read(path, DOCUMENTS_CSV, NULL, 0, &none, &documents, &error), ERROR_INVALID);
    assert_string_equal(error.message, "line 1: field 2 is not UTF-8");

    put(folder, "x", "{}\n \n[]");
    json_t *document;
    assert_int_equal(documents_read(path, DOCUMENTS_JSONL, NULL, 0, &none, &documents, &error), 0);
    assert_int_equal(documents.count, 2);
    assert_int_equal(documents.items[1].line, 3);
    assert_int_equal(documents_get(&documents, 0, &document, &error), 0);
    json_decref(document);
    assert_int_equal(documents_get(&documents, 1, &document, &error), ERROR_INVALID);
    assert_string_equal(error.message, "not a JSON object");
    documents_free(&documents);
}

/* ---- definitions ---- */

static const char definition[] = "{\"task\": \"t\", \"splits\": {\"test\": [{\"file\": \"t.jsonl\", "
                                 "\"format\": \"jsonl\"}]}, \"documents\": \"test\", "
                                 "\"fewshot\": {\"from\": [\"test\"]}, \"context\": \"{q}\", \"choices\": "
                                 "[\"{a}\", \"{b}\"], \"gold\": \"{label}\", "
                                 "\"metrics\": [\"acc\"]}";

/* The definition with a key set to what `value` says (NULL: without it). */
static int parse_with(const char *key, const char *value, struct task **ret_task, struct error *error)
{
    json_t *root = parse_json(definition);
    if (value)
        assert_int_equal(json_object_set_new(root, key, json_loads(value, JSON_DECODE_ANY, NULL)), 0);
    else
        json_object_del(root, key);
    char *text = json_dumps(root, 0);
    int status = task_parse(text, strlen(text), ret_task, error);
    free(text);
    json_decref(root);
    return status;
}

static void test_definitions_that_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *key, *value, *message;
    } cases[] = {
        {"task", NULL, "task: missing"},
        {"task", "\"No name\"", "task: 1 to 63 of a-z, digits and _"},
        {"splits", NULL, "splits: missing"},
        {"splits", "{\"test\": [{\"format\": \"jsonl\"}]}", "splits.test[0].file: missing"},
        {"splits", "{\"test\": [{\"file\": \"x\", \"format\": \"xml\"}]}",
         "splits.test[0].format: one of jsonl, csv, tsv"},
        {"splits", "{\"test\": [{\"file\": \"{x\", \"format\": \"csv\"}]}",
         "splits.test[0].file: column 3: '{' is not closed"},
        {"splits", "{\"test\": [{\"file\": \"x\", \"format\": \"csv\", \"fields\": {\"y\": \"{z|up}\"}}]}",
         "splits.test[0].fields.y: column 4: no filter is called 'up'"},
        {"documents", "\"dev\"", "documents: there is no split 'dev'"},
        {"fewshot", "{\"from\": [\"test\", \"train\"]}", "fewshot.from[1]: there is no split 'train'"},
        {"fewshot", "{\"from\": [\"test\"], \"sampler\": \"best\"}", "fewshot.sampler: random or first"},
        {"context", NULL, "context: missing"},
        {"choices", NULL, "choices: missing"},
        {"choices", "[\"a\", 3]", "choices[1]: not a string"},
        {"choices", "[\"a\", \"}\"]",
         "choices[1]: column 1: a '}' that nothing opened (write }} for a brace)"},
        {"gold", NULL, "gold: missing"},
        {"gold", "{\"value\": \"{a}\"}", "gold.among: missing"},
        {"target", "\"x\"", "choices: not beside 'target'"},
        {"contexts", "[\"x\"]", "choices: not beside 'contexts'"},
        {"metrics", "[\"f1\"]", "metrics[0]: of choices: acc or acc_norm"},
        {"metrics", NULL, "metrics: missing"},
        {"contxt", "1", "there is no key 'contxt' here"},
        {"subtasks", "{\"field\": \"s\", \"groups\": {\"g\": [\"a\", \"a\"]}}",
         "subtasks.groups.g[1]: 'a' is there already"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct task *task;
        struct error error = {0};
        assert_int_equal(parse_with(cases[i].key, cases[i].value, &task, &error), ERROR_INVALID);
        assert_string_equal(error.message, cases[i].message);
    }
    struct task *task;
    struct error error = {0};
    assert_int_equal(task_parse("{\n \"task\": }", 12, &task, &error), ERROR_INVALID);
    assert_non_null(strstr(error.message, "line 2, column 10"));
}

static void test_definitions_are_bounded(void **state)
{
    const struct folder *folder = *state;
    struct task_source source = {.arg = (void *)(uintptr_t)folder, .find = find_in_folder};
    struct prompt_options options = {.seed = 1234};
    struct buffer text = {0};
    struct task *task;
    struct prompts *prompts;
    struct error error = {0};
    buffer_append_string(&text, "{\"field\": \"s\", \"groups\": {\"g\": [\"a\"], \"h\": [\"b0\"");
    for (int i = 1; i < 1024; i++)
        buffer_printf(&text, ", \"b%d\"", i);
    buffer_append_string(&text, "]}}");
    assert_int_equal(parse_with("subtasks", text.data, &task, &error), ERROR_INVALID);
    assert_string_equal(error.message, "subtasks.groups.h: more than 1024 subtasks");

    /* A document of 4 MiB, a hundred choices that are all of it. */
    buffer_clear(&text);
    buffer_append_string(&text, "{\"q\": \"");
    for (int i = 0; i < 4 << 20; i++)
        buffer_append(&text, "a", 1);
    buffer_append_string(&text, "\"}");
    put(folder, "t.jsonl", text.data);
    buffer_clear(&text);
    for (int i = 0; i < 100; i++)
        buffer_append_string(&text, i ? ", \"{q}\"" : "[\"{q}\"");
    buffer_append_string(&text, "]");
    assert_int_equal(parse_with("choices", text.data, &task, &error), 0);
    assert_int_equal(prompts_open(task, -1, &options, &source, NULL, &prompts, &error), 0);
    assert_int_equal(prompts_check(prompts, &error), ERROR_INVALID);
    assert_string_equal(error.message, "t.jsonl line 1: choices: more than 16777216 bytes of text");
    prompts_free(prompts);
    task_free(task);

    buffer_clear(&text);
    buffer_append_string(&text, "{\"test\": [{\"format\": \"jsonl\", \"file\": \"");
    for (int i = 0; i < 256; i++)
        buffer_append(&text, "a", 1);
    buffer_append_string(&text, "\"}]}");
    assert_int_equal(parse_with("splits", text.data, &task, &error), 0);
    assert_int_equal(prompts_open(task, -1, &options, &source, NULL, &prompts, &error), ERROR_INVALID);
    assert_string_equal(error.message, "file: a name of more than 255 bytes");
    task_free(task);
    buffer_free(&text);
}

/* What is wrong with the documents is said with file and line. */
static void test_documents_that_are_refused(void **state)
{
    struct folder *folder = *state;
    static const struct {
        const char *documents, *message;
    } cases[] = {
        {"{\"q\": \"x\", \"a\": \"1\", \"b\": \"2\", \"label\": 1}\n{\"q\": \"x\", \"a\": \"1\", \"b\": "
         "\"2\", \"label\": 2}\n",
         "t.jsonl line 2: gold: 2 is outside the choices 0 to 1"},
        {"{\"q\": \"x\", \"a\": \"1\", \"b\": \"2\", \"label\": \"C\"}\n",
         "t.jsonl line 1: gold: 'C' is neither a choice nor an index"},
        {"\n{\"q\": \"x\", \"a\": \"1\", \"label\": 1}\n",
         "t.jsonl line 2: choices[1]: {b}: there is no field 'b'"},
        {"", "t.jsonl: there are no documents in it"},
        {"{\"q\": 1,}\n", NULL},
    };
    struct task_source source = {.arg = folder, .find = find_in_folder};
    struct prompt_options options = {.seed = 1234, .prefix_id = 0};
    char path[4096];
    struct tokenizer *tokenizer;
    struct task *task;
    struct prompts *prompts;
    struct error error = {0};
    snprintf(path, sizeof path, "%s/models/hatchling", getenv("ADDERD_SOURCE"));
    assert_int_equal(tokenizer_load(path, &tokenizer, NULL), 0);
    assert_int_equal(task_parse(definition, strlen(definition), &task, NULL), 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        put(folder, "t.jsonl", cases[i].documents);
        int status = prompts_open(task, -1, &options, &source, tokenizer, &prompts, &error);
        if (!status) {
            while (!(status = prompts_next(prompts, NULL, &error)))
                ; /* passing by draws, and does not render */
            prompts_free(prompts);
            struct example example;
            assert_int_equal(prompts_open(task, -1, &options, &source, tokenizer, &prompts, &error), 0);
            while (!(status = prompts_next(prompts, &example, &error)))
                example_free(&example);
            prompts_free(prompts);
        }
        assert_int_equal(status, ERROR_INVALID);
        if (cases[i].message)
            assert_string_equal(error.message, cases[i].message);
        else
            assert_memory_equal(error.message, "t.jsonl line 1: ", 16);
    }
    task_free(task);
    assert_int_equal(parse_with("source", "\"somewhere.org\"", &task, &error), 0);
    char file[1100];
    snprintf(file, sizeof file, "%s/t.jsonl", folder->path);
    assert_int_equal(unlink(file), 0);
    assert_int_equal(prompts_open(task, -1, &options, &source, tokenizer, &prompts, &error), ERROR_NOT_FOUND);
    assert_string_equal(error.message, "t wants the file t.jsonl, from somewhere.org");
    task_free(task);
    tokenizer_free(tokenizer);
}

/* A pool that is the split under test: one more is drawn, the document itself removed. Equal documents may all be drawn: then the
 * sample comes from the rest. The indices are what CPython's random.Random(1234) gives for these sizes. */
static void test_examples_are_not_the_document(void **state)
{
    struct folder *folder = *state;
    struct buffer text = {0};
    struct task_source source = {.arg = folder, .find = find_in_folder};
    struct prompt_options options = {.shots = 2, .seed = 1234, .prefix_id = 0};
    char path[4096];
    struct tokenizer *tokenizer;
    struct task *task;
    struct prompts *prompts;
    struct error error = {0};
    for (int i = 0; i < 8; i++)
        buffer_printf(&text, "{\"q\": \"%s\", \"a\": \"u\", \"b\": \"v\", \"label\": 0}\n",
                      i < 4   ? "same"
                      : i < 6 ? "x"
                              : "y");
    put(folder, "t.jsonl", text.data);
    buffer_free(&text);
    snprintf(path, sizeof path, "%s/models/hatchling", getenv("ADDERD_SOURCE"));
    assert_int_equal(tokenizer_load(path, &tokenizer, NULL), 0);
    assert_int_equal(task_parse(definition, strlen(definition), &task, NULL), 0);
    assert_int_equal(prompts_open(task, -1, &options, &source, tokenizer, &prompts, &error), 0);
    for (int i = 0; i < 8; i++) {
        struct example example;
        if (prompts_next(prompts, &example, &error))
            fail_msg("%s", error.message);
        assert_int_equal(example.n_requests, 2);
        buffer_clear(&text);
        assert_int_equal(tokenizer_decode(tokenizer, example.requests[0].ids,
                                          (size_t)example.requests[0].n_ids, false, &text, NULL),
                         0);
        /* Two examples and the document: its question is in the text once. */
        const char *question = i < 4 ? "same" : i < 6 ? "x" : "y", *at = text.data;
        int n = 0;
        while ((at = strstr(at, question))) {
            at++;
            n++;
        }
        assert_int_equal(n, 1);
        example_free(&example);
    }
    buffer_free(&text);
    prompts_free(prompts);
    task_free(task);
    tokenizer_free(tokenizer);
}

/* All definitions that are shipped can be read. */
static void test_built_in_tasks(void **state)
{
    (void)state;
    char folder[4096], path[8192];
    int n = 0;
    snprintf(folder, sizeof folder, "%s/tasks", getenv("ADDERD_SOURCE"));
    DIR *entries = opendir(folder);
    assert_non_null(entries);
    for (const struct dirent *entry; (entry = readdir(entries));) {
        struct error error = {0};
        struct task *task;
        char *text;
        size_t length;
        if (entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        assert_int_equal(file_read(path, 1 << 20, &text, &length, NULL), 0);
        if (task_parse(text, length, &task, &error))
            fail_msg("%s: %s", entry->d_name, error.message);
        assert_memory_equal(entry->d_name, task->name, strlen(task->name));
        if (!strcmp(task->name, "mmlu"))
            assert_int_equal(task->n_subtasks, 57);
        task_free(task);
        free(text);
        n++;
    }
    closedir(entries);
    assert_int_equal(n, 9);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_templates),
        cmocka_unit_test(test_templates_that_are_refused),
        cmocka_unit_test(test_texts_are_bounded),
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_work_is_bounded),
        cmocka_unit_test_setup_teardown(test_tables, make_folder, remove_folder),
        cmocka_unit_test(test_definitions_that_are_refused),
        cmocka_unit_test_setup_teardown(test_definitions_are_bounded, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_documents_that_are_refused, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_examples_are_not_the_document, make_folder, remove_folder),
        cmocka_unit_test(test_built_in_tasks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
