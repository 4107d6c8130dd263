"Routers, capacity, losses and statistics: against definitions written out, and against peers' conventions."
import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from sharetie.routing import (Balanced, ExpertChoice, Hash, NoisyTopK, Router, TopK, capacity, drop_overflow, importance_loss,
                              load_balancing_loss, load_loss, plan_rows, router_z_loss, statistics, update_biases_)
from sharetie.routing import _chance

DIM, EXPERTS = 6, 5
KINDS = {"topk": TopK, "noisy": NoisyTopK, "balanced": Balanced, "expert choice": ExpertChoice}
kinds = pytest.mark.parametrize("kind", KINDS)


def tokens(n=40, dim=DIM, seed=0, dtype=torch.float32):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(kind, k=2, **options):
    torch.manual_seed(1)
    return KINDS[kind](DIM, EXPERTS, k, **options)


def fixed(probs, k=1):
    "The routing of a top-k router that has exactly these probabilities."
    router = TopK(EXPERTS, EXPERTS, k, renormalize=False)
    with torch.no_grad(): router.gate.weight.copy_(torch.eye(EXPERTS))
    return router(probs.log())


# What all routers do

@kinds
def test_slots_are_in_the_order_of_tokens_and_the_same_on_every_run(kind):
    router = make(kind).eval()
    a, b = router(tokens()), router(tokens())
    assert (a.token.diff() >= 0).all()
    assert all(torch.equal(p, q) for p, q in zip(a[:6], b[:6]))
    assert a.counts().sum() == len(a.token) == 80
    assert a.table().shape == (40, EXPERTS)


@kinds
@pytest.mark.parametrize("k", [1, 2, EXPERTS])
def test_each_token_has_k_different_experts(kind, k):
    routing = make(kind, k)(tokens())
    assert (routing.table() > 0).sum() == 40 * k  # no expert twice
    if kind != "expert choice": assert ((routing.table() > 0).sum(-1) == k).all()
    else: assert routing.counts().tolist() == [math.ceil(40 * k / EXPERTS)] * EXPERTS


@kinds
@pytest.mark.parametrize("n", [0, 1, 3])
def test_few_tokens(kind, n):
    routing = make(kind)(tokens(n))
    plan = plan_rows(routing)
    assert len(plan.first) == n and plan.ends[-1] == routing.kept.sum()
    assert load_balancing_loss(routing).isfinite() and router_z_loss(routing).isfinite() and importance_loss(routing).isfinite()
    assert math.isfinite(statistics(routing)["usage entropy"])


@kinds
def test_a_token_that_is_not_finite_is_sent_nowhere_and_others_do_not_notice(kind):
    router, x = make(kind).eval(), tokens()
    bad = x.clone()
    bad[7, 3], bad[9, 0] = math.nan, math.inf
    routing = router(bad)
    assert not routing.kept[(routing.token == 7) | (routing.token == 9)].any()
    assert routing.bad.nonzero().flatten().tolist() == [7, 9]
    assert statistics(routing)["not finite"] == 2
    rest = [t for t in range(40) if t not in (7, 9)]
    assert torch.equal(routing.table()[rest], router(x[rest]).table())
    if kind != "expert choice": assert routing.weight[routing.token == 7].isnan().all()
    for loss in (load_balancing_loss, router_z_loss, importance_loss): assert loss(routing).isfinite()
    without = router(x[rest])
    assert load_balancing_loss(routing).item() == pytest.approx(load_balancing_loss(without).item())
    assert router_z_loss(routing).item() == pytest.approx(router_z_loss(without).item())


@kinds
def test_padding_takes_no_place_and_counts_nowhere(kind):
    router, x = make(kind).eval(), tokens()
    mask = torch.arange(40) < 30
    routing, alone = router(x, mask), router(x[:30])
    assert not routing.kept[~mask[routing.token]].any()
    assert statistics(routing)["padding"] == 10
    assert router_z_loss(routing).item() == pytest.approx(router_z_loss(alone).item())
    assert statistics(routing)["tokens"] == statistics(alone)["tokens"] and statistics(routing)["dropped"] == 0
    assert load_balancing_loss(routing).item() == pytest.approx(load_balancing_loss(alone).item())
    assert importance_loss(routing).item() == pytest.approx(importance_loss(alone).item(), rel=1e-5)
    assert torch.equal(routing.table()[:30], alone.table()) and (routing.table()[30:] == 0).all()


