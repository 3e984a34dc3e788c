/* store.h: everything the daemon must remember, in one SQLite file (WAL, foreign keys on, synchronous=FULL).
 *
 * Threads. All SQL runs on the store's own two threads: a writer, which takes whatever is queued into one
 * transaction (group commit: a callback with code 0 means the row survives a power cut), and a reader on a
 * connection of its own. Every function here is called on the loop's thread, copies what it is given, and
 * returns at once; callbacks run later on the loop's thread, writes' in the order of their calls and reads'
 * in the order of theirs. A NULL callback means: nobody waits (events, metrics). Requests that are still
 * queued at store_close are done, and their callbacks called, before it returns.
 *
 * A statement that fails takes nothing else of its group with it. After a full disk or an I/O error the store
 * goes on: what could not be written was reported to whoever asked. At most 64 MiB wait in a queue: then
 * requests are refused with ERROR_BUSY, whose callbacks may overtake those of requests that are under way.
 * Only where there is no memory to remember a request at all is its callback called (ERROR_NO_MEMORY) before
 * the function returns.
 *
 * <sqlite3.h> is included by the store's and the migrations' files alone. */
#ifndef DAEMON_STORE_H
#define DAEMON_STORE_H

#include "api/requests.h"
#include "api/resources.h"
#include "base/error.h"

#include <uv.h>

struct store;

/* Opens or creates FOLDER/adderd.db, applies the migrations compiled into the binary in order, each in its
 * transaction; ERROR_UNSUPPORTED when the file is newer than the binary. Blocking; before the loop runs.
 * With a loop it is a daemon's: FOLDER/adderd.lock is held, and ERROR_BUSY says who else holds it. With loop
 * NULL it works beside a running daemon, and only the blocking functions at the end may be called. */
int store_open(const char *folder, uv_loop_t *loop, struct store **ret_store, struct error *error);
/* NULL is fine. The loop must run once more afterwards (a handle closes). While requests are under way the
 * store keeps its loop alive, otherwise it does not. */
void store_close(struct store *store);
/* Called on the loop's thread for every transaction that committed: how long it took, how many requests it
 * made durable. One observer; NULL for none. */
typedef void (*store_commit_observer)(void *arg, double seconds, int64_t requests);
void store_observe_commits(struct store *store, store_commit_observer observer, void *arg);

/* error is NULL when code is 0. ERROR_NOT_FOUND: no such row. ERROR_IO: the disk is full, say. */
typedef void (*store_written)(void *arg, int code, const struct error *error);

/* The answer to a POST with an Idempotency-Key, kept for 24 hours. A row that such a POST makes commits together with
 * it, so that the POST, said again after a crash, makes no second one. */
struct kept_answer {
    const char *scope, *key, *body_hash; /* scope: key id and path; body_hash: of the request's body */
    int status;
    const char *body;
};

/* ---- files ---- */
/* answer may be NULL. */
void store_file_insert(struct store *store, const struct file_resource *file,
                       const struct kept_answer *answer, store_written done, void *arg);
/* Refused with ERROR_BUSY while a job that has not ended names it. */
void store_file_delete(struct store *store, const char *id, store_written done, void *arg);
/* file is NULL when code is not 0; valid during the call. */
typedef void (*store_file_read)(void *arg, int code, const struct file_resource *file);
void store_file_get(struct store *store, const char *id, store_file_read done, void *arg);
/* items: [count], valid during the call. ERROR_NOT_FOUND when query->after names no row. */
typedef void (*store_files_read)(void *arg, int code, const struct file_resource *items, size_t count,
                                 bool has_more);
void store_file_list(struct store *store, const struct list_query *query, store_files_read done, void *arg);
/* Files whose expires_at has passed, at most 1000 at a time, without those that an open job names. */
void store_file_expired(struct store *store, int64_t now, store_files_read done, void *arg);

/* ---- jobs ---- */
/* Its files must exist in the same transaction: ERROR_NOT_FOUND otherwise, with param. answer may be NULL. */
void store_job_insert(struct store *store, const struct job_resource *job, const struct kept_answer *answer,
                      store_written done, void *arg);
