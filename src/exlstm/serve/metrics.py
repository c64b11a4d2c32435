"""What the server counts, in the text form that Prometheus reads."""

from __future__ import annotations

from collections import Counter


class Times:
    """How many, and how many seconds together."""

    def __init__(self):
        self.count, self.seconds = 0, 0.0

    def add(self, seconds: float):
        self.count, self.seconds = self.count + 1, self.seconds + seconds


class Metrics:
    """Counted since the start; one thread writes each of them."""

    def __init__(self):
        self.statuses: Counter[int] = Counter()
        self.requests, self.first = Times(), Times()
        self.tokens = self.prompt_tokens = self.found_tokens = self.cancelled = 0

    def seconds_of_requests(self) -> float:
        """The mean of the requests that were answered, 1 before the first."""
        return self.requests.seconds / self.requests.count if self.requests.count else 1.0

    def text(self, now: dict[str, float]) -> str:
        """All of it, with what is `now`: gauges by their names."""
        lines = []

        def told(name, kind, about, values):
            lines.extend((f"# HELP exlstm_{name} {about}", f"# TYPE exlstm_{name} {kind}"))
            lines.extend(f"exlstm_{name}{label} {value}" for label, value in values.items())

        statuses = {f'{{status="{status}"}}': count for status, count in sorted(self.statuses.items())}
        told("responses_total", "counter", "Answers by HTTP status.", statuses)
        told("cancelled_total", "counter", "Requests whose client went away.", {"": self.cancelled})
        told("generated_tokens_total", "counter", "Tokens written.", {"": self.tokens})
        told("prompt_tokens_total", "counter", "Tokens of prompts.", {"": self.prompt_tokens})
        told("prompt_found_tokens_total", "counter", "Of those, not read again.", {"": self.found_tokens})
        for name, about, times in (
            ("request_seconds", "Seconds of requests that were answered.", self.requests),
            ("first_token_seconds", "Seconds until the first token.", self.first),
        ):
            told(name, "summary", about, {"_sum": times.seconds, "_count": times.count})
        for name, value in now.items():
            told(name, "gauge", f"{name.replace('_', ' ').capitalize()} now.", {"": value})
        return "\n".join(lines) + "\n"
