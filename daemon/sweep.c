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

/* ids: sorted. */
static int sweep_folder(char (*ids)[ID_BYTES], size_t n_ids, const char *data_dir, const char *name,
                        const char *prefix, struct error *error)
{
    char folder[4096];
    snprintf(folder, sizeof folder, "%s/%s", data_dir, name);
    DIR *dir = opendir(folder);
    if (!dir)
        return error_set(error, ERROR_IO, "cannot open %s: %s", folder, strerror(errno));
    for (struct dirent *item; (item = readdir(dir));) {
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
    closedir(dir);
    return 0;
}

int sweep_orphans(struct store *store, const char *data_dir, struct error *error)
{
    char(*files)[ID_BYTES] = NULL, (*jobs)[ID_BYTES] = NULL;
    size_t n_files = 0, n_jobs = 0;
    int code = store_load_ids(store, STORE_FILES, &files, &n_files, error);
    if (!code)
        code = store_load_ids(store, STORE_JOBS, &jobs, &n_jobs, error);
    if (!code && n_files + n_jobs) {
        code = sweep_folder(files, n_files, data_dir, "files", "file-", error);
        if (!code)
            code = sweep_folder(jobs, n_jobs, data_dir, "jobs", "ftjob-", error);
    }
    free(files);
    free(jobs);
    return code;
}
