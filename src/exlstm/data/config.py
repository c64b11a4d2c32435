"""What a corpus is and how it is served: frozen settings, without torch so that the command line answers at once."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from exlstm.data.tokenizer import check_kind


@dataclass(frozen=True)
class DataConfig:
    """Text, its tokens, its held-out part and its batches."""

    files: tuple[str, ...] = ()
    """files, folders (every text file below) or globs, as text or as .jsonl, packed (.gz, .bz2, .xz) or not; empty: the source
    of the Python standard library"""
    field: str = "text"
    """the field of a .jsonl that holds the text; every row is a document"""
    tokenizer: str = "bytes"
    """bytes, characters or bpe (a byte-level BPE trained on the text, needs exlstm[hf])"""
    vocab_size: int = 0
    """tokens of a bpe, at least 257; 0: 4096. The others know their own size"""
    context: int = 256
    """tokens a row of a batch"""
    batch_size: int = 8
    """rows a batch"""
    held_out: float = 0.1
    """share of the text that is kept from training: whole documents when there are ten, else the end of the text"""
    seed: int = 0
    """seed of the order of the batches and of the choice of held-out documents"""

    def __post_init__(self):
        files = (self.files,) if isinstance(self.files, str | os.PathLike) else tuple(self.files)
        files = tuple(os.fspath(file) if isinstance(file, os.PathLike) else file for file in files)
        object.__setattr__(self, "files", files)
        for file in files:
            if not isinstance(file, str) or not file:
                raise ValueError(f"files has {file!r}, wanted the name of a file or folder, or a glob")
        if not isinstance(self.field, str) or not self.field:
            raise ValueError(f"field is {self.field!r}, wanted the name of the field that holds the text")
        check_kind(self.tokenizer)
        for name, least in (("vocab_size", 0), ("context", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}, wanted a whole number of at least {least}")
        if self.tokenizer != "bpe" and self.vocab_size:
            raise ValueError(f"vocab_size is {self.vocab_size}; only a bpe takes one, {self.tokenizer} knows its own")
        if self.tokenizer == "bpe" and 0 < self.vocab_size < 257:
            raise ValueError(f"vocab_size is {self.vocab_size}, wanted at least 257: a bpe begins with the 256 bytes")
        share = self.held_out
        if not isinstance(share, int | float) or isinstance(share, bool) or not math.isfinite(share):
            raise ValueError(f"held_out is {share!r}, wanted a share of the text between 0 and 1")
        if not 0 < share < 1:
            raise ValueError(f"held_out is {share}, wanted a share of the text between 0 and 1, both excluded")
