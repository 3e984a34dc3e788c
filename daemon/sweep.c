/* sweep.c: see sweep.h. Blocking. */
#include "daemon/sweep.h"

#include "base/file.h"
#include "base/log.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int compare(const void *a, const void *b)
{
    return strcmp(a, b);
}

static int sweep_folder(struct store *store, enum store_table table, const char *folder, const char *prefix,
                        struct error *error)
{
    char(*ids)[ID_BYTES] = NULL;
    size_t n_ids = 0;
    DIR *dir = opendir(folder);
    if (!dir)
        return error_set(error, ERROR_IO, "cannot open %s: %s", folder, strerror(errno));
    int code = store_load_ids(store, table, &ids, &n_ids, error);
    for (struct dirent *item; !code && (item = readdir(dir));) {
        char path[4096 + 256];
        if (strncmp(item->d_name, prefix, strlen(prefix)) != 0 || strlen(item->d_name) >= ID_BYTES ||
            (n_ids && bsearch(item->d_name, ids, n_ids, sizeof *ids, compare)))
            continue;
        snprintf(path, sizeof path, "%s/%s", folder, item->d_name);
        struct error reason;
        if (file_remove_tree(path, &reason)) {
            log_write(LOG_WARN, "cannot remove what no row names", "path", path, "reason", reason.message,
                      NULL);
            continue;
        }
        log_write(LOG_INFO, "removed what no row names", "path", path, NULL);
    }
    free(ids);
    closedir(dir);
    return code;
}

int sweep_orphans(struct store *store, const char *data_dir, struct error *error)
{
    char folder[4096];
    snprintf(folder, sizeof folder, "%s/files", data_dir);
    int code = sweep_folder(store, STORE_FILES, folder, "file-", error);
    snprintf(folder, sizeof folder, "%s/jobs", data_dir);
    if (!code)
        code = sweep_folder(store, STORE_JOBS, folder, "ftjob-", error);
    return code;
}
