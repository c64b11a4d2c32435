"""What users get wrong: one sentence that says what came and what was wanted, exit code 2, nothing written, nothing lost."""

import builtins
import errno
import json
import math
import os
import shutil
import warnings
from dataclasses import fields

import pytest
import torch

import exlstm
from exlstm import LanguageConfig, LanguageModel, Stack, StackConfig, mLSTM, sLSTM
from exlstm.cli import main
from exlstm.data.config import DataConfig
from exlstm.models import checkpoint, probe
from exlstm.models.config import OPTIONS
from exlstm.ops.mlstm import mlstm
from exlstm.ops.slstm import slstm
from exlstm.train.config import TrainConfig

TINY = "--model.d-model 16 --model.n-layers 1 --model.n-heads 2 --data.context 16 --data.batch-size 2"
SHORT = f"{TINY} --train.eval-batches 1 --train.save-every 1 --train.steps 2"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with texts of every kind, and a finished run in it."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "text.txt").write_text("".join(f"line {i}, and then the next one\n" for i in range(100)))
    (folder / "empty.txt").touch()
    (folder / "one.txt").write_bytes(b"x")
    (folder / "binary.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "pictures").mkdir()
    (folder / "pictures" / "p.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" * 9)
    (folder / "bare").mkdir()
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.tex").write_text("years of work")
    for name, told in {
        "broken.json": "{",
        "list.json": "[1]",
        "unknown.json": '{"model": {"d_modle": 3}}',
        "room.json": '{"modle": {}}',
        "value.json": '{"model": {"d_model": "wide"}}',
        "later.json": '{"version": 99}',
        "number.json": '{"train": 3}',
    }.items():
        (folder / name).write_text(told)
    for run, more in (("run", ""), ("letters", "--data.tokenizer characters")):
        command = f"train {folder}/text.txt --out {folder}/{run} {SHORT} {more}"
        assert main(command.split()) == 0
    return folder


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    """A copy of it, and the working folder."""
    shutil.copytree(whole, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def folders(folder):
    return {path for path in folder.rglob("*") if path.is_dir()}


def refused(command, place, capsys):
    """The sentence; nothing in `place` may differ afterwards."""
    before, held = contents(place), folders(place)
    with warnings.catch_warnings(record=True):
        assert main(command if isinstance(command, list) else command.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("exlstm: ")
    assert told.endswith("\n")
    assert told.count("\n") == 1, f"not one line: {told}"
    assert "Traceback" not in told
    assert contents(place) == before
    assert folders(place) == held
    return told


# command: what its sentence must say
COMMANDS = {
    # text
    f"train missing.txt {SHORT}": "no file or folder missing.txt",
    f"train *.nothing {SHORT}": "no file matches *.nothing",
    f"train empty.txt {SHORT}": "empty.txt is empty",
    f"train one.txt {SHORT}": "one.txt is too short with 1 byte",
    f"train binary.bin {SHORT}": "binary",
    f"train bare {SHORT}": "bare holds no text",
    f"train pictures {SHORT}": "pictures holds no text",
    f"train text.txt missing.txt {SHORT}": "missing.txt",
    # sizes, blocks, fields, values
    "train text.txt --size smal": "unknown size 'smal', did you mean 'small'",
    "train text.txt --model.blocks mlstm slst": "unknown block 'slst', did you mean 'slstm'",
    "train text.txt --model.d-modle 3": "unknown field --model.d-modle, did you mean --model.d-model?",
    "train text.txt --steps 3": "did you mean --train.steps?",
    "train text.txt --lr 3": "did you mean --train.lr?",
    "train text.txt --zzz 3": "see exlstm train --help",
    "train text.txt --model.d-model wide": "--model.d-model is 'wide', wanted a number",
    "train text.txt --model.d-model": "--model.d-model wants a value",
    "train text.txt --train.betas 0.9": "--train.betas wants 2 values",
    "train text.txt --model.slstm.ffn-ratio -1": "slstm.ffn_ratio is -1.0, wanted a finite number of at least 0",
    "train text.txt --model.mlstm.gate-cap nan": "mlstm.gate_cap is nan, wanted a finite number of at least 0",
    "train text.txt --model.mlstm.i-bias inf": "mlstm.i_bias is inf, wanted a finite number",
    "train text.txt --model.slstm.forget-bias 3 nan": "slstm.forget_bias is (3.0, nan), wanted a finite number",
    "train text.txt --model.logit-cap inf": "logit_cap is inf, wanted a finite number of at least 0",
    "train text.txt --model.blocks mlstm_up --model.mlstm-up.up-ratio 0": "up_ratio 0.0 leaves no inner width",
    "train text.txt --model.d-model 30 --model.n-heads 4": "d_model 30 is not divisible by n_heads 4",
    "train text.txt --model.n-layers 0": "n_layers is 0",
    "train text.txt --model.dropout 1": "dropout is 1.0",
    "train text.txt --model.vocab-size 9": "--model.vocab-size follows from the tokenizer",
    "train text.txt --minutes 0": "minutes is 0.0",
    "train text.txt --minutes soon": "--minutes is 'soon', wanted a number",
    "train text.txt --minutes nan": "minutes is nan",
    "train text.txt --minutes 1 --train.steps 5": "one of the two",
    "train text.txt --train.lr -1": "lr is -1.0",
    f"train text.txt --train.seed {2**63}": "seed is 9223372036854775808, wanted a whole number below 2^63",
    f"train text.txt {SHORT} --model.d-model 1000000000": "there is not enough memory: a smaller",
    f"train text.txt {SHORT} --data.batch-size 5000000000000": "there is not enough memory: a smaller",
    "train text.txt --train.precision float8": "precision is 'float8'",
    f"train text.txt {SHORT} --train.compile --train.compile-backend nonsense": "compile_backend is 'nonsense'",
    "train text.txt --data.context 0": "context is 0",
    "train text.txt --data.held-out 1.5": "held_out is 1.5",
    "train text.txt --data.tokenizer byte": "unknown tokenizer 'byte', did you mean 'bytes'",
    "train text.txt --device gpu9": "device 'gpu9' cannot be used here",
    # files with settings
    "train text.txt --config missing.json": "missing.json",
    "train text.txt --config broken.json": "broken.json is not JSON",
    "train text.txt --config list.json": "list.json holds list",
    "train text.txt --config unknown.json": "unknown field 'model.d_modle', did you mean 'd_model'",
    "train text.txt --config room.json": "unknown field 'modle', did you mean 'model'",
    "train text.txt --config value.json": "model.d_model is 'wide'",
    "train text.txt --config later.json": "format version 99",
    "train text.txt --config number.json": "train 3, wanted an object",
    # run folders
    f"train text.txt --out run {SHORT} --model.d-model 32": "run holds another run: model.d_model is 32, was 16",
    f"train text.txt --out run {SHORT} --train.lr 0.5": "lr is 0.5, was 0.005",
    f"train text.txt --out run {SHORT} --data.context 8": "its settings: exlstm train --config run/run.json --out run",
    f"train broken.json --out run {SHORT}": "the corpus changed since this run began",
    f"train text.txt --out thesis {SHORT}": "thesis is no run, it holds chapter.tex",
    f"train text.txt --out text.txt {SHORT}": "text.txt is a file",
    f"train text.txt --out text.txt/below {SHORT}": "text.txt is a file",
    # what is asked of a run
    "generate": "generate wants the folder of a run",
    "generate missing": "missing does not exist",
    "generate text.txt": "text.txt is a file",
    "generate thesis": "thesis holds neither config.json nor checkpoints",
    "generate run --temperature -1": "temperature is -1.0",
    "generate run --top-p 2": "top_p is 2.0",
    "generate run --tokens -5": "exlstm: tokens is -5",
    "generate run --prompt -x": "--prompt wants a value, and one that begins with - is written --prompt=-...",
    "generate run --tokens many": "--tokens is 'many', wanted a number",
    "generate run --device gpu9": "device 'gpu9' cannot be used here",
    "generate run --device meta": "device 'meta' cannot be used here",
    "generate letters --prompt €": "€",
    "generate run extra": "unexpected argument 'extra'",
    "generate --run run": "unknown field --run, see exlstm generate --help",
    "evaluate": "evaluate wants the folder of a run",
    "evaluate run missing.txt": "missing.txt",
    "evaluate run empty.txt": "empty.txt",
    "evaluate run one.txt": "one.txt has one token",
    "evaluate letters binary.bin": "binary",
    "evaluate run --limit -1": "limit is -1",
    "plot": "plot wants the folder of a run",
    "plot thesis": "thesis is not the folder of a run",
    "plot run --tokens 1": "tokens is 1",
    # commands
    "trian text.txt": "unknown command 'trian', did you mean 'train'",
    "bench kernls": "unknown benchmark 'kernls', did you mean 'kernels'",
    "bench kernels --rounds many": "--rounds is 'many', wanted a number",
    "doctor 3": "unexpected argument '3'",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_command_is_one_sentence(command, place, capsys):
    assert COMMANDS[command] in refused(command, place, capsys)


def test_plot_without_matplotlib_says_how_to_get_it(place, capsys, monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert "pip install 'exlstm[plot]'" in refused("plot run", place, capsys)


# What happens to the newest checkpoint of a run of steps 0 to 2, of which two are kept.
DAMAGE = {
    "flipped": lambda folder: _flip(folder / "model.safetensors"),
    "truncated": lambda folder: os.truncate(folder / "model.safetensors", 100),
    "gone": lambda folder: (folder / "model.safetensors").unlink(),
    "config": lambda folder: (folder / "config.json").write_text("{}"),
    "manifest": lambda folder: (folder / "manifest.json").unlink(),
}


def _flip(file):
    data = bytearray(file.read_bytes())
    data[-5] ^= 0x40
    file.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_last_good_one_taken(place, capsys, damage):
    newest = place / "run/checkpoints/step-00000002"
    DAMAGE[damage](newest)
    before = contents(place)
    assert main(["generate", "run", "--tokens", "5", "--seed", "0"]) == 0
    out, err = capsys.readouterr()
    assert "step-00000002" in err
    assert err.count("\n") == 1
    assert len(out) > 1
    assert contents(place) == before
    # Training goes on from the good one and ends where the run had ended.
    assert main(f"train text.txt --out run {SHORT}".split()) == 0
    assert "step-00000002" in capsys.readouterr().out
    assert main(["generate", "run", "--tokens", "5", "--seed", "0"]) == 0
    assert capsys.readouterr().err == ""


def test_a_checkpoint_that_is_replaced_while_it_is_read(place, capsys, monkeypatch):
    """As a training does that goes on: every one that was listed is gone, and a newer one stands there."""
    steps, real = place / "run/checkpoints", checkpoint._load_folder

    def replaced(*args):
        monkeypatch.setattr(checkpoint, "_load_folder", real)
        (steps / "step-00000002").rename(steps / "step-00000003")
        shutil.rmtree(steps / "step-00000001")
        return real(*args)

    monkeypatch.setattr(checkpoint, "_load_folder", replaced)
    assert main(["generate", "run", "--tokens", "5", "--seed", "0"]) == 0
    assert capsys.readouterr().err == ""


def test_no_good_checkpoint_is_one_sentence(place, capsys):
    for folder in (place / "run/checkpoints").iterdir():
        _flip(folder / "model.safetensors")
    assert "no checkpoint in run can be read" in refused("generate run", place, capsys)


def test_a_damaged_corpus_is_told(place, capsys):
    (place / "run/data/corpus.json").write_text("{")
    assert "holds no corpus that can be read" in refused("plot run", place, capsys)


def test_a_damaged_run_json_is_told(place, capsys):
    (place / "run/run.json").write_text('{"version": 1,')
    assert "run.json is not JSON" in refused(f"train text.txt --out run {SHORT}", place, capsys)


def test_a_full_disk_is_one_sentence(place, capsys, monkeypatch):
    """Every write of a byte below the new run fails from the first checkpoint on; the old run is untouched."""
    real = os.fsync

    def full(handle):
        if "model.safetensors" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle)

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in refused(f"train text.txt --out new {SHORT}", place, capsys)


def test_a_full_disk_while_the_text_is_prepared(place, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("exlstm.data.text._aside", full)
    assert "No space left on device" in refused(f"train text.txt --out new {SHORT}", place, capsys)


def test_a_loss_that_is_not_finite_ends_in_a_sentence(place, capsys, monkeypatch):
    monkeypatch.setattr(LanguageModel, "loss", lambda self, batch: self.head.weight.sum() * float("nan"))
    assert main(f"train text.txt --out new {TINY} --train.steps 20".split()) == 2
    told = capsys.readouterr().err
    assert "loss is nan" in told
    assert told.count("\n") == 1
    assert any((place / "new/checkpoints").glob("step-*"))


def draw(*shape):
    return torch.randn(*shape)


def model():
    return LanguageModel(LanguageConfig(d_model=16, n_layers=1, n_heads=2))


TOKENS = torch.zeros(2, 5, dtype=torch.int64)
Q, GATE = draw(2, 5, 2, 8), draw(2, 5, 2)
META = torch.device("meta")
# Python: what is wrong, the call, what its sentence must say.
CALLS = {
    "heads": (lambda: mLSTM(30, 4), "d_model 30 is not divisible by n_heads 4"),
    "heads of slstm": (lambda: sLSTM(30, 4), "d_model 30 is not divisible by n_heads 4"),
    "start of slstm": (
        lambda: sLSTM(32, recurrent_start=-1.0),
        "recurrent_start is -1.0, wanted a finite number of at least 0",
    ),
    "block": (lambda: StackConfig(blocks=["mlstn"]), "unknown block 'mlstn', did you mean 'mlstm'"),
    "no block": (lambda: StackConfig(blocks=()), "blocks is empty"),
    "size of a layer": (lambda: Stack(StackConfig(d_model=16))(draw(2, 5, 8)), "wanted (B, T, 16)"),
    "device of a layer": (
        lambda: mLSTM(16)(draw(2, 5, 16).to(META)),
        "x is on meta and the layer's weights are on cpu",
    ),
    "device of tokens": (lambda: model()(TOKENS.to(META)), "tokens are on meta and the model is on cpu"),
    "T = 0": (lambda: Stack(StackConfig(d_model=16))(draw(2, 0, 16)), "no axis empty"),
    "T = 0 in a layer": (lambda: mLSTM(16)(draw(2, 0, 16)), "(2, 0"),
    "T = 0 of tokens": (lambda: model()(TOKENS[:, :0]), "wanted (B, T) with no axis empty"),
    "state of another depth": (lambda: Stack(StackConfig(d_model=16))(draw(1, 5, 16), (None,)), "state has 1 entries"),
    "state of another batch": (
        lambda: mlstm(Q, Q, Q, GATE, GATE, mlstm(Q[:1], Q[:1], Q[:1], GATE[:1], GATE[:1])[1]),
        "state.c",
    ),
    "tokens too large": (lambda: model()(TOKENS + 256), "tokens hold 256, wanted 0 to 255"),
    "tokens of floats": (lambda: model()(TOKENS.float()), "torch.float32, wanted whole numbers"),
    "flat tokens": (lambda: model()(TOKENS[0]), "wanted (B, T)"),
    "keys": (lambda: mlstm(Q, Q[..., :4], Q, GATE, GATE), "k has 4 features a head, q has 8"),
    "gates": (lambda: mlstm(Q, Q, Q, GATE[:, :3], GATE), "log_i has shape (2, 3, 2)"),
    "dtypes": (lambda: mlstm(Q, Q.double(), Q, GATE, GATE), "wanted one floating dtype"),
    "devices": (lambda: mlstm(Q, Q.to(META), Q, GATE, GATE), "k is on meta, wanted cpu"),
    "empty batch": (lambda: mlstm(Q[:0], Q[:0], Q[:0], GATE[:0], GATE[:0]), "no axis empty"),
    "a mask of numbers": (lambda: mlstm(Q, Q, Q, GATE, GATE, mask=torch.ones(2, 5)), "mask is torch.float32"),
    "a reset too long": (
        lambda: mlstm(Q, Q, Q, GATE, GATE, reset=torch.ones(2, 6).bool()),
        "reset is torch.bool of shape (2, 6)",
    ),
    "recurrent weights": (lambda: slstm(draw(2, 5, 2, 4, 8), draw(2, 4, 8, 4)), "r has shape (2, 4, 8, 4)"),
    "backend": (lambda: mlstm(Q, Q, Q, GATE, GATE, backend="cuda"), "backend 'cuda' is not one of"),
    "lengths": (lambda: mLSTM(16)(draw(2, 5, 16), lengths=torch.tensor([5])), "lengths"),
    "text without a tokenizer": (lambda: model().generate("hello"), "model.tokenizer is None"),
    "an empty prompt": (lambda: model().generate([]), "prompt is empty"),
    "a loss of nothing": (
        lambda: model().loss({"input": TOKENS}),
        "unknown field 'input' in the batch, did you mean 'inputs'",
    ),
    "no folder": (lambda: LanguageModel.from_pretrained("missing"), "missing does not exist"),
    "a probe of nothing": (
        lambda: probe.record(torch.nn.Linear(2, 2)).__enter__(),
        "Linear holds no Stack, xLSTM or layer",
    ),
    "a name": (lambda: exlstm.LSTM, "module 'exlstm' has no attribute 'LSTM'"),
    "steps and minutes": (lambda: TrainConfig(steps=3, minutes=1), "one of the two"),
    "held out": (lambda: DataConfig(held_out=0), "held_out is 0"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_bad_call_is_one_sentence(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attempt, sentence = CALLS[call]
    with pytest.raises((ValueError, TypeError, FileNotFoundError, AttributeError)) as caught:
        attempt()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# Of every setting of every block: what no number, no switch and no name is, and what a file could not hold.
ODD = (0, -1, 0.5, "x", None, True, (1,), math.nan)


@pytest.mark.parametrize(("kind", "name"), [(k, f.name) for k, kind in OPTIONS.items() for f in fields(kind)])
def test_a_setting_of_a_block_works_or_is_refused_in_one_sentence(kind, name):
    for value in ODD:
        try:
            options = OPTIONS[kind](**{name: value})
            model = LanguageModel(LanguageConfig(d_model=16, n_layers=1, n_heads=2, blocks=[kind], **{kind: options}))
        except ValueError as error:
            assert "\n" not in str(error) and (name in str(error) or "width" in str(error)), (value, str(error))
        else:
            assert model(torch.tensor([[1, 2, 3]]))[0].isfinite().all(), value


@pytest.mark.parametrize("values", [{"d_model": 16, "heads": 2}, {"slstm": {"convolution": 4}}], ids=json.dumps)
def test_a_config_with_an_unknown_key_is_refused(values, place, capsys):
    path = place / "run/checkpoints/step-00000002/config.json"
    config = json.loads(path.read_text())
    config["model"] |= values
    path.write_text(json.dumps(config))
    assert "unknown field" in refused("generate run/checkpoints/step-00000002", place, capsys)
