"""What members are judged by: few spans of validation, and those before them."""

import numpy as np
import pandas as pd
import pytest
import torch

from exlstm import Forecaster
from exlstm.forecast import combine, engine
from exlstm.forecast.config import FitConfig

LEVELS = torch.tensor(engine.LEVELS)
MEMBERS = ("naive", "theta", "linear")


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_quantiles_by_weight_are_those_of_as_many_numbers(n):
    x, levels = torch.randn(n, generator=torch.Generator().manual_seed(n)), [0.0, 0.1, 0.5, 0.9, 1.0]
    plain = combine.quantiles_of(x, torch.ones(n), levels)
    assert torch.allclose(plain, torch.quantile(x, torch.tensor(levels)), atol=1e-6)
    assert torch.allclose(combine.quantiles_of(x, torch.full((n,), 0.3), levels), plain, atol=1e-6)
    # With either sign one side is the other's mirror.
    even = combine.quantiles_of(x, torch.ones(n), levels, 1.0)
    assert torch.allclose(even, -even.flip(0), atol=1e-6)


def test_numbers_of_weight_three_count_as_three():
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    weight = torch.where(torch.arange(3000) < 1000, 3.0, 1.0)
    found = combine.quantiles_of(x + 2 * (weight > 1), weight, [0.1, 0.5, 0.9])
    repeated = (x + 2 * (weight > 1)).repeat_interleave(weight.long())
    assert torch.allclose(found, torch.quantile(repeated, torch.tensor([0.1, 0.5, 0.9])), atol=0.01)


@pytest.mark.parametrize("spans, share", [(0.5, 0.998), (1, 0.985), (4, 0.5), (16, 0.0154), (64, 0.0002)])
def test_to_which_side_few_spans_went_says_little(spans, share):
    assert combine.evenness(spans) == pytest.approx(share, abs=1e-3)
    # A series that rose in the only span: without that the interval would have no lower side.
    gone = 1 + 0.2 * torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
    spread = combine.residual_spread(gone, LEVELS, even=combine.evenness(spans))
    assert bool((spread[:, 0].abs() < 1e-6).all()) == (spans >= 16)
    factors = combine.stretch(spread.expand(40, -1, -1), gone, LEVELS, even=combine.evenness(spans))
    low, high = (spread * factors)[:, [0, -1]].abs().mean(0)
    assert (low > 0.9 * high) == (spans <= 4) and (low < 0.1 * high) == (spans >= 16)


@pytest.mark.parametrize("metric", ["mae", "mse"])
def test_what_one_span_of_validation_prefers_is_not_preferred_against_all_before(metric):
    """The linear path has half the error in the last span and twice as much in the seven before."""
    worth = torch.tensor([1.0] + [0.5] * 7).repeat_interleave(4)
    naive, linear = torch.ones(32), torch.tensor([0.5] + [2.0] * 7).repeat_interleave(4)
    q = torch.stack([naive, linear])[..., None, None].expand(-1, -1, 3, len(LEVELS))
    group = torch.tensor([0, -1, -2, -3, -4, -5, -6, -7]).repeat_interleave(4)
    given = torch.zeros(32, 3), torch.ones(32, 1), LEVELS, metric
    last = q[:, :4], (*(x[:4] for x in given[:2]), *given[2:]), group[:4]
    assert combine.blend(*last, ["naive", "linear"]) == [0, 1]
    assert combine.blend(q, given, group, ["naive", "linear"], worth)[0] > 0.9
    # By the same rule it is preferred where the spans before agree.
    agreed = torch.stack([naive, 0.5 * naive])[..., None, None].expand(-1, -1, 3, len(LEVELS))
    assert combine.blend(agreed, given, group, ["naive", "linear"], worth) == [0, 1]


def test_long_walks_are_left_near_their_last_value():
    """Eight walks, one span of validation, six before it: by validation alone the linear paths have all of the weight, a squared
    error 1.24 times that of the last value, and intervals of 80 % that hold 72."""
    found = []
    for seed in range(5):
        y = np.random.default_rng(seed).standard_normal((1300, 8)).cumsum(0)
        frame = pd.DataFrame(y, index=pd.date_range("2018-01-01", periods=1300), columns=[f"s{k}" for k in range(8)])
        config = FitConfig(members=MEMBERS, metric="mse", val_size=160, refit=False)
        told = Forecaster(150, config=config).fit(frame[:-150]).predict().sort_values(["unique_id", "ds"])
        true, last = y[-150:].T.ravel(), np.repeat(y[-151], 150)
        inside = (true >= told["xLSTM-lo-80"]) & (true <= told["xLSTM-hi-80"])
        ratio = np.square(told["xLSTM"] - true).mean() / np.square(last - true).mean()
        found.append([np.log(ratio), inside.mean()])
    ratio, inside = np.mean(found, 0)
    assert np.exp(ratio) < 1.15 and abs(inside - 0.8) < 0.05


@pytest.mark.parametrize("gain, share", [(0.005, 0.0), (0.0199, 0.0), (0.04, 0.5), (0.2, 0.9)])
def test_of_a_step_what_is_over_two_per_cent_is_believed(gain, share):
    """Two members of like size whose mean is better by `gain`, in 200 windows of as many spans."""
    target, worth = torch.zeros(200, 2), torch.ones(200)
    # Errors a and b of one size with (a + b) / 2 of the size (1 - gain) ** .5, and the first a shade less.
    angle = np.arccos((1 - gain) ** 0.5)
    one = torch.tensor([1.0, 0.0]).expand(200, 2) * 0.9999
    other = torch.tensor([np.cos(2 * angle), np.sin(2 * angle)]).float().expand(200, 2)
    q = torch.stack([one, other])[..., None].expand(-1, -1, -1, len(LEVELS))
    given = target, torch.ones(200, 1), LEVELS, "mse"
    found = combine.blend(q, given, torch.arange(200), ["naive", "linear"], worth)
    assert found == pytest.approx([1 - share / 2, share / 2], abs=0.03)
