"""Attention: packed documents are as if alone, on every implementation; what is not available is refused."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from stacey_dist.data import documents
from stacey_dist.errors import SettingsError
from stacey_dist.models.causal_lm import new_model
from stacey_dist.training.settings.llm_config import LLMConfig
from stacey_dist.training.tasks.attention import Attention, check_attention, generating, implementation

END = 2
LENGTH = 300  # three blocks of FlexAttention, the last in part
SHAPE = dict(
    vocab_size=60,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
    bos_token_id=END,
    eos_token_id=END,
    pad_token_id=None,
    use_cache=False,
)
ALL = ("sdpa", "eager", "flex", "flash_attention_2")


def make(name, kind="Llama", masked=True, **settings):
    """Return a tiny model of transformers that attends so, whose weights depend on `kind` alone; and an Attention."""
    config = LLMConfig()
    config.model.attention, config.data.document_mask, config.data.sequence_length = name, masked, LENGTH
    described = getattr(transformers, f"{kind}Config")(**SHAPE, **settings)
    torch.manual_seed(0)
    model = new_model(described, implementation(config, described))
    with torch.no_grad():
        for parameter in model.parameters():  # so that attention is far from even
            parameter.mul_(4.0 if parameter.dim() == 2 else 1.0)
    return model.eval(), Attention(config, model, END)


def make_windows():
    """Return windows that begin within a document, at one and at an end token, with a document of one token."""
    inputs = np.random.default_rng(0).integers(3, 60, (3, LENGTH))
    for window, ends in enumerate([(5, 6, 131, 140, 298), (0, 127, 255, 256), ()]):
        inputs[window, list(ends)] = END
    return inputs


def logits(model, own, inputs):
    given = own.arguments(tuple(map(torch.from_numpy, own.numbers(inputs))))
    return model(input_ids=torch.from_numpy(inputs), **given).logits


def one_by_one(model, inputs):
    """Return the logits of each document by itself: plain forward passes, without a mask and without positions."""
    model.config._attn_implementation = "eager"
    rows = []
    for window in torch.from_numpy(inputs):
        cuts = (window == END).nonzero().flatten().add(1).tolist()
        pieces = [piece for piece in window.tensor_split(cuts) if len(piece)]
        rows.append(torch.cat([model(input_ids=piece[None]).logits[0] for piece in pieces]))
    return torch.stack(rows)


@pytest.fixture
def flash(monkeypatch):
    """The package flash-attn, which needs a GPU, in as much as is used: documents one after another."""

    def flash_attn_varlen_func(q, k, v, ends, ends_k, longest, longest_k, *, dropout_p, softmax_scale, causal,
                               window_size):  # fmt: skip
        assert causal
        assert dropout_p == 0.0
        assert ends.dtype == torch.int32
        assert torch.equal(ends, ends_k)
        assert max(ends.diff().tolist()) <= longest == longest_k
        outputs = []
        for start, stop in zip(ends.tolist(), ends[1:].tolist(), strict=False):
            a, b, c = (x[start:stop].transpose(0, 1) for x in (q, k, v))
            index = torch.arange(stop - start)
            mask = index <= index[:, None]
            if window_size != (-1, -1):
                assert window_size[1] == 0
                mask &= index >= index[:, None] - window_size[0]
            out = F.scaled_dot_product_attention(a, b, c, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
            outputs.append(out.transpose(0, 1))
        return torch.cat(outputs)

    module = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.fixture
def flex(monkeypatch):
    """FlexAttention as torch operations, with the mask of tokens and not that of blocks: compiling takes a minute."""
    from transformers.integrations import flex_attention as used

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    plain = flex_attention.flex_attention
    monkeypatch.setattr(used, "compile_friendly_flex_attention", lambda *qkv, training, **how: plain(*qkv, **how))


@pytest.fixture(params=[*ALL, pytest.param("flex, compiled", marks=pytest.mark.exhaustive)])
def name(request):
    name = request.param.split(",")[0]
    if request.param in ("flash_attention_2", "flex"):
        request.getfixturevalue("flash" if name == "flash_attention_2" else "flex")
    return name


# float32 sums of up to 300 terms in another order, in two layers, beside logits of about 10.
CLOSE = dict(rtol=0, atol=1e-4)


@torch.no_grad()
def test_documents_in_a_window_are_as_if_alone(name):
    inputs = make_windows()
    model, own = make(name)
    packed = logits(model, own, inputs)
    alone = one_by_one(model, inputs)
    torch.testing.assert_close(packed, alone, **CLOSE)
    # Without the mask they are not.
    model, own = make(name, masked=False)
    unmasked = logits(model, own, inputs)
    assert (unmasked - alone)[:2].abs().max() > 0.5
    torch.testing.assert_close(unmasked[2], alone[2], **CLOSE)


ARCHITECTURES = {
    "Mistral": dict(sliding_window=40),
    "Olmo3": dict(sliding_window=40, layer_types=["sliding_attention", "full_attention"]),
    "Gemma2": dict(sliding_window=40, layer_types=["sliding_attention", "full_attention"]),
    "Qwen3": {},
    "GPTNeoX": {},
    "GPT2": {},
    "Olmo2": {},
    "Mixtral": dict(num_local_experts=2),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind"),
    [("sdpa", kind) for kind in ARCHITECTURES]
    + [("flash_attention_2", kind) for kind in ARCHITECTURES if kind != "Gemma2"],  # it is refused below
    indirect=["name"],
)
def test_documents_are_as_if_alone_with_other_architectures(name, kind):
    inputs = make_windows()
    model, own = make(name, kind, **ARCHITECTURES[kind])
    packed = logits(model, own, inputs)
    torch.testing.assert_close(packed, one_by_one(model, inputs), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Mistral", "Olmo3"])
def test_sliding_windows_are_kept_without_documents(name, kind):
    model, own = make(name, kind, masked=False, **ARCHITECTURES[kind])
    inputs = make_windows()
    found = logits(model, own, inputs)
    model.config._attn_implementation = "eager"
    torch.testing.assert_close(found, model(input_ids=torch.from_numpy(inputs)).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2"], indirect=True)
@pytest.mark.parametrize(
    "kinds", [["sliding_attention"] * 2, ["sliding_attention", "full_attention"]], ids=["all", "one"]
)
def test_a_window_that_a_module_does_not_pass_is_kept(name, kinds):
    """Qwen2-MoE's attention has its window in the masks of transformers alone."""
    experts = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    windows = dict(sliding_window=40, use_sliding_window=True, layer_types=kinds)
    model, own = make(name, "Qwen2Moe", masked=False, **windows, **experts)
    inputs = make_windows()
    found = logits(model, own, inputs)
    model.config._attn_implementation = "eager"
    expected = model(input_ids=torch.from_numpy(inputs)).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    windowless, without = make("sdpa", "Qwen2Moe", masked=False, **experts)
    assert (logits(windowless, without, inputs) - expected).abs().max() > 0.5


