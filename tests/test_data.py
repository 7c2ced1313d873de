"""Tokenizers, corpora, streams: nothing comes twice in an epoch, nothing held out is trained on."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import SpecError, StorageError
from shoal.training.data.corpus import Corpus, is_held_out, open_corpus
from shoal.training.data.permutation import Permutation
from shoal.training.data.sources import PIECE_BYTES, _character_end, standard_library
from shoal.training.data.stream import Stream, held_out
from shoal.training.data.tokenizer import ByteTokenizer, load_tokenizer
from shoal.training.spec import DataSection, RunSpec

pyarrow: Any = importlib.import_module("pyarrow")  # it has no types
parquet: Any = importlib.import_module("pyarrow.parquet")

SEQUENCE = 16
END = ByteTokenizer.end_of_document


def spec(source: str, *paths: Path | str, fraction: float = 0.1, **data: object) -> RunSpec:
    section = {"source": source, "paths": tuple(map(str, paths)), "held_out_fraction": fraction, **data}
    return RunSpec.model_validate({"data": section, "model": {"sequence": SEQUENCE}})


def corpus_of(run: RunSpec, tmp_path: Path) -> Corpus:
    return open_corpus(run, load_tokenizer(run.data), tmp_path / "cache")


def documents(tokens: np.ndarray, end: int = END) -> list[bytes]:
    """What lies between ends of documents, as bytes."""
    text = tokens.tolist()
    assert text[-1] == end
    ends = [at for at, token in enumerate(text) if token == end]
    starts = [0, *(at + 1 for at in ends)]
    return [bytes(text[start:at]) for start, at in zip(starts, ends, strict=False)]


def lines(count: int, width: int = 60) -> list[str]:
    return [f"{number:06d} " + chr(97 + number % 26) * width for number in range(count)]


def plain(length: int) -> Corpus:
    """A corpus whose tokens are their own positions."""
    return Corpus(np.arange(length, dtype=np.uint32), np.arange(length, dtype=np.uint32))


# Tokenizers


@given(st.text())
def test_bytes_come_back_as_the_text_they_were(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.encode(errors="replace").decode()
    assert ids.size == 0 or ids.max() < tokenizer.end_of_document < tokenizer.vocabulary


def test_bytes_that_are_no_text_and_ends_of_documents_decode_to_something() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(b"a\xff\x00").tolist() == [97, 255, 0]
    assert tokenizer.decode([72, 105, END, 33, 0xC3, 900]) == "Hi!\ufffd"


def tokenizer_file(path: Path, special: Sequence[str] = ("<|endoftext|>",)) -> Path:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["the cat sat on the mat, the dog ate the cat"], trainer)
    model.enable_truncation(4)
    model.save(str(path))
    return path


def test_a_tokenizer_file_encodes_whole_texts_and_gives_them_back(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json")
    digest = blake3(path.read_bytes()).hexdigest()
    tokenizer = load_tokenizer(DataSection(tokenizer=str(path), tokenizer_blake3=digest, vocabulary=320))
    text = "the cat — ate the <|endoftext|> of the mat"
    ids = tokenizer.encode(text)
    assert len(ids) > 4
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode([*ids, tokenizer.end_of_document]) == text
    assert tokenizer.decode(tokenizer.encode(b"mat \xff")) == "mat \ufffd"
    assert tokenizer.decode(tokenizer.encode("mat \ud800")) == "mat ?"
    assert tokenizer.vocabulary <= 320


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vocabulary": 200}, r"vocabulary = 200: set it to \d+ or more"),
        ({"tokenizer_blake3": "0" * 64}, "take the owner's tokenizer"),
        ({"end_of_document": "<stop>"}, "has no token <stop>"),
        ({"tokenizer": "/nowhere/tokenizer.json"}, "cannot be read"),
        ({"tokenizer": "/dev/zero"}, "is no file"),
        ({"tokenizer": "~nobody-is-called-so/tokenizer.json"}, "home directory"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_spec_is_refused(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json", ["<|endoftext|>", "<extra>"])
    with pytest.raises(SpecError, match=reason):
        load_tokenizer(DataSection.model_validate({"tokenizer": str(path), "vocabulary": 512, **change}))


def test_a_tokenizer_file_without_an_end_of_document_or_sense_is_refused(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json", ["<fin>"])
    with pytest.raises(SpecError, match=r"data\.end_of_document"):
        load_tokenizer(DataSection(tokenizer=str(path), vocabulary=512))
    assert load_tokenizer(DataSection(tokenizer=str(path), vocabulary=512, end_of_document="<fin>"))
    path.write_text('{"version": "1.0"}')
    with pytest.raises(SpecError, match="is not a tokenizer"):
        load_tokenizer(DataSection(tokenizer=str(path), vocabulary=512))


# Corpora


def test_the_standard_library_is_a_corpus(tmp_path: Path) -> None:
    corpus = corpus_of(spec("standard-library", fraction=0.02), tmp_path)
    assert len(corpus.training) > 1_000_000
    assert 0.005 < len(corpus.held_out) / len(corpus.training) < 0.05
    assert b"import" in documents(corpus.held_out)[0] + documents(corpus.training)[0]


def test_the_standard_library_leaves_out_tests_and_packages(tmp_path: Path) -> None:
    for name in ("b.py", "a/c.py", "a/test/d.py", "site-packages/e.py", "a/__pycache__/f.py", "a/readme.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    source = standard_library(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in source.files] == ["a/c.py", "b.py"]
    (piece,) = source.read(source.files[0])
    assert (piece.text, piece.key, piece.last) == (b"a/c.py", b"a/c.py", True)
    with pytest.raises(SpecError, match="no Python sources"):
        standard_library(tmp_path / "nowhere")


def test_documents_are_joined_by_end_of_document_and_each_is_on_one_side(tmp_path: Path) -> None:
    texts = [f"{number}: " + "x" * (number % 50) for number in range(400)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": text, "other": 1}) for text in [*texts, *texts[:50]]))
    corpus = corpus_of(spec("jsonl", path), tmp_path)
    training, held = documents(corpus.training), documents(corpus.held_out)
    assert sorted(training + held) == sorted(text.encode() for text in [*texts, *texts[:50]])
    assert not set(training) & set(held)
    assert 10 < len(held) < 100


def test_what_is_held_out_does_not_depend_on_the_other_documents(tmp_path: Path) -> None:
    texts = [f"{number}: {'y' * 40}" for number in range(300)]
    for name, part in (("a.jsonl", texts[:200]), ("b.jsonl", texts[100:][::-1])):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    one, other = (corpus_of(spec("jsonl", tmp_path / name), tmp_path) for name in ("a.jsonl", "b.jsonl"))
    assert not set(documents(one.held_out)) & set(documents(other.training))
    assert set(documents(one.held_out)) & set(documents(other.held_out))


@pytest.mark.parametrize("ending", [b"\n", b"", b"\n\xff\xfe no character \xc3"])
def test_a_text_file_is_cut_at_lines_and_no_byte_is_lost(ending: bytes, tmp_path: Path) -> None:
    text = "\n".join(lines(3000)).encode() + ending
    (tmp_path / "a.txt").write_bytes(text)
    corpus = corpus_of(spec("text", tmp_path / "a.txt"), tmp_path)
    pieces = documents(corpus.training) + documents(corpus.held_out)
    assert sum(map(len, pieces)) == len(text)
    in_order = b"".join(sorted(pieces, key=text.index))
    assert in_order == text
    assert all(piece[:6].isdigit() for piece in pieces)  # each begins with a line
    assert PIECE_BYTES // 2 < len(corpus.held_out) < len(text) / 2


@given(st.text(alphabet="aé€😀", min_size=12, max_size=24))
def test_text_without_lines_is_cut_between_characters(text: str) -> None:
    """Only the last characters matter: of thousands, Hypothesis at times could not draw enough examples."""
    data = text.encode()
    for end in range(len(data) - 8, len(data) + 1):
        cut = data[: _character_end(data[:end])]
        assert end - len(cut) < 4
        cut.decode()


def test_files_are_found_by_name_and_glob_once_each_in_a_fixed_order(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "[odd].txt"):
        (tmp_path / name).write_text(name * 200)
    run = spec("text", tmp_path / "a.txt", tmp_path / "**" / "*.txt", tmp_path / "[odd].txt", fraction=0.3)
    corpus = corpus_of(run, tmp_path)
    found = documents(corpus.training) + documents(corpus.held_out)
    assert sorted(text[:5] for text in found) == [b"[odd]", b"a.txt", b"b.txt", b"deep/"]
    again = open_corpus(run, ByteTokenizer(), tmp_path / "other-cache")
    assert np.array_equal(again.training, corpus.training)


def test_parquet_is_read_column_by_column(tmp_path: Path) -> None:
    texts = [f"row {number} — {'z' * 30}" for number in range(1000)]
    table = pyarrow.table({"body": [*texts, None, ""], "label": list(range(1002))})
    parquet.write_table(table, tmp_path / "data.parquet", row_group_size=300)
    corpus = corpus_of(spec("parquet", tmp_path / "*.parquet", text_field="body"), tmp_path)
    found = documents(corpus.training) + documents(corpus.held_out)
    assert sorted(found) == sorted(text.encode() for text in texts)


def test_a_tokenizer_file_tokenizes_a_corpus(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 2000)
    run = spec("text", tmp_path / "a.txt", tokenizer=str(path), vocabulary=320)
    tokenizer = load_tokenizer(run.data)
    corpus = corpus_of(run, tmp_path)
    assert len(corpus.training) < 2000 * 15
    assert tokenizer.decode(corpus.training[:40]).startswith("the cat sat on the mat\n")


BAD_DATA: list[tuple[str, str, dict[str, Any], str]] = [
    ("jsonl", '{"text": "fine"}\n{"body": 3}\n', {}, r"a\.data:2: no field 'text' \(it has: body\)"),
    ("jsonl", '{"text": "fine"}\n\n{"text": 3}\n', {}, r"a\.data:3: 'text' is int, not text"),
    ("jsonl", '{"text": "fine"}\n[1]\n', {}, r"a\.data:2: no field 'text' \(it is no object\)"),
    ("jsonl", '{"text": \n', {}, r"a\.data:1: not JSON"),
    ("jsonl", "[" * 100_000, {}, r"a\.data:1: not JSON"),
    ("parquet", "not parquet at all", {}, r"a\.data is not a Parquet file"),
    ("text", "", {}, "the corpus is too small: 0 tokens"),
    ("text", "short", {}, "the corpus is too small"),
]


@pytest.mark.parametrize(("source", "text", "data", "reason"), BAD_DATA)
def test_bad_data_is_named_by_file_and_line(
    source: str, text: str, data: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "a.data").write_text(text)
    with pytest.raises(SpecError, match=reason):
        corpus_of(spec(source, tmp_path / "a.data", **data), tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_parquet_column_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [1, 2], "body": ["a", "b"]}), path)
    with pytest.raises(SpecError, match=r"no column 'txet' \(it has: text, body"):
        corpus_of(spec("parquet", path, text_field="txet"), tmp_path)
    with pytest.raises(SpecError, match=r"a\.parquet: row 1: 'text' is int"):
        corpus_of(spec("parquet", path), tmp_path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SpecError, match=r"pip install 'shoal\[parquet\]'"):
        corpus_of(spec("parquet", tmp_path / "a.parquet"), tmp_path)


def test_a_pattern_without_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("there")
    with pytest.raises(SpecError, match=r"no file matches '.*\*\.text'"):
        corpus_of(spec("text", tmp_path / "a.txt", tmp_path / "*.text"), tmp_path)


def test_a_small_corpus_holds_out_more_than_asked_so_that_both_sides_have_a_sample(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(lines(600)))
    corpus = corpus_of(spec("text", tmp_path / "a.txt", fraction=0.0001), tmp_path)
    assert len(corpus.held_out) > SEQUENCE
    assert len(corpus.training) > SEQUENCE


def test_tokens_are_made_once_and_again_when_a_file_or_setting_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines(2000)))
    run = spec("text", path)
    told: list[tuple[int, int]] = []

    def open_it(run: RunSpec) -> Corpus:
        told.clear()
        return open_corpus(
            run, ByteTokenizer(), tmp_path / "cache", lambda done, all_: told.append((done, all_))
        )

    first = open_it(run)
    assert told[-1] == (path.stat().st_size, path.stat().st_size)
    assert np.array_equal(open_it(run).training, first.training)
    assert told == []
    open_it(spec("text", path, fraction=0.3))
    assert told
    path.write_text("\n".join(lines(2500)))
    assert len(open_it(run).training) > len(first.training)
    assert first.training[0] == 48  # the old tokens stay readable


@pytest.mark.parametrize("damage", ["short", "missing", "nonsense"])
def test_a_damaged_cache_is_built_again(damage: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(lines(2000)))
    run = spec("text", tmp_path / "a.txt")
    good = np.array(corpus_of(run, tmp_path).training)
    (folder,) = (tmp_path / "cache").iterdir()
    if damage == "short":
        (folder / "training.tokens").write_bytes(b"\0" * 10)
    elif damage == "missing":
        (folder / "corpus.json").unlink()
    else:
        (folder / "corpus.json").write_text('{"dtype": 3}')
    assert np.array_equal(corpus_of(run, tmp_path).training, good)


def test_peers_of_one_machine_may_build_the_same_corpus_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(lines(5000)))
    run = spec("text", tmp_path / "a.txt")
    together = threading.Barrier(4)
    lengths: list[int] = []

    def peer() -> None:
        together.wait()
        lengths.append(len(corpus_of(run, tmp_path).training))

    threads = [threading.Thread(target=peer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lengths) == 4
    assert len(set(lengths)) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_building_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(lines(40_000)))

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert 0 < done < total
        raise StoppedError

    with pytest.raises(StoppedError):
        open_corpus(spec("text", tmp_path / "a.txt"), ByteTokenizer(), tmp_path / "cache", stop)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(lines(2000)))
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(StorageError, match="cache"):
        corpus_of(spec("text", tmp_path / "a.txt"), tmp_path)


# Streams


@given(st.integers(1, 400), st.binary(max_size=8))
def test_a_permutation_names_every_number_once(size: int, key: bytes) -> None:
    order = Permutation(size, key)
    assert sorted(order[index] for index in range(size)) == list(range(size))


def test_a_permutation_of_many_is_spread_and_differs_by_key() -> None:
    size = 1_000_003
    one, other = Permutation(size, b"one"), Permutation(size, b"other")
    first = [one[index] for index in range(2000)]
    assert len(set(first)) == 2000
    assert abs(np.mean(first) / size - 0.5) < 0.03  # five standard errors
    assert sum(index == other[index] for index in range(2000)) < 5
    assert len(set(first) & {other[index] for index in range(2000)}) < 20
    steps = np.diff(first)
    assert np.unique(steps).size > 1990


def test_permutations_are_the_same_on_every_machine() -> None:
    order = Permutation(1000, b"frozen")
    assert [order[index] for index in range(8)] == [818, 563, 666, 363, 986, 991, 672, 985]


@given(st.integers(20, 300), st.integers(0, 2**64 - 1), st.integers(1, 7))
def test_an_epoch_holds_every_sample_once_whatever_the_batch(length: int, stream_id: int, batch: int) -> None:
    stream = Stream(plain(length), 1, stream_id, 4, batch)
    samples = stream.epoch_samples
    rows: list[list[int]] = []
    while len(rows) < 2 * samples:
        rows += stream.next().tokens.tolist()
    for epoch in (rows[:samples], rows[samples : 2 * samples]):
        assert sorted(row[0] for row in epoch) == [4 * sample for sample in range(samples)]
    assert all(row == list(range(row[0], row[0] + 5)) for row in rows)
    assert samples == (length - 1) // 4


def test_streams_epochs_and_seeds_have_different_orders() -> None:
    corpus = plain(4001)

    def order(seed: int, stream_id: int, epoch: int = 0) -> tuple[int, ...]:
        stream = Stream(corpus, seed, stream_id, 4, 1000)
        stream.resume(1000 * epoch)
        return tuple(stream.next().tokens[:, 0])

    assert len({order(1, 0), order(1, 1), order(2, 0), order(1, 0, 1), order(12, 0), order(1, 20)}) == 6
    assert order(1, 0) == order(1, 0)


@given(st.integers(0, 500), st.integers(1, 5))
def test_another_driver_goes_on_where_one_died(position: int, batches: int) -> None:
    corpus = plain(200)
    one, other = (Stream(corpus, 1, 7, 4, 3) for _ in range(2))
    one.resume(position)
    for _ in range(batches):
        one.next()
    stream_id, at = one.state()
    assert (stream_id, at) == (7, position + 3 * batches)
    other.resume(at)
    expected, got = one.next(), other.next()
    assert np.array_equal(expected.tokens, got.tokens)
    assert got.position == at


def test_batches_are_what_the_model_takes() -> None:
    batch = Stream(plain(100), 1, 0, 8, 3).next()
    assert batch.tokens.shape == (3, 9)
    assert batch.tokens.dtype == np.int64
    assert batch.tokens.flags.writeable


def test_held_out_batches_are_spread_over_the_part_and_the_same_for_all() -> None:
    batches = held_out(plain(1000), 4, 5, 2)
    starts = np.concatenate([batch.tokens[:, 0] for batch in batches])
    assert [batch.tokens.shape for batch in batches] == [(5, 5), (5, 5)]
    assert starts[0] == 0
    assert starts[-1] > 850
    assert np.unique(starts).size == 10
    for one, other in zip(batches, held_out(plain(1000), 4, 5, 2), strict=True):
        assert np.array_equal(one.tokens, other.tokens)


def test_a_small_held_out_part_is_used_whole_and_once() -> None:
    batches = held_out(plain(30), 4, 5, 10)
    assert [len(batch.tokens) for batch in batches] == [5, 2]


def test_a_corpus_without_a_sample_is_refused() -> None:
    with pytest.raises(SpecError, match="4 tokens hold no sequence of 4"):
        Stream(plain(4), 1, 0, 4, 2)
    with pytest.raises(SpecError, match="hold no sequence"):
        held_out(plain(4), 4, 1, 1)


def test_about_the_asked_share_is_held_out() -> None:
    share = np.mean([is_held_out(str(number).encode(), 0.1) for number in range(5000)])
    assert 0.08 < share < 0.12
    assert not is_held_out(b"x", 0.0)
    assert is_held_out(b"x", 1.0)
