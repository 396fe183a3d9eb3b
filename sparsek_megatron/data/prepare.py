# SPDX-License-Identifier: Apache-2.0
"""The data preparation program: corpus -> tokenizer -> Megatron dataset files. See `examples/prepare_data.py`."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from sparsek_megatron.data import corpus
from sparsek_megatron.data.encode import DatasetCard, DatasetWriter, encode_documents, existing_files
from sparsek_megatron.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from sparsek_megatron.errors import UserError
from sparsek_megatron.files import require_free_space, require_writable_folder
from sparsek_megatron.flags import FlagParser


def build_parser() -> FlagParser:
    """Flags of the program, with the names of Megatron's `preprocess_data.py` where it has them."""
    parser = FlagParser(description="Tokenize text into Megatron IndexedDataset files.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="text files, .jsonl files, folders of either")
    source.add_argument("--python-stdlib", action="store_true", help="the sources of this Python's standard library")
    parser.add_argument("--include", default="*", metavar="GLOB", help="files to take from folders, e.g. '*.py'")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys of .jsonl lines; one dataset for each")
    parser.add_argument("--output-prefix", required=True, help="path and name that the dataset's files start with")
    parser.add_argument("--tokenizer-model", required=True, help="SentencePiece model to use, or to write")
    parser.add_argument("--train-tokenizer", action="store_true", help="train the tokenizer on this corpus first")
    parser.add_argument("--vocab-size", type=int, help="vocabulary of the tokenizer to train")
    parser.add_argument(
        "--validation-fraction", type=float, default=0.0,
        help="part of the documents that goes to a _valid dataset, chosen by a hash of the document's name",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="tokenizing processes")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    return parser


def prepare(argv: Sequence[str] | None = None) -> None:
    """Run the program with the given command line.

    Raises:
        UserError: for each thing that the user can fix.
    """
    args = build_parser().parse_args(argv)
    _check(args)
    sources = corpus.stdlib_sources() if args.python_stdlib else corpus.find_sources(args.input, include=args.include)
    size = sum(s.path.stat().st_size for s in sources)
    prefix = Path(args.output_prefix)
    require_writable_folder(prefix.parent, "--output-prefix")
    require_free_space(prefix.parent, 2 * size, "--output-prefix")
    splits = ["train", "valid"] if args.validation_fraction else [None]
    has_jsonl = any(s.is_jsonl for s in sources)
    if args.json_keys != ["text"] and not has_jsonl:
        raise UserError(f"--json-keys {' '.join(args.json_keys)}: there is no .jsonl file in the input; leave it out")
    prefixes = {
        (key, split): "_".join(filter(None, [str(prefix), key if len(args.json_keys) > 1 else None, split]))
        for key in args.json_keys
        for split in splits
    }
    _refuse_overwrite(args, [*prefixes.values()])
    tokenizer = _tokenizer(args, sources)
    for key in args.json_keys:
        _write(args, sources, size, key, {split: prefixes[key, split] for split in splits}, tokenizer)


def _check(args: argparse.Namespace) -> None:
    if args.train_tokenizer and args.vocab_size is None:
        raise UserError("--train-tokenizer needs --vocab-size, e.g. --vocab-size 32000")
    if args.vocab_size is not None and not args.train_tokenizer:
        raise UserError(f"--vocab-size {args.vocab_size}: only with --train-tokenizer; the model has its own size")
    if not 0 <= args.validation_fraction < 1:
        raise UserError(f"--validation-fraction {args.validation_fraction}: must be at least 0 and below 1")
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")


def _refuse_overwrite(args: argparse.Namespace, prefixes: list[str]) -> None:
    if args.overwrite:
        return
    existing = [path for prefix in prefixes for path in existing_files(prefix)]
    if args.train_tokenizer and os.path.exists(args.tokenizer_model):
        existing.append(args.tokenizer_model)
    if existing:
        raise UserError(f"--output-prefix {args.output_prefix}: {existing[0]} exists; pass --overwrite to replace it")


def _tokenizer(args: argparse.Namespace, sources: list[corpus.Source]) -> SentencePieceTokenizer:
    path = Path(args.tokenizer_model)
    if not args.train_tokenizer:
        return SentencePieceTokenizer.load(path)
    require_writable_folder(path.parent, "--tokenizer-model")
    print(f"training a tokenizer of {args.vocab_size} tokens on {len(sources)} files", flush=True)
    texts = (
        document.text
        for key in args.json_keys
        for document in corpus.read_documents(sources, json_key=key)
        if not corpus.is_validation(document.name, args.validation_fraction)
    )
    return train_tokenizer(texts, vocab_size=args.vocab_size, path=path, threads=args.workers)


def _write(
    args: argparse.Namespace,
    sources: list[corpus.Source],
    size: int,
    key: str,
    prefixes: dict[str | None, str],
    tokenizer: SentencePieceTokenizer,
) -> None:
    model = Path(args.tokenizer_model).read_bytes()
    documents = corpus.read_documents(sources, json_key=key)
    writers: dict[str | None, DatasetWriter] = {}
    try:
        for split, prefix in prefixes.items():
            writers[split] = DatasetWriter(prefix, tokenizer)
        for name, ids in encode_documents(documents, model, workers=args.workers, total_bytes=size, label="tokenizing"):
            if args.validation_fraction:
                writers["valid" if corpus.is_validation(name, args.validation_fraction) else "train"].add(ids)
            else:
                writers[None].add(ids)
        for split, writer in writers.items():
            if writer.documents == 0:
                raise UserError(
                    f"--validation-fraction {args.validation_fraction}: no document for the {split} split; "
                    "give more documents or another fraction"
                    if split
                    else "--input: every document is empty"
                )
        cards = {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.discard()
    for split, card in cards.items():
        _print_card(prefixes[split], card)


def _print_card(prefix: str, card: DatasetCard) -> None:
    print(
        f"{prefix}: {card.documents:,} documents, {card.tokens:,} tokens, "
        f"unigram entropy {card.unigram_entropy:.3f} nats",
        flush=True,
    )