/* Writes the whole row, except what never changes (id, created_at). A job that has ended never changes again:
 * ERROR_INVALID. queue_position is not kept: it reads as -1. */
void store_job_update(struct store *store, const struct job_resource *job, store_written done, void *arg);
typedef void (*store_job_read)(void *arg, int code, const struct job_resource *job);
void store_job_get(struct store *store, const char *id, store_job_read done, void *arg);
typedef void (*store_jobs_read)(void *arg, int code, const struct job_resource *items, size_t count,
                                bool has_more);
void store_job_list(struct store *store, const struct list_query *query, store_jobs_read done, void *arg);

/* The end of a job in one transaction: its row (job->status is final), its adapter's row (when model is not
 * NULL), its result file's row (when result_file is not NULL) and its closing event (level "error" for a failed
 * job). Its resume point is forgotten. Saying the same end again changes nothing and is no error; another end is
 * ERROR_INVALID. */
struct adapter_row {
    struct model_resource model;
    char path[4096];    /* folder with the adapter, or a full model */
    char job[ID_BYTES]; /* the job that made it */
    int64_t step;       /* of a checkpoint; -1 for a final adapter */
    bool full;          /* a full fine-tune's model folder */
};
/* closing: the event as it is stored; NULL where code is not 0, or this end had been said before. */
typedef void (*store_job_finished)(void *arg, int code, const struct error *error,
                                   const struct event_resource *closing);
void store_job_finish(struct store *store, const struct job_resource *job, const struct adapter_row *model,
                      const struct file_resource *result_file, const char *message, store_job_finished done,
                      void *arg);

/* ---- events ---- */
/* Appends, and hands the stored event (its sequence set) to the callback once it is durable. A metrics event
 * carries its step; a second one of the same job and step (a resumed run saying it again) replaces nothing
 * and is dropped: then event is NULL and code 0. */
typedef void (*store_event_written)(void *arg, int code, const struct event_resource *event);
void store_event_append(struct store *store, const char *job, const char *level, const char *type,
                        const char *message, const char *data, int64_t step, store_event_written done,
                        void *arg);
typedef void (*store_events_read)(void *arg, int code, const struct event_resource *items, size_t count,
                                  bool has_more);
/* query->after is an event id of that job. A job that does not exist has no events: code 0, count 0. */
void store_event_list(struct store *store, const char *job, const struct list_query *query,
                      store_events_read done, void *arg);
/* Every metrics event of a job, in step order: for its result file. */
void store_metrics_list(struct store *store, const char *job, store_events_read done, void *arg);

/* ---- checkpoints and models ---- */
/* The checkpoint's row and its model's row together. Replaces an earlier one of the same job and step. */
void store_checkpoint_insert(struct store *store, const struct checkpoint_resource *checkpoint,
                             const struct adapter_row *model, store_written done, void *arg);
/* A checkpoint that only resumes (pause, shutdown): where the job goes on from. */
void store_resume_point_set(struct store *store, const char *job, int64_t step, const char *path,
                            store_written done, void *arg);
typedef void (*store_checkpoints_read)(void *arg, int code, const struct checkpoint_resource *items,
                                       size_t count, bool has_more);
void store_checkpoint_list(struct store *store, const char *job, const struct list_query *query,
                           store_checkpoints_read done, void *arg);
/* Forget a job's checkpoints that keep_checkpoints no longer covers (model rows too). */
void store_checkpoint_delete(struct store *store, const char *job, int64_t step, store_written done,
                             void *arg);
/* A model's row by itself; in the place of an earlier one of that id. */
void store_model_insert(struct store *store, const struct adapter_row *model, store_written done, void *arg);
/* A checkpoint's row goes with its model's. */
void store_model_delete(struct store *store, const char *id, store_written done, void *arg);

/* ---- evaluations: jobs of that kind, and their results ---- */
struct evaluation_row {
    int64_t document;
    bool acc, acc_norm;
    double log_likelihood;
    char *detail; /* JSON text */
};
/* One batch of an evaluation's unit: its examples (one that is there already stays as it is), and its tokens and seconds, which
 * are added to what the unit has. rows, and what they own, are taken over. */
