"""Weights of NX-AI's xlstm 2.0.6 and of transformers give on our blocks what they give there, and ours give it there."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from exlstm.models.checkpoint import load_checkpoint, save_checkpoint
from exlstm.models.config import LanguageConfig, MLSTMOptions
from exlstm.models.language import LanguageModel
from exlstm.models.names_stack import FIELDS
from exlstm.models.stack import Stack
from exlstm.ops.mlstm import MLSTMState

xlstm = pytest.importorskip("xlstm")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

from xlstm.xlstm_large.from_pretrained import load_from_pretrained  # noqa: E402
from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig  # noqa: E402

VOCABULARY = 61
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}
dtypes = pytest.mark.parametrize("dtype", LIMITS, ids=lambda d: str(d).removeprefix("torch."))


def scattered(module, seed=0):
    """The module with every weight moved away from where it starts."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=draw)
            p.add_(0.5 * noise / (p.shape[-1] ** 0.5 if p.ndim > 1 else 1))
    return module.eval()


def tokens_of(*shape, seed=1):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def same(found, wanted, limit):
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert (found - wanted).norm() <= limit * wanted.norm()


# xLSTMBlockStack and xLSTMLMModel

# name: (embedding_dim, number of blocks, blocks of sLSTM, settings of mLSTM, of sLSTM, of the feed-forward or None, others)
STACKS = {
    "README": (64, 3, [1], {}, {}, {"proj_factor": 1.3}, {}),
    "mLSTM alone": (32, 2, [], {"num_heads": 2, "conv1d_kernel_size": 3, "qkv_proj_blocksize": 8}, {}, {}, {}),
    "sLSTM alone": (48, 2, "all", {}, {"num_heads": 3, "conv1d_kernel_size": 0}, {"proj_factor": 2.1}, {}),
    "heads of their own": (64, 2, [0], {"num_heads": 8}, {"num_heads": 2, "conv1d_kernel_size": 2}, {}, {}),
    "one head": (32, 2, [1], {"num_heads": 1, "qkv_proj_blocksize": 16}, {"num_heads": 1}, {}, {}),
    "no feed-forward": (32, 2, [1], {"proj_factor": 1.5}, {}, None, {}),
    "widths of 16": (
        *(32, 2, [1], {"proj_factor": 1.5, "round_proj_up_to_multiple_of": 16}, {}),
        *({"round_proj_up_to_multiple_of": 1, "proj_factor": 1.4}, {}),
    ),
    "no norms": (32, 2, [1], {}, {"group_norm_weight": False}, {}, {"add_post_blocks_norm": False}),
}
stacks = pytest.mark.parametrize("name", STACKS)


def stack_config(name, kind=xlstm.xLSTMBlockStackConfig, **more):
    width, depth, at, mlstm, slstm, ffn, others = STACKS[name]
    slstm = {"backend": "vanilla", "num_heads": 4, "bias_init": "powerlaw_blockdependent", **slstm}
    return kind(
        mlstm_block=None if at == "all" else xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig(**mlstm)),
        slstm_block=xlstm.sLSTMBlockConfig(
            slstm=xlstm.sLSTMLayerConfig(**slstm),
            feedforward=None
            if ffn is None
            else xlstm.FeedForwardConfig(**{"proj_factor": 1.3, "act_fn": "gelu", **ffn}),
        ),
        **{"context_length": 64, "num_blocks": depth, "embedding_dim": width, "slstm_at": at, **others, **more},
    )


def cuda_layout(weights):
    """The same weights as the CUDA backend keeps them: kernel (H, in, gate · out), bias (H, gate, out)."""
    weights = dict(weights)
    for name in [n for n in weights if n.endswith("_recurrent_kernel_")]:
        heads, _, width = weights[name].shape
        weights[name] = weights[name].view(heads, 4, width, width).permute(0, 3, 1, 2).reshape(heads, width, 4 * width)
        bias = name.replace("_recurrent_kernel_", "_bias_")
        weights[bias] = weights[bias].view(4, heads, width).transpose(0, 1).reshape(-1)
    return weights


