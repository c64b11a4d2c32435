"""Weights in int8: near the model they come from, the same in every way of reading and writing, and said where they do not go."""

import sys

import pytest
import torch

from exlstm import LanguageConfig, LanguageModel, xLSTM
from exlstm.models.engine import Engine
from exlstm.models.quantized import int8, is_int8
from exlstm.models.sequence import Request
from exlstm.models.stack import BLOCKS


def model_of(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return LanguageModel(LanguageConfig(d_model=64, n_layers=2, n_heads=2, vocab_size=97, blocks=(kind,)), dtype=dtype)


@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_it_reads_as_the_model_reads(kind):
    model = model_of(kind).eval()
    tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))
    (plain, _), gates = model(tokens), {n: p.clone() for n, p in model.named_parameters() if "mixer.gate" in n}
    assert not is_int8(model) and int8(model) is model and is_int8(model) and not model.training
    held, _ = model(tokens)
    assert 0 < (held - plain).norm() < 0.03 * plain.norm()
    # Token by token as all at once, and the maps of gates as they were.
    pieces, state = [], None
    for t in range(12):
        y, state = model(tokens[:, t : t + 1], state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), held, rtol=0, atol=1e-5)
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in gates.items())


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_writes_alike_alone_and_in_slots(kind, dtype):
    model = int8(model_of(kind, dtype))
    prompts = [[1, 2, 3], [4, 5], [6]]
    alone = [model.generate(prompt, 6, temperature=0) for prompt in prompts]
    engine = Engine(model, 3)
    found = engine.admit(*(Request(prompt, 6, temperature=0) for prompt in prompts))
    for _ in engine.run():
        pass
    assert dtype != torch.float32 or [s.tokens for s in found] == alone
    assert all(len(s.tokens) == 6 for s in found) and all(len(tokens) == 6 for tokens in alone)


def test_what_it_is_not_for_is_said(tmp_path, monkeypatch):
    model = int8(model_of("mlstm"))
    with pytest.raises(ValueError, match=r"blocks\.0\.mixer\.q\.weight is held in int8.*save the model before"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="LanguageModel has no linear map"):
        int8(model)
    with pytest.raises(ValueError, match="Tanh has no linear map"):
        int8(torch.nn.Tanh())
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"pip install 'exlstm\[int8\]'"):
        int8(model_of("mlstm"))


def test_a_layer_takes_it_too():
    net = xLSTM(32, 32, blocks=("mlstm",), batch_first=True).eval()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = net(x)[0]
        assert 0 < (int8(net)(x)[0] - plain).norm() < 0.03 * plain.norm()
