"""Words: a tokenizer that knows every text, and encoders trained or frozen."""

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ftfy
import pytest
import tokenizers
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from daybreak.failure import BadRecipe
from daybreak.model import text

CAPTIONS = ["a red circle", "a blue square left of a green star", "two white crosses"] * 20
CONFIG = text.Config(width=32, depth=2, heads=2, vocabulary=400, max_tokens=16)


def scratch() -> text.TextEncoder:
    torch.manual_seed(0)
    return text.scratch(CONFIG, text.learn_tokenizer(CAPTIONS, CONFIG))


def test_the_tokenizer_is_the_same_whatever_the_order_of_the_captions() -> None:
    one = text.learn_tokenizer(CAPTIONS, CONFIG)
    other = text.learn_tokenizer(reversed(CAPTIONS), CONFIG)
    assert one.get_vocab() == other.get_vocab()


def test_no_text_is_unknown_and_a_frequent_word_is_one_token() -> None:
    tokenizer = text.learn_tokenizer(CAPTIONS, CONFIG)
    assert len(tokenizer("a red circle")["input_ids"]) == 4  # three words and the end
    for words in ("a zebra", "ein grüner Löwe", "数字 7", "🦓"):
        ids = tokenizer(words)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == words.lower()


@given(st.text(st.characters(max_codepoint=255), max_size=40))
@example("a red  circle ")
@example("-- ``quoted'' ... fl ff (c) 1/2 #1; \\x41 %20 <b> ~")
@example("&amp;amp; &#39;\r\n\x1b[31m")
def test_what_can_be_broken_in_a_caption_is_mended(caption: str) -> None:
    mended = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
    assert text.clean(caption) == mended


def test_a_word_is_the_same_token_wherever_it_stands_and_however_it_is_typed() -> None:
    tokenizer = text.learn_tokenizer(["a red circle", "a café"] * 20, CONFIG)
    article, red, circle, end = tokenizer("a red circle")["input_ids"]
    assert tokenizer("red circle")["input_ids"] == [red, circle, end]
    assert tokenizer("A RED circle")["input_ids"] == [article, red, circle, end]
    assert tokenizer("a cafe\u0301")["input_ids"] == tokenizer("a caf\u00e9")["input_ids"]
    assert len(tokenizer("a cafe\u0301")["input_ids"]) == 3


def test_a_tokenizer_is_as_large_as_was_asked_for_and_knows_its_limit() -> None:
    words = [f"{one}{two}{three}" for one in "bcdfgh" for two in "aeiouy" for three in "jklmn"]
    tokenizer = text.learn_tokenizer(words, CONFIG)
    assert len(tokenizer) == CONFIG.vocabulary
    assert tokenizer.model_max_length == CONFIG.max_tokens


def test_captions_are_mended_before_they_are_learned_from_read_or_measured() -> None:
    broken, whole = "  a red &amp; a blue circle ", "a red & a blue circle"
    one, other = (text.learn_tokenizer([caption] * 9, CONFIG) for caption in (broken, whole))
    assert one.get_vocab() == other.get_vocab()
    encoder = scratch()
    assert torch.equal(encoder.tokenize([broken])[0], encoder.tokenize([whole])[0])
    assert (
        encoder.length(broken) == encoder.length(whole) == int(encoder.tokenize([whole])[1].sum())
    )


def test_the_empty_prompt_is_one_token() -> None:
    _, mask = scratch().tokenize(["", "a red circle"])
    assert mask.sum(1).tolist() == [1, 4]


def test_captions_are_padded_to_few_lengths_and_cut_at_the_limit() -> None:
    encoder = scratch()
    assert encoder.tokenize(["a red circle"])[0].shape == (1, 8)
    assert encoder.tokenize(["red " * 100])[0].shape == (1, 16)


