"share_layers_ and unshare_layers_: what they make, what they keep, what they refuse."
import copy
import pickle

import pytest
import torch
from torch import nn

from sharetie.attention import Block, Cache
from sharetie.census import census
from sharetie.layers import layer_groups, share_layers_, unshare_layers_
from sharetie.ties import (BrokenTie, check_ties, declared_ties, find_ties, keep_ties, load_model, places, save_model,
                           share_module_, tie_)

SCHEMES = [("all", None, [0, 0, 0, 0, 0, 0]), ("sequence", 3, [0, 0, 1, 1, 2, 2]), ("sequence", 2, [0, 0, 0, 1, 1, 1]),
           ("cycle", 3, [0, 1, 2, 0, 1, 2]), ("cycle", 2, [0, 1, 0, 1, 0, 1]), ("cycle_rev", 3, [0, 1, 2, 2, 1, 0]),
           ("cycle_rev", 2, [0, 1, 0, 1, 1, 0]), ("cycle_rev", 6, [0, 1, 2, 3, 4, 5]), ("sandwich", None, [0, 1, 1, 1, 1, 2]),
           ([0, 0, 1, 1, 5, 5], None, [0, 0, 1, 1, 2, 2]), ((1, 0, 1, 0, 1, 0), None, [0, 1, 0, 1, 0, 1])]


