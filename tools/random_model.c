/* random_model.c: random-model SIZE FOLDER writes a Mamba model with the shapes of a published one and random
 * weights, in the layout of Hugging Face's state-spaces/mamba-SIZE-hf, so that everything but the quality of
 * the text can be tried where those files are not at hand.
 *
 * Weights are drawn as Mamba initialises them (Gu and Dao 2023, section 3.6, and its code): projections and
 * convolution uniform over +-1/sqrt(inputs), out_proj also divided by sqrt(layers), embeddings N(0, 0.02),
 * A_log = log(1..n), D = 1, norms 1, and dt's bias the inverse softplus of a log-uniform step of 0.001 to
 * 0.1. An element is a function of the seed, its tensor's name and its index, whatever thread draws it: the
 * same command writes the same bytes anywhere.
 *
 * Files hold 2 GB or --shard-bytes of weights at most; all processors draw and write, piece by piece. */
#include "base/file.h"
#include "engine/models/family.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { THREADS_MOST = 64, PIECE = 1 << 20, TOKENIZER_LIMIT = 64 << 20 };

static const struct size {
    const char *name;
    int hidden, layers;
} sizes[] = {{"tiny", 64, 2},    {"130m", 768, 24},  {"370m", 1024, 48},
             {"790m", 1536, 48}, {"1.4b", 2048, 48}, {"2.8b", 2560, 64}};
enum { N_SIZES = sizeof sizes / sizeof *sizes };

struct options {
    const struct size *size;
    const char *folder, *tokenizer;
    enum kernel_type type;
    uint64_t seed;
    int64_t shard_bytes;
};

/* One tensor and its place. */
struct tensor {
    struct tensor_spec spec;
    int64_t count, bytes;
    int shard;
    int64_t offset; /* in its shard's data */
};

struct shard {
    char name[64];
    int64_t data_bytes, data_begin; /* the data's length, and its place in the file */
    int fd;                         /* -1 = not open */
};

struct work {
    const struct options *options;
    struct model_config config;
    struct tensor *tensors;
    int64_t n_tensors;
    struct shard *shards;
    int n_shards;
    atomic_int_fast64_t next; /* the next piece of PIECE elements, counted through all tensors */
    atomic_int failed;        /* errno of a write that failed */
};

/* ---- drawing ---- */

