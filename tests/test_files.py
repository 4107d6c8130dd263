"""Files: broken ones are refused, the found ones are the right ones, and a failed download leaves nothing."""
import gzip
import hashlib
import http.server
import os
import struct
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sharetie import files
from sharetie.files import IDX_TYPES, Sentences, Source, find_file, read_conll, read_csv, read_idx

# readers ----------------------------------------------------------------------------------------------------------

def idx(array, code):
    "An idx file as bytes."
    array = np.asarray(array)
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(IDX_TYPES[code]).tobytes()


@pytest.mark.parametrize("code", IDX_TYPES)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 1, 3), (0, 4)])
def test_idx_round_trip(tmp_path, code, shape):
    array = np.arange(np.prod(shape)).reshape(shape) - (3 if code != 8 else 0)
    for name, blob in (("a", idx(array, code)), ("a.gz", gzip.compress(idx(array, code)))):
        (tmp_path / name).write_bytes(blob)
        got = read_idx(tmp_path / name)
        assert got.shape == shape and np.array_equal(got, array)
        got += 1  # writable, and no copy of the file's buffer


def test_idx_refuses_every_truncation_and_any_trailing_byte(tmp_path):
    whole, path = idx(np.arange(12).reshape(3, 4), 8), tmp_path / "a"
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="truncated|not an idx file"): read_idx(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="trailing bytes: shape .3, 4. needs 24 bytes, the file has 25"): read_idx(path)


@pytest.mark.parametrize("blob", [b"<!DOCTYPE html>", b"\0\0\x07\x01\0\0\0\0", b"\0\1\x08\x01\0\0\0\0", b"\0\0\x08\x00", b""])
def test_idx_refuses_other_files(tmp_path, blob):
    (tmp_path / "a").write_bytes(blob)
    with pytest.raises(ValueError, match="not an idx file: it starts with"): read_idx(tmp_path / "a")


def test_idx_refuses_absurd_sizes(tmp_path):
    (tmp_path / "a").write_bytes(b"\0\0\x0e\x04" + b"\xff" * 16)
    with pytest.raises(ValueError, match="truncated: shape .* the file has 20"): read_idx(tmp_path / "a")


def test_damaged_gzip_is_never_read_as_other_data(tmp_path):
    whole, path = gzip.compress(idx(np.arange(60), 8), mtime=0), tmp_path / "a.gz"
    right = torch.arange(60, dtype=torch.uint8)
    for n in range(2, len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="damaged or truncated"): read_idx(path)
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1:])
        try: assert torch.equal(read_idx(path), right)  # a flipped bit of the header's time stamp changes nothing
        except ValueError: pass
    path.write_bytes(whole + b"rest")
    with pytest.raises(ValueError, match="damaged or truncated"): read_idx(path)


SCHEMA = {"age": float, "sex": ("Female", "Male")}


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("| comment\n39, Male\n\n50.5,Female\n\n")
    frame = read_csv(path, SCHEMA)
    assert frame["age"].tolist() == [39, 50.5] and frame["age"].dtype == float and frame["sex"].tolist() == ["Male", "Female"]


@pytest.mark.parametrize("blob, message", [
    (b"39, Male\n50\n", "line 2 has 1 columns, expected 2"),
    (b"39, Male\n\n50, Male, x\n", "line 3 has 3 columns, expected 2"),
    (b"39, Male\n50, Man\n", "line 2, column sex: 'Man', expected one of Female, Male"),
    (b"39, Male\nold, Male\n", "line 2, column age: 'old', expected a number"),
    (b"inf, Male\n", "line 1, column age: 'inf', expected a number"),
    (b", Male\n", "line 1, column age: '', expected a number"),
    (b"39, Male\n50, Fem", "truncated: the last line, 2, has no line break"),
    (b"39, Male\n50, M\xe4nnlich\n", "line 2 is not UTF-8 text .byte 0xe4"),
    (b'39, Male\n50, "Male\n', "line 2: unexpected end of data"),
    (b"39, Male\n50, Ma\0le\n", "line 2"),
    (b"", "the file is empty"), (b"\n\n", "the file is empty"), (b"|x\n", "comments only"),
])
def test_csv_refuses(tmp_path, blob, message):
    (tmp_path / "a.csv").write_bytes(blob)
    with pytest.raises(ValueError, match=message): read_csv(tmp_path / "a.csv", SCHEMA)


