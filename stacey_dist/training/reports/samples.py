"""Samples of a language model: its continuations of held-out text."""

import math
from typing import TYPE_CHECKING, Any

import torch

from stacey_dist.training.callbacks import Callback, Training
from stacey_dist.training.engine import Engine
from stacey_dist.training.reports.trackers import log
from stacey_dist.training.run import Run
from stacey_dist.training.tasks.attention import generating

if TYPE_CHECKING:
    from stacey_dist.training.tasks.text_data import TextData


class Samples(Callback):
    """Has the model continue a held-out text by `tokens` after each evaluation, for the log and the trackers."""

    def __init__(self, data: "TextData", tokens: int) -> None:
        self.data, self.tokens = data, tokens

    def on_evaluation_end(self, training: Training, figures: dict[str, float]) -> None:
        """Continue the same beginning with the same random numbers as after other updates.

        A model whose loss is not finite is left alone: no probabilities come of its logits, which on a GPU is an error
        that ends the process before a save.
        """
        run = training.run
        if not math.isfinite(figures["eval_loss"]):
            return
        text = try_sample(run, training.engine, self.data, self.tokens)
        training.engine.model.train()
        line = "".join(character if character.isprintable() else " " for character in text)
        run.say(f"step {training.step}/{run.config.train.max_steps}  sample: {line}")
        log(run, {"step": training.step, "sample": text})


def try_sample(run: Run[Any], engine: Engine, data: "TextData", tokens: int) -> str:
    """Return what `sample` returns, or why the model cannot generate."""
    try:
        return sample(run, engine, data, tokens)
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        return f"none, for the model cannot generate: {' '.join(str(error).split())[:200]}"


def sample(run: Run[Any], engine: Engine, data: "TextData", tokens: int) -> str:
    """Return how the model continues a quarter of a held-out window by up to `tokens`; "" but on the main process.

    All processes call it together: sharded weights are gathered by all. The random numbers are the same each time, and
    those of training stay as they are. The model is left in evaluation mode.
    """
    device = run.accelerator.device
    prompt_length = max(1, run.config.data.sequence_length // 4)
    inputs, _ = data.corpora[0].validation.window(0)
    prompt = torch.from_numpy(inputs[:prompt_length])[None].to(device)
    model: Any = engine.module
    model.eval()
    # Generation has other shapes with each token, for each of which it would be compiled again.
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        with torch.no_grad(), generating(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(run.config.seed)
            output = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=min(tokens, max(1, run.config.data.sequence_length - prompt_length)),
                do_sample=True,
                temperature=0.8,
                top_k=50,
                remove_invalid_values=True,
                pad_token_id=data.end_token_id,
                use_cache=True,
                synced_gpus=run.accelerator.num_processes > 1,
            )[0]
    finally:
        model._compiled_call_impl = compiled
    output = output[output < data.vocab_size].tolist()  # a model may have more rows than there are tokens
    if data.tokenizer is None:
        return ""
    beginning, continuation = output[:prompt_length], output[prompt_length:]
    return f"{data.tokenizer.decode(beginning)} ⟶ {data.tokenizer.decode(continuation)}"
