/* run.c: see run.h.
 *
 * A window is WINDOW documents of a unit (fewer where their prompts are very long); what has been done before is left out of it. Its examples
 * are reported as soon as all their requests are scored. */
#include "engine/evaluation/run.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { WINDOW = 512, WINDOW_IDS = 32 << 20 };

/* Room for a batch: what waits meanwhile waits for one. */
enum {
    HOST_TOKENS = 1024,
    HOST_SEQS = 256,
    HOST_STATES = 64,
    HOST_STATE_BYTES = 256 << 20,
    DEVICE_TOKENS = 16384,
    DEVICE_SEQS = 2048,
    DEVICE_STATES = 512,
    LEAST_STATES = 8,
};
static const int64_t device_state_bytes = INT64_C(4) << 30;

struct evaluation_run {
    struct evaluation_run_options options;
    struct scorer *scorer;
    int unit;                /* of the window; n_units = all are done */
    struct prompts *prompts; /* of the unit */
    int64_t next;            /* document */
    struct example examples[WINDOW];
    int n_examples;
    int32_t first_row[WINDOW + 1]; /* of each example */
    bool reported[WINDOW];
    struct forest_row *rows;
    struct request_score *scores;
};

static int no_memory(struct error *error)
{
    return error_set(error, ERROR_NO_MEMORY, "no memory for an evaluation");
}

static int choose_room(const struct evaluation_run_options *options, struct scorer_options *scorer,
                       struct error *error)
{
    struct kernel_device_info info;
    const struct model *model = options->model;
    if (model_ops(model)->device_query(model_device(model), &info))
        return error_set(error, ERROR_DEVICE, "cannot query the device");
    const int64_t most = info.is_host ? HOST_STATES : DEVICE_STATES;
    const int64_t states = (info.is_host ? HOST_STATE_BYTES : device_state_bytes) / model_state_bytes(model);
    scorer->max_tokens = options->max_tokens ? options->max_tokens
                         : info.is_host      ? HOST_TOKENS
                                             : DEVICE_TOKENS;
    scorer->max_seqs = options->max_seqs ? options->max_seqs : info.is_host ? HOST_SEQS : DEVICE_SEQS;
    scorer->max_states = options->max_states     ? options->max_states
                         : states < LEAST_STATES ? LEAST_STATES
                                                 : (int32_t)(states > most ? most : states);
    return 0;
}

int evaluation_run_open(const struct evaluation_run_options *options, struct evaluation_run **ret_run,
                        struct error *error)
{
    struct scorer_options scorer = {.adapter = options->adapter, .share = options->plan->share};
    int status = choose_room(options, &scorer, error);
    struct evaluation_run *run = status ? NULL : calloc(1, sizeof *run);
    if (!run)
        return status ? status : no_memory(error);
    run->options = *options;
    status = scorer_create(options->model, &scorer, &run->scorer, error);
    if (status)
        evaluation_run_close(run);
    else
        *ret_run = run;
    return status;
}

static void end_window(struct evaluation_run *run)
{
    while (run->n_examples)
        example_free(&run->examples[--run->n_examples]);
    free(run->rows);
    free(run->scores);
    run->rows = NULL;
    run->scores = NULL;
}

void evaluation_run_close(struct evaluation_run *run)
{
    if (!run)
        return;
    scorer_free(run->scorer);
    end_window(run);
    prompts_free(run->prompts);
    free(run);
}

void evaluation_run_status(const struct evaluation_run *run, struct scorer_status *ret_status,
                           const struct evaluation_unit **ret_unit)
{
    scorer_status(run->scorer, ret_status);
    *ret_unit = run->prompts ? &run->options.plan->units[run->unit] : NULL;
}

const char *evaluation_run_pool(const struct evaluation_run *run)
{
    return run->prompts ? prompts_pool_file(run->prompts) : NULL;
}

/* ---- results ---- */

/* The first largest; what is not a number counts as largest, as numpy's argmax has it. */
static int best_of(const struct request_score *scores, const struct example *example, bool by_length)
{
    int best = 0;
    double most = 0;
    for (int i = 0; i < example->n_requests; i++) {
        double value = scores[i].log_likelihood;
        if (by_length)
            value /= (double)example->requests[i].characters;
        if (isnan(value))
            return i;
        if (!i || value > most) {
            best = i;
            most = value;
        }
    }
    return best;
}

