"Codebooks: values against kmeans_1d, summed gradients, tied models, state, copies, compile, sizes, refusals that change nothing."
import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from sharetie.clusters import kmeans_1d
from sharetie.codebooks import Lookup, cluster_, code_bits, compression_rate, decode_, stored_bits
from sharetie.finding import Transpose
from sharetie.hashing import hash_
from sharetie.making import tie_
from sharetie.masks import _inner, magnitude, make_permanent_, prune_
from sharetie.pieces import quantize_pieces_
from sharetie.priors import MixturePrior, assign_
from sharetie.results import set_seed
from sharetie.sharing import untie_
from sharetie.ties import check_ties, declared_ties, load_model, save_model
from sharetie.transformer import CharacterModel
from tied import TIED


def mlp():
    set_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("build, x", TIED, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("scope", ["layer", "across"])
def test_tied_models_are_clustered_once_and_stay_tied(build, x, scope):
    set_seed(1)
    model = build()
    weights = [p for p in model.parameters() if p.ndim > 1]
    bits, values = stored_bits(model), weights[0].detach().clone()
    cluster_(model, 4, scope=scope)
    found = kmeans_1d(values, 4)
    books = [p for name, p in model.named_parameters() if name.endswith("original")]
    assert len(weights) == len(books) == 1 and torch.equal(books[0], found.codebook)
    assert stored_bits(model) == bits - values.numel() * 32 + values.numel() * 2 + 4 * 32
    for other in (copy.deepcopy(model), cluster_(build(), 4)):
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), model(x))
        assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in model.parameters())
    out = model(x)
    out.square().sum().backward()
    with torch.no_grad(): books[0] -= .01 * books[0].grad
    assert not torch.equal(out, model(x))
    after = model(x)
    decode_(model)
    torch.testing.assert_close(model(x), after)
    assert sum(p.ndim > 1 for p in model.parameters()) == 1 and stored_bits(model) == bits


def test_gradient_is_the_sum_over_the_group():
    model, x = mlp().double(), torch.randn(7, 8).double()
    cluster_(model, 4)
    plain = decode_(copy.deepcopy(model))
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for i in (0, 2):
        chain, wanted = model[i].parametrizations.weight, torch.zeros(4).double()
        wanted.index_add_(0, chain[0].codes.flatten().long(), plain[i].weight.grad.flatten())
        torch.testing.assert_close(chain.original.grad, wanted)


def test_look_up_passes_gradcheck():
    lookup = Lookup(torch.tensor([[0, 1, 2], [2, 3, 1]]), 3, zero=True)
    assert torch.autograd.gradcheck(lookup, torch.randn(3).double().requires_grad_())


def test_across_is_one_codebook():
    model = mlp()
    values = torch.cat([model[i].weight.detach().flatten() for i in (0, 2)])
    cluster_(model, 5, scope="across")
    a, b = (model[i].parametrizations.weight for i in (0, 2))
    assert a.original is b.original and a[0] is not b[0]
    assert torch.equal(a.original, kmeans_1d(values, 5).codebook)
    out = model(torch.ones(1, 8))
    decode_(model)
    assert torch.equal(model(torch.ones(1, 8)), out) and model[0].weight is not model[2].weight


def test_zeros_stay_apart():
    model = mlp()
    with torch.no_grad(): model[0].weight[model[0].weight.abs() < .2] = 0
    gone = model[0].weight == 0
    cluster_(model, 3, "0.weight", zero=True)
    optimizer = torch.optim.Adam(model.parameters(), .1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    assert torch.equal(model[0].weight == 0, gone) and len(model[0].weight.unique()) == 4


def test_weights_decide():
    model = mlp()
    values, h = model[0].weight.detach().clone(), torch.rand(6, 8) + .01
    cluster_(model, 4, "0.weight", weights={"0.weight": h})
    assert torch.equal(model[0].parametrizations.weight.original, kmeans_1d(values, 4, h).codebook)
    plain = kmeans_1d(values, 4)
    def lost(w): return (h * (w - values) ** 2).sum().item()
    assert lost(model[0].weight) <= lost(plain.codebook[plain.codes]) * (1 + 1e-6)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_compiles():
    model, x = cluster_(mlp(), 4), torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))


def test_rate():
    assert compression_rate(16, 4) == 3.2
    assert code_bits(256) == 8 and code_bits(257) == 9
    assert Lookup(torch.zeros(3, dtype=torch.long), 256).codes.dtype == torch.uint8


class Rows(nn.Module):
    "Two parameters of one memory."
    def __init__(self):
        super().__init__()
        memory = torch.randn(4, 3)
        self.a, self.b = nn.Parameter(memory[:2]), nn.Parameter(memory[2:])


