/* file.c: see file.h. */
#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int file_read(const char *path, size_t limit, char **ret_data, size_t *ret_length, struct error *error)
{
    int code = 0;
    char *data = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return error_set(error, errno == ENOENT ? ERROR_NOT_FOUND : ERROR_IO, "cannot open %s: %s", path,
                         strerror(errno));
    struct stat st;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
        code = error_set(error, ERROR_IO, "%s is not a regular file", path);
        goto done;
    }
    if ((uint64_t)st.st_size > limit) {
        code = error_set(error, ERROR_INVALID, "%s has %lld bytes; at most %zu are read", path,
                         (long long)st.st_size, limit);
        goto done;
    }
    size_t size = (size_t)st.st_size, length = 0;
    data = malloc(size + 1);
    if (!data) {
        code = error_set(error, ERROR_NO_MEMORY, "no memory for the %zu bytes of %s", size, path);
        goto done;
    }
    while (length < size) {
        ssize_t n = read(fd, data + length, size - length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            code = error_set(error, ERROR_IO, "cannot read %s: %s", path, strerror(errno));
            goto done;
        }
        if (n == 0)
            break;
        length += (size_t)n;
    }
    data[length] = '\0';
    *ret_data = data;
    *ret_length = length;
    data = NULL;
done:
    free(data);
    close(fd);
    return code;
}

static int sync_parent(const char *path, struct error *error)
{
    char folder[PATH_MAX];
    snprintf(folder, sizeof folder, "%s", path);
    char *slash = strrchr(folder, '/');
    if (!slash)
        strcpy(folder, ".");
    else if (slash == folder)
        slash[1] = '\0';
    else
        *slash = '\0';
    return file_sync(folder, error);
}

int file_sync(const char *path, struct error *error)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return error_set(error, ERROR_IO, "cannot open %s: %s", path, strerror(errno));
    int failed = fsync(fd) ? errno : 0;
    close(fd);
    if (failed)
        return error_set(error, ERROR_IO, "cannot sync %s: %s", path, strerror(failed));
    return 0;
}

int file_rename_durable(const char *from, const char *to, struct error *error)
{
    if (rename(from, to))
        return error_set(error, ERROR_IO, "cannot rename %s to %s: %s", from, to, strerror(errno));
    return sync_parent(to, error);
}

int file_write_whole(const char *path, const void *data, size_t length, struct error *error)
{
    char temporary[PATH_MAX];
    if (snprintf(temporary, sizeof temporary, "%s.tmp-%d", path, (int)getpid()) >= (int)sizeof temporary)
        return error_set(error, ERROR_INVALID, "path too long: %s", path);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0640);
    if (fd < 0)
        return error_set(error, ERROR_IO, "cannot create %s: %s", temporary, strerror(errno));
    const char *next = data;
    int code = 0;
    while (length) {
        ssize_t n = write(fd, next, length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            code = error_set(error, ERROR_IO, "cannot write %s: %s", temporary, strerror(errno));
            break;
        }
        next += n;
        length -= (size_t)n;
    }
    if (!code && fsync(fd))
        code = error_set(error, ERROR_IO, "cannot sync %s: %s", temporary, strerror(errno));
    if (close(fd) && !code)
        code = error_set(error, ERROR_IO, "cannot close %s: %s", temporary, strerror(errno));
    if (!code)
        code = file_rename_durable(temporary, path, error);
    if (code)
        unlink(temporary);
    return code;
}

int file_make_dirs(const char *path, struct error *error)
{
    char prefix[PATH_MAX];
    if (snprintf(prefix, sizeof prefix, "%s", path) >= (int)sizeof prefix)
        return error_set(error, ERROR_INVALID, "path too long: %s", path);
    for (char *c = prefix + 1;; c++) {
        if (*c && *c != '/')
            continue;
        char saved = *c;
        *c = '\0';
        if (mkdir(prefix, 0750) && errno != EEXIST)
            return error_set(error, ERROR_IO, "cannot create folder %s: %s", prefix, strerror(errno));
        if (!saved)
            break;
        *c = saved;
    }
    struct stat st;
    if (stat(path, &st) || !S_ISDIR(st.st_mode))
        return error_set(error, ERROR_IO, "%s is not a folder", path);
    return 0;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *walk)
{
    (void)st, (void)type, (void)walk;
    return remove(path) && errno != ENOENT ? -1 : 0;
}

int file_remove_tree(const char *path, struct error *error)
{
    if (nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT) && errno != ENOENT)
        return error_set(error, ERROR_IO, "cannot remove %s: %s", path, strerror(errno));
    return 0;
}
