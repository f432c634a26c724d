"""Language-model pretraining as a task of the training loop: data, model, loss, evaluation, export."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from stacey_dist.data.mixture import MixedSampler
from stacey_dist.data.tokenizer import Tokenizer
from stacey_dist.data.tokens import IGNORED_LABEL, TokenStream
from stacey_dist.errors import SettingsError, settings_errors
from stacey_dist.models.causal_lm import attended, multiplied_parameters, router_weight
from stacey_dist.training.ahead import Ahead, Transfer
from stacey_dist.training.callbacks import Callback
from stacey_dist.training.engine import Engine
from stacey_dist.training.export import export
from stacey_dist.training.launchers import Parts
from stacey_dist.training.reports.flops import flops_per_token
from stacey_dist.training.reports.samples import Samples, try_sample
from stacey_dist.training.run import Run
from stacey_dist.training.settings.llm_config import LLMConfig
from stacey_dist.training.task import Task
from stacey_dist.training.tasks.attention import Attention
from stacey_dist.training.tasks.llm_model import build_model
from stacey_dist.training.tasks.text_data import TextData, prepare_data

_COMPARED_WINDOWS = 1024
"""An exported tokenizer is compared on the text of so many windows."""


@dataclass(frozen=True)
class TokenBatch:
    """Windows of tokens, int64 of shape (sequences, sequence_length), and what divides their summed loss."""

    inputs: Tensor
    labels: Tensor
    update_labels: int
    attention: dict[str, Any]
    """Further arguments of the forward pass: see `Attention.arguments`."""


class LanguageModeling(Task):
    """Next-token prediction over packed windows: the `Task` of `train_llm.py`."""

    unit = "tokens"
    loss_label = "cross-entropy, nats per token"

    def __init__(self, run: Run[LLMConfig], data: TextData, model: PreTrainedModel) -> None:
        self.run, self.data = run, data
        self.batch_size = run.config.train.global_batch_size
        sizes, shares = [len(corpus.train) for corpus in data.corpora], [corpus.share for corpus in data.corpora]
        self.samples_per_epoch = sum(sizes)
        self.sampler = MixedSampler(sizes, shares, run.config.seed)
        self.data_identity = data.identity
        self._attention = Attention(run.config, model, data.end_token_id)
        self._transfer = Transfer(run.accelerator.device)
        self._ahead = Ahead(self._share, self.batch_size)
        context = run.config.data.sequence_length
        with settings_errors({}):
            self._router_weight = router_weight(model.config)
        self.flops_per_unit = flops_per_token(multiplied_parameters(model), attended(model.config, context))

    def units(self, position: int) -> int:
        """Return the tokens predicted in the update: fewer than batch x length if the last, partial window is in it."""
        return self._tokens(position, self.batch_size)

    def units_before(self, position: int) -> int:
        """Return the tokens predicted in all updates before this position."""
        return self._tokens(0, position)

    def _tokens(self, position: int, windows: int) -> int:
        """Return the tokens predicted in so many windows from a position."""
        length = self.run.config.data.sequence_length
        tokens = windows * length
        for i, corpus in enumerate(self.data.corpora):
            last = len(corpus.train) - 1
            missing = length - corpus.train.label_count(last)
            tokens -= missing * self.sampler.times(i, last, position, windows)
        return tokens

    def epochs(self, position: int) -> dict[str, float]:
        """Return how often each source of a mixture was passed over before a position."""
        counts = self.sampler.counts(position)
        return {
            f"epoch_of.{corpus.name}": round(count / len(corpus.train), 4)
            for corpus, count in zip(self.data.corpora, counts, strict=True)
            if corpus.name
        }

    def micro_batches(self, position: int) -> Iterator[TokenBatch]:
        """Yield this process's share of the update's windows, in order. Raises SettingsError for damaged tokens."""
        if self.data.verification is not None:
            self.data.verification.check()
        units = self.units(position)
        for batch in self._ahead.take(position):
            yield self._on_device(batch, units)

    def _share(self, position: int) -> list[tuple[Tensor, ...]]:
        """Return the micro-batches of this process in the update at `position`, in host memory."""
        share, size = self.run.process_batch_size, self.run.micro_batch_size
        first = position + self.run.accelerator.process_index * share
        sources, windows = self.sampler.samples(first, share)
        mine = [(self.data.corpora[i].train, window) for i, window in zip(sources, windows.tolist(), strict=True)]
        return [self._read(mine[start : start + size]) for start in range(0, share, size)]

    def loss(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Return the micro-batch's summed cross-entropy over the number of tokens in the whole update.

        Where the model's configuration asks for its router's loss (`output_router_logits`), that of the micro-batch is
        added, weighted by its share of the update's windows.
        """
        loss, output = self._summed_loss(model, batch)
        loss = loss / batch.update_labels
        if self._router_weight is None:
            return loss
        if (auxiliary := getattr(output, "aux_loss", None)) is None:
            raise SettingsError(
                "output_router_logits: true is not allowed; transformers' model gives no balancing loss"
            )
        return loss + self._router_weight * (len(batch.inputs) / self.batch_size) * auxiliary

    def evaluate(self, model: nn.Module, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Return the loss in nats per token and the perplexity over every held-out token, each predicted once.

        Of a mixture, they are those over the held-out tokens of all sources, whatever the weights are, and each source
        has its own loss. `train.eval_sequences` limits the sequences of each source.
        """
        accelerator, size, limit = self.run.accelerator, self.run.micro_batch_size, self.run.config.train.eval_sequences
        labels = []
        totals = torch.zeros(len(self.data.corpora), dtype=torch.float64, device=accelerator.device)
        for total, corpus in zip(totals, self.data.corpora, strict=True):
            stream = corpus.validation
            count = min(limit or len(stream), len(stream))
            labels.append(min(count * self.run.config.data.sequence_length, stream.total_labels))
            mine = [(stream, i) for i in range(accelerator.process_index, count, accelerator.num_processes)]
            # As many forward passes on every process: sharded engines gather weights in each of them.
            longest = math.ceil(count / accelerator.num_processes)
            for start in range(0, longest, size):
                batch = self._on_device(self._read(mine[start : start + size] or [(stream, None)]), 1)
                total += self._summed_loss(model, batch)[0]
                if stopping():
                    return None
        if accelerator.num_processes > 1:
            torch.distributed.all_reduce(totals)
        sums = totals.tolist()
        loss = sum(sums) / sum(labels)
        return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))} | {
            f"eval_loss_of.{corpus.name}": total / count
            for corpus, total, count in zip(self.data.corpora, sums, labels, strict=True)
            if corpus.name
        }

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._ahead.close()

    def _summed_loss(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Any]:
        """Return the summed cross-entropy, and all that the model returned."""
        output = model(input_ids=batch.inputs, **batch.attention)
        logits = output.logits.flatten(0, 1).float()
        return F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"), output

    def _read(self, windows: Sequence[tuple[TokenStream, int | None]]) -> tuple[Tensor, ...]:
        """Return the inputs and labels of streams' windows, and the numbers of their attention; all in host memory.

        None stands for a window without labels.
        """
        length = self.run.config.data.sequence_length
        empty = (np.zeros(length, np.int64), np.full(length, IGNORED_LABEL, np.int64))
        pairs = [empty if i is None else stream.window(i) for stream, i in windows]
        inputs, labels = (np.stack(column) for column in zip(*pairs, strict=True))
        arrays = (inputs, labels, *self._attention.numbers(inputs))
        return tuple(self._transfer.pinned(torch.from_numpy(array)) for array in arrays)

    def _on_device(self, batch: tuple[Tensor, ...], update_labels: int) -> TokenBatch:
        inputs, labels, *numbers = self._transfer(*batch)
        return TokenBatch(inputs, labels, update_labels, self._attention.arguments(tuple(numbers)))


def finish(run: Run[LLMConfig], data: TextData, engine: Engine, checkpoint: Path) -> str:
    """Export the model and its tokenizer, and print what it writes; returns the line that says where they are.

    Raises SettingsError if it was trained on damaged tokens.
    """

    def check_tokens() -> None:
        if data.verification is not None:
            data.verification.check(finish=True)

    def save_tokenizer(directory: Path) -> None:
        assert data.tokenizer is not None  # the main process has it
        data.tokenizer.save(directory, _some_texts(data, data.tokenizer))

    run.call_on_main(check_tokens)
    exported = export(run, checkpoint, save_tokenizer)
    if run.config.tracking.sample_tokens:
        run.say(f"\nsample: {try_sample(run, engine, data, max(1, run.config.data.sequence_length // 2))}\n")
    return f"model and tokenizer for transformers: {exported}"


def _some_texts(data: TextData, tokenizer: Tokenizer) -> list[str]:
    """Return the text of windows from all over the tokens, on which an exported tokenizer is compared."""
    streams, count = [corpus.train for corpus in data.corpora], -(-_COMPARED_WINDOWS // len(data.corpora))
    windows = (
        stream.window(int(i))[0].tolist()
        for stream in streams
        for i in np.unique(np.linspace(0, len(stream) - 1, count, dtype=np.int64))
    )
    return [tokenizer.decode(ids) for ids in windows]


def _samples(run: Run[LLMConfig], data: TextData) -> list[Callback]:
    return [Samples(data, run.config.tracking.sample_tokens)] if run.config.tracking.sample_tokens else []


PARTS = Parts(prepare_data, build_model, LanguageModeling, finish, _samples)
