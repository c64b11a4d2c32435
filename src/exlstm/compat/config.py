"""NX-AI's configurations, field for field with their defaults, and what they are in our words. Nothing is written into one."""

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

from exlstm.models.config import (
    NO_MEMORY,
    LanguageConfig,
    MLSTMOptions,
    MLSTMUpOptions,
    SLSTMOptions,
    StackConfig,
    nearest,
)

EPS = 1e-6
BACKENDS = ("cuda", "vanilla")
_KINDS = ("native_autograd", "native_custbw", "triton_limit_chunk", "triton_xl_chunk", "triton_xl_chunk_siging")
_PARALLEL = ("native_autograd", "native_custbw", "native_stablef_autograd", "native_stablef_custbw")
_PARALLEL += ("triton_limit_headdim", "native_siging_autograd", "native_siging_custbw")
KERNELS = {
    "chunkwise_kernel": (*(f"chunkwise--{kind}" for kind in _KINDS), *(f"parallel--{kind}" for kind in _PARALLEL)),
    "sequence_kernel": ("native_sequence__native", "native_sequence__triton"),
    "step_kernel": ("native", "triton"),
    "mode": ("train", "train_with_padding", "inference"),
}
THEIR_START = (3.0, 6.0)  # of the forget gates, from the first head to the last


@dataclass
class mLSTMLayerConfig:
    """Settings of their mLSTM layer."""

    proj_factor: float = 2.0
    round_proj_up_dim_up: bool = True
    round_proj_up_to_multiple_of: int = 64
    _proj_up_dim: Optional[int] = None  # noqa: UP045
    conv1d_kernel_size: int = 4
    qkv_proj_blocksize: int = 4
    num_heads: int = 4
    embedding_dim: int = -1
    bias: bool = False
    dropout: float = 0.0
    context_length: int = -1
    _num_blocks: int = 1
    _inner_embedding_dim: Optional[int] = None  # noqa: UP045


@dataclass
class mLSTMBlockConfig:
    """Settings of their mLSTM block."""

    mlstm: mLSTMLayerConfig = field(default_factory=mLSTMLayerConfig)
    _num_blocks: Optional[int] = None  # noqa: UP045
    _block_idx: Optional[int] = None  # noqa: UP045


@dataclass
class sLSTMLayerConfig:
    """Settings of their sLSTM layer and cell."""

    hidden_size: int = -1
    num_heads: int = 4
    num_states: int = 4
    backend: str = "cuda"
    function: str = "slstm"
    bias_init: Literal["powerlaw_blockdependent", "small_init", "standard", "zeros"] = "powerlaw_blockdependent"
    recurrent_weight_init: Literal["zeros", "standard"] = "zeros"
    _block_idx: int = 0
    _num_blocks: int = 1
    num_gates: int = 4
    gradient_recurrent_cut: bool = False
    gradient_recurrent_clipval: Optional[float] = None  # noqa: UP045
    forward_clipval: Optional[float] = None  # noqa: UP045
    batch_size: int = 8
    input_shape: str = "BSGNH"
    internal_input_shape: str = "SBNGH"
    output_shape: str = "BNSH"
    constants: dict = field(default_factory=dict)
    dtype: str = "bfloat16"
    dtype_b: Optional[str] = "float32"  # noqa: UP045
    dtype_r: Optional[str] = None  # noqa: UP045
    dtype_w: Optional[str] = None  # noqa: UP045
    dtype_g: Optional[str] = None  # noqa: UP045
    dtype_s: Optional[str] = None  # noqa: UP045
    dtype_a: Optional[str] = None  # noqa: UP045
    enable_automatic_mixed_precision: bool = True
    initial_val: Any = 0.0
    embedding_dim: int = -1
    conv1d_kernel_size: int = 4
    group_norm_weight: bool = True
    dropout: float = 0.0


@dataclass
class FeedForwardConfig:
    """Settings of their gated feed-forward."""

    proj_factor: float = 1.3
    round_proj_up_dim_up: bool = True
    round_proj_up_to_multiple_of: int = 64
    _proj_up_dim: Optional[int] = None  # noqa: UP045
    act_fn: str = "gelu"
    embedding_dim: int = -1
    dropout: float = 0.0
    bias: bool = False
    ff_type: str = "ffn_gated"
    _num_blocks: int = 1