@kinds
def test_logits_are_in_single_precision_under_autocast_and_for_half_inputs(kind):
    router, x = make(kind).eval(), tokens().bfloat16()
    plain = router(x.float())
    assert torch.equal(router(x).logits, plain.logits)
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(router(x.float()).logits, plain.logits)
    assert make(kind, dtype=torch.float64).eval()(x.double()).logits.dtype == torch.float64


@pytest.mark.long
@kinds
def test_state_dict_copy_meta_and_compile(kind):
    router = make(kind).eval()
    other = KINDS[kind](DIM, EXPERTS).eval()
    other.load_state_dict(router.state_dict())
    assert torch.equal(other(tokens()).table(), deepcopy(router)(tokens()).table())
    assert KINDS[kind](DIM, EXPERTS, device="meta")(tokens().to("meta")).weight.is_meta
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(tokens()).table(), router(tokens()).table())


def test_bad_input_says_both_values():
    for k in (0, 6, -1):
        with pytest.raises(ValueError, match=rf"top_k: from 1 to num_experts = 5 is expected, got {k}"): TopK(DIM, 5, k)
    with pytest.raises(TypeError, match="top_k: a whole number"): TopK(DIM, 5, 1.5)
    with pytest.raises(ValueError, match="num_experts"): TopK(DIM, 0, 1)
    with pytest.raises(ValueError, match=r"x: tokens of width 6 is expected, got \(40, 5\)"): TopK(DIM, 5)(tokens(dim=5))
    with pytest.raises(ValueError, match=r"x: a tensor of 2 axes is expected, got \(2, 3, 6\)"): TopK(DIM, 5)(torch.ones(2, 3, 6))
    with pytest.raises(TypeError, match="x: a floating point tensor"): TopK(DIM, 5)(torch.ones(3, DIM, dtype=int))
    with pytest.raises(ValueError, match=r"mask: a tensor of shape \(40\) is expected, got \(39,\)"): TopK(DIM, 5)(tokens(), torch.ones(39, dtype=bool))
    with pytest.raises(TypeError, match="mask: booleans"): TopK(DIM, 5)(tokens(), torch.ones(40))
    with pytest.raises(ValueError, match="groups: a divisor of num_experts = 5 is expected, got 2"): Balanced(DIM, 5, groups=2)
    with pytest.raises(ValueError, match="top_k: at most the 2 experts"): Balanced(DIM, 6, 3, groups=3, top_groups=1)
    with pytest.raises(ValueError, match="rate"): Balanced(DIM, 6, rate=-1)
    with pytest.raises(ValueError, match="vocabulary"): Hash(DIM, 5)
    with pytest.raises(TypeError, match="ids: a tensor of whole numbers"): Hash(DIM, 5, vocabulary=9)(tokens(), ids=torch.ones(40))
    with pytest.raises(TypeError, match="model"): update_biases_(3)
    for f in (load_balancing_loss, importance_loss, load_loss, router_z_loss, statistics, plan_rows, lambda r: drop_overflow(r, 1)):
        with pytest.raises(TypeError, match="routing: a Routing, such as the attribute of a MoE after a batch, is expected, got None"): f(None)


def test_types_of_weights_and_switches():
    for router in (TopK, NoisyTopK, Balanced, ExpertChoice):
        with pytest.raises(TypeError, match="dtype: a floating point type or None is expected, got torch.int64"): router(8, 4, 2, dtype=torch.int64)
    for router in (TopK, Balanced):
        with pytest.raises(TypeError, match="renormalize: True or False is expected, got 'no'"): router(8, 4, 2, renormalize="no")


