/* log.h: structured log lines on stderr, one line an event. Only processes' main rooms (daemon/,
 * engine/worker.c, tools/) log; libraries return errors instead. Thread-safe: a line is one write().
 *
 * text:    2026-01-31T12:00:00.123Z info  job started job=ftjob-1 device=cpu
 * json:    {"time":"...","level":"info","message":"job started","job":"ftjob-1","device":"cpu"}
 * journal: the text form with a "<6>" priority prefix and no time, as systemd wants it. */
#ifndef BASE_LOG_H
#define BASE_LOG_H

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR };
enum log_format { LOG_TEXT, LOG_JSON, LOG_JOURNAL };

/* Once, before threads start. `who` ("daemon", "worker cpu") is put on every line. */
void log_configure(enum log_level level, enum log_format format, const char *who);

/* Pairs of strings after the message, closed by NULL: log_write(LOG_INFO, "job started", "job", id, NULL).
 * A value of NULL is written as "". */
void log_write(enum log_level level, const char *message, ...) __attribute__((sentinel));

#endif
