# SPDX-License-Identifier: Apache-2.0
"""Data preparation: what is written reads back exactly, and what is refused leaves nothing behind."""

import json
import math
import os
import resource
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from programs import run

from sparsek_megatron.data import corpus, encode
from sparsek_megatron.data.card import read_card, unigram_entropy
from sparsek_megatron.data.ordered import WorkerKilled, ordered_map
from sparsek_megatron.data.prepare import prepare
from sparsek_megatron.data.tokenizer import SentencePieceTokenizer


def flags(prepared, output: Path, *inputs: Path | str) -> list[str]:
    return ["--tokenizer-model", prepared.tokenizer, "--output-prefix", str(output / "d"), "--workers", "2",
            "--input", *map(str, inputs)]  # fmt: skip


def texts_of(prefix: Path, tokenizer: SentencePieceTokenizer) -> list[str]:
    dataset = IndexedDataset(str(prefix))
    documents = [dataset[i] for i in range(len(dataset))]
    assert all(ids[-1] == tokenizer.eod for ids in documents)
    return [tokenizer.detokenize(ids[:-1]) for ids in documents]


def test_folders_files_and_jsonl_read_back_exactly(prepared, tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"\tx\r\n  y\n")
    (folder / "sub" / "a.txt").write_text("ünï ▁code\n")
    (folder / ".hidden").write_text("never read")
    (folder / "empty.txt").write_text("")
    lines = [{"text": "first"}, {"text": "second\nline"}, {"text": ""}]
    (folder / "c.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    prepare(flags(prepared, tmp_path, folder))
    tokenizer = SentencePieceTokenizer.load(prepared.tokenizer)
    assert texts_of(tmp_path / "d", tokenizer) == ["\tx\r\n  y\n", "first", "second\nline", "ünï ▁code\n"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.bin", "d.idx", "d.json", "in"]


def test_each_json_key_gets_a_dataset(prepared, tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text('{"question": "why?", "answer": "because"}\n')
    prepare([*flags(prepared, tmp_path, path), "--json-keys", "question", "answer"])
    tokenizer = SentencePieceTokenizer.load(prepared.tokenizer)
    assert texts_of(tmp_path / "d_question", tokenizer) == ["why?"]
    assert texts_of(tmp_path / "d_answer", tokenizer) == ["because"]


def test_the_split_is_by_document_and_the_same_everywhere(prepared, tmp_path):
    names = {p.name for p in (prepared.folder / "texts").iterdir()}
    valid = {name for name in names if corpus.is_validation(name, 0.2)}
    assert 0 < len(valid) < len(names) / 2
    assert read_card(prepared.valid).documents == len(valid)
    assert read_card(prepared.train).documents == len(names) - len(valid)


def test_the_card_holds_the_entropy_of_the_tokens(prepared):
    dataset = IndexedDataset(prepared.valid)
    counts = np.bincount(np.concatenate([dataset[i] for i in range(len(dataset))]))
    p = [c / counts.sum() for c in counts.tolist() if c]
    card = read_card(prepared.valid)
    assert card.unigram_entropy == pytest.approx(-math.fsum(x * math.log(x) for x in p), abs=1e-12)
    assert card.tokens == counts.sum()
    assert unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))


def test_the_standard_library_is_a_corpus():
    sources = corpus.stdlib_sources()
    assert len(sources) > 300 and all(s.path.is_file() for s in sources)
    assert not any("test" in s.name.split("/") for s in sources)
    sum(len(corpus.read_text(s)) for s in sources)


BAD_INPUTS = {
    "missing": (None, "no such file or folder"),
    "empty.txt": (b"", "no non-empty file"),
    "latin.txt": ("caf\xe9 au lait".encode("latin-1"), r"latin.txt: not UTF-8 at byte 3"),
    "parse.jsonl": (b'{"text": "fine"}\n{"text": \n', "parse.jsonl, line 2: not valid JSON"),
    "key.jsonl": (b'{"text": "fine"}\n\n{"body": "x"}\n', "key.jsonl, line 3: no key 'text' (found: body)"),
    "list.jsonl": (b"[1]\n", "list.jsonl, line 1: no key 'text' (found: a list, not an object)"),
    "type.jsonl": (b'{"text": 3}\n', "type.jsonl, line 1: key 'text' holds int"),
    "bytes.jsonl": (b'{"text": "fine"}\n{"text": "\xff"}\n', "bytes.jsonl, line 2: not UTF-8"),
    "digits.jsonl": (b'{"text": "a", "n": %s}\n' % (b"9" * 5000), "digits.jsonl, line 1: not valid JSON"),
    "deep.jsonl": (b"[" * 200_000, "deep.jsonl, line 1: not valid JSON"),
    "half.jsonl": (
        rb'{"text": "\ud83d\ude42"}' + b"\n" + rb'{"text": "ab\ud83d"}',
        r"half.jsonl, line 2: key 'text' holds half of a surrogate pair ('\ud83d')",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_names_file_and_line_and_leaves_nothing(prepared, refused, tmp_path, name):
    content, said = BAD_INPUTS[name]
    source, out = tmp_path / name, tmp_path / "out"
    if content is not None:
        source.write_bytes(content)
    given = flags(prepared, out, source)
    assert said in refused(prepare, given)
    own = ["--train-tokenizer", "--vocab-size", "290", "--tokenizer-model", str(out / "t.model")]
    message = refused(prepare, [*given, *own])
    assert message.startswith("error: --input") and said in message
    assert not out.exists() or list(out.iterdir()) == []


def test_bad_flags_are_refused(prepared, refused, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("hello " * 50)
    given = flags(prepared, tmp_path / "out", text)
    assert "did you mean --output-prefix?" in refused(prepare, [*given, "--output-prefx", "x"])
    assert "not allowed with" in refused(prepare, [*given, "--python-stdlib"])
    assert "--train-tokenizer needs --vocab-size" in refused(prepare, [*given, "--train-tokenizer"])
    assert "only with --train-tokenizer" in refused(prepare, [*given, "--vocab-size", "300"])
    assert "at least 0 and below 1" in refused(prepare, [*given, "--validation-fraction", "1.5"])
    assert "no document for the valid split" in refused(prepare, [*given, "--validation-fraction", "1e-9"])
    assert "no .jsonl file" in refused(prepare, [*given, "--json-keys", "body"])
    own = ["--input", str(text), "--output-prefix", str(tmp_path / "out/d"), "--tokenizer-model",
           str(tmp_path / "out/t.model"), "--train-tokenizer", "--vocab-size"]  # fmt: skip
    assert "larger than the corpus can support" in refused(prepare, [*own, "30000"])
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_existing_output_is_kept_unless_told(prepared, refused, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("hello")
    given = flags(prepared, tmp_path, text)
    prepare(given)
    before = (tmp_path / "d.bin").read_bytes()
    text.write_text("another text")
    assert "pass --overwrite" in refused(prepare, given)
    assert (tmp_path / "d.bin").read_bytes() == before
    prepare([*given, "--overwrite"])
    assert (tmp_path / "d.bin").read_bytes() != before


def test_an_unwritable_folder_is_refused(prepared, refused, tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "file").write_text("in the way")
    given = flags(prepared, tmp_path / "file" / "below", tmp_path / "a.txt")
    assert "cannot write there" in refused(prepare, given)


def test_a_full_disk_is_one_line_and_nothing_half_written(prepared, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("all work and no play\n" * 20_000)
    out = tmp_path / "out"

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    said = run("prepare_data.py", *flags(prepared, out, text), code=2, preexec_fn=small_disk)
    assert said.startswith("error: cannot write") and said.count("\n") == 1, said
    assert list(out.iterdir()) == []


@pytest.mark.timeout(60, func_only=True)
def test_a_tokenizing_process_that_is_killed_is_one_line_and_nothing_is_written(
    prepared, refused, tmp_path, monkeypatch
):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(100)))
    tokenize = SentencePieceTokenizer.tokenize

    def killed_at_50(self, text: str) -> list[int]:
        if text == "text 50":
            os.kill(os.getpid(), signal.SIGKILL)
        return tokenize(self, text)

    monkeypatch.setattr(SentencePieceTokenizer, "tokenize", killed_at_50)
    said = refused(prepare, flags(prepared, tmp_path / "out", tmp_path / "in.jsonl"))
    assert "--workers 2: a tokenizing process was killed (by signal 9)" in said and "fewer --workers" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_results_of_several_processes_come_in_order_and_few_items_are_taken_ahead():
    taken = []

    def slow_at_the_start(item: int) -> int:
        time.sleep(0.02 if item < 16 else 0)
        return item * item

    items = (taken.append(i) or i for i in range(1000))
    results = ordered_map(lambda: slow_at_the_start, items, processes=3)
    assert next(results) == 0 and len(taken) <= 16 * 4 * 3
    assert [0, *results] == [i * i for i in range(1000)] and len(taken) == 1000
    assert list(ordered_map(lambda: str, [], processes=2)) == []


@pytest.mark.parametrize("within_a_result", [False, True])
@pytest.mark.timeout(60, func_only=True)
def test_a_killed_process_is_noticed_wherever_it_was(within_a_result):
    def killed(item: int) -> bytes:
        if item == 16 and within_a_result:
            time.sleep(0.2)  # until the other process's results are read, and so none of this one's for a while
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return bytes(10_000_000)
        if item == 16:
            os.kill(os.getpid(), signal.SIGKILL)
        return b""

    results = ordered_map(lambda: killed, range(200), processes=2)
    with pytest.raises(WorkerKilled, match="signal 9"):
        for _ in results:
            time.sleep(0.05)


def test_a_defect_in_a_process_is_no_lack_of_memory(capfd):
    with pytest.raises(RuntimeError, match="traceback is above"):
        list(ordered_map(lambda: int, ["1", "x"], processes=1))
    assert "invalid literal" in capfd.readouterr().err


def test_overwriting_that_is_cut_short_leaves_no_index_of_other_data(prepared, tmp_path, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text("hello")
    given = flags(prepared, tmp_path, text)
    prepare(given)
    text.write_text("another text")
    publish, published = encode.publish, []

    def cut_short(partial: Path, final: Path) -> None:
        if published:
            raise KeyboardInterrupt
        publish(partial, final)
        published.append(final.name)

    monkeypatch.setattr(encode, "publish", cut_short)
    with pytest.raises(KeyboardInterrupt):
        prepare([*given, "--overwrite"])
    assert published == ["d.bin"] and not (tmp_path / "d.idx").exists()
