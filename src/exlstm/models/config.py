"""What a network is: frozen settings of stacks and language models, without torch so that the command line answers at once."""

from __future__ import annotations

import difflib
import itertools
import math
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class MLSTMOptions:
    """The `mlstm` block (xLSTM 7B, arXiv 2503.13427, section 3): matrix memory, then a feed-forward."""

    qk_ratio: float = 0.5
    """width of queries and keys over the width of values"""
    conv: int = 4
    """width of the causal convolution in front of q and k; 0 leaves it out"""
    conv_all: bool = False
    """whether values and gates, too, come out of the convolution where there is one: all but the output gate"""
    gate_cap: float = 15.0
    """soft cap of the gates' pre-activations, in nats; 0 leaves it out"""
    i_bias: float = -2.0
    """bias of the input gate at the start, in nats"""
    forget_bias: tuple[float, float] = (0.0, 6.0)
    """the forget gates' bias at the start, at the first head and at the last, even steps: 0 remembers 2 tokens, 6 400"""
    out_start: float = 0.1
    """size of the output map at the start, over that of the other maps"""
    eps: float = 0.0
    """added to the stabilised denominator; only weights trained elsewhere want it"""
    i_gate: str = "exp"
    """input gate: exp, as in xLSTM, or sigmoid"""
    normalize: bool = True
    """divide what is read by the normaliser; without it the memory is gated linear attention"""
    ffn_ratio: float = 8 / 3
    """width of the feed-forward over d_model; 0 leaves the feed-forward out"""
    multiple: int = 64
    """widths that follow from a ratio are rounded up to a multiple of it"""


@dataclass(frozen=True)
class MLSTMUpOptions:
    """The `mlstm_up` block (xLSTM, arXiv 2405.04517, figure 11): projection up, matrix memory, projection down."""

    up_ratio: float = 2.0
    """inner width over d_model"""
    conv: int = 4
    """width of the causal convolution in front of q and k"""
    qkv_block: int = 4
    """side of the small blocks of the q, k and v maps"""
    forget_bias: tuple[float, float] = (0.0, 6.0)
    """the forget gates' bias at the start, at the first head and at the last, even steps: 0 remembers 2 tokens, 6 400"""
    eps: float = 0.0
    """added to the stabilised denominator; only weights trained elsewhere want it"""
    m_start: float = 0.0
    """stabiliser of an empty memory, in nats: with an eps of 0 it changes nothing"""
    i_gate: str = "exp"
    """input gate: exp, as in xLSTM, or sigmoid"""
    normalize: bool = True
    """divide what is read by the normaliser; without it the memory is gated linear attention"""
    multiple: int = 64
    """widths that follow from a ratio are rounded up to a multiple of it"""


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
    i_bias: float = -2.0
    """bias of the memory's input gate at the start, in nats"""
    forget_bias: tuple[float, float] = (0.0, 6.0)
    """bias of the memory's forget gates at the start, at the first head and at the last: 3 remembers 20 tokens, 6 400"""
    out_start: float = 0.1
    """size of the output map at the start, over that of the other maps"""
    ffn_ratio: float = 8 / 3
    """width of the feed-forward over d_model; 0 leaves the feed-forward out"""


@dataclass(frozen=True)
class SLSTMOptions:
    """The `slstm` block (xLSTM, arXiv 2405.04517, figure 10): scalar memory with memory mixing, then a gated feed-forward."""

    conv: int = 0
    """width of the causal convolution that feeds the input and forget gates; 0 leaves it out"""
    dense: bool = False
    """input maps over the whole width; False: one block a head, as in the paper"""
    forget_bias: tuple[float, float] = (-2.0, -2.0)
    """the forget gates' bias at the start, at the first unit of a head and at its last, even steps between"""
    n_heads: int = 0
    """heads of these blocks; 0: as many as the others"""
    ffn_ratio: float = 4 / 3
    """width of the feed-forward over d_model; 0 leaves the feed-forward out"""
    multiple: int = 64
    """widths that follow from a ratio are rounded up to a multiple of it"""
    recurrent_start: float = 1.5
    """size of the recurrent maps at the start, times an orthogonal one"""


@dataclass(frozen=True)
class AttentionOptions:
    """The `attention` block: causal softmax attention and SwiGLU, as in Llama (arXiv 2302.13971)."""

    n_kv_heads: int = 0
    """heads of keys and values (grouped queries); 0: as many as of queries"""
    rope_base: float = 10000.0
    """base of the rotary position embedding; 0 leaves positions out"""
    window: int = 0
    """tokens that a token sees, itself included; 0: all before it"""
    sinks: int = 0
    """first tokens of a document that stay visible beyond the window"""
    out_start: float = 1.0
    """size of the output map at the start, over that of the other maps"""
    ffn_ratio: float = 8 / 3
    """width of the feed-forward over d_model; 0 leaves the feed-forward out"""
    n_heads: int = 0
    """heads of queries in these blocks; 0: as many as the others"""
    dropout: float = 0.0
    """share of the weights of the softmax that are dropped in training"""


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
    close = difflib.get_close_matches(str(name), known := list(known), n=1, cutoff=0.5)
    shown = map(repr, known) if any("," in other for other in known) else known
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(shown)}"


