"""A model in files that other programs run: the streaming step as ONNX or pt2, and the forward over a sequence as pt2.

step(tokens (B, 1), every part of the state) -> logits (B, V), every part of the next state; a fresh state is zeros
forward(tokens (B, T)) -> logits (B, T, V)
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from exlstm import __version__, runs
from exlstm.layers.attention import AttentionState
from exlstm.models.config import nearest
from exlstm.models.language import LanguageModel
from exlstm.models.reading import evaluating
from exlstm.ops.backend import backend
from exlstm.train.checkpoint import write_folder

FORMATS = ("onnx", "pt2")
# Why a part of a model with these blocks cannot be had; attention with a window has its step.
NO_STEP = {"attention": "its state grows with every token"}
NO_FORWARD = {"lstm": "a compiled graph unrolls it over one length"}
# The shortest sequence that a forward takes, beside the widest convolution: what a graph of open length may assume.
SHORTEST = 4


class Step(nn.Module):
    """One token, with the state as plain tensors in the order of `parts`; places of a window count from 1, 0 is nobody's."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model
        with torch.no_grad():
            _, state = model(torch.zeros(2, 1, dtype=torch.int64, device=model.embedding.weight.device))
        self.structure = model.stack.filled(state)

    def forward(self, tokens: Tensor, *state: Tensor):
        given = iter(state)
        logits, after = self.model(tokens, _counted(_rebuilt(self.structure, given), -1))
        return logits[:, 0], *(tensor for _, tensor in parts(_counted(after, 1)))


class Forward(nn.Module):
    """A sequence from a fresh state."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[0]


def parts(state, name: str = "state") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a state with its name, as ("state_0_conv", ...), ("state_0_c", ...)."""
    if isinstance(state, Tensor):
        yield name, state
    elif hasattr(state, "_fields"):
        for field, value in zip(state._fields, state, strict=True):
            yield from parts(value, f"{name}_{field}")
    elif state is not None:
        for i, value in enumerate(state):
            inner = f"{name}_{i}" if name == "state" else f"{name}_conv" if isinstance(value, Tensor) else name
            yield from parts(value, inner)


def _rebuilt(structure, given: Iterator[Tensor]):
    if isinstance(structure, Tensor):
        return next(given)
    if structure is None:
        return None
    made = [_rebuilt(part, given) for part in structure]
    return type(structure)(*made) if hasattr(structure, "_fields") else tuple(made)


def _counted(state, by: int):
    """A state whose windows count their places from another number on: at 0 a fresh state is zeros."""
    if isinstance(state, AttentionState):
        return state._replace(positions=state.positions + by)
    if isinstance(state, Tensor) or state is None:
        return state
    inner = (_counted(part, by) for part in state)
    return type(state)(*inner) if hasattr(state, "_fields") else tuple(inner)


def export(model: LanguageModel, folder: str | Path, format: str) -> list[Path]:
    """Writes `folder`, whole or not at all: step.onnx, or step.pt2 and forward.pt2, and export.json, which describes them.

    `forward.pt2` holds our operators: whoever loads it imports exlstm.models.language first. ValueError: blocks that have
    neither a step of one size nor a forward of open length; ModuleNotFoundError: ONNX needs the extra `onnx`.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}{nearest(format, FORMATS)}")
    wanted = _wanted(model, format)
    folder = Path(folder)
    if folder.exists() and not (folder / "export.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds other things than an export; choose another folder")
    write_folder(folder, lambda aside: _write(evaluating(model), aside, format, wanted))
    return [folder / f"{name}.{format}" for name in wanted]


def _wanted(model, format: str) -> list[str]:
    """Of "step" and "forward" those that this format and the model's blocks allow."""
    if format == "onnx" and find_spec("onnxscript") is None:
        raise ModuleNotFoundError("ONNX needs the package onnxscript: pip install 'exlstm[onnx]'")
    if not isinstance(model, LanguageModel):
        raise TypeError(f"model is {type(model).__name__}, wanted a LanguageModel")
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError("the model is on the meta device and has no values to export")
    dtype = model.embedding.weight.dtype
    if format == "onnx" and dtype not in (torch.float32, torch.float16):
        raise ValueError(f"the model is {dtype}, for which ONNX Runtime lacks operators; wanted model.float()")
    no_step = {} if model.config.attention.window else NO_STEP
    tables = {"step": no_step} if format == "onnx" else {"step": no_step, "forward": NO_FORWARD}
    kinds, wanted, reasons = dict.fromkeys(model.config.layers()), [], []
    for name, table in tables.items():
        why = [f"no {name} of {kind}: {table[kind]}" for kind in kinds if kind in table]
        reasons += why
        wanted += [name] * (not why)
    if not wanted:
        raise ValueError(f"nothing of this model can be exported as {format}: {'; '.join(reasons)}")
    return wanted


