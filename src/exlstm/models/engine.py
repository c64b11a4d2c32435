"""Engine: a fixed number of slots in which sequences are written side by side; they come, fork and go one by one.

A slot is a row of every buffer: the state of the stack, the logits of the next token, rules, random numbers. A step chooses a
token in every row and reads it; on a GPU choosing and reading are a CUDA graph each, and the host looks at tokens that are some
steps old, so that nobody waits. One graph reads at all lengths, but where attention remembers the whole text: there the places
of all rows double when the longest row has filled its own, and the graph is recorded anew. What a row writes depends on its
request alone.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from os import PathLike

import torch

from exlstm.layers.token import hooked
from exlstm.models import checkpoint
from exlstm.models.chooser import Chooser
from exlstm.models.reading import GenerationState, evaluating, mapped, read, released
from exlstm.models.sampling import is_token
from exlstm.models.sequence import Request, Sequence
from exlstm.models.step import LEAST, Step
from exlstm.ops import backend as backends

# Steps that a GPU is ahead of what the host has looked at.
AHEAD = 2
# Prompts are read together where the shortest has at least this share of the longest's tokens.
ALIKE = 0.5
# Attention's rooms of up to so many bytes stay when the long sequences have left, and their graph with them.
IDLE_BYTES = 64 << 20


class Engine:
    """`slots` sequences of one model at a time; one that is done keeps its slot, for `fork` and `save`, until `remove`.

    Weights may change in place between steps; after moving or replacing them, build a new engine. An engine is for one thread
    at a time, with its sequences: whoever serves many clients hands their requests to the thread that steps.

    >>> from exlstm import LanguageConfig, LanguageModel
    >>> engine = Engine(LanguageModel(LanguageConfig(d_model=64, n_layers=1)), slots=4)
    >>> a, b = engine.admit(Request([1, 2, 3], 5, seed=0), Request([7], 9, temperature=0))
    >>> for sequences in engine.run():
    ...     pass
    >>> len(a.tokens), len(b.tokens)
    (5, 9)
    """

    def __init__(self, model, slots: int = 8):
        if not is_token(slots) or slots < 1:
            raise ValueError(f"slots is {slots!r}, wanted a whole number of at least 1")
        if not hasattr(model, "generate"):
            raise TypeError(f"model is {type(model).__name__}, wanted a LanguageModel")
        self.model, self.slots = model, int(slots)
        self.sequences: list[Sequence | None] = [None] * self.slots
        self._reader = evaluating(model)
        with torch.inference_mode():
            self._step = Step(self._reader, self.slots)
            self._chooser = Chooser(self.slots, model.config.vocab_size, self._step.x.device)
        self._graphs, self._pool = {}, None
        self._ahead: deque = deque()
        self._came: list[Sequence] = []
        self.captures = capturable(model) and self._step.fixed

    @property
    def free(self) -> int:
        """How many slots hold no sequence."""
        return self.sequences.count(None)

    # Coming and going

    def admit(self, *requests: Request) -> list[Sequence]:
        """Reads the prompts, those of like length together, and seats a sequence each; none is seated where one is wrong."""
        for request in requests:
            if not isinstance(request, Request):
                raise TypeError(f"the request is {type(request).__name__}, wanted a Request")
        return self.enter([Sequence(self.model, request) for request in requests])

    def enter(self, sequences: list[Sequence]) -> list[Sequence]:
        """`admit` for sequences that are built already, each once."""
        self._check_room(len(sequences))
        if any(sequence.entered for sequence in sequences) or len({*map(id, sequences)}) < len(sequences):
            raise ValueError("a sequence came twice; build another one of its request, or fork it")
        with torch.inference_mode():
            states = self._read(sequences)
            for state in states:
                check_finite(state)
                self._step.check(state.layers)
            try:
                for sequence, state in zip(sequences, states, strict=True):
                    self.seat([sequence], state)
            except BaseException:
                for sequence in sequences:
                    self.remove(sequence)
                    sequence.entered = False
                raise
        return sequences

    def remove(self, sequence: Sequence):
        """Frees the slot; what the sequence has written stays with it."""
        if not isinstance(sequence, Sequence):
            raise TypeError(f"sequence is {type(sequence).__name__}, wanted a Sequence of admit")
        if sequence.slot is None:
            return
        slot, sequence.slot = self._own(sequence), None
        self.sequences[slot] = None
        with torch.inference_mode():
            self._step.alive[slot] = False
            self._chooser.leave(slot)
            self._fit()

    def fork(self, sequence: Sequence, **changes) -> Sequence:
        """A second sequence that goes on where this one is: to the same end, or with other settings of Request.

        Its tokens, text and stops are of what it writes itself.
        """
        self._check_room(1)
        left = sequence.request.max_tokens - len(sequence.tokens)
        state = self.state(sequence)
        request = replace(
            sequence.request, **{"max_tokens": left, "seed": sequence.seed, **changes}, prompt=[], state=state
        )
        fork = Sequence(self.model, request, stream=sequence.stream)
        fork.decode_as(sequence)
        return self.enter([fork])[0]

    def state(self, sequence: Sequence) -> GenerationState:
        """The state after prompt and result, as `generate` returns it: a value, of one row."""
        slot = self._own(sequence)
        self.settle()
        kept = sequence.tokens
        with torch.inference_mode():
            if len(kept) == sequence.consumed:
                row, step, chooser = slice(slot, slot + 1), self._step, self._chooser
                state = GenerationState(step.row(slot), step.logits[row], chooser.seen[row], chooser.drawn[row])
            else:
                # It ended where only the host could see it, and the row has read on: the result is read again.
                before = sequence.request.state
                # Or a step failed under it, and nobody knows what the row holds.
                state = read(self._reader, [sequence.prompt + kept], before)
                drawn = before.drawn if isinstance(before, GenerationState) else torch.zeros_like(state.drawn)
                state = state._replace(drawn=drawn + len(kept))
        return released(state)

    def save(self, sequence: Sequence, path: str | PathLike):
        """Writes the state of a sequence to one safetensors file."""
        checkpoint.save_state(self.model, self.state(sequence), path)

    def load(self, path: str | PathLike, prompt=(), **settings) -> Sequence:
        """A sequence that goes on from a file of `save`, behind a prompt or none; settings as in Request."""
        state = checkpoint.load_state(self.model, path)
        (sequence,) = self.admit(Request(prompt, state=state, **settings))
        return sequence

    # Writing

    def step(self) -> list[Sequence]:
        """One more token in every slot that writes; the sequences whose tokens have come, on a GPU those of some steps ago.

        Where a step fails or is interrupted, the sequences that were writing end with "error"; the engine goes on with others.
        """
        device = self._step.x.device
        with torch.inference_mode(), backends.on(device):
            writing = [s for s in self.sequences if s and not s.done and s.launched < s.request.max_tokens]
            if writing:
                try:
                    self._launch(writing)
                except BaseException:
                    self._give_up(writing)
                    raise
            most = AHEAD if device.type == "cuda" and writing else 0
            while len(self._ahead) > most or (self._ahead and self._ahead[0][1].query()):
                self._collect()
        came, self._came = self._came, []
        return came

    def run(self) -> Iterator[list[Sequence]]:
        """Steps until every sequence is done; yields what `step` returns."""
        while any(s and not s.done for s in self.sequences):
            yield self.step()

    def settle(self):
        """Looks at every token that was chosen."""
        while self._ahead:
            self._collect()

    def _give_up(self, sequences):
        """Ends sequences whose rows may have read half a token."""
        for sequence in sequences:
            sequence.done, sequence.consumed = "error", -1
        # A device that is lost has to say so itself.
        with suppress(RuntimeError):
            self._step.alive.zero_()

    def _fit(self, coming=()):
        """Rooms with a free place in every row: doubled up to there, and smaller where a quarter is enough."""
        step, rows = self._step, [s for s in (*self.sequences, *coming) if s is not None]
        if not step.size:
            return
        # What was launched may have ended before, which only the device knows.
        longest = max((s.held + s.launched for s in rows), default=0)
        size = max(LEAST, 1 << longest.bit_length())
        if step.size < size or (step.size >= 4 * size and step.size * step.place_bytes > IDLE_BYTES):
            # A graph reads where the rooms were.
            self._graphs.pop("read", None)
            step.resize(size)
        if step.tokens.device.type == "cpu":
            # No graph wants one shape.
            step.reach = longest + 1

    def _launch(self, writing):
        self._fit()
        step, chooser = self._step, self._chooser
        for sequence in writing:
            if not sequence.rules.greedy:
                chooser.fill(sequence.slot, sequence.seed, sequence.stream, sequence.drawn + sequence.launched)
            sequence.launched += 1
        needs = chooser.needs()
        self._run(needs, lambda: chooser(step.logits, step.alive, step.tokens, needs))
        tokens, event = chooser.out, None
        if tokens.is_cuda:
            tokens = torch.empty(tokens.shape, dtype=tokens.dtype, device="cpu", pin_memory=True)
            tokens.copy_(chooser.out, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            tokens = tokens.clone()
        self._ahead.append((tokens, event, writing))
        self._run("read", step)

    def _collect(self):
        """Feeds the oldest tokens to their sequences."""
        tokens, event, sequences = self._ahead.popleft()
        if event is not None:
            event.synchronize()
        tokens = tokens.tolist()
        for sequence in sequences:
            if sequence.slot is None or sequence.done:
                continue
            token, row = tokens[sequence.slot], sequence.row
            row.feed(token)
            # An end that the device saw is not read; any other end was.
            seen = token in sorted(row.ends.eos)[: self._chooser.eos.shape[1]]
            sequence.consumed += not seen
            if row.done:
                sequence.done = "stop"
                with torch.inference_mode():
                    self._step.alive[sequence.slot] = False
            elif len(row.tokens) >= sequence.request.max_tokens:
                sequence.done = "length"
            self._came.append(sequence)

    def _run(self, name, call):
        """`call`, out of a graph where there can be one."""
        if not self.captures:
            call()
            return
        if name not in self._graphs:
            self._graphs[name] = self._capture(call)
        self._graphs[name].replay()

    def _capture(self, call):
        # With nobody alive the calls that warm up change nothing that anybody reads.
        alive = self._step.alive.clone()
        kept = [x.clone() for x in (self._step.tokens, self._chooser.out)]
        self._step.alive.zero_()
        side, here = torch.cuda.Stream(alive.device), torch.cuda.current_stream(alive.device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        here.wait_stream(side)
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        # Nothing that a collection sets free may call the driver while the graph is recorded.
        gc.collect()
        gc.disable()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                call()
        finally:
            if collects:
                gc.enable()
        self._pool = self._pool or graph.pool()
        self._step.alive.copy_(alive)
        for x, before in zip((self._step.tokens, self._chooser.out), kept, strict=True):
            x.copy_(before)
        return graph

    # Seats

    def _own(self, sequence) -> int:
        if sequence.slot is None or self.sequences[sequence.slot] is not sequence:
            raise ValueError("the sequence has no slot in this engine: it was removed, or is another engine's")
        return sequence.slot

    def _read(self, sequences) -> list[GenerationState]:
        """The state of every sequence after its prompt."""
        states: list = [None] * len(sequences)
        fresh = sorted(
            (i for i, s in enumerate(sequences) if s.request.state is None), key=lambda i: -len(sequences[i].prompt)
        )
        while fresh:
            longest = len(sequences[fresh[0]].prompt)
            alike = [i for i in fresh if len(sequences[i].prompt) >= ALIKE * longest]
            fresh = fresh[len(alike) :]
            read_state = read(self._reader, [sequences[i].prompt for i in alike], None)
            for at, i in enumerate(alike):
                states[i] = mapped(lambda x, at=at: x[at : at + 1], read_state)
        for i, sequence in enumerate(sequences):
            if states[i] is None:
                states[i] = read(self._reader, [sequence.prompt], sequence.request.state)
        return states

    def seat(self, sequences: list[Sequence], state: GenerationState):
        """Puts sequences whose prompts were read, with their state, a row each, into free slots."""
        self._check_room(len(sequences))
        self._step.check(state.layers)
        slots = [i for i, s in enumerate(self.sequences) if s is None][: len(sequences)]
        index = torch.tensor(slots, device=state.logits.device)
        with torch.inference_mode():
            for sequence, held in zip(sequences, self._step.held(state.layers)):
                sequence.held = held
            self._fit(sequences)
            self._step.seat(index, state.layers, state.logits)
            self._chooser.seen[index], self._chooser.drawn[index] = state.seen, state.drawn
            for sequence, slot, drawn in zip(sequences, slots, state.drawn.tolist(), strict=True):
                most = sequence.request.max_tokens
                self._chooser.seat(slot, sequence.rules, sequence.row.ends, most, sequence.limit)
                sequence.slot, sequence.drawn, self.sequences[slot] = slot, drawn, sequence
                sequence.entered = True
                self._step.alive[slot] = not sequence.done

    def _check_room(self, count: int):
        if count > self.free:
            slots = "the engine's free slots; a sequence that is done has its own until remove"
            raise ValueError(f"{count} sequences came, wanted at most {self.free}, {slots}")


def check_finite(state: GenerationState):
    """ValueError where a state cannot go on."""
    if not state.logits.isfinite().all():
        raise ValueError("the logits after the prompt are not finite: weights or state hold NaN or infinities")


def capturable(model) -> bool:
    """Whether a CUDA graph may hold the model's step: on a GPU, without autocast, and nobody looks at its modules' calls."""
    device = model.embedding.weight.device.type
    # The model itself is not called while it writes: a compiled forward of its own is no reason.
    parts = (part for part in model.modules() if part is not model)
    return device == "cuda" and not torch.is_autocast_enabled(device) and not any(map(hooked, parts))


class Held:
    """The engine that a model keeps between calls of generate: with its graphs, and neither copied nor saved with the model."""

    def __init__(self):
        self._kept, self._refused = [], None

    def __reduce__(self):
        return Held, ()

    def take(self, model, rows: int) -> tuple | None:
        """An engine of so many slots that nobody else uses, and what it was built for; None where no graph holds the step."""
        if not capturable(model):
            return None
        key = _fingerprint(model, rows)
        if key == self._refused:
            return None
        # Whoever pops it has it alone, whatever other threads do.
        kept = None
        with suppress(IndexError):
            kept = self._kept.pop()
        if kept is None or kept[1] != key:
            # The old buffers go before the new ones come.
            kept = None
            kept = Engine(model, rows), key
        if kept[0].captures:
            return kept
        self._refused = key
        return None

    def give(self, kept: tuple):
        """Hands it back, empty."""
        engine, _ = kept
        engine.settle()
        for sequence in engine.sequences:
            if sequence is not None:
                engine.remove(sequence)
        self._kept[:] = [kept]


def _fingerprint(model, rows: int):
    """What a captured step depends on: where every weight lies, how many rows, and whose kernels run."""
    places = tuple((id(p), p.data_ptr(), p.dtype) for p in (*model.parameters(), *model.buffers()))
    return rows, backends.chosen(None), places
