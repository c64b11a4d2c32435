"""Our tokenizers of bytes and of byte pairs as those of transformers, which hold the same tokens under the same numbers."""

from __future__ import annotations

import tokenizers
from transformers import PreTrainedTokenizerFast

from exlstm.data.tokenizer import BPE, Bytes, byte_letters


def fast_tokenizer(tokenizer: Bytes | BPE, **special) -> PreTrainedTokenizerFast:
    """The tokenizer for `pipeline` and `save_pretrained`; `special` names tokens of its own, as pad_token="\\x00", which
    text may hold all the same.

    TypeError: a tokenizer of another kind. ValueError: a special token that the vocabulary, and so the model, has not.
    """
    if isinstance(tokenizer, BPE):
        inner = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    elif isinstance(tokenizer, Bytes):
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=byte_letters(), merges=[]))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
    else:
        raise TypeError(f"the tokenizer is a {type(tokenizer).__name__}, wanted one of bytes or byte pairs")
    for name, text in special.items():
        if name.endswith("_token") and isinstance(text, str):
            special[name] = _letters(inner, name, text)
    # A special token is not looked for in the text, where its letters may stand for themselves.
    settings = {"clean_up_tokenization_spaces": False, "split_special_tokens": True, **special}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **settings)


def _letters(inner, name: str, text: str) -> str:
    """A special token as the vocabulary spells it: bytes have letters of their own there, the newline is a Ċ."""
    found = inner.encode(text).tokens
    if len(found) == 1 or inner.token_to_id(text) is not None:
        return found[0] if len(found) == 1 else text
    raise ValueError(f"{name} is {text!r}, which is {len(found)} tokens, wanted one of the vocabulary")
