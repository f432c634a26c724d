"""Text for pre-training: documents, tokenizers, prepared tokens, windows over them, and a global shuffle.

Importing this package loads neither torch nor transformers.
"""

from stacey_dist.data.cache import prepare
from stacey_dist.data.embedded import standard_library_documents
from stacey_dist.data.mixture import MixedSampler
from stacey_dist.data.sampler import GlobalSampler
from stacey_dist.data.source import Input, Source, embedded_source, files_source, hub_source
from stacey_dist.data.text import BadRecord, Document, read_records
from stacey_dist.data.tokenizer import Tokenizer, load_pretrained, load_sentencepiece, train_sentencepiece
from stacey_dist.data.tokens import IGNORED_LABEL, TokenStream

__all__ = [
    "IGNORED_LABEL",
    "BadRecord",
    "Document",
    "GlobalSampler",
    "Input",
    "MixedSampler",
    "Source",
    "TokenStream",
    "Tokenizer",
    "embedded_source",
    "files_source",
    "hub_source",
    "load_pretrained",
    "load_sentencepiece",
    "prepare",
    "read_records",
    "standard_library_documents",
    "train_sentencepiece",
]
