"""The model of `train_llm.py`: a LLaMA, any causal language model of `transformers`, or pretrained weights."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.initialization import no_init_weights

from stacey_dist.data.tokenizer import Tokenizer, load_pretrained, load_sentencepiece
from stacey_dist.errors import InputError, SettingsError, first_line, settings_errors
from stacey_dist.models.causal_lm import (
    causal_config,
    count_parameters,
    model_directory,
    new_model,
    weight_files,
)
from stacey_dist.training.initial_weights import InitialWeights, initial_weights, make_model
from stacey_dist.training.processes.launch import loads_weights_from_rank0
from stacey_dist.training.run import Run
from stacey_dist.training.settings.llm_config import LLMConfig, check_length, described_llama, described_model
from stacey_dist.training.tasks.attention import implementation

if TYPE_CHECKING:
    from stacey_dist.training.tasks.text_data import TextData

_SETTINGS = {"pretrained": "model.pretrained", "name_or_directory": "model.pretrained", "path": "model.pretrained"}


def check_model(config: LLMConfig) -> None:
    """Raise SettingsError if the architecture is not available, or takes no sequences of the data's length."""
    if (described := described_model(config.model)) is None:
        return
    check_length(config, described)
    if config.model.pretrained:
        with settings_errors(_SETTINGS):
            weight_files(model_directory(config.model.pretrained))


def check_vocabulary(config: LLMConfig, tokenizer: Tokenizer) -> None:
    """Raise SettingsError if the configured architecture has fewer tokens than the tokenizer.

    Of given weights, the embeddings are made as large as the tokenizer asks for.
    """
    if config.model.config is None or (described := described_model(config.model)) is None:
        return
    rows = causal_config(described).vocab_size
    if rows < tokenizer.vocab_size:
        raise SettingsError(
            f"model.config: {config.model.config} has a vocabulary of {rows} tokens, and the tokenizer one of "
            f"{tokenizer.vocab_size}; make its vocab_size at least that, or take another tokenizer"
        )


def own_tokenizer(config: LLMConfig) -> Tokenizer | None:
    """Return the tokenizer of the weights to continue from; None if another one is configured.

    Raises SettingsError if there is none beside the weights.
    """
    model, tokenizer = config.model, config.tokenizer
    if model.pretrained is None or model.embeddings is not None or tokenizer.name or tokenizer.file:
        return None
    with settings_errors(_SETTINGS):
        directory = model_directory(model.pretrained)
        if (directory / "sentencepiece.model").exists():  # of an export whose tokenizer transformers does not have
            return load_sentencepiece(directory / "sentencepiece.model")
        return load_pretrained(str(directory))


