"""Words: a tokenizer that knows every text, and encoders trained or frozen."""

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ftfy
import pytest
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


def test_a_missing_or_damaged_encoder_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=r"text\.encoder = '.*nothing'"):
        text.pretrained(named(tmp_path / "nothing"))
    saved(qwen3, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadRecipe, match=r"text\.encoder = .* a local folder") as caught:
        text.pretrained(named(tmp_path))
    assert "\n" not in str(caught.value)


def test_cleaning_mends_text_and_keeps_its_meaning() -> None:
    assert text.clean("  the sign says &quot;No. 7 (B)&quot;  ") == 'the sign says "No. 7 (B)"'
    assert text.clean("schÃ¶n 数字") == "schön 数字"
