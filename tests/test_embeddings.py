"Tied, scaled and factorized embeddings: gradients, first values, ranks, round trips, published counts, and what is refused."
import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sharetie.census import census
from sharetie.embeddings import FactorizedEmbedding, FactorizedHead, ScaledEmbedding, factorized, tie_head_
from sharetie.finding import find_ties
from sharetie.making import tie_
from sharetie.saving import load_model, save_model
from sharetie.sharing import untie_


class Model(nn.Module):
    "A table, something between, and a head."
    def __init__(self, embedding, head, dim=8):
        super().__init__()
        self.embedding, self.middle, self.head = embedding, nn.Linear(dim, dim), head

    def forward(self, words): return self.head(torch.tanh(self.middle(self.embedding(words))))


def plain(words=20, dim=8, kind=nn.Embedding, **options):
    torch.manual_seed(0)
    return Model(kind(words, dim, **options), nn.Linear(dim, words, bias=False), dim).double()


def thin(words=20, inner=3, dim=8):
    torch.manual_seed(0)
    return Model(FactorizedEmbedding(words, inner, dim), FactorizedHead(words, inner, dim), dim).double()


@pytest.fixture
def data(): return torch.randint(20, (2, 4, 5), generator=torch.Generator().manual_seed(1))


def loss(model, data): return F.cross_entropy(model(data[0]).flatten(0, 1), data[1].flatten())


# ties

@pytest.mark.parametrize("kind", [nn.Embedding, ScaledEmbedding])
def test_tied_gradient_is_the_sum(kind, data):
    tied = plain(kind=kind)
    tie_head_(tied)
    assert tied.head.weight is tied.embedding.weight
    apart = copy.deepcopy(tied)
    untie_(apart, "head.weight")
    for m in (tied, apart): loss(m, data).backward()
    torch.testing.assert_close(tied.embedding.weight.grad, apart.embedding.weight.grad + apart.head.weight.grad)
    torch.testing.assert_close(tied.middle.weight.grad, apart.middle.weight.grad)


def test_factorized_gradient_is_the_sum(data):
    tied = thin()
    assert len(tie_head_(tied)) == 2
    apart = thin()
    apart.head.table.weight.data = apart.embedding.table.weight.data.clone()
    apart.head.narrow.weight.data = apart.embedding.widen.weight.data.T.clone()
    for m in (tied, apart): loss(m, data).backward()
    torch.testing.assert_close(tied(data[0]), apart(data[0]))
    torch.testing.assert_close(tied.embedding.table.weight.grad, apart.embedding.table.weight.grad + apart.head.table.weight.grad)
    torch.testing.assert_close(tied.embedding.widen.weight.grad, apart.embedding.widen.weight.grad + apart.head.narrow.weight.grad.T)
    assert sum(p.numel() for p in tied.parameters()) == 20 * 3 + 3 * 8 + 8 * 8 + 8


def test_tied_gradients_by_differences(data):
    model = thin()
    tie_head_(model)
    table, widen = model.embedding.table.weight, model.embedding.widen.weight
    name = next(n for n, p in model.named_parameters() if p is widen)

    def f(table, widen):
        return loss_of(torch.func.functional_call(model, {"embedding.table.weight": table, name: widen}, (data[0][:1, :3],)))

    def loss_of(logits): return F.cross_entropy(logits.flatten(0, 1), data[1][:1, :3].flatten())
    assert torch.autograd.gradcheck(f, (table.detach().clone().requires_grad_(), widen.detach().clone().requires_grad_()))


@pytest.mark.parametrize("make", [plain, thin])
def test_round_trips(make, data, tmp_path):
    model = make()
    tie_head_(model)
    names = [tie.names for tie in find_ties(model)]
    same = copy.deepcopy(model)
    assert [tie.names for tie in find_ties(same)] == names
    torch.testing.assert_close(same(data[0]), model(data[0]))
    save_model(model, tmp_path / "m.safetensors")
    fresh = make()
    with torch.no_grad(): fresh.middle.weight.zero_()
    tie_head_(fresh)
    load_model(fresh, tmp_path / "m.safetensors")
    torch.testing.assert_close(fresh(data[0]), model(data[0]))
    fresh.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), .1)
    loss(model, data).backward()
    optimizer.step()
    assert [tie.names for tie in find_ties(model)] == names
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(data[0]), model(data[0]))
    with torch.autocast("cpu", torch.bfloat16): assert model.float()(data[0]).isfinite().all()


