"Removing units: the same as zeros in their place, ties kept, all or nothing."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sharetie.masks import magnitude, make_permanent_, prune_
from sharetie.results import set_seed
from sharetie.shrinking import remove_units_
from sharetie.ties import Transpose, check_ties, find_ties, load_model, save_model, tie_
from sharetie.tracing import trace_units


class Masked(nn.Module):
    "A model that can set what flows through named places to zero: the reference that knows nothing of weights."
    def __init__(self):
        super().__init__()
        self.gone = {}

    def at(self, name, x, axis=1):
        "What flows at a place, less the channels that are gone."
        if name not in self.gone: return x
        x = x.clone()
        x.index_fill_(axis, torch.tensor(self.gone.get(name, []), dtype=torch.long), 0)
        return x


class MLP(Masked):
    shape, widths = (5,), {"a": 7, "b": 6}
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)
    def forward(self, x): return self.c(self.at("b", self.b(self.at("a", self.a(x).sigmoid())).cos()))


class VGG(Masked):
    shape, widths = (2, 8, 8), {"a": 6, "b": 5, "c": 7}
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect")
        self.c, self.d = nn.Linear(5 * 4, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = F.max_pool2d(self.at("a", self.norm(self.a(x)).relu()), 2)
        x = F.adaptive_avg_pool2d(self.at("b", self.b(x).sigmoid()), 2).flatten(1)
        return self.d(self.at("c", F.gelu(self.c(x))))


class ResNet(Masked):
    "The stem and what is added to it have the same units; where they go, both go."
    shape, widths = (2, 6, 6), {"stem": 6, "inner": 5, "short": 4}
    def __init__(self):
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.inner, self.n1, self.outer, self.n2 = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.down, self.n3, self.short, self.head = nn.Conv2d(6, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.Conv2d(6, 4, 1, stride=2), nn.Linear(4, 3)

    def forward(self, x):
        x = self.at("stem", self.n0(self.stem(x)).relu())
        x = self.at("stem", (x + self.n2(self.outer(self.at("inner", self.n1(self.inner(x)).relu())))).relu())
        x = self.at("short", (self.n3(self.down(x)) + self.short(x)).relu())
        return self.head(x.mean((2, 3)))


class DenseNet(Masked):
    shape, widths = (2, 6, 6), {"stem": 4, "a": 3, "b": 3}
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(7, 3, 3, padding=1), nn.Linear(10, 3)
        self.na, self.nb = nn.BatchNorm2d(4), nn.BatchNorm2d(7)

    def forward(self, x):
        x = [self.at("stem", self.stem(x))]  # masks again after each norm, which turns zeros into its shift
        x.append(self.at("a", self.a(self.at("stem", self.na(x[0]).relu()))))
        stem, a = self.nb(torch.cat(x, 1)).relu().split([x[0].shape[1], x[1].shape[1]], 1)
        x.append(self.at("b", self.b(torch.cat([self.at("stem", stem), self.at("a", a)], 1))))
        return self.head(torch.cat(x, 1).mean((2, 3)))


class Mobile(Masked):
    "Depthwise and grouped convolutions in one dimension, and a gate."
    shape, widths = (3, 9), {"a": 6, "gate": 4}
    def __init__(self):
        super().__init__()
        self.a, self.d, self.p = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 12, 3, groups=6), nn.Conv1d(12, 4, 1)
        self.gate, self.t = nn.Conv1d(12, 4, 1), nn.ConvTranspose1d(4, 2, 3)

    def forward(self, x):
        x = self.d(self.a(x).tanh()).relu()
        if "a" in self.gone:
            self.gone["twice"] = [2 * i + j for i in self.gone["a"] for j in (0, 1)]
            x = self.at("twice", x)
        return self.t(self.at("gate", self.p(x) * self.gate(x).sigmoid()))


class Squeeze(Masked):
    "A depthwise convolution between two narrow ones, with a gate for each channel."
    shape, widths = (3, 6, 6), {"wide": 8, "low": 4}
    def __init__(self):
        super().__init__()
        self.wide, self.norm, self.deep = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8)
        self.low, self.high, self.out = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.at("wide", self.deep(self.at("wide", F.hardswish(self.norm(self.wide(x))))))
        gate = self.high(self.at("low", self.low(x.mean((2, 3), keepdim=True)).relu()))
        return self.out(x * F.hardsigmoid(gate))


