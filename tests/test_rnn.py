"Chunks by the rules of conlleval, a grammar, and taggers that share their cells over time."
import copy
import random

import pytest
import torch
from torch import nn

import sharetie.rnn as rnn
from sharetie.data import Tagged
from sharetie.rnn import Bidirectional, Chunk, Tagger, Unrolled, chunk_f1, chunks, flip, grammar
from sharetie.ties import find_ties


def test_all_names_of_the_three_chapters():
    import sharetie.gradients, sharetie.unrolled
    names = {}
    exec("from sharetie.rnn import *", names)
    for module in (sharetie.gradients, sharetie.unrolled): assert {*module.__all__} <= {*rnn.__all__}
    assert all(names[name] is getattr(rnn, name) for name in rnn.__all__)


# Chunks: the rules of conlleval, written out one by one

STARTS = {("O", "B"), ("O", "I"), ("O", "E"), ("O", "S"), ("B", "B"), ("B", "S"), ("I", "B"), ("I", "S"),
          ("E", "B"), ("E", "I"), ("E", "E"), ("E", "S"), ("S", "B"), ("S", "I"), ("S", "E"), ("S", "S")}
ENDS = {("B", "B"), ("B", "O"), ("B", "S"), ("I", "B"), ("I", "O"), ("I", "S"),
        ("E", "B"), ("E", "I"), ("E", "E"), ("E", "O"), ("E", "S"), ("S", "B"), ("S", "I"), ("S", "E"), ("S", "O"), ("S", "S")}


@pytest.mark.parametrize("before", "BIESO")
@pytest.mark.parametrize("mark", "BIESO")
def test_every_pair_of_marks(before, mark):
    "The table of the rules, for neighbors of one kind and of two."
    for other in "XY":
        a, b = ("O", "") if before == "O" else (before, "X"), ("O", "") if mark == "O" else (mark, other)
        changed = a[1] != b[1]
        assert rnn._starts(a, b) == ((before, mark) in STARTS or changed and mark != "O")
        assert rnn._ends(a, b) == ((before, mark) in ENDS or changed and before != "O")


@pytest.mark.parametrize("tags, expected", [
    ("", []), ("O", []), ("O O O", []),
    ("B-NP", [("NP", 0, 1)]), ("I-NP", [("NP", 0, 1)]),
    ("B-NP I-NP I-NP", [("NP", 0, 3)]), ("I-NP I-NP", [("NP", 0, 2)]),
    ("B-NP B-NP", [("NP", 0, 1), ("NP", 1, 2)]),
    ("I-NP B-NP I-NP", [("NP", 0, 1), ("NP", 1, 3)]),
    ("B-NP I-VP", [("NP", 0, 1), ("VP", 1, 2)]), ("I-NP I-VP I-NP", [("NP", 0, 1), ("VP", 1, 2), ("NP", 2, 3)]),
    ("O I-NP O", [("NP", 1, 2)]), ("B-NP O I-NP", [("NP", 0, 1), ("NP", 2, 3)]),
    ("B-NP E-NP O", [("NP", 0, 2)]), ("S-NP S-NP", [("NP", 0, 1), ("NP", 1, 2)]),
    ("B-NP I-NP E-NP E-NP", [("NP", 0, 3), ("NP", 3, 4)]), ("E-NP I-NP", [("NP", 0, 1), ("NP", 1, 2)]),
    ("B-A-B I-A-B", [("A-B", 0, 2)]),
])
def test_chunks(tags, expected): assert chunks(tags.split()) == [Chunk(*c) for c in expected]


def iob2(spans, n):
    tags = ["O"] * n
    for kind, first, after in spans: tags[first:after] = [f"B-{kind}"] + [f"I-{kind}"] * (after - first - 1)
    return tags


def random_spans(rng, n):
    spans, at = [], 0
    while at < n:
        at += rng.randrange(3)
        after = min(n, at + rng.randrange(1, 4))
        if at < n: spans.append(Chunk(rng.choice(["NP", "VP"]), at, after))
        at = after
    return spans


