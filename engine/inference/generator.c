/* generator.c: see generator.h. Device's owner thread.
 *
 * Life of a choice (one sequence): queued; seated when one of max_seqs state slots is free, first come first
 * served; waiting while its prompt runs; running, one token a step; over.
 *
 * A prompt is run once for all its choices, without its last token: that one is the first step of every
 * choice, so sampling happens in decode steps alone, and prefill only has to leave a state behind (and the
 * scores of the prompt, when echo asks for them: they are those of the rows that prefill runs). The state
 * grows in the slot of the prompt's first choice. Once it is whole the other seated choices take copies. If
 * some are not seated yet, one more copy goes to the spare slot and they take theirs from there. Seats are
 * given in order, so at most one prompt has both seated and queued choices, and one spare slot is enough.
 *
 * A quantum is either a prefill chunk (pieces of several prompts in one ragged forward) or a decode step for
 * all running choices. While there is work of both kinds they alternate, so that neither waits for more than
 * one quantum of the other. Rows of one step are kept together by adapter. */
#include "engine/inference/generator.h"

#include "engine/inference/request.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The least a prompt gets of a prefill chunk, if it needs as much: splitting finer only delays all of them.
 */
enum { PREFILL_SHARE_MIN = 64 };

struct generator {
    struct model *model;
    const struct tokenizer *tokenizer;
    int32_t vocab_size, bos_id, eos_id;
    int32_t max_seqs;
    int64_t prefill_tokens;
    struct runner *runner;
    struct state_pool *states; /* max_seqs + 1 slots; the last is the spare one */

    uint64_t last_id;
    struct request *first, *last; /* in order of arrival */
    int32_t n_queued;             /* choices without a seat */
    int32_t *free_slots;          /* [n_free] */
    int32_t n_free;
    struct prompt **filling; /* [n_filling] in order of arrival */
    int32_t n_filling;
    struct choice **running; /* [n_running] together by adapter */
    int32_t n_running;
    bool filled_last; /* the last quantum was prefill */

    /* Scratch of one quantum, sized once. */
    int32_t *ids;           /* [max_tokens] */
    int32_t *targets;       /* [max_tokens] */
    float *scores;          /* [max_tokens] */
    int32_t *score_top_ids; /* [max_tokens,KERNEL_TOP_MAX] */
    float *score_top_logprobs;
    int32_t *seq_starts;        /* [max_seqs+1] */
    int32_t *slots;             /* [max_seqs] */
    int32_t *order;             /* [max_seqs] */
    int32_t *take;              /* [max_seqs] */
    struct adapter_span *spans; /* [max_seqs] */
    struct sample_row *rows;    /* [max_seqs] */
    int32_t *sampled;           /* [max_seqs] */
    float *logprobs;            /* [max_seqs] */
    int32_t *top_ids;           /* [max_seqs,KERNEL_TOP_MAX] */
    float *top_logprobs;
};

static int check_kernel(int status, const char *what, struct error *error)
{
    if (status == KERNEL_OK)
        return 0;
    int code = status == KERNEL_DEVICE_LOST   ? ERROR_DEVICE
               : status == KERNEL_NO_MEMORY   ? ERROR_NO_MEMORY
               : status == KERNEL_UNSUPPORTED ? ERROR_UNSUPPORTED
                                              : ERROR_INTERNAL;
    return error_set(error, code, "%s: %s", what, kernel_status_text(status));
}

