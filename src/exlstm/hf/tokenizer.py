"""Our tokenizers of bytes and of byte pairs as those of transformers, which hold the same tokens under the same numbers."""

from __future__ import annotations

import tokenizers
from transformers import PreTrainedTokenizerFast

from exlstm.data.tokenizer import BPE, Bytes, byte_letters


def fast_tokenizer(tokenizer: Bytes | BPE, **special) -> PreTrainedTokenizerFast:
    """The tokenizer for `pipeline` and `save_pretrained`; `special` names tokens, as pad_token="\\x00".

    TypeError: a tokenizer of another kind.
    """
    if isinstance(tokenizer, BPE):
        inner = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    elif isinstance(tokenizer, Bytes):
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=byte_letters(), merges=[]))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
    else:
        raise TypeError(f"the tokenizer is a {type(tokenizer).__name__}, wanted one of bytes or byte pairs")
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **special)
