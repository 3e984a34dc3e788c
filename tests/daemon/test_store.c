/* test_store.c: the store's threads: group commit, isolation of failures, bounds, locks, closing, kill -9. */
#include "fixture.h"

#include "base/file.h"

#include <fcntl.h>
#include <signal.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* Another connection that holds the write lock, so that what is queued meanwhile has to wait. */
static sqlite3 *hold_writer(const struct fixture *fixture)
{
    sqlite3 *db = NULL;
    assert_int_equal(sqlite3_open(fixture->database, &db), SQLITE_OK);
    sqlite3_busy_timeout(db, 5000);
    assert_int_equal(sqlite3_exec(db, "BEGIN IMMEDIATE", NULL, NULL, NULL), SQLITE_OK);
    return db;
}

static void let_writer_go(sqlite3 *db)
{
    assert_int_equal(sqlite3_exec(db, "ROLLBACK", NULL, NULL, NULL), SQLITE_OK);
    sqlite3_close(db);
}

static int64_t count_rows(const struct fixture *fixture, const char *table)
{
    sqlite3 *db = NULL;
    sqlite3_stmt *statement = NULL;
    char sql[64];
    snprintf(sql, sizeof sql, "SELECT count(*) FROM %s", table);
    assert_int_equal(sqlite3_open(fixture->database, &db), SQLITE_OK);
    assert_int_equal(sqlite3_prepare_v2(db, sql, -1, &statement, NULL), SQLITE_OK);
    assert_int_equal(sqlite3_step(statement), SQLITE_ROW);
    int64_t count = sqlite3_column_int64(statement, 0);
    sqlite3_finalize(statement);
    sqlite3_close(db);
    return count;
}

/* ---- group commit ---- */

struct sequence {
    int next, failed;
};
struct numbered {
    struct sequence *sequence;
    int number;
};

static void expect_in_order(void *arg, int code, const struct error *error)
{
    (void)error;
    struct numbered *numbered = arg;
    if (numbered->number != numbered->sequence->next++ || code)
        numbered->sequence->failed++;
}

static void test_writes_share_commits(void **state)
{
    struct fixture *fixture = *state;
    enum { N = 500 };
    struct sequence sequence = {0};
    static struct numbered numbered[N];
    sqlite3 *held = hold_writer(fixture);
    for (int i = 0; i < N; i++) {
        char id[ID_BYTES];
        snprintf(id, sizeof id, "file-%d", i);
        struct file_resource file = make_file(id);
        numbered[i] = (struct numbered){&sequence, i};
        store_file_insert(fixture->store, &file, NULL, expect_in_order, &numbered[i]);
    }
    let_writer_go(held);
    fixture_run(fixture);
    assert_int_equal(sequence.next, N);
    assert_int_equal(sequence.failed, 0);
    /* The first commit took what was there when the writer woke, the second the rest. */
    assert_in_range(fixture->commits, 1, 2);
    assert_int_equal(fixture->committed, N);
    assert_int_equal(count_rows(fixture, "files"), N);
}

static void test_one_bad_statement_fails_alone(void **state)
{
    struct fixture *fixture = *state;
    assert_int_equal(insert_job(fixture, "ftjob-1"), 0);
    int64_t commits = fixture->commits;
    struct told told[8] = {0};
    struct file_resource first = make_file("file-1"), last = make_file("file-2"),
                         broken = make_file("file-3");
    snprintf(broken.status, sizeof broken.status, "lost"); /* breaks a CHECK */
    struct job_resource missing = make_job("ftjob-missing"), no_file = make_job("ftjob-2");
    snprintf(no_file.validation_file, sizeof no_file.validation_file, "file-missing");

    sqlite3 *held = hold_writer(fixture);
    store_file_insert(fixture->store, &first, NULL, tell, &told[0]);
    store_file_insert(fixture->store, &first, NULL, tell, &told[1]);
    store_file_insert(fixture->store, &broken, NULL, tell, &told[2]);
    store_job_update(fixture->store, &missing, tell, &told[3]);
    store_job_insert(fixture->store, &no_file, NULL, tell, &told[4]);
    store_event_append(fixture->store, "ftjob-missing", "info", "message", "x", NULL, 0, NULL, NULL);
    store_model_delete(fixture->store, "ft:none", tell, &told[5]);
    store_file_delete(fixture->store, "file-training", tell, &told[6]);
    store_file_insert(fixture->store, &last, NULL, tell, &told[7]);
    let_writer_go(held);
    fixture_run(fixture);

    const int codes[8] = {
        0, ERROR_INVALID, ERROR_INVALID, ERROR_NOT_FOUND, ERROR_NOT_FOUND, ERROR_NOT_FOUND, ERROR_BUSY, 0};
    for (int i = 0; i < 8; i++) {
        assert_int_equal(told[i].calls, 1);
        assert_int_equal(told[i].code, codes[i]);
    }
    assert_string_equal(told[4].error.param, "validation_file");
    assert_in_range(fixture->commits - commits, 1, 2);
    assert_int_equal(count_rows(fixture, "files"), 3);
    assert_int_equal(count_rows(fixture, "jobs"), 1);
    assert_int_equal(count_rows(fixture, "events"), 0);
}

