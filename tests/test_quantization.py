"Quantization: error bounds, peers, packing, layers against plain ones with the same numbers, ties, training for the grid, refusals that change nothing."
import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sharetie.binding import keep_ties
from sharetie.checking import check_ties
from sharetie.codebooks import cluster_, stored_bits
from sharetie.embeddings import ScaledEmbedding
from sharetie.factors import factorize_
from sharetie.finding import find_ties
from sharetie.making import declared_ties
from sharetie.masks import prune_
from sharetie.quantization import (FakeQuantize, QuantizedConv, QuantizedEmbedding, QuantizedLinear, QuantizedWeight, convert_, dequantize, pack_int4,
                                   prepare_, quantize, quantize_, quantized_weights, stored_bytes, unpack_int4)
from sharetie.results import set_seed
from sharetie.saving import load_model, save_model
from sharetie.transformer import CharacterModel
from tied import TIED_LAYERS, Speaker, autoencoder


def by_hand(model, bits, size):
    "A copy whose stored weights are points of the grid."
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1: p.copy_(dequantize(*quantize(p, bits, size), size))
    return model


@pytest.mark.parametrize("bits, size", [(8, None), (4, 3), (4, None), (3, 4)])
@pytest.mark.parametrize("name", TIED_LAYERS)
def test_tied_weights_are_quantized_once_and_stay_tied(name, bits, size, tmp_path):
    set_seed(1)
    build, x, count = TIED_LAYERS[name]
    model = build()
    wanted, before = by_hand(model, bits, size), stored_bytes(model)
    biases = [p for p in model.parameters() if p.ndim == 1]
    small = quantize_(model, bits, size)
    torch.testing.assert_close(small(x), wanted(x))
    assert len(quantized_weights(small)) == count and [*map(id, small.parameters())] == [*map(id, biases)]
    assert stored_bytes(small) < before
    check_ties(small)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(other(x), small(x)) and stored_bytes(other) == stored_bytes(small)
    other = quantize_(build(), bits, size)
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(x), small(x))
    other = quantize_(build(), bits, size)
    save_model(small, tmp_path / "small.safetensors")
    load_model(other, tmp_path / "small.safetensors")
    assert torch.equal(other(x), small(x))
    wide = copy.deepcopy(small).double()
    assert wide(x if not x.is_floating_point() else x.double()).dtype == torch.float64 and stored_bytes(wide) > stored_bytes(small)
    assert len(quantized_weights(wide)) == count


def test_a_tied_table_is_one_module_under_two_names_and_one_entry_of_a_file(tmp_path):
    from safetensors import safe_open
    model = keep_ties(Speaker())
    quantize_(model, 8, names="head")
    assert model.table.quantized is model.head.quantized
    assert find_ties(model)["head.quantized.codes"].names == ("table.quantized.codes", "head.quantized.codes")
    assert not declared_ties(model)
    save_model(model, tmp_path / "one.safetensors")
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["body.bias", "body.weight", "table.quantized.codes", "table.quantized.scales"]
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) == stored_bytes(model)
    model.to("meta")
    assert model.table.quantized is model.head.quantized and model.head.quantized.codes.is_meta


