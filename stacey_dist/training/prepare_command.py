"""`stacey-dist prepare`: tokenize the text of a configuration before the run, on a machine without GPUs."""

import argparse
import os

from stacey_dist.cores import available_cores
from stacey_dist.data.parts import SPLITS
from stacey_dist.data.tokens import TokenStream
from stacey_dist.errors import SettingsError
from stacey_dist.training.launchers import LLM
from stacey_dist.training.settings.command_line import help_of
from stacey_dist.training.settings.llm_config import LLMConfig

_ABOUT = (
    "Tokenize the text that train_llm.py with the same settings trains on, before the run. Its other settings are "
    "accepted, and have no effect."
)


def prepare(arguments: list[str]) -> int:
    """Fill the cache that the run with the same settings finds; returns 0.

    Tokens that are there are read, and damaged parts prepared again. After a kill, the same command continues from the
    last chunk of each worker. Several hosts that are given the same directory share the work. Raises SettingsError for
    bad settings or text, OSError for a full disk.
    """
    if {"--help", "-h"} & set(arguments):
        print(help_of(LLMConfig, "stacey-dist prepare", _ABOUT, ("config", "run_dir", "data", "tokenizer")))
        print("\n".join(own_options().format_help().splitlines()[3:]))
        return 0
    own, others = own_options().parse_known_args(arguments)
    config = LLM.parse(others, "stacey-dist prepare")
    from stacey_dist.training.tasks.text_data import tokenize  # after the settings were checked: it takes seconds

    directories, tokenizer = tokenize(config, verify=True, workers=own.workers, shard=_shard(own.shard))
    for directory in directories:
        train, validation = (
            TokenStream(directory, split, config.data.sequence_length).total_labels for split in SPLITS
        )
        print(
            f"{directory}: {train:,} training and {validation:,} held-out tokens, vocabulary {tokenizer.vocab_size:,}"
        )
    return 0


def own_options() -> argparse.ArgumentParser:
    """Return the parser of the options that are no settings of a run."""
    parser = argparse.ArgumentParser("stacey-dist prepare", add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--workers",
        type=int,
        default=available_cores(),
        metavar="N",
        help="number of processes that encode (default: one per core)",
    )
    task = f"{os.environ.get('SLURM_PROCID', 0)}/{os.environ.get('SLURM_NTASKS', 1)}"
    parser.add_argument(
        "--shard",
        default=task,
        metavar="I/N",
        help="index of this host and number of hosts, as in 0/4 (default: from srun, else 0/1)",
    )
    return parser


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise SettingsError(f"shard: {text!r} is not allowed; it must be I/N, as in 0/4 for the first of four hosts")
    return int(number), int(count)
