"Experts divided over two processes against one process: values, gradients, training, files, and bad input."
import copy
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from processes import in_two_processes
from sharetie.moe import MoE, merge_experts
from sharetie.parallel import (ParallelExperts, average_copies_, clip_gradients_, data_parallel, expert_parameters, load_sharded_optimizer_state_dict,
                               parallel_experts_, sharded_optimizer_state_dict, sharded_state_dict, totals, whole_model)
from sharetie.routing import Balanced, Hash, NoisyTopK, TopK, importance_loss, load_balancing_loss, load_loss, router_z_loss, statistics, update_biases_
from sharetie.saving import load_model, save_model
from sharetie.train import fit

DIM, HIDDEN, EXPERTS, TOKENS = 8, 12, 6, 40
EVEN = (20, 20)
CASES = {  # what is not as usual: options of the layer, "split" of the tokens, "mask", "dtype", "skew", "ids"
    **{f"top {k}": {"top_k": k} for k in range(1, EXPERTS + 1)},
    **{router: {"router": router} for router in ("balanced", "noisy", "expert choice")},
    "hash": {"ids": True}, "shared experts": {"shared_experts": 2}, "bias": {"bias": True, "expert": "gelu"},
    "uneven": {"split": (37, 3)}, "first rank without tokens": {"split": (0, 40)}, "second rank without tokens": {"split": (40, 0)},
    "no tokens": {"split": (0, 0)}, "one token": {"split": (1, 0), "top_k": 1}, "second rank without rows": {"skew": True, "bias": True},
    "mask": {"mask": True, "split": (25, 15)}, "capacity": {"capacity_factor": 1., "split": (25, 15)},
    "capacity by weight, mask": {"capacity_factor": 1.25, "drop": "weight", "mask": True, "bias": True},
    "segments": {"execution": "segments", "dtype": torch.float32}, "grouped": {"execution": "grouped", "dtype": torch.float32, "split": (30, 10)},
    "grouped, capacity": {"execution": "grouped", "dtype": torch.float32, "capacity_factor": 1.}}
cases = pytest.mark.parametrize("name", CASES)


def numbers(n=TOKENS, dtype=torch.float64, seed=0):
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(seed=1, **options):
    torch.manual_seed(seed)
    options = {"num_experts": EXPERTS, "top_k": 2, "dtype": torch.float64} | options
    return MoE(DIM, HIDDEN, **options)


def case(name):
    "A layer, and what each rank gets."
    options = dict(CASES[name])
    split, mask, skew, ids = (options.pop(key, usual) for key, usual in {"split": EVEN, "mask": False, "skew": False, "ids": False}.items())
    if ids: options["router"] = Hash(DIM, EXPERTS, 2, vocabulary=TOKENS)
    layer = make(**options).eval()
    x, n = numbers(dtype=options.get("dtype", torch.float64)), sum(split)
    if skew:
        x = x.abs()
        with torch.no_grad(): layer.router.gate.weight[3:] = -9
    given = {"mask": (torch.arange(n) % 4 != 1).split(split) if mask else [None] * 2, "ids": torch.arange(n).split(split) if ids else [None] * 2}
    return layer, x[:n].split(split), [{key: value[rank] for key, value in given.items()} for rank in range(2)]


def step(layer, x, given):
    "Outputs and gradients for a loss that weighs everything differently, as arrays."
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x, **given)
    (y * torch.linspace(-1, 1, DIM, dtype=y.dtype) * (x.detach() + 2)).sum().backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in layer.named_parameters()}
    return {key: value.detach().clone().numpy() for key, value in {"y": y, "x": x.grad, **grads}.items()}


def all_cases():
    "Every case on this rank: gradients in sum, and for one case averaged."
    rank, found = dist.get_rank(), {}
    for name in CASES:
        layer, parts, given = case(name)
        parallel_experts_(layer, average=False)
        found[name] = step(layer, parts[rank], given[rank])
        again = step(layer, parts[rank], given[rank])
        assert all((found[name][key] == again[key]).all() for key in again), name  # the same bits
        def recomputed(x, **given): return checkpoint(layer, x, use_reentrant=False, **given)
        recomputed.zero_grad, recomputed.named_parameters = layer.zero_grad, layer.named_parameters
        again = step(recomputed, parts[rank], given[rank])
        assert all((found[name][key] == again[key]).all() for key in again), name
    layer, parts, given = case("uneven")
    parallel_experts_(layer)
    return found, step(layer, parts[rank], given[rank])


@pytest.fixture(scope="module")
def on_two(tmp_path_factory): return in_two_processes(all_cases, tmp_path_factory.mktemp("cases"))


