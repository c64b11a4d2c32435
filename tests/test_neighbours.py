"""The operators' neighbours against plain formulas: convolution, loss, norms and feed-forwards, and the three peer layers."""

import math
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from exlstm.layers import basic, lstm
from exlstm.layers.attention import Attention
from exlstm.layers.lstm import LSTM, LSTMState
from exlstm.layers.mamba2 import Mamba2
from exlstm.layers.mlstm_window import mLSTMWindow
from exlstm.ops.conv import causal_conv
from exlstm.ops.loss import linear_cross_entropy


def draw(*shape, seed=0, dtype=torch.float64):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def flags(*shape, density, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < density


def close(found, wanted, limit=1e-12):
    """Relative distance; None stands for zeros."""
    for a, b in zip(found, wanted, strict=True):
        a, b = (torch.zeros(()) if x is None else x.double() for x in (a, b))
        assert (a - b).norm() <= limit * b.norm() + 1e-13, (a - b).norm() / b.norm()


def gradients(outputs, inputs):
    """Of a weighted sum of the outputs, so that no gradient is uniform."""
    total = sum((y * draw(*y.shape, seed=i).detach()).sum() for i, y in enumerate(outputs))
    return torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)


@pytest.mark.parametrize("sees", ["all", "window", "groups", "document", "one"])
def test_dropped_weights_of_attention_are_right_in_the_mean(sees):
    """In training alone; every output is linear in the weights, so that the mean of many draws is what evaluation gives."""
    time = 1 if sees == "one" else 7
    layer = Attention(
        8, 2, n_kv_heads=1 if sees == "groups" else 0, window=3 * (sees == "window"), dropout=0.3
    ).double()
    x, before = draw(1, time, 8).detach(), layer(draw(1, 4, 8, seed=1).detach())[1]
    more = {"reset": torch.arange(time)[None] == 3} if sees == "document" else {}
    state = before if sees == "one" else None
    wanted, kept = layer.eval()(x, state, **more)
    plain = Attention(8, 2, n_kv_heads=layer.n_kv_heads, window=layer.attend.window).double()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(wanted, plain.train()(x, state, **more)[0])
    torch.manual_seed(0)
    draws = 4000
    many, after = layer.train()(
        x.expand(draws, -1, -1),
        state and type(state)(*(y.expand(draws, *y.shape[1:]) for y in state)),
        **{name: flag.expand(draws, -1) for name, flag in more.items()},
    )
    close(after.keys[:1], kept.keys)
    error, spread = (many.mean(0) - wanted[0]).detach(), many.std(0).detach()
    assert (spread.max() > 0.01) and (error.abs() < 5 * spread / draws**0.5 + 1e-12).all()
    with pytest.raises(ValueError, match="dropout is 1, wanted a share from 0 to below 1"):
        Attention(8, dropout=1)


# Convolution


def plain_conv(x, weight, bias, state, reset=None, mask=None):
    """Token by token: a list of the last inputs a row."""
    columns, ys, states = weight.shape[1], [], []
    for row in range(x.shape[0]):
        past, y = list(state[row]), []
        for t in range(x.shape[1]):
            if reset is not None and reset[row, t]:
                past = [torch.zeros_like(x[row, t])] * (columns - 1)
            if mask is not None and not mask[row, t]:
                y.append(torch.zeros_like(x[row, t]))
                continue
            past = [*past, x[row, t]]
            y.append(bias + sum(weight[:, j] * past[j] for j in range(columns)))
            past = past[1:]
        ys.append(torch.stack(y))
        states.append(torch.stack(past) if past else state[row])
    return torch.stack(ys), torch.stack(states)


def conv_case(columns, time, with_reset, with_mask):
    tensors = [draw(3, time, 5), draw(5, columns, seed=1), draw(5, seed=2), draw(3, columns - 1, 5, seed=3)]
    options = {"reset": flags(3, time, density=0.3, seed=4)} if with_reset else {}
    return tensors, options | ({"mask": flags(3, time, density=0.6, seed=5)} if with_mask else {})


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_conv_equals_the_plain_loop(columns):
    for time, with_reset, with_mask in product((1, 2, 3, 9, 40), (False, True), (False, True)):
        tensors, options = conv_case(columns, time, with_reset, with_mask)
        found, wanted = causal_conv(*tensors, **options), plain_conv(*tensors, **options)
        close(found, wanted)
        close(gradients(found, tensors), gradients(wanted, tensors))


