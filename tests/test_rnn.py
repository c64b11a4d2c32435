"""xLSTM in the place of nn.LSTM: the same scripts run, the same errors come, over every kind of block."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

from exlstm import xLSTM
from exlstm.models.stack import BLOCKS

D, IN = 32, 5
KINDS = [*BLOCKS, ("slstm", "mlstm")]
each_kind = pytest.mark.parametrize("blocks", KINDS, ids=lambda b: b if isinstance(b, str) else "+".join(b))
both = pytest.mark.parametrize("kind", [nn.LSTM, xLSTM])


def build(blocks=("slstm",), layers=2, dtype=torch.float64, seed=0, **settings):
    torch.manual_seed(seed)
    options = {"mamba2": {"d_state": 8, "head_dim": 16}}
    return xLSTM(IN, D, layers, blocks=blocks, dtype=dtype, options=options, **settings).eval()


def sample(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same(found, wanted, limit=1e-9):
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= limit * wanted.norm() + 1e-12


# The same script


def test_the_signature_is_that_of_nn_lstm():
    ours = list(inspect.signature(xLSTM.__init__).parameters.values())[1:]
    theirs = [p for p in inspect.signature(nn.RNNBase.__init__).parameters.values() if p.name not in ("self", "mode")]
    positional = [p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "blocks"]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in theirs]
    net, peer = build(dtype=None, layers=1), nn.LSTM(IN, D)
    for name in (
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
    ):
        assert getattr(net, name) == getattr(peer, name)


def test_a_memory_that_is_taken_for_a_tensor_says_what_it_is():
    _, (_, c) = xLSTM(IN, D)(torch.randn(3, 2, IN))
    with pytest.raises(AttributeError, match="c is the memory of an xLSTM and no tensor, so it has no 'shape'"):
        c.shape  # noqa: B018
    with pytest.raises(TypeError, match=r"to empty rows take c \* keep"):
        c[:, 0] = 0
    for call in (
        lambda: c.repeat(2, 1, 1),
        lambda: c.repeat_interleave(2),
        lambda: c.index_select(0, torch.tensor([0])),
    ):
        with pytest.raises(ValueError, match="rows"):
            call()


@both
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("proj_size", [0, 7])
def test_one_script_for_both(kind, batch_first, bidirectional, proj_size):
    """Everything that scripts do with nn.LSTM, in one; only the class differs."""
    torch.manual_seed(0)
    layers, directions, out = 3, 1 + bidirectional, proj_size or D
    rnn = kind(IN, D, layers, True, batch_first, 0.1, bidirectional, proj_size).train()
    rnn.flatten_parameters()
    x = torch.randn(4, 6, IN) if batch_first else torch.randn(6, 4, IN)
    y, (h, c) = rnn(x)
    assert y.shape == (*x.shape[:2], directions * out) and h.shape == (layers * directions, 4, out)
    assert h.view(layers, directions, 4, out)[-1, -1].equal(h[-1])
    if not batch_first:
        assert y.view(6, 4, directions, out)[..., 0, :].equal(y[..., :out])
    y, (h, c) = rnn(x, (h, c))
    y, (h, c) = rnn(x, (h.detach(), c.detach()))
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rnn.parameters())
    rnn.eval()
    zeros = torch.zeros(layers * directions, 4, out), torch.zeros(layers * directions, 4, D)
    y, (h, c) = rnn(input=x, hx=zeros)
    assert torch.equal(y, rnn(x)[0])
    last = y[:, -1] if batch_first else y[-1]
    assert torch.equal(h[-directions], last[:, :out])
    chosen = torch.tensor([2, 0, 0])
    beams = h.index_select(1, chosen), c.index_select(dim=1, index=chosen)
    rows = x[:3] if batch_first else x[:, :3]
    again = rnn(rows, (h[:, chosen], c[:, chosen]))[0]
    assert torch.equal(rnn(rows, beams)[0], again)
    twice, rows = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), torch.cat([x, x], 0 if batch_first else 1)
    wanted = rnn(rows, (h[:, twice], c[:, twice]))[0]
    assert torch.equal(rnn(rows, (h.repeat_interleave(2, dim=1), c.repeat_interleave(2, dim=1)))[0], wanted)
    wanted = rnn(rows, (h[:, [0, 1, 2, 3] * 2], c[:, [0, 1, 2, 3] * 2]))[0]
    assert torch.equal(rnn(rows, (h.repeat(1, 2, 1), c.repeat(1, 2, 1)))[0], wanted)
    rows = x[:3] if batch_first else x[:, :3]
    keep = torch.tensor([1.0, 0, 1, 1]).view(1, -1, 1)
    masked, fresh = rnn(x, (keep * h, keep * c))[0], rnn(x)[0]
    row = (lambda t, r: t[r]) if batch_first else (lambda t, r: t[:, r])
    torch.testing.assert_close(row(masked, 1), row(fresh, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(row(masked, 0), row(rnn(x, (h, c))[0], 0), atol=1e-5, rtol=1e-5)
    moved = tuple(part[:, :2].contiguous().cpu().to(x.device, non_blocking=True).data for part in (h, c))
    again = rnn(rows[:2] if batch_first else rows[:, :2], moved)[0]
    assert not moved[0].requires_grad and again.isfinite().all()
    nothing, none = rnn(x[:0] if batch_first else x[:, :0])
    assert nothing.shape == (*([0, 6] if batch_first else [6, 0]), directions * out)
    assert none[0].shape == (layers * directions, 0, out)
    nothing, none = rnn(x[:0] if batch_first else x[:, :0], none)
    nothing.sum().backward()
    one, (h1, c1) = rnn(x[:, 0] if not batch_first else x[0])
    assert one.shape == (6, directions * out) and h1.shape == (layers * directions, out)
    torch.testing.assert_close(one, row(fresh, 0), atol=1e-5, rtol=1e-5)
    assert rnn(torch.randn(2, IN), (h1, c1))[0].shape == (2, directions * out)
    packed = pack_padded_sequence(x, [2, 6, 1, 4], batch_first=batch_first, enforce_sorted=False)
    z, (hp, cp) = rnn(packed)
    assert (z.sorted_indices, z.unsorted_indices) == (packed.sorted_indices, packed.unsorted_indices)
    z, lengths = pad_packed_sequence(z, batch_first=True)
    assert lengths.tolist() == [2, 6, 1, 4] and (z[0, 2:] == 0).all()
    alone, (ha, _) = rnn(row(x, 3)[:4])
    torch.testing.assert_close(z[3, :4], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hp[:, 3], ha, atol=1e-5, rtol=1e-5)
    rnn(pack_sequence([row(x, 1), row(x, 0)[:3]]), (hp[:, :2], cp[:, :2]))


WRONG = {
    "4 axes": lambda rnn: rnn(torch.randn(1, 2, 3, IN)),
    "another width": lambda rnn: rnn(torch.randn(2, 3, IN + 1)),
    "another dtype": lambda rnn: rnn(torch.randn(2, 3, IN, dtype=torch.float64)),
    "no token": lambda rnn: rnn(torch.randn(0, 3, IN)),
    "axes of h": lambda rnn: rnn(torch.randn(2, 3, IN), (torch.zeros(2, D), torch.zeros(2, D))),
    "axes of h, unbatched": lambda rnn: rnn(torch.randn(2, IN), (torch.zeros(2, 1, D), torch.zeros(2, 1, D))),
    "rows of h": lambda rnn: rnn(torch.randn(2, 3, IN), (torch.zeros(2, 4, D), torch.zeros(2, 3, D))),
    "layers of c": lambda rnn: rnn(torch.randn(2, 3, IN), (torch.zeros(2, 3, D), torch.zeros(1, 3, D))),
    "hidden_size 0": lambda rnn: type(rnn)(IN, 0),
    "hidden_size a float": lambda rnn: type(rnn)(IN, 8.0),
    "input_size 0": lambda rnn: type(rnn)(0, D),
    "input_size a float": lambda rnn: type(rnn)(1.5, D),
    "num_layers 0": lambda rnn: type(rnn)(IN, D, 0),
    "dropout 2": lambda rnn: type(rnn)(IN, D, 2, dropout=2),
    "dropout True": lambda rnn: type(rnn)(IN, D, 2, dropout=True),
    "bias 1": lambda rnn: type(rnn)(IN, D, bias=1),
    "batch_first 1": lambda rnn: type(rnn)(IN, D, batch_first=1),
    "proj_size negative": lambda rnn: type(rnn)(IN, D, proj_size=-1),
    "proj_size too wide": lambda rnn: type(rnn)(IN, D, proj_size=D),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_raises_what_nn_lstm_raises(wrong):
    errors = []
    for rnn in (nn.LSTM(IN, D, 2), xLSTM(IN, D, 2)):
        with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
            wrong(rnn)
        errors.append((caught.type, str(caught.value).replace("xLSTM", "LSTM")))
    assert errors[0] == errors[1]


def test_an_input_on_another_device_raises_what_nn_lstm_raises_on_a_gpu():
    with pytest.raises(
        RuntimeError, match="not at the same device, found input tensor at meta and parameter tensor at cpu"
    ):
        xLSTM(IN, D)(torch.randn(2, 3, IN, device="meta"))


def test_a_packed_sequence_that_does_not_fit():
    """nn.LSTM raises an error of a matrix product, or goes on with rows that nobody has."""
    rnn, packed, zeros = xLSTM(IN, D, 2), pack_sequence([torch.randn(3, IN), torch.randn(2, IN)]), torch.zeros(2, 3, D)
    with pytest.raises(RuntimeError, match="Expected 5, got 4"):
        rnn(pack_sequence([torch.randn(3, 4)]))
    with pytest.raises(RuntimeError, match=r"size \(2, 2, 32\), got \[2, 3, 32\]"):
        rnn(packed, (zeros, zeros))


def test_dropout_without_a_second_layer_warns_as_there():
    for kind in (nn.LSTM, xLSTM):
        with pytest.warns(UserWarning, match="dropout"):
            kind(IN, D, dropout=0.5)


def test_dropout_lies_between_layers_in_training():
    net, one, x = build(dropout=0.5).train(), build(layers=1).train(), sample(6, 2, IN)
    assert not torch.equal(net(x)[0], net(x)[0])
    assert torch.equal(net.eval()(x)[0], net(x)[0]) and torch.equal(one(x)[0], one(x)[0])


def test_what_is_no_state_of_ours_is_refused():
    net, x = build(), sample(4, 3, IN)
    _, (h, c) = net(x)
    zeros = torch.zeros(2, 3, D, dtype=torch.float64)
    for hx, told in {
        (zeros + 1, zeros): "no state of this network",
        (zeros, zeros + 1): "no state of this network",
        (h, c.index([0, 1])): "2 layers of 3 rows, got 2 of 2",
        (h, "c"): "c is str",
        (h,): "hx is 1 parts",
        "state": "hx is str",
    }.items():
        with pytest.raises((ValueError, RuntimeError), match=told):
            net(x, hx)
    with pytest.raises(ValueError, match="ones and zeros"):
        c * 0.5
    with pytest.raises(ValueError, match="dim is 0"):
        c.index_select(0, torch.tensor([0]))
    with pytest.raises(IndexError, match="more than rows"):
        c[0, :]
    with pytest.raises(ValueError, match="did you mean 'slstm'"):
        xLSTM(IN, D, blocks="sltsm")
    with pytest.raises(ValueError, match="did you mean 'conv'"):
        xLSTM(IN, D, options={"slstm": {"cnov": 4}})
    with pytest.raises(ValueError, match="unknown block 'lstms'"):
        xLSTM(IN, D, options={"lstms": {}})
    with pytest.raises(ValueError, match='"concat" or "sum"'):
        xLSTM(IN, D, bidirectional="both")
    for settings, told in {
        ("num_layers", 2.0): "num_layers should be of type int, got: float",
        ("proj_size", 3.5): "proj_size should be of type int, got: float",
        ("options", "conv"): "options are str, wanted settings by kind of block",
    }.items():
        with pytest.raises(TypeError, match=told):
            xLSTM(IN, D, **dict([settings]))
    for told, wrong in {"^slstm is list": ["conv"], "forget_bias is 3, wanted two numbers": {"forget_bias": 3}}.items():
        with pytest.raises(ValueError, match=told):
            xLSTM(IN, D, options={"slstm": wrong})
    for call in (lambda: net(None), lambda: net([x]), lambda: net(x, mask=[True]), lambda: net(x, reset=[True])):
        with pytest.raises(TypeError, match="wanted a tensor"):
            call()
    row = torch.ones(len(x), dtype=torch.bool)
    for wrong in ({"reset": row}, {"mask": row}, {"reset": row.float()[:, None]}):
        with pytest.raises(ValueError, match=rf"wanted bool of \(T, B\) = \({x.shape[0]}, {x.shape[1]}\)"):
            net(x, **wrong)
    with pytest.raises(ValueError, match="says itself"):
        net(pack_sequence([sample(3, IN)]), lengths=[3])


@each_kind
@pytest.mark.parametrize("bidirectional", [False, True, "sum"])
def test_one_unit_tells_more_than_a_sign(blocks, bidirectional):
    """Where nn.LSTM takes a hidden_size of 1, ours gives numbers that depend on the whole input, and learns."""
    torch.manual_seed(0)
    net = xLSTM(IN, 1, 2, bidirectional=bidirectional, blocks=blocks, dtype=torch.float64)
    width = 2 if bidirectional is True else 1
    zeros = torch.zeros(2 * net.n_directions, 3, 1, dtype=torch.float64)
    y, (h, c) = net(sample(40, 3, IN), (zeros, zeros))
    assert y.shape == (40, 3, width) and h.shape == (2 * net.n_directions, 3, 1)
    assert len(y.round(decimals=6).unique()) > 0.9 * y.numel()
    assert net(sample(4, 3, IN), (h, c))[0].shape == (4, 3, width)
    y.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in net.parameters())


# The laws, over every kind of block


@each_kind
@pytest.mark.parametrize("settings", [{}, {"proj_size": 7}, {"bias": False}], ids=str)
def test_a_split_changes_nothing(blocks, settings):
    net, x = build(blocks, **settings), sample(12, 3, IN)
    whole, (h, _) = net(x)
    y, state = net(x[:5])
    parts = [y]
    for t in range(5, 12):
        y, state = net(x[t : t + 1], state)
        parts.append(y)
    same(torch.cat(parts), whole)
    same(state.h, h)


@each_kind
@pytest.mark.parametrize("bidirectional", [False, True, "sum"])
def test_padding_changes_nothing(blocks, bidirectional):
    net, x, lengths = build(blocks, bidirectional=bidirectional), sample(9, 4, IN), [9, 4, 0, 1]
    y, (h, c) = net(x, lengths=lengths)
    packed = pack_padded_sequence(x[:, [0, 1, 3]], [9, 4, 1])
    z, (hp, _) = net(packed)
    same(pad_packed_sequence(z)[0], y[:, [0, 1, 3]])
    same(hp, h[:, [0, 1, 3]])
    before = net(sample(3, 4, IN, seed=2))[1]
    y, (h, c) = net(x, before, lengths=lengths)
    for row, length in enumerate(lengths):
        assert (y[length:, row] == 0).all()
        if length == 0:
            same(h[:, row], before.h[:, row])
            alone = before.index(row)
        else:
            wanted, alone = net(x[:length, row : row + 1], before.index(row))
            same(y[:length, row], wanted[:, 0])
            same(h[:, row], alone.h[:, 0])
        more = sample(2, 1, IN, seed=3)
        same(net(more, (h[:, [row]], c.index(row)))[0], net(more, alone)[0])
    scattered = torch.zeros(14, 4, dtype=torch.bool)
    scattered[[0, 2, 3, 4, 8, 9, 11, 12, 13], 0] = True
    wide = sample(14, 4, IN, seed=4)
    wide[scattered[:, 0], 0] = x[:, 0]
    y, (h, _) = net(wide, mask=scattered)
    wanted, (h0, _) = net(x[:, :1])
    same(y[scattered[:, 0], 0], wanted[:, 0])
    same(h[:, 0], h0[:, 0])


@each_kind
def test_the_reverse_direction_is_the_forward_one_on_reversed_sequences(blocks):
    net, x = build(blocks, layers=1, bidirectional=True), sample(9, 2, IN)
    forth = build(blocks, layers=1)
    forth.layers[0].load_state_dict(net.layers[1].state_dict())
    y, (h, _) = net(x, lengths=[9, 6])
    for row, length in enumerate((9, 6)):
        z, (hz, _) = forth(x[:length, row].flip(0))
        same(y[:length, row, D:], z.flip(0))
        same(h[1, row], hz[0])
    added = build(blocks, layers=1, bidirectional="sum")
    added.load_state_dict(net.state_dict())
    same(added(x)[0], net(x)[0].unflatten(-1, (2, D)).sum(2))


@each_kind
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_reset_is_a_fresh_start_in_both_directions(blocks, bidirectional):
    net, x = build(blocks, bidirectional=bidirectional), sample(10, 2, IN)
    reset = torch.zeros(10, 2, dtype=torch.bool)
    reset[6, 1] = True
    y, (h, _) = net(x, reset=reset)
    same(y[:6, 1], net(x[:6, 1])[0])
    same(y[6:, 1], net(x[6:, 1])[0])
    same(y[:, 0], net(x[:, 0])[0])
    last = net(x[6:, 1])[1].h
    same(h[-1 - bidirectional, 1], last[-1 - bidirectional])


@each_kind
def test_rows_that_are_emptied(blocks):
    net, x = build(blocks, batch_first=True), sample(3, 4, IN)
    _, (h, c) = net(x)
    keep = torch.tensor([True, False, True])
    y, after = net(x, (h * keep[None, :, None], c * keep[None, :, None]))
    same(y[1], net(x[1])[0])
    same(y[[0, 2]], net(x, (h, c))[0][[0, 2]])
    twice = (c * keep * torch.tensor([1, 1, 0])).index([2, 0]).to(torch.float64).clone().detach()
    y, _ = net(x[[2, 0]], (h[:, [2, 0]], twice))
    same(y[0], net(x[2])[0])
    same(y[1], net(x, (h, c))[0][0])
    assert after.c.fresh is None


@each_kind
def test_truncated_backpropagation_through_time(blocks):
    """A state that goes on, detached or not, and an optimiser that changes the weights in place between."""
    net, x = build(blocks, layers=1).train(), sample(12, 2, IN)
    optimiser, state = torch.optim.SGD(net.parameters(), 0.01), None
    for piece in x.chunk(4):
        y, state = net(piece, state)
        optimiser.zero_grad()
        y.square().mean().backward()
        optimiser.step()
        state = state.detach()
    first, state = net(x[:6])
    second, _ = net(x[6:], state)
    parts = torch.autograd.grad(torch.cat([first, second]).square().mean(), list(net.parameters()), allow_unused=True)
    whole = torch.autograd.grad(net(x)[0].square().mean(), list(net.parameters()), allow_unused=True)
    for a, b in zip(parts, whole, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            same(a, b, 1e-8)


def repackaged(state):
    """As the language model among PyTorch's examples does it between the pieces of a text."""
    return state.detach() if isinstance(state, torch.Tensor) else tuple(repackaged(part) for part in state)