# Grids

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, size", [((5, 40), None), ((5, 40), 16), ((5, 40), 1), ((4, 3, 3, 2), 5), ((3, 7), 100)])
def test_no_weight_moves_by_more_than_half_a_step(dtype, shape, size):
    set_seed(0)
    w = (torch.randn(shape) * torch.logspace(-3, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)
    n = min(size or 10**9, w[0].numel())
    for bits in range(2, 9):
        codes, scales = quantize(w, bits, size)
        assert codes.dtype == torch.int8 and codes.shape == w.shape and scales.dtype == dtype and codes.abs().max() <= 2 ** (bits - 1) - 1
        step = scales.double().repeat_interleave(n, 1)[:, :w[0].numel()].view(shape)
        error = (codes.double() * step - w.double()).abs()
        info = torch.finfo(dtype)  # scales are rounded to the type, small ones more
        assert (error <= step * (.5 + 4 * info.eps * 2 ** (bits - 1)) + 2 ** (bits - 1) * info.smallest_normal * info.eps).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_each_code_is_the_nearest_point_in_half_precision(dtype, bits):
    set_seed(0)
    w = torch.randn(64, 512).to(dtype)
    codes, scales = quantize(w, bits)
    high = 2 ** (bits - 1) - 1
    assert torch.equal(codes.double(), (w.double() / scales.double()).round().clamp(-high, high))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_ends_of_a_type_stay_numbers(dtype, bits):
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    w = torch.tensor([[info.max, -info.max], [tiny, 0], [3 * tiny, -tiny], [info.smallest_normal, 0]], dtype=dtype)
    seen = dequantize(*quantize(w, bits)).double()
    assert seen.isfinite().all() and ((seen != 0) | (w.abs() * 2 < w.abs().amax(1, keepdim=True))).all()
    error = (seen - w.double()).abs() / w.double().abs().amax(1, keepdim=True)
    assert error[0].max() < .01 and error[3].max() < .02 and error.max() <= .5


@pytest.mark.parametrize("treat", [lambda m: m, quantize_, lambda m: quantize_(m, 4, 16), prepare_])
def test_bits_and_bytes_are_those_of_a_file(treat):
    model = treat(nn.Sequential(nn.Linear(64, 30), nn.BatchNorm1d(30), nn.Linear(30, 10)))
    assert stored_bits(model) == 8 * stored_bytes(model) == 8 * sum(t.nbytes for t in model.state_dict().values())


def test_codes_of_codebooks_count_as_whole_bits():
    model = cluster_(nn.Sequential(nn.Linear(64, 30), nn.Linear(30, 10)), 4)
    prune_(model, {"0.bias": torch.rand(30)}, .5)
    assert stored_bits(model) == 2 * 2220 + 32 * (8 + 40) + 30 and stored_bytes(model) == -(-stored_bits(model) // 8)


def test_layers_of_other_kinds_are_left_and_computed_weights_refused():
    model = nn.Sequential(nn.ConvTranspose1d(8, 4, 1), nn.Linear(4, 3))
    assert [*quantized_weights(quantize_(model))] == ["1"]
    normed = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="'0.weight', computed by _WeightNorm"): quantize_(normed)
    assert [*quantized_weights(quantize_(normed, names="1"))] == ["1"]


def test_what_is_done_already_is_said():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    with pytest.raises(ValueError, match="got .*'QuantizedLinear'"): quantize_(quantize_(copy.deepcopy(model)))
    with pytest.raises(ValueError, match="that has no codebook yet"): cluster_(cluster_(model, 2), 2)
    with pytest.raises(ValueError, match="weight: a tensor with an axis"): quantize(torch.tensor(3.))


def test_codes_by_hand():
    w = torch.tensor([[1., -.5, .25, 0.]])
    assert quantize(w, 2)[0].tolist() == [[1, 0, 0, 0]] and quantize(w, 3)[0].tolist() == [[3, -2, 1, 0]]  # a half goes to the even
    codes, scales = quantize(w, 3, 2)
    assert codes.tolist() == [[3, -2, 3, 0]] and torch.allclose(scales, torch.tensor([[1 / 3, .25 / 3]]))


def test_groups_of_zeros_stay_zeros():
    w = torch.zeros(2, 6)
    w[1, 4] = 1
    codes, scales = quantize(w, 4, 3)
    assert torch.equal(dequantize(codes, scales, 3), w) and scales.tolist()[0] == [0, 0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_against_pytorch(bits):
    "torch.quantize_per_channel, and torch's straight-through estimator, forward and backward."
    set_seed(0)
    w = torch.randn(6, 9, requires_grad=True)
    codes, scales = quantize(w, bits)
    high = 2 ** (bits - 1) - 1
    peer = torch.quantize_per_channel(w.detach(), scales[:, 0].double(), torch.zeros(6), 0, torch.qint8)
    assert torch.equal(peer.int_repr(), codes)
    torch.testing.assert_close(peer.dequantize(), dequantize(codes, scales))
    slope = torch.randn(6, 9)
    theirs = torch.fake_quantize_per_channel_affine(w, scales[:, 0], torch.zeros(6, dtype=torch.int32), 0, -high, high)
    wanted, = torch.autograd.grad(theirs, w, slope)
    ours = FakeQuantize(bits)(w)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(torch.autograd.grad(ours, w, slope)[0], wanted)


def test_against_torchao():
    ao = pytest.importorskip("torchao.quantization")
    set_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 8))
    x = torch.randn(5, 64)
    theirs = copy.deepcopy(model)
    ao.quantize_(theirs, ao.Int8WeightOnlyConfig())
    torch.testing.assert_close(quantize_(model, 8)(x), theirs(x), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_packing(n):
    codes = torch.randint(-8, 8, (5, n), dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (5, (n + 1) // 2)
    assert torch.equal(unpack_int4(packed, n), codes) and torch.equal(unpack_int4(packed[[1, 1, 3]], n), codes[[1, 1, 3]])
    assert packed[0, 0].item() == codes[0, 0].item() + 8 + (16 * (codes[0, 1].item() + 8) if n > 1 else 0)


@pytest.mark.parametrize("bits, size", [(8, None), (4, 3), (2, None)])
def test_what_archives_need(bits, size):
    "Codes, scales and shape are all there is to a quantized weight."
    w = torch.randn(5, 4, 3)
    stored = QuantizedWeight(w, bits, size)
    codes, scales = quantize(w, bits, size)
    assert torch.equal(stored.integers(), codes) and torch.equal(stored.scales, scales) and stored.shape == (5, 4, 3)
    assert torch.equal(stored(), dequantize(stored.integers(), stored.scales, stored.group_size))
    assert stored.codes.nbytes == (5 * 12 if bits > 4 else 5 * 6)


# Layers

@pytest.mark.parametrize("kind", [nn.Embedding, ScaledEmbedding])
def test_embeddings_look_rows_up(kind):
    set_seed(0)
    model = nn.Sequential(kind(30, 5, padding_idx=2))
    for index in (torch.tensor(3), torch.randint(30, (2, 3, 4)), torch.empty(0, 2, dtype=torch.long)):
        for bits, size in ((8, None), (4, 2)):
            small = quantize_(copy.deepcopy(model), bits, size)
            assert isinstance(small[0], QuantizedEmbedding) and small[0].padding_idx == 2 and small[0].embedding_dim == 5
            torch.testing.assert_close(small(index), by_hand(model, bits, size)(index))


@pytest.mark.parametrize("index, error", [(torch.tensor([-1]), IndexError), (torch.tensor([30]), IndexError), (torch.ones(30, dtype=torch.bool), RuntimeError),
                                          (torch.ones(30, dtype=torch.uint8), RuntimeError), (torch.tensor([1.]), RuntimeError)])
def test_embeddings_refuse_what_plain_ones_refuse(index, error):
    model = nn.Sequential(nn.Embedding(30, 5))
    for layers in (model, quantize_(copy.deepcopy(model), 8), quantize_(copy.deepcopy(model), 4, 2)):
        with pytest.raises(error): layers(index)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1, "dilation": 2}, {"padding": "same", "padding_mode": "reflect"}, {"padding": (1, 0), "padding_mode": "circular", "bias": False}, {"groups": 2}], ids=str)
