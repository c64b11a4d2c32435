"""Triton kernels between the matrix products of training under their laws: in the interpreter, on a GPU with `pytest -m gpu`."""

import copy

import pytest
import torch

import exlstm
from exlstm import LanguageConfig, LanguageModel
from exlstm.layers import basic
from exlstm.ops.gated import gated
from gpu import (
    DEVICE,
    INTERPRETED,
    close,
    compile_kernel,
    cost,
    equal,
    here,
    hold_in_the_interpreter,
    law,
    normal,
    poisoned,
)

# The interpreter cuts a bfloat16 off where a GPU rounds it.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3, torch.float16: 5e-4}
dtypes = pytest.mark.parametrize("dtype", LIMITS, ids=str)


@here
def test_the_laws_hold_in_the_interpreter():
    hold_in_the_interpreter(__file__)


# The norm with the residual addition in front of it

NORMS = {
    "rms": lambda d: basic.RMSNorm(d, device=DEVICE),
    "layer": lambda d: basic.LayerNorm(d, device=DEVICE),
    "layer with bias": lambda d: basic.LayerNorm(d, bias=True, device=DEVICE),
}


def module(name, width):
    """A norm of that name with parameters drawn at random."""
    made = NORMS[name](width)
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(normal(width, seed=20 + i))
    return made


def residual(width, dtype, time=5):
    """x in float32 and y in `dtype`, both strided."""
    x = normal(2, time, 2 * width, seed=0).requires_grad_()
    return x, normal(time, 2, width, seed=1, dtype=dtype).requires_grad_()


def normed(norm, x, y, both=True):
    """n, x + y and the gradients of a weighted sum of both, or of n alone."""
    found = norm.after(x.chunk(2, -1)[1], y.transpose(0, 1))[: 1 + both]
    factors = [normal(*z.shape, seed=5 + i, dtype=torch.bfloat16).to(z.dtype) for i, z in enumerate(found)]
    return [*(z.detach() for z in found), *torch.autograd.grad(found, [x, y, *norm.parameters()], factors)]


def plain(call, norm, *leaves, **options):
    """`call` in float64 without kernels."""
    name = "rms" if isinstance(norm, basic.RMSNorm) else "layer" if norm.bias is None else "layer with bias"
    wide = NORMS[name](norm.weight.shape[0]).double()
    wide.load_state_dict(norm.state_dict())
    with exlstm.backend("cpu"):
        return call(wide, *(x.detach().double().requires_grad_() for x in leaves), **options)


@law
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("width", [1, 40, 96, 129, pytest.param(1024, marks=pytest.mark.gpu)])
def test_norm_after_a_sum_equals_the_plain_one(name, width):
    norm = module(name, width)
    for dtype, limit in LIMITS.items():
        x, y = residual(width, dtype)
        with poisoned(), torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            found = normed(norm, x, y)
        assert [z.dtype for z in found[:4]] == [dtype, torch.float32, torch.float32, dtype]
        wanted = plain(normed, norm, x, y)
        if width > 1:
            close(found, wanted, [limit, 1e-6, limit, limit, *[2e-6] * len(wanted[4:])])
    equal(normed(norm, x, y), normed(norm, x, y))


@law
@dtypes
def test_norm_keeps_the_dtype_of_what_it_reads(dtype):
    norm = module("layer", 24)
    x, y = (z.detach().to(dtype).requires_grad_() for z in residual(24, dtype))
    found = normed(norm, x, y, both=False)
    assert [z.dtype for z in found] == [dtype, dtype, dtype, torch.float32]
    # What was added is rounded before it is normalised, as in the plain one.
    close(found, plain(normed, norm, x, y, both=False), 2 * LIMITS[dtype])
    x = x.detach().chunk(2, -1)[1].requires_grad_()
    n = norm(x)
    assert n.dtype == dtype and norm.after(x, None)[1] is x
    (dx,) = torch.autograd.grad(n.float().square().sum(), x)
    assert dx.dtype == dtype and dx.isfinite().all()
    with torch.no_grad():
        equal([norm(x)], [n])


@law
@pytest.mark.parametrize("name", NORMS)
def test_norm_sums_over_many_programs(name, monkeypatch):
    from exlstm.ops import row_kernels

    monkeypatch.setattr(row_kernels, "BACKWARD", 64)
    monkeypatch.setattr(row_kernels, "PROGRAMS", 4)
    norm, (x, y) = module(name, 24), residual(24, torch.float32, time=13)
    with poisoned():
        found = normed(norm, x, y)
    close(found, plain(normed, norm, x, y), 2e-6)