def refused(model, error, message, *args):
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(error, match=message): tie_head_(model, *args)
    now = dict(model.named_parameters())
    assert now.keys() == before.keys() and all(now[n] is p and torch.equal(p, v) for n, (p, v) in before.items())
    assert not find_ties(model)


def test_what_tie_head_refuses():
    E, H = FactorizedEmbedding, FactorizedHead
    refused(Model(E(20, 3, 8), nn.Linear(8, 20)), TypeError, "head: FactorizedHead with FactorizedEmbedding as embedding is expected, got Linear")
    refused(Model(nn.Embedding(20, 8), H(20, 3, 8)), TypeError, "head: Linear with Embedding as embedding is expected, got FactorizedHead")
    refused(Model(nn.Embedding(20, 8), nn.Linear(8, 19)), ValueError, r"shape \(20, 8\), 'head.weight' has shape \(19, 8\)")
    refused(Model(E(20, 3, 8), H(20, 4, 8)), ValueError, r"shape \(3, 8\) after Transpose\(\), 'head.narrow.weight' has shape \(4, 8\)")
    refused(Model(E(20, 3, 8), H(19, 3, 8)), ValueError, r"shape \(20, 3\), 'head.table.weight' has shape \(19, 3\)")
    refused(Model(E(20, 3, 8), H(20, 3, 8, dtype=torch.float64)), ValueError, "dtype")
    refused(plain(), TypeError, "embedding: Embedding or FactorizedEmbedding is expected, got Linear", "middle")
    refused(plain(), TypeError, "head: Linear or FactorizedHead is expected, got Embedding", "embedding", "embedding")
    refused(plain(), ValueError, "head: 'heads' matches none of 3 names; the nearest is 'head'", "embedding", "heads")
    frozen = thin()
    frozen.head.narrow.requires_grad_(False)
    refused(frozen, ValueError, "frozen and trained")
    with pytest.raises(TypeError, match="model: a module"): tie_head_(3)


def test_tying_twice_and_untying(data):
    model = thin()
    tie_head_(model)
    with pytest.raises(ValueError, match="computed"): tie_head_(model)
    untie_(model, "head.narrow.weight")
    untie_(model, "head.table.weight")
    assert not find_ties(model)


# layers

def test_scaled_embedding():
    torch.manual_seed(0)
    table = ScaledEmbedding(3000, 64, padding_idx=3)
    assert not table.weight[3].any() and not table(torch.tensor([3])).any()
    assert abs(table.weight.var() * 64 - 1) < .05 and abs(table(torch.arange(3000)).var() - 1) < .05
    torch.testing.assert_close(table(torch.tensor([[5]]))[0, 0], table.weight[5] * 8)
    assert isinstance(table, nn.Embedding) and ScaledEmbedding(4, 2, device="meta").weight.is_meta
    same = ScaledEmbedding.from_pretrained(torch.ones(3, 4))
    torch.testing.assert_close(same(torch.tensor([0])), torch.full((1, 4), 2.))


@pytest.mark.parametrize("make", [ScaledEmbedding, lambda words, dim, **options: FactorizedEmbedding(words, 2, dim, **options)])
def test_words_and_sizes_that_tables_refuse(make):
    table = make(9, 4)
    for words, got in (([0, 9], "0 to 9"), ([-1, 2], "-1 to 2")):
        with pytest.raises(ValueError, match=f"^words: numbers from 0 to 8 are expected, got {got}$"): table(torch.tensor(words))
    for words in (torch.zeros(3), torch.zeros(3, dtype=torch.int8), torch.tensor([True]), [1]):
        with pytest.raises(TypeError, match="^words: a tensor of"): table(words)
    for sizes in ((0, 4), (-1, 4), (9, 0)):
        with pytest.raises(ValueError, match="a whole number"): make(*sizes)
    with pytest.raises(TypeError, match="a whole number"): make("9", 4)
    with pytest.raises(ValueError, match="padding_idx: a whole number from -9 to 8 is expected, got 9"): make(9, 4, padding_idx=9)
    with pytest.raises(TypeError, match="dtype: a floating point type"): make(9, 4, dtype=torch.int32)
    compiled = torch.compile(table, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.tensor([1, 8])), table(torch.tensor([1, 8])))