def test_every_scheme_says_the_same():
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randrange(1, 12)
        spans = random_spans(rng, n)
        tags = iob2(spans, n)
        iob1 = [f"I{tag[1:]}" if tag[0] == "B" and (i == 0 or tags[i - 1][2:] != tag[2:]) else tag for i, tag in enumerate(tags)]
        last = [*tags]
        for kind, first, after in spans: last[after - 1] = f"{'E' if after - first > 1 else 'S'}-{kind}"
        assert chunks(tags) == chunks(iob1) == chunks(last) == spans


def running_counts(truth, guess):
    "Counts as the published script keeps them: word by word, with a flag for a chunk that is right so far."
    right = found = true = 0
    for tags, others in zip(truth, guess):
        inside, a, b = False, ("O", ""), ("O", "")
        for x, y in zip([*map(rnn._split, tags), ("O", "")], [*map(rnn._split, others), ("O", "")]):
            end_a, end_b, start_a, start_b = rnn._ends(a, x), rnn._ends(b, y), rnn._starts(a, x), rnn._starts(b, y)
            if inside:
                if end_a and end_b and a[1] == b[1]: inside, right = False, right + 1
                elif end_a != end_b or x[1] != y[1]: inside = False
            if start_a and start_b and x[1] == y[1]: inside = True
            true, found, a, b = true + start_a, found + start_b, x, y
    return right, found, true


def test_counts_are_those_of_the_script():
    rng = random.Random(1)
    tags = ["O", "B-NP", "I-NP", "E-NP", "S-NP", "B-VP", "I-VP"]
    for _ in range(300):
        truth, guess = ([[rng.choice(tags) for _ in range(n)] for n in (5, 1, 3)] for _ in range(2))
        if rng.random() < 0.5: guess = [[t if rng.random() < .7 else g for t, g in zip(a, b)] for a, b in zip(truth, guess)]
        assert chunk_f1(truth, guess)[4:] == running_counts(truth, guess)


def test_score_by_hand():
    truth = ["B-NP I-NP O B-VP B-PP B-NP".split()]
    guess = ["B-NP I-NP O B-VP I-VP B-NP".split()]
    score = chunk_f1(truth, guess)
    assert (score.right, score.guessed, score.true) == (2, 3, 4) and score.accuracy == 5 / 6
    assert (score.precision, score.recall, score.f1) == (2 / 3, 1 / 2, pytest.approx(4 / 7))
    assert chunk_f1(truth, guess, "VP")[4:] == (0, 1, 1) and chunk_f1(truth, guess, "PP").f1 == 0.0
    assert chunk_f1(truth, truth)[:4] == (1.0, 1.0, 1.0, 1.0)


def test_sentences_do_not_run_on():
    assert chunk_f1([["B-NP"], ["I-NP"]], [["B-NP"], ["I-NP"]]).true == 2


def test_nothing_to_score():
    assert chunk_f1([], []) == (0.0, 0.0, 0.0, 0.0, 0, 0, 0)
    assert chunk_f1([["O"]], [["O"]]) == (0.0, 0.0, 0.0, 1.0, 0, 0, 0)


@pytest.mark.parametrize("call, error, message", [
    (lambda: chunks("B-NP"), TypeError, "tags: a list of tags is expected, got 'B-NP'"),
    (lambda: chunks(["NP"]), ValueError, "tags: 'O', or one of B, I, E, S with a kind.* got 'NP'"),
    (lambda: chunks(["B-"]), ValueError, "got 'B-'"), (lambda: chunks(["O-NP"]), ValueError, "got 'O-NP'"),
    (lambda: chunks([3]), TypeError, "got 3"),
    (lambda: chunk_f1([["O"]], []), ValueError, "as many sentences as in truth, 1, is expected, got 0"),
    (lambda: chunk_f1([["O", "O"]], [["O"]]), ValueError, r"guess\[0\]: as many tags as in truth, 2, is expected, got 1"),
    (lambda: chunk_f1(["O"], ["O"]), TypeError, "tags: a list"), (lambda: chunk_f1(None, []), TypeError, "truth: a list"),
])
def test_bad_tags(call, error, message):
    with pytest.raises(error, match=message): call()


