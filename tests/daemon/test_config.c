/* test_config.c: flags, variables, defaults and what is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "daemon/config.h"
#include "daemon/devices.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int clean(void **state)
{
    (void)state;
    clearenv();
    return 0;
}

/* Words in one string, separated by spaces. The struct's strings point into *ret_words. */
static int parse(const char *line, char ret_words[1024], struct config *ret_config, struct error *error)
{
    char *argv[64];
    int argc = 0;
    snprintf(ret_words, 1024, "%s", line);
    for (char *save = NULL, *word = strtok_r(ret_words, " ", &save); word; word = strtok_r(NULL, " ", &save))
        argv[argc++] = word;
    return config_parse(argc, argv, ret_config, error);
}

static void test_defaults(void **state)
{
    (void)state;
    char words[1024];
    struct config config;
    struct error error = {0};
    if (parse("", words, &config, &error))
        fail_msg("%s", error.message);
    assert_string_equal(config.listen_host, "127.0.0.1");
    assert_int_equal(config.listen_port, 8080);
    assert_null(config.port_file);
    assert_string_equal(config.data_dir, "adder-data");
    assert_int_equal(config.n_models_dirs, 1);
    assert_string_equal(config.models_dirs[0], "models");
    assert_int_equal(config.n_devices, 1);
    assert_string_equal(config.devices[0], "auto");
    assert_null(config.default_model);
    assert_string_equal(config.organization, "local");
    assert_int_equal(config.threads, 0);
    assert_int_equal(config.max_body_bytes, 32 << 20);
    assert_int_equal(config.max_upload_bytes, 1 << 30);
    assert_int_equal(config.max_seqs, 64);
    assert_int_equal(config.max_waiting, 1024);
    assert_int_equal(config.max_connections, 1024);
    assert_int_equal(config.heartbeat_timeout_ms, 30000);
    assert_int_equal(config.shutdown_timeout_ms, 30000);
    assert_int_equal(config.log_level, LOG_INFO);
    assert_int_equal(config.log_format, LOG_TEXT);
    config_free(&config);
    setenv("JOURNAL_STREAM", "8:123", 1);
    assert_int_equal(parse("", words, &config, &error), 0);
    assert_int_equal(config.log_format, LOG_JOURNAL);
    config_free(&config);
    assert_int_equal(parse("--log-format json", words, &config, &error), 0);
    assert_int_equal(config.log_format, LOG_JSON);
    config_free(&config);
}

static void test_flags(void **state)
{
    (void)state;
    char words[1024];
    struct config config;
    struct error error = {0};
    if (parse("--listen [::1]:0 --port-file=/run/port --data-dir /d --models-dir /m:1 --models-dir=/n "
              "--device cpu,cuda:0 --device cuda:11 --default-model hatchling --organization my_org-1 "
              "--threads 3 "
              "--max-body-bytes 64k --max-upload-bytes 2G --max-seqs 1 --max-waiting 0 --max-connections 9 "
              "--heartbeat-timeout 0.5 --shutdown-timeout 7 --log-level debug --log-format text",
              words, &config, &error))
        fail_msg("%s", error.message);
    assert_string_equal(config.listen_host, "::1");
    assert_int_equal(config.listen_port, 0);
    assert_string_equal(config.port_file, "/run/port");
    assert_string_equal(config.data_dir, "/d");
    assert_int_equal(config.n_models_dirs, 2);
    assert_string_equal(config.models_dirs[0], "/m:1");
    assert_string_equal(config.models_dirs[1], "/n");
    assert_int_equal(config.n_devices, 3);
    assert_string_equal(config.devices[1], "cuda:0");
    assert_string_equal(config.devices[2], "cuda:11");
    assert_string_equal(config.default_model, "hatchling");
    assert_string_equal(config.organization, "my_org-1");
    assert_int_equal(config.threads, 3);
    assert_int_equal(config.max_body_bytes, 64 << 10);
    assert_int_equal(config.max_upload_bytes, (int64_t)2 << 30);
    assert_int_equal(config.max_seqs, 1);
    assert_int_equal(config.max_waiting, 0);
    assert_int_equal(config.max_connections, 9);
    assert_int_equal(config.heartbeat_timeout_ms, 500);
    assert_int_equal(config.shutdown_timeout_ms, 7000);
    assert_int_equal(config.log_level, LOG_DEBUG);
    config_free(&config);
}

