"""A run = model + data + training: the only place where the three meet. Free of torch until a run begins."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from exlstm import __version__
from exlstm.data.config import DataConfig
from exlstm.data.files import PACKED
from exlstm.models.config import SIZES, LanguageConfig, from_dict, nearest
from exlstm.train.config import TrainConfig

VERSION = 1
SETTINGS = "run.json"
DEFAULT_SIZE = "tiny"
# How the size is trained that was tuned for the default run; the others take TrainConfig's defaults.
TRAINED = {"tiny": {"lr": 5e-3, "optimizer": "muon"}}
ROOMS = {"model": LanguageConfig, "data": DataConfig, "train": TrainConfig}
# What a run.json says beside the settings.
WRITTEN = ("version", "exlstm", "corpus")
# What two settings of one run may differ in: the tokenizer sets the vocabulary, and the fingerprint of the text says more than
# the names of its files. And what a run and the model that it begins with may.
FREE = ("model.vocab_size", "data.files")
FREE_AT_START = (*FREE, "model.dropout", "model.attention.dropout")


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run; `out` is its folder, runs/<name of the first file> where it is empty.

    `start` is what it begins with, "" for new weights: a run, one of its checkpoints, a saved model, or one of another package
    that `load_checkpoint` reads. Model and tokenizer are then those of the start, as `sized(start=...)` has them.
    """

    out: str = ""
    model: LanguageConfig = field(default_factory=LanguageConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    device: str = "auto"
    start: str = ""


def sized(
    size: str | None = None, values: dict | None = None, start: str = "", runs: tuple[str, ...] = ()
) -> RunConfig:
    """The settings of a run: those of a size under `values`, parts of a run.json; the argument `size` is above both.

    With a `start` they are, in place of a size, its model and tokenizer, and TrainConfig's defaults; they are looked for in
    `runs` that began with it before it is read itself.
    """
    values = dict(values or {})
    start = start or values.get("start", "")
    if start:
        return _started(start, size or values.get("size"), values, runs)
    for name in (size, values.get("size")):
        if name is not None and name not in SIZES:
            raise ValueError(f"unknown size {name!r}{nearest(name, SIZES)}")
    chosen = size or values.get("size", DEFAULT_SIZE)
    # The file of a run holds all of it: what it lacks had the default of its time.
    tuned = {} if "version" in values else TRAINED.get(chosen, {})
    values["train"] = {**tuned, **values.get("train", {})}
    parts = {name: from_dict(kind, values.get(name, {}), f"{name}.") for name, kind in ROOMS.items()}
    below, above = SIZES[values.get("size", DEFAULT_SIZE)], SIZES.get(size, {})
    parts["model"] = from_dict(LanguageConfig, {**below, **values.get("model", {}), **above}, "model.")
    return RunConfig(out=values.get("out", ""), **parts)


def _started(start: str, size: str | None, values: dict, runs: tuple[str, ...]) -> RunConfig:
    if size:
        raise ValueError(f"size is {size!r} beside the start {start}, whose size the model has: leave one of them out")
    below = {} if "version" in values else _of_start(start, runs)
    parts = {
        name: from_dict(kind, {**below.get(name, {}), **values.get(name, {})}, f"{name}.")
        for name, kind in ROOMS.items()
    }
    return RunConfig(out=values.get("out", ""), start=start, **parts)


def _of_start(start: str, runs: tuple[str, ...]) -> dict:
    """The model and the tokenizer of a start, as parts of a run.json: out of a run that began with it, or its own."""
    for folder in runs:
        with contextlib.suppress(ValueError, OSError):
            stored = read_config(Path(folder) / SETTINGS)
            if _same_place(start, stored.get("start", "")):
                kept = {name: stored["data"][name] for name in ("tokenizer", "vocab_size")}
                return {"model": stored["model"], "data": kept}
    from exlstm import starts

    return starts.settings(start)


def _same_place(one: str, other: str) -> bool:
    return bool(one) == bool(other) and os.path.abspath(one) == os.path.abspath(other)


def read_config(path: Path) -> dict:
    """The settings in a JSON file: a run's run.json, or any part of one ({"size": "nano", "train": {"steps": 100}})."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    known = (*ROOMS, "size", "out", "start", *WRITTEN)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, wanted an object with keys {', '.join(known)}")
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{path} has an unknown field {key!r}{nearest(key, known)}")
        wanted = {"version": int, **dict.fromkeys(ROOMS, dict)}.get(key, str)
        if not isinstance(value, wanted):
            raise ValueError(f"{path} has {key} {value!r}, wanted {'an object' if wanted is dict else wanted.__name__}")
    if values.get("version", VERSION) != VERSION:
        raise ValueError(f"{path} has format version {values['version']}, this exlstm reads {VERSION}")
    return values


def train_language(config: RunConfig):
    """Trains a language model and returns the trainer's TrainResult; the same call goes on where it stopped.

    Leaves in the run's folder: run.json, metrics.jsonl, checkpoints/ (LanguageModel.from_pretrained loads each of them,
    and the folder itself), data/ (the tokens). ValueError: a corpus or settings that do not fit, or a folder that holds
    another run.
    """
    folder = Path(config.out or default_folder(config.data))
    stored = _stored(folder)
    if stored:
        _refuse_other(folder, config, stored)
    verb = "goes on in" if stored else "writes to"
    print(f"{verb} {folder}: {SETTINGS}, metrics.jsonl, checkpoints/, data/", flush=True)
    # torch and all that needs it is loaded from here on.
    from exlstm import runs

    with _nothing_on_failure(folder), _memory_told():
        result, model, corpus = _train(folder, config, stored)
    if result.interrupted is None:
        runs.report(model, corpus.held_out.head(runs.REPORT_BYTES), f"held-out text of {folder}")
    if not (folder / f"checkpoints/step-{result.step:08d}").is_dir():
        return result
    print(f"\nmodel     {folder}/checkpoints/step-{result.step:08d}")
    print(f"metrics   {folder}/metrics.jsonl")
    print(f"settings  {folder}/{SETTINGS}")
    run = shlex.quote(str(folder))
    print(f"next      exlstm generate {run}\n          exlstm plot {run}", flush=True)
    return result


def _train(folder: Path, config: RunConfig, stored: dict):
    """The trainer's result, the model and the corpus."""
    import torch

    from exlstm import runs
    from exlstm.data.text import TextBatches, load_corpus, windows
    from exlstm.models import checkpoint
    from exlstm.models.language import LanguageModel
    from exlstm.train.loop import train
    from exlstm.train.process import keep_freed_memory
    from exlstm.train.progress import Progress

    keep_freed_memory()
    device, data = runs.device_of(config.device), config.data
    # A model that cannot be built, or begun with, is refused before minutes go into the corpus.
    LanguageModel(config.model, device="meta")
    begun, resumes = _begun(folder, config) if config.start else (None, True)
    tokenizer, preparing = begun and begun.tokenizer, _Preparing(folder)
    corpus = load_corpus(data, folder / "data", tokenizer, expect=stored.get("corpus"), progress=preparing)
    model = _model(config, corpus.tokenizer, begun).to(device)
    _write_settings(folder, config, model.config, corpus.fingerprint)
    for line in (*corpus.notes, *_told(model, corpus, device)):
        print(line, flush=True)
    held = list(windows(corpus.held_out, data.context, data.batch_size, config.train.eval_batches))

    def evaluate(model):
        return {"bits_per_byte": runs.bits_per_byte(model, held, corpus.held_out.token_bytes)}

    if not resumes:
        with torch.autocast(torch.device(device).type, torch.bfloat16, config.train.precision == "bfloat16"):
            rate = evaluate(model.eval())["bits_per_byte"]
        print(f"start: {config.start}, {rate:.4f} bits a byte on held-out text before the first step", flush=True)
    result = train(
        model,
        TextBatches(corpus.train, data.context, data.batch_size, data.seed, config.train.accumulate),
        config.train,
        folder,
        evaluate=evaluate,
        sample=_sampler(corpus, config.train.seed),
        save_model=checkpoint.write,
        progress=Progress(corpus.held_out.n_bytes / len(corpus.held_out)),
    )
    return result, model, corpus


