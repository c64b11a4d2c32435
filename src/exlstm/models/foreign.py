"""Weights trained with other packages, read into our models and written back; models/names*.py have the names.

Nothing is read before every name and shape is known to fit; then one tensor at a time, so that a model of any size is loaded
within little more than its own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from exlstm.models import names, names_large, names_stack
from exlstm.models.checkpoint import (
    CONFIG,
    FORMAT,
    _check_numbers,
    _checked_device,
    _first_line,
    _opened,
    _read_json,
    _some,
    _write_json,
)
from exlstm.models.config import LanguageConfig, nearest
from exlstm.models.language import LanguageModel
from exlstm.models.stack import Stack
from exlstm.train.checkpoint import write_folder

INDEX = "model.safetensors.index.json"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def load(source, config=None, device=None, dtype=None):
    """See `exlstm.models.checkpoint.load_checkpoint`."""
    device = _checked_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}, wanted a floating dtype as torch.bfloat16")
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        if path.is_dir() and _is_ours(path):
            return LanguageModel.from_pretrained(path, device=device, dtype=dtype)
        weights, told = _read_path(path)
    elif isinstance(source, Mapping):
        weights, told = Weights(source, "the state dict", copies=True), {}
    else:
        raise TypeError(f"source is {type(source).__name__}, wanted the path of a file or folder, or a state dict")
    return _build(weights, told if config is None else _plain(config), device, dtype)


class Weights:
    """Tensors by name out of a state dict, or out of safetensors files that are opened and not yet read."""

    def __init__(self, held: Mapping, where: str, copies: bool = False):
        self.where, self.copies = where, copies
        self.held = _flat(held, where)
        self.shapes = {
            name: tuple(held.shape) if isinstance(held, Tensor) else tuple(held.get_slice(name).get_shape())
            for name, held in self.held.items()
        }

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        held = self.held[name]
        if isinstance(held, Tensor):
            return held.detach()[start:stop]
        return held.get_tensor(name) if start is None else held.get_slice(name)[start:stop]


def _flat(held: Mapping, where: str) -> dict:
    """The weights of a state dict, also where it is an entry of a trainer's checkpoint."""
    for key in ("state_dict", "model"):
        if isinstance(held.get(key), Mapping):
            held = held[key]
    for name, value in held.items():
        if isinstance(value, Tensor | float | int) and not isinstance(name, str):
            raise ValueError(f"{where} has the key {name!r}, wanted names of weights")
        if not isinstance(value, Tensor) and not hasattr(value, "get_slice"):
            raise ValueError(f"{where} holds {type(value).__name__} under {name!r}, wanted tensors alone")
    return dict(held)


def _build(weights: Weights, given: dict, device: str, dtype):
    family = names.recognise(weights.shapes)
    if family is None:
        some = _some(sorted(weights.shapes)) or "nothing"
        raise ValueError(
            f"{weights.where} holds {some}: no weights of xLSTMBlockStack, xLSTMLMModel or xLSTMLarge, "
            "and ours want the folder of save_pretrained"
        )
    try:
        if family.kind == "large":
            names_large.check_large(given)
            config = names_large.large_config(weights.shapes, family, given)
            found = names_large.large_map(config, family)
        else:
            names_stack.check_stack(given)
            config = names_stack.stack_config(weights.shapes, family, given)
            found = names_stack.stack_map(config, family, weights.shapes)
        model = (LanguageModel if family.is_lm else Stack)(config, device="meta")
    except KeyError as error:
        raise ValueError(f"{weights.where} looks like an {family}, and lacks {error.args[0]}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{weights.where} looks like an {family}: {_first_line(error)}") from None
    _check(weights, family, config, model, found)
    state = {name: _finish(weights, name, take, device, dtype) for name, take in found.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def _check(weights: Weights, family, config, model, found: names.Map):
    """Every weight is there in its shape, and every name is understood: tried without reading, on the meta device."""
    used, missing, wrong = set(), set(), []

    def take(name, start=None, stop=None):
        if name not in weights.shapes:
            missing.add(name)
            raise KeyError(name)
        used.add(name)
        return torch.empty(weights.shapes[name], device="meta")[start:stop]

    for name, wanted in model.state_dict().items():
        try:
            shape = tuple(found[name](take).shape)
        except KeyError:
            continue
        except RuntimeError as error:
            wrong.append(f"{name}: {_first_line(error)}")
            continue
        if shape != tuple(wanted.shape):
            wrong.append(f"{name} {shape} instead of {tuple(wanted.shape)}")
    if isinstance(config, LanguageConfig) and config.tie_embeddings:
        used.add(f"{family.root}lm_head.weight")
    complaints = {
        "it lacks": sorted(missing),
        "it holds what is not understood:": sorted(weights.shapes.keys() - used),
        "shapes do not fit:": wrong,
    }
    told = [f"{what} {_some(some)}" for what, some in complaints.items() if some]
    if told:
        raise ValueError(f"{weights.where} looks like an {family}; {'; '.join(told)}")


def _finish(weights: Weights, name: str, take, device: str, dtype) -> Tensor:
    try:
        read = take(weights.read)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{weights.where} is damaged at {name}: {_first_line(error)}") from None
    _check_numbers(weights.where, name, read)
    # A state dict goes on belonging to whoever handed it in.
    ours = read.to(device=device, dtype=dtype or read.dtype, copy=weights.copies)
    return ours.clone(memory_format=torch.contiguous_format) if not ours.is_contiguous() else ours


FORMATS = ("transformers", "xlstm_large")


def save(model, folder, format: str):
    """See `exlstm.models.checkpoint.save_checkpoint`."""
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}{nearest(format, FORMATS)}")
    if not isinstance(model, LanguageModel):
        raise TypeError(f"model is {type(model).__name__}, wanted a LanguageModel")
    names_large.check_export(model.config)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is {'not empty' if folder.is_dir() else 'a file'}, wanted a new folder")
    write_folder(folder, lambda aside: _write(model, aside, format == "transformers"))


