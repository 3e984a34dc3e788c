/* migrations.h: the database's schema, as numbered SQL texts that are applied once each, in order.
 *
 * The texts of migrations/NNNN_name.sql are compiled into the binary. The table schema_migrations says which
 * of them a file has had, with a hash of each text: a file that a newer binary has written, or whose texts
 * are not this binary's, is refused rather than guessed at. Each text and its row commit together, so that a
 * crash leaves it applied or not. Blocking; any thread that owns the connection. */
#ifndef DAEMON_MIGRATIONS_H
#define DAEMON_MIGRATIONS_H

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>

struct sqlite3;

struct migration {
    int version; /* 1, 2, 3 ... */
    const char *name;
    const char *sql;
};
extern const struct migration migrations_compiled[];
extern const size_t migrations_compiled_count;

/* Is this exactly the schema that the list makes? Takes no write lock when it is. ERROR_UNSUPPORTED: the file
 * is newer; ERROR_CORRUPT: an applied text differs, or the file is no database. */
int migrations_check(struct sqlite3 *db, const struct migration *list, size_t count, bool *ret_current,
                     struct error *error);
/* Apply what is missing. The same errors, and ERROR_IO with what SQLite said. */
int migrations_apply(struct sqlite3 *db, const struct migration *list, size_t count, struct error *error);

#endif