def build_model(run: Run[LLMConfig], data: "TextData") -> Any:
    """Build the configured model, see `make_model`, or load its weights.

    Raises SettingsError if a configuration does not fit together, or weights do not fit it.
    """
    settings = run.config.model
    described = run.call_on_main(lambda: described_model(settings)) if settings.source else None
    described = described or described_llama(run.config, data.vocab_size)
    described = dict(described, dtype=None, torch_dtype=None)  # of the weights in a file: here a setting says it
    if settings.pretrained is None:
        described |= _special_tokens(data)
    attention = implementation(run.config, causal_config(described))
    try:
        if settings.pretrained is not None:
            model = _pretrained(run, data, described, attention)
        else:
            model = make_model(run, lambda: new_model(causal_config(described), attention))
    except ValueError as error:
        if isinstance(error, SettingsError) or settings.source is None:
            raise
        raise SettingsError(f"model.{settings.source}: {getattr(settings, settings.source)}: {error}") from error
    model = _cast(model, getattr(torch, settings.dtype))
    model.tie_weights()  # a model that is built without memory is not tied yet
    run.say(f"model: {describe(model, run.config)}; {run.config.optimizer.name}, lr {run.config.optimizer.lr:g}")
    return model


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """Cast a model's weights, and leave buffers that no file holds: rotary frequencies need their float32."""
    exact = [
        (module, name, module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set & module._buffers.keys()
    ]
    model = model.to(dtype)
    for module, name, buffer in exact:
        module._buffers[name] = buffer
    return model


def describe(model: Any, config: LLMConfig) -> str:
    """Return a model's architecture and numbers of parameters, as text to print."""
    total, active = count_parameters(model)
    name = "LLaMA" if config.model.source is None else type(model).__name__
    also = f" ({active:,} active)" if active < total else ""
    begun = f", weights of {config.model.pretrained}" if config.model.pretrained else ""
    return f"{name} with {total:,} parameters{also}{begun}"


def _special_tokens(data: "TextData") -> dict[str, Any]:
    """Return the special tokens of a model that learns another tokenizer than that of its configuration."""
    return {"bos_token_id": data.end_token_id, "eos_token_id": data.end_token_id, "pad_token_id": None}


def _pretrained(run: Run[LLMConfig], data: "TextData", described: dict[str, Any], attention: str | None) -> Any:
    """Return the model with the weights of `model.pretrained`, and the embeddings that its tokenizer asks for.

    The first process alone has them, if the engine sends the others their shares.
    """
    settings, seed = run.config.model, run.config.seed
    assert settings.pretrained is not None
    rows = causal_config(described).vocab_size
    first_new = 0 if settings.embeddings == "new" else rows
    resized = dict(described)
    if settings.embeddings == "new" or data.vocab_size > rows:
        resized["vocab_size"] = data.vocab_size
    if settings.embeddings is not None:
        resized |= _special_tokens(data)

    def build(dtype: torch.dtype = torch.float32) -> Any:
        torch.set_default_dtype(dtype)
        try:
            return new_model(causal_config(resized), attention)
        finally:
            torch.set_default_dtype(torch.float32)

    with torch.device("meta"):
        shell = build()
    if loads_weights_from_rank0(run.accelerator, shell) and not run.accelerator.is_main_process:
        with no_init_weights():  # nothing is written into its memory, which is none before
            return build(getattr(torch, settings.dtype))
    with _as_one_process(), settings_errors(_SETTINGS):
        model = _load(run, causal_config(described), attention)
        if first_new < resized["vocab_size"]:
            torch.manual_seed(seed)
            _renew_rows(model, first_new, resized["vocab_size"], initial_weights(seed, build))
            run.say(f"embeddings: {resized['vocab_size'] - first_new:,} rows are new, of {resized['vocab_size']:,}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(shell.config, name))
    return model


def _load(run: Run[LLMConfig], config: Any, attention: str | None) -> Any:
    """Return the model of a configuration with the weights of `model.pretrained`, in `model.dtype`.

    Raises InputError, about `pretrained`, if there are no weights for some of its parameters, or they are quantized.
    """
    settings = run.config.model
    assert settings.pretrained is not None
    directory = model_directory(settings.pretrained)
    weights: dict[str, Tensor] = {}
    try:
        for file in weight_files(directory):
            weights |= load_file(file)  # mapped: they are read as they are copied
        _check_dtypes(directory, weights)
        config._attn_implementation = attention
        model, found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=getattr(torch, settings.dtype),
            output_loading_info=True,
            trust_remote_code=False,
        )
    except InputError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise InputError(f"pretrained: {directory}: {first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"pretrained: {directory} has no weights for {missing[0]}, and {len(missing) - 1} others")
    if unused := sorted(found["unexpected_keys"]):
        run.say(f"model.pretrained: {len(unused)} tensors are no weights of the model and are left out: {unused[0]}, …")
    return model


def _check_dtypes(directory: Path, weights: dict[str, Tensor]) -> None:
    """Raise InputError for weights that are codes of other numbers."""
    for name, tensor in weights.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise InputError(
                f"pretrained: {directory}: {name} is of {str(tensor.dtype).removeprefix('torch.')}; quantized weights "
                "are not read, convert them to bfloat16 first"
            )


def _renew_rows(model: Any, first: int, size: int, initial: InitialWeights | None) -> None:
    """Give the embeddings `size` rows; those from `first` on are as in a model that begins from nothing."""
    model.resize_token_embeddings(size, mean_resizing=False)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    renewed = {id(p) for module in embeddings if module is not None for p in module.parameters()}
    for name, param in model.named_parameters():
        if initial is not None and id(param) in renewed:
            start = first * param[0].numel()
            with torch.no_grad():
                param.view(-1)[start:] = initial.values(name, start, param.numel())


@contextmanager
def _as_one_process() -> Iterator[None]:
    """Have transformers load weights into a whole model: it would have its own way under ZeRO-3 and FSDP."""
    from transformers.integrations import deepspeed

    asked, fsdp = deepspeed._hf_deepspeed_config_weak_ref, os.environ.get("ACCELERATE_USE_FSDP")
    deepspeed.unset_hf_deepspeed_config()
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = asked
        del os.environ["ACCELERATE_USE_FSDP"]
        if fsdp is not None:
            os.environ["ACCELERATE_USE_FSDP"] = fsdp
