"""Sizes of networks, read from their configuration, against the networks themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from daybreak.failure import BadRecipe
from daybreak.train import networks

HEADS: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def t5() -> nn.Module:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            d_model=64, d_kv=24, d_ff=96, num_layers=2, num_heads=4, vocab_size=50,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def t5gemma() -> nn.Module:
    part = {**HEADS, "head_dim": 24, "num_key_value_heads": 2, "intermediate_size": 96}
    part |= {"vocab_size": 50, "layer_types": ["full_attention"] * 2}
    return transformers.T5GemmaEncoderModel(
        transformers.T5GemmaConfig(encoder=part, decoder=part, is_encoder_decoder=False)
    )


def qwen() -> nn.Module:
    return transformers.Qwen3Model(
        transformers.Qwen3Config(
            **HEADS, head_dim=24, num_key_value_heads=2, intermediate_size=96, vocab_size=50
        )
    )


@pytest.mark.parametrize("build", [t5, t5gemma, qwen])
def test_a_text_encoder_is_as_large_as_its_configuration_says(build: Any, tmp_path: Path) -> None:
    model = build().eval()
    model.config.save_pretrained(tmp_path)
    network = networks.named(str(tmp_path), "text.encoder")
    matrices = {id(p): p.numel() for p in model.parameters() if p.ndim == 2 and p.numel() > 64 * 8}
    assert network.weights == sum(matrices.values())
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(1, 16, dtype=torch.long))
    assert network.forward(16) == pytest.approx(counter.get_total_flops(), rel=0.01)


def dinov2() -> nn.Module:
    return transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**HEADS, image_size=56, patch_size=14)
    )


def dinov2_gated() -> nn.Module:
    return transformers.Dinov2Model(
        transformers.Dinov2Config(**HEADS, image_size=56, patch_size=14, use_swiglu_ffn=True)
    )


def dinov3() -> nn.Module:
    return transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(
            **HEADS, patch_size=16, intermediate_size=96, num_register_tokens=4
        )
    )


@pytest.mark.parametrize("build", [dinov2, dinov2_gated, dinov3])
def test_a_teacher_takes_as_many_flops_as_its_configuration_says(
    build: Any, tmp_path: Path
) -> None:
    model = build().eval().requires_grad_(False)
    model.config.save_pretrained(tmp_path)
    network = networks.named(str(tmp_path), "dino.teacher")
    picture = torch.rand(1, 3, 4 * network.patch, 4 * network.patch, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forth:
            seen = model(pixel_values=picture).last_hidden_state
        with FlopCounterMode(display=False) as back:
            seen.sum().backward()
    assert seen.shape[1] == 16 + network.extra
    assert network.forward(16) == pytest.approx(forth.get_total_flops(), rel=0.01)
    assert network.back(16) == pytest.approx(back.get_total_flops(), rel=0.01)


def test_the_networks_of_the_published_recipe_have_their_published_sizes() -> None:
    """FLOPs: recipe of PRX part 3 at 256 words and 256 patches; weights: their model cards."""
    known = networks.NETWORKS
    assert known["google/t5gemma-2b-2b-ul2"].forward(256) == pytest.approx(1.0e12, rel=0.06)
    teacher = known["facebook/dinov3-vitl16-pretrain-lvd1689m"]
    assert teacher.forward(256) == pytest.approx(164e9, rel=0.01)
    assert teacher.weights == pytest.approx(300e6, rel=0.02)
    assert known["facebook/dinov2-with-registers-base"].weights == pytest.approx(86e6, rel=0.02)
    assert known["Qwen/Qwen3-1.7B"].weights == pytest.approx(1.72e9, rel=0.01)


@pytest.mark.parametrize("text", ["{}", "rubbish", '{"hidden_size": 3}'])
def test_a_configuration_without_sizes_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadRecipe, match=r"repa\.teacher = .* does not say how large it is"):
        networks.named(str(tmp_path), "repa.teacher")


@pytest.mark.parametrize("source", ["nobody/nothing", "nothing", "/nowhere", "../no/where"])
def test_an_unknown_network_is_one_sentence_that_names_known_ones(source: str) -> None:
    with pytest.raises(BadRecipe, match=r"text\.encoder = '.*' is neither .*flan-t5-small"):
        networks.named(source, "text.encoder")


def test_a_network_is_of_the_kind_that_its_key_wants() -> None:
    with pytest.raises(BadRecipe, match=r"text\.encoder = .* is an image encoder"):
        networks.named("facebook/dinov2-with-registers-base", "text.encoder")
    with pytest.raises(BadRecipe, match=r"repa\.teacher = .* is a text encoder"):
        networks.named("google/flan-t5-large", "repa.teacher")
    with pytest.raises(BadRecipe) as refused:
        networks.named("nosuch/thing", "text.encoder")
    assert "flan-t5" in str(refused.value)
    assert "dino" not in str(refused.value)