@pytest.mark.parametrize("with_flags", [False, True])
def test_conv_split_anywhere(with_flags):
    (x, weight, bias, state), options = conv_case(4, 12, with_flags, with_flags)
    whole = causal_conv(x, weight, bias, state, **options)
    for cuts in ([1, 11], [5, 7], [2] * 6, [1] * 12):
        ys, after, start = [], state, 0
        for size in cuts:
            part = slice(start, start + size)
            y, after = causal_conv(x[:, part], weight, bias, after, **{k: v[:, part] for k, v in options.items()})
            ys.append(y)
            start += size
        split = torch.cat(ys, 1), after
        close(split, whole)
        close(gradients(split, [x, weight, bias, state]), gradients(whole, [x, weight, bias, state]))


def test_conv_compiled_equals_eager():
    for time, with_reset, with_mask in ((1, True, True), (6, False, False), (6, True, True)):
        tensors, options = conv_case(4, time, with_reset, with_mask)
        found, wanted = compiled(causal_conv)(*tensors, **options), causal_conv(*tensors, **options)
        close(found, wanted)
        close(gradients(found, tensors), gradients(wanted, tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_conv_sums_in_float32(dtype):
    x, weight, bias = draw(2, 20, 8, dtype=dtype), draw(8, 4, seed=1), draw(8, seed=2)
    y, state = causal_conv(x, weight.float(), bias.float())
    wanted, _ = causal_conv(x.double(), weight, bias)
    assert y.dtype == state.dtype == dtype
    close([y], [wanted], torch.finfo(dtype).eps)


def test_conv_takes_any_strides_and_no_bias():
    x, weight = draw(3, 5, 9).transpose(1, 2), draw(4, 5, seed=1).t()
    y, _ = causal_conv(x, weight)
    wanted, _ = causal_conv(x.contiguous(), weight.contiguous(), torch.zeros(5, dtype=x.dtype))
    close([y], [wanted])
    close(gradients([y], [x, weight]), gradients([wanted], [x, weight]))


def test_conv_never_touches_padding():
    (x, weight, bias, state), options = conv_case(4, 12, True, True)
    mask = options["mask"]
    poisoned = x.detach().masked_fill(~mask[..., None], float("nan")).requires_grad_()
    found = causal_conv(poisoned, weight, bias, state, **options)
    wanted = causal_conv(x, weight, bias, state, **options)
    close(found, wanted)
    close(gradients(found, [poisoned, weight, state]), gradients(wanted, [x, weight, state]))


@pytest.mark.parametrize("time", [1, 9])
def test_conv_with_its_activation(time):
    tensors, options = conv_case(4, time, True, True)
    found, wanted = causal_conv(*tensors, **options, activation="silu"), plain_conv(*tensors, **options)
    wanted = F.silu(wanted[0]), wanted[1]
    close(found, wanted)
    close(gradients(found, tensors), gradients(wanted, tensors))
    with pytest.raises(ValueError, match="activation 'relu' is not one of silu, None"):
        causal_conv(*tensors, activation="relu")


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (lambda: (torch.ones(2, 3), torch.ones(3, 4)), ValueError, r"x has shape \(2, 3\), wanted \(B, T, D\)"),
        (lambda: (torch.ones(2, 0, 3), torch.ones(3, 4)), ValueError, "no axis empty"),
        (lambda: (torch.ones(2, 5, 3), torch.ones(4, 3)), ValueError, "weight has shape .* D = 3"),
        (lambda: (torch.ones(2, 5, 3), torch.ones(3, 4), torch.ones(4)), ValueError, "bias has shape"),
        (lambda: (torch.ones(2, 5, 3, dtype=int), torch.ones(3, 4)), TypeError, "x is torch.int64"),
        (lambda: (torch.ones(2, 5, 3), torch.ones(3, 4), None, torch.ones(2, 4, 3)), ValueError, r"wanted \(2, 3, 3\)"),
    ],
)
def test_conv_refuses_in_one_sentence(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        causal_conv(*arguments())


# Loss


def plain_loss(x, weight, targets, cap=0.0, reduction="mean"):
    logits = basic.soft_cap(x @ weight.t(), cap)
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)
    return losses.view(targets.shape) if reduction == "none" else losses


def loss_case(dtype=torch.float64):
    targets = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(2))
    targets[0, 2:4] = -100
    return draw(2, 9, 7, dtype=dtype), draw(11, 7, seed=1, dtype=dtype), targets


