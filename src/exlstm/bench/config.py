"""What each benchmark runs: settings without torch, so that the command line lists and explains them at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from exlstm.forecast.config import FitConfig


@dataclass(frozen=True)
class KernelsConfig:
    """The two operators, forward and backward: sLSTM beside nn.LSTM, mLSTM beside mlstm_kernels, growth with the length."""

    slstm: tuple[tuple[int, int, int, int], ...] = ((16, 256, 4, 32), (16, 256, 4, 64), (8, 512, 4, 128))
    """shapes B T H D of the sLSTM"""
    mlstm: tuple[tuple[int, int, int, int, int], ...] = ((1, 2048, 4, 64, 64),)
    """shapes B T H K V of the mLSTM"""
    growth: tuple[int, int] = (4096, 16384)
    """lengths between which the growth of the mLSTM is measured"""
    rounds: int = 9
    """timed runs of each side, in turn"""
    threads: int = 2
    """CPU threads"""
    device: str = "cpu"
    """where it runs: cpu, cuda, ..."""
    out: Path = Path("runs/bench")
    """folder for the table (CSV) and the picture (PNG)"""


@dataclass(frozen=True)
class MLSTMConfig:
    """The mLSTM on a GPU beside mlstm_kernels, causal attention and fla: time, share of the card, memory, errors, decoding."""

    shapes: tuple[tuple[int, int, int], ...] = ((8, 256, 512), (16, 128, 256), (32, 64, 128))
    """shapes H K V of the heads"""
    lengths: tuple[int, ...] = (2048, 8192, 32768)
    """tokens a sequence, with as many sequences as --tokens holds"""
    tokens: int = 65536
    """tokens at once; as a single sequence too, in the first shape"""
    batches: tuple[int, ...] = (1, 16, 128)
    """sequences of a decoding step, in the first shape; empty: no step is measured"""
    error_length: int = 2048
    """tokens of the sequence whose errors against float64 are measured; 0 leaves them out"""
    only: tuple[str, ...] = ()
    """sides that are measured, out of ours, mlstm_kernels, fla, cudnn, flash; empty: all"""
    quick: bool = False
    """one length, one batch and few repetitions"""
    seconds: float = 120.0
    """what has not begun by then is left out, and told; ours comes first"""
    threads: int = 2
    """CPU threads"""
    device: str = "cuda"
    """the GPU"""
    out: Path = Path("runs/bench")
    """folder for the tables (CSV) and the picture (PNG)"""


@dataclass(frozen=True)
class DecodeConfig:
    """Decoding on a GPU with random bfloat16 weights: ms a step, time to the first token, beside xLSTMLarge and Llama."""

    sizes: tuple[str, ...] = ("6.9B", "1.4B", "400M", "160M")
    """models, out of 6.9B, 1.4B, 400M, 160M parameters"""
    batches: tuple[int, ...] = (1, 32)
    """sequences decoded at once"""
    contexts: tuple[int, ...] = (128, 131072)
    """tokens that were read before; the second and further ones with the first batch alone"""
    prompt: int = 16384
    """tokens of the prompt whose first token is waited for, batch 1, in the largest model; 0 leaves it out"""
    tokens: int = 64
    """tokens that are timed"""
    only: tuple[str, ...] = ()
    """sides that are measured, out of ours, ours 7:1, ours int8, xlstm, llama; empty: all"""
    seconds: float = 240.0
    """what has not begun by then is left out, and told; ours comes first"""
    threads: int = 2
    """CPU threads"""
    device: str = "cuda"
    """the GPU"""
    out: Path = Path("runs/bench")
    """folder for the table (CSV) and the picture (PNG)"""


@dataclass(frozen=True)
class TrainConfig:
    """Training on a GPU, whole steps in bfloat16 by autocast: tokens a second and memory over the length, beside two peers."""

    size: str = "400M"
    """the model, out of 6.9B, 1.4B, 400M, 160M parameters"""
    lengths: tuple[int, ...] = (2048, 16384, 131072)
    """tokens a sequence"""
    tokens: int = 32768
    """tokens a step; a longer sequence stands alone, and its blocks run again in the backward"""
    only: tuple[str, ...] = ()
    """sides that are measured, out of ours; ours, captured; ours, compiled; ours 7:1; attention; mamba2; xlstm; llama; empty:
    all"""
    seconds: float = 400.0
    """what has not begun by then is left out, and told; ours comes first"""
    threads: int = 2
    """CPU threads"""
    device: str = "cuda"
    """the GPU"""
    out: Path = Path("runs/bench")
    """folder for the table (CSV) and the picture (PNG)"""


@dataclass(frozen=True)
class SLSTMConfig:
    """The sLSTM alone on a GPU, microseconds a step of time, forward and both ways, and its error against float64."""

    shapes: tuple[tuple[int, int], ...] = ((12, 64), (6, 128), (4, 192), (4, 256), (4, 512))
    """heads and units a head"""
    batches: tuple[int, ...] = (16, 1, 64, 128)
    """sequences; the first shape is measured with all of them, the others with the first"""
    length: int = 1024
    """tokens a sequence"""
    error_length: int = 256
    """tokens of the sequences whose errors are measured, 0 for none"""
    only: tuple[str, ...] = ()
    """sides to measure; empty for all: ours, lstm, flashrnn-triton, flashrnn-cuda"""
    seconds: float = 300.0
    """time to begin new cases in; what is left then is named and left out"""
    quick: bool = False
    """the first shape and batch alone"""
    threads: int = 2
    """CPU threads"""
    device: str = "cuda"
    """where it runs: cuda, cuda:1, ..."""
    out: Path = Path("runs/bench")
    """folder for the tables (CSV) and the picture (PNG)"""


@dataclass(frozen=True)
class TrainingConfig:
    """Forward and backward of the stack in the README of xlstm (6 mLSTM + 1 sLSTM, width 128), ours beside theirs."""

    batch: int = 4
    """sequences at once"""
    length: int = 256
    """tokens a sequence"""
    rounds: int = 7
    """timed runs of each side, in turn"""
    threads: int = 2
    """CPU threads"""
    device: str = "cpu"
    """where it runs: cpu, cuda, ..."""
    out: Path = Path("runs/bench")
    """folder for the table (CSV) and the picture (PNG)"""


@dataclass(frozen=True)
class DecodingConfig:
    """Greedy decoding with the stack in the README of xlstm, milliseconds a token, ours beside theirs."""

    batches: tuple[int, ...] = (1, 8)
    """sequences decoded at once"""
    tokens: int = 64
    """tokens decoded in a round"""
    rounds: int = 7
    """timed runs of each side, in turn"""
    threads: int = 2
    """CPU threads"""
    device: str = "cpu"
    """where it runs: cpu, cuda, ..."""
    out: Path = Path("runs/bench")
    """folder for the table (CSV) and the picture (PNG)"""


@dataclass(frozen=True)
class ParityConfig:
    """State tracking: a small stack learns the parity of short bit strings and is asked about long ones."""

    block: str = "slstm"
    """kind of block"""
    n_layers: int = 2
    """number of blocks"""
    d_model: int = 64
    """width"""
    n_heads: int = 4
    """heads"""
    conv: int = 0
    """width of the sLSTM's causal convolution; 0 leaves it out"""
    seconds: float = 180.0
    """training time a seed, at most"""
    steps: int = 1500
    """training steps a seed, at most: the schedule of the learning rate spans them"""
    lr: float = 5e-3
    """learning rate at its peak"""
    batch: int = 128
    """strings a step"""
    train_lengths: tuple[int, int] = (3, 40)
    """shortest and longest string in training"""
    test_lengths: tuple[int, int] = (40, 256)
    """shortest and longest string in the test"""
    early_stop: bool = True
    """stop when strings of up to 1.6 times the longest in training are all answered rightly, twice in a row"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """one run a seed"""
    threads: int = 2
    """CPU threads"""
    device: str = "cpu"
    """where it runs: cpu, cuda, ..."""
    out: Path = Path("runs/bench")
    """folder for the table (CSV) and the picture (PNG)"""


@dataclass(frozen=True)
class QualityConfig:
    """What a model reaches on text: nanoGPT's recipe for a CPU, or the default `exlstm train` beside a plain LSTM."""

    text: Path | None = None
    """the text of nanoGPT's recipe (tinyshakespeare.txt); without it the recipe is left out"""
    blocks: tuple[str, ...] = ("mlstm", "mlstm_up", "slstm", "attention")
    """stacks of the recipe: names of blocks, several in turn joined by + ("mlstm+slstm")"""
    steps: int = 2000
    """training steps of the recipe"""
    lr: float = 1e-3
    """learning rate of the recipe at its peak"""
    minutes: float = 0.0
    """training time of the default `exlstm train` and of the LSTM beside it (2 is the default run); 0 leaves them out"""
    files: tuple[str, ...] = ()
    """text of those two: files, folders or globs; empty: the source of the Python standard library"""
    seed: int = 0
    """seed of weights and batches"""
    threads: int = 2
    """CPU threads"""
    device: str = "cpu"
    """where it runs: cpu, cuda, ..."""
    out: Path = Path("runs/bench")
    """folder for the table (CSV), the picture (PNG) and the runs"""


