"Factors: optimal products, planted structures, layers in a row against the weight they stand for, ranks, ties, refusals that change nothing."
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sharetie.binding import keep_ties
from sharetie.census import census
from sharetie.checking import check_ties
from sharetie.factors import factored_layers, factorize_, share_basis_
from sharetie.finding import find_ties
from sharetie.layerwise import layerwise_
from sharetie.making import declared_ties, tie_
from sharetie.masks import magnitude, prune_
from sharetie.products import Factored, FactoredTable, matrix_factors
from sharetie.results import set_seed
from sharetie.saving import load_model, save_model
from sharetie.transformer import CharacterModel
from tied import TIED_LAYERS, Reused, Speaker, autoencoder, functional


def held(model):
    "Every layer's weight and bias by name, whether products or not."
    return {f"{n}.{a}": getattr(m, a).detach().clone() for n, m in model.named_modules() for a in ("weight", "bias")
            if isinstance(getattr(m, a, None), torch.Tensor)}


@pytest.mark.parametrize("name", TIED_LAYERS)
def test_tied_weights_are_factorized_once_and_stay_tied(name, tmp_path):
    set_seed(1)
    build, x, expected = TIED_LAYERS[name]
    model = build().double()
    x = x.double() if x.is_floating_point() else x
    before, plain = sum(p.numel() for p in model.parameters()), copy.deepcopy(model)
    exact = factorize_(copy.deepcopy(model), rank=4 if name in ("coder", "autoencoder") else 6 if name in ("reused", "convs") else 8)
    torch.testing.assert_close(exact(x), plain(x))
    thin = factorize_(copy.deepcopy(model), rank=2)
    assert sum(p.numel() for p in thin.parameters()) < before
    assert len(factored_layers(thin)) - (factored_layers(thin)["stored"] == 0).sum() == expected
    check_ties(thin)
    # against the same model with the product as its weight
    with torch.no_grad():
        for n, p in plain.named_parameters():
            layer = thin.get_submodule(n.removesuffix(".weight")) if n.endswith(".weight") else None
            if isinstance(layer, (Factored, FactoredTable)): p.copy_(layer.weight)
    torch.testing.assert_close(thin(x), plain(x))
    # gradients of the factors are those through the product
    thin(x).square().sum().backward()
    assert all(p.grad is not None for p in thin.parameters())
    # copies and files
    for other in (copy.deepcopy(thin), pickle.loads(pickle.dumps(thin))):
        torch.testing.assert_close(other(x), thin(x))
        assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in thin.parameters())
    other = factorize_(build().double(), rank=2)
    other.load_state_dict(thin.state_dict())
    torch.testing.assert_close(other(x), thin(x))
    save_model(thin, tmp_path / "thin.safetensors")
    other = factorize_(build().double(), rank=2)
    load_model(other, tmp_path / "thin.safetensors")
    torch.testing.assert_close(other(x), thin(x))
    assert census(thin, x).stored == sum(p.numel() for p in thin.parameters())


def test_declared_ties_of_factors_survive_a_cast():
    model = keep_ties(Speaker())
    factorize_(model, "head", rank=2)
    assert [d.names for d in declared_ties(model)] == [("table.down.weight", "head.down.weight"), ("table.up.weight", "head.up.weight")]
    model.to(torch.float64)
    check_ties(model)
    assert model.table.up.weight is model.head.up.weight and model.head.up.weight.dtype == torch.float64


def test_tied_biases_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tie_(model, ["0.bias", "1.bias"])
    factorize_(model, "0", rank=2)
    assert model[0].bias is model[1].bias and model[0].up.bias is model[1].bias
    assert [d.names for d in declared_ties(model)] == [("0.up.bias", "1.bias")]
    check_ties(model)


