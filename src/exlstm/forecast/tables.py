"""Tables on disk: CSV, Parquet, and the .tsf files of the Monash archive, as frames."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from exlstm.data.panel import ID, TARGET, TIME, require_pandas

# The frequencies of the Monash archive as pandas writes them.
TSF_FREQUENCIES = {
    "yearly": "YS", "quarterly": "QS", "monthly": "MS", "weekly": "7D", "daily": "D", "hourly": "h", "half_hourly": "30min",
    "10_minutes": "10min", "15_minutes": "15min", "minutely": "min", "4_seconds": "4s",
}  # fmt: skip


PARQUET = (".parquet", ".pq")
# What a column is hardly named.
DATE = r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}(?:[ T].*)?|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}(?:[ T].*)?"


def read_table(path: Path):
    """The frame in a file; what cannot be read is a ValueError or an OSError of one sentence."""
    pd = require_pandas()
    if path.is_dir():
        raise ValueError(f"{path} is a folder, wanted a table (CSV, Parquet or .tsf)")
    kind = path.suffix.lower()
    if kind == ".tsf":
        return read_tsf(path)[0]
    if path.exists() and path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        if kind in PARQUET:
            return pd.read_parquet(path)
        sep = _sep(path)
        frame = pd.read_csv(path, sep=sep)
        frame = _with_points(frame) if sep == ";" else frame
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except ImportError:
        raise ValueError(f"{path} is a Parquet file; reading it needs pyarrow: pip install pyarrow") from None
    except (ValueError, pd.errors.ParserError, UnicodeDecodeError) as error:
        first = (str(error).strip().splitlines() or ["no table"])[0]
        raise ValueError(f"{path} cannot be read as a table: {first}") from None
    if len(frame) == 0:
        raise ValueError(f"{path} has a header and no rows")
    if first := next((name for name in frame.columns if re.fullmatch(DATE, str(name).strip())), None):
        raise ValueError(f"the first line of {path} holds {first!r}, wanted the names of the columns")
    if len(frame.columns) < 2:
        raise ValueError(f"{path} has the single column {frame.columns[0]!r}, wanted at least a time and a value")
    return frame


def _sep(path: Path) -> str:
    """The separator of the first line."""
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    with opened(path, "rt", encoding="utf-8", errors="replace") as file:
        line = file.readline()
    counts = {sep: line.count(sep) for sep in (",", ";", "\t", "|")}
    best = max(counts, key=counts.get)
    return best if counts[best] else ","


def _with_points(frame):
    """Numbers with a comma for the point, as tables have them whose columns a semicolon parts."""
    for name in frame.columns:
        text = frame[name]
        if text.dtype.kind in "iufb":
            continue
        known = text.dropna().astype(str).str.strip()
        if len(known) and known.str.fullmatch(r"[+-]?\d+(?:,\d+)?(?:[eE][+-]?\d+)?").all():
            frame[name] = text.astype(object).str.replace(",", ".").astype(float)
    return frame


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


def read_tsf(path: Path) -> tuple[object, dict]:
    """The long frame of a .tsf file, and what its header says: frequency (an alias), horizon if there is one."""
    pd = require_pandas()
    try:
        lines = path.read_text(encoding="cp1252", errors="replace").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    header, attributes, parts, inside = {}, [], [], False
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if inside:
            parts.append(_tsf_series(line, attributes, header, path, number))
        elif line.lower() == "@data":
            inside = True
        elif line.startswith("@attribute"):
            attributes.append(line.split()[1])
        elif line.startswith("@"):
            header[line.split()[0][1:]] = line.split(maxsplit=1)[-1].strip()
    if not parts:
        raise ValueError(f"{path} holds no @data with a series: not a .tsf file")
    frame = pd.concat(parts, ignore_index=True)
    freq = TSF_FREQUENCIES.get(header.get("frequency", ""))
    return frame, {"freq": freq, "horizon": int(header["horizon"]) if header.get("horizon", "").isdigit() else None}


def _tsf_series(line: str, attributes: list, header: dict, path: Path, number: int):
    pd = require_pandas()
    values = line.split(":")
    if len(values) != len(attributes) + 1:
        raise ValueError(f"{path} has {len(values)} fields in line {number}, wanted {len(attributes) + 1}")
    told = dict(zip(attributes, values))
    try:
        y = np.array([np.nan if v.strip() == "?" else float(v) for v in values[-1].split(",")])
    except ValueError:
        raise ValueError(f"{path} holds a value in line {number} that is no number") from None
    name = told.get("series_name", f"T{number}")
    freq = TSF_FREQUENCIES.get(header.get("frequency", ""))
    if freq is None or "start_timestamp" not in told:
        return pd.DataFrame({ID: name, TIME: np.arange(len(y)), TARGET: y})
    start = pd.to_datetime(told["start_timestamp"], format="%Y-%m-%d %H-%M-%S")
    # Months and longer begin on the first day: the archive's days within them carry nothing.
    start = start if freq not in ("MS", "QS", "YS") else start.normalize().replace(day=1)
    if freq == "QS":
        freq = f"QS-{start.strftime('%b').upper()}"
    if freq == "YS":
        freq = f"YS-{start.strftime('%b').upper()}"
    try:
        times = pd.date_range(start, periods=len(y), freq=freq)
    except (pd.errors.OutOfBoundsDatetime, OverflowError):
        # Series of centuries: whole numbers count as well.
        return pd.DataFrame({ID: name, TIME: np.arange(len(y)), TARGET: y})
    return pd.DataFrame({ID: name, TIME: times, TARGET: y})
