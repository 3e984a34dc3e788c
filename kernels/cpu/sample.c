/* sample.c: choosing the next token; a row is a task.
 *
 * The vocabulary is never sorted. Every filter keeps the first so many ids in descending order of logit (ties to the
 * lowest id), so it is told by the last id that it keeps, its `cut`. That one is found by a selection that halves a
 * list until the wanted mass (a number of ids for top-k, of probability for top-p) is reached, on a list that one pass
 * over the logits has already made short. The draw then walks the kept ids in ascending order. */
#include "kernels/cpu/check.h"
#include "kernels/cpu/device.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/vector.h"

enum {
    BLOCK = 64 * VEC_LANES, /* ids of one partial sum of weights */
    GROUPS = 64,            /* vectors of group maxima */
    SHORT_LIST = 256,       /* so many wanted ids are found by group maxima; at most GROUPS x VEC_LANES */
};

struct candidate {
    float logit, weight;
    int32_t id;
};

/* Everything of one row. The arrays are the thread's scratch, of vocab elements rounded up to whole vectors. */
struct row_work {
    const struct sample_row *row;
    const float *logits; /* the model's */
    int64_t vocab;
    float *adjusted;
    float *weights;  /* exp((adjusted - highest) / temperature) */
    int32_t *counts; /* of an id in the generated part */
    struct candidate *list;
    double *sums; /* of the weights of each block */
};

static int64_t round_up(int64_t count, int64_t unit)
{
    return (count + unit - 1) / unit * unit;
}

static size_t work_bytes(int64_t vocab)
{
    size_t padded = (size_t)round_up(vocab, BLOCK);
    return padded * (2 * sizeof(float) + sizeof(int32_t) + sizeof(struct candidate)) +
           padded / BLOCK * sizeof(double);
}

static void work_carve(struct row_work *work, void *scratch, int64_t vocab)
{
    int64_t padded = round_up(vocab, BLOCK);
    work->vocab = vocab;
    work->sums = scratch;
    work->adjusted = (float *)(work->sums + padded / BLOCK);
    work->weights = work->adjusted + padded;
    work->counts = (int32_t *)(work->weights + padded);
    work->list = (struct candidate *)(work->counts + padded);
}

/* ---- adjusting ---- */

/* Repetition over the whole history, presence and frequency over what was generated, an id once each. */
static void apply_penalties(struct row_work *work)
{
    const struct sample_row *row = work->row;
    float *adjusted = work->adjusted;
    if (row->n_history == 0)
        return;
    memset(work->counts, 0, (size_t)work->vocab * sizeof(*work->counts));
    for (int32_t i = 0; i < row->n_history; i++) {
        int32_t id = row->history[i];
        if (work->counts[id]++ == 0)
            adjusted[id] = adjusted[id] > 0.0f ? adjusted[id] / row->repetition_penalty
                                               : adjusted[id] * row->repetition_penalty;
    }
    for (int32_t i = 0; i < row->n_history; i++)
        work->counts[row->history[i]] = 0;
    for (int32_t i = row->n_prompt; i < row->n_history; i++)
        work->counts[row->history[i]]++;
    for (int32_t i = row->n_prompt; i < row->n_history; i++) {
        int32_t *count = &work->counts[row->history[i]];
        if (*count > 0)
            adjusted[row->history[i]] -= row->presence_penalty + row->frequency_penalty * (float)*count;
        *count = 0;
    }
}

/* What may not be chosen becomes minus infinity: NaN, the banned id, the padding of the last vector. */
static void adjust(struct row_work *work)
{
    const struct sample_row *row = work->row;
    float *adjusted = work->adjusted;
    memcpy(adjusted, work->logits, (size_t)work->vocab * sizeof(*adjusted));
    apply_penalties(work);
    for (int32_t i = 0; i < row->n_bias; i++)
        adjusted[row->bias[i].id] += row->bias[i].bias;
    if (row->banned >= 0 && row->banned < work->vocab)
        adjusted[row->banned] = -INFINITY;
    int64_t padded = round_up(work->vocab, VEC_LANES);
    for (int64_t i = work->vocab; i < padded; i++)
        adjusted[i] = -INFINITY;
    for (int64_t i = 0; i < padded; i += VEC_LANES) {
        vec v = vec_load(adjusted + i);
        vec_store(adjusted + i, vec_select(v == v, v, vec_set1(-INFINITY)));
    }
}

