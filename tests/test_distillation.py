"Distillation: closed forms, limits, what teachers keep, hooks on modules that are reused, tied students, bad input."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sharetie.distillation import (DistillationLoss, Distiller, Lesson, Taught, Views, attention_loss, attention_map, hint_loss, logit_loss, soft_loss,
                                   teach)
from sharetie.layers import share_layers_
from sharetie.results import set_seed
from sharetie.train import fit
from tied import TIED


def scores(*shape): return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
@pytest.mark.parametrize("T", [.5, 1., 20.])
def test_soft_loss_and_its_gradient_have_closed_forms(shape, T):
    z, v = scores(*shape).requires_grad_(), scores(*shape).flip(-1).requires_grad_()
    q, p = (z / T).softmax(-1), (v / T).softmax(-1)
    loss = soft_loss(z, v, T)
    torch.testing.assert_close(loss, T * T * (p * (p / q).log()).sum(-1).mean())
    loss.backward()
    torch.testing.assert_close(z.grad, T * (q - p).detach() / (z.numel() / 5))
    assert v.grad is None


@pytest.mark.parametrize("f", [lambda z, v: soft_loss(z, v, 2.), logit_loss, hint_loss, lambda z, v: attention_loss(z[:, :, None], v[:, :, None])])
def test_losses_pass_gradcheck_and_vanish_where_nothing_differs(f):
    z, v = scores(4, 6).requires_grad_(), scores(6, 4).T
    assert torch.autograd.gradcheck(lambda z: f(z, v), z)
    assert f(v, v).abs() < 1e-12


def test_high_temperature_matches_logits_at_the_rate_of_one_over_t():
    z, v = scores(3, 7).requires_grad_(), scores(7, 3).T
    limit, = torch.autograd.grad(logit_loss(z, v), z)
    d = (z - v).detach()
    torch.testing.assert_close(limit, (d - d.mean(1, keepdim=True)) / 7 / 3)
    off = [(torch.autograd.grad(soft_loss(z, v, T), z)[0] - limit).norm() for T in (1e3, 2e3)]
    assert 1.95 < off[0] / off[1] < 2.05


def test_scores_of_minus_infinity_in_the_teacher_are_no_class():
    v = torch.tensor([[0., 1., -torch.inf]])
    assert soft_loss(torch.zeros(1, 3), v).isfinite()


class Small(nn.Module):
    "Everything that a mode and a pass can change."
    def __init__(self, width=6):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(.5), nn.ReLU()), nn.Linear(width, 3)
    def forward(self, x): return self.head(self.body(x))


@pytest.mark.parametrize("live", [False, True])
def test_the_teacher_is_afterwards_as_it_was(live):
    set_seed(0)
    teacher, student, x = Small(), Small(), torch.randn(16, 4)
    teacher.body[2].eval()
    before, modes = copy.deepcopy(teacher.state_dict()), [m.training for m in teacher.modules()]
    if live:
        pupil = Distiller(student, teacher, match={"body": "body"})
        fit(pupil, (x, torch.full((16,), -100)), pupil.loss, epochs=3, progress=False)
    else: fit(student, teach(teacher, (x, None), batch_size=5), DistillationLoss(), epochs=3, progress=False)
    after = teacher.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before) and [m.training for m in teacher.modules()] == modes
    assert not any(m._forward_hooks for m in teacher.modules()) and not any(m._forward_hooks for m in student.modules())
    assert all(p.grad is None for p in teacher.parameters())


def test_teach_answers_in_evaluation_mode_whatever_the_batch():
    teacher, x = Small(), torch.randn(7, 4)
    wanted = copy.deepcopy(teacher).eval()(x)
    for batch_size in (None, 1, 3):
        torch.testing.assert_close(teach(teacher, (x, None), batch_size=batch_size)[1].scores, wanted)


@pytest.mark.parametrize("hard", [0., .3, 1.])
def test_labels_count_where_there_are_some(hard):
    z, v, y = scores(4, 3), scores(3, 4).T, torch.tensor([2, -100, 0, -100])
    loss = DistillationLoss(2., hard)(z, Taught(y, v))
    torch.testing.assert_close(loss, (1 - hard) * soft_loss(z, v, 2.) + hard * F.cross_entropy(z[[0, 2]], y[[0, 2]]))
    none = DistillationLoss(2., hard)(z, Taught(torch.full((4,), -100), v))
    torch.testing.assert_close(none, (1 - hard) * soft_loss(z, v, 2.))


def test_tokens_are_examples():
    z, v, y = scores(2, 3, 5), scores(2, 3, 5).flip(0), torch.tensor([[0, 1, -100], [-100, 4, 2]])
    loss = DistillationLoss(1., .5)(z, Taught(y, v))
    torch.testing.assert_close(loss, .5 * soft_loss(z, v) + .5 * F.cross_entropy(z.flatten(0, 1), y.flatten()))