# The grammar

def test_grammar_is_a_data_set():
    data = grammar(200)
    assert isinstance(data, Tagged) and data.sizes == {"train": 120, "valid": 40, "test": 40}
    assert not {*data.sentences["train"].rows} & {*data.sentences["test"].rows}
    for split, text in (("train", data.sentences["train"]), ("test", data.sentences["test"])):
        x, y = getattr(data, split)
        for row, ids, tags in zip(text.rows, x, y):
            assert [data.words[i] for i in ids[:len(row)]] == [word for word, *_ in row] and not ids[len(row):].any()
            assert [data.tags[1][i] for i in tags[:len(row), 1]] == [tag for *_, tag in row] and (tags[len(row):] == -100).all()
            assert chunks([tag for *_, tag in row])


def test_grammar_repeats_itself_and_its_words_are_ambiguous():
    assert torch.equal(grammar(50).train.x, grammar(50).train.x) and not torch.equal(grammar(50).train.x, grammar(50, seed=1).train.x)
    tags = {}
    for row in grammar(500).sentences["train"].rows:
        for word, _, tag in row: tags.setdefault(word, set()).add(tag)
    assert {"B-NP", "I-NP", "B-VP", "I-VP"} <= tags["watch"] and {"B-NP", "I-NP", "B-VP"} <= tags["often"]


@pytest.mark.parametrize("options, error", [(dict(n=0), ValueError), (dict(n=2.5), TypeError), (dict(seed=-1), ValueError), (dict(valid=1.0), ValueError)])
def test_bad_grammars(options, error):
    with pytest.raises(error): grammar(**options)


# Both directions

def test_flip():
    x = torch.arange(8).view(2, 4)
    assert flip(x).tolist() == [[3, 2, 1, 0], [7, 6, 5, 4]] and flip(x, [4, 2]).tolist() == [[3, 2, 1, 0], [5, 4, 6, 7]]
    wide = torch.randn(3, 5, 2)
    assert torch.equal(flip(flip(wide, [1, 3, 5]), [1, 3, 5]), wide)
    with pytest.raises(ValueError, match="from 1 to 4"): flip(x, [5, 1])
    with pytest.raises(TypeError, match="x: a tensor"): flip([1, 2])


def pair(kind):
    "Two directions, and PyTorch's layer with the same weights."
    torch.manual_seed(0)
    layer = getattr(nn, kind)(3, 4, bidirectional=True, batch_first=True).double()
    cells = [getattr(nn, f"{kind}Cell")(3, 4).double() for _ in range(2)]
    for cell, end in zip(cells, ("_l0", "_l0_reverse")): cell.load_state_dict({name: getattr(layer, name + end) for name in cell.state_dict()})
    return Bidirectional(*(Unrolled(cell, 1) for cell in cells)), layer


@pytest.mark.parametrize("lengths", [None, [5, 2, 4], [3, 2, 1]])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_both_directions_are_the_layer(kind, lengths):
    ours, layer = pair(kind)
    x = torch.randn(3, 5, 3, dtype=torch.float64, requires_grad=True)
    packed = x if lengths is None else nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    expected = layer(packed)[0]
    if lengths is not None: expected = nn.utils.rnn.pad_packed_sequence(expected, batch_first=True, total_length=5)[0]
    got = ours(x, lengths)
    torch.testing.assert_close(got, expected)
    weigh = torch.randn_like(got)
    a = torch.autograd.grad((weigh * got).sum(), [x, *ours.parameters()])
    b = torch.autograd.grad((weigh * expected).sum(), [x, *layer.parameters()])
    for mine, other in zip(a, b, strict=True): torch.testing.assert_close(mine, other)


