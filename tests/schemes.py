"""What every scheme of sharing between tasks has to do, whatever its trunk: the tests of a chapter with schemes run all of this.

A scheme is a function `build(trunk, heads, axis)` to a `Multitask` model, where `axis` is that of the features. In a chapter's tests:

    MINE = {"sparse": lambda trunk, heads, axis: SparseSharing(trunk, heads), ...}

    @pytest.mark.parametrize("check", CHECKS)
    @pytest.mark.parametrize("kind", TRUNKS)
    @pytest.mark.parametrize("name", MINE)
    def test_schemes(name, kind, check, tmp_path): check(MINE[name], kind, tmp_path)
"""
import copy
import pickle

import pytest
import torch
from torch import nn

from sharetie.balancing import balancer
from sharetie.multitask import CrossStitch, Hard, Single, Sluice, Soft, TaskLosses, Transfer, sharing
from sharetie.results import set_seed
from sharetie.ties import load_model, save_model
from sharetie.train import fit

TASKS = ["a", "b", "c"]


class Recurrent(nn.LSTM):
    "An LSTM that gives its outputs alone."
    def forward(self, x): return super().forward(x)[0]


def mlp(): return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
def conv(): return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())
def lstm(): return nn.Sequential(Recurrent(6, 8, batch_first=True), Recurrent(8, 8, batch_first=True))


def transformer():
    def block(): return nn.TransformerEncoderLayer(8, 2, 16, dropout=0., activation="gelu", batch_first=True)
    return nn.Sequential(nn.Linear(6, 8), block(), block())


# Name: (trunk, shape of an input, head, axis of the features)
TRUNKS = {"mlp": (mlp, (6,), lambda: nn.Linear(8, 2), 1),
          "conv": (conv, (1, 4, 4), lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), 1),
          "lstm": (lstm, (3, 6), lambda: nn.Linear(8, 2), -1),
          "transformer": (transformer, (3, 6), lambda: nn.Linear(8, 2), -1)}

SCHEMES = {"hard": lambda trunk, heads, axis: Hard(trunk, heads),
           "single": lambda trunk, heads, axis: Single(trunk, heads, redraw=True),
           "soft": lambda trunk, heads, axis: Soft(trunk, heads, strength=.1, redraw=True),
           "cross-stitch": lambda trunk, heads, axis: CrossStitch(trunk, heads, redraw=True),
           "sluice": lambda trunk, heads, axis: Sluice(trunk, heads, axis=axis, orthogonal=.1, redraw=True),
           "sluice without skips": lambda trunk, heads, axis: Sluice(trunk, heads, axis=axis, skip=False),
           "transfer, frozen": lambda trunk, heads, axis: Transfer(trunk, heads),
           "transfer, fine-tuned": lambda trunk, heads, axis: Transfer(trunk, heads, shared=0),
           "transfer, partly shared": lambda trunk, heads, axis: Transfer(trunk, heads, shared=2, frozen=1)
                                      if len(trunk) == 3 else Transfer(trunk, heads, shared=1, frozen=0)}