class Model(nn.Module):
    def __init__(self, layers=6, dim=8, hidden=16, seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.emb, self.head = nn.Embedding(10, dim), nn.Linear(dim, 10, bias=False)
        self.blocks = nn.ModuleList(Block(dim, 2, hidden) for _ in range(layers))

    def forward(self, x):
        x = self.emb(x)
        for block in self.blocks: x = block(x)
        return self.head(x)


def words(b=2, n=5): return torch.randint(10, (b, n), generator=torch.Generator().manual_seed(1))


def state(model):
    "All that a model holds, by name: which tensor, of which value, trained or not; and what is declared."
    held = {n: (id(p.tensor), p.tensor.requires_grad, None if p.tensor.is_meta else p.tensor.tolist()) for n, p in places(model).items()}
    return held, declared_ties(model), [(id(m), type(m)) for m in model.modules()], find_ties(model)


def plain(model, groups):
    "The same function by a loop over the first block of each group."
    def forward(x):
        x = model.emb(x)
        for group in groups: x = model.blocks[groups.index(group)](x)
        return model.head(x)
    return forward


# Which layers share

@pytest.mark.parametrize("scheme, groups, expected", SCHEMES)
def test_groups(scheme, groups, expected): assert layer_groups(scheme, 6, groups) == expected


@pytest.mark.parametrize("n, m", [(n, m) for n in range(1, 13) for m in range(1, n + 1) if n % m == 0])
def test_groups_of_every_size(n, m):
    for scheme in ("sequence", "cycle", "cycle_rev"):
        labels = layer_groups(scheme, n, m)
        assert sorted(set(labels)) == list(range(m)) and all(labels.count(g) == n // m for g in range(m))
    assert layer_groups("cycle", n, m) == [i % m for i in range(n)]
    assert layer_groups("sequence", n, m) == sorted(layer_groups("cycle", n, m))
    if 1 < m < n: assert layer_groups("cycle_rev", n, m)[-m:] == list(range(m))[::-1]


def test_groups_bad():
    with pytest.raises(ValueError, match=r"scheme: .*'cycles'; did you mean 'cycle'"): layer_groups("cycles", 6, 2)
    for groups, got in [(4, "4"), (0, "0"), (12, "12"), (None, "None")]:
        with pytest.raises(ValueError, match=rf"groups: a divisor of the 6 layers \(1, 2, 3, 6\) is expected, got {got}"):
            layer_groups("cycle", 6, groups)
    with pytest.raises(ValueError, match="groups: 1 for 'all' is expected, got 2"): layer_groups("all", 6, 2)
    with pytest.raises(ValueError, match="^scheme: 'sandwich' needs at least 3 layers, got 2$"): layer_groups("sandwich", 2)
    with pytest.raises(ValueError, match=r"each of the 6 layers is expected, got \[0, 1\]"): layer_groups([0, 1], 6)
    with pytest.raises(ValueError, match=r"scheme\[1\]: a whole number from 0 to 1 is expected, got 7"): layer_groups([0, 7], 2)
    with pytest.raises(ValueError, match="groups: None"): layer_groups([0, 0], 2, 1)
    for bad in (None, 3, torch.tensor([0, 0]), {0: 0, 1: 0}):
        with pytest.raises(TypeError, match="scheme"): layer_groups(bad, 2)
    for bad in ([0.0, 0], [True, 0], ["a", 0]):
        with pytest.raises(TypeError, match=r"scheme\[0\]"): layer_groups(bad, 2)
    for bad in (2.0, "2", True):
        with pytest.raises(TypeError, match="groups"): layer_groups("cycle", 6, bad)
    with pytest.raises(ValueError, match="n: "): layer_groups("all", 0)


# Sharing

@pytest.mark.parametrize("scheme, groups, labels", SCHEMES)
def test_shared_layers_are_one_block_applied_again(scheme, groups, labels):
    model, x = Model(), words()
    expected = plain(copy.deepcopy(model), labels)(x)
    share_layers_(model, scheme, groups)
    assert torch.equal(model(x), expected)
    per = sum(p.numel() for p in Block(8, 2, 16).parameters())
    rest = sum(p.numel() for p in [model.emb.weight, model.head.weight])
    assert sum(p.numel() for p in model.parameters()) == rest + per * len(set(labels))
    assert census(model, x[:1]).stored == rest + per * len(set(labels))
    check_ties(model)


def test_the_gradient_is_the_sum_over_the_depth():
    free, shared, x = Model(), Model(), words()
    share_layers_(shared)
    for block in free.blocks: block.load_state_dict(shared.blocks[0].state_dict())
    for model in (free, shared): model(x).logsumexp(-1).sum().backward()
    for name, p in shared.blocks[0].named_parameters():
        total = sum(block.get_parameter(name).grad for block in free.blocks)
        torch.testing.assert_close(p.grad, total, rtol=1e-4, atol=1e-5)


def test_the_first_or_the_mean_stays():
    first, mean = Model(), Model()
    before = [block.attention.q.weight.detach().clone() for block in first.blocks]
    source = first.blocks[0].attention.q.weight
    share_layers_(first)
    share_layers_(mean, "cycle", 2, values="mean")
    assert first.blocks[5].attention.q.weight is source and torch.equal(source, before[0])
    torch.testing.assert_close(mean.blocks[1].attention.q.weight, (before[1] + before[3] + before[5]) / 3)


@pytest.mark.parametrize("parts, expected", [("attention", {"attention"}), ("feedforward", {"feedforward"}),
                                             (["attention", "norm1"], {"attention", "norm1"}), ("norm*", {"norm1", "norm2"}),
                                             ("feedforward.0.weight", {"feedforward"})])
def test_parts(parts, expected):
    model = Model()
    ties = share_layers_(model, parts=parts)
    assert {name.split(".")[2] for tie in ties for name in tie.names} == expected
    untied = [n for n, _ in model.named_parameters() if n.startswith("blocks.3.")]
    assert ("blocks.3.attention.q.weight" in untied) == ("attention" not in expected)
    check_ties(model)


def test_parts_one_after_the_other():
    model = Model()
    share_layers_(model, parts="attention")
    share_layers_(model, "cycle", 2, parts="feedforward")
    assert model.blocks[1].attention.q.weight is model.blocks[0].attention.q.weight
    assert model.blocks[1].feedforward[0].weight is not model.blocks[0].feedforward[0].weight
    assert model.blocks[1].feedforward[0].weight is model.blocks[5].feedforward[0].weight


def test_buffers_modes_hooks_and_attributes_stay_each_layers_own():
    model = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3))
    for i, block in enumerate(model): block.layer_idx = i
    share_layers_(model)
    assert len({id(b[1].running_mean) for b in model}) == 3 and [b.layer_idx for b in model] == [0, 1, 2]


def test_a_cache_per_layer_works_with_shared_layers():
    model = Model().eval()
    share_layers_(model)
    x = words(1, 6)
    caches, steps = [Cache() for _ in model.blocks], []
    for t in range(6):
        h = model.emb(x[:, t:t + 1])
        for block, cache in zip(model.blocks, caches): h = block(h, cache=cache)
        steps.append(model.head(h))
    torch.testing.assert_close(torch.cat(steps, 1), model(x))


