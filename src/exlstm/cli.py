"""The command line, `exlstm NAME ...`: one row of COMMANDS each.

Nothing heavy is imported until a command runs. A user's error is one sentence on stderr and exit code 2, Ctrl-C is 130,
SIGTERM 143; a bug keeps its traceback.
"""

from __future__ import annotations

import contextlib
import dis
import os
import signal
import sys
import warnings
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, Suppress, arg

from exlstm import __version__
from exlstm.arguments import flags, parse
from exlstm.bench import BENCHES
from exlstm.data.config import DataConfig
from exlstm.forecast.command import Forecast
from exlstm.forecast.command import run as forecast
from exlstm.models.config import LanguageConfig, nearest
from exlstm.recipes import DEFAULT_SIZE, RunConfig, default_folder, read_config, sized, train_language
from exlstm.serve.config import Serve
from exlstm.train.config import TrainConfig

Files = Annotated[Positional[tuple[str, ...]], arg(metavar="FILES")]
Run = Annotated[Positional[str], arg(metavar="RUN")]


@dataclass(frozen=True)
class Model(LanguageConfig):
    """A language model: a stack between an embedding and a head over the tokens of the tokenizer."""

    vocab_size: Suppress[int] = 256


@dataclass(frozen=True)
class Train:
    """Train a language model on text: files, folders or globs, or the Python standard library's own source without any.

    The same command again goes on where the last one stopped.
    """

    files: Files = ()
    """files, folders or globs of text, or of .jsonl; .gz, .bz2 and .xz are read as what they hold"""
    out: str = ""
    """run folder; left out: runs/<name of the first file>"""
    size: str = DEFAULT_SIZE
    """nano, tiny, small, medium or large: width and depth of the model; fields of --model given beside it go first"""
    minutes: float | None = None
    """wall-clock budget, the short form of --train.minutes; 2 when no --train.steps is given either"""
    config: str = ""
    """JSON file with settings: a run's run.json, or any part of one"""
    start: str = ""
    """what the run begins with: a run, one of its checkpoints, a saved model, or one of another package. Weights, --model and
    tokenizer are its own, in place of --size; the optimizer begins anew, by default AdamW at --train.lr 1e-3"""
    device: str = "auto"
    """cpu, cuda, ...; auto: the accelerator if there is one"""
    model: Model = field(default_factory=Model)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Generate:
    """Write on from a prompt with the model of a run."""

    run: Run = ""
    """run folder, or one of its checkpoints"""
    prompt: str = ""
    """text to go on from; left out: a new line"""
    tokens: int = 400
    """tokens to write, at most"""
    temperature: float = 1.0
    """below 1 plays safe, above 1 dares; 0 takes the likeliest token"""
    top_k: int = 0
    """only the k likeliest tokens; 0: all"""
    top_p: float = 1.0
    """only the likeliest tokens that together have this probability"""
    min_p: float = 0.0
    """only tokens at least this likely, relative to the likeliest"""
    repetition_penalty: float = 1.0
    """above 1: tokens that have been said lose"""
    stop: tuple[str, ...] = ()
    """texts that end the writing"""
    seed: int | None = None
    """the same seed writes the same text"""
    device: str = "auto"
    """cpu, cuda, ...; auto: the accelerator if there is one"""
    int8: bool = False
    """weights in int8, a scale a row: half the bytes of bfloat16; wants exlstm[int8]"""


@dataclass(frozen=True)
class Evaluate:
    """Bits per byte of a run's model on text, by position in the document, beside the rate of xz on the same bytes."""

    run: Run = ""
    """run folder, or one of its checkpoints"""
    files: Files = ()
    """files, folders or globs of text; left out: the run's held-out part"""
    field: str = "text"
    """the field of a .jsonl that holds the text"""
    limit: int = 131072
    """bytes that are read, at most; 0: all"""
    device: str = "auto"
    """cpu, cuda, ...; auto: the accelerator if there is one"""
    int8: bool = False
    """weights in int8, a scale a row: what they cost; wants exlstm[int8]"""