def joined(a, b):
    "Rows and experts of one rank after those of the other, and the sum of what both have."
    return {key: np.concatenate([a[key], b[key]]) if key in ("y", "x") or key.startswith("experts") else a[key] + b[key] for key in a}


def assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for key in found: np.testing.assert_allclose(found[key], expected[key], err_msg=key, **tolerance)


@cases
def test_outputs_and_gradients_are_those_of_one_process(on_two, name):
    layer, parts, given = case(name)
    alone = [step(layer, *each) for each in zip(parts, given)]
    expected = {key: np.concatenate([a[key] for a in alone]) if key in ("y", "x") else sum(a[key] for a in alone) for key in alone[0]}
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if layer.experts.w_in.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    assert_close(joined(*(rank[0][name] for rank in on_two)), expected, **tolerance)
    if name.startswith("top") and parts[0].shape == parts[1].shape:  # and of one batch
        assert_close(step(layer, torch.cat(parts), {}), expected, rtol=1e-9, atol=1e-12)


def test_averaged_gradients_of_experts_are_half_the_sum_and_others_are_the_same(on_two):
    for cases, averaged in on_two:
        for key, value in averaged.items():
            np.testing.assert_allclose(value, cases["uneven"][key] / (2 if key.startswith("experts") else 1), rtol=1e-9)


def test_with_one_rank_without_rows_its_experts_have_gradient_zero(on_two):
    assert all((value == 0).all() for key, value in on_two[1][0]["second rank without rows"].items() if key.startswith("experts"))


# Half precision and NaN

def odd_input():
    "Under autocast, in half precision, and with a token that is not a number."
    rank, found = dist.get_rank(), {}
    layer, x = make(dtype=torch.float32), numbers(dtype=torch.float32).split(EVEN)[rank]
    parallel_experts_(layer, average=False)
    with torch.autocast("cpu", torch.bfloat16): found["autocast"] = step_of(layer, x)
    found["half"] = step_of(copy.deepcopy(layer).bfloat16(), x.bfloat16())
    if rank: x[3, 2] = torch.nan
    found["nan"] = layer(x).detach().numpy(), statistics(layer.routing), totals(layer.routing).statistics()
    try: layer(x.double())
    except TypeError as error: found["error"] = str(error)
    return found


def step_of(layer, x):
    "Output and the gradient of the experts' first matrices."
    layer.zero_grad()
    y = layer(x)
    y.float().square().sum().backward()
    return y.dtype == torch.bfloat16, y.detach().float().numpy(), layer.experts.w_in.grad.float().numpy()


def test_half_precision_and_what_is_not_a_number(tmp_path):
    first, second = in_two_processes(odd_input, tmp_path)
    layer, x = make(dtype=torch.float32), numbers(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16): expected = {"autocast": step_of(layer, x)}
    expected["half"] = step_of(copy.deepcopy(layer).bfloat16(), x.bfloat16())
    for way, (low, y, grad) in expected.items():
        assert low and first[way][0] and second[way][0]
        np.testing.assert_allclose(np.concatenate([first[way][1], second[way][1]]), y, atol=2e-2)
        np.testing.assert_allclose(np.concatenate([first[way][2], second[way][2]]), grad, atol=.1, rtol=.1)
    x[23, 2] = torch.nan
    y = layer(x).detach().numpy()
    np.testing.assert_allclose(np.concatenate([first["nan"][0], second["nan"][0]]), y, atol=1e-6)
    assert np.isnan(y).any(1).nonzero()[0].tolist() == [23]
    assert first["nan"][1]["not finite"] == 0 and second["nan"][1]["not finite"] == 1
    assert first["nan"][2] == second["nan"][2] and first["nan"][2]["tokens"] == statistics(layer.routing)["tokens"]
    assert first["nan"][2]["not finite"] == 1
    assert first["error"] == "x: tokens of torch.float32, as the experts are, is expected, got torch.float64"


# With the rest of a model

class Net(nn.Module):
    "Two layers with residuals between linear maps."
    def __init__(self, router="balanced"):
        super().__init__()
        torch.manual_seed(4)
        self.first, self.last = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.layers = nn.ModuleList(MoE(DIM, HIDDEN, 4, 2, router=router, shared_experts=1) for _ in range(2))

    def forward(self, x):
        h = self.first(x)
        for layer in self.layers: h = h + layer(h)
        return self.last(h)


def train(model, layers, x, y, steps=4, copies=None):
    "Some steps with a loss for balance, a norm that clips, and a bias that balances; the norms."
    optimizer, norms = torch.optim.SGD(model.parameters(), .3), []
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        loss = loss + .1 * sum(totals(layer.routing).load_balancing_loss() + totals(layer.routing).router_z_loss() for layer in layers)
        optimizer.zero_grad()
        loss.backward()
        if copies is not None: average_copies_(model, copies)
        norms.append(clip_gradients_(model, .2).item())
        optimizer.step()
        update_biases_(model)
    return norms


