"""A label for every character: does it stand inside quotes that are closed again? Both directions have to be read.

    python examples/sequence_labelling.py

Rows are padded on the right; `lengths` says how far each goes.
"""

import torch
from torch import nn

import exlstm

QUOTE, CHARACTERS = 0, 8


def batch_of(rows: int, longest: int, draw: torch.Generator):
    """Characters (B, T), lengths (B,) and labels (B, T), -100 at padding."""
    x = torch.randint(1, CHARACTERS, (rows, longest), generator=draw)
    x = x.masked_fill(torch.rand(rows, longest, generator=draw) < 0.15, QUOTE)
    lengths = torch.randint(longest // 2, longest + 1, (rows,), generator=draw)
    valid = torch.arange(longest) < lengths[:, None]
    quotes = (x == QUOTE) & valid
    opened, total = quotes.cumsum(1), quotes.sum(1, keepdim=True)
    inside = (opened % 2 == 1) & (opened < total) & ~quotes
    return x, lengths, inside.long().masked_fill(~valid, -100)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, 32)
        self.rnn = exlstm.xLSTM(32, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 2)

    def forward(self, x, lengths):
        y, _ = self.rnn(self.embedding(x), lengths=lengths)
        return self.head(y)  # (B, T, 2)


def main(steps: int = 120, seed: int = 0) -> float:
    """Trains, and returns the accuracy a character on new rows, twice as long as those of the training."""
    torch.manual_seed(seed)
    draw, model = torch.Generator().manual_seed(seed), Tagger()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        x, lengths, labels = batch_of(32, 20, draw)
        loss = nn.functional.cross_entropy(model(x, lengths).flatten(0, 1), labels.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 20 == 0:
            print(f"step {step:4}   loss {loss.item():.3f}")
    x, lengths, labels = batch_of(200, 40, draw)
    with torch.no_grad():
        right = (model.eval()(x, lengths).argmax(-1) == labels)[labels >= 0]
    print(f"accuracy on {len(right):,} new characters {right.float().mean():.3f}")
    return right.float().mean().item()


if __name__ == "__main__":
    main()
