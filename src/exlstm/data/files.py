"""Which documents a corpus has: files, folders, globs, or the standard library's source; a file is a document."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Below the standard library, and not its source: what others installed, and tests, most of them tables.
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
BINARY = "binary (with NUL bytes)"
# How files begin that hold text in another form, and what to do about it.
FORMS = {
    b"\xff\xfe": "in UTF-16; save it in UTF-8",
    b"\xfe\xff": "in UTF-16; save it in UTF-8",
    b"\x1f\x8b": "packed by gzip; unpack it",
    b"BZh": "packed by bzip2; unpack it",
    b"\xfd7zXZ": "packed by xz; unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
}


class Document(NamedTuple):
    """A file with text, as it was when it was found."""

    name: str
    """path below the folder that was named, with slashes: the same on every machine"""
    path: Path
    size: int
    """bytes"""
    digest: str
    """sha256 of the bytes"""


def find(files: str | Sequence[str] = (), cache: Path | None = None) -> tuple[list[Document], list[str]]:
    """The documents behind `files`, in their order and each once, and sentences about what was passed over.

    Folders and globs pass over files with NUL bytes, hidden ones, and the folders of our own runs, among them the one
    that `cache` belongs to. FileNotFoundError, ValueError: something that was named is missing, binary or without text.
    """
    files = [os.path.expanduser(file) for file in ((files,) if isinstance(files, str | os.PathLike) else files)]
    cache = None if cache is None else Path(cache).resolve()
    documents, kinds, notes = [], {}, []
    for source in files or ("",):
        here = Counter()
        for name, path in _candidates(source, cache):
            real = os.path.realpath(path)
            if real not in kinds:
                data = path.read_bytes()
                kinds[real] = "empty" if not data else BINARY if b"\0" in data else "text"
                if kinds[real] == "text":
                    documents.append(Document(name, path, len(data), hashlib.sha256(data).hexdigest()))
            here[kinds[real]] += 1
        if not here["text"] and os.path.isfile(source):
            (kind,) = here
            # A shell's *.py brings empty files along.
            if kind == BINARY or len(files) == 1:
                raise ValueError(f"{source} is {kind}, wanted text{_form(Path(source))}")
            notes.append(f"{source} is empty")
        elif not here["text"]:
            told = ", ".join(f"{count} {kind}" for kind, count in here.items())
            raise ValueError(f"{source or 'the standard library'} holds no text" + (f": {told}" if told else ""))
    if not documents:
        raise ValueError(f"all {len(files)} files are empty, wanted text")
    if count := list(kinds.values()).count(BINARY):
        notes.append(f"passed over {count} binary file{'s' * (count > 1)}")
    return documents, notes


def _form(path: Path) -> str:
    """The rest of a sentence about a file that is no text as it stands."""
    with path.open("rb") as file:
        begin = file.read(8)
    return next((f"; it seems {told}" for mark, told in FORMS.items() if begin.startswith(mark)), "")


def read(document: Document) -> bytes:
    """The bytes of a document. ValueError: they are not those that were found."""
    data = document.path.read_bytes()
    if hashlib.sha256(data).hexdigest() != document.digest:
        raise ValueError(f"{document.path} changed while it was read; try again when it stands still")
    return data


def fingerprint(documents: Iterable[Document]) -> str:
    """One hash over names and contents: two corpora with the same one are the same text, wherever they lie."""
    lines = "".join(f"{d.digest} {d.name}\n" for d in documents)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def _candidates(source: str, cache: Path | None) -> Iterable[tuple[str, Path]]:
    """Names and paths of the files behind one source, binary and empty ones too."""
    if not source:
        root = Path(sysconfig.get_path("stdlib"))
        if not root.is_dir():
            raise FileNotFoundError(f"this Python has no source of its standard library at {root}; name files")
        return ((name, path) for name, path in _below(root, root, cache, NOT_THE_LIBRARY) if path.suffix == ".py")
    path = Path(source)
    if path.is_dir():
        return _below(path, path, cache)
    if path.is_file():
        return [(path.name, path)]
    if path.exists():
        raise ValueError(f"{source} is neither a file nor a folder")
    if not glob.has_magic(source):
        raise FileNotFoundError(f"there is no file or folder {source}")
    found = _matches(path, cache)
    if not found:
        raise FileNotFoundError(f"no file matches {source}")
    return found


def _matches(pattern: Path, cache: Path | None) -> list[tuple[str, Path]]:
    """What a glob finds, with all that is below the folders that it finds."""
    fixed = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    root, found = Path(*pattern.parts[:fixed]), []
    for match in sorted(glob.glob(str(pattern), recursive=True)):
        path = Path(match)
        above = [path, *path.parents][: len(path.parts) - fixed]
        if any(_is_run(folder, cache) for folder in above):
            continue
        if path.is_dir():
            found += _below(path, root, cache)
        elif path.is_file():
            found.append((path.relative_to(root).as_posix(), path))
    return found


def _below(folder: Path, root: Path, cache: Path | None, left_out: Iterable[str] = ()) -> Iterator[tuple[str, Path]]:
    """The files below a folder, in the order of their names; hidden ones and our own runs are left out."""

    def fail(error):
        raise error

    for here, folders, names in os.walk(folder, onerror=fail):
        below = [f for f in sorted(folders) if not f.startswith(".") and f not in left_out]
        folders[:] = [f for f in below if not _is_run(Path(here, f), cache)]
        for name in sorted(names):
            path = Path(here, name)
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(root).as_posix(), path


def _is_run(folder: Path, cache: Path | None) -> bool:
    """Whether a folder is a run of ours: what a run writes must not become, or change, the text that it learns from."""
    if cache is not None and folder.resolve() == cache:
        return True
    its_own = cache is not None and folder.resolve() == cache.parent
    return (folder / "run.json").is_file() and (its_own or (folder / "checkpoints").is_dir())
