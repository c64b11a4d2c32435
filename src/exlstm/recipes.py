"""A run = model + data + training: the only place where the three meet. Free of torch until a run begins."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
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


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run.

    `out` is its folder, runs/<name of the first file> where it is empty. `start` is a run, one of its checkpoints or a folder of
    `save_pretrained` whose weights and tokenizer the run begins with; `sized(values={"start": ...})` has its model's settings.
    """

    out: str = ""
    model: LanguageConfig = field(default_factory=LanguageConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    device: str = "auto"
    start: str = ""


def sized(size: str | None = None, values: dict | None = None) -> RunConfig:
    """The settings of a run: those of a size, or of the model it starts from, under `values`, parts of a run.json; the argument
    `size` is above both."""
    values = dict(values or {})
    for name in (size, values.get("size")):
        if name is not None and name not in SIZES:
            raise ValueError(f"unknown size {name!r}{nearest(name, SIZES)}")
    chosen = size or values.get("size", DEFAULT_SIZE)
    # The file of a run holds all of it: what it lacks had the default of its time.
    tuned = {} if "version" in values else TRAINED.get(chosen, {})
    below, above = SIZES[values.get("size", DEFAULT_SIZE)], SIZES.get(size, {})
    if values.get("start") and "version" not in values:
        if size or "size" in values:
            raise ValueError(f"size {chosen} came with a start, whose model has its own: leave one of the two out")
        below, tokenizer = _settings_of(values["start"])
        tuned, values["data"] = {}, {"tokenizer": tokenizer, **values.get("data", {})}
    values["train"] = {**tuned, **values.get("train", {})}
    parts = {name: from_dict(kind, values.get(name, {}), f"{name}.") for name, kind in ROOMS.items()}
    parts["model"] = from_dict(LanguageConfig, {**below, **values.get("model", {}), **above}, "model.")
    return RunConfig(out=values.get("out", ""), start=values.get("start", ""), **parts)


def _settings_of(start: str) -> tuple[dict, str]:
    """The settings of the model in `start`, and the kind of its tokenizer."""
    model = _model_of(start, "meta")
    return asdict(model.config), model.tokenizer.to_dict()["kind"]


def _model_of(start: str, device: str = "cpu"):
    """The model to start from. ValueError, FileNotFoundError: there is none, or it has no tokenizer."""
    from exlstm.models.language import LanguageModel

    model = LanguageModel.from_pretrained(start, device=device)
    if model.tokenizer is None:
        raise ValueError(
            f"{start} holds a model without a tokenizer, so that nothing says what its tokens mean in a text"
        )
    return model


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
    from exlstm import runs
    from exlstm.data.text import TextBatches, windows
    from exlstm.models import checkpoint
    from exlstm.train.loop import train
    from exlstm.train.process import keep_freed_memory
    from exlstm.train.progress import Progress

    keep_freed_memory()
    device, data = runs.device_of(config.device), config.data
    model, corpus, fresh = _begun(folder, config, stored)
    model.to(device)
    _write_settings(folder, config, model.config, corpus.fingerprint)
    for line in (*corpus.notes, *_told(model, corpus, device)):
        print(line, flush=True)
    held = list(islice(windows(corpus.held_out, data.context, data.batch_size), config.train.eval_batches))
    prompt = corpus.held_out.tokens[:16].tolist()

    def evaluate(model):
        return {"bits_per_byte": runs.bits_per_byte(model, held, corpus.held_out.token_bytes)}

    if fresh:
        bits = evaluate(model)["bits_per_byte"]
        print(f"start: {config.start}, {bits:.3f} bits per byte of held-out text", flush=True)

    def sample(model):
        try:
            written = model.generate(prompt, 100, temperature=0.8, seed=config.train.seed)
        except ValueError as error:
            # Weights gone wrong are the loss's to notice, and a step's to survive: a sample ends no training.
            return f"(nothing: {error})"
        return corpus.tokenizer.decode(prompt + written)

    result = train(
        model,
        TextBatches(corpus.train, data.context, data.batch_size, data.seed, config.train.accumulate),
        config.train,
        folder,
        evaluate=evaluate,
        sample=sample,
        save_model=checkpoint.write,
        progress=Progress(corpus.held_out.n_bytes / len(corpus.held_out)),
    )
    return result, model, corpus


def _source(folder: Path, config: RunConfig):
    """The model whose tokenizer the run has (None: it makes its own), and whether its weights are to be taken.

    A run that has a checkpoint goes on with that, whatever has become of where it started.
    """
    from exlstm.train.checkpoint import steps_in

    if not config.start:
        return None, False
    fresh = not steps_in(folder / "checkpoints")
    source = _model_of(config.start if fresh else str(folder), "cpu" if fresh else "meta")
    kind, size = source.tokenizer.to_dict()["kind"], source.tokenizer.vocab_size
    for name, came, has in (
        ("tokenizer", config.data.tokenizer, kind),
        ("vocab_size", config.data.vocab_size or size, size),
    ):
        if came != has:
            raise ValueError(f"data.{name} is {came}, but it comes from {config.start}, where it is {has}")
    return source, fresh


def _begun(folder: Path, config: RunConfig, stored: dict):
    """The model as it is before the first step, the corpus, and whether the model begins with the weights of another."""
    import torch

    from exlstm.data.text import load_corpus
    from exlstm.models.language import LanguageModel

    source, fresh = _source(folder, config)
    # What cannot be built, or takes other weights than there are, is refused before minutes go into the corpus.
    settings = replace(config.model, vocab_size=source.config.vocab_size) if source else config.model
    empty = LanguageModel(settings, device="meta")
    if fresh:
        _check_fit(empty, source, config.start)
    known, told = source and source.tokenizer, _Preparing(folder)
    corpus = load_corpus(config.data, folder / "data", expect=stored.get("corpus"), progress=told, tokenizer=known)
    settings = settings if source else replace(settings, vocab_size=corpus.tokenizer.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = LanguageModel(settings)
    if fresh:
        model.load_state_dict(source.state_dict())
    model.tokenizer = corpus.tokenizer
    return model, corpus, fresh


def _check_fit(model, source, start: str):
    """ValueError: the weights of `source` are not those of `model`, by the first name that tells."""
    wanted, found = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, source))
    for name in {**wanted, **found}:
        here, there = wanted.get(name, "missing"), found.get(name, "missing")
        if here != there:
            raise ValueError(f"the model is another than that of {start}: {name} is {here}, there {there}")


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
    if config.start != stored.get("start", ""):
        told.insert(0, f"start is {config.start!r}, was {stored.get('start', '')!r}")
    for room in ("model", "data"):
        now = json.loads(json.dumps(asdict(getattr(config, room))))
        told += _differences(f"{room}.", now, stored.get(room, {}))
    if told:
        more = f" and {len(told) - 3} more" if len(told) > 3 else ""
        raise ValueError(
            f"{folder} holds another run: {', '.join(told[:3])}{more}; choose another folder with --out, "
            f"go on with its settings by --config {folder / SETTINGS}, or with its weights by --start {folder}"
        )


def _differences(where: str, now: dict, stored: dict) -> Iterator[str]:
    for name, value in now.items():
        # The tokenizer sets the vocabulary, and the fingerprint of the text says more than the names of its files.
        if name not in stored or where + name in ("model.vocab_size", "data.files"):
            continue
        if isinstance(value, dict):
            yield from _differences(f"{where}{name}.", value, stored[name])
        elif value != stored[name]:
            yield f"{where}{name} is {value}, was {stored[name]}"


def _write_settings(folder: Path, config: RunConfig, model: LanguageConfig, fingerprint: str):
    """run.json, whole or not at all."""
    settings = {"version": VERSION, "exlstm": __version__, "corpus": fingerprint, "start": config.start}
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
