"""Make sure that text never becomes a special token: a document that spells the end token does not end there."""

import re
from typing import Any

_PROBES = ("{0}", " {0}", "{0} ", "a {0} b", "a{0}b", "{0}{0}", "({0})", "\n{0}\n", "a {0}.")


def read_literally(pretrained: Any) -> Any:
    """Return a fast tokenizer of ``transformers`` that encodes text which spells a special token as other text.

    Most tokenizers look for special tokens before their model sees the text; that is switched off, as
    ``split_special_tokens`` does. A model that has the token among its words or pieces (WordPiece, unigram) may still
    give it; then a pre-tokenizer splits the first character of such text from the rest. The unknown token is not
    looked at: it stands for any characters.

    Args:
        pretrained: a fast tokenizer (modified in place; use the returned one instead).

    Raises:
        ValueError: the text cannot be kept from becoming a special token, which the message names.
    """
    backend = pretrained.backend_tokenizer
    tokens = special_tokens(pretrained)
    backend.encode_special_tokens = True
    spelled_tokens = [token for token in tokens if _spells(backend, token)]
    if not spelled_tokens:
        return pretrained
    _split_spellings(backend, spelled_tokens)
    for token in spelled_tokens:
        if _spells(backend, token):
            raise ValueError(f"text that spells {token!r} becomes that token")
    return as_generic(pretrained)


def special_tokens(pretrained: Any) -> dict[str, int]:
    """Return the special tokens of a fast tokenizer and their ids, without the unknown token."""
    backend = pretrained.backend_tokenizer
    tokens = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    tokens |= {token: backend.token_to_id(token) for token in pretrained.all_special_tokens}
    return {token: i for token, i in sorted(tokens.items()) if i is not None and token != pretrained.unk_token}


def spelled(tokens: Any) -> list[str]:
    """Return texts that spell special tokens, alone and inside other text."""
    return [probe.format(token) for token in tokens for probe in _PROBES]


def _spells(backend: Any, token: str) -> bool:
    """Return whether text that spells a token is encoded as it."""
    unwanted = backend.token_to_id(token)
    encodings = backend.encode_batch_fast(spelled([token]), add_special_tokens=False)
    return any(unwanted in encoding.ids for encoding in encodings)


def _split_spellings(backend: Any, tokens: list[str]) -> None:
    from tokenizers import Regex, pre_tokenizers

    ends = [f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in tokens if len(token) > 1]
    if ends:
        split = pre_tokenizers.Split(Regex("|".join(ends)), "isolated")
        before = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
        backend.pre_tokenizer = pre_tokenizers.Sequence([*before, split])


def as_generic(pretrained: Any, **special: str) -> Any:
    """Return the tokenizer as a class that reads all of its steps from tokenizer.json: others make their own.

    `special` has other special tokens than those that it has, by the names of ``transformers``.
    """
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=pretrained.backend_tokenizer,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_max_length=pretrained.model_max_length,
        model_input_names=pretrained.model_input_names,
        padding_side=pretrained.padding_side,
        truncation_side=pretrained.truncation_side,
        chat_template=pretrained.chat_template,
        **{**pretrained.special_tokens_map, **special},
    )
