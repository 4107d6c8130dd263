"Grouping heads: what is averaged, what stays the same, which ties survive, and what is refused without a change."
import copy

import pytest
import torch
from torch import nn

from sharetie.attention import Attention, Block, Cache, from_multihead
from sharetie.finding import Transpose, find_ties
from sharetie.heads import cache_bytes, group_heads_
from sharetie.making import tie_
from sharetie.sharing import share_module_

HOWS = ["mean", "first", "svd"]


@pytest.fixture
def x(): return torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def layer(kv=None, heads=4, seed=0, **options):
    torch.manual_seed(seed)
    return Attention(32, heads, kv, dtype=torch.float64, **options)


def state(model): return {name: (p, p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)}


def unchanged(model, before, config):
    "The same Parameters with the same values, and the same sizes."
    now = dict(model.named_parameters(remove_duplicate=False))
    assert now.keys() == before.keys()
    assert all(now[n] is p and torch.equal(p, v) for n, (p, v) in before.items())
    assert sizes(model) == config


def sizes(model):
    return [(m.kv_heads, m.k.out_features) for m in model.modules() if isinstance(m, Attention)]


def turned(kv_groups, per, seed=0):
    "An attention whose heads are, in each group, one pair of keys and values in different bases."
    torch.manual_seed(seed)
    a = layer(heads=kv_groups * per, seed=seed)
    w = a.width
    with torch.no_grad():
        for h in range(a.heads):
            here, source = (slice(w * i, w * i + w) for i in (h, h - h % per))
            for keys, queries in ((a.k, a.q), (a.v, a.out)):
                r = torch.randn(w, w, dtype=torch.float64) + 2 * torch.eye(w)
                if h == h - h % per: r = torch.eye(w, dtype=torch.float64)
                keys.weight[here] = r @ keys.weight[source]
                keys.bias[here] = r @ keys.bias[source]
                back = torch.linalg.inv(r)
                if keys is a.v: queries.weight[:, here] = queries.weight[:, here] @ back
                else:
                    queries.weight[here] = back.T @ queries.weight[here]
                    queries.bias[here] = back.T @ queries.bias[here]
    return a


# values

