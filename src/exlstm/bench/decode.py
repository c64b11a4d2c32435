"""Decoding on a GPU with random bfloat16 weights, ours beside xLSTMLarge and Llama: ms a step, and time to the first token.

A step is one token for every sequence as a caller gets it, launches and choice of the likeliest token with it, timed over many.
"of the card" is the traffic that a step cannot do without, all weights but the embedding read once and each state read and
written once, over what the card copies a second. "off by" is ‖logits of steps − logits of the whole‖ / ‖logits of the whole‖.
"""

import time
from functools import partial

import torch

from exlstm.bench import peers, timing
from exlstm.bench.config import DecodeConfig
from exlstm.models.engine import Engine
from exlstm.models.quantized import int8
from exlstm.models.reading import leaves, mapped, read
from exlstm.models.sequence import Request, Sequence
from exlstm.models.step import Step

BF16 = torch.bfloat16
ENDLESS = 1 << 40
# Steps before the clock starts: graphs are captured and kernels compiled in them.
WARM = 8


class Ours:
    """Our engine; `blocks` are in turn those of the model, whose weights are held in int8 where `quantized`."""

    def __init__(self, size, device, blocks=("mlstm",), quantized=False):
        self.model = peers.language(size, blocks, device, BF16).eval()
        if quantized:
            int8(self.model)
        self.engine = None

    def start(self, tokens, batch):
        if self.engine is None or self.engine.slots != batch:
            self.engine = None
            self.engine = Engine(self.model, batch)
        for sequence in self.engine.sequences:
            if sequence is not None:
                self.engine.remove(sequence)
        with torch.inference_mode():
            state = read(self.model, [tokens], None)
            state = mapped(lambda x: x.expand(batch, *x.shape[1:]), state)
        request = Request([], ENDLESS, temperature=0, state=state)
        self.engine.seat([Sequence(self.model, request) for _ in range(batch)], state)

    def steps(self, count):
        for _ in range(count):
            self.engine.step()
        self.engine.settle()

    def first(self, tokens):
        """Reads a prompt and waits for the token behind it."""
        if self.engine.free == 0:
            self.engine.remove(self.engine.sequences[0])
        (sequence,) = self.engine.admit(Request(tokens, 2, temperature=0))
        while not sequence.tokens:
            self.engine.step()

    def moved(self, batch):
        """Bytes that a step cannot do without."""
        weights = sum(_bytes(p) for p in self.model.parameters() if p is not self.model.embedding.weight)
        with torch.inference_mode():
            state = self.model.hidden(torch.zeros(1, 1, dtype=torch.int64, device=self.model.embedding.weight.device))[
                1
            ]
        return weights + 2 * batch * sum(x.numel() * x.element_size() for x in leaves(state))

    def gap(self):
        """How far the steps' logits are off, three sequences, from a state on."""
        model, device = self.model, self.model.embedding.weight.device
        tokens = torch.randint(model.config.vocab_size, (3, 24), device=device)
        with torch.inference_mode():
            wanted, _ = model(tokens)
            first, state = model(tokens[:, :16])
            step, found = Step(model, 3), [first]
            step.seat(torch.arange(3, device=device), state, first[:, -1])
            step.alive.fill_(True)
            for t in range(16, 24):
                step.tokens.copy_(tokens[:, t])
                step()
                found.append(step.logits[:, None].clone())
        return timing.relative_error(torch.cat(found, 1)[:, 16:], wanted[:, 16:])


def _bytes(weight) -> int:
    """What a weight takes in memory, in int8 with its scales."""
    held = (weight.qdata, weight.scale) if hasattr(weight, "qdata") else (weight,)
    return sum(x.numel() * x.element_size() for x in held)


class Large:
    """xLSTMLarge of the package xlstm in its inference mode."""

    def __init__(self, size, device):
        # Its xl_chunk kernel ends the process in Triton 3.6's compiler where gates are bfloat16.
        kernels = {"chunkwise_kernel": "chunkwise--triton_limit_chunk", "sequence_kernel": "native_sequence__triton"}
        self.model = peers.large(size, device, BF16, mode="inference", return_last_states=True, **kernels)
        self.device = device

    @torch.inference_mode()
    def start(self, tokens, batch):
        logits, state = self.model(torch.tensor([tokens], device=self.device))
        self.state = {i: tuple(x.repeat(batch, *[1] * (x.ndim - 1)) for x in s) for i, s in state.items()}
        self.token = logits[:, -1:].argmax(-1).repeat(batch, 1)

    @torch.inference_mode()
    def steps(self, count):
        for _ in range(count):
            logits, self.state = self.model(self.token, self.state)
            self.token = logits.argmax(-1)
        self.token.tolist()

    @torch.inference_mode()
    def first(self, tokens):
        self.model(torch.tensor([tokens], device=self.device))[0][:, -1].argmax(-1).tolist()


class Llama:
    """Llama of transformers with its growing cache."""

    def __init__(self, size, device):
        self.model = peers.llama(size, device, BF16, length=1 << 18)
        self.device = device

    @torch.inference_mode()
    def start(self, tokens, batch):
        tokens = torch.tensor([tokens], device=self.device).repeat(batch, 1)
        self._read(tokens)

    def _read(self, tokens):
        out = self.model(tokens, use_cache=True, logits_to_keep=1)
        self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def steps(self, count):
        for _ in range(count):
            out = self.model(self.token, past_key_values=self.cache, use_cache=True)
            self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        self.token.tolist()

    @torch.inference_mode()
    def first(self, tokens):
        self._read(torch.tensor([tokens], device=self.device))
        self.token.tolist()


