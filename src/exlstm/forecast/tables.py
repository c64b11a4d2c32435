"""Tables on disk: CSV, Parquet, and .tsf files, as frames."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import warnings
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path

from exlstm.data.columns import ID_NAMES
from exlstm.data.panel import require_pandas
from exlstm.forecast import frames
from exlstm.forecast.tsf import read_tsf

PARQUET = (".parquet", ".pq")
SHEETS = (".xlsx", ".xlsm", ".xls", ".ods")
OTHERS = (
    ".json",
    ".jsonl",
    ".ndjson",
    ".xml",
    ".html",
    ".feather",
    ".arrow",
    ".orc",
    ".avro",
    ".pkl",
    ".h5",
    ".sqlite",
)
UNPACKING = (zlib.error, lzma.LZMAError, zipfile.BadZipFile)
# What a column is hardly named.
DATE = r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}(?:[ T].*)?|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}(?:[ T].*)?"

THOUSANDS = r"[+-]?(?:\d+|[1-9]\d{0,2}(?:,\d{3})+)(?:\.\d+)?"


def read_table(path: Path, id: str = "", like=None):
    """The frame in a file; what cannot be read is a ValueError or an OSError of one sentence.

    Ids stay what they are: column `id`, without it those with the name of one, is text where whole numbers begin with 0, as
    007 does, where they have a point, and where it is text in the frame `like`. A file that is no UTF-8 is read as
    Windows-1252, with a UserWarning.
    """
    pd = require_pandas()
    if path.is_dir():
        raise ValueError(f"{path} is a folder, wanted a table (CSV, Parquet or .tsf)")
    kind = path.suffix.lower()
    if kind == ".tsf":
        return frames.history(read_tsf(path)[0])
    if path.exists() and kind in SHEETS:
        raise ValueError(f"{path} is a spreadsheet, wanted CSV or Parquet: save it as one of those")
    if path.exists() and kind in OTHERS:
        raise ValueError(f"{path} is a {kind} file, wanted CSV, Parquet or .tsf")
    if path.exists() and path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        frame = _keyed(pd.read_parquet(path)) if kind in PARQUET else _read_csv(path, id, like)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except ImportError:
        raise ValueError(f"{path} is a Parquet file; reading it needs pyarrow: pip install pyarrow") from None
    except (ValueError, EOFError, OSError, *UNPACKING) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        first = (str(error).strip().splitlines() or ["no table"])[0]
        raise ValueError(f"{path} cannot be read as a table: {first}") from None
    if len(frame) == 0:
        raise ValueError(f"{path} has a header and no rows")
    if first := next((name for name in frame.columns if re.fullmatch(DATE, str(name).strip())), None):
        raise ValueError(f"the first line of {path} holds {first!r}, wanted the names of the columns")
    if len(frame.columns) < 2:
        raise ValueError(f"{path} has the single column {frame.columns[0]!r}, wanted at least a time and a value")
    return frame


def _keyed(frame):
    """The frame with its index as columns where that has names or times."""
    index, pd = frame.index, require_pandas()
    named = None not in index.names and not set(index.names) & set(frame.columns)
    timed = index.name is None and isinstance(index, pd.DatetimeIndex | pd.PeriodIndex)
    return frame.reset_index() if named or timed else frame


def _read_csv(path: Path, id: str, like):
    pd = require_pandas()
    sep, how = _dialect(path)

    def read(**more):
        with warnings.catch_warnings():
            # That a separator at the end of the lines parts nothing.
            warnings.simplefilter("ignore", pd.errors.ParserWarning)
            return pd.read_csv(path, sep=sep, **how, **more)

    try:
        frame = read()
    except UnicodeDecodeError:
        how["encoding"] = "cp1252"
        try:
            frame = read()
        except UnicodeDecodeError:
            raise ValueError("it is no text") from None
        warnings.warn(f"{path} is no UTF-8 and is read as Windows-1252", stacklevel=3)
    if not isinstance(frame.index, pd.RangeIndex) and frame.iloc[:, -1].isna().all():
        # Lines that end with a separator, and a header that does not, are no table with an index.
        how["index_col"] = False
        frame = read()

    def as_text(names, **more):
        return read(usecols=names, dtype=str, **more) if names else {}

    ids = [c for c in frame.columns if (c.strip() == id if id else c.strip().lower() in ID_NAMES)]
    read_anew = [c for c in ids if frame[c].dtype.kind in "iuf" or frame[c].isna().any()]
    # Namibia is NA.
    for name, text in as_text(read_anew, keep_default_na=False, na_values=[""]).items():
        numerals = frame[name].dtype.kind in "iu"
        held = like is not None and name in like.columns and like[name].dtype.kind not in "iufb"
        if held or not numerals or text.str.match(r"\s*0\d").any():
            frame[name] = text.str.strip()
    return _trimmed(_with_points(frame, ids, as_text) if sep == ";" else _with_commas(frame, ids, path, sep))


def _trimmed(frame):
    """Without empty rows at the end and empty columns without a name, which spreadsheets write."""
    rows = frame.notna().any(axis=1).to_numpy().nonzero()[0]
    held = [n for n, c in enumerate(frame.columns) if not re.fullmatch(r"Unnamed: \d+", c) or frame[c].notna().any()]
    return frame.iloc[: rows[-1] + 1 if len(rows) else 0, held]


def _dialect(path: Path) -> tuple[str, dict]:
    """The separator, and what else reading a text needs: its encoding, and to skip a first line that names the separator."""
    with _opened(path) as file:
        head = file.read(1 << 16)
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    lines = head.decode(encoding, "replace").removeprefix("\ufeff").splitlines()
    line = next((line for line in lines if line.strip()), "")
    # Excel's way to say it.
    if named := re.fullmatch(r'"?sep=(.)"?', line, re.IGNORECASE):
        return named[1], {"encoding": encoding, "skiprows": 1}
    counts = {sep: line.count(sep) for sep in (",", ";", "\t", "|")}
    best = max(counts, key=counts.get)
    return best if counts[best] else ",", {"encoding": encoding}


def _opened(path: Path):
    """The bytes of a file that may be packed."""
    kind = path.suffix.lower()
    if kind == ".zip":
        archive = zipfile.ZipFile(path)
        return archive.open((archive.namelist() or [""])[0])
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(kind, open)(path, "rb")


def _with_points(frame, ids, as_text):
    """Numbers with a comma for the point and perhaps a point between thousands, as tables have them whose columns a semicolon
    parts. That 1.050 is a thousand and not one, other numbers have to say: a comma in any column, or, beside it, whole ones
    below a thousand and a last 0 that no fraction would keep."""
    commas = False
    for name in frame.columns:
        if name in ids or frame[name].dtype.kind in "iufb":
            continue
        known = frame[name].dropna().astype(str).str.strip()
        if len(known) and known.str.fullmatch(r"[+-]?(?:\d+|[1-9]\d{0,2}(?:\.\d{3})+)(?:,\d+)?(?:[eE][+-]?\d+)?").all():
            commas |= bool(known.str.contains(",").any())
            frame[name] = _number(frame[name])
    for name, text in as_text([c for c in frame.columns if frame[c].dtype.kind == "f" and c not in ids]).items():
        known = text.dropna().str.strip()
        pointed = known.str.contains(".", regex=False)
        thousands = known[pointed].str.fullmatch(r"[+-]?[1-9]\d{0,2}\.\d{3}").all()
        below = known[~pointed]
        told = len(below) and below.str.fullmatch(r"[+-]?\d{1,3}").all() and known[pointed].str.endswith("0").any()
        if pointed.any() and thousands and (told or commas):
            frame[name] = _number(text)
    return frame


def _with_commas(frame, ids, path: Path, sep: str):
    """Numbers with commas between thousands, as 1,234.5, in tables whose columns something else parts, or that quote them."""
    for name in frame.columns:
        if name in ids or frame[name].dtype.kind not in "OU":
            continue
        known = frame[name].dropna().astype(str).str.strip()
        # A column of dates or notes is known by its first rows.
        if not all(len(part) and part.str.fullmatch(THOUSANDS).all() for part in (known.head(100), known)):
            continue
        # Where tabs part, 1,234 may be a fraction with a comma for the point; another number has to say that it is none.
        if known.str.contains("," if sep == "," else r"\.|,.*,|^[+-]?\d{1,3}$").any():
            warnings.warn(f"{path}: the commas in column {name!r} are read as those between thousands", stacklevel=4)
            frame[name] = frame[name].astype(object).str.replace(",", "", regex=False).astype(float)
    return frame


def _number(text):
    plain = text.astype(object).str.replace(".", "", regex=False)
    return plain.str.replace(",", ".", regex=False).astype(float)


def check_target(path: Path):
    """ValueError where `write_table` could not write a file of this name."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, wanted a file for the forecast")
    kind = path.suffix.lower()
    if kind not in ("", ".csv", ".txt", ".tsv", *PARQUET):
        raise ValueError(f"{path} is to be a {kind} file, wanted CSV (.csv, .tsv, .txt) or Parquet (.parquet)")
    if kind in PARQUET and find_spec("pyarrow") is None:
        raise ValueError(f"{path} is to be a Parquet file; writing it needs pyarrow: pip install pyarrow")


def write_table(frame, path: Path):
    """Writes beside and renames, so that a file stands whole or not at all."""
    aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        if path.suffix.lower() in PARQUET:
            frame.to_parquet(aside, index=False)
        else:
            frame.to_csv(aside, index=False, sep="\t" if path.suffix.lower() == ".tsv" else ",")
        os.replace(aside, path)
    except ImportError:
        raise ValueError(f"{path} is to be a Parquet file; writing it needs pyarrow: pip install pyarrow") from None
    except OSError as error:
        raise OSError(f"could not write {path}: {error.strerror or error}") from None
    finally:
        aside.unlink(missing_ok=True)
