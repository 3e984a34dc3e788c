/* run.c: see run.h.
 *
 * A window is some documents of a unit; what has been done before is left out of it. Its examples are reported as soon as all their
 * requests are scored. While a GPU works on a batch of one window the prompts of the next are made: twice as much as the batch had,
 * so that a device that is faster than the making of prompts gets windows that grow. */
#include "engine/evaluation/run.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { WINDOW = 1024, WINDOW_IDS = 32 << 20 };

/* What a window has at least, where there is as much: documents, for prefixes are shared within a window alone; on a GPU batches. */
enum { HOST_WINDOW = 512, DEVICE_BATCHES = 4 };

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

struct window {
    int unit;
    char *pool; /* the file that its few-shot examples come from, or NULL */
    struct example examples[WINDOW];
    int n_examples;
    int32_t first_row[WINDOW + 1]; /* of each example */
    bool reported[WINDOW];
    int64_t n_ids, n_tokens; /* of all requests; about what will be run of them */
};

struct evaluation_run {
    struct evaluation_run_options options;
    struct scorer *scorer;
    int least_examples; /* of a window; or so many tokens */
    int64_t least_tokens;
    int unit;                /* whose prompts are made; n_units = all are made */
    struct prompts *prompts; /* of the unit */
    int64_t next;            /* document */
    struct window windows[2], *current, *ahead;
    int ahead_status; /* of making the one ahead, told when it is its turn */
    struct error ahead_error;
    struct forest_row *rows; /* of the current one */
    struct request_score *scores;
};

static int no_memory(struct error *error)
{
    return error_set(error, ERROR_NO_MEMORY, "no memory for an evaluation");
}

static int choose_room(const struct evaluation_run_options *options, struct scorer_options *scorer,
                       bool *ret_is_host, struct error *error)
{
    struct kernel_device_info info;
    const struct model *model = options->model;
    if (model_ops(model)->device_query(model_device(model), &info))
        return error_set(error, ERROR_DEVICE, "cannot query the device");
    *ret_is_host = info.is_host;
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
    struct scorer_options scorer = {.adapter = options->adapter,
                                    .share = options->plan->share,
                                    .yield = options->yield,
                                    .yield_arg = options->yield_arg};
    bool is_host = true;
    int status = choose_room(options, &scorer, &is_host, error);
    struct evaluation_run *run = status ? NULL : calloc(1, sizeof *run);
    if (!run)
        return status ? status : no_memory(error);
    run->options = *options;
    run->least_examples = is_host ? HOST_WINDOW : WINDOW;
    run->least_tokens = is_host ? INT64_MAX : DEVICE_BATCHES * scorer.max_tokens;
    run->current = &run->windows[0];
    run->ahead = &run->windows[1];
    status = scorer_create(options->model, &scorer, &run->scorer, error);
    if (status)
        evaluation_run_close(run);
    else
        *ret_run = run;
    return status;
}

static void clear_window(struct window *window)
{
    while (window->n_examples)
        example_free(&window->examples[--window->n_examples]);
    window->n_ids = window->n_tokens = 0;
}

static void end_window(struct evaluation_run *run)
{
    clear_window(run->current);
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
    clear_window(run->ahead);
    free(run->current->pool);
    free(run->ahead->pool);
    prompts_free(run->prompts);
    free(run);
}

void evaluation_run_status(const struct evaluation_run *run, struct scorer_status *ret_status,
                           const struct evaluation_unit **ret_unit)
{
    scorer_status(run->scorer, ret_status);
    *ret_unit = ret_status->batches ? &run->options.plan->units[run->current->unit] : NULL;
}

const char *evaluation_run_pool(const struct evaluation_run *run)
{
    return run->current->pool;
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
    const struct example *example = &run->current->examples[index];
    struct example_result result = {
        .unit = &run->options.plan->units[run->current->unit],
        .example = example,
        .scores = run->scores + run->current->first_row[index],
    };
    if (result.unit->task->kind == TASK_TARGET) {
        result.acc = result.acc_norm = result.scores[0].greedy;
    } else {
        result.choice = best_of(result.scores, example, false);
        result.choice_norm = best_of(result.scores, example, true);
        result.acc = result.choice == example->gold;
        result.acc_norm = result.choice_norm == example->gold;
    }
    run->current->reported[index] = true;
    run->options.result(run->options.arg, &result);
}

