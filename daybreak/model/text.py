"""Captions to token vectors for the denoiser: a tokenizer and a transformer encoder.

There are two kinds with one interface. Without `encoder`, a small LFM2 with random weights is built
and trained along with the denoiser; its tokenizer is learned from the captions. Its convolutions
let each token see the five before it from the first step, so the vector of "circle" soon holds its
colour, and that of "left" what it refers to; a T5, whose attention is almost blind to order at
first, had not learned that after 78,000 pictures. With `encoder` (a hub id or a local folder), a
language model of `transformers` is used frozen: the encoder of a T5, FLAN-T5 or T5Gemma, a decoder
such as Qwen3, the text half of Qwen3-VL, or a relative of BERT. Both kinds are saved in the format
of `transformers`, so an exported pipeline does not need daybreak.

The empty prompt is the unconditional one. It still has the template or an end-of-text token, so
there is always a token to attend to. Padding is on the right, is masked, and reaches only to the
longest caption of the batch (rounded up, see `Config`).

Letters  b captions, l tokens, e width of the encoder.
Source   encoder: LFM2, arXiv 2511.23404, alternating convolution and attention; tokenizer:
         byte-level BPE. Skipped layers: as `clip_skip` of diffusers, which applies the final norm.
"""

import contextlib
import html
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from daybreak.failure import BadRecipe
from daybreak.model import hub

REACH = 6  # tokens that a convolution sees, such as "to the left of a blue"
WORD = 0.5  # standard deviation of token embeddings at initialisation
LENGTH_STEP = 8  # token counts are multiples of it


class Config(BaseModel):
    """A frozen encoder by name, or the size of one that is trained from scratch.

    For a frozen one, `template` is the text around a caption, which replaces its {}, and `skip` is
    how many of the last layers are left out. `max_tokens` includes the template. A batch is padded
    to its longest caption, rounded up to one of at most `lengths` values, because every block is
    compiled anew for each of them and each shape of pictures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str | None = None
    max_tokens: int = Field(default=32, gt=0, multiple_of=LENGTH_STEP)
    lengths: int = Field(default=4, gt=0)
    template: str = "{}"
    skip: int = Field(default=0, ge=0)
    width: int = Field(default=256, gt=0)
    depth: int = Field(default=2, gt=0)
    heads: int = Field(default=4, gt=0)
    vocabulary: int = Field(default=2048, ge=300)

    @property
    def length_step(self) -> int:
        """Token counts are rounded up to a multiple of this, which divides `max_tokens`."""
        units = self.max_tokens // LENGTH_STEP
        fewest = math.ceil(units / self.lengths)
        return LENGTH_STEP * next(n for n in range(fewest, units + 1) if units % n == 0)

    @model_validator(mode="after")
    def _heads_fit(self) -> "Config":
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}")
        return self

    @model_validator(mode="after")
    def _is_asked_what_it_can_answer(self) -> "Config":
        if self.template.count("{}") != 1:
            raise ValueError(
                f"template = {self.template!r} must hold {{}} once, where the caption comes"
            )
        if self.encoder is None and (self.template != "{}" or self.skip):
            raise ValueError(
                "template and skip are for a frozen encoder: name one with encoder, or remove them"
            )
        return self


class Text(NamedTuple):
    """Encoded captions; the mask is True for tokens and False for padding."""

    tokens: Float[Tensor, "b l e"]
    mask: Bool[Tensor, "b l"]


def clean(caption: str) -> str:
    """Repair broken Unicode, decode HTML entities and strip spaces, exactly as diffusers does.

    The repair takes half a millisecond; plain ASCII without "&", as most captions are, needs none.
    """
    if caption.isascii() and caption.isprintable() and "&" not in caption:
        return caption.strip()
    import ftfy  # loading it takes as long as cleaning a hundred captions

    return html.unescape(html.unescape(ftfy.fix_text(caption))).strip()


def learn_tokenizer(captions: Iterable[str], config: Config) -> Any:
    """Learn a byte-level BPE from captions; it can encode any text.

    Returns a `transformers.PreTrainedTokenizerFast` with `<pad>` = 0 and `</s>` = 1, which ends
    each text. The result does not depend on the order of the captions.
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
    """Build a small LFM2 with random weights, and embeddings large enough to tell tokens apart."""
    from transformers import Lfm2Config, Lfm2Model

    encoder = Lfm2Model(
        Lfm2Config(
            vocab_size=vocabulary,
            hidden_size=config.width,
            intermediate_size=2 * config.width,
            block_auto_adjust_ff_dim=False,
            num_hidden_layers=config.depth,
            layer_types=(["conv", "full_attention"] * config.depth)[: config.depth],
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            conv_L_cache=REACH,
            max_position_embeddings=config.max_tokens,
            initializer_range=config.width**-0.5,
            use_cache=False,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            attn_implementation="eager",  # faster than the fused kernel for so few tokens
        )
    )
    nn.init.normal_(encoder.embed_tokens.weight, std=WORD)
    module: nn.Module = encoder
    return module