@dataclass
class sLSTMBlockConfig:
    """Settings of their sLSTM block."""

    slstm: sLSTMLayerConfig = field(default_factory=sLSTMLayerConfig)
    feedforward: Optional[FeedForwardConfig] = field(default_factory=FeedForwardConfig)  # noqa: UP045
    _num_blocks: Optional[int] = None  # noqa: UP045
    _block_idx: Optional[int] = None  # noqa: UP045


@dataclass
class xLSTMBlockStackConfig:
    """Settings of their stack."""

    mlstm_block: Optional[mLSTMBlockConfig] = None  # noqa: UP045
    slstm_block: Optional[sLSTMBlockConfig] = None  # noqa: UP045
    context_length: int = -1
    num_blocks: int = 1
    embedding_dim: int = 128
    add_post_blocks_norm: bool = True
    bias: bool = False
    dropout: float = 0.0
    slstm_at: Union[list[int], Literal["all"]] = field(default_factory=list)  # noqa: UP007
    _block_map: Optional[str] = None  # noqa: UP045


@dataclass
class xLSTMLMModelConfig(xLSTMBlockStackConfig):
    """Settings of their language model."""

    vocab_size: int = -1
    tie_weights: bool = False
    weight_decay_on_embedding: bool = False
    add_embedding_dropout: bool = False


@dataclass
class xLSTMLargeConfig:
    """Settings of the architecture of xLSTM 7B."""

    embedding_dim: int
    num_heads: int
    num_blocks: int
    vocab_size: int
    use_bias: bool = False
    norm_eps: float = 1e-6
    norm_reduction_force_float32: bool = True
    add_out_norm: bool = True
    qk_dim_factor: float = 0.5
    v_dim_factor: float = 1.0
    chunkwise_kernel: str = "chunkwise--triton_limit_chunk"
    sequence_kernel: str = "native_sequence__triton"
    step_kernel: str = "triton"
    mode: str = "train"
    chunk_size: int = 64
    return_last_states: bool = False
    autocast_kernel_dtype: str = "bfloat16"
    eps: float = 1e-6
    inference_state_dtype: str = "float32"
    ffn_proj_factor: float = 2.6667
    ffn_round_up_to_multiple_of: int = 64
    gate_soft_cap: Optional[float] = 15.0  # noqa: UP045
    output_logit_soft_cap: Optional[float] = 30.0  # noqa: UP045
    weight_mode: str = "single"


def rounded(product: float, multiple: int, up: bool = True) -> int:
    """A width as their feed-forwards and projections round it."""
    whole, rest = divmod(round(product, 6), multiple)
    return int(whole + (up and rest > 0)) * multiple


def mlstm_options(layer: mLSTMLayerConfig, width: int) -> MLSTMUpOptions:
    """Their mLSTM layer of this width as a block of ours."""
    _refuse(layer.bias, "bias", "the maps of our mlstm_up block have no bias")
    inner = rounded(layer.proj_factor * width, layer.round_proj_up_to_multiple_of, layer.round_proj_up_dim_up)
    return MLSTMUpOptions(
        up_ratio=inner / width,
        conv=layer.conv1d_kernel_size,
        qkv_block=layer.qkv_proj_blocksize,
        forget_bias=THEIR_START,
        eps=EPS,
        m_start=NO_MEMORY,
        multiple=_multiple(inner),
    )


def slstm_options(block: sLSTMBlockConfig, width: int) -> SLSTMOptions:
    """Their sLSTM block of this width as one of ours."""
    layer = block.slstm
    _known("backend", layer.backend, BACKENDS)
    _refuse(layer.function != "slstm", f"function {layer.function!r}", "our sLSTM has 'slstm' alone")
    _refuse(layer.gradient_recurrent_cut, "gradient_recurrent_cut", "our gradients are exact")
    for name in ("gradient_recurrent_clipval", "forward_clipval"):
        _refuse(getattr(layer, name) is not None, name, "our sLSTM clips nothing")
    _refuse(layer.initial_val, f"initial_val {layer.initial_val}", "our memories begin empty")
    hidden = 0 if block.feedforward is None else hidden_width(block.feedforward, width)
    return SLSTMOptions(
        conv=layer.conv1d_kernel_size, n_heads=layer.num_heads, ffn_ratio=hidden / width, multiple=_multiple(hidden)
    )


