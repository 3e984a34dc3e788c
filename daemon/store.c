/* store.c: the store's two threads, the queues in front of them, and group commit.
 *
 * A request is made on the loop's thread, queued in the lane of the writer or the reader, run there, put on
 * the one list of what is done, and delivered on the loop's thread after a uv_async. The writer takes all
 * that is queued at once: while it waits for the disk the next group gathers, so that the longer a commit
 * takes, the more it carries.
 *
 * Within a group each request runs in a savepoint. One that fails is rolled back alone. When the transaction
 * itself is lost (the disk is full, an I/O error, a commit that fails) every request of the group is run
 * again in a transaction of its own, so that each gets its own answer and the small ones may still fit.
 *
 * One mutex guards the queues and the list of what is done; nothing is called while it is held. */
#include "daemon/migrations.h"
#include "daemon/store_internal.h"

#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <unistd.h>

enum { QUEUE_BYTES = 64 << 20, BUSY_TIMEOUT_MS = 5000 };

struct request_list {
    struct store_request *first, **last;
    size_t bytes;
};

struct lane {
    struct store *store;
    struct connection connection;
    struct request_list queue;
    uv_cond_t wake;
    uv_thread_t thread;
    bool has_wake, has_thread;
    void (*work)(struct lane *lane, struct store_request *first, int64_t count);
};

struct store {
    int lock_fd;
    struct lane writer, reader;
    uv_mutex_t mutex;
    uv_cond_t settled; /* something was put on done, or a blocking request is over */
    bool has_mutex, has_settled;
    bool closing;             /* under the mutex: the threads end once their queues are empty */
    struct request_list done; /* under the mutex */

    /* The loop's thread alone. */
    uv_async_t async; /* data is the store; NULL without a loop */
    struct request_list delivering;
    int64_t under_way; /* requests given to the store and not delivered yet */
    store_commit_observer observer;
    void *observer_arg;
};

/* ---- lists of requests ---- */

static void list_init(struct request_list *list)
{
    list->first = NULL;
    list->last = &list->first;
    list->bytes = 0;
}

static void list_push(struct request_list *list, struct store_request *request)
{
    request->next = NULL;
    *list->last = request;
    list->last = &request->next;
    list->bytes += request->bytes;
}

static struct store_request *list_pop(struct request_list *list)
{
    struct store_request *request = list->first;
    if (!request)
        return NULL;
    list->first = request->next;
    if (!list->first)
        list->last = &list->first;
    list->bytes -= request->bytes;
    request->next = NULL;
    return request;
}

/* All of `from` behind what is in `to`. */
static void list_move(struct request_list *from, struct request_list *to)
{
    if (!from->first)
        return;
    *to->last = from->first;
    to->last = from->last;
    to->bytes += from->bytes;
    list_init(from);
}

/* ---- requests, on the loop's thread ---- */

void *request_new(size_t size)
{
    struct store_request *request = calloc(1, size);
    if (request)
        request->bytes = size;
    return request;
}

static void deliver_written(struct store_request *request)
{
    if (request->done)
        request->done(request->arg, request->code, request->code ? &request->error : NULL);
}

void *request_new_write(size_t size,
                        int (*run)(struct connection *connection, struct store_request *request,
                                   struct error *error),
                        store_written done, void *arg)
{
    struct store_request *request = request_new(size);
    if (!request) {
        struct error error;
        int code = error_set(&error, ERROR_NO_MEMORY, "no memory for a request to the store");
        if (done)
            done(arg, code, &error);
        return NULL;
    }
    request->run = run;
    request->deliver = deliver_written;
    request->done = done;
    request->arg = arg;
    return request;
}

void request_refuse(struct store_request *request, int code, const char *reason)
{
    request->refused = true;
    request->code = error_set(&request->error, code, "%s", reason);
}

static void request_free(struct store_request *request)
{
    if (request->release)
        request->release(request);
    free(request);
}