Known = Callable[[Sequence[str]], Text | None]  # returns captions that are encoded already, or None


class TextEncoder(nn.Module):
    """Captions to `Text`. `trained` says whether the optimiser updates its weights.

    Trained weights stay float32 and are cast to `compute` for each call. Frozen weights are stored
    in `compute`, and captions that are `known` are not encoded again (model/text_cache.py). Buffers
    keep their precision: rotary frequencies in bfloat16 would give wrong positions.
    """

    def __init__(
        self,
        config: Config,
        encoder: nn.Module,
        tokenizer: Any,
        compute: torch.dtype = torch.float32,
        known: Known | None = None,
    ) -> None:
        super().__init__()
        self.config, self.tokenizer, self.compute, self.known = config, tokenizer, compute, known
        self.trained = config.encoder is None
        self.encoder = encoder if self.trained else encoder.eval().requires_grad_(False)
        self._asked = False

    @property
    def width(self) -> int:
        """Width of the token vectors."""
        return width_of(self.encoder)

    def tokenize(self, captions: Sequence[str]) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
        """Return token ids and mask, padded to the longest caption, at most `max_tokens` long."""
        limit = self.config.max_tokens
        tokens = self.tokenizer(
            [clean(caption) for caption in captions],
            padding="longest",
            pad_to_multiple_of=self.config.length_step,
            padding_side="right",
            max_length=limit,
            truncation=True,
            return_attention_mask=True,
        )
        ids, mask = (torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask"))
        return ids, mask.bool()

    def length(self, caption: str) -> int:
        """Number of tokens of a caption before it is cut to `max_tokens`."""
        return len(self.tokenizer(clean(caption), verbose=False)["input_ids"])

    def forward(self, captions: Sequence[str]) -> Text:
        """Encode captions on the device of the weights."""
        device = next(self.encoder.parameters()).device
        known = self.known(captions) if self.known else None
        if known is not None:
            return Text(*(sent(tensor, device) for tensor in known))
        ids, mask = (sent(tensor, device) for tensor in self.tokenize(captions))
        weights = {name: value.to(self.compute) for name, value in self.encoder.named_parameters()}
        quiet = contextlib.nullcontext() if self._asked else _quietly()  # it warns only once
        self._asked = True
        with quiet, torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            output = functional_call(
                self.encoder, weights, kwargs={"input_ids": ids, "attention_mask": mask}
            )
        return Text(output["last_hidden_state"], mask)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; to a GPU from pinned memory, so that the host does not wait for it.

    A tensor that is not contiguous, such as captions that were cut to fewer tokens, is made so
    before it is pinned: otherwise torch would copy it through memory that is not pinned.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def width_of(encoder: nn.Module) -> int:
    """Return the width of the output vectors of a `transformers` encoder."""
    return int(words_of(encoder.config).hidden_size)


def words_of(config: Any) -> Any:
    """Return the part of a `transformers` configuration that describes the text encoder."""
    for part in ("encoder", "text_config"):
        config = getattr(config, part) if part in config.sub_configs else config
    return config


def scratch(config: Config, tokenizer: Any, compute: torch.dtype = torch.float32) -> TextEncoder:
    """Build an encoder to be trained from scratch, for a tokenizer that was learned before."""
    return TextEncoder(config, new_encoder(config, len(tokenizer)), tokenizer, compute)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a checkpoint."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def pretrained(
    config: Config, compute: torch.dtype = torch.float32, known: Known | None = None
) -> TextEncoder:
    """Load a frozen encoder by hub id or local folder.

    Only the text encoder is kept: not the decoder of a T5, nor the vision half of Qwen3-VL.

    Errors  BadRecipe if it cannot be loaded, lacks weights, or does not fit `template` and `skip`.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer

    source = str(config.encoder)
    remedy = "give text.encoder a local folder that holds it"
    with hub.loading("text.encoder", source, remedy), _quietly():
        tokenizer = framed(AutoTokenizer.from_pretrained(source), config)
        described = AutoConfig.from_pretrained(source)
        _shorten(words_of(described), config)
        is_encoder = type(described) in AutoModelForTextEncoding._model_mapping
        if is_encoder:
            described.is_encoder_decoder = False
        loader = AutoModelForTextEncoding if is_encoder else AutoModel
        encoder, report = loader.from_pretrained(
            source, config=described, dtype=compute, output_loading_info=True
        )
    if "text_config" in described.sub_configs:
        encoder = encoder.get_decoder()
    # `transformers` fills weights that a checkpoint lacks with random values and raises no error.
    absent = [name for name in report["missing_keys"] if "pooler" not in name]
    if absent:
        raise BadRecipe(
            f"text.encoder = {source!r} lacks weights ({min(absent)}, ...): download it anew"
        )
    return TextEncoder(config, encoder, tokenizer, compute, known)


def framed(tokenizer: Any, config: Config) -> Any:
    """Return a tokenizer that adds the template to each caption, or at least an end token.

    So a caption that is too long is cut but the template is not, and an exported tokenizer does the
    same. It has the generic class, because the classes for single models drop, when they are loaded
    again, what was added to them.

    Errors  BadRecipe if the template leaves no room for a caption.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BadRecipe(
            f"text.encoder = {config.encoder!r} has no tokenizer.json: save its tokenizer with the "
            "newest transformers, or name another encoder"
        )
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # some tokenizers store a padding
    before, after = (
        tokenizer(side, add_special_tokens=False)["input_ids"] if side else []
        for side in config.template.split("{}")
    )
    bare, usual = (backend.encode("a", add_special_tokens=own).ids for own in (False, True))
    first = next(n for n in range(len(usual)) if usual[n : n + len(bare)] == bare)
    frame = {"<before>": usual[:first] + before, "<after>": after + usual[first + len(bare) :]}
    if not any(frame.values()):
        frame["<after>"] = [tokenizer.eos_token_id]
    taken = sum(map(len, frame.values()))
    if taken >= config.max_tokens:
        raise BadRecipe(
            f"text.template takes {taken} tokens, which leaves none for a caption: raise "
            f"text.max_tokens = {config.max_tokens}"
        )
    sides = {name: ids for name, ids in frame.items() if ids}
    backend.post_processor = processors.TemplateProcessing(
        single=[name for name in ("<before>", "$A", "<after>") if name in {"$A", *sides}],
        special_tokens=[
            {"id": name, "ids": ids, "tokens": [backend.id_to_token(one) for one in ids]}
            for name, ids in sides.items()
        ],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=tokenizer.pad_token or tokenizer.eos_token,
        eos_token=tokenizer.eos_token,
        model_max_length=config.max_tokens,
        padding_side="right",
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence warnings of `transformers` about weights left out on purpose and GPU-only kernels."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _shorten(words: Any, config: Config) -> None:
    """Remove the last `skip` layers from a configuration. Errors: BadRecipe if none remain."""
    left = words.num_hidden_layers - config.skip
    if left < 1:
        raise BadRecipe(
            f"text.skip = {config.skip} leaves no layer of the {words.num_hidden_layers} of "
            f"{config.encoder}"
        )
    words.num_hidden_layers = left
    words.use_cache = False  # the cache of keys and values serves generation only
    if config.skip and getattr(words, "layer_types", None):
        words.layer_types = words.layer_types[:left]