def _model(config: RunConfig, tokenizer, begun):
    """A new model for the tokenizer, or one of the weights of `begun`."""
    import torch

    from exlstm.models.language import LanguageModel

    size = begun.config.vocab_size if begun else tokenizer.vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = LanguageModel(replace(config.model, vocab_size=size))
    if begun:
        model.load_state_dict(begun.state_dict())
    model.tokenizer = tokenizer
    return model


def _sampler(corpus, seed: int):
    """What writes a sample: 100 tokens behind the first of the held-out text."""
    prompt = corpus.held_out.tokens[:16].tolist()

    def sample(model):
        try:
            written = model.generate(prompt, 100, temperature=0.8, seed=seed)
            return corpus.tokenizer.decode(prompt + written)
        except ValueError as error:
            # Weights gone wrong are the loss's to notice, and a step's to survive: a sample ends no training.
            return f"(nothing: {error})"

    return sample


def _begun(folder: Path, config: RunConfig):
    """The model that a run with a start begins with, and whether it is one of the run's own checkpoints, which hold all that the
    start had. ValueError: other settings than the start's."""
    from exlstm import starts
    from exlstm.train.checkpoint import newest

    own, _ = newest(folder / "checkpoints")
    model = starts.load(own or config.start)
    was = {"model": asdict(model.config), "data": {"tokenizer": starts.kind(model)}}
    if config.data.vocab_size:
        was["data"]["vocab_size"] = model.tokenizer.vocab_size
    told = []
    for room in was:
        told += _differences(f"{room}.", asdict(getattr(config, room)), was[room], FREE_AT_START)
    if told and not own:
        raise ValueError(
            f"{config.start} has another model or tokenizer: {_some(told)}; leave these settings out, or in Python take "
            "those of sized(start=...)"
        )
    return model, own is not None