static void queue_request(struct lane *lane, struct store_request *request)
{
    struct store *store = lane->store;
    if (store->under_way++ == 0)
        uv_ref((uv_handle_t *)&store->async);
    uv_mutex_lock(&store->mutex);
    bool full = lane->queue.bytes + request->bytes > QUEUE_BYTES;
    if (full) {
        request_refuse(request, ERROR_BUSY, "too much waits to be stored: try again");
        list_push(&store->done, request);
    } else {
        list_push(&lane->queue, request);
        uv_cond_signal(&lane->wake);
    }
    uv_mutex_unlock(&store->mutex);
    if (full)
        uv_async_send(&store->async);
}

void store_write(struct store *store, struct store_request *request)
{
    queue_request(&store->writer, request);
}

void store_read(struct store *store, struct store_request *request)
{
    queue_request(&store->reader, request);
}

static int run_blocking(struct lane *lane, struct store_request *request, struct error *error)
{
    struct store *store = lane->store;
    request->blocking = true;
    uv_mutex_lock(&store->mutex);
    list_push(&lane->queue, request);
    uv_cond_signal(&lane->wake);
    while (!request->settled)
        uv_cond_wait(&store->settled, &store->mutex);
    uv_mutex_unlock(&store->mutex);
    if (request->code && error)
        *error = request->error;
    return request->code;
}

int store_write_blocking(struct store *store, struct store_request *request, struct error *error)
{
    return run_blocking(&store->writer, request, error);
}

int store_read_blocking(struct store *store, struct store_request *request, struct error *error)
{
    return run_blocking(&store->reader, request, error);
}

static void deliver_next(struct store *store)
{
    struct store_request *request = list_pop(&store->delivering);
    /* Before the callback: it may close the store. */
    if (--store->under_way == 0 && !uv_is_closing((uv_handle_t *)&store->async))
        uv_unref((uv_handle_t *)&store->async);
    if (request->commit_requests && store->observer)
        store->observer(store->observer_arg, request->commit_seconds, request->commit_requests);
    if (request->deliver)
        request->deliver(request);
    request_free(request);
}

static void on_async(uv_async_t *async)
{
    struct store *store = async->data;
    uv_mutex_lock(&store->mutex);
    list_move(&store->done, &store->delivering);
    uv_mutex_unlock(&store->mutex);
    while (store->delivering.first)
        deliver_next(store);
}

/* ---- the lanes' threads ---- */

static void settle(struct lane *lane, struct store_request *first)
{
    struct store *store = lane->store;
    bool wake = false;
    uv_mutex_lock(&store->mutex);
    for (struct store_request *request = first, *next; request; request = next) {
        next = request->next;
        if (request->blocking) {
            request->settled = true; /* from here on it is its owner's */
        } else {
            list_push(&store->done, request);
            wake = true;
        }
    }
    uv_cond_broadcast(&store->settled);
    /* Under the mutex: afterwards the loop's thread may have closed the handle. */
    if (wake)
        uv_async_send(&store->async);
    uv_mutex_unlock(&store->mutex);
}

static void lane_main(void *arg)
{
    struct lane *lane = arg;
    struct store *store = lane->store;
    uv_mutex_lock(&store->mutex);
    for (;;) {
        while (!lane->queue.first && !store->closing)
            uv_cond_wait(&lane->wake, &store->mutex);
        struct store_request *first = lane->queue.first;
        list_init(&lane->queue);
        uv_mutex_unlock(&store->mutex);
        if (!first)
            return;
        int64_t count = 0;
        for (struct store_request *request = first; request; request = request->next)
            count++;
        lane->work(lane, first, count);
        settle(lane, first);
        uv_mutex_lock(&store->mutex);
    }
}

static void run_reads(struct lane *lane, struct store_request *first, int64_t count)
{
    (void)count;
    for (struct store_request *request = first; request; request = request->next)
        if (!request->refused)
            request->code = request->run(&lane->connection, request, &request->error);
}