TEXT = "We PRP B-NP\nread VBP B-VP\n\nWell UH O\n\n"


def test_conll(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive: archive.writestr("in/a.txt", TEXT)
    plain = read_conll(tmp_path / "a.txt")
    assert plain == read_conll(tmp_path / "a.txt.gz") == read_conll(tmp_path / "a.zip", "in/a.txt")
    assert len(plain) == 2 and plain.tokens == 3 and plain.column(0) == ["We", "read", "Well"] and plain[1] == (("Well", "UH", "O"),)
    assert plain[[1]].rows == (plain[1],)


@pytest.mark.parametrize("blob, message", [
    (b"We PRP B-NP\nread VBP\n\n", "line 2 has 2 columns, expected 3"),
    (b"We PRP B-NP x\n\n", "line 1 has 4 columns"),
    (b"We  B-NP\n\n", "line 1 has 3 columns, expected 3 words"),
    (b"We PRP B-NP\n", "ends inside a sentence, at 'We PRP B-NP'"),
    (b"We PRP B-NP\n\nread VBP B-", "truncated: the last line, 3"),
    (b"We PRP B-NP\n\n\xff\xfe VBP B-VP\n\n", "line 3 is not UTF-8"),
    (b"", "the file is empty"),
])
def test_conll_refuses(tmp_path, blob, message):
    (tmp_path / "a.txt").write_bytes(blob)
    with pytest.raises(ValueError, match=message): read_conll(tmp_path / "a.txt")


def test_conll_refuses_damaged_archives(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive: archive.writestr("a.txt", TEXT * 50)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="no member 'b.txt'"): read_conll(path, "b.txt")
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match="damaged or truncated"): read_conll(path, "a.txt")
    path.write_bytes(whole[:50] + bytes([whole[50] ^ 0xFF]) + whole[51:])
    with pytest.raises(ValueError, match="damaged or truncated"): read_conll(path, "a.txt")


# finding and downloading ------------------------------------------------------------------------------------------

