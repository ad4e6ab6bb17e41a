"""CLIPScore against the model's own likeness of pictures and words."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from daybreak.evaluate import clip_score
from daybreak.evaluate.clip_score import score
from daybreak.failure import BadRecipe
from daybreak.model import text

PROMPTS = ["a red circle", "two blue squares above", "a star", "a green cross and a white circle"]
SIDE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights, its tokenizer and its preparation."""
    place = tmp_path_factory.mktemp("clip")
    tokenizer = text.learn_tokenizer(PROMPTS, text.Config(vocabulary=300, max_tokens=16))
    tokenizer.save_pretrained(place)
    torch.manual_seed(0)
    words = {
        **SIDE,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 20,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    pictures = {**SIDE, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = CLIPConfig(projection_dim=8, text_config=words, vision_config=pictures)
    CLIPModel(config).save_pretrained(place)
    preparation = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": 28, "width": 28},
        "size": {"shortest_edge": 28},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
    }
    (place / "preprocessor_config.json").write_text(json.dumps(preparation))
    return place


def pictures(n: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (n, 28, 28, 3), dtype=np.uint8)


def test_the_score_is_the_models_own_likeness(folder: Path) -> None:
    clip = clip_score.load(str(folder))
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = text.load_tokenizer(folder)(PROMPTS, padding=True, return_tensors="pt")
    pixels = (torch.tensor(pictures(4)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():
        likeness = model(tokens["input_ids"], pixels, tokens["attention_mask"]).logits_per_image
    known = 100 * (likeness / model.logit_scale.exp()).diag().clamp(min=0)
    assert score(clip, pictures(4), PROMPTS).values == pytest.approx(
        known.detach().numpy(), abs=1e-3
    )


def test_each_picture_meets_its_own_prompt_whatever_else_is_scored(folder: Path) -> None:
    clip = clip_score.load(str(folder))
    many = score(clip, pictures(70), [PROMPTS[i % 4] for i in range(70)]).values
    assert many[:4] == pytest.approx(score(clip, pictures(4), PROMPTS).values, abs=1e-3)
    assert (many >= 0).all()


def test_prompts_longer_than_clip_reads_are_counted(folder: Path) -> None:
    clip = clip_score.load(str(folder))
    assert clip.longest == 20
    long = "a red circle " * 20
    assert score(clip, pictures(2), ["a star", long]).cut == 1


def test_what_cannot_be_scored_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 pictures and 1 prompts"):
        score(clip_score.load(str(folder)), pictures(2), ["a star"])
    with pytest.raises(BadRecipe, match=r"openai/clip-vit-large-patch14-336 \(1.7 GB, MIT\)"):
        clip_score.load()
    mute = tmp_path / "mute"
    CLIPModel.from_pretrained(folder).save_pretrained(mute)
    (mute / "preprocessor_config.json").write_text(
        (folder / "preprocessor_config.json").read_text()
    )
    with pytest.raises(BadRecipe, match=r"has \d+ tokens, but its model"):
        clip_score.load(str(mute))