def test_padding_stays_zero_and_masked():
    model = Speaker.__new__(Speaker)
    nn.Module.__init__(model)
    model.table, model.body, model.head = nn.Embedding(20, 8, padding_idx=3), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
    tie_(model, ["table.weight", "head.weight"], padding="mask")
    factorize_(model, "table", rank=3)
    assert model.table(torch.tensor(3)).abs().max() < 1e-6 and (model(torch.arange(4))[:, 3] == -torch.inf).all()
    model.table(torch.tensor([3, 4])).sum().backward()
    assert (model.table.up.weight.grad[3] == 0).all() and (model.table.up.weight.grad[4] != 0).any()


# Convolutions

@pytest.mark.parametrize("form", ["svd", "tucker", "cp"])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1, "dilation": 2}, {"padding": "same", "padding_mode": "reflect"}, {"padding": (1, 0), "padding_mode": "circular", "bias": False}], ids=str)
def test_convolutions_in_a_row_are_the_convolution_with_their_product(form, options):
    set_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 6, (3, 2), **options)).double()
    bias, x = model[0].bias, torch.randn(2, 5, 9, 8).double()
    plain = copy.deepcopy(model[0])
    factorize_(model, rank=3, form=form)
    plain.weight = nn.Parameter(model[0].weight.detach())
    torch.testing.assert_close(model(x), plain(x))
    assert model[0].bias is bias and (model[0].in_channels, model[0].stride, model[0].padding) == (5, plain.stride, plain.padding)
    torch.testing.assert_close(model[0](x[0]), plain(x[0]))  # without a batch


@pytest.mark.parametrize("d, form", [(1, "svd"), (1, "tucker"), (1, "cp"), (3, "svd"), (3, "tucker"), (3, "cp")])
def test_one_and_three_axes(d, form):
    set_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
    model, x = nn.Sequential(kind(4, 5, 3, padding=1)).double(), torch.randn(2, 4, *[5] * d).double()
    plain = copy.deepcopy(model[0])
    factorize_(model, rank=2, form=form)
    plain.weight = nn.Parameter(model[0].weight.detach())
    torch.testing.assert_close(model(x), plain(x))


def test_full_ranks_are_exact():
    set_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(45, 7)), torch.randn(3, 4, 5, 5)
    for options in ({"rank": 5, "names": "0"}, {"rank": (4, 5), "names": "0", "form": "tucker"}, {"rank": 7, "names": "2"}, {"rank": 7, "names": "2", "x": x}, {"rank": 5, "names": "0", "x": x}):
        torch.testing.assert_close(factorize_(copy.deepcopy(model), **options)(x), model(x), atol=1e-5, rtol=1e-4)


# Examples

@pytest.mark.parametrize("build", [lambda: nn.Sequential(nn.Linear(6, 8)), lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), lambda: nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False))])
def test_examples_make_outputs_nearest(build):
    set_seed(0)
    model = build().double()
    x = torch.randn(300, 6).double() * torch.logspace(0, -2, 6) if isinstance(model[0], nn.Linear) else torch.randn(300, 3, 6, 6).double().cumsum(-1)
    y = model(x).detach()
    rows = y if y.ndim == 2 else y.movedim(1, -1).flatten(0, 2)
    if model[0].bias is not None: rows = rows - rows.mean(0)  # which the bias takes over
    for r in (1, 3, 5):
        seen, blind = (factorize_(copy.deepcopy(model), rank=r, x=e)(x) for e in (x, None))
        lost = (seen - y).square().sum()
        torch.testing.assert_close(lost.detach(), torch.linalg.svdvals(rows)[r:].square().sum(), atol=1e-5, rtol=1e-5)
        assert lost <= (blind - y).square().sum()


def test_examples_of_all_uses_are_added_up():
    set_seed(0)
    model, x = Reused(6).double(), torch.randn(50, 6).double()
    inputs = torch.cat([x, model.a(x).relu()]).detach()
    outputs = model.a.weight.detach() @ inputs.T
    up, down = matrix_factors(model.a.weight.detach(), 2, outputs - outputs.mean(1, keepdim=True))
    wanted = model.a.bias + outputs.mean(1) - up @ down @ inputs.mean(0)
    factorize_(model, rank=2, x=x)
    torch.testing.assert_close(model.a.bias, wanted)
    torch.testing.assert_close(model.a.weight.detach(), up @ down, atol=1e-6, rtol=1e-5)


