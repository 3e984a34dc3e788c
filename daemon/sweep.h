/* sweep.h: what a crash left on disk. Before the loop runs. */
#ifndef DAEMON_SWEEP_H
#define DAEMON_SWEEP_H

#include "daemon/store.h"

/* Remove files of DATA_DIR/files and folders of DATA_DIR/jobs that have an id of ours and no row: a file has its name
 * before its row commits and loses it after the row is gone, and between the two anything may end. What else lies
 * there is left alone, and everything where the database has no row at all: that is a new or a lost one, and somebody
 * may still want what it knew. */
int sweep_orphans(struct store *store, const char *data_dir, struct error *error);

#endif