@torch.no_grad()
@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2"], indirect=True)
def test_a_window_that_a_class_does_not_have_is_not_passed(name):
    """OLMoE's attention passes `sliding_window` of any configuration; its masks have no window."""
    model, own = make(name, "Olmoe", masked=False, sliding_window=40, num_experts=2, num_experts_per_tok=1)
    inputs = make_windows()
    found = logits(model, own, inputs)
    model.config._attn_implementation = "eager"
    torch.testing.assert_close(found, model(input_ids=torch.from_numpy(inputs)).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("foreign", [{"sliding_window": 40}, {"layer_types": ["sliding_attention", "full_attention"]}])
def test_a_setting_that_a_class_does_not_have_changes_nothing(foreign):
    model, own = make("sdpa", masked=False, **foreign)
    (plain, without), inputs = make("sdpa", masked=False), make_windows()
    assert torch.equal(logits(model, own, inputs), logits(plain, without, inputs))
    model, own = make("sdpa", **foreign)
    torch.testing.assert_close(logits(model, own, inputs), one_by_one(model, inputs), **CLOSE)


@torch.no_grad()
def test_layers_that_pass_nothing_on_are_named(flash):
    model, own = make("flash_attention_2", "Nemotron")
    with pytest.raises(
        SettingsError, match=r"flash_attention_2 is not allowed; Nemotron\w*Attention is not told where"
    ):
        logits(model, own, make_windows())


@pytest.mark.parametrize("name", ["sdpa", "eager", pytest.param("flex", marks=pytest.mark.exhaustive)])
def test_the_loss_of_a_router_takes_no_mask_of_layers(name):
    inputs = make_windows()
    (model, own), (plain, without) = (
        make(name, "Mixtral", num_local_experts=4, output_router_logits=router) for router in (True, False)
    )
    given = own.arguments(tuple(map(torch.from_numpy, own.numbers(inputs))))
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(inputs), **given)
        assert torch.equal(output.logits, logits(plain, without, inputs))
    assert output.aux_loss > 0


def test_a_model_that_counts_a_mask_gets_positions():
    """OPT takes its positions from the mask, unless it is given them."""
    inputs = make_windows()
    sizes = dict(ffn_dim=48, word_embed_proj_dim=64)
    (eager, own), (plain, without) = (make(name, "OPT", masked=False, **sizes) for name in ("eager", "sdpa"))
    # sums in another order, through two layers
    assert (logits(eager, own, inputs) - logits(plain, without, inputs)).abs().max() < 1e-4