int generator_create(struct model *model, const struct tokenizer *tokenizer, int32_t max_seqs,
                     int64_t prefill_tokens, struct generator **ret_generator, struct error *error)
{
    if (max_seqs < 1 || max_seqs > 1 << 16 || prefill_tokens < 1 || prefill_tokens > 1 << 24)
        return error_set(error, ERROR_INVALID, "a generator of %d sequences and %lld prefill tokens",
                         max_seqs, (long long)prefill_tokens);
    struct generator *generator = calloc(1, sizeof *generator);
    if (!generator)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a generator");
    const struct model_config *config = model_config(model);
    generator->model = model;
    generator->tokenizer = tokenizer;
    generator->vocab_size = (int32_t)config->vocab_size;
    generator->eos_id = config->eos_id;
    generator->bos_id = config->eos_id >= 0 ? config->eos_id : config->bos_id;
    generator->max_seqs = max_seqs;
    generator->prefill_tokens = prefill_tokens;

    size_t max_tokens = (size_t)(prefill_tokens > max_seqs ? prefill_tokens : max_seqs),
           seqs = (size_t)max_seqs;
    const struct {
        void *pointer;
        size_t count, size;
    } arrays[] = {
        {&generator->free_slots, seqs, sizeof(int32_t)},
        {&generator->filling, seqs, sizeof(struct prompt *)},
        {&generator->running, seqs, sizeof(struct choice *)},
        {&generator->ids, max_tokens, sizeof(int32_t)},
        {&generator->targets, max_tokens, sizeof(int32_t)},
        {&generator->scores, max_tokens, sizeof(float)},
        {&generator->score_top_ids, max_tokens * KERNEL_TOP_MAX, sizeof(int32_t)},
        {&generator->score_top_logprobs, max_tokens * KERNEL_TOP_MAX, sizeof(float)},
        {&generator->seq_starts, seqs + 1, sizeof(int32_t)},
        {&generator->slots, seqs, sizeof(int32_t)},
        {&generator->order, seqs, sizeof(int32_t)},
        {&generator->take, seqs, sizeof(int32_t)},
        {&generator->spans, seqs, sizeof(struct adapter_span)},
        {&generator->rows, seqs, sizeof(struct sample_row)},
        {&generator->sampled, seqs, sizeof(int32_t)},
        {&generator->logprobs, seqs, sizeof(float)},
        {&generator->top_ids, seqs * KERNEL_TOP_MAX, sizeof(int32_t)},
        {&generator->top_logprobs, seqs * KERNEL_TOP_MAX, sizeof(float)},
    };
    int status = 0;
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        void *memory = calloc(arrays[i].count, arrays[i].size);
        if (!memory) {
            status = error_set(error, ERROR_NO_MEMORY, "no memory for a generator of %d sequences", max_seqs);
            goto failed;
        }
        memcpy(arrays[i].pointer, &memory, sizeof memory);
    }
    /* Taken from the end: slot 0 first. */
    for (int32_t slot = max_seqs; slot-- > 0;)
        generator->free_slots[generator->n_free++] = slot;
    status = runner_create(model, (int64_t)max_tokens, max_seqs, &generator->runner, error);
    if (status)
        goto failed;
    status = state_pool_create(model, max_seqs + 1, &generator->states, error);
    if (status)
        goto failed;
    *ret_generator = generator;
    return 0;
failed:
    generator_free(generator);
    return status;
}

/* ---- requests come and go ---- */

static void unlink_request(struct generator *generator, struct request *request)
{
    struct request **at = &generator->first, *previous = NULL;
    while (*at != request) {
        previous = *at;
        at = &previous->next;
    }
    *at = request->next;
    if (generator->last == request)
        generator->last = previous;
}

static void release_slot(struct generator *generator, struct choice *choice)
{
    if (choice->slot >= 0)
        generator->free_slots[generator->n_free++] = choice->slot;
    choice->slot = -1;
    choice->state = CHOICE_OVER;
}

/* Take a request out of everything and tell its owner. */
static void end_request(struct generator *generator, struct request *request, int code,
                        const struct error *error)
{
    int32_t kept = 0;
    for (int32_t i = 0; i < generator->n_running; i++)
        if (generator->running[i]->request != request)
            generator->running[kept++] = generator->running[i];
    generator->n_running = kept;
    kept = 0;
    for (int32_t i = 0; i < generator->n_filling; i++)
        if (generator->filling[i]->request != request)
            generator->filling[kept++] = generator->filling[i];
    generator->n_filling = kept;
    for (int32_t i = 0; i < request->n_choices; i++)
        release_slot(generator, &request->choices[i]);
    generator->n_queued -= request->n_choices - request->n_seated;
    unlink_request(generator, request);

    request->callbacks.done(request->callbacks.arg, request->n_prompt_tokens,
                            request_completion_tokens(request), code, error);
    request_free(request);
}