@kinds
def test_the_output_of_one_expert_trains_its_router(kind):
    router = make(kind, 1)
    (router(tokens()).weight * torch.linspace(1, 2, 40)).sum().backward()
    assert router.gate.weight.grad.abs().max() > 1e-3
    assert make(kind, 2)(tokens()).table().sum(1).allclose(torch.ones(40)) != (kind == "expert choice")


def test_renormalizing_one_weight_warns_where_there_is_a_choice():
    for router in (TopK, Balanced):
        with pytest.warns(UserWarning, match="renormalize: the one weight of a token is 1"): one = router(DIM, EXPERTS, 1, renormalize=True)
        assert torch.allclose(one(tokens()).weight, torch.ones(40)) and not router(DIM, EXPERTS, 1).renormalize
        assert router(DIM, 1, 1).renormalize and router(DIM, 1, 1, renormalize=True).renormalize and router(DIM, EXPERTS, 2).renormalize


def test_ids_outside_of_the_vocabulary_say_its_range():
    router, ids = Hash(DIM, 5, vocabulary=10), torch.arange(40) % 10
    for bad in (-1, 10, -100, 2 ** 40):
        ids[7] = bad
        with pytest.raises(ValueError, match=f"ids: from 0 to 9, as the vocabulary has them, is expected, got {bad}"): router(tokens(), ids=ids)
        padded = router(tokens(), torch.arange(40) != 7, ids)
        assert padded.kept.sum() == 78
    ids[7] = 7
    for dtype in (torch.uint8, torch.int8, torch.int32): assert torch.equal(router(tokens(), ids=ids.to(dtype)).expert, router(tokens(), ids=ids).expert)
    assert router(tokens(0), ids=ids[:0]).counts().sum() == 0
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens(), ids=ids).expert, router(tokens(), ids=ids).expert)


@kinds
def test_an_empty_batch_is_balanced(kind):
    found = statistics(make(kind)(tokens(0)))
    assert found["violation"] == 0 and found["usage entropy"] == 0 and found["tokens"] == [0] * EXPERTS


@kinds
@pytest.mark.parametrize("loss", [router_z_loss, load_balancing_loss, importance_loss])
def test_a_lost_number_in_padding_leaves_the_gradient(kind, loss):
    router, x, mask = make(kind).eval(), tokens(), torch.arange(40) != 3
    x[3, 1] = math.nan
    routing = router(x, mask)
    loss(routing).backward()
    assert router.gate.weight.grad.isfinite().all() and router.gate.weight.grad.any()
    assert statistics(routing)["padding"] == 1 and statistics(routing)["not finite"] == 0


def test_a_checkpoint_of_another_number_of_experts_says_both():
    with pytest.raises(RuntimeError, match=r"\[5, 6\].*\[4, 6\]"): TopK(DIM, 4).load_state_dict(TopK(DIM, 5).state_dict())


# Each router

def test_top_k_is_the_softmax_of_the_largest_logits():
    x, router = tokens(dtype=torch.float64), TopK(DIM, EXPERTS, 3, dtype=torch.float64)
    logits = x @ router.gate.weight.mT
    value, index = logits.topk(3, -1)
    expected = torch.zeros(40, EXPERTS, dtype=torch.float64).scatter(-1, index, value.softmax(-1))
    assert torch.allclose(router(x).table(), expected)
    raw = TopK(DIM, EXPERTS, 3, renormalize=False, dtype=torch.float64)
    raw.load_state_dict(router.state_dict())
    assert torch.allclose(raw(x).table(), torch.where(expected > 0, logits.softmax(-1), 0))


def test_all_experts_renormalized_is_the_dense_softmax():
    router = TopK(DIM, EXPERTS, EXPERTS)
    assert torch.allclose(router(tokens()).table(), (tokens() @ router.gate.weight.mT).softmax(-1))