def test_attention_sees_where_not_how():
    f = scores(2, 5, 3, 4)
    turn = torch.linalg.qr(scores(5, 5))[0]
    torch.testing.assert_close(attention_map(torch.einsum("oc,bchw->bohw", 3 * turn, f)), attention_map(f))
    tokens = f.flatten(2).mT
    torch.testing.assert_close(attention_map(tokens), attention_map(f))
    a, b = attention_map(f), attention_map(f.flip(-1))
    torch.testing.assert_close(attention_loss(f, f.flip(-1)), .5 * (a - b).square().sum(1).mean())


def test_views_go_each_to_its_own():
    teacher, student, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(4, 3)
    lesson = Distiller(student, teacher)(Views(student=x, teacher=2 * x))
    assert isinstance(lesson, Lesson)
    torch.testing.assert_close(lesson.output, student(x))
    torch.testing.assert_close(lesson.scores, teacher(2 * x))


def test_bridges_lead_from_width_to_width():
    pupil = Distiller(Small(5), Small(6), match=[("body.0", "body.0"), ("head", "head")], example=torch.randn(4, 4))
    assert [type(b).__name__ for b in pupil.bridges] == ["_Bridge", "Identity"]
    assert {n for n, _ in pupil.named_parameters()} == {f"student.{n}" for n, _ in pupil.student.named_parameters()} | {"bridges.0.weight", "bridges.0.bias"}
    out = pupil(torch.randn(4, 4))
    wanted = soft_loss(out.output, out.scores) + .5 * (hint_loss(pupil.bridges[0](out.features[0][0]), out.features[0][1]) + hint_loss(*out.features[1]))
    torch.testing.assert_close(pupil.loss(out, torch.full((4,), -100)), wanted)


class Loop(nn.Module):
    "One block, three times."
    def __init__(self):
        super().__init__()
        self.block, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
    def forward(self, x):
        for _ in range(3): x = self.block(x).tanh()
        return self.head(x)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 3)
    def forward(self, x):
        for block in self.blocks: x = block(x).tanh()
        return self.head(x)


def test_a_reused_module_gives_a_feature_for_each_call():
    loop, stack, x = Loop(), Stack(), torch.randn(5, 4)
    lesson = Distiller(loop, stack, match=[("block", f"blocks.{i}") for i in range(3)])(x)
    first = loop.block(x)
    torch.testing.assert_close(lesson.features[0][0], first)
    torch.testing.assert_close(lesson.features[1][0], loop.block(first.tanh()))
    torch.testing.assert_close(lesson.features[2][1], stack.blocks[2](lesson.features[1][1].tanh()))
    back = Distiller(stack, loop, match=[(f"blocks.{i}", "block") for i in range(3)])(x)
    torch.testing.assert_close(back.features[2][1], lesson.features[2][0])
    with pytest.raises(ValueError, match="3 times, got 2"): Distiller(loop, stack, match=[("block", "blocks.0"), ("block", "blocks.1")])(x)


@pytest.mark.parametrize("build, x", [*TIED, (Loop, torch.randn(8, 4)), (lambda: share_layers_(m := Stack()) and m, torch.randn(8, 4))])
def test_ties_of_students_stay_and_are_stored_once(build, x):
    set_seed(0)
    student, teacher = build(), build()
    count = sum(p.numel() for p in student.parameters())
    pupil = Distiller(student, teacher)
    history = fit(pupil, (x, torch.full((len(x),), -100)), pupil.loss, epochs=30, progress=False)
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    assert sum(p.numel() for p in pupil.parameters()) == sum(p.numel() for p in student.parameters()) == count
    other = Distiller(build(), teacher)
    other.load_state_dict(pupil.state_dict())
    for same in (copy.deepcopy(pupil), other): assert torch.equal(same(x).output, pupil(x).output)


def test_the_teacher_follows_to_a_type():
    pupil = Distiller(nn.Linear(3, 2), nn.Linear(3, 2)).double()
    assert pupil(torch.randn(4, 3).double()).scores.dtype == torch.double


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_losses_compile():
    z, v = scores(4, 5).float(), scores(5, 4).T.float().contiguous()
    for f in (soft_loss, logit_loss, hint_loss):
        torch.testing.assert_close(torch.compile(f, backend="aot_eager")(z, v), f(z, v))


