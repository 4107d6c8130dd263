"sharetie.train: what a run repeats, resumes and refuses."
import copy
import math
import os
import pickle
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from processes import PROCESSES, in_two_processes
from sharetie.data import digits
from sharetie.results import subplots
from sharetie.resume import _which
from sharetie.train import History, error_rate, evaluate, fit, set_seed
from sharetie.tying import TiePenalty, anneal, proximal_


def toy(n=60):
    "Points in the plane with the class of their quadrant's color."
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] * x[:, 1] > 0).long()


def net(seed=0, dropout=0.3):
    set_seed(seed)
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 2))


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def full_run(model, path=None, after_step=None, epochs=6, kind="cosine"):
    "A run with everything that has a state: optimizer, schedule, dropout, batches, early stop."
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
        "milestones": lambda: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4]),
        "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5),  # cuts the rate at the second epoch
        "sequence": lambda: torch.optim.lr_scheduler.SequentialLR(optimizer, [
            torch.optim.lr_scheduler.LinearLR(optimizer), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)], [2]),
    }[kind]()
    return fit(model, toy(), F.cross_entropy, valid=toy(30), metrics={"error": error_rate}, optimizer=optimizer, scheduler=scheduler,
               epochs=epochs, batch_size=16, patience=4, clip=1.0, checkpoint=path, after_step=after_step, seed=5)


def stop_at(last, stop):
    def at(step):
        if step == last: stop()
    return at


def interrupt(): raise KeyboardInterrupt


def kill(): os.kill(os.getpid(), signal.SIGKILL)


# ---- resume


@pytest.mark.parametrize("kind", ["cosine", "milestones", "plateau", "sequence"])
def test_resumes_after_an_exception_in_an_epoch(tmp_path, kind):
    whole = net()
    history = full_run(whole, after_step=stop_at(-1, interrupt), kind=kind)
    with pytest.raises(KeyboardInterrupt): full_run(net(), tmp_path / "run.pt", stop_at(11, interrupt), kind=kind)
    rate = torch.load(tmp_path / "run.pt", weights_only=True)["optimizer"]["param_groups"][0]["lr"]
    if kind != "sequence": assert rate < 0.05  # the schedule has moved it before the interruption
    resumed = net(seed=9)
    pd.testing.assert_frame_equal(full_run(resumed, tmp_path / "run.pt", stop_at(-1, interrupt), kind=kind), history, check_exact=True)
    assert same(resumed, whole)


def test_resumes_after_every_epoch(tmp_path):
    whole = net()
    full_run(whole, after_step=stop_at(-1, interrupt))
    for epochs in range(1, 7): full_run(resumed := net(seed=epochs - 1), tmp_path / "run.pt", stop_at(-1, interrupt), epochs)
    assert same(resumed, whole)


def full_run_until_killed(path, threads):
    torch.set_num_threads(threads)
    full_run(net(), path, stop_at(15, kill))


@pytest.mark.slow
def test_resumes_after_the_process_is_killed(tmp_path):
    whole = net()
    full_run(whole, after_step=stop_at(-1, kill))
    process = PROCESSES.Process(target=full_run_until_killed, args=(tmp_path / "run.pt", torch.get_num_threads()))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert torch.load(tmp_path / "run.pt", weights_only=True)["epoch"] == 3
    full_run(resumed := net(seed=9), tmp_path / "run.pt", stop_at(-1, kill))
    assert same(resumed, whole)


def test_a_checkpoint_that_is_being_written_leaves_the_last_one(tmp_path, monkeypatch):
    whole, writes, write = net(), [], torch.save
    full_run(whole, after_step=stop_at(-1, interrupt))

    def half(state, path):
        writes.append(path)
        write(state, path)
        if len(writes) == 3:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"): full_run(net(), tmp_path / "run.pt", stop_at(-1, interrupt))
    assert torch.load(tmp_path / "run.pt", weights_only=True)["epoch"] == 2
    full_run(resumed := net(seed=9), tmp_path / "run.pt", stop_at(-1, interrupt))
    assert same(resumed, whole)


def test_a_stopped_run_stays_stopped(tmp_path):
    def run(model): return fit(model, toy(), F.cross_entropy, valid=toy(30), patience=2, epochs=100, checkpoint=tmp_path / "run.pt",
                               optimizer=torch.optim.SGD(model.parameters(), lr=3.0))
    first, second = net(), net(seed=1)
    history = run(first)
    assert len(history) < 100
    pd.testing.assert_frame_equal(run(second), history, check_exact=True)
    assert same(first, second)


def test_a_loader_resumes_with_its_own_generator(tmp_path):
    def run(model, epochs, path=None):
        loader = DataLoader(TensorDataset(*toy()), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(3))
        return fit(model, loader, F.cross_entropy, epochs=epochs, checkpoint=path)
    whole, resumed = net(), net()
    run(whole, 4)
    run(resumed, 2, tmp_path / "run.pt")
    run(resumed := net(seed=1), 4, tmp_path / "run.pt")
    assert same(whole, resumed)


@pytest.mark.parametrize("kind", ["sampler", "batch_sampler", "valid"])
def test_a_loader_resumes_with_the_generator_of_its_sampler(tmp_path, kind):
    def run(model, epochs, path=None):
        data, own = TensorDataset(*toy()), torch.Generator().manual_seed(3)
        sampler = RandomSampler(data, generator=own)
        mixed = DataLoader(data, batch_sampler=BatchSampler(sampler, 16, False)) if kind == "batch_sampler" else DataLoader(data, 16, sampler=sampler)
        plain = DataLoader(data, 16)
        return fit(model, plain if kind == "valid" else mixed, F.cross_entropy, valid=mixed if kind == "valid" else None,
                   metrics={"first": lambda output, y: y[0].float()} if kind == "valid" else None, epochs=epochs, checkpoint=path)
    whole, resumed = net(), net(seed=1)
    history = run(whole, 4)
    run(net(), 2, tmp_path / "run.pt")
    pd.testing.assert_frame_equal(run(resumed, 4, tmp_path / "run.pt"), history, check_exact=True)
    assert same(whole, resumed)