static void report(struct evaluation_run *run, int index)
{
    const struct example *example = &run->examples[index];
    struct example_result result = {
        .unit = &run->options.plan->units[run->unit],
        .example = example,
        .scores = run->scores + run->first_row[index],
    };
    if (result.unit->task->kind == TASK_TARGET) {
        result.acc = result.acc_norm = result.scores[0].greedy;
    } else {
        result.choice = best_of(result.scores, example, false);
        result.choice_norm = best_of(result.scores, example, true);
        result.acc = result.choice == example->gold;
        result.acc_norm = result.choice_norm == example->gold;
    }
    run->reported[index] = true;
    run->options.result(run->options.arg, &result);
}

static void report_scored(struct evaluation_run *run)
{
    for (int i = 0; i < run->n_examples; i++) {
        bool whole = !run->reported[i];
        for (int32_t row = run->first_row[i]; whole && row < run->first_row[i + 1]; row++)
            whole = !run->scores[row].n_missing;
        if (whole)
            report(run, i);
    }
}

/* ---- windows ---- */

static int open_unit(struct evaluation_run *run, struct error *error)
{
    const struct evaluation_plan *plan = run->options.plan;
    const struct evaluation_unit *unit = &plan->units[run->unit];
    const struct model_config *config = model_config(run->options.model);
    const struct prompt_options options = {
        .shots = unit->shots,
        .seed = plan->seed,
        .limit = plan->limit,
        .max_length = plan->max_length,
        .prefix_id = config->bos_id >= 0 ? config->bos_id : config->eos_id,
    };
    run->next = 0;
    return prompts_open(unit->task, unit->subtask, &options, &plan->source, run->options.tokenizer,
                        &run->prompts, error);
}

/* The examples of the next WINDOW documents that are not done. */
static int take_examples(struct evaluation_run *run, struct error *error)
{
    const struct evaluation_unit *unit = &run->options.plan->units[run->unit];
    int64_t end = run->next + WINDOW, count = prompts_count(run->prompts);
    int status = 0;
    int32_t n_rows = 0;
    int64_t n_ids = 0;
    for (; !status && run->next < end && run->next < count && n_ids < WINDOW_IDS; run->next++) {
        bool done = run->options.is_done && run->options.is_done(run->options.arg, unit, run->next);
        struct example *example = done ? NULL : &run->examples[run->n_examples];
        status = prompts_next(run->prompts, example, error);
        if (status || done)
            continue;
        for (int i = 0; i < example->n_requests; i++)
            n_ids += example->requests[i].n_ids;
        run->reported[run->n_examples] = false;
        run->first_row[run->n_examples++] = n_rows;
        run->first_row[run->n_examples] = n_rows += example->n_requests;
    }
    return status ? error_prefix(error, "%s: ", unit->name) : 0;
}

static int begin_window(struct evaluation_run *run, struct error *error)
{
    int32_t n_rows = run->first_row[run->n_examples], row = 0;
    run->rows = malloc(((size_t)n_rows + 1) * sizeof *run->rows);
    run->scores = malloc(((size_t)n_rows + 1) * sizeof *run->scores);
    if (!run->rows || !run->scores)
        return no_memory(error);
    for (int i = 0; i < run->n_examples; i++)
        for (int j = 0; j < run->examples[i].n_requests; j++) {
            const struct prompt_request *request = &run->examples[i].requests[j];
            run->rows[row++] = (struct forest_row){request->ids, request->n_ids, request->n_context};
        }
    return scorer_begin(run->scorer, run->rows, n_rows, run->scores, error);
}

/* Go on to the next window that has something to score. Returns 1, 0 at the end, or a negative code. */
static int next_window(struct evaluation_run *run, struct error *error)
{
    while (run->unit < run->options.plan->n_units) {
        int status = run->prompts ? 0 : open_unit(run, error);
        end_window(run);
        if (!status)
            status = take_examples(run, error);
        if (!status && run->n_examples)
            status = begin_window(run, error);
        if (status)
            return status;
        if (run->n_examples)
            return 1;
        if (run->next >= prompts_count(run->prompts)) {
            prompts_free(run->prompts);
            run->prompts = NULL;
            run->unit++;
        }
    }
    return 0;
}

int evaluation_run_advance(struct evaluation_run *run, struct error *error)
{
    int status = run->n_examples ? 1 : next_window(run, error);
    if (status <= 0)
        return status;
    int more = scorer_advance(run->scorer, error);
    if (more < 0)
        return more;
    report_scored(run);
    if (!more)
        end_window(run);
    return 1;
}
