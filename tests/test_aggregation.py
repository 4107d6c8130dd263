"Steps from many gradients: against vectors, general solvers, a peer library, and the cases where a method has nothing to say."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize, nnls
from torchjd import aggregation as peer

from sharetie.aggregation import aligned, cagrad, graddrop, gradvac, imtl, mgda, nash, pcgrad, upgrad
from sharetie.results import set_seed

METHODS = {"pcgrad": pcgrad, "mgda": mgda, "cagrad": cagrad, "imtl": imtl, "nash": nash, "aligned": aligned, "upgrad": upgrad}


def gradients(tasks, width=30, seed=0, shift=.1):
    return torch.randn(tasks, width, generator=set_seed(seed), dtype=torch.float64) + shift


def step(method, J): return J.T @ method(J @ J.T)


@pytest.fixture(params=METHODS, ids=str)
def method(request): return METHODS[request.param]


# Any problem

@settings(max_examples=25, deadline=None)
@given(tasks=st.integers(1, 12), width=st.integers(1, 20), seed=st.integers(0, 10_000), exponent=st.integers(-12, 12))
def test_all_give_finite_steps_that_scale_with_the_gradients(tasks, width, seed, exponent):
    J = gradients(tasks, width, seed)
    for name, f in METHODS.items():
        d, scaled = step(f, J), step(f, J * 10. ** exponent)
        assert d.isfinite().all(), name
        if width <= tasks: continue  # of dependent gradients the step is not always continuous
        size = 1 if name == "nash" else 10. ** exponent
        torch.testing.assert_close(scaled / size, d, rtol=1e-5, atol=1e-7, msg=name)