@pytest.mark.parametrize("draw", [random.random, np.random.randn])
def test_global_random_numbers_resume(tmp_path, draw):
    def noisy(output, y): return (1 + 0.1 * draw()) * F.cross_entropy(output, y)
    def run(model, epochs, path=None): return fit(model, toy(), noisy, epochs=epochs, batch_size=20, checkpoint=path)
    whole, resumed = net(), net(seed=1)
    run(whole, 4)
    run(net(), 2, tmp_path / "run.pt")  # an odd number of Gaussians would leave half a pair, too
    draw()
    run(resumed, 4, tmp_path / "run.pt")
    assert same(whole, resumed)


@pytest.mark.parametrize("kind", [list, tuple])
def test_several_functions_after_a_step_resume(tmp_path, kind):
    def run(model, epochs, path=None):
        pair = model[0], model[2]
        tie, steps = TiePenalty([(pair[0].weight, pair[1].weight)], strength=0.5), []
        schedule = anneal(tie, 0.1, 10.0, 16)
        fit(model, toy(), F.cross_entropy, epochs=epochs, batch_size=16, checkpoint=path,
            after_step=kind([schedule, lambda step: proximal_(tie, 0.1), steps.append]))
        return schedule.done, steps
    def make(seed):
        set_seed(seed)
        return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    whole, resumed = make(0), make(1)
    assert run(whole, 4) == (16, list(range(1, 17)))
    run(make(0), 2, tmp_path / "run.pt")
    assert run(resumed, 4, tmp_path / "run.pt") == (16, list(range(9, 17)))
    assert same(whole, resumed)


class Warmup:
    "A penalty whose strength grows with the steps, and which keeps it in its state."
    def __init__(self, model): self.model, self.strength = model, 0.0
    def __call__(self): return self.strength * sum(p.pow(2).sum() for p in self.model.parameters())
    def step(self, now): self.strength = now / 10
    def state_dict(self): return {"strength": self.strength}
    def load_state_dict(self, state): self.strength = state["strength"]


def test_the_state_of_a_penalty_is_kept(tmp_path):
    def run(model, epochs, path=None):
        penalty = Warmup(model)
        return fit(model, toy(), F.cross_entropy, epochs=epochs, batch_size=16, penalty=penalty, after_step=penalty.step, checkpoint=path)
    whole = net()
    history = run(whole, 4)
    assert history["penalty"].iloc[-1] > 0
    run(net(), 2, tmp_path / "run.pt")
    run(resumed := net(seed=1), 4, tmp_path / "run.pt")
    assert same(whole, resumed)


@pytest.mark.parametrize("change, message", [
    (dict(model=nn.Linear(2, 2)), "model was"),
    (dict(seed=1), "seed was 0, and is 1"),
    (dict(batch_size=7), "batch_size was None, and is 7"),
    (dict(data=toy(50)), "data was torch.float32 (60, 2), and is torch.float32 (50, 2)"),
    (dict(loss=partial(F.cross_entropy)), "loss was cross_entropy ("),
    (dict(lr=0.1), "optimizer was"),
    (dict(epochs=1), "epochs: at least the 2 of the checkpoint"),
])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    def run(model=None, data=None, loss=F.cross_entropy, lr=0.01, **options):
        model = model or net(dropout=0)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        try: fit(model, data or toy(), loss, optimizer=torch.optim.Adam(model.parameters(), lr=lr), checkpoint=tmp_path / "a.pt", **{"epochs": 2, **options})
        except ValueError:
            assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
            raise
    run()
    with pytest.raises(ValueError) as e: run(**change)
    assert message in str(e.value) and "a.pt" in str(e.value)


def weighted(a, b=1, *, c=1):
    def loss(output, y, d=b): return a * d * c * F.cross_entropy(output, y)
    return loss


class Weighted:
    def __init__(self, weight): self.weight = weight
    def __call__(self, output, y): return self.weight * F.cross_entropy(output, y)


OTHERS = {"code": (lambda o, y: F.cross_entropy(o, y), lambda o, y: F.nll_loss(o, y)), "constant": (lambda o, y: 2 * F.cross_entropy(o, y), lambda o, y: 3 * F.cross_entropy(o, y)),
          "closure": (weighted(1), weighted(2)), "default": (weighted(1), weighted(1, 2)), "partial": (partial(F.cross_entropy, label_smoothing=.1), partial(F.cross_entropy, label_smoothing=.2)),
          "argument": (partial(F.cross_entropy, weight=torch.ones(2)), partial(F.cross_entropy, weight=torch.arange(1., 3))), "module": (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=.1)),
          "object": (Weighted(1), Weighted(2)), "method": (Weighted(1).__call__, Weighted(2).__call__), "inside": (lambda o, y: weighted(1)(o, y), lambda o, y: weighted(2)(o, y)),
          "around": (lambda o, y, f=weighted(1): f(o, y), lambda o, y, f=weighted(2): f(o, y))}


@pytest.mark.parametrize("kind", OTHERS)
def test_losses_and_metrics_of_one_name_are_told_apart(tmp_path, kind):
    one, other = OTHERS[kind]
    def run(path, epochs, loss=F.cross_entropy, **metrics):
        fit(net(), toy(), loss, epochs=epochs, checkpoint=tmp_path / path, **({"valid": toy(30), "metrics": metrics} if metrics else {}))
    run("loss", 1, one), run("metric", 1, m=one)
    run("loss", 2, copy.deepcopy(one)), run("metric", 2, m=copy.deepcopy(one))
    with pytest.raises(ValueError, match="loss' is of another run: loss was"): run("loss", 3, other)
    with pytest.raises(ValueError, match="metric' is of another run: metrics was m: "): run("metric", 3, m=other)


@pytest.mark.long
def test_a_loss_is_the_same_in_another_process(tmp_path):
    code = ("import torch.nn.functional as F; from functools import partial; from sharetie.resume import _which\n"
            "def loss(o, y): return F.cross_entropy(o, y) if o.dim() in {2, 3} or 'a' in {'a', 'b', 'c'} else None\n"
            "print(_which(loss), _which(partial(loss, y=None)), _which(F.cross_entropy))")
    assert len({subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, env=os.environ | {"PYTHONHASHSEED": seed}).stdout
                for seed in "123"}) == 1