def test_convolutions(options):
    set_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 6, (3, 2), **options)), torch.randn(2, 4, 9, 8)
    for bits, size in ((8, None), (4, 5)):
        small = quantize_(copy.deepcopy(model), bits, size)
        assert isinstance(small[0], QuantizedConv)
        torch.testing.assert_close(small(x), by_hand(model, bits, size)(x))


@pytest.mark.parametrize("kind, d", [(nn.Conv1d, 1), (nn.Conv3d, 3)])
def test_one_and_three_axes(kind, d):
    model, x = nn.Sequential(kind(4, 5, 3, padding=1)), torch.randn(2, 4, *[5] * d)
    torch.testing.assert_close(quantize_(copy.deepcopy(model), 8)(x), by_hand(model, 8, None)(x))


def test_gradients_pass_to_what_comes_before_and_to_biases():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), torch.randn(3, 4)
    quantize_(model, 8, names="1")
    model(x).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0 and model[1].bias.grad.tolist() == [3, 3]
    assert isinstance(model[1], QuantizedLinear) and (model[1].in_features, model[1].out_features) == (5, 2)


def test_products_can_be_quantized():
    model, x = factorize_(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 4)), rank=4), torch.randn(2, 12)
    before = model(x)
    quantize_(model, 8)
    torch.testing.assert_close(model(x), before, atol=.05, rtol=.05)
    words = factorize_(Speaker(), rank=4)
    before = words(torch.arange(3))
    quantize_(words, 8)
    torch.testing.assert_close(words(torch.arange(3)), before, atol=.1, rtol=.1)
    assert words.table.up.quantized is words.head.up.quantized and words.table.down.quantized is words.head.down.quantized


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_compiles():
    for change in (quantize_, prepare_):
        model, x = change(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), 4, 2), torch.arange(4)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))


def test_under_autocast():
    model = quantize_(Speaker(), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16): assert model(torch.arange(3)).dtype == torch.bfloat16


# Training for the grid