@pytest.mark.parametrize(
    ("limit", "step"),
    [(8, 8), (24, 8), (32, 8), (40, 40), (48, 16), (64, 16), (72, 24), (128, 32), (256, 64)],
)
def test_whatever_the_limit_there_are_four_lengths_at_most(limit: int, step: int) -> None:
    assert text.Config(max_tokens=limit).length_step == step
    assert len({-(-words // step) for words in range(1, limit + 1)}) <= 4


@pytest.mark.parametrize("limit", range(8, 264, 8))
def test_a_caption_is_cut_at_any_limit_that_is_allowed(limit: int) -> None:
    config = CONFIG.model_copy(update={"max_tokens": limit})
    encoder = text.scratch(config, text.learn_tokenizer(["a red circle"] * 10, config))
    assert encoder.tokenize(["red " * 300])[0].shape == (1, limit)


def test_with_one_length_every_batch_is_as_long_as_may_be() -> None:
    config = CONFIG.model_copy(update={"lengths": 1})
    encoder = text.scratch(config, text.learn_tokenizer(["a red circle"] * 10, config))
    assert encoder.tokenize(["a red circle"])[0].shape == (1, config.max_tokens)


def test_the_other_captions_of_a_batch_change_nothing() -> None:
    encoder = scratch()
    alone = encoder(["a red circle"])
    together = encoder(["a red circle", "a blue square left of a green star and a white cross"])
    assert together.tokens.shape[1] > alone.tokens.shape[1]
    torch.testing.assert_close(alone.tokens[0, :4], together.tokens[0, :4], atol=1e-5, rtol=1e-4)


def test_a_word_knows_the_words_before_it_from_the_first_step() -> None:
    encoder = scratch()
    captions = ["a red circle left of a green star", "a green circle left of a red star"]
    one, other = encoder(captions).tokens
    length = one.norm(dim=-1)
    unlike = (one - other).norm(dim=-1) / length
    circle, left = 2, 3
    assert unlike[circle] > 0.1
    assert unlike[left] > 0.1
    assert unlike[0] == 0  # nothing stands before it


def test_a_convolution_sees_five_words_back_and_no_further() -> None:
    config = CONFIG.model_copy(update={"depth": 1})  # a convolution and no attention
    torch.manual_seed(0)
    encoder = text.scratch(config, text.learn_tokenizer(CAPTIONS, config))
    one, other = encoder(
        [f"{colour} circle circle circle circle circle circle" for colour in ("red", "blue")]
    ).tokens
    told = (one - other).norm(dim=-1) > 1e-6
    assert told.tolist() == [True] * 6 + [False] * 2


def test_an_encoder_from_nothing_has_the_heads_and_the_spread_of_words_that_are_asked_for() -> None:
    encoder: Any = scratch().encoder
    assert encoder.config.num_attention_heads == CONFIG.heads
    assert float(encoder.embed_tokens.weight.detach().std()) == pytest.approx(0.5, rel=0.03)
    with pytest.raises(ValidationError, match="heads = 3 does not divide width = 32"):
        text.Config(width=32, heads=3)


def test_where_no_gradient_is_asked_for_an_encoder_keeps_none() -> None:
    encoder = scratch()
    assert encoder(["a red circle"]).tokens.requires_grad
    with torch.no_grad():
        assert not encoder(["a red circle"]).tokens.requires_grad


def test_an_encoder_from_nothing_learns_and_computes_in_the_precision_asked_for() -> None:
    encoder = scratch()
    encoder.compute = torch.bfloat16
    words = encoder(["a red circle"])
    assert words.tokens.dtype == torch.bfloat16
    words.tokens.float().square().mean().backward()
    gradients = [parameter.grad for parameter in encoder.parameters()]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)


DECODER = {"vocab_size": 400, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3}
DECODER |= {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}
T5 = {"vocab_size": 400, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 3}


def flan_t5() -> tuple[Any, Any]:
    """As published, and its half that reads."""
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    )
    return model, model.encoder


def t5gemma() -> tuple[Any, Any]:
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

    half = DECODER | {"query_pre_attn_scalar": 8, "sliding_window": 4}
    model = T5GemmaForConditionalGeneration(
        T5GemmaConfig(encoder=half, decoder=half, vocab_size=400)
    )
    return model, model.model.encoder


def qwen3() -> tuple[Any, Any]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**DECODER))
    return model, model.model