def test_what_a_loss_counts_or_collects_is_no_other_loss():
    def made(n):
        seen, rest = [], {}
        def loss(output, y):
            nonlocal n
            n += 1
            seen.append(n), rest.update(n=n)
            return loss and F.cross_entropy(output, y)
        return loss
    assert _which(made(1)) == _which(made(2)) != _which(weighted(1))
    late = lambda: missing  # a value from around that is not there yet
    if False: missing = 1
    assert _which(late).startswith("test_what")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    path.write_text("nothing of the kind")
    with pytest.raises(ValueError, match="checkpoint: cannot read .*run.pt.*; name another file, or remove it"): fit(net(), toy(), F.cross_entropy, checkpoint=path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="is of another run"): fit(net(), toy(), F.cross_entropy, checkpoint=path)


# ---- what a run leaves as it was


def test_a_run_depends_on_its_arguments_only_and_leaves_random_numbers_alone():
    one, two = net(), net()
    fit(one, toy(), F.cross_entropy, batch_size=16, seed=3)
    torch.rand(7), np.random.rand(7), random.random()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    fit(two, toy(), F.cross_entropy, batch_size=16, seed=3)
    assert same(one, two)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]
    fit(other := net(), toy(), F.cross_entropy, batch_size=16, seed=4)
    assert not same(one, other)


def test_modes_come_back():
    model = net()
    model[1].eval()
    fit(model, toy(), F.cross_entropy, epochs=1, valid=toy(10))
    assert [m.training for m in model] == [True, False, True, True, True]


def test_validation_does_not_change_a_run():
    one, two = net(), net()
    fit(one, toy(), F.cross_entropy, batch_size=16)
    fit(two, toy(), F.cross_entropy, batch_size=16, valid=toy(30))
    assert same(one, two)


# ---- numbers that are not finite


class NanAt(nn.Module):
    "The identity until its n-th call, which gives NaN."
    def __init__(self, n): super().__init__(); self.n, self.calls = n, 0

    def forward(self, x):
        self.calls += 1
        return x * math.nan if self.calls == self.n else x


@pytest.mark.parametrize("batch_size, step, epoch", [(None, 3, 3), (20, 5, 2)])
def test_a_nan_loss_stops_before_the_step(batch_size, step, epoch):
    def make(n): return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), NanAt(n), nn.Linear(4, 2))
    set_seed(0)
    model = make(step)
    reference = make(-1)
    reference.load_state_dict(model.state_dict())
    seen = []
    fit(reference, toy(), F.cross_entropy, batch_size=batch_size,
        after_step=lambda now: now == step - 1 and seen.extend(p.detach().clone() for p in reference.parameters()))
    with pytest.raises(FloatingPointError, match=rf"the loss is nan at step {step} \(epoch {epoch}\).*'0.weight'"):
        fit(model, toy(), F.cross_entropy, batch_size=batch_size)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), seen, strict=True))
    assert model.training


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    def root(): return (model[4].bias - model[4].bias.detach()).pow(2).sum().sqrt()
    with pytest.raises(FloatingPointError, match=r"a gradient is not finite at step 1 \(epoch 1\).*'4.bias'"):
        fit(model, toy(), F.cross_entropy, penalty=root)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_an_infinite_loss_with_finite_gradients_and_a_weight_that_was_nan():
    with pytest.raises(FloatingPointError, match="the loss is inf.*no gradient here is other than finite"):
        fit(net(), toy(), lambda output, y: F.cross_entropy(output, y) + math.inf)
    model = net()
    model[4].bias.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="the weight '4.bias' was not finite before"): fit(model, toy(), F.cross_entropy)


def test_large_finite_gradients_are_no_error():
    model = nn.Linear(2, 2)
    fit(model, toy(), lambda output, y: 1e25 * output.mean(), epochs=1, optimizer=torch.optim.SGD(model.parameters(), lr=1e-30))


def test_sparse_gradients_train_and_stop():
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True))
    data = torch.tensor([0, 0, 3]), torch.tensor([0, 1, 1])
    fit(model, data, F.cross_entropy, optimizer=torch.optim.SparseAdam(model.parameters()), epochs=2)
    model[0].weight.data[3] = math.inf
    with pytest.raises(FloatingPointError, match="'0.weight'"):
        fit(model, data, F.cross_entropy, optimizer=torch.optim.SparseAdam(model.parameters()))


# ---- options


def test_early_stop_restores_the_best_weights():
    model, kept = net(dropout=0), []
    data, valid = toy(20), toy(200)
    history = fit(model, data, F.cross_entropy, valid=valid, patience=3, epochs=300,
                  optimizer=torch.optim.SGD(model.parameters(), lr=2.0))
    assert len(history) == history.best_epoch + 3 < 300
    assert evaluate(model, valid, {"loss": F.cross_entropy})["loss"] == history["valid_loss"].min()
    fit(again := net(dropout=0), data, F.cross_entropy, epochs=history.best_epoch, optimizer=torch.optim.SGD(again.parameters(), lr=2.0))
    assert same(model, again)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_on_the_cpu(amp):
    dtypes = set()
    model = net(dropout=0)
    model[4].register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    history = fit(model, toy(), F.cross_entropy, amp=amp, epochs=30, optimizer=torch.optim.Adam(model.parameters(), lr=0.05))
    assert dtypes == {amp} and history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_overflow_in_float16_is_left_to_the_scaler():
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    history = fit(model, (torch.full((4, 2), 1.0), torch.zeros(4)), lambda output, y: 1e3 * output.sum(), amp=torch.float16, epochs=1)
    assert len(history) == 1 and torch.equal(model.weight, before)


def test_after_step_does_not_run_on_a_step_that_the_scaler_skips():
    model, steps, weights = nn.Linear(2, 1, bias=False), [], []
    def loss(output, y):  # overflows at the initial scale of 65536, not at a quarter of it
        weights.append(model.weight.detach().clone())
        return output.float().mean() * 2.0
    fit(model, (torch.full((4, 2), 1.0), torch.zeros(4)), loss, amp=torch.float16, epochs=5, after_step=steps.append)
    moved = [i for i, (a, b) in enumerate(zip(weights, weights[1:]), 1) if not torch.equal(a, b)]
    assert moved and moved[0] > 1 and steps == [*moved, 5]