@pytest.mark.parametrize("build, options, error, text", [
    (mlp, dict(k=0), ValueError, "k: "),
    (mlp, dict(k=1000), ValueError, "number of distinct values"),
    (mlp, dict(k=20), ValueError, "2.weight: k: a number of at most 18"),  # the second layer only, after the first was planned
    (mlp, dict(k=2, names="9.weight"), ValueError, "matches none"),
    (mlp, dict(k=2, names=[]), ValueError, "at least one weight"),
    (mlp, dict(k=2, scope="model"), ValueError, "scope: "),
    (mlp, dict(k=2, zero=1), TypeError, "zero: "),
    (mlp, dict(k=2, init="linaer"), ValueError, "did you mean"),
    (mlp, dict(k=2, weights=torch.ones(3)), TypeError, "weights: "),
    (mlp, dict(k=2, weights={"0.weight": torch.ones(6, 8)}), ValueError, "2.weight"),
    (mlp, dict(k=2, weights={"0.weight": torch.ones(6, 8), "2.weight": torch.ones(1)}), ValueError, "shape"),
    (lambda: nn.LSTM(2, 2), dict(k=2), ValueError, "RNNBase"),
    (Rows, dict(k=2, names="a"), ValueError, "memory of others"),
    (lambda: cluster_(mlp(), 2), dict(k=2, names="*original"), ValueError, "computed from"),
])
def test_refuses_and_changes_nothing(build, options, error, text):
    model = build()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(error, match=text): cluster_(model, **options)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_refuses_nan_and_no_model():
    model = mlp()
    with torch.no_grad(): model[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="2.weight"): cluster_(model, 2)
    assert not nn.utils.parametrize.is_parametrized(model[0])
    for call in (lambda: cluster_(3, 2), lambda: decode_(3), lambda: stored_bits(3)):
        with pytest.raises(TypeError, match="a module"): call()
    with pytest.raises(ValueError, match="look-ups"): decode_(mlp())


@pytest.mark.parametrize("call", [lambda m, n: cluster_(m, 2, n), lambda m, n: hash_(m, 2, n), lambda m, n: quantize_pieces_(m, 2, 1, n),
                                  lambda m, n: MixturePrior(m, 2, n)])
def test_names_and_weights_that_are_none(call):
    for names in (3, torch.ones(2)):
        with pytest.raises(TypeError, match="names: a list of names or patterns is expected"): call(mlp(), names)
    with pytest.raises(ValueError, match="0.weight: a weight with values is expected, got 'one of the meta device'"): call(mlp().to("meta"), None)
    with pytest.raises(ValueError, match="0.weight: a tensor with a shape is expected, got one of a lazy module"):
        call(nn.Sequential(nn.LazyLinear(3)), None)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("call, keeps", [(lambda m: cluster_(m, 3), False), (lambda m: cluster_(m, 3, zero=True), True), (lambda m: hash_(m, 4), False),
                                         (lambda m: quantize_pieces_(m, 2, 2), False), (lambda m: assign_(MixturePrior(m, 3)), True)])
def test_a_padding_row_that_is_lost_is_told(call, keeps):
    set_seed(0)
    model, pad = nn.Sequential(nn.Embedding(9, 4, padding_idx=2), nn.Linear(4, 3)), torch.tensor([2])
    if keeps: call(model)
    else:
        with pytest.warns(UserWarning, match="0.weight: row 2 pads and was 0"): call(model)
    assert model[0](pad).any() != keeps


@pytest.mark.parametrize("scope", ["layer", "across"])
def test_declared_ties_hold_through_clustering_and_back(scope, tmp_path):
    model = CharacterModel(16, 2, 1)
    declared = declared_ties(model)
    cluster_(model, 8, scope=scope)
    assert [d.names for d in declared_ties(model)] == [tuple(_inner(name) for name in d.names) for d in declared]
    check_ties(model)
    save_model(model, tmp_path / "clustered.safetensors")
    load_model(model, tmp_path / "clustered.safetensors")
    decode_(model)
    assert declared_ties(model) == declared and check_ties(model)["embedding.weight"]


def mapped():
    model = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 12))
    tie_(model, ["0.weight", "2.weight"], map=Transpose())
    return model


def masked():
    model = nn.Sequential(nn.Linear(12, 6))
    return prune_(model, magnitude(model), .5)


@pytest.mark.parametrize("call", [lambda m: cluster_(m, 2), lambda m: hash_(m, 2), lambda m: quantize_pieces_(m, 2, 2), MixturePrior],
                         ids=["cluster_", "hash_", "quantize_pieces_", "MixturePrior"])
@pytest.mark.parametrize("build, words, mend", [
    (mapped, r"Transpose computes '2.weight'; untie_\(model, '2.weight'\) first, or name other weights", lambda m: untie_(m, "2.weight")),
    (masked, r"Mask computes '0.weight'; make_permanent_\(model\) first", make_permanent_),
    (lambda: nn.Sequential(weight_norm(nn.Linear(12, 6))), "WeightNorm computes '0.weight'; remove_parametrizations from '0.weight' first", None),
], ids=["mapped tie", "mask", "norm"])
def test_computed_weights_are_refused_with_the_reason(call, build, words, mend):
    model = build()
    with pytest.raises(ValueError, match=words): call(model)
    if mend:
        mend(model)
        call(model)
