"""Saving and loading ties: every kind of tie through a file and back, by other programs too, and all that must be refused.

Rows are those of the list of known breakages: a test with a row's number in its name fails where only PyTorch and
safetensors are used, which it shows first.
"""
import copy
import json
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as their_load
from safetensors.torch import save_model as their_save
from torch import nn

from sharetie.binding import BrokenTie, Function, check_ties, declared_ties, keep_ties, retie_, share_module_, tie_, untie_
from sharetie.checkpoint import KEY, Checkpoint, Derived, find_derived, pieces, tie_metadata, write_tensors
from sharetie.finding import Reshape, Scale, Slice, Transpose, find_ties
from sharetie.saving import load_model, save_model


pytestmark = pytest.mark.filterwarnings("ignore:.*are one weight in the file and two in the model")


class Tiny(nn.Module):
    "An embedding, a layer, and a head."
    def __init__(self, words=12, width=4):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, x): return self.head(torch.tanh(self.body(self.embed(x))))


def tiny(seed=0, tied=True):
    torch.manual_seed(seed)
    model = Tiny()
    if tied: tie_(model, ["embed.weight", "head.weight"])
    return model


def values(model): return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Kinds of ties: each function makes a model whose weights come from the seed

def parameters(**tensors):
    model = nn.Module()
    for name, tensor in tensors.items(): model.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
    return model


def three_names():
    w = nn.Parameter(torch.randn(3, 4))
    return parameters(a=w, b=w, c=w, d=torch.randn(2))


def shared_module():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.Sequential(layer))


def cross_layer():
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(3)), "out": nn.Linear(8, 2)})
    share_module_(model, "blocks.[0-9]")
    return model


def transposed():
    w = nn.Parameter(torch.randn(3, 4))
    return parameters(a=w, b=w.data.t())


def sliced():
    w = nn.Parameter(torch.randn(6, 4))
    return parameters(part=w.data[2:5], a=w, column=w.data[:, 1:3], other=w.data[0])


def reshaped():
    w = nn.Parameter(torch.randn(6, 4))
    return parameters(a=w, b=w.data.view(3, 8), c=w.data.flatten())


def one_storage():
    w = nn.Parameter(torch.randn(3, 4))
    return parameters(a=w, b=w.data)


def overlapping():
    w = torch.randn(6, 4)
    return parameters(low=w[:4], high=w[2:])


def buffers():
    model = nn.Module()
    model.a, model.b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for name in ("running_mean", "running_var", "num_batches_tracked"): setattr(model.b, name, getattr(model.a, name))
    model.a(torch.randn(5, 3))
    return model


def by_transpose():
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 3))
    tie_(model, ["0.weight", "1.weight"], map=Transpose())
    return model


def by_transpose_backwards():
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 3))
    tie_(model, ["1.weight", "0.weight"], map=Transpose())
    return model


def by_slice():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(4, 3))
    tie_(model, ["0.weight", "1.weight"], map=Slice(slice(1, 4)))
    return model


def by_scale():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    tie_(model, ["0.weight", "1.weight"], map=Scale(3.))
    return model


def by_map_of_three():
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(3, 5), nn.Linear(5, 3))
    tie_(model, ["0.weight", "1.weight"])
    tie_(model, ["0.weight", "2.weight"], map=Transpose())
    return model


def by_function():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    tie_(model, ["0.weight", "1.weight"], map=torch.exp)
    return model


def odd_layouts():
    "No ties, but tensors that lie in memory in other orders."
    return parameters(a=torch.randn(4, 3).t(), b=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), c=torch.randn(()),
                      d=torch.empty(0, 3), e=torch.randn(6)[::2], f=torch.randn(3, dtype=torch.complex64).conj())


def tied_and_permuted():
    w = nn.Parameter(torch.randn(4, 3).t())
    return parameters(a=w, b=w, c=w.data.t())


KINDS = [tiny, three_names, shared_module, cross_layer, transposed, sliced, reshaped, one_storage, overlapping, buffers, by_transpose,
         by_transpose_backwards, by_slice, by_scale, by_map_of_three, by_function, odd_layouts, tied_and_permuted]


def make(kind, seed):
    torch.manual_seed(seed)
    return kind(seed) if kind is tiny else kind()


def untied(model):
    "A model with the same names, each with a tensor of its own, and other values."
    model = copy.deepcopy(model)
    for declared in declared_ties(model):
        for name in declared.names[1:] if declared.map is not None else (): untie_(model, name)
    def split(module):
        for name, child in module._modules.items():
            module._modules[name] = copy.deepcopy(child)
            split(module._modules[name])
    split(model)
    for module in model.modules():
        module.__dict__.pop("_declared_ties", None)
        for held, kind in ((module._parameters, nn.Parameter), (module._buffers, lambda t: t)):
            for name, tensor in list(held.items()):
                if tensor is not None: held[name] = kind(torch.full_like(tensor.detach().contiguous(), 7))
    assert not find_ties(model)
    return model


def seen(model):
    "All values by the names that people use: of computed members the computed value."
    found = {name: t for name, t in values(model).items() if ".parametrizations." not in f".{name}"}
    for declared in declared_ties(model):
        for name in declared.names[1:] if declared.map is not None else ():
            module, _, attribute = name.rpartition(".")
            found[name] = getattr(model.get_submodule(module), attribute).detach().clone()
    return found


# Round trips

@pytest.mark.parametrize("kind", KINDS)
def test_into_a_model_with_the_same_ties(kind, tmp_path):
    model, other = make(kind, 0), make(kind, 1)
    save_model(model, tmp_path / "model")
    held, ties = dict(other.named_parameters(remove_duplicate=False)), find_ties(other)
    loaded = load_model(other, tmp_path / "model")
    assert same(seen(other), seen(model))
    assert loaded.missing == loaded.unexpected == () and loaded.ties == find_ties(other) == ties
    assert all(p is held[name] for name, p in other.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not by_function])
def test_into_a_model_without_ties(kind, tmp_path):
    model = make(kind, 0)
    save_model(model, tmp_path / "model")
    other = untied(model)
    load_model(other, tmp_path / "model")
    assert same(values(other), seen(model)) and not find_ties(other)


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_plain_file_with_every_name(kind, tmp_path):
    model, other = make(kind, 0), make(kind, 1)
    save_file({name: tensor.contiguous().clone() for name, tensor in seen(model).items()}, tmp_path / "plain")
    ties = find_ties(other)
    load_model(other, tmp_path / "plain")
    assert same(seen(other), seen(model)) and find_ties(other) == ties


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_torch_file(kind, tmp_path):
    model, other = make(kind, 0), make(kind, 1)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    load_model(other, tmp_path / "model.pt")
    assert same(seen(other), seen(model))


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_file_without_ties_into_the_tied_model_when_computed_members_are_absent(kind, tmp_path):
    model, other = make(kind, 0), make(kind, 1)
    sources = {n: t for n, t in seen(model).items() if n in model.state_dict()}
    save_file({name: tensor.contiguous().clone() for name, tensor in sources.items()}, tmp_path / "plain")
    load_model(other, tmp_path / "plain")
    assert same(seen(other), seen(model))


