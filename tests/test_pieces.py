"Product quantization: clusters against scikit-learn and brute force, exact decoding, summed gradients, moments, tied models, bad input."
import copy
from itertools import product

import pytest
import torch
from sklearn.cluster import KMeans
from torch import nn

from sharetie.checking import check_ties
from sharetie.codebooks import decode_, stored_bits
from sharetie.making import declared_ties, tie_
from sharetie.pieces import PieceLookup, kmeans, piece_rate, quantize_pieces_
from sharetie.results import set_seed
from tied import Coder, Convs, Reused, Words


@pytest.mark.parametrize("seed", range(3))
def test_from_the_same_centers_as_scikit_learn(seed):
    x = torch.randn(2, 150, 3, generator=torch.Generator().manual_seed(seed)).double()
    found = kmeans(x, 6, init=x[:, :6])
    for points, codes, books, error in zip(x, *found):
        peer = KMeans(6, init=points[:6].numpy(), n_init=1, algorithm="lloyd", tol=0).fit(points.numpy())
        assert peer.labels_.tolist() == codes.tolist()
        torch.testing.assert_close(torch.from_numpy(peer.cluster_centers_), books)
        assert error.item() == pytest.approx(peer.inertia_)


def test_as_good_as_scikit_learn_from_a_start_of_its_own():
    set_seed(0)
    x = torch.randn(1, 400, 4)
    own = min(kmeans(x, 12, generator=torch.Generator().manual_seed(s)).error.item() for s in range(5))
    assert own < 1.03 * KMeans(12, n_init=5, random_state=0).fit(x[0].numpy()).inertia_


def test_close_to_the_best_of_all_clusterings():
    x = torch.randn(1, 7, 2, generator=torch.Generator().manual_seed(0)).double()
    def lost(codes):
        groups = [x[0][torch.tensor(codes) == j] for j in range(3)]
        return sum(((g - g.mean(0)) ** 2).sum().item() for g in groups if len(g))
    best = min(map(lost, product(range(3), repeat=7)))
    own = [kmeans(x, 3, generator=torch.Generator().manual_seed(s)).error.item() for s in range(8)]
    assert min(own) == pytest.approx(best) and all(e >= best - 1e-12 for e in own)


def test_sets_are_clustered_each_by_itself():
    x = torch.randn(4, 60, 3, generator=torch.Generator().manual_seed(0))
    together = kmeans(x, 5, init=x[:, :5])
    for i in range(4):
        alone = kmeans(x[i:i + 1], 5, init=x[i:i + 1, :5])
        assert torch.equal(alone.codes[0], together.codes[i])
        torch.testing.assert_close(alone.codebooks[0], together.codebooks[i])


@pytest.mark.parametrize("k", [3, 5])
def test_no_center_stays_empty(k):
    x = torch.randn(2, 40, 2, generator=torch.Generator().manual_seed(0)).double()
    init = torch.full((2, k, 2), 1e3).double()
    found = kmeans(x, k, init=init)
    assert all(len(codes.unique()) == k for codes in found.codes)
    lost = (x - found.codebooks.gather(1, found.codes[..., None].expand_as(x))).square().sum((1, 2))
    torch.testing.assert_close(lost, found.error)


def test_as_many_centers_as_points_lose_nothing():
    x = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0))
    assert kmeans(x, 9).error.max() < 1e-10
    x[0, 1] = x[0, 0]
    with pytest.raises(ValueError, match="at most 8"): kmeans(x, 9)


def test_far_from_zero_is_as_exact():
    x = torch.randn(1, 50, 2, generator=torch.Generator().manual_seed(0)).double()
    near, far = kmeans(x, 4, init=x[:, :4]), kmeans(x + 1e6, 4, init=x[:, :4] + 1e6)
    assert torch.equal(near.codes, far.codes) and far.error.item() == pytest.approx(near.error.item(), rel=1e-6)


def mlp():
    set_seed(0)
    return nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 12))


@pytest.mark.parametrize("books", ["positions", "layer"])
def test_codes_are_of_the_nearest_piece_and_decode_exactly(books):
    model, x = mlp(), torch.randn(5, 8)
    plain = copy.deepcopy(model)
    quantize_pieces_(model, 4, 4, books=books)
    lookup, source = model[0].parametrizations.weight[0], model[0].parametrizations.weight.original
    assert source.shape == (2 if books == "positions" else 1, 4, 4) and lookup.codes.shape == (40, 2)
    for j in range(2):
        pieces, book = plain[0].weight[:, 4 * j:4 * j + 4], source[j % len(source)]
        assert torch.equal(torch.cdist(pieces, book).argmin(1), lookup.codes[:, j].long())
        assert torch.equal(model[0].weight[:, 4 * j:4 * j + 4], book[lookup.codes[:, j].long()])
    out = model(x)
    assert torch.equal(decode_(model)(x), out)


