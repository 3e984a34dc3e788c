/* result_file.h: a finished job's step metrics as a CSV file, for `result_files`. */
#ifndef DAEMON_RESULT_FILE_H
#define DAEMON_RESULT_FILE_H

#include "daemon/store.h"

/* Read the job's metrics events, write DATA_DIR/files/ID durably off the loop, and hand the new file's
 * resource (purpose "fine-tune-results"; its row is not stored yet) to done, on the loop's thread. */
void result_file_write(uv_loop_t *loop, struct store *store, const char *data_dir, const char *job,
                       store_file_read done, void *arg);

#endif
