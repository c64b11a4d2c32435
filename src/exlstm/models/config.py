"""What a network is: frozen settings of stacks and language models, without torch so that the command line answers at once."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class MLSTMOptions:
    """The `mlstm` block (xLSTM 7B, arXiv 2503.13427, section 3): matrix memory, then a feed-forward."""

    qk_ratio: float = 0.5
    """width of queries and keys over the width of values"""
    conv: int = 4
    """width of the causal convolution in front of q and k; 0 leaves it out"""
    gate_cap: float = 15.0
    """soft cap of the gates' pre-activations, in nats; 0 leaves it out"""
    i_bias: float = -10.0
    """bias of the input gate at the start, in nats"""
    ffn_ratio: float = 8 / 3
    """width of the feed-forward over d_model; 0 leaves the feed-forward out"""


@dataclass(frozen=True)
class MLSTMUpOptions:
    """The `mlstm_up` block (xLSTM, arXiv 2405.04517, figure 11): projection up, matrix memory, projection down."""

    up_ratio: float = 2.0
    """inner width over d_model"""
    conv: int = 4
    """width of the causal convolution in front of q and k"""
    qkv_block: int = 4
    """side of the small blocks of the q, k and v maps"""


@dataclass(frozen=True)
class MLSTMWindowOptions:
    """The `mlstm_window` block: the `mlstm` block beside sliding-window attention, mixed head by head (arXiv 2603.15590)."""

    window: int = 512
    """tokens that the attention sees, itself included"""
    sinks: int = 4
    """first tokens of a document that stay visible beyond the window"""
    rope_base: float = 10000.0
    """base of the window's rotary positions; 0 leaves positions out"""
    qk_ratio: float = 0.5
    """width of queries and keys over the width of values"""
    conv: int = 4
    """width of the causal convolution in front of q and k; 0 leaves it out"""
    gate_cap: float = 15.0
    """soft cap of the memory's gates, in nats; 0 leaves it out"""
    i_bias: float = -10.0
    """bias of the memory's input gate at the start, in nats"""
    ffn_ratio: float = 8 / 3
    """width of the feed-forward over d_model; 0 leaves the feed-forward out"""


@dataclass(frozen=True)
class SLSTMOptions:
    """The `slstm` block (xLSTM, arXiv 2405.04517, figure 10): scalar memory with memory mixing, then a gated feed-forward."""

    conv: int = 0
    """width of the causal convolution that feeds the input and forget gates; 0 leaves it out"""
    dense: bool = False
    """input maps over the whole width; False: one block a head, as in the paper"""
    ffn_ratio: float = 4 / 3
    """width of the feed-forward over d_model; 0 leaves the feed-forward out"""


@dataclass(frozen=True)
class AttentionOptions:
    """The `attention` block: causal softmax attention and SwiGLU, as in Llama (arXiv 2302.13971)."""

    n_kv_heads: int = 0
    """heads of keys and values (grouped queries); 0: as many as n_heads"""
    rope_base: float = 10000.0
    """base of the rotary position embedding; 0 leaves positions out"""
    window: int = 0
    """tokens that a token sees, itself included; 0: all before it"""
    sinks: int = 0
    """first tokens of a document that stay visible beyond the window"""
    ffn_ratio: float = 8 / 3
    """width of the feed-forward over d_model; 0 leaves the feed-forward out"""


@dataclass(frozen=True)
class Mamba2Options:
    """The `mamba2` block (arXiv 2405.21060): gated state space layer, run on the mLSTM operator without normaliser."""

    d_state: int = 64
    """width of the state a head channel"""
    head_dim: int = 64
    """channels a head (the number of heads follows from it)"""
    expand: float = 2.0
    """inner width over d_model"""
    conv: int = 4
    """width of the causal convolution"""
    ffn_ratio: float = 0.0
    """width of the feed-forward over d_model; 0 leaves the feed-forward out, as in the paper"""


@dataclass(frozen=True)
class LSTMOptions:
    """The `lstm` block: a plain LSTM in the same residual frame, the baseline of every comparison."""

    ffn_ratio: float = 4 / 3
    """width of the feed-forward over d_model; 0 leaves the feed-forward out"""


OPTIONS = {
    "mlstm": MLSTMOptions,
    "mlstm_up": MLSTMUpOptions,
    "mlstm_window": MLSTMWindowOptions,
    "slstm": SLSTMOptions,
    "attention": AttentionOptions,
    "mamba2": Mamba2Options,
    "lstm": LSTMOptions,
}


