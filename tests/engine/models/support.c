/* support.c: see support.h. */
#include "tests/engine/models/support.h"

#include "base/file.h"
#include "engine/models/internal.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- backends ---- */

static int open_backend(const struct kernel_ops *ops, void **state)
{
    struct backend *backend = calloc(1, sizeof *backend);
    if (!backend)
        return -1;
    backend->ops = ops;
    *state = backend;
    return ops->device_open(0, 2, &backend->device);
}

int open_reference(void **state)
{
    return open_backend(kernels_reference(), state);
}

int open_cpu(void **state)
{
    return open_backend(kernels_cpu(), state);
}

int open_cuda(void **state)
{
    return open_backend(kernels_cuda(), state);
}

bool cuda_wanted(void)
{
    const char *asked = getenv("ADDERD_TEST_CUDA");
    struct kernel_device *device;
    if (!asked || strcmp(asked, "1"))
        return false;
    if (!kernels_cuda() || kernels_cuda()->device_open(0, 0, &device)) {
        printf("skipped: no GPU, or a build without CUDA\n");
        exit(77);
    }
    kernels_cuda()->device_close(device);
    return true;
}

int close_backend(void **state)
{
    struct backend *backend = *state;
    backend->ops->device_close(backend->device);
    free(backend);
    return 0;
}

/* ---- files ---- */

const char *source_path(const char *relative)
{
    static char paths[3][PATH_MAX];
    static int next;
    const char *root = getenv("ADDERD_SOURCE");
    char *path = paths[next++ % 3];
    snprintf(path, PATH_MAX, "%s/%s", root ? root : ".", relative);
    return path;
}

char *make_folder(void)
{
    const char *base = getenv("TMPDIR");
    char *folder = malloc(PATH_MAX);
    assert_non_null(folder);
    snprintf(folder, PATH_MAX, "%s/adderd-models-XXXXXX", base ? base : "/tmp");
    assert_non_null(mkdtemp(folder));
    return folder;
}

void remove_folder(char *folder)
{
    assert_int_equal(file_remove_tree(folder, NULL), 0);
    free(folder);
}

void write_text(const char *folder, const char *name, const char *text)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    assert_int_equal(file_write_whole(path, text, strlen(text), NULL), 0);
}

void check_ok(int code, const struct error *error)
{
    if (code)
        fail_msg("%s: %s", error_code_name(code), error->message);
}

void check_error(int code, int expected, const struct error *error, const char *part)
{
    if (code != expected || error->code != expected || !strstr(error->message, part))
        fail_msg("expected %s with \"%s\", got %s: %s", error_code_name(expected), part,
                 error_code_name(code), error->message);
}

struct model *open_model(const struct backend *backend, const char *relative)
{
    struct error error = {0};
    struct model *model = NULL;
    const char *path = *relative == '/' ? relative : source_path(relative);
    check_ok(model_open(path, backend->ops, backend->device, &model, &error), &error);
    model_infer_in_fp32(model);
    return model;
}

struct safetensors *open_vector(const char *relative)
{
    struct error error = {0};
    struct safetensors *file = NULL;
    check_ok(safetensors_open(source_path(relative), &file, &error), &error);
    return file;
}

json_t *load_json(const char *relative)
{
    json_error_t error;
    json_t *json = json_load_file(source_path(relative), 0, &error);
    if (!json)
        fail_msg("%s: %s", relative, error.text);
    return json;
}

static void *copy_tensor(const struct safetensors *file, const char *name, enum kernel_type type,
                         int64_t *ret_count)
{
    const struct tensor_view *view = safetensors_find(file, name);
    if (!view || view->type != type)
        fail_msg("no tensor %s of the type wanted", name);
    void *data = malloc((size_t)view->count * 4);
    assert_non_null(data);
    memcpy(data, view->data, (size_t)view->count * 4);
    if (ret_count)
        *ret_count = view->count;
    return data;
}

float *copy_floats(const struct safetensors *file, const char *name, int64_t *ret_count)
{
    return copy_tensor(file, name, TYPE_F32, ret_count);
}

int32_t *copy_ints(const struct safetensors *file, const char *name, int64_t *ret_count)
{
    return copy_tensor(file, name, TYPE_I32, ret_count);
}

