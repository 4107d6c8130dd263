"Masks on weights: what they keep out, whom they follow, what they live through, how they are chosen, bad input."
import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from sharetie.binding import keep_ties
from sharetie.checking import check_ties
from sharetie.finding import find_ties
from sharetie.masks import (Gradual, Mask, edges, gradual_sparsity, magnitude, make_permanent_, mask_, masks_of, prune_, random_scores, sparsity_of,
                            thresholds)
from sharetie.saving import load_model, save_model
from sharetie.train import fit
from tied import Convs, Speaker, autoencoder, reused


def plain(): return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


MODELS = {"words": (partial(Speaker, words=12, width=4), lambda: torch.randint(12, (3, 5))), "twice": (Convs, lambda: torch.rand(2, 2, 4, 4)), "reused": (reused, lambda: torch.rand(3, 4)),
          "autoencoder": (partial(autoencoder, 5, 3), lambda: torch.rand(3, 5)), "plain": (plain, lambda: torch.rand(3, 6))}
OPTIMIZERS = {"momentum": lambda p: torch.optim.SGD(p, .1, momentum=.9, weight_decay=.1), "nesterov": lambda p: torch.optim.SGD(p, .1, momentum=.9, nesterov=True),
              "adam": lambda p: torch.optim.Adam(p, .1), "adamw": lambda p: torch.optim.AdamW(p, .1), "rmsprop": lambda p: torch.optim.RMSprop(p, .01, momentum=.5)}


@pytest.fixture(params=MODELS)
def model_and_input(request):
    torch.manual_seed(0)
    make, x = MODELS[request.param]
    return make(), x()


def draw(model, part=.4): return {name: torch.rand(w.shape) > part for name, w in edges(model).items()}


def steps(model, x, optimizer, n=4):
    for _ in range(n):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


# What a mask does

def test_the_output_is_that_of_zeros_written_by_hand(model_and_input):
    model, x = model_and_input
    by_hand, masks = copy.deepcopy(model), draw(model)
    with torch.no_grad():
        for name, mask in masks.items(): dict(by_hand.named_parameters(remove_duplicate=False))[name].mul_(mask)
    held = list(map(id, model.parameters()))
    assert mask_(model, masks) is model
    assert torch.equal(model(x), by_hand(x)) and sorted(map(id, model.parameters())) == sorted(held)
    check_ties(model)


def test_gradients_are_those_of_the_masked_function(model_and_input):
    "By finite differences in the entries that are left, zero in the others; a shared weight sums over its uses."
    model, x = model_and_input
    model.double()
    x = x.double() if x.is_floating_point() else x
    mask_(model, draw(model))
    model(x).square().mean().backward()
    stored = {id(p): p for p in model.parameters()}
    for name, mask in masks_of(model).items():
        place = next(p for n, p in model.named_parameters() if n.replace("parametrizations.", "").replace(".original", "") == name)
        assert (place.grad[~mask] == 0).all() and id(place) in stored
        for at in mask.nonzero()[:3].tolist():
            h, found = 1e-6, []
            for sign in (1, -1):
                with torch.no_grad():
                    place[tuple(at)] += sign * h
                    found.append(model(x).square().mean().item())
                    place[tuple(at)] -= sign * h
            assert place.grad[tuple(at)].item() == pytest.approx((found[0] - found[1]) / 2 / h, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_brings_a_weight_back(name, model_and_input):
    model, x = model_and_input
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, x, optimizer)
    prune_(model, magnitude(model), .5)
    before = {n: w.clone() for n, w in edges(model).items()}
    steps(model, x, optimizer)
    for n, w in edges(model).items():
        mask = masks_of(model)[n]
        assert (w[~mask] == 0).all() and not torch.equal(w[mask], before[n][mask])
    check_ties(model, optimizer)


def test_training_with_masks_is_training_the_weights_that_are_left():
    "Against a loop that puts zeros back, with an optimizer without memory."
    torch.manual_seed(1)
    model, x = plain(), torch.rand(5, 6)
    by_hand, masks = copy.deepcopy(model), draw(model)
    mask_(model, masks)
    one, two = (torch.optim.SGD(m.parameters(), .3) for m in (model, by_hand))
    for _ in range(5):
        with torch.no_grad():
            for n, mask in masks.items(): by_hand.get_parameter(n).mul_(mask)
        steps(model, x, one, 1), steps(by_hand, x, two, 1)
    with torch.no_grad():
        for n, mask in masks.items(): by_hand.get_parameter(n).mul_(mask)
    torch.testing.assert_close(model(x), by_hand(x))


