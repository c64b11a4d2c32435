"""The settings of a training: what is refused, the learning rate of every step, and which parameters decay."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from exlstm.models.config import StackConfig
from exlstm.models.stack import Stack
from exlstm.train.config import TrainConfig
from exlstm.train.optim import Optimizer, decayed, lr_at


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1001])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.99])
def test_the_learning_rate_rises_then_falls_to_its_end(steps, warmup):
    config = TrainConfig(steps=steps, lr=2e-3, warmup=warmup, final_lr=0.25)
    rates = [lr_at(s, steps, config) for s in range(steps)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == 2e-3 * 0.25
    assert min(rates) > 0 and max(rates) <= 2e-3
    warm = min(round(warmup * steps), steps - 1)
    assert top == max(0, warm - 1)
    if warm:
        assert rates[0] == pytest.approx(2e-3 / warm) and rates[top] == 2e-3


class Many(nn.Module):
    no_decay = ("table",)

    def __init__(self):
        super().__init__()
        self.r = nn.Parameter(torch.ones(2, 4, 3, 3))
        self.b = nn.Parameter(torch.ones(2, 4, 3))
        self.table = nn.Parameter(torch.ones(3, 3))
        self.gate_bias = nn.Parameter(torch.ones(2, 2))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)
        self.norm = nn.LayerNorm((2, 3))
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.conv = nn.Conv1d(4, 4, 3, groups=4)

    def loss(self, batch):
        return sum((p.sum() - 1) ** 2 for p in self.parameters())


def test_only_matrices_decay():
    assert [n for n, yes in decayed(Many()).items() if yes] == ["r", "conv.weight"]
    assert "frozen" not in decayed(Many())
    optimizer = Optimizer(Many(), TrainConfig(steps=1, weight_decay=0.3))
    assert [g["weight_decay"] for g in optimizer.adamw.param_groups] == [0.3, 0.0]
    assert optimizer.names[:2] == ["r", "conv.weight"] and len(optimizer.names) == len(decayed(Many()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_recurrent_maps_have_a_rate_of_their_own(optimizer):
    def moved(scale):
        torch.manual_seed(0)
        net = Stack(StackConfig(d_model=64, n_layers=2, n_heads=2, blocks=("slstm", "lstm")))
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        training = Optimizer(net, TrainConfig(steps=1, weight_decay=0.0, optimizer=optimizer, recurrent_lr=scale))
        net(torch.randn(2, 8, 64))[0].square().mean().backward()
        training.step(0.01)
        return {name: p.detach() - before[name] for name, p in net.named_parameters()}

    once, thrice, never = moved(1.0), moved(3.0), moved(0.0)
    maps = {name for name in once if name.endswith(".r")}
    assert len(maps) == 2
    for name, move in once.items():
        wanted = 3 if name in maps else 1
        torch.testing.assert_close(thrice[name], wanted * move, rtol=1e-3, atol=1e-7)
        assert never[name].any() == (name not in maps and bool(move.any()))


def test_a_rate_for_recurrent_maps_wants_some():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = nn.Linear(3, 3)

    for net in (Many(), Named()):
        with pytest.raises(ValueError, match="recurrent_lr is 3, and the model has no recurrent maps"):
            Optimizer(net, TrainConfig(steps=1, recurrent_lr=3.0))


WRONG = [
    ({"steps": 0}, "steps is 0, wanted a whole number of at least 1"),
    ({"steps": True}, "steps is True"),
    ({"steps": 5, "minutes": 1.0}, "one of the two"),
    ({"minutes": 0.0}, "minutes is 0.0, wanted a number above 0"),
    ({"lr": math.nan}, "lr is nan"),
    ({"recurrent_lr": -1.0}, "recurrent_lr is -1.0, wanted a number of at least 0"),
    ({"lr": "fast"}, "lr is 'fast'"),
    ({"final_lr": 1.5}, "final_lr is 1.5, wanted a number from 0 to 1"),
    ({"warmup": 100}, "warmup is 100, wanted .*a share of the steps"),
    ({"weight_decay": -1}, "weight_decay is -1"),
    ({"betas": (0.9,)}, "wanted two numbers"),
    ({"betas": (0.9, 1.0)}, "betas is 1.0"),
    ({"clip": -1.0}, "clip is -1.0"),
    ({"accumulate": 0}, "accumulate is 0"),
    ({"precision": "float16"}, "precision is 'float16', wanted float32 or bfloat16"),
    ({"optimizer": "sgd"}, "optimizer is 'sgd', wanted adamw or muon"),
    ({"momentum": 1.0}, "momentum is 1.0, wanted a number from 0 to below 1"),
    ({"keep": 0}, "keep is 0"),
    ({"save_every": -1}, "save_every is -1"),
    ({"seed": -1}, "seed is -1"),
]


@pytest.mark.parametrize("settings, sentence", WRONG, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_wrong_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainConfig(**settings)


def test_settings_compare():
    config = TrainConfig(steps=10, betas=[0.9, 0.95])
    stored = {**json.loads(json.dumps(config.__dict__)), "lr": 0.5, "keep": 9}
    assert config.changes(stored) == ["lr is 0.001, was 0.5"]
    # Runs from before there was a choice.
    del stored["optimizer"], stored["momentum"]
    assert replace(config, lr=0.5).changes(stored) == []
    assert replace(config, lr=0.5, optimizer="muon").changes(stored) == ["optimizer is muon, was adamw"]
    assert (TrainConfig().budget(), TrainConfig(minutes=0.5).budget(), config.budget()) == (120, 30, None)
    assert [config.every(kind, 20000) for kind in ("eval", "save", "sample")] == [2000, 500, 2000]
    assert TrainConfig(save_every=7).every("save", 100) == 7 and config.every("save", 3) == 1
    assert [config.every("eval", steps) for steps in (3, 320, 330)] == [32, 32, 33]