def test_heads_of_another_type():
    with pytest.raises(TypeError, match="dtype: a floating point type"): FactorizedHead(9, 2, 4, dtype=torch.int32)
    with pytest.raises(TypeError, match="^h: torch.float32, as the weights are, is expected, got torch.float64"): FactorizedHead(9, 2, 4)(torch.zeros(2, 4).double())


def test_factorized_layers():
    torch.manual_seed(0)
    layer, head = FactorizedEmbedding(3000, 32, 64, padding_idx=3), FactorizedHead(3000, 32, 64)
    words = torch.tensor([[1, 2], [3, 4]])
    assert layer(words).shape == (2, 2, 64) and not layer(words)[1, 0].any()
    torch.testing.assert_close(layer(words), 8 * layer.table.weight[words] @ layer.widen.weight.T)
    h = F.layer_norm(torch.randn(2, 5, 64), [64])
    torch.testing.assert_close(head(h), h @ head.narrow.weight.T @ head.table.weight.T)
    assert abs(layer(torch.arange(3000)).var() - 1) < .1 and abs(head(h).var() - 1) < .2
    assert layer(words[:0]).shape == (0, 2, 64)
    with torch.device("meta"): assert FactorizedEmbedding(5, 2, 4)(torch.zeros(2, dtype=torch.long)).is_meta
    assert FactorizedHead(5, 2, 4, dtype=torch.bfloat16).table.weight.dtype == torch.bfloat16
    for kind in (FactorizedEmbedding, FactorizedHead):
        for i, name in enumerate(("vocabulary", "inner", "dim")):
            sizes = [5, 2, 4]
            sizes[i] = 0
            limits = "from 1 to 4" if name == "inner" else "of at least 1"
            with pytest.raises(ValueError, match=f"{name}: a whole number {limits} is expected, got 0"): kind(*sizes)
            sizes[i] = 2.
            with pytest.raises(TypeError, match=f"{name}: a whole number is expected, got 2.0"): kind(*sizes)


def test_what_factorized_layers_refuse():
    for kind in (FactorizedEmbedding, FactorizedHead):
        with pytest.raises(ValueError, match="inner: a whole number from 1 to 4 is expected, got 5"): kind(9, 5, 4)
        kind(9, 4, 4)
    for bad, error in ((50, ValueError), (-51, ValueError), ("a", TypeError), (1.0, TypeError)):
        with pytest.raises(error, match="padding_idx: a whole number"): FactorizedEmbedding(50, 8, 32, padding_idx=bad)
    assert FactorizedEmbedding(50, 8, 32, padding_idx=-1).table.padding_idx == 49
    with pytest.raises(TypeError, match="words: a tensor of whole numbers"): FactorizedEmbedding(9, 2, 4)(torch.rand(3))
    head = FactorizedHead(9, 2, 4)
    for bad in (torch.rand(2, 5), torch.tensor(1.)):
        with pytest.raises(ValueError, match="h: a last axis of 4 is expected"): head(bad)
    with pytest.raises(TypeError, match="h: a floating point tensor"): head(torch.ones(2, 4, dtype=torch.long))


@pytest.mark.parametrize("kind", ["thin", "plain"])
def test_padding_of_a_tied_table(kind, data):
    def build():
        torch.manual_seed(0)
        if kind == "plain": return plain(padding_idx=3)
        return Model(FactorizedEmbedding(20, 3, 8, padding_idx=3), FactorizedHead(20, 3, 8)).double()

    def step(model):
        optimizer = torch.optim.SGD(model.parameters(), .1)
        words, following = (torch.where(t == 3, 4, t) for t in data)
        F.cross_entropy(model(words).flatten(0, 1), following.flatten()).backward()
        optimizer.step()
        return model.embedding(torch.tensor(3)).abs().sum()

    masked, trained = build(), build()
    tie_head_(masked, padding="mask")
    assert step(masked) == 0 and (masked(data[0])[..., 3] == -torch.inf).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tie_head_(trained, padding="train")
    assert step(trained) > 0
    with pytest.warns(UserWarning, match="padding_idx"): tie_head_(build())
    model = build()
    before = state_of(model)
    with pytest.raises(ValueError, match="padding: one of 'mask', 'train'"): tie_head_(model, padding="none")
    assert state_of(model) == before and not find_ties(model)
    with pytest.raises(ValueError, match="padding"): tie_head_(thin(), padding="mask")