@stacks
@dtypes
def test_a_block_stack_gives_the_same(name, dtype):
    net = scattered(xlstm.xLSTMBlockStack(stack_config(name))).to(dtype)
    ours = load_checkpoint(net.state_dict())
    assert isinstance(ours, Stack) and not ours.training
    x = torch.randn(2, 37, STACKS[name][0], generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    with torch.no_grad():
        same(ours(x)[0], net(x), LIMITS[dtype])
        other = load_checkpoint(cuda_layout(net.state_dict()))
        assert torch.equal(other(x)[0], ours(x)[0])


@stacks
def test_its_steps_and_states_are_the_same(name):
    """Their steps begin at a stabiliser of 0, their forward at none: a step of ours begins where it is told to."""
    net = scattered(xlstm.xLSTMBlockStack(stack_config(name))).double()
    ours = load_checkpoint(net.state_dict())
    x = torch.randn(2, 9, STACKS[name][0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs, state = None, []
    for block in ours.blocks:
        is_mlstm = hasattr(block.mixer, "skip")
        zeros = [x.new_zeros(2, *shape) for shape in block.mixer.shapes]
        state.append((zeros[0], MLSTMState(*zeros[1:])) if is_mlstm else None)
    # A stack takes a state for each block, or for none.
    empty = ours(x[:, :1])[1]
    state = tuple(mine if mine is not None else fresh_slstm(made) for mine, made in zip(state, empty, strict=True))
    with torch.no_grad():
        for t in range(9):
            wanted, theirs = net.step(x[:, t : t + 1], theirs)
            y, state = ours(x[:, t : t + 1], state)
            same(y, wanted, 1e-10)
    for i, (conv, memory) in enumerate(state):
        their = theirs[f"block_{i}"]
        if conv is not None:
            same(conv, their["conv_state"][0][:, 1:], 1e-10)
        if isinstance(memory, MLSTMState):
            scale = memory.n.shape[-1] ** -0.5
            for mine, wanted in zip((memory.c * scale, memory.n * scale, memory.m), their["mlstm_state"], strict=True):
                same(mine, wanted.reshape(mine.shape), 1e-10)
        else:
            for mine, wanted in zip(memory, their["slstm_state"], strict=True):
                same(mine.flatten(1), wanted, 1e-10)


def fresh_slstm(state):
    conv, memory = state
    return None if conv is None else torch.zeros_like(conv), type(memory)(*map(torch.zeros_like, memory))


@stacks
@pytest.mark.parametrize("tied", [False, True])
def test_an_lm_model_gives_the_same(name, tied):
    config = stack_config(name, xlstm.xLSTMLMModelConfig, vocab_size=VOCABULARY, tie_weights=tied)
    net, tokens = scattered(xlstm.xLSTMLMModel(config)).double(), tokens_of(2, 33)
    ours = load_checkpoint(net.state_dict(), config)
    assert isinstance(ours, LanguageModel) and ours.config.tie_embeddings == tied
    with torch.no_grad():
        same(ours(tokens)[0], net(tokens), 1e-10)
        written = tokens
        for _ in range(6):
            written = torch.cat([written, net(written)[:, -1:].argmax(-1)], 1)
        assert torch.equal(ours.generate(tokens, 6, temperature=0), written[:, 33:])
    wrapped = {"state_dict": {f"model.net.{key}": value for key, value in net.state_dict().items()}, "epoch": 3}
    assert torch.equal(load_checkpoint(wrapped, config)(tokens)[0], ours(tokens)[0])


def test_the_input_gate_is_where_it_seems_not_to_be():
    """The trap, told by itself: with only `fgate.weight` changed, the first step's stabiliser, the input gate, changes."""
    net = scattered(xlstm.xLSTMBlockStack(stack_config("sLSTM alone"))).double()
    ours = load_checkpoint(net.state_dict())
    net.blocks[0].xlstm.fgate.weight.data.mul_(2)
    changed = load_checkpoint(net.state_dict())
    assert not torch.equal(changed.blocks[0].mixer.w[:, :16], ours.blocks[0].mixer.w[:, :16])
    assert torch.equal(changed.blocks[0].mixer.w[:, 16:], ours.blocks[0].mixer.w[:, 16:])


def test_eps_and_the_first_stabiliser_count():
    net = scattered(xlstm.xLSTMBlockStack(stack_config("mLSTM alone"))).double()
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for attribute, value in (("eps", 0.0), ("m_start", 0.0)):
        ours = load_checkpoint(net.state_dict())
        for block in ours.blocks:
            setattr(block.mixer, attribute, value)
        with pytest.raises(AssertionError):
            same(ours(x)[0], net(x), 1e-10)


# xLSTMLarge

NATIVE = {
    "chunkwise_kernel": "chunkwise--native_autograd",
    "sequence_kernel": "native_sequence__native",
    "step_kernel": "native",
    "mode": "inference",
    "return_last_states": True,
}
LARGE = {
    "plain": {},
    "heads": {"num_heads": 4, "qk_dim_factor": 1.0},
    "widths": {"embedding_dim": 48, "num_heads": 3, "qk_dim_factor": 0.25, "ffn_proj_factor": 1.7},
    "rounding": {"ffn_proj_factor": 1.4, "ffn_round_up_to_multiple_of": 1},
    "no norm, no caps": {"add_out_norm": False, "gate_soft_cap": None, "output_logit_soft_cap": None},
    "eps": {"eps": 1e-3, "norm_eps": 1e-2, "gate_soft_cap": 5.0, "output_logit_soft_cap": 3.0},
}


def large(name, dtype=torch.float32, **more):
    kept = str(dtype).removeprefix("torch.")
    settings = {"embedding_dim": 64, "num_heads": 2, "num_blocks": 2, "vocab_size": VOCABULARY, **NATIVE, **LARGE[name]}
    settings |= {"autocast_kernel_dtype": kept, "inference_state_dtype": kept, **more}
    config = xLSTMLargeConfig(**settings, norm_reduction_force_float32=dtype == torch.float32)
    return scattered(xLSTMLarge(config)).to(dtype), config


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("weight_mode", ["single", "fused"])
@dtypes
def test_xlstm_large_gives_the_same(name, weight_mode, dtype):
    net, config = large(name, dtype, weight_mode=weight_mode)
    ours, tokens = load_checkpoint(net.state_dict(), config), tokens_of(2, 70)
    with torch.no_grad():
        wanted, theirs = net(tokens)
        found, state = ours(tokens)
        same(found, wanted, LIMITS[dtype])
        for i, (conv, memory) in enumerate(state):
            assert conv is None
            for part, mine, wanted in zip("cnm", memory, theirs[i], strict=True):
                # Their chunks carry m in about float32, whatever the dtype.
                same(mine, wanted.reshape(mine.shape), max(LIMITS[dtype], 1e-8 * (part == "m")))
        more = tokens_of(2, 1, seed=2)
        same(ours(more, state)[0], net(more, theirs)[0], max(LIMITS[dtype], 1e-8))
        written = net.generate(tokens[:, :5], 12)[0]
        assert torch.equal(ours.generate(tokens[:, :5], 12, temperature=0), written[:, -12:])


def test_a_folder_of_xlstm_large(tmp_path):
    net, config = large("eps")
    weights = sorted(net.state_dict().items())
    lines = [f"{name}: {json.dumps(getattr(config, name))}  # as it was\n" for name in LARGE["eps"] | {"num_heads": 2}]
    (tmp_path / "config.yaml").write_text("---\n" + "".join(lines))
    for n, part in enumerate((weights[:9], weights[9:])):
        save_file({name: t.contiguous() for name, t in part}, tmp_path / f"model_{n}.safetensors")
    ours, tokens = load_checkpoint(tmp_path), tokens_of(2, 20)
    with torch.no_grad():
        same(ours(tokens)[0], net(tokens)[0], 1e-5)
    assert load_checkpoint(tmp_path, dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    assert torch.equal(load_checkpoint(tmp_path / "weights.pt")(tokens)[0], ours(tokens)[0])


# transformers


def hf(**more):
    settings = {"hidden_size": 128, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": VOCABULARY, **more}
    config = transformers.xLSTMConfig(**{"autocast_kernel_dtype": "float32", **settings})
    return scattered(transformers.xLSTMForCausalLM(config))


def hf_generate(net, tokens, count):
    with torch.no_grad():
        return net.generate(tokens, max_new_tokens=count, do_sample=False, pad_token_id=1, eos_token_id=None)[
            :, -count:
        ]


@pytest.mark.parametrize("settings", [{}, {"eps": 1e-3, "gate_soft_cap": 4.0}, {"qk_dim_factor": 1.0}], ids=str)
def test_transformers_gives_the_same(settings, tmp_path):
    net, tokens = hf(**settings), tokens_of(2, 40)
    net.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    more = tokens_of(2, 1, seed=2)
    with torch.no_grad():
        for ours in (load_checkpoint(tmp_path), load_checkpoint(net.state_dict(), net.config)):
            (found, state), theirs = ours(tokens), net(tokens)
            same(found, theirs.logits, 1e-5)
            for (_, memory), their in zip(state, theirs.cache.rnn_state.values(), strict=True):
                for mine, wanted in zip(memory, their, strict=True):
                    same(mine, wanted.reshape(mine.shape), 1e-5)
            # Their step writes into the state that it is given.
            same(ours(more, state)[0], net(more, cache=theirs.cache).logits, 1e-5)
            assert torch.equal(ours.generate(tokens[:, :7], 16, temperature=0), hf_generate(net, tokens[:, :7], 16))


# Back


def ours_to_export(**more):
    torch.manual_seed(3)
    options = MLSTMOptions(conv=0, eps=1e-6, **more.pop("mlstm", {}))
    settings = {"d_model": 128, "n_layers": 2, "n_heads": 2, "vocab_size": VOCABULARY, "mlstm": options, **more}
    return scattered(LanguageModel(LanguageConfig(**settings)))


EXPORTS = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "widths": {"mlstm": {"ffn_ratio": 1.9, "multiple": 1, "qk_ratio": 1.0}},
}


@pytest.mark.parametrize("name", EXPORTS)
def test_back_to_transformers(name, tmp_path):
    model, tokens = ours_to_export(**EXPORTS[name]), tokens_of(2, 40)
    save_checkpoint(model, tmp_path / "out")
    settings = {"output_loading_info": True, "autocast_kernel_dtype": "float32"}
    net, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **settings)
    assert isinstance(net, transformers.xLSTMForCausalLM)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        same(net.eval()(tokens).logits, model(tokens)[0], 1e-5)
    again = load_checkpoint(tmp_path / "out")
    with torch.no_grad():
        same(again(tokens)[0], model(tokens)[0], 1e-6)


@pytest.mark.parametrize("name", [*EXPORTS, "no norm, no cap"])
def test_back_to_xlstm_large(name, tmp_path):
    model, tokens = ours_to_export(**EXPORTS.get(name, {"norm": "none", "logit_cap": 0.0})), tokens_of(2, 40)
    save_checkpoint(model, tmp_path / "out", "xlstm_large")
    kernels = {f"{kind}_name": NATIVE[kind] for kind in ("chunkwise_kernel", "sequence_kernel", "step_kernel")}
    net = load_from_pretrained(tmp_path / "out", return_last_states=True, **kernels).eval()
    for module in net.modules():
        if hasattr(getattr(module, "config", None), "autocast_kernel_dtype"):
            module.config.autocast_kernel_dtype = "float32"
    with torch.no_grad():
        same(net(tokens)[0], model(tokens)[0], 1e-5)
    again = load_checkpoint(tmp_path / "out")
    with torch.no_grad():
        same(again(tokens)[0], model(tokens)[0], 1e-6)


def test_what_their_layout_has_not_is_refused(tmp_path):
    for settings, told in (
        ({"blocks": ("mlstm", "slstm")}, "blocks of kind slstm"),
        ({"mlstm": MLSTMOptions()}, "a convolution"),
        ({"mlstm": MLSTMOptions(conv=0, ffn_ratio=0.0)}, "without a feed-forward"),
        ({"mlstm": MLSTMOptions(conv=0, i_gate="sigmoid")}, "an input gate of kind sigmoid"),
        ({"mlstm": MLSTMOptions(conv=0, normalize=False)}, "without a normaliser"),
        ({"norm": "layer", "mlstm": MLSTMOptions(conv=0)}, "a norm of kind layer"),
    ):
        model = LanguageModel(LanguageConfig(d_model=32, n_layers=2, **settings))
        with pytest.raises(ValueError, match=told):
            save_checkpoint(model, tmp_path / "out")
    model = LanguageModel(LanguageConfig(d_model=32, n_layers=1, mlstm=MLSTMOptions(conv=0)))
    with pytest.raises(ValueError, match="did you mean 'transformers'"):
        save_checkpoint(model, tmp_path / "out", "transformer")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        save_checkpoint(model, tmp_path / "full")
    with pytest.raises(TypeError, match="is Linear"):
        save_checkpoint(nn.Linear(2, 2), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


# What does not fit is told by name


def test_our_own_folder_loads(tmp_path):
    model = LanguageModel(LanguageConfig(d_model=32, n_layers=1, vocab_size=VOCABULARY))
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(load_checkpoint(tmp_path / "ours").head.weight, model.head.weight)


def test_a_state_dict_stays_its_owners():
    net, config = large("plain")
    ours = load_checkpoint(net.state_dict(), config)
    theirs = {t.untyped_storage().data_ptr() for t in net.state_dict().values()}
    assert not theirs & {t.untyped_storage().data_ptr() for t in ours.state_dict().values()}
    assert all(p.requires_grad for p in ours.parameters())


def test_what_is_not_understood_is_named(tmp_path):
    net, _ = large("plain")
    weights = net.state_dict()
    block = "backbone.blocks.0.mlstm_layer."
    lacking = {name: t for name, t in weights.items() if name != f"{block}v.weight"}
    for changed, told in (
        (lacking, f"lacks {block}v.weight"),
        (weights | {f"{block}q.bias": torch.zeros(3)}, f"not understood: {block}q.bias"),
        (weights | {f"{block}v.weight": torch.zeros(5, 64)}, r"mixer.v.weight \(5, 64\) instead of \(64, 64\)"),
        (
            weights | {f"{block}v.weight": weights[f"{block}v.weight"] * float("nan")},
            "NaN or infinities in stack.*mixer.v",
        ),
        (weights | {f"{block}v.weight": weights[f"{block}v.weight"].long()}, "int64, wanted a floating dtype"),
        ({"lstm.weight_ih_l0": torch.zeros(3)}, "holds lstm.weight_ih_l0: no weights of"),
        ({"stack.blocks.0.norm.weight": torch.zeros(3)}, "ours want the folder of save_pretrained"),
        ({}, "holds nothing"),
        ({"a": 3}, "holds int under 'a'"),
        ({"blocks.0.xlstm_norm.weight": torch.zeros(4)}, "looks like an xLSTMBlockStack, and lacks blocks.0.xlstm."),
    ):
        with pytest.raises(ValueError, match=told):
            load_checkpoint(changed)
    for changed, told in (
        ({"num_heads": 4}, "says num_heads 4, the weights have 2"),
        ({"ffn_proj_facto": 2}, "unknown field 'ffn_proj_facto', did you mean 'ffn_proj_factor'"),
        ({"use_bias": True}, "use_bias"),
        ({"chunkwise_kernel": "chunkwise--triton_xl_chunk_siging"}, "sigmoid input gate"),
    ):
        with pytest.raises(ValueError, match=told):
            load_checkpoint(weights, changed)
    stack = scattered(xlstm.xLSTMBlockStack(stack_config("README")))
    for change, told in (
        (lambda c: c["slstm_block"]["slstm"].update(function="lstm"), "slstm.function 'lstm'"),
        (lambda c: c["slstm_block"]["feedforward"].update(act_fn="selu"), "feedforward.act_fn 'selu'"),
        (lambda c: c.update(num_blocks=7), "says num_blocks 7, the weights have 3"),
        (lambda c: c.update(num_block=3), "unknown field 'num_block', did you mean 'num_blocks'"),
        (
            lambda c: c["slstm_block"]["slstm"].update(functoin="lstm"),
            "unknown field 'slstm_block.slstm.functoin', did you mean 'function'",
        ),
    ):
        settings = {"slstm_block": {"slstm": {}, "feedforward": {}}}
        change(settings)
        with pytest.raises(ValueError, match=told):
            load_checkpoint(stack.state_dict(), settings)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load_checkpoint(tmp_path)
    with pytest.raises(TypeError, match="source is int"):
        load_checkpoint(3)
    with pytest.raises(TypeError, match="config is int"):
        load_checkpoint(weights, 3)
    with pytest.raises(ValueError, match="dtype is"):
        load_checkpoint(weights, dtype=torch.int64)
    with pytest.raises(ValueError, match="cannot be used here"):
        load_checkpoint(weights, device="nowhere")


def test_every_field_of_their_configurations_is_known():
    for where, kind in {
        "": xlstm.xLSTMLMModelConfig,
        "mlstm_block": xlstm.mLSTMBlockConfig,
        "mlstm_block.mlstm": xlstm.mLSTMLayerConfig,
        "slstm_block": xlstm.sLSTMBlockConfig,
        "slstm_block.slstm": xlstm.sLSTMLayerConfig,
        "slstm_block.feedforward": xlstm.FeedForwardConfig,
    }.items():
        assert set(FIELDS[where].split()) == {f.name for f in dataclasses.fields(kind) if f.name[0] != "_"}, where


def test_files_that_are_damaged_or_run_code(tmp_path):
    net, _ = large("plain")
    torch.save({"weights": net}, tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=r"whole.pt is no file of torch.save with tensors alone"):
        load_checkpoint(tmp_path / "whole.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds list, wanted a state dict"):
        load_checkpoint(tmp_path / "list.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ValueError, match=r"torn.safetensors is damaged"):
        load_checkpoint(tmp_path / "torn.safetensors")
    folder = tmp_path / "twice"
    folder.mkdir()
    for n in range(2):
        save_file({"lm_head.weight": torch.zeros(2, 2)}, folder / f"model_{n}.safetensors")
    with pytest.raises(ValueError, match=r"holds lm_head.weight, as does another file"):
        load_checkpoint(folder)
    (folder / "config.yaml").write_text("embedding_dim: 4\nblocks:\n  - 3\n")
    with pytest.raises(ValueError, match="line 2, is 'blocks:', wanted a name and a plain value"):
        load_checkpoint(folder / "model_0.safetensors")


MEASURED = """
import resource, sys, torch
from exlstm.models.checkpoint import load_checkpoint
from exlstm.models import foreign
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = load_checkpoint(sys.argv[1], dtype=getattr(torch, sys.argv[2]) if len(sys.argv) > 2 else None)
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.slow), True], ids=["single", "fused"])
def test_a_large_one_is_loaded_within_its_own_size(fused, tmp_path):
    """Shard by shard: the peak of the process grows by the model and little more."""
    settings = {"embedding_dim": 512, "num_heads": 4, "num_blocks": 4, "weight_mode": "fused" if fused else "single"}
    net = xLSTMLarge(xLSTMLargeConfig(vocab_size=4096, **settings, **NATIVE))
    weights = sorted(net.state_dict().items())
    for n in range(4):
        save_file({name: t.contiguous() for name, t in weights[n::4]}, tmp_path / f"model_{n}.safetensors")
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, size = map(int, done.stdout.split())
    assert size > 60e6 and grown < 1.1 * size + 20e6


def peak_of(call) -> int:
    """Bytes that torch holds at the most while `call` runs, beyond what it held before, files that it has mapped included."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kept = call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert kept is not None
    return peak


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
def test_nothing_is_held_beside_the_files_and_the_model(weight_mode, tmp_path):
    """In the dtype that is stored the model is the files, mapped, and no check copies a tensor; in another it is itself."""
    settings = {"embedding_dim": 256, "num_heads": 4, "num_blocks": 4, "vocab_size": 4096, "weight_mode": weight_mode}
    net = xLSTMLarge(xLSTMLargeConfig(**settings, **NATIVE)).bfloat16()
    weights = sorted(net.state_dict().items())
    for n in range(4):
        save_file({name: t.contiguous() for name, t in weights[n::4]}, tmp_path / f"model_{n}.safetensors")
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    model, small = sum(t.numel() for _, t in weights), max(t.numel() for _, t in weights) // 10
    for dtype, own in ((None, 0), (torch.float32, 4 * model), (torch.float16, 2 * model)):
        beside = peak_of(lambda dtype=dtype: load_checkpoint(tmp_path, dtype=dtype)) - sum(sizes)
        assert beside < own + small < own + max(sizes), (dtype, beside, own)