@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kv", [4, 8])
def test_mean_and_first_by_hand(groups, kv):
    a = layer(kv, heads=8)
    if kv % groups: pytest.skip("does not divide")
    k = a.k.weight.detach().view(groups, kv // groups, 4, 32)
    b = a.v.bias.detach().view(groups, kv // groups, 4)
    mean, first = (group_heads_(copy.deepcopy(a), groups, how) for how in ("mean", "first"))
    torch.testing.assert_close(mean.k.weight, k.mean(1).reshape(-1, 32), check_dtype=False)
    torch.testing.assert_close(mean.v.bias.data, b.mean(1).flatten())
    torch.testing.assert_close(first.k.weight.data, k[:, 0].reshape(-1, 32))
    torch.testing.assert_close(first.v.bias.data, b[:, 0].flatten())
    for m in (mean, first):
        assert torch.equal(m.q.weight, a.q.weight) and torch.equal(m.out.weight, a.out.weight)
        assert (m.kv_heads, m.k.out_features, m.v.out_features) == (groups, groups * 4, groups * 4)


@pytest.mark.parametrize("how", HOWS)
def test_equal_heads_lose_nothing(how, x):
    a = layer()
    with torch.no_grad():
        for linear in (a.k, a.v):
            for p in (linear.weight, linear.bias): p.copy_(p.unflatten(0, (2, 2, 8))[:, :1].expand(-1, 2, *[-1] * p.ndim).flatten(0, 2))
    y = a(x)
    torch.testing.assert_close(group_heads_(a, 2, how)(x), y)


@pytest.mark.parametrize("kv_groups, per", [(1, 2), (2, 2), (1, 4), (2, 4)])
def test_svd_sees_through_bases(kv_groups, per, x):
    a = turned(kv_groups, per)
    y = a(x)
    fitted = group_heads_(copy.deepcopy(a), kv_groups, "svd")
    torch.testing.assert_close(fitted(x), y)
    assert not fitted.k.bias.any() and not fitted.v.bias.any()
    mean = group_heads_(copy.deepcopy(a), kv_groups, "mean")(x)
    assert (mean - y).norm() > .1 * y.norm()


def products(a):
    "Of each head of the queries the matrix of its scores, bias of the query included, and that of its output."
    per = a.heads // a.kv_heads
    q = torch.cat([a.q.weight, a.q.bias[:, None]], 1).unflatten(0, (a.heads, -1)).detach()
    k, v = (m.weight.unflatten(0, (a.kv_heads, -1)).repeat_interleave(per, 0).detach() for m in (a.k, a.v))
    o = a.out.weight.detach().unflatten(1, (a.heads, -1)).transpose(0, 1)
    return q.mT @ k, o @ v


def test_svd_is_the_nearest():
    a = layer(heads=8)
    before = products(a)
    after = products(group_heads_(copy.deepcopy(a), 2, "svd"))
    for old, new in zip(before, after):
        for group in (slice(0, 4), slice(4, 8)):
            stacked = old[group].flatten(0, 1)
            left = torch.linalg.svdvals(stacked)[4:].square().sum()  # Eckart and Young: no smaller error of rank 4
            torch.testing.assert_close((new[group].flatten(0, 1) - stacked).square().sum(), left)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("bias", [True, False])
def test_in_two_steps_and_from_grouped(how, bias, x):
    a = layer(heads=8, bias=bias)
    once, twice = group_heads_(copy.deepcopy(a), 2, "mean"), group_heads_(group_heads_(copy.deepcopy(a), 4, "mean"), 2, "mean")
    torch.testing.assert_close(once(x), twice(x))
    grouped = layer(4, heads=8, bias=bias)
    assert group_heads_(grouped, 2, how)(x).shape == x.shape and grouped.kv_heads == 2
    assert group_heads_(a, 8, how) is a and a.kv_heads == 8  # nothing to do


@pytest.mark.parametrize("how", HOWS)
def test_types_and_devices(how):
    a = Attention(32, 4, dtype=torch.bfloat16)
    exact = group_heads_(copy.deepcopy(a).double(), 2, how)
    group_heads_(a, 2, how)
    assert a.k.weight.dtype == torch.bfloat16
    if how == "mean": assert torch.equal(a.k.weight, exact.k.weight.bfloat16())
    meta = group_heads_(Attention(32, 4, device="meta"), 1, how)
    assert meta.k.weight.is_meta and meta.k.weight.shape == (8, 32)


@pytest.mark.parametrize("how", HOWS)
def test_parameters_stay_and_train(how, x):
    model = nn.Sequential(Block(32, 4), Block(32, 4)).double()
    model[1].requires_grad_(False)
    kept = dict(model.named_parameters())
    model(x).sum().backward()
    group_heads_(model, 2, how)
    assert all(p is kept[name] for name, p in model.named_parameters())
    assert kept["0.attention.k.weight"].grad is None and kept["0.feedforward.0.weight"].grad is not None
    assert not kept["1.attention.k.weight"].requires_grad
    model(x).sum().backward()
    assert kept["0.attention.k.weight"].grad.shape == (16, 32)
    other = nn.Sequential(Block(32, 4, kv_heads=2), Block(32, 4, kv_heads=2)).double()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
    assert "kv_heads=2" in repr(model)


# caches

def test_cache_bytes_are_those_of_caches(x):
    model = nn.ModuleList(Block(32, 4) for _ in range(3)).double()
    share_module_(model, ["0", "2"])  # one block at two depths needs two caches
    for groups in (4, 2, 1):
        group_heads_(model, groups)
        caches, y = [Cache() for _ in model], x
        for block, cache in zip(model, caches): y = block(y, cache=cache)
        assert cache_bytes(model, 7, batch=2) == sum(c.nbytes for c in caches) == 3 * 2 * 2 * 7 * groups * 8 * 8
    assert cache_bytes(model, 7, dtype=torch.bfloat16) == 3 * 2 * 7 * 8 * 2
    assert cache_bytes(model, 0) == 0
    with pytest.raises(ValueError, match="tokens"): cache_bytes(model, -1)
    with pytest.raises(TypeError, match="dtype: a dtype of torch"): cache_bytes(model, 1, dtype="half")


# ties

def blocks(n=3): return nn.Sequential(*(Block(32, 4) for _ in range(n))).double()


@pytest.mark.parametrize("how", ["mean", "first"])
def test_ties_survive(how, x):
    model = blocks()
    tie_(model, ["0.attention.k.weight", "1.attention.k.weight"])
    tie_(model, ["0.attention.v.weight", "1.attention.v.weight"])
    share_module_(model, ["0", "2"])
    loose = copy.deepcopy(model)
    names = [t.names for t in find_ties(model)]
    group_heads_(model, 2, how)
    assert [t.names for t in find_ties(model)] == names
    one = group_heads_(copy.deepcopy(loose[1].attention), 2, how)
    torch.testing.assert_close(model[1].attention.k.weight, one.k.weight)
    assert model(x).shape == x.shape


def test_keys_tied_to_values():
    model = blocks(1)
    tie_(model, ["0.attention.k.weight", "0.attention.v.weight"])
    group_heads_(model, 2)
    assert model[0].attention.k.weight is model[0].attention.v.weight


def test_svd_of_a_shared_module(x):
    model = blocks(2)
    share_module_(model, ["0", "1"])
    alone = group_heads_(copy.deepcopy(model[0]), 2, "svd")
    group_heads_(model, 2, "svd")
    assert model[0] is model[1]
    torch.testing.assert_close(model(x), alone(alone(x)))


def refused(model, message, *args, error=ValueError):
    before, config = state(model), sizes(model)
    with pytest.raises(error, match=message): group_heads_(model, *args)
    unchanged(model, before, config)


def test_ties_that_would_break():
    model = blocks(2)
    tie_(model, ["1.attention.q.weight", "1.attention.k.weight"])
    refused(model, "'1.attention.q.weight' is tied to a weight of '1.attention' that changes; untie_ it first", 2)
    model = blocks(2)
    tie_(model, ["0.attention.k.weight", "1.attention.k.weight"])
    refused(model, "weights of '0.attention' and '1.attention' are one, and 'svd' would make them two", 2, "svd")
    model = blocks(2)
    model.other = nn.Linear(32, 32).double()
    tie_(model, ["0.attention.k.weight", "other.weight"], Transpose())
    refused(model, "is tied to a weight of '0.attention' that changes", 2)
    model = blocks(2)
    tie_(model, ["0.attention.q.weight", "1.attention.k.weight"], Transpose())
    refused(model, "model: a plain nn.Linear as k of '1.attention' is expected", 2)
    model = blocks(1)
    model[0].attention.v.weight = nn.Parameter(model[0].attention.k.weight.data)
    refused(model, "several tensors over one memory", 2)


def test_adam_from_before_is_found_by_its_error():
    model = blocks(1)
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for _ in range(2):
        if optimizer.state:
            group_heads_(model, 2)
            model(x).sum().backward()
            with pytest.raises(RuntimeError, match="size"): optimizer.step()
        else:
            model(x).sum().backward()
            optimizer.step()


def test_bad_groups():
    model = nn.Sequential(Block(32, 4), Attention(30, 6))
    refused(model, "groups: a divisor of the 6 heads of keys and values of '1' is expected, got 4", 4)
    refused(model, "groups: a whole number of at least 1 is expected, got 0", 0)
    refused(model, "groups: a whole number is expected, got 2.0", 2., error=TypeError)
    refused(model, "how: one of 'mean', 'first', 'svd' is expected, got 'men'; did you mean 'mean'", 2, "men")
    refused(Attention(32, 4, 2), "a divisor of the 2 heads of keys and values of '' is expected, got 4", 4)


def test_bad_models():
    with pytest.raises(TypeError, match="model: a module"): group_heads_([Attention(32, 4)], 2)
    with pytest.raises(ValueError, match="as in LLaMA models .* is expected, got Linear"): group_heads_(nn.Linear(4, 4), 2)
    model = nn.Sequential(Block(32, 4), nn.TransformerEncoderLayer(32, 4))
    refused(model, "MultiheadAttention at '1.self_attn', which holds .* in one matrix; from_multihead .* for blocks that call it with x alone", 2)
    model = nn.Sequential(Block(32, 4))
    model[0].attention.out.bias = None
    refused(model, "a bias of out at '0.attention'", 2, "svd")


def test_wrapped_models(one_process):
    import torch.distributed as dist
    wrapped = nn.parallel.DistributedDataParallel(blocks(1))
    with pytest.raises(ValueError, match="not wrapped yet is expected, got DistributedDataParallel"): group_heads_(wrapped, 2)


# PyTorch's layer

@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_from_multihead(bias, causal, x):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(32, 4, bias=bias, batch_first=True, dtype=torch.float64).eval()
    if bias: nn.init.normal_(theirs.in_proj_bias), nn.init.normal_(theirs.out_proj.bias)
    mask = ~torch.ones(7, 7).tril().bool() if causal else None
    ours = from_multihead(theirs, causal)
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=mask)[0])
    assert not ours.training and not any(p is q for p in ours.parameters() for q in theirs.parameters())


