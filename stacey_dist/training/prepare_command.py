"""`stacey-dist prepare`: tokenize the text of a configuration before the run, where no GPU waits for it."""

from stacey_dist.data.tokens import TokenStream
from stacey_dist.training.launchers import LLM


def prepare(arguments: list[str]) -> int:
    """Fill the cache that the run with the same settings finds; returns 0.

    Tokens that are there are read, and damaged ones made anew. Killed and started again, it resumes from its last
    commit. Raises SettingsError for bad settings or text, OSError for a full disk.
    """
    config = LLM.parse(arguments, "stacey-dist prepare")
    from stacey_dist.training.llm import tokenize  # after the settings were checked: it takes seconds

    directory, tokenizer = tokenize(config, verify=True)
    train, validation = (
        TokenStream(directory, split, config.data.sequence_length).total_labels for split in ("train", "validation")
    )
    print(f"{directory}: {train:,} training and {validation:,} held-out tokens, vocabulary {tokenizer.vocab_size:,}")
    return 0
