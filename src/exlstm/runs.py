"""A run on disk: measure its model on text, write with it, look at what it learnt."""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from exlstm import plot
from exlstm.data.text import documents, load_text, open_corpus, windows, xz_bits_per_byte
from exlstm.models import probe, quantized
from exlstm.models.language import LanguageModel

# Bytes of held-out text that the last word on a run is measured on; tokens that a state lives there; tokens a batch.
REPORT_BYTES, REPORT_ROW, REPORT_TOKENS = 1 << 17, 4096, 1 << 14


def bits_per_byte(model, batches, token_bytes) -> float:
    """Bits that `model` needs a byte of the targets in batches; `token_bytes` (V,) are the bytes of each token."""
    sizes, bits, count = torch.as_tensor(token_bytes, device="cpu"), 0.0, 0
    for batch in batches:
        bits += _losses(model, batch).sum().item() / math.log(2)
        count += int(sizes[batch.targets[batch.targets >= 0]].sum())
    return bits / count


def by_position(model, split) -> list[tuple[int, int, float]]:
    """(first position, bytes, bits a byte) of the text of a Split in bins: what the model gains from what it has read.

    Documents are read from a fresh state, and again after every REPORT_ROW tokens. Bins end at 64, 256, 1024 ...
    """
    sizes = torch.as_tensor(split.token_bytes, device="cpu")
    nats = torch.zeros(REPORT_ROW, dtype=torch.float64, device="cpu")
    count = torch.zeros_like(nats, dtype=torch.int64)
    for batch in documents(split, REPORT_ROW, REPORT_TOKENS // REPORT_ROW):
        length = batch.targets.shape[1]
        nats[:length] += _losses(model, batch).sum(0).cpu()
        count[:length] += (sizes[batch.targets.clamp(min=0)] * (batch.targets >= 0)).sum(0)
    edges = [0, *(4**i for i in range(3, 9) if 4**i < REPORT_ROW), REPORT_ROW]
    bins = [(start, int(count[start:end].sum()), nats[start:end].sum().item()) for start, end in pairwise(edges)]
    return [(start, n, total / math.log(2) / n) for start, n, total in bins if n]


def _losses(model, batch):
    """Nats of every target (B, T) in float64, on the model's device."""
    device = next(model.parameters()).device
    return model.token_losses(type(batch)(*(t.to(device) for t in batch))).double()


def report(model, split, title: str) -> float:
    """Prints bits per byte of a text by position and as a whole beside xz's on the same bytes; returns the whole."""
    model.eval()
    rows, xz = by_position(model, split), xz_bits_per_byte(split.bytes())
    total = sum(n for _, n, _ in rows)
    whole = sum(n * rate for _, n, rate in rows) / total
    ends = [*(f"to {start - 1}" for start, _, _ in rows[1:]), "on"]
    print(f"\n{title}, {split.n_bytes:,} bytes\n\n  after tokens         bytes   bits/byte")
    for (start, n, rate), end in zip(rows, ends, strict=True):
        print(f"  {f'{start} {end}':15} {n:10,}   {rate:9.3f}")
    print(f"  {'all':15} {total:10,}   {whole:9.3f}\n  {'xz':15} {split.n_bytes:10,}   {xz:9.3f}", flush=True)
    return whole


def evaluate(
    run: Path,
    files: Sequence[str] = (),
    limit: int = REPORT_BYTES,
    device: str = "auto",
    int8: bool = False,
    field: str = "text",
) -> float:
    """`report` on files, without any on the held-out text of the run, also of one that `run` is a checkpoint of.

    At most `limit` bytes are read, 0 for all; rows of a .jsonl have their text in `field`.
    """
    if limit < 0:
        raise ValueError(f"limit is {limit}, wanted a number of bytes, or 0 for all")
    model = load(run, device, int8)
    split = load_text(files, model.tokenizer, field, limit) if files else _corpus(_run_of(run)).held_out
    title = f"{', '.join(files[:3])}{' ...' * (len(files) > 3)}" if files else f"held-out text of {run}"
    return report(model, split.head(limit) if limit else split, title)


def write(run: Path, prompt: str, tokens: int, device: str = "auto", int8: bool = False, **sampling) -> Iterator[str]:
    """The prompt and what the run's model writes after it, piece by piece; `sampling` as in LanguageModel.generate."""
    if tokens < 0:
        raise ValueError(f"tokens is {tokens}, wanted at least 0")
    stream = load(run, device, int8).generate(prompt or "\n", tokens, stream=True, **sampling)

    def pieces():
        yield prompt
        yield from stream

    return pieces()


def draw(run: Path, tokens: int = 4096, device: str = "auto") -> list[Path]:
    """Draws loss.png and, for blocks with gates, gates.png into the run's folder, and tells what the gates did."""
    if tokens < 2:
        raise ValueError(f"tokens is {tokens}, wanted at least 2")
    plot.require_matplotlib()
    corpus, model = _corpus(run), load(run, device)
    kinds = ", ".join(dict.fromkeys(model.config.layers()))
    head, records = corpus.held_out.head(REPORT_BYTES), _metrics(run)
    to_bits = len(head) / head.n_bytes / math.log(2)
    learnt = {r["step"]: r["loss"] * to_bits for r in records if r.get("loss") is not None}
    tested = {r["step"]: r["bits_per_byte"] for r in records if r.get("bits_per_byte") is not None}
    drawn = [run / "loss.png"]
    title = f"{run}: {model.config.n_layers} layers of {kinds}, {model.n_parameters():,} parameters"
    plot.draw_loss(drawn[0], learnt, tested, xz_bits_per_byte(head.bytes()), title)
    heads = gates(model, corpus.held_out, tokens)
    if heads:
        drawn.append(run / "gates.png")
        plot.draw_gates(drawn[1], heads, f"{run}: what each head does over held-out text")
    _tell_gates(heads, kinds)
    print("\n".join(f"figure  {path}" for path in drawn))
    return drawn


def gates(model, split, tokens: int) -> list[probe.Head]:
    """What each head with gates does over the first tokens of a Split."""
    batch, device = next(windows(split, tokens, 1)), next(model.parameters()).device
    with torch.no_grad(), probe.record(model) as seen:
        model.hidden(batch.inputs.to(device), reset=batch.reset.to(device))
    return probe.summary(seen)


def _tell_gates(heads: list[probe.Head], kinds: str):
    if not heads:
        print(f"no gates to draw: blocks of {kinds} have none")
        return
    print("layer  block      forget horizon, tokens    mean forget gate    largest |m|")
    for layer in sorted({head.layer for head in heads}):
        own = [head for head in heads if head.layer == layer]
        horizons, forget = [head.horizon for head in own], [head.forget for head in own]
        spans = f"{min(horizons):.3g} to {max(horizons):.3g}", f"{min(forget):.3f} to {max(forget):.3f}"
        print(f"{layer:5}  {own[0].block:9}  {spans[0]:24}  {spans[1]:18}  {max(head.m for head in own):.3g}")


def device_of(name: str) -> str:
    """A device that can be used here; "auto" is the accelerator if there is one. ValueError: it cannot."""
    if name == "auto":
        return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    if name == "meta":
        raise ValueError("device 'meta' cannot be used here: it holds no numbers")
    try:
        return str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError) as error:
        told = str(error).strip().splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {told}") from None


def load(run: Path, device: str = "auto", int8: bool = False) -> LanguageModel:
    """The model of a run, or of one of its checkpoints, with its tokenizer; with its maps in int8, if asked for."""
    model = LanguageModel.from_pretrained(run, device=device_of(device))
    if model.tokenizer is None:
        raise ValueError(f"{run} holds no tokenizer, so its model cannot read text")
    return quantized.int8(model) if int8 else model


def _run_of(folder: Path) -> Path:
    """The run that a checkpoint lies in; any other folder is taken as it is."""
    checkpoints = folder.resolve().parent
    return checkpoints.parent if checkpoints.name == "checkpoints" else folder


def _corpus(run: Path):
    if not (run / "run.json").is_file():
        raise FileNotFoundError(f"{run} is not the folder of a run: it has no run.json")
    return open_corpus(run / "data")


def _metrics(run: Path) -> list[dict]:
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            # The last line may be torn by a kill.
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "step" in record]