@law
def test_norm_compiles_whole_and_is_differentiated_once():
    norm = module("rms", 16)
    leaves = [normal(2, 3, 16, seed=i).requires_grad_() for i in (0, 1)]

    def loss(x, y):
        n, total = norm.after(x, y)
        return (norm(n) * total).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    wanted = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    equal(torch.autograd.grad(compiled(*leaves), leaves), wanted)
    with pytest.raises(RuntimeError, match="the norm has no second derivative on a GPU"):
        wanted[0].square().sum().backward()


# The gated product


def product(leaves, activation):
    """y and the gradients of a weighted sum of it; g is strided."""
    g, u = leaves
    y = gated(g.chunk(2, -1)[1], u, activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, normal(*y.shape, seed=9, dtype=torch.bfloat16).to(y.dtype))]


@law
@dtypes
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("shape", [(2, 5, 24), (1, 1, 1), (1, 3, 2001)], ids=str)
def test_gated_equals_the_plain_one(shape, activation, dtype):
    wide = (*shape[:-1], 2 * shape[-1])
    leaves = [3 * normal(*size, seed=i, dtype=dtype) for i, size in enumerate((wide, shape))]
    leaves = [x.requires_grad_() for x in leaves]
    with poisoned():
        found = product(leaves, activation)
    with exlstm.backend("cpu"):
        wanted = product([x.detach().double().requires_grad_() for x in leaves], activation)
    assert all(x.dtype == dtype for x in found)
    close(found, wanted, LIMITS[dtype])
    equal(product(leaves, activation), found)


@law
def test_gated_stays_finite_compiles_whole_and_is_differentiated_once():
    def loss(g, u):
        return gated(g, u).square().sum()

    leaves = [normal(2, 3, 16, seed=i).requires_grad_() for i in (0, 1)]
    wanted = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    equal(torch.autograd.grad(compiled(*leaves), leaves), wanted)
    with pytest.raises(RuntimeError, match="gated has no second derivative on a GPU"):
        wanted[0].square().sum().backward()
    for activation in ("silu", "gelu"):
        g = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4], device=DEVICE).requires_grad_()
        (dg,) = torch.autograd.grad(gated(g, torch.ones_like(g), activation).sum(), g)
        close([dg], [torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0], dtype=torch.float64, device=DEVICE)], 1e-6)
    with pytest.raises(ValueError, match="activation 'tanh' is not one of silu, gelu"):
        gated(g, g, "tanh")


# Maps of one x


def mapped(linears, wide, x):
    """Every y, and the gradients of a weighted sum of them."""
    ys = basic.maps(x.transpose(0, 1), *linears, wide=wide)
    leaves = [x, *(linear.weight for linear in linears), *([] if wide is None else wide.parameters())]
    factors = [normal(*y.shape, seed=5 + i, dtype=torch.bfloat16).to(y.dtype) for i, y in enumerate(ys)]
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, factors)]


def drawn(inputs, *outputs, bias=False):
    """Linear maps, their inputs scaled so that outputs are of size 1."""
    made = [torch.nn.Linear(inputs, size, bias=bias, device=DEVICE) for size in outputs]
    with torch.no_grad():
        for i, p in enumerate(p for linear in made for p in linear.parameters()):
            p.copy_(normal(*p.shape, seed=40 + i) * inputs**-0.5)
    return made


@law
@dtypes
@pytest.mark.parametrize(("inputs", "outputs"), [(24, (8, 40)), (33, (16,)), (200, (16, 24, 8))], ids=str)
def test_maps_equal_the_plain_ones(inputs, outputs, dtype):
    linears, (wide,) = drawn(inputs, *outputs), drawn(inputs, 6, bias=True)
    x = normal(5, 2, inputs, seed=0, dtype=dtype).requires_grad_()
    for own in (None, wide):
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            found = mapped(linears, own, x)
            with exlstm.backend("cpu"):
                plain = mapped(linears, own, x)
        assert [y.dtype for y in found] == [y.dtype for y in plain]
        doubles = [copy.deepcopy(linear).double() for linear in linears]
        wanted = mapped(doubles, own and copy.deepcopy(own).double(), x.detach().double().requires_grad_())
        close(found, wanted, 2e-6 if dtype == torch.float32 else 4 * LIMITS[dtype])
        if own is not None:
            # In float32 whatever the dtype of x.
            close(found[len(linears) :][:1], wanted[len(linears) :][:1], 1e-6)


