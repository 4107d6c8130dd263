"""The checks of chapter 00_errors: what passes, what does not, and what the message says."""
import math
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from sharetie.errors import function, look_up, match_names, need, nonnegative, one_of, real, shown, tensor, through, warn, whole

NOT_NUMBERS = [None, "1", "", True, False, np.True_, [1], (1,), {}, 1j, Decimal(1), torch.tensor([1, 2]), float]
NAMES = ["fc.weight", "fc.bias", "head.weight"]


# ---- what came

@pytest.mark.parametrize("value, text", [
    (1, "1"), ("a", "'a'"), (None, "None"), (nn.Linear, "Linear"), (len, "<built-in function len>"),
    (torch.zeros(2, 3), "Tensor of float32, shape (2, 3)"), (np.zeros((2, 3)), "ndarray of float64, shape (2, 3)"),
    (nn.Parameter(torch.zeros(0).half()), "Parameter of float16, shape (0,)"), (torch.tensor(2.5), "tensor(2.5000)"),
    (nn.Sequential(nn.ReLU()), "Sequential( (0): ReLU() )"), (object(), "<object object>"),
])
def test_shown(value, text): assert shown(value) == text


@pytest.mark.parametrize("value", ["x" * 1000, list(range(1000)), nn.Sequential(*map(nn.Linear, range(1, 99), range(2, 100))),
                                   pd.DataFrame({"a": range(9)}), {i: "\n" for i in range(99)}, torch.randn(1, 1, 1), lambda: 0],
                         ids=lambda v: type(v).__name__)
def test_shown_is_one_short_line_without_addresses(value):
    text = shown(value)
    assert len(text) <= 200 and "\n" not in text and "0x" not in text


def test_need():
    need(True, "a", "b", "c")
    with pytest.raises(ValueError) as e: need(False, "rate", "a number above 0", -1)
    assert str(e.value) == "rate: a number above 0 is expected, got -1"
    with pytest.raises(TypeError, match="^model: a module is expected, got int$"): need(0, "model", "a module", int, TypeError)
    with pytest.raises(KeyError): need(None, "a", "b", "c", KeyError)


def test_warn_points_outside_of_the_package_and_torch():
    def inside(name, body):
        space = {"__name__": name, "warn": warn, "torch": torch}
        exec(body, space)
        return space["f"]
    deep = inside("sharetie.deep", "def f(): warn('told')")
    outer = inside("sharetie", "@torch.no_grad()\ndef f(call): call()")
    for call in (deep, lambda: outer(deep)):
        with pytest.warns(UserWarning, match="^told$") as told: call()
        assert [w.filename for w in told] == [__file__]
    other = inside("sharetie_of_others", "def f(call): call()")
    with pytest.warns(UserWarning) as told: other(deep)
    assert [w.filename for w in told] == ["<string>"]


# ---- numbers

@pytest.mark.parametrize("check", [real, whole, nonnegative])
@pytest.mark.parametrize("value", NOT_NUMBERS, ids=shown)
def test_no_number(check, value):
    with pytest.raises(TypeError, match="^rate: a (whole )?number is expected, got "): check(value, "rate")


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.int8(1), Fraction(1, 1)], ids=repr)
def test_real_takes_any_real_number(value):
    assert real(value, "rate", 0, 1) == 1.0 and type(real(value, "rate")) is float
    assert nonnegative(value, "rate") == 1.0


@pytest.mark.parametrize("value, limits, message", [
    (math.nan, {}, "a finite number is"), (math.inf, {}, "a finite number is"), (-math.inf, {"high": 1}, "a finite number of at most 1 is"),
    (10**400, {"low": 0}, "a finite number of at least 0 is"), (np.float32("nan"), {"above": 0}, "a finite number above 0 is"),
    (-1e-9, {"low": 0}, "of at least 0"), (1.1, {"high": 1}, "of at most 1"), (2, {"low": 0, "high": 1}, "from 0 to 1"),
    (0, {"above": 0}, "above 0"), (-1, {"above": 0, "high": 3}, "above 0 and of at most 3"), (4, {"above": 0, "high": 3}, "above 0 and of at most 3"),
])
def test_real_out_of_range(value, limits, message):
    with pytest.raises(ValueError, match=f"^rate: .*{message} .*expected, got"): real(value, "rate", **limits)


