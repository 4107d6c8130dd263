"Training many models at once: the same as one by one, whatever the scheme; bad input; losses that are lost."
import copy

import pytest
import torch
from torch import nn

from sharetie.gates import CGC, PLE, AdaTT, DSelectK, MMoE, OMoE
from sharetie.multitask import Hard, Single
from sharetie.related import fit_together_
from sharetie.results import set_seed


def layer(out=5, dim=4): return nn.Sequential(nn.Linear(dim, out), nn.Tanh())
def heads(): return {"a": nn.Linear(5, 1), "b": nn.Linear(5, 1)}
def squared(outputs, y): return (torch.cat([*outputs.values()], 1) - y).square().mean()


SCHEMES = {"hard": lambda: Hard(layer(), heads()), "single": lambda: Single(layer(), heads(), redraw=True),
           "mmoe": lambda: MMoE(layer(), heads(), 3), "omoe": lambda: OMoE(layer(), heads(), 3),
           "cgc": lambda: CGC(layer(), heads()), "ple": lambda: PLE([layer(), layer(5, 5)], heads()),
           "dselect": lambda: DSelectK(layer(), heads(), 4), "dselect, by example": lambda: DSelectK(layer(), heads(), 4, dim=4),
           "adatt": lambda: AdaTT([layer(), layer(5, 5)], heads(), 2, 1)}


def batches(runs, n=8, seed=0):
    "A function that draws batches for so many runs, the same whenever it is made."
    generator = torch.Generator().manual_seed(seed)
    def draw(): return torch.randn(runs, n, 4, generator=generator).double(), torch.randn(runs, n, 2, generator=generator).double()
    return draw


@pytest.mark.parametrize("name", SCHEMES)
def test_together_is_one_by_one(name):
    "Losses of all steps, and the weights at the end, in double precision."
    set_seed(0)
    models = [SCHEMES[name]().double() for _ in range(3)]
    alone, draw = copy.deepcopy(models), batches(3)
    losses = fit_together_(models, batches(3), squared, steps=4, rate=.01)
    optimizers = [torch.optim.Adam(m.parameters(), .01) for m in alone]
    for step in range(4):
        x, y = draw()
        for i, (m, optimizer) in enumerate(zip(alone, optimizers)):
            optimizer.zero_grad()
            loss = squared(m(x[i]), y[i])
            loss.backward()
            optimizer.step()
            torch.testing.assert_close(losses[step, i], loss.detach())
    for m, other in zip(models, alone):
        for p, q in zip(m.parameters(), other.parameters()): torch.testing.assert_close(p, q)
    assert losses.shape == (4, 3) and not losses.requires_grad


def test_a_lost_loss_leaves_the_models_as_they_were():
    set_seed(0)
    models = [SCHEMES["mmoe"]().double() for _ in range(2)]
    before, steps = copy.deepcopy([m.state_dict() for m in models]), [0]

    def draw():
        x, y = batches(2)()
        steps[0] += 1
        if steps[0] == 3: y[1, 0, 0] = torch.nan
        return x, y

    with pytest.raises(FloatingPointError, match="the loss is .*nan.* at step 3"): fit_together_(models, draw, squared, 5)
    for m, state in zip(models, before): assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())


def test_frozen_weights_stay():
    set_seed(0)
    models = [SCHEMES["mmoe"]().double() for _ in range(2)]
    for m in models: m.levels[0].requires_grad_(False)
    before = copy.deepcopy([m.state_dict() for m in models])
    fit_together_(models, batches(2), squared, 3, .01)
    for m, state in zip(models, before):
        for name, p in m.named_parameters(): assert torch.equal(p, state[name]) != p.requires_grad


class Scaled(nn.Linear):
    "A part with a buffer."
    def __init__(self, scale):
        super().__init__(4, 2)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x): return {"a": self.scale * super().forward(x)}


def test_buffers_may_be_there_if_they_are_equal():
    set_seed(0)
    def draw(): return torch.ones(2, 3, 4), torch.zeros(2, 3, 2)
    losses = fit_together_([Scaled(2.), Scaled(2.)], draw, squared, 3, .1)
    assert (losses[-1] < losses[0]).all()
    with pytest.raises(ValueError, match="models: modules with equal buffers"): fit_together_([Scaled(2.), Scaled(3.)], draw, squared, 3)


ONE = nn.Linear(4, 2)


@pytest.mark.parametrize("change, error, match", [
    ({"models": []}, TypeError, "models: a list of modules"),
    ({"models": nn.Linear(4, 2)}, TypeError, "models: a list of modules"),
    ({"models": [nn.Linear(4, 2), nn.Linear(4, 3)]}, ValueError, r"models: modules of one form and size is expected, got \[10, 15\]"),
    ({"models": [nn.Linear(4, 2), Scaled(1.)]}, ValueError, "models: modules of one form"),
    ({"draw": 3}, TypeError, "draw: a function of nothing"),
    ({"loss": lambda y: 0}, TypeError, "loss: a function of"),
    ({"steps": 0}, ValueError, "steps: a whole number"),
    ({"rate": 0}, ValueError, "rate: a finite number"),
    ({"models": [ONE, ONE]}, ValueError, "models: different modules is expected, got 'one of them twice, of 2'"),
    ({"draw": lambda: None}, TypeError, "draw: a function to inputs and labels is expected, got None"),
    ({"draw": lambda: (torch.ones(3, 5, 4), torch.ones(2, 5, 2))}, ValueError,
     r"draw: a function to inputs and labels for each of 2 models is expected, got \[\(3, 5, 4\), \(2, 5, 2\)\]"),
    ({"draw": lambda: (torch.ones(()), torch.ones(2))}, ValueError, "draw: a function to inputs and labels for each of 2 models"),
    ({"draw": batches(2), "loss": lambda output, y: output - y, "models": [ONE.double(), copy.deepcopy(ONE).double()]}, ValueError,
     r"loss: a function to a scalar is expected, got \(8, 2\)"),
])
def test_bad_input(change, error, match):
    given = {"models": [nn.Linear(4, 2) for _ in range(2)], "draw": lambda: None, "loss": nn.functional.mse_loss, "steps": 1, "rate": .1}
    with pytest.raises(error, match=match): fit_together_(**given | change)
