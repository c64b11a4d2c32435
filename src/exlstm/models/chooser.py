"""The next token of every row at once, each by rules of its own: `Sampling.choose` with its settings in tensors, without a wait.

A row also ends here: after its last token, or with one of its `eos`; then it is no longer alive, and its tokens are -1.
"""

import torch
from torch import Tensor

from exlstm.models.sampling import BLOCK, LARGEST, Sampling, numbers_of

# Single tokens that end a row and are looked for on the device; of more, the rest waits for the host to see it.
ENDS = 8

# What the count of a row can hold; more means the same.
LONGEST = torch.iinfo(torch.int64).max


class Chooser:
    """Rules, random numbers and what was seen of `rows` rows over a vocabulary; `out` (B,) are the last tokens, -1 for none."""

    def __init__(self, rows: int, vocabulary: int, device):
        def filled(value, *shape, dtype=torch.float32):
            return torch.full((rows, *shape), value, dtype=dtype, device=device)

        self.rules: list[Sampling | None] = [None] * rows
        self.limits, self.vocabulary = [vocabulary] * rows, vocabulary
        self.temperature, self.top_p, self.min_p, self.penalty = filled(1), filled(1), filled(0), filled(1)
        self.top_k, self.limit = filled(0, dtype=torch.int64), filled(vocabulary, dtype=torch.int64)
        self.eos, self.left = filled(-1, ENDS, dtype=torch.int64), filled(0, dtype=torch.int64)
        self.seen, self.drawn = filled(False, vocabulary, dtype=torch.bool), filled(0, dtype=torch.int64)
        self.uniform, self.out = filled(0, BLOCK), filled(-1, dtype=torch.int64)
        self._random, self._generator = [None] * rows, torch.Generator("cpu")

    def seat(self, row: int, rules: Sampling, ends, left: int, limit: int):
        """Rules of a row that writes `left` tokens below `limit`; its `seen` and `drawn` are the caller's to fill."""
        greedy = rules.greedy
        self.rules[row], self.limits[row], self._random[row] = rules, limit, None
        settings = {
            # A greedy row takes the likeliest token whatever else is asked of it.
            "temperature": 0.0 if greedy else min(max(rules.temperature, 1e-30), LARGEST),
            "top_k": 0 if greedy or rules.top_k >= limit else rules.top_k,
            "top_p": 1.0 if greedy else rules.top_p,
            "min_p": 0.0 if greedy else rules.min_p,
            "penalty": min(rules.repetition_penalty, LARGEST),
            "limit": limit,
            "left": min(left, LONGEST),
        }
        for name, value in settings.items():
            getattr(self, name)[row] = value
        single = sorted(ends.eos)[:ENDS]
        self.eos[row] = torch.tensor(single + [-1] * (ENDS - len(single)), device=self.eos.device)

    def leave(self, row: int):
        """The row has no rules any more."""
        self.rules[row], self.limits[row], self._random[row] = None, self.vocabulary, None

    def needs(self) -> tuple[bool, ...]:
        """Which parts of the choice are wanted by some row: limit, penalty, drawing, and drawing from sorted tokens."""
        rules = [r for r in self.rules if r is not None]
        drawn = [r for r in rules if not r.greedy]
        sorts = any(r.top_p < 1 or 0 < r.top_k < self.vocabulary for r in drawn)
        return (
            any(limit < self.vocabulary for limit in self.limits),
            any(r.repetition_penalty != 1 for r in rules),
            bool(drawn),
            sorts,
        )

    def fill(self, row: int, seed: int, stream: int, place: int):
        """Has the random numbers at hand of a row that chooses its token number `place`."""
        block = place // BLOCK
        if self._random[row] != block:
            numbers = numbers_of(seed, stream, block, self._generator)
            if self.uniform.is_cuda:
                # Pinned, so that nothing waits; its memory is not used again before the copy is done.
                numbers = numbers.pin_memory()
            self.uniform[row].copy_(numbers, non_blocking=True)
            self._random[row] = block

    def __call__(self, logits: Tensor, alive: Tensor, tokens: Tensor, needs: tuple[bool, ...]):
        """Puts the next token of every living row into `tokens` and `out`, and ends rows: all tensors stay where they are."""
        alive &= self.left > 0
        chosen = torch.where(alive, self._choose(logits, *needs), 0)
        tokens.copy_(chosen)
        self.out.copy_(torch.where(alive, chosen, -1))
        alive &= ~(chosen[:, None] == self.eos).any(1)
        self.left -= alive.long()
        self.drawn += alive.long()
        index = chosen[:, None]
        self.seen.scatter_(1, index, self.seen.gather(1, index) | alive[:, None])

    def _choose(self, logits, limits: bool, penalties: bool, draws: bool, sorts: bool) -> Tensor:
        if penalties:
            penalty = self.penalty[:, None]
            changed = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self.seen & (penalty != 1), changed, logits)
        if limits:
            places = torch.arange(self.vocabulary, device=logits.device)
            logits = logits.masked_fill(places >= self.limit[:, None], float("-inf"))
        likeliest = logits.argmax(-1)
        if not draws:
            return likeliest
        greedy = self.temperature == 0
        logits = (logits - logits.amax(-1, keepdim=True)) / torch.where(greedy, 1, self.temperature)[:, None]
        drawn = self._draw(logits, sorts)
        return torch.where(greedy, likeliest, drawn)

    def _draw(self, logits, sorts: bool) -> Tensor:
        places, top_p = torch.arange(self.vocabulary, device=logits.device), self.top_p[:, None]
        if sorts:
            # A row that needs no order keeps its own, so that it draws what it draws alone.
            ordered, order = logits.sort(descending=True, stable=True)
            sorted_rows = ((self.top_k > 0) | (self.top_p < 1))[:, None]
            top_k = self.top_k[:, None]
            ordered = ordered.masked_fill((places >= top_k) & (top_k > 0), float("-inf"))
            logits, order = torch.where(sorted_rows, ordered, logits), torch.where(sorted_rows, order, places)
        p = logits.softmax(-1)
        if sorts:
            p = p.masked_fill((p.cumsum(-1) - p >= top_p) & (top_p < 1), 0)
        p = p.masked_fill(p < self.min_p[:, None] * p.amax(-1, keepdim=True), 0)
        below = p.cumsum(-1)  # (B, V)
        total = below[:, -1:].contiguous()
        uniform = self.uniform.gather(1, (self.drawn % BLOCK)[:, None])
        index = torch.searchsorted(below, uniform * total, right=True)
        index = torch.minimum(index, torch.searchsorted(below, total)).clamp(max=self.vocabulary - 1)
        return (order.gather(-1, index) if sorts else index).squeeze(-1)
