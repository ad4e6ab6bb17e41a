"""Words for the denoiser: a tokenizer and a transformer encoder.

Two kinds, one interface. Without `encoder` a small T5 encoder is built from random weights, its
tokenizer learned from the captions, and it trains together with the denoiser. With `encoder` (a
hub id or a local folder) any `transformers` encoder is used frozen. Both are saved in the format
of `transformers`, so an exported pipeline needs nothing of ours.

An empty prompt is the unconditional one: it holds a single end-of-text token, so there is always
a word to attend to. Padding is masked, and only as long as the longest caption of the batch.

Letters  b captions, l tokens, e width of the encoder.
Source   encoder: T5, arXiv 1910.10683, without dropout; tokenizer: byte-level BPE.
"""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ftfy
import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from daybreak.failure import BadRecipe

LENGTH_STEP = 8  # token counts are rounded up to multiples of it: few shapes, few compilations


class Config(BaseModel):
    """A frozen encoder by name, or the size of one that is trained from nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str | None = None
    max_tokens: int = Field(default=32, gt=0, multiple_of=LENGTH_STEP)
    width: int = Field(default=256, gt=0)
    depth: int = Field(default=2, gt=0)
    heads: int = Field(default=4, gt=0)
    vocabulary: int = Field(default=2048, ge=300)

    @model_validator(mode="after")
    def _heads_fit(self) -> "Config":
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}")
        return self


class Text(NamedTuple):
    """Encoded captions; the mask is True where there is a word."""

    tokens: Float[Tensor, "b l e"]
    mask: Bool[Tensor, "b l"]


def clean(caption: str) -> str:
    """Mend broken Unicode and HTML entities and strip spaces, exactly as diffusers does."""
    return html.unescape(html.unescape(ftfy.fix_text(caption))).strip()


def learn_tokenizer(captions: Iterable[str], config: Config) -> Any:
    """Learn a byte-level BPE from captions; no text is unknown to it.

    Returns a `transformers.PreTrainedTokenizerFast` with `<pad>` = 0 and `</s>` = 1, which ends
    each text. The result depends on the captions alone, not on their order.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (clean(caption) for caption in captions),
        BpeTrainer(
            vocab_size=config.vocabulary,
            special_tokens=["<pad>", "</s>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=config.max_tokens,
    )


def new_encoder(config: Config, vocabulary: int) -> nn.Module:
    """Build a small T5 encoder with random weights."""
    from transformers import T5Config, T5EncoderModel

    encoder: nn.Module = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=config.width,
            d_kv=config.width // config.heads,
            d_ff=2 * config.width,
            num_layers=config.depth,
            num_heads=config.heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    return encoder


class TextEncoder(nn.Module):
    """Captions to `Text`. `trained` says whether its weights belong to the optimiser.

    Trained weights stay float32 and are cast to `compute` for each call; frozen ones are cast once.
    """

    def __init__(
        self,
        config: Config,
        encoder: nn.Module,
        tokenizer: Any,
        compute: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config, self.tokenizer, self.compute = config, tokenizer, compute
        self.trained = config.encoder is None
        self.encoder = encoder if self.trained else encoder.to(compute).eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """Width of the word vectors."""
        return width_of(self.encoder)

    def tokenize(self, captions: Sequence[str]) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
        """Return token ids and mask, as long as the longest caption and at most `max_tokens`."""
        limit = self.config.max_tokens
        tokens = self.tokenizer(
            [clean(caption) for caption in captions],
            padding="longest",
            pad_to_multiple_of=min(LENGTH_STEP, limit),
            padding_side="right",
            max_length=limit,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return tokens["input_ids"], tokens["attention_mask"].bool()

    def forward(self, captions: Sequence[str]) -> Text:
        """Encode captions on the device of the weights."""
        device = next(self.encoder.parameters()).device
        ids, mask = (tensor.to(device) for tensor in self.tokenize(captions))
        weights = {name: value.to(self.compute) for name, value in self.encoder.named_parameters()}
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            output = functional_call(
                self.encoder, weights, kwargs={"input_ids": ids, "attention_mask": mask}
            )
        return Text(output["last_hidden_state"], mask)


def width_of(encoder: nn.Module) -> int:
    """Return the width of the vectors that a `transformers` encoder gives."""
    config: Any = encoder.config
    if hasattr(config, "text_config"):
        config = config.text_config
    return int(config.hidden_size)


def scratch(config: Config, tokenizer: Any, compute: torch.dtype = torch.float32) -> TextEncoder:
    """Build the encoder that trains from nothing, for a tokenizer already learned."""
    return TextEncoder(config, new_encoder(config, len(tokenizer)), tokenizer, compute)


def load_tokenizer(folder: Path) -> Any:
    """Read a tokenizer that a checkpoint holds."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def pretrained(config: Config, compute: torch.dtype = torch.float32) -> TextEncoder:
    """Load a frozen encoder by hub id or local folder.

    Encoder-decoder models give their encoder. Errors: BadRecipe if it cannot be found.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer

    source = str(config.encoder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        described = AutoConfig.from_pretrained(source)
        loader = (
            AutoModelForTextEncoding
            if type(described) in AutoModelForTextEncoding._model_mapping
            else AutoModel
        )
        encoder = loader.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise BadRecipe(
            f"text.encoder = {source!r} is neither a local folder nor a model that can be loaded "
            f"from the hub ({str(error).splitlines()[0]})"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return TextEncoder(config, encoder, tokenizer, compute)