reductions = pytest.mark.parametrize("reduction", ["mean", "none"])


@reductions
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_loss_equals_the_plain_one(cap, reduction):
    x, weight, targets = loss_case()
    wanted = plain_loss(x, weight, targets, cap, reduction)
    for size in (None, 1, 4, 100):
        found = linear_cross_entropy(x, weight, targets, cap=cap, reduction=reduction, slice=size)
        close([found], [wanted])
        close(gradients([found], [x, weight]), gradients([wanted], [x, weight]))
    found = compiled(linear_cross_entropy)(x, weight, targets, cap=cap, reduction=reduction)
    close([found], [wanted])
    close(gradients([found], [x, weight]), gradients([wanted], [x, weight]))
    with torch.no_grad():
        close(
            [linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten().int(), cap=cap)],
            [wanted.sum() / 16 if reduction == "none" else wanted],
        )


@reductions
def test_loss_through_a_tied_weight(reduction):
    _, weight, targets = loss_case()
    ids = targets.clamp(min=0)
    found = linear_cross_entropy(F.embedding(ids, weight), weight, targets, reduction=reduction)
    wanted = plain_loss(F.embedding(ids, weight), weight, targets, 0.0, reduction)
    close(gradients([found], [weight]), gradients([wanted], [weight]))


@reductions
def test_loss_with_nothing_to_predict_is_zero(reduction):
    x, weight, targets = loss_case()
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, -100), reduction=reduction)
    assert not loss.any()
    assert not any(g.any() for g in gradients([loss], [x, weight]))


@reductions
def test_loss_under_autocast_is_float32(reduction):
    x, weight, targets = loss_case(torch.float32)
    wanted = plain_loss(x.double(), weight.double(), targets, 3.0, reduction)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy(x, weight, targets, cap=3.0, reduction=reduction)
    assert found.dtype == torch.float32
    close([found], [wanted], 1e-2)
    grads = gradients([found], [x, weight])
    assert all(g.dtype == torch.float32 for g in grads)
    close(grads, gradients([wanted], [x, weight]), 2e-2)


def test_loss_in_half_precision_keeps_small_gradients():
    """The mean over many tokens must not push a float16 gradient below what float16 can hold."""
    x, weight = draw(4096, 8, dtype=torch.float16), draw(11, 8, seed=1, dtype=torch.float16)
    targets = torch.arange(4096) % 11
    found = torch.autograd.grad(linear_cross_entropy(x, weight, targets) * 65536, [x, weight])
    wanted = torch.autograd.grad(plain_loss(x.double(), weight.double(), targets) * 65536, [x, weight])
    close(found, wanted, 5e-3)


