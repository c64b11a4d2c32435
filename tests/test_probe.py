"""Looking inside changes nothing, and what is seen is what the operators did."""

import math

import pytest
import torch
from torch import nn

from exlstm import LanguageConfig, LanguageModel, Stack, StackConfig, backend, mLSTM, sLSTM, xLSTM
from exlstm.models import probe
from exlstm.ops import mlstm, slstm

BLOCKS = ["mlstm", "slstm", "mlstm_up", "mamba2", "attention", "lstm"]
GATED = {0: "mlstm", 1: "slstm", 2: "mlstm_up", 3: "mamba2"}


def stack(blocks=BLOCKS, **more):
    torch.manual_seed(0)
    # Weights larger than at the start, so that the gates depend on the text.
    built = Stack(StackConfig(d_model=32, n_layers=len(blocks), n_heads=2, blocks=tuple(blocks), **more))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def watched(model, x, **more):
    with torch.no_grad(), probe.record(model) as seen:
        y, state = model(x, **more)
    return y, state, seen


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_looking_changes_nothing_and_leaves_nothing():
    model, x = stack(), draw(2, 20, 32)
    tables = [dict(operator.IMPLEMENTATIONS) for operator in (mlstm, slstm)]
    with torch.no_grad():
        plain, _ = model(x)
    y, _, seen = watched(model, x)
    assert torch.equal(y, plain)
    assert [dict(operator.IMPLEMENTATIONS) for operator in (mlstm, slstm)] == tables
    assert not any(block._forward_pre_hooks for block in model.blocks)
    with torch.no_grad():
        model(x)
    assert len(seen) == len(GATED)


def test_every_gated_layer_is_seen_in_its_place():
    _, _, seen = watched(stack(), draw(2, 20, 32))
    assert {gates.layer: gates.block for gates in seen} == GATED
    for gates in seen:
        assert gates.log_i.shape == gates.log_f.shape == gates.m.shape
        assert gates.log_i.shape[:2] == (2, 20)
        assert (gates.log_f <= 0).all()


def test_layers_and_xlstm_are_seen_as_stacks_are():
    x, seen_of = draw(2, 20, 32), {}
    layers = {"mlstm": mLSTM(32, n_heads=2), "slstm": sLSTM(32, n_heads=2)}
    for kind, layer in layers.items():
        layer.eval()
        y, _, seen = watched(layer, x)
        assert [(g.layer, g.block) for g in seen] == [(0, kind)] and torch.equal(y, layer(x)[0])
        seen_of[kind] = seen[0]
    both = nn.Sequential(nn.Linear(32, 32), *layers.values())
    with torch.no_grad(), probe.record(both) as seen:
        for layer in layers.values():
            layer(x)
    assert [(g.layer, g.block) for g in seen] == [(0, "mlstm"), (1, "slstm")]
    for gates in seen:
        assert torch.equal(gates.log_f, seen_of[gates.block].log_f)
    net = xLSTM(32, 32, num_layers=2, bidirectional=True, batch_first=True).eval()
    with torch.no_grad():
        plain = net(x)[0]
    y, _, seen = watched(net, x)
    assert torch.equal(y, plain) and [g.layer for g in seen] == [0, 1, 2, 3]
    assert len(probe.summary(seen)) == sum(g.log_f.shape[2] for g in seen)


def test_two_stacks_are_counted_on():
    model = nn.ModuleList([stack(["mlstm", "attention"]), stack(["slstm"])])
    with torch.no_grad(), probe.record(model) as seen:
        model[1](draw(1, 5, 32))
        model[0](draw(1, 5, 32))
    assert [(g.layer, g.block) for g in seen] == [(2, "slstm"), (0, "mlstm")]


def memories(state):
    """m of every layer with gates."""
    return [state[layer][1].m for layer in GATED]


