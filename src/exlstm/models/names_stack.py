"""xLSTMBlockStack and xLSTMLMModel, in either layout of the sLSTM: their names and settings as ours."""

from __future__ import annotations

from functools import partial

import torch

from exlstm.models.config import NO_MEMORY, LanguageConfig, MLSTMUpOptions, SLSTMOptions, StackConfig, nearest
from exlstm.models.names import Family, Map, agree, depth, joined, rounding, rows, whole

# The fields of their configurations, by where they stand; those with _ in front are filled in there.
_MAP = "proj_factor round_proj_up_dim_up round_proj_up_to_multiple_of embedding_dim bias dropout"
FIELDS = {
    "": "mlstm_block slstm_block context_length num_blocks embedding_dim add_post_blocks_norm bias dropout slstm_at "
    "vocab_size tie_weights weight_decay_on_embedding add_embedding_dropout",
    "mlstm_block": "mlstm",
    "mlstm_block.mlstm": f"{_MAP} conv1d_kernel_size qkv_proj_blocksize num_heads context_length",
    "slstm_block": "slstm feedforward",
    "slstm_block.slstm": "hidden_size num_heads num_states backend function bias_init recurrent_weight_init num_gates "
    "gradient_recurrent_cut gradient_recurrent_clipval forward_clipval batch_size input_shape internal_input_shape "
    "output_shape constants dtype dtype_b dtype_r dtype_w dtype_g dtype_s dtype_a enable_automatic_mixed_precision "
    "initial_val embedding_dim conv1d_kernel_size group_norm_weight dropout",
    "slstm_block.feedforward": f"{_MAP} act_fn ff_type",
}


def stack_config(shapes: dict, family: Family, given: dict) -> StackConfig:
    """Our configuration from the shapes of their weights and their configuration, which may be empty."""
    prefix = f"{family.root}{'xlstm_block_stack.' * family.is_lm}"
    blocks, n_layers = f"{prefix}blocks.", depth(shapes, f"{prefix}blocks.")
    kinds = tuple("slstm" if f"{blocks}{i}.xlstm.slstm_cell._bias_" in shapes else "mlstm_up" for i in range(n_layers))
    first = {kind: f"{blocks}{kinds.index(kind)}." for kind in kinds}
    d_model, heads, values = shapes[f"{blocks}0.xlstm_norm.weight"][0], 1, {}
    agree(given, {"num_blocks": n_layers, "embedding_dim": d_model})
    if "slstm" in first:
        values["slstm"], heads = _slstm_options(shapes, first["slstm"], d_model)
    if "mlstm_up" in first:
        values["mlstm_up"], heads = _mlstm_options(shapes, first["mlstm_up"], d_model)
    values |= {"d_model": d_model, "n_layers": n_layers, "n_heads": heads, "blocks": kinds}
    values |= {"dropout": float(given.get("dropout", 0.0))}
    norm = "layer" if f"{prefix}post_blocks_norm.weight" in shapes else "none"
    if not family.is_lm:
        return StackConfig(**values, out_norm=norm)
    vocabulary = shapes[family.embedding][0]
    agree(given, {"vocab_size": vocabulary})
    tied = bool(given.get("tie_weights", False)) or f"{family.root}lm_head.weight" not in shapes
    return LanguageConfig(**values, norm=norm, logit_cap=0.0, vocab_size=vocabulary, tie_embeddings=tied)


def _mlstm_options(shapes, block, d_model):
    layer = f"{block}xlstm."
    inner, side = shapes[f"{layer}learnable_skip"][0], shapes[f"{layer}q_proj.weight"][-1]
    options = MLSTMUpOptions(
        up_ratio=inner / d_model,
        conv=shapes[f"{layer}conv1d.conv.weight"][-1],
        qkv_block=side,
        eps=1e-6,
        m_start=NO_MEMORY,
        multiple=rounding(inner),
    )
    return options, shapes[f"{layer}mlstm_cell.igate.bias"][0]


