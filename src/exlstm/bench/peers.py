"""The peers, imported when they are asked for and run as black boxes through their public functions."""

from importlib import import_module

from torch import nn

from exlstm.layers.basic import LayerNorm
from exlstm.models.config import SLSTMOptions, StackConfig
from exlstm.models.stack import Stack

# The stack in the README of xlstm 2.0.6, in our words and in theirs.
WIDTH, HEADS, LAYERS, SLSTM_AT = 128, 4, 7, 1


def find(module: str):
    """The module, or None with one printed sentence where this interpreter cannot import it."""
    try:
        return import_module(module)
    except ImportError as error:
        print(f"{module} cannot be imported here ({error}): ours is measured alone")
        return None


class Readme(nn.Module):
    """The README's stack out of our blocks, with the norm that stands behind it there."""

    def __init__(self, device="cpu"):
        super().__init__()
        blocks = ["mlstm_up"] * LAYERS
        blocks[SLSTM_AT] = "slstm"
        options = SLSTMOptions(conv=4, ffn_ratio=1.3)
        config = StackConfig(d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, blocks=tuple(blocks), slstm=options)
        self.stack, self.norm = Stack(config, device=device), LayerNorm(WIDTH, device=device)

    def forward(self, x, state=None):
        y, state = self.stack(x, state)
        return self.norm(y), state


def their_stack(length: int, device="cpu"):
    """The README's stack of xlstm with its plain PyTorch sLSTM, or None where xlstm is not installed."""
    xlstm = find("xlstm")
    if xlstm is None:
        return None
    mlstm = xlstm.mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=HEADS)
    slstm = xlstm.sLSTMLayerConfig(
        backend="vanilla", num_heads=HEADS, conv1d_kernel_size=4, bias_init="powerlaw_blockdependent"
    )
    config = xlstm.xLSTMBlockStackConfig(
        mlstm_block=xlstm.mLSTMBlockConfig(mlstm=mlstm),
        slstm_block=xlstm.sLSTMBlockConfig(
            slstm=slstm, feedforward=xlstm.FeedForwardConfig(proj_factor=1.3, act_fn="gelu")
        ),
        context_length=length,
        num_blocks=LAYERS,
        embedding_dim=WIDTH,
        slstm_at=[SLSTM_AT],
    )
    return xlstm.xLSTMBlockStack(config).to(device)