NORMS, DESIGNS = ("none", "rms", "layer"), ("patches", "recent", "xlstmtime")
# A stabiliser as good as -inf, in nats: that of an empty memory in the parallel form of NX-AI's xlstm.
NO_MEMORY = -1e4
# What may be negative.
SIGNED = ("i_bias", "m_start", "forget_bias")
# What a setting may be, by its annotation.
KINDS = {"int": int, "float": (int, float), "bool": bool, "str": str, "tuple[str, ...]": (list, tuple, str)}


def _check_kind(name: str, value, wanted: str):
    """ValueError for a setting that is not what its annotation says: a file could not hold it, or a layer fails far away."""
    if wanted in KINDS and (not isinstance(value, KINDS[wanted]) or (isinstance(value, bool) and wanted != "bool")):
        raise ValueError(f"{name} is {value!r}, wanted {wanted}")


def _check_settings(config, where: str = ""):
    """ValueError for a setting of another kind, or that is no finite number, or below 0 where nothing negative is meant."""
    for f in fields(config):
        name, value = f.name, getattr(config, f.name)
        _check_kind(where + name, value, f.type)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not (math.isfinite(number) and (number >= 0 or name in SIGNED)):
                wanted = "a finite number" if name in SIGNED else "a finite number of at least 0"
                raise ValueError(f"{where}{name} is {value}, wanted {wanted}")


def _check_norm(name: str, value):
    if value not in NORMS:
        raise ValueError(f"{name} is {value!r}{nearest(value, NORMS)}")


@dataclass(frozen=True)
class StackConfig:
    """A stack of residual blocks over (B, T, d_model)."""

    d_model: int = 256
    """width of the residual stream"""
    n_layers: int = 4
    """number of blocks"""
    n_heads: int = 4
    """heads of every mixer that has heads, where its options do not say how many"""
    blocks: tuple[str, ...] = ("mlstm",)
    """kinds of block, repeated in turn up to n_layers: mlstm, mlstm_up, mlstm_window, slstm, attention, mamba2, lstm"""
    dropout: float = 0.0
    """dropout on the output of every mixer and feed-forward, and of a language model's embedding, in training"""
    out_norm: str = "none"
    """norm behind the last block: none, rms or layer"""
    norm_eps: float = 0.0
    """added to the variance in every norm; 0: 1e-6 or 1e-5, as each block's paper has it"""
    mlstm: MLSTMOptions = field(default_factory=MLSTMOptions)
    mlstm_up: MLSTMUpOptions = field(default_factory=MLSTMUpOptions)
    mlstm_window: MLSTMWindowOptions = field(default_factory=MLSTMWindowOptions)
    slstm: SLSTMOptions = field(default_factory=SLSTMOptions)
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    mamba2: Mamba2Options = field(default_factory=Mamba2Options)
    lstm: LSTMOptions = field(default_factory=LSTMOptions)

    def __post_init__(self):
        for name in ("d_model", "n_layers", "n_heads", "vocab_size"):
            value = getattr(self, name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, wanted a whole number of at least 1")
        _check_settings(self)
        blocks = (self.blocks,) if isinstance(self.blocks, str) else tuple(self.blocks)
        object.__setattr__(self, "blocks", blocks)
        if not blocks:
            raise ValueError(f"blocks is empty; it names at least one of {', '.join(OPTIONS)}")
        for block in blocks:
            if block not in OPTIONS:
                raise ValueError(f"unknown block {block!r}{nearest(block, OPTIONS)}")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}")
        for kind, options in OPTIONS.items():
            given = getattr(self, kind)
            if not isinstance(given, options):
                raise TypeError(f"{kind} is {type(given).__name__}, wanted {options.__name__}")
            _check_settings(given, f"{kind}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, wanted 0 ≤ dropout < 1")
        _check_norm("out_norm", self.out_norm)

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
    norm: str = "rms"
    """norm in front of the head: none, rms or layer"""

    def __post_init__(self):
        super().__post_init__()
        _check_norm("norm", self.norm)