def test_a_run_whose_every_step_is_skipped_stops(tmp_path):
    model, steps = nn.Linear(2, 1, bias=False), []
    before = model.weight.detach().clone()
    def root(): return (model.weight - model.weight.detach()).pow(2).sum().sqrt()
    def run(epochs, path=None): return fit(model, (torch.ones(4, 2), torch.zeros(4)), lambda output, y: output.float().mean(), amp=torch.float16,
                                           penalty=root, epochs=epochs, after_step=steps.append, checkpoint=path)
    assert len(run(19, tmp_path / "run.pt")) == 19
    for path in (None, tmp_path / "run.pt"):
        with pytest.raises(FloatingPointError, match=r"a gradient is not finite at step 20 \(epoch 20\).*'weight'; 20 steps in a row were skipped"): run(30, path)
    assert torch.equal(model.weight, before) and steps == []


def test_a_validation_loss_that_is_nan_stops_an_early_stop():
    calls = []
    def loss(output, y):
        calls.append(torch.is_grad_enabled())  # the first without gradients only tries the validation data
        return F.cross_entropy(output, y) * (math.nan if calls.count(False) == 4 and not calls[-1] else 1)
    with pytest.raises(FloatingPointError, match="the validation loss is nan after epoch 3"):
        fit(net(), toy(), loss, valid=toy(30), patience=5)
    calls.clear()
    assert len(fit(net(), toy(), loss, valid=toy(30))) == 10


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [None, torch.float16, torch.bfloat16])
def test_trains_resumes_and_stops_on_a_gpu(tmp_path, amp):
    def run(model, epochs, path=None): return fit(model, toy(), F.cross_entropy, device="cuda", amp=amp, batch_size=16, epochs=epochs, checkpoint=path)
    whole = net()
    history = run(whole, 4)
    assert next(whole.parameters()).is_cuda and history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    run(net(), 2, tmp_path / "run.pt")
    run(resumed := net(seed=1), 4, tmp_path / "run.pt")
    assert same(whole, resumed)
    before = [p.detach().clone() for p in whole.parameters()]
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"): fit(whole, (toy()[0] * math.nan, toy()[1]), F.cross_entropy, amp=amp)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), before, strict=True))


def test_clip_bounds_the_step():
    model = nn.Linear(2, 2)
    before = [p.detach().clone() for p in model.parameters()]
    fit(model, toy(), lambda output, y: 100 * F.cross_entropy(output, y), clip=0.5, epochs=1, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    moved = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before)]).norm()
    assert moved.item() == pytest.approx(0.5, rel=1e-4)


def test_the_scheduler_moves_the_rate_after_each_epoch():
    model, rates = nn.Linear(2, 2), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fit(model, toy(), F.cross_entropy, optimizer=optimizer, scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), epochs=3,
        batch_size=30, after_step=lambda step: rates.append(optimizer.param_groups[0]["lr"]))
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_an_optimizer_with_a_closure_trains():
    model = nn.Linear(2, 2)
    x, y = toy()
    history = fit(model, (x, (x[:, 0] > 0).long()), F.cross_entropy, optimizer=torch.optim.LBFGS(model.parameters()), epochs=5)
    assert history["train_loss"].iloc[-1] < 0.1 * history["train_loss"].iloc[0]


def test_the_optimizer_may_hold_some_of_the_parameters():
    model = net()
    before = model[0].weight.detach().clone()
    fit(model, toy(), F.cross_entropy, optimizer=torch.optim.SGD(model[4].parameters(), lr=0.1), epochs=2)
    assert torch.equal(model[0].weight, before)


def test_penalty_and_after_step():
    model, steps = nn.Linear(2, 2), []
    history = fit(model, toy(), F.cross_entropy, penalty=lambda: model.weight.pow(2).sum(), after_step=steps.append, epochs=3, batch_size=25)
    assert steps == list(range(1, 10)) and list(history) == ["train_loss", "penalty"]
    by_hand = nn.Linear(2, 2)
    by_hand.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=1e-3)
    (F.cross_entropy(by_hand(toy()[0]), toy()[1]) + by_hand.weight.pow(2).sum()).backward()
    optimizer.step()
    fit(model, toy(), F.cross_entropy, penalty=lambda: model.weight.pow(2).sum(), epochs=1)
    assert same(model, by_hand)


# ---- data


def test_a_loader_gives_the_steps_of_its_batches():
    one, two = net(dropout=0), net(dropout=0)
    x, y = toy()
    fit(one, DataLoader(TensorDataset(x, y), batch_size=60), F.cross_entropy, epochs=3)
    fit(two, (x, y), F.cross_entropy, epochs=3)
    assert same(one, two)


def test_a_loader_without_length():
    class Stream(IterableDataset):
        def __iter__(self): return zip(*toy())
    history = fit(net(), DataLoader(Stream(), batch_size=16), F.cross_entropy, epochs=2, valid=DataLoader(Stream(), batch_size=7))
    assert list(history) == ["train_loss", "valid_loss"] and history.notna().all(axis=None)


def test_the_loss_of_an_epoch_is_the_mean_over_examples():
    model, x = nn.Linear(1, 1), torch.arange(5.0)[:, None]
    def value(output, y): return y.mean() + 0 * output.sum()
    history = fit(model, (x, x), value, valid=(x, x), batch_size=2, epochs=1)
    assert history.iloc[0].tolist() == [2, 2]


class Nested(nn.Module):
    def __init__(self): super().__init__(); self.left, self.right = nn.Linear(2, 2), nn.Linear(2, 2)
    def forward(self, x): return self.left(x["a"]), self.right(x["b"][0])


def test_nested_batches():
    x, y = toy()
    def loss(output, y): return F.cross_entropy(output[0], y[0]) + F.cross_entropy(output[1], y[1])
    history = fit(Nested(), ({"a": x, "b": [x]}, (y, 1 - y)), loss, batch_size=16, epochs=20)
    assert history["train_loss"].is_monotonic_decreasing


def test_a_dataset_brings_its_validation_split():
    data = digits()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert list(fit(model, data, F.cross_entropy, epochs=1)) == ["train_loss", "valid_loss"]
    assert list(fit(model, data.train, F.cross_entropy, epochs=1)) == ["train_loss"]


def test_float64_stays_float64():
    model, (x, y) = nn.Linear(2, 2).double(), toy()
    history = fit(model, (x.double(), y), F.cross_entropy, epochs=1, valid=(x.double(), y))
    value = F.cross_entropy(model(x.double()), y).item()
    assert history["valid_loss"].iloc[0] == pytest.approx(value, rel=1e-13) and float(np.float32(value)) != value


# ---- bad input

