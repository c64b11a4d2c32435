"""State tracking: a small stack learns the parity of short bit strings and is asked about longer ones (arXiv 2405.04517, B.1.1).

Scaled accuracy: 0 is guessing, 1 is every string right.
"""

import time
from dataclasses import replace
from itertools import pairwise

import torch
from torch.nn.utils import clip_grad_norm_

from exlstm.bench import timing
from exlstm.bench.config import ParityConfig
from exlstm.data.tasks import TASKS, TaskBatches, scaled_accuracy
from exlstm.models.config import LanguageConfig
from exlstm.models.language import LanguageModel
from exlstm.train.config import TrainConfig
from exlstm.train.optim import Optimizer, lr_at

PARITY = TASKS["parity"]
# Strings of the checks and of the test come from seeds that training never takes.
CHECK_EVERY, CHECK_SEED, TEST_SEED, TEST_STRINGS, SLICES = 50, -1, -2, 1024, 6


def run(config: ParityConfig) -> list[dict]:
    """Trains, prints and writes; returns one row a seed."""
    if not config.seeds:
        raise ValueError("seeds is empty, wanted at least one")
    rows, curves = [], {}
    with timing.cores(config):
        # What the test cannot ask is refused before anything has learnt.
        TaskBatches("parity", 1, *config.test_lengths, seed=TEST_SEED)
        for seed in config.seeds:
            model, spent = train(config, seed)
            predictions, targets, lengths = answers(model, config, config.test_lengths, TEST_STRINGS, TEST_SEED)
            score = scaled_accuracy(predictions, targets, PARITY.chance)
            curves[seed] = _by_length(predictions, targets, lengths, config.test_lengths)
            columns = {f"{low}–{high}": value for (low, high), value in curves[seed].items()}
            rows.append({"seed": seed, **spent, "scaled accuracy": round(score, 4), **columns})
    size, ends = model.n_parameters(), "–".join(map(str, config.test_lengths))
    print(f"\n{config.block}, {config.n_layers} layers of {config.d_model}, {size:,} parameters; lengths {ends}:")
    timing.report("parity", rows, config, timing.machine(config), _drawing(config, curves))
    return rows


def train(config: ParityConfig, seed: int) -> tuple[LanguageModel, dict]:
    """A model trained on short strings, and the steps, seconds and last loss of its training."""
    torch.manual_seed(seed)
    model = _model(config)
    settings = TrainConfig(steps=config.steps, lr=config.lr, warmup=0.1)
    optimizer, batches = (
        Optimizer(model, settings),
        TaskBatches("parity", config.batch, *config.train_lengths, seed=seed),
    )
    longest = config.train_lengths[1]
    check = (longest, longest * 8 // 5)
    start, solved = time.perf_counter(), 0
    for step in range(1, config.steps + 1):
        inputs, targets, _ = (t.to(config.device) for t in batches.batch(step - 1))
        loss = model.loss((inputs, targets))
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step(lr_at(step - 1, config.steps, settings))
        seconds = time.perf_counter() - start
        over = seconds > config.seconds
        if step % CHECK_EVERY == 0 or over or step == config.steps:
            predictions, targets, _ = answers(model, config, check, TEST_STRINGS // 2, CHECK_SEED)
            score = scaled_accuracy(predictions, targets, PARITY.chance)
            told = f"seed {seed}  step {step}/{config.steps}  loss {loss.item():.4f}"
            print(f"{told}  lengths {check[0]}–{check[1]}: {score:.3f}  {seconds:.0f} s", flush=True)
            solved = solved + 1 if score == 1.0 else 0
            if over or (config.early_stop and solved == 2):
                break
    return model, {"steps": step, "seconds": round(seconds, 1), "loss": round(loss.item(), 5)}


def _model(config: ParityConfig) -> LanguageModel:
    sizes = {"d_model": config.d_model, "n_layers": config.n_layers, "n_heads": config.n_heads}
    options = LanguageConfig(**sizes, blocks=config.block, vocab_size=PARITY.vocab_size)
    if config.block == "slstm":
        options = replace(options, slstm=replace(options.slstm, conv=config.conv))
    return LanguageModel(options, device=config.device)


@torch.no_grad()
def answers(model, config: ParityConfig, lengths: tuple[int, int], count: int, seed: int):
    """Predictions and targets (count, 1) at the questions, and the lengths of the strings."""
    batches, found = TaskBatches("parity", min(256, count), *lengths, seed=seed), []
    for step in range(-(-count // batches.batch_size)):
        inputs, targets, length = batches.batch(step)
        logits, _ = model(inputs.to(config.device))
        question = (length - 1)[:, None]
        said = logits.argmax(-1).cpu().gather(1, question)
        found.append((said, targets.gather(1, question), length - 1))
    return [torch.cat(column) for column in zip(*found)]


def _by_length(predictions, targets, lengths, ends) -> dict[tuple[int, int], float]:
    """Scaled accuracy in equal slices of the lengths."""
    edges = torch.linspace(ends[0], ends[1] + 1, SLICES + 1).round().int().tolist()
    slices = {}
    for low, high in pairwise(edges):
        inside = (lengths >= low) & (lengths < high)
        if inside.any():
            score = scaled_accuracy(predictions[inside], targets[inside], PARITY.chance)
            slices[low, high - 1] = round(score, 4)
    return slices


def _drawing(config: ParityConfig, curves):
    def draw(axes):
        for seed, slices in curves.items():
            axes.plot([sum(ends) / 2 for ends in slices], list(slices.values()), marker="o", label=f"seed {seed}")
        axes.axvspan(*config.train_lengths, color="0.9", label="lengths in training")
        axes.set(
            xlabel="length of the string", ylabel="scaled accuracy", ylim=(-0.1, 1.05), title=f"parity, {config.block}"
        )
        axes.legend()

    return draw
