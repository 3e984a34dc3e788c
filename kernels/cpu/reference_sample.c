/* reference_sample.c: choosing the next token. See reference.c. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/check.h"
#include "kernels/cpu/device.h"
#include "kernels/cpu/reference.h"

struct candidate {
    float logit; /* adjusted */
    int32_t id;
    double weight; /* exp of the distance to the highest, after temperature */
};

static void adjust_logits(const struct sample_row *row, int64_t vocab, const float *logits, float *adjusted,
                          int32_t *counts)
{
    memcpy(adjusted, logits, (size_t)vocab * sizeof(*adjusted));

    memset(counts, 0, (size_t)vocab * sizeof(*counts));
    for (int32_t i = 0; i < row->n_history; i++) {
        int32_t id = row->history[i];
        if (counts[id]++ == 0)
            adjusted[id] = adjusted[id] > 0.0f ? adjusted[id] / row->repetition_penalty
                                               : adjusted[id] * row->repetition_penalty;
    }
    memset(counts, 0, (size_t)vocab * sizeof(*counts));
    for (int32_t i = row->n_prompt; i < row->n_history; i++)
        counts[row->history[i]]++;
    for (int64_t id = 0; id < vocab; id++)
        if (counts[id] > 0)
            adjusted[id] -= row->presence_penalty + row->frequency_penalty * (float)counts[id];
    for (int32_t i = 0; i < row->n_bias; i++)
        adjusted[row->bias[i].id] += row->bias[i].bias;
}

static int compare_candidates(const void *left, const void *right)
{
    const struct candidate *a = left, *b = right;
    if (a->logit != b->logit)
        return a->logit > b->logit ? -1 : 1;
    return a->id < b->id ? -1 : a->id > b->id;
}

static int compare_ids(const void *left, const void *right)
{
    const struct candidate *a = left, *b = right;
    return a->id < b->id ? -1 : a->id > b->id;
}

/* How many of the sorted candidates pass top-k, top-p and min-p, at least one. */
static int64_t filter(const struct sample_row *row, const struct candidate *sorted, int64_t count)
{
    if (row->top_k > 0 && row->top_k < count)
        count = row->top_k;
    if (row->top_p < 1.0f) {
        double total = 0, sum = 0;
        for (int64_t i = 0; i < count; i++)
            total += sorted[i].weight;
        int64_t kept = 0;
        while (kept < count && (kept == 0 || sum < (double)row->top_p * total))
            sum += sorted[kept++].weight;
        count = kept;
    }
    while (count > 1 && sorted[count - 1].weight < (double)row->min_p)
        count--;
    return count;
}

static int32_t choose(const struct sample_row *row, struct candidate *list, int64_t count)
{
    qsort(list, (size_t)count, sizeof(*list), compare_candidates);
    if (count == 0)
        return 0;
    if (row->temperature == 0.0f || isinf(list[0].logit))
        return list[0].id;
    for (int64_t i = 0; i < count; i++)
        list[i].weight = exp(((double)list[i].logit - (double)list[0].logit) / (double)row->temperature);
    count = filter(row, list, count);

    qsort(list, (size_t)count, sizeof(*list), compare_ids);
    double total = 0, sum = 0;
    for (int64_t i = 0; i < count; i++)
        total += list[i].weight;
    double draw = (double)philox_uniform(row->seed, row->position) * total;
    int32_t last = list[0].id;
    for (int64_t i = 0; i < count; i++) {
        if (list[i].weight > 0)
            last = list[i].id;
        sum += list[i].weight;
        if (draw < sum)
            break;
    }
    return last;
}

static void report(const struct sample_args *s, int64_t r, struct candidate *list)
{
    const float *logits = s->logits + r * s->logits_stride;
    double highest = -INFINITY, sum = 0;
    for (int64_t i = 0; i < s->vocab; i++)
        highest = fmax(highest, (double)logits[i]);
    for (int64_t i = 0; i < s->vocab; i++)
        sum += exp((double)logits[i] - highest);
    double total = highest + log(sum);
    s->logprobs[r] = (float)((double)logits[s->ids[r]] - total);
    if (s->top_ids == NULL)
        return;
    for (int64_t i = 0; i < s->vocab; i++)
        list[i] = (struct candidate){.logit = logits[i], .id = (int32_t)i};
    qsort(list, (size_t)s->vocab, sizeof(*list), compare_candidates);
    for (int32_t i = 0; i < s->row[r].n_top && i < s->vocab; i++) {
        s->top_ids[r * KERNEL_TOP_MAX + i] = list[i].id;
        s->top_logprobs[r * KERNEL_TOP_MAX + i] = (float)((double)list[i].logit - total);
    }
}

int reference_sample(struct kernel_device *device, const struct sample_args *s)
{
    int status = check_sample(s);
    size_t vocab = (size_t)s->vocab;
    if (status == KERNEL_OK)
        status =
            cpu_scratch_reserve(device, vocab * (sizeof(struct candidate) + sizeof(float) + sizeof(int32_t)));
    if (status != KERNEL_OK)
        return status;
    struct candidate *list = cpu_scratch(device, 0);
    float *adjusted = (float *)(list + vocab);
    int32_t *counts = (int32_t *)(adjusted + vocab);
    for (int64_t r = 0; r < s->rows; r++) {
        adjust_logits(&s->row[r], s->vocab, s->logits + r * s->logits_stride, adjusted, counts);
        int64_t count = 0;
        for (int32_t i = 0; i < s->vocab; i++)
            if (i != s->row[r].banned && !isnan(adjusted[i]))
                list[count++] = (struct candidate){.logit = adjusted[i], .id = i};
        s->ids[r] = choose(&s->row[r], list, count);
        report(s, r, list);
    }
    return KERNEL_OK;
}
