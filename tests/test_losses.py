"""Losses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrobirds import losses


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 5), st.integers(0, 2**31))
def test_mse_is_the_mean_over_the_observed_entries_of_the_event(event: list[int], batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(batch, *event, generator=generator, dtype=torch.float64) for _ in range(2))
    y[torch.rand(y.shape, generator=generator) < 0.3] = torch.nan
    got = losses.mse(x, y)
    for b in range(batch):
        seen = ~y[b].isnan()
        expected = ((x[b] - y[b])[seen] ** 2).sum() / max(1, int(seen.sum()))
        assert got[b] == pytest.approx(float(expected))


def test_mse_gradient_is_finite_where_data_are_missing() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    y = torch.tensor([[1.0, torch.nan, 1.0], [torch.nan] * 3])
    loss = losses.mse(x, y)
    assert loss.tolist() == [1.0, 0.0]
    assert torch.autograd.grad(loss.sum(), x)[0].tolist() == [[-1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]


def test_mse_takes_counts_as_data() -> None:
    assert losses.mse(torch.zeros(1, 2), torch.tensor([[1, 3]])).tolist() == [5.0]
