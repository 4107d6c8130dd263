"Gaps and streams: exact inverses, the entropy, the same bytes, and every damage refused."
import math
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharetie.coding import _number, entropy_bits, from_gaps, from_stream, to_gaps, to_stream


def slow_gaps(mask, bits):
    "One entry after the other, as the text says it."
    filler, gaps, skipped = 2**bits - 1, [], 0
    for here in mask.flatten().tolist():
        if here:
            gaps += [filler] * (skipped // filler) + [skipped % filler]
            skipped = 0
        else: skipped += 1
    return gaps


@settings(deadline=None, max_examples=60)
@given(st.lists(st.booleans(), max_size=80), st.integers(1, 16))
def test_gaps_and_back(mask, bits):
    mask = torch.tensor(mask, dtype=torch.bool)
    gaps = to_gaps(mask, bits)
    assert gaps.tolist() == slow_gaps(mask, bits)
    assert torch.equal(from_gaps(gaps, bits, tuple(mask.shape)), mask)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 60))
def test_gaps_are_refused_or_are_those_of_their_mask(gaps, size):
    gaps = torch.tensor(gaps, dtype=torch.int32)
    try: mask = from_gaps(gaps, 2, (size,))
    except ValueError: return
    assert torch.equal(to_gaps(mask, 2), gaps)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4)])
def test_gaps_of_every_shape(shape):
    for fill in (torch.zeros, torch.ones):
        mask = fill(shape, dtype=torch.bool)
        assert torch.equal(from_gaps(to_gaps(mask, 3), 3, shape), mask)


@pytest.mark.parametrize("gaps, bits, error, words", [
    (torch.tensor([1., 2.]), 3, TypeError, "a tensor of whole numbers"),
    (torch.tensor([[1, 2]]), 3, ValueError, "a tensor of 1 axes"),
    (torch.tensor([0, -1]), 3, ValueError, "numbers from 0 to 7"),
    (torch.tensor([8]), 3, ValueError, "numbers from 0 to 7"),
    (torch.tensor([0, 7]), 3, ValueError, "no filler at the end"),
    (torch.tensor([6, 6]), 3, ValueError, "positions below 10"),
    (torch.full((9,), 2**40), 3, ValueError, "numbers from 0 to 7"),
    (torch.tensor([1]), 0, ValueError, "bits"),
    (torch.tensor([1]), 17, ValueError, "bits"),
    (torch.tensor([1]), 2.0, TypeError, "a whole number"),
])
def test_gaps_that_are_refused(gaps, bits, error, words):
    with pytest.raises(error, match=words): from_gaps(gaps, bits, (10,))


def test_a_mask_is_bool():
    with pytest.raises(TypeError, match="a tensor of bool"): to_gaps(torch.ones(3), 3)
    with pytest.raises(TypeError, match="a tensor"): to_gaps([True], 3)


def test_entropy_against_the_formula():
    x = torch.randint(0, 7, (5, 200))
    p = np.unique(x.numpy(), return_counts=True)[1] / 1000
    assert math.isclose(entropy_bits(x), -1000 * (p * np.log2(p)).sum())
    assert entropy_bits(torch.zeros(0).int()) == 0
    with pytest.raises(ValueError, match="at least 0"): entropy_bits(torch.tensor([-1]))
    with pytest.raises(TypeError, match="whole numbers"): entropy_bits(torch.ones(2))


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 300).flatmap(lambda k: st.tuples(st.just(k), st.lists(st.integers(0, k - 1), max_size=200))), st.booleans())
def test_streams_and_back(drawn, entropy):
    k, numbers = drawn
    numbers = torch.tensor(numbers, dtype=torch.int64)
    stream = to_stream(numbers, k, entropy)
    found = from_stream(stream)
    assert found.dtype == torch.int32 and found.tolist() == numbers.tolist()
    assert torch.equal(stream, to_stream(numbers, k, entropy))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_streams_of_all_types_and_shapes_are_alike(kind):
    x = torch.arange(24).remainder(5)
    assert torch.equal(to_stream(x, 5), to_stream(x.view(2, 3, 4).to(kind), 5))
    assert torch.equal(to_stream(x, 5), to_stream(x.repeat_interleave(2)[::2], 5))