/* ---- order ---- */

static bool comes_before(const struct candidate *a, const struct candidate *b)
{
    return a->logit > b->logit || (a->logit == b->logit && a->id < b->id);
}

static void swap(struct candidate *list, int64_t i, int64_t j)
{
    struct candidate other = list[i];
    list[i] = list[j];
    list[j] = other;
}

/* Moves what comes before the middle of three elements to the front; returns how many, at which place that element
 * then lies. */
static int64_t partition(struct candidate *list, int64_t count)
{
    int64_t middle = count / 2, last = count - 1;
    if (comes_before(&list[middle], &list[0]))
        swap(list, middle, 0);
    if (comes_before(&list[last], &list[0]))
        swap(list, last, 0);
    if (comes_before(&list[middle], &list[last]))
        swap(list, middle, last);
    int64_t before = 0;
    for (int64_t i = 0; i < last; i++)
        if (comes_before(&list[i], &list[last]))
            swap(list, i, before++);
    swap(list, before, last);
    return before;
}

static double mass_of(const struct candidate *list, int64_t count, bool by_weight)
{
    if (!by_weight)
        return (double)count;
    double mass = 0;
    for (int64_t i = 0; i < count; i++)
        mass += (double)list[i].weight;
    return mass;
}

/* The shortest beginning of the list, in descending order, whose mass reaches `wanted`; at least one. Returns its
 * length; the list's first so many elements are it, in any order, the last of them in its place. */
static int64_t select_mass(struct candidate *list, int64_t count, double wanted, bool by_weight)
{
    int64_t first = 0, end = count;
    while (end - first > 1) {
        int64_t pivot = first + partition(list + first, end - first);
        double before = mass_of(list + first, pivot - first, by_weight);
        if (pivot > first && before >= wanted) {
            end = pivot;
            continue;
        }
        before += mass_of(list + pivot, 1, by_weight);
        if (before >= wanted)
            return pivot + 1;
        wanted -= before;
        first = pivot + 1;
    }
    return end;
}

/* A number that at least `wanted` of the values reach, as high as maxima over groups show it; minus infinity when
 * they do not. The groups are the lanes of GROUPS vectors. */
static float lower_bound(const float *values, int64_t count, int64_t wanted)
{
    vec maxima[GROUPS];
    int64_t vectors = count / VEC_LANES;
    if (vectors < GROUPS || wanted > SHORT_LIST)
        return -INFINITY;
    for (int64_t g = 0; g < GROUPS; g++)
        maxima[g] = vec_load(values + g * VEC_LANES);
    for (int64_t v = GROUPS; v < vectors; v++)
        maxima[v % GROUPS] = vec_max(maxima[v % GROUPS], vec_load(values + v * VEC_LANES));

    struct candidate list[GROUPS * VEC_LANES];
    for (int64_t i = 0; i < GROUPS * VEC_LANES; i++)
        list[i] = (struct candidate){.logit = maxima[i / VEC_LANES][i % VEC_LANES], .id = (int32_t)i};
    return list[select_mass(list, GROUPS * VEC_LANES, (double)wanted, false) - 1].logit;
}

/* Lists what is above or at the bound (all but NaN when it is minus infinity). Returns how many. */
static int64_t list_from(const float *values, const float *weights, int64_t count, float bound,
                         struct candidate *list)
{
    int64_t found = 0, i = 0;
    for (; i + VEC_LANES <= count; i += VEC_LANES) {
        vec v = vec_load(values + i);
        uint32_t bits = vec_greater_bits(v, vec_set1(bound)) | vec_equal_bits(v, vec_set1(bound));
        for (; bits != 0; bits &= bits - 1) {
            int64_t at = i + __builtin_ctz(bits);
            list[found++] = (struct candidate){values[at], weights != NULL ? weights[at] : 0.0f, (int32_t)at};
        }
    }
    for (; i < count; i++)
        if (values[i] >= bound)
            list[found++] = (struct candidate){values[i], weights != NULL ? weights[i] : 0.0f, (int32_t)i};
    return found;
}