@dataclass(frozen=True)
class LinearConfig:
    """The linear path of a forecaster: which numbers it sees and in which units."""

    horizon: int = 1
    """steps forecast at once"""
    lookback: int = 1
    """steps of the target that it sees"""
    past: int = 0
    """steps of every past covariate that it sees"""
    n_past: int = 0
    """covariates of the past, those known for the future included"""
    n_future: int = 0
    """covariates known for the future"""
    n_dates: int = 0
    """numbers of the calendar that it sees, at the first step of the forecast; 0 leaves the calendar out"""
    center: str = "mean"
    """what is subtracted from a window: its mean, or its last value"""
    scale: str = "window"
    """what a window is counted in: its own deviation, or that of the whole series"""
    lately: int = 0
    """steps at the end of a window whose deviation it is counted in; 0: all"""
    own: int = 0
    """series that have weights of their own beside those of all"""

    def __post_init__(self):
        for name, known in (("center", ("mean", "last")), ("scale", ("window", "series"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, wanted {' or '.join(known)}")
        for name in ("horizon", "lookback"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at least 1 step")

    @property
    def features(self) -> int:
        """Numbers that the path sees, the constant included."""
        return self.lookback + self.past * self.n_past + self.horizon * self.n_future + self.n_dates + 1


@dataclass(frozen=True)
class ForecasterConfig(StackConfig):
    """The network of a forecaster: a stack over patches of the window, between an embedding and a head of quantiles."""

    d_model: int = 64
    """width of the residual stream"""
    n_layers: int = 2
    """number of blocks"""
    blocks: tuple[str, ...] = ("slstm",)
    """kinds of block, repeated in turn up to n_layers"""
    dropout: float = 0.1
    """dropout on the output of every mixer and feed-forward and in front of the head, in training"""
    # Memories of every length: what a patch says is kept, or not, from the first step on.
    slstm: SLSTMOptions = field(default_factory=lambda: SLSTMOptions(dense=True, forget_bias=(5.0, -5.0)))
    horizon: int = 1
    """steps forecast at once"""
    lookback: int = 8
    """steps of the past that the network sees, a multiple of patch"""
    patch: int = 8
    """steps a token"""
    n_past: int = 0
    """covariates of the past, those known for the future included"""
    n_future: int = 0
    """covariates known for the future"""
    n_dates: int = 0
    """numbers of the calendar"""
    n_static: int = 0
    """numbers a series"""
    recent: int = 0
    """latest steps that are read at once, with the covariates ahead; 0: none"""
    variates: str = "none"
    """how series of one panel see each other: none, attention, or slstm (both ways along the series)"""
    design: str = "patches"
    """patches: tokens are patches of time; recent: the latest steps alone; xlstmtime: tokens are the series, as in that paper"""
    quantiles: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975)
    """levels of the quantiles, the median in the middle"""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "quantiles", tuple(self.quantiles))
        q = self.quantiles
        if len(q) % 2 == 0 or not all(0 < a < b < 1 for a, b in itertools.pairwise(q)) or q[len(q) // 2] != 0.5:
            raise ValueError(f"quantiles are {q}, wanted rising levels between 0 and 1 with 0.5 in the middle")
        for name, known in {"variates": ("none", "attention", "slstm"), "design": DESIGNS}.items():
            if (came := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {came!r}{nearest(came, known)}")
        if self.horizon < 1 or self.patch < 1 or self.lookback < 1 or self.lookback % self.patch:
            came = f"horizon {self.horizon}, lookback {self.lookback}, patch {self.patch}"
            raise ValueError(f"{came}; wanted at least 1 each, and a lookback of whole patches")

    @property
    def grouped(self) -> bool:
        """Whether a batch holds whole panels: every series at one cut after the other."""
        return self.variates != "none" or self.design == "xlstmtime"


# For minutes on a CPU: after 150 steps this alternation is at 2.17 bits a byte, `mlstm` alone at 2.43.
_TURN = {"blocks": ("slstm", "mlstm"), "slstm": SLSTMOptions(4, dense=True), "mlstm": MLSTMOptions(conv_all=True)}
SIZES = {
    "nano": {"d_model": 96, "n_layers": 3, "n_heads": 3},
    "tiny": {"d_model": 160, "n_layers": 4, "n_heads": 4, **_TURN},
    "small": {"d_model": 384, "n_layers": 6, "n_heads": 6},
    "medium": {"d_model": 768, "n_layers": 12, "n_heads": 8},
    "large": {"d_model": 1024, "n_layers": 24, "n_heads": 8},
}


def from_dict(kind, values: dict, where: str = ""):
    """A config of dataclass `kind` from plain values, or with finished options of a block; an unknown key is a ValueError."""
    known = {f.name: f for f in fields(kind)}
    if not isinstance(values, dict):
        told = where.strip(".") or kind.__name__
        raise ValueError(f"{told} is {type(values).__name__}, wanted an object with keys {', '.join(known)}")
    for key in values:
        if key not in known:
            raise ValueError(f"unknown field {where + key!r}{nearest(key, known)}")
    nested = {
        k: from_dict(OPTIONS[k], v, f"{where}{k}.") if k in known and k in OPTIONS and type(v) is not OPTIONS[k] else v
        for k, v in values.items()
    }
    for key, value in nested.items():
        _check_kind(where + key, value, known[key].type)
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in nested.items()})