@dataclass(frozen=True)
class ForecastingConfig:
    """Forecasts of public benchmarks by their protocols, ours beside its own baselines and other libraries.

    Files decide the protocol: a .tsf file is a task of the Monash archive; a CSV whose last column is OT and whose two others are
    forecasts is a task of electricity prices; any other CSV is long-horizon, with every window of its test part.
    """

    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILES")] = ()
    """CSV and .tsf files"""
    protocol: Literal["auto", "long", "prices", "archive"] = "auto"
    """long: every window, squared errors in deviations of the training part; prices: the same for one column, with the others
    as covariates known for the future and without; archive: last windows of many series, MASE and weighted quantile loss"""
    horizons: tuple[int, ...] = ()
    """horizons of the long protocol; empty: 96 192 336 720, or 24 36 48 60 for files of less than 2,000 rows"""
    seeds: tuple[int, ...] = (0,)
    """one fit a seed"""
    mixers: tuple[str, ...] = ("slstm",)
    """blocks of the network, each in turn in the same network: slstm, mlstm, attention, mamba2, lstm; several joined by +; or
    xlstmtime: the network of that paper, for panels of one length"""
    peers: tuple[str, ...] = ()
    """other libraries' models: patchtst, nhits, dlinear, xlstm (neuralforecast), autotheta (statsforecast)"""
    peer_python: str = ""
    """interpreter in whose environment the peers are installed; empty: this one"""
    peer_steps: int = 1000
    """training steps of a peer, at most; it stops early by its validation loss"""
    peer_minutes: float = 0.0
    """minutes after which a peer is stopped and left out of a task; 0: never"""
    stride: int = 1
    """steps between test windows of the long protocol; anything but 1 is a preview"""
    fit: FitConfig = field(default_factory=FitConfig)
    threads: int = 2
    """CPU threads"""
    device: str = "cpu"
    """where it runs: cpu, cuda, ..."""
    out: Path = Path("runs/bench")
    """folder for the tables (CSV, Markdown) and the picture (PNG)"""


