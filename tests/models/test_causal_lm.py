"""Models of other architectures: their attention is right, and what is counted of them is what they compute."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import stacey_dist.training.tasks.llm_model  # noqa: F401  # it registers the attention
from stacey_dist.errors import InputError
from stacey_dist.models.causal_lm import (
    CAUSAL,
    attended,
    attention_of,
    causal_config,
    count_parameters,
    multiplied_parameters,
    new_model,
    read_description,
    router_weight,
)
from stacey_dist.training.activation_checkpointing import checkpoint_activations
from stacey_dist.training.reports.flops import flops_per_token
from tests.models.architectures import ARCHITECTURES, OTHERS, SHAPE, described

LENGTH = 16
TRIED = {"gemma2", "mistral", "falcon", "doge", "bert-generation"}


def made(kind, attention, **changes):
    """Return a model whose weights are so large that attention decides its logits."""
    torch.manual_seed(0)
    model = new_model(causal_config(described(kind) | changes), attention)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.3)
    return model.eval()


@pytest.mark.parametrize("kind", [
    *ARCHITECTURES, *sorted(TRIED),
    *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in sorted(OTHERS.keys() - TRIED)),
])  # fmt: skip
def test_the_attention_is_that_of_transformers_plainest(kind):
    attention = attention_of(causal_config(described(kind)), LENGTH)
    tokens = torch.randint(400, (3, LENGTH))
    with torch.no_grad():
        ours, plain = (made(kind, name)(input_ids=tokens).logits for name in (attention, "eager"))
    # Sums of 16 float32 numbers in another order, through two layers.
    assert (ours - plain).abs().max() < 1e-5 * plain.abs().max() + 1e-5
    changed = tokens.clone()
    changed[:, LENGTH // 2 :] = (tokens[:, LENGTH // 2 :] + 1) % 400
    with torch.no_grad():
        others = made(kind, attention)(input_ids=changed).logits
    assert torch.allclose(ours[:, : LENGTH // 2], others[:, : LENGTH // 2], atol=1e-4)  # of sums in another order
    assert (ours[:, LENGTH // 2 :] - others[:, LENGTH // 2 :]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("kind", "changes", "attention"),
    [
        ("llama", {}, CAUSAL),
        ("mistral", {"sliding_window": LENGTH}, CAUSAL),
        ("mistral", {"sliding_window": LENGTH - 1}, None),
        ("gemma3_text", {"sliding_window": LENGTH}, CAUSAL),
        ("gemma3_text", {"use_bidirectional_attention": True}, None),
        ("qwen3", {"max_window_layers": 3}, CAUSAL),
        ("llama4_text", {}, None),
        ("gemma2", {}, "eager"),
        ("gemma2", {"attn_logit_softcapping": None, "sliding_window": LENGTH}, None),
        ("falcon", {}, "eager"),
        ("falcon", {"alibi": False}, None),  # without the interface that takes ours
    ],
)
def test_which_attention_a_configuration_gets(kind, changes, attention):
    assert attention_of(causal_config(described(kind) | changes), LENGTH) == attention


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "qwen3_moe", "gpt2", "deepseek_v3"])
def test_operations_are_those_that_torch_counts(kind):
    own = described(kind) | ({"sliding_window": 64} if kind == "gemma3_text" else {})
    model = new_model(causal_config(own), "eager")
    model.set_experts_implementation("eager") if "moe" in kind or kind in ("mixtral", "deepseek_v3") else None
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=torch.randint(400, (1, LENGTH)))
    vectors = 6 * sum(p.numel() for p in model.parameters() if p.dim() == 1)  # norms and biases: no product
    ours = flops_per_token(multiplied_parameters(model), attended(model.config, LENGTH)) - vectors
    # torch counts rotations of positions too, once for all sequences
    assert ours == pytest.approx(3 * counter.get_total_flops() / LENGTH, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "changes", "weight"),
    [
        ("mixtral", {"router_aux_loss_coef": 0.5}, 0.5),
        ("mixtral", {"output_router_logits": False}, None),
        ("jetmoe", {"output_router_logits": True, "aux_loss_coef": 0.25}, 0.25),
        ("llama", {}, None),
    ],
)
def test_the_weight_of_a_routers_loss(kind, changes, weight):
    own = {"model_type": "jetmoe"} if kind == "jetmoe" else described(kind)
    assert router_weight(causal_config(own | changes)) == weight


def test_a_routers_loss_that_a_model_does_not_have_is_refused():
    with pytest.raises(
        InputError, match=r"output_router_logits: true is not allowed; llama has no router_aux_loss_coef"
    ):
        router_weight(causal_config(described("llama") | {"output_router_logits": True}))


def test_windows_bound_what_a_token_attends_to():
    config = causal_config(described("gemma3_text"))
    assert attended(config, 4) == 2 * 4 * 16 * 4
    assert attended(config, 32) == 4 * 16 * (8 + 32)
    assert attended(causal_config(described("mistral")), 32) == 2 * 32 * 8
    # Its layers are `layers_block_type` in the file, and its window `attention_window_size`.
    griffin = {"model_type": "recurrent_gemma", **SHAPE, "num_hidden_layers": 3, "attention_window_size": 8}
    assert attended(causal_config(griffin), 32) == 32 * 8
    windows = {"sliding_window": 8}  # LLaMA has none
    assert attended(causal_config(described("llama") | windows), 32) == attended(causal_config(described("llama")), 32)


def test_layers_without_attention_attend_to_nothing():
    sizes = dict(hidden_size=64, num_attention_heads=2, num_hidden_layers=4)
    layers = ["conv", "conv", "full_attention", "conv"]
    lfm2 = causal_config({"model_type": "lfm2", "num_key_value_heads": 2, "layer_types": layers, **sizes})
    assert attended(lfm2, 128) == 64 * 128
    neo = causal_config(
        {"model_type": "gpt_neo", "hidden_size": 64, "num_heads": 2, "num_layers": 4, "window_size": 16,
         "attention_types": [[["global", "local"], 2]]}
    )  # fmt: skip
    assert attended(neo, 128) == 2 * 64 * (128 + 16)


def test_experts_whose_number_has_another_name_count_as_well():
    config = AutoConfig.for_model(
        "aria_text", hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, moe_num_experts=8, moe_topk=2, moe_num_shared_experts=1, vocab_size=100,
    )  # fmt: skip
    with torch.device("meta"):
        total, active = count_parameters(AutoModelForCausalLM.from_config(config))
    assert total - active == 2 * 8 * 3 * 32 * 24 * 6 // 8


def test_experts_count_as_far_as_a_token_passes_through_them():
    for kind, experts in (("mixtral", 2 * 8 * 3 * 32 * 48), ("qwen3_moe", 2 * 8 * 3 * 32 * 24)):
        total, active = count_parameters(made(kind, CAUSAL))
        assert total - active == experts * 6 // 8
    total, active = count_parameters(made("llama", CAUSAL))
    assert total == active


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_neox", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("recomputed", [True, "selective"])
def test_activations_that_are_computed_again_are_the_same(kind, recomputed):
    gradients = []
    for kept in (False, recomputed):
        model = made(kind, attention_of(causal_config(described(kind)), LENGTH)).train()
        checkpoint_activations(model, kept)
        torch.manual_seed(1)  # of dropout
        output = model(input_ids=torch.arange(48).reshape(3, LENGTH))
        (output.logits.square().mean() + (getattr(output, "aux_loss", None) or 0)).backward()
        gradients.append([param.grad for param in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_configurations_of_the_repository_are_models():
    names = sorted((Path(__file__).parents[2] / "configs/models").iterdir())
    with torch.device("meta"):
        models = [new_model(causal_config(read_description(str(path)))) for path in names]
    for model in models:
        model.tie_weights()
    assert [count_parameters(model) for model in models] == [(46_702_792_704, 12_879_925_248), (988_544, 988_544)]


def test_names_of_code_are_left_out(tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    config = described("llama") | {"auto_map": {"AutoModelForCausalLM": "code.Model"}, "quantization_config": {"a": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_description(str(tmp_path))
    assert found == described("llama")
    new_model(causal_config(found))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config: "),
        ("[]", "a configuration is a JSON object, not list"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000}', "num_hidden_layers: 1000000 is more than 100000"),
        ('{"model_type": 7}', "model_type 7 is not one of transformers"),
        ('{"model_type": "whisper"}', "is an encoder-decoder"),
        ('{"model_type": "roberta", "is_decoder": true}', "model_type roberta is not a causal language model"),
        ('{"model_type": "vit"}', "model_type vit is not a causal language model"),
    ],
)
def test_what_is_no_causal_language_model_is_one_line(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError) as error:
        read_description(str(tmp_path / "config.json"))
    assert message in str(error.value)
    assert str(error.value).startswith("config: ")
    assert len(str(error.value).splitlines()) == 1
