"""Is a sentence friendly? Sentences of any length in packed batches, read from both sides.

    python examples/sentence_classifier.py

The sentences are made on the spot: friendly and unfriendly words between others, "not" turns the next one round, and the
majority decides.
"""

import random

import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import exlstm

WORDS = [
    "good",
    "fine",
    "kind",
    "warm",
    "bad",
    "cold",
    "rude",
    "dull",
    "not",
    "the",
    "a",
    "host",
    "room",
    "was",
    "very",
]


def sentence(draw: random.Random) -> tuple[list[int], int]:
    """Word numbers, and 1 where the friendly words win."""
    while True:
        words, score, sign = [], 0, 1
        for _ in range(draw.randint(3, 25)):
            word = draw.randrange(len(WORDS))
            words.append(word)
            if word < 8:
                score, sign = score + sign * (1 if word < 4 else -1), 1
            elif WORDS[word] == "not":
                sign = -sign
        if score:
            return words, int(score > 0)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), 32)
        self.rnn = exlstm.xLSTM(32, 32, bidirectional=True)
        self.head = nn.Linear(64, 2)

    def forward(self, sentences: list[torch.Tensor]) -> torch.Tensor:
        packed = pack_sequence([self.embedding(s) for s in sentences], enforce_sorted=False)
        _, (h, _) = self.rnn(packed)
        return self.head(torch.cat([h[0], h[1]], -1))


def main(steps: int = 150, batch: int = 32, seed: int = 0) -> float:
    """Trains, and returns the accuracy on sentences that were not seen."""
    torch.manual_seed(seed)
    draw, model = random.Random(seed), Classifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        sentences, labels = zip(*(sentence(draw) for _ in range(batch)), strict=True)
        loss = nn.functional.cross_entropy(model([torch.tensor(s) for s in sentences]), torch.tensor(labels))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 25 == 0:
            print(f"step {step:4}   loss {loss.item():.3f}")
    sentences, labels = zip(*(sentence(draw) for _ in range(500)), strict=True)
    with torch.no_grad():
        right = model.eval()([torch.tensor(s) for s in sentences]).argmax(-1) == torch.tensor(labels)
    print(f"accuracy on 500 new sentences {right.float().mean():.3f}")
    return right.float().mean().item()


if __name__ == "__main__":
    main()
