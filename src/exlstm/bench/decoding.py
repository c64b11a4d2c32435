"""Greedy decoding with the stack in the README of xlstm: a token in, a token out, the state carried along."""

import torch
from torch import nn

from exlstm.bench import peers, timing
from exlstm.bench.config import DecodingConfig

VOCABULARY = 256


def run(config: DecodingConfig) -> list[dict]:
    """Measures, prints and writes; returns the rows of the table."""
    rows = []
    with timing.cores(config), torch.inference_mode():
        torch.manual_seed(0)
        ours, theirs = peers.Readme(config.device).eval(), peers.their_stack(config.tokens, config.device)
        embed = nn.Embedding(VOCABULARY, peers.WIDTH, device=config.device)
        head = nn.Linear(peers.WIDTH, VOCABULARY, bias=False, device=config.device)
        steps = {"ours": lambda x, state: ours(x, state)}
        if theirs is not None:
            theirs.eval()
            steps["peer"] = lambda x, state: theirs.step(x, state=state)
        x = torch.randn(2, config.tokens, peers.WIDTH, device=config.device)
        whole = {"ours": lambda: ours(x)[0], "peer": lambda: theirs(x)}
        gaps = {f"{side}: step − forward": f"{_gap(step, x, whole[side]()):.0e}" for side, step in steps.items()}
        for batch in config.batches:
            first = torch.randint(VOCABULARY, (batch, 1), device=config.device)
            calls = [
                lambda step=step, first=first: _decode(step, embed, head, first, config.tokens)
                for step in steps.values()
            ]
            times = timing.paired(*calls, rounds=config.rounds, device=config.device, warmup=1)
            times = times._replace(
                ours=times.ours / config.tokens, peer=None if times.peer is None else times.peer / config.tokens
            )
            rows.append(timing.row(f"decoding, B {batch}", "ms/token", times, "xlstm's step", 0.5, **gaps))
    timing.report("decoding", rows, config, timing.machine(config, "xlstm"), timing.bars(rows, "ms/token"))
    return rows


def _decode(step, embed, head, token, n: int):
    """The n tokens after `token` (B, 1), each the likeliest."""
    state, tokens = None, []
    for _ in range(n):
        y, state = step(embed(token), state)
        token = head(y).argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, 1)


def _gap(step, x, whole) -> float:
    """The greatest difference between token by token and all at once."""
    state, ys = None, []
    for t in range(x.shape[1]):
        y, state = step(x[:, t : t + 1], state)
        ys.append(y)
    return (torch.cat(ys, 1) - whole).abs().max().item()