/* ---- what the disk refuses ---- */

static void limit_file_size(rlim_t bytes)
{
    struct rlimit limit;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    limit.rlim_cur = bytes < limit.rlim_max ? bytes : limit.rlim_max;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
}

static void test_io_error_is_reported_and_survived(void **state)
{
    struct fixture *fixture = *state;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(insert_file(fixture, "file-before"), 0);
    char wal[128];
    snprintf(wal, sizeof wal, "%s-wal", fixture->database);
    struct stat st;
    assert_int_equal(stat(wal, &st), 0);

    size_t large = 1 << 20;
    char *body = malloc(large + 1);
    assert_non_null(body);
    memset(body, 'x', large);
    body[large] = '\0';
    struct told told[4] = {0};
    struct file_resource one = make_file("file-1"), two = make_file("file-2");

    /* Room for the small ones, none for their neighbour. */
    sqlite3 *held = hold_writer(fixture);
    store_file_insert(fixture->store, &one, NULL, tell, &told[0]);
    store_answer_put(fixture->store, &(struct kept_answer){"scope", "key", "hash", 200, body}, tell,
                     &told[1]);
    store_file_insert(fixture->store, &two, NULL, tell, &told[2]);
    limit_file_size((rlim_t)st.st_size + (256 << 10));
    let_writer_go(held);
    fixture_run(fixture);
    limit_file_size(RLIM_INFINITY);
    assert_int_equal(told[0].code, 0);
    assert_int_equal(told[1].code, ERROR_IO);
    assert_int_equal(told[2].code, 0);

    /* No room at all. */
    limit_file_size(4096);
    int code = insert_file(fixture, "file-3");
    limit_file_size(RLIM_INFINITY);
    assert_int_equal(code, ERROR_IO);
    assert_int_equal(insert_file(fixture, "file-3"), 0);
    store_answer_put(fixture->store, &(struct kept_answer){"scope", "key", "hash", 200, body}, tell,
                     &told[3]);
    fixture_run(fixture);
    assert_int_equal(told[3].code, 0);

    fixture_reopen(fixture);
    assert_int_equal(count_rows(fixture, "files"), 4);
    assert_int_equal(count_rows(fixture, "answers"), 1);
    free(body);
}

static void test_queue_is_bounded(void **state)
{
    struct fixture *fixture = *state;
    enum { N = 40 };
    size_t large = 2 << 20;
    char *body = malloc(large + 1);
    assert_non_null(body);
    memset(body, 'x', large);
    body[large] = '\0';
    static struct told told[N];
    memset(told, 0, sizeof told);
    int refused = 0, written = 0, in_use = 0;
    sqlite3 *held = hold_writer(fixture);
    for (int i = 0; i < N; i++) {
        char key[16];
        snprintf(key, sizeof key, "%d", i);
        store_answer_put(fixture->store, &(struct kept_answer){"scope", key, "hash", 200, body}, tell,
                         &told[i]);
        assert_int_equal(told[i].calls, 0);
    }
    uv_run(&fixture->loop, UV_RUN_ONCE); /* the refusals do not wait for the writer */
    for (int i = 0; i < N; i++)
        refused += told[i].calls && strstr(told[i].error.message, "too much waits");
    let_writer_go(held);
    fixture_run(fixture);
    for (int i = 0; i < N; i++) {
        assert_int_equal(told[i].calls, 1);
        written += told[i].code == 0;
        in_use += strstr(told[i].error.message, "in use by another process") != NULL;
    }
    if (in_use == 0) /* else all this took longer than the writer waits for the database */
        assert_in_range(refused, 1, N - 31);
    assert_int_equal(written + refused + in_use, N);
    assert_int_equal(count_rows(fixture, "answers"), written);
    free(body);
}

/* ---- opening and closing ---- */

static void test_second_daemon_is_refused(void **state)
{
    struct fixture *fixture = *state;
    struct store *second = NULL;
    struct error error = {0};
    char pid[32];
    snprintf(pid, sizeof pid, "process %ld)", (long)getpid());
    assert_int_equal(store_open(fixture->folder, &fixture->loop, &second, &error), ERROR_BUSY);
    assert_null(second);
    assert_non_null(strstr(error.message, pid));
    assert_non_null(strstr(error.message, fixture->folder));
    /* The keys command goes beside it. */
    assert_int_equal(store_open(fixture->folder, NULL, &second, &error), 0);
    store_close(second);
    fixture_reopen(fixture);
}

