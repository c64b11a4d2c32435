"""Stack: residual blocks of any kinds in a row, and the table of the kinds."""

from dataclasses import asdict

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from exlstm.layers import attention, basic, lstm, mamba2, mlstm, mlstm_up, mlstm_window, slstm
from exlstm.layers.token import hooked
from exlstm.models.config import StackConfig
from exlstm.ops.backend import blanked, kernels

# kind: (mixer, takes n_heads, norm, feed-forward). Attention and mLSTM blocks follow Llama and xLSTM 7B, the others
# the xLSTM paper.
BLOCKS = {
    "mlstm": (mlstm.mLSTM, True, basic.RMSNorm, basic.SwiGLU),
    "mlstm_up": (mlstm_up.mLSTMUp, True, basic.LayerNorm, None),
    "mlstm_window": (mlstm_window.mLSTMWindow, True, basic.RMSNorm, basic.SwiGLU),
    "slstm": (slstm.sLSTM, True, basic.LayerNorm, basic.GatedGELU),
    "attention": (attention.Attention, True, basic.RMSNorm, basic.SwiGLU),
    "mamba2": (mamba2.Mamba2, False, basic.RMSNorm, basic.SwiGLU),
    "lstm": (lstm.LSTM, False, basic.LayerNorm, basic.GatedGELU),
}

NORMS = {"none": None, "rms": basic.RMSNorm, "layer": basic.LayerNorm}


def make_norm(kind: str, config: StackConfig, device=None, dtype=None) -> nn.Module:
    """The norm of this name over d_model; "none" leaves its input as it is."""
    return nn.Identity() if NORMS[kind] is None else NORMS[kind](config.d_model, device=device, dtype=dtype)


def set_eps(module: nn.Module, eps: float):
    """`eps` in every norm of a module; 0 leaves each its own."""
    for part in module.modules():
        if eps and isinstance(part, basic.RMSNorm | basic.LayerNorm | basic.HeadNorm):
            part.eps = eps


def _after(norm, x, y):
    """The norm of x + y, and x + y, in one where nobody listens to the norm; y None adds nothing."""
    if type(norm) in (basic.RMSNorm, basic.LayerNorm) and not hooked(norm):
        return norm.after(x, y)
    x = x if y is None else x + y
    return norm(x), x


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)) where the kind has a feed-forward."""

    def __init__(self, kind: str, config: StackConfig, device=None, dtype=None):
        super().__init__()
        mixer, has_heads, norm, ffn = BLOCKS[kind]
        options = asdict(getattr(config, kind))
        ratio = options.pop("ffn_ratio", 0)
        multiple = options.pop("multiple") if ffn and "multiple" in options else 64
        heads = (options.pop("n_heads", 0) or config.n_heads,) if has_heads else ()
        self.norm = norm(config.d_model, device=device, dtype=dtype)
        self.mixer = mixer(config.d_model, *heads, **options, device=device, dtype=dtype)
        self.ffn_norm = self.ffn = None
        if ffn and ratio:
            self.ffn_norm = norm(config.d_model, device=device, dtype=dtype)
            self.ffn = ffn(config.d_model, basic.width(ratio, config.d_model, multiple), device=device, dtype=dtype)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None

    def forward(self, x, state=None, *, mask=None, reset=None):
        """x (B, T, D), or a pair whose sum is meant, the second one perhaps None; what comes back has the same form."""
        # The next norm works out a sum that waits on its way: neither x nor its gradient is moved for the sum alone.
        apart = isinstance(x, tuple)
        n, x = _after(self.norm, *x) if apart else (self.norm(x), x)
        y, state = self.mixer(n, state, mask=mask, reset=reset)
        y = self.dropout(y) if self.dropout else y
        if self.ffn is not None:
            n, x = _after(self.ffn_norm, x, y)
            y = self.ffn(n)
            y = self.dropout(y) if self.dropout else y
        return ((x, y) if apart else x + y), state

    def reset_parameters(self):
        for part in (self.norm, self.mixer, self.ffn_norm, self.ffn):
            if part is not None:
                part.reset_parameters()


@torch.no_grad()
def scale_outputs(blocks, depth: int):
    """What blocks add to a residual stream, scaled so that the sum keeps its size at any depth (GPT-2, section 2.3)."""
    for block in blocks:
        for part in (block.mixer, block.ffn):
            if isinstance(getattr(part, "out", None), nn.Linear):
                part.out.weight.mul_((2 * depth) ** -0.5)


class Stack(nn.Module):
    """Residual blocks over (B, T, d_model); the state is a tuple with one entry a block.

    >>> stack = Stack(StackConfig(d_model=64, n_layers=4, blocks=["mlstm", "slstm"]))
    >>> y, state = stack(torch.randn(2, 10, 64))
    >>> y, state = stack(torch.randn(2, 1, 64), state)
    """

    def __init__(self, config: StackConfig, device=None, dtype=None):
        super().__init__()
        if not isinstance(config, StackConfig):
            raise TypeError(f"config is {type(config).__name__}, wanted a StackConfig")
        self.config = config
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList(Block(kind, config, device, dtype) for kind in config.layers())
        self.norm = make_norm(config.out_norm, config, device, dtype)
        set_eps(self, config.norm_eps)
        scale_outputs(self.blocks, len(self.blocks))

    def reset_parameters(self):
        for block in self.blocks:
            block.reset_parameters()
        if not isinstance(self.norm, nn.Identity):
            self.norm.reset_parameters()
        scale_outputs(self.blocks, len(self.blocks))

    def forward(self, x, state=None, *, lengths=None, mask=None, reset=None, between: list | None = None):
        """y (B, T, d_model) and the state after the last token; `lengths` (B,), `mask` and `reset` (B, T) as in every layer.

        `between` gets what stands behind every block (B, T, d_model), the last without the norm of the stack.
        """
        self._check(x, state)
        mask = basic.valid_mask(lengths, mask, *x.shape[:2], x.device)
        x = blanked(x, mask)
        # A sum on its way is between our own blocks; whoever listens to one, or stands in its place, gets x and gives x.
        ours = all(type(block) is Block and not hooked(block) for block in self.blocks)
        states, apart = [], ours and kernels(x)
        x = (x, None) if apart else x
        # Only dropout draws, and nothing asks for the state of the draws while a graph is recorded.
        random = max(self.config.dropout, self.config.attention.dropout) > 0
        for i, block in enumerate(self.blocks):
            before = None if state is None else state[i]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, after = checkpoint(
                    block, x, before, mask=mask, reset=reset, use_reentrant=False, preserve_rng_state=random
                )
            else:
                x, after = block(x, before, mask=mask, reset=reset)
            states.append(after)
            if between is not None:
                between.append(x[0] + x[1] if apart else x)
        return self.norm(x[0] + x[1] if apart else x), tuple(states)

    def filled(self, state):
        """The same state at the size at which it stops growing: with windows as long as they get, in part unseen."""
        # Somebody's module may stand in a block's place, and has no mixer.
        mixers = [getattr(block, "mixer", None) for block in self.blocks]
        return tuple(m.filled(s) if hasattr(m, "filled") else s for m, s in zip(mixers, state, strict=True))

    def _check(self, x, state):
        basic.check_input(x, self.config.d_model)
        if state is not None and (not isinstance(state, tuple | list) or len(state) != len(self.blocks)):
            came = f"{len(state)} entries" if isinstance(state, tuple | list) else type(state).__name__
            raise ValueError(f"state has {came}, wanted one entry for each of the {len(self.blocks)} blocks")