class Feed(Masked):
    "A transformer's layer."
    shape, widths = (4, 8), {"block.linear1": 12}
    def __init__(self):
        super().__init__()
        self.block, self.head = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation="gelu"), nn.Linear(8, 3)
        self.block.activation = lambda h: self.at("block.linear1", F.gelu(h), 2)
    def forward(self, x): return self.head(self.block(x))


NETS = {cls.__name__: cls for cls in (MLP, VGG, ResNet, DenseNet, Mobile, Squeeze, Feed)}


def warm(model, x):
    "Running means that are not zero."
    model.train()
    for _ in range(3): model(x + 1)
    return model.eval()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETS)
def test_same_as_zeros_where_units_are_read(name, seed):
    set_seed(seed)
    model = NETS[name]().double()
    x = torch.randn(6, *model.shape, dtype=torch.float64)
    warm(model, x)
    units = {layer: torch.randperm(n)[:int(torch.randint(1, n, ()))].tolist() for layer, n in model.widths.items()}
    torch.backends.mha.set_fastpath_enabled(False)
    model.gone = dict(units)
    with torch.no_grad(): expected = model(x)
    model.gone = {}
    before, size = list(model.parameters()), sum(p.numel() for p in model.parameters())
    gone = remove_units_(model, units, x[:2])
    torch.backends.mha.set_fastpath_enabled(True)
    with torch.no_grad(): torch.testing.assert_close(model(x), expected)
    assert all(sorted(gone[layer]) == sorted(which) for layer, which in units.items())
    assert all(a is b for a, b in zip(before, model.parameters())) and sum(p.numel() for p in model.parameters()) < size
    model.train()(x).square().sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    if name != "Feed": assert torch.equal(copy.deepcopy(model).eval()(x), model.eval()(x))  # a lambda holds on to the first
    for layer in model.modules():
        if isinstance(layer, nn.Linear): assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape)
        if isinstance(layer, nn.BatchNorm2d): assert layer.num_features == len(layer.running_mean) == len(layer.weight)


class Auto(nn.Module):
    "A tied autoencoder of bare Parameters."
    def __init__(self):
        super().__init__()
        self.w, self.b, self.c = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(8))
    def forward(self, x): return (x @ self.w.T + self.b).sigmoid() @ self.w + self.c


def declared():
    "The same of layers, by a declared tie."
    model = nn.Sequential(nn.Linear(8, 5), nn.Sigmoid(), nn.Linear(5, 8))
    tie_(model, ["0.weight", "2.weight"], map=Transpose())
    return model


class Language(nn.Module):
    "One table at both ends."
    def __init__(self, width=8):
        super().__init__()
        self.table, self.mid, self.head = nn.Embedding(20, width), nn.Linear(width, width), nn.Linear(width, 20, bias=False)
        self.head.weight = self.table.weight
    def forward(self, tokens): return self.head(self.mid(self.table(tokens)).relu())


class Pair(nn.Module):
    "Two convolutions on one Parameter, or one in two places."
    def __init__(self, reuse):
        super().__init__()
        self.stem, self.a, self.head = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)
        self.b = self.a if reuse else nn.Conv2d(4, 4, 3)
        self.b.weight = self.a.weight
    def forward(self, x): return self.head(self.b(self.a(self.stem(x)).relu()).relu().mean((2, 3)))


REAL = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
TIED = {"bare": (Auto, REAL, "w", 2 * 8 + 2), "declared": (declared, REAL, "0", 2 * 8 + 2),
        "language": (Language, torch.arange(6)[None], "table", 2 * 20 + 2 * 8 + 2 * 8 - 4 + 2),
        "convolutions": (lambda: Pair(False), torch.ones(1, 1, 8, 8), "a", 2 * 2 + (16 - 4) * 9 + 2 + 2 + 2 * 2),
        "reused": (lambda: Pair(True), torch.ones(1, 1, 8, 8), "a", 2 * 2 + (16 - 4) * 9 + 2 + 2 * 2)}


@pytest.mark.parametrize("kind", TIED)
def test_tied_weights_shrink_once_and_stay_tied(kind, tmp_path):
    make, x, name, less = TIED[kind]
    set_seed(0)
    model = make()
    ties, size = [tie.names for tie in find_ties(model)], sum(p.numel() for p in model.parameters())
    gone = remove_units_(model, {name: [0, 3]}, x)
    assert [tie.names for tie in find_ties(model)] == ties and sum(p.numel() for p in model.parameters()) == size - less
    check_ties(model)
    save_model(model, tmp_path / "small.safetensors")
    set_seed(1)
    fresh = make()
    assert remove_units_(fresh, gone, x) == gone
    load_model(fresh, tmp_path / "small.safetensors")
    torch.testing.assert_close(fresh(x), model(x))
    assert [tie.names for tie in find_ties(fresh)] == ties