class Largest(TorchDispatchMode):
    """The most numbers that any result of an operation had."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for y in result if isinstance(result, tuple | list) else (result,):
            self.found = max(self.found, y.numel() if isinstance(y, torch.Tensor) else 0)
        return result


@reductions
def test_loss_never_holds_all_logits(reduction):
    x, weight, targets = draw(640, 4), draw(500, 4, seed=1), torch.arange(640) % 500
    with Largest() as largest:
        linear_cross_entropy(x, weight, targets, slice=32, reduction=reduction).sum().backward()
    assert weight.numel() < largest.found <= 32 * 500


@reductions
def test_loss_is_differentiated_once(reduction):
    x, weight, targets = loss_case()
    loss = linear_cross_entropy(x, weight, targets, reduction=reduction).sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative"):
        dx.square().sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"targets": torch.full((2, 9), 11)}, ValueError, "target 11 is no id of a vocabulary of 11"),
        ({"targets": torch.full((2, 9), -1)}, ValueError, "target -1 is no id"),
        ({"targets": torch.ones(2, 8, dtype=int)}, ValueError, r"of shape \(2, 8\), wanted ids of \(2, 9\)"),
        ({"targets": torch.ones(2, 9)}, ValueError, "targets is torch.float32"),
        ({"weight": torch.ones(11, 6)}, ValueError, r"weight has shape \(11, 6\), wanted \(V, D\) with D = 7"),
        ({"x": torch.ones(2, 9, 7, dtype=int)}, TypeError, "x and weight are torch.int64"),
        ({"reduction": "sum"}, ValueError, "reduction is 'sum', wanted 'mean' or 'none'"),
        ({"slice": 0}, ValueError, "slice is 0, wanted at least 1 token"),
    ],
)
def test_loss_refuses_in_one_sentence(change, error, sentence):
    x, weight, targets = loss_case()
    with pytest.raises(error, match=sentence):
        linear_cross_entropy(**{"x": x, "weight": weight, "targets": targets} | change)


# Norms, feed-forwards and helpers


def plain_norm(module, x):
    """(x - mean) / std · weight, without the mean for RMSNorm, a head at a time for HeadNorm."""
    centred = x if isinstance(module, basic.RMSNorm) else x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
    y = y.flatten(-2) if isinstance(module, basic.HeadNorm) else y
    bias = getattr(module, "bias", None)
    return y * module.weight + (0 if bias is None else bias)


NORMS = {
    "rms": (lambda **new: basic.RMSNorm(12, **new), (2, 5, 12)),
    "layer": (lambda **new: basic.LayerNorm(12, **new), (2, 5, 12)),
    "layer with bias": (lambda **new: basic.LayerNorm(12, bias=True, **new), (2, 5, 12)),
    "head": (lambda **new: basic.HeadNorm(3, 4, **new), (2, 5, 3, 4)),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_equal_their_formula(name):
    build, shape = NORMS[name]
    norm, x = build(dtype=torch.float64), draw(*shape)
    with torch.no_grad():
        for i, p in enumerate(norm.parameters()):
            p.copy_(draw(*p.shape, seed=i + 1))
    inputs = [x, *norm.parameters()]
    wanted = plain_norm(norm, x)
    for call in (norm, compiled(norm)):
        found = call(x)
        close([found], [wanted])
        close(gradients([found], inputs), gradients([wanted], inputs))
    sliced = draw(*shape[:-1], 2 * shape[-1])[..., ::2]
    close([norm(sliced)], [plain_norm(norm, sliced)])
    low = x.detach().bfloat16()
    found = norm.float()(low)
    assert found.dtype == torch.bfloat16
    close([found], [plain_norm(norm, low.double())], 4e-3)
    assert norm(torch.zeros(shape)).isfinite().all()


@pytest.mark.parametrize(("activation", "function"), [("sigmoid", torch.sigmoid), ("silu", F.silu)])
def test_norm_with_its_gate_and_skip(activation, function):
    norm, x = basic.HeadNorm(3, 4, dtype=torch.float64), draw(2, 5, 3, 4)
    gate, skip, c = draw(2, 5, 12, seed=1), draw(12, seed=2), draw(2, 5, 12, seed=3)
    found = [norm(x, gate, activation=activation), norm(x, gate, activation=activation, skip=(skip, c))]
    wanted = [norm(x) * function(gate), (norm(x) + skip * c) * function(gate)]
    close(found, wanted)
    close(gradients(found, [x, gate, skip, c]), gradients(wanted, [x, gate, skip, c]))
    with pytest.raises(ValueError, match="activation 'relu' is not one of sigmoid, silu"):
        norm(x, gate, activation="relu")


def test_hand_written_gradients_can_be_differentiated():
    norm = basic.RMSNorm(3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), [draw(4, 3), draw(3)]
    )
    tensors, options = conv_case(3, 5, True, True)
    assert torch.autograd.gradgradcheck(lambda *t: causal_conv(*t, **options), tensors)


@pytest.mark.parametrize(("kind", "activation"), [(basic.SwiGLU, F.silu), (basic.GatedGELU, F.gelu)])
def test_feed_forwards_equal_their_formula(kind, activation):
    ffn, x = kind(6, 10, dtype=torch.float64), draw(2, 3, 6)
    gate, up, out = (m.weight for m in (ffn.gate, ffn.up, ffn.out))
    close([ffn(x)], [(activation(x @ gate.t()) * (x @ up.t())) @ out.t()])


MODULES = {
    **{name: build for name, (build, _) in NORMS.items()},
    "swiglu": lambda **new: basic.SwiGLU(6, 10, **new),
    "gelu": lambda **new: basic.GatedGELU(6, 10, **new),
    "conv": lambda **new: basic.CausalConv(6, 4, **new),
}


@pytest.mark.parametrize("name", MODULES)
def test_parts_build_on_meta_and_start_by_reset_parameters(name):
    module = MODULES[name](device="meta", dtype=torch.float64)
    assert all(p.is_meta for p in module.parameters())
    module = module.to_empty(device="cpu")
    torch.manual_seed(0)
    module.reset_parameters()
    wanted = MODULES[name](dtype=torch.float64)
    torch.manual_seed(0)
    wanted.reset_parameters()
    assert list(module.state_dict()) == list(wanted.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), wanted.parameters(), strict=True))


def test_linear_maps_start_with_the_scale_they_promise():
    weight = torch.empty(300, 400)
    basic.init_linear(weight)
    assert weight.std() == pytest.approx((2 / 2000) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("ratio", "d_model", "multiple", "wanted"),
    [
        (8 / 3, 96, 64, 256),
        (8 / 3, 128, 64, 384),
        (4 / 3, 160, 64, 256),
        (2.0, 64, 64, 128),
        (0.1, 10, 1, 1),
        (0.0, 64, 64, 0),
    ],
)
def test_width_rounds_up(ratio, d_model, multiple, wanted):
    assert basic.width(ratio, d_model, multiple) == wanted


def test_soft_cap():
    x = torch.tensor([-1e9, -0.01, 0.0, 0.01, 1e9])
    torch.testing.assert_close(
        basic.soft_cap(x, 15.0), torch.tensor([-15.0, -0.01, 0.0, 0.01, 15.0]), rtol=1e-5, atol=0
    )
    assert basic.soft_cap(x, 0.0) is x


def test_valid_mask_joins_lengths_and_mask():
    def valid(lengths, mask=None):
        return basic.valid_mask(lengths, mask, 2, 3, torch.device("cpu"))

    mask = torch.tensor([[False, True, True], [True, True, True]])
    assert valid(None) is None and valid(None, mask) is mask
    assert valid([2, 0]).tolist() == [[True, True, False], [False, False, False]]
    assert valid(torch.tensor([2, 3], dtype=torch.int32), mask).tolist() == [[False, True, False], [True, True, True]]
    for lengths, sentence in (
        ([4, 0], "lengths go from 0 to 4"),
        ([-1, 0], "from -1"),
        ([1.0, 2.0], "float32"),
        ([1], "(B,)"),
    ):
        with pytest.raises(ValueError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
            valid(lengths)
    with pytest.raises(ValueError, match=r"mask is torch.bool of shape \(3, 2\)"):
        valid(None, mask.t())


# Peer layers against their recurrences


def segments(x, reset, mask):
    """Each row's documents, without padding: (row, times) pairs."""
    for row in range(x.shape[0]):
        starts = [0, *(reset[row, 1:].nonzero().squeeze(1) + 1).tolist(), x.shape[1]]
        for start, stop in pairwise(starts):
            yield row, start + mask[row, start:stop].nonzero().squeeze(1)