static void end_all(struct generator *generator, int code, const struct error *error)
{
    while (generator->first)
        end_request(generator, generator->first, code, error);
}

void generator_free(struct generator *generator)
{
    if (!generator)
        return;
    struct error error = {0};
    error_set(&error, ERROR_CANCELLED, "the model is being unloaded");
    end_all(generator, error.code, &error);
    state_pool_free(generator->states);
    runner_free(generator->runner);
    free(generator->free_slots);
    free(generator->filling);
    free(generator->running);
    free(generator->ids);
    free(generator->targets);
    free(generator->scores);
    free(generator->score_top_ids);
    free(generator->score_top_logprobs);
    free(generator->seq_starts);
    free(generator->slots);
    free(generator->order);
    free(generator->take);
    free(generator->spans);
    free(generator->rows);
    free(generator->sampled);
    free(generator->logprobs);
    free(generator->top_ids);
    free(generator->top_logprobs);
    free(generator);
}

int generator_submit(struct generator *generator, const struct generation_request *source, uint64_t *ret_id,
                     struct error *error)
{
    struct request *request;
    int status = request_create(source, generator->last_id + 1, generator->vocab_size, generator->bos_id,
                                &request, error);
    if (status)
        return status;
    if (request->n_choices > INT32_MAX - generator->n_queued) {
        request_free(request);
        return error_set(error, ERROR_BUSY, "too many sequences wait");
    }
    if (generator->last)
        generator->last->next = request;
    else
        generator->first = request;
    generator->last = request;
    generator->n_queued += request->n_choices;
    *ret_id = request->id;
    generator->last_id = request->id;
    return 0;
}

void generator_cancel(struct generator *generator, uint64_t id)
{
    for (struct request *request = generator->first; request; request = request->next) {
        if (request->id == id) {
            struct error error = {0};
            error_set(&error, ERROR_CANCELLED, "the request was cancelled");
            end_request(generator, request, error.code, &error);
            return;
        }
    }
}

bool generator_idle(const struct generator *generator)
{
    return !generator->first;
}

bool generator_uses(const struct generator *generator, const struct adapter *adapter)
{
    for (const struct request *request = generator->first; request; request = request->next)
        if (request->adapter == adapter)
            return true;
    return false;
}

void generator_status(const struct generator *generator, struct generator_status *ret_status)
{
    *ret_status = (struct generator_status){
        .running = generator->max_seqs - generator->n_free,
        .waiting = generator->n_queued,
    };
}

/* ---- from seat to first step ---- */

/* A choice has said its last word. */
static void close_choice(struct generator *generator, struct choice *choice, enum finish_reason finish)
{
    choice_report(choice, finish);
    release_slot(generator, choice);
    choice->request->n_open--;
}

/* The state in the choice's slot is its prompt's: let it run. Failures of memory are noted in the request,
 * which end_finished then ends. */
static void start_choice(struct generator *generator, struct choice *choice)
{
    struct request *request = choice->request;
    int status = choice_start(choice, generator->tokenizer);
    if (!status && !request->params.max_tokens)
        status = choice_finish(choice);
    if (status) {
        request->failure = status;
        return;
    }
    if (!request->params.max_tokens) {
        close_choice(generator, choice, FINISH_LENGTH);
        return;
    }
    choice_report(choice, FINISH_NONE);
    choice->state = CHOICE_RUNNING;
    int32_t at = generator->n_running;
    while (at > 0 && generator->running[at - 1]->request->adapter != request->adapter)
        at--;
    if (at == 0)
        at = generator->n_running;
    memmove(&generator->running[at + 1], &generator->running[at],
            (size_t)(generator->n_running - at) * sizeof(struct choice *));
    generator->running[at] = choice;
    generator->n_running++;
}

static bool prompt_is_whole(const struct prompt *prompt)
{
    return prompt->n_run == prompt->n_ids - 1;
}