@pytest.mark.parametrize("make, at", [
    (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 4, enable_nested_tensor=False), None),
    (lambda: nn.Sequential(*(Block(8, 2, 16) for _ in range(4))), None),
    (lambda: nn.Sequential(nn.Linear(8, 8), nn.Sequential(*(Block(8, 2, 16) for _ in range(4)))), "1"),
    (lambda: nn.Sequential(nn.Linear(8, 8), nn.Sequential(*(Block(8, 2, 16) for _ in range(4)))), None)])
def test_other_lists_of_blocks(make, at):
    torch.manual_seed(0)
    model, x = make(), torch.randn(2, 3, 8)
    before = sum(p.numel() for p in model.parameters())
    share_layers_(model, "cycle", 2, at=at)
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before
    for mode in (True, False):
        with torch.set_grad_enabled(mode): model.train(mode)(x)
    y = model(x)
    unshare_layers_(model, at)
    assert torch.equal(model(x), y) and not find_ties(model)


def test_a_list_inside_of_a_model():
    model = Model()
    share_layers_(model.blocks, "sequence", 2)
    check_ties(model)
    assert declared_ties(model)[0].names[0] == "blocks.0.norm1.weight"
    unshare_layers_(model)
    assert not find_ties(model) and not declared_ties(model)


def test_several_lists_are_asked_for_by_name():
    model = nn.Transformer(8, 2, 2, 2, 16)
    before = state(model)
    with pytest.raises(ValueError, match="at: the name of one list of blocks, of 'encoder.layers', 'decoder.layers', is expected, got None"):
        share_layers_(model)
    assert state(model) == before
    share_layers_(model, at="decoder.layers")
    assert model.decoder.layers[1].linear1.weight is model.decoder.layers[0].linear1.weight
    assert model.encoder.layers[1].linear1.weight is not model.encoder.layers[0].linear1.weight


def test_lists_inside_of_blocks_do_not_count():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model = nn.ModuleList(Experts() for _ in range(2))
    assert len(share_layers_(model)) == 6


# Through what a model goes

def train(model, steps=3):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(words()).square().sum().backward()
        optimizer.step()
    return optimizer


def lives_through(change, folder):
    "The ties that `change` makes are there after training, copies, pickles, state dicts and files."
    model, other = Model(), Model(seed=1)
    change(model), change(other)
    check_ties(model, train(model))
    x, y = words(), model(words())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        check_ties(twin, train(twin))
        assert not torch.equal(twin(x), y) and torch.equal(model(x), y)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), y)
    save_model(model, folder / "m.safetensors")
    other = Model(seed=2)
    change(other)
    load_model(other, folder / "m.safetensors")
    assert torch.equal(other(x), y)
    check_ties(other)


@pytest.mark.parametrize("change", [lambda m: share_layers_(m, "cycle_rev", 3), lambda m: share_layers_(m, parts="attention")])
def test_ties_live_through_training_copies_pickles_and_files(change, tmp_path): lives_through(change, tmp_path)


def test_a_file_brings_the_sharing_along(tmp_path):
    model, fresh = Model(), Model(seed=1)
    share_layers_(model)
    save_model(model, tmp_path / "m.safetensors")
    load_model(fresh, tmp_path / "m.safetensors", restore_ties=True)
    assert torch.equal(fresh(words()), model(words())) and len(list(fresh.parameters())) == len(list(model.parameters()))
    size = (tmp_path / "m.safetensors").stat().st_size
    head = int.from_bytes((tmp_path / "m.safetensors").read_bytes()[:8], "little")
    assert size == 8 + head + sum(p.nbytes for p in model.parameters())


def test_keep_ties_keeps_them_over_meta_and_assign():
    model = Model()
    share_layers_(model)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    keep_ties(model).to("meta").to_empty(device="cpu")
    model.load_state_dict(values, assign=True)
    check_ties(model)
    assert len(list(model.blocks.parameters())) == len(list(Block(8, 2, 16).parameters()))