@dataclass(frozen=True)
class CompareConfig:
    """Train every model of a row on the same samples with the same optimizers and seeds, and write the table and the plot.

    Ctrl-C or the end of --minutes saves; the same command goes on.
    """

    models: tuple[str, ...] = ()
    """models of the row that are trained; empty: all. See bench/entrants.py"""
    cases: tuple[str, ...] = ()
    """tasks of the row; empty: all"""
    lrs: tuple[float, ...] = ()
    """learning rates; the best by the median over seeds is reported. Empty: the row's"""
    seeds: tuple[int, ...] = ()
    """seeds; empty: the row's"""
    steps: int = 0
    """training steps of every run: equal tokens; 0: the row's"""
    minutes_each: float = 0.0
    """training time of every run, measured alone: equal seconds in place of equal tokens; 0: equal tokens"""
    batch: int = 0
    """words or windows a step; 0: the row's"""
    widths: tuple[int, ...] = ()
    """widths of the models; empty: the row's"""
    dropouts: tuple[float, ...] = ()
    """dropouts, each a line of the table of its own; empty: the row's"""
    optimizers: tuple[str, ...] = ()
    """adamw, muon (for the matrices of the blocks), each a line of its own; empty: the row's"""
    final_lrs: tuple[float, ...] = ()
    """last learning rates as parts of the highest, each a line of its own; empty: the row's"""
    clips: tuple[float, ...] = ()
    """largest norms of the gradient, each a line of its own; 0: as it is; empty: the row's"""
    recurrent_lrs: tuple[float, ...] = ()
    """learning rates of recurrent maps over that of all others, each a line of its own; empty: the row's"""
    precisions: tuple[str, ...] = ()
    """float32, bfloat16 (on a GPU), each a line of its own; empty: the row's"""
    n_layers: int = 0
    """number of blocks; 0: the row's"""
    n_heads: int = 0
    """heads; 0: the row's"""
    minutes: float = 0.0
    """time of this command: what is unfinished then is saved; 0: until all is done"""
    at_once: int = 0
    """runs at once on a GPU, or processes on a CPU; 0: by their size, or one a core"""
    graphs: bool = True
    """record the steps as CUDA graphs"""
    text: Path | None = None
    """the file of a row that reads text: tinyshakespeare.txt, enwik8, or code (its held-out packages beside it as FILE.val)"""
    quick: bool = False
    """two steps of toys on short words: does everything run here?"""
    threads: int = 1
    """CPU threads of a run"""
    device: str = "auto"
    """cpu, cuda, ...; auto: the accelerator if there is one"""
    out: Path = Path("runs/compare")
    """folder, with a folder a row: runs.csv, table.csv, table.md, table.png, records, checkpoints"""