/* Give state to the seated choices of a prompt that has just become whole. */
static int share_prompt(struct generator *generator, struct prompt *prompt, struct error *error)
{
    const struct request *request = prompt->request;
    struct choice *choices = &request->choices[(prompt - request->prompts) * request->n];
    int32_t seated = request->n - prompt->n_queued;
    int status = 0;
    if (prompt->n_queued)
        status = state_pool_copy(generator->states, generator->max_seqs, prompt->slot);
    for (int32_t i = 0; i < seated && !status; i++)
        if (choices[i].slot != prompt->slot)
            status = state_pool_copy(generator->states, choices[i].slot, prompt->slot);
    if (status)
        return error_set(error, status, "copying a recurrent state: %s", error_code_name(status));
    prompt->slot = generator->max_seqs;
    for (int32_t i = 0; i < seated; i++)
        start_choice(generator, &choices[i]);
    return 0;
}

static int seat_choice(struct generator *generator, struct choice *choice, struct error *error)
{
    struct prompt *prompt = choice->prompt;
    choice->slot = generator->free_slots[--generator->n_free];
    choice->state = CHOICE_SEATED;
    generator->n_queued--;
    prompt->n_queued--;
    choice->request->n_seated++;

    int status = 0;
    bool whole = prompt_is_whole(prompt);
    if (prompt->slot < 0 || prompt->n_ids == 1)
        status = state_pool_reset(generator->states, choice->slot);
    else if (whole)
        status = state_pool_copy(generator->states, choice->slot, prompt->slot);
    if (status)
        return error_set(error, status, "preparing a recurrent state: %s", error_code_name(status));

    if (prompt->slot < 0) {
        prompt->slot = choice->slot;
        if (request_scores_prompt(choice->request) && !prompt->implicit &&
            score_list_push(&prompt->scores, prompt->ids[0], NAN, NULL, NULL))
            choice->request->failure = ERROR_NO_MEMORY;
        if (!whole)
            generator->filling[generator->n_filling++] = prompt;
    }
    if (whole)
        start_choice(generator, choice);
    return 0;
}

/* Seats to those who wait, first come first served. */
static int seat_waiting(struct generator *generator, struct error *error)
{
    for (struct request *request = generator->first; request && generator->n_queued;
         request = request->next) {
        while (request->n_seated < request->n_choices && !request->failure) {
            if (!generator->n_free)
                return 0;
            int status = seat_choice(generator, &request->choices[request->n_seated], error);
            if (status)
                return status;
        }
    }
    return 0;
}

/* ---- quanta ---- */

/* Runs of neighbours that use the same adapter. */
static void add_span(struct generator *generator, int32_t *n_spans, const struct adapter *adapter,
                     int32_t seq)
{
    if (*n_spans && generator->spans[*n_spans - 1].adapter == adapter)
        generator->spans[*n_spans - 1].seq_end = seq + 1;
    else
        generator->spans[(*n_spans)++] =
            (struct adapter_span){.adapter = adapter, .seq_begin = seq, .seq_end = seq + 1};
}

/* Divide the chunk: everyone who fills gets an equal share, but not less than PREFILL_SHARE_MIN, oldest
 * first; what is left goes to the oldest that can use it. */
static void divide_chunk(struct generator *generator)
{
    int64_t left = generator->prefill_tokens;
    int64_t share = left / generator->n_filling;
    if (share < PREFILL_SHARE_MIN)
        share = PREFILL_SHARE_MIN;
    for (int32_t i = 0; i < generator->n_filling; i++)
        generator->take[i] = 0;
    for (int round = 0; round < 2; round++) {
        for (int32_t i = 0; i < generator->n_filling && left; i++) {
            const struct prompt *prompt = generator->filling[i];
            int64_t need = prompt->n_ids - 1 - prompt->n_run - generator->take[i];
            int64_t most = round == 0 && share < left ? share : left;
            int64_t take = need < most ? need : most;
            generator->take[i] += (int32_t)take;
            left -= take;
        }
    }
}