X, Y = toy()
BAD = {
    "model, no module": (dict(model=print), TypeError, "model: an nn.Module is expected, got builtin_function_or_method"),
    "model without parameters": (dict(model=nn.ReLU()), ValueError, "model: a module with a parameter that trains is expected, got"),
    "frozen model": (dict(model=nn.Linear(2, 2).requires_grad_(False)), ValueError, "model: a module with a parameter that trains is expected, got"),
    "meta model": (dict(model=nn.Linear(2, 2, device="meta")), ValueError, "model: parameters with values are expected, 'weight' has none yet"),
    "data, one tensor": (dict(data=X), TypeError, "data: (x, y), a Split, a Dataset or a DataLoader is expected, got Tensor"),
    "data, array": (dict(data=(X.numpy(), Y)), TypeError, "data: a tensor in every part is expected, got ndarray"),
    "data, lengths": (dict(data=(X, Y[:7])), ValueError, "data: an equal number of examples in x and y is expected, got ([60], [7])"),
    "data, empty": (dict(data=(X[:0], Y[:0])), ValueError, "data: at least one example is expected, got 0"),
    "data, no leaves": (dict(data=((), ())), ValueError, "data: an equal number of examples in x and y is expected, got ([], [])"),
    "data, scalar": (dict(data=(X, torch.tensor(1))), ValueError, "data: a tensor with examples along its first axis is expected"),
    "loader of x only": (dict(data=DataLoader(TensorDataset(X))), ValueError, "data: a loader of pairs (x, y) is expected, got one of list of 1"),
    "empty loader": (dict(data=DataLoader(TensorDataset(X, Y), batch_size=100, drop_last=True)), ValueError, "data: a loader with at least one batch is expected, got none"),
    "valid, lengths": (dict(valid=(X, Y[:7])), ValueError, "valid: an equal number of examples in x and y is expected, got ([60], [7])"),
    "loss, no function": (dict(loss="mse"), TypeError, "loss: a function of (output, y) is expected, got 'mse'"),
    "loss per example": (dict(loss=lambda output, y: output), ValueError, "loss: a scalar is expected of it, got shape (60, 2)"),
    "loss, text": (dict(loss=lambda output, y: "low"), TypeError, "loss: a scalar tensor is expected of it, got str"),
    "loss without gradient": (dict(loss=lambda output, y: output.detach().sum()), ValueError, "loss: a function of the weights is expected, got one without gradient"),
    "penalty, shape": (dict(penalty=lambda: torch.zeros(3)), ValueError, "penalty: a scalar is expected of it, got shape (3,)"),
    "penalty, no function": (dict(penalty=0.1), TypeError, "penalty: a function of nothing is expected, got 0.1"),
    "after_step, no function": (dict(after_step=1), TypeError, "after_step: a function of (step) is expected, got 1"),
    "after_step, list": (dict(after_step=[print, 1]), TypeError, "after_step: a function of (step) is expected, got 1"),
    "optimizer, no optimizer": (dict(optimizer="adam"), TypeError, "optimizer: a torch optimizer is expected, got 'adam'"),
    "optimizer of another model": (dict(optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters())), ValueError, "none of the model's 6 parameters"),
    "scheduler alone": (dict(scheduler=torch.optim.lr_scheduler.ExponentialLR(torch.optim.SGD([X]), 0.5)), ValueError, "scheduler: None without `optimizer` is expected, got <torch.optim.lr_scheduler.ExponentialLR object>"),
    "epochs 0": (dict(epochs=0), ValueError, "epochs: a whole number of at least 1 is expected, got 0"),
    "epochs 1.5": (dict(epochs=1.5), TypeError, "epochs: a whole number is expected, got 1.5"),
    "epochs True": (dict(epochs=True), TypeError, "epochs: a whole number is expected, got True"),
    "batch_size 0": (dict(batch_size=0), ValueError, "batch_size: a whole number of at least 1 is expected, got 0"),
    "batch_size and loader": (dict(data=DataLoader(TensorDataset(X, Y)), batch_size=3), ValueError, "batch_size: None with a DataLoader, which decides, is expected, got 3"),
    "device unknown": (dict(device="gpu"), ValueError, "device: one that is here is expected, got 'gpu'"),
    "device absent": (dict(device="cuda:99"), ValueError, "device: one that is here is expected, got 'cuda:99'"),
    "device meta": (dict(device="meta"), ValueError, "device: one that computes is expected, got 'meta'"),
    "amp": (dict(amp=True), ValueError, "amp: None, torch.float16 or torch.bfloat16 is expected, got True"),
    "clip 0": (dict(clip=0), ValueError, "clip: a finite number above 0 is expected, got 0"),
    "clip nan": (dict(clip=math.nan), ValueError, "clip: a finite number above 0 is expected, got nan"),
    "patience 0": (dict(patience=0, valid=(X, Y)), ValueError, "patience: a whole number of at least 1 is expected, got 0"),
    "patience without valid": (dict(patience=3), ValueError, "patience: None without `valid` is expected, got 3"),
    "metrics without valid": (dict(metrics={"error": error_rate}), ValueError, "without `valid`"),
    "metrics, name taken": (dict(metrics={"loss": error_rate}, valid=(X, Y)), ValueError, "metrics: another name than 'loss', which is taken, is expected"),
    "metrics, no functions": (dict(metrics=["error"], valid=(X, Y)), TypeError, "metrics: a dict of functions of (output, y) is expected, got ['error']"),
    "seed": (dict(seed=-1), ValueError, "seed: a whole number from 0 to 4294967295 is expected, got -1"),
    "checkpoint, no path": (dict(checkpoint=3), TypeError, "checkpoint: a path is expected, got 3"),
    "checkpoint, no folder": (dict(checkpoint="/nowhere/run.pt"), ValueError, "checkpoint: a file in a folder that exists is expected, got '/nowhere/run.pt'"),
    "model, none": (dict(model=None), TypeError, "model: an nn.Module is expected, got NoneType"),
    "lazy model": (dict(model=nn.LazyLinear(2)), ValueError, "model: parameters with values are expected, 'weight' has none yet"),
    "data, none": (dict(data=None), TypeError, "data: (x, y), a Split, a Dataset or a DataLoader is expected, got NoneType"),
    "data, lists": (dict(data=([1.0], [0])), TypeError, "data: a tensor in every part is expected, got float"),
    "data, width": (dict(data=(X[:, :1], Y)), ValueError, "data: a batch that fits model, loss and metrics is expected, got x float32 (60, 1) and y int64 (60,): mat1"),
    "data, classes": (dict(data=(X, Y + 2)), ValueError, "data: a batch that fits model, loss and metrics is expected, got x float32 (60, 2) and y int64 (60,): Target"),
    "valid, width": (dict(valid=(X[:, :1], Y)), ValueError, "valid: a batch that fits model, loss and metrics is expected, got x float32 (60, 1)"),
    "valid, classes": (dict(valid=(X, Y + 2), batch_size=7), ValueError, "valid: a batch that fits model, loss and metrics is expected, got x float32 (7, 2)"),
    "valid, loader": (dict(valid=DataLoader(TensorDataset(X[:, :1], Y), 4, shuffle=True)), ValueError, "valid: a batch that fits model, loss and metrics is expected, got x float32 (4, 1)"),
    "valid, loader of x": (dict(valid=DataLoader(TensorDataset(X), 4)), ValueError, "a loader of pairs (x, y) is expected"),
    "valid, text": (dict(valid="valid"), TypeError, "valid: (x, y), a Split"),
    "metric fails": (dict(valid=(X, Y), metrics={"odd": lambda output, y: output @ output}), ValueError, "valid: a batch that fits model, loss and metrics is expected"),
    "metric per example": (dict(valid=(X, Y), metrics={"odd": lambda output, y: output}), ValueError, "odd: a scalar is expected of it, got shape (60, 2)"),
    "metric of one": (dict(valid=(X, Y), metrics={"odd": lambda output: 0}), TypeError, "metrics['odd']: a function of (output, y) is expected, got <lambda>(output)"),
    "metrics, empty": (dict(valid=(X, Y), metrics={}), TypeError, "metrics: a dict of functions of (output, y) is expected, got {}"),
    "loss, none": (dict(loss=None), TypeError, "loss: a function of (output, y) is expected, got None"),
    "loss of one": (dict(loss=lambda output: 0), TypeError, "loss: a function of (output, y) is expected, got <lambda>(output)"),
    "penalty of one": (dict(penalty=lambda model: 0), TypeError, "penalty: a function of nothing is expected, got <lambda>(model)"),
    "after_step of nothing": (dict(after_step=lambda: 0), TypeError, "after_step: a function of (step) is expected, got <lambda>()"),
    "epochs, none": (dict(epochs=None), TypeError, "epochs: a whole number is expected, got None"),
    "epochs, nan": (dict(epochs=math.nan), TypeError, "epochs: a whole number is expected, got nan"),
    "seed, none": (dict(seed=None), TypeError, "seed: a whole number is expected, got None"),
    "clip True": (dict(clip=True), TypeError, "clip: a number is expected, got True"),
    "clip text": (dict(clip="1"), TypeError, "clip: a number is expected, got '1'"),
    "amp float64": (dict(amp=torch.float64), ValueError, "amp: None, torch.float16 or torch.bfloat16 is expected, got torch.float64"),
    "batch_size -1": (dict(batch_size=-1), ValueError, "batch_size: a whole number of at least 1 is expected, got -1"),
    "patience 1.5": (dict(patience=1.5, valid=(X, Y)), TypeError, "patience: a whole number is expected, got 1.5"),
    "data, no x": (dict(data=((), Y)), ValueError, "data: an equal number of examples in x and y is expected, got ([], [60])"),
    "data, meta": (dict(data=(X.to("meta"), Y)), ValueError, "data: a tensor with values is expected, got Tensor of float32, shape (60, 2)"),
    "data, a module": (dict(data=nn.Linear(2, 2)), TypeError, "data: (x, y), a Split, a Dataset or a DataLoader is expected, got Linear"),
    "valid, no x": (dict(valid=({}, Y)), ValueError, "valid: an equal number of examples in x and y is expected, got ([], [60])"),
    "valid, meta": (dict(valid=(X, Y.to("meta"))), ValueError, "valid: a tensor with values is expected"),
    "valid, a data set": (dict(valid=digits()), TypeError, "valid: (x, y), a Split or a DataLoader is expected, got Dataset"),
    "penalty, complex": (dict(penalty=lambda: 1j), TypeError, "penalty: a real number is expected of it, got torch.complex"),
    "loss, complex": (dict(loss=lambda output, y: output.sum() * 1j), TypeError, "loss: a real number is expected of it, got torch.complex64"),
    "progress": (dict(progress=torch.zeros(2)), TypeError, "progress: True or False is expected, got Tensor"),
    "progress, none": (dict(progress=None), TypeError, "progress: True or False is expected, got None"),
    "checkpoint, a folder": (dict(checkpoint="/"), ValueError, "checkpoint: a file, and no folder, is expected, got '/'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_of_fit(case):
    options, error, message = BAD[case]
    options = {"model": nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2), nn.Linear(2, 2)), "data": (X, Y), "loss": F.cross_entropy} | options
    model, rng = options.pop("model"), torch.get_rng_state()
    before = [p.detach().clone() for p in model.parameters()] if isinstance(model, nn.Module) and case != "lazy model" else []
    with pytest.raises(error) as e: fit(model, options.pop("data"), options.pop("loss"), **options)
    assert message in str(e.value)
    if before and not before[0].is_meta: assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)


