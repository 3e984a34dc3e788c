/* protocol.h: the frames between the daemon and a worker, over one byte stream (a socketpair today, a network
 * stream when a cluster scheduler starts workers elsewhere). The one header of engine/ that daemon/ may
 * include.
 *
 * Frame: u32 payload length (little-endian), u16 type, u16 zero, u64 id, payload: one JSON object, UTF-8.
 * `id` ties answers to requests: the daemon draws it (never 0), every frame that answers carries it back.
 * Frames of jobs carry "job" and "attempt" instead and id 0; a frame whose attempt is not the job's current
 * one is dropped by the daemon, so that a late worker cannot change what a newer one reports.
 *
 * MODEL below stands for {"id","path"} (path: the base model's folder), ADAPTER for {"id","path"} or null.
 * Unknown keys are ignored; a missing one fails the request or the job, naming it. Bytes that are no frame at
 * all end the connection.
 *
 * daemon -> worker
 *
 *   CONFIGURE                       first frame, once
 *     {"max_seqs","prefill_tokens","heartbeat_ms"}
 *   LOAD -> LOADED | FAILED
 *     {"model": MODEL}
 *   UNLOAD                          forget it once nothing uses it; no answer
 *     {"adapter": id} or {"model": id}
 *   COMPLETE -> CHUNK* (DONE | FAILED)
 *     {"model","adapter","prompts": [string | [int]...],"chat": bool,"messages": [{"role","content"}...]
 *     (when chat; then prompts is empty),"n","max_tokens" (null for chat = as much as the server's limit),
 *     "temperature","top_p","min_p","top_k","repetition_penalty","presence_penalty","frequency_penalty",
 *     "logit_bias": {"id": x},"stop": [string...],"seed" (null = drawn),"logprobs" (null or 0..20),"echo",
 *     "ignore_eos","stream"}
 *   CANCEL                          id = the request's. Answered by that request's FAILED (code
 *     {}                            "cancelled") unless it is already over
 *   TOKENIZE -> TOKENS | FAILED
 *     {"model","text","add_special_tokens"}
 *   DETOKENIZE -> TEXT | FAILED
 *     {"model","tokens": [int...]}
 *   TOKENIZER_INFO -> INFO | FAILED
 *     {"model"}
 *   JOB_PLAN -> JOB_PLANNED | FAILED    before a job is accepted: FAILED with "no_memory" and what would fit when it
 *                                   cannot fit on this device. The files are read where the answer depends on them
 *     {"job","attempt","model","training_file","validation_file","hyperparameters","seed"}
 *   JOB_VALIDATE -> JOB_VALIDATED | JOB_INVALID | FAILED    "busy": not beside the job that trains here
 *     {"job","attempt","model","training_file": path,"validation_file": path|null,"hyperparameters","seed"}
 *   JOB_START -> JOB_* ... JOB_ENDED   begins when no request runs, if there is no room before
 *     {"job","attempt","model","training_file","validation_file","hyperparameters","seed","folder",
 *     "resume_from": path|null}
 *   EVALUATION_VALIDATE -> JOB_VALIDATED ("examples","total_steps","warnings": [text...]) | JOB_INVALID | FAILED    "busy", as above
 *     {"job","attempt","models": [{"name","model","adapter"}...],"precisions": ["auto"|"fp32"...],"tasks": [{"name","definition": path}...],
 *     "num_fewshot": [n...],"limit": n|null,"seed","max_length": n|null,"share": bool (false: every request by itself),
 *     "data_dir": path|null,"files": {name: path} (uploaded ones)}
 *   EVALUATION_START -> JOB_MESSAGE | EVALUATION_RESULTS ... JOB_ENDED
 *     the same, "total_steps", and "done": {a model's name: {"PRECISION/TASK/SHOTS": [[first,last] of documents scored before...]}}
 *   JOB_STOP                        pause checkpoints first. Answered by JOB_ENDED
 *     {"job","attempt","reason": "cancel"|"pause"}
 *   SHUTDOWN                        checkpoint the running job, end it as "paused", exit 0
 *     {}
 *
 * worker -> daemon
 *
 *   HELLO                           first frame
 *     {"version","device","device_name","pid","threads","total_bytes","free_bytes"}
 *   STATUS                          every heartbeat_ms at most; the heartbeat. allocated_bytes: by this process's ops;
 *                                   grace_ms: how much longer than usual the next one may take (a model is loaded)
 *     {"total_bytes","free_bytes","resident_bytes","allocated_bytes","grace_ms","running","waiting","models": [id...]}
 *   LOADED
 *     {"model": id,"family","vocab_size","parameters","weight_bytes","state_bytes","seconds"}
 *   CHUNK                           "tokens" only when logprobs were asked for; -inf is sent as -9999
 *     {"index","text","finish_reason": null|"stop"|"length","tokens": [{"id","text","bytes" (only when text
 *     is not whole UTF-8: array),"logprob": number|null,"top": [[text,logprob]...]}...]}
 *   DONE
 *     {"prompt_tokens","completion_tokens"}
 *   FAILED
 *     {"code": an error_code_name,"message","param": string|null}
 *   TOKENS {"tokens": [int...]}
 *   TEXT   {"text"}
 *   INFO   {"eos_token","bos_token","pad_token","chat_template"} strings or null
 *   JOB_PLANNED                     weights included; at most so many, if the files were not read
 *     {"planned_bytes"}
 *   JOB_VALIDATED
 *     {"job","attempt","examples","tokens","loss_tokens","validation_examples","total_steps","planned_bytes"}
 *   JOB_INVALID
 *     {"job","attempt","code","message","param",
 *     "lines": [{"file": "training_file"|"validation_file","line","reason"}...]}
 *   JOB_MESSAGE
 *     {"job","attempt","level","message"}
 *   JOB_METRICS                     NaN and inf travel as null
 *     {"job","attempt","step","total_steps","train_loss","train_accuracy","valid_loss"|null,
 *     "valid_accuracy"|null,"learning_rate","grad_norm","tokens_per_second","trained_tokens","eta_seconds",
 *     "skipped_steps","loss_scale"|null,"planned_memory_bytes","peak_memory_bytes","bytes_per_token"}
 *   JOB_CHECKPOINT                  resumable_only: written for a pause or shutdown, not to be listed
 *     {"job","attempt","step","folder","train_loss","train_accuracy","valid_loss"|null,"valid_accuracy"|null,
 *     "best","resumable_only"}
 *   JOB_CHECKPOINT_DROPPED          its folder is gone: keep_checkpoints newer ones exist
 *     {"job","attempt","step"}
 *   EVALUATION_RESULTS              of one batch, in several frames where they are long: examples of one model, task and shot
 *                                   count, whole ones alone. tokens: that the requests begun meanwhile have; tokens_run: that
 *                                   went through the model; seconds: took
 *     {"job","attempt","model": name,"metrics": "acc acc_norm" (their names, a space between),"precision","task","parent" (its
 *     definition's name),"group" (of its subtask, or ""),"num_fewshot","pool": file|null,"results": [{"doc","acc": 0|1,
 *     "acc_norm": 0|1,"log_likelihood" (of the gold or the target),"detail": JSON text for clients}...],"tokens","tokens_run",
 *     "seconds","tokens_per_second","step","total_steps","eta_seconds"}
 *   FAULT                           its last frame, perhaps its first: why the process ends by itself
 *     {"reason"}
 *   JOB_ENDED
 *     {"job","attempt","status": "succeeded"|"failed"|"cancelled"|"paused","resumable": bool (a checkpoint to
 *     go on from was written),"folder": the adapter's or null,"trained_tokens","step",
 *     "error": {"code","message","param"}|null}
 */