def test_a_bias_that_is_tied_takes_over_no_mean():
    set_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double(), torch.randn(50, 6).double() + 3
    tie_(model, ["0.bias", "1.bias"])
    w, bias = model[0].weight.detach(), model[0].bias.detach().clone()
    up, down = matrix_factors(w, 2, w @ x.T)
    factorize_(model, "0", rank=2, x=x)
    torch.testing.assert_close(model[0].weight.detach(), up @ down, atol=1e-6, rtol=1e-5)
    assert torch.equal(model[0].bias, bias)


def test_what_no_example_shows_is_left_to_the_weights():
    set_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False)).double()
    x = torch.zeros(4, 6).double()
    w = model[0].weight.detach().clone()
    factorize_(model, rank=3, x=x)
    torch.testing.assert_close(model[0].weight.detach(), torch.mm(*matrix_factors(w, 3)))


def test_the_mode_and_hooks_are_as_before():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(.5), nn.Linear(4, 4))
    factorize_(model.train(), rank=2, x=torch.randn(5, 4))
    assert all(m.training for m in model.modules()) and not any(m._forward_hooks for m in model.modules())


# Ranks

def test_energy_is_kept_and_no_rank_less_would_do():
    set_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 40)).double()
    thin = factorize_(copy.deepcopy(model), energy=.6)
    for i, row in factored_layers(thin).iterrows():
        s = torch.linalg.svdvals(model[i].weight.detach()).square()
        r, = row["ranks"]
        assert s[:r].sum() >= .6 * s.sum() > s[:r - 1].sum()
    assert isinstance(factorize_(copy.deepcopy(model), energy=1.)[0], nn.Linear)  # would not shrink


@pytest.mark.parametrize("form", ["svd", "tucker", "cp"])
def test_a_budget_is_met_and_all_of_it_used(form):
    set_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Conv2d(12, 16, 3), nn.Conv2d(16, 8, 1))
    whole = sum(m.weight.numel() for m in model)
    for part in (.15,) if form == "cp" else (.2, .5, .9):
        thin = factorize_(copy.deepcopy(model), budget=round(part * whole), form=form)
        used = sum(w.numel() for m in thin for w in ([m.weight] if isinstance(m, nn.Conv2d) else [layer.weight for layer in m]))
        assert .6 * part * whole < used <= part * whole
        assert used == sum(factored_layers(thin)["stored"]) + sum(m.weight.numel() for m in thin if isinstance(m, nn.Conv2d))


def test_a_budget_buys_one_energy_for_all():
    set_seed(0)
    model = nn.Sequential(nn.Linear(30, 40, bias=False), nn.Linear(40, 20, bias=False)).double()
    thin = factorize_(copy.deepcopy(model), budget=1000)
    ranks = [r for r, in factored_layers(thin)["ranks"]]
    spectra = [torch.linalg.svdvals(m.weight.detach()).square() for m in model]
    kept = [(s[:r].sum() / s.sum()).item() for s, r in zip(spectra, ranks)]
    level = min(kept)
    for s, r in zip(spectra, ranks): assert r == 1 or s[:r - 1].sum() / s.sum() < level
    above = [1 + int((s.cumsum(0) / s.sum() < level + 1e-9).sum()) for s in spectra]  # the next level for all
    assert sum(r * sum(m.weight.shape) for r, m in zip(above, model)) > 1000


# One basis

def test_a_shared_basis_is_the_product_form_of_the_stack():
    set_seed(0)
    model = nn.ModuleDict({n: nn.Linear(8, m) for n, m in {"q": 6, "k": 6, "v": 10}.items()}).double()
    stack = torch.cat([m.weight.detach() for m in model.values()])
    share_basis_(model, ["q", "k", "v"], rank=4)
    torch.testing.assert_close(torch.cat([m.weight.detach() for m in model.values()]), torch.mm(*matrix_factors(stack, 4)))
    basis = model["q"].down.weight
    assert all(m.down.weight is basis for m in model.values())
    assert find_ties(model)["v.down.weight"].names == ("q.down.weight", "k.down.weight", "v.down.weight")
    assert [d.names for d in declared_ties(model)] == [("q.down.weight", "k.down.weight", "v.down.weight")]
    assert factored_layers(model)["stored"].tolist() == [6 * 4 + 8 * 4, 24, 40]
    basis.data.zero_()
    assert all((m.weight == 0).all() for m in model.values())