/* Run one request in a savepoint of its own. Returns false when the whole transaction is lost. */
static bool run_in_savepoint(struct connection *connection, struct store_request *request)
{
    struct error error = {0};
    struct query savepoint = query_begin(connection, "SAVEPOINT request");
    if (query_run(&savepoint, NULL, &error)) {
        request->code = error.code;
        request->error = error;
        return false;
    }
    request->error = error;
    request->code = request->run(connection, request, &request->error);
    if (sqlite3_get_autocommit(connection->db)) {
        if (!request->code)
            request->code = error_set(&request->error, ERROR_IO, "the transaction was lost");
        return false;
    }
    if (request->code) {
        struct query back = query_begin(connection, "ROLLBACK TO request");
        if (query_run(&back, NULL, NULL))
            return false;
    }
    struct query release = query_begin(connection, "RELEASE request");
    return query_run(&release, NULL, NULL) == 0;
}

static void fail_all(struct store_request *first, int64_t count, const struct error *error)
{
    for (struct store_request *request = first; count > 0; request = request->next, count--)
        if (!request->refused && !request->code) {
            request->code = error->code;
            request->error = *error;
        }
}

/* Run `count` requests as one transaction. Returns false when it was lost half-way and each should be tried
 * alone; a lone one that is lost has its code set. */
static bool commit_group(struct connection *connection, struct store_request *first, int64_t count)
{
    struct error error = {0};
    uint64_t started = uv_hrtime();
    struct query begin = query_begin(connection, "BEGIN IMMEDIATE");
    if (query_run(&begin, NULL, &error)) {
        fail_all(first, count, &error); /* nothing was tried: it would be no better one by one */
        return true;
    }
    int64_t succeeded = 0;
    bool lost = false;
    struct store_request *request = first;
    for (int64_t i = 0; i < count && !lost; i++, request = request->next) {
        if (request->refused)
            continue;
        lost = !run_in_savepoint(connection, request);
        succeeded += request->code == 0;
    }
    if (!lost) {
        struct query commit = query_begin(connection, "COMMIT");
        lost = query_run(&commit, NULL, &error) != 0;
    }
    if (!sqlite3_get_autocommit(connection->db)) {
        struct query back = query_begin(connection, "ROLLBACK");
        query_run(&back, NULL, NULL);
    }
    if (!lost) {
        if (succeeded) {
            first->commit_seconds = (double)(uv_hrtime() - started) / 1e9;
            first->commit_requests = succeeded;
        }
        return true;
    }
    if (count > 1)
        return false;
    if (!error.code)
        error_set(&error, ERROR_IO, "the transaction was lost");
    fail_all(first, count, &error);
    return true;
}

static void run_writes(struct lane *lane, struct store_request *first, int64_t count)
{
    if (commit_group(&lane->connection, first, count))
        return;
    for (struct store_request *request = first; request; request = request->next) {
        if (request->refused)
            continue;
        request->code = 0;
        commit_group(&lane->connection, request, 1);
    }
}

/* ---- opening and closing ---- */

static int lock_folder(const char *folder, int *ret_fd, struct error *error)
{
    char path[PATH_MAX], owner[32] = "";
    snprintf(path, sizeof path, "%s/adderd.lock", folder);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0640);
    if (fd < 0)
        return error_set(error, ERROR_IO, "cannot open %s: %s", path, strerror(errno));
    if (flock(fd, LOCK_EX | LOCK_NB)) {
        int failed = errno;
        ssize_t n = pread(fd, owner, sizeof owner - 1, 0);
        close(fd);
        owner[n > 0 ? n : 0] = '\0';
        owner[strcspn(owner, "\n")] = '\0';
        if (failed != EWOULDBLOCK)
            return error_set(error, ERROR_IO, "cannot lock %s: %s", path, strerror(failed));
        return error_set(error, ERROR_BUSY, "another adderd (process %s) uses the data folder %s",
                         owner[0] ? owner : "unknown", folder);
    }
    /* The process id is for people; the lock is what counts. */
    int n = snprintf(owner, sizeof owner, "%ld\n", (long)getpid());
    if (ftruncate(fd, 0) || pwrite(fd, owner, (size_t)n, 0) != n) {
        int failed = errno;
        close(fd);
        return error_set(error, ERROR_IO, "cannot write %s: %s", path, strerror(failed));
    }
    *ret_fd = fd;
    return 0;
}