CONTENT = idx(np.arange(5000) % 251, 8)
FILE = gzip.compress(CONTENT, mtime=0)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    "Serves FILE under /good/, and fails in one way under each other folder."

    def do_GET(self):
        self.server.asked.append(self.path)
        kind = self.path.split("/")[1]
        body = gzip.compress(CONTENT[:-1] + b"?", mtime=0) if kind == "wrong" else FILE
        if kind == "absent": return self.send_error(404)
        self.send_response(200)
        if kind != "short": self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if kind in ("drop", "short") else body)

    def log_message(self, *args): pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    "A local server; the cache is an empty folder, and SHARETIE_DATA is not set."
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("SHARETIE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SHARETIE_DATA", raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.source = lambda *kinds: {"toy": Source(tuple(f"http://127.0.0.1:{server.server_port}/{kind}/" for kind in kinds), {"a.gz": DIGEST})}
    server.stop = lambda: (server.shutdown(), server.server_close(), thread.join())
    yield server
    if thread.is_alive(): server.stop()


def files_in(path): return sorted(str(p.relative_to(path)) for p in Path(path).rglob("*") if p.is_file())


def test_download_and_second_call_without_network(server, tmp_path):
    path = find_file("toy", "a.gz", server.source("good"))
    assert path == tmp_path / "cache/toy/a.gz" and path.read_bytes() == FILE and files_in(tmp_path) == ["cache/toy/a.gz"]
    server.stop()
    assert find_file("toy", "a.gz", server.source("good")) == path and server.asked == ["/good/a.gz"]


@pytest.mark.parametrize("kind, reason", [("wrong", "the SHA-256 of its content is .* expected " + DIGEST), ("drop", "IncompleteRead"),
                                          ("short", "damaged or truncated"), ("absent", "404")])
def test_failed_download_leaves_nothing(server, tmp_path, kind, reason):
    with pytest.raises(FileNotFoundError, match=reason) as error: find_file("toy", "a.gz", server.source(kind))
    assert files_in(tmp_path) == []
    message = str(error.value)
    assert "two ways" in message and "SHARETIE_DATA=" in message and "SHARETIE_CACHE=" in message and f"/{kind}/a.gz" in message
    assert find_file("toy", "a.gz", server.source("good")).read_bytes() == FILE  # and the next call can succeed


def test_unknown_file_lists_the_known_ones(server):
    for name, file in (("toy", "b.gz"), ("tay", "a.gz")):
        with pytest.raises(ValueError, match=f"no file '{file}' of a data set '{name}'; there are toy: a.gz"):
            find_file(name, file, server.source("good"))


def test_second_address_is_tried(server, tmp_path):
    find_file("toy", "a.gz", server.source("absent", "drop", "good"))
    assert server.asked == ["/absent/a.gz", "/drop/a.gz", "/good/a.gz"] and files_in(tmp_path) == ["cache/toy/a.gz"]


def test_no_server_at_all(server, tmp_path):
    source = server.source("good")
    server.stop()
    with pytest.raises(FileNotFoundError, match="two ways to provide it"): find_file("toy", "a.gz", source)
    assert files_in(tmp_path) == []


def test_interrupted_download_leaves_nothing(server, tmp_path, monkeypatch):
    def interrupt(*args): raise KeyboardInterrupt
    monkeypatch.setattr(files, "_verify", interrupt)
    with pytest.raises(KeyboardInterrupt): files._download(server.source("good")["toy"].urls[0] + "a.gz", tmp_path / "cache/toy/a.gz", DIGEST)
    assert files_in(tmp_path) == []


def test_damaged_cache_is_replaced(server, tmp_path):
    path = tmp_path / "cache/toy/a.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(FILE[:100])
    assert find_file("toy", "a.gz", server.source("good")).read_bytes() == FILE


@pytest.mark.parametrize("cache", ["plain", "plain/below"])
def test_cache_that_cannot_be_made(server, tmp_path, monkeypatch, cache):
    "The cache folder is, or lies below, a plain file: nobody can write there, root included."
    (tmp_path / "plain").write_text("mine")
    monkeypatch.setenv("SHARETIE_CACHE", str(tmp_path / cache))
    with pytest.raises(FileNotFoundError, match="a cache folder that can be written"): find_file("toy", "a.gz", server.source("good"))
    assert files_in(tmp_path) == ["plain"] and (tmp_path / "plain").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_cache(server, tmp_path):
    (tmp_path / "cache/toy").mkdir(parents=True)
    (tmp_path / "cache/toy").chmod(0o500)
    with pytest.raises(FileNotFoundError, match="a cache folder that can be written"): find_file("toy", "a.gz", server.source("good"))
    (tmp_path / "cache/toy").chmod(0o700)
    assert files_in(tmp_path) == []


def test_own_folder_comes_first_and_is_checked(server, tmp_path, monkeypatch):
    own = tmp_path / "own/toy/a.gz"
    own.parent.mkdir(parents=True)
    monkeypatch.setenv("SHARETIE_DATA", str(tmp_path / "own"))
    own.write_bytes(gzip.compress(CONTENT, 1))  # other bytes, same content
    assert find_file("toy", "a.gz", server.source("good")) == own
    own.write_bytes(gzip.compress(CONTENT[:-1] + b"?"))
    with pytest.raises(ValueError, match="own/toy/a.gz: the SHA-256 of its content is .*another or a damaged file"):
        find_file("toy", "a.gz", server.source("good"))
    own.write_bytes(FILE[:50])
    with pytest.raises(ValueError, match="own/toy/a.gz: damaged or truncated"): find_file("toy", "a.gz", server.source("good"))
    assert server.asked == [] and own.exists()
    own.unlink()
    assert find_file("toy", "a.gz", server.source("good")).parent == tmp_path / "cache/toy"


# arguments of another kind ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("read", [read_idx, lambda path: read_csv(path, SCHEMA), read_conll])
@pytest.mark.parametrize("path", [None, 3, ["a"], b"a", True])
def test_no_path(read, path):
    with pytest.raises(TypeError, match="^path: a path is expected, got"): read(path)


@pytest.mark.parametrize("options, message", [
    (dict(columns=None), "^columns: a dictionary of float or words by column is expected, got None"), (dict(columns=["age", "sex"]), "^columns: "), (dict(columns={}), "^columns: "), (dict(columns="age"), "^columns: "),
    (dict(columns={"age": int}), r"^columns\['age'\]: float or a tuple of words is expected, got int"), (dict(columns={"age": float, "sex": "Male"}), r"^columns\['sex'\]: .* got 'Male'"),
    (dict(columns={"age": float, "sex": None}), r"^columns\['sex'\]: "), (dict(columns={1: float, "sex": ("Male",)}), "^columns: text for every name is expected, got 1"), (dict(columns={None: float}), "^columns: text"), (dict(columns={"age": ()}), r"^columns\['age'\]: "), (dict(columns={"age": (1, 2)}), r"^columns\['age'\]: "),
    (dict(columns=SCHEMA, comment=None), "^comment: text is expected, got None"), (dict(columns=SCHEMA, comment=3), "^comment: "),
])
def test_bad_options_of_read_csv(tmp_path, options, message):
    (tmp_path / "a.csv").write_bytes(b"39, Male\n")
    with pytest.raises(TypeError, match=message): read_csv(tmp_path / "a.csv", **options)


def test_an_empty_comment_skips_nothing(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"39, Male\n")
    assert len(read_csv(tmp_path / "a.csv", SCHEMA, comment="")) == 1


@pytest.mark.parametrize("options, error, message", [(dict(columns=0), ValueError, "^columns: "), (dict(columns=None), TypeError, "^columns: "), (dict(columns=True), TypeError, "^columns: "),
                                                     (dict(member=3), TypeError, "^member: ")])
def test_bad_options_of_read_conll(tmp_path, options, error, message):
    (tmp_path / "a.txt").write_bytes(b"We PRP B-NP\n\n")
    with pytest.raises(error, match=message): read_conll(tmp_path / "a.txt", **options)


@pytest.mark.parametrize("rows", [None, [], "ab", ("We",), (["We"],), 3])
def test_no_sentences(rows):
    with pytest.raises(TypeError, match="^rows: a tuple of sentences"): Sentences(rows)


@pytest.mark.parametrize("token", [None, "We", ["We", "PRP"], (), ("We", 1), (["We"],), {"We": "PRP"}], ids=str)
def test_no_tokens(token):
    with pytest.raises(TypeError, match="^rows: tokens that are tuples of text is expected, got"): Sentences((((("read", "VBP")), token),))


@pytest.mark.parametrize("i", [None, "0", 1.5, True, [0.0], [True, False, True], np.array([True, False, True]), torch.zeros(2), {0: 1}, np.float64(1)], ids=str)
def test_no_place_of_a_sentence(i):
    with pytest.raises(TypeError, match="^i: a whole number is expected, got"): THREE[i]


THREE = Sentences(tuple(((word, tag),) for word, tag in ("aA", "bB", "cC")))


@pytest.mark.parametrize("i, words", [([2, 0], "ca"), (np.array([2, 0]), "ca"), (torch.tensor([2, 0]), "ca"), ((), ""), (slice(1, None), "bc"), (range(2), "ab"), ([np.int64(-1)], "c")], ids=str)
def test_some_sentences(i, words):
    assert THREE[i].column(0) == list(words) and THREE[np.int64(1)] == THREE[torch.tensor(1)] == THREE[1]
    with pytest.raises(IndexError): THREE[3]


@pytest.mark.parametrize("k, error", [(3, ValueError), (-1, ValueError), (None, TypeError), ("0", TypeError), (True, TypeError)])
def test_no_column(k, error):
    with pytest.raises(error, match="^k: a whole number"): Sentences(((("We", "PRP", "B-NP"),),)).column(k)
    assert Sentences(()).column(0) == []


@pytest.mark.parametrize("arguments, message", [((None, "a"), "^name: text"), (("toy", None), "^file: text"), ((["toy"], "a"), "^name: text"), (("toy", "a", None), "^sources: "),
                                                (("toy", "a", {"toy": None}), "^sources: "), (("toy", "a", ["toy"]), "^sources: ")])
def test_bad_arguments_of_find_file(arguments, message):
    with pytest.raises(TypeError, match=message): find_file(*arguments)


@pytest.mark.parametrize("arguments, message", [(("http://host/", {}), "^urls: a tuple of addresses is expected, got 'http://host/'"), ((None, {}), "^urls: "), (((), None), "^files: "), (((), ["a"]), "^files: "), (((), {"a": None}), "^files: "), (((), {1: "a"}), "^files: ")])
def test_bad_sources(arguments, message):
    with pytest.raises(TypeError, match=message): Source(*arguments)
