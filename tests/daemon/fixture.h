/* fixture.h: what the store's tests share: a folder, a loop and an open store for each test. */
#ifndef TESTS_DAEMON_FIXTURE_H
#define TESTS_DAEMON_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "daemon/store.h"

struct fixture {
    char folder[64], database[96];
    uv_loop_t loop;
    struct store *store;
    int64_t commits, committed; /* transactions, and requests in them */
};

/* A new folder under TMPDIR. */
void make_folder(char folder[64]);
int fixture_setup(void **state);
int fixture_teardown(void **state);
/* Close the store and open it again, as a restart does. */
void fixture_reopen(struct fixture *fixture);
/* Run the loop until every request so far is answered. */
void fixture_run(struct fixture *fixture);

/* A store_written that keeps what it was told; arg: a struct told. */
struct told {
    int calls, code;
    struct error error;
};
void tell(void *arg, int code, const struct error *error);

/* Rows with everything that is needed set. */
struct file_resource make_file(const char *id);
struct job_resource make_job(const char *id);
struct adapter_row make_model(const char *id, const char *job, int64_t step);
/* Insert and wait; the code. make_job's training file is inserted when it is missing. */
int insert_file(struct fixture *fixture, const char *id);
int insert_job(struct fixture *fixture, const char *id);

#endif