static int connection_open(struct connection *connection, const char *path, const char *pragmas,
                           struct error *error)
{
    /* Each connection has one thread at a time, so it needs no mutex of its own. */
    int status = sqlite3_open_v2(
        path, &connection->db,
        SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_EXRESCODE, NULL);
    if (status == SQLITE_OK)
        status = sqlite3_busy_timeout(connection->db, BUSY_TIMEOUT_MS);
    if (status == SQLITE_OK)
        status = sqlite3_exec(connection->db, pragmas, NULL, NULL, NULL);
    if (status == SQLITE_OK)
        return 0;
    int code =
        (status & 0xff) == SQLITE_NOTADB || (status & 0xff) == SQLITE_CORRUPT ? ERROR_CORRUPT : ERROR_IO;
    return error_set(error, code, "cannot open %s: %s", path,
                     connection->db ? sqlite3_errmsg(connection->db) : sqlite3_errstr(status));
}

static void connection_close(struct connection *connection)
{
    for (int i = 0; i < connection->n_statements; i++)
        sqlite3_finalize(connection->statements[i].statement);
    sqlite3_close(connection->db);
}

/* Bring the schema up to date. Beside a running daemon that is not ours to do. */
static int migrate(struct store *store, const char *folder, bool beside, struct error *error)
{
    bool current = false;
    sqlite3 *db = store->writer.connection.db;
    int code = migrations_check(db, migrations_compiled, migrations_compiled_count, &current, error);
    if (code || current)
        return code;
    int fd = -1;
    if (beside && (code = lock_folder(folder, &fd, error)))
        return error_prefix(error, "the database has an older form, which only its daemon may renew: ");
    code = migrations_apply(db, migrations_compiled, migrations_compiled_count, error);
    if (fd >= 0)
        close(fd);
    return code;
}

static int lane_start(struct lane *lane, struct error *error)
{
    int status = uv_thread_create(&lane->thread, lane_main, lane);
    if (status)
        return error_set(error, ERROR_NO_MEMORY, "cannot start a thread of the store: %s",
                         uv_strerror(status));
    lane->has_thread = true;
    return 0;
}

static void lanes_stop(struct store *store)
{
    struct lane *lanes[] = {&store->writer, &store->reader};
    if (store->has_mutex) {
        uv_mutex_lock(&store->mutex);
        store->closing = true;
        for (int i = 0; i < 2; i++)
            if (lanes[i]->has_wake)
                uv_cond_signal(&lanes[i]->wake);
        uv_mutex_unlock(&store->mutex);
    }
    for (int i = 0; i < 2; i++)
        if (lanes[i]->has_thread)
            uv_thread_join(&lanes[i]->thread);
    /* The writer's connection last: the last one to close folds the WAL into the file. */
    connection_close(&store->reader.connection);
    connection_close(&store->writer.connection);
    for (int i = 0; i < 2; i++)
        if (lanes[i]->has_wake)
            uv_cond_destroy(&lanes[i]->wake);
    if (store->has_settled)
        uv_cond_destroy(&store->settled);
    if (store->lock_fd >= 0)
        close(store->lock_fd);
}

static void store_free(struct store *store)
{
    if (store->has_mutex)
        uv_mutex_destroy(&store->mutex);
    free(store);
}

static void on_async_closed(uv_handle_t *handle)
{
    store_free(handle->data);
}