def test_a_mask_over_a_mask_only_takes_out_more():
    model = plain()
    first, second = draw(model), draw(model)
    mask_(mask_(model, first), second)
    for n, mask in masks_of(model).items(): assert torch.equal(mask, first[n] & second[n])


def test_what_is_nan_and_masked_is_zero():
    model = nn.Linear(2, 1)
    mask_(model, {"weight": torch.tensor([[True, False]])})
    with torch.no_grad(): model.parametrizations.weight.original[0, 1] = math.nan
    assert model(torch.ones(1, 2)).isfinite().all()


# Ties

def test_one_parameter_is_scored_counted_and_masked_once():
    model = Speaker(words=12, width=4)
    assert list(magnitude(model)) == ["table.weight", "body.weight"] and list(edges(model, "head.weight")) == ["table.weight"]
    prune_(model, {"head.weight": magnitude(model)["table.weight"]}, .25)
    assert (model.table.weight == 0).sum() == (model.head.weight == 0).sum() == 12 and model.table.weight.shape == (12, 4)
    assert sparsity_of(model).loc["all", "size"] == 12 * 4 + 4 * 4
    assert len({id(p) for p in model.parameters()}) == 3
    kept = copy.deepcopy(model)
    with pytest.raises(ValueError, match="one entry for 'table.weight', which has several names"):
        prune_(model, {"head.weight": torch.rand(12, 4), "table.weight": torch.rand(12, 4)}, .5)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), kept.state_dict().values()))


def test_a_mapped_member_sees_the_pruned_source():
    model = autoencoder(5, 3)
    prune_(model, magnitude(model), .5)
    torch.testing.assert_close(model[2].weight, model[0].weight.T)
    assert (model[2].weight == 0).sum() == round(.5 * 15)
    assert find_ties(model)[0].how == "map"
    check_ties(model)


def test_a_pseudo_tie_is_refused():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = nn.Parameter(a.weight.detach())
    model = nn.Sequential(a, b)
    with pytest.raises(ValueError, match=r"shares its memory with another Parameter; retie_\(model\) makes them one first"): prune_(model, {"0.weight": torch.rand(3, 3)}, .5)
    assert not masks_of(model)


# What masks live through

def test_copies_pickles_and_state_dicts(model_and_input):
    model, x = model_and_input
    mask_(model, draw(model))
    y = model(x)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), y) and {n: m.tolist() for n, m in masks_of(copied).items()} == {n: m.tolist() for n, m in masks_of(model).items()}
    with torch.no_grad():
        for p in copied.parameters(): p.zero_()
    assert torch.equal(model(x), y), "a copy has numbers of its own"
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    copied.load_state_dict(torch.load(file))
    assert torch.equal(copied(x), y)
    check_ties(copied)


def test_files_hold_each_number_once(model_and_input, tmp_path):
    model, x = model_and_input
    fresh = copy.deepcopy(model)
    prune_(model, magnitude(model), .5)
    save_model(model, tmp_path / "masked")
    mask_(fresh, {n: torch.ones(w.shape, dtype=torch.bool) for n, w in edges(fresh).items()})
    load_model(fresh, tmp_path / "masked")
    assert torch.equal(fresh(x), model(x))
    check_ties(fresh)
    stored = sum(p.nbytes for p in model.parameters()) + sum(m.nbytes for m in masks_of(model).values())
    assert (tmp_path / "masked").stat().st_size < stored + 4096


def test_casts_moves_and_kept_ties():
    model = Speaker(words=12, width=4)
    keep_ties(model)
    prune_(model, magnitude(model), .5)
    x = torch.randint(12, (2, 3))
    model.double()
    assert model(x).dtype == torch.float64 and (model.head.weight == 0).sum() == 24
    model.to("meta")
    assert model.head.weight.is_meta and masks_of(model)["table.weight"].is_meta


