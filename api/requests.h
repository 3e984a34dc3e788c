/* requests.h: what clients send, decoded strictly into structs. Pure: no I/O, no look-ups of files or models.
 *
 * Decoders return 0, or -1 with *problem filled (400 unless said otherwise), naming the field at fault and,
 * for a value out of range, the range. They free what they allocated on failure. */
#ifndef API_REQUESTS_H
#define API_REQUESTS_H

#include "api/problem.h"
#include "api/resources.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Parse a body into an object: duplicate keys, NUL in strings, depth over 64 and non-objects are refused with
 * line and column. */
int body_decode(const char *body, size_t length, json_t **ret_object, struct problem *problem);

/* ---- list queries ---- */
struct list_query {
    char after[MODEL_ID_BYTES]; /* "" = from the start */
    int64_t limit;              /* 1..100 for jobs, events, checkpoints; 1..10000 for files */
    bool ascending;
    char purpose[32];       /* files; "" = any */
    enum job_kind job_kind; /* jobs */
    json_t *metadata;       /* jobs: wanted pairs (metadata[k]=v), or NULL; json_decref */
    bool stream;            /* events */
};
/* value(arg, key) gives one query argument or NULL. Each kind has OpenAI's default limit (jobs and events 20,
 * checkpoints 10, files 10000) and order (newest first). */
enum list_kind { LIST_FILES, LIST_JOBS, LIST_EVALUATIONS, LIST_EVENTS, LIST_CHECKPOINTS };
struct query_argument {
    const char *key, *value;
};
int list_query_decode(enum list_kind kind, const struct query_argument *arguments, size_t count,
                      struct list_query *ret_query, struct problem *problem);

/* ---- fine-tuning jobs ---- */
struct job_request {
    char model[MODEL_ID_BYTES];
    char training_file[ID_BYTES], validation_file[ID_BYTES];
    char suffix[65];
    bool has_seed;
    uint64_t seed;
    json_t *metadata;        /* object or NULL: at most 16 pairs, keys of 64, values of 512 characters */
    json_t *hyperparameters; /* object: every key of API.md, checked and resolved, but for precision "auto" */
    /* NULL, or {"settings": an evaluation's, without models,"seed","at": ["checkpoints","end"] or one of them,"keep_best":
     * {"task","metric","num_fewshot"}|null} */
    json_t *evaluations;
};
/* method.supervised.hyperparameters, the top-level hyperparameters (older clients), and our own keys beside
 * either are merged; a key given twice with different values, and an unknown one, is refused by name. */
int job_request_decode(const json_t *body, struct job_request *ret_request, struct problem *problem);
void job_request_free(struct job_request *request);

/* ---- evaluations ---- */
enum { EVALUATION_MAX_MODELS = 64, EVALUATION_MAX_TASKS = 256, EVALUATION_MAX_SHOT_COUNTS = 16 };
struct evaluation_request {
    json_t *metadata;      /* as a job's */
    char parent[ID_BYTES]; /* the fine-tuning job that names it, or "" */
    uint64_t seed;
    /* {"models": [id...],"tasks": [name or file id...],"num_fewshot": [n...],"limit": n|null,"max_length": n|null,
     * "share": bool,"precisions": [name...]}, all there */
    json_t *settings;
};
/* model and models, num_fewshot: one or a list. */
int evaluation_request_decode(const json_t *body, struct evaluation_request *ret_request,
                              struct problem *problem);
void evaluation_request_free(struct evaluation_request *request);

/* ---- files ---- */
/* Checks one multipart upload's fields once they are all known. now: seconds since 1970. */
int file_fields_check(const char *purpose, const char *filename, const char *expires_anchor,
                      const char *expires_seconds, int64_t now, struct file_resource *ret_file,
                      struct problem *problem);

/* ---- completions ---- */
struct completion_request {
    bool chat;
    char model[MODEL_ID_BYTES];   /* "" = the default model */
    char adapter[MODEL_ID_BYTES]; /* "" = none named */
    bool stream, include_usage;
    int64_t n_prompts, n; /* choices = n_prompts * n */
    bool echo, has_logprobs;
    json_t *work; /* the COMPLETE frame's payload except "model" and "adapter": see the worker protocol */
};
/* Limits of the server that requests are checked against. */
struct completion_limits {
    int64_t max_prompts, max_choices, max_tokens, max_stop;
};
int completion_request_decode(const json_t *body, bool chat, const struct completion_limits *limits,
                              struct completion_request *ret_request, struct problem *problem);
void completion_request_free(struct completion_request *request);

/* ---- tokenizer ---- */
struct tokenize_request {
    char model[MODEL_ID_BYTES]; /* "" = default */
    const char *text;           /* inside body */
    size_t length;
    bool add_special_tokens;
};
int tokenize_request_decode(const json_t *body, struct tokenize_request *ret_request,
                            struct problem *problem);
struct detokenize_request {
    char model[MODEL_ID_BYTES];
    const json_t *tokens; /* array of ints inside body */
};
int detokenize_request_decode(const json_t *body, struct detokenize_request *ret_request,
                              struct problem *problem);

#endif