def test_the_ends_of_a_range_belong_to_it():
    assert real(0, "a", 0, 1) == 0 and real(1, "a", 0, 1) == 1 and whole(1, "a", 1, 1) == 1 and nonnegative(0, "a") == 0


@pytest.mark.parametrize("value", [1.0, np.float64(1), math.nan, Fraction(1, 1), torch.tensor(1)], ids=repr)
def test_whole_takes_no_other_number(value):
    with pytest.raises(TypeError, match="^n: a whole number is expected"): whole(value, "n")


def test_whole():
    assert whole(np.uint8(3), "n") == 3 and type(whole(np.int64(3), "n")) is int and whole(-2, "n") == -2
    for value, low, high, message in [(0, 1, None, "of at least 1"), (3, None, 2, "of at most 2"), (7, 1, 3, "from 1 to 3")]:
        with pytest.raises(ValueError, match=f"^n: a whole number {message} is expected, got {value}$"): whole(value, "n", low, high)


def test_nonnegative_takes_a_tensor_of_one_number():
    assert nonnegative(torch.tensor([0.5]), "strength") == 0.5 and nonnegative(torch.tensor(2), "strength") == 2.0
    for value in (-1, math.nan, math.inf, -math.inf, torch.tensor(-1.0), torch.tensor(math.nan)):
        with pytest.raises(ValueError, match="^strength: a finite number of at least 0 is expected, got"): nonnegative(value, "strength")
    for value in (torch.tensor(True), torch.zeros(0), torch.zeros((), device="meta"), torch.tensor(1j)):
        with pytest.raises(TypeError, match="^strength: a number is expected"): nonnegative(value, "strength")
    with pytest.raises(TypeError, match="not trained"): nonnegative(nn.Parameter(torch.tensor(1.0)), "strength")


# ---- names

def test_one_of():
    assert one_of("b", "kind", iter("ab")) == "b"
    for value in (None, 1, ["a"], torch.zeros(2), True):
        with pytest.raises(TypeError, match="^kind: one of 'a', 'b' is expected, got"): one_of(value, "kind", ["a", "b"])
    with pytest.raises(ValueError, match=r"^kind: one of 'huber', 'l1' is expected, got 'Hubber'; did you mean 'huber'\?$"):
        one_of("Hubber", "kind", ["huber", "l1"])
    with pytest.raises(ValueError, match="got 'zzz'$"): one_of("zzz", "kind", ["a", "b"])


@pytest.mark.parametrize("pattern, hits", [("fc.weight", ["fc.weight"]), ("fc.*", NAMES[:2]), ("*", NAMES), ("[!f]*", NAMES[2:]), ("*d.w?ight", NAMES[2:])])
def test_match_names(pattern, hits):
    assert match_names(NAMES, pattern, "members") == match_names(iter(NAMES), pattern, "members") == hits