def test_from_multihead_refuses():
    with pytest.raises(TypeError, match="layer: nn.MultiheadAttention is expected, got Linear"): from_multihead(nn.Linear(4, 4))
    for options in ({"kdim": 8}, {"vdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"dropout": .1}):
        with pytest.raises(ValueError, match=f"got \\['{next(iter(options))}'\\]"): from_multihead(nn.MultiheadAttention(32, 4, **options))


# transformers

@pytest.fixture(scope="module")
def transformers(): return pytest.importorskip("transformers", reason="transformers is not installed: its own models are not converted")


def llama(transformers, kv=4, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=kv, max_position_embeddings=32, **options)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("how", ["mean", "first"])
@pytest.mark.parametrize("kv, groups", [(4, 2), (4, 1), (2, 1)])
def test_llama(transformers, how, kv, groups):
    model, words = llama(transformers, kv, attention_bias=True), torch.randint(50, (2, 6))
    k = model.model.layers[1].self_attn.k_proj.weight.detach().view(groups, kv // groups, 8, 32)
    full = cache_bytes(model, 6, 2)
    assert group_heads_(model, groups, how) is model
    expected = (k.mean(1) if how == "mean" else k[:, 0]).reshape(-1, 32)
    torch.testing.assert_close(model.model.layers[1].self_attn.k_proj.weight.data, expected)
    assert model.config.num_key_value_heads == groups
    other = llama(transformers, groups, attention_bias=True)  # the same as a model that was built so
    other.load_state_dict(model.state_dict())
    out = model(words, use_cache=True)
    torch.testing.assert_close(out.logits, other(words).logits)
    cache = out.past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kept == cache_bytes(model, 6, 2) == full * groups // kv
    step = model(words[:, -1:], past_key_values=model(words[:, :-1], use_cache=True).past_key_values).logits
    torch.testing.assert_close(step[:, -1], out.logits[:, -1], atol=1e-5, rtol=1e-5)


def test_llama_equal_heads_lose_nothing(transformers):
    model, words = llama(transformers), torch.randint(50, (2, 6))
    with torch.no_grad():
        for block in model.model.layers:
            for linear in (block.self_attn.k_proj, block.self_attn.v_proj):
                linear.weight.copy_(linear.weight.view(2, 2, 8, 32)[:, :1].expand(-1, 2, -1, -1).reshape(32, 32))
    before = model(words).logits
    torch.testing.assert_close(group_heads_(model, 2)(words).logits, before, atol=1e-5, rtol=1e-5)


def test_llama_refuses_svd(transformers):
    model = llama(transformers)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="how: 'mean' or 'first' for LlamaAttention, which may turn its keys"): group_heads_(model, 2, "svd")
    with pytest.raises(ValueError, match="groups: a divisor of the 4 heads"): group_heads_(model, 3)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters()) and model.config.num_key_value_heads == 4


@pytest.mark.parametrize("how", ["mean", "first", "svd"])
def test_heads_with_nan_are_refused_and_stay(how):
    layer = Attention(8, 4)
    with torch.no_grad(): layer.k.weight[0, 0] = torch.nan
    before = layer.k.weight.clone()
    with pytest.raises(ValueError, match="weight of k: finite numbers are expected"): group_heads_(layer, 2, how)
    assert torch.equal(layer.k.weight.nan_to_num(), before.nan_to_num())
    assert group_heads_(Attention(8, 4, device="meta"), 2, "mean").k.weight.shape == (4, 8)
