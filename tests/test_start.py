"""Training that begins with the weights and the tokenizer of a model that is there."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from exlstm import LanguageModel
from exlstm.cli import main
from exlstm.data.config import DataConfig
from exlstm.recipes import sized, train_language
from exlstm.train.config import TrainConfig

FIRST = "It was the best of times, it was the worst of times. " * 60
SECOND = "the times were best, was it the worst of it, It was. " * 60
SMALL = {"size": "nano", "model": {"d_model": 16, "n_layers": 1, "n_heads": 2}}


def data(text, tokenizer="bytes", vocab_size=0):
    return DataConfig(files=(str(text),), tokenizer=tokenizer, vocab_size=vocab_size, context=32, batch_size=2)


def schedule(steps=4, **settings):
    return TrainConfig(steps=steps, eval_batches=1, **settings)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, text in (("first", FIRST), ("second", SECOND)):
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def base(texts):
    """Runs by the kind of their tokenizer, on the first text."""
    made = {}
    for kind, size in (("bytes", 0), ("characters", 0), ("bpe", 300)):
        if kind == "bpe":
            pytest.importorskip("tokenizers")
        made[kind] = texts / kind
        train_language(
            replace(
                sized(values=SMALL), out=str(made[kind]), data=data(texts / "first.txt", kind, size), train=schedule()
            )
        )
    return made


def tuned(start, out, text, kind="bytes", **settings):
    config = sized(values={"start": str(start)})
    config = replace(config, out=str(out), data=replace(data(text), tokenizer=kind), train=schedule(**settings))
    return train_language(config)


def weights(folder):
    return LanguageModel.from_pretrained(folder).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_it_begins_with_the_weights_and_the_tokenizer(kind, base, texts, tmp_path, capsys):
    # A rate of next to nothing leaves the weights where they began.
    tuned(base[kind], tmp_path / "run", texts / "second.txt", kind, lr=1e-30, weight_decay=0.0)
    assert same(weights(tmp_path / "run"), weights(base[kind]))
    models = [LanguageModel.from_pretrained(folder) for folder in (tmp_path / "run", base[kind])]
    assert models[0].tokenizer.to_dict() == models[1].tokenizer.to_dict()
    bits = float(capsys.readouterr().out.split(f"start: {base[kind]}, ")[1].split(" ")[0])
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    told = [line["bits_per_byte"] for line in lines if "bits_per_byte" in line]
    assert told and told == pytest.approx([bits] * len(told), abs=1e-3)


@pytest.mark.parametrize("form", ["checkpoint", "saved"])
def test_a_checkpoint_and_a_saved_model_are_starts_as_a_run_is(form, base, texts, tmp_path):
    start = next(iter((base["bytes"] / "checkpoints").iterdir()))
    if form == "saved":
        LanguageModel.from_pretrained(base["bytes"]).save_pretrained(tmp_path / "saved")
        start = tmp_path / "saved"
    else:
        start = sorted((base["bytes"] / "checkpoints").iterdir())[-1]
    tuned(start, tmp_path / "a", texts / "second.txt")
    tuned(base["bytes"], tmp_path / "b", texts / "second.txt")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(base["bytes"]))


def test_it_goes_on_without_its_start_bit_for_bit(base, texts, tmp_path, monkeypatch):
    start = tmp_path / "start"
    shutil.copytree(base["characters"], start)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tuned(start, whole, texts / "second.txt", "characters", steps=6, save_every=2)
    from exlstm.train import loop

    calls, saved = [], loop.checkpoint.save

    def once(*given, **named):
        saved(*given, **named)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(loop.checkpoint, "save", once)
        tuned(start, parts, texts / "second.txt", "characters", steps=6, save_every=2)
    config = sized(values=json.loads((parts / "run.json").read_text()))
    shutil.rmtree(start)
    assert config.start == str(start)
    train_language(replace(config, out=str(parts)))
    assert same(weights(parts), weights(whole))


def test_the_command_takes_the_model_and_says_the_rest(base, texts, tmp_path, capsys):
    short = "--train.steps 2 --train.eval-batches 1 --data.context 32 --data.batch-size 2"
    out = tmp_path / "run"
    assert main(f"train {texts / 'second.txt'} --start {base['bpe']} --out {out} {short}".split()) == 0
    run = json.loads((out / "run.json").read_text())
    assert (
        run["start"] == str(base["bpe"]) and run["data"]["tokenizer"] == "bpe" and run["train"]["optimizer"] == "adamw"
    )
    assert run["model"] == json.loads((base["bpe"] / "run.json").read_text())["model"]
    # The same command finds its own run, and dropout is no other model.
    assert main(f"train {texts / 'second.txt'} --start {base['bpe']} --out {out} {short}".split()) == 0
    more = (
        f"train {texts / 'second.txt'} --start {base['bpe']} --out {tmp_path / 'dropped'} {short} --model.dropout 0.1"
    )
    assert main(more.split()) == 0
    capsys.readouterr()


BASE, TEXT = "{bytes}", "{texts}/second.txt"
REFUSED = {
    f"--start {BASE} --size nano": "size nano came with a start, whose model has its own: leave one of the two out",
    f"--start {BASE} --model.d-model 32": "another than that of {bytes}: embedding.weight is (256, 32), there (256, 16)",
    f"--start {BASE} --model.n-layers 2": "another than that of {bytes}: stack.blocks.1",
    f"--start {BASE} --data.tokenizer characters": "data.tokenizer is characters, but it comes from {bytes}, where it is bytes",
    "--start {bpe} --data.vocab-size 400": "data.vocab_size is 400, but it comes from {bpe}, where it is 279",
    "--start {texts}/nowhere": "{texts}/nowhere does not exist",
    f"--start {TEXT}": "{texts}/second.txt is a file, wanted the folder of a model or of a run",
    "--start {texts}/mute": "{texts}/mute holds a model without a tokenizer",
    "--start {texts}/empty": "{texts}/empty",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_does_not_fit_is_one_sentence_and_leaves_nothing(flags, base, texts, tmp_path, capsys):
    model = LanguageModel.from_pretrained(base["bytes"])
    model.tokenizer = None
    if not (texts / "mute").exists():
        model.save_pretrained(texts / "mute")
    (texts / "empty").mkdir(exist_ok=True)
    named = {**base, "texts": texts}
    out = tmp_path / "run"
    assert main(f"train {TEXT} --out {out} --train.steps 1 {flags}".format(**named).split()) == 2
    told = capsys.readouterr().err
    assert REFUSED[flags].format(**named) in told and told.count("\n") == 1
    assert not out.exists()


def test_another_start_is_another_run_and_a_longer_one_a_new_run(base, texts, tmp_path):
    tuned(base["bytes"], tmp_path / "run", texts / "second.txt")
    with pytest.raises(ValueError, match=r"start is '', was '.*bytes'"):
        train_language(
            replace(sized(values=SMALL), out=str(tmp_path / "run"), data=data(texts / "second.txt"), train=schedule())
        )
    with pytest.raises(ValueError, match=r"holds another run: steps is 9, was 4.*or with its weights by --start .*run"):
        tuned(base["bytes"], tmp_path / "run", texts / "second.txt", steps=9)
    tuned(tmp_path / "run", tmp_path / "longer", texts / "second.txt", steps=9)
    strange = texts / "strange.txt"
    strange.write_text("ζ " + SECOND)
    with pytest.raises(ValueError, match="the character 'ζ'"):
        tuned(base["characters"], tmp_path / "strange", strange, "characters")
    assert not (tmp_path / "strange").exists()