@pytest.mark.long
def test_compiled():
    model = Model(2)
    share_layers_(model)
    x = words()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_meta_and_bfloat16():
    with torch.device("meta"): model = Model()
    share_layers_(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model = Model().bfloat16()
    share_layers_(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model(words()).isfinite().all()
    model = Model()
    share_layers_(model)
    with torch.autocast("cpu", torch.bfloat16): assert model(words()).dtype == torch.bfloat16


def test_frozen_layers_stay_frozen():
    model = Model()
    model.blocks.requires_grad_(False)
    share_layers_(model)
    assert not any(p.requires_grad for p in model.blocks.parameters())
    unshare_layers_(model)
    assert not any(p.requires_grad for p in model.blocks.parameters())


# Going back

@pytest.mark.parametrize("change", [share_layers_, lambda m: share_layers_(m, "sandwich"), lambda m: share_layers_(m, parts="norm?")])
def test_unshared_layers_compute_the_same_and_train_apart(change):
    model, x = Model(), words()
    names = sorted(n for n, _ in model.named_parameters())
    change(model)
    y, types = model(x), [type(m) for m in Model().modules()]
    assert unshare_layers_(model) is model
    torch.testing.assert_close(model(x), y)
    assert not find_ties(model) and not declared_ties(model)
    assert sorted(n for n, _ in model.named_parameters()) == names
    assert [type(m) for m in model.modules()] == types
    train(model)
    assert not torch.equal(model.blocks[0].attention.q.weight, model.blocks[1].attention.q.weight)


def test_unsharing_keeps_ties_within_a_layer_and_with_the_outside():
    model = Model()
    tie_(model, ["emb.weight", "head.weight"])
    for i in range(6): tie_(model, [f"blocks.{i}.norm1.weight", f"blocks.{i}.norm2.weight"])
    share_layers_(model)
    unshare_layers_(model)
    assert model.emb.weight is model.head.weight
    assert all(block.norm1.weight is block.norm2.weight for block in model.blocks)
    assert len({id(block.norm1.weight) for block in model.blocks}) == 6


def test_shared_modules_are_unshared_too():
    model, x = Model(), words()
    share_module_(model, "blocks.*.attention")
    y = model(x)
    unshare_layers_(model)
    assert len({id(block.attention) for block in model.blocks}) == 6 and torch.equal(model(x), y)
    model = nn.ModuleList([Block(8, 2, 16)] * 3)
    unshare_layers_(model)
    assert len({id(block) for block in model}) == 3 and not find_ties(model)


def test_an_optimizer_from_before_unsharing_is_found():
    model = Model()
    share_layers_(model)
    old = torch.optim.Adam(model.parameters())
    check_ties(model, old)
    unshare_layers_(model)
    with pytest.raises(BrokenTie, match="blocks.1"): check_ties(model, old)
    check_ties(model, torch.optim.Adam(model.parameters()))


def test_nothing_to_unshare():
    model = Model()
    before = state(model)
    with pytest.raises(ValueError, match="the layers of 'blocks' share nothing"): unshare_layers_(model)
    assert state(model) == before


# What is refused, with the model as it was

def other_block(**options):
    def change(model): model.blocks[2] = Block(**{"dim": 8, "heads": 2, "hidden": 16} | options)
    return change


BAD = [
    (share_layers_, {"scheme": "cycel"}, None, ValueError, "'cycel'; did you mean 'cycle'"),
    (share_layers_, {"scheme": "cycle", "groups": 4}, None, ValueError, "divisor of the 6 layers .* got 4"),
    (share_layers_, {"scheme": [0, 1, 0]}, None, ValueError, r"6 layers is expected, got \[0, 1, 0\]"),
    (share_layers_, {"parts": "atention"}, None, ValueError, "'atention' .*nearest is 'attention'"),
    (share_layers_, {"parts": "feedforward.1"}, None, ValueError, "at least one parameter .* got 'feedforward.1'"),
    (share_layers_, {"parts": 3}, None, TypeError, "parts"),
    (share_layers_, {"at": "*"}, lambda m: setattr(m, "more", copy.deepcopy(m.blocks)), ValueError, r"at: the name of one list of blocks, such as 'blocks', 'blocks.0.feedforward', is expected, got '\*'"),
    (share_layers_, {"parts": []}, None, ValueError, "parts"),
    (share_layers_, {"values": "last"}, None, ValueError, "values: .*'last'"),
    (share_layers_, {"at": "bloks"}, None, ValueError, "'bloks' .*'blocks'"),
    (share_layers_, {}, other_block(hidden=32), ValueError, r"'feedforward.0.weight' has shape \(16, 8\) in layer 0 and shape \(32, 8\) in layer 2"),
    (share_layers_, {}, other_block(kv_heads=1), ValueError, r"'attention.k.weight' has shape \(8, 8\) in layer 0 and shape \(4, 8\) in layer 2"),
    (share_layers_, {}, other_block(bias=False), ValueError, "'attention.q.bias' has shape .* in layer 0 and nothing .* in layer 2"),
    (share_layers_, {}, other_block(dtype=torch.float64), ValueError, "torch.float32 in layer 0 and dtype torch.float64 in layer 2"),
    (share_layers_, {}, other_block(device="meta"), ValueError, "device cpu in layer 0 and device meta in layer 2"),
    (share_layers_, {}, lambda m: m.blocks[1].norm1.requires_grad_(False), ValueError, "'norm1.weight' has trained True in layer 0 and trained False in layer 1"),
    (share_layers_, {"scheme": "cycle", "groups": 2}, share_layers_, ValueError, r"one tensor already, and groups \[0, 1, 0, 1, 0, 1\]"),
    (share_layers_, {}, lambda m: tie_(m, ["blocks.0.norm1.weight", "blocks.1.norm2.weight"]), ValueError, "one tensor already"),
]


@pytest.mark.parametrize("call, options, change, error, words", BAD)
def test_refused(call, options, change, error, words):
    model = Model()
    if change: change(model)
    before, attributes = state(model), {*model.__dict__}
    with pytest.raises(error, match=words): call(model, **options)
    assert state(model) == before and {*model.__dict__} == attributes


@pytest.mark.parametrize("bad", [None, [Block(8, 2), Block(8, 2)], "model", torch.ones(2)])
def test_no_module(bad):
    for call in (share_layers_, unshare_layers_):
        with pytest.raises(TypeError, match="model: a module"): call(bad)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.ModuleList(), nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])])
