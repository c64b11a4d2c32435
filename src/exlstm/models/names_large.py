"""xLSTMLarge, single and fused, and transformers' xLSTMForCausalLM: their names and settings as ours, and ours as theirs."""

from __future__ import annotations

from exlstm.layers.basic import width
from exlstm.models.config import LanguageConfig, MLSTMOptions, nearest
from exlstm.models.names import Family, Map, agree, depth, joined, rounding, rows, whole

# Settings of xLSTMLarge and of transformers' xLSTMConfig that shapes do not tell, where the configuration is silent.
LARGE_DEFAULTS = {"eps": 1e-6, "norm_eps": 1e-6, "gate_soft_cap": 15.0, "output_logit_soft_cap": 30.0}
# Their other settings: of how it is computed, or of training.
LARGE_OTHERS = (
    *("embedding_dim", "hidden_size", "num_heads", "num_blocks", "num_hidden_layers", "vocab_size", "use_bias"),
    *("norm_reduction_force_float32", "add_out_norm", "qk_dim_factor", "v_dim_factor", "chunkwise_kernel"),
    *("sequence_kernel", "step_kernel", "mode", "chunk_size", "return_last_states", "autocast_kernel_dtype"),
    *("inference_state_dtype", "ffn_proj_factor", "ffn_round_up_to_multiple_of", "weight_mode"),
)


def large_config(shapes: dict, family: Family, given: dict) -> LanguageConfig:
    """Our configuration from the shapes of their weights and their configuration, which may be empty."""
    blocks = f"{family.root}backbone.blocks."
    layer, ffn = f"{blocks}0.mlstm_layer.", f"{blocks}0.ffn."
    d_model, n_layers = shapes[f"{blocks}0.norm_mlstm.weight"][0], depth(shapes, blocks)
    if family.is_fused:
        heads = shapes[f"{layer}ifgate_preact.bias"][0] // 2
        keys = (shapes[f"{layer}qkv_opreact.weight"][0] - 2 * d_model) // 2
        hidden = shapes[f"{ffn}proj_up_gate_z.weight"][0] // 2
    else:
        heads, keys = shapes[f"{layer}igate_preact.bias"][0], shapes[f"{layer}q.weight"][0]
        hidden = shapes[f"{ffn}proj_up.weight"][0]
    vocabulary = shapes[family.embedding][0]
    told = {"embedding_dim": d_model, "hidden_size": d_model, "num_heads": heads, "vocab_size": vocabulary}
    agree(given, {**told, "num_blocks": n_layers, "num_hidden_layers": n_layers, "v_dim_factor": 1.0})
    held = {name: given.get(name, value) for name, value in LARGE_DEFAULTS.items()}
    options = MLSTMOptions(
        qk_ratio=keys / d_model,
        conv=0,
        gate_cap=float(held["gate_soft_cap"] or 0),
        eps=float(held["eps"]),
        ffn_ratio=hidden / d_model,
        multiple=rounding(hidden),
    )
    return LanguageConfig(
        d_model=d_model,
        n_layers=n_layers,
        n_heads=heads,
        blocks=("mlstm",),
        mlstm=options,
        vocab_size=vocabulary,
        norm_eps=float(held["norm_eps"]),
        norm="rms" if f"{family.root}backbone.out_norm.weight" in shapes else "none",
        logit_cap=float(held["output_logit_soft_cap"] or 0),
        tie_embeddings=f"{family.root}lm_head.weight" not in shapes,
    )


def check_large(given: dict):
    """Settings that our mlstm block has not, and, of xLSTMLarge's own configuration, names that it has not."""
    if given.get("use_bias"):
        raise ValueError("the configuration says use_bias, and the maps of our mlstm block have no bias")
    if "siging" in str(given.get("chunkwise_kernel")):
        kernel = given["chunkwise_kernel"]
        raise ValueError(f"the configuration says {kernel!r}, a sigmoid input gate, whose weights are not translated")
    if "model_type" not in given:
        known = [*LARGE_DEFAULTS, *LARGE_OTHERS]
        for name in given:
            if name not in known:
                raise ValueError(f"the configuration has the unknown field {name!r}{nearest(name, known)}")


