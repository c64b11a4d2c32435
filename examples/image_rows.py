"""Digits as sequences: an image is read row by row, and the last output names the digit.

    python examples/image_rows.py

The images are made on the spot: seven segments, moved about, with noise. For MNIST put its 28 rows of 28 in their place.
"""

import torch
from torch import nn

import exlstm

SIZE = 16
# Segments of 0 to 9, as on a pocket calculator: top, upper left, upper right, middle, lower left, lower right, bottom.
SEGMENTS = [
    "1110111",
    "0010010",
    "1011101",
    "1011011",
    "0111010",
    "1101011",
    "1101111",
    "1010010",
    "1111111",
    "1111011",
]
PLACES = [(0, 0, 1, 6), (0, 0, 6, 1), (0, 5, 6, 1), (5, 0, 1, 6), (5, 0, 6, 1), (5, 5, 6, 1), (10, 0, 1, 6)]


def images(count: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 16 rows, 16) and the digits in them."""
    digits = torch.randint(10, (count,), generator=draw)
    x = 0.1 * torch.randn(count, SIZE, SIZE, generator=draw)
    corners = torch.stack([torch.randint(n, (count,), generator=draw) for n in (SIZE - 10, SIZE - 5)], 1).tolist()
    for image, digit, (top, left) in zip(x, digits.tolist(), corners, strict=True):
        for is_lit, (row, column, height, width) in zip(SEGMENTS[digit], PLACES, strict=True):
            if is_lit == "1":
                image[top + row : top + row + height, left + column : left + column + width] += 1
    return x, digits


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = exlstm.xLSTM(SIZE, 64, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        _, (h, _) = self.rnn(x)
        return self.head(h[-1])


def main(steps: int = 160, seed: int = 0) -> float:
    """Trains, and returns the accuracy on images that were not seen."""
    torch.manual_seed(seed)
    draw, model = torch.Generator().manual_seed(seed), Reader()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        x, digits = images(64, draw)
        loss = nn.functional.cross_entropy(model(x), digits)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 25 == 0:
            print(f"step {step:4}   loss {loss.item():.3f}")
    x, digits = images(500, draw)
    with torch.no_grad():
        right = (model.eval()(x).argmax(-1) == digits).float()
    print(f"accuracy on 500 new images {right.mean():.3f}")
    return right.mean().item()


if __name__ == "__main__":
    main()
