"""The scripts of examples/ run, and what they train learns: shorter here than when they are called by hand."""

import importlib.util
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


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SHORT, *OTHERS}
