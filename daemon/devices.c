/* devices.c: see devices.h. The daemon loads no CUDA library: what is there it tells from the driver's nodes. */
#include "daemon/devices.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(ADDERD_CUDA)
enum { GPU_NODES = 64 };
#else
enum { GPU_NODES = 0 };
#endif

/* GPUs as the driver shows them to this process: /dev/nvidia0, /dev/nvidia1 ...; a container may hold any of them.
 */
static int count_nodes(void)
{
    int count = 0;
    char path[32];
    for (int i = 0; i < GPU_NODES; i++) {
        snprintf(path, sizeof path, "/dev/nvidia%d", i);
        count += access(path, R_OK | W_OK) == 0;
    }
    return count;
}

/* As the CUDA driver reads it: indices, or UUIDs of GPUs and of their MIG slices; the first entry that names no
 * device ends the list, and one that is named twice empties it. UUIDs are taken at their word. */
int devices_visible(const char *visible, int n_gpus)
{
    bool seen[1000] = {false};
    int count = 0;
    if (!visible || !n_gpus)
        return n_gpus;
    for (; visible && *visible; count++) {
        while (isspace((unsigned char)*visible))
            visible++;
        if (strncmp(visible, "GPU-", 4) != 0 && strncmp(visible, "MIG-", 4) != 0) {
            char *end;
            long index = isdigit((unsigned char)*visible) ? strtol(visible, &end, 10) : -1;
            if (index < 0 || index >= n_gpus || index >= (long)sizeof seen)
                return count;
            if (seen[index])
                return 0;
            seen[index] = true;
        }
        const char *comma = strchr(visible, ',');
        visible = comma ? comma + 1 : NULL;
    }
    return count;
}

static void add(struct device_list *list, const char *name)
{
    for (size_t i = 0; i < list->n; i++)
        if (!strcmp(list->names[i], name))
            return;
    if (list->n < CONFIG_MAX_DEVICES)
        snprintf(list->names[list->n++], sizeof list->names[0], "%s", name);
}

void devices_resolve(const struct config *config, struct device_list *ret_list)
{
    ret_list->n = 0;
    for (int i = 0; i < config->n_devices; i++) {
        if (strcmp(config->devices[i], "auto") != 0) {
            add(ret_list, config->devices[i]);
            continue;
        }
        int n_gpus = devices_visible(getenv("CUDA_VISIBLE_DEVICES"), count_nodes());
        for (int gpu = 0; gpu < n_gpus; gpu++) {
            char name[32];
            snprintf(name, sizeof name, "cuda:%d", gpu);
            add(ret_list, name);
        }
        if (!n_gpus)
            add(ret_list, "cpu");
    }
}
