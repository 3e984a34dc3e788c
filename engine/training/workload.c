/* workload.c: see workload.h. */
#include "engine/training/workload.h"

#include <inttypes.h>
#include <string.h>

enum { DEVICE_RESERVE = 512 << 20 };

static int query(const struct trainer_options *options, struct kernel_device_info *ret_info,
                 struct error *error)
{
    if (model_ops(options->model)->device_query(model_device(options->model), ret_info))
        return error_set(error, ERROR_DEVICE, "cannot query the device");
    return 0;
}

/* What a plan may take: a GPU's ops keep areas of their own, which no plan counts. At least 1, which is a limit. */
static int64_t available_bytes(const struct trainer_options *options, const struct kernel_device_info *info)
{
    int64_t bytes = info->free_bytes + options->reclaimable_bytes - (info->is_host ? 0 : DEVICE_RESERVE);
    return bytes > 0 ? bytes : 1;
}

/* The plan of a micro-batch of so many tokens in so many sequences, within what is available. */
static struct plan_request request_of(const struct trainer_options *options,
                                      const struct kernel_device_info *info, int64_t max_tokens,
                                      int32_t max_seqs)
{
    const struct training_spec *spec = &options->spec;
    return (struct plan_request){
        .adaptation = spec->adaptation,
        .lora = spec->lora,
        .max_tokens = max_tokens,
        .max_seqs = max_seqs,
        .act = training_activation_type(spec->precision),
        .tf32 = spec->precision == PRECISION_TF32,
        .byte_limit = available_bytes(options, info),
    };
}

static int check_spec(const struct trainer_options *options, const struct kernel_device_info *info,
                      struct error *error)
{
    const struct training_spec *spec = &options->spec;
    if (info->is_host && spec->precision != PRECISION_FP32)
        return error_set_param(error, ERROR_UNSUPPORTED, "precision",
                               "precision %s needs a GPU: the CPU computes in fp32 and nothing else",
                               training_precision_name(spec->precision));
    if (!options->validation_file && spec->load_best_at_end)
        return error_set_param(error, ERROR_INVALID, "load_best_at_end",
                               "load_best_at_end needs a validation_file: the best is that of the lowest "
                               "validation loss");
    if (!options->validation_file && spec->early_stopping_patience)
        return error_set_param(error, ERROR_INVALID, "early_stopping",
                               "early_stopping needs a validation_file: it watches the validation loss");
    return 0;
}

static int load_data(const struct trainer_options *options, const char *path, const char *param,
                     struct dataset **ret_dataset, struct trainer_bad_lines *bad, struct error *error)
{
    const struct model_config *config = model_config(options->model);
    const struct dataset_options dataset_options = {
        .max_seq_len = options->spec.max_seq_len,
        .truncate = options->spec.truncate,
        .split_text = options->spec.packing,
        .eos_id = config->eos_id,
        .chat_template = config->chat_template[0] ? config->chat_template : NULL,
        .yield = options->callbacks.yield,
        .yield_arg = options->callbacks.arg,
    };
    struct dataset *dataset = NULL;
    struct error reason = {0};
    int code = dataset_load(path, options->tokenizer, &dataset_options, &dataset, &reason);
    if (code) {
        if (dataset && bad) {
            bad->file = param;
            bad->n_line_errors = dataset->n_line_errors;
            memcpy(bad->line_errors, dataset->line_errors, sizeof bad->line_errors);
        }
        error_set_param(error, code, param, "%s", reason.message);
        goto done;
    }
    for (int64_t i = 0; i < dataset->n_tokens; i++) {
        if (dataset->ids[i] < 0 || dataset->ids[i] >= config->vocab_size) {
            code = error_set_param(error, ERROR_INVALID, "model",
                                   "the tokenizer does not fit the model: token %" PRId32
                                   " lies outside its vocabulary of %" PRId64,
                                   dataset->ids[i], config->vocab_size);
            goto done;
        }
    }
    *ret_dataset = dataset;
    dataset = NULL;
done:
    dataset_free(dataset);
    return code;
}

