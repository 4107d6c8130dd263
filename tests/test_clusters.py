"Clusters on a line: the optimum against brute force, kmeans1d, and scikit-learn; starts, weights, refusals."
import itertools

import kmeans1d
import pytest
import torch
from sklearn.cluster import KMeans

from sharetie.clusters import kmeans_1d
from sharetie.results import set_seed

STARTS = ["linear", "density", "forgy", "root"]


def brute(values, k, weights=None):
    values, order = values.double().sort()
    weights = torch.ones_like(values) if weights is None else weights.double()[order]
    def lost(a, b):
        v, h = values[a:b], weights[a:b]
        return (h * (v - (h * v).sum() / h.sum()) ** 2).sum().item()
    cuts = itertools.combinations(range(1, len(values)), k - 1)
    return min(sum(map(lost, (0, *cut), (*cut, len(values)))) for cut in cuts)


def loss(values, found, weights=None):
    squares = (values.double() - found.codebook.double()[found.codes]) ** 2
    return (squares if weights is None else squares * weights.double()).sum().item()


@pytest.mark.parametrize("seed", range(8))
def test_equals_brute_force(seed):
    set_seed(seed)
    n = 4 + seed
    values, weights = torch.randn(n).double() * 10 ** (seed - 4), torch.rand(n).double() + .1
    for k in range(1, n + 1):
        for h in (None, weights):
            found = kmeans_1d(values, k, h)
            assert found.error == pytest.approx(brute(values, k, h), rel=1e-7, abs=1e-12 * values.square().sum().item())
            assert loss(values, found, h) == pytest.approx(found.error, rel=1e-9, abs=1e-24)


def test_equals_brute_force_with_ties():
    values = torch.tensor([1., 1, 1, 2, 2, 7, 7, 8, 9, 9])
    for k in range(1, 6): assert kmeans_1d(values, k).error == pytest.approx(brute(values, k), abs=1e-6)
    assert kmeans_1d(values, 5).codebook.tolist() == [1, 2, 7, 8, 9]


@pytest.mark.parametrize("k", [16, 64])
def test_equals_kmeans1d(k):
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(k)).double()
    codes, centers = kmeans1d.cluster(values.tolist(), k)
    theirs = (values - torch.tensor(centers).double()[torch.tensor(codes)]).square().sum().item()
    exact, binned = kmeans_1d(values, k, bins=None), kmeans_1d(values, k)
    assert exact.error == pytest.approx(theirs, rel=1e-9)
    assert torch.equal(exact.codes, torch.tensor(codes))
    assert theirs * (1 - 1e-9) <= binned.error <= 1.001 * theirs


@pytest.mark.parametrize("seed", range(3))
def test_outermost_values_may_be_alone(seed):
    values = torch.randn(6000, generator=torch.Generator().manual_seed(seed + 2))
    assert kmeans_1d(values, 64, bins=512).error < 1.003 * kmeans_1d(values, 64, bins=None).error


@pytest.mark.parametrize("k", [32, *(pytest.param(k, marks=pytest.mark.long) for k in (256, 512))])
@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_allowed_edges_grow_with_the_codebook(kind, k):
    for seed in range(2):
        set_seed(seed)
        values = torch.randn(3000) if kind == "normal" else torch.distributions.Laplace(0, 1).sample((3000,))
        assert kmeans_1d(values, k).error <= 1.0012 * kmeans_1d(values, k, bins=None).error


@pytest.mark.parametrize("start", STARTS)
def test_starts_stand_still(start):
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)).double()
    found = kmeans_1d(values, 8, init=start, generator=torch.Generator().manual_seed(1))
    assert found.error >= kmeans_1d(values, 8).error * (1 - 1e-9)
    nearest = (values[:, None] - found.codebook).abs().argmin(1)
    assert torch.equal(nearest, found.codes)
    for g in range(8):
        if (found.codes == g).any(): assert values[found.codes == g].mean().item() == pytest.approx(found.codebook[g].item(), abs=1e-9)


