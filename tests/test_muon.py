"""Muon: what it does to a matrix, which parameters it moves, and that a run with it stops and goes on as any other."""

import copy
import math

import pytest
import torch
from torch import nn

from exlstm import LanguageConfig, LanguageModel
from exlstm.train import muon
from exlstm.train.config import TrainConfig
from exlstm.train.muon import Muon, orthogonalised
from exlstm.train.optim import Optimizer, lr_at


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (3, 16, 24), (2, 3, 16, 16)], ids=str)
def test_singular_values_become_equal_and_their_vectors_stay(shape):
    x = drawn(*shape)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ orthogonalised(x) @ vt.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.65 and values.max() < 1.25
    assert (inner - values.diag_embed()).abs().max() < 1e-9
    torch.testing.assert_close(orthogonalised(1e-3 * x), orthogonalised(x), rtol=1e-4, atol=1e-5)


def stepped(optimizer, parameters, steps=4):
    for step in range(steps):
        for i, p in enumerate(parameters):
            p.grad = drawn(*p.shape, seed=100 * step + i).to(p)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


SHAPES = [(16, 24), (24, 16), (16, 24), (32, 32)]


def test_a_step_is_torch_s_muon():
    # Theirs computes in bfloat16.
    ours, theirs = ([nn.Parameter(drawn(*s, seed=i).float()) for i, s in enumerate(SHAPES)] for _ in range(2))
    before = [p.detach().clone() for p in ours]
    moved = stepped(Muon(ours, lr=0.02, weight_decay=0.3), ours)
    wanted = stepped(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"), theirs)
    for a, b, start in zip(moved, wanted, before):
        assert (a - b).norm() < 0.02 * (b - start).norm()


@pytest.mark.parametrize("together", [1, 900, 2**27])
def test_matrices_move_alike_alone_and_together(together, monkeypatch):
    shapes = [*SHAPES, (3, 16, 24), (2, 2, 24, 16)]
    joint, alone = ([nn.Parameter(drawn(*s, seed=i)) for i, s in enumerate(shapes)] for _ in range(2))
    monkeypatch.setattr(muon, "TOGETHER", together)
    moved = stepped(Muon(joint, lr=torch.tensor(0.02, dtype=torch.float64)), joint)
    monkeypatch.setattr(muon, "TOGETHER", 1)
    for i, (p, m) in enumerate(zip(alone, moved)):
        single = [nn.Parameter(x.detach()) for x in p.reshape(-1, *p.shape[-2:])]
        optimizer = Muon(single, lr=0.02)
        for step in range(4):
            grad = drawn(*p.shape, seed=100 * step + i)
            for x, g in zip(single, grad.reshape(-1, *p.shape[-2:])):
                x.grad = g
            optimizer.step()
        torch.testing.assert_close(torch.stack(list(single)).reshape(p.shape), m, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("axes", [0, 1, 2])
def test_axes_between_the_counted_and_the_last_are_rows(axes):
    p = nn.Parameter(drawn(2, 3, 16, 24))
    rows = nn.Parameter(p.detach().clone().reshape(*p.shape[:axes], -1, 24))
    (moved,) = stepped(Muon([{"params": [p], "axes": axes}], lr=0.02), [p])
    (wanted,) = stepped(Muon([rows], lr=0.02), [rows])
    torch.testing.assert_close(moved, wanted.reshape(p.shape), rtol=1e-9, atol=1e-12)


def model(blocks=("mlstm", "slstm"), seed=0):
    torch.manual_seed(seed)
    return LanguageModel(LanguageConfig(d_model=32, n_layers=len(blocks), n_heads=2, blocks=blocks, vocab_size=16))


def test_it_moves_the_matrices_of_blocks_and_nothing_else():
    net = model(("mlstm", "slstm", "attention", "mamba2"))
    optimizer = Optimizer(net, TrainConfig(steps=1, optimizer="muon"))
    names = {id(p): n for n, p in net.named_parameters()}
    moved = {names[id(p)] for group in optimizer.muon.param_groups for p in group["params"]}
    left = {names[id(p)] for group in optimizer.adamw.param_groups for p in group["params"]}
    assert moved | left == set(names.values()) and not moved & left
    for kept in ("embedding", "head", "norm", "conv", "bias"):
        assert not [n for n in moved if kept in n]
    for wanted in ("0.mixer.q", "0.mixer.out", "0.ffn.gate", "1.mixer.r", "1.mixer.w", "2.mixer.k", "3.mixer.out"):
        assert [n for n in moved if wanted in n]
    assert "stack.blocks.0.mixer.gate.weight" in left
    assert {g["weight_decay"] for g in optimizer.muon.param_groups} == {0.1}
    # The four gates of an sLSTM are rows of one map a head.
    axes = {names[id(p)]: group["axes"] for group in optimizer.muon.param_groups for p in group["params"]}
    assert [axes[f"stack.blocks.{n}"] for n in ("1.mixer.r", "1.mixer.w", "0.mixer.q.weight")] == [1, 1, None]


def learn(net, optimizer, config, steps):
    for step in steps:
        tokens = torch.randint(0, 16, (4, 17), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net.loss((tokens[:, :-1], tokens[:, 1:])).backward()
        optimizer.step(lr_at(step, 8, config))


def test_its_state_survives_and_is_told_from_another_s():
    config = TrainConfig(steps=8, optimizer="muon", lr=3e-3)
    whole, part = model(), model()
    learn(whole, Optimizer(whole, config), config, range(8))
    first = Optimizer(part, config)
    learn(part, first, config, range(4))
    again = copy.deepcopy(part)
    second = Optimizer(again, config)
    second.load(first.state())
    learn(again, second, config, range(4, 8))
    for a, b in zip(whole.parameters(), again.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"momentum_buffer', which is of another optimizer"):
        Optimizer(part, TrainConfig(steps=8)).load(first.state())
    with pytest.raises(ValueError, match=r"q.weight.step', which is of another optimizer"):
        other = Optimizer(part, TrainConfig(steps=8))
        learn(part, other, config, range(1))
        Optimizer(part, config).load(other.state())


@pytest.fixture
def half():
    """A mesh of two processes of which this is one; the other says nothing."""
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield distributed.init_device_mesh("cpu", (2,))
    distributed.destroy_process_group()


@pytest.mark.parametrize(("shape", "axes"), [((1, 192, 48), None), ((3, 2, 16, 48), 1), ((17, 32), None)])
def test_a_matrix_in_parts_stays_in_them(shape, axes, half):
    from torch.distributed.tensor import Shard, distribute_tensor

    parameter = nn.Parameter(distribute_tensor(torch.ones(shape), half, [Shard(0)]))
    parameter.grad = distribute_tensor(drawn(*shape).float(), half, [Shard(0)])
    Muon([{"params": [parameter], "axes": axes}]).step()
    assert parameter.placements == (Shard(0),) and parameter.shape == shape


def test_what_it_cannot_move():
    with pytest.raises(ValueError, match=r"Muon moves matrices, a parameter has shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])
    optimizer = Muon([nn.Parameter(torch.zeros(3, 4))])
    for values, sentence in (
        ({}, r"a parameter has shape \(3,\)"),
        ({"lr": -1.0}, "lr is -1.0, wanted a number from 0"),
        ({"momentum": 1.0}, "momentum is 1.0, wanted a number from 0 to below 1$"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
    ):
        with pytest.raises(ValueError, match=sentence):
            optimizer.add_param_group({"params": nn.Parameter(torch.zeros((3, 4) if values else 3)), **values})
    assert len(optimizer.param_groups) == 1
    narrow = Optimizer(nn.Linear(8, 8), TrainConfig(steps=1, optimizer="muon"))
    assert narrow.muon is None and len(narrow.adamw.param_groups) == 2


@pytest.mark.gpu
def test_a_recorded_step_is_a_plain_one():
    ours, theirs = ([nn.Parameter(drawn(*s, seed=i).float().cuda()) for i, s in enumerate(SHAPES)] for _ in range(2))
    wanted = stepped(Muon(theirs, lr=0.02), theirs, steps=6)
    rate = torch.tensor(0.02, device="cuda")
    optimizer = Muon(ours, lr=rate)
    grads = [torch.zeros_like(p) for p in ours]
    for p, g in zip(ours, grads):
        p.grad = g
    kept = [p.detach().clone() for p in ours]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    with torch.no_grad():
        for p, k in zip(ours, kept):
            p.copy_(k)
            optimizer.state[p]["momentum_buffer"].zero_()
    for step in range(6):
        for i, g in enumerate(grads):
            g.copy_(drawn(*g.shape, seed=100 * step + i))
        graph.replay()
    for a, b in zip(ours, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    values = torch.linalg.svdvals(orthogonalised(drawn(4, 64, 96).bfloat16().cuda()).float())
    assert values.min() > 0.6 and values.max() < 1.3