def test_numbers_of_numpy_are_numbers(tmp_path):
    def run(one, epochs, path=None):
        model = plain()
        fit(model, toy(), F.cross_entropy, epochs=one(epochs), batch_size=one(7), valid=toy(30), patience=one(4), seed=one(3), clip=np.float64(1), checkpoint=path)
        return model
    run(np.int64, 2, tmp_path / "run.pt")
    assert same(run(int, 4), run(np.int32, 4, tmp_path / "run.pt"))
    assert evaluate(plain(), toy(), ERROR, batch_size=np.int64(7)) == evaluate(plain(), toy(), ERROR, batch_size=10**400)


def test_a_scheduler_of_another_optimizer():
    model = net()
    ours, other = (torch.optim.SGD(model.parameters()) for _ in range(2))
    with pytest.raises(ValueError, match="scheduler: belongs to another optimizer"):
        fit(model, toy(), F.cross_entropy, optimizer=ours, scheduler=torch.optim.lr_scheduler.ExponentialLR(other, 0.5))


@pytest.mark.parametrize("scheduler, message", [
    ("cosine", "scheduler: a scheduler with a function step is expected, got 'cosine'"), (lambda: 0, "scheduler: a scheduler with a function step"),
    (type("Odd", (), {"step": lambda self, loss: 0})(), r"scheduler.step: a function of nothing is expected, got <lambda>\(loss\)"),
    (type("Odd", (), {"step": 3})(), "scheduler.step: a function of nothing is expected, got 3")])