def qwen3_vl() -> tuple[Any, Any]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    turns: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    eye: dict[str, Any] = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    eye |= {"out_hidden_size": 24, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=DECODER | {"rope_parameters": turns | {"mrope_interleaved": True}},
            vision_config=eye,
        )
    )
    return model, model.model.language_model


def bert() -> tuple[Any, Any]:
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
    model = BertModel(BertConfig(vocab_size=400, intermediate_size=32, **size))
    return model, model


TOWERS = [flan_t5, t5gemma, qwen3, qwen3_vl, bert]
PUBLISHED = TOWERS[:4]
Tower = Callable[[], tuple[Any, Any]]
CAPTION, LONGER = "a red circle", "a blue square left of a green star and a white cross"


def saved(tower: Tower, folder: Path, ends: bool = True) -> Any:
    """A tiny tower as its users publish it, with or without an end after each text.

    Returns the half that reads, with matrices large enough for words to differ.
    """
    tokenizer = text.learn_tokenizer(CAPTIONS, CONFIG)
    if not ends:
        tokenizer.backend_tokenizer.post_processor = None
    tokenizer.padding_side = "left"  # as GPT's heirs are saved
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model, reads = tower()
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    model.eval().save_pretrained(folder)
    return reads


def named(folder: Path, **more: Any) -> text.Config:
    return text.Config(encoder=str(folder), max_tokens=16, **more)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_frozen_encoder_says_what_the_published_model_says(tmp_path: Path, tower: Tower) -> None:
    theirs = saved(tower, tmp_path)
    encoder = text.pretrained(named(tmp_path))
    words = encoder([CAPTION, ""])
    assert words.tokens.shape == (2, 8, 24)
    assert words.mask.sum(1).tolist() == [4, 1]
    assert encoder.width == 24
    assert not words.tokens.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())

    ids, mask = encoder.tokenize([CAPTION, ""])
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask)["last_hidden_state"]
    torch.testing.assert_close(words.tokens[mask], expected[mask])


