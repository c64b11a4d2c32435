"""The scripts of examples/ run, and what they train learns: shorter here than when they are called by hand."""

import importlib.util
import zipfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# script: (how long it runs here, the share that is right at least; a guess is right in a half, in images in a tenth)
SHORT = {
    "sentence_classifier": ({"steps": 60}, 0.75),
    "sequence_labelling": ({"steps": 100}, 0.9),
    "image_rows": ({"steps": 60}, 0.4),
    "recurrent_policy": ({"pieces": 25}, 0.9),
}
# The same for those that want another package, and what it says at its import is its own.
OTHERS = {
    "train_lightning": ("lightning", {"steps": 80}, 0.8),
    "forecast_neuralforecast": ("neuralforecast", {"max_steps": 60, "count": 6}, -0.5),
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SHORT)
def test_an_example_learns(name, capsys):
    settings, least = SHORT[name]
    share = load(name).main(**settings)
    assert share >= least
    assert f"{share:.3f}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_an_example_in_another_library_learns(name, capsys, tmp_path, monkeypatch):
    """A negative bound: what is returned is an error over that of a guess, and at most this large."""
    package, settings, bound = OTHERS[name]
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    found = load(name).main(**settings)
    assert found >= bound if bound > 0 else found <= -bound
    assert f"{found:.3f}" in capsys.readouterr().out


def test_a_corpus_of_wheels_is_whole(tmp_path):
    """Every file once, packages that are held out in their own part, and what they share with others not learnt from."""
    long, same = b"x = 1\n" * 50, b"same = 2\n" * 40
    files = {
        "apple-1-py3-none-any.whl": {
            "apple/a.py": long,
            "apple/b.py": same,
            "apple/short.py": b"1",
            "apple/c.txt": long * 2,
        },
        "pear-2-py3-none-any.whl": {"pear/a.py": same, "pear/b.py": b"y = 3\n" * 60, "pear/line.py": b"1" * 1001},
    }
    for name, texts in files.items():
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            for file, text in texts.items():
                wheel.writestr(file, text)
    out = tmp_path / "code"
    sizes = load("code_corpus").main(str(tmp_path), str(out), "Pear")
    assert out.read_bytes() == long + b"\0"
    assert (tmp_path / "code.val").read_bytes() == same + b"\0" + b"y = 3\n" * 60 + b"\0"
    assert list(sizes.values()) == [len(out.read_bytes()), (tmp_path / "code.val").stat().st_size]
    with pytest.raises(SystemExit, match=r"no wheel in .* is of plum"):
        load("code_corpus").main(str(tmp_path), str(out), "plum")


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SHORT, *OTHERS, "code_corpus"}