@pytest.mark.parametrize("bits, size", [(8, None), (3, 4)])
@pytest.mark.parametrize("name", TIED_LAYERS)
def test_prepared_models_train_and_convert_bit_by_bit(name, bits, size):
    set_seed(1)
    build, x, count = TIED_LAYERS[name]
    model = build()
    held = [*map(id, model.parameters())]
    wanted = by_hand(model, bits, size)
    prepare_(model, bits, size)
    assert sorted(map(id, model.parameters())) == sorted(held)
    check_ties(model)
    torch.testing.assert_close(model(x), wanted(x))
    # the gradient is that at the points of the grid, a shared one summed over its uses
    model(x).square().sum().backward(), wanted(x).square().sum().backward()
    by_shape = {tuple(p.shape): p.grad for p in wanted.parameters()}
    for p in model.parameters(): torch.testing.assert_close(p.grad, by_shape[tuple(p.shape)], atol=1e-4, rtol=1e-4)
    torch.optim.SGD(model.parameters(), .1).step()
    after, again = model(x), copy.deepcopy(model)
    assert torch.equal(again(x), after)
    state = build()
    prepare_(state, bits, size).load_state_dict(model.state_dict())
    assert torch.equal(state(x), after)
    convert_(model)
    torch.testing.assert_close(model(x), after, atol=1e-6, rtol=1e-6)
    assert len(quantized_weights(model)) == count
    check_ties(model)
    convert_(again)
    torch.testing.assert_close(again(x), after, atol=1e-6, rtol=1e-6)


def test_several_grids_convert_each_to_its_own():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    prepare_(model, 8, names="0"), prepare_(model, 4, 2, names="1")
    x = torch.randn(2, 8)
    y = model(x)
    convert_(model)
    assert torch.equal(model(x), y)
    assert [(w.bits, w.group_size) for w in quantized_weights(model).values()] == [(8, None), (4, 2)] and isinstance(model[2], nn.Linear)


def test_declared_ties_come_back_with_their_names():
    model = Speaker()
    prepare_(model, 8)
    assert declared_ties(model)[0].names == ("table.parametrizations.weight.original", "head.parametrizations.weight.original")
    model = autoencoder()
    first = declared_ties(model)[0]
    prepare_(model, 8)
    torch.testing.assert_close(model[2].weight, model[0].weight.T)
    with pytest.raises(ValueError, match="matches none"): quantize_(model, 8, names="9")
    assert convert_(model)[2].flipped and not declared_ties(model) and first.map is not None


def test_conversion_of_weights_that_are_lost_changes_nothing():
    model = prepare_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 8)
    model[1].parametrizations.weight.original.data.fill_(math.nan)
    modules = [*model.modules()]
    with pytest.raises(ValueError, match="1.weight: finite numbers are expected"): convert_(model)
    assert [*model.modules()] == modules and isinstance(model[0].parametrizations.weight[0], FakeQuantize)


def test_training_for_the_grid_learns_what_rounding_loses():
    "A line through points, on a grid of two bits: the best point of the grid is found."
    set_seed(0)
    x = torch.randn(200, 3)
    model = prepare_(nn.Sequential(nn.Linear(3, 1)), 2)
    y = x @ torch.tensor([[.5], [.5], [-.5]])
    optimizer = torch.optim.Adam(model.parameters(), .1)
    for _ in range(150):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    convert_(model)
    assert model[0].quantized.integers().tolist() == [[1, 1, -1]] and F.mse_loss(model(x), y) < 1e-3


def test_a_character_model():
    set_seed(0)
    model, x = CharacterModel(16, 2, 2), torch.randint(90, (2, 7))
    small = quantize_(copy.deepcopy(model), 8)
    torch.testing.assert_close(small(x), model(x), atol=.1, rtol=.1)
    assert small.embedding.quantized is small.head.quantized and stored_bytes(small) < .35 * stored_bytes(model)


# Bad input

def plain(): return nn.Sequential(nn.Linear(6, 8), nn.Conv2d(4, 4, 3, groups=2), nn.LayerNorm(4), nn.Embedding(5, 4, max_norm=1.), nn.GRU(3, 3), nn.ConvTranspose2d(2, 2, 2))


