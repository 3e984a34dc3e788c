/* support.h: what the tests of this room share: a backend to run on, the vectors, batches filled by hand. */
#ifndef TESTS_ENGINE_MODELS_SUPPORT_H
#define TESTS_ENGINE_MODELS_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "engine/models/model.h"

#include <jansson.h>

struct backend {
    const struct kernel_ops *ops;
    struct kernel_device *device;
};

/* Group set-up and tear-down; the group's tests find the backend in *state. */
int open_reference(void **state);
int open_cpu(void **state);
int open_cuda(void **state);
int close_backend(void **state);
/* ADDERD_TEST_CUDA=1 asks for the tests on the first GPU instead; where there is none the program ends here, as
 * skipped. */
bool cuda_wanted(void);
/* Run a group on the fast backend. */
#define run_on_fast(tests)                                                                                   \
    (cuda_wanted() ? cmocka_run_group_tests_name("cuda", tests, open_cuda, close_backend)                    \
                   : cmocka_run_group_tests_name("cpu", tests, open_cpu, close_backend))
/* Run a group on the plain reference and on the fast backend. */
#define run_on_both(tests)                                                                                   \
    ((cuda_wanted() ? 0 : cmocka_run_group_tests_name("reference", tests, open_reference, close_backend)) +  \
     run_on_fast(tests))

/* A path below the source tree; valid until the third call after. */
const char *source_path(const char *relative);
/* A fresh folder, removed by remove_folder (which frees the string). */
char *make_folder(void);
void remove_folder(char *folder);
void write_text(const char *folder, const char *name, const char *text);

/* Fail with the message when code is not 0. */
void check_ok(int code, const struct error *error);
/* The code and a part of the message. */
void check_error(int code, int expected, const struct error *error, const char *part);

/* Its inference is in fp32 on every backend. */
struct model *open_model(const struct backend *backend, const char *relative);
struct safetensors *open_vector(const char *relative);
json_t *load_json(const char *relative);
/* A copy of a tensor's elements; free it. */
float *copy_floats(const struct safetensors *file, const char *name, int64_t *ret_count);
int32_t *copy_ints(const struct safetensors *file, const char *name, int64_t *ret_count);
float *read_device(const struct model *model, const float *data, int64_t count);
void write_device(const struct model *model, float *data, const float *values, int64_t count);
/* |a - b| / |b|, and the largest difference of one element. */
double relative_error(const float *a, const float *b, int64_t count);
double largest_difference(const float *a, const float *b, int64_t count);
/* A tiny deterministic generator: 0 <= result < limit. */
uint32_t draw(uint64_t *seed, uint32_t limit);

/* A micro-batch filled by hand; labels NULL = every next token is predicted, -100 = ignored. labels[t] is the
 * label of token t itself, as in the vectors. */
struct batch *new_batch(int64_t capacity, int32_t max_seqs);
void batch_add(struct batch *batch, const int32_t *ids, const int32_t *labels, int32_t n);
void drop_batch(struct batch *batch);

/* One of the official training curves' batches: rows of equal length, every next token predicted. */
struct batch *curve_batch(const json_t *rows);
/* A new adapter on hatchling with the first values of the LoRA curve. */
struct adapter *adapter_of_curve(struct model *model);

/* A random model in a folder of its own. config: the file's text. Frees nothing; remove_folder() it. */
char *make_random_model(const char *config, uint64_t seed, enum kernel_type matrix_type);
/* An adapter with every tensor random, of both factors. */
struct adapter *random_adapter(struct model *model, const struct lora_config *lora, uint64_t seed);
/* Logits of all rows of one sequence on a fresh runner; free them. */
float *all_logits(struct model *model, const struct adapter *adapter, const int32_t *ids, int32_t n);

#endif