def nearest(name: str, known) -> str:
    """', did you mean ...?' for the known name nearest to `name`, or the list of known names."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


@dataclass(frozen=True)
class StackConfig:
    """A stack of residual blocks over (B, T, d_model)."""

    d_model: int = 256
    """width of the residual stream"""
    n_layers: int = 4
    """number of blocks"""
    n_heads: int = 4
    """heads of every mixer that has heads of its own choosing"""
    blocks: tuple[str, ...] = ("mlstm",)
    """kinds of block, repeated in turn up to n_layers: mlstm, mlstm_up, mlstm_window, slstm, attention, mamba2, lstm"""
    dropout: float = 0.0
    """dropout on the output of every mixer and feed-forward, in training"""
    mlstm: MLSTMOptions = field(default_factory=MLSTMOptions)
    mlstm_up: MLSTMUpOptions = field(default_factory=MLSTMUpOptions)
    mlstm_window: MLSTMWindowOptions = field(default_factory=MLSTMWindowOptions)
    slstm: SLSTMOptions = field(default_factory=SLSTMOptions)
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    mamba2: Mamba2Options = field(default_factory=Mamba2Options)
    lstm: LSTMOptions = field(default_factory=LSTMOptions)

    def __post_init__(self):
        blocks = (self.blocks,) if isinstance(self.blocks, str) else tuple(self.blocks)
        object.__setattr__(self, "blocks", blocks)
        if not blocks:
            raise ValueError(f"blocks is empty; it names at least one of {', '.join(OPTIONS)}")
        for block in blocks:
            if block not in OPTIONS:
                raise ValueError(f"unknown block {block!r}{nearest(block, OPTIONS)}")
        for name in ("d_model", "n_layers", "n_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, wanted a whole number of at least 1")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, wanted 0 ≤ dropout < 1")

    def layers(self) -> tuple[str, ...]:
        """The kind of every block, n_layers names."""
        return tuple(self.blocks[i % len(self.blocks)] for i in range(self.n_layers))


@dataclass(frozen=True)
class LanguageConfig(StackConfig):
    """A language model: a stack between an embedding and a head over `vocab_size` tokens."""

    vocab_size: int = 256
    """number of tokens"""
    tie_embeddings: bool = False
    """one matrix for embedding and head"""
    logit_cap: float = 30.0
    """soft cap of the logits, in nats; 0 leaves it out"""

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.vocab_size, int) or self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size!r}, wanted a whole number of at least 1")


# `tiny` is tuned for minutes on a CPU: after 150 steps its alternation is at 2.17 bits a byte, `mlstm` alone at 2.43.
SIZES = {
    "nano": {"d_model": 96, "n_layers": 3, "n_heads": 3},
    "tiny": {
        "d_model": 160,
        "n_layers": 4,
        "n_heads": 4,
        "blocks": ("slstm", "mlstm"),
        "slstm": SLSTMOptions(conv=4, dense=True),
    },
    "small": {"d_model": 384, "n_layers": 6, "n_heads": 6},
    "medium": {"d_model": 768, "n_layers": 12, "n_heads": 8},
    "large": {"d_model": 1024, "n_layers": 24, "n_heads": 8},
}


def from_dict(kind, values: dict, where: str = ""):
    """A config of dataclass `kind` from plain values, or with finished options of a block; an unknown key is a ValueError
    that names the nearest one."""
    known = {f.name: f for f in fields(kind)}
    if not isinstance(values, dict):
        raise ValueError(
            f"{where or kind.__name__} is {type(values).__name__}, wanted an object with keys {', '.join(known)}"
        )
    for key in values:
        if key not in known:
            raise ValueError(f"unknown field {where + key!r}{nearest(key, known)}")
    nested = {
        k: from_dict(OPTIONS[k], v, f"{where}{k}.") if k in known and k in OPTIONS and type(v) is not OPTIONS[k] else v
        for k, v in values.items()
    }
    for key, value in nested.items():
        wanted = known[key].type
        fits = {"int": int, "float": (int, float), "bool": bool, "str": str, "tuple[str, ...]": (list, tuple, str)}.get(
            wanted
        )
        if fits and (not isinstance(value, fits) or (isinstance(value, bool) and wanted != "bool")):
            raise ValueError(f"{where}{key} is {value!r}, wanted {wanted}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in nested.items()})