static void test_unusable_folder(void **state)
{
    struct fixture *fixture = *state;
    struct store *store = NULL;
    struct error error = {0};
    assert_int_equal(store_open("/proc/nowhere", &fixture->loop, &store, &error), ERROR_IO);
    char folder[64], path[96];
    make_folder(folder);
    snprintf(path, sizeof path, "%s/adderd.db", folder);
    assert_int_equal(
        file_write_whole(path, "this is no database, but it is long enough to be read as one", 60, NULL), 0);
    assert_int_equal(store_open(folder, &fixture->loop, &store, &error), ERROR_CORRUPT);
    assert_null(store);
    assert_int_equal(file_remove_tree(folder, NULL), 0);
}

struct chain {
    struct fixture *fixture;
    int length;
    bool close;
};

static void go_on(void *arg, int code, const struct error *error)
{
    (void)error;
    struct chain *chain = arg;
    assert_int_equal(code, 0);
    char id[ID_BYTES];
    snprintf(id, sizeof id, "file-%d", chain->length);
    if (++chain->length < 10) {
        struct file_resource file = make_file(id);
        store_file_insert(chain->fixture->store, &file, NULL, go_on, chain);
    } else if (chain->close) {
        store_close(chain->fixture->store);
        chain->fixture->store = NULL;
    }
}

static void test_close_does_what_is_queued(void **state)
{
    struct fixture *fixture = *state;
    struct chain chain = {fixture, 0, false};
    for (int i = 0; i < 50; i++) {
        char id[ID_BYTES];
        snprintf(id, sizeof id, "file-q%d", i);
        struct file_resource file = make_file(id);
        store_file_insert(fixture->store, &file, NULL, NULL, NULL);
    }
    go_on(&chain, 0, NULL);
    store_close(fixture->store);
    fixture->store = NULL;
    assert_int_equal(chain.length, 10);
    fixture_run(fixture);
    fixture_reopen(fixture);
    assert_int_equal(count_rows(fixture, "files"), 59);
}

static void test_close_inside_a_callback(void **state)
{
    struct fixture *fixture = *state;
    struct chain chain = {fixture, 0, true};
    struct told told = {0};
    go_on(&chain, 0, NULL);
    struct file_resource file = make_file("file-other");
    store_file_insert(fixture->store, &file, NULL, tell, &told);
    fixture_run(fixture);
    assert_null(fixture->store);
    assert_int_equal(told.calls, 1);
    fixture_reopen(fixture);
    assert_int_equal(count_rows(fixture, "files"), 10);
}

