/* scorer.c: see scorer.h.
 *
 * A node is ready when its parent has run. A batch takes ready nodes, the deepest first, the longest first among them. Each
 * starts from its parent's state, as often as there are children; what it ends with is kept in a slot where it has children, or goes
 * on in another batch, and nowhere else. A parent's slot is free when the last child has run its first tokens. A node that needs a
 * slot is taken only while as many stay free as its subtree is high: the last one taken can then always be finished, which gives
 * back what the one before needs, and so on.
 *
 * Few rows: the CPU's products sum in another order when there are few of them, so a batch is filled up to ROWS_LEAST with tokens of
 * no account, and the head always sees the same number of rows there. */
#include "engine/evaluation/scorer.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS_LEAST = 64, HEAD_ROWS_HOST = 64 };

enum node_state { NODE_WAITING, NODE_READY, NODE_RUNNING, NODE_DONE };

struct node_run {
    enum node_state state;
    int32_t slot;      /* what it ended with so far; -1 = none */
    int32_t n_run;     /* tokens */
    int32_t n_to_come; /* children that have not begun */
};

struct scorer {
    struct model *model;
    struct scorer_options options;
    int32_t head_rows; /* of one call */
    bool padded;       /* of each call exactly */
    struct runner *runner;
    struct state_pool *states; /* max_states */
    int32_t *free_slots;       /* [n_free] */
    int32_t n_free;
    struct scorer_status status;

    /* The window. */
    const struct forest_row *rows;
    struct request_score *scores;
    struct forest forest;
    struct node_run *runs; /* [n_nodes] */
    int32_t *ready;        /* [n_ready] nodes that are ready or running */
    int32_t n_ready;

    /* The batch; arrays of the size in brackets. */
    int32_t n_seqs, n_tokens;
    int32_t *taken;        /* [max_seqs] nodes */
    int32_t *ids;          /* [max_tokens] */
    int32_t *seq_starts;   /* [max_seqs+2] */
    int32_t *from, *slots; /* [max_seqs+1] states read, written */
    int32_t n_asked;       /* in the arrays below, [head_rows] */
    int32_t *asked_rows, *asked_targets, *asked_requests, *argmax;
    float *logprobs;
};

static int no_memory(struct error *error)
{
    return error_set(error, ERROR_NO_MEMORY, "no memory for an evaluation");
}

static int device_error(int status, const char *what, struct error *error)
{
    return status ? error_set(error, status, "%s: %s", what, error_code_name(status)) : 0;
}

/* ---- making one ---- */

static int make_arrays(struct scorer *scorer, struct error *error)
{
    const size_t seqs = (size_t)scorer->options.max_seqs, head = (size_t)scorer->head_rows;
    scorer->free_slots = malloc((size_t)scorer->options.max_states * sizeof *scorer->free_slots);
    scorer->taken = malloc(seqs * sizeof *scorer->taken);
    scorer->ids = malloc((size_t)scorer->options.max_tokens * sizeof *scorer->ids);
    scorer->seq_starts = calloc(seqs + 2, sizeof *scorer->seq_starts);
    scorer->from = malloc((seqs + 1) * sizeof *scorer->from);
    scorer->slots = malloc((seqs + 1) * sizeof *scorer->slots);
    scorer->asked_rows = malloc(head * sizeof *scorer->asked_rows);
    scorer->asked_targets = malloc(head * sizeof *scorer->asked_targets);
    scorer->asked_requests = malloc(head * sizeof *scorer->asked_requests);
    scorer->logprobs = malloc(head * sizeof *scorer->logprobs);
    scorer->argmax = malloc(head * sizeof *scorer->argmax);
    if (!scorer->free_slots || !scorer->taken || !scorer->ids || !scorer->seq_starts || !scorer->from ||
        !scorer->slots || !scorer->asked_rows || !scorer->asked_targets || !scorer->asked_requests ||
        !scorer->logprobs || !scorer->argmax)
        return no_memory(error);
    for (int32_t slot = scorer->options.max_states; slot-- > 0;)
        scorer->free_slots[scorer->n_free++] = slot;
    return 0;
}