def _told(model, corpus, device: str) -> tuple[str, str]:
    config = model.config
    kinds = ", ".join(dict.fromkeys(config.layers()))
    sizes = f"width {config.d_model}, {model.n_parameters():,} parameters, on {device}"
    text = f"{corpus.train.n_bytes:,} bytes to learn from, {corpus.held_out.n_bytes:,} held out"
    return f"model: {config.n_layers} layers of {kinds}, {sizes}", f"text: {text}, {corpus.tokenizer.vocab_size} tokens"


def default_folder(data: DataConfig) -> str:
    """runs/<name of the first file>; a glob is named after the last folder before its first sign."""
    if not data.files:
        return "runs/stdlib"
    path = Path(data.files[0])
    plain = [part for part in path.parts if not set("*?[") & set(part)]
    stem = Path(path.stem).stem if path.suffix.lower() in PACKED else path.stem
    name = stem if path.parts and path.parts[-1:] == tuple(plain[-1:]) else (plain or [""])[-1]
    return f"runs/{''.join(c for c in name if c.isalnum() or c in '-_ ').strip() or 'text'}"


def _stored(folder: Path) -> dict:
    """The run.json of a run's folder; {} where a run may begin. ValueError: the folder is something else."""
    if (folder / SETTINGS).exists():
        return read_config(folder / SETTINGS)
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise ValueError(f"{part} is a file, wanted a folder for the run: choose another with --out")
    for file in sorted(folder.iterdir()) if folder.exists() else ():
        # A preparation of the text that was killed leaves data/ alone.
        if file.name != "data" and not file.name.startswith("."):
            raise ValueError(f"{folder} is no run, it holds {file.name} and no {SETTINGS}: choose another with --out")
    return {}