/* ---- choosing ---- */

static float highest_of(const float *values, int64_t count)
{
    vec highest = vec_set1(-INFINITY);
    int64_t i = 0;
    for (; i + VEC_LANES <= count; i += VEC_LANES)
        highest = vec_max(highest, vec_load(values + i));
    float result = vec_largest(highest);
    for (; i < count; i++)
        result = values[i] > result ? values[i] : result;
    return result;
}

/* The first id whose adjusted logit is `value`, one of them. */
static int32_t first_equal(const struct row_work *work, float value)
{
    int64_t i = 0;
    uint32_t bits;
    while ((bits = vec_equal_bits(vec_load(work->adjusted + i), vec_set1(value))) == 0)
        i += VEC_LANES;
    return (int32_t)(i + __builtin_ctz(bits));
}

/* Sums of the weights, by block and in all. */
static double sum_weights(struct row_work *work)
{
    double total = 0;
    for (int64_t first = 0; first < work->vocab; first += BLOCK) {
        int64_t end = first + BLOCK < work->vocab ? first + BLOCK : work->vocab;
        vec sum = vec_set1(0.0f);
        for (int64_t i = first; i < end; i += VEC_LANES)
            sum += vec_load(work->weights + i);
        work->sums[first / BLOCK] = (double)vec_sum(sum);
        total += work->sums[first / BLOCK];
    }
    return total;
}

static void weigh(struct row_work *work, float highest)
{
    for (int64_t i = 0; i < work->vocab; i += VEC_LANES)
        vec_store(work->weights + i,
                  vec_exp((vec_load(work->adjusted + i) - highest) / work->row->temperature));
}

/* Clears the weights of what comes after the cut. */
static void cut_at(struct row_work *work, const struct candidate *cut)
{
    for (int64_t i = 0; i < work->vocab; i += VEC_LANES) {
        vec v = vec_load(work->adjusted + i), w = vec_load(work->weights + i);
        vec kept = vec_select(v > cut->logit, w, vec_set1(0.0f));
        for (uint32_t ties = vec_equal_bits(v, vec_set1(cut->logit)); ties != 0; ties &= ties - 1) {
            int lane = __builtin_ctz(ties);
            if (i + lane <= cut->id)
                kept[lane] = w[lane];
        }
        vec_store(work->weights + i, kept);
    }
}

/* Clears the weights of what top-k, top-p and min-p leave out. */
static void filter(struct row_work *work)
{
    const struct sample_row *row = work->row;
    int64_t count = -1; /* of the list, when there is one */
    if (row->top_k > 0 && row->top_k < work->vocab) {
        float bound = lower_bound(work->adjusted, work->vocab, row->top_k);
        count = list_from(work->adjusted, work->weights, work->vocab, bound, work->list);
        count = select_mass(work->list, count, (double)row->top_k, false);
    }
    if (row->top_p < 1.0f) {
        double total = count < 0 ? sum_weights(work) : mass_of(work->list, count, true);
        double wanted = (double)row->top_p * total;
        if (count < 0) {
            /* All weights below (1 - top_p) total / vocab together are less than what may be left out. */
            count = list_from(work->weights, work->weights, work->vocab,
                              (float)(0.999 * (total - wanted) / (double)work->vocab), work->list);
            for (int64_t i = 0; i < count; i++)
                work->list[i].logit = work->adjusted[work->list[i].id];
        }
        count = select_mass(work->list, count, wanted, true);
    }
    if (count > 0)
        cut_at(work, &work->list[count - 1]);
    for (int64_t i = 0; row->min_p > 0.0f && i < work->vocab; i += VEC_LANES) {
        vec w = vec_load(work->weights + i);
        vec_store(work->weights + i, vec_select(w >= row->min_p, w, vec_set1(0.0f)));
    }
}

