"Ten schemes within one study: the same budget for all, the same bits for one seed, masks from validation data alone, bad input."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sharetie.comparison as comparison
from sharetie.comparison import SCHEMES, Study, train_scheme
from sharetie.multitask import Hard, TaskLosses, pooled
from sharetie.sparse import kept

TASKS = ("a", "b")


def trunk(): return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
def heads(): return {task: nn.Linear(6, 2) for task in TASKS}


def data(n=30, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=draw)
    return x, {"a": (x[:, 0] > 0).long(), "b": (x[:, 1] > 0).long()}


def study(**options):
    parts = {"trunk": trunk, "heads": heads, "losses": TaskLosses(dict.fromkeys(TASKS, F.cross_entropy)), "train": data(), "valid": data(seed=1), "epochs": 10, "batch_size": 10}
    return Study(**(parts | options))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_takes_as_many_steps_for_its_model(scheme, monkeypatch):
    "Of the final model's own training, and of what it began with; the search of sparse sharing is on top."
    taken = []
    def fit(model, *args, epochs, **options):
        taken.append((model, epochs))
        return original(model, *args, epochs=epochs, **options)
    original = comparison.fit
    monkeypatch.setattr(comparison, "fit", fit)
    model = train_scheme(scheme, study(), 3)
    if scheme == "sparse":
        *search, (last, epochs) = taken
        assert last is model and epochs == 10 and len(search) == 2 * 4 and {e for _, e in search} == {10}
    else: assert sum(epochs for _, epochs in taken) == 10 and taken[-1][0] is model


@pytest.mark.long
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_seed_gives_the_same_bits_and_learns(scheme):
    once, again, other = (train_scheme(scheme, study(), seed) for seed in (1, 1, 2))
    for p, q in zip(once.state_dict().values(), again.state_dict().values(), strict=True): assert torch.equal(p, q)
    assert any(p.shape != q.shape or not torch.equal(p, q) for p, q in zip(once.state_dict().values(), other.state_dict().values()))
    losses, (x, y) = study().losses, study().train
    fresh = train_scheme(scheme, study(epochs=2, rate=1e-6), 1)
    with torch.no_grad(): assert losses.total(once(x), y) < losses.total(fresh(x), y)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_labels_on_pictures_of_their_own(scheme):
    x, y = data(40)
    model = train_scheme(scheme, study(train=tuple(pooled({"a": (x[:20], y["a"][:20]), "b": (x[20:], y["b"][20:])})), batch_size=None), 0)
    assert all(out.isfinite().all() for out in model(x).values())


def test_hard_sharing_is_that_of_the_loop():
    from sharetie.results import set_seed
    from sharetie.train import fit
    found = train_scheme("hard", study(), 4)
    set_seed(4)
    by_hand = Hard(trunk(), heads())
    fit(by_hand, data(), study().losses.total, optimizer=torch.optim.Adam(by_hand.parameters(), .01), epochs=10, batch_size=10, seed=4, progress=False)
    for p, q in zip(found.parameters(), by_hand.parameters(), strict=True): assert torch.equal(p, q)


@pytest.mark.long
def test_masks_are_chosen_on_validation_data():
    "Labels of validation that are wrong about one task change the choice of masks, and labels that are right again do not."
    right = train_scheme("sparse", study(), 0)
    same = train_scheme("sparse", study(valid=data(seed=1)), 0)
    assert all(torch.equal(p, q) for p, q in zip(right.masks.state_dict().values(), same.masks.state_dict().values(), strict=True))
    assert kept(right) < kept(train_scheme("hard", study(), 0))
    x, y = data(seed=1)
    wrong = [train_scheme("sparse", study(valid=(x, y | {"a": 1 - y["a"]})), seed) for seed in range(3)]
    rights = [train_scheme("sparse", study(), seed) for seed in range(3)]
    assert any(not torch.equal(p, q) for a, b in zip(wrong, rights) for p, q in zip(a.masks.state_dict().values(), b.masks.state_dict().values()))


@pytest.mark.parametrize("options, error, message", [
    ({"trunk": 3}, TypeError, "trunk: a function of nothing is expected, got 3"),
    ({"heads": lambda task: None}, TypeError, "heads: a function of nothing is expected"),
    ({"losses": {}}, TypeError, "losses: TaskLosses is expected, got dict"),
    ({"train": data()[0]}, TypeError, "train: a pair of inputs and labels by task is expected"),
    ({"valid": (1, 2)}, TypeError, "valid: a pair of inputs and labels by task is expected"),
    ({"epochs": 1}, ValueError, "epochs: a whole number of at least 2 is expected, got 1"),
    ({"batch_size": 0}, ValueError, "batch_size: a whole number of at least 1 is expected, got 0"),
    ({"rate": 0.}, ValueError, "rate: a finite number above 0 is expected, got 0.0"),
])
def test_a_study_refuses(options, error, message):
    with pytest.raises(error) as raised: study(**options)
    assert message in str(raised.value)


def test_a_scheme_that_is_not_there_and_a_trunk_without_stages():
    with pytest.raises(ValueError, match="scheme: one of .* is expected, got 'hart'; did you mean 'hard'"): train_scheme("hart", study())
    with pytest.raises(TypeError, match="study: a Study is expected, got str"): train_scheme("hard", "study")
    with pytest.raises(ValueError, match="seed: a whole number of at least 0 is expected, got -1"): train_scheme("hard", study(), -1)
    with pytest.raises(TypeError, match="trunk: an nn.Sequential, between whose stages tasks can meet"): train_scheme("cross-stitch", study(trunk=lambda: nn.Linear(5, 6)))