def large_map(config: LanguageConfig, family: Family) -> Map:
    """Our names -> their weights."""
    root, keys, fused = family.root, round(config.d_model * config.mlstm.qk_ratio), family.is_fused
    found = {"embedding.weight": whole(family.embedding)}
    if config.norm != "none":
        found["norm.weight"] = whole(f"{root}backbone.out_norm.weight")
    if not config.tie_embeddings:
        found["head.weight"] = whole(f"{root}lm_head.weight")
    for i in range(config.n_layers):
        ours, theirs = f"stack.blocks.{i}.", f"{root}backbone.blocks.{i}."
        layer, ffn = f"{theirs}mlstm_layer.", f"{theirs}ffn."
        found[f"{ours}norm.weight"] = whole(f"{theirs}norm_mlstm.weight")
        found[f"{ours}ffn_norm.weight"] = whole(f"{theirs}norm_ffn.weight")
        found[f"{ours}mixer.norm.weight"] = whole(f"{layer}multihead_norm.weight")
        found[f"{ours}mixer.out.weight"] = whole(f"{layer}out_proj.weight")
        found[f"{ours}ffn.out.weight"] = whole(f"{ffn}proj_down.weight")
        if fused:
            start, hidden = 0, None
            for name, size in (("q", keys), ("k", keys), ("v", config.d_model), ("o", config.d_model)):
                found[f"{ours}mixer.{name}.weight"] = rows(f"{layer}qkv_opreact.weight", start, start + size)
                start += size
            for part in ("weight", "bias"):
                found[f"{ours}mixer.gate.{part}"] = whole(f"{layer}ifgate_preact.{part}")
            hidden = _hidden(config)
            found[f"{ours}ffn.gate.weight"] = rows(f"{ffn}proj_up_gate_z.weight", 0, hidden)
            found[f"{ours}ffn.up.weight"] = rows(f"{ffn}proj_up_gate_z.weight", hidden, 2 * hidden)
            continue
        for name, their in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "ogate_preact")):
            found[f"{ours}mixer.{name}.weight"] = whole(f"{layer}{their}.weight")
        for part in ("weight", "bias"):
            found[f"{ours}mixer.gate.{part}"] = joined(f"{layer}igate_preact.{part}", f"{layer}fgate_preact.{part}")
        found[f"{ours}ffn.gate.weight"] = whole(f"{ffn}proj_up_gate.weight")
        found[f"{ours}ffn.up.weight"] = whole(f"{ffn}proj_up.weight")
    return found


def _hidden(config) -> int:
    return width(config.mlstm.ffn_ratio, config.d_model, config.mlstm.multiple)


def check_export(config: LanguageConfig):
    """ValueError: what of a model the layout of xLSTMLarge has not."""
    options, reasons = config.mlstm, []
    for kind in dict.fromkeys(config.layers()):
        if kind != "mlstm":
            reasons.append(f"blocks of kind {kind}")
    if not reasons:
        reasons += ["a convolution in its mlstm blocks"] * bool(options.conv)
        reasons += ["mlstm blocks without a feed-forward"] * (not options.ffn_ratio)
        reasons += [f"an input gate of kind {options.i_gate} in its mlstm blocks"] * (options.i_gate != "exp")
        reasons += ["mlstm blocks without a normaliser"] * (not options.normalize)
    reasons += [f"a norm of kind {config.norm} in front of the head"] * (config.norm == "layer")
    reasons += ["a norm behind the last block and one in front of the head"] * (config.out_norm != "none")
    if reasons:
        raise ValueError(f"the model has {', '.join(reasons)}, which the layout of xLSTMLarge has not")


def large_export(config: LanguageConfig, is_hf: bool) -> Map:
    """Their names -> our weights, in the single layout."""
    found = {
        "backbone.embeddings.weight" if is_hf else "embedding.weight": whole("embedding.weight"),
        "lm_head.weight": whole("embedding.weight" if config.tie_embeddings else "head.weight"),
    }
    if config.norm != "none":
        found["backbone.out_norm.weight"] = whole("norm.weight")
    for i in range(config.n_layers):
        ours, theirs = f"stack.blocks.{i}.", f"backbone.blocks.{i}."
        for name, their in (
            *(("norm", "norm_mlstm"), ("ffn_norm", "norm_ffn"), ("mixer.norm", "mlstm_layer.multihead_norm")),
            *((f"mixer.{name}", f"mlstm_layer.{name}") for name in "qkv"),
            *(("mixer.o", "mlstm_layer.ogate_preact"), ("mixer.out", "mlstm_layer.out_proj")),
            *(("ffn.gate", "ffn.proj_up_gate"), ("ffn.up", "ffn.proj_up"), ("ffn.out", "ffn.proj_down")),
        ):
            found[f"{theirs}{their}.weight"] = whole(f"{ours}{name}.weight")
        for part in ("weight", "bias"):
            gate, heads = f"{ours}mixer.gate.{part}", config.n_heads
            found[f"{theirs}mlstm_layer.igate_preact.{part}"] = rows(gate, 0, heads)
            found[f"{theirs}mlstm_layer.fgate_preact.{part}"] = rows(gate, heads, 2 * heads)
    return found


def large_settings(config: LanguageConfig, keys: int) -> dict:
    """The fields of xLSTMLargeConfig that give our widths; `keys` is the width of all queries."""
    d_model, hidden = config.d_model, _hidden(config)
    return {
        "embedding_dim": d_model,
        "num_heads": config.n_heads,
        "num_blocks": config.n_layers,
        "vocab_size": config.vocab_size,
        "use_bias": False,
        "norm_eps": config.norm_eps or 1e-6,
        "norm_reduction_force_float32": True,
        "add_out_norm": config.norm != "none",
        "qk_dim_factor": _factor(keys, d_model),
        "v_dim_factor": 1.0,
        "eps": config.mlstm.eps,
        "ffn_proj_factor": _factor(hidden, d_model),
        "ffn_round_up_to_multiple_of": rounding(hidden),
        "gate_soft_cap": config.mlstm.gate_cap or None,
        "output_logit_soft_cap": config.logit_cap or None,
        "weight_mode": "single",
    }


def _factor(wanted: int, d_model: int) -> float:
    """What d_model is multiplied by; they cut the product down to a whole number."""
    factor = wanted / d_model
    return factor if int(d_model * factor) == wanted else (wanted + 0.25) / d_model
