"""The peers, imported when they are asked for and run as black boxes through their public functions."""

from importlib import import_module

import torch
from torch import nn

from exlstm.layers import basic
from exlstm.layers.basic import LayerNorm
from exlstm.models.config import LanguageConfig, MLSTMOptions, SLSTMOptions, StackConfig
from exlstm.models.language import LanguageModel
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


# Language models of the sizes of xLSTM 7B and its smaller kin: width, blocks, heads; and of a Llama of as many parameters.
SIZES = {"6.9B": (4096, 32, 8), "1.4B": (2048, 24, 8), "400M": (1024, 24, 4), "160M": (768, 12, 6)}
VOCABULARY = 50304


def language(size: str, blocks=("mlstm",), device="cuda", dtype=None, depth: int = 1):
    """Ours, with random weights: blocks without convolution as in xLSTM 7B, attention as in `llama`; `depth` times as deep."""
    width, layers, heads = SIZES[size]
    heads = _attention_heads(width) if blocks == ("attention",) else heads
    config = LanguageConfig(
        d_model=width,
        n_layers=depth * layers,
        n_heads=heads,
        vocab_size=VOCABULARY,
        blocks=blocks,
        mlstm=MLSTMOptions(conv=0),
    )
    return LanguageModel(config, device=device, dtype=dtype)


def large(size: str, device="cuda", dtype=None, **settings):
    """xLSTMLarge of the package xlstm, or None where it is not installed; `settings` as in its config."""
    package = find("xlstm.xlstm_large.model")
    if package is None:
        return None
    width, layers, heads = SIZES[size]
    config = package.xLSTMLargeConfig(
        embedding_dim=width, num_heads=heads, num_blocks=layers, vocab_size=VOCABULARY, **settings
    )
    with torch.device(device):
        return package.xLSTMLarge(config).to(dtype or torch.float32)


def llama(size: str, device="cuda", dtype=None, length: int = 2048):
    """Llama of transformers with heads of 128 (of 64 below a width of 2048), or None where it is not installed."""
    package = find("transformers")
    if package is None:
        return None
    width, layers, _ = SIZES[size]
    config = package.LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=_attention_heads(width),
        intermediate_size=basic.width(8 / 3, width), vocab_size=VOCABULARY, max_position_embeddings=length,
        attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(device):
        return package.LlamaForCausalLM(config).to(dtype or torch.float32)


def _attention_heads(width: int) -> int:
    """Heads of 128 features, of 64 in narrow models."""
    return max(1, width // (128 if width >= 2048 else 64))
