"""What can happen to a training: kills, damage, full disks. Nothing good is lost, and a sentence says what happened."""

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from exlstm.train import checkpoint
from exlstm.train.config import TrainConfig
from exlstm.train.loop import train
from exlstm.train.progress import Progress

# A toy run in a process of its own. It forks before torch has worked, so that a kill costs milliseconds, not an import.
SCRIPT = """
import os, signal, time
import torch
from torch import nn
from exlstm.train.config import TrainConfig
from exlstm.train.loop import train

torch.set_num_threads(1)
torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
signal.signal(signal.SIGINT, signal.default_int_handler)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 8))

    def loss(self, x):
        return (self.net(x) - x).square().mean()


class Batches:
    def batch(self, step, micro):
        time.sleep(PAUSE)
        return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


def go(out, steps, save_every):
    config = TrainConfig(steps=steps, save_every=save_every)
    result = train(Toy(), Batches(), config, out, evaluate=lambda m: {"noise": torch.rand(()).item()})
    return 128 + result.interrupted if result.interrupted else 0


def child(out, steps, save_every):
    number = os.fork()
    if not number:
        os._exit(go(out, steps, save_every))
    return number


def recorded(out):
    metrics = out + "/metrics.jsonl"
    return open(metrics).read().count("loss") if os.path.exists(metrics) else 0


def killed(out, steps, save_every, after):
    # SIGKILL after so many seconds: whether it came before the end, and the records it left.
    number = child(out, steps, save_every)
    time.sleep(after)
    os.kill(number, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(number, 0)[1]), recorded(out)


def stopped(out, steps, save_every, by, records):
    # The exit code of a run that gets the signal `by` after so many records.
    number = child(out, steps, save_every)
    while recorded(out) < records:
        time.sleep(0.01)
    os.kill(number, by)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])

"""


def script(code, pause=0.0):
    """What the script above and then `code` print, in a process of its own."""
    text = SCRIPT.replace("PAUSE", str(pause)) + code
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


def history(out):
    """The records without their times."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def weights(out):
    return (checkpoint.newest(Path(out) / "checkpoints")[0] / "model.safetensors").read_bytes()


class Toy(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(width, width)

    def loss(self, x):
        x = x.repeat(1, self.net.in_features // 8)
        return (self.net(x) - x).square().mean()


class Deeper(Toy):
    def __init__(self):
        super().__init__()
        self.more = nn.Linear(8, 8)


class Batches:
    """`on` maps a step to something that happens while its batch is made."""

    def __init__(self, on=None):
        self.on = on or {}

    def batch(self, step, micro):
        self.on.get(step, lambda: None)()
        return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


def run(out, model=None, shown=None, on=None, **settings):
    progress = Progress(stream=io.StringIO() if shown is None else shown)
    settings = {"steps": 12, "save_every": 4, **settings}
    return train(model or Toy(), Batches(on), TrainConfig(**settings), out, progress=progress)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A run of 12 steps, and the same run stopped after 8 with the checkpoints 8 and 4."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "whole")
    run(folder / "half", on={7: interrupt})
    assert checkpoint.steps_in(folder / "half" / "checkpoints") == [8, 4]
    return folder


@pytest.fixture
def half(clean, tmp_path):
    return Path(shutil.copytree(clean / "half", tmp_path / "half"))


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def kill_often(tmp_path, kills, steps):
    rng = random.Random(0)
    waits = [rng.uniform(0.02, 0.25) for _ in range(kills)]
    cut, whole = str(tmp_path / "cut"), str(tmp_path / "whole")
    # However fast the machine, the steps alone take longer than all the kills.
    out = script(
        f"""