@pytest.mark.long
def test_compile_and_gradients(model_and_input):
    model, x = model_and_input
    prune_(model, magnitude(model), .5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for call in (model, compiled):
        model.zero_grad()
        y = call(x)
        y.square().sum().backward()
        if call is model: expected = y.detach(), [p.grad.clone() for p in model.parameters()]
    torch.testing.assert_close(y.detach(), expected[0])
    for p, g in zip(model.parameters(), expected[1]): torch.testing.assert_close(p.grad, g)


def test_under_autocast():
    model = plain()
    prune_(model, magnitude(model), .5)
    with torch.autocast("cpu", dtype=torch.bfloat16): y = model(torch.rand(3, 6))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


def test_permanent_zeros_have_the_names_of_before(model_and_input):
    model, x = model_and_input
    names, parameters = {*model.state_dict()}, sorted(map(id, model.parameters()))
    prune_(model, magnitude(model), .5)
    y, masks = model(x), masks_of(model)
    assert make_permanent_(model) is model and not masks_of(model)
    assert {*model.state_dict()} == names and sorted(map(id, model.parameters())) == parameters
    assert torch.equal(model(x), y)
    check_ties(model)
    again = mask_(model, {n: w != 0 for n, w in edges(model).items()})
    for n, mask in masks_of(again).items(): assert torch.equal(mask, masks[n])


def test_permanent_after_training(model_and_input):
    "What drifted behind the mask is not let out."
    model, x = model_and_input
    optimizer = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    steps(model, x, optimizer)
    prune_(model, magnitude(model), .5)
    steps(model, x, optimizer)
    y = model(x)
    make_permanent_(model)
    assert torch.equal(model(x), y)


# How entries are chosen

@settings(max_examples=60, deadline=None)
@given(some.integers(0, 10**6), some.floats(0, .99), some.sampled_from(["layer", "global"]), some.booleans())
def test_the_lowest_go(seed, sparsity, scope, equal):
    torch.manual_seed(seed)
    model = plain()
    scores = {n: (torch.randint(3, w.shape).float() if equal else torch.rand(w.shape)) for n, w in edges(model).items()}
    prune_(model, scores, sparsity, scope=scope)
    masks = masks_of(model)
    groups = [[n] for n in scores] if scope == "layer" else [list(scores)]
    for group in groups:
        s, m = (torch.cat([t[n].flatten() for n in group]) for t in (scores, masks))
        assert (~m).sum() == round(sparsity * len(m))
        if m.any() and (~m).any(): assert s[m].min() >= s[~m].max()


def test_sparsity_means_all_that_is_out():
    model = plain()
    prune_(model, magnitude(model), .3)
    before = masks_of(model)
    before = {n: m.clone() for n, m in before.items()}
    prune_(model, random_scores(model), .6)
    for n, m in masks_of(model).items():
        assert (~m).sum() == round(.6 * m.numel()) and not (m & ~before[n]).any()


@pytest.mark.parametrize("pattern, n, m", [("2:4", 2, 4), ("1:2", 1, 2)])
def test_patterns(pattern, n, m):
    model = nn.Conv2d(4, 3, 2)
    scores = {"weight": torch.rand(model.weight.shape)}
    prune_(model, scores, pattern=pattern)
    mask, s = (t["weight"].movedim(1, -1).reshape(-1, m) for t in (masks_of(model), scores))  # along the input channels
    assert (mask.sum(1) == n).all()
    for row, own in zip(mask, s): assert own[row].min() >= own[~row].max()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm, name", [(nn.utils.weight_norm, "weight_g"), (nn.utils.weight_norm, "weight_v"), (nn.utils.spectral_norm, "weight_orig")])
def test_what_a_norm_is_computed_from_is_no_weight_to_prune(norm, name):
    model = nn.Sequential(norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    for names in (None, f"0.{name}"):
        with pytest.raises(ValueError, match=r"0.weight_\w+: is what (Weight|Spectral)Norm computes 'weight' from; name other weights"): edges(model, names)
    assert list(edges(model, "1.weight")) == ["1.weight"]


def test_thresholds_follow_the_deviation():
    model = plain()
    found = thresholds(model, 1.5)
    for n, w in edges(model).items(): assert found[n] == pytest.approx(1.5 * w.std(correction=0).item(), rel=1e-5)
    prune_(model, magnitude(model), threshold=found)
    for n, w in edges(model).items(): assert (w[masks_of(model)[n]].abs() >= found[n]).all()


def test_random_scores_are_those_of_the_seed():
    model = plain()
    a, b, c = random_scores(model, seed=1), random_scores(model, seed=1), random_scores(model, seed=2)
    assert all(torch.equal(a[n], b[n]) and not torch.equal(a[n], c[n]) for n in a)


@given(some.integers(0, 50), some.integers(1, 20), some.integers(0, 10), some.floats(.1, .95))
def test_the_schedule_rises_from_start_to_end(step, count, start, final):
    now, next_ = (gradual_sparsity(t, final, count, start) for t in (step, step + 1))
    assert 0 <= now <= next_ <= final + 1e-12
    if step <= start: assert now == 0
    if step >= start + count: assert now == pytest.approx(final)


def test_gradual_pruning_in_fit():
    torch.manual_seed(0)
    model, x = plain(), torch.rand(20, 6)
    schedule = Gradual(model, .8, steps=10, start=2, every=3)
    fit(model, (x, torch.randint(4, (20,))), nn.functional.cross_entropy, epochs=4, batch_size=5, after_step=schedule, progress=False)
    assert sparsity_of(model).loc["all", "sparsity"] == pytest.approx(.8, abs=.02)


# Bad input

BAD = {
    "no module": (lambda m: prune_(3, {}, .5), TypeError, "model: a module is expected, got int"),
    "no scores": (lambda m: prune_(m, {}, .5), ValueError, "scores: at least one weight is expected, got {}"),
    "a list": (lambda m: prune_(m, [1], .5), TypeError, "scores: a dictionary of tensors by name is expected"),
    "unknown": (lambda m: prune_(m, {"0.wieght": torch.rand(8, 6)}, .5), ValueError, "did you mean '0.weight'"),
    "shape": (lambda m: prune_(m, {"0.weight": torch.rand(6, 8)}, .5), ValueError, "scores['0.weight']: a tensor of shape (8, 6) is expected, got (6, 8)"),
    "nan": (lambda m: prune_(m, {"0.weight": torch.full((8, 6), math.nan)}, .5), ValueError, "NaN or infinite"),
    "one nan after a good one": (lambda m: prune_(m, {"0.weight": torch.rand(8, 6), "2.weight": torch.full((4, 8), math.nan)}, .5), ValueError, "NaN or infinite"),
    "whole numbers": (lambda m: prune_(m, {"0.weight": torch.ones(8, 6).long()}, .5), TypeError, "scores['0.weight']: a floating point tensor is expected"),
    "all": (lambda m: prune_(m, magnitude(m), 1.), ValueError, "sparsity: a part of at least 0 and below 1 is expected, got 1.0"),
    "negative": (lambda m: prune_(m, magnitude(m), -.1), ValueError, "sparsity: a finite number of at least 0 is expected, got -0.1"),
    "percent": (lambda m: prune_(m, magnitude(m), 50), ValueError, "sparsity: a part of at least 0 and below 1 is expected, got 50"),
    "two ways": (lambda m: prune_(m, magnitude(m), .5, threshold=.1), ValueError, "one of sparsity, threshold and pattern is expected, got ['sparsity', 'threshold']"),
    "no way": (lambda m: prune_(m, magnitude(m)), ValueError, "one of sparsity, threshold and pattern is expected, got 'none'"),
    "scope": (lambda m: prune_(m, magnitude(m), .5, scope="all"), ValueError, "scope: one of 'layer', 'global' is expected, got 'all'"),
    "pattern": (lambda m: prune_(m, magnitude(m), pattern="4:2"), ValueError, 'pattern: n of m neighbours, such as "2:4", is expected, got \'4:2\''),
    "row": (lambda m: prune_(m, magnitude(m), pattern="2:4"), ValueError, "pattern: '0.weight' with a second axis whose length is a multiple of 4 is expected, got (8, 6)"),
    "threshold": (lambda m: prune_(m, magnitude(m), threshold={"0.weight": 1.}), ValueError, "threshold: a number for '2.weight' too is expected, got ['0.weight']"),
    "no digits": (lambda m: prune_(m, magnitude(m), pattern="²:4"), ValueError, "pattern: n of m neighbours"),
    "mask": (lambda m: mask_(m, {"0.weight": torch.ones(8, 6)}), TypeError, "masks['0.weight']: a tensor of bool is expected"),
    "bias": (lambda m: edges(m, ["0.bais"]), ValueError, "the nearest is '0.bias'"),
    "names": (lambda m: edges(m, 3), TypeError, "names: a list of names or patterns is expected, got 3"),
    "q": (lambda m: thresholds(m, -1), ValueError, "q: a finite number of at least 0 is expected, got -1"),
    "schedule": (lambda m: gradual_sparsity(1, .3, 10, initial=.5), ValueError, "initial: at most final=0.3 is expected, got 0.5"),
    "gradual": (lambda m: Gradual(m, .5, 0), ValueError, "steps: a whole number of at least 1 is expected, got 0"),
    "nothing to prune": (lambda m: edges(nn.ReLU()), ValueError, "names: at least one weight with two axes or more is expected, got []"),
    "lstm": (lambda m: edges(nn.LSTM(2, 3)), ValueError, "weight_ih_l0: belongs to LSTM, which reads its weights from a list of its own"),
    "normed": (lambda m: edges(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), "weight"), ValueError, "weight: is computed by _WeightNorm already"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_nothing_changes(name):
    call, error, message = BAD[name]
    model = plain()
    before, modules = copy.deepcopy(model.state_dict()), [*map(type, model.modules())]
    with pytest.raises(error) as raised: call(model)
    assert message in str(raised.value)
    assert list(model.state_dict()) == list(before) and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [*map(type, model.modules())] == modules and not masks_of(model)


def test_a_layer_that_loses_all_gives_a_warning():
    model = plain()
    scores = {"0.weight": torch.zeros(8, 6), "2.weight": torch.ones(4, 8)}
    with pytest.warns(UserWarning, match=r"nothing is left of \['0.weight'\]"): prune_(model, scores, 48 / 80, scope="global")


def test_a_mask_needs_bools():
    with pytest.raises(TypeError, match="mask: a tensor of bool is expected"): Mask(torch.ones(2))
    assert pickle.loads(pickle.dumps(Mask(torch.tensor([True, False])))).mask.tolist() == [True, False]


def test_many_weights_are_masked_in_one_look_at_the_model(monkeypatch):
    "The time goes with the number of weights, not with its square."
    import sharetie.masks as masks
    looks, real = [], masks.find_ties
    monkeypatch.setattr(masks, "find_ties", lambda m: (looks.append(1), real(m))[1])
    counts = []
    for layers in (2, 12):
        looks.clear()
        model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(layers)])
        prune_(model, {f"{i}.weight": torch.rand(2, 2) for i in range(layers)}, .5)
        counts.append(len(looks))
    assert counts[0] == counts[1]


def test_a_failure_on_the_way_undoes_all(monkeypatch):
    import sharetie.masks as masks
    model, calls, real = plain(), [], masks._attach
    before = copy.deepcopy(model.state_dict())
    def failing(*args):
        calls.append(1)
        if len(calls) == 2: raise MemoryError
        return real(*args)
    monkeypatch.setattr(masks, "_attach", failing)
    with pytest.raises(MemoryError): prune_(model, magnitude(model), .5)
    assert list(model.state_dict()) == list(before) and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_script_is_refused():
    model = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="weight: belongs to a script"): prune_(model, {"weight": torch.rand(2, 2)}, .5)


