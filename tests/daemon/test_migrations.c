/* test_migrations.c: fresh files, older ones, newer ones, edited texts, and migrations that fail. */
#include "daemon/migrations.h"
#include "daemon/store.h"
#include "fixture.h"

#include "base/file.h"

#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct migration history[] = {
    {1, "0001_one.sql", "CREATE TABLE one (x); INSERT INTO one VALUES (1);"},
    {2, "0002_two.sql", "CREATE TABLE two (x); UPDATE one SET x = x + 1;"},
    {3, "0003_three.sql", "ALTER TABLE one ADD COLUMN y DEFAULT 7;"},
};

static int64_t ask(sqlite3 *db, const char *sql)
{
    sqlite3_stmt *statement = NULL;
    assert_int_equal(sqlite3_prepare_v2(db, sql, -1, &statement, NULL), SQLITE_OK);
    assert_int_equal(sqlite3_step(statement), SQLITE_ROW);
    int64_t value = sqlite3_column_int64(statement, 0);
    sqlite3_finalize(statement);
    return value;
}

static int open_memory(void **state)
{
    sqlite3 *db = NULL;
    assert_int_equal(sqlite3_open(":memory:", &db), SQLITE_OK);
    *state = db;
    return 0;
}

static int close_memory(void **state)
{
    assert_int_equal(sqlite3_close(*state), SQLITE_OK); /* BUSY when a statement was left */
    return 0;
}

static void test_fresh(void **state)
{
    sqlite3 *db = *state;
    struct error error = {0};
    bool current = true;
    assert_int_equal(migrations_check(db, history, 3, &current, &error), 0);
    assert_false(current);
    assert_int_equal(migrations_apply(db, history, 3, &error), 0);
    assert_int_equal(migrations_check(db, history, 3, &current, &error), 0);
    assert_true(current);
    assert_int_equal(ask(db, "SELECT x FROM one"), 2);
    assert_int_equal(ask(db, "SELECT y FROM one"), 7);
    assert_int_equal(ask(db, "SELECT count(*) FROM schema_migrations WHERE length(checksum) = 64"), 3);
    /* Again: nothing is done twice. */
    assert_int_equal(migrations_apply(db, history, 3, &error), 0);
    assert_int_equal(ask(db, "SELECT x FROM one"), 2);
}

static void test_upgrade(void **state)
{
    sqlite3 *db = *state;
    struct error error = {0};
    assert_int_equal(migrations_apply(db, history, 1, &error), 0);
    assert_int_equal(ask(db, "SELECT x FROM one"), 1);
    assert_int_equal(sqlite3_exec(db, "INSERT INTO one VALUES (10)", NULL, NULL, NULL), SQLITE_OK);
    assert_int_equal(migrations_apply(db, history, 3, &error), 0);
    assert_int_equal(ask(db, "SELECT sum(x) FROM one"), 13);
    assert_int_equal(ask(db, "SELECT sum(y) FROM one"), 14);
}

static void test_newer_is_refused(void **state)
{
    sqlite3 *db = *state;
    struct error error = {0};
    bool current;
    assert_int_equal(migrations_apply(db, history, 3, &error), 0);
    assert_int_equal(migrations_apply(db, history, 2, &error), ERROR_UNSUPPORTED);
    assert_non_null(strstr(error.message, "0003_three.sql"));
    assert_int_equal(migrations_check(db, history, 2, &current, &error), ERROR_UNSUPPORTED);
}

static void test_edited_is_refused(void **state)
{
    sqlite3 *db = *state;
    struct error error = {0};
    struct migration edited[3];
    memcpy(edited, history, sizeof edited);
    edited[0].sql = "CREATE TABLE one (x); INSERT INTO one VALUES (2);";
    assert_int_equal(migrations_apply(db, history, 2, &error), 0);
    assert_int_equal(migrations_apply(db, edited, 3, &error), ERROR_CORRUPT);
    assert_non_null(strstr(error.message, "0001_one.sql"));
    assert_int_equal(ask(db, "SELECT count(*) FROM schema_migrations"), 2); /* and nothing was applied */
    /* A row that was taken out is no better than an edited one. */
    assert_int_equal(sqlite3_exec(db, "DELETE FROM schema_migrations WHERE version = 1", NULL, NULL, NULL),
                     SQLITE_OK);
    assert_int_equal(migrations_apply(db, history, 3, &error), ERROR_CORRUPT);
}

