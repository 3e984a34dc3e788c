/* sample.c: choosing the next token; a row is a task.
 *
 * The vocabulary is never sorted. Every filter keeps the first so many ids in descending order of logit (ties to the
 * lowest id), so it is told by the last id that it keeps, its cut. A histogram over the distance from the highest logit
 * says in which bucket the cut lies, for top-k counting ids and for top-p adding their weights; only that bucket's ids
 * are ordered, as far as needed. The draw then walks the kept ids in ascending order. */
#include "kernels/cpu/check.h"
#include "kernels/cpu/device.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/vector.h"

enum {
    BLOCK = 64 * VEC_LANES, /* ids of one partial sum of weights */
    BUCKETS = 2048,
    BUCKETS_A_UNIT = 64, /* of logit: all beyond 32 from the highest share the last bucket */
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
    double *sums;      /* of the weights of each block */
    double *histogram; /* [BUCKETS] */
};

static int64_t round_up(int64_t count, int64_t unit)
{
    return (count + unit - 1) / unit * unit;
}

static size_t work_bytes(int64_t vocab)
{
    size_t padded = (size_t)round_up(vocab, BLOCK);
    return padded * (2 * sizeof(float) + sizeof(int32_t) + sizeof(struct candidate)) +
           (padded / BLOCK + BUCKETS) * sizeof(double);
}

static void work_carve(struct row_work *work, void *scratch, int64_t vocab)
{
    int64_t padded = round_up(vocab, BLOCK);
    work->vocab = vocab;
    work->histogram = scratch;
    work->sums = work->histogram + BUCKETS;
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

/* Which bucket each lane falls into, with a fraction; ascending in the order of ids. NaN (infinity from infinity) is
 * the highest. */
VEC_INLINE vec bucket_of(vec logits, float highest)
{
    vec distance = (highest - logits) * (float)BUCKETS_A_UNIT;
    distance = vec_select(distance == distance, distance, vec_set1(0.0f));
    return vec_min(distance, vec_set1((float)(BUCKETS - 1)));
}

/* Fills the histogram with the mass of `count` logits: their weights, or one each without weights. Returns the whole
 * mass. NaN has none. */
static double fill_histogram(struct row_work *work, const float *logits, const float *weights, int64_t count,
                             float highest)
{
    double total = 0, *histogram = work->histogram;
    memset(histogram, 0, BUCKETS * sizeof(*histogram));
    for (int64_t i = 0; i < count; i += VEC_LANES) {
        int64_t n = count - i < VEC_LANES ? count - i : VEC_LANES;
        vec_int bucket = __builtin_convertvector(bucket_of(vec_load_n(logits + i, n), highest), vec_int);
        int32_t buckets[VEC_LANES];
        memcpy(buckets, &bucket, sizeof(buckets));
        for (int64_t lane = 0; lane < n; lane++)
            if (!isnan(logits[i + lane]))
                histogram[buckets[lane]] += weights != NULL ? (double)weights[i + lane] : 1.0;
    }
    for (int64_t b = 0; b < BUCKETS; b++)
        total += histogram[b];
    return total;
}

/* Lists the ids whose bucket is in first .. last. Returns how many. */
static int64_t list_buckets(struct row_work *work, const float *logits, const float *weights, int64_t count,
                            float highest, int64_t first, int64_t last)
{
    int64_t found = 0;
    for (int64_t i = 0; i < count; i += VEC_LANES) {
        int64_t n = count - i < VEC_LANES ? count - i : VEC_LANES;
        vec v = vec_load_n(logits + i, n), bucket = bucket_of(v, highest);
        uint32_t bits = vec_greater_bits(vec_set1((float)last + 1.0f), bucket) &
                        ~vec_greater_bits(vec_set1((float)first), bucket) & vec_equal_bits(v, v) &
                        ((2u << (n - 1)) - 1);
        for (; bits != 0; bits &= bits - 1) {
            int64_t id = i + __builtin_ctz(bits);
            work->list[found++] = (struct candidate){
                .logit = logits[id], .weight = weights != NULL ? weights[id] : 0.0f, .id = (int32_t)id};
        }
    }
    return found;
}

/* The bucket in which the mass from the first one on reaches `wanted`; *ret_before: the mass of those before it. */
static int64_t find_bucket(const struct row_work *work, double wanted, double *ret_before)
{
    int64_t b = 0;
    double before = 0;
    while (b < BUCKETS - 1 && before + work->histogram[b] < wanted)
        before += work->histogram[b++];
    *ret_before = before;
    return b;
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

/* Clears the weights of all but the first ids, in order, that make up the wanted mass. */
static void keep_mass(struct row_work *work, float highest, double wanted, bool by_weight)
{
    double before;
    int64_t bucket = find_bucket(work, wanted, &before);
    int64_t count = list_buckets(work, work->adjusted, work->weights, work->vocab, highest, bucket, bucket);
    if (count == 0)
        return; /* rounding led past the last: all are kept */
    count = select_mass(work->list, count, wanted - before, by_weight);
    const struct candidate *cut = &work->list[count - 1];
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
static void filter(struct row_work *work, float highest)
{
    const struct sample_row *row = work->row;
    if (row->top_k > 0 && row->top_k < work->vocab) {
        fill_histogram(work, work->adjusted, NULL, work->vocab, highest);
        keep_mass(work, highest, (double)row->top_k, false);
    }
    if (row->top_p < 1.0f) {
        double total = fill_histogram(work, work->adjusted, work->weights, work->vocab, highest);
        keep_mass(work, highest, (double)row->top_p * total, true);
    }
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
    filter(work, highest);
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
    float highest = highest_of(work->logits, work->vocab);
    double before;
    fill_histogram(work, work->logits, NULL, work->vocab, highest);
    int64_t last = find_bucket(work, (double)wanted, &before);
    int64_t count = list_buckets(work, work->logits, NULL, work->vocab, highest, 0, last);
    count = count > 0 ? select_mass(work->list, count, (double)wanted, false) : 0;
    for (int64_t i = 1; i < count; i++) {
        struct candidate next = work->list[i];
        int64_t j = i;
        for (; j > 0 && comes_before(&next, &work->list[j - 1]); j--)
            work->list[j] = work->list[j - 1];
        work->list[j] = next;
    }
    for (int64_t i = 0; i < wanted; i++) { /* fewer are found in a row with NaN */
        ids[i] = i < count ? work->list[i].id : 0;
        logprobs[i] = i < count ? (float)((double)work->list[i].logit - total) : NAN;
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