int scorer_create(struct model *model, const struct scorer_options *options, struct scorer **ret_scorer,
                  struct error *error)
{
    struct kernel_device_info info;
    if (options->max_tokens < 2 * ROWS_LEAST || options->max_tokens > INT32_MAX || options->max_states < 2 ||
        options->max_states > 1 << 16 || options->max_seqs < 1 || options->max_seqs > 1 << 16)
        return error_set(error, ERROR_INVALID,
                         "a scorer of %" PRId64 " tokens, %" PRId32 " sequences and %" PRId32 " states",
                         options->max_tokens, options->max_seqs, options->max_states);
    struct scorer *scorer = calloc(1, sizeof *scorer);
    if (!scorer)
        return no_memory(error);
    *scorer = (struct scorer){.model = model, .options = *options};
    int status =
        runner_create_for_scores(model, options->max_tokens, options->max_seqs + 1, &scorer->runner, error);
    if (!status)
        status = state_pool_create(model, options->max_states, &scorer->states, error);
    if (!status)
        status = device_error(model_ops(model)->device_query(model_device(model), &info) ? ERROR_DEVICE : 0,
                              "asking the device", error);
    if (!status) {
        int64_t most = runner_score_most(scorer->runner);
        scorer->padded = info.is_host;
        scorer->head_rows = (int32_t)(info.is_host && most > HEAD_ROWS_HOST ? HEAD_ROWS_HOST : most);
        status = make_arrays(scorer, error);
    }
    if (status)
        scorer_free(scorer);
    else
        *ret_scorer = scorer;
    return status;
}

static void end_window(struct scorer *scorer)
{
    for (int32_t i = 0; i < scorer->forest.n_nodes; i++)
        if (scorer->runs[i].slot >= 0)
            scorer->free_slots[scorer->n_free++] = scorer->runs[i].slot;
    forest_free(&scorer->forest);
    free(scorer->runs);
    free(scorer->ready);
    scorer->runs = NULL;
    scorer->ready = NULL;
    scorer->n_ready = 0;
}

void scorer_free(struct scorer *scorer)
{
    if (!scorer)
        return;
    end_window(scorer);
    runner_free(scorer->runner);
    state_pool_free(scorer->states);
    free(scorer->free_slots);
    free(scorer->taken);
    free(scorer->ids);
    free(scorer->seq_starts);
    free(scorer->from);
    free(scorer->slots);
    free(scorer->asked_rows);
    free(scorer->asked_targets);
    free(scorer->asked_requests);
    free(scorer->logprobs);
    free(scorer->argmax);
    free(scorer);
}

void scorer_status(const struct scorer *scorer, struct scorer_status *ret_status)
{
    *ret_status = scorer->status;
}

/* ---- a window ---- */

static int32_t own_tokens(const struct forest_node *node)
{
    return node->end - node->start;
}

/* The deepest first, then the longest, then in the forest's order. */
static int compare_nodes(const void *left, const void *right, void *arg)
{
    const struct forest_node *nodes = arg;
    const int32_t i = *(const int32_t *)left, j = *(const int32_t *)right;
    const struct forest_node *a = &nodes[i], *b = &nodes[j];
    if (a->level != b->level)
        return a->level > b->level ? -1 : 1;
    if (own_tokens(a) != own_tokens(b))
        return own_tokens(a) > own_tokens(b) ? -1 : 1;
    return (i > j) - (i < j);
}

int scorer_begin(struct scorer *scorer, const struct forest_row *rows, int32_t n_rows,
                 struct request_score *scores, struct error *error)
{
    end_window(scorer);
    for (int32_t i = 0; i < n_rows; i++)
        if (rows[i].n_context < 1)
            return error_set(error, ERROR_INVALID, "a request without a context");
    int status = forest_create(rows, n_rows, scorer->options.share, &scorer->forest, error);
    if (status)
        return status;
    const size_t n = (size_t)scorer->forest.n_nodes + 1;
    scorer->runs = calloc(n, sizeof *scorer->runs);
    scorer->ready = malloc(n * sizeof *scorer->ready);
    if (!scorer->runs || !scorer->ready) {
        forest_free(&scorer->forest);
        return no_memory(error);
    }
    for (int32_t i = 0; i < scorer->forest.n_nodes; i++) {
        const struct forest_node *node = &scorer->forest.nodes[i];
        scorer->runs[i] = (struct node_run){.slot = -1, .n_to_come = node->n_children};
        if (node->parent >= 0)
            continue;
        scorer->runs[i].state = NODE_READY;
        scorer->ready[scorer->n_ready++] = i;
    }
    for (int32_t i = 0; i < n_rows; i++)
        scores[i] = (struct request_score){.greedy = true, .n_missing = rows[i].n_ids - rows[i].n_context};
    scorer->rows = rows;
    scorer->scores = scores;
    scorer->status.tokens_said += scorer->forest.n_row_tokens;
    return 0;
}