@torch.no_grad()
def _write(model, folder: Path, format: str, wanted: list[str]):
    device = model.embedding.weight.device
    told = {"format": "exlstm-export", "version": __version__, "vocab_size": model.config.vocab_size, "files": {}}
    batch = torch.export.Dim("batch")
    if "step" in wanted:
        step = Step(model)
        state = dict(parts(step.structure))
        given = (torch.zeros(2, 1, dtype=torch.int64, device=device), *state.values())
        # In plain operations, which any runtime has.
        with backend("reference"):
            traced = torch.export.export(step, given, dynamic_shapes=({0: batch}, tuple({0: batch} for _ in state)))
        told["files"][f"step.{format}"] = {
            "inputs": {"tokens": ["batch", 1], **{name: ["batch", *t.shape[1:]] for name, t in state.items()}},
            "outputs": ["logits", *(f"next_{name}" for name in state)],
        }
        if format == "onnx":
            _write_onnx(traced, folder / "step.onnx", list(state))
        else:
            torch.export.save(traced, folder / "step.pt2")
    if "forward" in wanted:
        shortest = max([SHORTEST, *(len(p[0]) for name, p in model.named_parameters() if name.endswith("conv.weight"))])
        sample = torch.zeros(2, 100, dtype=torch.int64, device=device)
        length = torch.export.Dim("length", min=shortest)
        traced = torch.export.export(Forward(model), (sample,), dynamic_shapes=({0: batch, 1: length},))
        torch.export.save(traced, folder / "forward.pt2")
        told["files"]["forward.pt2"] = {"inputs": {"tokens": ["batch", "length"]}, "shortest": shortest}
    if model.tokenizer is not None:
        told["tokenizer"] = model.tokenizer.to_dict()
    (folder / "export.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _unheard():
    """Without what torch and onnxscript say about each other, in warnings and in logs."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _forms() -> dict:
    """Operators of torch in the operators of ONNX that lose least; its own table makes logsigmoid the logarithm of a sigmoid,
    which near 1 keeps no digit of a forget gate that remembers for long, and is -inf where the sigmoid underflows."""
    from onnxscript import opset18 as op

    def rms_norm(x, shape, weight=None, eps=None):
        axes = [-n - 1 for n in range(len(shape))]
        y = op.Div(x, op.Sqrt(op.Add(op.ReduceMean(op.Mul(x, x), axes), op.CastLike(eps, x))))
        return y if weight is None else op.Mul(y, weight)

    aten = torch.ops.aten
    return {
        aten.log_sigmoid.default: lambda x: op.Neg(op.Softplus(op.Neg(x))),
        # ONNX Runtime's own sigmoid is a quotient of polynomials: where it is small, the fourth digit is wrong.
        aten.sigmoid.default: lambda x: op.Reciprocal(op.Add(op.Exp(op.Neg(x)), op.CastLike(1.0, x))),
        aten.silu.default: lambda x: op.Div(x, op.Add(op.Exp(op.Neg(x)), op.CastLike(1.0, x))),
        aten.rms_norm.default: rms_norm,
    }


def _write_onnx(traced, path: Path, state: list[str]):
    with _unheard():
        program = torch.onnx.export(
            traced,
            input_names=["tokens", *state],
            output_names=["logits", *(f"next_{name}" for name in state)],
            dynamic_shapes=({0: "batch"}, tuple({0: "batch"} for _ in state)),
            custom_translation_table=_forms(),
            dynamo=True,
            verbose=False,
        )
        program.save(path, external_data=False)


def export_run(run: Path, out: str, format: str):
    """`export` of a run's model, in float32 on the CPU, into `out` or RUN/export/FORMAT."""
    model = runs.load(run, "cpu").float()
    written = export(model, Path(out) if out else run / "export" / format, format)
    for path in written:
        print(f"{format}  {path}  {path.stat().st_size:,} bytes")