def test_a_scheduler_that_cannot_step(scheduler, message):
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(TypeError, match=message):
        fit(model, toy(), F.cross_entropy, optimizer=torch.optim.SGD(model.parameters()), scheduler=scheduler)
    assert torch.equal(model.weight, before)


def test_float16_with_a_closure_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="amp: None or torch.bfloat16 for an optimizer with a closure is expected, got torch.float16"):
        fit(model, toy(), F.cross_entropy, optimizer=torch.optim.LBFGS(model.parameters()), amp=torch.float16)


class Counts(nn.Module):
    "Draws a random number, counts its calls, and writes buffers in place and anew."
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(2, 2), 0
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.calls, self.last, self.seen = self.calls + 1, torch.rand(()), len(x)
        self.total += 1
        return self.linear(x)


@pytest.mark.parametrize("valid", [(X, Y + 2), DataLoader(TensorDataset(X, Y + 2), 5, shuffle=True, generator=torch.Generator().manual_seed(3))], ids=["tensors", "loader"])
def test_trying_the_validation_data_leaves_no_trace(valid):
    model = Counts().train()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    generator = getattr(valid, "generator", None)
    order = None if generator is None else generator.get_state()
    with pytest.raises(ValueError, match="^valid: a batch that fits"): fit(model, toy(), F.cross_entropy, valid=valid)
    assert model.calls == 0 and not hasattr(model, "seen") and model.training and torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert order is None or torch.equal(generator.get_state(), order)


def test_a_stream_of_validation_data_is_read_once_per_epoch_only():
    class Stream(IterableDataset):
        reads = 0
        def __iter__(self):
            Stream.reads += 1
            return zip(*toy())
    fit(net(), toy(), F.cross_entropy, epochs=2, valid=DataLoader(Stream(), batch_size=7))
    assert Stream.reads == 2


def test_bad_metrics():
    with pytest.raises(ValueError, match=r"each: a scalar is expected of it, got shape \(60,\)"):
        evaluate(net(), toy(), {"each": lambda output, y: output[:, 0]})
    with pytest.raises(TypeError, match="metrics: a dict of functions"): evaluate(net(), toy(), error_rate)


ERROR = {"error": error_rate}


@pytest.mark.parametrize("model, data, metrics, options, error, message", [
    (None, (X, Y), ERROR, {}, TypeError, "^model: an nn.Module is expected, got NoneType"), (print, (X, Y), ERROR, {}, TypeError, "^model: an nn.Module"),
    (nn.LazyLinear(2), (X, Y), ERROR, {}, ValueError, "^model: parameters with values"), (nn.ReLU(), None, ERROR, {}, TypeError, "^data: .* got NoneType"),
    (nn.ReLU(), X, ERROR, {}, TypeError, "^data: .* got Tensor"), (nn.ReLU(), digits(), ERROR, {}, TypeError, r"^data: \(x, y\), a Split or a DataLoader is expected, got Dataset"), (nn.ReLU(), ([], Y), ERROR, {}, ValueError, "^data: an equal number of examples"),
    (nn.ReLU(), (X, Y.to("meta")), ERROR, {}, ValueError, "^data: a tensor with values"), (nn.ReLU(), (X, Y), {"a": lambda output, y: 1j}, {}, TypeError, "^a: a real number is expected of it"), (nn.ReLU(), ([1], [2]), ERROR, {}, TypeError, "^data: a tensor in every part is expected, got int"),
    (nn.ReLU(), (X[:0], Y[:0]), ERROR, {}, ValueError, "^data: at least one example"), (nn.ReLU(), (X, Y[:3]), ERROR, {}, ValueError, "^data: an equal number of examples"),
    (nn.ReLU(), (X, Y), None, {}, TypeError, "^metrics: .* got None"), (nn.ReLU(), (X, Y), {}, {}, TypeError, "^metrics: .* got {}"),
    (nn.ReLU(), (X, Y), {1: error_rate}, {}, TypeError, "^metrics: "), (nn.ReLU(), (X, Y), {"a": None}, {}, TypeError, r"^metrics\['a'\]: a function of \(output, y\) is expected, got None"),
    (nn.ReLU(), (X, Y), {"a": lambda output: 0}, {}, TypeError, r"^metrics\['a'\]: "), (nn.Linear(3, 2), (X, Y), ERROR, {}, ValueError, r"^data: a batch .* got x float32 \(60, 2\) and y int64 \(60,\): mat1"),
    (nn.ReLU(), (X, Y.float()), ERROR, {}, ValueError, "^data: a batch .* a tensor of whole numbers is expected"), (nn.ReLU(), (X, Y), {"a": lambda output, y: "b"}, {}, TypeError, "^a: a scalar tensor is expected of it, got str"),
    *((nn.ReLU(), (X, Y), ERROR, dict(batch_size=b), e, "^batch_size: ") for b, e in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("1", TypeError))),
    (nn.ReLU(), (X, Y), ERROR, dict(device="gpu"), ValueError, "^device: "), (nn.ReLU(), (X, Y), ERROR, dict(device=1.5), ValueError, "^device: "), (nn.ReLU(), (X, Y), ERROR, dict(amp="half"), ValueError, "^amp: "),
])
def test_bad_arguments_of_evaluate(model, data, metrics, options, error, message):
    with pytest.raises(error, match=message): evaluate(model, data, metrics, **options)


@pytest.mark.parametrize("output, y, error, message", [
    (None, Y, TypeError, "^output: a tensor is expected, got None"), ([[1.0]], Y, TypeError, "^output: "), (X, None, TypeError, "^y: a tensor of whole numbers is expected, got None"),
    (X, Y.tolist(), TypeError, "^y: "), (X, Y.float(), TypeError, "^y: "), (X, Y.bool(), TypeError, "^y: "), (X, Y[:3], ValueError, r"^y: a tensor of shape \(60\) is expected, got \(3,\)"),
    (X, Y[:, None], ValueError, "^y: a tensor of shape"), (X[:0], Y[:0], ValueError, "^output: a tensor with at least one element"), (torch.tensor(1.0), torch.tensor(0), ValueError, "^output: a row of scores"),
])
def test_bad_arguments_of_error_rate(output, y, error, message):
    with pytest.raises(error, match=message): error_rate(output, y)


