/* log.c: see log.h. */
#include "base/log.h"

#include "base/buffer.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static enum log_level minimum = LOG_INFO;
static enum log_format format = LOG_TEXT;
static char process[32] = "adderd";

static const char *const level_names[] = {"debug", "info", "warn", "error"};
static const int journal_priorities[] = {7, 6, 4, 3};

void log_configure(enum log_level level, enum log_format new_format, const char *who)
{
    minimum = level;
    format = new_format;
    snprintf(process, sizeof process, "%s", who);
}

static void append_json(struct buffer *line, const char *text)
{
    buffer_append(line, "\"", 1);
    for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
        if (*c == '"' || *c == '\\')
            buffer_printf(line, "\\%c", *c);
        else if (*c < 0x20)
            buffer_printf(line, "\\u%04x", *c);
        else
            buffer_append(line, c, 1);
    }
    buffer_append(line, "\"", 1);
}

/* key=value with quotes only where a space, a quote or a control character asks for them. */
static void append_text(struct buffer *line, const char *text)
{
    if (*text && !strpbrk(text, " \"\\\n\r\t="))
        buffer_append_string(line, text);
    else
        append_json(line, text);
}

void log_write(enum log_level level, const char *message, ...)
{
    if (level < minimum)
        return;
    struct timeval now;
    gettimeofday(&now, NULL);
    struct tm utc;
    gmtime_r(&now.tv_sec, &utc);
    char date[32], stamp[48];
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S", &utc);
    snprintf(stamp, sizeof stamp, "%s.%03dZ", date, (int)(now.tv_usec / 1000));

    struct buffer line = {0};
    if (format == LOG_JSON) {
        buffer_printf(&line, "{\"time\":\"%s\",\"level\":\"%s\",\"process\":", stamp, level_names[level]);
        append_json(&line, process);
        buffer_append_string(&line, ",\"message\":");
        append_json(&line, message);
    } else if (format == LOG_JOURNAL) {
        buffer_printf(&line, "<%d>%s: %s", journal_priorities[level], process, message);
    } else {
        buffer_printf(&line, "%s %-5s %s: %s", stamp, level_names[level], process, message);
    }
    va_list args;
    va_start(args, message);
    for (const char *key; (key = va_arg(args, const char *));) {
        const char *value = va_arg(args, const char *);
        if (!value)
            value = "";
        if (format == LOG_JSON) {
            buffer_append(&line, ",", 1);
            append_json(&line, key);
            buffer_append(&line, ":", 1);
            append_json(&line, value);
        } else {
            buffer_printf(&line, " %s=", key);
            append_text(&line, value);
        }
    }
    va_end(args);
    buffer_append_string(&line, format == LOG_JSON ? "}\n" : "\n");
    if (!line.failed) {
        ssize_t ignored = write(STDERR_FILENO, line.data, line.length);
        (void)ignored;
    }
    buffer_free(&line);
}