/* Scores of the rows [begin,end) of the last forward, which belong to order[from..to). */
static int score_rows(struct generator *generator, int32_t from, int32_t to, struct error *error)
{
    int32_t begin = generator->seq_starts[from], end = generator->seq_starts[to];
    int32_t n_top = generator->filling[generator->order[from]]->scores.n_top;
    int status = runner_score(generator->runner, begin, end, generator->targets + begin, generator->scores,
                              NULL, n_top, n_top ? generator->score_top_ids : NULL,
                              n_top ? generator->score_top_logprobs : NULL, error);
    for (int32_t s = from; s < to && !status; s++) {
        struct prompt *prompt = generator->filling[generator->order[s]];
        for (int32_t row = generator->seq_starts[s]; row < generator->seq_starts[s + 1]; row++) {
            size_t top = (size_t)(row - begin) * (size_t)n_top;
            if (score_list_push(&prompt->scores, generator->targets[row], generator->scores[row - begin],
                                generator->score_top_ids + top, generator->score_top_logprobs + top)) {
                prompt->request->failure = ERROR_NO_MEMORY;
                break;
            }
        }
    }
    return status;
}

static int score_chunk(struct generator *generator, int32_t n_seqs, struct error *error)
{
    for (int32_t from = 0, to; from < n_seqs; from = to) {
        const struct prompt *prompt = generator->filling[generator->order[from]];
        to = from + 1;
        if (!request_scores_prompt(prompt->request))
            continue;
        for (; to < n_seqs; to++) {
            const struct prompt *next = generator->filling[generator->order[to]];
            if (!request_scores_prompt(next->request) || next->scores.n_top != prompt->scores.n_top)
                break;
        }
        int status = score_rows(generator, from, to, error);
        if (status)
            return status;
    }
    return 0;
}

static int prefill(struct generator *generator, struct error *error)
{
    divide_chunk(generator);
    int32_t n_seqs = 0;
    for (int32_t i = 0; i < generator->n_filling; i++) {
        if (!generator->take[i])
            continue;
        const struct adapter *adapter = generator->filling[i]->request->adapter;
        int32_t at = n_seqs++;
        for (; at > 0; at--) {
            int32_t before = generator->order[at - 1];
            if ((uintptr_t)generator->filling[before]->request->adapter <= (uintptr_t)adapter)
                break;
            generator->order[at] = before;
        }
        generator->order[at] = i;
    }
    int32_t n_tokens = 0, n_spans = 0;
    for (int32_t s = 0; s < n_seqs; s++) {
        const struct prompt *prompt = generator->filling[generator->order[s]];
        int32_t take = generator->take[generator->order[s]];
        memcpy(generator->ids + n_tokens, prompt->ids + prompt->n_run, (size_t)take * sizeof(int32_t));
        memcpy(generator->targets + n_tokens, prompt->ids + prompt->n_run + 1,
               (size_t)take * sizeof(int32_t));
        generator->seq_starts[s] = n_tokens;
        generator->slots[s] = prompt->slot;
        add_span(generator, &n_spans, prompt->request->adapter, s);
        n_tokens += take;
    }
    generator->seq_starts[n_seqs] = n_tokens;
    struct forward_request forward = {
        .n_seqs = n_seqs,
        .seq_starts = generator->seq_starts,
        .ids = generator->ids,
        .slots = generator->slots,
        .states = generator->states,
        .spans = generator->spans,
        .n_spans = n_spans,
    };
    int status = runner_forward(generator->runner, &forward, error);
    if (!status)
        status = score_chunk(generator, n_seqs, error);
    if (status)
        return status;

    for (int32_t i = 0; i < generator->n_filling; i++)
        generator->filling[i]->n_run += generator->take[i];
    int32_t kept = 0, n_filling = generator->n_filling;
    generator->n_filling = 0;
    for (int32_t i = 0; i < n_filling; i++) {
        struct prompt *prompt = generator->filling[i];
        if (!prompt_is_whole(prompt))
            generator->filling[kept++] = prompt;
        else if (!status)
            status = share_prompt(generator, prompt, error);
    }
    generator->n_filling = kept;
    return status;
}