def test_positions_and_what_is_attended_to():
    inputs = np.array([[5, END, 7, 8, END, END, 9], [END, 3, 4, 5, 6, 7, 8]])
    places = documents.positions(inputs, END)
    assert places.tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    assert documents.positions(inputs, None).tolist() == [list(range(7))] * 2
    assert documents.first_attended(places).tolist() == [[0, 0, 2, 2, 2, 5, 6], [0, 1, 1, 1, 1, 1, 1]]
    assert documents.first_attended(places, 3).tolist() == [[0, 0, 2, 2, 2, 5, 6], [0, 1, 1, 1, 2, 3, 4]]
    assert documents.boundaries(places).tolist() == [0, 2, 5, 6, 7, 8, 14]


@pytest.mark.parametrize("length", [1, 127, 128, 384, 500])
@pytest.mark.parametrize("sliding_window", [None, 1, 128, 200])
def test_blocks_are_those_that_torch_finds_by_looking_at_all_pairs_of_tokens(length, sliding_window):
    rng = np.random.default_rng(length)
    inputs = np.where(rng.random((4, length)) < np.array([0.0, 0.003, 0.01, 0.3])[:, None], END, 7)
    first = documents.first_attended(documents.positions(inputs, END), sliding_window)
    attended_first = torch.from_numpy(first)

    def attends(window, head, query, key):
        return (key <= query) & (key >= attended_first[window, query])

    expected = flex_attention.create_block_mask(attends, 4, None, length, length, device="cpu")
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    for name, found in zip(names, documents.blocks(first), strict=True):
        assert found.flags.c_contiguous  # kernels read them as they lie
        assert torch.equal(torch.from_numpy(found), getattr(expected, name)), name


class Reads(TorchDispatchMode):
    """Raises where the host would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func)
        assert "nonzero" not in str(func)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_the_host_does_not_wait_for_the_device(name, masked):
    model, own = make(name, masked=masked)
    numbers = tuple(map(torch.from_numpy, own.numbers(make_windows())))
    with Reads():
        given = own.arguments(numbers)
        if name != "flex":  # it runs as torch operations here
            model(input_ids=torch.from_numpy(make_windows()), **given)
    assert bool(given) == (masked or name != "sdpa")


def test_a_model_generates_with_masks_of_transformers():
    model, _ = make("sdpa")
    before = model.config._attn_implementation
    with generating(model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == before == "causal_sdpa"


def check_on(device, name, mixed_precision="no", dtype="float32"):
    config = LLMConfig()
    config.model.attention, config.model.dtype = name, dtype
    accelerator = SimpleNamespace(device=torch.device(device), mixed_precision=mixed_precision)
    check_attention(SimpleNamespace(config=config, accelerator=accelerator))


def test_what_cannot_be_had_is_refused(flash, monkeypatch):
    for name in ("sdpa", "eager"):
        check_on("cpu", name)
    with pytest.raises(SettingsError, match=r"model.attention: flex is not allowed; .* on GPUs only"):
        check_on("cpu", "flex")
    check_on("cuda", "flex")
    with pytest.raises(SettingsError, match=r"flash_attention_2 is not allowed; it runs on GPUs, not on cpu"):
        check_on("cpu", "flash_attention_2", "bf16")
    with pytest.raises(SettingsError, match=r"it computes in bfloat16 or float16; use --train.mixed_precision bf16"):
        check_on("cuda", "flash_attention_2")
    check_on("cuda", "flash_attention_2", "fp16")
    check_on("cuda", "flash_attention_2", dtype="bfloat16")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(SettingsError, match=r"flash_attn cannot be imported \(.*\); pip install flash-attn"):
        check_on("cuda", "flash_attention_2", "bf16")


def test_models_that_cannot_are_refused():
    with pytest.raises(SettingsError, match=r"flex is not allowed; an attention head has 8 numbers, .* at least 16"):
        make("flex", head_dim=8)
    for name in ("flex", "flash_attention_2"):
        with pytest.raises(SettingsError, match=f"{name} is not allowed; transformers' Gemma2ForCausalLM has none"):
            make(name, "Gemma2")
    for kind in ("GptOss", "DeepseekV3"):  # sinks, latent attention
        described = getattr(transformers, f"{kind}Config")()
        config = LLMConfig()
        config.model.attention = "flash_attention_2"
        with pytest.raises(SettingsError, match=rf"transformers' {kind}ForCausalLM has none"):
            implementation(config, described)
    chunks = transformers.Llama4TextConfig(**SHAPE, attention_chunk_size=40)
    for described, stateful in (
        (chunks, False),
        (transformers.MambaConfig(), True),
        (transformers.LlamaConfig(), True),
    ):
        config = LLMConfig()
        config.data.document_mask = True
        described._attn_implementation = implementation(config, described) or "sdpa"
        model = SimpleNamespace(config=described, _is_stateful=stateful, _supports_attention_backend=True)
        with pytest.raises(SettingsError, match=r"data.document_mask: true is not allowed; documents cannot be kept"):
            Attention(config, model, END)
