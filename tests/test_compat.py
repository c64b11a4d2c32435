"""NX-AI's names on our modules: their README runs, their weights give their numbers, and none of their defects is here."""

import contextlib
import copy
import dataclasses
import io
import pickle
import re
import subprocess
import sys
from importlib.metadata import metadata

import pytest
import torch
from torch import nn

import exlstm.compat as ours

theirs = pytest.importorskip("xlstm")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig  # noqa: E402

VOCABULARY = 61


def scattered(module, seed=0):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=draw) / (p.shape[-1] ** 0.5 if p.ndim > 1 else 1))
    return module.eval()


def config(names, kind="xLSTMBlockStackConfig", slstm=None, mlstm=None, **more):
    """The same configuration out of either package."""
    slstm = {"backend": "vanilla", "num_heads": 2, **(slstm or {})}
    return getattr(names, kind)(
        mlstm_block=names.mLSTMBlockConfig(mlstm=names.mLSTMLayerConfig(**(mlstm or {}))),
        slstm_block=names.sLSTMBlockConfig(slstm=names.sLSTMLayerConfig(**slstm)),
        **{"context_length": 64, "num_blocks": 3, "embedding_dim": 32, "slstm_at": [1], **more},
    )


def sample(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(found, wanted, limit=1e-10):
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= limit * wanted.norm()


# Their names, fields and snippets

NAMES = [name for name in dir(theirs) if name[0] != "_" and isinstance(getattr(theirs, name), type)]


def test_every_name_of_theirs_is_here():
    assert len(NAMES) == 14 and set(NAMES) <= set(ours.__all__)


@pytest.mark.parametrize("name", [*[n for n in NAMES if n.endswith("Config")], "xLSTMLargeConfig"])
def test_every_field_and_default_of_theirs_is_here(name):
    wanted = dataclasses.fields(getattr(theirs, name, xLSTMLargeConfig))
    found = {f.name: f for f in dataclasses.fields(getattr(ours, name))}
    for f in wanted:
        assert f.default == found.pop(f.name).default, f.name
    assert not found


SNIPPETS = re.findall(
    r"```python\s*\n(.*?)```", metadata("xlstm").get_payload() or metadata("xlstm")["Description"], re.DOTALL
)
SNIPPETS = [snippet for snippet in SNIPPETS if "xlstm" in snippet and "os.environ" not in snippet]


def test_their_readme_runs():
    """As it stands there but for the import, and on a CPU where it asks for a GPU."""
    assert len(SNIPPETS) == 5
    seen = {}
    for snippet in SNIPPETS:
        code = re.sub(r"from xlstm(\.xlstm_large\.model)? import", "from exlstm.compat import", snippet)
        code = code.replace('"cuda")', '"cpu")')
        # What stands alone on the last line is what the reader is told to be true.
        lines = code.rstrip().splitlines()
        if "==" in lines[-1]:
            lines[-1] = f"assert {lines[-1]}"
        exec(compile("\n".join(lines), "README of xlstm", "exec"), seen)
    assert isinstance(seen["xlstm"], ours.xLSTMLarge) and isinstance(seen["xlstm_stack"], ours.xLSTMLMModel)


# Their numbers


def test_a_stack_with_their_weights():
    net = scattered(theirs.xLSTMBlockStack(config(theirs))).double()
    stack = ours.xLSTMBlockStack(config(ours)).double().eval()
    stack.load_state_dict(net.state_dict())
    x = sample(2, 12, 32)
    with torch.no_grad():
        same(stack(x), net(x))
        state = other = None
        for t in range(12):
            y, state = stack.step(x[:, t : t + 1], state)
            z, other = net.step(x[:, t : t + 1], other)
            same(y, z)
        for block in other:
            for a, b in zip(state[block]["conv_state"], other[block]["conv_state"], strict=True):
                same(a[:, 1:], b[:, 1:])
            if "slstm_state" in other[block]:
                same(state[block]["slstm_state"], other[block]["slstm_state"])
            else:
                for a, b in zip(state[block]["mlstm_state"], other[block]["mlstm_state"], strict=True):
                    same(a, b)
        # A state of theirs goes on here.
        same(stack.step(x[:, :1], other)[0], net.step(x[:, :1], other)[0])


def test_a_language_model_with_their_weights():
    more = {"kind": "xLSTMLMModelConfig", "vocab_size": VOCABULARY, "tie_weights": True}
    net = scattered(theirs.xLSTMLMModel(config(theirs, **more))).double()
    model = ours.xLSTMLMModel(config(ours, **more)).double().eval()
    model.load_state_dict(net.state_dict())
    tokens = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        same(model(tokens), net(tokens))
        same(model.step(tokens[:, :1])[0], net.step(tokens[:, :1])[0])


LARGE = {"embedding_dim": 64, "num_heads": 2, "num_blocks": 2, "vocab_size": VOCABULARY, "return_last_states": True}
NATIVE = {
    "chunkwise_kernel": "chunkwise--native_autograd",
    "sequence_kernel": "native_sequence__native",
    "step_kernel": "native",
}
NATIVE |= {"mode": "inference", "autocast_kernel_dtype": "float32"}


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
def test_a_large_one_with_their_weights(weight_mode):
    settings = {**LARGE, **NATIVE, "ffn_proj_factor": 1.7, "weight_mode": weight_mode}
    net = scattered(xLSTMLarge(xLSTMLargeConfig(**settings)))
    model = ours.xLSTMLarge(ours.xLSTMLargeConfig(**settings)).eval()
    model.load_state_dict(net.state_dict())
    tokens = torch.randint(VOCABULARY, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        (y, state), (z, other) = model(tokens), net(tokens)
        same(y, z, 1e-5)
        for i in other:
            for a, b in zip(state[i], other[i], strict=True):
                same(a, b, 1e-5)
        same(model(tokens[:, :1], other)[0], net(tokens[:, :1], other)[0], 1e-5)
        assert torch.equal(model.generate(tokens[:, :6], 10)[0], net.generate(tokens[:, :6], 10)[0])
    with pytest.raises(ValueError, match="sampling_type is 'beam'"):
        model.generate(tokens, 3, "beam")


def test_layers_and_blocks_with_their_weights():
    """Alone they give what they give inside the stack, and a forward hands its state to a step."""
    stack = ours.xLSTMBlockStack(config(ours)).double().eval()
    x = sample(2, 12, 32)
    mlstm = ours.mLSTMLayer(ours.mLSTMLayerConfig(embedding_dim=32)).double().eval()
    slstm = ours.sLSTMLayer(ours.sLSTMLayerConfig(embedding_dim=32, num_heads=2)).double().eval()
    mblock = ours.mLSTMBlock(ours.mLSTMBlockConfig(ours.mLSTMLayerConfig(embedding_dim=32))).double().eval()
    sblock = (
        ours.sLSTMBlock(ours.sLSTMBlockConfig(ours.sLSTMLayerConfig(embedding_dim=32, num_heads=2))).double().eval()
    )
    for layer, block in ((mlstm, mblock), (slstm, sblock)):
        inner = stack.stack.blocks[layer is slstm]
        layer.layer.load_state_dict(inner.mixer.state_dict())
        block.block.load_state_dict(inner.state_dict())
        assert torch.equal(layer(x), inner.mixer(x)[0]) and torch.equal(block(x), inner(x)[0])
        for module in (layer, block):
            y, state = module(x[:, :7], return_last_state=True)
            z, _ = module.step(x[:, 7:8], **state)
            same(torch.cat([y, z], 1), module(x[:, :8]), 1e-9)
            module.reset_parameters()
            with pytest.raises(ValueError, match="wanted one token"):
                module.step(x)
    ffn = ours.GatedFeedForward(ours.FeedForwardConfig(embedding_dim=32, dropout=0.5))
    assert ffn.eval()(x.float()).shape == x.shape
    ffn.reset_parameters()
    for layer in (ours.mLSTMLayer, ours.sLSTMLayer, ours.GatedFeedForward):
        with pytest.raises(ValueError, match="embedding_dim is -1"):
            layer(layer.config_class())


# Their defects


def test_any_length_whatever_context_length_says():
    for length in (-1, 16):
        stack = ours.xLSTMBlockStack(config(ours, context_length=length))
        assert stack(torch.randn(2, 77, 32)).shape == (2, 77, 32)


@pytest.mark.parametrize("mode", ["train", "train_with_padding", "inference"])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_large_one_trains_in_every_mode_at_any_length(mode, batch):
    model = ours.xLSTMLarge(ours.xLSTMLargeConfig(**{**LARGE, "return_last_states": False, "mode": mode}))
    model(torch.randint(VOCABULARY, (batch, 37))).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_widths_that_are_no_multiples_of_64():
    """Theirs keeps states of rounded widths beside layers of others."""
    model = ours.xLSTMLarge(ours.xLSTMLargeConfig(**{**LARGE, "embedding_dim": 96})).eval()
    tokens = torch.randint(VOCABULARY, (2, 9))
    (whole, _), (first, state) = model(tokens), model(tokens[:, :5])
    same(torch.cat([first, model(tokens[:, 5:], state)[0]], 1), whole, 1e-5)
    assert model.generate(tokens, 4)[0].shape == (2, 4)


def test_a_feed_forward_is_not_shut_at_the_start():
    """transformers starts its gates with zeros, and nothing comes out."""
    block = ours.xLSTMLarge(ours.xLSTMLargeConfig(**LARGE)).model.stack.blocks[0]
    assert block.ffn(torch.randn(9, 64)).std() > 0.05 and block.mixer.o.weight.std() > 0.05


def test_a_forward_gives_the_state_and_takes_one():
    stack, x = ours.xLSTMBlockStack(config(ours)).double().eval(), sample(2, 10, 32)
    y, state = stack(x[:, :6], return_last_state=True)
    z, state = stack(x[:, 6:9], state, return_last_state=True)
    last, _ = stack.step(x[:, 9:], state)
    same(torch.cat([y, z, last], 1), stack(x), 1e-9)
    partial, _ = stack(x, {"block_1": state["block_1"]}, return_last_state=True)
    assert partial.isfinite().all()
    with pytest.raises(ValueError, match="state has block_7"):
        stack(x, {"block_7": {}})
    with pytest.raises(TypeError, match="mlstm_state is no part"):
        stack(x, {"block_1": state["block_0"]})


def test_what_is_not_understood_is_no_argument():
    stack, x = ours.xLSTMBlockStack(config(ours)), torch.randn(2, 5, 32)
    layer = ours.mLSTMLayer(ours.mLSTMLayerConfig(embedding_dim=32))
    for call in (
        lambda: stack(x, lengths=[5, 3]),
        lambda: layer(x, slstm_state=None),
        lambda: stack.step(x, mask=None),
    ):
        with pytest.raises(TypeError, match="unexpected keyword"):
            call()
    with pytest.raises(TypeError, match="unexpected keyword argument 'contxt'"):
        ours.xLSTMBlockStackConfig(contxt=3)


def test_a_row_that_is_emptied_stays_finite():
    stack, x = ours.xLSTMBlockStack(config(ours)).double().eval(), sample(2, 4, 32)
    stack.stack.blocks[1].mixer.b.data[:, 0] = -200.0
    _, state = stack(x, return_last_state=True)
    state["block_1"]["slstm_state"][:, 0] = 0
    y, _ = stack.step(x[:, :1], state)
    assert y.isfinite().all()


def test_it_compiles_whole():
    stack, x = ours.xLSTMBlockStack(config(ours)).double(), sample(2, 5, 32)
    same(torch.compile(stack, fullgraph=True, backend="aot_eager")(x), stack(x))
    torch._dynamo.reset()


def test_copies_and_pickles():
    stack, x = ours.xLSTMBlockStack(config(ours)).double(), sample(2, 5, 32)
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert torch.equal(other(x), stack(x))
    again = ours.xLSTMBlockStack(config(ours)).double()
    again.load_state_dict(stack.state_dict())
    assert torch.equal(again(x), stack(x))


def test_configurations_are_only_read():
    mine = config(ours, dropout=0.3, mlstm={"dropout": 0.5})
    before = copy.deepcopy(mine)
    ours.xLSTMBlockStack(mine)
    assert mine == before


def test_dropout_reaches_the_feed_forward():
    stack = ours.xLSTMBlockStack(config(ours, dropout=0.5))
    block = stack.stack.blocks[1].train()
    with torch.no_grad():
        block.mixer.norm.weight.zero_()
    x = torch.randn(1, 1, 32)
    assert not torch.equal(block(x)[0], block(x)[0])


def test_what_would_be_another_network_is_refused():
    for change, told in (
        ({"bias": True}, "bias"),
        ({"slstm": {"function": "lstm"}}, "function 'lstm'"),
        ({"slstm": {"forward_clipval": 3.0}}, "forward_clipval"),
        ({"slstm": {"gradient_recurrent_clipval": 3.0}}, "gradient_recurrent_clipval"),
        ({"slstm": {"gradient_recurrent_cut": True}}, "exact"),
        ({"slstm": {"num_heads": 3}}, "not divisible by n_heads 3"),
        ({"mlstm": {"num_heads": 3}}, "not divisible by n_heads 3"),
        ({"mlstm": {"conv1d_kernel_size": 0}}, "conv is 0, wanted a width of at least 1"),
        ({"mlstm": {"bias": True}}, "no bias"),
    ):
        with pytest.raises(ValueError, match=told):
            ours.xLSTMBlockStack(config(ours, **change))
    for change, told in (
        ({"use_bias": True}, "use_bias"),
        ({"v_dim_factor": 0.5}, "v_dim_factor"),
        ({"chunkwise_kernel": "parallel--native_siging_custbw"}, "sigmoid input gate"),
    ):
        with pytest.raises(ValueError, match=told):
            ours.xLSTMLarge(ours.xLSTMLargeConfig(**{**LARGE, **change}))
    with pytest.raises(ValueError, match="act_fn 'selu'"):
        ours.GatedFeedForward(ours.FeedForwardConfig(embedding_dim=8, act_fn="selu"))
    with pytest.raises(ValueError, match="neither"):
        ours.xLSTMBlockStack(ours.xLSTMBlockStackConfig())
    with pytest.raises(ValueError, match="no slstm_block"):
        ours.xLSTMBlockStack(ours.xLSTMBlockStackConfig(mlstm_block=ours.mLSTMBlockConfig(), slstm_at=[0]))


def test_unknown_kernels_give_one_warning():
    with pytest.warns(UserWarning, match="step_kernel 'tritonn' is unknown, did you mean 'triton'") as told:
        ours.xLSTMLarge(ours.xLSTMLargeConfig(**{**LARGE, "step_kernel": "tritonn"}))
    assert len(told) == 1
    with pytest.warns(UserWarning, match="backend 'metal' is unknown") as told:
        ours.xLSTMBlockStack(config(ours, slstm={"backend": "metal"}))
    assert len(told) == 1


def test_a_head_of_one_number_is_finite():
    with pytest.warns(UserWarning, match="4 heads of 1 unit"):
        layer = ours.sLSTMLayer(ours.sLSTMLayerConfig(embedding_dim=4, num_heads=4))
    assert all(p.isfinite().all() for p in layer.parameters()) and layer(torch.randn(2, 5, 4)).isfinite().all()


def test_it_starts_as_the_papers_have_it():
    model = ours.xLSTMLMModel(config(ours, kind="xLSTMLMModelConfig", vocab_size=5000, embedding_dim=64))
    assert model.model.embedding.weight.std().item() == pytest.approx((2 / (5 * 64)) ** 0.5, rel=0.05)
    model = ours.xLSTMLarge(ours.xLSTMLargeConfig(**LARGE))
    bias = model.model.stack.blocks[0].mixer.gate.bias
    assert bias.tolist() == [-10.0, -10.0, 3.0, 6.0]


ORDER = """
from exlstm import compat
slstm = compat.sLSTMBlockConfig(compat.sLSTMLayerConfig(backend="vanilla"))
mlstm = compat.mLSTMBlockConfig()
config = compat.xLSTMLMModelConfig(mlstm_block=mlstm, slstm_block=slstm, num_blocks=2, slstm_at=[1], vocab_size=9)
print(compat.xLSTMLMModel(config).get_weight_decay_optim_group_param_names())
"""


def test_weight_decay_groups_are_in_order_and_whole():
    other = subprocess.run([sys.executable, "-c", ORDER], capture_output=True, text=True)
    with contextlib.redirect_stdout(io.StringIO()) as here:
        exec(ORDER)
    assert here.getvalue() == other.stdout and other.stdout.startswith("(['model.")
    for on_embedding in (False, True):
        settings = {"kind": "xLSTMLMModelConfig", "vocab_size": 9, "weight_decay_on_embedding": on_embedding}
        model = ours.xLSTMLMModel(config(ours, **settings))
        decay, free = model.get_weight_decay_optim_group_param_names()
        assert sorted(decay + free) == sorted(name for name, _ in model.named_parameters())
        assert ("model.embedding.weight" in decay) == on_embedding
        assert "model.stack.blocks.1.mixer.r" in decay and "model.stack.blocks.1.mixer.b" in free
        groups = model.get_weight_decay_optim_groups()
        assert [len(group) for group in groups] == [len(decay), len(free)]
        assert all(isinstance(p, nn.Parameter) for group in groups for p in group)


def test_embedding_dropout_where_it_is_asked_for():
    settings = {"kind": "xLSTMLMModelConfig", "vocab_size": 9, "dropout": 0.5}
    assert isinstance(ours.xLSTMLMModel(config(ours, **settings)).dropout, nn.Identity)
    assert ours.xLSTMLMModel(config(ours, **settings, add_embedding_dropout=True)).dropout.p == 0.5
    model = ours.xLSTMLMModel(config(ours, **settings))
    model.reset_parameters()
