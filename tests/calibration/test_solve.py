"""The algebra against numpy: sums of moments, one repair, and the order in which units go."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from vlprune.calibration.moments import Moments
from vlprune.calibration.solve import repair
from vlprune.errors import DataError
from vlprune.methods.obs import DAMPING, removal


def features(tokens: int = 400, width: int = 12, seed: int = 0) -> Tensor:
    """Correlated ReLU features with a mean, float64."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, 5, generator=g) @ torch.randn(5, width, generator=g)
    noise = 0.3 * torch.randn(tokens, width, generator=g)
    return torch.relu(mixed + noise + 0.2).double()


def layer(out: int = 7, width: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(9)
    return torch.randn(out, width, generator=g).double(), torch.randn(out, generator=g).double()


def gathered(x: Tensor, y: Tensor | None = None, weights: Tensor | None = None) -> Moments:
    moments = Moments.empty(x.shape[1], 0 if y is None else y.shape[1])
    moments.add(x, weights, y)
    return moments


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("damping", [1e-3, 1e-1])
def test_a_repair_is_ridge_regression_on_the_raw_activations(
    monkeypatch: pytest.MonkeyPatch, affine: bool, damping: float
) -> None:
    monkeypatch.setattr("vlprune.calibration.solve.DAMPING", (damping,))
    x, (weight, bias) = features(), layer()
    y = x @ weight.T + (bias if affine else 0)
    kept = torch.tensor([0, 2, 3, 7, 8, 11])
    made = repair(gathered(x, y), Moments.empty(12, 7), weight, bias if affine else None, kept)
    # the change of the weights, shrunk towards none: rows of sqrt(ridge) times one, and the
    # column of ones for the bias, which is not shrunk
    small = x[:, kept].numpy()
    centred = small - small.mean(0) if affine else small
    ridge = len(x) * (damping * (centred**2).mean(0).mean() + 1e-12 * (small**2).mean(0).mean())
    ones = np.ones((len(x), 1)) if affine else np.zeros((len(x), 0))
    penalty = np.hstack([np.sqrt(ridge) * np.eye(6), np.zeros((6, ones.shape[1]))])
    left = y.numpy() - small @ weight[:, kept].numpy().T
    system = np.vstack([np.hstack([small, ones]), penalty])
    found, *_ = np.linalg.lstsq(system, np.vstack([left, np.zeros((6, 7))]), rcond=None)
    np.testing.assert_allclose(made.weight, weight[:, kept].numpy() + found[:6].T, atol=1e-9)
    if affine:
        np.testing.assert_allclose(made.bias, found[6], atol=1e-9)
    else:
        assert made.bias is None
    shift = made.bias if affine else 0
    error = (y - x[:, kept] @ made.weight.T - shift).square().sum() / y.square().sum()
    assert made.after == pytest.approx(float(error), rel=1e-9)
    assert made.after < made.before


def test_no_repair_is_made_where_it_would_not_help() -> None:
    """Targets of the fitted tokens that have nothing to do with those of the held-out ones."""
    weight, bias = layer()
    x, other = features(40), features(40, seed=1)
    g = torch.Generator().manual_seed(0)
    wrong = torch.randn(40, 7, generator=g).double() * 100
    kept = torch.arange(11)
    right = other[:, kept] @ weight[:, kept].T + bias
    made = repair(gathered(x, wrong), gathered(other, right), weight, bias, kept)
    assert made.damping == 0
    assert made.after == made.before == pytest.approx(0, abs=1e-12)
    assert torch.equal(made.weight, weight[:, kept])


@pytest.mark.parametrize("per_unit", [1, 3, 6], ids=["neurons", "head dimensions", "heads"])
def test_the_predicted_error_is_that_after_the_best_repair(per_unit: int) -> None:
    x, (weight, _) = features(), layer()
    second = x.T @ x / len(x)
    ridge = DAMPING * second.diagonal().mean()
    columns = torch.arange(12).reshape(per_unit, -1).T if per_unit == 3 else None
    columns = torch.arange(12).reshape(-1, per_unit) if columns is None else columns
    order, errors = removal(second, weight, columns)
    assert sorted(order) == list(range(len(columns)))
    damped = torch.cat([x, torch.eye(12).double() * (ridge * len(x)).sqrt()])
    for count in range(1, len(order)):
        gone = set(columns[order[:count]].reshape(-1).tolist())
        kept = [c for c in range(12) if c not in gone]
        best = torch.linalg.lstsq(damped[:, kept], damped @ weight.T).solution
        measured = (damped @ weight.T - damped[:, kept] @ best).square().sum() / len(x)
        assert sum(errors[:count]) == pytest.approx(float(measured), rel=1e-8)
    whole = (damped @ weight.T).square().sum() / len(x)
    assert sum(errors) == pytest.approx(float(whole), rel=1e-8)


def test_each_removal_is_the_cheapest_one() -> None:
    x, (weight, _) = features(width=6), layer(width=6)
    second = x.T @ x / len(x)
    second_damped = second + DAMPING * second.diagonal().mean() * torch.eye(6).double()

    def cost(gone: list[int]) -> float:
        kept = [c for c in range(6) if c not in gone]
        cross = second_damped[:, kept]
        explained = cross @ torch.linalg.solve(second_damped[kept][:, kept], cross.T)
        left = second_damped - explained if kept else second_damped
        return float(torch.trace(weight @ left @ weight.T))

    order, errors = removal(second, weight, torch.arange(6)[:, None])
    for count in range(6):
        left = [u for u in range(6) if u not in order[:count]]
        costs = {u: cost([*order[:count], u]) - cost(order[:count]) for u in left}
        assert order[count] == min(costs, key=costs.__getitem__)
        assert errors[count] == pytest.approx(costs[order[count]], rel=1e-7)
    best = min(combinations(range(6), 2), key=lambda pair: cost(list(pair)))
    assert cost(order[:2]) <= 1.5 * cost(list(best))


def test_units_that_others_imitate_go_first_however_large_they_are() -> None:
    x, (weight, _) = features(width=6), layer(width=6)
    x[:, 2] = x[:, 3] + x[:, 4]
    weight[:, 2] *= 20
    order, errors = removal(x.T @ x / len(x), weight, torch.arange(6)[:, None])
    assert order[0] in (2, 3, 4)
    assert errors[0] < 0.05 * max(errors)


@pytest.mark.parametrize("value", [0.0, 3.0, 1e4])
def test_constant_inputs_are_no_obstacle(value: float) -> None:
    x = torch.full((50, 12), value)
    weight, bias = layer()
    y = (x.double() @ weight.T + bias).float()
    moments, kept = gathered(x, y), torch.arange(5)
    made = repair(moments, Moments.empty(12, 7), weight, bias, kept)
    assert made.after == pytest.approx(0, abs=1e-6)
    assert made.weight.isfinite().all()
    order, errors = removal(moments.covariance(True), weight, torch.arange(12)[:, None])
    assert sorted(order) == list(range(12))
    assert all(np.isfinite(errors))


def test_padding_counts_as_if_it_were_not_there() -> None:
    x, y = features(30), features(30, 7, seed=4)
    weights = torch.ones(30)
    weights[20:] = 0
    x[25] = float("nan")
    padded, alone = gathered(x, y, weights), gathered(x[:20], y[:20])
    for name in ("x", "xx", "y", "yx", "yy", "weight", "count"):
        assert torch.equal(*(torch.as_tensor(getattr(m, name)) for m in (padded, alone))), name
    weights[:10] = 0.5
    doubled, halved = gathered(torch.cat([x[:20], x[10:20]])), gathered(x, None, weights)
    torch.testing.assert_close(doubled.xx, 2 * halved.xx)
    torch.testing.assert_close(doubled.covariance(True), halved.covariance(True))


def test_sums_of_two_halves_are_the_whole() -> None:
    x, y = features(30), features(30, 7, seed=4)
    both, whole = gathered(x[:11], y[:11]) + gathered(x[11:], y[11:]), gathered(x, y)
    torch.testing.assert_close(both.xx, whole.xx)
    torch.testing.assert_close(both.yx, whole.yx)
    assert both.yy == pytest.approx(whole.yy)
    assert both.count == 30


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    x = features(5)
    x[3, 3] = value
    with pytest.raises(DataError, match="NaN or infinite"):
        gathered(x)


def test_a_large_mean_takes_no_digits_from_a_small_spread() -> None:
    x = (features(200) * 1e-2).float() + 1e3
    found = gathered(x).covariance(True)
    torch.testing.assert_close(found, torch.cov(x.double().T, correction=0), rtol=1e-4, atol=1e-9)