LOSSES = History({"train_loss": [2.0, 1.0], "valid_loss": [1.0, 2.0]}, index=[1, 2])


@pytest.mark.parametrize("options, error, message", [
    (dict(ax=3), TypeError, "^ax: one axes of matplotlib is expected, got 3"), (dict(columns=3), TypeError, "^columns: names of columns is expected, got 3"), (dict(columns=[]), ValueError, "^columns: at least one"),
    (dict(columns="valid"), ValueError, "^columns: one of 'train_loss', 'valid_loss' is expected, got 'valid'"), (dict(columns=[None]), TypeError, "^columns: "), (dict(columns=["train_loss", 1]), TypeError, "^columns: "),
])
def test_bad_arguments_of_draw(options, error, message):
    with pytest.raises(error, match=message): LOSSES.draw(**options)


@pytest.mark.parametrize("history", [History({"error": [1.0]}), History({"train_loss": [math.nan]}), History({"train_loss": []}, dtype=float), History({"train_loss": ["low"]}),
                                     LOSSES.set_axis([1, 1]), LOSSES.set_axis(["a", "b"]), LOSSES.set_axis(["valid_loss", "valid_loss"], axis=1)], ids=["no loss", "nan", "empty", "text", "same epoch", "no epochs", "same name"])
def test_a_history_without_a_best_epoch(history):
    with pytest.raises(ValueError, match="^history: "): history.best_epoch


@pytest.mark.parametrize("history, message", [
    (LOSSES.set_axis([1, 1]), "^history: one row for each epoch is expected, got \\[1, 1\\]"), (LOSSES.assign(valid_loss=math.nan), "^history: an epoch with a valid_loss"), (LOSSES.assign(train_loss="low"), "^columns: one column of numbers for 'train_loss' is expected, got Series"),
    (LOSSES.set_axis(["train_loss", "train_loss"], axis=1), "^columns: one column of numbers for 'train_loss'"),
])
def test_a_history_that_cannot_be_drawn_leaves_the_axes(history, message):
    ax = subplots()[1]
    with pytest.raises(ValueError, match=message): history.draw(ax)
    assert not ax.lines
    plt.close(ax.figure)


# ---- several processes


def with_ddp(folder):
    "Half of each batch per process; then a resumed run, and a loss that is NaN in one process only."
    rank = dist.get_rank()
    half = tuple(t[rank::2] for t in toy())
    def wrapped(): return nn.parallel.DistributedDataParallel(plain())
    model, resumed, path = wrapped(), wrapped(), Path(folder, "ddp.pt")
    history = fit(model, half, F.cross_entropy, epochs=5, valid=toy(30), patience=3)
    fit(wrapped(), half, F.cross_entropy, epochs=2, valid=toy(30), patience=3, checkpoint=path)
    fit(resumed, half, F.cross_entropy, epochs=5, valid=toy(30), patience=3, checkpoint=path)
    try: fit(model, (half[0] / (1 - rank), half[1]), F.cross_entropy)
    except FloatingPointError as e: error = str(e)
    state = {k: v.numpy() for k, v in model.module.state_dict().items()}
    return state, pd.DataFrame(history), same(model, resumed), error, sorted(os.listdir(folder))


def with_fsdp(folder):
    "The same model in shards, on the same data in both processes."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    def wrapped():
        model = plain()
        for layer in model: fully_shard(layer, mesh=mesh) if any(True for _ in layer.parameters()) else None
        return fully_shard(model, mesh=mesh)
    model, resumed, path = wrapped(), wrapped(), Path(folder, "fsdp.pt")
    history = fit(model, toy(), F.cross_entropy, epochs=5, valid=toy(30), patience=3, clip=10.0)
    fit(wrapped(), toy(), F.cross_entropy, epochs=2, valid=toy(30), patience=3, clip=10.0, checkpoint=path)
    fit(resumed, toy(), F.cross_entropy, epochs=5, valid=toy(30), patience=3, clip=10.0, checkpoint=path)
    state, again = ({k: v.full_tensor().numpy() for k, v in m.state_dict().items()} for m in (model, resumed))
    return state, pd.DataFrame(history), all((state[k] == again[k]).all() for k in state), None, sorted(os.listdir(folder))


def plain():
    set_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.mark.long
@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is without torch.distributed")
@pytest.mark.parametrize("f, name", [(with_ddp, "ddp"), pytest.param(with_fsdp, "fsdp", marks=pytest.mark.long)])
def test_two_processes_train_like_one(tmp_path, f, name):
    model = plain()
    history = fit(model, toy(), F.cross_entropy, epochs=5, valid=toy(30), patience=3, clip=10.0)
    (state, table, resumed, error, files), other = in_two_processes(f, tmp_path, tmp_path)
    for key, value in model.state_dict().items(): np.testing.assert_allclose(state[key], value.numpy(), rtol=1e-4, atol=1e-6)
    pd.testing.assert_frame_equal(table, pd.DataFrame(history), rtol=1e-4)
    pd.testing.assert_frame_equal(table, other[1], check_exact=True)
    assert resumed and other[2]
    assert {f"{name}.rank0.pt", f"{name}.rank1.pt"} <= set(files) and not any(file.endswith(".tmp") for file in files)
    if f is with_ddp: assert "at step 1 (epoch 1): the first parameter whose gradient is not finite is 'module.0.weight'" in error and other[3]


# ---- history


def test_history_is_a_table_that_draws_itself():
    history = fit(net(), toy(), F.cross_entropy, valid=toy(30), metrics={"error": error_rate}, epochs=4)
    assert isinstance(history, History) and history.index.tolist() == [1, 2, 3, 4] and history.index.name == "epoch"
    ax = history.draw()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train loss", "valid loss"] and ax.get_xlabel() == "epoch"
    assert history.draw(columns="valid_error").get_ylabel() == "valid error"
    assert isinstance(pickle.loads(pickle.dumps(history)), History)


def test_no_bar_without_a_person(capfd):
    fit(net(), toy(), F.cross_entropy, epochs=2)
    assert capfd.readouterr() == ("", "")