@pytest.mark.parametrize("case", ["plain", "reset", "left padding", "right padding", "reset padding", "with a state"])
def test_the_stabiliser_ends_where_the_state_does(case):
    """The last m follows from the recorded gates alone: were one of them wrong, it would end elsewhere."""
    model, x = stack(), draw(2, 20, 32)
    reset, mask = torch.zeros(2, 20, dtype=torch.bool), torch.ones(2, 20, dtype=torch.bool)
    reset[0, 7] = reset[1, 0] = True
    mask[0, :5] = False
    hole, inside = torch.ones_like(mask), torch.zeros_like(reset)
    hole[:, 16:19], inside[:, 17] = False, True
    settings = {
        "plain": {},
        "reset": {"reset": reset},
        "left padding": {"mask": mask},
        "right padding": {"lengths": torch.tensor([20, 11])},
        "reset padding": {"mask": hole, "reset": inside},
        "with a state": {"state": model(draw(2, 3, 32))[1]},
    }[case]
    _, state, seen = watched(model, x, **settings)
    for gates, m in zip(seen, memories(state), strict=True):
        torch.testing.assert_close(gates.m[:, -1].float(), m, atol=1e-5, rtol=1e-5)


def test_padding_is_left_out():
    model, x = stack(), draw(1, 12, 32)
    alone = probe.summary(watched(model, x)[2])
    padded = torch.cat([x, draw(1, 30, 32)], 1)
    with_padding = probe.summary(watched(model, padded, lengths=torch.tensor([12]))[2])
    for a, b in zip(alone, with_padding, strict=True):
        assert a[:3] == b[:3]
        assert a[3:] == pytest.approx(b[3:], rel=1e-4, abs=1e-5)


def test_calls_add_up():
    model, x = stack(), draw(2, 20, 32)
    whole = probe.summary(watched(model, x)[2])
    with torch.no_grad(), probe.record(model) as seen:
        _, state = model(x[:, :8])
        model(x[:, 8:], state)
    assert len(seen) == 2 * len(GATED)
    for a, b in zip(whole, probe.summary(seen), strict=True):
        assert a[3:] == pytest.approx(b[3:], rel=1e-4, abs=1e-5)


def test_the_implementation_that_was_asked_for_runs(monkeypatch):
    called = []

    def counted(*arguments):
        called.append("mlstm")
        return mlstm.IMPLEMENTATIONS["reference"](*arguments)

    monkeypatch.setitem(mlstm.IMPLEMENTATIONS, "counted", counted)
    with backend("counted"):
        watched(stack(["mlstm", "mlstm"]), draw(1, 5, 32))
    assert called == ["mlstm", "mlstm"]


def test_horizon_and_gates_of_known_gates():
    """f = exp(-1/h) everywhere forgets to 1/e in h tokens; an sLSTM head is as its median unit."""
    log_i, steps = torch.full((1, 50, 2), -3.0), torch.tensor([10.0, 200.0])
    log_f = (-1 / steps).expand(1, 50, 2)
    matrix = probe.Gates(0, "mlstm", log_i, log_f, torch.full((1, 50, 2), -2.5))
    units = (-1 / torch.tensor([2.0, 5.0, 1000.0])).expand(1, 50, 1, 3)
    scalar = probe.Gates(3, "slstm", torch.ones(1, 50, 1, 3), units, torch.ones(1, 50, 1, 3))
    first, second, third = probe.summary([matrix, scalar])
    assert (first.layer, first.head, third.layer, third.block) == (0, 0, 3, "slstm")
    assert (first.horizon, second.horizon, third.horizon) == pytest.approx((10, 200, 5), rel=1e-4)
    assert first.forget == pytest.approx(math.exp(-0.1))
    assert third.forget == pytest.approx((math.exp(-1 / 2) + math.exp(-1 / 5) + math.exp(-1 / 1000)) / 3)
    assert (first.log_i, first.log_i_std, first.m) == (-3, 0, 2.5)
    assert probe.summary([matrix._replace(log_f=torch.zeros(1, 50, 2))])[0].horizon == math.inf


def test_a_language_model_is_looked_into_too():
    model = LanguageModel(LanguageConfig(d_model=16, n_layers=2, n_heads=2))
    with torch.no_grad(), probe.record(model) as seen:
        model(torch.zeros(1, 9, dtype=torch.int64))
    assert [gates.layer for gates in seen] == [0, 1]
