"""What is exported gives what the model gives: the step in ONNX Runtime and as pt2, the forward at any length."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from exlstm.cli import main
from exlstm.data.tokenizer import Bytes
from exlstm.export import export, parts
from exlstm.models.config import LanguageConfig, SLSTMOptions
from exlstm.models.language import LanguageModel

RECURRENT = ("mlstm", "slstm", "mlstm_up", "mamba2", "lstm")


def build(blocks):
    torch.manual_seed(0)
    config = LanguageConfig(
        d_model=32,
        n_layers=len(blocks),
        n_heads=2,
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("blocks", "limit"),
    [
        (("mlstm", "slstm"), 1e-6),
        pytest.param(("mlstm_up",), 1e-6, marks=pytest.mark.slow),
        pytest.param(("mlstm_up", "mamba2", "lstm"), 1.2e-6, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_step_in_onnx_runtime(blocks, limit, tmp_path, caplog):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build(blocks)
    (path,) = export(model, tmp_path / "out", "onnx")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    told = json.loads((tmp_path / "out" / "export.json").read_text())["files"]["step.onnx"]
    assert [i.name for i in session.get_inputs()] == list(told["inputs"])

    def call(tokens, state):
        given = {"tokens": tokens.numpy(), **{name: t.numpy() for name, t in state.items()}}
        logits, *after = (torch.from_numpy(np.array(x)) for x in session.run(told["outputs"], given))
        return logits, dict(zip(state, after, strict=True))

    for rows in (1, 5):
        assert stepped(call, model, 100, rows) < limit


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


def test_what_cannot_be_exported_is_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'onnx'"):
        export(build(("mlstm",)), tmp_path / "out", "onx")
    with pytest.raises(ValueError, match="no step of attention: its state grows"):
        export(build(("attention", "lstm")), tmp_path / "out", "pt2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other things than an export"):
        export(build(("mlstm",)), tmp_path / "full", "pt2")
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