def data(): return numbers(dtype=torch.float32), numbers(dtype=torch.float32, seed=1)


def with_the_rest(wrap):
    "The state of one process's model after training in two."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    rank, (x, y), net, copies = dist.get_rank(), data(), Net(), None
    if rank and "DDP" in wrap: nn.init.zeros_(net.first.weight)  # DDP takes that of rank 0
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "experts"))
    if wrap == "copies": copies = mesh["copies"]
    parallel_experts_(net, mesh["experts"] if wrap == "copies" else None)
    if wrap == "FSDP2": model = fully_shard(net, ignored_params={*expert_parameters(net).values()})
    else: model = nn.parallel.DistributedDataParallel(net) if wrap == "plain DDP" else data_parallel(net)
    norms = train(model, net.layers, x[rank::2], y[rank::2], copies=copies)
    if wrap != "FSDP2": state = whole_model(net).state_dict()
    else: state = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in sharded_state_dict(net).items()}
    return {name: p.numpy() for name, p in state.items()}, norms


@pytest.mark.parametrize("wrap", ["DDP", "plain DDP", "FSDP2", "copies"])
def test_a_model_trains_on_two_processes_as_on_one(tmp_path, wrap):
    net, (x, y) = Net(), data()
    norms = train(net, net.layers, x, y)
    assert norms[0] > .2  # it clips
    for state, found in in_two_processes(with_the_rest, tmp_path, wrap):
        np.testing.assert_allclose(found, norms, rtol=1e-4)
        assert_close(state, {name: p.numpy() for name, p in net.state_dict().items()}, rtol=1e-3, atol=1e-5)


def wrapped_elsewhere():
    "What the first batch says in DDP around more or less than the model that was divided, and which experts DDP leaves alone."
    rank, x, found = dist.get_rank(), numbers(dtype=torch.float32), {}
    for name, part in {"more": lambda net: nn.Sequential(net), "less": lambda net: net.layers[0]}.items():
        net = Net()
        parallel_experts_(net)
        before = net.layers[0].experts.w_in.detach().clone()
        model = nn.parallel.DistributedDataParallel(part(net))
        try: model(x[rank::2])
        except ValueError as error: found[name] = str(error)
        net = Net()
        parallel_experts_(net)
        data_parallel(part(net))(x[rank::2]).sum().backward()
        assert torch.equal(net.layers[0].experts.w_in, before) and net.layers[0].experts.w_in.grad.any(), name
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(net)), nn.parallel.DistributedDataParallel(whole_model(net))
    return found, [sorted(name for name in each.parameters_to_ignore if "experts.w" in name) for each in wrapped]


def test_ddp_around_more_or_less_than_was_divided_says_so_on_all_ranks(tmp_path):
    said = "model: data_parallel around it (DDP put one rank's experts in the place of all) is expected, got DistributedDataParallel"
    for found, (divided, whole) in in_two_processes(wrapped_elsewhere, tmp_path):
        assert found == {"more": said, "less": said}
        assert divided == [f"layers.{i}.experts.w_{way}" for i in range(2) for way in ("in", "out")] and whole == []


def test_what_was_noted_for_ddp_stays(one_process):
    net = nn.Sequential(nn.Linear(DIM, DIM), make(router="balanced", bias=True))
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["0.bias"])
    parallel_experts_(net)
    for model in (data_parallel(net), nn.parallel.DistributedDataParallel(net)):
        assert model.parameters_to_ignore == {"0.bias", "1.router.load", *expert_parameters(net)}
    assert nn.parallel.DistributedDataParallel(whole_model(net)).parameters_to_ignore == {"0.bias", "1.router.load"}


