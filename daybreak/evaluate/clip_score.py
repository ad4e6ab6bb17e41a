"""CLIPScore: the similarity of a picture and its prompt in CLIP's embedding.

    score = 100 max(0, cos(picture, prompt))

It judges which objects a picture shows better than their number or their attributes, it saturates
for good models, and it reads at most 77 tokens: compare scores only for equal prompts, and look at
`Scores.cut`.

Letters  n pictures, each with its prompt.
Source   arXiv 2104.08718, with weight 1 as in torchmetrics (the paper multiplies by 2.5).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from daybreak.evaluate import features
from daybreak.evaluate.features import BATCH, Extractor, Features
from daybreak.failure import BadRecipe


class Clip(NamedTuple):
    """The image and text encoders of a CLIP model."""

    pictures: Extractor
    words: Callable[[Sequence[str]], Features]
    length: Callable[[str], int]  # tokens of a prompt
    longest: int  # most tokens that are read


class Scores(NamedTuple):
    """A score for each picture, and how many prompts were cut because CLIP reads fewer tokens."""

    values: npt.NDArray[np.float64]
    cut: int


def load(source: str = "clip", device: torch.device | str = "cpu") -> Clip:
    """Load a CLIP model by hub id or local folder.

    Errors  BadRecipe if it cannot be loaded, has no text encoder, or has a tokenizer that does not
            fit.
    """
    from transformers import AutoTokenizer

    model, processor = features.from_hub(source)
    if not hasattr(model.config, "text_config"):
        raise BadRecipe(
            f"{source} has no text encoder, and CLIPScore needs a CLIP model: give --clip one"
        )
    hub, revision = features.located(source)
    tokenizer = AutoTokenizer.from_pretrained(hub, revision=revision)
    known, needed = len(tokenizer), int(model.config.text_config.vocab_size)
    if known != needed:  # `transformers` makes an empty one if its files are missing
        raise BadRecipe(
            f"the tokenizer of {hub} has {known} tokens, but its model needs {needed}: put the "
            "tokenizer.json of the model beside it"
        )
    longest = int(model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def words(prompts: Sequence[str]) -> Features:
        tokens = tokenizer(
            list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(device)
        found: Features = (
            model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
            .pooler_output.cpu()
            .numpy()
        )
        return found

    return Clip(
        features.from_model(source, model.to(device), processor),
        words,
        lambda prompt: len(tokenizer(prompt)["input_ids"]),
        longest,
    )


def score(clip: Clip, pictures: npt.NDArray[np.uint8], prompts: Sequence[str]) -> Scores:
    """The score of each picture with its own prompt.

    Errors  ValueError unless there are as many prompts as pictures.
    """
    if len(pictures) != len(prompts):
        raise ValueError(f"{len(pictures)} pictures and {len(prompts)} prompts")
    seen = features.extract(clip.pictures, pictures)
    read = np.concatenate(
        [clip.words(prompts[first : first + BATCH]) for first in range(0, len(prompts), BATCH)]
    )
    seen, read = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (seen, read))
    nearness = np.einsum("nf,nf->n", seen.astype(np.float64), read.astype(np.float64))
    cut = sum(clip.length(prompt) > clip.longest for prompt in prompts)
    return Scores(100 * nearness.clip(0), cut)
