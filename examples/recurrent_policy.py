"""A policy with a memory: many games side by side, each of which ends and begins anew at its own time.

    python examples/recurrent_policy.py

The game, a corridor: a sign at its entrance says where to turn at its end, some steps later, and is seen only there. The
policy gradient (REINFORCE with a learnt baseline) runs over pieces of 16 steps; the memory goes on from piece to piece, and
`reset` empties the rows in which a new game begins.
"""

import torch
from torch import nn

import exlstm


class Corridors:
    """`rows` corridors side by side; a step takes an action (B,) of 0 or 1 and gives what is seen next (B, 4), and a reward."""

    def __init__(self, rows: int, draw: torch.Generator):
        self.rows, self.draw = rows, draw
        self.sign, self.left = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
        self.begins = torch.ones(rows, dtype=torch.bool)

    def look(self) -> torch.Tensor:
        """What is seen: the sign (none, 0 or 1 as one of three), and whether this is the end."""
        new = self.begins
        self.sign = torch.where(new, torch.randint(2, (self.rows,), generator=self.draw), self.sign)
        self.left = torch.where(new, torch.randint(3, 9, (self.rows,), generator=self.draw), self.left)
        sign = nn.functional.one_hot(torch.where(new, self.sign + 1, 0), 3)
        return torch.cat([sign, (self.left == 0)[:, None]], 1).float()

    def step(self, action: torch.Tensor) -> torch.Tensor:
        """The reward: at the end 1 for the right turn and -1 for the other, on the way 0."""
        self.begins = self.left == 0
        self.left = self.left - 1
        return torch.where(self.begins, (action == self.sign) * 2.0 - 1, 0.0)


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = exlstm.xLSTM(4, 32)
        self.action, self.value = nn.Linear(32, 2), nn.Linear(32, 1)

    def forward(self, seen, state=None, reset=None):
        """seen (T, B, 4), reset (T, B): True where a new game begins."""
        y, state = self.rnn(seen, state, reset=reset)
        return self.action(y), self.value(y).squeeze(-1), state


def play(policy, games, state, steps: int):
    """Plays on: what was seen, which games began, what was done and gained, and the state behind it."""
    record = []
    for _ in range(steps):
        begins = games.begins
        seen = games.look()
        with torch.no_grad():
            logits, _, state = policy(seen[None], state, begins[None])
        action = torch.multinomial(logits[0].softmax(-1), 1, generator=games.draw).squeeze(1)
        record.append((seen, begins, action, games.step(action)))
    return *(torch.stack(column) for column in zip(*record, strict=True)), state


def returns(reward, begins, value):
    """What is gained from each step to the end of its game (T, B); what lies behind the piece is the baseline's guess."""
    total, gains = value, []
    for t in reversed(range(len(reward))):
        ends = reward[t] != 0
        total = reward[t] + torch.where(ends, 0, total)
        gains.append(total)
    return torch.stack(gains[::-1])


def main(pieces: int = 60, seed: int = 0) -> float:
    """Plays and learns, and returns the share of right turns in the last pieces."""
    torch.manual_seed(seed)
    policy, games = Policy(), Corridors(64, torch.Generator().manual_seed(seed))
    optimiser = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    state, shares = None, []
    for piece in range(pieces):
        before = state
        seen, begins, action, reward, state = play(policy, games, state, 16)
        logits, value, _ = policy(seen, before, begins)
        gain = returns(reward, begins, value[-1].detach())
        chosen = torch.log_softmax(logits, -1).gather(-1, action[..., None]).squeeze(-1)
        loss = -((gain - value.detach()) * chosen).mean() + 0.5 * (gain - value).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
        shares.append(((reward > 0).sum() / (reward != 0).sum()).item())
        if piece % 10 == 0:
            print(f"piece {piece:4}   right turns {shares[-1]:.3f}")
    share = sum(shares[-10:]) / 10
    print(f"right turns in the last 10 pieces {share:.3f}")
    return share


if __name__ == "__main__":
    main()