@pytest.mark.parametrize("books", ["positions", "layer"])
def test_gradient_is_the_sum_over_all_places(books):
    model, x = mlp().double(), torch.randn(7, 8).double()
    quantize_pieces_(model, 3, 2, books=books)
    plain = decode_(copy.deepcopy(model))
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    chain, grad = model[0].parametrizations.weight, plain[0].weight.grad.unflatten(1, (4, 2))
    wanted = torch.zeros_like(chain.original)
    for i in range(40):
        for j in range(4): wanted[j % len(wanted), chain[0].codes[i, j].long()] += grad[i, j]
    torch.testing.assert_close(chain.original.grad, wanted)


def test_look_up_passes_gradcheck():
    codes = torch.tensor([[0, 1, 2], [2, 1, 0]])
    for m in (3, 1): assert torch.autograd.gradcheck(PieceLookup(codes, 3, (2, 6)), torch.randn(m, 3, 2).double().requires_grad_())


def test_pieces_of_one_weight_are_a_codebook_of_values():
    model = mlp()
    quantize_pieces_(model, 5, 1, "0.weight", books="layer")
    assert len(model[0].weight.unique()) == 5 and piece_rate((40, 8), 5, 1, "layer") == 320 * 32 / (320 * 3 + 5 * 32)


@pytest.mark.parametrize("books", ["positions", "layer"])
@pytest.mark.parametrize("k, width", [(2, 1), (5, 2), (12, 4)])
def test_the_rate_is_that_of_a_layer(books, k, width):
    layer = quantize_pieces_(nn.Linear(8, 40, bias=False), k, width, books=books)
    assert piece_rate((40, 8), k, width, books) == pytest.approx(40 * 8 * 32 / stored_bits(layer))


def test_convolutions_are_cut_along_their_kernels():
    set_seed(0)
    conv = nn.Conv2d(4, 16, 3)
    quantize_pieces_(conv, 8, 9)
    assert [len(conv.weight[:, c].flatten(1).unique(dim=0)) for c in range(4)] == [8] * 4
    assert stored_bits(conv) == 16 * 4 * 3 + 4 * 8 * 9 * 32 + 16 * 32


@pytest.mark.parametrize("books", ["positions", "layer"])
def test_moments_of_the_inputs_decide(books):
    set_seed(0)
    layer, x = nn.Linear(8, 64, bias=False), torch.randn(300, 8) * torch.tensor([3., .1] * 4)
    lost = []
    for moments in (None, {"weight": torch.diag(torch.tensor([9., .01] * 4))}):
        other = quantize_pieces_(copy.deepcopy(layer), 4, 2, books=books, moments=moments, generator=set_seed(0))
        lost.append((x @ (other.weight - layer.weight).T).square().mean().item())
    assert lost[1] < .5 * lost[0]


def test_moments_of_nothing_are_no_moments():
    plain, moved = mlp(), mlp()
    quantize_pieces_(plain, 4, 4, "0.weight", generator=set_seed(0))
    quantize_pieces_(moved, 4, 4, "0.weight", moments={"0.weight": torch.eye(8)}, generator=set_seed(0))
    torch.testing.assert_close(plain[0].weight, moved[0].weight)


@pytest.mark.parametrize("build, x", [(Words, torch.arange(4)), (lambda: Reused(6), torch.randn(3, 6)), (lambda: Convs(4), torch.randn(1, 4, 4, 4)), (Coder, torch.randn(2, 6))])
@pytest.mark.parametrize("books", ["positions", "layer"])
def test_tied_models_are_cut_once_and_stay_tied(build, x, books):
    set_seed(1)
    model = build()
    weight, = [p for p in model.parameters() if p.ndim > 1]
    bits, n = stored_bits(model), weight.numel()
    quantize_pieces_(model, 2, 2, books=books)
    source, = [p for name, p in model.named_parameters() if name.endswith("original")]
    assert stored_bits(model) == bits - 32 * n + n // 2 + 32 * source.numel()
    for other in (copy.deepcopy(model), quantize_pieces_(build(), 2, 2, books=books)):
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), model(x))
        assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in model.parameters())
    out = model(x)
    out.square().sum().backward()
    with torch.no_grad(): source -= .01 * source.grad
    assert not torch.equal(out, model(x))
    after = model(x)
    decode_(model)
    torch.testing.assert_close(model(x), after)
    assert sum(p.ndim > 1 for p in model.parameters()) == 1 and stored_bits(model) == bits


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_compiles():
    model, x = quantize_pieces_(mlp(), 4, 2), torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))


