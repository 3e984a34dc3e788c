/* tiny.c: see tiny.h. */
#include "tests/engine/training/tiny.h"

#include "base/file.h"

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { VOCAB = 258, D_MODEL = 16, D_INNER = 32, D_STATE = 4, DT_RANK = 2, D_CONV = 4, LAYERS = 2 };

/* ---- the model ---- */

struct writer {
    struct tensor_view tensors[64];
    char names[64][96];
    int64_t count;
};

/* uniform in center +- width */
static void add_tensor(struct writer *writer, const char *name, float center, float width, int64_t rows,
                       int64_t columns, bool conv)
{
    struct tensor_view *tensor = &writer->tensors[writer->count];
    float *data = malloc((size_t)(rows * columns) * sizeof *data);
    assert_non_null(data);
    for (int64_t i = 0; i < rows * columns; i++)
        data[i] = center + width * (2 * philox_uniform((uint64_t)writer->count, (uint64_t)i) - 1);
    snprintf(writer->names[writer->count], sizeof writer->names[0], "%s", name);
    tensor->name = writer->names[writer->count++];
    tensor->type = TYPE_F32;
    tensor->count = rows * columns;
    tensor->data = data;
    tensor->shape[tensor->n_dims++] = rows;
    if (conv)
        tensor->shape[tensor->n_dims++] = 1;
    if (columns > 1)
        tensor->shape[tensor->n_dims++] = columns;
}

static void write_weights(const char *path, bool dead)
{
    struct writer *writer = calloc(1, sizeof *writer);
    char name[96];
    struct error error = {0};
    assert_non_null(writer);
    add_tensor(writer, "backbone.embeddings.weight", 0, 0.5f, VOCAB, D_MODEL, false);
    for (int layer = 0; layer < LAYERS; layer++) {
        const struct {
            const char *name;
            float center, width;
            int rows, columns;
        } parts[] = {
            {"norm.weight", 1, 0, D_MODEL, 1},
            {"mixer.A_log", 0.7f, 0.7f, D_INNER, D_STATE},
            {"mixer.D", 1, 0, D_INNER, 1},
            {"mixer.conv1d.weight", 0, 0.5f, D_INNER, D_CONV},
            {"mixer.conv1d.bias", 0, 0.1f, D_INNER, 1},
            {"mixer.in_proj.weight", 0, 0.3f, 2 * D_INNER, D_MODEL},
            {"mixer.x_proj.weight", 0, 0.3f, DT_RANK + 2 * D_STATE, D_INNER},
            {"mixer.dt_proj.weight", 0, 0.5f, D_INNER, DT_RANK},
            {"mixer.dt_proj.bias", -2, 1, D_INNER, 1},
            {"mixer.out_proj.weight", 0, dead ? 0 : 0.3f, D_MODEL, D_INNER},
        };
        for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
            snprintf(name, sizeof name, "backbone.layers.%d.%s", layer, parts[i].name);
            add_tensor(writer, name, parts[i].center, parts[i].width, parts[i].rows, parts[i].columns,
                       parts[i].columns == D_CONV && strstr(name, "conv1d"));
        }
    }
    add_tensor(writer, "backbone.norm_f.weight", 1, 0, D_MODEL, 1, false);
    int code = safetensors_write(path, writer->tensors, writer->count, NULL, &error);
    assert_string_equal(error.message, "");
    assert_int_equal(code, 0);
    for (int64_t i = 0; i < writer->count; i++)
        free((void *)(uintptr_t)writer->tensors[i].data);
    free(writer);
}

static void write_json(const char *path, json_t *json)
{
    assert_non_null(json);
    assert_int_equal(json_dump_file(json, path, 0), 0);
    json_decref(json);
}

/* A byte a token: the alphabet of byte-level BPE without merges. */
static json_t *byte_tokenizer(void)
{
    json_t *vocab = json_pack("{s:i, s:i}", "<|endoftext|>", 0, "<|padding|>", 1);
    int next = 256;
    for (int byte = 0; byte < 256; byte++) {
        bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
        int point = printable ? byte : next++;
        char spelling[3] = {(char)point, 0, 0};
        if (point >= 128) {
            spelling[0] = (char)(0xc0 | point >> 6);
            spelling[1] = (char)(0x80 | (point & 63));
        }
        json_object_set_new(vocab, spelling, json_integer(byte + 2));
    }
    return json_pack("{s:s, s:[{s:i, s:s, s:b, s:b, s:b, s:b, s:b}], s:n, s:{s:s, s:b, s:b, s:b}, s:n,"
                     " s:{s:s, s:b, s:b, s:b}, s:{s:s, s:o, s:[]}}",
                     "version", "1.0", "added_tokens", "id", 0, "content", "<|endoftext|>", "single_word", 0,
                     "lstrip", 0, "rstrip", 0, "normalized", 0, "special", 1, "normalizer", "pre_tokenizer",
                     "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets", 1, "use_regex", 1,
                     "post_processor", "decoder", "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets",
                     1, "use_regex", 1, "model", "type", "BPE", "vocab", vocab, "merges");
}

