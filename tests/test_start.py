"""A run that begins with a model that is there: its weights, its tokenizer, and what is refused beside it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from exlstm import LanguageConfig, LanguageModel, Stack, StackConfig, runs, starts
from exlstm.cli import main
from exlstm.data.tokenizer import BPE, Bytes, Characters
from exlstm.models.checkpoint import save_checkpoint
from exlstm.models.config import MLSTMOptions
from exlstm.recipes import RunConfig, sized, train_language
from exlstm.train import loop
from exlstm.train.config import TrainConfig

SHORT = ["--data.context", "16", "--data.batch-size", "2", "--train.eval-batches", "2", "--train.save-every", "2"]
MODEL = LanguageConfig(d_model=16, n_layers=2, n_heads=2, mlstm=MLSTMOptions(conv=0))
TOLD = "the quick brown fox jumps over the lazy dog\n"
TOKENIZERS = {
    "bytes": Bytes,
    "characters": lambda: Characters(TOLD + "0123456789"),
    "bpe": lambda: BPE.fit([TOLD * 30], 280),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """What a run that begins anew learns from."""
    file = tmp_path_factory.mktemp("text") / "new.txt"
    file.write_text("".join(f"{i} dogs jump over {i % 7} foxes\n" for i in range(150)))
    return file


@pytest.fixture(scope="module")
def began(text, tmp_path_factory):
    """A finished run of four steps, to begin with."""
    run = tmp_path_factory.mktemp("runs") / "began"
    model = [
        "--model.d-model",
        "16",
        "--model.n-layers",
        "2",
        "--model.n-heads",
        "2",
        "--model.blocks",
        "mlstm",
        "slstm",
    ]
    assert main(["train", str(text), "--out", str(run), *model, *SHORT, "--train.steps", "4"]) == 0
    return run


def saved(folder, name="bytes", tokenizer=None):
    """A model as it is made, with a tokenizer."""
    tokenizer = tokenizer or TOKENIZERS[name]()
    torch.manual_seed(1)
    model = LanguageModel(replace(MODEL, vocab_size=tokenizer.vocab_size))
    model.tokenizer = tokenizer
    model.save_pretrained(folder)
    return model


def command(text, start, out, *more, steps=4):
    return ["train", str(text), "--start", str(start), "--out", str(out), *SHORT, "--train.steps", str(steps), *more]


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def weights(run, step):
    return load_file(run / f"checkpoints/step-{step:08d}/model.safetensors")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_weights_and_tokenizer_are_the_starts(name, text, tmp_path, capsys):
    """At step 0 to the last bit; with steps too small to see, the run is as good as its start and has read the same tokens."""
    model = saved(tmp_path / "start", name)
    out = tmp_path / "run"
    small = ["--train.lr", "1e-30", "--train.weight-decay", "0", "--train.keep", "9"]
    assert main(command(text, tmp_path / "start", out, *small, steps=2)) == 0
    assert "bits a byte on held-out text before the first step" in capsys.readouterr().out
    first, last = (weights(out, step) for step in (0, 2))
    assert all(torch.equal(first[key], value) for key, value in model.state_dict().items())
    assert all(torch.allclose(last[key], value, rtol=0, atol=1e-20) for key, value in first.items())
    again = LanguageModel.from_pretrained(out)
    assert again.tokenizer.to_dict() == model.tokenizer.to_dict()
    rates = [runs.evaluate(path, (str(text),), device="cpu") for path in (tmp_path / "start", out)]
    assert rates[0] == rates[1]


def test_the_first_validation_is_the_starts(began, text, tmp_path, capsys):
    last = [json.loads(line) for line in (began / "metrics.jsonl").read_text().splitlines() if "bits_per_byte" in line]
    assert main(command(text, began, tmp_path / "run", steps=1)) == 0
    assert f"start: {began}, {last[-1]['bits_per_byte']:.4f} bits a byte" in capsys.readouterr().out


def test_a_run_goes_on_without_its_start(began, text, tmp_path, monkeypatch):
    """Bit for bit, with dropout of its own; and from run.json."""
    start, whole, parts = tmp_path / "start", tmp_path / "whole", tmp_path / "parts"
    shutil.copytree(began, start)
    more = ["--model.dropout", "0.1", "--train.optimizer", "muon"]
    assert main(command(text, start, whole, *more)) == 0
    advance = loop._Run._advance

    def once(self):
        advance(self)
        if self.step == 2:
            self.signals.received = 15

    monkeypatch.setattr(loop._Run, "_advance", once)
    assert main(command(text, start, parts, *more)) == 128 + 15
    monkeypatch.undo()
    shutil.rmtree(start)
    assert main(command(text, start, parts, *more)) == 0
    assert losses(parts) == losses(whole) and len(losses(whole)) == 4
    assert all(torch.equal(weights(parts, 4)[key], value) for key, value in weights(whole, 4).items())
    assert main(["train", str(text), "--out", str(parts), "--config", str(parts / "run.json")]) == 0
    assert json.loads((parts / "run.json").read_text())["start"] == str(start)


def test_from_every_format_alike(text, tmp_path):
    model = saved(tmp_path / "ours")
    save_checkpoint(model, tmp_path / "transformers", "transformers")
    save_checkpoint(model, tmp_path / "large", "xlstm_large")
    found = []
    for name in ("ours", "transformers", "large"):
        assert main(command(text, tmp_path / name, tmp_path / f"from-{name}", steps=3)) == 0
        found.append(losses(tmp_path / f"from-{name}"))
    assert found[0] == found[1] == found[2]


def test_a_tokenizer_of_another_package(tmp_path):
    """What gives every text back as bytes is taken, also in a larger vocabulary; what does not, or is none, is refused."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = TOKENIZERS["bpe"]()
    save_checkpoint(LanguageModel(replace(MODEL, vocab_size=300)), tmp_path / "theirs", "transformers")
    with pytest.raises(ValueError, match="has 300 tokens and no tokenizer"):
        starts.load(tmp_path / "theirs")
    file = tmp_path / "theirs/tokenizer.json"
    inner, told = bpe.inner, "fox  jumps    <|end|> über\n    x"
    for added in ([], [tokenizers.AddedToken("    "), tokenizers.AddedToken("<|end|>", special=True)]):
        inner.add_tokens(added)
        file.write_text(inner.to_str())
        model = starts.load(tmp_path / "theirs")
        assert (model.config.vocab_size, model.tokenizer.vocab_size) == (300, bpe.vocab_size + len(added))
        tokens = model.tokenizer.encode(told)
        assert model.tokenizer.decode(tokens) == told and tokens == inner.encode(told, add_special_tokens=False).ids
    assert max(tokens) >= bpe.vocab_size
    file.write_text(json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be trained with"):
        starts.load(tmp_path / "theirs")
    file.rename(tmp_path / "theirs/tokenizer.model")
    with pytest.raises(ValueError, match=r"\(tokenizer\.model\) cannot be trained with"):
        starts.load(tmp_path / "theirs")


def test_a_larger_vocabulary_stays(text, tmp_path):
    bpe = TOKENIZERS["bpe"]()
    save_checkpoint(LanguageModel(replace(MODEL, vocab_size=300)), tmp_path / "theirs", "transformers")
    (tmp_path / "theirs/tokenizer.json").write_text(bpe.inner.to_str())
    assert main(command(text, tmp_path / "theirs", tmp_path / "run", steps=2)) == 0
    found = LanguageModel.from_pretrained(tmp_path / "run")
    assert (found.config.vocab_size, found.tokenizer.vocab_size) == (300, bpe.vocab_size)


def test_a_text_is_prepared_for_its_tokenizer(text, tmp_path):
    """A corpus that was prepared for another one is made anew, also for one of the same kind."""
    keys = []
    for name, more in (("one", ""), ("two", "!?")):
        saved(tmp_path / name, tokenizer=Characters(TOLD + "0123456789" + more))
        # Beside the corpus of the one before.
        if keys:
            shutil.copytree(tmp_path / "run-one/data", tmp_path / "run-two/data")
        assert main(command(text, tmp_path / name, tmp_path / f"run-{name}", steps=1)) == 0
        keys.append(json.loads((tmp_path / f"run-{name}/data/corpus.json").read_text())["key"])
    assert keys[0] != keys[1]
    found = json.loads((tmp_path / "run-two/data/corpus.json").read_text())["tokenizer"]
    assert found == LanguageModel.from_pretrained(tmp_path / "two").tokenizer.to_dict()


def test_in_python(began, text, tmp_path):
    config = sized(start=str(began))
    assert (config.model.d_model, config.train) == (16, TrainConfig())
    schedule = TrainConfig(steps=1, eval_batches=1)
    config = replace(config, out=str(tmp_path / "run"), data=replace(config.data, files=(str(text),)), train=schedule)
    assert train_language(config).step == 1
    with pytest.raises(ValueError, match=r"model.d_model is 256, was 16.*sized\(start"):
        train_language(RunConfig(str(tmp_path / "other"), data=config.data, train=schedule, start=str(began)))


def test_what_contradicts_a_start_is_refused(began, text, tmp_path, capsys):
    """In one sentence, before the text is prepared, and nothing is left."""
    part = tmp_path / "part.json"
    part.write_text(json.dumps({"model": {"n_layers": 3}}))
    for given, told in (
        (["--model.d-model", "32"], "model.d_model is 32, was 16"),
        (["--config", str(part)], "model.n_layers is 3, was 2"),
        (["--model.slstm.conv", "2"], "model.slstm.conv is 2, was 4"),
        (["--data.tokenizer", "characters"], "data.tokenizer is characters, was bytes"),
        (
            ["--data.tokenizer", "bpe", "--data.vocab-size", "300"],
            "data.tokenizer is bpe, was bytes, data.vocab_size is 300",
        ),
        (["--size", "nano"], "size is 'nano' beside the start"),
    ):
        assert main(command(text, began, tmp_path / "run", *given)) == 2
        out, err = capsys.readouterr()
        assert told in err and len(err.splitlines()) == 1 and "prepares" not in out
        assert not (tmp_path / "run").exists()
    assert (
        main(command(text, began, tmp_path / "run", "--model.d-model", "16", "--data.tokenizer", "bytes", steps=1)) == 0
    )


def broken(folder, name):
    """A folder that nothing can begin with, and what is said of it."""
    if name == "missing":
        return "does not exist"
    if name == "stack":
        folder.mkdir()
        save_file(Stack(StackConfig(d_model=16, n_layers=1)).state_dict(), folder / "model.safetensors")
        return "no weights of xLSTMBlockStack"
    if name == "forecaster":
        folder.mkdir()
        (folder / "forecaster.json").write_text("{}")
        return "holds a forecaster"
    if name == "no checkpoint yet":
        folder.mkdir()
        (folder / "run.json").write_text("{}")
        return "holds no checkpoint yet"
    saved(folder)
    if name == "of transformers":
        (folder / "config.json").write_text(json.dumps({"model_type": "exlstm"}))
        return "a model of exlstm.hf, which"
    file = folder / "model.safetensors"
    if name == "int8":
        held = {key: value.to(torch.int8) for key, value in load_file(file).items()}
        save_file(held, file)
        return "torch.int8, wanted a floating dtype"
    file.write_bytes(file.read_bytes()[:-100])
    return "is damaged"


BROKEN = ("missing", "stack", "forecaster", "no checkpoint yet", "of transformers", "int8", "damaged")


def test_what_is_no_start_is_refused(text, tmp_path, capsys):
    for name in BROKEN:
        told = broken(tmp_path / name, name)
        assert main(command(text, tmp_path / name, tmp_path / "run")) == 2
        out, err = capsys.readouterr()
        assert told in err and len(err.splitlines()) == 1 and not out, name
    assert not (tmp_path / "run").exists()


def test_a_text_of_other_characters_is_refused(text, tmp_path, capsys):
    saved(tmp_path / "start", "characters")
    other = tmp_path / "other.txt"
    other.write_text(TOLD * 20 + "é")
    assert main(command(other, tmp_path / "start", tmp_path / "run")) == 2
    assert "'é' (U+00E9) is not among the" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_start_is_another_run(began, text, tmp_path, capsys):
    """And a longer schedule is told the way."""
    run = tmp_path / "run"
    assert main(command(text, began, run, steps=1)) == 0
    capsys.readouterr()
    for given, told in (
        (command(text, run, run, steps=1), f"start is {run}, was {began}"),
        (["train", *command(text, began, run, steps=1)[4:], str(text)], f"start is left out, was {began}"),
        (
            command(text, began, run, steps=2),
            "steps is 2, was 1; choose another folder with --out (to train its model further",
        ),
    ):
        assert main(given) == 2
        err = capsys.readouterr().err
        assert told in err and len(err.splitlines()) == 1
    longer = command(text, run, tmp_path / "longer", steps=2)
    assert main(longer) == 0 and len(losses(tmp_path / "longer")) == 2
