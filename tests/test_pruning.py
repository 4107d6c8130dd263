"The pruning module: all names of its chapters, and one function for all methods for single weights."
import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sharetie.pruning as pruning
from sharetie.checking import check_ties
from sharetie.making import tie_
from sharetie.pruning import edges, masks_of, prune_edges_, sparsity_of

METHODS = ["magnitude", "taylor", "obd", "block", "greedy", "once"]
INNER = {"Numbers", "Tracer", "plain_forward", "Probe"}  # of how units are traced and probed


@pytest.mark.parametrize("chapter", ["masks", "criteria", "surgeon", "layerwise", "trimming", "tracing", "shrinking", "nodes", "merging"])
def test_names_of_all_chapters_are_here(chapter):
    module = importlib.import_module(f"sharetie.{chapter}")
    assert {*module.__all__} - INNER <= {*pruning.__all__}
    for name in {*module.__all__} - INNER: assert getattr(pruning, name) is getattr(module, name)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)), (torch.rand(30, 8), torch.randint(4, (30,)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options, left", [({"sparsity": .75}, [24, 12]), ({"pattern": "1:4"}, [24, 12]), ({"sparsity": .5, "names": "0.weight"}, [48, 48])])
def test_every_method_prunes_as_asked(method, options, left):
    model, data = network()
    assert prune_edges_(model, data, F.cross_entropy, method=method, **options) is model
    assert sparsity_of(model)["left"].tolist()[:2] == left


@pytest.mark.parametrize("method", METHODS[:3])
def test_one_ranking_over_all(method):
    model, data = network()
    prune_edges_(model, data, F.cross_entropy, .5, method=method, scope="global")
    assert sparsity_of(model).loc["all", "left"] == 72 and sparsity_of(model)["left"].iloc[0] != 48


@pytest.mark.parametrize("method", METHODS)
def test_a_few_examples_at_a_time(method):
    (model, data), most = network(), [0]
    model.register_forward_pre_hook(lambda m, args: most.append(len(args[0])))
    whole = prune_edges_(copy.deepcopy(model), data, F.cross_entropy, .5, method=method)
    most.clear()
    some = prune_edges_(model, data, F.cross_entropy, .5, method=method, batch_size=7)
    assert max(most, default=0) == (0 if method == "magnitude" else 7)
    for name, mask in masks_of(whole).items(): assert torch.equal(mask, masks_of(some)[name])


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8, bias=False)
        tie_(self, ["table.weight", "head.weight"])

    def forward(self, x): return self.head(torch.tanh(self.body(self.table(x))))


@pytest.mark.parametrize("method", METHODS)
def test_a_tied_table_goes_once(method):
    torch.manual_seed(0)
    model, data = Words(), (torch.randint(8, (20,)), torch.randint(8, (20,)))
    prune_edges_(model, data, F.cross_entropy, .5, method=method)
    assert sparsity_of(model)["left"].tolist() == [16, 8, 24] and list(edges(model)) == ["table.weight", "body.weight"]
    check_ties(model)


BAD = [(dict(method="magnitud"), ValueError, "did you mean 'magnitude'"), (dict(method="block", scope="global"), ValueError, "compares no layers"), (dict(scope="all"), ValueError, "scope"),
       (dict(pattern="2:4"), ValueError, "one of sparsity and pattern"), (dict(sparsity=None), ValueError, "one of sparsity and pattern"), (dict(sparsity=1.), ValueError, "below 1"),
       (dict(sparsity=None, pattern="2:5"), ValueError, "multiple of 5"), (dict(data=3), TypeError, "a pair"), (dict(loss=None), TypeError, "loss: a function"),
       (dict(batch_size=0), ValueError, "batch_size: a whole number of at least 1 is expected, got 0"),
       (dict(method="block", names="*"), ValueError, "0.bias: a weight with rows and columns"),
       (dict(method="obd", loss=lambda z, y: F.cross_entropy(z, y, reduction="sum")), ValueError, "a mean over examples")]


@pytest.mark.parametrize("options, error, match", BAD)
def test_bad_input_changes_nothing(options, error, match):
    model, data = network()
    before = copy.deepcopy(model)
    with pytest.raises(error, match=match): prune_edges_(model, **({"data": data, "loss": F.cross_entropy, "sparsity": .5} | options))
    assert not masks_of(model) and all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))


def by_hand(model, x, y, method):
    "Scores from autograd and formulas, for a network of two layers with ReLU between."
    F.cross_entropy(model(x), y).backward()
    first, last = model[0].weight.detach(), model[2].weight.detach()
    if method == "magnitude": return [first.abs(), last.abs()]
    if method == "taylor": return [(w * w.grad).abs().detach() for w in (model[0].weight, model[2].weight)]
    h, p = model[0](x).relu().detach(), model(x).softmax(1).detach()
    back = p * (1 - p) / len(x)
    inner = back @ last.square() * (h > 0)
    return [inner.T @ x.square() * first.square() / 2, back.T @ h.square() * last.square() / 2]


@pytest.mark.parametrize("method", METHODS[:3])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_goes_has_the_lowest_scores_made_by_hand(method, scope):
    model, (x, y) = network()
    scores = by_hand(copy.deepcopy(model), x, y, method)
    prune_edges_(model, (x, y), F.cross_entropy, .5, method=method, scope=scope)
    kept = list(masks_of(model).values())
    if scope == "global": scores, kept = ([torch.cat([t.flatten() for t in part])] for part in (scores, kept))
    for s, m in zip(scores, kept): assert int(m.sum()) == m.numel() // 2 and s[m].min() >= s[~m].max()


WORK = {"taylor": lambda m, d: pruning.taylor(m, d, F.cross_entropy), "obd": lambda m, d: pruning.obd(m, d, F.cross_entropy), "cross": lambda m, d: pruning.obd(m, d, F.cross_entropy, cross=True),
        "calibrate": lambda m, d: pruning.calibrate(m, d[0]), "surgeon": lambda m, d: pruning.surgeon_(m, d, F.cross_entropy, 3), "layerwise": lambda m, d: pruning.layerwise_(m, d[0], .5),
        "trim": lambda m, d: pruning.trim_(m, d[0], .3, "7.weight")}


@pytest.mark.parametrize("name", WORK)
def test_statistics_modes_and_hooks_are_as_they_were(name):
    "Of a model in training, with a part of it in evaluation."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(.5), nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    data = torch.rand(20, 1, 3, 3), torch.randint(4, (20,))
    model(data[0])
    model[6].eval()
    model[7].bias.requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    WORK[name](model, data)
    assert [m.training for m in model] == [True] * 6 + [False, True]
    assert [p.requires_grad for p in model[7].parameters()].count(False) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if not hasattr(m, "_one_value"))
    kept = [n for n in before if "running" in n or "tracked" in n or not name.endswith(("surgeon", "layerwise", "trim"))]
    assert len(kept) >= 6 and all(torch.equal(model.state_dict()[n], before[n]) for n in kept)