def test_padding_may_hold_anything():
    ours, _ = pair("LSTM")
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    clean = ours(x, [5, 2])
    x[1, 2:] = torch.nan
    out = ours(x, [5, 2])
    assert torch.equal(out, clean)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


def test_one_cell_for_both():
    ahead = Unrolled(nn.GRUCell(3, 4), 1)
    ours = Bidirectional(ahead, ahead)
    assert len(list(ours.parameters())) == 4 and len(find_ties(ours).true) == 4
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(ours(x)[..., 4:], ours(x.flip(1)).flip(1)[..., :4])


@pytest.mark.parametrize("parts, error, message", [
    ((nn.GRU(3, 4), Unrolled(nn.GRUCell(3, 4), 1)), TypeError, "ahead: an Unrolled is expected, got GRU"),
    ((Unrolled(nn.GRUCell(3, 4), 1), None), TypeError, "back: an Unrolled"),
    ((Unrolled(nn.GRUCell(3, 4), 1), Unrolled(nn.GRUCell(3, 4), 1, batch_first=False)), ValueError, "back: one with batch_first=True")])
def test_bad_directions(parts, error, message):
    with pytest.raises(error, match=message): Bidirectional(*parts)


def test_bad_lengths_of_both():
    ours, _ = pair("GRU")
    x = torch.zeros(2, 5, 3, dtype=torch.float64)
    for lengths, error in (([6, 1], ValueError), ([0, 1], ValueError), ([1.0, 2.0], TypeError), ([1], ValueError)):
        with pytest.raises(error, match="lengths"): ours(x, lengths)
    fixed = Bidirectional(*(Unrolled(nn.GRUCell(3, 4).double(), 4, "none") for _ in range(2)))
    with pytest.raises(ValueError, match="at most 4 steps .*got 5"): fixed(x)
    assert fixed(x, [4, 2]).shape == (2, 5, 8), "no sentence is longer than the steps"
    with pytest.raises(ValueError, match=r"x: .*at least one sequence of one step, is expected, got \(0, 5, 3\)"): ours(x[:0], [])


# The tagger

@pytest.mark.parametrize("reads, cells", [("ahead", 1), ("one cell", 1), ("both", 2)])
def test_tagger(reads, cells):
    torch.manual_seed(0)
    tagger = Tagger([9, 4], 5, width=3, hidden=4, reads=reads)
    assert sum(isinstance(m, nn.LSTMCell) for m in tagger.modules()) == cells
    x = torch.tensor([[[3, 1], [4, 2], [5, 3]], [[6, 1], [0, 0], [0, 0]]])
    scores = tagger(x)
    torch.testing.assert_close(scores[1:, :1], tagger(x[1:, :1]), msg="padding does not matter")
    other = copy.deepcopy(tagger)
    other.load_state_dict(tagger.state_dict())
    assert torch.equal(other(x), scores)
    nn.functional.cross_entropy(scores.transpose(1, 2), torch.tensor([[0, 1, 2], [3, -100, -100]])).backward()
    assert all(p.grad is not None for p in tagger.parameters())


def test_tagger_learns_a_tag_that_the_next_word_decides():
    torch.manual_seed(0)
    x = torch.randint(1, 3, (40, 6))
    y = torch.cat([x[:, 1:], x[:, -1:]], 1) - 1
    right = {}
    for reads in ("ahead", "both"):
        tagger = Tagger([3], 2, width=4, hidden=8, reads=reads)
        adam = torch.optim.Adam(tagger.parameters(), lr=0.05)
        for _ in range(60):
            adam.zero_grad()
            nn.functional.cross_entropy(tagger(x).transpose(1, 2), y).backward()
            adam.step()
        right[reads] = (tagger(x).argmax(-1) == y).float().mean().item()
    assert right["ahead"] < 0.9 < right["both"]


@pytest.mark.parametrize("options, error, message", [
    (dict(sizes=[]), TypeError, "sizes: a list"), (dict(sizes=9), TypeError, "sizes: a list"), (dict(sizes=[0]), ValueError, "sizes: .* got 0"),
    (dict(tags=0), ValueError, "tags: .* got 0"), (dict(width=1.5), TypeError, "width"), (dict(hidden=0), ValueError, "hidden"),
    (dict(reads="back"), ValueError, "reads: one of 'ahead', 'both', 'one cell'")])
