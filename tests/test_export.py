"""What is exported gives what the model gives: the step in ONNX Runtime and as pt2, the forward at any length."""

import contextlib
import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from exlstm.cli import main
from exlstm.data.tokenizer import Bytes
from exlstm.export import export, parts
from exlstm.models.config import AttentionOptions, LanguageConfig, MLSTMWindowOptions, SLSTMOptions, StackConfig
from exlstm.models.language import LanguageModel
from exlstm.models.rnn import xLSTM
from exlstm.models.stack import BLOCKS, Stack
from exlstm.ops.backend import log_sigmoid

RECURRENT = ("mlstm", "slstm", "mlstm_up", "mamba2", "lstm")
# Kinds of block with a window that is left within a few tokens.
WINDOWS = {
    "mlstm_window": MLSTMWindowOptions(window=6, sinks=2),
    "attention": AttentionOptions(window=5, sinks=2, rope_base=0.0, n_heads=4, n_kv_heads=1),
}


def build(blocks, seed=0, d_model=32, **options):
    torch.manual_seed(seed)
    config = LanguageConfig(
        **options,
        d_model=d_model,
        n_layers=len(blocks),
        n_heads=2 if d_model == 32 else 4,
        blocks=blocks,
        vocab_size=61,
        slstm=SLSTMOptions(conv=3),
        tie_embeddings=True,
    )
    return LanguageModel(config).eval()


def tokens_of(*shape, seed=1):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stepped(call, model, steps, rows=3):
    """‖difference‖ / ‖logits‖ of `call(tokens, state by name)` from the model, the largest of `steps`; states are compared."""
    _, state = model(tokens_of(rows, 1))
    held = {name: torch.zeros_like(t) for name, t in parts(state)}
    ours, worst = None, 0.0
    for t in range(steps):
        tokens = tokens_of(rows, 1, seed=t)
        logits, held = call(tokens, held)
        wanted, ours = model(tokens, ours)
        worst = max(worst, ((logits - wanted[:, 0]).norm() / wanted.norm()).item())
    last = dict(parts(ours))
    assert all(torch.allclose(held[name], last[name], atol=1e-5, rtol=1e-5) for name in last)
    return worst


def in_runtime(model, folder):
    """The exported step as a function of tokens and the state by name, in ONNX Runtime."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (path,) = export(model, folder, "onnx")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    told = json.loads((folder / "export.json").read_text())["files"]["step.onnx"]
    assert {i.name: list(i.shape) for i in session.get_inputs()} == told["inputs"]

    def call(tokens, state):
        given = {"tokens": tokens.numpy(), **{name: t.numpy() for name, t in state.items()}}
        logits, *after = (torch.from_numpy(np.array(x)) for x in session.run(told["outputs"], given))
        return logits, dict(zip(state, after, strict=True))

    return call


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "blocks",
    [
        ("mlstm", "slstm"),
        *(pytest.param((kind,), marks=pytest.mark.slow) for kind in RECURRENT),
        pytest.param(("mlstm_up", "mamba2", "lstm"), marks=pytest.mark.slow),
    ],
    ids="+".join,
)
def test_the_step_in_onnx_runtime(blocks, tmp_path, caplog):
    model = build(blocks)
    call = in_runtime(model, tmp_path / "out")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    for rows in (1, 5):
        assert stepped(call, model, 100, rows) < 1e-6


@torch.no_grad()
def apart(call, model, rows, steps=100):
    """‖difference‖ / ‖logits‖ over all steps: of `call` from the model, and of both from the model in float64."""
    wide, ours, truth, found = copy.deepcopy(model).double(), None, None, []
    held = {name: torch.zeros_like(t) for name, t in parts(model(tokens_of(rows, 1))[1])}
    for t in range(steps):
        tokens = tokens_of(rows, 1, seed=t)
        logits, held = call(tokens, held)
        (mine, ours), (exact, truth) = model(tokens, ours), wide(tokens, truth)
        found.append((logits.double(), mine[:, 0].double(), exact[:, 0]))
    there, here, exact = map(torch.stack, zip(*found, strict=True))
    return tuple(((a - b).norm() / exact.norm()).item() for a, b in ((there, here), (there, exact), (here, exact)))


# Blocks, d_model, bias of the forget gates where it is not the one they start with, and how far from the model: the numbers of
# a step are 32 bits wide there and here, and sums of 256 products are added in another order.
EXACT = [
    (("mlstm_up",), 32, 12.0, 1e-6),
    *[pytest.param((kind,), d, None, 1e-6, marks=pytest.mark.slow) for kind in RECURRENT for d in (32, 256)],
    *[
        pytest.param(blocks, d, None, limit, marks=pytest.mark.slow)
        for blocks in (("mlstm_up", "mamba2", "lstm"), ("mlstm", "slstm", "mlstm_up"), ("mlstm_up",) * 3)
        for d, limit in ((32, 1e-6), (64, 1e-6), (256, 2e-6))
    ],
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("blocks", "d_model", "forget", "limit"), EXACT)
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_runtime_is_as_near_to_exact_numbers_as_torch(blocks, d_model, forget, limit, seed, tmp_path):
    """A gate that remembers for 160,000 tokens has its logarithm from 1 - sigmoid, not from sigmoid."""
    model = build(blocks, seed, d_model)
    if forget is not None:
        with torch.no_grad():
            model.stack.blocks[0].mixer.gate.bias[2:] = forget
    call = in_runtime(model, tmp_path / "out")
    for rows in (1, 5):
        between, there, here = apart(call, model, rows)
        assert between < limit and there < 2 * here, (between, there, here)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mlstm", "mlstm_up", "slstm"])
def test_gates_that_are_open_or_shut_in_onnx_runtime(kind, tmp_path):
    for i, f in ((90.0, -120.0), (-90.0, 120.0), (90.0, 120.0), (-90.0, -120.0)):
        model = build((kind,))
        gates = model.stack.blocks[0].mixer.b.mT if kind == "slstm" else model.stack.blocks[0].mixer.gate.bias
        with torch.no_grad():
            for part, value in zip(gates.chunk(4, -1) if kind == "slstm" else gates.chunk(2), (i, f)):
                part.fill_(value)
        between, _, _ = apart(in_runtime(model, tmp_path / f"{i} {f}"), model, 3, 40)
        assert between < 1e-6, (i, f, between)


@pytest.mark.slow
def test_the_step_as_pt2(tmp_path):
    model = build(RECURRENT)
    step = torch.export.load(export(model, tmp_path / "out", "pt2")[0])
    assert not any("exlstm" in str(node.target) for node in step.graph.nodes), "an operator of ours is in the graph"
    run = step.module()

    def call(tokens, state):
        logits, *after = run(tokens, *state.values())
        return logits, dict(zip(state, after, strict=True))

    assert stepped(call, model, 30) < 1e-6


LOADED = """
import sys, torch
import exlstm.models.language
forward = torch.export.load(sys.argv[1]).module()
for length in map(int, sys.argv[2:]):
    tokens = torch.arange(3 * length).view(3, length) % 61
    torch.save(forward(tokens), f"{sys.argv[1]}.{length}")
