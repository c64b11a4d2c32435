"""What the README and docs/drop-in.md show runs as it stands there."""

import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from exlstm.cli import main
from exlstm.data.tokenizer import Bytes
from exlstm.models.config import OPTIONS, LanguageConfig
from exlstm.models.language import LanguageModel

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DROP_IN = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(
    r"^(exlstm .*?)(?:\s+#.*)?$", "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)), re.M
)
CURLS = [
    shlex.split(command)
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for command in re.findall(r"^curl .*?[^\\\n]$", block, re.M | re.DOTALL)
]
TEXT = "".join(f"{i}. Once upon a time there was a line, and it was number {i}.\n" for i in range(150))
SMALL = "--size nano --data.context 16 --data.batch-size 2 --train.eval-batches 1 --train.steps 1"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my.txt", "other.txt"):
        (tmp_path / name).write_text(TEXT)
    months = [f"{2015 + i // 12}-{i % 12 + 1:02}-01,{100 + i + 9 * (i % 12)}" for i in range(96)]
    (tmp_path / "sales.csv").write_text("\n".join(["ds,y", *months]) + "\n")
    return tmp_path


def test_the_python_examples_run(here):
    """One after the other in one place, as somebody reads them."""
    names = {}
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), names)
    assert len(EXAMPLES) >= 4
    assert (here / "my-model/model.safetensors").is_file()
    assert (here / "runs/mine/checkpoints/step-00000002").is_dir()


# What other packages do at their import is theirs.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("section", DROP_IN.split("\n## ")[1:], ids=lambda text: text.splitlines()[0])
def test_a_section_of_drop_in_runs(section, here):
    """On a folder with a small model where it is wanted; without packages of the long installations it is passed over."""
    names, examples = {}, re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    commands = re.findall(r"^(exlstm .*?)(?:\s+#.*)?$", section, re.M)
    assert examples or commands
    model = LanguageModel(LanguageConfig(d_model=32, n_layers=1))
    model.tokenizer = Bytes()
    model.save_pretrained("runs/my")
    for package in ("lm_eval", "onnxscript"):
        if f"import {package}" in section or (package == "onnxscript" and commands):
            pytest.importorskip(package)
    for example in examples:
        exec(compile(example, "drop-in.md", "exec"), names)
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0


def serve(words):
    """Starts the server, asks what the README asks, and ends it."""
    words = [sys.executable, "-m", "exlstm", *words, "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        port = re.search(r"http://127.0.0.1:(\d+)", process.stdout.readline())[1]
        assert len(CURLS) == 2
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for curl in CURLS:
            address = next(word for word in curl if word.startswith("127.0.0.1:8000/"))
            kind, body = (curl[curl.index(flag) + 1] for flag in ("-H", "-d"))
            headers = dict([kind.split(": ")])
            place = f"http://{address.replace('8000', port)}"
            with direct.open(urllib.request.Request(place, body.encode(), headers), timeout=60) as answer:
                assert b'"choices":' in answer.read()
    finally:
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        process.stdout.close()
    return 0


def test_the_commands_run(here, capsys):
    """Trainings are short ones, and a comparison of all models has one case; everything else is as written."""
    assert len(COMMANDS) >= 5
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        if words[0] == "train":
            at = words.index("--minutes")
            # A model that is there has its size.
            words[at : at + 2] = SMALL.split()[2 * ("--start" in words) :]
        if words[0] == "forecast":
            words += ["--minutes", "0.02"]
        if words[0] == "compare":
            words += ["--cases", "parity"]
        if words[0] == "plot":
            pytest.importorskip("matplotlib")
        run = serve if words[0] == "serve" else main
        assert run(words) == 0, command
    assert "Once" in capsys.readouterr().out


def test_every_block_stands_in_the_table():
    for block in OPTIONS:
        assert f"| `{block}` |" in README