def test_no_list_of_blocks(model):
    with pytest.raises(ValueError, match=f"two or more blocks of one class is expected, got {type(model).__name__}"): share_layers_(model)


def test_recurrent_layers():
    model = nn.ModuleList(nn.GRU(3, 3) for _ in range(2))
    share_layers_(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0 and model[1]._flat_weights[1] is model[0].weight_hh_l0


# Models of transformers, from configurations

def build(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = dict(vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32)
    if kind == "bert": return transformers.BertModel(transformers.BertConfig(**small)), "attention"
    if kind == "llama": return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)), "self_attn"
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=4, n_head=2, n_positions=32)), "attn"


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_models_of_transformers(kind, tmp_path):
    model, part = build(kind)
    model, x = model.eval(), torch.randint(50, (2, 7))
    before = sum(p.numel() for p in model.parameters())
    ties = share_layers_(model, "cycle", 2, parts=part)
    assert all(part in name for tie in ties for name in tie.names)
    unshare_layers_(model)
    assert sum(p.numel() for p in model.parameters()) == before
    share_layers_(model)
    assert sum(p.numel() for p in model.parameters()) < before
    check_ties(model)
    y = model(x)[0]
    save_model(model, tmp_path / "m.safetensors")
    fresh = build(kind)[0].eval()
    load_model(fresh, tmp_path / "m.safetensors", restore_ties=True)
    assert torch.equal(fresh(x)[0], y)
    unshare_layers_(model)
    assert torch.equal(model(x)[0], y)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_cache_of_keys_and_values_still_knows_its_layers(kind):
    model = build(kind)[0].eval()
    share_layers_(model)
    x = torch.randint(50, (1, 4))
    told = [model.generate(x, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0) for cache in (True, False)]
    assert torch.equal(*told)
    blocks = model.transformer.h if kind == "gpt2" else model.model.layers
    assert [(b.attn if kind == "gpt2" else b.self_attn).layer_idx for b in blocks] == [0, 1, 2, 3]
    past = model(x, use_cache=True).past_key_values
    last = model(x[:, :1], past_key_values=past).logits
    torch.testing.assert_close(last[:, 0], model(torch.cat([x, x[:, :1]], 1)).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_a_mean_with_nan_is_refused_and_nothing_shared():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    with torch.no_grad(): model[1].bias[0] = torch.inf
    with pytest.raises(ValueError, match="1.bias: finite numbers are expected"): share_layers_(model, values="mean")
    assert not find_ties(model)