/* Steele, Lea and Flood 2014, the finalizer of SplitMix64. */
static uint64_t mix(uint64_t x)
{
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

static uint64_t key_of(uint64_t seed, const char *name)
{
    uint64_t key = mix(seed);
    for (; *name; name++)
        key = mix(key ^ (uint64_t)(unsigned char)*name);
    return key;
}

enum shape_of_draw { CONSTANT, UNIFORM, NORMAL, LOG_COLUMN, TIME_STEP };
struct draw {
    enum shape_of_draw shape;
    float scale; /* the constant, half the width of the interval, the deviation */
};

static bool ends_with(const char *name, const char *end)
{
    size_t n = strlen(name), m = strlen(end);
    return n >= m && !strcmp(name + n - m, end);
}

static struct draw draw_of(const struct work *work, const struct tensor_spec *spec)
{
    const struct model_config *config = &work->config;
    float inputs = (float)spec->shape[spec->n_dims - 1];
    if (ends_with(spec->name, "embeddings.weight"))
        return (struct draw){NORMAL, 0.02f};
    if (ends_with(spec->name, "A_log"))
        return (struct draw){LOG_COLUMN, 1};
    if (ends_with(spec->name, "dt_proj.bias"))
        return (struct draw){TIME_STEP, 1};
    if (ends_with(spec->name, "conv1d.bias"))
        return (struct draw){UNIFORM, 1 / sqrtf((float)config->d_conv)};
    if (ends_with(spec->name, "out_proj.weight"))
        return (struct draw){UNIFORM, 1 / sqrtf(inputs * (float)config->n_layers)};
    if (spec->n_dims > 1)
        return (struct draw){UNIFORM, 1 / sqrtf(inputs)};
    return (struct draw){CONSTANT, 1}; /* D and the norms */
}

/* The element at `index` of a tensor with rows of `columns`. */
static float draw_element(struct draw draw, uint64_t key, int64_t index, int64_t columns)
{
    uint64_t bits = mix(key + (uint64_t)index);
    float uniform = (float)(bits >> 40) * 0x1p-24f;
    switch (draw.shape) {
    case UNIFORM:
        return draw.scale * (2 * uniform - 1);
    case NORMAL: {
        /* Four uniform 16-bit numbers: their sum has the variance 1/3 and is close to a normal one. */
        uint64_t sum = (bits & 0xFFFF) + (bits >> 16 & 0xFFFF) + (bits >> 32 & 0xFFFF) + (bits >> 48);
        return draw.scale * 1.7320508f * ((float)sum * 0x1p-16f - 2);
    }
    case LOG_COLUMN:
        return logf((float)(index % columns + 1));
    case TIME_STEP: {
        float step = expf(logf(0.001f) + uniform * (logf(0.1f) - logf(0.001f)));
        return step + logf(-expm1f(-step));
    }
    case CONSTANT:
        break;
    }
    return draw.scale;
}

static uint16_t to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* Elements [begin,end) as the file has them. */
static void draw_piece(const struct work *work, const struct tensor *tensor, int64_t begin, int64_t end,
                       void *piece)
{
    struct draw draw = draw_of(work, &tensor->spec);
    uint64_t key = key_of(work->options->seed, tensor->spec.name);
    int64_t columns = tensor->spec.shape[tensor->spec.n_dims - 1];
    for (int64_t i = begin; i < end; i++) {
        float value = draw_element(draw, key, i, columns);
        if (work->options->type == TYPE_F32)
            ((float *)piece)[i - begin] = value;
        else if (work->options->type == TYPE_BF16)
            ((uint16_t *)piece)[i - begin] = to_bf16(value);
        else
            ((_Float16 *)piece)[i - begin] = (_Float16)value;
    }
}

static int write_at(int fd, const char *data, int64_t bytes, int64_t at)
{
    while (bytes > 0) {
        ssize_t written = pwrite(fd, data, (size_t)bytes, at);
        if (written < 0 && errno != EINTR)
            return errno;
        if (written > 0)
            data += written, at += written, bytes -= written;
    }
    return 0;
}

/* Draws and writes pieces until none is left; on each of the threads. */
static void *write_pieces(void *arg)
{
    struct work *work = arg;
    int64_t size = (int64_t)kernel_type_size(work->options->type);
    int64_t first = 0, i = 0; /* of tensor i: the number of its first piece */
    void *buffer = malloc((size_t)(PIECE * size));
    if (!buffer)
        atomic_store(&work->failed, ENOMEM);
    while (!atomic_load(&work->failed)) {
        int64_t piece = atomic_fetch_add(&work->next, 1);
        while (i < work->n_tensors && piece - first >= (work->tensors[i].count + PIECE - 1) / PIECE)
            first += (work->tensors[i++].count + PIECE - 1) / PIECE;
        if (i == work->n_tensors)
            break;
        const struct tensor *tensor = &work->tensors[i];
        const struct shard *shard = &work->shards[tensor->shard];
        int64_t begin = (piece - first) * PIECE;
        int64_t end = begin + PIECE < tensor->count ? begin + PIECE : tensor->count;
        draw_piece(work, tensor, begin, end, buffer);
        int failed = write_at(shard->fd, buffer, (end - begin) * size,
                              shard->data_begin + tensor->offset + begin * size);
        if (failed)
            atomic_store(&work->failed, failed);
    }
    free(buffer);
    return NULL;
}

static int write_weights(struct work *work, struct error *error)
{
    pthread_t threads[THREADS_MOST];
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    int n = processors < 1 ? 1 : processors > THREADS_MOST ? THREADS_MOST : (int)processors, started = 0;
    while (started < n - 1 && !pthread_create(&threads[started], NULL, write_pieces, work))
        started++;
    write_pieces(work);
    for (int i = 0; i < started; i++)
        pthread_join(threads[i], NULL);
    int failed = atomic_load(&work->failed);
    return failed ? error_set(error, ERROR_IO, "cannot write the weights: %s", strerror(failed)) : 0;
}

/* ---- the layout ---- */

/* As the published folders have it; transformers and the original package each find their names. */
static json_t *make_config(const struct options *options)
{
    const struct size *size = options->size;
    json_t *json = json_pack(
        "{s:[s], s:i, s:i, s:i, s:i, s:i, s:i, s:b, s:s, s:i, s:f, s:i, s:f, s:s, s:i, s:i, s:i, s:i, s:b, "
        "s:b, s:b, s:{}, s:i, s:b}",
        "architectures", "MambaForCausalLM", "bos_token_id", 0, "conv_kernel", 4, "d_inner", 2 * size->hidden,
        "d_model", size->hidden, "eos_token_id", 0, "expand", 2, "fused_add_norm", 1, "hidden_act", "silu",
        "hidden_size", size->hidden, "initializer_range", 0.1, "intermediate_size", 2 * size->hidden,
        "layer_norm_epsilon", 1e-5, "model_type", "mamba", "n_layer", size->layers, "num_hidden_layers",
        size->layers, "pad_token_id", 0, "pad_vocab_size_multiple", 8, "rescale_prenorm_residual", 0,
        "residual_in_fp32", 1, "rms_norm", 1, "ssm_cfg", "state_size", 16, "tie_word_embeddings", 1);
    json_t *rest = json_pack("{s:f, s:s, s:f, s:f, s:i, s:f, s:s, s:b, s:b, s:b, s:i}", "time_step_floor",
                             0.0001, "time_step_init_scheme", "random", "time_step_max", 0.1, "time_step_min",
                             0.001, "time_step_rank", (size->hidden + 15) / 16, "time_step_scale", 1.0,
                             "torch_dtype", kernel_type_name(options->type), "use_bias", 0, "use_cache", 1,
                             "use_conv_bias", 1, "vocab_size", 50280);
    if (json && rest)
        json_object_update(json, rest);
    json_decref(rest);
    return json;
}

static int list_tensors(struct work *work, struct error *error)
{
    const struct options *options = work->options;
    struct tensor_spec spec;
    while (family_mamba.tensor(&work->config, work->n_tensors, &spec))
        work->n_tensors++;
    work->tensors = calloc((size_t)work->n_tensors, sizeof *work->tensors);
    work->shards = calloc((size_t)work->n_tensors, sizeof *work->shards);
    if (!work->tensors || !work->shards)
        return error_set(error, ERROR_NO_MEMORY, "no memory for the list of tensors");
    work->n_shards = 1;
    for (int64_t i = 0; i < work->n_tensors; i++) {
        struct tensor *tensor = &work->tensors[i];
        family_mamba.tensor(&work->config, i, &tensor->spec);
        tensor->count = 1;
        for (int d = 0; d < tensor->spec.n_dims; d++)
            tensor->count *= tensor->spec.shape[d];
        tensor->bytes = tensor->count * (int64_t)kernel_type_size(options->type);
        struct shard *shard = &work->shards[work->n_shards - 1];
        if (shard->data_bytes && shard->data_bytes + tensor->bytes > options->shard_bytes)
            shard = &work->shards[work->n_shards++];
        tensor->shard = work->n_shards - 1;
        tensor->offset = shard->data_bytes;
        shard->data_bytes += tensor->bytes;
    }
    for (int i = 0; i < work->n_shards; i++) {
        work->shards[i].fd = -1;
        if (work->n_shards == 1)
            strcpy(work->shards[i].name, "model.safetensors");
        else
            snprintf(work->shards[i].name, sizeof work->shards[i].name, "model-%05d-of-%05d.safetensors",
                     i + 1, work->n_shards);
    }
    return 0;
}

/* A shard's header, padded with spaces so that its data is aligned; free() it. NULL when out of memory. */
static char *make_header(const struct work *work, int shard, size_t *ret_length)
{
    static const char *const dtypes[] = {[TYPE_F32] = "F32", [TYPE_BF16] = "BF16", [TYPE_F16] = "F16"};
    json_t *header = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
    bool failed = !header;
    for (int64_t i = 0; i < work->n_tensors && !failed; i++) {
        const struct tensor *tensor = &work->tensors[i];
        if (tensor->shard != shard)
            continue;
        json_t *shape = json_array();
        for (int d = 0; d < tensor->spec.n_dims; d++)
            json_array_append_new(shape, json_integer(tensor->spec.shape[d]));
        failed = json_object_set_new(header, tensor->spec.name,
                                     json_pack("{s:s, s:o, s:[I, I]}", "dtype", dtypes[work->options->type],
                                               "shape", shape, "data_offsets", (json_int_t)tensor->offset,
                                               (json_int_t)(tensor->offset + tensor->bytes)));
    }
    char *text = failed ? NULL : json_dumps(header, JSON_COMPACT);
    json_decref(header);
    if (!text)
        return NULL;
    size_t length = strlen(text), padded = (length + 8 + 63) / 64 * 64 - 8;
    char *longer = realloc(text, padded + 1);
    if (!longer) {
        free(text);
        return NULL;
    }
    memset(longer + length, ' ', padded - length);
    *ret_length = padded;
    return longer;
}

static int begin_shard(struct work *work, int index, struct error *error)
{
    struct shard *shard = &work->shards[index];
    char path[PATH_MAX], prefix[8];
    size_t length = 0;
    char *header = make_header(work, index, &length);
    if (!header)
        return error_set(error, ERROR_NO_MEMORY, "no memory for the header of %s", shard->name);
    for (int i = 0; i < 8; i++)
        prefix[i] = (char)(length >> 8 * i & 0xFF);
    shard->data_begin = 8 + (int64_t)length;
    snprintf(path, sizeof path, "%s/%s", work->options->folder, shard->name);
    shard->fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    int failed = shard->fd < 0 ? errno : write_at(shard->fd, prefix, sizeof prefix, 0);
    if (!failed)
        failed = write_at(shard->fd, header, (int64_t)length, sizeof prefix);
    free(header);
    return failed ? error_set(error, ERROR_IO, "cannot write %s: %s", path, strerror(failed)) : 0;
}

static int write_json(const struct work *work, const char *name, json_t *json, struct error *error)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", work->options->folder, name);
    char *text = json ? json_dumps(json, JSON_INDENT(2) | JSON_SORT_KEYS) : NULL;
    int code = text ? file_write_whole(path, text, strlen(text), error)
                    : error_set(error, ERROR_NO_MEMORY, "no memory for %s", name);
    free(text);
    return code;
}

