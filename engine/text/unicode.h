/* unicode.h: what the text room needs of Unicode: UTF-8 in pieces, NFC, white space, word characters. Pure
 * functions; any thread. */
#ifndef ENGINE_TEXT_UNICODE_H
#define ENGINE_TEXT_UNICODE_H

#include "base/buffer.h"
#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Look at the character that starts at text (length > 0). Returns its length in bytes (1..4) and sets
 * *ret_codepoint; 0 when the bytes are a proper beginning of one; -n when they cannot be one, n bytes being
 * the "maximal subpart" that one U+FFFD stands for (Unicode 3.9, as Python's 'replace' and Rust's lossy
 * conversions do). */
int utf8_scan(const char *text, size_t length, int32_t *ret_codepoint);

/* How many bytes at the start are whole, valid UTF-8. */
size_t utf8_valid_prefix(const char *text, size_t length);

/* Append bytes that arrive in pieces, invalid ones as U+FFFD. The bytes of a character that is not yet whole
 * wait in held (*n_held of them, at most 3). */
void utf8_feed(unsigned char *held, size_t *n_held, const char *bytes, size_t length, struct buffer *out);
/* The end of the pieces: what is held becomes U+FFFD. */
void utf8_finish(size_t *n_held, struct buffer *out);

/* Append text (valid UTF-8) in Normalization Form C. O(n log n), also for endless runs of combining marks.
 * Returns 0 or ERROR_NO_MEMORY. */
int unicode_nfc(const char *text, size_t length, struct buffer *out);

/* Unicode's White_Space. */
bool unicode_is_space(int32_t codepoint);
/* \w of UTS 18 (alphabetic, marks, decimal digits, connectors, joiners), as Rust's regex crate has it. */
bool unicode_is_word(int32_t codepoint);

/* The lengths of the white space at both ends of text. Invalid bytes are not white space. */
size_t unicode_leading_space(const char *text, size_t length);
size_t unicode_trailing_space(const char *text, size_t length);

/* The character that ends at text[length - 1] (length > 0): its code point, or -1 when invalid. */
int32_t unicode_last(const char *text, size_t length, size_t *ret_bytes);

#endif
