"Products: optimal ones against closed forms and descent, planted structures found, bad input."
import pytest
import torch

from sharetie.products import cp_factors, matrix_factors, tucker_factors
from sharetie.results import set_seed


def test_outputs_decide_as_the_closed_form_says():
    set_seed(0)
    w, x = torch.randn(7, 9).double(), (torch.randn(9, 9) * torch.logspace(0, -3, 9)).double() @ torch.randn(9, 50).double()
    c = torch.linalg.cholesky(x @ x.T)
    for r in range(1, 8):
        up, down = matrix_factors(w, r, w @ x)
        u, s, vh = torch.linalg.svd(w @ c)  # whitened, truncated, and turned back
        whitened = u[:, :r] * s[:r] @ vh[:r] @ torch.linalg.inv(c)
        torch.testing.assert_close(up @ down, whitened, atol=1e-6, rtol=1e-6)
        lost = (w @ x - up @ down @ x).square().sum()
        torch.testing.assert_close(lost, torch.linalg.svdvals(w @ x)[r:].square().sum())
        plain_up, plain_down = matrix_factors(w, r)
        assert lost <= (w @ x - plain_up @ plain_down @ x).square().sum() + 1e-9
        torch.testing.assert_close((w - plain_up @ plain_down).square().sum(), torch.linalg.svdvals(w)[r:].square().sum())
        torch.testing.assert_close(up.T @ up, down @ down.T)  # the same sizes


def test_no_descent_beats_the_outputs_closed_form():
    set_seed(3)
    w, x = torch.randn(5, 6).double(), torch.randn(6, 40).double() * torch.logspace(1, -1, 6).double()[:, None]
    up, down = matrix_factors(w, 2, w @ x)
    best = (w @ x - up @ down @ x).square().sum().item()
    for _ in range(2):
        a, b = torch.randn(5, 2).double().requires_grad_(), torch.randn(2, 6).double().requires_grad_()
        optimizer = torch.optim.LBFGS([a, b], max_iter=60, line_search_fn="strong_wolfe")
        def closure():
            optimizer.zero_grad()
            loss = (w @ x - a @ b @ x).square().sum()
            loss.backward()
            return loss
        optimizer.step(closure)
        assert best * (1 - 1e-9) <= closure().item() <= best * 1.1  # arrives, and no lower


@pytest.mark.parametrize("d", [1, 2, 3])
def test_planted_convolutions_are_found(d):
    set_seed(d)
    k = (3, 2, 3)[:d]
    out, into = torch.randn(8, 3).double(), torch.randn(2, 7).double()
    planted = torch.einsum("tp,pq...,qs->ts...", out, torch.randn(3, 2, *k).double(), into)
    a, core, b = tucker_factors(planted, (2, 3))
    torch.testing.assert_close(torch.einsum("tp,pq...,qs->ts...", b, core, a), planted)
    parts = [torch.randn(n, 3).double() for n in (8, 7, *k)]
    letters = "tsijk"[:d + 2]
    product = ",".join(f"{c}r" for c in letters) + f"->{letters}"
    planted = torch.einsum(product, *parts)
    found = cp_factors(planted, 3)
    assert (torch.einsum(product, *found) - planted).norm() < 1e-5 * planted.norm()
    sizes = torch.stack([f.norm(dim=0) for f in found])
    torch.testing.assert_close(sizes, sizes[:1].expand_as(sizes))


def test_tucker_by_turns_is_no_worse_than_one_turn_and_than_random_bases():
    set_seed(0)
    w = torch.randn(8, 7, 3, 3).double()
    def lost(parts): return (torch.einsum("tp,pqij,qs->tsij", parts[2], parts[1], parts[0]) - w).square().sum()
    assert lost(tucker_factors(w, (3, 4))) <= lost(tucker_factors(w, (3, 4), steps=0)) + 1e-12
    for _ in range(20):
        a, b = (torch.linalg.qr(torch.randn(n, r).double())[0] for n, r in ((7, 3), (8, 4)))
        assert lost((a.T, torch.einsum("tsij,tp,sq->pqij", w, b, a), b)) >= lost(tucker_factors(w, (3, 4)))


def descended(lost, shapes, starts=6):
    "The least loss that descent from random factors finds."
    found = []
    for seed in range(starts):
        draw = torch.Generator().manual_seed(seed)
        parts = [torch.randn(shape, generator=draw, dtype=torch.double).requires_grad_() for shape in shapes]
        optimizer = torch.optim.LBFGS(parts, max_iter=400, tolerance_change=1e-12, line_search_fn="strong_wolfe")
        def closure():
            optimizer.zero_grad()
            loss = lost(parts)
            loss.backward()
            return loss
        optimizer.step(closure)
        found.append(lost(parts).item())
    return min(found)


@pytest.mark.long
def test_no_descent_beats_tucker_by_turns():
    w = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    def lost(parts): return (torch.einsum("tp,pqi,qs->tsi", parts[2], parts[1], parts[0]) - w).square().sum()
    ours, plain = (lost(tucker_factors(w, (2, 3), steps=steps)).item() for steps in (50, 0))
    assert ours < plain and ours == pytest.approx(descended(lost, [(2, 5), (3, 2, 3), (6, 3)]), rel=1e-6)


def test_no_descent_beats_cp_by_turns():
    w = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    def lost(parts): return (torch.einsum("tr,sr,ir->tsi", *parts) - w).square().sum()
    for rank in (1, 2):
        parts = [f.requires_grad_() for f in cp_factors(w, rank, steps=2000)]
        assert lost(parts).item() == pytest.approx(descended(lost, [(n, rank) for n in w.shape]), rel=1e-3)
        assert all(g.abs().max() < .05 for g in torch.autograd.grad(lost(parts), parts))


def test_cp_of_one_axis_is_a_matrix():
    w = torch.randn(5, 4, 1).double()
    torch.testing.assert_close(torch.einsum("tr,sr,ir->tsi", *cp_factors(w, 2))[..., 0], torch.mm(*matrix_factors(w[..., 0], 2)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("call, error, message", [
    (lambda: matrix_factors(torch.ones(3, 4), 4), ValueError, "from 1 to 3"), (lambda: matrix_factors(torch.ones(3), 1), ValueError, "2 axes"),
    (lambda: matrix_factors(torch.ones(3, 4), 1, torch.ones(4, 4)), ValueError, r"shape \(3, any\)"), (lambda: tucker_factors(torch.ones(3, 4), (1, 1)), ValueError, "three axes"),
    (lambda: tucker_factors(torch.ones(3, 4, 2), (5, 1)), ValueError, "from 1 to 4"), (lambda: cp_factors(torch.ones(3, 4, 2), 0), ValueError, "from 1 to 6"),
    (lambda: cp_factors(torch.full((3, 4, 2), torch.nan), 1), ValueError, "finite")])
def test_bad_tensors(call, error, message):
    with pytest.raises(error, match=message): call()