static void test_variables(void **state)
{
    (void)state;
    char words[1024];
    struct config config;
    struct error error = {0};
    setenv("ADDER_LISTEN", "0.0.0.0:99", 1);
    setenv("ADDER_MODELS_DIR", "/a:/b", 1);
    setenv("ADDER_DEVICE", "cuda:1,cpu", 1);
    setenv("ADDER_MAX_SEQS", "5", 1);
    setenv("ADDER_THREADS", "", 1); /* as if it were not set */
    assert_int_equal(parse("", words, &config, &error), 0);
    assert_string_equal(config.listen_host, "0.0.0.0");
    assert_int_equal(config.listen_port, 99);
    assert_int_equal(config.n_models_dirs, 2);
    assert_string_equal(config.models_dirs[1], "/b");
    assert_int_equal(config.n_devices, 2);
    assert_int_equal(config.max_seqs, 5);
    assert_int_equal(config.threads, 0);
    config_free(&config);
    /* A flag wins, and does not add to the variable's list. */
    assert_int_equal(parse("--models-dir /c --device cpu --max-seqs 6", words, &config, &error), 0);
    assert_int_equal(config.n_models_dirs, 1);
    assert_string_equal(config.models_dirs[0], "/c");
    assert_int_equal(config.n_devices, 1);
    assert_int_equal(config.max_seqs, 6);
    config_free(&config);
    assert_string_equal(getenv("ADDER_DEVICE"), "cuda:1,cpu");
    /* A bad variable is named, unless a flag takes its place. */
    setenv("ADDER_MAX_SEQS", "many", 1);
    assert_int_equal(parse("", words, &config, &error), ERROR_INVALID);
    assert_non_null(strstr(error.message, "ADDER_MAX_SEQS: 'many'"));
    assert_int_equal(parse("--max-seqs 6", words, &config, &error), 0);
    config_free(&config);
}

static void test_refused(void **state)
{
    (void)state;
    static const struct {
        const char *line, *says;
    } cases[] = {
        {"--frobnicate 3", "unknown flag --frobnicate"},
        {"--threads 2 --frobnicate", "unknown flag --frobnicate"},
        {"-x", "unknown flag -x"},
        {"--threads", "--threads needs a value"},
        {"--max-seqs 3 --data-dir", "--data-dir needs a value"},
        {"models", "unexpected 'models'"},
        {"--threads 1 serve --max-seqs 2", "unexpected 'serve'"},
        {"--threads -1", "--threads: '-1' is not a whole number between 0 and 1024"},
        {"--threads 1.5", "--threads: '1.5'"},
        {"--max-seqs 0", "--max-seqs: '0' is not a whole number between 1 and 65536"},
        {"--max-seqs 99999999999999999999", "between 1 and 65536"},
        {"--max-body-bytes 12T", "--max-body-bytes: '12T' is not a number of bytes"},
        {"--max-body-bytes 1MB", "'1MB'"},
        {"--max-body-bytes 5", "between 1024 and 1073741824"},
        {"--max-upload-bytes 99999999999G", "'99999999999G'"},
        {"--heartbeat-timeout 0", "between 0.1 and 3600"},
        {"--heartbeat-timeout nan", "'nan'"},
        {"--heartbeat-timeout 5s", "'5s'"},
        {"--listen 8080", "'8080' is not HOST:PORT"},
        {"--listen :8080", "is not HOST:PORT"},
        {"--listen ::1:8080", "in brackets"},
        {"--listen localhost:", "is not a port between 0 and 65535"},
        {"--listen localhost:65536", "'65536' is not a port"},
        {"--listen localhost:80x", "'80x' is not a port"},
        {"--device gpu", "'gpu' is none of cpu, cuda:N and auto"},
        {"--device cpu,", "has an empty part"},
        {"--device cuda:", "'cuda:' is none of"},
        {"--device cpu --device cpu", "cpu is named twice"},
        {"--organization a:b", "'a:b'"},
        {"--log-level loud", "'loud' is none of debug, info, warn and error"},
        {"--log-format xml", "'xml' is none of text, json and journal"},
        {"--models-dir a --models-dir b --models-dir c --models-dir d --models-dir e --models-dir f "
         "--models-dir g "
         "--models-dir h --models-dir i --models-dir j --models-dir k --models-dir l --models-dir m "
         "--models-dir n "
         "--models-dir o --models-dir p --models-dir q",
         "--models-dir: at most 16 may be given"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char words[1024];
        struct config config, before;
        struct error error = {0};
        memset(&config, 0x5a, sizeof config);
        before = config;
        assert_int_equal(parse(cases[i].line, words, &config, &error), ERROR_INVALID);
        if (!strstr(error.message, cases[i].says))
            fail_msg("'%s' says: %s", cases[i].line, error.message);
        assert_memory_equal(&config, &before, sizeof config);
    }
}

static void test_help_names_everything(void **state)
{
    (void)state;
    const char *help = config_help();
    static const char *const names[] = {
        "listen",        "port-file",    "data-dir",        "models-dir",        "device",
        "default-model", "organization", "threads",         "max-body-bytes",    "max-upload-bytes",
        "max-seqs",      "max-waiting",  "max-connections", "heartbeat-timeout", "shutdown-timeout",
        "log-level",     "log-format",   "tasks-dir",       "eval-data-dir",
    };
    int flags = 0;
    for (const char *at = help; (at = strstr(at, "\n  --")); at++)
        flags++;
    assert_int_equal(flags, sizeof names / sizeof *names);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char flag[64], variable[64] = "(ADDER_";
        snprintf(flag, sizeof flag, "--%s ", names[i]);
        size_t length = strlen(variable);
        for (const char *c = names[i]; *c; c++)
            variable[length++] = *c == '-' ? '_' : (char)(*c - 'a' + 'A');
        variable[length++] = ')';
        variable[length] = '\0';
        if (!strstr(help, flag) || !strstr(help, variable))
            fail_msg("the help does not say %s or %s", flag, variable);
    }
    assert_non_null(strstr(help, "[127.0.0.1:8080]"));
    for (const char *line = help; *line;) {
        size_t length = strcspn(line, "\n");
        assert_true(length <= 90);
        line += length + (line[length] == '\n');
    }
    /* --help prints it, and is no error. */
    FILE *file = tmpfile();
    assert_non_null(file);
    fflush(stdout);
    int saved = dup(STDOUT_FILENO);
    dup2(fileno(file), STDOUT_FILENO);
    char words[1024], printed[16384] = "";
    struct config config;
    int code = parse("--threads 2 --help", words, &config, NULL);
    fflush(stdout);
    dup2(saved, STDOUT_FILENO);
    close(saved);
    assert_int_equal(code, 1);
    rewind(file);
    assert_true(fread(printed, 1, sizeof printed - 1, file) > 0);
    fclose(file);
    assert_string_equal(printed, help);
}

