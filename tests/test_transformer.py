"The character language model: text, windows, model, training, score, and the names of the part in one place."
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sharetie import attention, depth, embeddings, heads, layers, transformer
from sharetie.layers import share_layers_
from sharetie.ties import check_ties, declared_ties, find_ties, load_model, save_model
from sharetie.transformer import (ALPHABET, CharacterModel, bits_per_character, decode, encode, help_text,
                                  train_characters, windows)


@pytest.fixture(scope="module")
def text(): return help_text()


@pytest.mark.parametrize("module", [attention, heads, embeddings, layers, depth])
def test_all_names_of_the_part_are_offered(module):
    for name in module.__all__:
        assert getattr(transformer, name) is getattr(module, name) and name in transformer.__all__


def test_every_character_there_and_back():
    assert len(ALPHABET) == len(set(ALPHABET)) == 96 and decode(encode(ALPHABET)) == ALPHABET
    assert encode(ALPHABET).tolist() == list(range(96)) and encode("").shape == (0,)
    assert decode(encode("é“x”—’\t")) == '?"x"-\'?'


@pytest.mark.parametrize("call, error, words", [
    (lambda: encode(b"a"), TypeError, "text: text"), (lambda: encode(None), TypeError, "text"),
    (lambda: decode("a"), TypeError, "codes"), (lambda: decode(torch.zeros(2)), TypeError, "whole numbers"),
    (lambda: decode(torch.tensor([96])), ValueError, "from 0 to 95 is expected, got 96"),
    (lambda: decode(torch.tensor([-1])), ValueError, "got -1"), (lambda: decode(torch.zeros(2, 2, dtype=torch.long)), ValueError, "1 axes"),
    (lambda: help_text(0), ValueError, "part"), (lambda: help_text(1.0), ValueError, "part"), (lambda: help_text("a"), TypeError, "part"),
    (lambda: help_text(seed=-1), ValueError, "seed"),
    (lambda: windows(torch.arange(4), 0, 2), ValueError, "count"), (lambda: windows(torch.arange(4), 2, 0), ValueError, "length"),
    (lambda: windows(torch.arange(4), 2, 4), ValueError, "from 1 to 3 is expected, got 4"),
    (lambda: windows(torch.arange(4.0), 2, 2), TypeError, "text"), (lambda: windows("text", 2, 2), TypeError, "text"),
    (lambda: bits_per_character(CharacterModel(), torch.arange(8), 8), ValueError, "from 1 to 7 is expected, got 8"),
    (lambda: train_characters(CharacterModel(layers=1), torch.arange(80), 0), ValueError, "steps"),
    (lambda: train_characters(CharacterModel(layers=1), torch.arange(80), 2, rate=0), ValueError, "rate"),
    (lambda: train_characters(CharacterModel(layers=1), torch.arange(80), 2, batch=0), ValueError, "^batch: .* got 0"),
    (lambda: train_characters(CharacterModel(layers=1), torch.arange(80), 2, batch="a"), TypeError, "^batch"),
    (lambda: bits_per_character(nn.Identity(), torch.arange(80)), TypeError, "^what model gives: a floating point tensor"),
    (lambda: bits_per_character(CharacterModel(layers=1), torch.arange(80).to(torch.int8)), TypeError, "^x: a tensor of int32 or int64"),
    (lambda: CharacterModel(layers=0), ValueError, "layers"), (lambda: CharacterModel(dim=9, heads=3), ValueError, "dim|even"),
    (lambda: CharacterModel(dim=8, heads=3), ValueError, "divisor of dim=8 is expected, got 3"),
    (lambda: windows(torch.arange(0), 2, 2), ValueError, "text: a text of at least two characters is expected, got 0"),
    (lambda: bits_per_character(CharacterModel(), torch.arange(1)), ValueError, "at least two characters is expected, got 1"),
    (lambda: bits_per_character(None, torch.arange(80)), TypeError, "model: a module is expected, got NoneType"),
    (lambda: train_characters(None, torch.arange(80), 2), TypeError, "model: a module is expected, got NoneType"),
    (lambda: CharacterModel(layers=1)(torch.tensor([[1, 96]])), ValueError, "x: numbers from 0 to 95 are expected, got 1 to 96"),
    (lambda: CharacterModel(layers=1)(torch.tensor([[-1, 5]])), ValueError, "x: numbers from 0 to 95 are expected, got -1 to 5"),
    (lambda: CharacterModel()(torch.zeros(1, 4)), TypeError, "x: a tensor of whole numbers"),
    (lambda: CharacterModel()(torch.zeros(4, dtype=torch.long)), ValueError, "2 axes"),
])
def test_bad(call, error, words):
    with pytest.raises(error, match=words): call()


