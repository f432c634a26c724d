"""Text for pre-training: documents, tokenizers, prepared tokens, windows over them, and a global shuffle.

Importing this package loads neither torch nor transformers.
"""

from stacey_dist.data.embedded import standard_library_documents
from stacey_dist.data.prepare import prepare
from stacey_dist.data.sampler import GlobalSampler
from stacey_dist.data.source import Source, embedded_source, files_source, hub_source
from stacey_dist.data.text import Document, expand_files, hub_documents, read_documents
from stacey_dist.data.tokenizer import Tokenizer, load_pretrained, load_sentencepiece, train_sentencepiece
from stacey_dist.data.tokens import IGNORED_LABEL, TokenStream

__all__ = [
    "IGNORED_LABEL",
    "Document",
    "GlobalSampler",
    "Source",
    "TokenStream",
    "Tokenizer",
    "embedded_source",
    "expand_files",
    "files_source",
    "hub_documents",
    "hub_source",
    "load_pretrained",
    "load_sentencepiece",
    "prepare",
    "read_documents",
    "standard_library_documents",
    "train_sentencepiece",
]
