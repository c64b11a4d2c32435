"""What a run shows while it works: a live panel on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import itertools
import math
import os
import sys
import time

BARS = "▁▂▃▄▅▆▇█"
PLAIN_SECONDS, LIVE_SECONDS = 5.0, 0.25
CURVE = 256


def clock(seconds: float) -> str:
    """1:05 or 2:03:07."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Pace:
    """Says every few seconds how much of a task is done and how long the rest takes; `say(text)` hears it, or None."""

    def __init__(self, what: str, total: int, say, seconds: float = PLAIN_SECONDS):
        self.what, self.total, self.say, self.seconds, self.done = what, total, say, seconds, 0
        self.start = self.last = time.perf_counter()

    def add(self, count: int = 1):
        self.done, now = self.done + count, time.perf_counter()
        if self.say and now - self.last >= self.seconds and self.done < self.total:
            self.last, left = now, (now - self.start) / self.done * (self.total - self.done)
            self.say(f"  {self.what}: {self.done:,} of {self.total:,}, {left:.0f} s left")


def sparkline(values: list[float], width: int) -> str:
    """The values as `width` bars at most, each the mean of its share."""
    width = min(width, len(values))
    edges = [len(values) * i // width for i in range(width + 1)] if width else []
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means, default=0), max(means, default=0)
    return "".join(BARS[round((m - low) / ((high - low) or 1) * (len(BARS) - 1))] for m in means)


def legible(text: str, width: int) -> str:
    """One line of at most `width` characters: what a model writes must not steer the terminal."""
    text = "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text[: 2 * width])
    return text if len(text) <= width else text[: width - 1] + "…"


def measured(evaluation: dict) -> str:
    """The numbers of an evaluation in a line; None stands for one that was not finite."""
    told = {k: "not finite" if v is None else f"{v:.4f}" for k, v in evaluation.items() if k != "step"}
    return "  ".join(f"{k} {v}" for k, v in told.items())


def _is_terminal(stream) -> bool:
    drawable = (getattr(stream, "encoding", None) or "").lower().startswith("utf")
    return drawable and stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


class Progress:
    """Shows a run; `bytes_per_token` adds bits per byte to the loss, `live` None: by whether `stream` is a terminal.

    A display that fails (a closed pipe) goes dark: it never ends a training.
    """

    def __init__(self, bytes_per_token: float | None = None, stream=None, live: bool | None = None):
        self.stream = sys.stdout if stream is None else stream
        self.bytes_per_token = bytes_per_token
        self.on_terminal = _is_terminal(self.stream) if live is None else live
        self.live = None
        self.dark = False
        self.curve: list[float] = []
        self.share, self.pending = 1, []
        self.record, self.evaluation, self.written = {}, {}, ""
        self.first = self.steps = 0
        self.pace = self.shown = 0.0
        self.at = None

    def start(self, step: int, steps: int):
        """The first step follows `step`, the last one is `steps`."""
        self.first, self.steps = step, steps
        if self.on_terminal and not self.dark:
            self._safely(self._open)

    def step(self, record: dict):
        """A training record: step, lr, tokens_per_second, and the loss unless the step was skipped."""
        now = time.perf_counter()
        if self.at is not None:
            # The mean over about the last 50 steps; evaluations and checkpoints count: they will come again.
            weight = max(0.02, 1 / max(1, record["step"] - self.first - 1))
            self.pace += weight * (now - self.at - self.pace)
        self.at = now
        self.record = record if "loss" in record else {**self.record, "step": record["step"]}
        if "loss" in record:
            self._bend(record["loss"])
        if now - self.shown >= (LIVE_SECONDS if self.live else PLAIN_SECONDS) or record["step"] == self.steps:
            self.shown = now
            self._safely(self._show)

    def evaluated(self, record: dict):
        """An evaluation: step and the numbers measured there."""
        self.evaluation = record
        if not self.live:
            self.say(f"step {record['step']:>{len(str(self.steps))}}/{self.steps}  {measured(record)}")

    def sample(self, text: str):
        """Something the model wrote."""
        self.written = text
        if not self.live:
            self.say(f"  writes: {legible(text, 140)}")

    def say(self, text: str):
        """A line that stays."""
        self._safely(
            lambda: self.live.console.print(text, markup=False, highlight=False) if self.live else self._print(text)
        )

    def stop(self):
        """Leaves the last state on the screen."""
        if live := self.live:
            self._safely(self._show)
            self._safely(live.stop)
            self.live = None

    def _bend(self, loss: float):
        """Adds to the curve, which halves its resolution when it is long: its size does not depend on the run's."""
        self.pending.append(loss)
        if len(self.pending) == self.share:
            self.curve.append(sum(self.pending) / self.share)
            self.pending.clear()
        if len(self.curve) == 2 * CURVE:
            self.curve = [(a + b) / 2 for a, b in zip(self.curve[::2], self.curve[1::2])]
            self.share *= 2

    def _safely(self, show):
        if self.dark:
            return
        try:
            show()
        except (OSError, ValueError):
            self.dark, self.live = True, None

    def _print(self, text: str):
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), file=self.stream, flush=True)

    def _left(self) -> str:
        return f"  {clock(self.pace * (self.steps - self.record.get('step', 0)))} left" if self.pace else ""

    def _numbers(self) -> list[tuple[str, str]]:
        record, shown = self.record, []
        if "loss" in record:
            shown.append(("loss", f"{record['loss']:.4f}"))
            if self.bytes_per_token:
                shown.append(("bits/byte", f"{record['loss'] / math.log(2) / self.bytes_per_token:.3f}"))
        if "lr" in record:
            shown.append(("lr", f"{record['lr']:.2e}"))
        if "tokens_per_second" in record:
            shown.append(("tokens/s", f"{record['tokens_per_second']:,.0f}"))
        return shown

    def _show(self):
        if self.live:
            self.live.update(self._panel(), refresh=True)
        else:
            step = f"step {self.record['step']:>{len(str(self.steps))}}/{self.steps}"
            numbers = "  ".join(f"{k} {v}" for k, v in self._numbers())
            self._print(f"{step}  {numbers}{self._left()}")

    def _open(self):
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self.stream, force_terminal=True)
        # rich would end the program.
        console.on_broken_pipe = lambda: None
        # Refreshed by the steps themselves: a thread of its own would take time from a model of a few milliseconds.
        self.live = Live(self._panel(), console=console, auto_refresh=False)
        self.live.start()

    def _panel(self):
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        width = self.live.console.width if self.live else 80
        step, table = self.record.get("step", self.first), Table.grid(padding=(0, 2))
        done = round(24 * step / max(1, self.steps))
        table.add_row("step", Text(f"{step}/{self.steps}  {'━' * done}{'╌' * (24 - done)}{self._left()}"))
        table.add_row("now", Text("  ".join(f"{k} {v}" for k, v in self._numbers())))
        table.add_row("loss", Text(sparkline(self.curve, max(10, width - 16))))
        if self.evaluation:
            table.add_row(f"at {self.evaluation['step']}", Text(measured(self.evaluation)))
        if self.written:
            table.add_row("writes", Text(legible(self.written, max(10, 3 * (width - 16)))))
        return Panel(table, title="training", title_align="left", width=min(width, 120))
