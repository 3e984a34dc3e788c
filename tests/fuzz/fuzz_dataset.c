/* fuzz_dataset.c: the input is a JSONL file; its size chooses the options. */
#include "fuzz.h"

#include "engine/text/dataset.h"
#include "engine/text/unicode.h"

#include <string.h>

/* One epoch must give every example and every target once. */
static void walk(struct dataset *dataset, bool packing, int64_t max_seq_len)
{
    int64_t tokens, n_tokens = 0, n_targets = 0, n_seqs = 0, n_batches = 0;
    int32_t seqs;
    struct batch *batch = NULL;
    struct data_cursor cursor = {0};
    FUZZ_CHECK(dataset_batch_limits(dataset, 3, packing, max_seq_len, &tokens, &seqs, NULL) == 0);
    FUZZ_CHECK(batch_create(tokens, seqs, &batch) == 0);
    for (; cursor.epoch == 0; n_batches++) {
        FUZZ_CHECK(dataset_next_batch(dataset, 1, true, 3, packing, max_seq_len, &cursor, batch, NULL) == 0);
        FUZZ_CHECK(batch->n_targets > 0);
        n_tokens += batch->n_tokens;
        n_targets += batch->n_targets;
        n_seqs += batch->n_seqs;
    }
    FUZZ_CHECK(n_tokens == dataset->n_tokens && n_targets == dataset->n_loss_tokens);
    FUZZ_CHECK(n_seqs == dataset->n_examples);
    FUZZ_CHECK(n_batches == dataset_batches_per_epoch(dataset, 1, true, 0, 3, packing, max_seq_len));
    batch_free(batch);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct tokenizer *tokenizer;
    static const char *const templates[] = {NULL, "alpaca", "chatml", "plain"};
    if (!tokenizer)
        FUZZ_CHECK(tokenizer_load(fuzz_source("models/hatchling"), &tokenizer, NULL) == 0);
    struct dataset_options options = {.max_seq_len = 2 + (int64_t)(size % 61),
                                      .truncate = size & 1,
                                      .split_text = size & 2,
                                      .eos_id = size & 4 ? -1 : 0,
                                      .chat_template = templates[size / 8 % 4]};
    struct dataset *dataset = NULL;
    struct error error = {0};
    char path[32];
    int fd = fuzz_file(data, size, path);
    int status = dataset_load(path, tokenizer, &options, &dataset, &error);
    close(fd);
    FUZZ_CHECK(status == 0 || (status == ERROR_INVALID && error.message[0]));
    FUZZ_CHECK(dataset && (status != 0) == (dataset->n_line_errors > 0 || dataset->n_examples == 0));
    for (int64_t i = 0; i < dataset->n_line_errors && i < DATASET_LISTED_ERRORS; i++) {
        const char *reason = dataset->line_errors[i].reason;
        FUZZ_CHECK(reason[0] && utf8_valid_prefix(reason, strlen(reason)) == strlen(reason));
    }
    for (int64_t i = 0; i < dataset->n_examples; i++) {
        int64_t length = dataset->starts[i + 1] - dataset->starts[i];
        FUZZ_CHECK(length >= 2 && length <= options.max_seq_len);
    }
    if (dataset->n_examples > 0) {
        walk(dataset, false, options.max_seq_len);
        walk(dataset, true, options.max_seq_len);
    }
    dataset_free(dataset);
    return 0;
}
