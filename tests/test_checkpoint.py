"""Models and states on disk: what is saved comes back bit by bit, what is not whole or not ours is refused by name."""

import hashlib
import json
import os
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from exlstm.data.tokenizer import BPE, Bytes, Characters
from exlstm.models import checkpoint
from exlstm.models.config import AttentionOptions, LanguageConfig, MLSTMOptions
from exlstm.models.language import LanguageModel
from exlstm.models.stack import BLOCKS
from exlstm.train.checkpoint import step_folder, write_folder

each_kind = pytest.mark.parametrize("blocks", [(kind,) for kind in BLOCKS] + [("mlstm", "slstm")], ids="+".join)


def build(blocks=("mlstm", "slstm"), **settings):
    torch.manual_seed(0)
    settings = {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 31, **settings}
    return LanguageModel(LanguageConfig(blocks=blocks, **settings)).eval()


def tokens_of(*shape):
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(0))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@each_kind
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_survives_save_and_load(tmp_path, blocks, tied):
    model = build(blocks, tie_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    loaded = LanguageModel.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config and same(loaded, model) and loaded.tokenizer is None
    assert torch.equal(loaded(tokens_of(2, 5))[0], model(tokens_of(2, 5))[0])
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    assert not any(b.is_meta for b in loaded.buffers())
    shapes = LanguageModel.from_pretrained(tmp_path / "model", device="meta")
    assert all(p.is_meta and p.shape == q.shape for p, q in zip(shapes.parameters(), model.parameters(), strict=True))
    loaded.train().loss(tokens_of(2, 5)).backward()
    assert {f.name for f in (tmp_path / "model").iterdir()} == {"model.safetensors", "config.json", "manifest.json"}


def tie_head(model):
    model.head.weight = model.embedding.weight


def tie_blocks(model):
    model.stack.blocks[1] = model.stack.blocks[0]


@pytest.mark.parametrize("tie", (tie_head, tie_blocks), ids=lambda tie: tie.__name__)
def test_what_somebody_has_tied_is_saved_under_each_of_its_names(tmp_path, tie):
    model = build(("mlstm",))
    tie(model)
    model.save_pretrained(tmp_path / "model")
    loaded = LanguageModel.from_pretrained(tmp_path / "model")
    assert same(loaded, model)
    assert torch.equal(loaded(tokens_of(2, 5))[0], model(tokens_of(2, 5))[0])


def test_every_setting_survives(tmp_path):
    model = build(
        dropout=0.25, logit_cap=0.0, tie_embeddings=True, mlstm=MLSTMOptions(qk_ratio=1.0, conv=0, i_bias=-3.5)
    )
    model.save_pretrained(str(tmp_path / "deep" / "er"))
    assert LanguageModel.from_pretrained(str(tmp_path / "deep" / "er")).config == model.config


TOKENIZERS = {
    "bytes": Bytes,
    "characters": lambda: Characters("abc é\n日"),
    "bpe": lambda: pytest.importorskip("tokenizers") and BPE.fit(["ab abc abcd 日本 \n"] * 5, 280),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokenizer_comes_along(tmp_path, kind):
    model = build(vocab_size=300)
    model.tokenizer = TOKENIZERS[kind]()
    model.save_pretrained(tmp_path / "model")
    loaded = LanguageModel.from_pretrained(tmp_path / "model")
    assert loaded.tokenizer.to_dict() == model.tokenizer.to_dict()
    assert loaded.generate("abc", 9, seed=0) == model.generate("abc", 9, seed=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(tmp_path, stored):
    model = build().to(stored)
    model.save_pretrained(tmp_path / "model")
    assert same(LanguageModel.from_pretrained(tmp_path / "model"), model)
    half = LanguageModel.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.bfloat16)
    assert same(half, model.to(torch.bfloat16))
    mixed = build()
    mixed.head.to(torch.float64)
    mixed.save_pretrained(tmp_path / "mixed")
    assert same(LanguageModel.from_pretrained(tmp_path / "mixed"), mixed)


def test_attention_has_its_own_heads_or_those_of_its_file(tmp_path):
    """A file from before attention could have heads of its own loads as it was."""
    own = build(blocks=("attention",), attention=AttentionOptions(n_heads=4, n_kv_heads=2))
    own.save_pretrained(tmp_path / "own")
    loaded = LanguageModel.from_pretrained(tmp_path / "own")
    assert same(loaded, own) and loaded.stack.blocks[0].mixer.attend.d_head == own.config.d_model // 4
    before = build(blocks=("attention",))
    before.save_pretrained(tmp_path / "before")
    settings = json.loads((tmp_path / "before" / "config.json").read_text())
    assert settings["model"]["attention"].pop("n_heads") == 0
    (tmp_path / "before" / "config.json").write_text(json.dumps(settings))
    manifest(tmp_path / "before")
    loaded = LanguageModel.from_pretrained(tmp_path / "before")
    assert same(loaded, before) and loaded.stack.blocks[0].mixer.n_heads == before.config.n_heads


def test_what_is_saved_is_whole_and_contiguous(tmp_path):
    model = build()
    model.head.weight = torch.nn.Parameter(torch.randn(16, 31).t())
    model.stack.blocks[0] = torch.compile(model.stack.blocks[0], backend="eager")
    model.save_pretrained(tmp_path / "model")
    loaded = LanguageModel.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.head.weight, model.head.weight)
    with pytest.raises(ValueError, match="meta"):
        LanguageModel(LanguageConfig(d_model=16), device="meta").save_pretrained(tmp_path / "meta")
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_loading_holds_one_copy(tmp_path):
    """No weight is drawn or allocated beside the ones that are read."""
    model = build(d_model=64, n_heads=4)
    model.save_pretrained(tmp_path / "model")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded = LanguageModel.from_pretrained(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before) and same(loaded, model)


# Saving over what is there


def test_a_saved_model_is_replaced(tmp_path):
    first, second = build(), build(n_layers=3)
    first.tokenizer = Characters("ab")
    for model in (first, second):
        model.save_pretrained(tmp_path / "model")
    loaded = LanguageModel.from_pretrained(tmp_path / "model")
    assert same(loaded, second) and loaded.tokenizer is None
    (tmp_path / "empty").mkdir()
    first.save_pretrained(tmp_path / "empty")
    assert same(LanguageModel.from_pretrained(tmp_path / "empty"), first)


OTHERS = {
    "notes beside a model": ("notes.txt", True),
    "a checkpoint of training": ("optimizer.safetensors", True),
    "notes": ("notes.txt", False),
    "weights of others": ("model.safetensors", False),
    "a config of others": ("config.json", False),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_peoples_files_are_never_replaced(tmp_path, case):
    name, beside = OTHERS[case]
    folder = tmp_path / "folder"
    if beside:
        build().save_pretrained(folder)
    folder.mkdir(exist_ok=True)
    (folder / name).write_text('{"model_type": "gpt2"}')
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(ValueError, match="choose another folder") as raised:
        build(n_layers=3).save_pretrained(folder)
    assert "\n" not in str(raised.value)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    with pytest.raises(ValueError, match="is a file"):
        build().save_pretrained(folder / name)


# Refusals


def manifest(folder):
    """Makes the folder whole again after a change, as if it had been written so."""
    listed = {}
    for file in folder.iterdir():
        if file.name != "manifest.json":
            data = file.read_bytes()
            listed[file.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"files": listed}))


