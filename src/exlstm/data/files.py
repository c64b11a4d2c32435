"""Which documents a corpus has: files, folders, globs, or the standard library's source, read a block at a time.

A file is a document; so is every row of a .jsonl. A packed file is read as what it holds.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import json
import lzma
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Below the standard library, and not its source: what others installed, and tests, most of them tables.
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
BINARY = "binary (with NUL bytes)"
# Bytes that are read at once, and the longest row of a table.
BLOCK, LONGEST = 1 << 22, 1 << 28
PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
TABLES = (".jsonl", ".ndjson")
# How files begin that hold text in another form, and what to do about it.
FORMS = {
    b"\xff\xfe": "in UTF-16; save it in UTF-8",
    b"\xfe\xff": "in UTF-16; save it in UTF-8",
    b"\x1f\x8b": "packed by gzip; unpack it, or let its name end in .gz",
    b"BZh": "packed by bzip2; unpack it, or let its name end in .bz2",
    b"\xfd7zXZ": "packed by xz; unpack it, or let its name end in .xz",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "a table of Parquet; write its rows to a .jsonl",
}


class OtherTable(ValueError):
    """The first row of a table lacks the field."""


class Document(NamedTuple):
    """A file with text, as it was when it was found."""

    name: str
    """path below the folder that was named, with slashes: the same on every machine"""
    path: Path
    size: int
    """bytes of text"""
    digest: str
    """sha256 of them, and of where rows end"""
    field: str = ""
    """the field of its rows that holds the text; empty: the file itself is text"""


def find(
    files: str | Sequence[str] = (), cache: Path | None = None, field: str = "text"
) -> tuple[list[Document], list[str]]:
    """The documents behind `files`, in their order and each once, and sentences about what was passed over; rows of a .jsonl
    have their text in `field`.

    Folders and globs pass over files with NUL bytes, hidden ones, and the folders of our own runs, among them the one
    that `cache` belongs to; folders also tables whose first row lacks the field. FileNotFoundError, ValueError: something
    that was named is missing, binary, damaged or without text.
    """
    files = [os.path.expanduser(file) for file in ((files,) if isinstance(files, str | os.PathLike) else files)]
    cache = None if cache is None else Path(cache).resolve()
    documents, kinds, notes, other = [], {}, [], f"without a field {field!r}"
    for source in files or ("",):
        here = Counter()
        for name, path in _candidates(source, cache):
            real = os.path.realpath(path)
            if kinds.get(real, other) == other:
                try:
                    kinds[real], size, digest = _summed(path, field)
                except OtherTable:
                    if not os.path.isdir(source):
                        raise
                    kinds[real] = other
                if kinds[real] == "text":
                    documents.append(Document(name, path, size, digest, field if _is_table(path) else ""))
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
    counts = Counter(kinds.values())
    for count, kind in ((counts[BINARY], "binary file"), (counts[other], "table")):
        if count:
            notes.append(f"passed over {count} {kind}{'s' * (count > 1)}{f' {other}' * (kind == 'table')}")
    return documents, notes


def _form(path: Path) -> str:
    """The rest of a sentence about a file that is no text as it stands."""
    with _open(path) as file:
        begin = file.read(8)
    return next((f"; it seems {told}" for mark, told in FORMS.items() if begin.startswith(mark)), "")


def _open(path: Path):
    return PACKED.get(path.suffix.lower(), open)(path, "rb")


def _is_table(path: Path) -> bool:
    return Path(path.stem if path.suffix.lower() in PACKED else path.name).suffix.lower() in TABLES


def _summed(path: Path, field: str) -> tuple[str, int, str]:
    """What a file holds (text, nothing, something binary), and the size and digest of its text."""
    size, hashed, table = 0, hashlib.sha256(), _is_table(path)
    for begins, piece in _read(path, field if table else ""):
        if not table and b"\0" in piece:
            return BINARY, 0, ""
        size += len(piece)
        hashed.update(_row_mark(piece) * (begins and table) + piece)
    return "text" if size else "empty", size, hashed.hexdigest()


def _row_mark(row: bytes) -> bytes:
    return b"%d " % len(row)


def pieces(document: Document) -> Iterator[tuple[bool, bytes]]:
    """The text of a document in pieces, each with whether a row begins there: rows of a table, blocks of a file that is one.

    ValueError, at the end: it is not what was found.
    """
    hashed = hashlib.sha256()
    for begins, piece in _read(document.path, document.field):
        hashed.update(_row_mark(piece) * (begins and bool(document.field)) + piece)
        yield begins, piece
    if hashed.hexdigest() != document.digest:
        raise ValueError(f"{document.path} changed while it was read; try again when it stands still")


def _read(path: Path, field: str) -> Iterator[tuple[bool, bytes]]:
    """`pieces` of a file, whatever it holds."""
    with _open(path) as stream:
        try:
            if field:
                yield from ((True, row) for row in _rows(path, stream, field))
                return
            begins = True
            while block := stream.read(BLOCK):
                yield begins, block
                begins = False
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        except OSError as error:
            # How bz2 says it.
            if error.errno is None:
                raise ValueError(f"{path} is damaged: {error}") from None
            raise


def _rows(path: Path, stream, field: str) -> Iterator[bytes]:
    """The texts of a file with a JSON object a line; empty ones and empty lines are left out."""
    found = False
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST), b""), 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}, is not JSON ({error}); wanted an object with a field {field!r}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}, holds {type(row).__name__}, wanted an object with a field {field!r}")
        if field not in row:
            told = ", ".join(map(repr, list(row)[:8])) or "none"
            error = ValueError if found else OtherTable
            raise error(
                f"{where}, has no field {field!r}, only {told}; name the one with the text by --field or --data.field"
            )
        found = True
        if not isinstance(row[field], str):
            raise ValueError(f"{where}, has {field!r} of {type(row[field]).__name__}, wanted text")
        if row[field]:
            yield row[field].encode("utf-8", "replace")


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