def snapshot(model, optimizer=None):
    "All that must stay."
    sizes = [(n, m.extra_repr()) for n, m in model.named_modules()]
    state = optimizer.state_dict() if optimizer else None
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return sizes, copy.deepcopy({n: t.clone() for n, t in model.state_dict().items()}), copy.deepcopy(state), grads, [id(p) for p in model.parameters()]


def equal(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class Written(nn.Module):
    "A size written into the code, or a mean over units."
    def __init__(self, mean=False):
        super().__init__()
        self.a, self.norm, self.b, self.mean = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2), mean
    def forward(self, x):
        x = self.a(x)
        return self.b(self.norm(x) if self.mean else x.view(len(x), 4))


class Counts(Written):
    "Divides by its number of units."
    def forward(self, x): return self.b(self.a(x) / self.a(x).shape[-1])


@pytest.mark.parametrize("make, units, error, message", [
    (Written, {"a": [0]}, ValueError, "cannot do without them, at .*: RuntimeError"),
    (Counts, {"a": [0]}, ValueError, "outputs differ by .* exact=False"),
    (lambda: Written(True), {"a": [0]}, ValueError, "a mean over units .native_layer_norm in 'norm'.*exact=False"),
    (Written, {"a": [0, 1, 2, 3]}, ValueError, "at least one of 4 units left in 'a'"),
    (Written, {"b": [0]}, ValueError, r"units\['b'\]: unit 0 cannot be removed because of the model puts them out"),
    (Written, {"aa": [0]}, ValueError, "'aa'; did you mean 'a'"), (Written, {"a": [4]}, ValueError, "from 0 to 3"),
    (Written, {"a": [-1]}, ValueError, "from 0 to 3"), (Written, {"a": [.5]}, TypeError, "a whole number"),
    (Written, {"a": [1, 1]}, ValueError, "each unit once"), (Written, {"a": [True, False]}, ValueError, "a mask of 4 units"),
    (Written, {"a": 1}, TypeError, "a list of units' indices"), (Written, ["a"], TypeError, "a dictionary of units"),
    (lambda: nn.Sequential(nn.LSTM(3, 4)), {"0.weight_hh_l0": [0]}, ValueError, "cannot be removed because of .* in '0'")])
def test_refused_and_untouched(make, units, error, message):
    set_seed(0)
    model = make()
    x = torch.randn(2, 3)
    optimizer = torch.optim.Adam(model.parameters())
    out = model(x)
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    optimizer.step()
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message): remove_units_(model, units, x, optimizer=optimizer)
    assert equal(before, snapshot(model, optimizer)) and not model._forward_pre_hooks


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_mean_over_units_where_it_is_wanted(norm):
    set_seed(0)
    model, x = Written(True), torch.randn(5, 3)
    model.norm = norm(4)
    a, stay = copy.deepcopy(model), [0, 1, 3]
    remove_units_(model, {"a": [2]}, x, exact=False)
    left = norm(3)
    left.load_state_dict({name: p[stay] for name, p in a.norm.state_dict().items()})
    torch.testing.assert_close(model(x), left(a.a(x)[:, stay]) @ a.b.weight[:, stay].T + a.b.bias)
    assert model.norm.normalized_shape == (3,)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, .1, momentum=.9), lambda p: torch.optim.AdamW(p, amsgrad=True),
                                  lambda p: torch.optim.RMSprop(p, momentum=.5)])