@pytest.mark.parametrize("names, pattern, one, error, message", [
    (NAMES, "fc.wieght", False, ValueError, "^members: 'fc.wieght' matches none of 3 names; the nearest is 'fc.weight'$"),
    (NAMES, "zzzz", False, ValueError, "^members: 'zzzz' matches none of 3 names; they begin with \\['fc.weight'"), (NAMES, "", False, ValueError, "'' matches none"), ([], "*", False, ValueError, "none of 0 names; there are none"),
    (NAMES, "*.weight", True, ValueError, r"matches 2 of 3 names; in a tuple, one is expected, got \['fc.weight', 'head.weight'\]"),
    (NAMES, None, False, TypeError, "^members: a name or pattern .str. is expected, got None"), (NAMES, 3, False, TypeError, "got 3"),
    (NAMES, ["fc.*"], False, TypeError, "^members: "), (None, "*", False, TypeError, "^names: a list of names is expected, got None"),
    ("fc.weight", "*", False, TypeError, "^names: .* got 'fc.weight'"), (torch.zeros(3), "*", False, TypeError, "^names: "),
    ([1, 2], "*", False, TypeError, r"^names: a list of text is expected, got \[1, 2\]"),
])
def test_names_that_do_not_match(names, pattern, one, error, message):
    with pytest.raises(error, match=message): match_names(names, pattern, "members", one)


def test_a_name_that_is_a_pattern_means_itself():
    assert match_names(["a[0]", "a0"], "a[0]", "members", one=True) == ["a[0]"]


# ---- tensors

@pytest.mark.parametrize("value", [None, 1.0, [1.0], np.zeros(3), "x", nn.Linear(1, 1)], ids=lambda v: type(v).__name__)
def test_no_tensor(value):
    for floating, words in {None: "a tensor", True: "a floating point tensor", False: "a tensor of whole numbers"}.items():
        with pytest.raises(TypeError, match=f"^x: {words} is expected, got"): tensor(value, "x", floating)


@pytest.mark.parametrize("dtype, floating", [(torch.float16, True), (torch.bfloat16, True), (torch.float64, True), (torch.int8, False),
                                             (torch.uint8, False), (torch.int64, False), (torch.bool, None), (torch.complex64, None)])
def test_types_of_tensors(dtype, floating):
    x = torch.zeros(2, dtype=dtype)
    assert tensor(x, "x") is x
    for wanted in (True, False):
        if wanted == floating: assert tensor(x, "x", wanted) is x
        else:
            with pytest.raises(TypeError, match=f"^x: .* got Tensor of {str(dtype)[6:]}, shape"): tensor(x, "x", wanted)


@pytest.mark.parametrize("options, message", [
    (dict(ndim=1), r"a tensor of 1 axes is expected, got \(2, 3\)"), (dict(ndim=0), "a tensor of 0 axes"),
    (dict(shape=(2,)), r"a tensor of shape \(2\) is expected"), (dict(shape=(3, 2)), r"a tensor of shape \(3, 2\) is expected, got \(2, 3\)"),
    (dict(shape=(None, 2)), r"a tensor of shape \(any, 2\) is expected"), (dict(finite=True), "finite numbers are expected, got 2 of 6 that are NaN"),
])
def test_tensors_that_do_not_fit(options, message):
    x = torch.tensor([[1.0, math.nan, 2.0], [3.0, -math.inf, 4.0]])
    assert tensor(x, "x", True, 2, (None, 3), True) is x
    with pytest.raises(ValueError, match=f"^x: {message}"): tensor(x, "x", **options)


def test_numbers_of_a_sparse_tensor_are_not_looked_at():
    x = torch.eye(2).to_sparse()
    assert tensor(x, "x", True) is x
    with pytest.raises(TypeError, match="^x: a dense tensor is expected, got torch.sparse_coo$"): tensor(x, "x", finite=True)


def test_empty_tensors():
    assert tensor(torch.zeros(0, 3), "x", finite=True).shape == (0, 3)
    with pytest.raises(ValueError, match=r"^x: a tensor with at least one element is expected, got \(0, 3\)"):
        tensor(torch.zeros(0, 3), "x", filled=True)


# ---- told afterwards

TABLE = nn.Embedding(5, 2)