static void report_scored(struct evaluation_run *run)
{
    for (int i = 0; i < run->current->n_examples; i++) {
        bool whole = !run->current->reported[i];
        for (int32_t row = run->current->first_row[i]; whole && row < run->current->first_row[i + 1]; row++)
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

/* One more document into the window ahead, if it is not done. */
static int take_example(struct evaluation_run *run, struct error *error)
{
    const struct evaluation_unit *unit = &run->options.plan->units[run->unit];
    struct window *window = run->ahead;
    bool done = run->options.is_done && run->options.is_done(run->options.arg, unit, run->next);
    struct example *example = done ? NULL : &window->examples[window->n_examples];
    int status = prompts_next(run->prompts, example, error);
    if (status)
        return error_prefix(error, "%s: ", unit->name);
    run->next++;
    if (done)
        return 0;
    window->n_tokens += example->requests[0].n_context;
    for (int i = 0; i < example->n_requests; i++) {
        window->n_tokens += example->requests[i].n_ids - example->requests[i].n_context;
        window->n_ids += example->requests[i].n_ids;
    }
    window->reported[window->n_examples] = false;
    window->first_row[window->n_examples + 1] = window->first_row[window->n_examples] + example->n_requests;
    window->n_examples++;
    return 0;
}

/* The unit of a window that is empty: the next one that has documents left. */
static int begin_ahead(struct evaluation_run *run, struct error *error)
{
    struct window *window = run->ahead;
    int status = 0;
    while (!status && run->unit < run->options.plan->n_units) {
        if (!run->prompts)
            status = open_unit(run, error);
        if (status || run->next < prompts_count(run->prompts))
            break;
        prompts_free(run->prompts);
        run->prompts = NULL;
        run->unit++;
    }
    const char *pool = !status && run->prompts ? prompts_pool_file(run->prompts) : NULL;
    window->unit = run->unit;
    free(window->pool);
    window->pool = pool ? strdup(pool) : NULL;
    return status ? status : pool && !window->pool ? no_memory(error) : 0;
}

/* Until the window ahead has so many examples, or about so many tokens. */
static void make_ahead(struct evaluation_run *run, int most_examples, int64_t most_tokens)
{
    struct window *window = run->ahead;
    while (!run->ahead_status && window->n_examples < most_examples && window->n_tokens < most_tokens &&
           window->n_ids < WINDOW_IDS) {
        if (!window->n_examples)
            run->ahead_status = begin_ahead(run, &run->ahead_error);
        if (run->ahead_status || !run->prompts || run->next >= prompts_count(run->prompts))
            return;
        run->ahead_status = take_example(run, &run->ahead_error);
    }
}

static int begin_window(struct evaluation_run *run, struct error *error)
{
    const struct window *window = run->current;
    int32_t n_rows = window->first_row[window->n_examples], row = 0;
    run->rows = malloc(((size_t)n_rows + 1) * sizeof *run->rows);
    run->scores = malloc(((size_t)n_rows + 1) * sizeof *run->scores);
    if (!run->rows || !run->scores)
        return no_memory(error);
    for (int i = 0; i < window->n_examples; i++)
        for (int j = 0; j < window->examples[i].n_requests; j++) {
            const struct prompt_request *request = &window->examples[i].requests[j];
            run->rows[row++] = (struct forest_row){request->ids, request->n_ids, request->n_context};
        }
    return scorer_begin(run->scorer, run->rows, n_rows, run->scores, error);
}

/* Go on to the next window that has something to score. Returns 1, 0 at the end, or a negative code. */
static int next_window(struct evaluation_run *run, struct error *error)
{
    end_window(run);
    make_ahead(run, run->least_examples, run->least_tokens);
    if (run->ahead_status) {
        *error = run->ahead_error;
        return run->ahead_status;
    }
    struct window *window = run->ahead;
    run->ahead = run->current;
    run->current = window;
    if (!window->n_examples)
        return 0;
    int status = begin_window(run, error);
    return status ? status : 1;
}

int evaluation_run_advance(struct evaluation_run *run, struct error *error)
{
    int32_t tokens;
    int status = run->current->n_examples ? 1 : next_window(run, error);
    if (status <= 0)
        return status;
    status = scorer_launch(run->scorer, &tokens, error);
    if (!status)
        make_ahead(run, WINDOW, run->ahead->n_tokens + 2 * (int64_t)tokens);
    int more = status ? status : scorer_collect(run->scorer, error);
    if (more < 0)
        return more;
    report_scored(run);
    if (!more)
        end_window(run);
    return 1;
}