OF_NUMBERS = [transposed, sliced, reshaped, one_storage, overlapping, tied_and_permuted, odd_layouts, buffers]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in OF_NUMBERS])
def test_into_a_model_on_the_meta_device(kind, tmp_path):
    model = make(kind, 0)
    save_model(model, tmp_path / "model")
    with torch.device("meta"): other = make(kind, 1)
    ties = find_ties(other)
    loaded = load_model(other, tmp_path / "model")
    assert same(seen(other), seen(model)) and loaded.ties == ties
    assert not any(t.is_meta for t in other.state_dict().values())
    check_ties(other)


def test_pseudo_ties_on_the_meta_device_share_memory_again(tmp_path):
    model = transposed()
    save_model(model, tmp_path / "model")
    w = torch.empty(3, 4, device="meta")
    other = parameters(a=w, b=w.t())
    load_model(other, tmp_path / "model")
    assert same(values(other), values(model)) and find_ties(other) == find_ties(model)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (by_function, overlapping, odd_layouts)])
def test_ties_restored_in_an_untied_model(kind, tmp_path):
    model = make(kind, 0)
    save_model(model, tmp_path / "model")
    other = untied(model)
    loaded = load_model(other, tmp_path / "model", restore_ties=True)
    assert same(seen(other), seen(model))
    assert sum(p.numel() for p in other.parameters()) + sum(b.numel() for b in other.buffers()) == \
        sum(tensor.numel() for tensor in load_file(tmp_path / "model").values())
    assert loaded.ties and not loaded.ties.pseudo and check_ties(other) == loaded.ties


@pytest.mark.parametrize("kind", KINDS)
def test_each_number_is_stored_once(kind, tmp_path):
    model = make(kind, 0)
    save_model(model, tmp_path / "model")
    stored = load_file(tmp_path / "model")
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values() if t.numel()}
    if kind not in (overlapping, odd_layouts): assert sum(t.nbytes for t in stored.values()) == sum(held.values())
    assert all(torch.equal(tensor, seen(model)[name]) for name, tensor in stored.items())
    assert not any(".parametrizations." in f".{name}" for name in stored)


def test_saved_twice_is_the_same_file(tmp_path):
    for name in "ab": save_model(tiny(), tmp_path / name, {"b": "2", "a": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
          torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(dtype, tmp_path):
    model, other = nn.Module(), nn.Module()
    value = (torch.randn(3, 4) * 10).abs().to(dtype)
    model.a = model.b = nn.Buffer(value)
    model.t = nn.Buffer(value.t())
    save_model(model, tmp_path / "model")
    for name, shape in {"a": (3, 4), "b": (3, 4), "t": (4, 3)}.items(): other.register_buffer(name, torch.zeros(shape).to(dtype))
    load_model(other, tmp_path / "model")
    for name in "abt":
        assert torch.equal(getattr(other, name).double() if not dtype.is_complex else getattr(other, name),
                           getattr(model, name).double() if not dtype.is_complex else getattr(model, name))


LAYOUTS = {"same": lambda w: w, "transpose": lambda w: w.t(), "rows": lambda w: w[1:3], "columns": lambda w: w[:, :2], "every second": lambda w: w[::2, ::2],
           "row": lambda w: w[1], "flat": lambda w: w.reshape(-1), "diagonal": lambda w: w.diagonal(), "copy": lambda w: w.clone()}


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(sources=st.lists(st.tuples(st.integers(3, 5), st.integers(3, 5), st.booleans()), min_size=1, max_size=3),
       members=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(sorted(LAYOUTS)), st.booleans()), max_size=6), seed=st.integers(0, 99))
def test_any_mixture_of_views_comes_back(sources, members, seed, tmp_path_factory):
    def build(seed):
        torch.manual_seed(seed)
        made = [torch.randn(m, n).t() if turned else torch.randn(n, m) for n, m, turned in sources]
        found = {f"s{i}": w for i, w in enumerate(made)}
        for i, (which, how, turned) in enumerate(members):
            w = made[which % len(made)]
            found[f"m{i}"] = LAYOUTS[how](w.t() if turned else w)
        return parameters(**found)
    path = tmp_path_factory.getbasetemp() / "mixture"
    model, other = build(seed), build(seed + 1)
    save_model(model, path)
    plain = parameters(**{name: torch.zeros_like(t, memory_format=torch.contiguous_format) for name, t in values(model).items()})
    empty = copy.deepcopy(plain).to("meta")
    for target in (other, plain, empty):
        load_model(target, path)
        assert same(values(target), values(model))
    assert sum(t.nbytes for t in load_file(path).values()) <= sum(t.nbytes for t in values(model).values())


# Rows of the list

def test_row_1_bytes_once_every_name_restored_into_tied_and_untied(tmp_path):
    model = tiny()
    with pytest.raises(RuntimeError, match="share memory"): save_file(model.state_dict(), tmp_path / "plain")
    their_save(model, tmp_path / "theirs")
    assert "head.weight" not in load_file(tmp_path / "theirs")
    with pytest.raises(RuntimeError, match="Missing key"): their_load(tiny(1, tied=False), tmp_path / "theirs")
    save_model(model, tmp_path / "ours")
    assert os.path.getsize(tmp_path / "ours") - os.path.getsize(tmp_path / "theirs") < 200
    for tied in (True, False):
        for path in ("ours", "theirs"):
            other = tiny(1, tied)
            load_model(other, tmp_path / path)
            assert same(values(other), values(model)) and (other.head.weight is other.embed.weight) == tied


def test_row_1_transposed_alias(tmp_path):
    model = transposed()
    with pytest.raises(RuntimeError): their_save(model, tmp_path / "theirs")
    save_model(model, tmp_path / "ours")
    assert list(load_file(tmp_path / "ours")) == ["a"]
    other = parameters(a=torch.zeros(3, 4), b=torch.zeros(4, 3))
    load_model(other, tmp_path / "ours")
    assert same(values(other), values(model))


def test_what_a_file_stores_once_is_no_tie_of_a_meta_model(tmp_path):
    save_model(tiny(), tmp_path / "tied")
    with torch.device("meta"): model = Tiny()
    load_model(model, tmp_path / "tied")
    assert not find_ties(model) and torch.equal(model.embed.weight, model.head.weight)
    with torch.no_grad(): model.embed.weight.zero_()
    assert model.head.weight.any()


def test_a_device_that_is_none_is_refused_before_anything_changes(tmp_path):
    save_model(tiny(), tmp_path / "tied")
    with torch.device("meta"): model = Tiny()
    with pytest.raises(ValueError, match="device: a device that is here, such as 'cpu' is expected, got 'banana'"): load_model(model, tmp_path / "tied", device="banana")
    assert all(p.is_meta for p in model.parameters())