#ifndef ENGINE_PROTOCOL_H
#define ENGINE_PROTOCOL_H

#include "base/buffer.h"
#include "base/error.h"

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

enum { PROTOCOL_VERSION = 1, PROTOCOL_HEADER_BYTES = 16, PROTOCOL_MAX_PAYLOAD = 64 << 20 };

enum frame_type {
    FRAME_CONFIGURE = 1,
    FRAME_LOAD,
    FRAME_UNLOAD,
    FRAME_COMPLETE,
    FRAME_CANCEL,
    FRAME_TOKENIZE,
    FRAME_DETOKENIZE,
    FRAME_TOKENIZER_INFO,
    FRAME_JOB_VALIDATE,
    FRAME_JOB_START,
    FRAME_JOB_STOP,
    FRAME_SHUTDOWN,
    FRAME_JOB_PLAN,
    FRAME_EVALUATION_VALIDATE,
    FRAME_EVALUATION_START,

    FRAME_HELLO = 64,
    FRAME_STATUS,
    FRAME_LOADED,
    FRAME_CHUNK,
    FRAME_DONE,
    FRAME_FAILED,
    FRAME_TOKENS,
    FRAME_TEXT,
    FRAME_INFO,
    FRAME_JOB_VALIDATED,
    FRAME_JOB_INVALID,
    FRAME_JOB_MESSAGE,
    FRAME_JOB_METRICS,
    FRAME_JOB_CHECKPOINT,
    FRAME_JOB_CHECKPOINT_DROPPED,
    FRAME_JOB_ENDED,
    FRAME_FAULT,
    FRAME_JOB_PLANNED,
    FRAME_EVALUATION_RESULTS,
};

struct frame {
    enum frame_type type;
    uint64_t id;
    json_t *payload; /* an object; json_decref it */
};

/* "complete", "job_started" ...; "unknown". */
const char *frame_type_name(enum frame_type type);

/* Append one whole frame to out. The payload's reference is stolen. Returns 0, ERROR_NO_MEMORY or
 * ERROR_INVALID (payload NULL, not an object, over the limit). */
int frame_encode(enum frame_type type, uint64_t id, json_t *payload, struct buffer *out);
/* Take the first frame out of in. Returns 1 and fills *ret_frame, 0 when more bytes are needed, ERROR_CORRUPT
 * when the stream is not the protocol. */
int frame_decode(struct buffer *in, struct frame *ret_frame, struct error *error);

/* A JSON string of any bytes: what is not UTF-8 becomes U+FFFD. NULL when out of memory. */
json_t *frame_text(const char *text, size_t length);
/* A JSON number, null for NaN and infinities (JSON has none). */
json_t *frame_number(double value);
/* {"code","message","param"} of an error. */
json_t *frame_error_payload(const struct error *error);

#endif
