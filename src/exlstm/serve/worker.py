"""The thread that owns the engine: requests wait in a bounded queue, their prompts are read piece by piece between steps, and
what they write goes back to whoever asked.

What a request writes depends on it alone: a prompt is read by itself, in the same pieces whatever else runs, and a slot does
not see its neighbours.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from exlstm.models.engine import Engine
from exlstm.models.reading import evaluating
from exlstm.models.sequence import Request, Sequence
from exlstm.serve.asked import Asked, Refused
from exlstm.serve.config import Serve
from exlstm.serve.metrics import Metrics
from exlstm.serve.prefixes import Prefixes, Reading

# Seconds without a sign of the thread after which it counts as hung: a step or a piece of a prompt of a large model takes a few.
HUNG = 60.0
# Failures in a row, nothing between them succeeding, after which the device counts as lost.
FAILURES = 5


class Job:
    """A request on its way. `tell` gets its events, in the worker's thread: a Piece, or a Refused, which is the last one."""

    def __init__(self, asked: Asked, tell: Callable):
        self.asked, self.tell = asked, tell
        self.begun = time.monotonic()
        self.until = float("inf")
        self.gone = self.begins = False
        self.prompt = self.choice = 0
        self.reading: Reading | None = None
        self.writing: set[Sequence] = set()
        self.left = len(asked.prompts) * asked.n
        self.found = 0

    @property
    def seated(self) -> bool:
        """Whether all its texts have begun."""
        return self.prompt == len(self.asked.prompts)


@dataclass(frozen=True)
class Piece:
    """What a text of a job goes on with; `reason` says why it ended there, "stop" or "length"."""

    index: int
    text: str
    tokens: int
    reason: str | None = None