int store_open(const char *folder, uv_loop_t *loop, struct store **ret_store, struct error *error)
{
    struct store *store = calloc(1, sizeof *store);
    if (!store)
        return error_set(error, ERROR_NO_MEMORY, "no memory for the store");
    store->lock_fd = -1;
    store->writer.store = store->reader.store = store;
    store->writer.work = run_writes;
    store->reader.work = run_reads;
    list_init(&store->writer.queue);
    list_init(&store->reader.queue);
    list_init(&store->done);
    list_init(&store->delivering);

    char path[PATH_MAX];
    int code = file_make_dirs(folder, error);
    if (code)
        goto done;
    if (snprintf(path, sizeof path, "%s/adderd.db", folder) >= (int)sizeof path || sodium_init() < 0) {
        code = error_set(error, ERROR_INVALID, "cannot use the data folder %s", folder);
        goto done;
    }
    if (loop && (code = lock_folder(folder, &store->lock_fd, error)))
        goto done;
    if ((code =
             connection_open(&store->writer.connection, path,
                             "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;"
                             "PRAGMA journal_size_limit = 67108864",
                             error)) ||
        (code = migrate(store, folder, !loop, error)) ||
        (code = connection_open(&store->reader.connection, path, "PRAGMA query_only = ON", error)) ||
        (code = file_sync(folder, error))) {
        goto done;
    }

    store->has_mutex = uv_mutex_init(&store->mutex) == 0;
    store->has_settled = uv_cond_init(&store->settled) == 0;
    store->writer.has_wake = uv_cond_init(&store->writer.wake) == 0;
    store->reader.has_wake = uv_cond_init(&store->reader.wake) == 0;
    if (!store->has_mutex || !store->has_settled || !store->writer.has_wake || !store->reader.has_wake) {
        code = error_set(error, ERROR_NO_MEMORY, "cannot make the store's locks");
        goto done;
    }
    if ((code = lane_start(&store->writer, error)) || (code = lane_start(&store->reader, error)))
        goto done;
    if (loop) {
        int status = uv_async_init(loop, &store->async, on_async);
        if (status) {
            code = error_set(error, ERROR_NO_MEMORY, "cannot wake the loop: %s", uv_strerror(status));
            goto done;
        }
        store->async.data = store;
        uv_unref((uv_handle_t *)&store->async);
    }
    *ret_store = store;
    return 0;
done:
    lanes_stop(store);
    store_free(store);
    return code;
}

void store_close(struct store *store)
{
    if (!store)
        return;
    /* Callbacks may ask for more, which is done too. This may itself run inside of one. */
    while (store->under_way) {
        uv_mutex_lock(&store->mutex);
        while (!store->done.first && !store->delivering.first)
            uv_cond_wait(&store->settled, &store->mutex);
        list_move(&store->done, &store->delivering);
        uv_mutex_unlock(&store->mutex);
        while (store->delivering.first)
            deliver_next(store);
    }
    lanes_stop(store);
    if (store->async.data)
        uv_close((uv_handle_t *)&store->async, on_async_closed);
    else
        store_free(store);
}

void store_observe_commits(struct store *store, store_commit_observer observer, void *arg)
{
    store->observer = observer;
    store->observer_arg = arg;
}

void store_new_id(const char *prefix, char ret_id[ID_BYTES])
{
    static const char alphabet[] = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    enum { LENGTH = 24, LETTERS = sizeof alphabet - 1, LIMIT = 256 - 256 % LETTERS };
    char letters[LENGTH + 1] = "";
    for (int n = 0; n < LENGTH;) {
        unsigned char random[2 * LENGTH];
        ssize_t got = getrandom(random, sizeof random, 0);
        for (ssize_t i = 0; i < got && n < LENGTH; i++)
            if (random[i] < LIMIT) /* every letter equally likely */
                letters[n++] = alphabet[random[i] % LETTERS];
    }
    snprintf(ret_id, ID_BYTES, "%.*s%s", ID_BYTES - 1 - LENGTH, prefix, letters);
}