float *read_device(const struct model *model, const float *data, int64_t count)
{
    float *values = malloc((size_t)count * sizeof *values);
    assert_non_null(values);
    assert_int_equal(
        model_ops(model)->copy_out(model_device(model), values, data, (size_t)count * sizeof *values), 0);
    return values;
}

void write_device(const struct model *model, float *data, const float *values, int64_t count)
{
    assert_int_equal(
        model_ops(model)->copy_in(model_device(model), data, values, (size_t)count * sizeof *values), 0);
}

/* ---- numbers ---- */

double relative_error(const float *a, const float *b, int64_t count)
{
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < count; i++) {
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        norm += (double)b[i] * (double)b[i];
    }
    return norm > 0 ? sqrt(difference / norm) : sqrt(difference);
}

double largest_difference(const float *a, const float *b, int64_t count)
{
    double largest = 0;
    for (int64_t i = 0; i < count; i++) {
        double difference = fabs((double)a[i] - (double)b[i]);
        if (!(difference <= largest))
            largest = difference;
    }
    return largest;
}

uint32_t draw(uint64_t *seed, uint32_t limit)
{
    return (uint32_t)(philox_uniform(UINT64_C(0x5eed), (*seed)++) * (float)limit);
}

/* ---- batches ---- */

struct batch *new_batch(int64_t capacity, int32_t max_seqs)
{
    struct batch *batch = calloc(1, sizeof *batch);
    assert_non_null(batch);
    batch->capacity = capacity;
    batch->max_seqs = max_seqs;
    batch->ids = calloc((size_t)capacity, sizeof *batch->ids);
    batch->targets = calloc((size_t)capacity, sizeof *batch->targets);
    batch->seq_starts = calloc((size_t)max_seqs + 1, sizeof *batch->seq_starts);
    assert_true(batch->ids && batch->targets && batch->seq_starts);
    return batch;
}

void batch_add(struct batch *batch, const int32_t *ids, const int32_t *labels, int32_t n)
{
    assert_true(batch->n_tokens + n <= batch->capacity && batch->n_seqs < batch->max_seqs);
    for (int32_t t = 0; t < n; t++) {
        int32_t target = t + 1 == n ? -100 : labels ? labels[t + 1] : ids[t + 1];
        batch->ids[batch->n_tokens] = ids[t];
        batch->targets[batch->n_tokens++] = target;
        batch->n_targets += target >= 0;
    }
    batch->seq_starts[++batch->n_seqs] = (int32_t)batch->n_tokens;
}

void drop_batch(struct batch *batch)
{
    free(batch->ids);
    free(batch->targets);
    free(batch->seq_starts);
    free(batch);
}

/* ---- models and adapters ---- */

/* Values that keep a random model well behaved: A_log near log(1..n), dt's bias such that steps are small. */
static float random_value(const char *name, int64_t i, float scale, uint64_t seed)
{
    float uniform = 2.0f * philox_uniform(seed, (uint64_t)i) - 1.0f;
    if (strstr(name, "norm"))
        return 1.0f + 0.1f * uniform;
    if (strstr(name, "A_log"))
        return logf(1.0f + (float)(i % 16)) + 0.1f * uniform;
    if (strstr(name, "dt_proj.bias"))
        return -3.0f + uniform;
    return scale * uniform;
}

char *make_random_model(const char *config_text, uint64_t seed, enum kernel_type matrix_type)
{
    char *folder = make_folder();
    char path[PATH_MAX];
    struct error error = {0};
    struct model_config config;
    struct tensor_spec spec;
    struct tensor_view views[128];
    json_t *json = json_loads(config_text, 0, NULL);
    assert_non_null(json);
    check_ok(family_mamba.parse_config(json, &config, &error), &error);
    json_decref(json);
    int64_t n = 0;
    static char names[128][96];
    const struct kernel_ops *ops = kernels_reference();
    struct kernel_device *device;
    assert_int_equal(ops->device_open(0, 1, &device), 0);
    for (; family_mamba.tensor(&config, n, &spec); n++) {
        assert_true(n < 128);
        struct tensor_view *view = &views[n];
        memcpy(names[n], spec.name, sizeof names[n]);
        *view = (struct tensor_view){
            .name = names[n], .type = spec.fp32 ? TYPE_F32 : matrix_type, .n_dims = spec.n_dims, .count = 1};
        for (int d = 0; d < spec.n_dims; d++)
            view->count *= view->shape[d] = spec.shape[d];
        float *values = malloc((size_t)view->count * sizeof *values);
        void *stored = malloc((size_t)view->count * sizeof *values);
        assert_true(values && stored);
        float scale = spec.n_dims == 2 ? 1.5f / sqrtf((float)spec.shape[1]) : 0.3f;
        for (int64_t i = 0; i < view->count; i++)
            values[i] = random_value(spec.name, i, scale, seed + (uint64_t)n);
        assert_int_equal(ops->cast(device, stored, view->type, values, TYPE_F32, view->count), 0);
        free(values);
        view->data = stored;
    }
    ops->device_close(device);
    write_text(folder, "config.json", config_text);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    check_ok(safetensors_write(path, views, n, NULL, &error), &error);
    for (int64_t i = 0; i < n; i++)
        free((void *)(uintptr_t)views[i].data);
    return folder;
}

