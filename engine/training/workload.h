/* workload.h: what a job has to do, known before anything is allocated on the device: its data, the largest
 * micro-batch, the number of steps, the memory plan. The trainer's own; called on its thread. */
#ifndef ENGINE_TRAINING_WORKLOAD_H
#define ENGINE_TRAINING_WORKLOAD_H

#include "engine/training/trainer.h"

struct workload {
    struct dataset *training;
    struct dataset *validation; /* or NULL */
    int64_t longest;            /* tokens of the longest example of either */
    int64_t max_tokens;         /* of any micro-batch of either */
    int32_t max_seqs;
    int64_t total_steps;
    struct plan_request request; /* of the pass; its byte_limit is what is free, or will be */
    struct memory_plan plan;
};

/* ret_bad may be NULL. */
int workload_open(const struct trainer_options *options, struct workload *ret_workload,
                  struct trainer_bad_lines *ret_bad, struct error *error);
/* A host promises more memory than it has and kills whoever takes it at its word: the worker, and with it all that it
 * serves. So the plan is held against what is free. ERROR_NO_MEMORY says what would fit. */
int workload_check_memory(const struct trainer_options *options, const struct workload *workload,
                          struct error *error);
/* A zeroed one is fine. */
void workload_close(struct workload *workload);

#endif