def test_the_expected_load_is_the_chance_of_being_chosen():
    torch.manual_seed(0)
    router = NoisyTopK(DIM, EXPERTS, 2)
    x = tokens(1).expand(20000, DIM)
    routing = router(x)
    assert torch.allclose(routing.load / 20000, routing.counts() / 20000, atol=.02)
    clean, noisy, size = (torch.randn(3, EXPERTS, dtype=torch.float64) for _ in range(3))
    chance = _chance(clean, noisy, size.abs(), 2)
    for t in range(3):
        for e in range(EXPERTS):
            rival = sorted((noisy[t, i].item() for i in range(EXPERTS) if i != e), reverse=True)[1]
            assert chance[t, e].item() == pytest.approx(.5 * (1 + math.erf((clean[t, e] - rival) / size.abs()[t, e] / 2 ** .5)))


def test_noise_has_a_gradient_and_load_loss_too():
    torch.manual_seed(0)
    router = NoisyTopK(DIM, EXPERTS)
    load_loss(router(tokens())).backward()
    assert router.spread.weight.grad.abs().sum() > 0 and router.gate.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="an expected load"): load_loss(router.eval()(tokens()))
    with pytest.raises(ValueError, match="an expected load"): load_loss(TopK(DIM, EXPERTS)(tokens()))


def test_the_bias_counts_for_the_choice_and_not_for_the_weight():
    router, x = Balanced(DIM, EXPERTS, 2, rate=1.), tokens()
    scores = (x @ router.gate.weight.mT).sigmoid()
    router.bias[3] = 5.
    table = router(x).table()
    assert (table[:, 3] > 0).all()
    assert torch.allclose(table, torch.where(table > 0, scores, 0) / torch.where(table > 0, scores, 0).sum(-1, keepdim=True))


def test_the_bias_moves_by_the_sign_and_only_when_told():
    router = Balanced(DIM, 4, 1, rate=.25)
    before = router.bias.clone()
    router.observe(torch.tensor([10, 0, 6, 4]))
    assert torch.equal(router.bias, before)
    router.update_()
    assert router.bias.tolist() == [-.25, .25, -.25, .25]
    assert router.load.tolist() == [0] * 4
    assert "load" not in router.state_dict() and "bias" in router.state_dict()


def test_the_bias_balances_a_skewed_router():
    torch.manual_seed(0)
    router = Balanced(8, 16, 2, rate=.02)
    with torch.no_grad(): router.gate.weight[0] += 2 * torch.ones(8)
    x = tokens(512, 8) + .5
    start = statistics(router(x))["violation"]
    for _ in range(300):
        router.observe(router(x).counts())
        router.update_()
    assert statistics(router(x))["violation"] < .5 < 1 < start


def test_groups_limit_where_a_token_goes():
    router = Balanced(DIM, 8, 3, groups=4, top_groups=2)
    table = router(tokens()).table().unflatten(-1, (4, 2))
    assert ((table > 0).any(-1).sum(-1) <= 2).all()
    scores = (tokens() @ router.gate.weight.mT).sigmoid().unflatten(-1, (4, 2)).sum(-1)
    best = scores.topk(2, -1).indices
    inside = torch.zeros(40, 4, dtype=bool).scatter(-1, best, True)
    assert not (table > 0)[~inside].any()


def test_expert_choice_takes_the_best_tokens_of_each_column():
    router = ExpertChoice(DIM, EXPERTS, 2)
    probs = (tokens() @ router.gate.weight.mT).softmax(-1)
    table = router(tokens()).table()
    for e in range(EXPERTS):
        assert set(table[:, e].nonzero().flatten().tolist()) == set(probs[:, e].topk(16).indices.tolist())
    assert torch.allclose(table[table > 0], probs[table > 0])


def test_who_is_causal():
    x, changed = tokens(), torch.cat([tokens()[:20], tokens(20, seed=5)])
    for kind in ("topk", "balanced"):
        router = make(kind)
        assert torch.equal(router(x).table()[:20], router(changed).table()[:20])
    assert not torch.equal(make("expert choice")(x).table()[:20], make("expert choice")(changed).table()[:20])