void tiny_write_data(const char *path, int n, int first)
{
    static const char *const words[] = {"ada", "bo", "cyd", "dunya", "el", "fritz", "gul"};
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    for (int i = first; i < first + n; i++)
        fprintf(file, "{\"prompt\": \"%s %d:\", \"completion\": \" %s%s\"}\n", words[i % 7], i * i % 10,
                words[i * 3 % 7], i % 2 ? " and so on" : "");
    assert_int_equal(fclose(file), 0);
}

void tiny_open(struct tiny *tiny, bool dead)
{
    char path[512];
    struct error error = {0};
    memset(tiny, 0, sizeof *tiny);
    /* In memory where that is possible: these tests sync thousands of files. */
    const char *parent = getenv("TMPDIR");
    if (!parent)
        parent = access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm";
    snprintf(tiny->folder, sizeof tiny->folder, "%s/adderd-training-XXXXXX", parent);
    assert_non_null(mkdtemp(tiny->folder));
    snprintf(path, sizeof path, "%s/model", tiny->folder);
    assert_int_equal(file_make_dirs(path, &error), 0);
    snprintf(path, sizeof path, "%s/model/config.json", tiny->folder);
    write_json(path,
               json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:i, s:i, s:i, s:b, s:b, s:b, s:s}",
                         "model_type", "mamba", "vocab_size", VOCAB, "hidden_size", D_MODEL, "state_size",
                         D_STATE, "num_hidden_layers", LAYERS, "intermediate_size", D_INNER, "conv_kernel",
                         D_CONV, "time_step_rank", DT_RANK, "layer_norm_epsilon", 1e-5, "eos_token_id", 0,
                         "bos_token_id", 0, "pad_token_id", 1, "tie_word_embeddings", 1, "use_bias", 0,
                         "use_conv_bias", 1, "hidden_act", "silu"));
    snprintf(path, sizeof path, "%s/model/model.safetensors", tiny->folder);
    write_weights(path, dead);
    snprintf(path, sizeof path, "%s/model/tokenizer.json", tiny->folder);
    write_json(path, byte_tokenizer());
    tokenizer_load(path, &tiny->tokenizer, &error);
    assert_string_equal(error.message, "");
    const char *cuda = getenv("ADDERD_TEST_CUDA");
    tiny->ops = cuda && !strcmp(cuda, "1") ? kernels_cuda() : kernels_cpu();
    assert_int_equal(tiny->ops->device_open(0, 1, &tiny->device), 0);
    snprintf(path, sizeof path, "%s/model", tiny->folder);
    model_open(path, tiny->ops, tiny->device, &tiny->model, &error);
    assert_string_equal(error.message, "");
    snprintf(tiny->train, sizeof tiny->train, "%s/train.jsonl", tiny->folder);
    snprintf(tiny->valid, sizeof tiny->valid, "%s/valid.jsonl", tiny->folder);
    snprintf(tiny->job, sizeof tiny->job, "%s/job", tiny->folder);
    tiny_write_data(tiny->train, 11, 0);
    tiny_write_data(tiny->valid, 5, 40);
}

void tiny_close(struct tiny *tiny)
{
    model_close(tiny->model);
    tokenizer_free(tiny->tokenizer);
    tiny->ops->device_close(tiny->device);
    assert_int_equal(file_remove_tree(tiny->folder, NULL), 0);
}

struct trainer_options tiny_options(struct tiny *tiny)
{
    struct trainer_options options = {
        .model = tiny->model,
        .tokenizer = tiny->tokenizer,
        .base_name = "tiny",
        .spec = {.n_epochs = 2,
                 .batch_size = 2,
                 .gradient_accumulation_steps = 2,
                 .max_seq_len = 64,
                 .adaptation = ADAPT_LORA,
                 .lora = {.targets = TARGETS_DEFAULT, .rank = 4, .alpha = 8},
                 .learning_rate = 0.02f,
                 .beta1 = 0.9f,
                 .beta2 = 0.999f,
                 .eps = 1e-8f,
                 .schedule = SCHEDULE_LINEAR,
                 .max_grad_norm = 1,
                 .seed = 7},
        .training_file = tiny->train,
        .validation_file = tiny->valid,
        .folder = tiny->job,
    };
    assert_int_equal(file_remove_tree(tiny->job, NULL), 0);
    return options;
}