def test_training_goes_on_as_if_units_had_never_been(make):
    "An output weight of zero, kept zero, is the same as no unit."
    set_seed(0)
    model, x, y = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double(), torch.randn(9, 3).double(), torch.randn(9, 2).double()
    with torch.no_grad():
        model[2].weight[:, [1, 4]] = 0
    optimizer = make(model.parameters())

    def step(m, o, hold=()):
        o.zero_grad()
        F.mse_loss(m(x), y).backward()
        for i in hold: m[2].weight.grad[:, i] = 0
        o.step()
        with torch.no_grad():
            for i in hold: m[2].weight[:, i] = 0

    for _ in range(3): step(model, optimizer, (1, 4))
    whole = copy.deepcopy(model)
    other = make(whole.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    remove_units_(model, {"0": [1, 4]}, x, optimizer=optimizer)
    for _ in range(3): step(model, optimizer), step(whole, other, (1, 4))
    torch.testing.assert_close(model(x), whole(x))


def test_an_optimizer_whose_state_does_not_follow():
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(4, 3)
    optimizer = torch.optim.LBFGS(model.parameters())
    optimizer.step(lambda: (optimizer.zero_grad(), model(x).square().sum(), model(x).square().sum().backward())[1])
    with pytest.raises(ValueError, match="optimizer"): remove_units_(model, {"0": [0]}, x, optimizer=optimizer)
    with pytest.raises(TypeError, match="a torch optimizer"): remove_units_(model, {"0": [0]}, x, optimizer="Adam")
    assert model[0].out_features == 5


def test_frozen_half_precision_and_compiled():
    model, x = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).bfloat16(), torch.randn(4, 3).bfloat16()
    model[0].weight.requires_grad_(False)
    remove_units_(model, {"0": [5]}, x)
    assert not model[0].weight.requires_grad and model[0].weight.dtype == torch.bfloat16
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))
    remove_units_(model.to("meta"), {"0": [0]}, x.to("meta"))
    assert model[0].weight.shape == (4, 3)


def test_wrapped_models_are_refused(tmp_path):
    with pytest.raises(TypeError, match="neither scripted nor compiled"):
        remove_units_(torch.compile(nn.Linear(2, 2)), {"": [0]}, torch.ones(1, 2))


def test_real_transformer():
    "A language model of the wild, with its tie: hidden units go, outputs stay those of zeros."
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.arange(6)[None]
    name = "transformer.h.0.mlp.c_fc"
    graph = trace_units(model, tokens)
    key = next(k for k in graph.layers if k.startswith(name) and len(set(graph.layers[k])) == 64)
    masked = copy.deepcopy(model)
    with torch.no_grad(): masked.transformer.h[0].mlp.c_proj.weight[:32] = 0
    remove_units_(model, {key: range(32)}, tokens)
    torch.testing.assert_close(model(tokens).logits, masked(tokens).logits)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (16, 32)


def test_units_in_front_of_a_padding_that_goes_around():
    set_seed(0)
    model, x = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular")), torch.randn(2, 2, 5, 5)
    a = copy.deepcopy(model)
    remove_units_(model, {"0": [1]}, x)
    with torch.no_grad(): a[2].weight[:, 1] = 0
    assert model[2].in_channels == 3
    torch.testing.assert_close(model(x), a(x))


def test_inputs_on_which_nothing_can_be_compared():
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.full((2, 3), torch.nan)
    before = snapshot(model)
    with pytest.raises(ValueError, match="inputs: some that the model answers by a finite number"): remove_units_(model, {"0": [1]}, x)
    assert equal(before, snapshot(model))
    remove_units_(model, {"0": [1]}, x, exact=False)
    assert model[0].out_features == 4


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_are_cut_as_they_are(sparse):
    set_seed(0)
    model, x = nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Tanh(), nn.Linear(4, 2)), torch.tensor([[1, 2], [3, 3]])
    model(x).square().sum().backward()
    wanted = [p.grad.to_dense() for p in model.parameters()]
    remove_units_(model, {"0": [1]}, x)
    stay = [0, 2, 3]
    for p, grad in zip(model.parameters(), (wanted[0][:, stay], wanted[1][:, stay], wanted[2])): assert torch.equal(p.grad.to_dense(), grad)
    assert model[0].weight.grad.is_sparse == sparse


def test_what_went_from_a_masked_model_goes_from_a_plain_one():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.rand(5, 4)
    plain = copy.deepcopy(model)
    prune_(model, magnitude(model), .5)
    gone = remove_units_(model, {"0": [0, 1]}, x)
    assert gone == {"0": [0, 1]} == remove_units_(plain, gone, x)
    make_permanent_(model)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), model(x))


def test_inputs_that_the_model_cannot_take_change_nothing():
    model = Written()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="inputs: what the model can take"): remove_units_(model, {"a": [0]}, torch.zeros(2, 9))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_weight_is_no_layer_and_an_optimizer_of_others_no_help():
    make = lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    model, x = make(), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"units: a layer is expected, got '0.weight'; did you mean '0'\?"): remove_units_(model, {"0.weight": [1]}, x)
    with pytest.raises(ValueError, match="optimizer: one of parameters of this model"): remove_units_(model, {"0": [1]}, x, optimizer=torch.optim.Adam(make().parameters()))
    assert model[0].out_features == 5