@pytest.mark.parametrize("numbers, error, message", [
    (torch.tensor([[0, 5]]), ValueError, "^words: numbers from 0 to 4 are expected, got 0 to 5$"), (torch.tensor([-1, 2]), ValueError, "got -1 to 2"),
    (torch.tensor([5], dtype=torch.int32), ValueError, "got 5 to 5"), (torch.zeros(2), TypeError, "^words: a tensor of whole numbers"),
    ([1], TypeError, "^words: a tensor of whole numbers"), (None, TypeError, "^words"), (torch.tensor([True]), TypeError, "^words"),
    *((torch.zeros(3, dtype=dtype), TypeError, "^words: a tensor of int32 or int64 is expected, got") for dtype in (torch.int8, torch.uint8, torch.int16)),
])
def test_numbers_without_a_row(numbers, error, message):
    with pytest.raises(error, match=message): look_up(TABLE, numbers, "words", 5)


def test_rows_are_those_of_the_table():
    for dtype in (torch.int32, torch.int64):
        words = torch.tensor([[0, 4]], dtype=dtype)
        assert torch.equal(look_up(TABLE, words, "words", 5), TABLE(words))
    assert look_up(TABLE, torch.zeros(0, dtype=int), "words", 5).shape == (0, 2)
    for wrong in (IndexError("of another kind"), ValueError("of another kind")):
        def fails(numbers): raise wrong
        with pytest.raises(type(wrong), match="^of another kind$"): look_up(fails, torch.tensor([1]), "words", 5)
    def outer(numbers): return look_up(TABLE, numbers, "inner", 5)
    with pytest.raises(ValueError, match="^outer: numbers from 0 to 4"): look_up(outer, torch.tensor([5]), "outer", 5)
    assert torch.equal(torch.compile(look_up, backend="eager", fullgraph=True)(TABLE, torch.tensor([1]), "words", 5), TABLE.weight[1:2])


def test_a_layer_that_fails_says_why():
    layer = nn.Linear(2, 3)
    assert through(layer, torch.ones(1, 2), "x").shape == (1, 3)
    with pytest.raises(TypeError, match="^x: torch.float32, as the weights are, is expected, got torch.float64$"): through(layer, torch.ones(1, 2).double(), "x")
    with pytest.raises(ValueError, match="^x: cpu, as the weights are, is expected, got .*meta"): through(layer, torch.ones(1, 2, device="meta"), "x")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"): through(layer, torch.ones(1, 3), "x")
    with torch.autocast("cpu", torch.bfloat16): assert through(layer, torch.ones(1, 2).bfloat16(), "x").dtype == torch.bfloat16


# ---- functions

class Called:
    def __call__(self, output, y): return 0


@pytest.mark.parametrize("f", [lambda output, y: 0, lambda *a: 0, lambda output, y=0, *, scale=1: 0, Called(), Called().__call__, nn.MSELoss(),
                               torch.nn.functional.mse_loss, torch.maximum, max, partial(lambda a, b, c: 0, 1), np.maximum])
def test_functions_that_fit(f): assert function(f, "loss", ("output", "y")) is f


@pytest.mark.parametrize("f", [None, "mse", 3, [print], lambda: 0, lambda output: 0, lambda output, y, extra: 0, lambda output, y, *, scale: 0,
                               partial(lambda a, b: 0, 1)], ids=shown)
def test_functions_that_do_not_fit(f):
    with pytest.raises(TypeError, match=r"^loss: a function of \(output, y\) is expected, got ") as e: function(f, "loss", ("output", "y"))
    assert "0x" not in str(e.value)


def test_functions_of_nothing_and_of_anything():
    assert function(dict, "f", ()) is dict
    with pytest.raises(TypeError, match=r"^f: a function of nothing is expected, got <lambda>\(x\)$"): function(lambda x: 0, "f", ())
    assert function(len, "f") is len
    with pytest.raises(TypeError, match="^f: a function is expected, got 3$"): function(3, "f")


def test_a_module_is_called_as_its_forward_is():
    assert function(nn.MSELoss(), "loss", ("output", "y"))
    with pytest.raises(TypeError, match=r"^penalty: a function of nothing is expected, got Linear\(input"): function(nn.Linear(1, 1), "penalty", ())
