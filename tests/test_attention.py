"Attention against PyTorch's, values and gradients, what it refuses, and what a conversion to fewer heads keeps."
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from sharetie.attention import Attention, Block, Cache, attention, from_multihead, positions


def heads(q=4, kv=4, n=5, m=5, width=8, dtype=torch.float64, seed=0, batch=(2,)):
    "Queries, keys and values."
    g = torch.Generator().manual_seed(seed)
    sizes = (q, n), (kv, m), (kv, m)
    return [torch.randn(*batch, *size, width, generator=g, dtype=dtype, requires_grad=True) for size in sizes]


def compared(ours, theirs, inputs, at=1e-12):
    "Values and gradients agree."
    y, z = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(y, z, atol=at, rtol=at)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    for a, b in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(z, inputs, g)):
        torch.testing.assert_close(a, b, atol=at, rtol=at)


# attention

@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_attention_equals_pytorch(causal, kv, batch):
    def theirs(q, k, v): return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=kv < 4)
    compared(lambda *qkv: attention(*qkv, causal=causal), theirs, heads(kv=kv, batch=batch))


@pytest.mark.parametrize("shape", [(5, 5), (1, 5), (5, 1), (2, 1, 5, 5), (4, 5, 5), (1,)])
@pytest.mark.parametrize("kind", ["bool", "float", "some -inf"])
def test_masks_equal_pytorch(shape, kind):
    g = torch.Generator().manual_seed(3)
    mask = torch.rand(shape, generator=g) > .4
    if kind == "float": mask = torch.randn(shape, generator=g, dtype=torch.float64)
    if kind == "some -inf": mask = torch.where(mask, 0, -torch.inf).double()
    def theirs(*qkv): return F.scaled_dot_product_attention(*qkv, attn_mask=mask.expand(2, 4, 5, 5))
    compared(lambda *qkv: attention(*qkv, mask=mask), theirs, heads())


def test_nothing_seen_gives_zero_and_finite_gradients():
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    q, k, v = heads()
    y = attention(q, k, v, mask=mask)
    assert not y[:, :, 2].any() and y[:, :, 1].all()
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v)) and not q.grad[:, :, 2].any()


@pytest.mark.parametrize("n, m", [(2, 5), (1, 5), (5, 5)])
def test_last_query_is_at_last_key(n, m):
    def theirs(*qkv): return F.scaled_dot_product_attention(*qkv, attn_mask=causal_lower_right(n, m)._materialize())
    compared(lambda *qkv: attention(*qkv, causal=True), theirs, heads(n=n, m=m))


def test_causal_and_mask_together():
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) > .5
    both = mask & torch.ones(5, 5).tril().bool()
    q, k, v = heads()
    torch.testing.assert_close(attention(q, k, v, True, mask), attention(q, k, v, mask=both))
    added = torch.randn(5, 5, dtype=torch.float64)
    expected = attention(q, k, v, mask=added.masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf))
    torch.testing.assert_close(attention(q, k, v, True, added), expected)


def test_wider_values():
    q, k, v = heads()
    v = torch.cat([v, v], -1)
    assert attention(q, k, v).shape == (2, 4, 5, 16)


def test_attention_gradients():
    q, k, v = heads(q=2, kv=1, n=3, m=3, width=2, batch=())
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, causal=True), (q, k, v))


def test_empty_and_meta():
    q, k, v = heads(n=0)
    assert attention(q, k, v).shape == (2, 4, 0, 8)
    q, k, v = (t.to("meta") for t in heads())
    assert attention(q, k, v, causal=True).is_meta


@pytest.mark.long
def test_attention_compiles_whole():
    q, k, v = heads(kv=2)
    whole = torch.compile(attention, fullgraph=True, backend="aot_eager")
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) > .3
    for options in ({}, {"causal": True}, {"mask": mask}): torch.testing.assert_close(whole(q, k, v, **options), attention(q, k, v, **options))


