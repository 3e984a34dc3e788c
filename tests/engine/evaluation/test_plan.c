/* The daemon's order as a list of units: what is meant by a task's name, and what is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/file.h"
#include "engine/evaluation/plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int make_folder(void **state)
{
    const char *parent = getenv("TMPDIR");
    char *folder = NULL;
    assert_true(asprintf(&folder, "%s/adderd-plan-XXXXXX", parent ? parent : "/tmp") > 0);
    assert_non_null(mkdtemp(folder));
    *state = folder;
    return 0;
}

static int remove_folder(void **state)
{
    assert_int_equal(file_remove_tree(*state, NULL), 0);
    free(*state);
    return 0;
}

static void put(const char *folder, const char *name, const char *content)
{
    char path[1100];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    assert_int_equal(file_write_whole(path, content, strlen(content), NULL), 0);
}

static const char plain[] =
    "{\"task\": \"t\", \"splits\": {\"test\": [{\"file\": \"t.jsonl\", \"format\": \"jsonl\"}]}, "
    "\"documents\": \"test\", \"fewshot\": {\"from\": [\"test\"]}, \"context\": \"{q}\", "
    "\"choices\": [\"a\", \"b\"], \"gold\": \"0\", \"metrics\": [\"acc\"]";

/* tasks: NAME=FILE with blanks between, an empty NAME for null. */
static int read_plan(const char *folder, const char *tasks, struct evaluation_plan **ret_plan,
                     json_t **ret_order, struct error *error)
{
    json_t *list = json_array();
    char copy[256], *rest = copy, *item;
    snprintf(copy, sizeof copy, "%s", tasks);
    while ((item = strtok_r(rest, " ", &rest))) {
        char *file = strchr(item, '=');
        *file++ = '\0';
        json_array_append_new(list, json_pack("{s:s*, s:o}", "name", *item ? item : NULL, "definition",
                                              json_sprintf("%s/%s", folder, file)));
    }
    *ret_order = json_pack("{s:o, s:[i,i], s:i, s:s}", "tasks", list, "num_fewshot", 0, 2, "seed", 1234,
                           "data_dir", folder);
    int status = evaluation_plan_read(*ret_order, ret_plan, error);
    if (status)
        json_decref(*ret_order);
    return status;
}

static void put_definitions(const char *folder)
{
    char text[2048];
    snprintf(text, sizeof text, "%s}", plain);
    put(folder, "t.json", text);
    snprintf(text, sizeof text,
             "%s, \"subtasks\": {\"field\": \"s\", \"groups\": {\"g\": [\"a\", \"b\"], \"h\": [\"c\"]}}}",
             plain);
    put(folder, "s.json", text);
}

static void test_names(void **state)
{
    static const struct {
        const char *tasks, *units; /* each at 0 and 2 shots */
    } cases[] = {
        {"t=t.json", "t/0 t/2 "},
        {"=t.json", "t/0 t/2 "},
        {"t=s.json", "t_a/0 t_b/0 t_c/0 t_a/2 t_b/2 t_c/2 "},
        {"t_g=s.json t_c=s.json", "t_a/0 t_b/0 t_a/2 t_b/2 t_c/0 t_c/2 "},
    };
    put_definitions(*state);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct evaluation_plan *plan;
        struct error error = {0};
        json_t *order;
        char units[256] = "";
        if (read_plan(*state, cases[i].tasks, &plan, &order, &error))
            fail_msg("%s: %s", cases[i].tasks, error.message);
        for (int j = 0; j < plan->n_units; j++)
            sprintf(units + strlen(units), "%s/%d ", plan->units[j].name, (int)plan->units[j].shots);
        assert_string_equal(units, cases[i].units);
        evaluation_plan_free(plan);
        json_decref(order);
    }
}

static void test_orders_that_are_refused(void **state)
{
    static const struct {
        const char *tasks, *message;
    } cases[] = {
        {"u=t.json", "the definition of u is of t"},
        {"t_x=t.json", "there is no task 't_x'"},
        {"t_x=s.json", "there is no task 't_x'"},
        {"", "no task"},
        {"=t.json =t.json", "t at 0 shots is there twice, by two of the tasks"},
        {"t_g=s.json t_b=s.json", "t_b at 0 shots is there twice, by two of the tasks"},
    };
    put_definitions(*state);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct evaluation_plan *plan;
        struct error error = {0};
        json_t *order;
        assert_true(read_plan(*state, cases[i].tasks, &plan, &order, &error) < 0);
        assert_string_equal(error.message, cases[i].message);
        assert_string_equal(error.param, "tasks");
    }
}

static void count_pause(void *arg)
{
    ++*(int *)arg;
}

/* Whoever else wants the thread has a turn between any two documents, and each is rendered once, however many shot counts there
 * are: 3 lines read for 0 shots; for 2 shots of the split under test twice 3 lines read, and twice 3 texts made. */
static void test_checking_pauses(void **state)
{
    struct evaluation_plan *plan;
    struct error error = {0};
    json_t *order, *warnings = json_array();
    int pauses = 0;
    put_definitions(*state);
    put(*state, "t.jsonl", "{\"q\": 1}\n{\"q\": 2}\n{\"q\": 3}\n");
    assert_int_equal(read_plan(*state, "t=t.json", &plan, &order, &error), 0);
    plan->source.pause = (struct documents_pause){count_pause, &pauses};
    assert_int_equal(evaluation_plan_check(plan, warnings, &error), 0);
    assert_int_equal(evaluation_plan_examples(plan), 6);
    assert_int_equal(pauses, 3 + 6 + 6);
    evaluation_plan_free(plan);
    json_decref(order);
    put(*state, "t.jsonl", "{\"q\": 1}\n{\"q\": 2}\n{}\n");
    assert_int_equal(read_plan(*state, "t=t.json", &plan, &order, &error), 0);
    assert_int_equal(evaluation_plan_check(plan, warnings, &error), ERROR_INVALID);
    assert_string_equal(error.message, "t at 2 shots: t.jsonl line 3: context: {q}: there is no field 'q'");
    evaluation_plan_free(plan);
    json_decref(order);
    json_decref(warnings);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_names, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_orders_that_are_refused, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_checking_pauses, make_folder, remove_folder),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
