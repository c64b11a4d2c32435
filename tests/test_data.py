"""The laws of data: tokens give the text back, splits part it, batches cover it and depend on (seed, step) alone."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exlstm.data import files, parts, text, tokenizer
from exlstm.data.config import DataConfig
from exlstm.data.text import Split, TextBatches, load_corpus, load_text, open_corpus, windows, xz_bits_per_byte
from exlstm.data.tokenizer import BPE, TOKENIZERS, Bytes, Characters, tokenizer_from_dict

SAMPLE = "The forget gate — ein Tor, das vergißt 🙂.\r\n\r\n    if x:\n\t\treturn x  \n\n\n  日本語 tail\x1c \n"
FITTED = {name: kind.fit([SAMPLE * 3], 300 if name == "bpe" else 0) for name, kind in TOKENIZERS.items()}
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)
ALPHABET = st.sampled_from(sorted(set(SAMPLE)))


def write(folder, **contents):
    """Files below `folder`; a double underscore is a slash, a single one a dot."""
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def many(folder, count=30):
    """A folder of documents of different sizes."""
    return write(folder, **{f"d{i % 3}__{i}_txt": f"document {i} says: " + SAMPLE * (1 + i % 5) for i in range(count)})


def split_of(*documents, name="bytes"):
    tokens = [FITTED[name].array(d) for d in documents]
    names = tuple(f"{i}" for i in range(len(documents)))
    return Split(np.concatenate(tokens), np.array([len(t) for t in tokens]), names, FITTED[name])


SPLITS = {
    "one": split_of(bytes(range(97, 123)) * 3),
    "many": split_of(b"abcdefg", b"hi", b"jklmnopqrstuvwxyzABCDEFGHIJK", b"LM", b"NOPQRSTUVWXYZ0123456789"),
    "pairs": split_of(*[bytes([2 * i, 2 * i + 1]) for i in range(9)]),
    "two": split_of(b"ab"),
}
every_split = pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)


# Tokenizers


@every_tokenizer
@settings(max_examples=40, deadline=None)
@given(value=st.text(ALPHABET, max_size=60))
@example(value="")
@example(value=SAMPLE)
def test_tokens_give_the_text_back(name, value):
    know = FITTED[name]
    tokens = know.encode(value)
    assert know.decode(tokens) == value and know.bytes(tokens) == value.encode()
    assert know.array(value).tolist() == tokens == know.encode(value.encode())
    assert all(0 <= t < know.vocab_size for t in tokens) and len(know.pieces) == know.vocab_size
    assert know.decode(np.array(tokens, np.int64)) == know.decode(torch.tensor(tokens, dtype=torch.long)) == value
    stream = know.decoder()
    pushed = [stream.push(t) for t in tokens]
    assert "".join(pushed) + stream.flush() == value


@every_tokenizer
def test_a_tokenizer_survives_json(name):
    know = FITTED[name]
    again = tokenizer_from_dict(json.loads(json.dumps(know.to_dict())))
    assert type(again) is type(know) and again.to_dict() == know.to_dict() and again.pieces == know.pieces
    assert again.encode(SAMPLE) == know.encode(SAMPLE)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=40), words=st.text(max_size=40))
def test_no_text_is_too_strange_for_bytes(name, data, words):
    know = FITTED[name]
    assert know.decode(know.encode(data)) == data.decode("utf-8", "replace")
    assert know.decode(know.encode(words)) == words
    stream = know.decoder()
    tokens = know.encode(data)
    assert "".join(map(stream.push, tokens)) + stream.flush() == know.decode(tokens)


def test_a_character_comes_out_whole():
    stream = Bytes().decoder()
    assert [stream.push(b) for b in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert stream.push(0xF0) == "" and stream.flush() == "\ufffd" and stream.flush() == ""
    assert stream.push(ord("a")) == "a"


def test_what_the_shell_could_not_decode_is_taken():
    assert Bytes().encode("a\udcff") == [97, 255]
    assert Bytes().encode("a\ud83d") == list(b"a?")
    assert FITTED["bpe"].decode(FITTED["bpe"].encode("a\udcff")) == "a\ufffd"


@settings(max_examples=60, deadline=None)
@given(value=st.text(st.sampled_from("a 'st\n\r\t\x0b\x1c\u2003é1."), max_size=80), size=st.integers(1, 9))
def test_slices_do_not_change_the_tokens_of_a_bpe(value, size):
    whole = FITTED["bpe"].encode(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "SLICE", size)
        assert FITTED["bpe"].encode(value) == whole


def test_training_a_bpe_is_deterministic_and_stays_in_its_size():
    first = BPE.fit([SAMPLE * 50], 320)
    assert first.to_dict() == BPE.fit([SAMPLE * 50], 320).to_dict()
    assert 257 < first.vocab_size <= 320
    assert len(first.encode(SAMPLE)) < len(SAMPLE.encode()) / 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "FIT", len(SAMPLE))
        assert BPE.fit([SAMPLE, "zebra " * 99]).to_dict() == BPE.fit([SAMPLE]).to_dict()


NOT_BYTE_LEVEL = {
    "kind": "bpe",
    "definition": {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
}
BAD_TOKENS = [
    (lambda: Characters("abc").encode("abé"), "'é' .U.00E9. is not among the 3 known ones: abc"),
    (lambda: Characters("a\n").encode(b"\xff"), "FFFD"),
    (lambda: Characters(""), "at least one character"),
    (lambda: Bytes().decode([97, 256]), "token 256 does not exist, this tokenizer has 256"),
    (lambda: Characters("ab").decode([-1]), "token -1 does not exist"),
    (lambda: Bytes().decoder().push(999), "token 999"),
    (lambda: tokenizer_from_dict({"kind": "words"}), "unknown tokenizer 'words'; known: bytes, characters, bpe"),
    (lambda: tokenizer_from_dict({"kind": ["bytes"]}), "did you mean 'bytes'"),
    (lambda: tokenizer_from_dict([]), "unknown tokenizer None; known: bytes"),
    (lambda: tokenizer_from_dict({"kind": "bytes", "more": 1}), "not a description of a bytes tokenizer"),
    (lambda: tokenizer_from_dict({"kind": "characters"}), "has the keys characters, kind"),
    (lambda: tokenizer_from_dict({"kind": "characters", "characters": 5}), "characters is 5"),
    (lambda: tokenizer_from_dict({"kind": "bpe", "definition": {}}), "not a BPE"),
    (lambda: tokenizer_from_dict(NOT_BYTE_LEVEL), "not a byte-level BPE"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD_TOKENS)
def test_bad_tokens_are_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_text_of_a_wrong_type_is_refused():
    with pytest.raises(TypeError, match="text is int, wanted str or bytes"):
        Bytes().encode(5)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'exlstm\[hf\]'"):
        load_corpus(DataConfig(files=many(tmp_path / "text"), tokenizer="bpe"), tmp_path / "run" / "data")
    assert not (tmp_path / "run").exists()


# Which files


def names(sources, cache=None):
    return [d.name for d in files.find(sources, cache)[0]]


def test_folders_globs_and_files(tmp_path):
    root = write(
        tmp_path / "x", a_txt="aa", b_py="bb", sub__c_txt="cc", sub__deep__d_md="dd", bin_dat=b"a\0b", none_txt=""
    )
    write(tmp_path / "x", sub__h="hh")
    (tmp_path / "x" / ".git").mkdir()
    (tmp_path / "x" / ".git" / "config").write_text("hidden")
    (tmp_path / "x" / ".hidden").write_text("hidden")
    everything = ["a.txt", "b.py", "sub/c.txt", "sub/h", "sub/deep/d.md"]
    assert names([root]) == names(root) == everything
    assert names([f"{root}/*.txt"]) == ["a.txt"]
    assert names([f"{root}/**/*.txt"]) == ["a.txt", "sub/c.txt"]
    assert sorted(names([f"{root}/**"])) == sorted(everything)
    assert names([f"{root}/s*"]) == ["sub/c.txt", "sub/h", "sub/deep/d.md"]
    assert names([f"{root}/b.py", root, f"{root}/*.txt"]) == ["b.py", "a.txt", "sub/c.txt", "sub/h", "sub/deep/d.md"]
    assert files.find([root])[1] == ["passed over 1 binary file"]
    assert files.find([f"{root}/a.txt", f"{root}/none.txt"])[1] == [f"{root}/none.txt is empty"]


def test_a_name_with_brackets_and_the_home_folder(tmp_path, monkeypatch):
    write(tmp_path, **{"a[1]_txt": "text"})
    assert names([f"{tmp_path}/a[1].txt"]) == ["a[1].txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert names(["~/a[1].txt"]) == ["a[1].txt"]


def test_a_run_never_learns_from_itself(tmp_path):
    write(
        tmp_path, notes_txt="n" * 99, runs__old__run_json="{}", runs__old__metrics_jsonl="{}", runs__other_txt="o" * 99
    )
    (tmp_path / "runs" / "old" / "checkpoints").mkdir()
    config = DataConfig(files=str(tmp_path))
    cache = tmp_path / "runs" / "new" / "data"
    first = load_corpus(config, cache)
    assert first.train.names == ("notes.txt", "runs/other.txt")
    write(tmp_path, runs__new__run_json="{}", runs__new__metrics_jsonl="{}")
    assert load_corpus(config, cache, expect=first.fingerprint).fingerprint == first.fingerprint
    for sources in (str(tmp_path), f"{tmp_path}/**", f"{tmp_path}/*"):
        assert set(names(sources, cache)) == {"notes.txt", "runs/other.txt"}


def test_the_default_is_the_standard_library(tmp_path):
    corpus = load_corpus(DataConfig(), tmp_path)
    found = corpus.train.names + corpus.held_out.names
    assert {"argparse.py", "json/decoder.py"} <= set(found)
    assert all(n.endswith(".py") for n in found)
    assert not [n for n in found if {"site-packages", "test", "tests"} & set(n.split("/"))]
    total = corpus.train.n_bytes + corpus.held_out.n_bytes
    assert total > 4e6 and abs(corpus.held_out.n_bytes / total - 0.1) < 0.03
    assert corpus.notes == ()


def test_a_fingerprint_is_names_and_contents_and_not_the_place(tmp_path):
    def mark(folder):
        return files.fingerprint(files.find([folder])[0])

    one, other = many(tmp_path / "one"), many(tmp_path / "two" / "deep")
    assert mark(one) == mark(other)
    write(tmp_path / "one", d0__0_txt="document 0 said: " + SAMPLE)
    assert mark(one) != mark(other)
    os.rename(f"{other}/d0/0.txt", f"{other}/d0/00.txt")
    assert mark(other) != mark(many(tmp_path / "three"))


# Preparing


def test_a_text_that_changes_while_it_is_read_is_noticed(tmp_path):
    (document,), _ = files.find(write(tmp_path, a_txt="before"))
    assert list(files.pieces(document)) == [(True, b"before")]
    document.path.write_text("behind")
    with pytest.raises(ValueError, match="changed while it was read"):
        list(files.pieces(document))


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("count", [1, 2, 9, 10, 30])
def test_the_parts_are_the_whole_text_once(tmp_path, count, share):
    documents, _ = files.find(many(tmp_path, count))
    train, held = parts.divide(documents, share, seed=1)
    found = Counter()
    for part in train + held:
        assert part.begin < part.end
        found[part.document.name] += part.end - part.begin
    assert found == {d.name: d.size for d in documents}
    if share in (0.1, 0.5) or count >= parts.MANY:
        assert train and held
    if count >= parts.MANY:
        assert not {p.document.name for p in train} & {p.document.name for p in held}
        if share in (0.1, 0.5):
            size = sum(p.document.size for p in held) / sum(d.size for d in documents)
            assert abs(size - share) < 0.05
        assert parts.divide(documents, share, seed=1)[1] == held


def test_held_out_documents_follow_the_seed_and_the_names_alone(tmp_path):
    def held(folder, seed):
        return [p.document.name for p in parts.divide(files.find(folder)[0], 0.2, seed)[1]]

    one, other = many(tmp_path / "one"), many(tmp_path / "two")
    assert held(one, 0) == held(other, 0)
    assert len({tuple(held(one, seed)) for seed in range(5)}) == 5


def test_one_large_document_is_not_held_out(tmp_path):
    folder = write(tmp_path, **{f"{i}_txt": "a few words" for i in range(20)}, large_txt="x" * 10000)
    for seed in range(10):
        train, held = parts.divide(files.find(folder)[0], 0.1, seed)
        assert "large.txt" in {p.document.name for p in train} and held


@pytest.mark.parametrize("name", ["bytes", "characters"])
def test_few_documents_hold_out_the_end_of_the_text(tmp_path, name):
    value = "".join(chr(97 + i % 26) for i in range(1003))
    corpus = load_corpus(DataConfig(files=write(tmp_path / "t", a_txt=value), tokenizer=name), tmp_path / "c")
    n = int(0.9 * len(value))
    assert corpus.train.bytes() == value[:n].encode() and corpus.held_out.bytes() == value[n:].encode()


@pytest.mark.parametrize("documents", [3, 30])
def test_every_tokenizer_sees_the_same_text(tmp_path, documents):
    folder = many(tmp_path / "t", documents)
    corpora = [
        load_corpus(DataConfig(files=folder, tokenizer=n, vocab_size=300 * (n == "bpe")), tmp_path / n)
        for n in TOKENIZERS
    ]
    for part in ("train", "held_out"):
        assert len({getattr(c, part).bytes() for c in corpora}) == 1
        for split in (getattr(c, part) for c in corpora):
            assert split.n_bytes == len(split.bytes()) == split.token_bytes[split.tokens].sum()
            split.bytes().decode()
    assert [c.train.tokens.dtype for c in corpora] == ["u1", "u1", "<u2"]


def test_tokens_take_the_bytes_they_need(tmp_path):
    value = "".join(map(chr, range(0x20000, 0x20000 + 70000)))
    corpus = load_corpus(DataConfig(files=write(tmp_path / "t", a_txt=value), tokenizer="characters"), tmp_path / "c")
    assert corpus.train.tokens.dtype == "<u4" and corpus.train.bytes() + corpus.held_out.bytes() == value.encode()


@every_tokenizer
def test_strange_bytes_and_line_ends_are_kept(tmp_path, name):
    value = b"one\r\ntwo\r\n\xff\xfe three \xe9\r\n" * 9
    folder = write(tmp_path / "t", a_txt=value)
    corpus = load_corpus(DataConfig(files=folder, tokenizer=name, held_out=0.25), tmp_path / "c")
    wanted = value if name == "bytes" else value.decode("utf-8", "replace").encode()
    assert corpus.train.bytes() + corpus.held_out.bytes() == wanted


@pytest.mark.parametrize("ending", ["\n", "\r\n", " ", "。\n", "\u3000\n", ""], ids=ascii)
@every_tokenizer
def test_the_size_of_what_is_read_at_once_changes_nothing(tmp_path, name, ending, monkeypatch):
    value = "".join(f"line {i} für 2 €{ending}" for i in range(300)).encode() + b"\xff\xe2\x82 end\n"
    config = DataConfig(files=write(tmp_path / "t", a_txt=value, b_txt="b" * 99), tokenizer=name)
    whole = load_corpus(config, tmp_path / "whole")
    monkeypatch.setattr(files, "BLOCK", 500)
    monkeypatch.setattr(parts, "TAIL", 100)
    pieces = load_corpus(config, tmp_path / "pieces")
    for part in ("train", "held_out"):
        one, other = getattr(whole, part), getattr(pieces, part)
        assert one.bytes() == other.bytes() and one.names == other.names
        if name != "bpe" or ending in ("\n", "\r\n", "。\n"):
            assert one.tokens.tolist() == other.tokens.tolist() and one.counts.tolist() == other.counts.tolist()
    tokens = load_text(config.files, whole.tokenizer).tokens
    assert name == "bpe" or len(tokens) == len(whole.train) + len(whole.held_out)


@pytest.mark.parametrize("name", ["bytes", "characters"])
def test_a_large_file_is_not_read_into_memory(tmp_path, name, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 1 << 14)
    large = tmp_path / "large.txt"
    large.write_bytes(b"a line of text\n" * (1 << 16))
    (tmp_path / "sparse.txt").touch()
    os.truncate(tmp_path / "sparse.txt", 1 << 28)
    config = DataConfig(files=str(large), tokenizer=name)
    tracemalloc.start()
    corpus = load_corpus(config, tmp_path / "c")
    with pytest.raises(ValueError, match="binary"):
        files.find(str(tmp_path / "sparse.txt"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < large.stat().st_size
    assert corpus.train.n_bytes + corpus.held_out.n_bytes == large.stat().st_size


def test_the_size_of_a_split_is_counted_in_little_memory():
    split = Split(np.zeros(1 << 24, np.uint8), np.array([1 << 24]), ("a",), Bytes())
    tracemalloc.start()
    assert split.n_bytes == 1 << 24
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()


PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("end", PACKERS)
def test_packed_files_are_read_as_what_they_hold(tmp_path, end):
    plain, rows = SAMPLE * 9, "".join(json.dumps({"text": f"row {i}\n", "n": i}) + "\n" for i in range(9))
    write(tmp_path, **{f"a_txt{end}": PACKERS[end](plain.encode()), f"b_jsonl{end}": PACKERS[end](rows.encode())})
    corpus = load_corpus(DataConfig(files=(f"{tmp_path}/a.txt{end}", f"{tmp_path}/b.jsonl{end}")), tmp_path / "c")
    held = corpus.held_out
    assert corpus.train.bytes() + held.bytes() == plain.encode() + b"".join(b"row %d\n" % i for i in range(9))


def test_every_row_of_a_table_is_a_document(tmp_path):
    texts = ["one", "", "zwei €", "x", "a\nb\n", "\ud800", "tail"]
    lines = [json.dumps({"text": t, "body": "B" + t}) for t in texts]
    root = write(tmp_path / "t", a_jsonl="\ufeff" + "\r\n".join([*lines[:3], "", *lines[3:]]))
    config = DataConfig(files=root, held_out=0.3)
    corpus = load_corpus(config, tmp_path / "c")
    # Rows with one byte predict nothing; no row is torn.
    assert corpus.train.bytes() + corpus.held_out.bytes() == "onezwei €a\nb\ntail".encode()
    assert corpus.train.counts.tolist() == [3, 8, 4] and corpus.held_out.counts.tolist() == [4]
    assert corpus.train.names == ("a.jsonl",) * 3 and open_corpus(tmp_path / "c").train.names == corpus.train.names
    assert TextBatches(corpus.train, 14, 1).batch(0).reset.sum() == 3
    other = load_corpus(replace(config, field="body"), tmp_path / "c")
    assert other.fingerprint != corpus.fingerprint and other.train.bytes().startswith("BoneBzwei €".encode())
    assert load_text(root, Bytes()).counts.tolist() == [3, 8, 4, 4]
    assert load_text(root, Bytes(), field="body").counts.tolist() == [4, 9, 2, 5, 2, 5]
    # The same letters with other borders are another text.
    write(tmp_path / "t", a_jsonl="\n".join(json.dumps({"text": t}) for t in ["onez", "wei €", "xa\nb\n", "?tail"]))
    assert load_corpus(config, tmp_path / "c").fingerprint != corpus.fingerprint


def test_a_prepared_corpus_is_reused_and_a_changed_one_made_anew(tmp_path):
    folder, cache = many(tmp_path / "t"), tmp_path / "run" / "data"
    config, seen = DataConfig(files=folder), []
    first = load_corpus(config, cache, progress=lambda done, total: seen.append((done, total)))
    size = first.train.n_bytes + first.held_out.n_bytes
    assert len(seen) == 31 and seen == sorted(seen) and (seen[0], seen[-1]) == ((0, size), (size, size))
    assert sorted(p.suffix for p in cache.iterdir()) == [".bin", ".json"]
    stamps = {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
    again = load_corpus(
        DataConfig(files=folder, context=9, batch_size=2), cache, progress=lambda *_: pytest.fail("anew")
    )
    assert {p.name: p.stat().st_mtime_ns for p in cache.iterdir()} == stamps
    assert again.fingerprint == first.fingerprint and again.train.bytes() == first.train.bytes()
    assert isinstance(again.train.tokens.base, np.memmap) or isinstance(again.train.tokens.base.base, np.memmap)
    for changed in (DataConfig(files=folder, seed=3), DataConfig(files=folder, held_out=0.3), config):
        before = load_corpus(changed, cache)
        assert len(list(cache.glob("*.bin"))) == 1
    stat = os.stat(f"{folder}/d0/0.txt")
    write(tmp_path / "t", d0__0_txt="document 0 SAYS: " + SAMPLE)
    os.utime(f"{folder}/d0/0.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = load_corpus(config, cache)
    assert after.fingerprint != before.fingerprint and b"SAYS" in after.train.bytes() + after.held_out.bytes()


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot ask whether a process lives")
def test_what_a_killed_preparation_left_goes_and_that_of_a_living_one_stays(tmp_path):
    folder, cache = many(tmp_path / "t"), tmp_path / "data"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (cache / f".tmp-{pid}").mkdir(parents=True)
        (cache / f".tmp-{pid}" / "tokens").write_bytes(b"x")
    load_corpus(DataConfig(files=folder), cache)
    assert [left.name for left in cache.glob(".tmp-*")] == [f".tmp-{os.getppid()}"]


def test_a_run_on_a_changed_corpus_is_refused(tmp_path):
    folder, cache = many(tmp_path / "t"), tmp_path / "c"
    config = DataConfig(files=folder)
    first = load_corpus(config, cache)
    assert load_corpus(config, cache, expect=first.fingerprint).train.bytes() == first.train.bytes()
    write(tmp_path / "t", d0__0_txt="changed", new_txt="new")
    os.remove(f"{folder}/d1/1.txt")
    told = r"changed since this run began \(new.txt is new, d0/0.txt is another, d1/1.txt is gone\): "
    with pytest.raises(ValueError, match=told):
        load_corpus(config, cache, expect=first.fingerprint)
    assert open_corpus(cache).fingerprint == first.fingerprint


@pytest.mark.parametrize("harm", ["flip", "short", "no tokens", "no header", "header", "version", "tokenizer", "key"])
def test_a_damaged_cache_is_refused_and_made_anew(tmp_path, harm):
    config, cache = DataConfig(files=many(tmp_path / "t")), tmp_path / "c"
    first = load_corpus(config, cache)
    whole = first.train.bytes()
    (tokens,) = cache.glob("*.bin")
    header = json.loads((cache / text.HEADER).read_text())
    data = bytearray(tokens.read_bytes())
    if harm == "flip":
        data[100] ^= 1
    tokens.unlink()
    if harm != "no tokens":
        tokens.write_bytes(data[:-1] if harm == "short" else data)
    foreign = {"version": {"version": 99}, "tokenizer": {"tokenizer": {"kind": "x"}}, "key": {"key": "../../t/d0/0"}}
    (cache / text.HEADER).write_text(json.dumps(header | foreign.get(harm, {})) if harm != "header" else "{")
    if harm == "no header":
        (cache / text.HEADER).unlink()
    with pytest.raises(ValueError, match="holds no corpus that can be read"):
        open_corpus(cache)
    assert load_corpus(config, cache).train.bytes() == whole == open_corpus(cache).train.bytes()


def test_a_prepared_corpus_opens_without_its_files(tmp_path):
    folder = many(tmp_path / "t")
    first = load_corpus(DataConfig(files=folder, tokenizer="characters"), tmp_path / "c")
    os.rename(folder, tmp_path / "elsewhere")
    again = open_corpus(tmp_path / "c")
    assert again.held_out.bytes() == first.held_out.bytes() and again.tokenizer.to_dict() == first.tokenizer.to_dict()
    assert again.held_out.names == first.held_out.names


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    config = DataConfig(files=many(tmp_path / "t"))
    monkeypatch.setattr(
        text.json, "dumps", lambda value, dumps=json.dumps: full() if "train" in value else dumps(value)
    )
    with pytest.raises(OSError, match=r"No space left on device.*data"):
        load_corpus(config, tmp_path / "run" / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t"]


def test_a_context_longer_than_the_text_is_cut_and_said(tmp_path):
    corpus = load_corpus(DataConfig(files=write(tmp_path / "t", a_txt="x" * 50)), tmp_path / "c")
    assert corpus.notes == ("a context of 256 is cut to 44, there are 45 tokens to train on",)
    assert TextBatches(corpus.train, 256, 3).batch(0).inputs.shape == (3, 44)


BAD_FILES = {
    "missing": ("nothing.txt", FileNotFoundError, "there is no file or folder .*nothing.txt"),
    "glob": ("*.rst", FileNotFoundError, "no file matches .*rst"),
    "empty": ("empty.txt", ValueError, "empty.txt is empty, wanted text"),
    "one byte": ("one.txt", ValueError, "one.txt is too short with 1 byte: "),
    "few bytes": ("few.txt", ValueError, "few.txt is too short with 10 bytes: "),
    "binary": ("data.bin", ValueError, r"data.bin is binary \(with NUL bytes\), wanted text"),
    "UTF-16": ("wide.txt", ValueError, "wide.txt is binary .*, wanted text; it seems in UTF-16; save it in UTF-8$"),
    "packed": (
        "packed.txt",
        ValueError,
        "packed.txt is binary .*; it seems packed by gzip; unpack it, or let .* end in .gz$",
    ),
    "packed by zstd": ("ok.zst", ValueError, "zst is binary .*, wanted text; it seems packed by zstd; unpack it$"),
    "parquet": ("ok.parquet", ValueError, "it seems a table of Parquet; write its rows to a .jsonl$"),
    "packed and cut short": ("short.gz", ValueError, "short.gz is damaged: Compressed file ended"),
    "gz in name alone": ("no.gz", ValueError, "no.gz is damaged: Not a gzipped file"),
    "bz2 in name alone": ("no.bz2", ValueError, "no.bz2 is damaged: Invalid data stream"),
    "xz in name alone": ("no.xz", ValueError, "no.xz is damaged: Input format not supported"),
    "packed binary": ("data.gz", ValueError, r"data.gz is binary \(with NUL bytes\), wanted text$"),
    "row that is not JSON": (
        "torn.jsonl",
        ValueError,
        "torn.jsonl, line 2, is not JSON .*; wanted an object with a field 'text'$",
    ),
    "row without the field": (
        "other.jsonl",
        ValueError,
        "line 1, has no field 'text', only 'body', 'n'; name the one with the text by --field or --data.field",
    ),
    "row that is a list": ("list.jsonl", ValueError, "list.jsonl, line 3, holds list, wanted an object"),
    "row with another thing": ("null.jsonl", ValueError, "null.jsonl, line 1, has 'text' of NoneType, wanted text$"),
    "rows without text": ("none.jsonl", ValueError, "none.jsonl is empty, wanted text"),
    "folder without files": ("hollow", ValueError, "hollow holds no text"),
    "folder without text": ("blobs", ValueError, r"blobs holds no text: 1 binary \(with NUL bytes\), 1 empty"),
    "glob without text": ("blobs/*", ValueError, "holds no text: "),
    "no file": ("pipe", ValueError, "pipe is neither a file nor a folder"),
    "too long a name": ("n" * 300, OSError, "name too long"),
}


def test_a_folder_passes_over_tables_of_other_things_and_says_so(tmp_path):
    rows, good = '{"loss": 1.5}\n{"loss": 1.25}\n', tmp_path / "t" / "good.jsonl"
    root = write(tmp_path / "t", a_txt="fine " * 9, log_jsonl=rows, more_jsonl=rows, good_jsonl='{"text": "x"}')
    documents, notes = files.find(root)
    assert [d.name for d in documents] == ["a.txt", "good.jsonl"]
    assert notes == ["passed over 2 tables without a field 'text'"]
    good.write_text('{"text": "x"}\n{"loss": 2}\n')
    for named in ([root], [f"{root}/a.txt", f"{root}/log.jsonl"], [f"{root}/*.jsonl"]):
        with pytest.raises(
            ValueError, match=r"jsonl, line [12], has no field 'text', only 'loss'; name the one with the text by"
        ):
            files.find(named)
    good.unlink()
    with pytest.raises(ValueError, match=r"log.jsonl, line 1, has no field"):
        files.find([root, f"{root}/log.jsonl"])
    (tmp_path / "t" / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"holds no text: 2 without a field 'text'$"):
        files.find(root)


@pytest.mark.parametrize(("source", "error", "sentence"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_in_a_sentence_and_nothing_is_written(tmp_path, source, error, sentence):
    root = write(
        tmp_path / "t", empty_txt="", one_txt="x", few_txt="ten bytes!", data_bin=b"\x7fELF\0\0", ok_txt="fine " * 99
    )
    write(tmp_path / "t", blobs__a=b"\0", blobs__b="", wide_txt="text".encode("utf-16"))
    packed = gzip.compress(b"fine " * 99)
    write(tmp_path / "t", packed_txt=packed, ok_zst=b"\x28\xb5\x2f\xfd\0", ok_parquet=b"PAR1\0", short_gz=packed[:-9])
    write(tmp_path / "t", no_gz="text", no_bz2="text", no_xz="text", data_gz=gzip.compress(b"\0"))
    write(tmp_path / "t", torn_jsonl='{"text": "a"}\n{"text": "b', other_jsonl='{"body": "a", "n": 1}')
    write(
        tmp_path / "t", list_jsonl='{"text": "a"}\n\n["a"]', null_jsonl='{"text": null}', none_jsonl='{"text": ""}\n\n'
    )
    (tmp_path / "t" / "hollow").mkdir()
    os.mkfifo(tmp_path / "t" / "pipe")
    for sources in ([f"{root}/{source}"], [f"{root}/ok.txt", f"{root}/{source}"]):
        if len(sources) == 2 and source in ("empty.txt", "one.txt", "few.txt", "none.jsonl"):
            continue
        with pytest.raises(error, match=f"(?i){sentence}") as told:
            load_corpus(DataConfig(files=sources), tmp_path / "run" / "data")
        assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


@every_tokenizer
@pytest.mark.parametrize("value", ["x", "xy", "xyz " * 4])
def test_too_little_text_is_refused_by_every_tokenizer(tmp_path, name, value):
    config = DataConfig(files=write(tmp_path / "t", a_txt=value), tokenizer=name, held_out=0.01)
    with pytest.raises(ValueError, match="is too short"):
        load_corpus(config, tmp_path / "run" / "data")
    assert not (tmp_path / "run").exists()


def test_only_empty_files_are_refused(tmp_path):
    root = write(tmp_path, a_txt="", b_txt="")
    with pytest.raises(ValueError, match="all 2 files are empty"):
        files.find([f"{root}/a.txt", f"{root}/b.txt"])


@every_tokenizer
def test_no_more_text_is_taken_than_asked_for(tmp_path, name, monkeypatch):
    root = write(tmp_path, a_txt=SAMPLE, b_txt=SAMPLE * 99, c_txt=SAMPLE)
    whole = load_text(root, FITTED[name])
    monkeypatch.setattr(files, "BLOCK", 500)
    some = load_text(root, FITTED[name], limit=1000)
    assert some.names == ("a.txt", "b.txt") and 1000 <= len(some) < 1600 < len(whole)
    assert some.head(1000).bytes() == whole.head(1000).bytes()


def test_text_for_a_tokenizer_that_stands(tmp_path):
    root = write(tmp_path, a_txt="abcab", b_txt="c", c_txt="ba\n", one__x_txt="x")
    split = load_text([f"{root}/*.txt"], Characters("abc\n"))
    assert split.names == ("a.txt", "c.txt") and split.bytes() == b"abcabba\n" and split.starts.tolist() == [0, 5]
    with pytest.raises(ValueError, match="'x'"):
        load_text([root], Characters("abc\n"))
    with pytest.raises(ValueError, match=r"x.txt has one token"):
        load_text([f"{root}/one"], Bytes())


@every_split
def test_the_head_of_a_split_is_its_beginning(split):
    whole = split.bytes()
    for size in range(len(whole) + 3):
        if size < 2:
            with pytest.raises(ValueError, match="too few"):
                split.head(size)
            continue
        head = split.head(size)
        assert (whole.startswith(head.bytes()) and size - 1 <= len(head.bytes())) or len(head) == len(split)
        assert (
            head.counts.sum() == len(head) <= size and (head.counts > 1).all() and len(head.names) == len(head.counts)
        )


def test_a_head_counts_bytes_and_not_tokens():
    split = split_of(SAMPLE, SAMPLE, name="characters")
    for size in (7, 40, 90, 150):
        assert size - 5 < len(split.head(size).bytes()) <= size


def test_xz_is_the_rate_of_xz():
    assert xz_bits_per_byte(hashlib.sha512(b"noise").digest() * 400) < 0.2
    assert 8 < xz_bits_per_byte(bytes(np.random.default_rng(0).integers(0, 256, 9999, np.uint8))) < 8.2
    with pytest.raises(ValueError, match="no text"):
        xz_bits_per_byte(b"")


# Batches

PINNED = ["hx8NV", "F0pog", "Z7wER", "JEoUg"]


def predicted(split, batch):
    """How often each token follows each in what a batch predicts."""
    count = Counter()
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist()):
        count.update((a, b) for a, b in zip(inputs, targets) if b != -100)
    return count


def wanted(split):
    """All pairs (token, next token) inside the documents."""
    tokens = split.tokens.tolist()
    return Counter(p for s, e in zip(split.starts, split.ends) for p in zip(tokens[s : e - 1], tokens[s + 1 : e]))


def total(counters):
    return sum(counters, Counter())


@every_split
@pytest.mark.parametrize("context", [1, 3, 8, 1000])
@pytest.mark.parametrize("seed", [0, 7])
def test_an_epoch_predicts_every_token_once(split, context, seed):
    batches = TextBatches(split, context, batch_size=1, seed=seed)
    for epoch in range(3):
        steps = range(epoch * batches.windows, (epoch + 1) * batches.windows)
        assert total(predicted(split, batches.batch(s)) for s in steps) == wanted(split)


@pytest.mark.parametrize("context", [1, 4, 9, 1000])
def test_rows_are_the_text_in_a_row(context):
    split = SPLITS["many"]
    tokens, ring = split.tokens.tolist(), len(split) - 1
    assert len(set(tokens)) == len(tokens)
    batches = TextBatches(split, context, batch_size=5, seed=3)
    starts, lasts = set(split.starts.tolist()), set((split.ends - 1).tolist())
    for step in range(9):
        batch = batches.batch(step)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64 and batch.reset.dtype == torch.bool
        assert batch.inputs.shape == batch.targets.shape == batch.reset.shape == (5, batches.context)
        for inputs, targets, reset in zip(*(x.tolist() for x in batch)):
            places = [tokens.index(t) for t in inputs]
            assert places == [(places[0] + t) % ring for t in range(len(places))]
            assert reset == [p in starts for p in places]
            counted = [t != -100 for t in targets]
            known = [t == tokens[p + 1] for p, t, c in zip(places, targets, counted) if c]
            assert all(known) and not any(p in lasts for p, c in zip(places, counted) if c)
            # Without a target: the end of a document, or what is beyond the last window of the epoch.
            beyond = batches.windows * batches.context - ring
            if any(not c and p not in lasts for p, c in zip(places, counted)):
                assert beyond and not any(counted[-beyond:])
                assert all(p in lasts for p, c in zip(places[:-beyond], counted) if not c)


def test_a_batch_depends_on_nothing_but_seed_and_step():
    split = SPLITS["many"]
    steps = list(range(40))
    one, other = TextBatches(split, 6, 4, seed=5), TextBatches(split, 6, 4, seed=5)
    forward = [one.batch(s) for s in steps]
    backward = [other.batch(s) for s in reversed(steps)][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    strange = TextBatches(split, 6, 4, seed=6)
    assert any(not torch.equal(strange.batch(s).inputs, forward[s].inputs) for s in range(3))
    assert one.batch(10**12).inputs.shape == (4, 6)


def test_the_order_is_the_same_on_every_machine():
    batches = TextBatches(SPLITS["many"], 8, 5, seed=1)
    found = ["".join(map(chr, batches.batch(step).inputs[:, 0].tolist())) for step in range(4)]
    assert found == PINNED


def test_micro_batches_are_the_rows_of_one_large_batch():
    split = SPLITS["many"]
    large, small = TextBatches(split, 6, 12, seed=5), TextBatches(split, 6, 4, seed=5, accumulate=3)
    for step in range(5):
        parts = [small.batch(step, micro) for micro in range(3)]
        for i, whole in enumerate(large.batch(step)):
            assert torch.equal(torch.cat([p[i] for p in parts]), whole)
    with pytest.raises(ValueError, match="no batch 3 of step 0"):
        small.batch(0, 3)


@pytest.mark.parametrize("field", ["context", "batch_size", "accumulate"])
def test_batches_of_nothing_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} is 0, wanted at least 1"):
        TextBatches(SPLITS["one"], **{"context": 4, "batch_size": 2, field: 0})


@every_split
@pytest.mark.parametrize("way", [windows, text.documents], ids=["windows", "documents"])
@pytest.mark.parametrize(("context", "batch_size"), [(1, 1), (4, 3), (7, 100), (1000, 2)])
def test_an_evaluation_predicts_every_token_once(split, way, context, batch_size):
    batches = list(way(split, context, batch_size))
    assert total(predicted(split, b) for b in batches) == wanted(split)
    assert all(1 <= len(b.inputs) <= batch_size and b.inputs.shape[1] <= context for b in batches)
    assert all(len(b.inputs) == batch_size for b in batches[:-1])
    assert all((b.targets != -100).any() for b in batches) or way is windows


def test_windows_are_those_of_nanogpt():
    split = SPLITS["one"]
    tokens = torch.from_numpy(split.tokens.astype(np.int64))
    (batch,) = windows(split, 8, 100)
    for i in range((len(tokens) - 1) // 8):
        assert torch.equal(batch.inputs[i], tokens[8 * i : 8 * i + 8])
        assert torch.equal(batch.targets[i], tokens[8 * i + 1 : 8 * i + 9])
    assert batch.reset.nonzero().tolist() == [[0, 0]]
    assert batch.targets[-1].tolist() == [*tokens[73:].tolist(), *[-100] * 3]


@pytest.mark.parametrize(("batch_size", "most"), [(1, 1), (1, 4), (2, 2), (3, 1), (10, 1), (5, 2), (4, 100)])
def test_few_windows_are_spread_over_the_split(batch_size, most):
    split = SPLITS["one"]
    whole = torch.cat([b.inputs for b in windows(split, 8, 100)])
    batches = list(windows(split, 8, batch_size, most))
    asked = min(len(whole), most * batch_size)
    rows = [int((whole == row).all(1).nonzero()[0]) for b in batches for row in b.inputs]
    assert rows == [i * len(whole) // asked for i in range(asked)] and len(batches) == -(-asked // batch_size)


def test_rows_of_documents_stay_inside_one():
    split = SPLITS["many"]
    tokens = split.tokens.tolist()
    rows = []
    for batch in text.documents(split, 10, 3):
        for inputs, targets, reset in zip(*(x.tolist() for x in batch)):
            n = sum(t != -100 for t in targets)
            assert all(t == -100 for t in targets[n:]) and not any(reset[1:n])
            begin = tokens.index(inputs[0])
            assert inputs[:n] == tokens[begin : begin + n] and reset[0] == (begin in split.starts)
            rows.append((begin, n))
    assert sorted(rows) == [(0, 6), (7, 1), (9, 10), (19, 10), (29, 7), (37, 1), (39, 10), (49, 10), (59, 2)]
    assert [n for _, n in rows] == sorted((n for _, n in rows), reverse=True)


# Settings

BAD_SETTINGS = [
    ({"tokenizer": "byte"}, "unknown tokenizer 'byte', did you mean 'bytes'"),
    ({"tokenizer": "words"}, "unknown tokenizer 'words'; known: bytes, characters, bpe"),
    ({"tokenizer": ["bytes"]}, "unknown tokenizer"),
    ({"vocab_size": 512}, "vocab_size is 512; only a bpe takes one"),
    ({"tokenizer": "bpe", "vocab_size": 100}, "wanted at least 257"),
    ({"vocab_size": -1}, "vocab_size is -1, wanted a whole number of at least 0"),
    ({"context": 0}, "context is 0, wanted a whole number of at least 1"),
    ({"context": 2.5}, "context is 2.5"),
    ({"batch_size": True}, "batch_size is True"),
    ({"seed": -1}, "seed is -1"),
    ({"field": ""}, "field is '', wanted the name of the field"),
    ({"held_out": 0}, "held_out is 0, wanted a share of the text between 0 and 1"),
    ({"held_out": 1.0}, "held_out is 1.0"),
    ({"held_out": float("nan")}, "held_out is nan"),
    ({"held_out": "10%"}, "held_out is '10%'"),
    ({"files": ("a", "")}, "files has ''"),
    ({"files": (5,)}, "files has 5"),
]


@pytest.mark.parametrize(("values", "sentence"), BAD_SETTINGS)
def test_bad_settings_are_refused_in_a_sentence(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        DataConfig(**values)


def test_settings_take_one_file_and_lists():
    assert DataConfig(files="a").files == ("a",) and DataConfig(files=["a", "b"]).files == ("a", "b")
    assert DataConfig(files=Path("a")).files == ("a",) and DataConfig(files=[Path("a"), "b"]).files == ("a", "b")
