/* batch.c: epochs' orders and ragged batches. See dataset.h. One thread at a time per data set.
 *
 * Rows are made by walking an epoch's order from the cursor: without packing a row is one example, with
 * packing it takes examples until the next would not fit. As a row depends on nothing but where it begins,
 * the position among the examples is all that a checkpoint needs. */
#include "engine/text/dataset.h"

#include "kernels/kernels.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

enum { NOT_A_TARGET = -100 };

struct dataset_order {
    int64_t *index; /* [n_examples], valid for seed and epoch below */
    uint64_t seed;
    int64_t epoch; /* -1 = not drawn yet */
    /* How many packed rows the order named by these has; -1 = not counted yet. */
    int64_t rows, rows_max_seq_len, rows_epoch;
    uint64_t rows_seed;
    bool rows_shuffle;
};

void dataset_free(struct dataset *dataset)
{
    if (!dataset)
        return;
    if (dataset->order)
        free(dataset->order->index);
    free(dataset->order);
    free(dataset->starts);
    free(dataset->ids);
    free(dataset->loss);
    free(dataset);
}

int batch_create(int64_t capacity, int32_t max_seqs, struct batch **ret_batch)
{
    if (capacity < 1 || capacity > INT32_MAX || max_seqs < 1)
        return ERROR_INVALID;
    struct batch *batch = calloc(1, sizeof *batch);
    if (!batch)
        return ERROR_NO_MEMORY;
    batch->capacity = capacity;
    batch->max_seqs = max_seqs;
    batch->ids = calloc((size_t)capacity, sizeof *batch->ids);
    batch->targets = calloc((size_t)capacity, sizeof *batch->targets);
    batch->seq_starts = calloc((size_t)max_seqs + 1, sizeof *batch->seq_starts);
    if (!batch->ids || !batch->targets || !batch->seq_starts) {
        batch_free(batch);
        return ERROR_NO_MEMORY;
    }
    *ret_batch = batch;
    return 0;
}

void batch_free(struct batch *batch)
{
    if (!batch)
        return;
    free(batch->ids);
    free(batch->targets);
    free(batch->seq_starts);
    free(batch);
}

static int64_t length_of(const struct dataset *dataset, int64_t example)
{
    return dataset->starts[example + 1] - dataset->starts[example];
}

/* A whole number below `bound` (1 .. 2^32) from two draws' 32 best bits. */
static int64_t draw_below(uint64_t key, uint64_t counter, int64_t bound)
{
    uint64_t high = (uint64_t)(philox_uniform(key, 2 * counter) * 0x1p24f);
    uint64_t low = (uint64_t)(philox_uniform(key, 2 * counter + 1) * 0x1p24f);
    return (int64_t)(((high << 8 | low >> 16) * (uint64_t)bound) >> 32);
}

/* *ret_index: the examples of an epoch in order; NULL = as in the file. */
static int prepare_order(struct dataset *dataset, uint64_t seed, bool shuffle, int64_t epoch,
                         const int64_t **ret_index)
{
    struct dataset_order *order = dataset->order;
    if (!order) {
        order = malloc(sizeof *order);
        if (!order)
            return ERROR_NO_MEMORY;
        *order = (struct dataset_order){.epoch = -1, .rows = -1};
        dataset->order = order;
    }
    if (!shuffle) {
        *ret_index = NULL;
        return 0;
    }
    if (order->epoch != epoch || order->seed != seed) {
        int64_t n = dataset->n_examples;
        if (!order->index) {
            order->index = malloc((size_t)n * sizeof *order->index);
            if (!order->index)
                return ERROR_NO_MEMORY;
        }
        for (int64_t i = 0; i < n; i++)
            order->index[i] = i;
        uint64_t key = seed ^ ((uint64_t)epoch + 1) * 0x9E3779B97F4A7C15u;
        for (int64_t i = n - 1; i > 0; i--) {
            int64_t j = draw_below(key, (uint64_t)i, i + 1), other = order->index[j];
            order->index[j] = order->index[i];
            order->index[i] = other;
        }
        order->seed = seed;
        order->epoch = epoch;
    }
    *ret_index = order->index;
    return 0;
}

/* Where the row that begins at position ends; *ret_tokens: how long it is. */
static int64_t row_end(const struct dataset *dataset, const int64_t *index, int64_t position, bool packing,
                       int64_t max_seq_len, int64_t *ret_tokens)
{
    int64_t tokens = length_of(dataset, index ? index[position] : position);
    int64_t end = position + 1;
    for (; packing && end < dataset->n_examples; end++) {
        int64_t length = length_of(dataset, index ? index[end] : end);
        if (tokens + length > max_seq_len)
            break;
        tokens += length;
    }
    *ret_tokens = tokens;
    return end;
}