def half_by_fsdp():
    "Three steps of one process's model in bfloat16, its blocks wrapped one by one: losses, and the dtypes and values of the experts."
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    rank, (x, y), net, losses = dist.get_rank(), data(), Net(), []
    parallel_experts_(net)
    options = {"ignored_params": {*expert_parameters(net).values()}, "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
    for block in net.layers: fully_shard(block, **options)
    model, optimizer = fully_shard(net, **options), torch.optim.SGD(net.parameters(), .1)
    for _ in range(3):
        out = model(x[rank::2])
        loss = (out.float() - y[rank::2]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        dtypes = {out.dtype, *(part.computed_in(out) for part in net.modules() if isinstance(part, ParallelExperts))}
        masters = {t.dtype for p in expert_parameters(net).values() for t in (p, p.grad)}
        optimizer.step()
        losses.append(loss.item())
    try: net.layers[0].experts.computed_in(x.double())
    except TypeError as error: said = str(error)
    return losses, dtypes, masters, said, {name: p.detach().numpy() for name, p in expert_parameters(net).items()}


def test_fsdp_computes_in_half_precision_while_experts_stay_in_single(tmp_path):
    net, (x, y), expected = Net(), data(), []
    optimizer = torch.optim.SGD(net.parameters(), .1)
    for _ in range(3):
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    found = in_two_processes(half_by_fsdp, tmp_path)
    np.testing.assert_allclose(np.mean([rank[0] for rank in found], 0), expected, rtol=2e-2)
    for losses, dtypes, masters, said, values in found:
        assert dtypes == {torch.bfloat16} and masters == {torch.float32}
        assert said == "x: tokens of torch.float32, as the experts are, is expected, got torch.float64"
    for name, value in found[0][4].items():
        np.testing.assert_allclose(np.concatenate([value, found[1][4][name]]), net.get_parameter(name).detach().numpy(), atol=1e-2)


# Sums over ranks

LOSSES = {"load_balancing_loss": load_balancing_loss, "importance_loss": importance_loss, "router_z_loss": router_z_loss, "load_loss": load_loss}


def routed(router, x, mask):
    torch.manual_seed(0)
    made = {"topk": TopK, "noisy": NoisyTopK, "balanced": Balanced}[router](DIM, EXPERTS, 2, dtype=torch.float64)
    if router == "noisy": made.eval()
    return made, made(x, mask)


def batch(nan):
    "Tokens and which of them count; one is not finite, if asked for."
    x, mask = numbers(), torch.arange(TOKENS) % 5 != 0
    if nan: x[6, 0] = torch.nan
    return x, mask


def sums(router, nan):
    "Losses, their gradients and the statistics of a rank's part."
    x, mask = batch(nan)
    part = slice(0, 27) if dist.get_rank() == 0 else slice(27, None)
    made, routing = routed(router, x[part], mask[part])
    total, found = totals(routing), {}
    for name in [*LOSSES][:3]:
        loss = getattr(total, name)()
        found[name] = loss.item(), torch.autograd.grad(loss, made.gate.weight, retain_graph=True)[0].numpy()
    return found, total.statistics()


def same_statistics(a, b):
    return a.keys() == b.keys() and a["tokens"] == b["tokens"] and all(a[key] == pytest.approx(b[key]) for key in a if key != "tokens")


@pytest.mark.parametrize("router, nan", [("topk", False), ("topk", True), ("balanced", False), ("noisy", False)])
def test_totals_are_those_of_the_whole_batch(tmp_path, router, nan):
    made, routing = routed(router, *batch(nan))
    found = in_two_processes(sums, tmp_path, router, nan)
    for name in [*LOSSES][:3]:
        expected = LOSSES[name](routing)
        assert [rank[0][name][0] for rank in found] == pytest.approx([expected.item()] * 2)
        if nan: continue
        grad = torch.autograd.grad(expected, made.gate.weight, retain_graph=True)[0].numpy()
        np.testing.assert_allclose(sum(rank[0][name][1] for rank in found) / 2, grad, rtol=1e-7, atol=1e-10)  # as DDP averages
    for _, statistic in found: assert same_statistics(statistic, statistics(routing)) and statistic["not finite"] == nan


def test_totals_without_other_processes():
    torch.manual_seed(0)
    router = NoisyTopK(DIM, EXPERTS, 2, dtype=torch.float64)
    routing = router(numbers())
    total = totals(routing)
    for name, loss in LOSSES.items(): assert getattr(total, name)().item() == pytest.approx(loss(routing).item())
    assert same_statistics(total.statistics(), statistics(routing))
    hashed = totals(Hash(DIM, EXPERTS, 2, vocabulary=9)(numbers(9), ids=torch.arange(9)))
    assert "token entropy" not in hashed.statistics()
    for name, what in {"load_balancing_loss": "probabilities", "router_z_loss": "logits", "load_loss": "an expected load"}.items():
        with pytest.raises(ValueError, match=f"routing: one with {what}"): getattr(hashed, name)()
    with pytest.raises(TypeError, match="routing: a Routing, such as the attribute of a MoE after a batch, is expected, got None"): totals(None)


class Largest(TorchDispatchMode):
    "The most numbers in any result."
    most = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        self.most = max([self.most, *(t.numel() for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, torch.Tensor))])
        return out


def test_totals_need_no_table_of_all_slots():
    torch.manual_seed(0)
    routing = TopK(DIM, 16, 8)(numbers(dtype=torch.float32))
    with Largest() as seen: totals(routing).importance_loss().backward()
    assert seen.most == TOKENS * (16 + 1)  # a column for what nobody chose


def stages():
    "Biases of two stages of a pipeline with different numbers of routers, and of all routers: how often ranks met, and the signs."
    rank, met, reduce = dist.get_rank(), [], dist.all_reduce
    groups = [dist.new_group([r]) for r in range(2)]
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    stage, model = (nn.ModuleList(Balanced(DIM, 2, 1) for _ in range(n)) for n in (1 + rank, 3))
    def counted(x, **options): return met.append(len(x)) or reduce(x, **options)
    dist.all_reduce, found = counted, []
    try:
        for routers, group in ((stage, groups[rank]), (model, None), (model, mesh)):
            for i, router in enumerate(routers): router.observe(torch.tensor([4 * rank + i, 1 + i]))  # in sum more on the first, but on rank 0
            update_biases_(routers, group)
            found.append([(router.bias.sign().tolist(), router.load.sum().item()) for router in routers])
    finally: dist.all_reduce = reduce
    return met, found


def test_biases_of_a_stage_are_moved_by_one_exchange_in_its_group(tmp_path):
    first, second = in_two_processes(stages, tmp_path)
    assert first == ([2, 6, 6], [[([1, -1], 0)], *[[([-1, 1], 0)] * 3] * 2])
    assert second == ([4, 6, 6], [[([-1, 1], 0)] * 2, *[[([-1, 1], 0)] * 3] * 2])


# Files

def other_net(): return nn.Sequential(nn.Linear(DIM, DIM), MoE(DIM, HIDDEN, 4, 2, shared_experts=1, bias=True))


def files(folder):
    "Load what one process saved, and save."
    torch.manual_seed(dist.get_rank() + 7)
    for way in ("file", "parts", "state"):
        net = other_net()
        if way == "file": load_model(net, folder / "one.safetensors")
        parallel_experts_(net)
        if way == "parts": dcp.load(sharded_state_dict(net), checkpoint_id=str(folder / "one"))
        if way == "state": net.load_state_dict(torch.load(folder / "one.pt"))
        whole = whole_model(net)
        assert torch.equal(whole(numbers(dtype=torch.float32)), torch.load(folder / "y.pt")), way
        assert not any(isinstance(part, ParallelExperts) for part in whole.modules()) and net[1].experts.w_in.shape[0] == 2
    own = net.state_dict()  # a rank's own part, as it is
    net.load_state_dict(own)
    with torch.no_grad():
        for p in expert_parameters(net).values(): p.mul_(2)
    whole = whole_model(net)
    if dist.get_rank() == 0: save_model(whole, folder / "two.safetensors")
    dcp.save(sharded_state_dict(net), checkpoint_id=str(folder / "two"))
    return whole(numbers(dtype=torch.float32)).detach().numpy()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_saved_by_one_loaded_by_two_and_back(tmp_path):
    net = other_net()
    torch.save(net(numbers(dtype=torch.float32)).detach(), tmp_path / "y.pt")
    save_model(net, tmp_path / "one.safetensors")
    torch.save(net.state_dict(), tmp_path / "one.pt")
    dcp.save(net.state_dict(), checkpoint_id=str(tmp_path / "one"), no_dist=True)
    first, second = in_two_processes(files, tmp_path, tmp_path)
    assert (first == second).all()
    for way in ("file", "parts"):
        net = other_net()
        if way == "file": load_model(net, tmp_path / "two.safetensors")
        else: dcp.load(net.state_dict(), checkpoint_id=str(tmp_path / "two"), no_dist=True)
        np.testing.assert_allclose(net(numbers(dtype=torch.float32)).detach().numpy(), first, rtol=1e-5, atol=1e-6)


def state_of_the_first(folder):
    "What each rank says to the state of the first one's part, to that of its own and to one that does not say whose it is."
    torch.manual_seed(dist.get_rank())
    said, net = [], other_net()
    parallel_experts_(net)
    own = net.state_dict()
    if dist.get_rank() == 0:
        torch.save(own, folder / "first.pt")
        save_model(net, folder / "first.safetensors")
    dist.barrier()
    net.load_state_dict(own)
    net.load_state_dict(sharded_state_dict(net))
    for load in (lambda: net.load_state_dict(torch.load(folder / "first.pt")), lambda: load_model(net, folder / "first.safetensors"),
                 lambda: net.load_state_dict({name: p for name, p in own.items() if "_extra" not in name})):
        before = [p.detach().clone() for p in net.parameters()]
        try: load()
        except ValueError as error: said.append(str(error))
        assert not said or all(map(torch.equal, before[2:], net[1].parameters()))
        assert not said or len(said) != 2 or torch.equal(before[0], net[0].weight)  # `load_model` changes all or nothing
    return said


def test_the_part_of_another_rank_is_refused(tmp_path):
    first, second = in_two_processes(state_of_the_first, tmp_path, tmp_path)
    asked = "1.experts.w_in: a state of all experts, or of experts {}, is expected, got '{}'"
    unknown = "a part that does not say which"
    assert first == [asked.format("0 to 1 of 4", unknown)]
    assert second == [asked.format("2 to 3 of 4", "experts 0 to 1 of 4")] * 2 + [asked.format("2 to 3 of 4", unknown)]


def with_adam(net):
    "Two groups of parameters, the experts by themselves."
    experts = [p for name, p in net.named_parameters() if "experts" in name]
    rest = [p for name, p in net.named_parameters() if "experts" not in name]
    return torch.optim.Adam([{"params": experts, "lr": .02}, {"params": rest}], .01, eps=1e-3)


def steps(model, optimizer, x, y, n):
    for _ in range(n):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def resumed(wrap, folder):
    "A third step after two of one process; the whole model, and this rank's moments after they were saved and loaded."
    from torch.distributed.fsdp import fully_shard
    rank, (x, y), net = dist.get_rank(), data(), Net("topk")
    nn.init.zeros_(net.first.weight)
    parallel_experts_(net)
    model = data_parallel(net) if wrap == "DDP" else fully_shard(net, ignored_params={*expert_parameters(net).values()})
    optimizer = with_adam(net)
    model(x).sum().backward()  # a state can be loaded all the same
    for group in optimizer.param_groups: group["lr"] = 9.
    def load(name, optimizer):
        state = {"model": sharded_state_dict(net), "optimizer": sharded_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=str(folder / name))
        load_sharded_optimizer_state_dict(model, optimizer, state["optimizer"])
    load("one", optimizer)
    steps(model, optimizer, x[rank::2], y[rank::2], 1)
    dcp.save({"model": sharded_state_dict(net), "optimizer": sharded_optimizer_state_dict(model, optimizer)}, checkpoint_id=str(folder / wrap))
    again = with_adam(net)
    load(wrap, again)
    for p in expert_parameters(net).values():
        assert all(torch.equal(optimizer.state[p][key], again.state[p][key]) and type(again.state[p][key]) is torch.Tensor for key in ("exp_avg", "exp_avg_sq"))
    return {name: p.full_tensor().numpy() if hasattr(p, "full_tensor") else p.numpy() for name, p in sharded_state_dict(net).items()}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("wrap", ["DDP", "FSDP2"])
def test_an_optimizer_goes_on_two_processes_and_back_on_one(tmp_path, wrap):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    net, (x, y) = Net("topk"), data()
    optimizer = with_adam(net)
    steps(net, optimizer, x, y, 2)
    dcp.save({"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=str(tmp_path / "one"), no_dist=True)
    steps(net, optimizer, x, y, 1)
    for state in in_two_processes(resumed, tmp_path, wrap, tmp_path):
        assert_close(state, {name: p.numpy() for name, p in net.state_dict().items()}, rtol=1e-4, atol=1e-6)
    other = Net("topk")
    back = with_adam(other)
    state = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, back)}
    dcp.load(state, checkpoint_id=str(tmp_path / wrap), no_dist=True)
    set_optimizer_state_dict(other, back, state["optimizer"])
    for each in ((net, optimizer), (other, back)): steps(*each, x, y, 1)
    for p, q in zip(net.parameters(), other.parameters()): torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6)