/* ---- a batch ---- */

/* Tokens of the node that go into a batch with this much room: all that is left of it, or what a batch holds of a longer one. */
static int32_t tokens_for(const struct scorer *scorer, int32_t index, int64_t room)
{
    int64_t left = own_tokens(&scorer->forest.nodes[index]) - scorer->runs[index].n_run;
    return (int32_t)(left <= room ? left : left > scorer->options.max_tokens ? room : 0);
}

/* Is what it ends with wanted? */
static bool goes_on(const struct scorer *scorer, int32_t index, int32_t tokens)
{
    const struct forest_node *node = &scorer->forest.nodes[index];
    return node->n_children || scorer->runs[index].n_run + tokens < own_tokens(node);
}

/* Can it have a slot without making the last one taken wait for ever? */
static bool may_sit(const struct scorer *scorer, int32_t index, int32_t tokens)
{
    return scorer->runs[index].slot >= 0 || !goes_on(scorer, index, tokens) ||
           scorer->n_free >= 1 + scorer->forest.nodes[index].height;
}

static void take(struct scorer *scorer, int32_t index, int32_t tokens)
{
    const struct forest_node *node = &scorer->forest.nodes[index];
    struct node_run *run = &scorer->runs[index];
    int32_t from = run->slot;
    if (!run->n_run && node->parent >= 0)
        from = scorer->runs[node->parent].slot;
    if (run->slot < 0 && goes_on(scorer, index, tokens))
        run->slot = scorer->free_slots[--scorer->n_free];
    run->state = NODE_RUNNING;
    memcpy(scorer->ids + scorer->n_tokens, node->ids + run->n_run, (size_t)tokens * sizeof *scorer->ids);
    scorer->taken[scorer->n_seqs] = index;
    scorer->from[scorer->n_seqs] = from;
    scorer->slots[scorer->n_seqs] = run->slot;
    scorer->n_tokens += tokens;
    scorer->seq_starts[++scorer->n_seqs] = scorer->n_tokens;
}

static void fill_batch(struct scorer *scorer)
{
    scorer->n_seqs = scorer->n_tokens = 0;
    qsort_r(scorer->ready, (size_t)scorer->n_ready, sizeof *scorer->ready, compare_nodes,
            scorer->forest.nodes);
    for (int32_t i = 0; i < scorer->n_ready && scorer->n_seqs < scorer->options.max_seqs; i++) {
        int64_t room = scorer->options.max_tokens - scorer->n_tokens;
        int32_t tokens = tokens_for(scorer, scorer->ready[i], room);
        if (!room)
            break;
        if (tokens && may_sit(scorer, scorer->ready[i], tokens))
            take(scorer, scorer->ready[i], tokens);
    }
}

static int run_batch(struct scorer *scorer, struct error *error)
{
    int32_t n_seqs = scorer->n_seqs;
    if (scorer->n_tokens < ROWS_LEAST) {
        memset(scorer->ids + scorer->n_tokens, 0,
               (size_t)(ROWS_LEAST - scorer->n_tokens) * sizeof *scorer->ids);
        scorer->from[n_seqs] = scorer->slots[n_seqs] = -1;
        scorer->seq_starts[++n_seqs] = ROWS_LEAST;
    }
    const struct adapter_span span = {scorer->options.adapter, 0, n_seqs};
    struct forward_request request = {.n_seqs = n_seqs,
                                      .seq_starts = scorer->seq_starts,
                                      .ids = scorer->ids,
                                      .slots = scorer->slots,
                                      .from = scorer->from,
                                      .states = scorer->states,
                                      .spans = &span,
                                      .n_spans = 1,
                                      .yield = scorer->options.yield,
                                      .yield_arg = scorer->options.yield_arg};
    scorer->status.tokens_run += scorer->n_tokens;
    scorer->status.batches++;
    return runner_forward(scorer->runner, &request, error);
}

/* ---- scores ---- */