def _slstm_options(shapes, block, d_model):
    layer, convolution = f"{block}xlstm.", f"{block}xlstm.conv1d.conv.weight"
    up = shapes.get(f"{block}ffn.proj_up.weight")
    hidden, heads = (up[0] // 2 if up else 0), shapes[f"{layer}slstm_cell._recurrent_kernel_"][0]
    options = SLSTMOptions(
        conv=shapes[convolution][-1] if convolution in shapes else 0,
        n_heads=heads,
        ffn_ratio=hidden / d_model,
        multiple=rounding(hidden),
    )
    return options, heads


def check_stack(given: dict):
    """Settings that our blocks have not, and names that are none of theirs."""
    for where, known in FIELDS.items():
        for name in _inner(given, *filter(None, where.split("."))):
            if not name.startswith("_") and name not in known.split():
                place = f"{where}.{name}".lstrip(".")
                raise ValueError(f"the configuration has the unknown field {place!r}{nearest(name, known.split())}")
    slstm, ffn = (_inner(given, "slstm_block", name) for name in ("slstm", "feedforward"))
    for where, values, name, wanted in (
        ("slstm", slstm, "function", "slstm"),
        ("feedforward", ffn, "act_fn", "gelu"),
        ("feedforward", ffn, "ff_type", "ffn_gated"),
    ):
        if values.get(name, wanted) != wanted:
            raise ValueError(
                f"the configuration says {where}.{name} {values[name]!r}, and our slstm block has {wanted!r} alone"
            )


def _inner(given: dict, *names: str) -> dict:
    for name in names:
        given = given.get(name) or {}
    return given


def stack_map(config: StackConfig, family: Family, shapes: dict) -> Map:
    """Our names -> their weights."""
    prefix = f"{family.root}{'xlstm_block_stack.' * family.is_lm}"
    found, ours = {}, "stack." * family.is_lm
    for i, kind in enumerate(config.layers()):
        block = {"slstm": _slstm_map, "mlstm_up": _mlstm_map}[kind]
        found |= {f"{ours}blocks.{i}.{name}": take for name, take in block(f"{prefix}blocks.{i}.", shapes).items()}
    if f"{prefix}post_blocks_norm.weight" in shapes:
        found["norm.weight"] = _residual(f"{prefix}post_blocks_norm.weight")
    if family.is_lm:
        found["embedding.weight"] = whole(family.embedding)
        if not config.tie_embeddings:
            found["head.weight"] = whole(f"{family.root}lm_head.weight")
    return found


def _mlstm_map(block: str, shapes: dict) -> Map:
    layer = f"{block}xlstm."
    gates = {
        f"mixer.gate.{part}": joined(*(f"{layer}mlstm_cell.{gate}.{part}" for gate in ("igate", "fgate")))
        for part in ("weight", "bias")
    }
    return gates | {
        "norm.weight": _residual(f"{block}xlstm_norm.weight"),
        "mixer.up.weight": whole(f"{layer}proj_up.weight"),
        **_convolution(layer),
        "mixer.qkv": lambda take: torch.stack([take(f"{layer}{name}_proj.weight") for name in "qkv"]),
        "mixer.norm.weight": _residual(f"{layer}mlstm_cell.outnorm.weight"),
        "mixer.skip": whole(f"{layer}learnable_skip"),
        "mixer.out.weight": whole(f"{layer}proj_down.weight"),
    }


def _slstm_map(block: str, shapes: dict) -> Map:
    layer = f"{block}xlstm."
    kernel = f"{layer}slstm_cell._recurrent_kernel_"
    heads, width = shapes[kernel][0], shapes[f"{layer}fgate.weight"][-1]
    # The two layouts of the kernel differ in shape, but those of the bias do not: the kernel tells both.
    is_cuda = tuple(shapes[kernel][1:]) == (width, 4 * width) and width > 0
    found = {
        "norm.weight": _residual(f"{block}xlstm_norm.weight"),
        **(_convolution(layer) if f"{layer}conv1d.conv.weight" in shapes else {}),
        # Their `fgate` feeds the input gate and their `igate` the forget gate.
        "mixer.w": lambda take: torch.cat([take(f"{layer}{gate}gate.weight") for gate in "fizo"], 1),
        "mixer.r": partial(_recurrent, kernel, heads, width, is_cuda),
        "mixer.b": partial(_bias, f"{layer}slstm_cell._bias_", heads, width, is_cuda),
        "mixer.norm.weight": _residual(f"{layer}group_norm.weight", heads * width, shapes),
    }
    if f"{block}ffn.proj_up.weight" in shapes:
        up = f"{block}ffn.proj_up.weight"
        hidden = shapes[up][0] // 2
        found |= {
            "ffn_norm.weight": _residual(f"{block}ffn_norm.weight"),
            "ffn.gate.weight": rows(up, 0, hidden),
            "ffn.up.weight": rows(up, hidden, 2 * hidden),
            "ffn.out.weight": whole(f"{block}ffn.proj_down.weight"),
        }
    return found


def _recurrent(name, heads, width, is_cuda, take):
    kernel = take(name)
    if is_cuda:
        return kernel.view(heads, width, 4, width).permute(0, 2, 3, 1)  # (H, in, gate, out) -> (H, gate, out, in)
    return kernel.view(heads, 4, width, width)


def _bias(name, heads, width, is_cuda, take):
    bias = take(name)
    return bias.view(heads, 4, width) if is_cuda else bias.view(4, heads, width).transpose(0, 1)


def _convolution(layer: str) -> Map:
    return {
        "mixer.conv.weight": lambda take: take(f"{layer}conv1d.conv.weight").squeeze(1),
        "mixer.conv.bias": whole(f"{layer}conv1d.conv.bias"),
    }


def _residual(name: str, width: int = 0, shapes: dict | None = None):
    """A norm's weight is kept as what it adds to 1; a norm without a weight of its own scales by 1."""
    if shapes is not None and name not in shapes:
        return lambda take: torch.ones(width)
    return lambda take: 1 + take(name)