@dataclass(frozen=True)
class Plot:
    """Draw a run as PNG files: the loss, and what the gates of every layer and head remember."""

    run: Run = ""
    """run folder"""
    tokens: int = 4096
    """tokens of held-out text that the gates are watched on"""


@dataclass(frozen=True)
class Export:
    """Write a run's model as files that other programs run: its streaming step, and its forward over a sequence."""

    run: Run = ""
    """run folder, or one of its checkpoints"""
    format: Literal["onnx", "pt2"] = "onnx"
    """onnx: the step; pt2 (torch.export): also the forward at any length"""
    out: str = ""
    """folder to write; left out: RUN/export/FORMAT. An export that stands there is replaced"""


@dataclass(frozen=True)
class Doctor:
    """What is installed, which implementation of each operator runs, why, and whether it agrees with the reference."""


def train(command: Train):
    data = replace(command.data, files=command.files or command.data.files)
    schedule = command.train if command.minutes is None else replace(command.train, minutes=command.minutes)
    model = LanguageConfig(**vars(command.model))
    result = train_language(RunConfig(command.out, model, data, schedule, command.device, command.start))
    return 0 if result.interrupted is None else 128 + result.interrupted


def _train_default(argv: list[str]) -> Train:
    """What the command starts from: the settings of --config, then --size; flags given one by one come on top of it."""
    given = flags(argv)
    stored = read_config(Path(given["--config"])) if given.get("--config") else {}
    # A run that began with the start knows its settings, wherever the start has gone.
    runs = [
        given.get("--out"),
        *(default_folder(DataConfig((word,))) for word in argv if word),
        default_folder(DataConfig()),
    ]
    default = sized(given.get("--size"), stored, given.get("--start", ""), tuple(filter(None, runs)))
    if "--model.vocab-size" in given:
        raise ValueError("--model.vocab-size follows from the tokenizer; --data.vocab-size sets that of a bpe")
    schedule = default.train
    if {"--minutes", "--train.minutes", "--train.steps"} & set(given):
        schedule = replace(schedule, steps=None, minutes=None)
    return Train(
        out=default.out, start=default.start, model=Model(**vars(default.model)), data=default.data, train=schedule
    )


def generate(command: Generate):
    from exlstm.runs import write

    settings = {f.name: getattr(command, f.name) for f in fields(command)[3:]}
    # What a model writes may be any character, and the terminal's encoding may know few.
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")
    for piece in write(_run(command), command.prompt, command.tokens, **settings):
        print(piece, end="", flush=True)
    print()


def evaluate(command: Evaluate):
    told = command.files, command.limit, command.device, command.int8, command.field
    import_module("exlstm.runs").evaluate(_run(command), *told)


def plot(command: Plot):
    import_module("exlstm.runs").draw(_run(command), command.tokens)


def export(command: Export):
    import_module("exlstm.export").export_run(_run(command), command.out, command.format)


def serve(command: Serve):
    # Wrong settings are told before torch loads.
    command.check()
    return import_module("exlstm.serve.command").run(command)


def _run(command) -> Path:
    if not command.run:
        name = type(command).__name__.lower()
        raise ValueError(f"{name} wants the folder of a run, as in: exlstm {name} runs/stdlib")
    return Path(command.run)


def bench(argv: list[str]):
    """Measure ours beside the peers: `exlstm bench NAME`."""
    from exlstm.bench import config as settings

    if not argv or argv[0] in ("-h", "--help"):
        rows = [f"  {name:10} {told}" for name, (_, _, told) in BENCHES.items()]
        lines = ["usage: exlstm bench NAME ...", "", *rows, "", "exlstm bench NAME --help explains its settings."]
        print(*lines, sep="\n")
        return 0
    if argv[0] not in BENCHES:
        raise ValueError(f"unknown benchmark {argv[0]!r}{nearest(argv[0], BENCHES)}")
    room, kind, _ = BENCHES[argv[0]]
    config = parse(getattr(settings, kind), f"exlstm bench {argv[0]}", argv[1:])
    if config is not None:
        import_module(room).run(config)
    return 0