def write(name, content):
    def spoil(folder):
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text(json.dumps(content))

    return spoil


def config(**changes):
    """Changes in config.json; those of `model` one level down; None deletes."""

    def spoil(folder):
        values = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            inner = values["model"] if key in values["model"] or key.startswith("d_mod") or key == "bloks" else values
            inner[key] = value
            if value is None:
                del inner[key]
        (folder / "config.json").write_text(json.dumps(values))

    return spoil


def weights(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


def flip(name, place, mask=0x40):
    def spoil(folder):
        data = bytearray((folder / name).read_bytes())
        data[place] ^= mask
        (folder / name).write_bytes(data)

    return spoil


def truncate(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def drop(name):
    return lambda folder: (folder / name).unlink()


def poison(value):
    def change(tensors):
        tensors["norm.weight"][3] = value

    return weights(change)


NX_AI = {"mlstm_block": {}, "context_length": 256, "num_blocks": 7, "embedding_dim": 128, "slstm_at": [1]}
HEADER = (2**62).to_bytes(8, "little") + b"{}"
REFUSED = {
    "no config": (drop("config.json"), "config.json"),
    "no weights": (drop("model.safetensors"), "model.safetensors is missing"),
    "no tokenizer": (drop("tokenizer.json"), "tokenizer.json is missing"),
    "no manifest": (drop("manifest.json"), "manifest.json"),
    "weights truncated": (truncate("model.safetensors", -100), "model.safetensors is damaged"),
    "weights cut in the header": (truncate("model.safetensors", 50), "model.safetensors is damaged"),
    "weights empty": (write("model.safetensors", b""), "model.safetensors is damaged .*: it is empty"),
    "weights a text": (write("model.safetensors", b"these are not weights"), "model.safetensors is damaged"),
    "weights with a giant header": (write("model.safetensors", HEADER), "model.safetensors is damaged"),
    "weights a pickle": (write("model.safetensors", b"\x80\x04cos\nsystem\n."), "model.safetensors is damaged"),
    "a bit of a weight": (flip("model.safetensors", -7, 1), "model.safetensors is damaged"),
    "a bit of the header": (flip("model.safetensors", 12), "model.safetensors"),
    "a bit of the config": (flip("config.json", 30), "config.json"),
    "a bit of the tokenizer": (flip("tokenizer.json", 20, 1), "tokenizer.json"),
    "config changed by hand": (config(dropout=0.5), "config.json is damaged"),
    "NaN": (poison(float("nan")), "NaN or infinities in norm.weight"),
    "infinity": (poison(float("-inf")), "NaN or infinities in norm.weight"),
    "a tensor missing": (weights(lambda t: t.pop("norm.weight")), "lacks norm.weight"),
    "many missing": (
        weights(lambda t: [t.pop(n) for n in list(t) if n.startswith("stack.blocks.0.mixer")]),
        r"lacks stack\.\S+, stack\.\S+, stack\.\S+ and \d+ more",
    ),
    "a tensor too many": (weights(lambda t: t.update(extra=torch.zeros(1))), "extra"),
    "a wrong shape": (
        weights(lambda t: t.update({"norm.weight": torch.zeros(3)})),
        r"norm.weight \(3,\) instead of \(16,\)",
    ),
    "a wrong dtype": (
        weights(lambda t: t.update({"norm.weight": torch.zeros(16, dtype=torch.int64)})),
        "norm.weight as torch.int64",
    ),
    "config empty": (write("config.json", b""), "config.json is not JSON"),
    "config a text": (write("config.json", b"d_model = 16"), "config.json is not JSON"),
    "config not UTF-8": (write("config.json", b"\xff\xfe{}"), "config.json is not JSON"),
    "config a list": (write("config.json", [1]), "JSON list"),
    "config too deep": (write("config.json", b"[" * 100_000), "config.json is not JSON"),
    "config with NaN": (write("config.json", b'{"format": NaN}'), "NaN is no number of JSON"),
    "config of Hugging Face": (write("config.json", {"model_type": "gpt2"}), "Hugging Face .*'gpt2'"),
    "config of NX-AI": (write("config.json", NX_AI), "NX-AI.*mlstm_block"),
    "config of nobody": (write("config.json", {"layers": 3}), "foreign configuration .keys layers"),
    "another format": (config(format="mine"), "format 'mine'"),
    "a newer version": (config(version=2), "version 2, written by a newer exlstm"),
    "a version of text": (config(version="1"), "version '1'"),
    "no version": (config(version=None), "version None"),
    "no model": (write("config.json", {"format": "exlstm", "version": 1}), "no key 'model'"),
    "model a number": (write("config.json", {"format": "exlstm", "version": 1, "model": 3}), "wanted an object"),
    "an unknown key": (config(modle={}), "unknown key 'modle', did you mean 'model'"),
    "an unknown field": (config(d_modl=3), "unknown field 'd_modl', did you mean 'd_model'"),
    "a width of text": (config(d_model="16"), "d_model is '16', wanted int"),
    "a width of -1": (config(d_model=-1), "d_model is -1"),
    "another width": (config(d_model=32), "has another shape"),
    "a giant width": (config(d_model=2 * 10**18), "config.json"),
    "another depth": (config(n_layers=1), "says 1 layers, model.safetensors holds 2"),
    "a giant depth": (config(n_layers=10**9), "says 1000000000 layers, model.safetensors holds 2"),
    "blocks a number": (config(blocks=5), "config.json: blocks"),
    "blocks of numbers": (config(blocks=[5]), "config.json: .*5"),
    "an unknown block": (config(blocks=["mlsmt"]), "did you mean 'mlstm'"),
    "options of text": (config(mlstm="big"), "mlstm is str, wanted an object"),
    "heads that do not fit": (config(n_heads=5), "not divisible"),
    "a convolution of -1": (config(mlstm={"conv": -1}), "config.json"),
    "tokenizer a text": (write("tokenizer.json", b"hello"), "tokenizer.json is no"),
    "tokenizer unknown": (write("tokenizer.json", {"kind": "wordpiece"}), "wordpiece"),
    "tokenizer without kind": (write("tokenizer.json", {}), "tokenizer.json is no tokenizer"),
    "tokenizer too large": (
        lambda folder: write("tokenizer.json", Characters("".join(map(chr, range(40, 90)))).to_dict())(folder),
        "50 tokens, the model 31",
    ),
    "manifest empty": (write("manifest.json", {"files": {}}), "does not list model.safetensors"),
    "manifest of nonsense": (write("manifest.json", b"{]"), "manifest.json is damaged"),
}
# Whoever writes the manifest anew must not get past these either.
HASHED = ("no tokenizer", "no manifest", "manifest", "a bit", "config changed", "weights truncated", "weights cut")
CASES = [(case, False) for case in REFUSED] + [(case, True) for case in REFUSED if not case.startswith(HASHED)]


@pytest.mark.parametrize(("case", "rewritten"), CASES, ids=[f"{c}, rewritten" * r or c for c, r in CASES])
def test_what_is_not_whole_or_not_ours_is_refused_by_name(tmp_path, case, rewritten):
    spoil, told = REFUSED[case]
    model, folder = build(), tmp_path / "model"
    model.tokenizer = Characters("abc")
    model.save_pretrained(folder)
    spoil(folder)
    if rewritten:
        manifest(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=told) as raised:
        LanguageModel.from_pretrained(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


def test_places_and_arguments(tmp_path):
    folder = tmp_path / "model"
    build().save_pretrained(folder)
    (tmp_path / "nothing").mkdir()
    cases = [
        ({"folder": tmp_path / "nowhere"}, FileNotFoundError, "nowhere does not exist"),
        ({"folder": "a\0b"}, FileNotFoundError, "does not exist"),
        ({"folder": folder / "model.safetensors"}, ValueError, "is a file"),
        ({"folder": tmp_path / "nothing"}, FileNotFoundError, "neither config.json nor checkpoints"),
        ({"folder": folder, "dtype": torch.int8}, ValueError, "dtype is torch.int8"),
        ({"folder": folder, "dtype": "bfloat16"}, ValueError, "dtype is 'bfloat16'"),
        ({"folder": folder, "device": "abacus"}, ValueError, "device 'abacus' cannot be used here"),
    ]
    if not torch.cuda.is_available():
        cases.append(({"folder": folder, "device": "cuda"}, ValueError, "device 'cuda' cannot be used here"))
    for arguments, error, told in cases:
        with pytest.raises(error, match=told) as raised:
            LanguageModel.from_pretrained(**arguments)
        assert "\n" not in str(raised.value)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").mkdir()
    with pytest.raises(ValueError, match="is not a file"):
        LanguageModel.from_pretrained(folder)


# Runs


def run_of(folder, *models):
    for step, model in enumerate(models, 1):

        def writer(aside, model=model):
            checkpoint.write(model, aside)
            (aside / "optimizer.safetensors").write_bytes(b"moments")

        write_folder(step_folder(folder / "checkpoints", step), writer)
    return folder


def test_a_run_loads_its_newest_checkpoint_that_is_whole(tmp_path):
    models = [build(n_layers=n) for n in (1, 2, 3, 4)]
    run = run_of(tmp_path / "run", *models)
    (run / "run.json").write_text("{}")
    assert same(LanguageModel.from_pretrained(run), models[3])
    flip("optimizer.safetensors", 2)(step_folder(run / "checkpoints", 4))
    with pytest.warns(UserWarning, match=r"step-00000004.optimizer\.safetensors is damaged") as warned:
        assert same(LanguageModel.from_pretrained(run), models[2])
    assert len(warned) == 1 and warned[0].filename == __file__
    poison(float("nan"))(step_folder(run / "checkpoints", 3))
    manifest(step_folder(run / "checkpoints", 3))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert same(LanguageModel.from_pretrained(run), models[1])
    assert [f"step-0000000{step}" in str(w.message) for step, w in zip((4, 3), warned, strict=True)] == [True, True]
    assert same(LanguageModel.from_pretrained(step_folder(run / "checkpoints", 1)), models[0])
    with pytest.raises(ValueError, match="step-00000004"):
        LanguageModel.from_pretrained(step_folder(run / "checkpoints", 4))
    for step in (1, 2):
        drop("manifest.json")(step_folder(run / "checkpoints", step))
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read; the newest: .*step-00000004"):
        LanguageModel.from_pretrained(run)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint yet"):
        LanguageModel.from_pretrained(run)


# States


def leaves(value):
    if isinstance(value, tuple | list):
        return [type(value), *(leaf for item in value for leaf in leaves(item))]
    return [value]


@each_kind
def test_a_state_survives_save_and_load(tmp_path, blocks):
    model = build(blocks)
    whole = model.generate([[1, 2, 3], [4]], 12, seed=1)
    first, state = model.generate([[1, 2, 3], [4]], 5, seed=1, return_state=True)
    for name, value in (("generate", state), ("forward", state.layers)):
        model.save_state(value, tmp_path / name)
        loaded = model.load_state(tmp_path / name)
        for before, after in zip(leaves(value), leaves(loaded), strict=True):
            assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
    again = model.generate([[], []], 7, seed=1, state=model.load_state(tmp_path / "generate"))
    assert [a + b for a, b in zip(first, again, strict=True)] == whole
    logits, _ = model(torch.tensor([[5], [6]]), model.load_state(str(tmp_path / "forward")))
    assert torch.equal(logits, model(torch.tensor([[5], [6]]), state)[0])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["forward", "generate"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
def test_files_have_the_rights_of_any_new_file(tmp_path):
    """What safetensors writes nobody but its owner may read: no server could serve the runs of somebody else."""
    model = build()
    before = os.umask(0o022)
    try:
        model.save_pretrained(tmp_path / "model")
        model.save_state(model(tokens_of(1, 4))[1], tmp_path / "state")
    finally:
        os.umask(before)
    files = [tmp_path / "state", *(tmp_path / "model").iterdir()]
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in files} == {file.name: "0o644" for file in files}


STATES = {
    "missing": (lambda path, model: path.unlink(), FileNotFoundError, "is missing"),
    "a folder": (lambda path, model: (path.unlink(), path.mkdir()), ValueError, "not a file"),
    "empty": (lambda path, model: path.write_bytes(b""), ValueError, "it is empty"),
    "truncated": (lambda path, model: path.write_bytes(path.read_bytes()[:-8]), ValueError, "damaged"),
    "a bit": (lambda path, model: flip(path.name, -5)(path.parent), ValueError, "damaged"),
    "weights": (lambda path, model: save_file({"a": torch.zeros(1)}, path), ValueError, "holds no state"),
    "of another model": (
        lambda path, model: build(("lstm",)).save_state(build(("lstm",))(tokens_of(1, 2))[1], path),
        ValueError,
        "another model: blocks",
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_states_that_are_not_whole_or_not_ours_are_refused(tmp_path, case):
    spoil, error, told = STATES[case]
    model, path = build(), tmp_path / "state"
    model.save_state(model(tokens_of(1, 4))[1], path)
    spoil(path, model)
    with pytest.raises(error, match=told) as raised:
        model.load_state(path)
    assert "\n" not in str(raised.value)


def test_what_is_no_state_is_not_saved(tmp_path):
    model = build()
    with pytest.raises(ValueError, match=r"state\.1 is Linear"):
        model.save_state((None, torch.nn.Linear(1, 1)), tmp_path / "state")
    with pytest.raises(ValueError, match="state is int, wanted tensors in tuples"):
        model.save_state(3, tmp_path / "state")
    with pytest.raises(OSError, match="could not write"):
        model.save_state((None,), tmp_path / "nowhere" / "state")
    assert not list(tmp_path.iterdir())