def plain_ssd(layer, u):
    """Mamba-2's recurrence of one document u (T, d_model), as the paper writes it."""
    linear = {name: getattr(layer, name)(u) for name in ("z", "xbc", "dt")}
    mixed = F.pad(linear["xbc"], (0, 0, layer.conv.weight.shape[1] - 1, 0)).unfold(0, layer.conv.weight.shape[1], 1)
    mixed = F.silu((mixed * layer.conv.weight).sum(-1) + layer.conv.bias)
    x, b, c = mixed.split([layer.inner, layer.d_state, layer.d_state], -1)
    x, delta, a = x.unflatten(-1, (layer.n_heads, -1)), F.softplus(linear["dt"]), -layer.a_log.exp()
    s, ys = 0, []
    for t in range(u.shape[0]):
        s = torch.exp(delta[t] * a)[:, None, None] * s + delta[t][:, None, None] * b[t][:, None] * x[t][:, None, :]
        ys.append(torch.einsum("hkv,k->hv", s, c[t]) + layer.d[:, None] * x[t])
    y = torch.stack(ys).flatten(-2) * F.silu(linear["z"])
    return layer.out(y * torch.rsqrt(y.square().mean(-1, keepdim=True) + layer.norm.eps) * layer.norm.weight)


def plain_attention(layer, x):
    """Softmax attention of one document x (T, d_model), with a table of who sees whom."""
    return layer.out(looked_up(layer.attend, *(linear(x) for linear in (layer.q, layer.k, layer.v))))