def compare(argv: list[str]):
    """Train models side by side on a row of the scoreboard, with tables and plots: `exlstm compare ROW`."""
    from exlstm.bench.config import CompareConfig
    from exlstm.bench.entrants import MODELS, THEIRS
    from exlstm.bench.rows import ROWS

    if not argv or argv[0] in ("-h", "--help"):
        lines = ["usage: exlstm compare ROW ...", "", *(f"  {name:16} {row.about}" for name, row in ROWS.items())]
        lines += ["", f"models, for --models: {', '.join((*MODELS, *THEIRS))}"]
        print("\n".join([*lines, "", "exlstm compare ROW --help explains its settings."]))
        return 0
    if argv[0] not in ROWS:
        raise ValueError(f"unknown row {argv[0]!r}{nearest(argv[0], ROWS)}")
    config = parse(CompareConfig, f"exlstm compare {argv[0]}", argv[1:])
    if config is not None:
        import_module("exlstm.bench.compare").run(argv[0], config)
    return 0


def doctor(_):
    return import_module("exlstm.doctor").report()


# name -> (its arguments, what runs it and perhaps returns the exit code, what the arguments start from)
COMMANDS = {
    "train": (Train, train, _train_default),
    "generate": (Generate, generate, None),
    "evaluate": (Evaluate, evaluate, None),
    "forecast": (Forecast, forecast, None),
    "plot": (Plot, plot, None),
    "export": (Export, export, None),
    "serve": (Serve, serve, None),
    "doctor": (Doctor, doctor, None),
    "bench": (None, bench, None),
    "compare": (None, compare, None),
}


def main(argv: list[str] | None = None) -> int:
    """Runs `exlstm` with these arguments (sys.argv without any) and returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _warnings_told():
            return _dispatch(argv) or 0
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone (`exlstm generate ... | head`), and the interpreter would flush into the closed pipe.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1
    except Exception as error:
        sentence = _told(error)
        if sentence is None:
            raise
        print(f"exlstm: {sentence}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _warnings_told():
    """Warnings of ours, such as a damaged checkpoint that was passed over, are a line each; others look as ever."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def told(message, category, *rest):
            if category is UserWarning:
                print(f"exlstm: {_sentence(str(message))}", file=sys.stderr)
            else:
                show(message, category, *rest)

        warnings.filterwarnings("always", "passed over", UserWarning)
        warnings.showwarning = told
        yield


def _dispatch(argv: list[str]):
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"exlstm {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}{nearest(name, COMMANDS)}")
    kind, run, default = COMMANDS[name]
    if kind is None:
        return run(rest)
    command = parse(kind, f"exlstm {name}", rest, default)
    return 0 if command is None else run(command)


def _overview() -> str:
    told = {name: (kind or run).__doc__.split("\n\n")[0] for name, (kind, run, _) in COMMANDS.items()}
    lines = ["usage: exlstm COMMAND ...", "", "xLSTM: train it, read what it writes, look inside.", ""]
    lines += [f"  {name:10} {_sentence(text)}" for name, text in told.items()]
    lines += ["", "exlstm COMMAND --help explains a command, exlstm --version says which one this is.", ""]
    return "\n".join([*lines, "To begin: exlstm train --minutes 2"])


def _told(error: Exception) -> str | None:
    """The sentence of an error that the user can mend; None for a bug of ours."""
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        return _sentence(str(error)) if error.strerror is None else f"{where}{error.strerror}"
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    # Only what a `raise` of ours says is for the user; what a library or a builtin says of our call is our mistake.
    frame = trace.tb_frame
    raised = frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    ours = raised and Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parent)
    if ours and isinstance(error, ValueError | TypeError | OSError | FloatingPointError):
        return _sentence(str(error))
    # A library that writes for us reports a full disk in a class of its own.
    return _sentence(str(error)) if "No space left on device" in str(error) else None


def _sentence(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