static void test_failure_leaves_no_half(void **state)
{
    sqlite3 *db = *state;
    struct error error = {0};
    const struct migration broken[] = {
        history[0],
        {2, "0002_broken.sql",
         "CREATE TABLE half (x); UPDATE one SET x = 100; INSERT INTO nowhere VALUES (1);"},
    };
    assert_int_equal(migrations_apply(db, broken, 2, &error), ERROR_IO);
    assert_non_null(strstr(error.message, "0002_broken.sql"));
    assert_non_null(strstr(error.message, "nowhere"));
    assert_true(sqlite3_get_autocommit(db));
    assert_int_equal(ask(db, "SELECT x FROM one"), 1);
    assert_int_equal(ask(db, "SELECT count(*) FROM sqlite_schema WHERE name = 'half'"), 0);
    /* Mended, it goes on from there. */
    assert_int_equal(migrations_apply(db, history, 3, &error), 0);
    assert_int_equal(ask(db, "SELECT x FROM one"), 2);

    const struct migration rude[] = {history[0], history[1], history[2], {4, "0004_rude.sql", "COMMIT"}};
    assert_int_equal(migrations_apply(db, rude, 4, &error), ERROR_INTERNAL);
}

static void test_compiled_ones(void **state)
{
    (void)state;
    assert_true(migrations_compiled_count >= 1);
    for (size_t i = 0; i < migrations_compiled_count; i++)
        assert_int_equal(migrations_compiled[i].version, i + 1);
    assert_string_equal(migrations_compiled[0].name, "0001_initial.sql");

    /* The generated text is the file's, byte for byte. */
    const char *source = getenv("ADDERD_SOURCE");
    assert_non_null(source);
    for (size_t i = 0; i < migrations_compiled_count; i++) {
        char path[4096], *text = NULL;
        size_t length = 0;
        snprintf(path, sizeof path, "%s/migrations/%s", source, migrations_compiled[i].name);
        assert_int_equal(file_read(path, 1 << 20, &text, &length, NULL), 0);
        assert_string_equal(text, migrations_compiled[i].sql);
        free(text);
    }
}

static void test_store_refuses_newer_and_edited_files(void **state)
{
    struct fixture *fixture = *state;
    struct error error = {0};
    static const struct {
        const char *sql;
        int code;
    } cases[] = {
        {"INSERT INTO schema_migrations VALUES (9999, '9999_future.sql', 'x', 1)", ERROR_UNSUPPORTED},
        {"DELETE FROM schema_migrations WHERE version = 9999; UPDATE schema_migrations SET checksum = 'x'",
         ERROR_CORRUPT},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        store_close(fixture->store);
        fixture->store = NULL;
        fixture_run(fixture);
        sqlite3 *db = NULL;
        assert_int_equal(sqlite3_open(fixture->database, &db), SQLITE_OK);
        assert_int_equal(sqlite3_exec(db, cases[i].sql, NULL, NULL, NULL), SQLITE_OK);
        sqlite3_close(db);
        assert_int_equal(store_open(fixture->folder, &fixture->loop, &fixture->store, &error), cases[i].code);
        assert_null(fixture->store);
        assert_int_equal(store_open(fixture->folder, NULL, &fixture->store, &error), cases[i].code);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_fresh, open_memory, close_memory),
        cmocka_unit_test_setup_teardown(test_upgrade, open_memory, close_memory),
        cmocka_unit_test_setup_teardown(test_newer_is_refused, open_memory, close_memory),
        cmocka_unit_test_setup_teardown(test_edited_is_refused, open_memory, close_memory),
        cmocka_unit_test_setup_teardown(test_failure_leaves_no_half, open_memory, close_memory),
        cmocka_unit_test(test_compiled_ones),
        cmocka_unit_test_setup_teardown(test_store_refuses_newer_and_edited_files, fixture_setup,
                                        fixture_teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
