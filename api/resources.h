/* resources.h: the resources as plain structs (what the store keeps) and their JSON (what clients read).
 * Pure.
 *
 * Encoders return a new json_t reference, NULL when out of memory. Strings in the structs are owned by
 * whoever filled them unless a comment says otherwise; "" means null where the contract allows null. */
#ifndef API_RESOURCES_H
#define API_RESOURCES_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

enum { ID_BYTES = 64, MODEL_ID_BYTES = 256, FILENAME_BYTES = 256 };

/* ---- files ---- */
struct file_resource {
    char id[ID_BYTES];                     /* "file-..." */
    int64_t bytes, created_at, expires_at; /* expires_at 0 = never */
    char filename[FILENAME_BYTES];
    char purpose[32];
    char status[16]; /* uploaded | processed | error */
    char status_details[256];
    char sha256[65]; /* not shown to clients */
};
json_t *file_encode(const struct file_resource *file);

/* ---- jobs ---- */
enum job_status {
    JOB_VALIDATING,
    JOB_QUEUED,
    JOB_RUNNING,
    JOB_PAUSED,
    JOB_SUCCEEDED,
    JOB_FAILED,
    JOB_CANCELLED
};
enum { JOB_STATUS_COUNT = JOB_CANCELLED + 1 };
const char *job_status_name(enum job_status status); /* "validating_files" ... */
int job_status_from_name(const char *name);          /* -1 when unknown */
bool job_status_is_final(enum job_status status);

enum job_kind { JOB_FINE_TUNING, JOB_EVALUATION };
const char *job_kind_name(enum job_kind kind); /* "fine_tuning", "evaluation" */

/* A fine-tuning job or an evaluation. Of an evaluation: `model` is the first one, `hyperparameters` is what it evaluates
 * (api/requests.h's evaluation_request), steps are examples; files, loss and names of models stay empty. */
struct job_resource {
    enum job_kind kind;
    char id[ID_BYTES];                           /* "ftjob-...", "eval-..." */
    int64_t created_at, started_at, finished_at; /* 0 -> null */
    char model[MODEL_ID_BYTES];                  /* the base */
    char fine_tuned_model[MODEL_ID_BYTES];
    char suffix[65];
    enum job_status status;
    char training_file[ID_BYTES], validation_file[ID_BYTES], result_file[ID_BYTES];
    uint64_t seed;
    char *hyperparameters; /* JSON object text, every value resolved; owned, freed by job_free */
    char *metadata;        /* JSON object text or NULL; owned */
    char parent[ID_BYTES]; /* of an evaluation: the fine-tuning job that named it, or "" */
    /* Of a fine-tuning job: the evaluations it names (api/requests.h's job_request), and those that were made of them so far, a
     * JSON array of {"id","model"}; each NULL where there are none; owned. */
    char *evaluations, *evaluation_jobs;
    int64_t trained_tokens; /* -1 -> null */
    char error_code[64], error_param[64], error_message[4096];
    int64_t attempt; /* how often a worker was given it */
    /* progress, of the last metrics */
    int64_t step, total_steps;                       /* total_steps 0 = not known yet */
    double tokens_per_second, loss, eta_seconds;     /* NaN -> null */
    int64_t planned_memory_bytes, peak_memory_bytes; /* 0 -> null */
    double bytes_per_token;
    int64_t skipped_steps;  /* left out because a 16-bit gradient overflowed */
    int64_t queue_position; /* -1 -> null; 0 = next */
    char device[32];
};
void job_free(struct job_resource *job); /* what it owns, not the struct */
/* organization: organization_id. now (seconds since 1970) plus the job's ETA is its estimated_finish. */
json_t *job_encode(const struct job_resource *job, const char *organization, int64_t now);

struct event_resource {
    int64_t sequence;   /* grows with time, unique in the daemon; the id is "ftevent-SEQUENCE" */
    char job[ID_BYTES]; /* "eval-..." = an evaluation's */
    int64_t created_at;
    char level[8]; /* info | warn | error */
    char type[8];  /* message | metrics */
    char *message; /* owned */
    char *data;    /* JSON object text or NULL; owned */
};
void event_free(struct event_resource *event);
json_t *event_encode(const struct event_resource *event);

struct checkpoint_resource {
    char id[ID_BYTES]; /* "ftckpt-..." */
    char job[ID_BYTES];
    int64_t created_at, step;
    char model[MODEL_ID_BYTES];                                    /* fine_tuned_model_checkpoint */
    double train_loss, train_accuracy, valid_loss, valid_accuracy; /* NaN -> null */
};
json_t *checkpoint_encode(const struct checkpoint_resource *checkpoint);

/* ---- evaluations ---- */
/* A model on a task at a number of shots, and its sums over the examples scored so far. */
struct evaluation_unit_resource {
    char model[MODEL_ID_BYTES];
    char precision[16];
    char task[128], parent[64], group[64]; /* parent: the definition's task; group: a subtask's, or "" */
    int64_t num_fewshot;
    char metrics[64]; /* names with a space between: acc, acc_norm, perplexity */
    char pool[256];   /* the file that examples came from, or "" */
    int64_t tokens, tokens_run;
    double seconds;
    int64_t n, acc, acc_norm;                      /* examples, right ones, right ones by length */
    double log_likelihood, log_likelihood_squared; /* sums */
};
/* The resource. units may be NULL: then "results" is null. */
json_t *evaluation_encode(const struct job_resource *job, const struct evaluation_unit_resource *units,
                          size_t count, int64_t now);
/* Its results alone: a list, whole tasks before their subtasks. */
json_t *evaluation_results_encode(const struct evaluation_unit_resource *units, size_t count);
/* The paper's table (evaluation_report.c says what is in it). */
json_t *evaluation_report_encode(const struct job_resource *job, const struct evaluation_unit_resource *units,
                                 size_t count);

/* ---- models ---- */
struct model_resource {
    char id[MODEL_ID_BYTES];
    int64_t created;
    char owned_by[64];
    char root[MODEL_ID_BYTES];   /* the base's id (a base's is its own) */
    char parent[MODEL_ID_BYTES]; /* "" -> null for a base */
};
json_t *model_encode(const struct model_resource *model);

/* ---- lists ---- */
/* {"object":"list","data","first_id","last_id","has_more"}; data is stolen. Ids are read from the elements'
 * "id". */
json_t *list_encode(json_t *data, bool has_more);
/* {"id","object","deleted":true} */
json_t *deleted_encode(const char *id, const char *object);

#endif
