"""The models that a row of the scoreboard may name: their blocks in turn, their settings beside the defaults. Free of torch."""

from exlstm.models.config import nearest

# Attention of the hybrids: without positions, and as far as the longest text that any row learns from, so that a token of a
# longer one never sees more than it has learnt to.
_BOUNDED = {"attention": {"rope_base": 0.0, "window": 2048}}
_EIGHTH, _SECOND = (*["matrix"] * 7, "attention"), ("matrix", "slstm", *["matrix"] * 6)
# name -> (blocks in turn, settings of the kinds beside the defaults); "matrix" is the row's kind of mLSTM block.
MODELS = {
    "xlstm[1:0]": (("matrix",), {}),
    "xlstm[0:1]": (("slstm",), {}),
    "xlstm[1:1]": (("matrix", "slstm"), {}),
    "xlstm[7:1]": (_SECOND, {}),
    "hybrid[3:1]": (("matrix", "matrix", "matrix", "attention"), _BOUNDED),
    "hybrid[1:1]": (("matrix", "attention"), _BOUNDED),
    "hybrid[7:1]": (_EIGHTH, _BOUNDED),
    "hybrid[7:1]-conv-all": (_EIGHTH, {**_BOUNDED, "matrix": {"conv_all": True}}),
    "hybrid[7:1]-unbounded": (_EIGHTH, {"attention": {"rope_base": 0.0, "window": 0}}),
    "hybrid[7:1]-early": (("matrix", "matrix", "attention", *["matrix"] * 5), _BOUNDED),
    "hybrid[7:1]-window": (_EIGHTH, {"attention": {"rope_base": 0.0, "window": 1024, "sinks": 4}}),
    "mlstm_window": (("mlstm_window",), {}),
    # As the memories started before: nearly closed, and their output maps as large as the others.
    "xlstm[7:1]-closed-loud": (_SECOND, {"matrix": {"i_bias": -10.0, "out_start": 1.0}}),
    "xlstm[7:1]-wide-keys": (_SECOND, {"matrix": {"qk_ratio": 1.0}}),
    # A row that reads a text says how much of it attention sees, for all models that say nothing of their own.
    "transformer": (("attention",), {}),
    "transformer-unbounded": (("attention",), {"attention": {"window": 0}}),
    "transformer-quiet": (("attention",), {"attention": {"out_start": 0.1}}),
    "mamba2": (("mamba2",), {}),
    # As large as in the published language models; heads of 128 / 64 take the kernels in plain Triton, those of 64 / 64 do not.
    "mamba2-state-128": (("mamba2",), {"mamba2": {"d_state": 128}}),
    "lstm": (("lstm",), {}),
    # What a block is made of, one change at a time. `mlstm` is the post-up block with the convolution, without it that of
    # xLSTM 7B; `mlstm_up` is the pre-up block. The sLSTM without its exponential gate is the LSTM.
    "mlstm": (("mlstm",), {}),
    "mlstm-wide-keys": (("mlstm",), {"mlstm": {"qk_ratio": 1.0}}),
    "mlstm_up": (("mlstm_up",), {}),
    "mlstm-conv-all": (("mlstm",), {"mlstm": {"conv_all": True}}),
    "mlstm-no-conv": (("mlstm",), {"mlstm": {"conv": 0}}),
    "mlstm-closed": (("mlstm",), {"mlstm": {"i_bias": -10.0}}),
    "mlstm-loud": (("mlstm",), {"mlstm": {"out_start": 1.0}}),
    "mlstm-closed-loud": (("mlstm",), {"mlstm": {"i_bias": -10.0, "out_start": 1.0}}),
    "mlstm-i-bias-0": (("mlstm",), {"mlstm": {"i_bias": 0.0}}),
    "mlstm-no-cap": (("mlstm",), {"mlstm": {"gate_cap": 0.0}}),
    "mlstm-sigmoid": (("mlstm",), {"mlstm": {"i_gate": "sigmoid"}}),
    "mlstm-no-normaliser": (("mlstm",), {"mlstm": {"normalize": False}}),
    "mlstm-sigmoid-no-normaliser": (("mlstm",), {"mlstm": {"i_gate": "sigmoid", "normalize": False}}),
    "memory-forget-3-to-6": (("matrix",), {"matrix": {"forget_bias": (3.0, 6.0)}}),
    "memory-forget-3-to-12": (("matrix",), {"matrix": {"forget_bias": (3.0, 12.0)}}),
    "memory-forget-6-to-12": (("matrix",), {"matrix": {"forget_bias": (6.0, 12.0)}}),
    "memory-forget-9-to-12": (("matrix",), {"matrix": {"forget_bias": (9.0, 12.0)}}),
    "memory-forget-0-to-12": (("matrix",), {"matrix": {"forget_bias": (0.0, 12.0)}}),
    # Nothing is forgotten, so that a count of thousands is as exact as one of ten.
    "mlstm-forget-18": (("mlstm",), {"mlstm": {"forget_bias": (18.0, 18.0), "gate_cap": 0.0}}),
    "mlstm-forget-18-no-normaliser": (
        ("mlstm",),
        {"mlstm": {"forget_bias": (18.0, 18.0), "gate_cap": 0.0, "normalize": False}},
    ),
    "slstm-conv": (("slstm",), {"slstm": {"conv": 4}}),
    "slstm-dense": (("slstm",), {"slstm": {"dense": True}}),
    "slstm-forget-5-to-5": (("slstm",), {"slstm": {"forget_bias": (5.0, -5.0)}}),
    "slstm-forget-2-to-6": (("slstm",), {"slstm": {"forget_bias": (2.0, -6.0)}}),
    "slstm-forget-0": (("slstm",), {"slstm": {"forget_bias": (0.0, 0.0)}}),
    "slstm-recurrent-0": (("slstm",), {"slstm": {"recurrent_start": 0.0}}),
    "slstm-recurrent-0.5": (("slstm",), {"slstm": {"recurrent_start": 0.5}}),
    "slstm-recurrent-1": (("slstm",), {"slstm": {"recurrent_start": 1.0}}),
    "slstm-recurrent-2.5": (("slstm",), {"slstm": {"recurrent_start": 2.5}}),
}
# The outside control, where the package xlstm is installed: its blocks at its own defaults, by the places of the sLSTM.
THEIRS = {"nx-ai[1:0]": "none", "nx-ai[0:1]": "all", "nx-ai[1:1]": "second"}


def near(name: str) -> str:
    """What may be meant by the unknown name of a model: one that is of blocks of this name alone, or a name like it."""
    alone = [model for model, made in MODELS.items() if made == ((name,), {})]
    return f"; {alone[0]!r} is of such blocks alone" if alone else nearest(name, (*MODELS, *THEIRS))