class Worker:
    """The engine, its thread and its queue; `submit`, `cancel`, `drain` and `alive` are for other threads."""

    def __init__(self, model, settings: Serve):
        self.model, self.settings, self.metrics = model, settings, Metrics()
        self.engine, self._reader = Engine(model, settings.slots), evaluating(model)
        self._prefixes = Prefixes(settings.prefix_mib << 20)
        self._inbox: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        self._seats: dict[Sequence, tuple[Job, int, int]] = {}
        self._turns = self._failures = 0
        self._changed, self._stopped = threading.Condition(), False
        self.dead: str | None = None
        self.drained: float | None = None
        self._beat = time.monotonic()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self):
        """Writes two tokens, so that kernels are compiled and a broken model says so, and then lets the thread run."""
        (sequence,) = self.engine.admit(Request([0], 2, seed=0))
        for _ in self.engine.run():
            pass
        self.engine.remove(sequence)
        self._beat = time.monotonic()
        self.thread.start()

    # For other threads

    def submit(self, job: Job):
        """Takes a job into the queue. Refused: it is full, the server is about to end, or the thread has died."""
        with self._changed:
            if not self.alive():
                raise Refused(503, f"the engine does not run any more: {self.dead or 'it hangs'}")
            if self.drained is not None:
                raise Refused(503, "the server is about to end")
            waiting = self.waiting()
            if waiting >= self.settings.queue + self.engine.free:
                wait = self.metrics.seconds_of_requests() * (waiting + 1) / self.settings.slots
                sentence = f"{waiting} requests wait already, come again later"
                raise Refused(429, sentence, wait=min(60, max(1, round(wait))))
            job.until = job.begun + self.settings.timeout
            self._inbox.append(job)
            self._changed.notify()

    def cancel(self, job: Job):
        """Nobody listens to the job any more: its slots are freed before the next step."""
        with self._changed:
            job.gone = True
            self._changed.notify()

    def drain(self, seconds: float):
        """No new jobs; those that are there have so long."""
        with self._changed:
            self.drained = time.monotonic() + seconds
            self._changed.notify()

    def stop(self, seconds: float = 10.0):
        """Ends the thread; what still runs is refused."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self.thread.is_alive():
            self.thread.join(seconds)

    def alive(self) -> bool:
        """Whether the thread goes on: it has not died, and was seen not long ago."""
        return self.dead is None and self.thread.is_alive() and time.monotonic() - self._beat < HUNG

    def waiting(self) -> int:
        """Jobs whose texts have not all begun."""
        return len(self._inbox) + len(self._waiting)

    # In the engine's thread

    def _run(self):
        told = "it was stopped"
        try:
            while self._next():
                self._sweep()
                self._turn()
                self._write()
        except BaseException as error:
            traceback.print_exc()
            told = f"{type(error).__name__}: {error}"
        with self._changed:
            self.dead = told
            self._waiting += self._inbox
            self._inbox.clear()
        # Without the engine, which may fail again.
        for job in self._jobs():
            job.tell(Refused(503, f"the engine does not run any more: {told}"))

    def _next(self) -> bool:
        """Waits until there is something to do; False at the end."""
        with self._changed:
            self._beat = time.monotonic()
            while not (self._inbox or self._waiting or self._seats or self._stopped):
                self._changed.wait(1.0)
                self._beat = time.monotonic()
            self._waiting += self._inbox
            self._inbox.clear()
            return not self._stopped

    def _jobs(self) -> list[Job]:
        return list(dict.fromkeys((*self._waiting, *(job for job, _, _ in self._seats.values()))))

    def _sweep(self):
        """Ends jobs that nobody waits for, and those whose time is over."""
        now, drained = time.monotonic(), self.drained
        for job in self._jobs():
            if job.gone:
                self.metrics.cancelled += 1
                self._end(job)
            elif now >= job.until:
                self._end(job, Refused(504, f"the request took longer than {self.settings.timeout:g} seconds"))
            elif drained is not None and now >= drained:
                self._end(job, Refused(503, "the server has ended before the request was done"))

    def _turn(self):
        """Reads one piece of a prompt, or seats the texts that go on from one: those in front take turns."""
        free = self.engine.free
        if not free or not self._waiting:
            return
        self._turns += 1
        job = self._waiting[self._turns % min(free, len(self._waiting))]
        try:
            if job.reading is None:
                job.reading = Reading(self._reader, job.asked.prompts[job.prompt], self._prefixes)
                # For a later choice it is read again.
                if not job.choice:
                    self.metrics.prompt_tokens += len(job.reading.prompt)
                    self.metrics.found_tokens += job.reading.found
                    job.found += job.reading.found
            if not job.reading.done:
                job.reading.step()
            if job.reading.done:
                self._seat(job)
        except Exception as error:
            traceback.print_exc()
            # What a state has wrong, such as a NaN, says nothing about the device, nor does a prompt that its memory cannot hold.
            self._failures += not isinstance(error, ValueError | torch.cuda.OutOfMemoryError)
            self._end(job, Refused(500, f"the prompt could not be read: {error}"))
            if self._failures >= FAILURES:
                raise

    def _seat(self, job: Job):
        """Begins one more text of a job."""
        request = Request([], state=job.reading.state, **job.asked.rules)
        sequence = Sequence(self.model, request, stream=job.choice)
        sequence.writes_text()
        self.engine.enter([sequence])
        self._seats[sequence] = job, job.prompt * job.asked.n + job.choice, 0
        job.writing.add(sequence)
        job.choice += 1
        if job.choice == job.asked.n:
            job.prompt, job.choice, job.reading = job.prompt + 1, 0, None
        # Behind the others: a request of many texts must not keep them waiting.
        self._waiting.remove(job)
        if not job.seated:
            self._waiting.append(job)
            # A state takes as much memory as a slot: those of more jobs than that are read again.
            if sum(other.reading is not None for other in self._waiting) > self.settings.slots:
                job.reading = None

    def _write(self):
        """One more token in every slot."""
        try:
            came = self.engine.step()
            self._failures = 0 if came else self._failures
        except Exception as error:
            traceback.print_exc()
            self._failures += 1
            # Nobody knows which of them lack a token now.
            for job in {job for job, _, _ in self._seats.values()}:
                self._end(job, Refused(500, f"writing failed: {error}"))
            if self._failures >= FAILURES:
                raise
            return
        self.metrics.tokens += len(came)
        # On a GPU some tokens of one text may come at once.
        for sequence, count in Counter(came).items():
            if sequence in self._seats:
                self._tell(sequence, count)

    def _tell(self, sequence: Sequence, came: int):
        job, index, count = self._seats[sequence]
        count += came
        self._seats[sequence] = job, index, count
        if not job.begins:
            job.begins = True
            self.metrics.first.add(time.monotonic() - job.begun)
        text = sequence.fresh() if job.asked.stream or sequence.done else ""
        # The slot is free before anybody hears of the end.
        if sequence.done:
            self._leave(sequence)
            job.left -= 1
            if not job.left:
                self._end(job)
        if text or sequence.done:
            job.tell(Piece(index, text, count, sequence.done))

    def _leave(self, sequence: Sequence):
        job, _, _ = self._seats.pop(sequence)
        job.writing.discard(sequence)
        self.engine.remove(sequence)

    def _end(self, job: Job, refused: Refused | None = None):
        """Frees what a job has, and tells why it did not end by itself."""
        for sequence in list(job.writing):
            self._leave(sequence)
        if job in self._waiting:
            self._waiting.remove(job)
        job.reading = None
        if refused is not None:
            job.tell(refused)
        elif not job.gone:
            self.metrics.requests.add(time.monotonic() - job.begun)