@each_kind
@pytest.mark.parametrize("change", [repackaged, list])
def test_a_script_may_walk_through_a_state(blocks, change):
    net, x = build(blocks, bidirectional=True), sample(5, 2, IN)
    state = net(x)[1]
    assert torch.equal(net(x, change(state))[0], net(x, state)[0])
    h, c = state
    emptied = h, c * torch.tensor([1, 0])
    assert torch.equal(net(x, change(emptied))[0], net(x, emptied)[0])
    assert not net(x, repackaged(state))[0].isnan().any()


@each_kind
def test_copies_pickles_state_dicts_and_states_on_disk(blocks):
    net, x = build(blocks, bidirectional=True), sample(5, 2, IN)
    wanted, state = net(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x)[0], wanted)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = build(blocks, bidirectional=True, seed=9)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x)[0], wanted)
    on_disk = io.BytesIO()
    torch.save(state.detach(), on_disk)
    on_disk.seek(0)
    once_saved = torch.load(on_disk, weights_only=True)
    for kept in (copy.deepcopy(state.detach()), pickle.loads(pickle.dumps(state.detach())), once_saved):
        assert torch.equal(net(x, kept)[0], net(x, state)[0])
    moved = state.detach().to("cpu", torch.float32)
    assert moved.h.dtype == torch.float32
    leaves = [t for t in tree_leaves(state.to(torch.bfloat16).c) if isinstance(t, torch.Tensor)]
    assert torch.bfloat16 not in {t.dtype for t in leaves}
    same(net(x.float().double(), state.to(torch.float64))[0], net(x, state)[0], 1e-5)