def interrupted(folder):
    "Three epochs at once and in two parts; then what is said where the ranks' files are exchanged."
    rank, (x, y) = dist.get_rank(), data()
    def run(epochs, name):
        net = Net("topk")
        parallel_experts_(net)
        fit(data_parallel(net), (x[rank::2], y[rank::2]), F.mse_loss, epochs=epochs, checkpoint=folder / name, progress=False)
        return whole_model(net).state_dict()
    through, _, again = (run(*each) for each in ((3, "through.pt"), (1, "parts.pt"), (3, "parts.pt")))
    assert all(torch.equal(p, again[name]) for name, p in through.items())
    state = (folder / f"parts.rank{1 - rank}.pt").read_bytes()
    dist.barrier()
    (folder / f"parts.rank{rank}.pt").write_bytes(state)
    try: run(4, "parts.pt")
    except ValueError as error: return str(error)


def test_fit_goes_on_from_the_files_of_ranks(tmp_path):
    asked = "module.layers.0.experts.w_in: a state of all experts, or of experts {} to {} of 4, is expected, got 'experts {} to {} of 4'"
    assert in_two_processes(interrupted, tmp_path, tmp_path) == [asked.format(0, 1, 2, 3), asked.format(2, 3, 0, 1)]


def test_states_of_optimizers(one_process):
    layer = make()
    parallel_experts_(layer)
    layer(numbers()).sum().backward()
    own = layer.experts.w_in
    for kind, options in ((torch.optim.SGD, {"momentum": .9}), (torch.optim.SGD, {}), (torch.optim.RMSprop, {}), (torch.optim.Adafactor, {})):
        optimizer = kind(layer.parameters(), .1, **options)
        optimizer.step()
        state = sharded_optimizer_state_dict(layer, optimizer)
        shapes = {key: tuple(t.shape) for key, t in optimizer.state[own].items() if isinstance(t, torch.Tensor)} if optimizer.state else {}
        found = state["state"].get("experts.w_in", {})
        assert {key: tuple(t.shape) for key, t in found.items() if isinstance(t, torch.Tensor)} == shapes
        assert all(type(t).__name__ == "DTensor" for t in found.values() if isinstance(t, torch.Tensor) and t.ndim)
    optimizer.state[own]["row_var"] = torch.zeros(5)
    with pytest.raises(ValueError, match=rf"optimizer: row_var of experts.w_in: one row for each of {EXPERTS} experts is expected, got \(5,\)"):
        sharded_optimizer_state_dict(layer, optimizer)
    with pytest.raises(TypeError, match="model: a module is expected, got None"): sharded_optimizer_state_dict(None, optimizer)
    with pytest.raises(TypeError, match="optimizer: a torch optimizer is expected, got 3"): sharded_optimizer_state_dict(layer, 3)
    other = torch.optim.Adam(make().parameters())
    for call in (sharded_optimizer_state_dict, lambda *given: load_sharded_optimizer_state_dict(*given, state)):
        with pytest.raises(ValueError, match=r"optimizer: one of the model's parameters alone is expected, got \[\("): call(layer, other)
    for bad, got in ((3, "3"), ({}, r"\[\]"), ({"state": {}}, r"\['state'\]")):
        with pytest.raises(TypeError, match=f"state: a dictionary with 'state' and 'param_groups' is expected, got {got}"):
            load_sharded_optimizer_state_dict(layer, optimizer, bad)
    assert not other.state