struct adapter *random_adapter(struct model *model, const struct lora_config *lora, uint64_t seed)
{
    struct error error = {0};
    struct adapter *adapter = NULL;
    check_ok(adapter_create(model, ADAPT_LORA, lora, seed, &adapter, &error), &error);
    for (int64_t i = 0; i < adapter->n_parameters; i++) {
        struct param_slice *slice = &adapter->parameters[i].slice;
        float *values = malloc((size_t)slice->count * sizeof *values);
        assert_non_null(values);
        for (int64_t k = 0; k < slice->count; k++)
            values[k] = 0.6f * philox_uniform(seed + 100 + (uint64_t)i, (uint64_t)k) - 0.3f;
        write_device(model, slice->param, values, slice->count);
        free(values);
    }
    return adapter;
}

float *all_logits(struct model *model, const struct adapter *adapter, const int32_t *ids, int32_t n)
{
    struct error error = {0};
    struct runner *runner = NULL;
    int32_t starts[] = {0, n};
    int32_t *rows = malloc((size_t)n * sizeof *rows);
    assert_non_null(rows);
    for (int32_t i = 0; i < n; i++)
        rows[i] = i;
    struct adapter_span span = {adapter, 0, 1};
    struct forward_request request = {
        .n_seqs = 1, .seq_starts = starts, .ids = ids, .spans = &span, .n_spans = 1};
    const float *logits;
    check_ok(runner_create(model, n, n, &runner, &error), &error);
    check_ok(runner_forward(runner, &request, &error), &error);
    check_ok(runner_logits(runner, rows, n, &logits, &error), &error);
    float *result = read_device(model, logits, n * model_config(model)->vocab_size);
    runner_free(runner);
    free(rows);
    return result;
}

/* ---- the official training curves ---- */

struct batch *curve_batch(const json_t *rows)
{
    size_t n_rows = json_array_size(rows), length = json_array_size(json_array_get(rows, 0));
    struct batch *batch = new_batch((int64_t)(n_rows * length), (int32_t)n_rows);
    int32_t ids[256];
    assert_true(length <= 256);
    for (size_t r = 0; r < n_rows; r++) {
        for (size_t t = 0; t < length; t++)
            ids[t] = (int32_t)json_integer_value(json_array_get(json_array_get(rows, r), t));
        batch_add(batch, ids, NULL, (int32_t)length);
    }
    return batch;
}

struct adapter *adapter_of_curve(struct model *model)
{
    struct error error = {0};
    const struct lora_config lora = {
        .targets = TARGET_IN_PROJ | TARGET_X_PROJ | TARGET_DT_PROJ | TARGET_OUT_PROJ, .rank = 8, .alpha = 16};
    struct safetensors *init = open_vector("tests/vectors/hatchling_train_lora_init.safetensors");
    struct adapter *adapter = NULL;
    check_ok(adapter_create(model, ADAPT_LORA, &lora, 0, &adapter, &error), &error);
    assert_int_equal(safetensors_count(init), adapter->n_parameters);
    for (int64_t i = 0; i < adapter->n_parameters; i++) {
        float *values = copy_floats(init, adapter->parameters[i].name, NULL);
        write_device(model, adapter->parameters[i].slice.param, values, adapter->parameters[i].slice.count);
        free(values);
    }
    safetensors_close(init);
    return adapter;
}
