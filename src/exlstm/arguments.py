"""The words behind a command as its settings; where they do not fit, one sentence that says why."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
from dataclasses import fields, is_dataclass

import tyro


def parse(kind, prog: str, argv: list[str], default=None):
    """The settings `kind` out of the arguments; None when they asked for help. ValueError: they do not fit."""
    start = default([] if {"-h", "--help"} & set(argv) else argv) if default else None
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            settings = {} if start is None else {"default": start}
            command, unknown = tyro.cli(kind, prog=prog, args=argv, return_unknown_args=True, **settings)
    except SystemExit as end:
        if not end.code:
            return None
        raise ValueError(_squeezed(errors.getvalue())) from None
    if unknown:
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("-"):
            raise ValueError(f"unexpected argument {flag!r}, see {prog} --help")
        raise ValueError(f"unknown field {flag}{_nearest_flag(flag, kind) or f', see {prog} --help'}")
    return command


def _nearest_flag(flag: str, kind) -> str:
    """', did you mean --model.d-model?' for --d-model or --model.d-modle; '' when nothing is near, or what is has no flag."""
    name, known = flag.lstrip("-").replace("_", "-"), _known_flags(kind)
    close = [k for k in known if k.endswith(f".{name}")] or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f", did you mean --{close[0]}?" if close and close[0] != name else ""


def _known_flags(kind, prefix: str = "") -> list[str]:
    flags = []
    for f in fields(kind):
        name = prefix + f.name.replace("_", "-")
        inner = f.default_factory if is_dataclass(f.default_factory) else None
        flags += _known_flags(inner, f"{name}.") if inner else [name]
    return flags


def flags(argv: list[str]) -> dict[str, str]:
    """Every flag that was typed, with the word after it: {"--size": "tiny"}."""
    found = {}
    for word, after in zip(argv, [*argv[1:], ""]):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            found[flag.replace("_", "-")] = value if equals else after
    return found


def _squeezed(box: str) -> str:
    """tyro's framed report as one sentence."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]
    told = " ".join(line.strip(" │╭╮╰╯─") if "─" in line or "│" in line else line for line in lines)
    told = re.split(r"Argument helptext:|For full helptext", re.sub(r"-{4,}", " ", told))[0]
    told = " ".join(told.split()).removesuffix(".")
    if missing := re.match(r"Missing value for argument '(\S+)'(?:. Expected (\d+) values)?", told):
        single = f"a value, and one that begins with - is written {missing[1]}=-..."
        return f"{missing[1]} wants {single if missing[2] in (None, '1') else f'{missing[2]} values'}"
    kinds = r"(?:invalid literal|could not convert|no type matching).*(?:: |from \[)|Could not.*: \[(?:'[\d.]+', )*"
    if wrong := re.match(rf"Error parsing (--\S+): (?:{kinds})('.*?')", told):
        return f"{wrong[1]} is {wrong[2]}, wanted a number"
    return re.sub(r"^Error parsing [\w.-]+: ", "", told) or "these arguments do not fit"
