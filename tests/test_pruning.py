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
       (dict(method="obd", loss=lambda z, y: F.cross_entropy(z, y, reduction="sum")), ValueError, "a mean over examples")]


@pytest.mark.parametrize("options, error, match", BAD)
def test_bad_input_changes_nothing(options, error, match):
    model, data = network()
    before = copy.deepcopy(model)
    with pytest.raises(error, match=match): prune_edges_(model, **({"data": data, "loss": F.cross_entropy, "sparsity": .5} | options))
    assert not masks_of(model) and all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))