def test_a_shared_basis_sees_examples():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(6, 5, bias=False), nn.Linear(6, 7, bias=False)
        def forward(self, x): return torch.cat([self.q(x), self.k(x)], -1)
    set_seed(0)
    model, x = Attention().double(), torch.randn(90, 6).double() * torch.logspace(0, -2, 6)
    y = model(x)
    share_basis_(model, "*", rank=2, x=x)
    torch.testing.assert_close((model(x) - y).square().sum(), torch.linalg.svdvals(y)[2:].square().sum(), atol=1e-8, rtol=1e-5)


def test_a_basis_shared_with_a_table():
    model = Speaker()
    share_basis_(model, "*", rank=3)
    assert model.table.down.weight is model.head.down.weight is model.body.down.weight
    assert model.table.up.weight is model.head.up.weight
    check_ties(model)
    assert model(torch.arange(4)).shape == (4, 20)


def test_a_character_model():
    set_seed(0)
    model, x = CharacterModel(dim=16, layers=2), torch.randint(90, (2, 7))
    exact = factorize_(copy.deepcopy(model), ["embedding", "blocks.*"], rank=16)
    torch.testing.assert_close(exact(x), model(x), atol=1e-4, rtol=1e-4)
    thin = factorize_(copy.deepcopy(model), "head", rank=4, x=x)
    assert thin.embedding.up.weight is thin.head.up.weight and census(thin, x).stored == sum(p.numel() for p in thin.parameters())


# After

def test_factors_can_be_pruned_and_factorized_again():
    model = factorize_(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 4)), rank=4)
    prune_(model, magnitude(model), .5)
    model = factorize_(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 4)), rank=4)
    factorize_(model, "0.up", rank=2)
    assert model(torch.randn(2, 12)).shape == (2, 4) and model[0].weight.shape == (12, 12)


@pytest.mark.filterwarnings("ignore")
def test_compiles():
    model, x = factorize_(Speaker(), rank=3), torch.arange(4)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))


def test_frozen_weights_have_frozen_factors():
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False))
    factorize_(model, rank=2)
    assert not any(p.requires_grad for p in model.parameters())


# Bad input

def plain(): return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.Conv2d(4, 4, 3, groups=2), nn.LayerNorm(4), nn.Embedding(5, 4, max_norm=1.), nn.GRU(3, 3), nn.ConvTranspose2d(2, 2, 2))