def test_gradients_come_back_where_a_state_cannot_be_taken(one_process, monkeypatch):
    layer = make()
    parallel_experts_(layer)
    layer(numbers()).sum().backward()
    before = [p.grad for p in layer.parameters()]
    def broken(*given): raise RuntimeError("no state")
    monkeypatch.setattr("torch.distributed.checkpoint.state_dict.get_optimizer_state_dict", broken)
    with pytest.raises(RuntimeError, match="no state"): sharded_optimizer_state_dict(layer, torch.optim.Adam(layer.parameters()))
    assert all(p.grad is grad for p, grad in zip(layer.parameters(), before)) and any(grad is not None for grad in before)


def test_copies_and_pickles(one_process):
    layer, x = make(), numbers()
    y = layer(x)
    parallel_experts_(layer, dist.group.WORLD)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), whole_model(layer)):
        assert torch.equal(other(x), layer(x)) and torch.allclose(other(x), y)
        assert other.experts.w_in is not layer.experts.w_in
    assert copy.deepcopy(layer).experts.group is layer.experts.group
    frozen = make()
    frozen.experts.requires_grad_(False)
    parallel_experts_(frozen)
    assert not any(p.requires_grad for p in [*expert_parameters(frozen).values(), *whole_model(frozen).experts.parameters()])