@pytest.mark.long
def test_a_compiled_layer_takes_sequences_of_any_length():
    layer = Attention(16, 2, causal=True)
    whole = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 7, 9):
        x = torch.randn(2, n, 16)
        torch.testing.assert_close(whole(x), layer(x))


@pytest.mark.parametrize("kv", [4, 1])
def test_permutation_equivariance(kv):
    torch.manual_seed(0)
    x, order = torch.randn(2, 7, 32, dtype=torch.float64), torch.randperm(7)
    free, causal = (Block(32, 4, kv_heads=kv, causal=c, dtype=torch.float64) for c in (False, True))
    torch.testing.assert_close(free(x[:, order]), free(x)[:, order])
    assert (causal(x[:, order]) - causal(x)[:, order]).abs().max() > .01
    code = positions(7, 32, dtype=torch.float64)
    assert (free(x[:, order] + code) - free(x + code)[:, order]).abs().max() > .01


BAD_HEADS = [
    (dict(kv=3), "k: a number of heads that divides the 4 of q is expected, got 3"),
    (dict(kv=8), "got 8"),
]


@pytest.mark.parametrize("sizes, message", BAD_HEADS)
def test_heads_that_do_not_divide(sizes, message):
    with pytest.raises(ValueError, match=message): attention(*heads(**sizes))