# name -> what builds it for a size; ours first, so that no peer can spoil it
SIDES = {
    "ours": Ours,
    "ours 7:1": partial(Ours, blocks=("mlstm",) * 7 + ("slstm",)),
    "ours int8": partial(Ours, quantized=True),
    "xlstm": Large,
    "llama": Llama,
}
NEEDS = {"ours int8": "torchao", "xlstm": "xlstm.xlstm_large.model", "llama": "transformers"}


def run(config: DecodeConfig) -> list[dict]:
    """Measures, prints and writes; returns the rows of the table."""
    timing.wants_gpu(config, "decode")
    for kind, given, known in (("side", config.only, SIDES), ("size", config.sizes, peers.SIZES)):
        for name in given:
            if name not in known:
                raise ValueError(f"{kind} {name!r} is not one of {', '.join(known)}")
    deadline, rows = time.monotonic() + config.seconds, []
    with timing.cores(config):
        facts = timing.machine(config, "triton", "xlstm", "mlstm_kernels", "transformers")
        copy = _copy_speed(config.device)
        facts["copy TB/s"] = round(copy, 2)
        for name in config.only or SIDES:
            if name in NEEDS and peers.find(NEEDS[name]) is None:
                continue
            for size in config.sizes:
                side = timing.attempt(f"{name} {size}", deadline, partial(SIDES[name], size, config.device))
                if side is not None:
                    rows += _rows(name, size, side, config, deadline, copy)
                del side
                _free()
    _add_ratios(rows)
    timing.report("decode", rows, config, facts, _draw(rows) if rows else None)
    return rows


def _rows(name, size, side, config, deadline, copy):
    """Every figure of one side and size."""
    torch.manual_seed(0)
    places = [(batch, context) for batch in config.batches for context in config.contexts[:1]]
    places[1:1] = [(config.batches[0], context) for context in config.contexts[1:]]
    gap = timing.attempt(f"{name} {size} off by", deadline, side.gap) if hasattr(side, "gap") else None
    rows = []
    for batch, context in places:
        what = f"{name} {size} B {batch} behind {context}"
        ms = timing.attempt(what, deadline, partial(_step_time, side, batch, context, config))
        if ms is None:
            continue
        row = {"size": size, "side": name, "B": batch, "context": context, "ms/step": round(ms, 3)}
        if hasattr(side, "moved"):
            row["of the card"] = round(side.moved(batch) / ms / 1e9 / copy, 2)
        rows.append(row | {"tokens/s": round(1e3 * batch / ms)})
        print(f"{what}: {ms:.3f} ms a step", flush=True)
    if gap is not None and rows:
        rows[0]["off by"] = f"{gap:.1e}"
    if config.prompt and size == config.sizes[0] and rows:
        first = timing.attempt(f"{name} {size} first token", deadline, partial(_first_time, side, config))
        rows[0]["first token ms"] = first and round(first, 1)
    return rows


def _step_time(side, batch, context, config):
    """Milliseconds of a step of `batch` sequences behind `context` tokens."""
    side.start(torch.randint(peers.VOCABULARY, (context,)).tolist(), batch)
    side.steps(WARM)
    return timing.milliseconds(lambda: side.steps(config.tokens), config.device) / config.tokens


def _first_time(side, config):
    tokens = torch.randint(peers.VOCABULARY, (config.prompt,)).tolist()
    side.start(tokens[:16], 1)
    for _ in range(2):
        side.first(tokens)
    return min(timing.milliseconds(lambda: side.first(tokens), config.device) for _ in range(3))


def _copy_speed(device) -> float:
    """TB/s, read and written, of a copy."""
    x = torch.zeros(1 << (31 if torch.device(device).type == "cuda" else 20), device=device, dtype=torch.uint8)
    y = torch.empty_like(x)
    y.copy_(x)
    return 2 * x.numel() / min(timing.milliseconds(lambda: y.copy_(x), device) for _ in range(5)) / 1e9


def _free():
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _add_ratios(rows):
    """The peers over ours in the rows of ours, and how a step behind a long context compares to one behind a short."""
    found = {(row["side"], row["size"], row["B"], row["context"]): row["ms/step"] for row in rows}
    for row in rows:
        place = row["size"], row["B"], row["context"]
        if row["side"] == "ours":
            for peer in NEEDS:
                if (peer, *place) in found:
                    row[f"{peer}/ours"] = round(found[peer, *place] / row["ms/step"], 2)
        first = next(
            ms for (side, size, batch, _), ms in found.items() if (side, size, batch) == (row["side"], *place[:2])
        )
        row["over the first context"] = round(row["ms/step"] / first, 3)


def _draw(rows):
    """Milliseconds a step over the size, a line a side and batch, behind the first context."""

    def draw(axes):
        sizes = [size for size in reversed(peers.SIZES) if any(row["size"] == size for row in rows)]
        first = rows[0]["context"]
        for side, batch in dict.fromkeys((row["side"], row["B"]) for row in rows):
            own = {r["size"]: r["ms/step"] for r in rows if (r["side"], r["B"], r["context"]) == (side, batch, first)}
            places = [i for i, size in enumerate(sizes) if size in own]
            axes.plot(places, [own[sizes[i]] for i in places], "o-", label=f"{side}, B {batch}")
        axes.set_xticks(range(len(sizes)), sizes)
        axes.set(yscale="log", xlabel="parameters", ylabel="ms a step", title=f"bfloat16, behind {first} tokens")
        axes.legend(frameon=False, fontsize=8)

    return draw