"""


@pytest.mark.parametrize(
    "blocks",
    [("mlstm", "slstm"), pytest.param(("mlstm_up", "mamba2", "attention"), marks=pytest.mark.slow)],
    ids=str,
)
def test_the_forward_at_any_length(blocks, tmp_path):
    """In another process, at lengths around the chunks' and beyond."""
    model, lengths = build(blocks), [4, 31, 32, 33, 64, 129, 500]
    path = export(model, tmp_path / "out", "pt2")[-1]
    assert path.name == "forward.pt2"
    done = subprocess.run([sys.executable, "-c", LOADED, str(path), *map(str, lengths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for length in lengths:
        tokens = torch.arange(3 * length).view(3, length) % 61
        with torch.no_grad():
            torch.testing.assert_close(torch.load(f"{path}.{length}"), model(tokens)[0], atol=5e-5, rtol=1e-4)


@torch.no_grad()
def out_of_zeros(call, model, folder, format, steps=25, rows=3):
    """‖difference‖ / ‖logits‖ of an exported step, from a state of zeros as export.json has it, the largest of `steps`."""
    inputs = json.loads((folder / "export.json").read_text())["files"][f"step.{format}"]["inputs"]
    kinds = {name: torch.int64 if name.endswith(("positions", "length")) else torch.float32 for name in inputs}
    held = {
        name: torch.zeros(rows, *shape[1:], dtype=kinds[name]) for name, shape in inputs.items() if name != "tokens"
    }
    state, worst = None, 0.0
    for t in range(steps):
        tokens = tokens_of(rows, 1, seed=t)
        logits, held = call(tokens, held)
        wanted, state = model(tokens, state)
        worst = max(worst, ((logits - wanted[:, 0]).norm() / wanted.norm()).item())
    return worst


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [pytest.param("mlstm_window", marks=pytest.mark.slow), "attention"])
def test_a_window_in_files(kind, tmp_path):
    """A hybrid's step keeps one size and starts at zeros; its forward serves texts within the window and beyond it."""
    model = build(("mlstm", kind), **{kind: WINDOWS[kind]})
    paths = export(model, tmp_path / "pt2", "pt2")
    step, forward = (torch.export.load(path).module() for path in paths)

    def call(tokens, state):
        logits, *after = step(tokens, *state.values())
        return logits, dict(zip(state, after, strict=True))

    assert out_of_zeros(call, model, tmp_path / "pt2", "pt2") < 1e-6
    for length in (4, 5, 6, 7, 8, 9, 64, 129):
        tokens = tokens_of(2, length)
        with torch.no_grad():
            torch.testing.assert_close(forward(tokens), model(tokens)[0], atol=5e-5, rtol=1e-4)
    call = in_runtime(model, tmp_path / "onnx")
    assert out_of_zeros(call, model, tmp_path / "onnx", "onnx") < 1e-6


PARTS = {  # of every kind of block: what can be had as pt2
    **{kind: ["step", "forward"] for kind in (*RECURRENT, "mlstm_window")},
    "attention": ["forward"],
    "lstm": ["step"],
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_block_has_its_parts_or_says_why_not(kind, tmp_path, monkeypatch):
    """What is to be written is known before anything is; where there is no step there is no ONNX."""
    written = []
    monkeypatch.setattr("exlstm.export._write", lambda model, folder, format, wanted: written.append(wanted))
    pytest.importorskip("onnxscript")
    told = f"no step of {kind}: its state grows"
    for format, wanted in (("pt2", PARTS[kind]), ("onnx", [part for part in PARTS[kind] if part == "step"])):
        with contextlib.nullcontext() if wanted else pytest.raises(ValueError, match=told):
            export(build((kind,)), tmp_path / format, format)
            assert written.pop() == wanted


def test_what_cannot_be_exported_is_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'onnx'"):
        export(build(("mlstm",)), tmp_path / "out", "onx")
    with pytest.raises(ValueError, match="no step of attention: its state grows"):
        export(build(("attention", "lstm")), tmp_path / "out", "pt2")
    with pytest.raises(TypeError, match="model is Stack, wanted a LanguageModel"):
        export(build(("mlstm",)).stack, tmp_path / "out", "pt2")
    with pytest.raises(ValueError, match="on the meta device and has no values to export"):
        export(build(("mlstm",)).to("meta"), tmp_path / "out", "pt2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other things than an export"):
        export(build(("mlstm",)), tmp_path / "full", "pt2")
    pytest.importorskip("onnxscript")
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match=f"the model is {dtype}, for which ONNX Runtime lacks operators"):
            export(build(("mlstm",)).to(dtype), tmp_path / "out", "onnx")
    monkeypatch.setattr("exlstm.export.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'exlstm"):
        export(build(("mlstm",)), tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys):
    model = LanguageModel(LanguageConfig(d_model=32, n_layers=1, blocks=("slstm",))).train()
    model.tokenizer = Bytes()
    model.save_pretrained(tmp_path / "run")
    # An export that stands there is replaced, one in the other format stays.
    for format in ("onnx", "pt2"):
        (tmp_path / "run" / "export" / format).mkdir(parents=True)
        (tmp_path / "run" / "export" / format / "export.json").write_text("{}")
    assert main(["export", str(tmp_path / "run"), "--format", "pt2"]) == 0
    told = capsys.readouterr().out
    assert "step.pt2" in told and "forward.pt2" in told and " bytes" in told
    described = json.loads((tmp_path / "run" / "export" / "pt2" / "export.json").read_text())
    assert (tmp_path / "run" / "export" / "onnx" / "export.json").read_text() == "{}"
    assert described["tokenizer"] == {"kind": "bytes"}
    assert main(["export", str(tmp_path / "run"), "--format", "onx"]) == 2
    assert main(["export"]) == 2


class First(torch.nn.Module):
    """What a network gives, without its state."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[0]


class Gate(torch.nn.Module):
    def forward(self, x):
        return log_sigmoid(x)


def by_torch(net, x, path):
    """A network as torch.onnx.export writes it by itself, as a function in ONNX Runtime."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(net, (x,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*BLOCKS, "xLSTM"])
def test_a_layer_goes_to_onnx_by_torch_itself(kind, tmp_path):
    """A stack or an xLSTM without a word from us, over the length that it was shown."""
    torch.manual_seed(0)
    if kind == "xLSTM":
        net = xLSTM(32, 32, batch_first=True, bidirectional=True)
    else:
        net = Stack(StackConfig(d_model=32, n_layers=1, n_heads=2, blocks=kind))
    net, x = First(net.eval()), torch.randn(2, 6, 32)
    found = by_torch(net, torch.randn(2, 6, 32), tmp_path / "net.onnx")(x)
    torch.testing.assert_close(found, net(x), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_forget_gates_keep_their_digits_there(tmp_path):
    x = torch.linspace(-40, 15, 200)
    found = by_torch(Gate(), torch.zeros(200), tmp_path / "gate.onnx")(x)
    torch.testing.assert_close(found.double(), torch.nn.functional.logsigmoid(x.double()), atol=0, rtol=1e-5)