@pytest.mark.long
def test_a_mesh_a_compiled_model_and_no_gradient(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    layer, x = make(), numbers()
    y = layer(x)
    parallel_experts_(layer, init_device_mesh("cpu", (1,)))
    with torch.no_grad(): assert torch.allclose(layer(x), y)
    compiled = torch.compile(nn.Sequential(nn.Identity(), layer), backend="aot_eager")
    assert torch.allclose(compiled(x), y)
    assert "here 0 to 5" in repr(layer)


# Bad input

def wrong():
    "What is refused in each of two processes, with the model as it was."
    rank, said = dist.get_rank(), []
    net = nn.Sequential(MoE(DIM, HIDDEN, 4), MoE(DIM, HIDDEN, 5))
    before = [*net.parameters()]
    alone = dist.new_group([0])
    try: parallel_experts_(net)
    except ValueError as error: said.append(str(error))
    assert all(p is q for p, q in zip(before, net.parameters(), strict=True))
    try: parallel_experts_(net[1], alone)  # the first process has all five
    except ValueError as error: said.append(str(error))
    net = MoE(DIM, HIDDEN, 4)
    parallel_experts_(net)
    try: merge_experts(net)
    except ValueError as error: said.append(str(error))
    for number in (6, 2):  # of which two are a rank's part
        other = MoE(DIM, HIDDEN, number, 1)
        for part, state in ((net, other.state_dict()), (net.experts, other.experts.state_dict())):
            try: part.load_state_dict(state)
            except ValueError as error: said.append(str(error))
    return said


def test_a_group_or_a_state_that_does_not_fit(tmp_path):
    first, second = in_two_processes(wrong, tmp_path)
    assert first[0] == second[0] == "group: a size that divides num_experts = 5 is expected, got 2"
    assert second[1] == "group: one that has the process of rank 1 is expected, got -100"
    assert first[1] == second[2] == "layer: one with all 4 experts in one place is expected, got 2"
    sizes = "router.gate.weight: a tensor of shape (4, 8) is expected, got ({}, 8)"
    assert first[2:] == [sizes.format(6), "w_in: 4 experts (or the 2 of a rank) is expected, got 6", sizes.format(2),
                         "w_in: a state of all experts, or of experts 0 to 1 of 4, is expected, got 'a part that does not say which'"]


def test_bad_input_without_a_group():
    with pytest.raises(TypeError, match="model: a module is expected, got 3"): data_parallel(3)
    with pytest.raises(ValueError, match="group: one that was begun by torch.distributed.init_process_group is expected, got None"): parallel_experts_(make())


def test_bad_input(one_process):
    layer = make()
    with pytest.raises(TypeError, match="model: a module is expected, got 3"): parallel_experts_(3)
    with pytest.raises(ValueError, match="model: one with a MoE is expected, got Linear"): parallel_experts_(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="group: a process group, a mesh or None is expected, got 'all'"): parallel_experts_(layer, "all")
    with pytest.raises(TypeError, match="average: True or False is expected, got 1"): parallel_experts_(layer, average=1)
    with pytest.raises(ValueError, match="model: one that is not wrapped yet is expected, got DistributedDataParallel"): parallel_experts_(nn.parallel.DistributedDataParallel(make()))
    shared = nn.Sequential(make(), make())
    shared[1].experts.w_in = shared[0].experts.w_in
    with pytest.raises(ValueError, match=r"model: one whose layers share no experts is expected, got \['0', '1'\]"): parallel_experts_(shared)
    parallel_experts_(layer)
    with pytest.raises(ValueError, match="model: one whose experts are whole is expected"): parallel_experts_(layer)
    with pytest.raises(ValueError, match=r"x: tokens of width 8 is expected, got \(40, 7\)"): layer(numbers()[:, :7])
    with pytest.raises(ValueError, match="max_norm: a finite number above 0 is expected, got 0"): clip_gradients_(layer, 0)
    split = (numbers(8), numbers(8, seed=1))
    with pytest.raises(ValueError, match="clip: a function of the model that knows of all ranks' parts of 'experts' is expected, got 1.0"):
        fit(layer, split, F.mse_loss, epochs=1, clip=1.)
    with pytest.raises(ValueError, match="amp: None or torch.bfloat16, for a step that all ranks with parts of 'experts' take, is expected, got torch.float16"):
        fit(layer, split, F.mse_loss, epochs=1, amp=torch.float16)
    before = [p.detach().clone() for p in layer.parameters()]
    rate = torch.optim.SGD(layer.parameters(), lr=1.)
    fit(layer, split, F.mse_loss, epochs=1, optimizer=rate, clip=lambda model: clip_gradients_(model, .01))
    moved = sum((p - old).square().sum() for p, old in zip(layer.parameters(), before)).sqrt()
    torch.testing.assert_close(moved.item(), .01, rtol=1e-3, atol=0)
    norm = sum(p.grad.square().sum() for p in layer.parameters()).sqrt().item()
    assert clip_gradients_(layer, 1.).item() == pytest.approx(norm, rel=1e-14)  # in double precision, as the model is
    layer.experts.size = 2
    with pytest.raises(ValueError, match="group: the size 2 that experts were divided for is expected, got 1"): layer(numbers())
    with pytest.raises(TypeError, match="model: a module is expected, got None"): average_copies_(None, None)
    for f in (expert_parameters, whole_model, sharded_state_dict):
        with pytest.raises(TypeError, match="model: a module is expected, got None"): f(None)


def test_plain_ddp_around_experts_of_one_rank_loses_nothing(one_process):
    torch.manual_seed(0)
    model, x = nn.Sequential(MoE(8, 6, 4, bias=True)), torch.randn(10, 8)
    parallel_experts_(model)
    y = model(x)
    assert torch.equal(nn.parallel.DistributedDataParallel(nn.Sequential(model))(x), y)
