"""What a run may begin with: the model of a run, a saved one or one of another package, with the tokenizer that it reads by."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from exlstm.data.tokenizer import BPE, Bytes
from exlstm.models.checkpoint import CONFIG, TOKENIZER, load_checkpoint
from exlstm.models.language import LanguageModel

FORECASTER, RUN = "forecaster.json", "run.json"


def load(start: str | Path, device: str = "cpu") -> LanguageModel:
    """The language model in `start`, in float32, with its tokenizer.

    `start` is a run (its newest whole checkpoint), a checkpoint, a folder of `save_pretrained`, or what `load_checkpoint` takes.
    ValueError, OSError: there is none, or nobody knows what its tokens stand for.
    """
    path = Path(start)
    if (path / FORECASTER).is_file():
        raise ValueError(f"{path} holds a forecaster, wanted a language model to begin with")
    if (path / RUN).is_file() and not (path / "checkpoints").is_dir():
        raise FileNotFoundError(f"{path} holds no checkpoint yet, wanted a model to begin with")
    of_transformers = (path / CONFIG).is_file() and _model_type(path / CONFIG) == "exlstm"
    # What transformers saved of ours is refused there, with the way to it.
    read = LanguageModel.from_pretrained if of_transformers else load_checkpoint
    model = read(path, device=device, dtype=torch.float32)
    if not isinstance(model, LanguageModel):
        raise ValueError(f"{path} holds a stack without embedding and head, wanted a language model to begin with")
    if model.tokenizer is None:
        model.tokenizer = _tokenizer(path, model.config.vocab_size)
    return model


def settings(start: str | Path) -> dict:
    """The model and the tokenizer of a start, as parts of a run.json."""
    model = load(start, "meta")
    return {"model": asdict(model.config), "data": {"tokenizer": kind(model)}}


def kind(model: LanguageModel) -> str:
    """The kind of a model's tokenizer, as DataConfig names it."""
    return model.tokenizer.to_dict()["kind"]


def _model_type(path: Path):
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return values.get("model_type") if isinstance(values, dict) else None


def _tokenizer(path: Path, size: int) -> Bytes | BPE:
    """What the tokens of a model of another package stand for: its tokenizer.json, or 256 bytes where there is none."""
    folder = path if path.is_dir() else path.parent
    if (folder / TOKENIZER).is_file():
        try:
            tokenizer = BPE((folder / TOKENIZER).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / TOKENIZER} cannot be trained with: {error}") from None
        if tokenizer.vocab_size > size:
            raise ValueError(f"{folder / TOKENIZER} has {tokenizer.vocab_size} tokens, the model {size}")
        return tokenizer
    others = sorted(f.name for f in folder.iterdir() if f.name.startswith(("tokenizer", "vocab", "spiece")))
    if others or size != 256:
        came = f"the tokenizer of {path} ({others[0]})" if others else f"{path} has {size} tokens and no tokenizer: it"
        raise ValueError(f"{came} cannot be trained with, wanted a byte-level {TOKENIZER} or the 256 bytes as tokens")
    return Bytes()