BAD = {
    "no module": (lambda m: factorize_(3, rank=1), TypeError, "model: a module is expected, got int"),
    "above": (lambda m: factorize_(m, "0", rank=7), ValueError, "rank of '0': a whole number from 1 to 6 is expected, got 7"),
    "zero": (lambda m: factorize_(m, "0", rank=0), ValueError, "rank of '0': a whole number from 1 to 6 is expected, got 0"),
    "negative": (lambda m: factorize_(m, "0", rank=-1), ValueError, "rank of '0': a whole number from 1 to 6 is expected, got -1"),
    "half": (lambda m: factorize_(m, "0", rank=1.5), TypeError, "rank of '0': a whole number is expected, got 1.5"),
    "one good, one above": (lambda m: factorize_(m, ["0", "2"], rank=5), ValueError, "rank of '2': a whole number from 1 to 3 is expected, got 5"),
    "pair": (lambda m: factorize_(m, "0", rank=(2, 2)), ValueError, "rank: one number for svd is expected, got (2, 2)"),
    "tucker": (lambda m: factorize_(m, "2", rank=(3, 3), form="tucker"), ValueError, "rank of '2': a whole number from 1 to 2 is expected, got 3"),
    "cp": (lambda m: factorize_(m, "2", rank=19, form="cp"), ValueError, "rank of '2': a whole number from 1 to 18 is expected, got 19"),
    "nothing": (lambda m: factorize_(m), ValueError, "rank: one of rank, energy and budget is expected, got none"),
    "two": (lambda m: factorize_(m, rank=1, budget=3), ValueError, "one of rank, energy and budget is expected, got ['rank', 'budget']"),
    "energy": (lambda m: factorize_(m, energy=1.1), ValueError, "energy: a finite number from 0 to 1 is expected, got 1.1"),
    "energy of cp": (lambda m: factorize_(m, "2", energy=.5, form="cp"), ValueError, "energy: None for CP, which has no spectrum"),
    "budget": (lambda m: factorize_(m, "0", budget=48), ValueError, "budget: a whole number from 1 to 47 is expected, got 48"),
    "small budget": (lambda m: factorize_(m, "0", budget=13), ValueError, "budget: at least 14 numbers, for ranks of 1, is expected, got 13"),
    "small budget of cp": (lambda m: factorize_(m, "2", budget=3, form="cp"), ValueError, "budget: at least 11 numbers, for ranks of 1, is expected, got 3"),
    "form": (lambda m: factorize_(m, rank=1, form="pca"), ValueError, "form: one of 'svd', 'tucker', 'cp' is expected, got 'pca'"),
    "linear tucker": (lambda m: factorize_(m, "0", rank=1, form="tucker"), ValueError, "layers with a weight of Conv1d, Conv2d, Conv3d are expected, got '0', which is Linear"),
    "groups": (lambda m: factorize_(m, "3", rank=1), ValueError, "got '3', which is Conv2d in groups"),
    "norm": (lambda m: factorize_(m, "4", rank=1), ValueError, "got '4', which is LayerNorm"),
    "max_norm": (lambda m: factorize_(m, "5", rank=1), ValueError, "got '5', which is Embedding with max_norm"),
    "gru": (lambda m: factorize_(m, "6", rank=1), ValueError, "got '6', which is GRU"),
    "transposed": (lambda m: factorize_(m, "7", rank=1), ValueError, "got '7', which is ConvTranspose2d"),
    "unknown": (lambda m: factorize_(m, "9", rank=1), ValueError, "names: '9' matches none of 2 names"),
    "names": (lambda m: factorize_(m, 3, rank=1), TypeError, "names: a list of names or patterns is expected, got 3"),
    "no names": (lambda m: factorize_(m, [], rank=1), ValueError, "names: layers with a weight of Linear"),
    "no examples": (lambda m: factorize_(m, "0", rank=1, x=torch.ones(0, 6)), ValueError, "x: a tensor with at least one element is expected"),
    "nan examples": (lambda m: factorize_(m, "0", rank=1, x=torch.full((1, 6), torch.nan)), ValueError, "x: finite numbers are expected"),
    "list of examples": (lambda m: factorize_(m, "0", rank=1, x=[1.]), TypeError, "x: a tensor is expected"),
    "examples of tucker": (lambda m: factorize_(m, "2", rank=1, form="tucker", x=torch.ones(1, 6)), ValueError, "x: None for a form of convolutions"),
    "basis of one": (lambda m: share_basis_(m, "0", rank=1), ValueError, "names: more than one weight is expected, got ['0']"),
    "basis of kinds": (lambda m: share_basis_(m, ["0", "2"], rank=1), ValueError, "got '2', which is Conv2d"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_nothing_changes(name):
    call, error, message = BAD[name]
    model = plain()
    before, modules = copy.deepcopy(model.state_dict()), [*model.modules()]
    with pytest.raises(error) as raised: call(model)
    assert message in str(raised.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and [*model.modules()] == modules


OTHER = {
    "nan": (lambda m: m[0].weight.data.fill_(torch.nan), "0.weight: finite numbers are expected"),
    "masked": (lambda m: prune_(m, {"0.weight": torch.rand(6, 6)}, .5), "got '0.weight', computed by Mask; make_permanent_(model) first, or name other weights"),
    "normed": (lambda m: nn.utils.parametrizations.weight_norm(m[0]), "computed by _WeightNorm"),
    "view": (lambda m: setattr(m[1], "weight", nn.Parameter(m[0].weight.detach())), "several tensors over one memory"),
    "elsewhere": (lambda m: setattr(m[2], "weight", nn.Parameter(torch.ones(6, 6))) or setattr(m[2], "extra", m[0].weight), "used by LayerNorm"),
    "meta": (lambda m: setattr(m[0], "weight", nn.Parameter(torch.empty(6, 6, device="meta"))), "a weight with values"),
    "lazy": (lambda m: m.append(nn.LazyLinear(3)), "call the model once first"),
    "widths": (lambda m: m.append(nn.Linear(5, 5)), "one width, type and device for all layers is expected"),
}


@pytest.mark.parametrize("name", OTHER)
def test_weights_that_cannot_be_products_are_refused(name):
    change, message = OTHER[name]
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6))
    change(model)
    modules = [*model.modules()]
    with pytest.raises(ValueError) as raised: share_basis_(model, [n for n, m in model.named_modules() if isinstance(m, nn.Linear)], rank=2)
    assert message in str(raised.value) and [*model.modules()] == modules


def test_examples_have_to_reach_a_layer_and_to_go_one_way():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        def forward(self, x): return self.a(x)
    with pytest.raises(ValueError, match="examples that reach 'b' are expected; name other layers"): factorize_(Branch(), rank=2, x=torch.ones(3, 4))
    with pytest.raises(ValueError, match="x: examples that the model takes"): factorize_(Branch(), rank=2, x=torch.ones(3, 5))
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match="self_attn.out_proj: .*elsewhere, in multi_head_attention_forward; name other weights"):
        factorize_(encoder, rank=2, x=torch.randn(3, 5, 8))
    model = autoencoder()
    with pytest.raises(ValueError, match="x: None for '0', which is used as its transpose, too,"): factorize_(model, rank=2, x=torch.ones(3, 6))
    assert isinstance(model[0], nn.Linear)
    broken = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    broken[0].bias.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="what '1' sees of x: finite numbers"): factorize_(broken, rank=2, x=torch.ones(3, 4))
    assert not any(m._forward_hooks for m in broken.modules())