/* ---- logs ---- */

static bool same_metrics(const struct training_metrics *a, const struct training_metrics *b)
{
    const double x[] = {a->train_loss, a->train_accuracy, a->learning_rate,
                        a->grad_norm,  a->valid_loss,     a->valid_accuracy};
    const double y[] = {b->train_loss, b->train_accuracy, b->learning_rate,
                        b->grad_norm,  b->valid_loss,     b->valid_accuracy};
    return a->step == b->step && a->total_steps == b->total_steps && a->epoch == b->epoch &&
           a->trained_tokens == b->trained_tokens && a->has_valid == b->has_valid &&
           !memcmp(x, y, a->has_valid ? sizeof x : 4 * sizeof *x);
}

static void on_metrics(void *arg, const struct training_metrics *metrics)
{
    struct run_log *log = arg;
    assert_in_range(metrics->step, 1, TINY_MAX_STEPS - 1);
    if (log->reported[metrics->step])
        assert_true(same_metrics(metrics, &log->metrics[metrics->step]));
    log->metrics[metrics->step] = *metrics;
    log->reported[metrics->step] = true;
}

static void on_checkpoint(void *arg, const struct training_checkpoint *checkpoint)
{
    struct run_log *log = arg;
    assert_true(log->n_checkpoints < TINY_MAX_NOTES);
    assert_true(path_exists("%s/trainer_state.json", checkpoint->folder));
    snprintf(log->newest, sizeof log->newest, "%s", checkpoint->folder);
    log->checkpoints[log->n_checkpoints] = *checkpoint;
    log->checkpoints[log->n_checkpoints++].folder = NULL;
}

static void on_dropped(void *arg, int64_t step)
{
    struct run_log *log = arg;
    assert_true(log->n_dropped < TINY_MAX_NOTES);
    log->dropped[log->n_dropped++] = step;
}

static void on_message(void *arg, const char *level, const char *text)
{
    struct run_log *log = arg;
    size_t used = strlen(log->messages);
    snprintf(log->messages + used, sizeof log->messages - used, "%s: %s\n", level, text);
}

void run_log_attach(struct run_log *log, struct trainer_options *options)
{
    options->callbacks = (struct trainer_callbacks){.arg = log,
                                                    .message = on_message,
                                                    .metrics = on_metrics,
                                                    .checkpoint = on_checkpoint,
                                                    .checkpoint_dropped = on_dropped};
}

int run_whole(const struct trainer_options *options)
{
    struct trainer *trainer = NULL;
    struct error error = {0};
    int advances = 1, code;
    trainer_open(options, &trainer, &error);
    assert_string_equal(error.message, "");
    while ((code = trainer_advance(trainer, &error)) == TRAINER_MORE)
        advances++;
    assert_string_equal(error.message, "");
    assert_int_equal(code, TRAINER_FINISHED);
    trainer_close(trainer);
    return advances;
}

void assert_same_runs(const struct run_log *a, const struct run_log *b)
{
    for (int step = 0; step < TINY_MAX_STEPS; step++) {
        assert_int_equal(a->reported[step], b->reported[step]);
        if (a->reported[step])
            assert_true(same_metrics(&a->metrics[step], &b->metrics[step]));
    }
}

void assert_same_files(const char *a, const char *b)
{
    char *x = NULL, *y = NULL;
    size_t x_length = 0, y_length = 0;
    assert_int_equal(file_read(a, 1 << 26, &x, &x_length, NULL), 0);
    assert_int_equal(file_read(b, 1 << 26, &y, &y_length, NULL), 0);
    assert_int_equal(x_length, y_length);
    assert_memory_equal(x, y, x_length);
    free(x);
    free(y);
}

bool path_exists(const char *format, ...)
{
    char path[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(path, sizeof path, format, args);
    va_end(args);
    return !access(path, F_OK);
}

int count_entries(const char *folder)
{
    int count = 0;
    struct dirent *entry;
    DIR *stream = opendir(folder);
    if (!stream)
        return 0;
    while ((entry = readdir(stream)))
        count += strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..");
    closedir(stream);
    return count;
}