@pytest.mark.parametrize("k", [1, 3, 5])
def test_hash_is_balanced_over_words_and_fixed(k):
    router, ids = Hash(DIM, 5, k, vocabulary=40, seed=3), torch.arange(40)
    routing = router(tokens(), ids=ids)
    assert routing.counts().tolist() == [8 * k] * 5
    assert ((routing.table() > 0).sum(-1) == k).all()
    assert torch.equal(router.experts, Hash(DIM, 5, k, vocabulary=40, seed=3).experts)
    assert not torch.equal(router.experts, Hash(DIM, 5, k, vocabulary=40, seed=4).experts) or k == 5
    assert torch.allclose(routing.table().sum(-1), torch.ones(40))
    for loss, name in ((load_balancing_loss, "probabilities"), (router_z_loss, "logits")):
        with pytest.raises(ValueError, match=name): loss(routing)


# Capacity and the plan

def test_capacity_is_rounded_up_from_the_exact_number():
    assert [capacity(*given) for given in ((100, 10, 1, 1.1), (10, 1, 1, 1.1), (101, 10, 1, 1.1), (60, 3, 2, 1), (0, 3, 2, 1.5))] == [11, 11, 12, 40, 0]
    for n in range(1, 300):
        for tenths in range(10, 30): assert capacity(n, 7, 3, tenths / 10) == -(-tenths * n * 3 // 70)


def dropped_by_hand(routing, room, drop):
    "Which slots are kept, one after the other."
    before = [sum(1 for j in range(i) if routing.token[j] == t) for i, t in enumerate(routing.token)]
    key = before if drop == "position" else (-routing.weight).tolist()
    kept, full = [False] * len(before), [0] * routing.num_experts
    for i in sorted(range(len(before)), key=lambda i: (key[i], i)):
        e = routing.expert[i]
        if routing.kept[i] and full[e] < room:
            kept[i] = True
            full[e] += 1
    return kept


@pytest.mark.parametrize("drop", ["position", "weight"])
@pytest.mark.parametrize("room", [1, 7, 16, 80])
def test_overflow_is_dropped_as_documented(drop, room):
    mask = torch.arange(40) % 7 != 3
    routing = make("topk")(tokens(), mask)
    limited = drop_overflow(routing, room, drop)
    assert limited.kept.tolist() == dropped_by_hand(routing, room, drop)
    assert statistics(limited)["dropped"] == (routing.counts() - room).clamp(min=0).sum()
    assert torch.equal(limited.weight, routing.weight)
    assert load_balancing_loss(limited) == load_balancing_loss(routing)


def test_room_and_bad_capacity():
    assert capacity(40, 5, 2, 1) == 16 and capacity(41, 5, 2, 1.25) == math.ceil(1.25 * 82 / 5)
    for bad in (.99, 0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="capacity_factor: a finite number of at least 1 is expected, got"): capacity(40, 5, 2, bad)
    with pytest.raises(ValueError, match="num_tokens: a whole number of at least 0 is expected, got -5"): capacity(-5, 5, 2, 1)
    with pytest.raises(ValueError, match="num_experts: a whole number of at least 1 is expected, got 0"): capacity(5, 0, 2, 1)
    with pytest.raises(ValueError, match="top_k: from 1 to num_experts = 5 is expected, got 0"): capacity(5, 5, 0, 1)
    with pytest.raises(TypeError, match="num_tokens: a whole number is expected, got 'a'"): capacity("a", 5, 2, 1)
    assert capacity(0, 5, 2, 1) == 0
    with pytest.raises(ValueError, match="room"): drop_overflow(make("topk")(tokens()), 0)
    with pytest.raises(ValueError, match="did you mean 'weight'"): drop_overflow(make("topk")(tokens()), 3, "weights")


@kinds
def test_the_plan_loses_no_slot(kind):
    mask = torch.arange(40) % 5 != 0
    routing = drop_overflow(make(kind)(tokens(), mask), 9)
    plan = plan_rows(routing)
    assert sorted(plan.slot.tolist()) == list(range(len(routing.token)))
    assert torch.equal(plan.row[plan.slot], torch.arange(len(plan.slot)))
    assert plan.ends[-1] == routing.kept.sum()
    begin = 0
    for e, end in enumerate(plan.ends.tolist()):
        slots = plan.slot[begin:end]
        assert (routing.expert[slots] == e).all() and routing.kept[slots].all() and (slots.diff() > 0).all()
        begin = end
    assert torch.equal(plan.first, torch.searchsorted(routing.token, torch.arange(40)))


# Losses

@pytest.mark.parametrize("k", [1, 2])
def test_balance_is_one_at_uniform_routing_and_the_number_of_experts_at_collapse(k):
    even = torch.full((EXPERTS, EXPERTS), .1 / (EXPERTS - 2))
    for t in range(EXPERTS): even[t, t], even[t, (t + 1) % EXPERTS] = .5, .4
    assert load_balancing_loss(fixed(even, k)).item() == pytest.approx(1, abs=1e-6)
    one = torch.full((8, EXPERTS), 1e-9)
    one[:, 2] = 1
    assert load_balancing_loss(fixed(one, 1)).item() == pytest.approx(EXPERTS, abs=1e-5)


def test_balance_is_that_of_transformers_up_to_k():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    router, x = TopK(DIM, EXPERTS, 2), tokens()
    routing = router(x)
    theirs = mixtral.load_balancing_loss_func((routing.logits,), EXPERTS, 2)
    assert load_balancing_loss(routing).item() == pytest.approx(theirs.item() / 2, rel=1e-5)


def test_the_gradient_of_balance_is_that_of_the_mean_probability_alone():
    router, x = TopK(DIM, EXPERTS, 2, dtype=torch.float64), tokens(dtype=torch.float64)
    routing = router(x)
    load_balancing_loss(routing).backward()
    weight = router.gate.weight.detach().clone().requires_grad_()
    share = routing.counts() / 80
    (EXPERTS * (share * (x @ weight.mT).softmax(-1).mean(0)).sum()).backward()
    assert torch.allclose(router.gate.weight.grad, weight.grad)


def test_z_loss_of_constant_logits():
    probs = torch.full((7, EXPERTS), math.exp(2.))
    assert router_z_loss(fixed(probs)).item() == pytest.approx((2 + math.log(EXPERTS)) ** 2, rel=1e-5)
    router, x = TopK(DIM, EXPERTS, dtype=torch.float64), tokens(dtype=torch.float64)
    assert router_z_loss(router(x)).item() == pytest.approx((x @ router.gate.weight.mT).logsumexp(-1).square().mean().item())


def test_importance_counts_dropped_slots_and_no_padding():
    routing = make("topk")(tokens(), torch.arange(40) < 30)
    limited = drop_overflow(routing, 5)
    assert importance_loss(limited).item() == importance_loss(routing).item() and limited.counts().sum() < 60
    assert importance_loss(routing).item() == pytest.approx(importance_loss(make("topk")(tokens()[:30])).item())


def test_importance_is_the_squared_coefficient_of_variation():
    routing = make("topk")(tokens())
    sums = routing.table().sum(0)
    assert importance_loss(routing).item() == pytest.approx((sums.var(correction=0) / sums.mean() ** 2).item(), rel=1e-5)


def test_statistics_of_a_known_table():
    probs = torch.tensor([[.6, .1, .1, .1, .1]] * 3 + [[.1, .6, .1, .1, .1]])
    found = statistics(fixed(probs))
    assert found["tokens"] == [3, 1, 0, 0, 0]
    assert found["violation"] == pytest.approx(3 / .8 - 1)
    assert found["usage entropy"] == pytest.approx(-.75 * math.log(.75) - .25 * math.log(.25))
    assert found["token entropy"] == pytest.approx(-.6 * math.log(.6) - .4 * math.log(.1), rel=1e-5)
    assert found["dropped"] == found["not finite"] == found["padding"] == 0


def test_a_router_of_ones_own():
    class First(Router):
        def route(self, x, mask, ids): return TopK.route(self, x, mask, ids)
    mine = First(DIM, EXPERTS, 1)
    mine.renormalize = True
    assert mine(tokens()).counts().sum() == 40
    assert F.one_hot(mine(tokens()).expert, EXPERTS).sum() == 40