/* The id at which the running sum of weights passes the draw, in ascending order of ids. */
static int32_t draw(struct row_work *work)
{
    double left = (double)philox_uniform(work->row->seed, work->row->position) * sum_weights(work);
    int64_t block = 0, blocks = (work->vocab + BLOCK - 1) / BLOCK;
    while (block + 1 < blocks && left >= work->sums[block])
        left -= work->sums[block++];
    int64_t end = (block + 1) * BLOCK < work->vocab ? (block + 1) * BLOCK : work->vocab;
    int64_t last = -1;
    for (int64_t i = block * BLOCK; i < end && left >= 0; i++) {
        if (work->weights[i] > 0.0f)
            last = i;
        left -= (double)work->weights[i];
    }
    while (last < 0 || work->weights[last] <= 0.0f) /* rounding led past the last weight */
        last = last < 0 ? work->vocab - 1 : last - 1;
    return (int32_t)last;
}

static int32_t choose(struct row_work *work)
{
    adjust(work);
    float highest = highest_of(work->adjusted, work->vocab);
    int32_t best = first_equal(work, highest);
    if (isinf(highest)) {
        /* Nothing may be chosen, or one id beyond all others; the banned id not even then. */
        bool banned = best == work->row->banned && work->vocab > 1;
        return banned ? (best == 0 ? 1 : 0) : best;
    }
    if (work->row->temperature == 0.0f)
        return best;
    weigh(work, highest);
    filter(work);
    return draw(work);
}

/* ---- reporting ---- */

/* log sum exp of the model's own logits. */
static double log_total(const float *logits, int64_t count)
{
    float highest = highest_of(logits, count);
    double total = 0;
    int64_t i = 0;
    while (i + VEC_LANES <= count) {
        int64_t end = i + BLOCK < count ? i + BLOCK : count;
        vec sum = vec_set1(0.0f);
        for (; i + VEC_LANES <= end; i += VEC_LANES)
            sum += vec_exp(vec_load(logits + i) - highest);
        total += (double)vec_sum(sum);
    }
    for (; i < count; i++)
        total += exp((double)logits[i] - (double)highest);
    return (double)highest + log(total);
}

static void report_top(struct row_work *work, double total, int32_t *ids, float *logprobs)
{
    int64_t wanted = work->row->n_top < work->vocab ? work->row->n_top : work->vocab;
    float bound = lower_bound(work->logits, work->vocab, wanted);
    int64_t count = list_from(work->logits, NULL, work->vocab, bound, work->list);
    if (count == 0) { /* a row with NaN */
        for (int64_t i = 0; i < wanted; i++) {
            ids[i] = 0;
            logprobs[i] = NAN;
        }
        return;
    }
    count = select_mass(work->list, count, (double)wanted, false);
    for (int64_t i = 0; i < count; i++) {
        struct candidate next = work->list[i];
        int64_t j = i;
        for (; j > 0 && comes_before(&next, &work->list[j - 1]); j--)
            work->list[j] = work->list[j - 1];
        work->list[j] = next;
    }
    for (int64_t i = 0; i < count; i++) {
        ids[i] = work->list[i].id;
        logprobs[i] = (float)((double)work->list[i].logit - total);
    }
}

struct sample_task {
    struct kernel_device *device;
    const struct sample_args *args;
};

static void sample_row(void *arg, int64_t index, int thread)
{
    const struct sample_task *task = arg;
    const struct sample_args *s = task->args;
    struct row_work work = {.row = &s->row[index], .logits = s->logits + index * s->logits_stride};
    work_carve(&work, cpu_scratch(task->device, thread), s->vocab);
    s->ids[index] = choose(&work);
    double total = log_total(work.logits, s->vocab);
    s->logprobs[index] = (float)((double)work.logits[s->ids[index]] - total);
    if (s->top_ids != NULL && work.row->n_top > 0)
        report_top(&work, total, s->top_ids + index * KERNEL_TOP_MAX,
                   s->top_logprobs + index * KERNEL_TOP_MAX);
}

int CPU_NAME(cpu_sample)(struct kernel_device *device, const struct sample_args *s)
{
    int status = check_sample(s);
    if (status == KERNEL_OK)
        status = cpu_scratch_reserve(device, work_bytes(s->vocab));
    if (status != KERNEL_OK)
        return status;
    struct sample_task task = {.device = device, .args = s};
    cpu_parallel(device, s->rows, sample_row, &task);
    return KERNEL_OK;
}