print(*[killed({cut!r}, {steps}, 1, wait) for wait in {waits}], sep="\\n")
assert go({cut!r}, {steps}, 1) == 0
assert go({whole!r}, {steps}, 50) == 0
""",
        pause=0.01,
    )
    left = [int(line.split()[1][:-1]) for line in out.splitlines() if line.startswith("(True")]
    assert len(left) >= 0.8 * kills and len(set(left)) >= 0.5 * kills, (
        f"the kills came before the run or after it: {out}"
    )
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert not list(tmp_path.glob("**/.tmp-*"))


def test_sigkill_at_random_moments(tmp_path):
    kill_often(tmp_path, kills=12, steps=250)


@pytest.mark.slow
def test_sigkill_a_hundred_times(tmp_path):
    kill_often(tmp_path, kills=100, steps=2500)


def test_sigint_and_sigterm_save_and_give_their_exit_codes(tmp_path):
    cut, whole = str(tmp_path / "cut"), str(tmp_path / "whole")
    out = script(
        f"""
run = {cut!r}, 60, 50
print("codes", stopped(*run, signal.SIGINT, 10), stopped(*run, signal.SIGTERM, 25), go(*run))
go({whole!r}, 60, 50)
""",
        pause=0.02,
    )
    assert "codes 130 143 0" in out and out.count("the same command continues") == 2
    assert history(cut) == history(whole)
    assert weights(cut) == weights(whole)


def truncated(data):
    return data[: len(data) // 2]


def flipped(data):
    middle = len(data) * 2 // 3
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [truncated, flipped, None], ids=["truncated", "flipped", "deleted"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(clean, half, file, damage):
    newest = half / "checkpoints" / "step-00000008"
    (newest / file).write_bytes(damage((newest / file).read_bytes())) if damage else (newest / file).unlink()
    shown = io.StringIO()
    assert run(half, shown=shown).step == 12
    told = shown.getvalue().splitlines()
    assert "step-00000008" in told[0] and ("damaged" in told[0] or "missing" in told[0] or "has no manifest" in told[0])
    # A flipped bit in the manifest may accuse the file whose checksum it spoils.
    assert file in told[0] or file == "manifest.json"
    assert told[1].startswith("continues after step 4 of 12")
    assert history(half) == history(clean / "whole")
    assert weights(half) == weights(clean / "whole")
    assert checkpoint.newest(half / "checkpoints")[1] == []


def test_without_a_good_checkpoint_the_run_starts_anew(clean, half):
    for folder in (half / "checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    shown = io.StringIO()
    run(half, shown=shown)
    assert shown.getvalue().count("is damaged") == 2 and "starts from the beginning" in shown.getvalue()
    assert history(half) == history(clean / "whole")


@pytest.mark.parametrize("manifest", ["[]", '{"files": []}', '{"files": {"x": 1}}', "", "\x00"])
def test_a_manifest_of_nonsense_is_damaged(half, manifest):
    folder = half / "checkpoints" / "step-00000008"
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"manifest.json is damaged"):
        checkpoint.verify(folder)


def rewritten(folder, state):
    """The same checkpoint, whole, with other contents of state.json."""
    kept = files(folder) | {"state.json": json.dumps(state).encode()}
    kept.pop("manifest.json")
    checkpoint.write_folder(folder, lambda to: [(to / name).write_bytes(data) for name, data in kept.items()])


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            {"version": checkpoint.VERSION + 1},
            "has checkpoint format 2, this version reads up to 1: it was written by a newer",
        ),
        ({"version": None}, "state.json is not the state of a training"),
    ],
)
def test_a_checkpoint_of_another_format_is_refused(half, change, sentence):
    newest = half / "checkpoints" / "step-00000008"
    rewritten(newest, json.loads((newest / "state.json").read_text()) | change)
    before = files(half)
    with pytest.raises(ValueError, match=sentence):
        run(half)
    assert files(half) == before


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"lr": 0.5, "steps": 20}, "holds another run: steps is 20, was 12, lr is 0.5, was 0.001; give its settings"),
        ({"model": Toy(16)}, "step-00000008 does not fit this model: .*shape"),
        ({"model": Deeper()}, "step-00000008 does not fit this model: .*more.weight"),
    ],
)
def test_the_folder_of_another_run_is_refused_and_left_alone(half, settings, sentence):
    before = files(half)
    with pytest.raises(ValueError, match=sentence):
        run(half, **settings)
    assert files(half) == before


def test_settings_that_do_not_shape_a_run_may_change(clean, half):
    run(half, save_every=1, keep=5, eval_every=3)
    assert history(half) == history(clean / "whole")
    assert checkpoint.steps_in(half / "checkpoints") == [12, 11, 10, 9, 8]


def test_a_folder_has_one_writer(half):
    before = files(half)
    with checkpoint.only_writer(half), pytest.raises(ValueError, match="is being written by another training"):
        run(half)
    assert files(half) == before
    assert run(half).step == 12


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["save_file", "save_model", "_write_manifest", "_fsync"])
def test_a_full_disk_loses_nothing(clean, half, call, monkeypatch):
    before = files(half / "checkpoints")
    monkeypatch.setattr(checkpoint, call, full)
    with pytest.raises(
        OSError, match=r"could not write .*step-00000012: No space left on device; what was written before stands"
    ):
        run(half)
    assert files(half / "checkpoints") == before
    monkeypatch.undo()
    assert run(half).step == 12
    assert history(half) == history(clean / "whole")


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_limit_of_the_system_loses_nothing(tmp_path):
    import resource

    run(tmp_path, Toy(128), on={7: interrupt})
    before, limits = files(tmp_path / "checkpoints"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"could not write .*step-00000012: .*File too large.*; what was written before stands"
        ):
            run(tmp_path, Toy(128))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path / "checkpoints") == before


def test_a_full_disk_stops_the_history_in_a_sentence(half, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            return len(data) - 1

    monkeypatch.setattr(checkpoint.Metrics, "rewind", lambda self, step: setattr(self, "handle", Full()))
    with pytest.raises(OSError, match=r"could not write .*metrics.jsonl: No space left on device"):
        run(half)


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not make the folder .*file/x/checkpoints: Not a directory"):
        run(tmp_path / "file" / "x")

    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match=r"could not make the folder .*: Read-only file system"):
        run(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("end", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt(), RuntimeError("own")], ids=repr)
def test_a_writer_that_fails_leaves_what_was_there(tmp_path, end):
    checkpoint.write_folder(tmp_path / "x", lambda to: (to / "a").write_text("old"))
    before = files(tmp_path)

    def writer(to):
        (to / "a").write_text("new")
        raise end

    with pytest.raises(type(end)):
        checkpoint.write_folder(tmp_path / "x", writer)
    assert files(tmp_path) == before
    checkpoint.write_folder(tmp_path / "x", lambda to: (to / "b").write_text("new"))
    assert set(files(tmp_path)) == {"x/b", "x/manifest.json"}


def test_where_a_link_leads_is_written_and_the_link_stays(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/real")
    for text in ("old", "new", "newer"):
        checkpoint.write_folder(tmp_path / "link", lambda to, text=text: (to / "a").write_text(text))
        assert (tmp_path / "link").is_symlink() and (tmp_path / "far/real/a").read_text() == text
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "far", "link", "manifest.json", "real"]


def test_pruning_keeps_what_a_resume_needs(half):
    (half / "checkpoints" / "step-00000008" / "state.json").unlink()
    kept = []
    watched = {s: lambda: kept.append(checkpoint.steps_in(half / "checkpoints")) for s in range(4, 12)}
    run(half, on=watched, save_every=3, keep=1)
    assert kept == [[8, 4], [8, 4], [6], [6], [6], [9], [9], [9]]


def test_leftovers_of_a_killed_writer_go(half):
    leftover = half / "checkpoints" / ".tmp-123-step-00000009"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    (half / "checkpoints" / "step-notes").mkdir()
    run(half)
    assert sorted(p.name for p in (half / "checkpoints").iterdir()) == ["step-00000008", "step-00000012", "step-notes"]