def test_a_table_with_sparse_gradients_is_refused():
    model = nn.Embedding(5, 3, sparse=True)
    with pytest.raises(ValueError, match="weight: belongs to a table with sparse gradients"): prune_(model, {"weight": torch.rand(5, 3)}, .5)
    assert not masks_of(model)


# Against others

@pytest.mark.parametrize("scope", ["layer", "global"])
def test_torch_takes_out_the_same_where_nothing_is_shared(scope):
    from torch.nn.utils import prune as theirs
    torch.manual_seed(0)
    model = plain()
    other = copy.deepcopy(model)
    prune_(model, magnitude(model), .6, scope=scope)
    layers = [(other[0], "weight"), (other[2], "weight")]
    if scope == "global": theirs.global_unstructured(layers, theirs.L1Unstructured, amount=.6)
    else: [theirs.l1_unstructured(*layer, .6) for layer in layers]
    for own, (layer, _) in zip(masks_of(model).values(), layers): assert torch.equal(own, layer.weight_mask.bool())
    assert torch.equal(model(torch.ones(1, 6)), other(torch.ones(1, 6)))


@given(some.integers(0, 30), some.integers(1, 20), some.integers(0, 10), some.floats(.5, .95), some.floats(0, .4))
def test_what_is_still_to_go_falls_with_the_cube_of_the_steps_left(step, count, start, final, initial):
    left = (final - gradual_sparsity(step, final, count, start, initial)) / (final - initial)
    steps_left = min(max(count + start - step, 0), count)
    assert left * count ** 3 == pytest.approx(steps_left ** 3, abs=1e-6)