def test_text_is_split_once_and_for_all(text):
    again, other = help_text(), help_text(seed=1)
    assert torch.equal(again.train, text.train) and torch.equal(again.valid, text.valid)
    assert other.sha256 == text.sha256 and not torch.equal(other.valid[:500], text.valid[:500])
    share = len(text.valid) / (len(text.valid) + len(text.train))
    assert 0.05 < share < 0.2 and len(help_text(0.3).valid) > 2 * len(text.valid)


def test_no_paragraph_is_in_both_parts(text):
    train, valid = (set(decode(part).split("\n\n")) for part in text[:2])
    assert len(train) > 500 and len(valid) > 50 and not {p for p in train & valid if len(p) > 20}


def test_windows_are_places_of_the_text():
    text = torch.arange(50) % 7
    x, y = windows(text, 200, 5, seed=3)
    assert x.shape == y.shape == (200, 5) and torch.equal(x[:, 1:], y[:, :-1])
    places = {tuple(text[i:i + 6].tolist()) for i in range(45)}
    assert {(*a, b[-1]) for a, b in zip(x.tolist(), y.tolist())} <= places
    assert torch.equal(windows(text, 200, 5, seed=3)[0], x) and not torch.equal(windows(text, 200, 5, seed=4)[0], x)
    x, _ = windows(torch.arange(6), 500, 5)
    assert x[:, 0].unique().tolist() == [0], "one place only"


def test_the_model_is_causal_tied_and_travels(tmp_path):
    torch.manual_seed(0)
    model, x = CharacterModel(layers=2), torch.randint(96, (2, 9))
    y = model(x)
    later = x.clone()
    later[:, 5:] = 0
    torch.testing.assert_close(model(later)[:, :5], y[:, :5])
    assert model.head.weight is model.embedding.weight and len(declared_ties(model)) == 1
    twin = copy.deepcopy(model)
    check_ties(twin)
    assert torch.equal(twin(x), y)
    save_model(model, tmp_path / "m.safetensors")
    other = CharacterModel(layers=2)
    load_model(other, tmp_path / "m.safetensors")
    assert torch.equal(other(x), y)
    other.load_state_dict(model.state_dict())
    with torch.device("meta"): assert CharacterModel()(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 96)


def test_a_new_model_knows_nothing(text):
    torch.manual_seed(0)
    bits = bits_per_character(CharacterModel(), text.valid[:2000])
    assert abs(bits - math.log2(96)) < 1.5


class Copier(nn.Module):
    "Scores of the present character, scaled; in training mode, none."
    def forward(self, x): return F.one_hot(x, 96) * (0.0 if self.training else 3.0)


def test_bits_against_a_loop(text):
    model, part = Copier(), text.valid[:135]
    total, count = 0.0, 0
    for start in range(0, 128, 32):
        for i in range(start, start + 32):
            scores = 3.0 * F.one_hot(part[i], 96)
            total -= scores.log_softmax(-1)[part[i + 1]].item() / math.log(2)
            count += 1
    assert count == 128 and math.isclose(bits_per_character(model, part), total / count, rel_tol=1e-5)
    assert model.training, "the mode is as before"
    assert math.isclose(bits_per_character(model, part, 4), bits_per_character(model, part[:133], 2), rel_tol=1e-5)


def test_training_repeats_itself_and_learns(text):
    scores = []
    for _ in range(2):
        torch.manual_seed(0)
        model = CharacterModel(16, 2, 2)
        share_layers_(model)
        before = bits_per_character(model, text.valid[:1000])
        train_characters(model, text.train, 30)
        scores.append(bits_per_character(model, text.valid[:1000]))
        check_ties(model)
        assert model.blocks[0].attention.q.weight is model.blocks[1].attention.q.weight and len(find_ties(model)) == 17
    assert scores[0] == scores[1] < before


def test_the_model_compiles_whole():
    torch.manual_seed(0)
    model, x = CharacterModel(layers=1), torch.arange(12).view(2, 6)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_characters_in_half_precision():
    assert CharacterModel().bfloat16()(torch.zeros(1, 3, dtype=int)).dtype == torch.bfloat16