static int write_index(const struct work *work, struct error *error)
{
    json_t *map = json_object();
    int64_t total = 0;
    for (int64_t i = 0; i < work->n_tensors; i++) {
        total += work->tensors[i].bytes;
        json_object_set_new(map, work->tensors[i].spec.name,
                            json_string(work->shards[work->tensors[i].shard].name));
    }
    json_t *index =
        json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t)total, "weight_map", map);
    int code = write_json(work, "model.safetensors.index.json", index, error);
    json_decref(index);
    return code;
}

/* One that an earlier model of several files left would hide the only one there is now. */
static int remove_index(const struct work *work, struct error *error)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", work->options->folder);
    return unlink(path) && errno != ENOENT ? error_set(error, ERROR_IO, "cannot remove %s", path) : 0;
}

static int copy_tokenizer(const struct options *options, struct error *error)
{
    char path[PATH_MAX];
    char *text = NULL;
    size_t length;
    snprintf(path, sizeof path, "%s/tokenizer.json", options->folder);
    int code = file_read(options->tokenizer, TOKENIZER_LIMIT, &text, &length, error);
    if (!code)
        code = file_write_whole(path, text, length, error);
    free(text);
    return code;
}

static int run(struct work *work, json_t *config, struct error *error)
{
    int code = family_mamba.parse_config(config, &work->config, error);
    if (!code)
        code = list_tensors(work, error);
    if (!code)
        code = file_make_dirs(work->options->folder, error);
    for (int i = 0; i < work->n_shards && !code; i++)
        code = begin_shard(work, i, error);
    if (!code)
        code = write_weights(work, error);
    if (!code && work->n_shards > 1)
        code = write_index(work, error);
    else if (!code)
        code = remove_index(work, error);
    if (!code)
        code = copy_tokenizer(work->options, error);
    return code ? code : write_json(work, "config.json", config, error);
}