BAD = {
    "no module": (lambda f, m: f(3), TypeError, "model: a module is expected, got int"),
    "one bit": (lambda f, m: f(m, 1), ValueError, "bits: a whole number from 2 to 8 is expected, got 1"),
    "sixteen": (lambda f, m: f(m, 16), ValueError, "bits: a whole number from 2 to 8 is expected, got 16"),
    "half": (lambda f, m: f(m, 4.), TypeError, "bits: a whole number is expected, got 4.0"),
    "group": (lambda f, m: f(m, 4, 0), ValueError, "group_size: a whole number of at least 1 is expected, got 0"),
    "norm": (lambda f, m: f(m, names="2"), ValueError, "got '2', which is LayerNorm"),
    "max_norm": (lambda f, m: f(m, names=["0", "3"]), ValueError, "got '3', which is Embedding with max_norm"),
    "gru": (lambda f, m: f(m, names="4"), ValueError, "got '4', which is GRU"),
    "transposed": (lambda f, m: f(m, names="5"), ValueError, "got '5', which is ConvTranspose2d"),
    "unknown": (lambda f, m: f(m, names="7"), ValueError, "names: '7' matches none of 2 names"),
    "names": (lambda f, m: f(m, names=3), TypeError, "names: a list of names or patterns is expected, got 3"),
}


@pytest.mark.parametrize("call", [quantize_, prepare_])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_nothing_changes(name, call):
    ask, error, message = BAD[name]
    model = plain()
    modules = [*model.modules()]
    with pytest.raises(error) as raised: ask(call, model)
    assert message in str(raised.value) and [*model.modules()] == modules


@pytest.mark.parametrize("call", [quantize_, prepare_])
@pytest.mark.parametrize("change, message", [
    (lambda m: m[1].weight.data.fill_(math.inf), "1.weight: finite numbers are expected"), (lambda m: prune_(m, {"0.weight": torch.rand(6, 6)}, .5), "got '0.weight', computed by Mask; make_permanent_(model) first, or name other weights"),
    (lambda m: prepare_(m, 8), "computed by FakeQuantize"), (lambda m: setattr(m[1], "weight", nn.Parameter(m[0].weight.detach())), "several tensors over one memory"),
    (lambda m: setattr(m[2], "extra", m[0].weight), "used by LayerNorm")])
def test_weights_that_cannot_be_codes_are_refused(call, change, message):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6))
    change(model)
    modules = [*model.modules()]
    with pytest.raises(ValueError) as raised: call(model, names=["0", "1"])
    assert message in str(raised.value) and [*model.modules()] == modules


@pytest.mark.parametrize("call, error, message", [
    (lambda: quantize(torch.ones(2, 2).long()), TypeError, "floating point"), (lambda: quantize(torch.ones(0, 2)), ValueError, "at least one element"),
    (lambda: quantize(torch.tensor([math.nan])), ValueError, "finite"), (lambda: dequantize(torch.ones(2, 4).long(), torch.ones(2, 3), 2), ValueError, r"shape \(2, 2\)"),
    (lambda: dequantize(torch.ones(2, 4), torch.ones(2, 1)), TypeError, "whole numbers"), (lambda: pack_int4(torch.tensor([[8]])), ValueError, "from -8 to 7"),
    (lambda: dequantize(torch.ones(2, 4).long(), torch.ones(2, 1), 0), ValueError, "group_size: a whole number of at least 1"),
    (lambda: unpack_int4(torch.ones(2, 2), 4), TypeError, "packed: a tensor of whole numbers"), (lambda: unpack_int4(torch.ones(2, 2).int(), 4), TypeError, "uint8"),
    (lambda: unpack_int4(torch.ones(2, 2).byte(), 5), ValueError, "n: a number of at most 4"),
    (lambda: convert_(nn.Linear(2, 2)), ValueError, "one that `prepare_` prepared"), (lambda: convert_(3), TypeError, "a module"),
    (lambda: FakeQuantize(9), ValueError, "from 2 to 8"), (lambda: quantized_weights(3), TypeError, "a module"), (lambda: stored_bytes(3), TypeError, "a module")])
def test_bad_tensors(call, error, message):
    with pytest.raises(error, match=message): call()


@pytest.mark.gpu
def test_gpu_equals_cpu():
    model, x = Speaker(), torch.arange(4)
    for bits, size in ((8, None), (4, 3)):
        here, there = quantize_(copy.deepcopy(model), bits, size), quantize_(copy.deepcopy(model).cuda(), bits, size)
        assert torch.equal(here.head.quantized.codes, there.head.quantized.codes.cpu()) and there.table.quantized is there.head.quantized
        torch.testing.assert_close(there(x.cuda()).cpu(), here(x))
        torch.testing.assert_close(here.cuda()(x.cuda()), there(x.cuda()))
