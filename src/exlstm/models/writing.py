"""Writing on from a prompt: it is read once, then a batch gets one token a row at a time, whole or as a stream."""

import torch
from torch import Tensor

from exlstm.models.engine import check_finite
from exlstm.models.reading import GenerationState, evaluating, joined, mapped, mark, read, read_prompt, released
from exlstm.models.sampling import Ends, Row, Sampling, Uniform, check_range, check_whole, is_token
from exlstm.models.sequence import Request, Sequence

# Fills rows of a tensor result that ended early; the loss takes it for "not predicted".
FILL = -100


class Writing:
    """One call of generate: everything is checked and the prompt is read when it is built."""

    def __init__(self, model, prompt, max_tokens, rules: Sampling, ends: Ends, seed, state):
        check_whole("max_tokens", max_tokens)
        if seed is not None and not is_token(seed):
            raise ValueError(f"seed is {seed!r}, wanted a whole number or None")
        self.model, self.rules, self.ends = evaluating(model), rules, ends
        self.max_tokens = int(max_tokens)
        if seed is None and not rules.greedy:
            # Without a seed the draws still follow torch.manual_seed.
            seed = torch.randint(2**62, (), device="cpu").item()
        self.seed = seed
        self.prompt = prompt
        self.is_text, self.is_one, rows = read_prompt(model, prompt)
        for i, row in enumerate(rows):
            where = "prompt" if self.is_one else f"prompt {i}"
            check_range(where, row, model)
            if not row and not isinstance(state, GenerationState):
                raise ValueError(f"{where} is empty, wanted at least one token, or a state of generate to go on from")
        self.limit = model.tokenizer.vocab_size if self.is_text else model.config.vocab_size
        self.rows = [Row(ends, None) for _ in rows]
        with torch.inference_mode():
            self.start = read(self.model, rows, state)
        check_finite(self.start)
        self.after = None

    def finish(self, return_state: bool):
        """The whole result, shaped like the prompt; with `return_state` and the state."""
        if self.ends.strings:
            self._decode_along()
        with torch.inference_mode():
            for _ in self._steps(bool(self.ends), return_state):
                pass
            return (self.result(), self.state()) if return_state else self.result()

    def stream(self, return_state: bool) -> "Stream":
        """The result of a single prompt piece by piece: text, or tokens one by one."""
        if not self.is_one:
            raise ValueError(f"stream=True wants a single prompt, not a batch of {len(self.rows)}")
        if self.is_text or self.ends.strings:
            self._decode_along()
        return Stream(self, return_state)

    def _decode_along(self):
        for row in self.rows:
            row.decoder = self.model.tokenizer.decoder()

    def _steps(self, watch: bool, return_state: bool):
        """Chooses and feeds tokens until all rows are done; yields after each one if somebody watches."""
        held = self.model.held
        kept = held.take(self.model, len(self.rows))
        if kept is None:
            yield from self._eager_steps(watch)
            return
        try:
            yield from self._engine_steps(kept[0], return_state)
        finally:
            held.give(kept)

    def _engine_steps(self, engine, return_state):
        """The same out of the graphs of an engine with a slot for every row."""
        rules, sequences = self.rules, []
        for i, row in enumerate(self.rows):
            state = mapped(lambda x, i=i: x[i : i + 1], self.start)
            request = Request(
                [], self.max_tokens, rules.temperature, rules.top_k, rules.top_p, rules.min_p, rules.repetition_penalty,
                seed=self.seed, state=state,
            )  # fmt: skip
            sequences.append(Sequence(self.model, request, row, stream=i))
            sequences[-1].limit = self.limit
        engine.seat(sequences, self.start)
        while not all(sequence.done for sequence in sequences):
            if engine.step():
                yield
        if return_state:
            states = [engine.state(sequence) for sequence in sequences]
            self.after = joined(states)

    def _eager_steps(self, watch: bool):
        now, rules, chosen = self.start, self.rules, []
        seen = None if rules.repetition_penalty == 1 else now.seen.clone()
        uniform = None if rules.greedy else Uniform(self.seed, now.drawn.tolist())
        layers, logits, tokens, count = now.layers, now.logits, None, 0
        for count in range(self.max_tokens):
            if count:
                x, layers = self.model.hidden(tokens[:, None], layers)
                logits = self.model.logits(x[:, -1])
            said = None if seen is None else seen[:, : self.limit]
            tokens = rules.choose(logits[:, : self.limit], said, uniform)  # (B,)
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            if watch:
                for row, token in zip(self.rows, tokens.tolist(), strict=True):
                    row.feed(token)
                yield
                if all(row.done for row in self.rows):
                    break
            else:
                chosen.append(tokens)
        # Unwatched tokens are fetched once, at the end: an accelerator is never waited for in between.
        if chosen:
            for row, tokens in zip(self.rows, torch.stack(chosen, 1).tolist(), strict=True):
                row.tokens = tokens
        self.last = layers, logits, count

    def _kept(self) -> list[list[int]]:
        decode = None if self.model.tokenizer is None else self.model.tokenizer.decode
        return [row.kept(decode) for row in self.rows]

    def result(self):
        """What was written, shaped like the prompt."""
        if self.is_text:
            texts = [row.written(self.model.tokenizer.decode) for row in self.rows]
            return texts[0] if self.is_one else texts
        rows = self._kept()
        if isinstance(self.prompt, Tensor):
            longest = max(map(len, rows))
            filled = [row + [FILL] * (longest - len(row)) for row in rows]
            result = torch.tensor(filled, dtype=torch.int64, device=self.prompt.device).view(len(rows), longest)
            return result[0] if self.is_one else result
        return rows[0] if self.is_one else rows

    def state(self) -> GenerationState:
        """The state after the result of every row."""
        if self.after is not None:
            return released(self.after)
        kept, start = self._kept(), self.start
        layers, logits, count = self.last
        if all(len(row) >= count for row in kept):
            now = start._replace(layers=layers, logits=logits, seen=mark(start.seen, [row[:count] for row in kept]))
            now = read(self.model, [row[count:] for row in kept], now)
        else:
            # A row ended before the others, or before its stop: the results are read again, from the end of the prompt.
            now = read(self.model, kept, start)
        drawn = start.drawn + torch.tensor([len(row) for row in kept], device=start.drawn.device)
        return released(now._replace(drawn=drawn))


class Stream:
    """Iterator over the pieces of a result; `state` is the state after the last one, when it was asked for."""

    def __init__(self, writing: Writing, return_state: bool):
        self.state = None
        self._pieces = self._run(writing, return_state)

    def __iter__(self):
        return self

    def __next__(self):
        # Around every piece, not around the loop: nothing of it may reach the code that takes the pieces.
        with torch.inference_mode():
            return next(self._pieces)

    def _run(self, writing, return_state):
        row, shown = writing.rows[0], 0
        for _ in writing._steps(True, return_state):
            if row.done:
                continue
            sure = row.sure_characters() if writing.is_text else row.sure_tokens()
            if sure > shown:
                yield from _pieces(row.text if writing.is_text else row.tokens, shown, sure)
                shown = sure
        if return_state:
            self.state = writing.state()
        result = writing.result()
        yield from _pieces(result, shown, len(result))


def _pieces(written: str | list, start: int, end: int):
    """A text goes out whole, tokens one by one."""
    piece = written[start:end]
    return [piece] * bool(piece) if isinstance(written, str) else piece