void store_evaluation_insert(struct store *store, const char *evaluation,
                             const struct evaluation_unit_resource *unit, struct evaluation_row *rows,
                             size_t count, store_written done, void *arg);
/* In the order in which they began. Valid during the call. */
typedef void (*store_units_read)(void *arg, int code, const struct evaluation_unit_resource *items,
                                 size_t count);
void store_evaluation_units(struct store *store, const char *evaluation, store_units_read done, void *arg);
/* Which documents are scored: {MODEL: {"PRECISION/TASK/SHOTS": [[first,last]...]}}, JSON text, valid during the call. */
typedef void (*store_scored_read)(void *arg, int code, const char *scored);
void store_evaluation_scored(struct store *store, const char *evaluation, store_scored_read done, void *arg);
/* Examples as they were scored, behind `after` (0 = from the first), at most `limit`. */
struct evaluation_example {
    int64_t sequence;
    struct evaluation_unit_resource unit; /* its names alone */
    char *detail;
};
typedef void (*store_examples_read)(void *arg, int code, const struct evaluation_example *items, size_t count,
                                    bool has_more);
void store_evaluation_examples(struct store *store, const char *evaluation, int64_t after, int64_t limit,
                               store_examples_read done, void *arg);

/* ---- idempotency ---- */
/* The answer that a POST with this key got before; the first one put stands. */
typedef void (*store_answer_read)(void *arg, int code, int status, const char *body_hash, const char *body);
void store_answer_get(struct store *store, const char *scope, const char *key, store_answer_read done,
                      void *arg);
/* Of a POST that made no row. */
void store_answer_put(struct store *store, const struct kept_answer *answer, store_written done, void *arg);

/* ---- keys ---- */
struct key_row {
    char id[ID_BYTES]; /* "key-..." */
    char name[128];
    char hash[65]; /* BLAKE2b-256 of the token, hex (libsodium's crypto_generichash) */
    int64_t created_at, revoked_at, last_used_at; /* 0 = not, never */
};
/* All keys, revoked ones too, oldest first: `adderd keys` may have changed them beside the daemon, so the
 * server asks every second or two and hands them to auth_reload. */
typedef void (*store_keys_read)(void *arg, int code, const struct key_row *items, size_t count);
void store_key_list(struct store *store, store_keys_read done, void *arg);
/* Nobody waits for this. */
void store_key_used(struct store *store, const char *id, int64_t now);

/* ---- start-up, and the `keys` command: blocking, before the loop runs ---- */
/* *ret_items: free() it (NULL when there are none). Jobs that have not ended, oldest first, with what is
 * needed to go on. */
struct job_recovery {
    struct job_resource job; /* job_free */
    char resume_from[4096];  /* newest checkpoint's folder, "" = from the start */
    int64_t resume_step;
};
int store_load_unfinished(struct store *store, struct job_recovery **ret_items, size_t *ret_count,
                          struct error *error);
int store_load_models(struct store *store, struct adapter_row **ret_items, size_t *ret_count,
                      struct error *error);
int store_load_keys(struct store *store, struct key_row **ret_items, size_t *ret_count, struct error *error);
/* Live keys have distinct names: ERROR_INVALID. */
int store_key_insert(struct store *store, const struct key_row *key, struct error *error);
/* ERROR_NOT_FOUND when no live key has this id or name. */
int store_key_revoke(struct store *store, const char *id_or_name, int64_t now, struct error *error);
/* The ids of all files, or of all jobs, in the order of strcmp. *ret_ids: free() it. */
enum store_table { STORE_FILES, STORE_JOBS };
int store_load_ids(struct store *store, enum store_table table, char (**ret_ids)[ID_BYTES], size_t *ret_count,
                   struct error *error);
/* Jobs that exist by status, for the metrics at start. */
int store_count_jobs(struct store *store, int64_t ret_counts[JOB_STATUS_COUNT], struct error *error);

/* A new unique id: PREFIX ("file-") and 24 characters of base62 from the kernel's random source. */
void store_new_id(const char *prefix, char ret_id[ID_BYTES]);

#endif