A, B = nn.Linear(3, 2), nn.Linear(3, 2)
X = torch.zeros(4, 3)
BAD = {
    "shapes": (lambda: soft_loss(torch.zeros(2, 3), torch.zeros(2, 4)), ValueError, "teacher: a tensor of shape"),
    "no scores": (lambda: soft_loss(torch.zeros(2).long(), torch.zeros(2)), TypeError, "student: a floating"),
    "a number": (lambda: soft_loss(torch.tensor(1.), torch.tensor(1.)), ValueError, "a last axis of scores"),
    "empty": (lambda: logit_loss(torch.zeros(0, 3), torch.zeros(0, 3)), ValueError, "at least one element"),
    "cold": (lambda: soft_loss(X, X, 0.), ValueError, "temperature: "),
    "hard": (lambda: DistillationLoss(1., 1.1), ValueError, "hard: "),
    "NaN": (lambda: DistillationLoss(float("nan")), ValueError, "temperature: "),
    "labels": (lambda: DistillationLoss()(X, torch.zeros(4)), TypeError, "y: `Taught`"),
    "classes second": (lambda: DistillationLoss()(torch.zeros(2, 4, 3), Taught(torch.zeros(2, 3).long(), torch.zeros(2, 4, 3))), ValueError, "labels: one for each answer .*classes last"),
    "live labels": (lambda: (d := Distiller(A, B)).loss(d(X), torch.zeros(4, 1).long()), ValueError, "labels: one for each answer"),
    "example": (lambda: Distiller(A, B, example=torch.zeros(4, 7)), ValueError, "example: what the model can take"),
    "data of another width": (lambda: teach(A, (torch.zeros(4, 7), None)), ValueError, "data: what the model can take"),
    "a teacher of NaN": (lambda: soft_loss(X, X / 0), ValueError, "teacher: scores that have a softmax are expected, got 4 answers"),
    "an endless teacher": (lambda: soft_loss(X, (X + 1) / 0), ValueError, "teacher: scores that have a softmax"),
    "nothing can be": (lambda: soft_loss(X, -(X + 1) / 0), ValueError, "teacher: scores that have a softmax"),
    "scores of NaN": (lambda: logit_loss(X, X / 0), ValueError, "teacher: finite numbers"),
    "one axis": (lambda: attention_map(X), ValueError, "three axes or more"),
    "positions": (lambda: attention_loss(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 4)), ValueError, "at 9 positions"),
    "no data": (lambda: teach(A, X), TypeError, "data: "),
    "empty data": (lambda: teach(A, (X[:0], None)), ValueError, "data: "),
    "other count": (lambda: teach(A, (X, None), view=X[:2]), ValueError, "an equal number of examples"),
    "other labels": (lambda: teach(A, (X, torch.zeros(4, 1).long())), ValueError, "labels: "),
    "no teacher": (lambda: teach(3, (X, None)), TypeError, "teacher: "),
    "itself": (lambda: Distiller(A, A), ValueError, "another module than the student"),
    "no module": (lambda: Distiller(A, 3), TypeError, "teacher: a module"),
    "name": (lambda: Distiller(Stack(), Stack(), match={"block": "blocks.0"}), ValueError, "match"),
    "text": (lambda: Distiller(A, B, match="body"), TypeError, "match: a list of pairs of names"),
    "triple": (lambda: Distiller(A, B, match=[("a", "b", "c")]), TypeError, "match: a pair of names"),
    "by": (lambda: Distiller(A, B, by="hnit"), ValueError, "did you mean 'hint'"),
    "mix": (lambda: Distiller(A, B, mix=soft_loss), TypeError, "mix: "),
    "strength": (lambda: Distiller(A, B, strength=-1.), ValueError, "strength: "),
    "widths": (lambda: (d := Distiller(Small(5), Small(6), match={"body": "body"})).loss(d(torch.randn(4, 4)), torch.zeros(4).long()), ValueError, "shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, text = BAD[case]
    with pytest.raises(error, match=text): call()


def test_a_class_that_both_rule_out_is_none():
    z, v = torch.tensor([[0., 1., -torch.inf]], requires_grad=True), torch.tensor([[1., 0., -torch.inf]])
    loss = soft_loss(z, v, 2.)
    torch.testing.assert_close(loss, soft_loss(z[:, :2], v[:, :2], 2.))
    loss.backward()
    torch.testing.assert_close(z.grad[:, :2], 2 * ((z / 2).softmax(1) - (v / 2).softmax(1)).detach()[:, :2])
    assert z.grad[0, 2] == 0


def test_a_teacher_that_answers_no_number():
    teacher = nn.Linear(3, 2).train()
    with pytest.raises(ValueError, match="scores of the teacher: numbers are expected, got 8 of 8 that are NaN"): teach(teacher, (torch.full((4, 3), torch.nan), None))
    assert teacher.training


def test_classes_in_the_middle_are_refused_without_labels_too():
    z = torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match="classes last"): DistillationLoss()(z, Taught(torch.full((2, 3), -100), z))
    DistillationLoss()(z, Taught(torch.full((2,), -100), z)), DistillationLoss()(z, Taught(torch.full((2, 4), -100), z))