def _write(model, folder: Path, is_hf: bool):
    held = {name.replace("_orig_mod.", ""): tensor.detach() for name, tensor in model.state_dict().items()}

    def take(name, start=None, stop=None):
        return held[name][start:stop]

    tensors = {name: part(take).contiguous() for name, part in names_large.large_export(model.config, is_hf).items()}
    if model.config.tie_embeddings:
        # One tensor under two names is what the file format refuses.
        tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    settings = names_large.large_settings(model.config, len(held["stack.blocks.0.mixer.q.weight"]))
    if is_hf:
        told = {"hidden_size": model.config.d_model, "num_hidden_layers": model.config.n_layers}
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        told |= {"model_type": "xlstm", "architectures": ["xLSTMForCausalLM"], "dtype": dtype}
        _write_json(folder / CONFIG, {**settings, **told, **_special_tokens(model)})
    else:
        lines = [f"{name}: {_yaml(value)}\n" for name, value in settings.items()]
        (folder / "config.yaml").write_text("".join(lines), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _yaml(value) -> str:
    """Plain values are written as in JSON, but YAML takes 1e-06 for a text, and 1.0e-06 for a number."""
    return re.sub(r"^(-?\d+)e", r"\1.0e", json.dumps(value))


def _special_tokens(model) -> dict:
    """Theirs stand at 0, 1 and 2, which in our vocabularies are tokens like others."""
    return dict.fromkeys(("bos_token_id", "pad_token_id", "eos_token_id"))


# Files


def _is_ours(folder: Path) -> bool:
    if not (folder / CONFIG).is_file():
        return (folder / "checkpoints").is_dir()
    return _read_json(folder / CONFIG).get("format") == FORMAT


def _read_path(path: Path) -> tuple[Weights, dict]:
    """The weights of a file or folder, opened, and the configuration that lies beside them."""
    if path.is_file():
        return _weights([path], path), _beside(path.parent)
    if (path / INDEX).is_file():
        table = _read_json(path / INDEX).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise ValueError(f"{path / INDEX} has no weight_map from names of weights to files")
        files = [path / Path(name).name for name in sorted(set(table.values()))]
    else:
        files = sorted(path.glob("*.safetensors")) or sorted(f for f in path.iterdir() if f.suffix in PICKLES)
    if not files:
        raise FileNotFoundError(f"{path} holds no weights, wanted *.safetensors, or one of {', '.join(PICKLES)}")
    return _weights(files, path), _beside(path)


def _weights(files: list[Path], where: Path) -> Weights:
    held = {}
    for file in files:
        if file.suffix in PICKLES:
            tensors = _flat(_unpickled(file), str(file))
        else:
            opened = _opened(file, "cpu")
            tensors = dict.fromkeys(opened.keys(), opened)
        twice = held.keys() & tensors.keys()
        if twice:
            raise ValueError(f"{file} holds {min(twice)}, as does another file of {where}")
        held |= tensors
    return Weights(held, str(where))


def _unpickled(file: Path):
    """A file of torch.save: tensors alone, nothing of it is run."""
    try:
        held = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise ValueError(f"{file} is no file of torch.save with tensors alone: {_first_line(error)}") from None
    if not isinstance(held, Mapping):
        raise ValueError(f"{file} holds {type(held).__name__}, wanted a state dict")
    return held


def _beside(folder: Path) -> dict:
    if (folder / CONFIG).is_file():
        return _read_json(folder / CONFIG)
    if (folder / "config.yaml").is_file():
        return read_flat_yaml(folder / "config.yaml")
    return {}


def read_flat_yaml(path: Path) -> dict:
    """The settings in a config.yaml as xLSTMLarge writes it: a name and a plain value a line."""
    values = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = re.sub(r"(^|\s)#.*", "", line).rstrip()
        if not text or text == "---":
            continue
        match = re.fullmatch(r"([A-Za-z_]\w*):\s+(\S.*)", text)
        if not match:
            raise ValueError(f"{path}, line {number}, is {line.strip()!r}, wanted a name and a plain value")
        values[match[1]] = _plain_value(match[2])
    return values


def _plain_value(text: str):
    known = {"null": None, "~": None, "true": True, "false": False}
    if text.lower() in known:
        return known[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'\"")


def _plain(config) -> dict:
    """A configuration as plain values: a mapping, a dataclass, or an object with to_dict, as transformers has it."""
    if hasattr(config, "to_dict") and not isinstance(config, type):
        return config.to_dict()
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        return read_flat_yaml(path) if path.suffix in (".yaml", ".yml") else _read_json(path)
    if not isinstance(config, Mapping):
        raise TypeError(f"config is {type(config).__name__}, wanted a mapping, a dataclass or the path of a file")
    return dict(config)
