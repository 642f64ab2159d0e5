"""Distances between sets of features: closed forms, the plain formula, and what must not change them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.errors import CheckpointError, InputError, NotFiniteError
from fewstep.metrics.fid import (
    FeatureStatistics,
    frechet_at_infinity,
    frechet_distance,
    frechet_interval,
    kernel_distance,
)

of = FeatureStatistics.of


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=seeded(seed), dtype=torch.float64)


def exact(mean: Tensor, covariance: Tensor) -> FeatureStatistics:
    """The statistics of a distribution, as of a thousand images."""
    return FeatureStatistics(network="unnamed", count=1000, mean=mean.double(), scatter=covariance.double() * 999)


def correlated(count: int, width: int, seed: int) -> Tensor:
    return normal(count, width, seed) @ normal(width, width, seed + 1) + normal(1, width, seed + 2)


def plain_formula(a: Tensor, b: Tensor) -> float:
    linalg = pytest.importorskip("scipy.linalg")
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (a, b)]
    product = linalg.sqrtm(covariances[0] @ covariances[1]).real
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(shift) + np.trace(covariances[0] + covariances[1] - 2 * product)


@pytest.mark.parametrize("width", [1, 5, 32])
def test_commuting_gaussians_have_their_closed_form(width):
    a, b = torch.linspace(0.1, 3, width), torch.linspace(2, 0.5, width)  # variances
    turn = torch.linalg.qr(normal(width, width, 0)).Q
    averages = normal(2, width, 1)
    covariances = [turn @ torch.diag(variances.double()) @ turn.T for variances in (a, b)]
    expected = (averages[0] - averages[1]).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    found = frechet_distance(exact(averages[0], covariances[0]), exact(averages[1], covariances[1]))
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_gaussians_that_do_not_commute_have_their_closed_form():
    a, b = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    # In two dimensions tr((A B)^(1/2))^2 = tr(A B) + 2 det(A B)^(1/2), here 8 + 2 * 3.
    assert frechet_distance(exact(torch.zeros(2), a), exact(torch.zeros(2), b)) == pytest.approx(8 - 2 * 14**0.5)


@pytest.mark.parametrize("width", [3, 40])
def test_the_plain_formula_agrees(width):
    a, b = correlated(200, width, 0), correlated(150, width, 5)
    assert frechet_distance(of(a), of(b)) == pytest.approx(plain_formula(a, b), rel=1e-8)


def test_few_pictures_leave_no_noise():
    """Fewer images than features: zero eigenvalues, whose roots would be 1e-8 each."""
    a, b = 100 * correlated(20, 200, 0), 100 * correlated(30, 200, 5)
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    cross = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + sum(x.square().sum() for x in centred) - 2 * cross
    assert frechet_distance(of(a), of(b)) == pytest.approx(float(expected), rel=1e-12)
    assert of(a).root.shape == (200, 19)
    assert frechet_distance(of(a), of(a)) < 1e-9 * float(of(a).covariance.trace())


def test_pictures_all_alike_have_the_distance_of_their_means():
    a, b = torch.ones(7, 3), torch.zeros(5, 3)
    assert frechet_distance(of(a), of(b)) == pytest.approx(3)


def test_distance_is_symmetric_and_sees_no_turn_shift_or_order():
    a, b = correlated(100, 8, 0), correlated(80, 8, 5)
    distance = frechet_distance(of(a), of(b))
    turn = torch.linalg.qr(normal(8, 8, 9)).Q
    assert frechet_distance(of(b), of(a)) == pytest.approx(distance)
    assert frechet_distance(of(a @ turn + 3), of(b @ turn + 3)) == pytest.approx(distance)
    assert frechet_distance(of(a.flip(0)), of(b)) == pytest.approx(distance)
    assert frechet_distance(of(2 * a), of(2 * b)) == pytest.approx(4 * distance)


def test_single_precision_features_far_from_zero_keep_their_spread():
    a = normal(1000, 4, 0).float() + 1e4
    assert frechet_distance(of(a), of(a.double())) < 1e-9
    assert of(a).covariance.allclose(a.double().T.cov(), rtol=1e-9)


@pytest.mark.parametrize("sizes", [(500,), (1, 499), (100, 1, 399), (5,) * 100])
def test_batches_merge_into_the_whole(sizes):
    features = correlated(500, 6, 0) + 100
    merged, whole = FeatureStatistics.of_batches(features.split(sizes)), of(features)
    assert merged.count == 500
    assert merged.mean.allclose(whole.mean, rtol=1e-12)
    assert merged.covariance.allclose(whole.covariance, rtol=1e-9)


def test_statistics_come_back_from_a_file(tmp_path):
    path, kept = tmp_path / "reference.safetensors", of(correlated(30, 6, 0), "inception-v3")
    kept.save(path)
    back = FeatureStatistics.load(path)
    assert (back.network, back.count) == ("inception-v3", 30)
    assert back.mean.equal(kept.mean)
    assert back.scatter.equal(kept.scatter)
    assert list(tmp_path.iterdir()) == [path]


def test_other_files_are_refused(tmp_path):
    path, kept = tmp_path / "x.safetensors", of(correlated(30, 6, 0))
    with pytest.raises(CheckpointError, match="cannot be read"):
        FeatureStatistics.load(path)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="a JSON text"):
        FeatureStatistics.load(path)
    FeatureStatistics(network="", count=3, mean=kept.mean, scatter=kept.scatter[:5]).save(path)
    with pytest.raises(CheckpointError, match="holds no feature statistics"):
        FeatureStatistics.load(path)
    kept.save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="cut short"):
        FeatureStatistics.load(path)


@pytest.mark.parametrize("shape", [(3,), (0, 4), (4, 0), (2, 3, 4)])
def test_features_of_other_shapes_are_refused(shape):
    with pytest.raises(InputError, match="shape"):
        of(torch.zeros(shape))


def test_features_that_are_not_finite_are_counted():
    features = normal(10, 3, 0)
    features[4, 1], features[7] = torch.nan, torch.inf
    with pytest.raises(NotFiniteError, match="2 of 10 images are not finite, first of number 4"):
        of(features)


def test_statistics_of_unlike_features_are_never_mixed():
    a, b, c = of(normal(9, 3, 0), "ours"), of(normal(9, 4, 0), "ours"), of(normal(9, 3, 0), "inception-v3")
    for other in (b, c):
        with pytest.raises(InputError, match="cannot be compared"):
            frechet_distance(a, other)
        with pytest.raises(InputError, match="cannot be compared"):
            a.merged(other)


def test_one_picture_and_none_have_no_distance():
    with pytest.raises(InputError, match="1 image has no spread: any distance is possible"):
        frechet_distance(of(normal(1, 3, 0)), of(normal(9, 3, 0)))
    with pytest.raises(InputError, match="at least one batch"):
        FeatureStatistics.of_batches([])


# Features of scale 1.3 about 0.5 in every direction, against a standard normal reference.
WIDTH = 8
REFERENCE = exact(torch.zeros(WIDTH), torch.eye(WIDTH))
TRUTH = WIDTH * (0.5**2 + 0.3**2)


def drawn(count: int, seed: int) -> Tensor:
    return 1.3 * normal(count, WIDTH, seed) + 0.5


@pytest.mark.parametrize("count", [12, 60, 300])
def test_the_interval_holds_the_truth_as_often_as_it_says(count):
    found = [
        frechet_interval(drawn(count, seed), REFERENCE, generator=seeded(seed), resamples=100) for seed in range(40)
    ]
    assert sum(interval.low <= TRUTH <= interval.high for interval in found) >= 34
    assert all(interval.low <= interval.value <= interval.high for interval in found)


def test_more_pictures_make_the_interval_narrower():
    few, many = (frechet_interval(drawn(count, 0), REFERENCE, generator=seeded(0)) for count in (30, 3000))
    assert many.high - many.low < 0.2 * (few.high - few.low)


def test_with_fewer_pictures_than_features_nothing_bounds_the_distance_below():
    reference = exact(torch.zeros(32), torch.eye(32))
    interval = frechet_interval(5 + normal(32, 32, 0), reference, generator=seeded(0))
    assert interval.low == 0
    assert interval.value > 32 * 25 * 0.9


def test_too_few_pictures_are_told_how_wide_the_interval_is():
    with pytest.raises(InputError, match=r"of 20 images is only known to be within 0 and 4\.\d+, which"):
        frechet_interval(drawn(20, 0), REFERENCE, generator=seeded(0), widest=0.5)
    with pytest.raises(InputError, match="any distance is possible; take at least 10"):
        frechet_interval(drawn(9, 0), REFERENCE, generator=seeded(0))


def test_the_interval_follows_its_generator_alone():
    first, again = (frechet_interval(drawn(30, 0), REFERENCE, generator=seeded(3), resamples=9) for _ in range(2))
    assert first == again


def test_extrapolation_takes_the_bias_off():
    sets = [drawn(100, seed) for seed in range(40)]
    biased = np.mean([frechet_distance(of(features), REFERENCE) for features in sets])
    limit = np.mean([frechet_at_infinity(features, REFERENCE, generator=seeded(0)) for features in sets])
    assert biased - TRUTH > 0.2
    assert abs(limit - TRUTH) < 0.12


def test_extrapolation_needs_four_pictures_a_feature():
    with pytest.raises(InputError, match="at least 32"):
        frechet_at_infinity(drawn(31, 0), REFERENCE, generator=seeded(0))


def test_kernel_distance_of_a_subset_pair_is_its_definition():
    a, b = normal(8, 3, 0), normal(8, 3, 1) + 1
    found = kernel_distance(a.repeat(2, 1), b.repeat(2, 1), generator=seeded(0), subsets=400, subset_size=8)

    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    # Over all subsets of the doubled sets, two different members are the same image once in 15 pairs.
    within = [sum(kernel(x, y) * (2 if x is y else 4) for x in s for y in s) / (16 * 15) for s in (list(a), list(b))]
    between = sum(kernel(x, y) for x in a for y in b) / 64
    scatter = found.standard_error / 400**0.5  # of the mean; with half of the images its scale is 1
    assert abs(found.value - (sum(within) - 2 * between)) < 4 * scatter


def test_kernel_distance_of_shifted_normals_is_its_closed_form():
    """In one dimension E (x y + 1)^3 = 1 + 3 m1 + 3 m2 + m3, with m the products of the moments."""
    shift = 0.7
    a, b = normal(2000, 1, 0), normal(2000, 1, 1) + shift
    moments = torch.tensor([[0, 1, 0], [shift, 1 + shift**2, shift**3 + 3 * shift]])
    gaps = (moments[0] - moments[1]).square() * torch.tensor([3, 3, 1])
    found = kernel_distance(a, b, generator=seeded(0), subsets=50, subset_size=250)
    assert abs(found.value - float(gaps.sum())) < 3 * found.standard_error


def test_kernel_distance_of_one_distribution_is_unbiased():
    found = [
        kernel_distance(
            normal(60, 5, seed), normal(60, 5, 1000 + seed), generator=seeded(0), subsets=20, subset_size=20
        )
        for seed in range(100)
    ]
    values = np.array([estimate.value for estimate in found])
    assert abs(values.mean()) < 3 * values.std() / 10
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize("size", [30, 100])
def test_kernel_distance_knows_its_error(size):
    """Whatever the subsets: naive errors shrink with their number, not with what is known."""
    found = [
        kernel_distance(normal(200, 5, seed) + 0.7, normal(200, 5, 999 + seed), generator=seeded(0), subset_size=size)
        for seed in range(60)
    ]
    scatter = np.std([estimate.value for estimate in found])
    assert np.mean([estimate.standard_error for estimate in found]) == pytest.approx(scatter, rel=0.35)


@pytest.mark.parametrize(("subsets", "size"), [(1, 10), (0, 10), (10, 1), (10, 26)])
def test_subsets_that_tell_no_error_are_refused(subsets, size):
    with pytest.raises(InputError, match="tell no error"):
        kernel_distance(normal(50, 3, 0), normal(90, 3, 1), generator=seeded(0), subsets=subsets, subset_size=size)


def test_kernel_distance_wants_one_network():
    with pytest.raises(InputError, match="3 and 4 numbers"):
        kernel_distance(normal(50, 3, 0), normal(50, 4, 1), generator=seeded(0), subset_size=9)