def hidden_width(ffn: FeedForwardConfig, width: int) -> int:
    """The inner width of their feed-forward, which is the only one that we have: gated, with GELU."""
    _refuse(ffn.act_fn != "gelu", f"act_fn {ffn.act_fn!r}", "our gated feed-forward has 'gelu' alone")
    _refuse(ffn.ff_type != "ffn_gated", f"ff_type {ffn.ff_type!r}", "our feed-forward is gated")
    _refuse(ffn.bias, "bias", "our feed-forward has no bias")
    return rounded(ffn.proj_factor * width, ffn.round_proj_up_to_multiple_of, ffn.round_proj_up_dim_up)


def stack_config(config: xLSTMBlockStackConfig) -> StackConfig | LanguageConfig:
    """Their stack or language model as ours."""
    width, depth = config.embedding_dim, config.num_blocks
    _refuse(config.bias, "bias", "the maps of our blocks have no bias")
    if config.mlstm_block is None and config.slstm_block is None:
        raise ValueError("the configuration has neither mlstm_block nor slstm_block, wanted at least one")
    at = range(depth) if config.slstm_at == "all" or config.mlstm_block is None else config.slstm_at
    kinds = tuple("slstm" if i in at else "mlstm_up" for i in range(depth))
    if "slstm" in kinds and config.slstm_block is None:
        raise ValueError(f"slstm_at is {config.slstm_at}, and the configuration has no slstm_block")
    values = {"d_model": width, "n_layers": depth, "n_heads": 1, "blocks": kinds, "dropout": config.dropout}
    if config.slstm_block is not None:
        values |= {"slstm": slstm_options(config.slstm_block, width), "n_heads": config.slstm_block.slstm.num_heads}
    if config.mlstm_block is not None:
        layer = config.mlstm_block.mlstm
        values |= {"mlstm_up": mlstm_options(layer, width), "n_heads": layer.num_heads}
    norm = "layer" if config.add_post_blocks_norm else "none"
    if not isinstance(config, xLSTMLMModelConfig):
        return StackConfig(**values, out_norm=norm)
    return LanguageConfig(
        **values, norm=norm, logit_cap=0.0, vocab_size=config.vocab_size, tie_embeddings=config.tie_weights
    )


def large_config(config: xLSTMLargeConfig) -> LanguageConfig:
    """Their xLSTMLarge as ours."""
    for name, known in KERNELS.items():
        _known(name, getattr(config, name), known)
    _refuse(config.use_bias, "use_bias", "the maps of our mlstm block have no bias")
    _refuse(config.v_dim_factor != 1, f"v_dim_factor {config.v_dim_factor}", "our values are as wide as the model")
    _refuse(
        "siging" in config.chunkwise_kernel,
        config.chunkwise_kernel,
        "models of a sigmoid input gate are not translated",
    )
    width, multiple = config.embedding_dim, config.ffn_round_up_to_multiple_of
    hidden = rounded(int(width * config.ffn_proj_factor), multiple)
    options = MLSTMOptions(
        qk_ratio=int(width * config.qk_dim_factor) / width,
        conv=0,
        gate_cap=config.gate_soft_cap or 0.0,
        i_bias=-10.0,
        forget_bias=THEIR_START,
        out_start=1.0,
        eps=config.eps,
        ffn_ratio=hidden / width,
        multiple=_multiple(hidden),
    )
    return LanguageConfig(
        d_model=width,
        n_layers=config.num_blocks,
        n_heads=config.num_heads,
        mlstm=options,
        norm_eps=config.norm_eps,
        norm="rms" if config.add_out_norm else "none",
        vocab_size=config.vocab_size,
        logit_cap=config.output_logit_soft_cap or 0.0,
    )


def _multiple(width: int) -> int:
    return 64 if width % 64 == 0 else 1


def _refuse(wrong, what: str, why: str):
    if wrong:
        raise ValueError(f"the configuration says {what}, and {why}")


def _known(name: str, value: str, known: tuple[str, ...]):
    if value not in known:
        warnings.warn(f"{name} {value!r} is unknown{nearest(value, known)}; ours runs, chosen by device", stacklevel=4)
