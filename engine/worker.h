/* worker.h: the process that owns one device. Everything it knows of the world comes through one byte stream.
 */
#ifndef ENGINE_WORKER_H
#define ENGINE_WORKER_H

struct kernel_ops;

struct worker_options {
    int fd;                       /* the stream, connected (3 when the daemon starts it) */
    const char *device;           /* "cpu", "cuda:0" */
    int threads;                  /* 0 = all processors */
    const struct kernel_ops *ops; /* NULL: the backend of that device (a test hands in one that fails) */
};

/* Serve until the stream closes or SHUTDOWN comes. Returns the process's exit status. */
int worker_run(const struct worker_options *options);

#endif