int64_t dataset_batches_per_epoch(struct dataset *dataset, uint64_t seed, bool shuffle, int64_t epoch,
                                  int32_t batch_size, bool packing, int64_t max_seq_len)
{
    int64_t rows = dataset->n_examples;
    if (packing) {
        const int64_t *index;
        if (prepare_order(dataset, seed, shuffle, epoch, &index))
            return ERROR_NO_MEMORY;
        struct dataset_order *order = dataset->order;
        if (order->rows < 0 || order->rows_max_seq_len != max_seq_len || order->rows_shuffle != shuffle ||
            (shuffle && (order->rows_epoch != epoch || order->rows_seed != seed))) {
            int64_t tokens;
            order->rows = 0;
            for (int64_t at = 0; at < dataset->n_examples; order->rows++)
                at = row_end(dataset, index, at, true, max_seq_len, &tokens);
            order->rows_max_seq_len = max_seq_len;
            order->rows_shuffle = shuffle;
            order->rows_epoch = epoch;
            order->rows_seed = seed;
        }
        rows = order->rows;
    }
    return (rows + batch_size - 1) / batch_size;
}

static int compare_lengths(const void *a, const void *b)
{
    const int64_t *x = a, *y = b;
    return *x < *y ? -1 : *x > *y;
}

int dataset_batch_limits(const struct dataset *dataset, int32_t batch_size, bool packing, int64_t max_seq_len,
                         int64_t *ret_tokens, int32_t *ret_seqs, struct error *error)
{
    int64_t n = dataset->n_examples, tokens = 0, seqs = 0;
    int64_t *lengths = malloc((size_t)(n ? n : 1) * sizeof *lengths);
    if (!lengths)
        return error_set(error, ERROR_NO_MEMORY, "out of memory while measuring the data");
    for (int64_t i = 0; i < n; i++)
        lengths[i] = length_of(dataset, i);
    qsort(lengths, (size_t)n, sizeof *lengths, compare_lengths);
    if (packing) {
        /* No more than full bins, and in them no more than the shortest examples that fit. */
        tokens = dataset->n_tokens / batch_size < max_seq_len ? dataset->n_tokens : batch_size * max_seq_len;
        for (int64_t sum = 0; seqs < n && sum + lengths[seqs] <= tokens; seqs++)
            sum += lengths[seqs];
    } else {
        for (; seqs < n && seqs < batch_size; seqs++)
            tokens += lengths[n - 1 - seqs];
    }
    free(lengths);
    if (tokens > INT32_MAX)
        return error_set_param(error, ERROR_INVALID, "batch_size",
                               "a batch of %d rows would hold %lld tokens, at most %d are possible",
                               (int)batch_size, (long long)tokens, INT32_MAX);
    *ret_tokens = tokens;
    *ret_seqs = (int32_t)seqs;
    return 0;
}

/* Append an example to the batch as a sequence of its own. */
static void add_example(const struct dataset *dataset, int64_t example, struct batch *batch)
{
    int64_t start = dataset->starts[example], length = length_of(dataset, example);
    const int32_t *ids = dataset->ids + start;
    const uint8_t *loss = dataset->loss + start;
    int32_t *targets = batch->targets + batch->n_tokens;
    memcpy(batch->ids + batch->n_tokens, ids, (size_t)length * sizeof *ids);
    for (int64_t t = 0; t < length; t++) {
        bool counts = t + 1 < length && loss[t + 1];
        targets[t] = counts ? ids[t + 1] : NOT_A_TARGET;
        batch->n_targets += counts;
    }
    batch->n_tokens += length;
    batch->seq_starts[++batch->n_seqs] = (int32_t)batch->n_tokens;
}

int dataset_next_batch(struct dataset *dataset, uint64_t seed, bool shuffle, int32_t batch_size, bool packing,
                       int64_t max_seq_len, struct data_cursor *cursor, struct batch *batch,
                       struct error *error)
{
    const int64_t *index;
    if (cursor->epoch < 0 || cursor->position < 0 || cursor->position >= dataset->n_examples)
        return error_set(error, ERROR_INVALID,
                         "the data position (epoch %lld, example %lld) lies outside the data (%lld examples)",
                         (long long)cursor->epoch, (long long)cursor->position,
                         (long long)dataset->n_examples);
    if (prepare_order(dataset, seed, shuffle, cursor->epoch, &index))
        return error_set(error, ERROR_NO_MEMORY, "out of memory while shuffling the data");

    int64_t end = cursor->position, tokens = 0;
    for (int32_t row = 0; row < batch_size && end < dataset->n_examples; row++) {
        int64_t more;
        end = row_end(dataset, index, end, packing, max_seq_len, &more);
        tokens += more;
    }
    if (tokens > batch->capacity || end - cursor->position > batch->max_seqs)
        return error_set(error, ERROR_INVALID,
                         "%lld tokens in %lld sequences do not fit a batch of %lld tokens in %d sequences",
                         (long long)tokens, (long long)(end - cursor->position), (long long)batch->capacity,
                         (int)batch->max_seqs);

    batch->n_tokens = 0;
    batch->n_seqs = 0;
    batch->n_targets = 0;
    batch->seq_starts[0] = 0;
    for (int64_t at = cursor->position; at < end; at++)
        add_example(dataset, index ? index[at] : at, batch);
    if (end == dataset->n_examples)
        *cursor = (struct data_cursor){.epoch = cursor->epoch + 1};
    else
        cursor->position = end;
    return 0;
}
