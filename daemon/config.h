/* config.h: what `adderd serve` was told, by flags and ADDER_* variables (a flag wins). */
#ifndef DAEMON_CONFIG_H
#define DAEMON_CONFIG_H

#include "base/error.h"
#include "base/log.h"

#include <stdbool.h>
#include <stdint.h>

enum { CONFIG_MAX_FOLDERS = 16, CONFIG_MAX_DEVICES = 16 };

struct config {
    char listen_host[64];  /* an address or a name; IPv6 without its brackets */
    uint16_t listen_port;  /* 0 = a free one, printed in the log and written to port_file */
    const char *port_file; /* or NULL: "HOST:PORT\n" is written there once it listens */
    const char *data_dir;
    const char *models_dirs[CONFIG_MAX_FOLDERS];
    int n_models_dirs;
    const char *tasks_dir;                   /* definitions of evaluation tasks */
    const char *eval_data_dir;               /* their documents, or NULL */
    const char *devices[CONFIG_MAX_DEVICES]; /* "cpu", "cuda:N", "auto" */
    int n_devices;
    const char *default_model; /* or NULL */
    const char *organization;  /* second part of ft: names and organization_id */
    int threads;               /* CPU threads a worker may use, 0 = all */
    int64_t max_body_bytes;    /* JSON bodies */
    int64_t max_upload_bytes;
    int32_t max_seqs;    /* sequences a worker decodes together */
    int32_t max_waiting; /* requests queued for completions before 429 */
    int32_t max_connections;
    int32_t heartbeat_timeout_ms;
    int32_t shutdown_timeout_ms;
    enum log_level log_level;
    enum log_format log_format;
};

/* argv after "serve" (argv[0] is the first flag). Returns 0, 1 when --help was printed, or an error that
 * names the flag or variable. Strings point into argv and the environment, except models_dirs and devices,
 * which config_free frees. */
int config_parse(int argc, char **argv, struct config *ret_config, struct error *error);
void config_free(struct config *config);
/* Can only this machine reach an address? True for 127.0.0.0/8, ::1 and localhost. */
bool config_is_loopback(const char *host);
/* The text of `adderd serve --help`: every flag with its variable and default. */
const char *config_help(void);

#endif