/* Score what has been asked. */
static int answer(struct scorer *scorer, struct error *error)
{
    const int32_t n_rows = scorer->padded ? scorer->head_rows : scorer->n_asked;
    if (!scorer->n_asked)
        return 0;
    for (int32_t i = scorer->n_asked; i < n_rows; i++) {
        scorer->asked_rows[i] = scorer->asked_rows[scorer->n_asked - 1];
        scorer->asked_targets[i] = scorer->asked_targets[scorer->n_asked - 1];
    }
    int status = runner_score_rows(scorer->runner, scorer->asked_rows, n_rows, scorer->asked_targets,
                                   scorer->logprobs, scorer->argmax, error);
    for (int32_t i = 0; !status && i < scorer->n_asked; i++) {
        struct request_score *score = &scorer->scores[scorer->asked_requests[i]];
        score->log_likelihood += (double)scorer->logprobs[i];
        score->greedy = score->greedy && scorer->argmax[i] == scorer->asked_targets[i];
        score->n_missing--;
    }
    scorer->n_asked = 0;
    return status;
}

static int ask(struct scorer *scorer, int32_t row, const struct forest_mark *mark, struct error *error)
{
    scorer->asked_rows[scorer->n_asked] = row;
    scorer->asked_targets[scorer->n_asked] = scorer->rows[mark->row].ids[mark->position + 1];
    scorer->asked_requests[scorer->n_asked] = mark->row;
    return ++scorer->n_asked == scorer->head_rows ? answer(scorer, error) : 0;
}

static int score_sequence(struct scorer *scorer, int32_t seq, struct error *error)
{
    const struct forest_node *node = &scorer->forest.nodes[scorer->taken[seq]];
    const int32_t begin = node->start + scorer->runs[scorer->taken[seq]].n_run,
                  end = begin + scorer->seq_starts[seq + 1] - scorer->seq_starts[seq];
    int status = 0;
    for (int32_t i = 0; !status && i < node->n_marks; i++) {
        const struct forest_mark *mark = &scorer->forest.marks[node->first_mark + i];
        if (mark->position >= begin && mark->position < end)
            status = ask(scorer, scorer->seq_starts[seq] + mark->position - begin, mark, error);
    }
    return status;
}

static int score_batch(struct scorer *scorer, struct error *error)
{
    int status = 0;
    for (int32_t seq = 0; !status && seq < scorer->n_seqs; seq++)
        status = score_sequence(scorer, seq, error);
    return status ? status : answer(scorer, error);
}

static void give_back(struct scorer *scorer, struct node_run *run)
{
    if (run->slot >= 0)
        scorer->free_slots[scorer->n_free++] = run->slot;
    run->slot = -1;
}

/* What has run makes its children ready; states that nothing will start from any more are given back. */
static void settle(struct scorer *scorer)
{
    for (int32_t seq = 0; seq < scorer->n_seqs; seq++) {
        const int32_t index = scorer->taken[seq];
        const struct forest_node *node = &scorer->forest.nodes[index];
        struct node_run *run = &scorer->runs[index];
        if (!run->n_run && node->parent >= 0 && !--scorer->runs[node->parent].n_to_come)
            give_back(scorer, &scorer->runs[node->parent]);
        run->n_run += scorer->seq_starts[seq + 1] - scorer->seq_starts[seq];
        if (run->n_run < own_tokens(node))
            continue;
        run->state = NODE_DONE;
        if (!run->n_to_come)
            give_back(scorer, run);
    }
    scorer->n_ready = 0;
    for (int32_t i = 0; i < scorer->forest.n_nodes; i++) {
        const int32_t parent = scorer->forest.nodes[i].parent;
        struct node_run *run = &scorer->runs[i];
        if (run->state == NODE_WAITING && scorer->runs[parent].state == NODE_DONE)
            run->state = NODE_READY;
        if (run->state == NODE_READY || run->state == NODE_RUNNING)
            scorer->ready[scorer->n_ready++] = i;
    }
}

int scorer_launch(struct scorer *scorer, int32_t *ret_tokens, struct error *error)
{
    scorer->n_seqs = scorer->n_tokens = 0;
    if (scorer->n_ready)
        fill_batch(scorer);
    *ret_tokens = scorer->n_tokens;
    if (scorer->n_ready && !scorer->n_seqs)
        return error_set(error, ERROR_INVALID, "%" PRId32 " recurrent states are too few for these prompts",
                         scorer->options.max_states);
    return scorer->n_seqs ? run_batch(scorer, error) : 0;
}

int scorer_collect(struct scorer *scorer, struct error *error)
{
    int status = score_batch(scorer, error);
    if (status)
        return status;
    settle(scorer);
    return scorer->n_ready > 0;
}

int scorer_advance(struct scorer *scorer, struct error *error)
{
    int32_t tokens;
    int status = scorer_launch(scorer, &tokens, error);
    return status ? status : scorer_collect(scorer, error);
}