def looked_up(heads, q, k, v):
    """(T, H·V) of q, k, v (T, H·D), (T, H'·D), (T, H'·V)."""
    time, width = len(q), heads.d_head
    groups, width_v = q.shape[-1] // k.shape[-1], v.shape[-1] * width // k.shape[-1]
    q, k, v = (s.unflatten(-1, (-1, w)).transpose(0, 1) for s, w in ((q, width), (k, width), (v, width_v)))  # (H, T, ·)
    if heads.rope_base:
        half = width // 2
        angles = torch.arange(time)[:, None] * heads.rope_base ** (-torch.arange(half, dtype=q.dtype) / half)
        turn = torch.polar(torch.ones_like(angles), angles)
        q, k = (
            torch.view_as_real(torch.complex(s[..., :half], s[..., half:]) * turn).transpose(-1, -2).flatten(-2)
            for s in (q, k)
        )
    t, j = torch.arange(time)[:, None], torch.arange(time)
    seen = (j <= t) & ((t - j < (heads.window or time)) | (j < heads.sinks))
    scores = q @ k.repeat_interleave(groups, 0).mT / math.sqrt(width)
    y = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(groups, 0)
    return y.transpose(0, 1).flatten(-2)


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_window_is_read_in_pieces(flagged, sinks, monkeypatch):
    """Values, states and gradients are those of the whole, wherever documents and padding stand."""
    torch.manual_seed(0)
    layer = Attention(12, 2, window=4, sinks=sinks, dtype=torch.float64)
    x = draw(2, 45, 12).double().requires_grad_()
    where = {"reset": flags(2, 45, density=0.1, seed=1), "mask": flags(2, 45, density=0.8, seed=2)} if flagged else {}
    found = []
    for piece in (1, 7, 512):
        monkeypatch.setattr("exlstm.layers.attention.PIECE", piece)
        first, state = layer(x[:, :20], **{name: flag[:, :20] for name, flag in where.items()})
        second, state = layer(x[:, 20:], state, **{name: flag[:, 20:] for name, flag in where.items()})
        y = torch.cat([first, second], 1) * where.get("mask", torch.ones(2, 45))[..., None]
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        logits, _ = layer(x[:, :3], layer.filled(state))
        found.append((y, gradient, logits))
    for other in found[:2]:
        for a, b in zip(other, found[2], strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def plain_mlstm_window(layer, x):
    """The memory by its recurrence, the window by a table, each normalised a head, mixed by the gate."""
    mixed = F.pad(x, (0, 0, layer.conv.weight.shape[1] - 1, 0)).unfold(0, layer.conv.weight.shape[1], 1)
    mixed = F.silu((mixed * layer.conv.weight).sum(-1) + layer.conv.bias)
    q, k, v = layer.q(mixed), layer.k(mixed), layer.v(x)
    heads, gates = layer.n_heads, layer.gate_cap * torch.tanh(layer.gate(x) / layer.gate_cap)
    by_head = [s.unflatten(-1, (heads, -1)) for s in (q, k, v)]
    c = n = 0
    m, memory = torch.full((heads,), -torch.inf, dtype=x.dtype), []
    for t in range(len(x)):
        qt, kt, vt = (s[t] for s in by_head)
        log_i, log_f = gates[t, :heads], F.logsigmoid(gates[t, heads:])
        after = torch.maximum(log_f + m, log_i).detach()
        f, i = torch.exp(log_f + m - after)[:, None], torch.exp(log_i - after)[:, None]
        c, n, m = f[..., None] * c + i[..., None] * kt[..., None] * vt[:, None], f * n + i * kt, after
        qt = qt / math.sqrt(qt.shape[-1])
        least = torch.exp(-m)
        memory.append((qt[:, None] @ c)[:, 0] / torch.maximum((qt * n).sum(-1).abs(), least)[:, None])
    sides = []
    for y, norm in ((torch.stack(memory), layer.memory_norm), (looked_up(layer.attend, q, k, v), layer.window_norm)):
        y = y.view(len(x), heads, -1)
        y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, correction=0, keepdim=True) + norm.eps)
        sides.append(y.flatten(-2) * norm.weight)
    g = torch.sigmoid(layer.side(torch.cat((q, k, v), -1))).repeat_interleave(layer.d_model // heads, -1)
    return layer.out((g * sides[0] + (1 - g) * sides[1]) * torch.sigmoid(layer.o(x)))


def varlen(q, k, v, starts, ends, most, longest, *, window_size):
    """The kernel that takes documents (N, H, D) one behind the other, in plain operations."""
    assert torch.equal(starts, ends) and most == longest >= starts.diff().max()
    left, right = window_size
    assert right == 0
    found = []
    for begin, end in pairwise(starts.tolist()):
        apart = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (apart >= 0) & ((apart <= left) | (left < 0))
        part = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        found.append(F.scaled_dot_product_attention(*part, attn_mask=seen).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize(("window", "documents"), [(0, True), (3, True), (3, False)])
def test_attention_hands_documents_to_a_fused_kernel_one_behind_the_other(window, documents, monkeypatch):
    from exlstm.layers import attention

    layer = Attention(24, 6, n_kv_heads=2, window=window, dtype=torch.float64)
    x = draw(3, 20, 24)
    reset = flags(3, 20, density=0.2, seed=1) if documents else None
    wanted = layer(x, reset=reset)
    monkeypatch.setattr(attention.Heads, "_packs", lambda self, q, v, reset: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    found = layer(x, reset=reset)
    close([found[0], *found[1]], [wanted[0], *wanted[1]])
    close(gradients([found[0]], [x]), gradients([wanted[0]], [x]))


def awake(layer):
    """The layer with gates that depend on its input, as after some training."""
    with torch.no_grad():
        for part in (layer.gate, layer.side):
            part.weight.normal_(std=0.3)
        layer.gate.bias[: layer.n_heads] += 10
    return layer


def plain_lstm(layer, x):
    lstm = nn.LSTM(layer.d_model, layer.d_model, dtype=x.dtype)
    weights = (layer.w, layer.r, layer.b, torch.zeros_like(layer.b))
    return torch.func.functional_call(lstm, dict(zip(lstm.state_dict(), weights, strict=True)), x)[0]


PEERS = {
    "mamba2": (lambda: Mamba2(12, d_state=5, head_dim=8, dtype=torch.float64), plain_ssd),
    "attention": (lambda: Attention(12, 2, dtype=torch.float64), plain_attention),
    "attention without positions": (lambda: Attention(12, 4, rope_base=0.0, dtype=torch.float64), plain_attention),
    "attention with groups": (lambda: Attention(24, 6, n_kv_heads=2, dtype=torch.float64), plain_attention),
    "attention with window": (lambda: Attention(12, 2, window=3, dtype=torch.float64), plain_attention),
    "attention with sinks": (
        lambda: Attention(24, 6, n_kv_heads=3, window=4, sinks=2, dtype=torch.float64),
        plain_attention,
    ),
    "attention to itself": (lambda: Attention(12, 2, window=1, dtype=torch.float64), plain_attention),
    "mlstm beside a window": (
        lambda: awake(mLSTMWindow(16, 2, window=4, sinks=2, dtype=torch.float64)),
        plain_mlstm_window,
    ),
    "lstm": (lambda: LSTM(12, dtype=torch.float64), plain_lstm),
    "lstm in float32": (lambda: LSTM(12), plain_lstm),
}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("cuts", [[30], [1] * 30, [1, 9, 20]], ids=["whole", "steps", "parts"])
def test_peers_equal_their_recurrence_in_every_document(name, cuts):
    torch.manual_seed(0)
    build, plain = PEERS[name]
    layer = build()
    dtype = next(layer.parameters()).dtype
    x, reset, mask = (
        draw(3, 30, layer.d_model, dtype=dtype),
        flags(3, 30, density=0.08, seed=1),
        flags(3, 30, density=0.8, seed=2),
    )
    wanted = torch.zeros_like(x)
    for row, times in segments(x, reset, mask):
        if len(times):
            wanted = wanted.index_put((torch.tensor(row), times), plain(layer, x[row, times]))
    ys, state, start = [], None, 0
    for size in cuts:
        part = slice(start, start + size)
        y, state = layer(x[:, part], state, mask=mask[:, part], reset=reset[:, part])
        ys.append(y)
        start += size
    found, inputs = torch.cat(ys, 1), [x, *layer.parameters()]
    assert found.isfinite().all()
    limit = 1e-5 if dtype == torch.float32 else 1e-11
    close([found * mask[..., None]], [wanted], limit)
    close(gradients([found * mask[..., None]], inputs), gradients([wanted], inputs), limit)


@pytest.mark.parametrize("name", PEERS)
def test_peers_without_flags_equal_their_recurrence(name):
    torch.manual_seed(0)
    build, plain = PEERS[name]
    layer = build()
    dtype = next(layer.parameters()).dtype
    x = draw(2, 9, layer.d_model, dtype=dtype)
    found, wanted, inputs = layer(x)[0], torch.stack([plain(layer, row) for row in x]), [x, *layer.parameters()]
    limit = 1e-5 if dtype == torch.float32 else 1e-11
    close([found], [wanted], limit)
    close(gradients([found], inputs), gradients([wanted], inputs), limit)


def test_a_window_bounds_the_state():
    layer, state = Attention(12, 2, window=4, sinks=2), None
    for size in (1, 2, 9, 1, 1):
        _, state = layer(torch.randn(2, size, 12), state)
        assert state.keys.shape[1] <= 5
    assert state.positions.tolist() == [[0, 1, 11, 12, 13]] * 2 and state.length.tolist() == [14, 14]


@pytest.mark.parametrize(("inner", "head_dim"), [((64, 2.0), 64), ((160, 2.0), 64), ((33, 2.0), 33), ((96, 1.5), 48)])
def test_mamba_heads_divide_any_width(inner, head_dim):
    layer = Mamba2(inner[0], expand=inner[1])
    assert layer.head_dim == head_dim and layer.n_heads * head_dim == inner[0] * inner[1]
    assert layer(torch.randn(1, 3, inner[0]))[0].isfinite().all()


def test_mamba_starts_with_the_steps_of_the_paper():
    torch.manual_seed(0)
    layer = Mamba2(512, head_dim=1)
    steps, a = F.softplus(layer.dt.bias.detach()), layer.a_log.exp()
    assert 1e-3 * 0.999 < steps.min() < 1.2e-3 and 0.08 < steps.max() < 0.1 * 1.001
    assert steps.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.15)
    assert 1 <= a.min() < 1.2 and 15.8 < a.max() <= 16


def test_mamba_stays_finite_at_wild_gates():
    layer = Mamba2(8, d_state=4)
    for size in (-1e4, -20.0, 1e4):
        with torch.no_grad():
            layer.dt.bias.fill_(size)
        y, state = layer(torch.randn(2, 70, 8))
        y.sum().backward()
        assert y.isfinite().all() and all(s.isfinite().all() for s in state[1])
        assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Attention(10, 3), "d_model 10 is not divisible by n_heads 3"),
        (lambda: Attention(12, 4, n_kv_heads=3), "n_heads 4 is not divisible by n_kv_heads 3"),
        (lambda: Attention(12, 4), "heads of width 3; rotary positions want an even width"),
        (lambda: Attention(8, 2, sinks=1), "window is 0 and sinks 1"),
        (lambda: Attention(8, 2, window=-1), "window is -1"),
        (lambda: Attention(8, 2)(torch.ones(1, 2, 8), (1, 2)), "state is not an AttentionState"),
        (lambda: Attention(8, 2)(torch.ones(1, 2, 8), Attention(8, 4)(torch.ones(1, 2, 8))[1]), "state.keys has shape"),
        (lambda: Mamba2(8, expand=0.0), "wanted at least one channel"),
        (lambda: LSTM(8)(torch.ones(1, 2, 8), LSTMState(torch.ones(1, 8), torch.ones(1, 7))), "state.c has shape"),
        (lambda: LSTM(8)(torch.ones(1, 2, 7)), r"x has shape \(1, 2, 7\), wanted \(B, T, 8\)"),
        (lambda: basic.CausalConv(8, 0), "width is 0, wanted at least 1 token"),
    ],
)
def test_peers_refuse_in_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_no_autocast_reaches_the_recurrence_of_the_lstm(monkeypatch):
    """On a GPU too: cuDNN would take any autocast for float16."""

    class OnGPU(torch.Tensor):
        device = torch.device("cuda")

    def piece(_, x, h, c):
        seen.append(torch.is_autocast_enabled("cuda"))
        return x, h, c

    seen = []
    monkeypatch.setattr(lstm, "check_input", lambda *_: None)
    monkeypatch.setattr(LSTM, "_piece", piece)
    torch.set_autocast_enabled("cuda", True)
    try:
        LSTM(8)(torch.ones(2, 3, 8).as_subclass(OnGPU))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert seen == [False]


@pytest.mark.gpu
def test_gradients_under_autocast_do_not_vanish_in_the_lstm():
    """Where they are smaller than anything that float16 holds."""
    layer, x, found = LSTM(64).cuda(), draw(4, 40, 64, dtype=torch.float32).detach().cuda(), []
    for on in (True, False):
        with torch.autocast("cuda", torch.bfloat16, enabled=on):
            y, _ = layer(x)
        found.append(torch.autograd.grad(1e-9 * y[:, -1].float().sum(), [layer.w, layer.r]))
    close(*found, limit=1e-2)
