"""What a run leaves on disk: checkpoint folders that stand whole or not at all, and the history of the run.

A folder is written aside, its files hashed into manifest.json and fsynced, then renamed: a kill at any moment leaves
the old or the new one. Nothing is pickled. `step-00000100/` holds the model (model.safetensors and what its
writer adds), optimizer.safetensors and state.json.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model

VERSION = 1
MANIFEST = "manifest.json"


class DamagedCheckpoint(ValueError):
    """A folder that is not what was written: one sentence that names the bad file."""


def write_folder(path: Path | str, writer: Callable[[Path], None]):
    """Writes the folder `path` by `writer(folder)`, whole or not at all; a folder of that name is replaced, where a link
    leads is written and the link stays.

    When the disk is full or the place cannot be written: an OSError of one sentence, and nothing is left behind.
    """
    named, path = path, Path(os.path.realpath(path))
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    replaced = path.with_name(f".tmp-{os.getpid()}-{path.name}-replaced")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        writer(temporary)
        _write_manifest(temporary)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        _fsync(path.parent)
    except (OSError, SafetensorError) as error:
        raise _refusal(f"could not write {named}", error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        elif replaced.exists():
            replaced.rename(path)


def _write_manifest(folder: Path):
    """manifest.json: size and sha256 of every file below `folder`, all of them on the disk when it returns."""
    files, manifest = {}, folder / MANIFEST
    manifest.touch()
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f != manifest):
        if file.suffix == ".safetensors":
            share(file, manifest)
        files[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": _sha256(file)}
        _fsync(file)
    manifest.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    _fsync(manifest)
    for inner in (folder, *(f for f in folder.rglob("*") if f.is_dir())):
        _fsync(inner)


def share(file: Path, like: Path):
    """Gives a file the rights of another: what safetensors writes nobody but its owner may read, whatever the umask."""
    file.chmod(stat.S_IMODE(like.stat().st_mode))


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path):
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems cannot sync a folder; none reports a lost file so.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def _refusal(what: str, error: Exception) -> OSError:
    """One sentence for a failed write; safetensors reports the system's error in words of its own."""
    reason = getattr(error, "strerror", None) or str(error).replace("Error while serializing: ", "").strip()
    refusal = OSError(f"{what}: {reason}; what was written before stands")
    refusal.errno = getattr(error, "errno", None)
    return refusal


def verify(path: Path | str) -> dict:
    """The manifest of a folder written by `write_folder`; DamagedCheckpoint names the file that is not as written."""
    path = Path(path)
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        wanted = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint(f"{path / MANIFEST} is damaged: not the list of files that was written") from None
    for name, (size, digest) in wanted.items():
        file = path / name
        try:
            found = file.stat().st_size
            if found != size:
                raise DamagedCheckpoint(f"{file} is damaged: {found} bytes, {size} were written")
            if _sha256(file) != digest:
                raise DamagedCheckpoint(f"{file} is damaged: its bytes are not the ones that were written")
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{file} is missing") from None
        except OSError as error:
            raise DamagedCheckpoint(f"{file} cannot be read: {error.strerror}") from None
    return files


def step_folder(folder: Path | str, step: int) -> Path:
    """Where the checkpoint of `step` stands."""
    return Path(folder) / f"step-{step:08d}"


def steps_in(folder: Path | str) -> list[int]:
    """Steps that have a checkpoint folder, newest first, good or bad."""
    names = (f.name for f in Path(folder).glob("step-*") if f.is_dir())
    return sorted((int(n[5:]) for n in names if n[5:].isdigit()), reverse=True)


def newest(folder: Path | str) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder` that verifies, or None, and one sentence for every newer one that does not."""
    bad = []
    for step in steps_in(folder):
        path = step_folder(folder, step)
        try:
            verify(path)
            return path, bad
        except DamagedCheckpoint as error:
            bad.append(str(error))
    return None, bad


def clean(folder: Path | str):
    """Removes what killed writers left behind."""
    for leftover in Path(folder).glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def prune(folder: Path | str, step: int, keep: int):
    """Keeps the `keep` newest checkpoints up to `step`, just written; later ones belong to a discarded future."""
    steps = steps_in(folder)
    kept = [s for s in steps if s <= step][:keep]
    for old in set(steps) - set(kept):
        # Renamed first: a kill in the middle must not leave a half that looks like a damaged checkpoint.
        doomed = Path(folder) / f".tmp-{os.getpid()}-{old}-pruned"
        with contextlib.suppress(OSError):
            step_folder(folder, old).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def save_weights(model: torch.nn.Module, folder: Path):
    """model.safetensors of the model's state; shared tensors are written once."""
    save_model(model, str(folder / "model.safetensors"))


def save(path: Path, model, optimizer, state: dict, save_model: Callable = save_weights):
    """A checkpoint folder of model, `optimizer.state()` and `state` (plain values)."""

    def writer(folder: Path):
        save_model(model, folder)
        save_file({k: v.contiguous() for k, v in optimizer.state().items()}, folder / "optimizer.safetensors")
        stated = {"version": VERSION, **state, "torch": torch.__version__}
        (folder / "state.json").write_text(json.dumps(stated, indent=1), encoding="utf-8")

    write_folder(path, writer)


def read_state(path: Path) -> dict:
    """state.json of a checkpoint that verifies; a newer format is refused."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        newer = state["version"] > VERSION
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path / 'state.json'} is not the state of a training") from None
    if newer:
        found = f"{path} has checkpoint format {state['version']}, this version reads up to {VERSION}"
        raise ValueError(f"{found}: it was written by a newer exlstm")
    return state


def load(path: Path, model: torch.nn.Module, optimizer):
    """The values of a checkpoint that verifies, into model and optimizer; those of another model are a ValueError."""
    try:
        load_model(model, path / "model.safetensors")
        optimizer.load(load_file(path / "optimizer.safetensors"))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit this model: {told[:300]}") from None


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds the folder for one training process; a second one is a ValueError. SIGKILL frees it too."""
    if os.name == "nt":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # A file system without locks must not stop a training.
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(handle)
            raise ValueError(
                f"{folder} is being written by another training; wait for it or choose another folder"
            ) from None
    try:
        yield
    finally:
        os.close(handle)


class Metrics:
    """metrics.jsonl: one JSON object a line, in the kernel's hands as soon as `write` returns."""

    def __init__(self, path: Path):
        self.path = path
        self.handle = None

    def rewind(self, step: int):
        """Drops the records after `step` and every torn line, and opens the file for what follows."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        aside = self.path.with_name(".tmp-metrics")
        try:
            with open(aside, "wb") as stream:
                stream.writelines(line for line in lines if _up_to(step, line))
                stream.flush()
                os.fsync(stream.fileno())
            aside.replace(self.path)
            self.handle = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise _refusal(f"could not write {self.path}", error) from None

    def write(self, record: dict):
        """Appends one record; floats keep every bit, those that are not finite become null."""
        plain = {k: None if isinstance(v, float) and v - v != 0 else v for k, v in record.items()}
        line = (json.dumps(plain, allow_nan=False) + "\n").encode()
        try:
            if self.handle.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _refusal(f"could not write {self.path}", error) from None

    def sync(self):
        """Puts the records on the disk: a checkpoint must not survive a power cut that its history does not."""
        os.fsync(self.handle.fileno())

    def close(self):
        if self.handle is not None:
            self.handle.close()
            self.handle = None


def _up_to(step: int, line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False