def test_lloyd_equals_scikit_learn_from_the_same_centers():
    values = torch.randn(400, generator=torch.Generator().manual_seed(3)).double()
    init = torch.linspace(-2, 2, 7).double()
    theirs = KMeans(7, init=init[:, None].numpy(), n_init=1, tol=0, algorithm="lloyd").fit(values[:, None].numpy())
    assert kmeans_1d(values, 7, init=init.flip(0)).error == pytest.approx(theirs.inertia_, rel=1e-9)


def test_weights_are_repeats_and_zero_has_no_say():
    set_seed(0)
    values, times = torch.randn(200).double(), torch.randint(0, 4, (200,))
    found, repeated = kmeans_1d(values, 9, times.double()), kmeans_1d(values.repeat_interleave(times), 9)
    torch.testing.assert_close(found.codebook, repeated.codebook)
    assert found.error == pytest.approx(repeated.error)
    assert found.codes.shape == values.shape and found.codes.max() == 8
    torch.testing.assert_close(kmeans_1d(values, 9, 1e-8 * times.double()).codebook, found.codebook)


@pytest.mark.parametrize("start", ["optimal", *STARTS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_that_are_alone_stay_as_they_are(dtype, start):
    set_seed(0)
    distinct = torch.logspace(-5, 3, 40, dtype=torch.double).mul(torch.tensor([1., -1.]).repeat(20)).to(dtype).unique()
    values = distinct[torch.randint(len(distinct), (300,))]
    found = kmeans_1d(values, len(values.unique()), init=start)
    if start in ("optimal", "forgy"): assert torch.equal(found.codebook[found.codes], values)
    for g in found.codes.unique():
        group = values[found.codes == g]
        assert group.min() <= found.codebook[g] <= group.max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_and_shapes(dtype):
    values = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    found = kmeans_1d(values, 4)
    assert found.codes.shape == values.shape and found.codes.dtype == torch.long
    assert found.codebook.dtype == dtype and not found.codebook.requires_grad
    assert (found.codebook.diff() > 0).all()


def test_far_off_and_shifted_values_keep_their_groups():
    values = torch.randn(300, generator=torch.Generator().manual_seed(0)).double()
    codes = kmeans_1d(values, 6).codes
    for moved in (values * 1e100, values * 1e-100, values + 1e4): assert torch.equal(kmeans_1d(moved, 6).codes, codes)
    assert kmeans_1d(torch.full((9,), 3.), 1).error == 0


@pytest.mark.gpu
def test_gpu_equals_cpu():
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    ours, there = kmeans_1d(values, 16), kmeans_1d(values.cuda(), 16)
    assert there.codes.is_cuda and there.error == pytest.approx(ours.error, rel=1e-6)


@pytest.mark.parametrize("arguments, error, text", [
    (([1., 2.], 1), TypeError, "values: a floating point tensor"),
    ((torch.arange(3), 1), TypeError, "values: a floating point tensor"),
    ((torch.tensor([1., torch.inf]), 1), ValueError, "1 of 2 that are NaN or infinite"),
    ((torch.zeros(0), 1), ValueError, "at least one element"),
    ((torch.rand(5), 0), ValueError, "k: "),
    ((torch.rand(5), 2.), TypeError, "k: a whole number"),
    ((torch.ones(5), 2), ValueError, "at most 1, the number of distinct values"),
    ((torch.rand(5), 2, torch.ones(4)), ValueError, "weights: "),
    ((torch.rand(5), 2, -torch.ones(5)), ValueError, "no number below 0"),
    ((torch.rand(5), 2, torch.zeros(5)), ValueError, "a number above 0"),
    ((torch.rand(5), 2, None, "forgi"), ValueError, "did you mean 'forgy'"),
    ((torch.rand(5), 2, None, torch.zeros(3)), ValueError, "init: "),
    ((torch.rand(5), 2, None, "optimal", 1), ValueError, "bins: "),
    ((torch.rand(5), 2, None, "forgy", None, 3), TypeError, "generator: a torch.Generator is expected, got int"),
])
def test_refuses(arguments, error, text):
    with pytest.raises(error, match=text): kmeans_1d(*arguments)