def nan():
    model = mlp()
    with torch.no_grad(): model[2].weight[0, 0] = torch.nan
    return model


@pytest.mark.parametrize("build, options, error, text", [
    (mlp, dict(k=0, width=2), ValueError, "k: "),
    (mlp, dict(k=2, width=0), ValueError, "width: "),
    (mlp, dict(k=2, width=3), ValueError, "a divisor of the 8 columns of '0.weight'"),
    (mlp, dict(k=20, width=2), ValueError, "at most 12, the pieces of '2.weight'"),  # the second layer only
    (mlp, dict(k=2, width=2, books="layers"), ValueError, "did you mean 'layer'"),
    (mlp, dict(k=2, width=2, names="0.bias"), ValueError, "two axes"),
    (mlp, dict(k=2, width=2, names="9.weight"), ValueError, "matches none"),
    (mlp, dict(k=2, width=2, moments=torch.eye(8)), TypeError, "moments: "),
    (mlp, dict(k=2, width=2, moments={"0.weight": torch.eye(8)}), ValueError, "2.weight"),
    (mlp, dict(k=2, width=2, moments={"0.weight": torch.eye(7)}), ValueError, "shape"),
    (mlp, dict(k=2, width=2, iterations=-1), ValueError, "iterations: "),
    (mlp, dict(k=2, width=2, names="0.weight", moments={"0.weight": -torch.eye(8)}), ValueError, "0.weight: moments: a matrix with eigenvalues of at least 0 is expected, got -1.0"),
    (nan, dict(k=2, width=2), ValueError, "2.weight"),
    (lambda: nn.LSTM(2, 2), dict(k=2, width=2), ValueError, "RNNBase"),
    (lambda: nn.Linear(4, 4, bias=False).requires_grad_(False), dict(k=5, width=2), ValueError, "at most 4"),
    (lambda: quantize_pieces_(mlp(), 2, 2), dict(k=2, width=2, names="*original"), ValueError, "computed from"),
])
def test_refuses_and_changes_nothing(build, options, error, text):
    model = build()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(error, match=text): quantize_pieces_(model, **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)


def test_equal_rows_are_named():
    layer = nn.Linear(4, 6)
    with torch.no_grad(): layer.weight.copy_(torch.ones(6, 4))
    with pytest.raises(ValueError, match="weight: k: at most 1, the number of distinct points"): quantize_pieces_(layer, 2, 2)


@pytest.mark.parametrize("call, error, text", [
    (lambda: kmeans(torch.zeros(3, 4), 2), ValueError, "points: a tensor of 3 axes"),
    (lambda: kmeans(torch.full((1, 3, 2), torch.nan), 2), ValueError, "finite"),
    (lambda: kmeans(torch.rand(1, 3, 2), 4), ValueError, "k: "),
    (lambda: kmeans(torch.rand(1, 3, 2), 2, init=torch.rand(1, 3, 2)), ValueError, "init: "),
    (lambda: piece_rate((4, 6), 2, 4), ValueError, "a divisor of the 6 columns"),
    (lambda: piece_rate((3,), 2, 2), TypeError, "shape: rows and columns"),
    (lambda: PieceLookup(torch.zeros(3).long(), 2, (3, 2)), ValueError, "codes: "),
    (lambda: PieceLookup(torch.full((3, 2), 2), 2, (3, 2)), ValueError, "numbers from 0 to 1"),
    (lambda: quantize_pieces_(3, 2, 2), TypeError, "module"),
])
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text): call()


def test_declared_ties_follow():
    model = Words()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    tie_(model, ["embedding.weight", "head.weight"])
    quantize_pieces_(model, 2, 2)
    check_ties(model)
    (name,) = {d.names for d in declared_ties(model)}
    assert all(n.endswith("original") for n in name) and model.embedding.weight.equal(model.head.weight)