def _refuse_other(folder: Path, config: RunConfig, stored: dict):
    """ValueError when the folder holds a run of other settings, naming what differs."""
    told = config.train.changes(stored.get("train", {}))
    for room in ("model", "data"):
        now = json.loads(json.dumps(asdict(getattr(config, room))))
        told += _differences(f"{room}.", now, stored.get(room, {}))
    if not _same_place(config.start, stored.get("start", "")):
        told.insert(0, f"start is {config.start or 'left out'}, was {stored.get('start') or 'left out'}")
    if told:
        # A schedule has its end from the first step on: more of it is another run.
        longer = any(text.startswith(("steps ", "minutes ")) for text in told)
        further = f" (to train its model further: with --start {folder})" if longer else ""
        raise ValueError(
            f"{folder} holds another run: {_some(told)}; choose another folder with --out{further}, "
            f"or go on with its settings: exlstm train --config {folder / SETTINGS} --out {folder}"
        )


def _some(told: list[str]) -> str:
    return ", ".join(told[:3]) + (f" and {len(told) - 3} more" if len(told) > 3 else "")


def _differences(where: str, now: dict, stored: dict, free: tuple[str, ...] = FREE) -> Iterator[str]:
    for name, value in now.items():
        if name not in stored or where + name in free:
            continue
        if isinstance(value, dict):
            yield from _differences(f"{where}{name}.", value, stored[name], free)
        elif value != stored[name]:
            yield f"{where}{name} is {value}, was {stored[name]}"


def _write_settings(folder: Path, config: RunConfig, model: LanguageConfig, fingerprint: str):
    """run.json, whole or not at all."""
    settings = {"version": VERSION, "exlstm": __version__, "corpus": fingerprint}
    settings |= {"start": str(config.start)} if config.start else {}
    settings |= {"model": asdict(model), "data": asdict(config.data), "train": asdict(config.train)}
    aside = folder / f".tmp-{os.getpid()}-{SETTINGS}"
    try:
        with open(aside, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(settings, indent=1) + "\n")
            stream.flush()
            # Without it a power cut could leave an empty file under the name.
            os.fsync(stream.fileno())
        aside.replace(folder / SETTINGS)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def _nothing_on_failure(folder: Path):
    """A run that fails before its first checkpoint leaves no folder that was not there before; nor does one that is refused
    before it has learnt anything, so that the same command with other settings may begin there."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException as error:
        from exlstm.train.checkpoint import only_writer, steps_in

        # Another training may have begun there in the meantime.
        with contextlib.suppress(OSError, ValueError):
            steps = steps_in(folder / "checkpoints")
            if made and (not steps or (steps == [0] and isinstance(error, ValueError))):
                with only_writer(folder):
                    shutil.rmtree(folder)
                for parent in made[1:]:
                    parent.rmdir()
        raise


# How PyTorch says it, on every device.
NO_MEMORY = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")


@contextlib.contextmanager
def _memory_told():
    """ValueError of one sentence where memory runs out: what takes less is the user's to choose."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError) and not any(sign in told for sign in NO_MEMORY):
            raise
        less = (
            "a smaller --data.batch-size, --data.context or --size takes less, as does --train.gradient-checkpointing"
        )
        raise ValueError(f"there is not enough memory: {less} ({told})") from None


class _Preparing:
    """Says that a corpus is being prepared, and every few seconds how much of it is."""

    def __init__(self, folder: Path):
        self.folder, self.pace = folder, None

    def __call__(self, done: int, total: int):
        from exlstm.train.progress import Pace

        if not done:
            print(f"prepares {total:,} bytes of text in {self.folder}/data", flush=True)
            return
        # What comes before the first bytes, learning a vocabulary, says nothing about the others.
        self.pace = self.pace or Pace("bytes of text", total, lambda text: print(text, flush=True))
        self.pace.add(done - self.pace.done)
