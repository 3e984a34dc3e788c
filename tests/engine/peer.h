/* peer.h: a worker in a process of its own, and the daemon's end of the stream to it: what the worker's tests share. */
#ifndef TESTS_ENGINE_PEER_H
#define TESTS_ENGINE_PEER_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/protocol.h"
#include "kernels/kernels.h"

#include <stdbool.h>
#include <sys/types.h>

struct peer {
    int fd;
    pid_t pid;
    struct buffer in;
};

/* hatchling's, and one of this program's own that goes with it. */
extern char model_folder[4096], work_folder[64];
int peer_setup(void **state);
int peer_teardown(void **state);
/* A file there. */
void write_work_file(const char *name, const char *text, char path[128]);

/* A worker of that device; ops: NULL for the device's own. */
void peer_fork(struct peer *peer, const char *device, const struct kernel_ops *ops);
/* One of the CPU that has said HELLO and is configured, its heartbeat so rare that an answer which waited for it would be
 * missed. */
void peer_start_on(struct peer *peer, const struct kernel_ops *ops);
void peer_start(struct peer *peer);
/* Wait for the process; its exit status, or 128 + signal. */
int peer_wait(struct peer *peer);
/* By SHUTDOWN. */
void peer_stop(struct peer *peer);

void peer_send(struct peer *peer, enum frame_type type, uint64_t id, json_t *payload);
/* The next frame, STATUS too. The caller drops its payload. */
struct frame peer_receive_any(struct peer *peer);
/* But STATUS. */
struct frame peer_receive(struct peer *peer);
/* The next frame, which must be of this type and id. */
json_t *peer_expect(struct peer *peer, enum frame_type type, uint64_t id);
void expect_failed(struct peer *peer, uint64_t id, const char *code, const char *param);
/* All text of one completion, to be freed. */
char *peer_completion(struct peer *peer, uint64_t id, json_t *payload, int *ret_chunks);

const char *text_of(const json_t *payload, const char *key);
int64_t integer_of(const json_t *payload, const char *key);
json_t *folder_json(const char *id, const char *path);
json_t *model_json(void);
json_t *complete_json(const char *prompt, int max_tokens, bool stream);

/* ---- jobs ---- */

enum { EXAMPLES = 12, STEPS = 8 };

/* Training data of so many examples, into the work folder. */
void write_examples(const char *name, char path[128]);
/* What JOB_VALIDATE and JOB_START say of a job of so many steps. */
json_t *job_json(const char *job, const char *training_file);
json_t *start_json(const char *job, const char *training_file, const char *resume_from);

/* What a job reported until it ended. */
struct job_report {
    double losses[STEPS + 1]; /* by step */
    int n_metrics, n_checkpoints, n_dropped, n_chunks, n_done;
    char checkpoint[256]; /* the newest */
    bool resumable_only;  /* of it */
    char status[32], folder[256];
    bool resumable;
    int64_t step;
};

/* Take one frame in. Returns false after JOB_ENDED. */
bool job_report_add(struct job_report *report, const struct frame *frame, const char *job);
/* All until then. */
void job_report_read(struct job_report *report, struct peer *peer, const char *job);

#endif