def state_of(model): return {name: (id(p), p.tolist()) for name, p in model.named_parameters()}


# from a trained table

@pytest.mark.parametrize("kind", [nn.Embedding, ScaledEmbedding])
@pytest.mark.parametrize("shape", [(20, 8), (5, 8)])
def test_factorized_is_the_nearest(kind, shape):
    torch.manual_seed(0)
    table, every = kind(*shape).double(), torch.arange(shape[0])
    scale = table(every) / table.weight
    torch.testing.assert_close(factorized(table, min(shape))(every), table(every))
    values = torch.linalg.svdvals(table.weight)
    for inner in range(1, min(shape)):
        made = factorized(table, inner)
        lost = (made(every) - table(every)).square().sum() / scale[0, 0] ** 2
        torch.testing.assert_close(lost, values[inner:].square().sum())
        assert (made.table.embedding_dim, made.widen.out_features) == (inner, shape[1])


def test_factorized_keeps_what_it_finds():
    table = nn.Embedding(20, 8, padding_idx=2, dtype=torch.bfloat16).eval().requires_grad_(False)
    made = factorized(table, 8)
    assert made.table.padding_idx == 2 and made.table.weight.dtype == torch.bfloat16 and not made.training
    assert not any(p.requires_grad for p in made.parameters())
    assert made(torch.tensor([2])).abs().max() < 1e-2
    assert factorized(nn.Embedding(20, 8, device="meta"), 3).table.weight.is_meta
    with pytest.raises(ValueError, match="inner: a whole number from 1 to 8 is expected, got 9"): factorized(table, 9)
    with pytest.raises(ValueError, match=r"embedding: a table without max_norm is expected, got Embedding\(20, 8, max_norm=1.0\)"):
        factorized(nn.Embedding(20, 8, max_norm=1.), 3)
    for options in ({"sparse": True}, {"scale_grad_by_freq": True}, {}):
        made = factorized(nn.Embedding(20, 8, **options), 3).table
        assert {"sparse": made.sparse, "scale_grad_by_freq": made.scale_grad_by_freq} == {"sparse": False, "scale_grad_by_freq": False} | options
    with pytest.raises(TypeError, match="embedding: nn.Embedding is expected, got Linear"): factorized(nn.Linear(3, 3), 1)
    with torch.no_grad(): (bad := nn.Embedding(20, 8)).weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="embedding.weight: finite numbers are expected, got 1 of 160"): factorized(bad, 3)


# published counts

PRINTED = {  # Lan et al. 2020, table 1, in millions: inner, width, heads, layers
    12: (128, 768, 12, 12), 18: (128, 1024, 16, 24), 60: (128, 2048, 16, 24), 235: (128, 4096, 64, 12)}
COUNTED = {12: 11_683_584, 18: 17_683_968, 60: 58_724_864, 235: 222_595_584}


@pytest.mark.parametrize("millions", PRINTED)
def test_albert_of_transformers(millions):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: its own models are not counted")
    inner, width, heads, layers = PRINTED[millions]
    config = transformers.AlbertConfig(embedding_size=inner, hidden_size=width, num_attention_heads=heads,
                                       num_hidden_layers=layers, intermediate_size=4 * width)
    with torch.device("meta"): counted = census(transformers.AlbertModel(config), torch.zeros(1, 8, dtype=torch.long))
    assert counted.stored == COUNTED[millions]
    assert (abs(counted.stored / 1e6 / millions - 1) < .03) == (millions != 235)  # the paper's largest number does not fit


def test_census_of_a_thin_pair():
    model, words = thin().float(), torch.zeros(1, 5, dtype=torch.long)
    before = census(model, words)
    tie_head_(model)
    after = census(model, words)
    assert before.stored - after.stored == 20 * 3 + 3 * 8 and before.used == after.used
