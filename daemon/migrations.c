/* migrations.c: see migrations.h. */
#include "daemon/migrations.h"

#include <sodium.h>
#include <sqlite3.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { CHECKSUM_BYTES = 32, CHECKSUM_TEXT = 2 * CHECKSUM_BYTES + 1 };

static int refuse(sqlite3 *db, struct error *error)
{
    int code = sqlite3_errcode(db);
    return error_set(error, code == SQLITE_NOTADB || code == SQLITE_CORRUPT ? ERROR_CORRUPT : ERROR_IO,
                     "the database says: %s", sqlite3_errmsg(db));
}

static int run(sqlite3 *db, const char *sql, struct error *error)
{
    return sqlite3_exec(db, sql, NULL, NULL, NULL) == SQLITE_OK ? 0 : refuse(db, error);
}

static void checksum(const char *sql, char ret_text[CHECKSUM_TEXT])
{
    unsigned char hash[CHECKSUM_BYTES];
    crypto_generichash(hash, sizeof hash, (const unsigned char *)sql, strlen(sql), NULL, 0);
    sodium_bin2hex(ret_text, CHECKSUM_TEXT, hash, sizeof hash);
}

/* Compare what the file has had with the list. A file's migrations must be the list's first *ret_applied. */
static int compare(sqlite3 *db, const struct migration *list, size_t count, size_t *ret_applied,
                   struct error *error)
{
    int code = 0;
    size_t applied = 0;
    sqlite3_stmt *statement = NULL;
    if (sqlite3_prepare_v2(db, "SELECT 1 FROM sqlite_schema WHERE name = 'schema_migrations'", -1, &statement,
                           NULL) != SQLITE_OK)
        return refuse(db, error);
    int step = sqlite3_step(statement);
    if (step != SQLITE_ROW && step != SQLITE_DONE)
        code = refuse(db, error);
    sqlite3_finalize(statement);
    statement = NULL;
    if (code || step == SQLITE_DONE)
        goto done;

    if (sqlite3_prepare_v2(db, "SELECT version, name, checksum FROM schema_migrations ORDER BY version", -1,
                           &statement, NULL) != SQLITE_OK) {
        code = refuse(db, error);
        goto done;
    }
    while ((step = sqlite3_step(statement)) == SQLITE_ROW) {
        int version = sqlite3_column_int(statement, 0);
        const char *name = (const char *)sqlite3_column_text(statement, 1);
        const char *sum = (const char *)sqlite3_column_text(statement, 2);
        if (applied == count) {
            code =
                error_set(error, ERROR_UNSUPPORTED,
                          "the database was written by a newer adderd (it has migration %s; this one knows "
                          "%zu): start that version",
                          name ? name : "?", count);
            goto done;
        }
        char expected[CHECKSUM_TEXT];
        checksum(list[applied].sql, expected);
        if (version != list[applied].version || !sum || strcmp(sum, expected)) {
            code = error_set(error, ERROR_CORRUPT,
                             "migration %d of the database (%s) is not this binary's %s: its text was edited "
                             "after it was applied",
                             version, name ? name : "?", list[applied].name);
            goto done;
        }
        applied++;
    }
    if (step != SQLITE_DONE)
        code = refuse(db, error);
done:
    sqlite3_finalize(statement);
    if (!code)
        *ret_applied = applied;
    return code;
}

/* One migration and its row, within the caller's transaction. */
static int apply_one(sqlite3 *db, const struct migration *migration, struct error *error)
{
    int code = run(db, migration->sql, error);
    if (code)
        return error_prefix(error, "migration %s: ", migration->name);
    if (sqlite3_get_autocommit(db))
        return error_set(error, ERROR_INTERNAL, "migration %s ends its transaction itself", migration->name);

    char sum[CHECKSUM_TEXT];
    checksum(migration->sql, sum);
    sqlite3_stmt *statement = NULL;
    if (sqlite3_prepare_v2(db, "INSERT INTO schema_migrations VALUES (?, ?, ?, ?)", -1, &statement, NULL) !=
            SQLITE_OK ||
        sqlite3_bind_int(statement, 1, migration->version) != SQLITE_OK ||
        sqlite3_bind_text(statement, 2, migration->name, -1, SQLITE_STATIC) != SQLITE_OK ||
        sqlite3_bind_text(statement, 3, sum, -1, SQLITE_STATIC) != SQLITE_OK ||
        sqlite3_bind_int64(statement, 4, (sqlite3_int64)time(NULL)) != SQLITE_OK ||
        sqlite3_step(statement) != SQLITE_DONE)
        code = refuse(db, error);
    sqlite3_finalize(statement);
    return code;
}

int migrations_check(struct sqlite3 *db, const struct migration *list, size_t count, bool *ret_current,
                     struct error *error)
{
    size_t applied = 0;
    int code = compare(db, list, count, &applied, error);
    if (!code)
        *ret_current = applied == count;
    return code;
}

int migrations_apply(struct sqlite3 *db, const struct migration *list, size_t count, struct error *error)
{
    bool current = false;
    int code = migrations_check(db, list, count, &current, error);
    while (!code && !current) {
        /* Compared again under the write lock: another process may be doing the same. */
        size_t applied = 0;
        code = run(db, "BEGIN IMMEDIATE", error);
        if (code)
            break;
        code = run(db,
                   "CREATE TABLE IF NOT EXISTS schema_migrations (version INTEGER PRIMARY KEY, name TEXT NOT "
                   "NULL, checksum TEXT NOT NULL, applied_at INTEGER NOT NULL)",
                   error);
        if (!code)
            code = compare(db, list, count, &applied, error);
        if (!code && applied < count)
            code = apply_one(db, &list[applied], error);
        if (!code)
            code = run(db, "COMMIT", error);
        if (code && !sqlite3_get_autocommit(db))
            sqlite3_exec(db, "ROLLBACK", NULL, NULL, NULL);
        current = applied + 1 >= count;
    }
    return code;
}