def test_row_3_two_values_for_one_tie(tmp_path):
    model = tiny()
    torch.manual_seed(5)
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "two")
    silent = tiny()
    silent._declared_ties, silent.head.weight = (), silent.embed.weight
    silent._one_value.remove()  # as if the tie had never been declared
    silent.load_state_dict(state)
    assert torch.equal(silent.embed.weight, state["head.weight"]), "PyTorch lets the last one win"
    before = values(model)
    with pytest.raises(BrokenTie, match="embed.weight = head.weight: one weight in the model, and different numbers"): load_model(model, tmp_path / "two")
    assert same(values(model), before)
    load_model(model, tmp_path / "two", on_conflict="first")
    assert torch.equal(model.embed.weight, state["embed.weight"]) and model.head.weight is model.embed.weight
    load_model(model, tmp_path / "two", on_conflict="mean")
    torch.testing.assert_close(model.head.weight, (state["embed.weight"] + state["head.weight"]) / 2)
    assert torch.equal(model.body.weight, state["body.weight"])


@pytest.mark.parametrize("kind", [transposed, sliced, overlapping, by_transpose, by_slice])
def test_row_3_two_values_through_a_view(kind, tmp_path):
    model = make(kind, 0)
    wanted = seen(model)
    state = {name: tensor.clone() + i for i, (name, tensor) in enumerate(wanted.items())}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "two")
    before = values(model)
    with pytest.raises(BrokenTie, match="different numbers"): load_model(model, tmp_path / "two")
    assert same(values(model), before)
    load_model(model, tmp_path / "two", on_conflict="first")
    first = next(iter(model.state_dict()))
    assert torch.equal(values(model)[first], state[first])
    load_model(model, tmp_path / "two", on_conflict="mean")
    if kind is transposed: torch.testing.assert_close(model.a.detach(), (state["a"] + state["b"].T) / 2)


def test_row_3_through_a_map_that_makes_new_numbers(tmp_path):
    model = by_scale()
    state = {**seen(model), "1.weight": torch.randn(4, 4)}
    save_file({n: t.clone() for n, t in state.items()}, tmp_path / "two")
    before = values(model)
    for policy in ("error", "mean"):
        with pytest.raises(BrokenTie, match="is not what"): load_model(model, tmp_path / "two", on_conflict=policy)
    assert same(values(model), before)
    load_model(model, tmp_path / "two", on_conflict="first")
    assert torch.equal(model[0].weight, state["0.weight"])


def test_row_5_sharded_models_are_named_and_gathered_ones_are_saved(tmp_path, one_process):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    model = tiny()
    before = values(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"embed.weight: a DTensor .* full_state_dict=True"): save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    save_model(tiny(3), tmp_path / "model")
    with pytest.raises(ValueError, match="embed.weight: a DTensor"): load_model(model, tmp_path / "model")
    whole, state = tiny(4), get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    whole.load_state_dict(state)
    save_model(whole, tmp_path / "model")
    assert same(values(whole), before) and "head.weight" not in load_file(tmp_path / "model")


def test_row_5_a_distributed_checkpoint_with_both_names(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    model, other = tiny(), tiny(1)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "model.pt")
    assert sum(t.numel() for t in torch.load(tmp_path / "model.pt").values()) == 2 * 12 * 4 + 4 * 4 + 4, "both names are there"
    load_model(other, tmp_path / "model.pt")
    assert same(values(other), values(model)) and other.head.weight is other.embed.weight


def test_row_11_a_file_with_the_shared_tensor_twice_or_a_name_lost(tmp_path):
    model = tiny()
    state = {name: tensor.clone() for name, tensor in values(model).items()}
    save_file(state, tmp_path / "twice")
    save_file({name: tensor for name, tensor in state.items() if name != "embed.weight"}, tmp_path / "lost")
    for path in ("twice", "lost"):
        other = tiny(1)
        load_model(other, tmp_path / path)
        assert same(values(other), values(model)) and other.head.weight is other.embed.weight
    with pytest.raises(ValueError, match="missing: embed.weight"): load_model(tiny(1, tied=False), tmp_path / "lost")


def test_row_13_sharing_across_layers_that_nobody_declared(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=3, n_head=2)
    def build(seed):
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(config)
        for block in model.transformer.h[1:]: block.mlp = model.transformer.h[0].mlp
        return model
    model, other = build(0), build(1)
    with pytest.raises(RuntimeError): model.save_pretrained(tmp_path / "hub")
    save_model(model, tmp_path / "model")
    load_model(other, tmp_path / "model")
    assert same(values(other), values(model)) and find_ties(other) == find_ties(model)
    assert other.lm_head.weight is other.transformer.wte.weight
    separate = transformers.GPT2LMHeadModel(config)
    load_model(separate, tmp_path / "model")
    words = torch.arange(8)[None]
    assert torch.equal(separate.eval()(words).logits, model.eval()(words).logits)