@each_kind
def test_meta_device_then_reset_parameters(blocks):
    net = build(blocks, proj_size=6, bidirectional=True, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(float("nan"))
    torch.manual_seed(0)
    net.reset_parameters()
    assert net(sample(4, 2, IN))[0].isfinite().all()
    again = build(blocks, proj_size=6, bidirectional=True)
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert a.norm().item() == pytest.approx(b.norm().item(), rel=0.3, abs=0.1)


def test_compiled_equals_eager():
    net, x = build(("slstm", "mlstm"), bidirectional=True), sample(5, 2, IN)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    state = net(x)[1].detach()
    same(compiled(x, state, lengths=torch.tensor([5, 3]))[0], net(x, state, lengths=[5, 3])[0])
    torch._dynamo.reset()


def test_exported_with_an_open_batch_and_length():
    net, sizes = build(("slstm", "mlstm"), bidirectional=True, batch_first=True), {0: torch.export.Dim("batch")}
    sizes[1] = torch.export.Dim("time", min=4)
    program = torch.export.export(net, (sample(3, 70, IN),), dynamic_shapes=(sizes,)).module()
    for batch, time in ((3, 70), (2, 5), (1, 200)):
        x = sample(batch, time, IN)
        same(program(x)[0], net(x)[0])


def test_a_replica_has_weights_and_no_parameters():
    """What DataParallel makes of every module for every card but the first."""
    net, x = build(("slstm", "mlstm")), sample(5, 2, IN)
    modules = list(net.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, part in module.named_children():
            setattr(replica, name, replicas[part])
        for name, weight in module._parameters.items():
            setattr(replica, name, weight if weight is None else weight.clone())
    same(replicas[net](x)[0], net(x)[0])


@pytest.mark.parametrize("hidden", [2, 7, 10, 33, 50, 100])
@pytest.mark.parametrize("blocks", ["slstm", "mlstm", "mlstm_up", "lstm"])
def test_any_width(hidden, blocks):
    net = xLSTM(3, hidden, blocks=blocks)
    y, _ = net(torch.randn(4, 2, 3))
    assert y.shape == (4, 2, hidden) and y.isfinite().all() and y.std() > 0.1


def test_options_reach_the_blocks():
    net = xLSTM(IN, D, blocks="slstm", n_heads=2, options={"slstm": {"conv": 4, "ffn_ratio": 0.0}})
    block = net.layers[0].block
    assert block.mixer.n_heads == 2 and block.mixer.conv is not None and block.ffn is None
    assert "proj_size" not in repr(net) and "blocks=('slstm',)" in repr(net)


def test_autocast_and_bfloat16():
    net, x = build(dtype=torch.float32), sample(6, 2, IN, dtype=torch.float32)
    wanted, _ = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = net(x)
    assert (y.float() - wanted).norm() < 0.05 * wanted.norm()
    net.bfloat16()
    y, state = net(x.bfloat16())
    assert y.dtype == torch.bfloat16 and net(x.bfloat16(), state)[0].isfinite().all()


def test_it_learns_to_remember():
    """The first of 20 symbols is to be named after the last; nn.LSTM is still at chance after these steps."""
    torch.manual_seed(0)
    rnn, head = xLSTM(4, 32, batch_first=True), nn.Linear(32, 4)
    parameters = [*rnn.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(150):
        symbols = torch.randint(4, (32, 20))
        _, (h, _) = rnn(F.one_hot(symbols, 4).float())
        loss = F.cross_entropy(head(h[-1]), symbols[:, 0])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    assert loss < 0.1


def test_no_warning_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(layers=2, dropout=0.1)(sample(3, 2, IN))