@pytest.mark.parametrize("k", [2, 3, 16, 64, 256, 4096])
@pytest.mark.parametrize("skew", [0., 1., 3.])
def test_close_to_the_entropy(k, skew):
    generator = np.random.default_rng(k)
    p = np.arange(1, k + 1) ** -skew
    x = torch.from_numpy(generator.choice(k, 300_000, p=p / p.sum()))
    bits = 8 * len(to_stream(x, k))
    assert bits <= 1.002 * entropy_bits(x) + 16 * k + 8 * 24  # a table of 16 bits, and what is on top
    assert bits >= entropy_bits(x)
    whole = 8 * len(to_stream(x, k, entropy=False))
    assert abs(whole - len(x) * math.log2(k)) <= 8 * 24


def test_one_number_alone_takes_no_room():
    assert len(to_stream(torch.zeros(10**6).int(), 1)) < 12
    assert len(to_stream(torch.full((10**6,), 3), 4)) < 24


def test_every_damaged_bit_and_every_cut_is_found():
    x = torch.arange(300) ** 2 % 11
    for entropy in (True, False):
        stream = to_stream(x, 11, entropy)
        for i in range(len(stream)):
            with pytest.raises(ValueError, match="stream"): from_stream(stream[:i])
            for bit in range(8):
                broken = stream.clone()
                broken[i] ^= 1 << bit
                with pytest.raises(ValueError, match="stream"): from_stream(broken)
    with pytest.raises(ValueError, match="stream"): from_stream(torch.cat([stream, torch.zeros(4).byte()]))


def forged(head, words=b""):
    "Bytes with a check that fits them."
    check = zlib.crc32(words, zlib.crc32(head)).to_bytes(4, "little")
    return torch.tensor([*head, *check, *words], dtype=torch.uint8)


@pytest.mark.parametrize("stream, words", [
    (forged(b"\7\1\1"), "0, 8 or 16"),
    (forged(b"\0\1\0"), "an alphabet of 1 to 65536"),
    (forged(b"\0" + _number(1) + _number(2**20)), "an alphabet of 1 to 65536"),
    (forged(b"\0\xff\xff\xff\xff\xff\1\1"), "a number has no end"),
    (forged(b"\x08\2\2\0\0", b"\1\0\0\0"), "none of ours"),  # a table of nothing
    (forged(b"\0\2\2", b"\1\0\0\0\0\0\0\0"), "none of ours"),  # never ends in a word of zero
    (forged(b"\0\2\2", b"\1\0\0"), "none of ours"),  # no whole word
    (forged(b"\0\2\2", b"\1\2\3\4\5\6\7\x08"), "not all are used"),
    (forged(b"\0\0\2", b"\1\2\3\4"), "not all are used"),
    (forged(b"\0\2\1", b"\1\2\3\4"), "not all are used"),
])
def test_streams_whose_check_fits_and_that_are_none_of_ours(stream, words):
    with pytest.raises(ValueError, match=words): from_stream(stream)


def test_arguments_of_streams():
    with pytest.raises(TypeError, match="a tensor of uint8"): from_stream(torch.ones(9).int())
    with pytest.raises(ValueError, match="1 axes"): from_stream(torch.ones(3, 3).byte())
    with pytest.raises(ValueError, match="at most 3 numbers"): from_stream(to_stream(torch.ones(4).int(), 2), most=3)
    with pytest.raises(ValueError, match="numbers below 2"): to_stream(torch.tensor([2]), 2)
    for k in (0, 2**16 + 1):
        with pytest.raises(ValueError, match="k"): to_stream(torch.tensor([0]), k)
    with pytest.raises(TypeError, match="whole numbers"): to_stream(torch.tensor([True]), 2)


@pytest.mark.long
def test_other_processes_write_the_same_bytes():
    code = ("import torch, zlib; from sharetie.coding import to_stream; torch.manual_seed(0);"
            "print(zlib.crc32(to_stream((torch.rand(5000) * 9).int(), 9).numpy()))")
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(runs) == 1