/* An epoch's last step takes the micro-batches that are left, however few: none is carried over. */
static int count_steps(const struct trainer_options *options, struct dataset *training, int64_t *ret_steps,
                       struct error *error)
{
    const struct training_spec *spec = &options->spec;
    int64_t steps = 0, per_epoch = 0;
    for (int64_t epoch = 0; epoch < spec->n_epochs && !spec->max_steps; epoch++) {
        if (epoch == 0 || spec->packing) /* how bins fill depends on the epoch's order */
            per_epoch = dataset_batches_per_epoch(training, spec->seed, true, epoch, spec->batch_size,
                                                  spec->packing, spec->max_seq_len);
        if (per_epoch < 0)
            return error_set(error, (int)per_epoch, "cannot lay out the training data");
        if (spec->packing && options->callbacks.yield)
            options->callbacks.yield(options->callbacks.arg);
        steps += (per_epoch + spec->gradient_accumulation_steps - 1) / spec->gradient_accumulation_steps;
    }
    *ret_steps = spec->max_steps ? spec->max_steps : steps;
    return 0;
}

/* Widen the bounds by what batches of this set need. */
static int include_batches(const struct training_spec *spec, const struct dataset *dataset,
                           struct workload *workload, struct error *error)
{
    int64_t tokens = 0;
    int32_t seqs = 0;
    int code = dataset_batch_limits(dataset, spec->batch_size, spec->packing, spec->max_seq_len, &tokens,
                                    &seqs, error);
    if (code)
        return code;
    for (int64_t i = 0; i < dataset->n_examples; i++) {
        int64_t length = dataset->starts[i + 1] - dataset->starts[i];
        workload->longest = length > workload->longest ? length : workload->longest;
    }
    workload->max_tokens = tokens > workload->max_tokens ? tokens : workload->max_tokens;
    workload->max_seqs = seqs > workload->max_seqs ? seqs : workload->max_seqs;
    return 0;
}

/* Recomputing is the last resort: before it the caller may make room. */
static int plan(const struct trainer_options *options, struct workload *workload, struct error *error)
{
    struct kernel_device_info info;
    struct plan_request *request = &workload->request;
    int code = query(options, &info, error);
    if (code)
        return code;
    *request = request_of(options, &info, workload->max_tokens, workload->max_seqs);
    code = model_plan(options->model, request, &workload->plan, error);
    if (code || !options->callbacks.make_room ||
        (!workload->plan.recompute && workload->plan.total_bytes <= request->byte_limit) ||
        !options->callbacks.make_room(options->callbacks.arg))
        return code;
    code = query(options, &info, error);
    request->byte_limit = available_bytes(options, &info);
    return code ? code : model_plan(options->model, request, &workload->plan, error);
}

int workload_open(const struct trainer_options *options, struct workload *ret_workload,
                  struct trainer_bad_lines *ret_bad, struct error *error)
{
    const struct training_spec *spec = &options->spec;
    struct workload workload = {0};
    struct kernel_device_info info;
    int code = query(options, &info, error);
    if (!code)
        code = check_spec(options, &info, error);
    if (!code)
        code =
            load_data(options, options->training_file, "training_file", &workload.training, ret_bad, error);
    if (!code && options->validation_file)
        code = load_data(options, options->validation_file, "validation_file", &workload.validation, ret_bad,
                         error);
    if (!code)
        code = include_batches(spec, workload.training, &workload, error);
    if (!code && workload.validation)
        code = include_batches(spec, workload.validation, &workload, error);
    if (!code)
        code = count_steps(options, workload.training, &workload.total_steps, error);
    if (!code)
        code = plan(options, &workload, error);
    if (code)
        workload_close(&workload);
    else
        *ret_workload = workload;
    return code;
}

void workload_close(struct workload *workload)
{
    dataset_free(workload->training);
    dataset_free(workload->validation);
    *workload = (struct workload){0};
}

/* ---- does it fit? ---- */

static bool fits(const struct trainer_options *options, const struct plan_request *request)
{
    struct memory_plan plan;
    return !model_plan(options->model, request, &plan, NULL) && plan.total_bytes <= request->byte_limit;
}

/* Rows that fit with rows of so many tokens, by halves; 0 when not even one does. */
static int32_t fitting_rows(const struct trainer_options *options, const struct workload *workload,
                            int64_t row_tokens)
{
    struct plan_request request = workload->request;
    double seqs_per_row = (double)request.max_seqs / (double)options->spec.batch_size;
    for (int32_t rows = options->spec.batch_size; rows; rows /= 2) {
        int64_t tokens = rows * row_tokens;
        request.max_tokens = tokens < workload->max_tokens ? tokens : workload->max_tokens;
        request.max_seqs = (int32_t)(seqs_per_row * rows) + 1;
        if (fits(options, &request))
            return rows;
    }
    return 0;
}

