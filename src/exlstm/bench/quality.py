"""What a model reaches on text: nanoGPT's recipe for a CPU, and the default `exlstm train` beside a plain LSTM of its size.

The recipe: characters, 4 layers of 128, context 64, batch 12, 2,000 steps, no dropout, the last tenth of the text held out;
the loss of the last step over all of it, in windows of 64 that begin with an empty state.
"""

import time
from dataclasses import replace
from pathlib import Path

import torch

from exlstm import runs
from exlstm.bench import timing
from exlstm.bench.config import QualityConfig
from exlstm.data.config import DataConfig
from exlstm.data.text import TextBatches, load_corpus, windows, xz_bits_per_byte
from exlstm.models import checkpoint
from exlstm.models.config import LanguageConfig
from exlstm.models.language import LanguageModel
from exlstm.recipes import RunConfig, sized, train_language
from exlstm.train.config import TrainConfig
from exlstm.train.loop import train
from exlstm.train.progress import Progress

CONTEXT, BATCH, LAYERS, WIDTH, HEADS = 64, 12, 4, 128, 4
# The loss that nanoGPT reports for a Transformer of 0.8 M parameters under this recipe, on tinyshakespeare.
NANOGPT = 1.88


def run(config: QualityConfig) -> list[dict]:
    """Measures, prints and writes; returns the rows of both parts."""
    rows, curves = [], {}
    folder = config.out / f"quality-{time.strftime('%Y%m%d-%H%M%S')}"
    with timing.cores(config):
        if config.text is None or not config.text.is_file():
            why = "no --text" if config.text is None else f"there is no file {config.text}"
            print(f"nanoGPT's recipe is left out: {why}")
        else:
            for blocks in config.blocks:
                row, curves[blocks] = _recipe(config, blocks, folder)
                rows.append(row)
        if config.minutes:
            rows += _default(config, folder)
        else:
            print("the default run is left out: no --minutes")
    if rows:
        timing.report("quality", rows, config, timing.machine(config), _drawing(curves) if curves else None)
    return rows


def _recipe(config: QualityConfig, blocks: str, folder: Path) -> tuple[dict, dict[int, float]]:
    """The row of one stack, and its held-out loss by step."""
    data = DataConfig(
        files=(str(config.text),), tokenizer="characters", context=CONTEXT, batch_size=BATCH, seed=config.seed
    )
    corpus = load_corpus(data, folder / "data")
    kinds = tuple(blocks.split("+"))
    settings = LanguageConfig(
        d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, blocks=kinds, vocab_size=corpus.tokenizer.vocab_size
    )
    torch.manual_seed(config.seed)
    model = LanguageModel(settings).to(config.device)
    model.tokenizer = corpus.tokenizer
    every = max(1, config.steps // 4)
    schedule = TrainConfig(steps=config.steps, lr=config.lr, betas=(0.9, 0.99), eval_every=every, seed=config.seed)
    curve = []

    def evaluate(model):
        curve.append(_loss(model, corpus.held_out))
        return {"held_out": curve[-1]}

    print(f"\n{blocks}: {model.n_parameters():,} parameters, {config.steps} steps on {config.text}", flush=True)
    start = time.perf_counter()
    batches = TextBatches(corpus.train, CONTEXT, BATCH, config.seed)
    result = train(
        model, batches, schedule, folder / blocks, evaluate=evaluate, save_model=checkpoint.write, progress=Progress()
    )
    if result.interrupted is not None:
        raise KeyboardInterrupt
    row = {
        "stack": f"{blocks}, nanoGPT's recipe",
        "parameters": model.n_parameters(),
        "steps": result.step,
        "seconds": round(time.perf_counter() - start, 1),
        "held-out nats a character": round(curve[-1], 4),
    }
    steps = [*range(every, config.steps, every), config.steps]
    return row, dict(zip(steps, curve))


def _loss(model, split) -> float:
    """Mean nats a token over the whole split, in windows that begin with an empty state."""
    device, nats, count = next(model.parameters()).device, 0.0, 0
    for inputs, targets, _ in windows(split, CONTEXT, 256):
        nats += model.token_losses((inputs.to(device), targets.to(device))).double().sum().item()
        count += int((targets >= 0).sum())
    return nats / count


def _default(config: QualityConfig, folder: Path) -> list[dict]:
    """Bits a byte of the default run and of an LSTM stack of equal size after equally many minutes, and xz's rate."""
    default = sized()
    ours = replace(default.model, vocab_size=256)
    data = replace(default.data, files=config.files)
    models = {"default run": ours, "lstm of equal size": equal_lstm(ours)}
    rows = []
    for name, model in models.items():
        out = folder / name.split()[0]
        schedule = replace(default.train, minutes=config.minutes, seed=config.seed)
        start = time.perf_counter()
        result = train_language(RunConfig(str(out), model, data, schedule, config.device))
        seconds = round(time.perf_counter() - start, 1)
        if result.interrupted is not None:
            raise KeyboardInterrupt
        trained = runs.load(out, config.device)
        rows.append(
            {
                "stack": f"{name}, {config.minutes:g} minutes",
                "parameters": trained.n_parameters(),
                "steps": result.step,
                "seconds": seconds,
                "held-out bits a byte": round(runs.evaluate(out, device=config.device), 4),
            }
        )
    held = load_corpus(data, out / "data").held_out.head(runs.REPORT_BYTES)
    return [*rows, {"stack": "xz", "held-out bits a byte": round(xz_bits_per_byte(held.bytes()), 4)}]


def equal_lstm(config: LanguageConfig) -> LanguageConfig:
    """A stack of as many `lstm` blocks, so wide that it has about as many parameters."""
    wanted = LanguageModel(config, device="meta").n_parameters()
    widths = range(16, 2 * config.d_model + 16, 8)
    stacks = [replace(config, blocks=("lstm",), d_model=width, n_heads=1) for width in widths]
    return min(stacks, key=lambda stack: abs(LanguageModel(stack, device="meta").n_parameters() - wanted))


def _drawing(curves):
    def draw(axes):
        for blocks, curve in curves.items():
            axes.plot(list(curve), list(curve.values()), marker=".", label=blocks)
        axes.axhline(NANOGPT, color="0.6", linestyle="--", label=f"nanoGPT's own figure, {NANOGPT}")
        axes.set(xlabel="step", ylabel="held-out nats a character", title="nanoGPT's recipe for a CPU")
        axes.legend()

    return draw
