/* file.h: files that are either whole or absent. Blocking calls; not for the event loop's thread unless the
 * file is small. */
#ifndef BASE_FILE_H
#define BASE_FILE_H

#include "base/error.h"

#include <stddef.h>
#include <stdint.h>

/* Read all of a file of at most `limit` bytes. *ret_data is NUL-terminated (not counted); free() it. */
int file_read(const char *path, size_t limit, char **ret_data, size_t *ret_length, struct error *error);
/* Write to "PATH.tmp-PID", fsync, rename over PATH, fsync the folder: a reader sees the old file or the new
 * one. */
int file_write_whole(const char *path, const void *data, size_t length, struct error *error);
/* fsync a file or a folder by name. */
int file_sync(const char *path, struct error *error);
/* rename() and fsync the target's folder. */
int file_rename_durable(const char *from, const char *to, struct error *error);
/* mkdir -p, mode 0750. */
int file_make_dirs(const char *path, struct error *error);
/* rm -rf, within one file system, never following links. A path that does not exist is fine. */
int file_remove_tree(const char *path, struct error *error);

#endif
