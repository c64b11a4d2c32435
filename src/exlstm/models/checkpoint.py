"""Models and states on disk: safetensors and strict JSON, written whole or not at all, read whole and ours or refused.

A model is a folder: model.safetensors, config.json {"format": "exlstm", "version": 1, "model": {...}}, tokenizer.json
where there is a tokenizer, and manifest.json with the hash of each. A state is one safetensors file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from exlstm.data.tokenizer import tokenizer_from_dict
from exlstm.models.config import LanguageConfig, from_dict, nearest
from exlstm.models.reading import GenerationState
from exlstm.train.checkpoint import MANIFEST, share, step_folder, steps_in, verify, write_folder

FORMAT, STATE_FORMAT, VERSION = "exlstm", "exlstm-state", 1
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
LARGEST_JSON = 2**28


def write(model, folder: Path):
    """The files of a model, into a folder that stands."""
    config = {"format": FORMAT, "version": VERSION, "model": asdict(model.config)}
    _write_json(folder / CONFIG, config)
    if model.tokenizer is not None:
        _write_json(folder / TOKENIZER, model.tokenizer.to_dict())
    # A compiled block is named after its wrapper; the file knows the block alone.
    weights = {name.replace("_orig_mod.", ""): tensor.detach() for name, tensor in model.state_dict().items()}
    on_meta = next((name for name, tensor in weights.items() if tensor.is_meta), None)
    if on_meta:
        raise ValueError(f"{on_meta} is on the meta device and has no values to save")
    # What somebody has tied stands under each of its names: a file holds no ties.
    places = {tensor.data_ptr(): name for name, tensor in weights.items()}
    apart = {n: t if places[t.data_ptr()] == n else t.clone() for n, t in weights.items()}
    save_file({name: t.contiguous() for name, t in apart.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def save(model, folder: str | os.PathLike):
    """A folder that `load` reads; replaces one that holds such a model and nothing else, or nothing at all."""
    folder = Path(folder)
    held = next((name for name, p in model.named_parameters() if hasattr(p, "qdata")), None)
    if held is not None:
        raise ValueError(f"{held} is held in int8, which is not written; save the model before it is put into int8")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, wanted a folder to save the model in")
    if folder.is_dir():
        found = {file.name for file in folder.iterdir()}
        foreign = sorted(found - {WEIGHTS, CONFIG, TOKENIZER, MANIFEST})
        if foreign:
            raise ValueError(f"{folder} holds {foreign[0]}, which is no part of a saved model; choose another folder")
        if found:
            try:
                _read_config(folder)
            except (ValueError, OSError) as error:
                raise ValueError(f"{folder} may not be replaced, choose another folder: {error}") from None
    write_folder(folder, lambda aside: write(model, aside))


def load(kind, folder: str | os.PathLike, device=None, dtype=None):
    """The model of class `kind` in `folder`, or in a run's newest whole checkpoint; see `from_pretrained`."""
    folder, device = Path(folder), _checked_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}, wanted a floating dtype as torch.bfloat16")
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, wanted the folder of a model or of a run")
    if (folder / CONFIG).exists() or not (folder / "checkpoints").is_dir():
        return _load_folder(kind, folder, device, dtype)
    steps, bad = folder / "checkpoints", {}
    # Asked for anew each time: a training that goes on writes new ones and removes the old, in the midst of a reading too.
    while left := [path for step in steps_in(steps) if (path := step_folder(steps, step)) not in bad]:
        try:
            model = _load_folder(kind, left[0], device, dtype)
        except (ValueError, OSError) as error:
            bad[left[0]] = str(error)
            continue
        for reason in (told for path, told in bad.items() if path.exists()):
            warnings.warn(f"passed over a newer checkpoint: {reason}", UserWarning, stacklevel=3)
        return model
    if bad:
        raise ValueError(f"no checkpoint in {folder} can be read; the newest: {next(iter(bad.values()))}")
    raise FileNotFoundError(f"{folder} holds no checkpoint yet")


def _load_folder(kind, folder: Path, device: str, dtype):
    config = _read_config(folder)
    # Numbers are read all the same where shapes alone are wanted: what is damaged is refused everywhere.
    with _opened(folder / WEIGHTS, "cpu" if device == "meta" else device) as file:
        _check_depth(folder, config, file.keys())
        try:
            model = kind(config, device="meta")
        except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"{folder / CONFIG} describes no model: {_first_line(error)}") from None
        _check_names(folder / WEIGHTS, model, file)
        weights = {name: _read_weight(folder / WEIGHTS, file, name, dtype) for name in model.state_dict()}
    tokenizer = _read_tokenizer(folder / TOKENIZER, config) if (folder / TOKENIZER).exists() else None
    # Last, so that what can be named more closely is.
    listed = verify(folder)
    for name in (WEIGHTS, CONFIG, *[TOKENIZER] * (tokenizer is not None)):
        if name not in listed:
            raise ValueError(f"{folder / MANIFEST} does not list {name}: the two were not written together")
    model.load_state_dict(weights, assign=True)
    model.tokenizer = tokenizer
    return (model.to(device) if device == "meta" else model).eval()


