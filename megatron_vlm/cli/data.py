"""Prepares data files for training.

megatron-vlm data tokenizer DATA DIRECTORY [--vocabulary-size N]    a tokenizer of DATA's own texts

A tokenizer is made for a language model that starts from random weights; a model that was trained before has its own.
DATA is a LLaVA JSON or JSONL file. The directory is named in the recipe as `model.language.tokenizer`, and
`model.language.config.vocab_size` must be at least its number of tokens.
"""

import argparse
from pathlib import Path

from megatron_vlm.errors import shown
from megatron_vlm.runtime.command_line import CommandLine, whole_number
from megatron_vlm.runtime.waiting import told_if_slow

VOCABULARY_SIZE = 4096


def main() -> None:
    parser = CommandLine(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    summary = "make a tokenizer of the texts of a data file"
    tokenizer = commands.add_parser("tokenizer", description=summary, help=summary)
    tokenizer.add_argument("data", type=Path, help="a LLaVA JSON or JSONL file")
    tokenizer.add_argument("directory", type=Path, help="the tokenizer's directory, to be made")
    tokenizer.add_argument(
        "--vocabulary-size",
        type=whole_number(1),
        default=VOCABULARY_SIZE,
        metavar="N",
        help=f"tokens at most, special ones included (default {VOCABULARY_SIZE})",
    )
    tokenizer.set_defaults(execute=_make_tokenizer)
    with parser.run() as (arguments, _):
        arguments.execute(arguments)


def _make_tokenizer(arguments: argparse.Namespace) -> None:
    with told_if_slow(f"making a tokenizer of {arguments.data}"):
        from megatron_vlm.data.text.new_tokenizer import make_tokenizer

        num_tokens = make_tokenizer(arguments.data, arguments.directory, arguments.vocabulary_size)
    print(f"{shown(str(arguments.directory))}: {num_tokens:,} tokens")


if __name__ == "__main__":
    main()
