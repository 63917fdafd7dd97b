"""A tokenizer that shows in text which tokens it was made of."""

from __future__ import annotations

import tokenizers

from moe_jax.text import Tokenizer

VOCABULARY = 32000
EOS = 7


def make_tokenizer() -> Tokenizer:
    """Token i is i in hexadecimal digits and a space; every sixth ends with the first half of a character, every other
    begins with the second half of one."""
    written = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def piece(i: int) -> str:
        first, last = ("©" if i % 2 else ""), ("Ã" if i % 6 == 0 else "")  # the bytes A9 and C3, which are é reversed
        return first + written.pre_tokenize_str(f"{i:x} ")[0][0] + last

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({piece(i): i for i in range(VOCABULARY)}, piece(0)))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend)


TOKENIZER = make_tokenizer()
