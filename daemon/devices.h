/* devices.h: which devices the workers are for. Before the loop runs. */
#ifndef DAEMON_DEVICES_H
#define DAEMON_DEVICES_H

#include "daemon/config.h"

#include <stddef.h>

struct device_list {
    char names[CONFIG_MAX_DEVICES][32]; /* "cpu", "cuda:0"; each once */
    size_t n;
};

/* The configured devices; "auto" is every GPU that the workers will see, or the CPU where there is none or the
 * build has no use for one. */
void devices_resolve(const struct config *config, struct device_list *ret_list);
/* Of n_gpus, how many CUDA_VISIBLE_DEVICES leaves: visible is its value, NULL when it is not set. The runtime
 * counts those from 0, so that "cuda:0" is the first that it names. */
int devices_visible(const char *visible, int n_gpus);

#endif