@settings(max_examples=40, deadline=None)
@given(tasks=st.integers(2, 20), width=st.integers(1, 30), seed=st.integers(0, 10_000))
def test_the_shortest_step_is_that_of_scipy(tasks, width, seed):
    J = gradients(tasks, width, seed)
    u, _ = nnls(torch.cat([J.T, torch.ones(1, tasks)]).numpy(), torch.eye(width + 1)[-1].double().numpy())
    best = J.T @ torch.from_numpy(u / u.sum())
    a = mgda(J @ J.T)
    assert a.min() >= 0 and abs(a.sum() - 1) < 1e-9
    torch.testing.assert_close(J.T @ a, best, rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(tasks=st.integers(1, 8), width=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_upgrad_is_the_mean_of_projections(tasks, width, seed):
    J = gradients(tasks, width, seed, shift=0)
    found = []
    for g in J:  # Moreau: the projection on {Jd >= 0} is g plus the part that the polar cone's generators, -J, explain
        u, _ = nnls(-J.T.numpy(), g.numpy())
        found.append(g + J.T @ torch.from_numpy(u))
    d = step(upgrad, J)
    torch.testing.assert_close(d, torch.stack(found).mean(0), rtol=1e-6, atol=1e-6)
    assert (J @ d).min() > -1e-6


@pytest.mark.parametrize("c", [.1, .5, 1., 3.])
@pytest.mark.parametrize("seed", range(4))
def test_cagrad_solves_its_primal_problem(c, seed):
    J = gradients(4, 6, seed, shift=0)
    mean = J.mean(0)
    radius = c * mean.norm().item()
    def worst(d): return -(d[-1])
    found = minimize(worst, [*mean.tolist(), (J @ mean).min().item()], method="SLSQP", tol=1e-12, options={"maxiter": 500}, constraints=[
        {"type": "ineq", "fun": lambda d: J.numpy() @ d[:-1] - d[-1]},
        {"type": "ineq", "fun": lambda d: radius ** 2 - ((d[:-1] - mean.numpy()) ** 2).sum()}])
    d = step(lambda gram: cagrad(gram, c), J)
    assert (d - mean).norm() <= radius * (1 + 1e-9)
    assert (J @ d).min().item() == pytest.approx(found.x[-1], abs=1e-5)


def test_cagrad_with_a_large_radius_nears_the_shortest_step():
    J = gradients(3, 10, shift=.5)
    a, b = step(lambda gram: cagrad(gram, 1e4), J), step(mgda, J)
    assert torch.cosine_similarity(a, b, 0) > 1 - 1e-6


@settings(max_examples=40, deadline=None)
@given(tasks=st.integers(1, 30), seed=st.integers(0, 10_000), spread=st.floats(0, 6))
def test_nash_solves_its_equation(tasks, seed, spread):
    J = gradients(tasks, 40, seed) * 10 ** (spread * torch.rand(tasks, 1, generator=set_seed(seed), dtype=torch.float64))
    gram = J @ J.T
    a = nash(gram)
    torch.testing.assert_close(gram @ a * a, torch.ones_like(a), rtol=1e-7, atol=1e-7)
    assert (J.T @ a).norm() == pytest.approx(math.sqrt(tasks))


def test_imtl_has_equal_projections_and_aligned_one_singular_value():
    J = gradients(6)
    shares = J @ step(imtl, J) / J.norm(dim=1)
    torch.testing.assert_close(shares, shares[:1].expand(6))
    U, s, Vh = torch.linalg.svd(J, full_matrices=False)
    torch.testing.assert_close(step(aligned, J), s.min() * (U @ Vh).mean(0))


def vector_pcgrad(J, orders, phi=None):
    total = torch.zeros_like(J[0])
    for k, order in enumerate(orders):
        p = J[k].clone()
        for j in order:
            c = torch.cosine_similarity(p, J[j], 0)
            wanted = 0. if phi is None else phi[k, j]
            if j != k and c < wanted:
                p = p + p.norm() * (wanted * (1 - c * c).sqrt() - c * (1 - wanted ** 2) ** .5) / (J[j].norm() * (1 - wanted ** 2) ** .5) * J[j]
        total += p
    return total


def test_pcgrad_and_gradvac_are_those_on_vectors_in_any_order():
    J = gradients(6, 8, shift=0)
    generator = set_seed(3)
    orders = [torch.randperm(6, generator=generator).tolist() for _ in range(6)]
    torch.testing.assert_close(J.T @ pcgrad(J @ J.T, set_seed(3)), vector_pcgrad(J, orders))
    phi = torch.rand(6, 6, generator=generator, dtype=torch.float64) - .5
    torch.testing.assert_close(J.T @ gradvac(J @ J.T, phi, set_seed(3))[0], vector_pcgrad(J, orders, phi))


def test_the_peer_agrees():
    for seed in range(3):
        J = gradients(5, 12, seed, shift=.2)
        def check(method, theirs, factor=1., tol=1e-3):
            torch.testing.assert_close(step(method, J) * factor, theirs(J), rtol=tol, atol=tol)
        check(imtl, peer.IMTLG())
        check(aligned, peer.AlignedMTL())
        pair = J[:2]
        torch.testing.assert_close(step(pcgrad, pair), peer.PCGrad()(pair))
        torch.testing.assert_close(step(mgda, pair), peer.MGDA(epsilon=1e-9, max_iters=1000)(pair), rtol=1e-3, atol=1e-3)
        check(upgrad, peer.UPGrad())
    torch.testing.assert_close(graddrop(gradients(1)), peer.GradDrop()(gradients(1)))


# Little or nothing to say

def test_one_task(method):
    J = gradients(1)
    torch.testing.assert_close(torch.nn.functional.normalize(step(method, J), dim=0), torch.nn.functional.normalize(J[0], dim=0))


def test_a_task_that_has_arrived(method):
    J = gradients(3)
    with_zero = torch.cat([J[:1], torch.zeros(1, 30), J[1:]])
    d = step(method, with_zero)
    assert d.isfinite().all()
    if method is mgda: assert d.abs().max() < 1e-12
    elif method in (imtl, nash): torch.testing.assert_close(d, step(method, J))
    else: assert d.norm() > 0


def test_all_have_arrived(method):
    a = method(torch.zeros(3, 3))
    assert a.shape == (3,) and a.isfinite().all()


def test_identical_gradients_keep_their_direction(method):
    J = gradients(1).expand(4, 30)
    d = step(method, J)
    torch.testing.assert_close(d / d.norm(), J[0] / J[0].norm(), rtol=1e-5, atol=1e-5)


def test_opposite_gradients_of_one_length_cancel(method):
    g = gradients(1)
    assert step(method, torch.cat([g, -g])).norm() < 1e-4 * g.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types_of_numbers(method, dtype):
    gram = torch.tensor([[2., -.5, .25], [-.5, 1., .5], [.25, .5, 4.]])
    a = method(gram.to(dtype))
    assert a.dtype == dtype
    torch.testing.assert_close(a.float(), method(gram), rtol=2e-2, atol=2e-2)


def test_the_gram_matrix_stays_as_it_was_and_gets_no_gradient(method):
    J = gradients(4).requires_grad_()
    gram = J @ J.T
    before = gram.detach().clone()
    assert not method(gram).requires_grad
    assert torch.equal(gram, before)


# Bad input

@pytest.mark.parametrize("gram, error, words", [
    ([[1.]], TypeError, "gram: a floating point tensor is expected"),
    (torch.eye(2, dtype=torch.int64), TypeError, "floating point"),
    (torch.ones(3), ValueError, "2 axes"),
    (torch.ones(2, 3), ValueError, r"square matrix \(tasks, tasks\) is expected, got \(2, 3\)"),
    (torch.ones(0, 0), ValueError, "at least one element"),
    (torch.diag(torch.tensor([1., math.nan, 1])), ValueError, "NaN or infinity in task 1"),
    (torch.tensor([[1., math.nan], [math.nan, 1.]]), ValueError, "finite"),
    (torch.tensor([[1., .5], [0., 1.]]), ValueError, "inner products"),
    (torch.tensor([[1., 2.], [2., 1.]]), ValueError, "inner products"),
    (torch.diag(torch.tensor([1., -1.])), ValueError, "inner products"),
    (torch.eye(2, device="meta"), ValueError, "meta device"),
])
def test_what_is_no_gram_matrix(method, gram, error, words):
    with pytest.raises(error, match=words): method(gram)


def test_other_bad_input():
    gram = torch.eye(2)
    with pytest.raises(TypeError, match="generator: a torch.Generator or None is expected, got 5"): pcgrad(gram, 5)
    with pytest.raises(ValueError, match="c: a finite number of at least 0 is expected, got -1"): cagrad(gram, -1)
    with pytest.raises(TypeError, match="c: a number"): cagrad(gram, "0.4")
    with pytest.raises(ValueError, match="target: cosines above -1 and below 1"): gradvac(gram, torch.full((2, 2), 1.))
    with pytest.raises(ValueError, match=r"target: a tensor of shape \(2, 2\)"): gradvac(gram, torch.zeros(3, 3))
    with pytest.raises(ValueError, match="gradients: finite numbers"): graddrop(torch.tensor([[math.nan]]))
    with pytest.raises(ValueError, match="gradients: a tensor of 2 axes"): graddrop(torch.ones(3))