def _read_config(folder: Path) -> LanguageConfig:
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds neither {CONFIG} nor checkpoints: not the folder of a model or a run")
    values = _read_json(path)
    if values.get("format") != FORMAT:
        raise ValueError(f"{path} is {_foreign(values)}, wanted one with format {FORMAT!r}")
    _check_version(path, values.get("version"))
    for key in values:
        if key not in ("format", "version", "model"):
            raise ValueError(f"{path} has the unknown key {key!r}{nearest(key, ('format', 'version', 'model'))}")
    if "model" not in values:
        raise ValueError(f"{path} has no key 'model'")
    try:
        return from_dict(LanguageConfig, values["model"])
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: {_first_line(error)}") from None


def _foreign(values: dict) -> str:
    """Whose configuration this is, as far as its keys tell."""
    if values.get("model_type") == "exlstm":
        return "a model of exlstm.hf, which ExlstmForCausalLM.from_pretrained(...).to_exlstm() reads"
    if "model_type" in values or "architectures" in values or "transformers_version" in values:
        return f"a Hugging Face configuration (model_type {values.get('model_type')!r})"
    theirs = [key for key in ("mlstm_block", "slstm_block", "slstm_at", "num_blocks", "embedding_dim") if key in values]
    if theirs:
        return f"a configuration of NX-AI's xlstm ({', '.join(theirs)})"
    if "format" in values:
        return f"a configuration of format {values['format']!r}"
    return f"a foreign configuration (keys {', '.join(list(values)[:5]) or 'none'})"


def _check_version(path: Path, version):
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{path} has version {version!r}, wanted a whole number from 1 to {VERSION}")
    if version > VERSION:
        raise ValueError(f"{path} has version {version}, written by a newer exlstm; this one reads up to {VERSION}")


def _check_depth(folder: Path, config: LanguageConfig, names):
    """Before anything is built: a config with a million layers must not take an hour to be refused."""
    held = len({name.split(".")[2] for name in names if name.startswith("stack.blocks.")})
    if held != config.n_layers:
        raise ValueError(f"{folder / CONFIG} says {config.n_layers} layers, {WEIGHTS} holds {held}")