def setting(build, kind="mlp", seed=0, tasks=TASKS, noisy=True):
    "A model in double precision, with no two weights alike, and an input of five examples."
    generator = set_seed(seed)
    trunk, shape, head, axis = TRUNKS[kind]
    model = build(trunk(), {task: head() for task in tasks}, axis).double().eval()
    with torch.no_grad():
        for p in model.parameters() if noisy else (): p.add_(.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model, torch.randn(5, *shape, generator=generator, dtype=torch.float64)


def scalar(output):
    "A number that every entry of an output moves in its own way."
    weights = torch.linspace(.5, 1.7, output.numel(), dtype=output.dtype).view_as(output)
    return (weights * output.sin()).sum()


def labels_for(outputs): return {task: torch.zeros_like(y) for task, y in outputs.items()}


def check_forward(build, kind, tmp_path):
    "One input for all, the same for each, and some tasks alone give the same outputs, in the order asked."
    model, x = setting(build, kind)
    outputs = model(x)
    assert list(outputs) == model.tasks == TASKS
    for asked in (TASKS, TASKS[::-1], TASKS[1:2]):
        some = model({task: x for task in asked})
        assert list(some) == asked
        for task, y in some.items(): torch.testing.assert_close(y, outputs[task])


def check_own_inputs(build, kind, tmp_path):
    "A task's output at its own input is what it is when all tasks see that input."
    model, x = setting(build, kind)
    inputs = {task: x[i:i + 2] - i for i, task in enumerate(TASKS)}
    for task, y in model(inputs).items(): torch.testing.assert_close(y, model(inputs[task])[task])


def check_gradients(build, kind, tmp_path):
    "One task's loss sends gradients to exactly the entries that `used_by` and `sharing` say."
    model, x = setting(build, kind)
    for p in model.parameters(): p.requires_grad_(True)
    table, named, times = sharing(model), dict(model.named_parameters()), {}
    for task in model.tasks:
        used = model.used_by(task)
        assert used.keys() <= named.keys()
        grads = torch.autograd.grad(scalar(model(x)[task]), list(named.values()), allow_unused=True)
        for (name, p), g in zip(named.items(), grads):
            mask = used.get(name, torch.zeros_like(p, dtype=torch.bool))
            g = torch.zeros_like(p) if g is None else g
            if mask is None: assert g.any(), (task, name)
            else: assert mask.dtype == torch.bool and torch.equal(g != 0, mask), (task, name)
            full = torch.ones_like(p, dtype=torch.int) if mask is None else mask.int()
            times[name] = times.get(name, 0) + full
            assert table.loc[name, task] == full.sum()
    assert list(table.index) == list(named) and table.tasks == model.tasks
    for name, p in named.items():
        assert table.loc[name, "stored"] == p.numel() and table.loc[name, "shared"] == (times[name] > 1).sum()
    assert {id(p) for p in model.shared_parameters()} == {id(p) for name, p in named.items() if (times[name] > 1).any()}


def check_independence(build, kind, tmp_path):
    "Whatever `used_by` leaves out can change without a change of the task's output, and what it names cannot."
    model, x = setting(build, kind)
    for task in model.tasks:
        used, before = model.used_by(task), model(x)[task]
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in changed.named_parameters():
                mask = used.get(name, torch.zeros_like(p, dtype=torch.bool))
                if mask is not None: p[~mask] += 1.
        assert torch.equal(changed(x)[task], before)
        with torch.no_grad():
            for name, p in changed.named_parameters():
                if name in used: p += .1 * torch.randn_like(p)
        assert not torch.allclose(changed(x)[task], before)


def check_files(build, kind, tmp_path):
    "A file and a state dict bring all outputs back, in a model that started elsewhere."
    model, x = setting(build, kind)
    for way in ("file", "state dict", "deepcopy", "pickle") if kind == "mlp" else ("file",):
        other, _ = setting(build, kind, seed=1)
        assert not torch.allclose(other(x)["a"], model(x)["a"])
        if way == "file":
            save_model(model, tmp_path / "model.safetensors")
            load_model(other, tmp_path / "model.safetensors")
        elif way == "state dict": other.load_state_dict(model.state_dict())
        elif way == "deepcopy": other = copy.deepcopy(model)
        else:
            try: other = pickle.loads(pickle.dumps(model))
            except (pickle.PicklingError, AttributeError, TypeError): continue  # a lambda in a test's trunk
        for task, y in model(x).items(): assert torch.equal(other(x)[task], y)
        assert sharing(other).equals(sharing(model))
        if model.penalty is not None: torch.testing.assert_close(other.penalty(), model.penalty())


def check_training(build, kind, tmp_path):
    "`fit` lowers the losses, with a scheme's own penalty, and moves no frozen weight."
    if kind not in ("mlp", "lstm"): return  # the others would add time and no case
    model, x = setting(build, kind)
    losses = TaskLosses({task: nn.functional.mse_loss for task in TASKS})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    y = labels_for(model(x))
    history = fit(model, (x, y), losses.total, penalty=model.penalty, epochs=3, progress=False)
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    for name, p in model.named_parameters(): assert p.requires_grad or torch.equal(p, before[name])


def check_balancing(build, kind, tmp_path):
    "Equal weights by a balancer are the sum of the losses; gradients by a Gram matrix reach the same weights."
    if kind not in ("mlp", "lstm"): return  # the others would add time and no case
    model, x = setting(build, kind)
    shared = model.shared_parameters()
    losses = TaskLosses({task: nn.functional.mse_loss for task in TASKS})
    outputs = model(x)
    losses.total(outputs, labels_for(outputs)).backward()
    summed = {name: p.grad for name, p in model.named_parameters()}
    for method in ("equal", "pcgrad") if any(p.requires_grad for p in shared) else ():
        model.zero_grad()
        outputs = model(x)
        balancer(method).backward(losses(outputs, labels_for(outputs)), shared)
        for name, p in model.named_parameters():
            assert (p.grad is None) == (summed[name] is None), name
            if method == "equal" and p.grad is not None: torch.testing.assert_close(p.grad, summed[name])


def check_compiled(build, kind, tmp_path):
    "The forward pass is one graph."
    if kind != "mlp": return  # others take seconds, and an LSTM makes no single graph
    model, x = setting(build, kind)
    torch._dynamo.reset()
    outputs = torch.compile(model, fullgraph=True, backend="eager")(x)
    for task, y in model(x).items(): torch.testing.assert_close(outputs[task], y)


CHECKS = [check_forward, check_own_inputs, check_gradients, check_independence, check_files, check_training, check_balancing,
          pytest.param(check_compiled, marks=pytest.mark.long)]
