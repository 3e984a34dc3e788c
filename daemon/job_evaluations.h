/* job_evaluations.h: the evaluations that a fine-tuning job names: of its checkpoints, and of what training ends with. Each is an
 * evaluation of its own, whose row names the job; the job ends when they have, with the best where it keeps the best. Loop thread
 * only; part of scheduler.h.
 *
 * While a job waits for them it is `running`, without a worker, and its final model has a row already: that row says after a
 * restart that training is done. */
#ifndef DAEMON_JOB_EVALUATIONS_H
#define DAEMON_JOB_EVALUATIONS_H

#include "daemon/scheduler.h"

struct live_job;

/* A checkpoint was made, a restart was made, an evaluation has ended: do what is next. Nothing for a job that names none. */
void job_evaluations_look(struct live_job *live);
/* Training has ended with what is in this folder. */
void job_evaluations_trained(struct live_job *live, const char *folder);
/* At a start: is training done? */
void job_evaluations_recover(struct live_job *live);
/* The job is cancelled: so are they, and the model that training ended with is forgotten. */
void job_evaluations_cancel(struct live_job *live);
void job_evaluations_forget(struct live_job *live);
/* An evaluation's end is committed: an event of its job, if it has one. */
void job_evaluations_ended(struct scheduler *scheduler, const struct job_resource *evaluation);
/* Must its checkpoints stay, all of them, to be evaluated? */
bool job_evaluations_keep_all(const struct job_resource *job);

#endif
