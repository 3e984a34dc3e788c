/* tokenizer_parts.h: what a tokenizer is made of; shared by tokenizer.c (use) and tokenizer_load.c. */
#ifndef ENGINE_TEXT_TOKENIZER_PARTS_H
#define ENGINE_TEXT_TOKENIZER_PARTS_H

#define PCRE2_CODE_UNIT_WIDTH 8

#include "engine/text/added_tokens.h"
#include "engine/text/bpe.h"
#include "engine/text/tokenizer.h"
#include "engine/text/vocabulary.h"

#include <pcre2.h>

struct tokenizer {
    struct vocabulary vocabulary;
    struct bpe bpe;
    struct added_tokens raw;        /* matched in the text as it is */
    struct added_tokens normalized; /* matched in the normalized text between those */
    pcre2_code *split;              /* NULL = do not split (use_regex false) */
    bool nfc, add_prefix_space;
    bool uncuttable; /* an added token may reach over the end of a word, or depends on what is there */
};

#endif