@pytest.mark.parametrize("tower", TOWERS)
def test_padding_and_neighbours_are_inert_in_every_tower(tmp_path: Path, tower: Tower) -> None:
    saved(tower, tmp_path)
    encoder = text.pretrained(named(tmp_path))
    alone, together = encoder([CAPTION]), encoder([CAPTION, LONGER])
    assert together.tokens.shape[1] > alone.tokens.shape[1]
    assert together.mask[0].tolist() == [True] * 4 + [False] * 12  # on the right, whatever was set
    torch.testing.assert_close(alone.tokens[0, :4], together.tokens[0, :4], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tower", PUBLISHED)
def test_half_precision_rounds_weights_and_not_positions(tmp_path: Path, tower: Tower) -> None:
    saved(tower, tmp_path)
    full, half = (
        text.pretrained(named(tmp_path), dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    exact, near = full([LONGER]), half([LONGER])
    assert near.tokens.dtype == torch.bfloat16
    assert (near.tokens - exact.tokens).norm() / exact.tokens.norm() < 0.06
    for ours, theirs in zip(half.buffers(), full.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tower", PUBLISHED)
def test_layers_left_out_leave_an_earlier_state_and_are_not_exported(
    tmp_path: Path, tower: Tower
) -> None:
    from transformers import AutoModel, AutoModelForTextEncoding

    theirs = saved(tower, tmp_path / "published")
    encoder = text.pretrained(named(tmp_path / "published", skip=1))
    ids, mask = encoder.tokenize([CAPTION, LONGER])
    with torch.no_grad():
        states = theirs(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        norm = theirs.final_layer_norm if tower is flan_t5 else theirs.norm
        expected = norm(states["hidden_states"][-2])
    words = encoder([CAPTION, LONGER])
    torch.testing.assert_close(words.tokens[mask], expected[mask])

    encoder.encoder.save_pretrained(tmp_path / "exported")  # type: ignore[operator]
    small, large = (
        sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
        for folder in (tmp_path / "exported", tmp_path / "published")
    )
    assert small < large
    loader = AutoModelForTextEncoding if tower in (flan_t5, t5gemma) else AutoModel
    again = loader.from_pretrained(tmp_path / "exported")
    with torch.no_grad():
        found = again(input_ids=ids, attention_mask=mask)["last_hidden_state"]
    torch.testing.assert_close(found[mask], words.tokens[mask])


def test_a_template_stands_around_every_caption_and_is_never_cut(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    saved(qwen3, tmp_path)
    config = named(tmp_path, template="two {} left of")
    encoder = text.pretrained(config)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    before, caption, after = (
        plain(words, add_special_tokens=False)["input_ids"]
        for words in ("two ", CAPTION, " left of")
    )
    ids, mask = encoder.tokenize([CAPTION, "", "red " * 50])
    assert ids[0][mask[0]].tolist() == [*before, *caption, *after, 1]
    assert ids[1][mask[1]].tolist() == [*before, *after, 1]
    assert mask[2].all()
    assert ids[2, -len(after) - 1 :].tolist() == [*after, 1]

    encoder.tokenizer.save_pretrained(tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    again = exported(CAPTION, padding="max_length", max_length=16, truncation=True)
    assert again["input_ids"][: int(mask[0].sum())] == ids[0][mask[0]].tolist()
    assert exported.padding_side == "right"


def test_a_template_comes_after_what_begins_and_before_what_ends_each_text(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = text.learn_tokenizer(CAPTIONS, CONFIG)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A </s>", special_tokens=[("<pad>", 0), ("</s>", 1)]
    )
    before, caption, after = (
        tokenizer(words, add_special_tokens=False)["input_ids"]
        for words in ("two ", CAPTION, " left of")
    )
    config = text.Config(encoder="any", max_tokens=16, template="two {} left of")
    framed = text.framed(tokenizer, config)
    assert framed(CAPTION)["input_ids"] == [0, *before, *caption, *after, 1]
    assert framed.model_max_length == 16  # what an exported pipeline cuts at


def test_a_template_that_leaves_no_token_for_a_caption_is_refused() -> None:
    tokenizer = text.learn_tokenizer(CAPTIONS, CONFIG)
    fits = text.Config(encoder="any", max_tokens=8, template="red " * 5 + "{}")  # a space, an end
    assert len(text.framed(tokenizer, fits)("")["input_ids"]) == 7
    full = fits.model_copy(update={"template": "red " * 6 + "{}"})
    with pytest.raises(BadRecipe, match=r"takes 8 tokens, .*text\.max_tokens = 8"):
        text.framed(text.learn_tokenizer(CAPTIONS, CONFIG), full)


def test_a_tokenizer_that_pads_with_nothing_pads_with_its_end() -> None:
    tokenizer = text.learn_tokenizer(CAPTIONS, CONFIG)
    tokenizer.pad_token = None  # as GPT-2's
    framed = text.framed(tokenizer, text.Config(encoder="any", max_tokens=16))
    padded = framed(["a red circle", ""], padding="longest")
    assert padded["input_ids"][1] == [1, 1, 1, 1]
    assert padded["attention_mask"][1] == [1, 0, 0, 0]


def test_a_tokenizer_without_a_file_of_its_own_is_refused() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(BadRecipe, match=r"text\.encoder = 'byt5' has no tokenizer\.json"):
        text.framed(ByT5Tokenizer(), text.Config(encoder="byt5"))


@pytest.mark.parametrize("tower", PUBLISHED)
def test_the_empty_prompt_is_a_word_where_the_tokenizer_adds_none(
    tmp_path: Path, tower: Tower
) -> None:
    saved(tower, tmp_path, ends=False)
    encoder = text.pretrained(named(tmp_path))
    words = encoder(["", CAPTION])
    assert words.mask.sum(1).tolist() == [1, 4]
    assert words.tokens.isfinite().all()


def test_the_class_of_a_tokenizer_does_not_undo_the_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, T5Tokenizer

    letters = [(sign, -3.0) for sign in "abcdefghijklmnopqrstuvwxyz"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    theirs = T5Tokenizer(vocab=[*special, *letters], extra_ids=0)
    framed = text.framed(theirs, text.Config(encoder="t5", template="of {}"))
    framed.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("ab")["input_ids"] == framed("ab")["input_ids"]
    assert again.decode(again("ab")["input_ids"]).startswith("of")


def test_what_an_encoder_cannot_do_is_said_in_one_sentence(tmp_path: Path) -> None:
    saved(qwen3, tmp_path)
    for more, message in (
        ({"skip": 3}, r"text\.skip = 3 leaves no layer of the 3"),
        ({"template": "red " * 20 + "{}"}, r"text\.template takes 22 tokens.*max_tokens = 16"),
    ):
        with pytest.raises(BadRecipe, match=message):
            text.pretrained(named(tmp_path, **more))
    for wrong, message in (
        ({"encoder": "t5", "template": "of"}, r"must hold \{\} once"),
        ({"encoder": "t5", "template": "{} {}"}, r"must hold \{\} once"),
        ({"skip": 1}, "are for a frozen encoder"),
        ({"template": "of {}"}, "are for a frozen encoder"),
    ):
        with pytest.raises(ValidationError, match=message):
            text.Config(**wrong)


def test_an_encoder_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    saved(qwen3, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    kept = {name: tensor for name, tensor in weights.items() if name != lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadRecipe, match=r"lacks weights \(layers\.1\.mlp\.up_proj\.weight"):
        text.pretrained(named(tmp_path))


def test_an_encoder_needs_no_pooler(tmp_path: Path) -> None:
    saved(bert, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert text.pretrained(named(tmp_path))([CAPTION]).tokens.isfinite().all()


def test_loading_an_encoder_leaves_transformers_as_talkative_as_it_was(tmp_path: Path) -> None:
    from transformers.utils import logging

    saved(qwen3, tmp_path)
    before = logging.get_verbosity()
    try:
        logging.set_verbosity_info()
        text.pretrained(named(tmp_path))([CAPTION])
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(before)


def test_a_missing_or_damaged_encoder_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=r"text\.encoder = '.*nothing'"):
        text.pretrained(named(tmp_path / "nothing"))
    saved(qwen3, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadRecipe, match=r"text\.encoder = .* a local folder") as caught:
        text.pretrained(named(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", None])
def test_damaged_weights_of_the_older_kind_are_one_clear_sentence(
    content: bytes | None, tmp_path: Path
) -> None:
    saved(bert, tmp_path)
    old, new = tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors"
    torch.save(load_file(new), old)
    new.unlink()
    whole = old.read_bytes()
    old.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(BadRecipe, match=r"text\.encoder = .* a local folder") as caught:
        text.pretrained(named(tmp_path))
    assert "\n" not in str(caught.value)


def test_padding_that_a_tokenizer_stores_is_not_a_part_of_the_caption(tmp_path: Path) -> None:
    saved(bert, tmp_path)
    wanted = text.pretrained(named(tmp_path)).tokenize([CAPTION, ""])
    stored = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stored.enable_padding(length=12, pad_id=0, pad_token="<pad>")
    stored.save(str(tmp_path / "tokenizer.json"))
    found = text.pretrained(named(tmp_path)).tokenize([CAPTION, ""])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_cleaning_mends_text_and_keeps_its_meaning() -> None:
    assert text.clean("  the sign says &quot;No. 7 (B)&quot;  ") == 'the sign says "No. 7 (B)"'
    assert text.clean("schÃ¶n 数字") == "schön 数字"
