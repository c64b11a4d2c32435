"""Weights in int8 for decoding: half the bytes of bfloat16, and a step reads little else. Needs torchao (extra `int8`)."""

from __future__ import annotations

import contextlib
import logging
import warnings

from torch import nn

# Maps that make gates: few numbers, whose errors add up over a memory's life.
KEPT = ("mixer.gate", "mixer.dt")


def int8(model: nn.Module) -> nn.Module:
    """Puts the model's linear maps into int8 with a scale a row, in place, by torchao; returns it, in eval mode.

    The maps of gates, the embedding (also where it is the head), convolutions, norms and recurrent matrices stay as they are.
    For reading and writing only: such a model neither learns nor is saved. On a GPU the kernels of a decoding step read the
    int8 numbers themselves; elsewhere torchao multiplies. A map's weights move by at most 1/254 of the row's largest.

    Args:
        model: a LanguageModel, or any module with nn.Linear in it, in float32, bfloat16 or float16.

    Raises:
        ImportError: torchao is not installed.
        ValueError: the model has no linear map that could be put into int8, or has been put into it before.
    """
    with _quiet():
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise ImportError("int8 weights want torchao: pip install 'exlstm[int8]'") from error
        names = [name for name, module in model.named_modules() if _fits(name, module)]
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no linear map in float32, bfloat16 or float16 to put into int8"
            )
        wanted = set(names)
        quantize_(model, Int8WeightOnlyConfig(version=2), filter_fn=lambda _, name: name in wanted)
    return model.eval()


def is_int8(model: nn.Module) -> bool:
    """Whether a weight of the model is held in int8."""
    return any(hasattr(p, "qdata") for p in model.parameters())


def _fits(name, module) -> bool:
    if type(module) is not nn.Linear or name.endswith(KEPT):
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.is_floating_point() and weight.element_size() <= 4


@contextlib.contextmanager
def _quiet():
    """Without what torchao and PyTorch say of kernels that this machine has no use for."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
