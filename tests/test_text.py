"""Words: a tokenizer that knows every text, and encoders trained or frozen."""

from pathlib import Path

import pytest
import torch

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


def test_the_empty_prompt_is_one_token() -> None:
    _, mask = scratch().tokenize(["", "a red circle"])
    assert mask.sum(1).tolist() == [1, 4]


def test_captions_are_padded_to_few_lengths_and_cut_at_the_limit() -> None:
    encoder = scratch()
    assert encoder.tokenize(["a red circle"])[0].shape == (1, 8)
    assert encoder.tokenize(["red " * 100])[0].shape == (1, 16)


def test_the_other_captions_of_a_batch_change_nothing() -> None:
    encoder = scratch()
    alone = encoder(["a red circle"])
    together = encoder(["a red circle", "a blue square left of a green star and a white cross"])
    assert together.tokens.shape[1] > alone.tokens.shape[1]
    torch.testing.assert_close(alone.tokens[0, :4], together.tokens[0, :4], atol=1e-5, rtol=1e-4)


def test_an_encoder_from_nothing_learns_and_computes_in_the_precision_asked_for() -> None:
    encoder = scratch()
    encoder.compute = torch.bfloat16
    words = encoder(["a red circle"])
    assert words.tokens.dtype == torch.bfloat16
    words.tokens.float().square().mean().backward()
    gradients = [parameter.grad for parameter in encoder.parameters()]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)


def saved_t5(folder: Path) -> Path:
    """A tiny encoder-decoder, saved as its users publish it."""
    from transformers import T5Config, T5ForConditionalGeneration

    text.learn_tokenizer(CAPTIONS, CONFIG).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 3}
    T5ForConditionalGeneration(T5Config(vocab_size=400, **size)).save_pretrained(folder)
    return folder


def saved_bert(folder: Path) -> Path:
    """A tiny encoder-only model."""
    from transformers import BertConfig, BertModel

    text.learn_tokenizer(CAPTIONS, CONFIG).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    BertModel(BertConfig(vocab_size=400, intermediate_size=32, **size)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("saved", [saved_t5, saved_bert])
def test_any_frozen_encoder_loads_from_a_local_folder(tmp_path: Path, saved: object) -> None:
    folder = saved(tmp_path)  # type: ignore[operator]
    encoder = text.pretrained(text.Config(encoder=str(folder), max_tokens=16))
    words = encoder(["a red circle", ""])
    assert words.tokens.shape == (2, 8, 24)
    assert encoder.width == 24
    assert not words.tokens.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_a_missing_encoder_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=r"text\.encoder = '.*nothing'"):
        text.pretrained(text.Config(encoder=str(tmp_path / "nothing")))


def test_cleaning_mends_text_and_keeps_its_meaning() -> None:
    assert text.clean("  the sign says &quot;No. 7 (B)&quot;  ") == 'the sign says "No. 7 (B)"'
    assert text.clean("schÃ¶n 数字") == "schön 数字"
