/* dataset.h: training files into token sequences with loss masks, and those into ragged batches.
 *
 * A training file is JSONL: every line one JSON object, one example, all lines of one form (API.md):
 *   {"prompt","completion"}             taken as they are; loss on the completion
 *   {"messages": [{"role","content"}]}  rendered by the chat form (below); loss on the assistant's turns
 *   {"instruction","input","output"}    the same, as one user turn and its answer; "input" may be absent,
 *                                       null or ""
 *   {"text"}                            taken as it is; loss on all of it
 * Other keys of a line ("id", "category") are ignored, unless they change what should be learnt ("tools").
 * A byte order mark, CRLF and blank lines are tolerated. The end of text token closes every example and bears
 * loss. The first token of an example is never predicted. Examples are kept as ids in one array; nothing is
 * padded, ever.
 *
 * Context and completion are tokenized apart and put together, so what serves as a prompt is, token for
 * token, what training saw before the completion. Any thread may call; one thread at a time per dataset. */
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
    bool truncate;   /* cut longer examples at the end; otherwise they are errors that name line and length */
    bool split_text; /* "text" examples longer than max_seq_len are split into several (used with packing); a
                       piece begins with the last token of the one before, so every token is predicted once */
    int32_t eos_id;  /* closes an example; -1 = none */
    const char *chat_template; /* "alpaca", "chatml", NULL = plain "role: content" lines; for messages and
                                  instruction */
    void (*yield)(void *arg);  /* called every so often while a file is read; NULL = never */
    void *yield_arg;
};

struct dataset {
    enum dataset_form form;
    int64_t n_examples;
    int64_t n_tokens;
    int64_t n_loss_tokens; /* tokens that are predicted under the loss */
    int64_t *starts;       /* [n_examples+1] into ids */
    int32_t *ids;          /* [n_tokens] */
    uint8_t *loss;         /* [n_tokens] 1 = this token is a target */
    int64_t n_truncated;   /* examples that were cut */
    int64_t n_dropped;     /* of those, the ones left out: no token that bears loss remained */
    int64_t n_line_errors; /* all of them; the first DATASET_LISTED_ERRORS are listed */
    struct dataset_line_error line_errors[DATASET_LISTED_ERRORS];
    struct dataset_order *order; /* internal: the epoch's order, kept from call to call */
};

/* Read and tokenize. ERROR_INVALID when a line is bad, the set is empty, nothing bears loss or an option is
 * wrong (then *ret_dataset is still set, so that the caller can list line_errors; free it); ERROR_NOT_FOUND,
 * ERROR_IO, ERROR_NO_MEMORY otherwise (not set). */
int dataset_load(const char *path, const struct tokenizer *tokenizer, const struct dataset_options *options,
                 struct dataset **ret_dataset, struct error *error);
void dataset_free(struct dataset *dataset);

/* ---- chat forms ----
 *
 * The roles are system (or its newer name, developer), user and assistant. Contents lose white space at both
 * ends, in training and in serving alike. S, U, A: contents of a system message, a user's, an assistant's;
 * "|" stands between what chat_render gives and the reply, which alone bears loss.
 *
 * - plain: "system: S\nuser: U\nassistant:| A", a turn a line.
 *
 * - chatml:
 *   "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n|A<|im_end|>";
 *   "\n" follows before the next turn.
 *
 * - alpaca: "S\n\n### Instruction:\nU\n\n### Response:\n|A"; "\n\n" follows before the next turn. S, when no
 *   system message opens the chat: "Below is an instruction that describes a task. Write a response that
 *   appropriately completes the request." A non-empty "input" of the instruction form stands in a section
 *   "### Input:" after the instruction and S says so, as in the Alpaca data; the other forms append it to the
 *   instruction after "\n\n".
 *
 * The boundaries lie where the GPT-2 split always cuts, so encoding a prompt with earlier replies in one
 * piece gives the ids that training saw. */
struct chat_message {
    const char *role;
    const char *content;
};
/* The prompt text of a chat, ending where the assistant is to speak. chat_template: NULL or "" = plain.
 * ERROR_INVALID for an unknown template or role, or no messages. */
int chat_render(const char *chat_template, const struct chat_message *messages, size_t n_messages,
                struct buffer *prompt, struct error *error);
/* What a reply begins with that is the form's, not the content's: " " for plain, otherwise "". A server drops
 * it from the front of the text it generates. */
const char *chat_reply_lead(const char *chat_template);
/* The text that ends a reply, when the model goes on past it: a stop string for a server. */
const char *chat_reply_stop(const char *chat_template);

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
 * change the order: next fit). shuffle: as in dataset_next_batch. ERROR_NO_MEMORY. */
int64_t dataset_batches_per_epoch(struct dataset *dataset, uint64_t seed, bool shuffle, int64_t epoch,
                                  int32_t batch_size, bool packing, int64_t max_seq_len);
/* The tokens and sequences that no batch of any epoch exceeds: for batch_create and the memory plan. */
int dataset_batch_limits(const struct dataset *dataset, int32_t batch_size, bool packing, int64_t max_seq_len,
                         int64_t *ret_tokens, int32_t *ret_seqs, struct error *error);
/* Fill batch with the next batch_size rows (one example each, or a packed bin each; the last of an epoch may
 * be smaller; never across epochs) and advance the cursor; past the last batch of an epoch it is
 * {epoch + 1, 0}. The order of an epoch is a Fisher-Yates shuffle drawn from philox(seed, epoch): the same on
 * every machine. shuffle = false keeps file order (validation). ERROR_INVALID when the batch is too small for
 * it (see dataset_batch_limits) or the cursor lies outside the data. */
int dataset_next_batch(struct dataset *dataset, uint64_t seed, bool shuffle, int32_t batch_size, bool packing,
                       int64_t max_seq_len, struct data_cursor *cursor, struct batch *batch,
                       struct error *error);

#endif