def test_bad_taggers(options, error, message):
    with pytest.raises(error, match=message): Tagger(**{"sizes": [9], "tags": 3} | options)


@pytest.mark.conll
def test_scorer_on_the_published_corpus():
    from sharetie.data import conll2000
    news = conll2000()
    truth = [[tag for *_, tag in row] for row in news.sentences["test"].rows]
    score = chunk_f1(truth, truth)
    assert (news.sentences["test"].tokens, score.true, score.f1) == (47_377, 23_852, 1.0)


@pytest.mark.parametrize("kind, error, message", [
    (3, TypeError, "^kind: text, such as 'NP', or None, is expected, got 3"),
    ("XP", ValueError, r"^kind: one of the kinds that are there \(NP, VP\) is expected, got 'XP'"),
])
def test_bad_kinds(kind, error, message):
    with pytest.raises(error, match=message): chunk_f1([["B-NP", "O"]], [["O", "B-VP"]], kind)
    assert chunk_f1([["B-NP", "O"]], [["O", "B-VP"]], "VP")[4:] == (0, 1, 0)


def test_a_kind_where_nothing_is():
    with pytest.raises(ValueError, match=r"that are there \(none\)"): chunk_f1([["O"]], [["O"]], "NP")


@pytest.mark.parametrize("reads", ["ahead", "both", "one cell"])
def test_bad_sentences(reads):
    tagger = Tagger([5], 3, 4, 4, reads)
    with pytest.raises(TypeError, match="^x: a tensor of whole numbers is expected"): tagger([[1, 2]])
    with pytest.raises(ValueError, match=r"^x\[1, 1\]: a word .* is expected, got 0"): tagger(torch.tensor([[1, 2, 3], [1, 0, 2]]))
    with pytest.raises(ValueError, match=r"^x\[0, 0\]: a word"): tagger(torch.tensor([[0, 2, 3]]))
    with pytest.raises(ValueError, match=r"^x\[1\]: a sentence of one word or more is expected"): tagger(torch.tensor([[1, 2], [0, 0]]))
    with pytest.raises(TypeError, match="^x: a tensor of whole numbers is expected"): tagger(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"^x: a tensor of shape \(any, any, 1\)"): tagger(torch.ones(2, 3, 2, dtype=int))
    with pytest.raises(ValueError, match="^x: .*at least one sequence of one step"): tagger(torch.ones(0, 3, dtype=int))
    assert tagger(torch.tensor([[1, 2, 3], [1, 0, 0]])).shape == (2, 3, 3)
    assert tagger.to("meta")(torch.ones(2, 3, dtype=int, device="meta")).shape == (2, 3, 3)


@pytest.mark.parametrize("reads", ["ahead", "both", "one cell"])
def test_words_that_a_tagger_lacks(reads):
    one, two = Tagger([5], 3, 4, 4, reads), Tagger([5, 4], 3, 4, 4, reads)
    with pytest.raises(ValueError, match="^x: numbers from 0 to 4 are expected, got 1 to 5$"): one(torch.tensor([[1, 5]]))
    with pytest.raises(ValueError, match="^x: numbers from 0 to 4 are expected, got -1 to 2$"): one(torch.tensor([[-1, 2]]))
    with pytest.raises(ValueError, match=r"^x\[..., 1\]: numbers from 0 to 3 are expected, got 0 to 4$"): two(torch.tensor([[[1, 0], [2, 4]]]))
    for dtype in (torch.int8, torch.uint8, torch.int16):
        with pytest.raises(TypeError, match="^x: a tensor of int32 or int64"): one(torch.ones(1, 2, dtype=dtype))
    assert torch.equal(one(torch.tensor([[1, 2]], dtype=torch.int32)), one(torch.tensor([[1, 2]])))