@law
def test_maps_cast_once_and_leave_alone_what_they_should():
    linears, (wide,) = drawn(24, 8, 8), drawn(24, 4, bias=True)
    x, heard = normal(2, 3, 24, seed=0), []
    with torch.autocast(DEVICE, torch.bfloat16):
        *ys, p = basic.maps(x, *linears, wide=wide)
        assert p.dtype == torch.float32 and all(y.dtype == torch.bfloat16 for y in ys)
        assert len({id(y.grad_fn) for y in ys}) == 1
        with torch.no_grad():
            *quiet, _ = basic.maps(x, *linears, wide=wide)
        equal(quiet, ys)
    linears[0].weight.requires_grad_(False)
    ys = basic.maps(x, *linears)
    sum(y.sum() for y in ys).backward()
    assert linears[0].weight.grad is None and linears[1].weight.grad is not None
    linears[1].register_forward_hook(lambda *_: heard.append(1))
    assert len({y.grad_fn for y in basic.maps(x, *linears)}) == 2 and heard == [1]
    x.requires_grad_()
    linears[1]._forward_hooks.clear()
    (dx,) = torch.autograd.grad(sum(y.square().sum() for y in basic.maps(x, *linears)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


# A whole model


def small_model():
    torch.manual_seed(0)
    config = LanguageConfig(vocab_size=11, d_model=32, n_layers=2, n_heads=2, blocks=("mlstm", "attention"))
    return LanguageModel(config, device=DEVICE)


def trained(model, tokens, dtype):
    """The loss and the gradient of every parameter."""
    with torch.autocast(DEVICE, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        loss = model.loss(tokens)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def doubled(module, args, output):
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


class Other(torch.nn.Module):
    """Somebody's module in a block's place."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, state=None, *, mask=None, reset=None):
        y, state = self.block(x, state, mask=mask, reset=reset)
        return 2 * y, state


PARTS = ("embedding", "stack.blocks.0", "stack.blocks.1.norm", "stack.blocks.0.ffn_norm", "stack.blocks.0.mixer.gate")


@law
@pytest.mark.parametrize("name", [*PARTS, "stack.blocks.0.mixer.norm", "head", "other"])
def test_whoever_listens_to_a_module_or_replaces_a_block_does_so_beside_kernels_too(name):
    torch.manual_seed(0)
    model = LanguageModel(LanguageConfig(d_model=16, n_layers=2, n_heads=2, blocks=["mlstm"], vocab_size=11))
    model = model.to(DEVICE).eval()
    if name == "other":
        model.stack.blocks[0] = Other(model.stack.blocks[0])
    else:
        model.get_submodule(name).register_forward_hook(doubled)
    tokens, found = torch.tensor([[1, 2, 3]], device=DEVICE), {}
    for backend in ("reference", "auto"):
        with exlstm.backend(backend), torch.no_grad():
            logits, state = model(tokens)
            found[backend] = (logits, model(tokens[:, :1], state)[0])
    torch.testing.assert_close(found["auto"], found["reference"], atol=1e-4, rtol=1e-4)
    engine = exlstm.Engine(model, 1)
    (sequence,) = engine.admit(exlstm.Request([1, 2, 3], 2, temperature=0))
    for _ in engine.run():
        pass
    with exlstm.backend("reference"):
        wanted = model(torch.tensor([[1, 2, 3, *sequence.tokens]], device=DEVICE))[0][:, -1]
    torch.testing.assert_close(engine.state(sequence).logits, wanted, atol=1e-4, rtol=1e-4)


@law
def test_a_model_of_kernels_learns_as_the_plain_one():
    model, tokens = small_model(), torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = trained(model, tokens, torch.float32)
    model.gradient_checkpointing = True
    equal(trained(model, tokens, torch.float32), found)
    with poisoned():
        rough = trained(model, tokens, torch.bfloat16)
    with exlstm.backend("reference"):
        wanted = trained(model.double(), tokens, torch.float64)
    close(found, wanted, 1e-5)
    close(rough, wanted, 0.1)


# Compiled for an H200

ROW_TYPES = {
    **dict.fromkeys(("y", "n", "dn", "dy"), "*bf16"),
    **dict.fromkeys(("x", "r", "dr", "dx", "weight", "bias", "dweight", "dbias"), "*fp32"),
    "eps": "fp32",
}


@here
@pytest.mark.parametrize(("width", "full"), [(1024, False), (1024, True), (768, False), (4096, True)])
def test_norm_compiles_without_spills(width, full):
    from exlstm.ops import row_kernels as kernels

    what = {"CENTRE": full, "HAS_BIAS": full}
    for kernel, tile, more in (
        (kernels.row_norm_forward_kernel, kernels.FORWARD, {"ADD": True}),
        (kernels.row_norm_backward_kernel, kernels.BACKWARD, {"HAS_DR": True, "TWO": True}),
    ):
        cut = kernels._cut(width, tile)
        warps = cut.pop("num_warps")
        registers, spilled = cost(compile_kernel(kernel, ROW_TYPES, cut | what | more, warps))
        assert 16 < registers <= 128 and spilled == 0


@here
@pytest.mark.parametrize("silu", [True, False])
def test_gated_compiles_without_spills(silu):
    from exlstm.ops import gated_kernels as kernels

    types = dict.fromkeys(("g", "u", "y", "dy", "dg", "du"), "*bf16")
    for kernel, numbers in (
        (kernels.gated_forward_kernel, kernels.FORWARD),
        (kernels.gated_backward_kernel, kernels.BACKWARD),
    ):
        compiled = compile_kernel(kernel, types, {"BN": numbers, "SILU": silu}, kernels.WARPS)
        registers, spilled = cost(compiled)
        assert 16 < registers <= 64 and spilled == 0


@here
@pytest.mark.parametrize("outputs", [8, 16, 64, 128])
def test_wide_maps_compile_without_spills(outputs):
    from exlstm.ops import maps_kernels as kernels

    cut = kernels._cut(outputs, torch.bfloat16)
    warps = cut.pop("num_warps")
    types = {"x": "*bf16", **dict.fromkeys(("weight", "bias", "p"), "*fp32")}
    registers, spilled = cost(compile_kernel(kernels.wide_forward_kernel, types, cut, warps))
    assert 16 < registers <= 255 and spilled == 0


# A step out of a graph


@here
def test_a_captured_step_wants_a_gpu():
    from exlstm.train.capture import Captured

    layer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="wants parameters on an NVIDIA GPU, they are on cpu"):
        Captured(layer, layer.parameters())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("blocks", [("mlstm",), ("mlstm", "slstm"), ("mlstm_up", "mamba2"), ("lstm",)], ids="+".join)
def test_a_captured_step_equals_an_eager_one(blocks, again):
    """Loss and gradients of every step, with weights that change in between and batches of two forms, in bfloat16 by autocast."""
    from exlstm.train.capture import Captured

    torch.manual_seed(0)
    eager = LanguageModel(
        LanguageConfig(d_model=128, n_layers=2, n_heads=2, vocab_size=97, blocks=blocks), device=DEVICE
    )
    held = copy.deepcopy(eager)
    eager.gradient_checkpointing = held.gradient_checkpointing = again
    captured = Captured(held.loss, held.parameters())
    for step in range(6):
        batch = torch.randint(97, (2, 65 if step % 2 else 130), device=DEVICE)
        with torch.autocast("cuda", torch.bfloat16):
            wanted, found = eager.loss(batch), captured(batch)
        wanted.backward()
        assert torch.equal(wanted.detach(), found), step
        for (name, p), q in zip(eager.named_parameters(), held.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), (step, name)
            with torch.no_grad():
                p -= 0.1 * p.grad
                q -= 0.1 * q.grad
            p.grad = None


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("groups", [1, 4])
def test_attention_reads_documents_and_windows_as_with_a_mask(window, groups, monkeypatch):
    """In bfloat16 by autocast, against the mask in float32; nothing as large as the mask is made."""
    from exlstm.layers.attention import Attention, Heads

    torch.manual_seed(0)
    layer = Attention(256, 4, n_kv_heads=4 // groups, window=window, device=DEVICE)
    x = torch.randn(2, 300, 256, device=DEVICE, requires_grad=True)
    reset = torch.rand(2, 300, device=DEVICE) < 0.02
    for flags in (reset, None) if window else (reset,):
        inputs = [x, *layer.parameters()]
        wanted = layer(x, reset=flags)[0]
        truth = [wanted, *torch.autograd.grad(wanted.sin().sum(), inputs)]
        with torch.autocast("cuda", torch.bfloat16), monkeypatch.context() as patch:
            patch.setattr(Heads, "_visible", None)
            found = layer(x, reset=flags)[0]
        found = [found, *torch.autograd.grad(found.float().sin().sum(), inputs)]
        close(found, [z.double() for z in truth], 1e-2)
