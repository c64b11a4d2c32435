"""The models of the scoreboard behind one face: a loss to learn, answers to questions, losses of a text in pieces.

Every contender has `loss((inputs, targets))`, `answers(inputs, asked)` and `read(inputs, targets, state)`.
"""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from exlstm.bench import peers, rows
from exlstm.bench.entrants import MODELS, THEIRS
from exlstm.bench.rows import Case, Row
from exlstm.data.tasks import TASKS
from exlstm.layers.basic import RMSNorm, init_linear
from exlstm.models.config import LanguageConfig, from_dict, nearest
from exlstm.models.language import LanguageModel
from exlstm.models.stack import Stack


def build(name: str, case: Case, row: Row, vocab_size: int, device=None) -> nn.Module:
    """The model `name` for a case, on a device; ValueError for an unknown one or a package that is not here."""
    if name in THEIRS:
        return _Theirs(THEIRS[name], case, row, vocab_size).to(device)
    settings = network(name, row, vocab_size or 1)
    task = TASKS.get(case.task)
    return _Real(settings, task.features, device) if task and task.features else _Ours(settings, device)


def network(name: str, row: Row, vocab_size: int) -> LanguageConfig:
    """The settings of a model of ours: n_layers of the row, or as many as come nearest to the size of `match`."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}{nearest(name, (*MODELS, *THEIRS))}")
    kinds, options = rows.settings(name, row)
    blocks = tuple(row.matrix if kind == "matrix" else kind for kind in kinds)
    options = {row.matrix if kind == "matrix" else kind: chosen for kind, chosen in options.items()}
    sizes = {"d_model": row.d_model, "n_layers": row.n_layers, "n_heads": row.n_heads, "dropout": row.dropout}
    settings = from_dict(LanguageConfig, {**sizes, "blocks": blocks, "vocab_size": vocab_size, **options})
    if not row.match or name == row.match:
        return settings
    wanted = n_parameters(network(row.match, row, vocab_size))
    # At least one round of the kinds, so that a ratio is what its name says.
    stacks = [replace(settings, n_layers=n) for n in range(len(kinds), 4 * row.n_layers + len(kinds))]
    return min(stacks, key=lambda stack: abs(n_parameters(stack) - wanted))


def n_parameters(settings: LanguageConfig) -> int:
    """Parameters of the model with these settings: one block of every kind is built, without memory, and counted."""
    blocks = {kind: replace(settings, blocks=(kind,), n_layers=1) for kind in settings.blocks}
    sizes = {kind: _block_size(stack) for kind, stack in blocks.items()}
    maps = settings.vocab_size * settings.d_model * (1 if settings.tie_embeddings else 2) + settings.d_model
    return maps + sum(sizes[kind] for kind in settings.layers())


@lru_cache(maxsize=256)
def _block_size(stack: LanguageConfig) -> int:
    return sum(p.numel() for p in Stack(stack, device="meta").parameters())


def state_size(model: nn.Module, length: int) -> dict[str, int | None]:
    """Bytes that a model of ours remembers of one sequence of `length` tokens, and how many floats they are: under autocast the
    keys of attention take two bytes each, a memory four. Nones where a peer does not tell."""
    if isinstance(model, _Theirs):
        return {"state_bytes": None, "state_floats": None}
    with torch.no_grad():
        kept = [t for t in tree_leaves(model.remember(model.blank(length))) if isinstance(t, Tensor)]
    floats = sum(t.numel() for t in kept if t.is_floating_point())
    return {"state_bytes": sum(t.numel() * t.element_size() for t in kept), "state_floats": floats}


class _Ours(nn.Module):
    """A LanguageModel."""

    def __init__(self, settings: LanguageConfig, device=None):
        super().__init__()
        self.net = LanguageModel(settings, device=device)

    def loss(self, batch) -> Tensor:
        return self.net.loss(batch)

    def answers(self, inputs: Tensor, asked: Tensor) -> Tensor:
        """The likeliest token (N,) at every place that is asked (B, T)."""
        x, _ = self.net.hidden(inputs)
        return self.net.logits(x[asked]).argmax(-1)

    def read(self, inputs: Tensor, targets: Tensor, state=None):
        """Nats of every target (B, T) after what the state remembers, and the next state."""
        x, state = self.net.hidden(inputs, state)
        return _nats(self.net.logits(x), targets), state

    def blank(self, length: int) -> Tensor:
        return torch.zeros(1, length, dtype=torch.long, device=self.net.embedding.weight.device)

    def remember(self, inputs: Tensor):
        return self.net.hidden(inputs)[1]


class _Real(nn.Module):
    """A stack between two linear maps, for tasks of real numbers: the mean square error of the answers."""

    def __init__(self, settings: LanguageConfig, features: int, device=None):
        super().__init__()
        self.embed = nn.Linear(features, settings.d_model, bias=False, device=device)
        self.stack = Stack(settings, device=device)
        self.norm = RMSNorm(settings.d_model, device=device)
        self.head = nn.Linear(settings.d_model, 1, bias=False, device=device)
        for linear in (self.embed, self.head):
            init_linear(linear.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.norm(self.stack(self.embed(inputs))[0]))[..., 0].float()

    def loss(self, batch) -> Tensor:
        inputs, targets = batch
        asked = ~targets.isnan()
        return ((self(inputs) - targets.nan_to_num()).square() * asked).sum() / asked.sum()

    def answers(self, inputs: Tensor, asked: Tensor) -> Tensor:
        return self(inputs)[asked]

    def blank(self, length: int) -> Tensor:
        return torch.zeros(1, length, self.embed.in_features, device=self.head.weight.device)

    def remember(self, inputs: Tensor):
        return self.stack(self.embed(inputs))[1]


class _Theirs(nn.Module):
    """xlstm of NX-AI, a black box at its defaults: its language model, its initialisation, its plain PyTorch sLSTM."""

    def __init__(self, places: str, case: Case, row: Row, vocab_size: int):
        super().__init__()
        package = peers.find("xlstm")
        if package is None:
            raise ValueError("the package xlstm is not installed")
        if case.task in TASKS and TASKS[case.task].features:
            raise ValueError("its language model takes tokens only")
        at = {"none": [], "all": list(range(row.n_layers)), "second": list(range(1, row.n_layers, 2))}[places]
        # Its masks are as long as this; a row with its answer is a little longer than twice the word.
        longest = max(longest for _, longest, _ in (*case.train, *case.test))
        config = package.xLSTMLMModelConfig(
            mlstm_block=package.mLSTMBlockConfig(mlstm=package.mLSTMLayerConfig(num_heads=row.n_heads)),
            slstm_block=package.sLSTMBlockConfig(
                slstm=package.sLSTMLayerConfig(backend="vanilla", num_heads=row.n_heads),
                feedforward=package.FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
            ),
            context_length=longest + 64,
            num_blocks=row.n_layers,
            embedding_dim=row.d_model,
            slstm_at=at,
            dropout=row.dropout,
            vocab_size=vocab_size,
        )
        self.net = package.xLSTMLMModel(config)
        self.net.reset_parameters()

    def loss(self, batch) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self.net(inputs).float().flatten(0, 1), targets.flatten())

    def answers(self, inputs: Tensor, asked: Tensor) -> Tensor:
        return self.net(inputs)[asked].argmax(-1)

    def read(self, inputs: Tensor, targets: Tensor, state=None):
        if state is not None:
            raise ValueError("its language model hands no state over")
        return _nats(self.net(inputs).float(), targets), None


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