def _check_names(path: Path, model, file):
    """Every tensor of the model is in the file, in its shape, and no other."""
    wanted, found = model.state_dict(), set(file.keys())
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in found}
    sizes = {n: tuple(t.shape) for n, t in wanted.items()}
    wrong = [f"{n} {shapes[n]} instead of {sizes[n]}" for n in wanted if n in found and shapes[n] != sizes[n]]
    complaints = {
        "lacks": [n for n in wanted if n not in found],
        "holds, against config.json,": sorted(found - wanted.keys()),
        "has another shape than config.json wants in": wrong,
    }
    told = [f"{what} {_some(names)}" for what, names in complaints.items() if names]
    if told:
        raise ValueError(f"{path} {'; it '.join(told)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_weight(path: Path, file, name: str, dtype) -> Tensor:
    try:
        tensor = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged at {name}: {_first_line(error)}") from None
    _check_numbers(path, name, tensor)
    return tensor if dtype is None else tensor.to(dtype)


def _check_numbers(where: Path | str, name: str, tensor: Tensor):
    """Floating numbers, all of them finite, found without a copy: `isfinite` of a large tensor is three of them."""
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise ValueError(f"{where} holds {name} as {tensor.dtype}, wanted a floating dtype of 16 bits or more")
    # The ends of a tensor with a NaN are NaN.
    if tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
        raise ValueError(f"{where} holds NaN or infinities in {name}")


def _read_tokenizer(path: Path, config: LanguageConfig):
    try:
        tokenizer = tokenizer_from_dict(_read_json(path))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no tokenizer: {_first_line(error)}") from None
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{path} has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    return tokenizer


# Other packages


def load_checkpoint(source, config=None, device=None, dtype=None):
    """Our model with weights that another package was trained with, in eval mode: a LanguageModel, or a Stack where there is
    neither embedding nor head.

    Args:
        source: a state dict, a file (safetensors, or torch.save's with tensors alone) or a folder (one file or shards, with
            config.json or config.yaml) of NX-AI's xLSTMBlockStack, xLSTMLMModel (either layout of the sLSTM) or xLSTMLarge
            (single or fused), of transformers' xLSTMForCausalLM, or of ours. What stands in front of all names is left out.
        config: their configuration, where it does not lie beside the weights: a mapping, their dataclass, or a file. Needed
            only for what shapes do not tell; without it their defaults count.
        device, dtype: of the model; None is the CPU, and the dtype that is stored.

    Raises:
        ValueError, FileNotFoundError: what is missing, damaged, not understood or not to be had on our blocks, by name.

    >>> model = load_checkpoint(xlstm_model.state_dict())  # doctest: +SKIP
    """
    # The models stand on this room, so it gets to know them only when it is asked for one.
    return import_module("exlstm.models.foreign").load(source, config, device, dtype)


def save_checkpoint(model, folder: str | os.PathLike, format: str = "transformers"):
    """Writes a LanguageModel of `mlstm` blocks without convolution for another package, whole or not at all.

    `format` is "transformers" (config.json, read by xLSTMForCausalLM.from_pretrained) or "xlstm_large" (config.yaml, read by
    NX-AI's load_from_pretrained). ValueError: the model has what their layout has not, or the folder holds other things.
    """
    import_module("exlstm.models.foreign").save(model, folder, format)


# States


def save_state(model, state, path: str | os.PathLike):
    """One file with every tensor of the state, its structure and the model's config; an existing one is replaced."""
    if not isinstance(state, tuple | list):
        raise ValueError(f"state is {type(state).__name__}, wanted tensors in tuples: a state of forward or generate")
    path, tensors = Path(path), {}
    told = {"structure": _flatten(state, "state", tensors), "model": asdict(model.config)}
    told = {key: json.dumps(value) for key, value in told.items()}
    metadata = {"format": STATE_FORMAT, "version": str(VERSION), **told, "sha256": _digest(tensors, **told)}
    aside, empty = (path.with_name(f".tmp-{os.getpid()}-{path.name}{end}") for end in ("", "-empty"))
    try:
        save_file(tensors, aside, metadata=metadata)
        empty.touch()
        share(aside, empty)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {path}: {getattr(error, 'strerror', None) or _first_line(error)}") from None
    finally:
        for left in (aside, empty):
            with contextlib.suppress(OSError):
                left.unlink()


def load_state(model, path: str | os.PathLike):
    """The state in a file of `save_state`, on the model's device."""
    path = Path(path)
    with _opened(path, "cpu") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != STATE_FORMAT:
            raise ValueError(f"{path} holds no state: its format is {metadata.get('format')!r}, not {STATE_FORMAT!r}")
        try:
            version, structure = (json.loads(metadata[key]) for key in ("version", "structure"))
            config = from_dict(LanguageConfig, json.loads(metadata["model"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"{path} is damaged: its header is not the one that was written") from None
        _check_version(path, version)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _digest(tensors, metadata["structure"], metadata["model"]) != metadata.get("sha256"):
        raise ValueError(f"{path} is damaged: its bytes are not the ones that were written")
    theirs, ours = asdict(config), asdict(model.config)
    other = [f"{key} is {value!r} there, {ours[key]!r} here" for key, value in theirs.items() if value != ours[key]]
    if other:
        raise ValueError(f"{path} is the state of another model: {other[0]}")
    device = model.embedding.weight.device
    try:
        return _build(structure, {name: t.to(device) for name, t in tensors.items()}, _kinds(model))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} has a structure that this model's state has not: {_first_line(error)}") from None


def _flatten(value, name: str, tensors: dict):
    """The structure of a state as plain JSON; its tensors go into `tensors`."""
    if isinstance(value, Tensor):
        # A copy: tensors of a state may lie in one memory, which the format refuses.
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = {field: _flatten(getattr(value, field), f"{name}.{field}", tensors) for field in value._fields}
        return {"kind": type(value).__name__, "fields": fields}
    if isinstance(value, tuple | list):
        items = [_flatten(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise ValueError(f"{name} is {type(value).__name__}, wanted tensors in tuples: a state of forward or generate")


def _build(structure: dict, tensors: dict, kinds: dict):
    ((form, content), *rest) = structure.items()
    if form == "kind":
        return kinds[content](**{k: _build(v, tensors, kinds) for k, v in dict(rest)["fields"].items()})
    if form in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[form](_build(item, tensors, kinds) for item in content)
    return tensors[content] if form == "tensor" else {"value": content}[form]


def _kinds(model) -> dict:
    """The classes in a state of this model by name: the model is asked, so that a new block needs no row here."""
    found, device = {"GenerationState": GenerationState}, model.embedding.weight.device
    with torch.no_grad():
        left = [model.hidden(torch.zeros(1, 1, dtype=torch.int64, device=device))[1]]
    while left:
        value = left.pop()
        if isinstance(value, tuple | list):
            left += value
            if hasattr(value, "_fields"):
                found[type(value).__name__] = type(value)
    return found


def _digest(tensors: dict, structure: str, model: str) -> str:
    whole = hashlib.sha256((structure + model).encode())
    for name in sorted(tensors):
        whole.update(name.encode())
        whole.update(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


# Files


def _write_json(path: Path, values: dict):
    path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, too many for a configuration")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {_first_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is a JSON {type(values).__name__}, wanted an object")
    return values


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")


def _opened(path: Path, device: str):
    """A safetensors file, header checked."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        return safe_open(path, framework="pt", device=device)
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        reason = "it is empty" if size == 0 else f"{_first_line(error)} ({size} bytes)"
        raise ValueError(f"{path} is damaged or no safetensors file: {reason}") from None


def _checked_device(device) -> str:
    try:
        return str(torch.empty(0, device=device).device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