def test_what_attention_refuses():
    q, k, v = heads()
    with pytest.raises(TypeError, match="q: a floating point tensor"): attention(q.long(), k, v)
    with pytest.raises(TypeError, match="v: a floating point tensor"): attention(q, k, [1])
    with pytest.raises(ValueError, match="axes"): attention(q[0, 0], k[0, 0], v[0, 0])
    with pytest.raises(ValueError, match="k: the width of q, 8, is expected, got 4"): attention(q, k[..., :4], v)
    with pytest.raises(ValueError, match="v: batch, heads and positions of k"): attention(q, k, v[:, :, :4])
    with pytest.raises(ValueError, match="k: the batch of q"): attention(q, k[:1], v[:1])
    with pytest.raises(ValueError, match="k: torch.float64 on cpu, as q, is expected, got 'torch.float32 on cpu'"):
        attention(q, k.float(), v)
    with pytest.raises(ValueError, match="on meta"): attention(q, k, v.to("meta"))
    with pytest.raises(ValueError, match=r"mask: a shape that stretches to \(2, 4, 5, 5\) is expected, got \(5, 4\)"):
        attention(q, k, v, mask=torch.ones(5, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask"): attention(q, k, v, mask=torch.ones(3, 2, 4, 5, 5))
    with pytest.raises(TypeError, match="mask: a tensor of True and False"): attention(q, k, v, mask=torch.ones(5, 5).long())
    with pytest.raises(TypeError, match="mask: a tensor"): attention(q, k, v, mask=True)


# the modules

def test_attention_module_is_the_formula():
    torch.manual_seed(0)
    for kv, causal in [(4, False), (2, True), (1, True)]:
        layer, x = Attention(32, 4, kv, causal, dtype=torch.float64), torch.randn(2, 7, 32, dtype=torch.float64)
        q, k, v = (f(x).view(2, 7, -1, 8).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
        expected = layer.out(attention(q, k, v, causal).transpose(1, 2).reshape(2, 7, 32))
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_module_mask(causal):
    torch.manual_seed(0)
    layer, x = Attention(32, 4, 2, causal, dtype=torch.float64), torch.randn(2, 7, 32, dtype=torch.float64)
    seen = torch.rand(2, 1, 1, 7) > .3
    seen[..., 0] = True
    masked = layer(x, mask=seen)
    torch.testing.assert_close(masked, layer(x, mask=torch.where(seen, 0., -torch.inf).double()))
    other = torch.where(seen[:, 0, 0, :, None], x, torch.randn_like(x))  # unseen positions may hold anything
    torch.testing.assert_close(masked[seen[:, 0, 0]], layer(other, mask=seen)[seen[:, 0, 0]])


@pytest.mark.parametrize("pieces", [[1] * 7, [3, 4], [7], [6, 1]])
def test_cache_gives_the_same(pieces):
    torch.manual_seed(0)
    block, x = Block(32, 4, kv_heads=2, dtype=torch.float64), torch.randn(2, 7, 32, dtype=torch.float64)
    cache = Cache()
    parts = torch.cat([block(part, cache=cache) for part in x.split(pieces, 1)], 1)
    torch.testing.assert_close(parts, block(x))
    assert len(cache) == 7 and cache.nbytes == 2 * 2 * 2 * 7 * 8 * 8
    assert Cache().nbytes == len(Cache()) == 0


def test_block_by_hand():
    torch.manual_seed(0)
    block, x = Block(16, 2, hidden=24), torch.randn(2, 5, 16)
    y = x + block.attention(block.norm1(x))
    torch.testing.assert_close(block(x), y + block.feedforward(block.norm2(y)))
    assert [name for name, _ in block.named_children()] == ["norm1", "norm2", "attention", "feedforward"]
    assert block.feedforward[0].out_features == 24 and Block(16, 2).feedforward[0].out_features == 64
    assert block.attention.causal and not Block(16, 2, causal=False).attention.causal


@pytest.mark.long
@pytest.mark.parametrize("kv", [4, 1])
def test_state_copy_compile_autocast_meta(kv):
    torch.manual_seed(0)
    block, x = Block(32, 4, kv_heads=kv), torch.randn(2, 7, 32)
    other = Block(32, 4, kv_heads=kv)
    other.load_state_dict(block.state_dict())
    torch.testing.assert_close(other(x), block(x))
    torch.testing.assert_close(copy.deepcopy(block)(x), block(x))
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))
    with torch.autocast("cpu", torch.bfloat16): assert block.attention(x).dtype == torch.bfloat16
    with torch.device("meta"): assert Block(32, 4, kv_heads=kv)(torch.zeros(1, 3, 32)).is_meta
    assert Attention(32, 4, kv)(torch.randn(7, 32)).shape == (7, 32)
    assert Attention(32, 4, kv, causal=True)(torch.zeros(2, 0, 32)).shape == (2, 0, 32)


def test_what_modules_refuse():
    with pytest.raises(ValueError, match="heads: a divisor of dim=30 is expected, got 4"): Attention(30, 4)
    with pytest.raises(ValueError, match="kv_heads: a divisor of heads=4 is expected, got 3"): Attention(32, 4, 3)
    with pytest.raises(ValueError, match="heads"): Attention(32, 0)
    with pytest.raises(TypeError, match="dim: a whole number"): Block(32., 4)
    with pytest.raises(ValueError, match="hidden"): Block(32, 4, hidden=0)
    with pytest.raises(ValueError, match=r"x: \(batch, positions, 32\) is expected, got \(2, 5, 16\)"):
        Attention(32, 4)(torch.zeros(2, 5, 16))
    with pytest.raises(TypeError, match="x: a floating point tensor"): Attention(32, 4)(torch.zeros(2, 32).long())
    with pytest.raises(ValueError, match="mask: a shape that stretches"):
        Attention(32, 4)(torch.zeros(2, 5, 32), torch.ones(4, 5) > 0)


# positions

def test_positions_by_the_formula():
    code = positions(20, 6, dtype=torch.float64)
    for at in range(20):
        for i in range(3):
            angle = at / 10_000 ** (2 * i / 6)
            assert abs(code[at, 2 * i] - math.sin(angle)) < 1e-12
            assert abs(code[at, 2 * i + 1] - math.cos(angle)) < 1e-12
    assert positions(3, 4).dtype == torch.float32 and positions(0, 4).shape == (0, 4)
    torch.testing.assert_close(positions(5, 6, start=15), positions(20, 6)[15:])
    far = positions(1, 4, start=10**7)[0, 0]
    assert abs(far - math.sin(10**7)) < 1e-6  # angles are computed in double precision
    assert positions(3, 4, device="meta", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_what_positions_refuses():
    with pytest.raises(ValueError, match="dim: an even number is expected, got 5"): positions(3, 5)
    with pytest.raises(ValueError, match="n: a whole number of at least 0"): positions(-1, 4)
    with pytest.raises(TypeError): positions(3., 4)
    with pytest.raises(ValueError, match="base"): positions(3, 4, base=0)


def test_a_refused_call_leaves_the_cache_as_it_was():
    layer, cache, x = Attention(8, 2, causal=True), Cache(), torch.randn(1, 5, 8)
    layer(x, cache=cache)
    with pytest.raises(ValueError, match="mask"): layer(x[:, :1], mask=torch.ones(9, 9, dtype=torch.bool), cache=cache)
    with pytest.raises(ValueError, match=r"k: batch, heads and width of the cache, \(1, 2, 4\), is expected, got \(2, 2, 4\)"): layer(torch.randn(2, 1, 8), cache=cache)
    with pytest.raises(TypeError, match="cache: a Cache or None"): layer(x, cache=3)
    with pytest.raises(ValueError, match=r"k: .*\(1, 2, 4\), is expected, got \(1, 4, 2\)"): Attention(8, 4, causal=True)(x, cache=cache)
    with pytest.raises(ValueError, match="k: torch.float32 on cpu, as the cache is, is expected, got 'torch.float64 on cpu'"): copy.deepcopy(layer).double()(x.double(), cache=cache)
    for k, v, error in ((None, None, TypeError), (torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 1, 4), ValueError)):
        with pytest.raises(error): cache.extend(k, v)
    assert len(cache) == 5


@pytest.mark.parametrize("make", [lambda **options: Attention(8, 2, **options), lambda **options: Block(8, 2, **options)])
def test_layers_say_what_they_read(make):
    layer, x = make(), torch.randn(2, 5, 8)
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(TypeError, match=f"^x: torch.float32, as the weights are, is expected, got {dtype}"): layer(x.to(dtype))
    with pytest.raises(ValueError, match=r"^x: \(batch, positions, 8\) is expected, got \(2, 5, 9\)"): layer(torch.zeros(2, 5, 9))
    for bad in (x.long(), None, [1]):
        with pytest.raises(TypeError, match="^x: a floating point tensor"): layer(bad)
    for dtype in (torch.int32, torch.complex64, "float32"):
        with pytest.raises(TypeError, match="^dtype: a floating point type"): make(dtype=dtype)
    for flag in ("causal", "bias"):
        with pytest.raises(TypeError, match=f"^{flag}: True or False is expected, got 1"): make(**{flag: 1})


def test_masks_of_another_type_or_place():
    q, mask = torch.randn(1, 2, 5, 4), torch.randn(5, 5, dtype=torch.float64)
    torch.testing.assert_close(attention(q, q, q, mask=mask), attention(q, q, q, mask=mask.float()))
    far = torch.ones(5, 5, dtype=torch.bool, device="meta")
    for call in (lambda: attention(q, q, q, mask=far), lambda: Attention(8, 2)(torch.randn(1, 5, 8), mask=far)):
        with pytest.raises(ValueError, match="^mask: a tensor on cpu"): call()
    with pytest.raises(TypeError, match="^causal: True or False"): attention(q, q, q, causal="yes")
    for dtype in (torch.int32, "float32"):
        with pytest.raises(TypeError, match="^dtype"): positions(3, 4, dtype=dtype)


def test_a_frozen_layer_stays_frozen():
    made = from_multihead(nn.MultiheadAttention(8, 2).requires_grad_(False))
    assert not any(p.requires_grad for p in made.parameters())
    assert all(p.requires_grad for p in from_multihead(nn.MultiheadAttention(8, 2)).parameters())