def test_row_22_a_state_cast_key_by_key(tmp_path):
    model = tiny()
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    split = tiny(1)
    split.load_state_dict(half, assign=True)
    assert split.head.weight is not split.embed.weight, "untied without a word"
    with pytest.raises(BrokenTie, match="another tensor with equal values"): save_model(split, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    retie_(split)
    save_model(split, tmp_path / "model")
    assert "head.weight" not in load_file(tmp_path / "model")
    save_file({name: tensor.clone() for name, tensor in half.items()}, tmp_path / "half")
    other = tiny(2).half()
    load_model(other, tmp_path / "half")
    assert other.head.weight is other.embed.weight and torch.equal(other.head.weight, half["head.weight"])


# The model in memory

def test_optimizers_and_gradients_stay(tmp_path):
    model = tiny()
    optimizer = torch.optim.Adam(model.parameters())
    save_model(model, tmp_path / "model")
    model(torch.arange(5)).sum().backward()
    optimizer.step()
    load_model(model, tmp_path / "model")
    assert check_ties(model, optimizer) and same(values(model), values(tiny()))
    assert all(p.grad is not None for p in model.parameters())
    before = values(model)
    optimizer.step()
    assert not same(values(model), before), "the optimizer steps what was loaded"


def test_frozen_stays_frozen_and_attributes_stay(tmp_path):
    save_model(tiny(), tmp_path / "model")
    with torch.device("meta"): model = tiny(1)
    model.body.weight.requires_grad_(False)
    model.embed.weight.no_decay = True
    load_model(model, tmp_path / "model")
    assert not model.body.weight.requires_grad and model.head.weight.requires_grad and model.head.weight.no_decay


def test_loaded_on_the_meta_device_can_be_trained_and_saved_over_its_file(tmp_path):
    save_model(tiny(), tmp_path / "model")
    with torch.device("meta"): model = tiny(1)
    load_model(model, tmp_path / "model")
    with torch.no_grad(): model.head.weight.add_(1)
    assert torch.equal(load_file(tmp_path / "model")["embed.weight"], tiny().embed.weight), "writing to the model leaves the file"
    kept = values(model)
    save_model(model, tmp_path / "model")
    save_model(tiny(5), tmp_path / "model")
    assert same(values(model), kept), "and the file, replaced, leaves the model"


def test_buffers_that_are_not_saved_stay_visible(tmp_path):
    def build():
        model = tiny(1)
        model.register_buffer("rotary", torch.ones(2), persistent=False)
        return model
    save_model(build(), tmp_path / "model")
    with torch.device("meta"): model = build()
    with pytest.raises(ValueError, match="missing: rotary"): load_model(model, tmp_path / "model")
    assert all(p.is_meta for p in model.parameters())
    assert load_model(model, tmp_path / "model", strict=False).missing == ("rotary",)
    assert not any(p.is_meta for p in model.parameters())


def test_kept_ties_load_too(tmp_path):
    save_model(tiny(), tmp_path / "model")
    for build in (lambda: keep_ties(tiny(1)), lambda: keep_ties(tiny(1)).to("meta")):
        model = build()
        load_model(model, tmp_path / "model")
        assert same(values(model), values(tiny())) and check_ties(model)


def test_modules_with_a_way_of_their_own_are_asked(tmp_path):
    class Renamed(nn.Linear):
        def _load_from_state_dict(self, state, prefix, *args):
            state[prefix + "weight"] = state.pop(prefix + "old")
            super()._load_from_state_dict(state, prefix, *args)
    model = Renamed(2, 2, bias=False)
    save_file({"old": torch.ones(2, 2)}, tmp_path / "model")
    with pytest.raises(ValueError, match="missing: weight; unexpected: old"): load_model(model, tmp_path / "model")


class Halfway(nn.Linear):
    "A layer that loads in a way of its own, and may not get to the end of it."
    def _load_from_state_dict(self, state, prefix, *args):
        super()._load_from_state_dict(state, prefix, *args)
        self.loaded = nn.Parameter(torch.ones(1))
        raise KeyError("halfway")


class Complains(nn.Linear):
    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        errors.append("no, not like this")


def raising_hook(*_): raise RuntimeError("hook")


@pytest.mark.parametrize("spoil, error", [
    (lambda m: m.append(Halfway(2, 2)), KeyError), (lambda m: m.append(Complains(2, 2)), RuntimeError),
    (lambda m: m[1].register_load_state_dict_pre_hook(raising_hook), RuntimeError),
    (lambda m: m[1].register_load_state_dict_post_hook(raising_hook), RuntimeError)], ids=["raises", "complains", "hook before", "hook after"])
@pytest.mark.parametrize("restore", [True, False])
def test_a_module_that_fails_halfway_leaves_the_model_as_it_was(spoil, error, restore, tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    spoil(model)
    saved = copy.deepcopy(model)
    for p in saved.parameters(): nn.init.constant_(p, 7)
    saved[0].weight = saved[1].weight
    save_model(saved, tmp_path / "model")
    before, held = values(model), dict(model.named_parameters())
    with pytest.raises(error): load_model(model, tmp_path / "model", restore_ties=restore)
    assert same(values(model), before) and all(held[name] is p for name, p in model.named_parameters()) and not find_ties(model)


def test_models_without_loading_code_need_no_second_copy():
    from sharetie.saving import _loads_itself
    assert not any(map(_loads_itself, (keep_ties(tiny()), buffers(), cross_layer(), by_transpose(), nn.LSTM(2, 2), nn.MultiheadAttention(2, 1))))
    assert _loads_itself(nn.Sequential(Halfway(2, 2)))


def test_a_mapped_tie_of_buffers_that_are_not_saved(tmp_path):
    def build(a, b, seed):
        torch.manual_seed(seed)
        model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
        model.a.register_buffer("t", torch.randn(2), persistent=a)
        model.b.register_buffer("t", torch.randn(2), persistent=b)
        tie_(model, ["a.t", "b.t"], map=Scale(2.))
        return model
    for a in (True, False):
        for b in (True, False):
            save_model(build(a, b, 0), tmp_path / "model")
            model = build(a, b, 1)
            load_model(model, tmp_path / "model")
            assert same(values(model), values(build(a, b, 0))) and torch.equal(model.b.t, 2 * model.a.t)
            assert torch.equal(model.a.t, build(a, b, 0).a.t) == (a or b), "saved if one of them is"


def test_a_tied_file_in_an_untied_model_is_told_once(tmp_path, recwarn):
    save_model(tiny(), tmp_path / "model")
    with pytest.warns(UserWarning, match="embed.weight and head.weight are one weight in the file and two in the model; restore_ties=True") as told:
        load_model(tiny(tied=False), tmp_path / "model")
    assert len(told) == 1 and told[0].filename == __file__
    torch.save(tiny().state_dict(), tmp_path / "torch")
    with pytest.warns(UserWarning, match="restore_ties=True"): load_model(tiny(tied=False), tmp_path / "torch")
    their_save(tiny(), tmp_path / "theirs")
    with pytest.warns(UserWarning, match="restore_ties=True"): load_model(tiny(tied=False), tmp_path / "theirs")
    save_model(by_scale(), tmp_path / "mapped")
    with pytest.warns(UserWarning, match="0.weight and 1.weight are one"): load_model(untied(by_scale()), tmp_path / "mapped")
    recwarn.clear()
    load_model(tiny(), tmp_path / "model")
    load_model(by_scale(), tmp_path / "mapped")
    with torch.device("meta"): load_model(tiny(), tmp_path / "model")
    for restore in (True, False): load_model(tiny(tied=False), tmp_path / "model", restore_ties=restore)
    assert not recwarn.list
    with pytest.raises(TypeError, match="restore_ties: True, False or None is expected, got 'yes'"): load_model(tiny(), tmp_path / "model", restore_ties="yes")


def test_a_warning_of_ties_that_a_file_brings_points_at_the_caller(tmp_path):
    def model(): return nn.ModuleDict({"embed": nn.Embedding(5, 3, padding_idx=0), "head": nn.Linear(3, 5, bias=False)})
    pair = ["embed.weight", "head.weight"]
    tied = model()
    tie_(tied, pair, padding="train")
    save_model(tied, tmp_path / "model")
    with pytest.warns(UserWarning, match="padding_idx") as told: load_model(model(), tmp_path / "model", restore_ties=True)
    assert [w.filename for w in told] == [__file__]


@pytest.mark.long
def test_ties_of_a_file_are_not_made_inside_of_a_wrapper(tmp_path, one_process):
    save_model(tiny(), tmp_path / "model")
    ddp = nn.parallel.DistributedDataParallel(tiny(1, tied=False))
    before = values(ddp)
    with pytest.raises(ValueError, match="one that is not wrapped yet is expected, got what DistributedDataParallel holds"):
        load_model(ddp.module, tmp_path / "model", restore_ties=True)
    assert same(values(ddp), before)
    load_model(ddp.module, tmp_path / "model", restore_ties=False)
    assert same(values(ddp.module), values(tiny()))


@pytest.mark.parametrize("kind", [shared_module, cross_layer])
def test_a_shared_module_is_restored_as_one(kind, tmp_path):
    save_model(make(kind, 0), tmp_path / "model")
    assert all(len(names) > 1 for names in Checkpoint(tmp_path / "model").modules)
    model = untied(make(kind, 1))
    loaded = load_model(model, tmp_path / "model", restore_ties=True)
    assert {tie.how for tie in loaded.ties} == {"module"} and same(values(model), values(make(kind, 0)))
    assert [d.kind for d in declared_ties(model)] == ["module"] and check_ties(model)


def test_modules_that_cannot_be_one_are_tied_by_their_tensors(tmp_path):
    save_model(nn.Sequential(*[nn.Linear(2, 2)] * 2), tmp_path / "model")
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].index, model[1].index = 0, 1
    assert {tie.how for tie in load_model(model, tmp_path / "model", restore_ties=True).ties} == {"tensor"}


@pytest.mark.parametrize("modules", [5, [5], ["ab"], [["a"]], [[1, 2]]])
def test_notes_of_modules_in_another_form(modules, tmp_path):
    note = {KEY: json.dumps({"version": 1, "ties": [], "modules": modules})}
    save_file({"w": torch.ones(2)}, tmp_path / "model", note)
    with pytest.raises(ValueError, match="the ties in its metadata cannot be read: modules: a list of lists of names"): Checkpoint(tmp_path / "model")


@pytest.mark.parametrize("path, error", [(None, TypeError), (5, TypeError), (b"model", TypeError), (["model"], TypeError), ("", ValueError)])
def test_paths_that_are_none(path, error, tmp_path):
    from sharetie.duplicates import dedup_file, file_ties
    save_model(tiny(), tmp_path / "model")
    import io
    for path, error in ((path, error), (io.BytesIO(), TypeError)):
        for call in (lambda: save_model(tiny(), path), lambda: load_model(tiny(), path), lambda: file_ties(path)):
            with pytest.raises(error, match="^path: the path of a file is expected, got "): call()
        with pytest.raises(error, match="^source: the path of a file"): dedup_file(path, tmp_path / "new")
        with pytest.raises(error, match="^target: the path of a file"): dedup_file(tmp_path / "model", path)


def test_names_behind_a_prefix_are_pointed_at(tmp_path):
    torch.save({"model": tiny().state_dict(), "epoch": 3}, tmp_path / "model")
    with pytest.raises(ValueError, match="unexpected: .*; all that is missing is there behind 'model.'"): load_model(tiny(), tmp_path / "model")


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    import sharetie.checkpoint as checkpoint
    steps, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(checkpoint.os, "fsync", lambda file: steps.append("sync") or fsync(file))
    monkeypatch.setattr(checkpoint.os, "replace", lambda *names: steps.append("name") or replace(*names))
    save_model(tiny(), tmp_path / "model")
    assert steps == ["sync", "name"]


def test_a_computed_member_alone_gives_its_source(tmp_path):
    for kind in (by_transpose, by_scale):
        model, other = make(kind, 0), make(kind, 1)
        state = {name: tensor.contiguous().clone() for name, tensor in seen(model).items() if name != "0.weight"}
        save_file(state, tmp_path / "model")
        load_model(other, tmp_path / "model")
        torch.testing.assert_close(seen(other), seen(model))
    with pytest.raises(ValueError, match="missing: 0.weight"):
        save_file({"1.weight": torch.ones(3, 4), "1.bias": torch.ones(3)}, tmp_path / "model")
        load_model(by_slice(), tmp_path / "model")


def test_ties_are_restored_for_the_names_that_are_there(tmp_path):
    save_model(tiny(), tmp_path / "model")
    part = nn.ModuleDict({"embed": nn.Embedding(12, 4)})
    loaded = load_model(part, tmp_path / "model", strict=False, restore_ties=True)
    assert torch.equal(part.embed.weight, tiny().embed.weight) and not loaded.ties
    assert set(loaded.unexpected) == {"body.weight", "body.bias", "head.weight"}


def test_duplicates_are_not_restored_as_ties(tmp_path):
    from sharetie.duplicates import dedup_file
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    save_file(values(model), tmp_path / "model")
    dedup_file(tmp_path / "model", tmp_path / "small")
    other = copy.deepcopy(model)
    load_model(other, tmp_path / "small", restore_ties=True)
    assert not find_ties(other) and same(values(other), values(model))


# Other programs

def test_any_loader_reads_the_file(tmp_path):
    save_model(tiny(), tmp_path / "model", {"note": "mine"})
    with safe_open(tmp_path / "model", framework="pt") as file:
        metadata = file.metadata()
        assert metadata["note"] == "mine" and metadata["format"] == "pt"
        assert json.loads(metadata[KEY]) == {"version": 1, "ties": [{"source": "embed.weight", "kind": "parameter", "members": [{"name": "head.weight"}]}]}
        assert torch.equal(file.get_tensor("embed.weight"), tiny().embed.weight)
    other = tiny(1)
    their_load(other, tmp_path / "model")
    assert same(values(other), values(tiny()))


def test_safetensors_agrees_on_the_bytes(tmp_path):
    state = {"a": torch.randn(3), "b": torch.arange(5), "c": torch.tensor([True]), "ü": torch.randn(2).half(), "empty": torch.empty(0, 2)}
    save_file(state, tmp_path / "theirs", {"format": "pt"})
    write_tensors(tmp_path / "ours", state, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_transformers_reads_the_file(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    model.config.save_pretrained(tmp_path)
    save_model(model, tmp_path / "model.safetensors")
    other = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert other.lm_head.weight is other.transformer.wte.weight and same(values(other), values(model))


# The file on disk

def test_permissions_are_those_of_the_process_or_of_the_old_file(tmp_path):
    old = os.umask(0o027)
    try: save_model(tiny(), tmp_path / "model")
    finally: os.umask(old)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o640
    (tmp_path / "model").chmod(0o604)
    save_model(tiny(1), tmp_path / "model")
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o604


def test_a_link_stays_a_link(tmp_path):
    save_model(tiny(), tmp_path / "first")
    (tmp_path / "latest").symlink_to("first")
    save_model(tiny(1), tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink() and torch.equal(load_file(tmp_path / "first")["embed.weight"], tiny(1).embed.weight)


FULL = """
import resource, sys
from sharetie.saving import save_model
from torch import nn
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for path in sys.argv[1:]:
    try: save_model(nn.Linear(400, 400), path)
    except OSError as error: print(type(error).__name__, error.errno)
"""


@pytest.mark.long
def test_a_full_disk_in_mid_write(tmp_path):
    save_model(tiny(), tmp_path / "model")
    before = (tmp_path / "model").read_bytes()
    run = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "model"), str(tmp_path / "new")], capture_output=True, text=True)
    assert [line.split()[0] for line in run.stdout.splitlines()] == ["OSError"] * 2, run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (tmp_path / "model").read_bytes() == before


def test_an_interrupt_in_mid_write(tmp_path, monkeypatch):
    import sharetie.checkpoint as checkpoint
    save_model(tiny(), tmp_path / "model")
    before = (tmp_path / "model").read_bytes()
    def stop(tensor): raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint, "pieces", stop)
    with pytest.raises(KeyboardInterrupt): save_model(tiny(1), tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(IsADirectoryError): save_model(tiny(), tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"): save_model(tiny(), tmp_path / "none" / "model")
    assert list(tmp_path.iterdir()) == []


def peak(function):
    "Bytes of memory that `function` needs at most beyond what is held before it; pages of files are not counted."
    def held(): return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    samples, done = [held()], threading.Event()
    def watch():
        while not done.wait(0.001): samples.append(held())
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = function()
        samples.append(held())  # of what it gives, whenever the watch looked last
        del result
    finally:
        done.set()
        thread.join()
    return max(samples) - samples[0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read memory from")
def test_one_copy_of_memory(tmp_path):
    model = parameters(a=torch.ones(4000, 4000), b=torch.ones(4000, 4000).t())
    model.c = model.a
    assert peak(lambda: values(model)) > 1.5e8, "the measure sees copies"
    assert peak(lambda: save_model(model, tmp_path / "model")) < 5.5e7
    assert peak(lambda: load_model(model, tmp_path / "model")) < 1e7


def test_pieces_are_small_and_in_order():
    for tensor in (torch.arange(60).reshape(3, 4, 5).permute(2, 0, 1), torch.arange(7)[::3], torch.tensor(3.)):
        parts = list(pieces(tensor, most=16))
        assert torch.equal(torch.cat([p.flatten() for p in parts]), tensor.flatten()) and max(p.nbytes for p in parts) <= 24


# What is refused

class Extra(nn.Linear):
    def get_extra_state(self): return {"version": 3}
    def set_extra_state(self, state): pass


def quantized():
    model = nn.Module()
    model.q = nn.Buffer(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    return model


def sparse():
    model = nn.Module()
    model.s = nn.Buffer(torch.eye(3).to_sparse())
    return model


def wide():
    model = nn.Module()
    model.z = nn.Buffer(torch.ones(2, dtype=torch.complex128))
    return model


def meta():
    with torch.device("meta"): return nn.Linear(2, 2)


UNSAVABLE = {
    "lazy": (lambda: nn.LazyLinear(3), ValueError, "weight: a UninitializedParameter has no place in a file; call the model once"),
    "meta": (meta, ValueError, "weight: a tensor on the meta device has no place in a file"),
    "extra state": (lambda: Extra(2, 2), TypeError, "_extra_state: a tensor .* is expected, got {'version': 3}"),
    "quantized": (quantized, ValueError, "q: a tensor of torch.qint8 has no place"),
    "sparse": (sparse, ValueError, "s: a tensor of torch.sparse_coo has no place in a file; make it dense"),
    "complex128": (wide, ValueError, "z: a tensor of torch.complex128 has no place"),
    "no module": (lambda: {"w": torch.ones(2)}, TypeError, "model: a module is expected"),
}


@pytest.mark.parametrize("build, error, message", UNSAVABLE.values(), ids=UNSAVABLE)
def test_what_cannot_be_saved(build, error, message, tmp_path):
    with pytest.raises(error, match=message): save_model(build(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("metadata, error, message", [
    ({"a": 1}, TypeError, "metadata: a dictionary from text to text"), ("text", TypeError, "metadata: a dictionary"),
    *[({key: "mine"}, ValueError, f"metadata: no key 'sharetie' or 'sharetie.…', which files of this package keep for themselves, is expected, got .*'{key}'")
      for key in (KEY, "sharetie.archive")]])
def test_metadata_that_is_none(metadata, error, message, tmp_path):
    with pytest.raises(error, match=message): save_model(tiny(), tmp_path / "model", metadata)
    assert list(tmp_path.iterdir()) == []


def note(**ties): return {KEY: json.dumps({"version": 1, "ties": [{"source": s, "kind": "parameter", "members": m} for s, m in ties.items()]})}


def state(): return {name: tensor.clone() for name, tensor in values(tiny(1)).items() if name != "head.weight"}


W = state()["embed.weight"]
CONTRADICTIONS = {
    "other numbers": (state() | {"head.weight": W + 1}, note(**{"embed.weight": [{"name": "head.weight"}]}), "stored with other numbers"),
    "other shape": (state() | {"head.weight": torch.ones(4, 12)}, note(**{"embed.weight": [{"name": "head.weight"}]}), r"stored as F32 \(4, 12\)"),
    "other type": (state() | {"head.weight": W.half()}, note(**{"embed.weight": [{"name": "head.weight"}]}), "stored as F16"),
    "no source": (state(), note(**{"lost.weight": [{"name": "head.weight"}]}), "lost.weight is not in the file"),
    "own source": (state(), note(**{"embed.weight": [{"name": "embed.weight"}]}), "its own source"),
    "two sources": (state(), note(**{"embed.weight": [{"name": "head.weight"}], "body.weight": [{"name": "head.weight"}]}), "second source"),
    "slice of too many axes": (state(), note(**{"embed.weight": [{"name": "head.weight", "map": "Slice", "arguments": [1, 1, 1]}]}), "map does not fit"),
    "shape of other size": (state(), note(**{"embed.weight": [{"name": "head.weight", "map": "Reshape", "arguments": [[5, 5], None]}]}), "map does not fit"),
    "chain": (state(), note(**{"embed.weight": [{"name": "x"}], "x": [{"name": "head.weight"}]}), "x is not in the file"),
}


@pytest.mark.parametrize("tensors, metadata, message", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_metadata_that_the_tensors_contradict(tensors, metadata, message, tmp_path):
    save_file(tensors, tmp_path / "model", metadata)
    for model in (tiny(), tiny(0, tied=False)):
        before = values(model)
        with pytest.raises(BrokenTie, match=message): load_model(model, tmp_path / "model", on_conflict="first", strict=False)
        assert same(values(model), before)


BAD_NOTES = {
    "no JSON": "{", "a list": "[]", "later version": '{"version": 2, "ties": []}', "no version": '{"ties": []}', "true version": '{"version": true, "ties": []}',
    "no ties": '{"version": 1}', "ties of text": '{"version": 1, "ties": "abc"}', "no members": '{"version": 1, "ties": [{"source": "a", "kind": "parameter"}]}',
    "name of number": '{"version": 1, "ties": [{"source": "a", "kind": "parameter", "members": [{"name": 3}]}]}',
    "map of number": '{"version": 1, "ties": [{"source": "a", "kind": "parameter", "members": [{"name": "b", "map": 3}]}]}',
    "axes twice": '{"version": 1, "ties": [{"source": "a", "kind": "parameter", "members": [{"name": "b", "map": "Transpose", "arguments": [0, 0]}]}]}',
    "deep": '{"version": 1, "ties": ' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("text", BAD_NOTES.values(), ids=BAD_NOTES)
def test_metadata_of_another_form(text, tmp_path):
    save_file(state(), tmp_path / "model", {KEY: text})
    with pytest.raises(ValueError, match="model: the ties in its metadata cannot be read"): load_model(tiny(), tmp_path / "model")


def test_a_map_that_only_its_code_can_do(tmp_path):
    model = by_function()
    save_model(model, tmp_path / "model")
    assert Checkpoint(tmp_path / "model").derived["1.weight"].map == "torch._VariableFunctionsClass.exp"
    other = untied(model)
    before = values(other)
    for restore in (False, True):
        with pytest.raises(ValueError, match="1.weight: .*exp"): load_model(other, tmp_path / "model", restore_ties=restore)
    assert same(values(other), before) and not find_ties(other)


FILES = {
    "empty": (b"", "damaged, truncated or no safetensors"), "short": (b"abc", "damaged, truncated or no safetensors"),
    "text": (b"hello, this is a text, not a checkpoint", "neither safetensors nor a torch file"),
    "header cut": (b"\x40\0\0\0\0\0\0\0{\"a\":", "damaged, truncated or no safetensors"),
    "zip": (b"PK\3\4" + b"\0" * 60, "damaged or truncated"), "pickle cut": (b"\x80\x02}q\x00(X\x04\x00\x00\x00ab", "damaged or truncated"),
}


@pytest.mark.parametrize("content, message", FILES.values(), ids=FILES)
def test_foreign_files(content, message, tmp_path):
    (tmp_path / "file").write_bytes(content)
    model = tiny()
    with pytest.raises(ValueError, match=f"file: .*({message})"): load_model(model, tmp_path / "file")
    assert same(values(model), values(tiny()))


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_truncated_files(kind, keep, tmp_path):
    path = tmp_path / "model"
    if kind == "torch": torch.save(tiny(1).state_dict(), path)
    else: save_model(tiny(1), path)
    path.write_bytes(path.read_bytes()[:int(keep * path.stat().st_size)])
    model = tiny()
    with pytest.raises(ValueError, match="model: damaged"): load_model(model, path)
    assert same(values(model), values(tiny()))


class Gift:
    def __reduce__(self): return os.system, ("touch ran",)


def test_an_unsafe_pickle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"embed.weight": torch.ones(2), "gift": Gift()}, "gift.pt")
    torch.save(tiny(), "whole.pt")
    for path in ("gift.pt", "whole.pt"):
        with pytest.raises(ValueError, match=f"{path}: a pickle that calls .* is refused"): load_model(tiny(), path)
    assert not (tmp_path / "ran").exists()


def changed(**new):
    held = {name: tensor.clone() for name, tensor in values(tiny(1)).items()}
    for name, tensor in new.items():
        name = name.replace("_", ".")
        if tensor is None: del held[name]
        else: held[name] = tensor
    return held


MISFITS = {
    "missing": (changed(body_weight=None), "missing: body.weight; unexpected: nothing"),
    "unexpected": (changed(other_weight=torch.ones(2)), "missing: nothing; unexpected: other.weight"),
    "shape": (changed(body_weight=torch.ones(4, 5)), r"body.weight: shape \(4, 4\) is expected, got \(4, 5\)"),
    "shape of a tie": (changed(head_weight=torch.ones(13, 4)), r"head.weight: shape \(12, 4\) is expected, got \(13, 4\)"),
    "type": (changed(body_weight=torch.ones(4, 4).half()), r"body.weight: type F32 \(or cast=True\) is expected, got 'F16'"),
}


@pytest.mark.parametrize("tensors, message", MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_files_that_do_not_fit(kind, tensors, message, tmp_path):
    save_file(tensors, tmp_path / "model") if kind == "safetensors" else torch.save(tensors, tmp_path / "model")
    model = tiny()
    with pytest.raises(ValueError, match=message): load_model(model, tmp_path / "model")
    assert same(values(model), values(tiny()))


def test_not_strict(tmp_path):
    save_file(changed(body_weight=None, other_weight=torch.ones(2)), tmp_path / "model")
    model = tiny()
    loaded = load_model(model, tmp_path / "model", strict=False)
    assert loaded.missing == ("body.weight",) and loaded.unexpected == ("other.weight",)
    assert torch.equal(model.body.weight, tiny().body.weight) and torch.equal(model.head.weight, tiny(1).head.weight)


@pytest.mark.parametrize("on_meta", [False, True])
def test_cast(on_meta, tmp_path):
    save_model(tiny(1).half(), tmp_path / "half")
    with torch.device("meta" if on_meta else "cpu"): model = tiny()
    load_model(model, tmp_path / "half", cast=True)
    assert same(values(model), {n: t.half().float() for n, t in values(tiny(1)).items()}) and model.head.weight is model.embed.weight


def test_mean_of_whole_numbers(tmp_path):
    model = buffers()
    state = {name: tensor.clone() for name, tensor in values(model).items()}
    state["b.num_batches_tracked"] += 1
    save_file(state, tmp_path / "model")
    with pytest.raises(ValueError, match="on_conflict: 'first' for whole numbers"): load_model(model, tmp_path / "model", on_conflict="mean")
    load_model(model, tmp_path / "model", on_conflict="first")


def test_arguments(tmp_path):
    save_model(tiny(), tmp_path / "model")
    with pytest.raises(ValueError, match="on_conflict: one of"): load_model(tiny(), tmp_path / "model", on_conflict="last")
    with pytest.raises(ValueError, match="device: None for a model that has its memory"): load_model(tiny(), tmp_path / "model", device="cpu")
    with pytest.raises(TypeError, match="model: a module"): load_model(tiny().state_dict(), tmp_path / "model")
    with pytest.raises(FileNotFoundError): load_model(tiny(), tmp_path / "none")
    with pytest.raises(OSError): load_model(tiny(), tmp_path)


def test_a_model_whose_ties_do_not_hold(tmp_path):
    save_model(tiny(), tmp_path / "model")
    model = tiny(1)
    model.head.weight = nn.Parameter(model.head.weight + 1)
    before = values(model)
    with pytest.raises(BrokenTie, match="differs by up to 1"): load_model(model, tmp_path / "model")
    with pytest.raises(BrokenTie, match="differs by up to 1"): save_model(model, tmp_path / "model")
    assert same(values(model), before) and same(load_file(tmp_path / "model"), {n: t for n, t in values(tiny()).items() if n != "head.weight"})


def test_a_failed_load_takes_restored_ties_back(tmp_path):
    save_model(tiny(), tmp_path / "model")
    model = tiny(1, tied=False)
    model.register_parameter("more", nn.Parameter(torch.ones(2)))
    before = values(model)
    with pytest.raises(ValueError, match="missing: more"): load_model(model, tmp_path / "model", restore_ties=True)
    assert same(values(model), before) and not find_ties(model) and not declared_ties(model)


def test_an_index_of_shards(tmp_path):
    state = values(tiny())
    derived = {"head.weight": Derived("embed.weight")}
    write_tensors(tmp_path / "1.safetensors", {"embed.weight": state["embed.weight"]}, tie_metadata(derived))
    write_tensors(tmp_path / "2.safetensors", {n: t for n, t in state.items() if n.startswith("body")})
    where = {"embed.weight": "1.safetensors", "body.weight": "2.safetensors", "body.bias": "2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for tied in (True, False):
        model = tiny(1, tied)
        load_model(model, index)
        assert same(values(model), state)
    for text, error, message in (("{", ValueError, "no index"), ("[" * 200_000, ValueError, "no index"), ('{"weight_map": {"a": "../1"}}', ValueError, "files beside"),
                                 ('{"weight_map": {"a": "3"}}', FileNotFoundError, "shard 3 is missing"),
                                 ('{"weight_map": {"a": "1.safetensors"}}', ValueError, "there is no a in 1.safetensors")):
        index.write_text(text)
        with pytest.raises(error, match=message): load_model(tiny(), index)


FRESH = """
import sys
from sharetie.saving import load_model
from torch import nn
model = nn.Sequential(nn.Embedding(12, 4), nn.Linear(4, 12, bias=False))
print(load_model(model, sys.argv[1], restore_ties=True).ties[0].names, model[0].weight is model[1].weight)
"""


def test_a_fresh_process_has_the_tie(tmp_path):
    model = nn.Sequential(nn.Embedding(12, 4), nn.Linear(4, 12, bias=False))
    tie_(model, ["0.weight", "1.weight"])
    save_model(model, tmp_path / "model")
    run = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path / "model")], capture_output=True, text=True)
    assert run.stdout == "('0.weight', '1.weight') True\n", run.stderr


# What a fresh reading found

def an_untied_reader():
    torch.manual_seed(1)
    return nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})


def a_tied_file(tmp_path):
    model = an_untied_reader()
    with torch.no_grad(): model["embed"].weight.add_(1)
    tie_(model, ["embed.weight", "head.weight"])
    save_model(model, tmp_path / "tied.safetensors")
    return tmp_path / "tied.safetensors"


def inference_weight():
    with torch.inference_mode(): return nn.Parameter(torch.zeros(5, 3), requires_grad=False)


@pytest.mark.parametrize("weight, words", [
    (lambda: nn.Parameter(torch.zeros(1, 3).expand(5, 3)), "head.weight: a tensor with memory for each number"),
    (inference_weight, "head.weight: a tensor that can be written"),
], ids=["expanded", "inference"])
def test_what_cannot_be_written_is_found_before_anything_is(tmp_path, weight, words):
    model = an_untied_reader()
    model["head"].weight = weight()
    before = model["embed"].weight.detach().clone()
    with pytest.raises(ValueError, match=words): load_model(model, a_tied_file(tmp_path), restore_ties=False)
    assert torch.equal(model["embed"].weight, before)


def test_a_warning_that_is_an_error_changes_nothing(tmp_path):
    model = an_untied_reader()
    before = model["embed"].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="restore_ties=True"): load_model(model, a_tied_file(tmp_path))
    assert torch.equal(model["embed"].weight, before)


@pytest.mark.parametrize("option", [{"restore_ties": 1}, {"restore_ties": torch.ones(2)}, {"strict": "no"}, {"cast": 1}])
def test_switches_are_true_or_false(tmp_path, option):
    with pytest.raises(TypeError, match=f"{[*option][0]}: True"): load_model(an_untied_reader(), a_tied_file(tmp_path), **option)


def test_a_failed_load_leaves_no_watch(tmp_path):
    model = an_untied_reader()
    model["more"] = nn.Linear(2, 2)
    with pytest.raises(ValueError): load_model(model, a_tied_file(tmp_path), restore_ties=True)
    assert not find_ties(model).true and "_one_value" not in model.__dict__ and not model._load_state_dict_pre_hooks


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("kind, make", {
    "torch.sparse_coo": lambda w: w.to_sparse(), "torch.sparse_csr": lambda w: w.to_sparse_csr(),
    "the meta device": lambda w: w.to("meta"), "torch.qint8": lambda w: torch.quantize_per_tensor(w, .1, 0, torch.qint8),
    "a nested tensor": lambda w: torch.nested.nested_tensor([w, w])}.items())
def test_a_torch_file_without_plain_numbers_is_refused_before_anything_changes(tmp_path, kind, make, cast):
    model, other = tiny(), tiny(1)
    state = other.state_dict()
    state["body.weight"] = make(state["body.weight"].clone())
    torch.save(state, tmp_path / "w.pt")
    before = values(model)
    with pytest.raises(ValueError, match=f"body.weight: numbers are expected, got .*{kind}"): load_model(model, tmp_path / "w.pt", cast=cast)
    assert same(values(model), before)


def test_imaginary_parts_are_not_cast_away(tmp_path):
    model = tiny()
    state = values(model) | {"body.weight": torch.ones(4, 4, dtype=torch.complex64)}
    torch.save(state, tmp_path / "w.pt")
    before = values(model)
    with pytest.raises(ValueError, match="body.weight: .*real numbers.*C64"): load_model(model, tmp_path / "w.pt", cast=True)
    assert same(values(model), before)


def test_a_compiled_model_is_saved_and_loaded(tmp_path):
    model, other = (torch.compile(tiny(seed, tied), backend="eager") for seed, tied in ((0, True), (1, False)))
    save_model(model, tmp_path / "w.safetensors")
    assert load_model(other, tmp_path / "w.safetensors", restore_ties=True).ties[0].names == ("_orig_mod.embed.weight", "_orig_mod.head.weight")
    assert same(values(other), values(model)) and declared_ties(other) == declared_ties(model)


@pytest.mark.parametrize("value, target", [(1e9, torch.float16), (1.5, torch.int64), (float("nan"), torch.int64), (300., torch.int8), (2., torch.bool)])
def test_a_cast_that_loses_numbers_is_refused(tmp_path, value, target):
    model = parameters(a=torch.zeros(3))
    model.b = nn.Buffer(torch.zeros(3, dtype=target))
    save_file({"a": torch.ones(3), "b": torch.tensor([1., value, 0.])}, tmp_path / "w")
    before = values(model)
    with pytest.raises(ValueError, match=f"b: numbers that {target} can hold are expected, got {value}"): load_model(model, tmp_path / "w", cast=True)
    assert same(values(model), before)


def test_a_cast_that_rounds_is_a_cast(tmp_path):
    model = parameters(a=torch.zeros(3, dtype=torch.float16), b=torch.zeros(2, dtype=torch.float64))
    save_file({"a": torch.tensor([1 / 3, float("inf"), float("nan")]), "b": torch.tensor([1, 2])}, tmp_path / "w")
    load_model(model, tmp_path / "w", cast=True)
    assert torch.equal(model.a[:2], torch.tensor([1 / 3, float("inf")]).half()) and model.a[2].isnan() and model.b.tolist() == [1, 2]


def test_a_device_that_is_not_here_is_refused(tmp_path):
    save_model(tiny(), tmp_path / "w")
    if torch.cuda.is_available(): pytest.skip("a CUDA device is here")
    with pytest.raises(ValueError, match="device: a device that is here"): load_model(tiny().to("meta"), tmp_path / "w", device="cuda")


def double(w): return w * 2
def triple(w): return w * 3


def test_a_file_tied_by_another_function_is_refused_by_name(tmp_path):
    def made(map):
        model = parameters(a=torch.ones(2), b=torch.ones(2))
        tie_(model, ["a", "b"], map=map)
        return model
    save_model(made(double), tmp_path / "w")
    with pytest.raises(ValueError, match="b: in .*w it is what .*double makes of a, in the model what .*triple makes of a"): load_model(made(triple), tmp_path / "w")
    load_model(made(double), tmp_path / "w")