/* ---- the command line ---- */

static int usage(FILE *file)
{
    fprintf(file, "usage: random-model SIZE FOLDER [options]\n\n"
                  "  SIZE               tiny, 130m, 370m, 790m, 1.4b or 2.8b\n"
                  "  --dtype TYPE       bf16 (the default), fp16 or fp32\n"
                  "  --seed N           0\n"
                  "  --shard-bytes N    most bytes of weights a file (2000000000)\n"
                  "  --tokenizer FILE   tests/vectors/tokenizers/gpt-neox-20b.json\n");
    return file == stderr ? 2 : 0;
}

static bool read_options(int argc, char **argv, struct options *options)
{
    static const struct option known[] = {
        {"dtype", required_argument, NULL, 'd'},
        {"seed", required_argument, NULL, 's'},
        {"shard-bytes", required_argument, NULL, 'b'},
        {"tokenizer", required_argument, NULL, 't'},
        {"help", no_argument, NULL, 'h'},
        {0},
    };
    int option;
    while ((option = getopt_long(argc, argv, "h", known, NULL)) != -1) {
        if (option == 'd' && !strcmp(optarg, "bf16"))
            options->type = TYPE_BF16;
        else if (option == 'd' && !strcmp(optarg, "fp16"))
            options->type = TYPE_F16;
        else if (option == 'd' && !strcmp(optarg, "fp32"))
            options->type = TYPE_F32;
        else if (option == 's')
            options->seed = strtoull(optarg, NULL, 10);
        else if (option == 'b')
            options->shard_bytes = strtoll(optarg, NULL, 10);
        else if (option == 't')
            options->tokenizer = optarg;
        else if (option == 'h')
            exit(usage(stdout));
        else
            return false;
    }
    if (argc - optind != 2 || options->shard_bytes < 1)
        return false;
    for (int i = 0; i < N_SIZES; i++)
        if (!strcmp(argv[optind], sizes[i].name))
            options->size = &sizes[i];
    options->folder = argv[optind + 1];
    return options->size != NULL;
}

int main(int argc, char **argv)
{
    struct options options = {.type = TYPE_BF16,
                              .shard_bytes = 2000000000,
                              .tokenizer = "tests/vectors/tokenizers/gpt-neox-20b.json"};
    if (!read_options(argc, argv, &options))
        return usage(stderr);
    struct work work = {.options = &options};
    struct error error = {0};
    json_t *config = make_config(&options);
    int code = config ? run(&work, config, &error) : error_set(&error, ERROR_NO_MEMORY, "no memory");
    if (code)
        fprintf(stderr, "random-model: %s\n", error.message);
    for (int i = 0; i < work.n_shards; i++)
        if (work.shards[i].fd >= 0)
            close(work.shards[i].fd);
    free(work.tensors);
    free(work.shards);
    json_decref(config);
    return code != 0;
}
