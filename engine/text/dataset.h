/* dataset.h: training files into token sequences with loss masks, and those into ragged batches.
 *
 * Every line of a JSONL file is one example, one form per file (API.md): {"prompt","completion"},
 * {"messages"},
 * {"instruction","input","output"}, {"text"}. Loss falls on completions (assistant turns) alone, for "text"
 * on all; the end of text token closes every example and bears loss. Examples are kept as ids in one array;
 * nothing is padded, ever. */
#ifndef ENGINE_TEXT_DATASET_H
#define ENGINE_TEXT_DATASET_H

#include "base/error.h"
#include "engine/text/tokenizer.h"

#include <stdbool.h>
#include <stdint.h>

enum dataset_form { DATASET_UNKNOWN, DATASET_PROMPT, DATASET_MESSAGES, DATASET_INSTRUCTION, DATASET_TEXT };

enum { DATASET_LISTED_ERRORS = 20 };

struct dataset_line_error {
    int64_t line; /* 1 for the first */
    char reason[200];
};

struct dataset_options {
    int64_t max_seq_len; /* tokens of one example, its end of text included */
    bool truncate;       /* cut longer examples; otherwise they are errors that say which line and how long */
    bool split_text; /* "text" examples longer than max_seq_len are split into several (used with packing) */
    int32_t eos_id;  /* closes an example; -1 = none */
    const char *chat_template; /* "alpaca", "chatml", NULL = plain "role: content" lines; for messages and
                                  instruction */
};

struct dataset {
    enum dataset_form form;
    int64_t n_examples;
    int64_t n_tokens;
    int64_t n_loss_tokens; /* tokens that are predicted under the loss */
    int64_t *starts;       /* [n_examples+1] into ids */
    int32_t *ids;          /* [n_tokens] */
    uint8_t *loss;         /* [n_tokens] 1 = this token is a target */
    int64_t n_line_errors; /* all of them; the first DATASET_LISTED_ERRORS are listed */
    struct dataset_line_error line_errors[DATASET_LISTED_ERRORS];
};

/* Read and tokenize. Returns 0; ERROR_INVALID when a line is bad, the set is empty or holds no loss token
 * (then *ret_dataset is still set, so that the caller can list line_errors; free it); ERROR_IO,
 * ERROR_NO_MEMORY otherwise (not set). */
int dataset_load(const char *path, const struct tokenizer *tokenizer, const struct dataset_options *options,
                 struct dataset **ret_dataset, struct error *error);
void dataset_free(struct dataset *dataset);

/* The prompt text of a chat, ending where the assistant is to speak. messages: role/content pairs. */
struct chat_message {
    const char *role;
    const char *content;
};
int chat_render(const char *chat_template, const struct chat_message *messages, size_t n_messages,
                struct buffer *prompt, struct error *error);

/* ---- batches ---- */

/* A ragged micro-batch. targets[t] is the id to predict at position t (the next token of the same example),
 * or -100. */
struct batch {
    int64_t n_tokens;
    int32_t n_seqs;
    int64_t n_targets;   /* how many targets count */
    int32_t *ids;        /* [capacity] */
    int32_t *targets;    /* [capacity] */
    int32_t *seq_starts; /* [max_seqs+1] */
    int64_t capacity;    /* tokens */
    int32_t max_seqs;
};
int batch_create(int64_t capacity, int32_t max_seqs, struct batch **ret_batch);
void batch_free(struct batch *batch);

/* Where training is in the data; written into checkpoints as it is. Zeroed = the start. */
struct data_cursor {
    int64_t epoch;    /* 0 for the first */
    int64_t position; /* examples of this epoch's order already used */
};

/* How many micro-batches one epoch has: ceil(rows / batch_size); with packing, rows are bins of at most
 * max_seq_len tokens filled with whole examples in the epoch's order (first fit over a short window would
 * change the order: next fit). */
int64_t dataset_batches_per_epoch(const struct dataset *dataset, uint64_t seed, int64_t epoch,
                                  int32_t batch_size, bool packing, int64_t max_seq_len);
/* Fill batch with the next batch_size rows (one example each, or a packed bin each; the last of an epoch may
 * be smaller; never across epochs) and advance the cursor. The order of an epoch is a Fisher-Yates shuffle
 * drawn from philox(seed, epoch): the same on every machine. shuffle = false keeps file order (validation).
 */
int dataset_next_batch(const struct dataset *dataset, uint64_t seed, bool shuffle, int32_t batch_size,
                       bool packing, int64_t max_seq_len, struct data_cursor *cursor, struct batch *batch,
                       struct error *error);

#endif
