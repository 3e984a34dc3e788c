/* The base room: buffers, errors, durable files, log lines. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/buffer.h"
#include "base/error.h"
#include "base/file.h"
#include "base/log.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void test_buffer_grows_and_consumes(void **state)
{
    (void)state;
    struct buffer buffer = {0};
    for (int i = 0; i < 1000; i++)
        buffer_printf(&buffer, "%d,", i);
    assert_false(buffer.failed);
    assert_memory_equal(buffer.data, "0,1,2,3,", 8);
    assert_int_equal(buffer.data[buffer.length], '\0');
    buffer_consume(&buffer, 4);
    assert_memory_equal(buffer.data, "2,3,", 4);
    size_t length;
    char *taken = buffer_take(&buffer, &length);
    assert_int_equal(strlen(taken), length);
    assert_null(buffer.data);
    free(taken);
    taken = buffer_take(&buffer, &length);
    assert_string_equal(taken, "");
    free(taken);
}

static void test_buffer_failure_sticks(void **state)
{
    (void)state;
    struct buffer buffer = {0};
    buffer_append_string(&buffer, "kept");
    assert_int_equal(buffer_reserve(&buffer, SIZE_MAX - 2), ERROR_NO_MEMORY);
    buffer_append_string(&buffer, "dropped");
    assert_true(buffer.failed);
    assert_int_equal(buffer.length, 4);
    assert_null(buffer_take(&buffer, NULL));
}

static void test_error_prefix_and_names(void **state)
{
    (void)state;
    struct error error;
    assert_int_equal(error_set_param(&error, ERROR_INVALID, "seed", "%d is odd", 3), ERROR_INVALID);
    assert_int_equal(error_prefix(&error, "layer %d: ", 7), ERROR_INVALID);
    assert_string_equal(error.message, "layer 7: 3 is odd");
    assert_string_equal(error.param, "seed");
    /* The message itself may be an argument. */
    error_set(&error, ERROR_IO, "again: %s", error.message);
    assert_string_equal(error.message, "again: layer 7: 3 is odd");
    assert_string_equal(error.param, "");
    for (int code = ERROR_INTERNAL; code < 0; code++)
        assert_int_equal(error_code_from_name(error_code_name(code)), code);
    assert_int_equal(error_set(NULL, ERROR_BUSY, "nobody listens"), ERROR_BUSY);
}

static void test_file_is_whole_or_absent(void **state)
{
    (void)state;
    char folder[] = "/tmp/adderd-test-XXXXXX", path[128], below[128];
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/a/b/c", folder);
    assert_int_equal(file_make_dirs(path, NULL), 0);
    assert_int_equal(file_make_dirs(path, NULL), 0);
    snprintf(path, sizeof path, "%s/a/b/file", folder);
    assert_int_equal(file_write_whole(path, "first", 5, NULL), 0);
    assert_int_equal(file_write_whole(path, "second!", 7, NULL), 0);
    char *data;
    size_t length;
    assert_int_equal(file_read(path, 7, &data, &length, NULL), 0);
    assert_string_equal(data, "second!");
    free(data);

    struct error error;
    assert_int_equal(file_read(path, 6, &data, &length, &error), ERROR_INVALID);
    snprintf(below, sizeof below, "%s/none", path);
    assert_int_equal(file_write_whole(below, "x", 1, &error), ERROR_IO);
    assert_int_equal(file_make_dirs(below, &error), ERROR_IO);
    snprintf(below, sizeof below, "%s/none", folder);
    assert_int_equal(file_read(below, 10, &data, &length, &error), ERROR_NOT_FOUND);

    /* A link is removed, what it points to is not. */
    char outside[] = "/tmp/adderd-outside-XXXXXX", link[128];
    assert_non_null(mkdtemp(outside));
    snprintf(link, sizeof link, "%s/a/link", folder);
    assert_int_equal(symlink(outside, link), 0);
    assert_int_equal(file_remove_tree(folder, NULL), 0);
    assert_int_equal(access(folder, F_OK), -1);
    assert_int_equal(access(outside, F_OK), 0);
    assert_int_equal(file_remove_tree(folder, NULL), 0);
    assert_int_equal(rmdir(outside), 0);
}

/* What one log_write() says on stderr. */
static void capture(enum log_format format, const char *value, char *line, size_t size)
{
    int ends[2], saved = dup(STDERR_FILENO);
    assert_int_equal(pipe(ends), 0);
    dup2(ends[1], STDERR_FILENO);
    log_configure(LOG_INFO, format, "test");
    log_write(LOG_DEBUG, "not shown", NULL);
    log_write(LOG_WARN, "it \"happened\"", "key", value, "none", NULL, NULL);
    dup2(saved, STDERR_FILENO);
    close(saved);
    close(ends[1]);
    ssize_t n = read(ends[0], line, size - 1);
    close(ends[0]);
    assert_true(n > 0);
    line[n] = '\0';
}

static void test_log_lines(void **state)
{
    (void)state;
    char line[512];
    capture(LOG_JSON, "a\nb\x01", line, sizeof line);
    assert_non_null(
        strstr(line, "\"level\":\"warn\",\"process\":\"test\",\"message\":\"it \\\"happened\\\"\""));
    assert_non_null(strstr(line, "\"key\":\"a\\u000ab\\u0001\",\"none\":\"\"}\n"));
    capture(LOG_JOURNAL, "two words", line, sizeof line);
    assert_string_equal(line, "<4>test: it \"happened\" key=\"two words\" none=\"\"\n");
    capture(LOG_TEXT, "one", line, sizeof line);
    assert_non_null(strstr(line, "Z warn  test: it \"happened\" key=one none=\"\"\n"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_buffer_grows_and_consumes),
        cmocka_unit_test(test_buffer_failure_sticks),
        cmocka_unit_test(test_error_prefix_and_names),
        cmocka_unit_test(test_file_is_whole_or_absent),
        cmocka_unit_test(test_log_lines),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