@pytest.mark.parametrize("read", [lambda x, w: F.linear(x, w), lambda x, w: x @ w.T, lambda x, w: w[:, 0] + x[:, :4]])
@pytest.mark.parametrize("call", [lambda m, x: factorize_(m, rank=2, x=x), lambda m, x: share_basis_(m, ["a", "b"], rank=2, x=x),
                                  lambda m, x: layerwise_(m, x, .5)])
def test_uses_of_a_weight_outside_of_its_layer_are_refused_with_examples(read, call):
    model, x = functional(lambda m, x: m.b(m.a(x)) + read(x, m.b.weight), a=nn.Linear(4, 4), b=nn.Linear(4, 4)), torch.randn(9, 4)
    before, modules = copy.deepcopy(model.state_dict()), [*model.modules()]
    with pytest.raises(ValueError, match="^b.*: a weight that layers alone use is expected, the model uses it elsewhere.*; name other weights"): call(model, x)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and [*model.modules()] == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_a_table_of_nothing():
    with pytest.raises(TypeError, match="a module"): factored_layers(3)


@pytest.mark.gpu
def test_gpu_equals_cpu():
    set_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(54, 5)).double(), torch.randn(40, 3, 5, 5).double()
    for options in ({"rank": 3}, {"rank": 3, "x": x}, {"rank": 2, "form": "tucker", "names": "0"}, {"rank": 2, "form": "cp", "names": "0"}):
        there = factorize_(copy.deepcopy(model).cuda(), **options | ({"x": x.cuda()} if "x" in options else {}))
        torch.testing.assert_close(there(x.cuda()).cpu(), factorize_(copy.deepcopy(model), **options)(x), atol=1e-5, rtol=1e-5)