static void test_loopback(void **state)
{
    (void)state;
    const char *inside[] = {"127.0.0.1", "127.9.8.7", "::1", "localhost", "::ffff:127.0.0.1"};
    const char *outside[] = {
        "0.0.0.0",        "::", "10.0.0.1", "128.0.0.1", "example.org", "", "127.0.0.1.example.org",
        "::ffff:10.0.0.1"};
    for (size_t i = 0; i < sizeof inside / sizeof *inside; i++)
        assert_true(config_is_loopback(inside[i]));
    for (size_t i = 0; i < sizeof outside / sizeof *outside; i++)
        assert_false(config_is_loopback(outside[i]));
}

/* As the CUDA runtime counts. */
static void test_visible_devices(void **state)
{
    (void)state;
    static const struct {
        const char *visible;
        int count;
    } cases[] = {
        {NULL, 4},    {"", 0},     {"0", 1},       {"2,3", 2},  {" 1, 0", 2}, {"0,1,2,3", 4},
        {"0,9,1", 1}, {"-1", 0},   {"1,1", 0},     {"none", 0}, {"3,", 1},    {"GPU-5ebe9f43,MIG-a1", 2},
        {"NoDev", 0}, {"0,-1", 1}, {"GPU-a,7", 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (devices_visible(cases[i].visible, 4) != cases[i].count)
            fail_msg("\"%s\": %d", cases[i].visible, devices_visible(cases[i].visible, 4));
    assert_int_equal(devices_visible("GPU-5ebe9f43", 0), 0);

    struct config config = {.devices = {"cuda:1", "cpu", "cuda:1"}, .n_devices = 3};
    struct device_list list;
    devices_resolve(&config, &list);
    assert_int_equal(list.n, 2);
    assert_string_equal(list.names[0], "cuda:1");
    setenv("CUDA_VISIBLE_DEVICES", "", 1);
    config = (struct config){.devices = {"auto"}, .n_devices = 1};
    devices_resolve(&config, &list);
    assert_int_equal(list.n, 1);
    assert_string_equal(list.names[0], "cpu");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_defaults, clean),
        cmocka_unit_test_setup(test_flags, clean),
        cmocka_unit_test_setup(test_variables, clean),
        cmocka_unit_test_setup(test_refused, clean),
        cmocka_unit_test_setup(test_help_names_everything, clean),
        cmocka_unit_test_setup(test_visible_devices, clean),
        cmocka_unit_test(test_loopback),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