/* What would make it fit, as far as the plan tells; "" when nothing does. */
static void advise(const struct trainer_options *options, const struct workload *workload, char *text,
                   size_t size)
{
    const struct training_spec *spec = &options->spec;
    int64_t row = spec->packing ? spec->max_seq_len : workload->longest, shorter = row / 2;
    int32_t rows = fitting_rows(options, workload, row);
    int length = 0;
    if (rows)
        length = snprintf(text, size, "; batch_size %" PRId32 " with gradient_accumulation_steps %d fits",
                          rows, spec->gradient_accumulation_steps * ((spec->batch_size + rows - 1) / rows));
    for (; !rows && shorter >= 2; shorter /= 2)
        if ((rows = fitting_rows(options, workload, shorter)))
            length = snprintf(text, size, "; max_seq_len %" PRId64 " with batch_size %" PRId32 " fits",
                              shorter, rows);
    struct plan_request request = workload->request;
    if (spec->adaptation == ADAPT_FULL) {
        request.adaptation = ADAPT_LORA;
        request.lora = (struct lora_config){.targets = TARGETS_DEFAULT, .rank = 8, .alpha = 16};
        if (fits(options, &request))
            length += snprintf(text + length, size - (size_t)length, "; adaptation lora fits");
    }
    if (spec->precision == PRECISION_FP32 || spec->precision == PRECISION_TF32) {
        struct kernel_device_info info;
        request = workload->request;
        request.act = TYPE_BF16;
        request.tf32 = false;
        if (!query(options, &info, NULL) && !info.is_host && fits(options, &request))
            snprintf(text + length, size - (size_t)length, "; precision bf16 fits");
    }
}

int workload_check_memory(const struct trainer_options *options, const struct workload *workload,
                          struct error *error)
{
    char advice[256] = "";
    if (workload->plan.total_bytes <= workload->request.byte_limit)
        return 0;
    advise(options, workload, advice, sizeof advice);
    return error_set_param(
        error, ERROR_NO_MEMORY, "batch_size",
        "the job needs %" PRId64 " bytes beyond the model's %" PRId64 ", with all recomputed that can "
        "be; %" PRId64 " are free%s",
        workload->plan.total_bytes, model_weight_bytes(options->model), workload->request.byte_limit, advice);
}

int trainer_bound(const struct trainer_options *options, int64_t *ret_planned_bytes, struct error *error)
{
    const struct training_spec *spec = &options->spec;
    struct kernel_device_info info;
    struct memory_plan plan;
    int code = query(options, &info, error);
    if (!code)
        code = check_spec(options, &info, error);
    if (code)
        return code;
    int64_t tokens = spec->batch_size * spec->max_seq_len;
    if (tokens > INT32_MAX)
        return 0;
    /* No example has less than two tokens. */
    int64_t seqs = spec->packing ? (tokens + 1) / 2 : spec->batch_size;
    const struct plan_request request = request_of(options, &info, tokens, (int32_t)seqs);
    code = model_plan(options->model, &request, &plan, error);
    if (code)
        return code;
    if (plan.total_bytes > request.byte_limit)
        return 0;
    *ret_planned_bytes = model_weight_bytes(options->model) + plan.total_bytes;
    return 1;
}

int trainer_inspect(const struct trainer_options *options, struct trainer_inspection *ret_inspection,
                    struct trainer_bad_lines *ret_bad, struct error *error)
{
    struct workload workload;
    *ret_bad = (struct trainer_bad_lines){0};
    int code = workload_open(options, &workload, ret_bad, error);
    if (!code && (code = workload_check_memory(options, &workload, error)))
        workload_close(&workload);
    if (code)
        return code;
    *ret_inspection = (struct trainer_inspection){
        .examples = workload.training->n_examples,
        .tokens = workload.training->n_tokens,
        .loss_tokens = workload.training->n_loss_tokens,
        .validation_examples = workload.validation ? workload.validation->n_examples : 0,
        .total_steps = workload.total_steps,
        .planned_bytes = model_weight_bytes(options->model) + workload.plan.total_bytes,
    };
    workload_close(&workload);
    return 0;
}