static int decode(struct generator *generator, struct error *error)
{
    int32_t n = generator->n_running, n_spans = 0;
    bool tops = false;
    for (int32_t i = 0; i < n; i++) {
        const struct choice *choice = generator->running[i];
        const struct generation_params *params = &choice->request->params;
        generator->ids[i] = choice->history[choice->n_history - 1];
        generator->seq_starts[i] = i;
        generator->slots[i] = choice->slot;
        add_span(generator, &n_spans, choice->request->adapter, i);
        tops |= params->logprobs > 0;
        generator->rows[i] = (struct sample_row){
            .temperature = params->temperature,
            .top_k = params->top_k,
            .top_p = params->top_p,
            .min_p = params->min_p,
            .repetition_penalty = params->repetition_penalty,
            .presence_penalty = params->presence_penalty,
            .frequency_penalty = params->frequency_penalty,
            .history = choice->history,
            .n_history = choice->n_history,
            .n_prompt = choice->prompt->n_ids,
            .bias = params->bias,
            .n_bias = params->n_bias,
            .seed = choice->seed,
            .position = (uint64_t)choice->n_generated,
            .banned = params->ignore_eos ? generator->eos_id : -1,
            .n_top = params->logprobs > 0 ? params->logprobs : 0,
        };
    }
    generator->seq_starts[n] = n;
    struct forward_request forward = {
        .n_seqs = n,
        .seq_starts = generator->seq_starts,
        .ids = generator->ids,
        .slots = generator->slots,
        .states = generator->states,
        .spans = generator->spans,
        .n_spans = n_spans,
    };
    const float *logits;
    int status = runner_forward(generator->runner, &forward, error);
    if (!status)
        status = runner_logits(generator->runner, NULL, n, &logits, error);
    if (status)
        return status;
    struct sample_args args = {
        .rows = n,
        .vocab = generator->vocab_size,
        .logits = logits,
        .logits_stride = generator->vocab_size,
        .row = generator->rows,
        .ids = generator->sampled,
        .logprobs = generator->logprobs,
        .top_ids = tops ? generator->top_ids : NULL,
        .top_logprobs = tops ? generator->top_logprobs : NULL,
    };
    status = check_kernel(model_ops(generator->model)->sample(model_device(generator->model), &args),
                          "choosing the next token", error);
    if (status)
        return status;

    int32_t kept = 0;
    for (int32_t i = 0; i < n; i++) {
        struct choice *choice = generator->running[i];
        enum finish_reason finish = FINISH_NONE;
        status = choice_accept(choice, generator->tokenizer, generator->eos_id, generator->sampled[i],
                               generator->logprobs[i], generator->top_ids + (size_t)i * KERNEL_TOP_MAX,
                               generator->top_logprobs + (size_t)i * KERNEL_TOP_MAX, &finish);
        if (status) {
            choice->request->failure = status;
        } else if (finish != FINISH_NONE) {
            close_choice(generator, choice, finish);
            continue;
        } else {
            choice_report(choice, FINISH_NONE);
        }
        generator->running[kept++] = choice;
    }
    generator->n_running = kept;
    return 0;
}

/* Requests whose choices are all over, and those that ran out of memory on the way. Seats go in order: behind
 * the first request that has none nothing can have happened. */
static void end_finished(struct generator *generator)
{
    struct request *next;
    for (struct request *request = generator->first; request && request->n_seated; request = next) {
        next = request->next;
        if (request->failure) {
            struct error error = {0};
            error_set(&error, request->failure, "no memory to go on with the request");
            end_request(generator, request, error.code, &error);
        } else if (!request->n_open) {
            end_request(generator, request, 0, NULL);
        }
    }
}

int generator_advance(struct generator *generator, struct error *error)
{
    struct error reason = {0};
    int status = seat_waiting(generator, &reason);
    if (!status) {
        if (generator->n_filling && (!generator->n_running || !generator->filled_last)) {
            status = prefill(generator, &reason);
            generator->filled_last = true;
        } else if (generator->n_running) {
            status = decode(generator, &reason);
            generator->filled_last = false;
        }
    }
    if (status) {
        end_all(generator, status, &reason);
        if (error)
            *error = reason;
        return status;
    }
    end_finished(generator);
    return generator->max_seqs - generator->n_free + generator->n_queued;
}