static void test_new_ids(void **state)
{
    (void)state;
    char seen[200][ID_BYTES];
    for (int i = 0; i < 200; i++) {
        store_new_id("file-", seen[i]);
        assert_int_equal(strlen(seen[i]), 5 + 24);
        assert_int_equal(strncmp(seen[i], "file-", 5), 0);
        assert_int_equal(
            strspn(seen[i] + 5, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"), 24);
        for (int j = 0; j < i; j++)
            assert_string_not_equal(seen[i], seen[j]);
    }
}

/* ---- kill -9 ---- */

struct child {
    struct store *store;
    int pipe, started;
};
struct child_write {
    struct child *child;
    int number;
};

static void start_write(struct child *child);

static void acknowledge(void *arg, int code, const struct error *error)
{
    (void)error;
    struct child_write *child_write = arg;
    struct child *child = child_write->child;
    if (code || write(child->pipe, &child_write->number, sizeof(int)) != (ssize_t)sizeof(int))
        _exit(1);
    free(child_write);
    start_write(child);
}

static void start_write(struct child *child)
{
    struct child_write *child_write = malloc(sizeof *child_write);
    if (!child_write)
        _exit(1);
    *child_write = (struct child_write){child, child->started++};
    char id[ID_BYTES];
    snprintf(id, sizeof id, "file-%d", child_write->number);
    struct file_resource file = make_file(id);
    store_file_insert(child->store, &file, NULL, acknowledge, child_write);
}

static void write_until_killed(const char *folder, int pipe)
{
    uv_loop_t loop;
    struct child child = {.pipe = pipe};
    if (uv_loop_init(&loop) || store_open(folder, &loop, &child.store, NULL))
        _exit(1);
    for (int i = 0; i < 16; i++)
        start_write(&child);
    uv_run(&loop, UV_RUN_DEFAULT);
    _exit(1);
}

static void expect_found(void *arg, int code, const struct file_resource *file)
{
    assert_int_equal(code, 0);
    assert_non_null(file);
    ++*(int *)arg;
}

static void test_what_was_acknowledged_survives_kill(void **state)
{
    (void)state;
    char folder[64];
    make_folder(folder);
    int acknowledged = 0;
    static int numbers[100000];
    for (int round = 0; round < 3; round++) {
        int ends[2];
        assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0)
            write_until_killed(folder, ends[1]);
        close(ends[1]);
        int n = 0, number;
        while (n < 60000 && read(ends[0], &number, sizeof number) == (ssize_t)sizeof number) {
            numbers[n++] = number;
            if (n == 150 + 50 * round)
                kill(pid, SIGKILL); /* then what it had said before is read to the end */
        }
        close(ends[0]);
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        assert_true(n >= 150);
        acknowledged = n;

        uv_loop_t loop;
        struct store *store = NULL;
        struct error error = {0};
        assert_int_equal(uv_loop_init(&loop), 0);
        if (store_open(folder, &loop, &store, &error))
            fail_msg("%s", error.message);
        int found = 0;
        struct told deleted = {0};
        for (int i = 0; i < n; i++) {
            char id[ID_BYTES];
            snprintf(id, sizeof id, "file-%d", numbers[i]);
            store_file_get(store, id, expect_found, &found);
        }
        uv_run(&loop, UV_RUN_DEFAULT);
        assert_int_equal(found, acknowledged);
        /* The next round starts from none, on the same file. */
        for (int i = 0; i < n + 1000; i++) {
            char id[ID_BYTES];
            snprintf(id, sizeof id, "file-%d", i);
            store_file_delete(store, id, tell, &deleted);
        }
        store_close(store);
        uv_run(&loop, UV_RUN_DEFAULT);
        assert_int_equal(uv_loop_close(&loop), 0);
        assert_int_equal(deleted.calls, n + 1000);
    }
    assert_int_equal(file_remove_tree(folder, NULL), 0);
}

/* ---- many at once (worth most under ThreadSanitizer) ---- */

struct mixed {
    struct fixture *fixture;
    int left, answered, failed;
};

static void on_mixed_read(void *arg, int code, const struct file_resource *file);
static void on_mixed_list(void *arg, int code, const struct file_resource *items, size_t count,
                          bool has_more);

static void on_mixed_write(void *arg, int code, const struct error *error)
{
    (void)error;
    struct mixed *mixed = arg;
    mixed->answered++;
    mixed->failed += code != 0;
    if (mixed->left-- > 0) {
        struct list_query query = {.limit = 50};
        store_file_list(mixed->fixture->store, &query, on_mixed_list, mixed);
        store_event_append(mixed->fixture->store, "ftjob-1", "info", "message", "hello", "{\"a\":1}", 0, NULL,
                           NULL);
    }
}

static void on_mixed_list(void *arg, int code, const struct file_resource *items, size_t count, bool has_more)
{
    (void)has_more;
    struct mixed *mixed = arg;
    mixed->answered++;
    mixed->failed += code != 0 || count < 1;
    store_file_get(mixed->fixture->store, items[count - 1].id, on_mixed_read, mixed);
}

static void on_mixed_read(void *arg, int code, const struct file_resource *file)
{
    struct mixed *mixed = arg;
    mixed->answered++;
    mixed->failed += code != 0 || !file;
    char id[ID_BYTES];
    store_new_id("file-", id);
    struct file_resource new_file = make_file(id);
    store_file_insert(mixed->fixture->store, &new_file, NULL, on_mixed_write, mixed);
}

static void test_many_at_once(void **state)
{
    struct fixture *fixture = *state;
    assert_int_equal(insert_job(fixture, "ftjob-1"), 0);
    struct mixed mixed = {.fixture = fixture, .left = 1500};
    for (int i = 0; i < 32; i++) {
        char id[ID_BYTES];
        store_new_id("file-", id);
        struct file_resource file = make_file(id);
        store_file_insert(fixture->store, &file, NULL, on_mixed_write, &mixed);
    }
    fixture_run(fixture);
    assert_int_equal(mixed.failed, 0);
    assert_int_equal(mixed.answered, 32 + 3 * 1500);
    assert_int_equal(count_rows(fixture, "files"), 1 + 32 + 1500);
    assert_int_equal(count_rows(fixture, "events"), 1500);
}

#define WITH_STORE(test) cmocka_unit_test_setup_teardown(test, fixture_setup, fixture_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        /* First: it forks, and no thread has been started yet. */
        cmocka_unit_test(test_what_was_acknowledged_survives_kill),
        WITH_STORE(test_writes_share_commits),
        WITH_STORE(test_one_bad_statement_fails_alone),
        WITH_STORE(test_io_error_is_reported_and_survived),
        WITH_STORE(test_queue_is_bounded),
        WITH_STORE(test_second_daemon_is_refused),
        WITH_STORE(test_unusable_folder),
        WITH_STORE(test_close_does_what_is_queued),
        WITH_STORE(test_close_inside_a_callback),
        WITH_STORE(test_many_at_once),
        cmocka_unit_test(test_new_ids),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
