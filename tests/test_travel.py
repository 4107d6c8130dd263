"What travel costs, against counting rank by rank."
import pytest

from sharetie.travel import Machine, Travel, travel_cost

SIZES = {"tokens": 64, "dim": 16, "hidden": 32, "top_k": 4}


def by_hand(ranks, near, tokens, dim, top_k, itemsize):
    "Bytes of rank 0 with every expert equally likely: each rank gets the same share of its rows, four times."
    share = tokens * top_k / ranks * dim * itemsize * 4
    return sum(share for rank in range(1, ranks) if rank < near), sum(share for rank in range(1, ranks) if rank >= near)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16, 64, 1024])
@pytest.mark.parametrize("itemsize", [1.5, 4])
def test_bytes_are_those_of_counting(ranks, itemsize):
    cost = travel_cost(ranks, **SIZES, itemsize=itemsize)
    assert (cost.inside, cost.outside) == pytest.approx(by_hand(ranks, 8, 64, 16, 4, itemsize))


def test_times_are_bytes_and_operations_by_rates():
    machine = Machine(per_node=4, inside=100, outside=10, rate=1000, latency=0)
    cost = travel_cost(16, **SIZES, machine=machine)
    assert cost.travel == max(cost.inside / 100, cost.outside / 10)
    assert cost.work == pytest.approx(3 * 2 * 3 * 64 * 4 * 16 * 32 / 1000)  # three times the products of three matrices
    assert cost.ratio == cost.travel / cost.work
    later = travel_cost(16, **SIZES, machine=machine._replace(latency=2))
    assert later.travel == pytest.approx(cost.travel + 4 * 15 * 2)
    assert travel_cost(1, **SIZES).travel == 0


@pytest.mark.parametrize("ranks", [8, 64, 512])
def test_at_the_even_width_travel_is_work(ranks):
    machine = Machine(rate=1e15)
    even = travel_cost(ranks, **SIZES, machine=machine).even
    assert travel_cost(ranks, **SIZES | {"hidden": max(1, round(even))}, machine=machine).ratio == pytest.approx(1, rel=.05)


def test_without_latency_tokens_width_and_experts_per_token_do_not_matter():
    machine = Machine(latency=0)
    ratio = travel_cost(64, **SIZES, machine=machine).ratio
    for change in ({"tokens": 9}, {"dim": 100}, {"top_k": 1}): assert travel_cost(64, **SIZES | change, machine=machine).ratio == pytest.approx(ratio)
    assert travel_cost(64, **SIZES | {"hidden": 64}, machine=machine).ratio == pytest.approx(ratio / 2)


def test_a_limit_on_nodes():
    free, few = travel_cost(64, **SIZES), travel_cost(64, **SIZES, nodes=2)
    assert few.outside == pytest.approx(4 * 64 * 16 * 2 * 2 * 7 / 8)  # two of eight nodes, one of eight times its own
    assert few.outside < free.outside and few.inside > free.inside
    assert travel_cost(8, **SIZES, nodes=2) == travel_cost(8, **SIZES)
    assert travel_cost(64, **SIZES, nodes=99) == travel_cost(64, **SIZES, nodes=4)  # no more nodes than experts
    assert isinstance(few, Travel)


def test_bad_input():
    for name in SIZES:
        with pytest.raises(ValueError, match=f"{name}: a whole number of at least 1 is expected, got 0"): travel_cost(8, **SIZES | {name: 0})
    with pytest.raises(TypeError, match="ranks: a whole number is expected, got 2.5"): travel_cost(2.5, **SIZES)
    with pytest.raises(TypeError, match="machine: a Machine is expected, got 3"): travel_cost(8, **SIZES, machine=3)
    for name in Machine._fields:
        with pytest.raises(ValueError, match=f"machine.{name}: "): travel_cost(8, **SIZES, machine=Machine(**{name: -1}))
    for name in ("inside", "outside", "rate"):
        with pytest.raises(ValueError, match=f"machine.{name}: a finite number above 0 is expected, got 0"): travel_cost(8, **SIZES, machine=Machine(**{name: 0}))
    with pytest.raises(ValueError, match="itemsize: a finite number above 0 is expected, got 0"): travel_cost(8, **SIZES, itemsize=0)
    for ranks in (8, 64):
        with pytest.raises(ValueError, match="nodes: a whole number of at least 1 is expected, got 0"): travel_cost(ranks, **SIZES, nodes=0)
