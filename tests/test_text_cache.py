"""Embeddings kept on disk: the encoder's own numbers, and never those of another caption."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from daybreak.failure import BadData, BadRecipe, BadStorage
from daybreak.model import text, text_cache
from daybreak.model.text import Config, TextEncoder
from tests import warm

CAPTIONS = [
    *("a red circle", "a blue square left of a green star", "two white crosses", "ein grüner Löwe"),
    *("数字 7", "the sign says &quot;No. 7&quot;", "red " * 50, " a red  circle", "a red circle"),
]


def saved(folder: Path, seed: int = 0, kind: str = "bert") -> Path:
    """A tiny encoder with random weights, as its users would publish it."""
    from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

    text.learn_tokenizer(CAPTIONS * 20, Config(vocabulary=400)).save_pretrained(folder)
    torch.manual_seed(seed)
    if kind == "t5":
        size = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
        T5EncoderModel(T5Config(vocab_size=400, **size)).save_pretrained(folder)
    else:
        size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
        BertModel(BertConfig(vocab_size=400, intermediate_size=32, **size)).save_pretrained(folder)
    return folder


def loaded(
    folder: Path, compute: torch.dtype = torch.float32, known: text.Known | None = None
) -> TextEncoder:
    return text.pretrained(Config(encoder=str(folder), max_tokens=16), compute, known)


def opened(dataset: Path, encoder: TextEncoder) -> text_cache.Reader:
    reader = text_cache.reader([dataset], encoder.config, encoder.compute)
    assert reader is not None
    return reader


@pytest.mark.parametrize("kind", ["bert", "t5"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_the_encoder_gives(
    tmp_path: Path, kind: str, compute: torch.dtype
) -> None:
    encoder = loaded(saved(tmp_path / "encoder", kind=kind), compute)
    text_cache.write(tmp_path, encoder, CAPTIONS)
    reader = opened(tmp_path, encoder)
    close = 1e-6 if compute == torch.float32 else 0.05
    for captions in ([""], CAPTIONS, CAPTIONS[::-1], ["", CAPTIONS[1], ""], CAPTIONS[:1] * 5):
        found, exact = reader.tokens(captions), encoder(captions)
        assert found is not None
        assert found.tokens.shape == exact.tokens.shape
        assert found.tokens.dtype == compute
        assert torch.equal(found.mask, exact.mask)
        words = found.tokens[exact.mask], exact.tokens[exact.mask]
        torch.testing.assert_close(*words, atol=close, rtol=0)
        assert not found.tokens[~found.mask].any()


def test_a_caption_is_known_by_what_is_tokenised(tmp_path: Path) -> None:
    encoder = loaded(saved(tmp_path / "encoder"))
    text_cache.write(tmp_path, encoder, CAPTIONS)
    reader = opened(tmp_path, encoder)
    assert len(reader.digests) == len(CAPTIONS)  # two are the same, and the empty one joins them
    assert reader.tokens(['the sign says "No. 7"']) is not None
    for changed in ("a red circles", "A red circle", "a  red circle", "a red circle."):
        assert reader.tokens([changed]) is None
        assert reader.tokens(["a red circle", changed]) is None


def test_a_cache_is_found_by_contents_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path / "encoder")
    encoder = loaded(folder)
    text_cache.write(tmp_path, encoder, CAPTIONS)
    config = encoder.config
    moved = folder.rename(tmp_path / "elsewhere")
    same = config.model_copy(update={"encoder": str(moved), "width": 512, "vocabulary": 300})
    assert text_cache.reader([tmp_path], same, torch.float32) is not None
    longer = same.model_copy(update={"max_tokens": 24})
    assert text_cache.reader([tmp_path], longer, torch.float32) is None
    assert text_cache.reader([tmp_path], same, torch.bfloat16) is None

    (moved / ".cache").mkdir()
    (moved / ".cache" / "left").write_text("by a download")
    assert text_cache.reader([tmp_path], same, torch.float32) is not None
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        before = (moved / name).read_bytes()
        (moved / name).write_bytes(before + b" ")
        assert text_cache.reader([tmp_path], same, torch.float32) is None
        (moved / name).write_bytes(before)
    assert text_cache.reader([tmp_path], same, torch.float32) is not None
    saved(moved, seed=1)
    assert text_cache.reader([tmp_path], same, torch.float32) is None


def test_every_setting_of_a_frozen_encoder_has_a_say_in_the_name(tmp_path: Path) -> None:
    """A setting that is new some day is taken to matter until somebody says it does not."""
    folder = saved(tmp_path)
    used = text_cache.settings(Config(encoder=str(folder)), torch.float32)["settings"]
    assert set(used) == set(Config.model_fields) - text_cache.OURS


def test_training_reads_what_is_known_and_encodes_the_rest(tmp_path: Path) -> None:
    folder = saved(tmp_path / "encoder")
    text_cache.write(tmp_path, loaded(folder), CAPTIONS)
    known = opened(tmp_path, loaded(folder)).tokens
    plain, other = loaded(folder), loaded(saved(tmp_path / "other", seed=1), known=known)
    for captions in (["a red circle", ""], CAPTIONS):
        mask = plain(captions).mask
        torch.testing.assert_close(
            other(captions).tokens[mask], plain(captions).tokens[mask], atol=1e-6, rtol=0
        )
    new = ["a red circle", "a caption nobody has seen"]
    assert not torch.allclose(other(new).tokens, plain(new).tokens, atol=1e-2)


def test_what_is_expected_is_in_memory_when_it_is_asked_for(tmp_path: Path) -> None:
    encoder = loaded(saved(tmp_path / "encoder"))
    text_cache.write(tmp_path, encoder, CAPTIONS)
    reader = opened(tmp_path, encoder)
    exact = reader.tokens(CAPTIONS[:6])
    assert exact is not None
    reader.expect(CAPTIONS[:4])
    reader.expect(["never seen", *CAPTIONS[4:6]])  # nothing to read ahead: it will be encoded
    for shard in reader.shards:
        shard[:] = 0  # as slow as it may be, nobody looks there any more
    found = reader.tokens(CAPTIONS[:4])
    assert found is not None
    torch.testing.assert_close(found.tokens, exact.tokens[:4, : found.tokens.shape[1]])
    late = reader.tokens(CAPTIONS[4:6])
    assert late is not None
    assert not late.tokens.any()
    for rows in (slice(0, 2), slice(2, 4)):  # a batch in two passes
        part = reader.tokens(CAPTIONS[rows])
        assert part is not None
        assert part.tokens.shape[1] == encoder.tokenize(CAPTIONS[rows])[0].shape[1]
        torch.testing.assert_close(part.tokens, exact.tokens[rows, : part.tokens.shape[1]])


def test_a_caption_that_was_expected_is_not_cleaned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = loaded(saved(tmp_path / "encoder"))
    text_cache.write(tmp_path, encoder, CAPTIONS)
    reader = opened(tmp_path, encoder)
    text_cache._digest.cache_clear()
    reader.expect(CAPTIONS)
    monkeypatch.setattr(text_cache, "clean", None)
    assert reader.tokens(CAPTIONS) is not None


def test_only_new_captions_are_encoded(tmp_path: Path) -> None:
    encoder = loaded(saved(tmp_path / "encoder"))
    asked: list[str] = []
    encoder.register_forward_pre_hook(lambda _, given: asked.extend(given[0]))
    heard: list[int] = []
    text_cache.write(tmp_path, encoder, CAPTIONS[:3], heard.append)
    assert sorted(asked) == sorted(["", *CAPTIONS[:3]])
    assert heard == [1, 2, 3]
    folder = text_cache.write(tmp_path, encoder, CAPTIONS)
    assert len(asked) == len(set(asked)) == len(CAPTIONS)  # one of which differs in spaces alone
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    text_cache.write(tmp_path, encoder, CAPTIONS)
    assert len(asked) == len(CAPTIONS)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_several_processes_share_a_dataset_out(tmp_path: Path) -> None:
    encoder = loaded(saved(tmp_path / "encoder"))
    for number in (2, 1, 3):
        assert text_cache.partial([tmp_path], encoder.config, encoder.compute) == [tmp_path]
        text_cache.write(tmp_path, encoder, CAPTIONS, part=text_cache.Part(number, 3))
    assert text_cache.partial([tmp_path], encoder.config, encoder.compute) == []
    found = opened(tmp_path, encoder).tokens(CAPTIONS)
    assert found is not None
    exact = encoder(CAPTIONS)
    assert torch.equal(found.mask, exact.mask)
    assert float((found.tokens - exact.tokens)[exact.mask].abs().max()) < 1e-6
    asked: list[str] = []
    encoder.register_forward_pre_hook(lambda _, given: asked.extend(given[0]))
    text_cache.write(tmp_path, encoder, CAPTIONS)
    assert asked == [], "what the parts hold is not encoded again"
    text_cache.verify(tmp_path)


def test_one_process_at_a_time_writes_a_cache(tmp_path: Path) -> None:
    encoder = loaded(saved(tmp_path / "encoder"))

    def write_too(_: int) -> None:
        with pytest.raises(BadRecipe, match="another command is encoding captions"):
            text_cache.write(tmp_path, encoder, CAPTIONS)

    text_cache.write(tmp_path, encoder, CAPTIONS[:3], write_too)
    text_cache.write(tmp_path, encoder, CAPTIONS)
    assert opened(tmp_path, encoder).tokens(CAPTIONS) is not None


def test_many_shards_are_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = loaded(saved(tmp_path / "encoder"))
    monkeypatch.setattr(text_cache, "SHARD_BYTES", 1500)
    monkeypatch.setattr(text_cache, "AHEAD", 7)
    monkeypatch.setattr(text_cache, "BATCH", 3)
    captions = [f"{'red ' * (number % 9)}circle {number}" for number in range(60)]
    folder = text_cache.write(tmp_path, encoder, captions)
    assert len(list(folder.glob("*.safetensors"))) > 10
    found, exact = opened(tmp_path, encoder).tokens(captions), encoder(captions)
    assert found is not None
    torch.testing.assert_close(
        found.tokens[exact.mask], exact.tokens[exact.mask], atol=1e-6, rtol=0
    )


def test_several_datasets_are_read_as_one(tmp_path: Path) -> None:
    encoder = loaded(saved(tmp_path / "encoder"))
    one, two, without = (tmp_path / name for name in ("one", "two", "without"))
    text_cache.write(one, encoder, CAPTIONS[:2])
    text_cache.write(two, encoder, CAPTIONS[2:4])
    reader = text_cache.reader([one, without, two], encoder.config, encoder.compute)
    assert reader is not None
    assert reader.tokens(CAPTIONS[:4]) is not None
    assert reader.tokens(CAPTIONS[:5]) is None


def test_a_kill_costs_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = loaded(saved(tmp_path / "encoder"))
    monkeypatch.setattr(text_cache, "SHARD_BYTES", 1500)
    monkeypatch.setattr(text_cache, "AHEAD", 4)
    captions = [f"circle {number}" for number in range(40)]

    def until_the_power_fails() -> object:
        yield from captions[:30]
        raise KeyboardInterrupt

    def partial() -> list[Path]:
        return text_cache.partial([tmp_path], encoder.config, encoder.compute)

    assert partial() == [tmp_path]
    with pytest.raises(KeyboardInterrupt):
        text_cache.write(tmp_path, encoder, until_the_power_fails())  # type: ignore[arg-type]
    assert partial() == [tmp_path]
    kept = len(opened(tmp_path, encoder).digests)
    assert 15 < kept < 30
    folder = text_cache.write(tmp_path, encoder, captions)
    reader = opened(tmp_path, encoder)
    assert len(set(reader.digests.tolist())) == len(reader.digests) == 41
    assert reader.tokens(captions) is not None
    assert not list(folder.glob(".tmp-*"))
    assert partial() == []


def test_a_kill_before_the_first_shard_leaves_a_cache_that_knows_nothing(tmp_path: Path) -> None:
    encoder = loaded(saved(tmp_path / "encoder"))

    def nothing_yet() -> Iterator[str]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        text_cache.write(tmp_path, encoder, nothing_yet())
    assert opened(tmp_path, encoder).tokens(["a red circle"]) is None


def cut(folder: Path) -> None:
    path = folder / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def gone(folder: Path) -> None:
    (folder / "00000.safetensors").unlink()


def garbled(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize("harm", [cut, gone, garbled])
def test_a_damaged_cache_is_refused_with_a_remedy(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    encoder = loaded(saved(tmp_path / "encoder"))
    harm(text_cache.write(tmp_path, encoder, CAPTIONS))
    with pytest.raises(BadData, match="remove this folder and run"):
        opened(tmp_path, encoder)


def test_a_flipped_bit_is_found_when_asked_for(tmp_path: Path) -> None:
    text_cache.verify(tmp_path)
    folder = text_cache.write(tmp_path, loaded(saved(tmp_path / "encoder")), CAPTIONS)
    text_cache.verify(tmp_path)
    data = bytearray((folder / "00000.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "00000.safetensors").write_bytes(data)
    with pytest.raises(BadData, match=r"damaged: 00000\.safetensors has sha256"):
        text_cache.verify(tmp_path)


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a file where a folder should be")
    with pytest.raises(BadStorage, match="cannot write"):
        text_cache.write(tmp_path, loaded(saved(tmp_path / "encoder")), CAPTIONS)


def test_without_a_cache_nothing_is_hashed(tmp_path: Path) -> None:
    config = Config(encoder="nobody/nothing")
    assert text_cache.reader([tmp_path], config, torch.float32) is None
    (tmp_path / "text").mkdir()
    assert text_cache.reader([tmp_path], Config(), torch.float32) is None
    with pytest.raises(BadRecipe, match=r"text\.encoder = 'nobody/nothing'"):
        text_cache.reader([tmp_path], config, torch.float32)


def test_a_hub_id_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub cache as downloads leave it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        saved(repository / "snapshots" / commit)
        (repository / "refs" / "main").write_text(commit)
        made_with = text_cache.settings(Config(encoder="someone/tiny"), torch.float32)
        assert made_with["encoder"] == {"someone/tiny": commit}


def test_the_manifest_says_what_the_numbers_were_made_with(tmp_path: Path) -> None:
    folder = text_cache.write(tmp_path, loaded(saved(tmp_path / "encoder")), CAPTIONS)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["precision"] == "float32"
    assert manifest["settings"] == {"max_tokens": 16, "template": "{}", "skip": 0}
    assert list(manifest["shards"]) == ["00000.safetensors"]
    assert folder.parent == tmp_path / "text"


def test_a_run_takes_the_same_steps_with_and_without_a_cache(
    tiny: Path, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    from daybreak import config
    from daybreak.train import loop

    rows = [{"captions": [f"a {word} circle", f"{word}"]} for word in ("red", "blue", "green")]
    dataset, encoder = prepared(rows * 4), saved(tmp_path / "encoder")
    losses = []
    for out in ("without", "with"):
        told: list[str] = []
        values = {"out": tmp_path / out, "data.source": dataset, "text.encoder": encoder}
        sets = [f'{name}="{value}"' for name, value in values.items()]
        sets += ["stage.0.resolution=64", "stage.0.steps=3", "stage.0.batch=4", "dit.patch=16"]
        loop.train(config.load(tiny, tuple(sets), ("scenes",)), told.append)
        lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        assert ("7 captions are already encoded" in told) == (out == "with")
        configured = config.load(tmp_path / out / "recipe.toml").text
        text_cache.write(
            dataset,
            text.pretrained(configured),
            [caption for row in rows for caption in row["captions"]],
        )
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_cache_that_does_not_fit_the_recipe_is_said(tiny: Path, tmp_path: Path) -> None:
    from daybreak import config
    from daybreak.train import encoded

    encoder = saved(tmp_path / "encoder")
    text_cache.write(tmp_path, loaded(encoder), CAPTIONS)
    sets = [f'data.source="{tmp_path}"', f'text.encoder="{encoder}"']
    told: list[str] = []
    recipe = config.load(tiny, tuple(sets), ("scenes",))
    assert recipe.text.max_tokens == 24
    assert encoded.known(recipe, torch.float32, told.append) is None
    assert "another text.encoder, text.max_tokens, template or precision" in told[0]
    recipe = config.load(tiny, (*sets, "text.max_tokens=16"), ("scenes",))
    assert encoded.known(recipe, torch.float32, told.append) is not None
    assert told[1:] == ["9 captions are already encoded"]
    (tmp_path / "other" / "text").mkdir(parents=True)
    both = f'data.source=[["{tmp_path}", 1.0], ["{tmp_path / "other"}", 1.0]]'
    recipe = config.load(tiny, (both, *sets[1:], "text.max_tokens=16"), ("scenes",))
    assert encoded.known(recipe, torch.float32, told.append) is not None
    assert told[3].startswith(f"some captions of {tmp_path / 'other'} are not, and every batch")
    # Precision, template and skip count too: the recipe of the run has them all.
    assert told[3].endswith(f"--cache-text {recipe.out}/recipe.toml")


def test_the_verb_encodes_a_dataset_and_checks_it(
    prepared: Callable[..., Path], tmp_path: Path
) -> None:
    dataset, encoder = prepared([{"captions": ["a red circle", "red"]}] * 3), saved(tmp_path / "t5")

    done = warm.run(
        *("-m", "daybreak", "prepare", dataset, "--cache-text", encoder),
        *("--max-tokens", 16, "--precision", "float32", "--verify"),
    )
    assert done.returncode == 0, done.stderr
    made, verified = done.stdout.splitlines()
    assert Path(made.removeprefix("text: ")).parent == dataset / "text"
    assert verified == f"{dataset}: 3 pictures, every byte matches the manifest"
    reader = opened(dataset, loaded(encoder))
    assert len(reader.digests) == 3
    assert reader.tokens(["a red circle", "red", ""]) is not None


def test_the_verb_encodes_as_a_recipe_asks(
    tiny: Path, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    from daybreak import cli, config
    from daybreak.train import encoded

    dataset, encoder = prepared([{"captions": ["a red circle"]}]), saved(tmp_path / "encoder")
    with pytest.raises(BadRecipe, match="trains its own text encoder"):
        cli.prepare([str(dataset)], cache_text=str(tiny))
    with pytest.raises(BadRecipe, match="--part and --max-tokens are options of --cache-text"):
        cli.prepare([str(dataset)], out=tmp_path / "part", part="1/2")
    sets = ('text.template="a {} circle"', "text.skip=1", f"text.encoder={encoder}")
    recipe = config.load(tiny, (*sets, f"data.source={dataset}", "dit.patch=16"), ("scenes",))
    tiny.write_text(config.dump(recipe))
    cli.prepare([str(dataset)], cache_text=str(tiny))
    known = encoded.known(recipe, torch.float32, lambda line: None)
    assert known is not None
    found, exact = known.tokens(["red"]), text.pretrained(recipe.text)(["red"])
    assert found is None  # it is not among the captions
    found, exact = known.tokens(["a red circle"]), text.pretrained(recipe.text)(["a red circle"])
    assert found is not None
    torch.testing.assert_close(found.tokens[found.mask], exact.tokens[exact.mask])
    assert exact.mask.sum() > 4  # the template is in it


def test_a_batch_with_one_caption_that_is_not_held_is_not_held(tmp_path: Path) -> None:
    encoder = loaded(saved(tmp_path / "encoder"))
    text_cache.write(tmp_path, encoder, CAPTIONS)
    reader = opened(tmp_path, encoder)
    for unknown in ("", "a cross", "zzz"):
        batch = [CAPTIONS[0], f"{unknown} never seen", CAPTIONS[1]]
        assert reader.tokens(batch) is None


def test_a_pass_of_a_batch_that_was_expected_is_no_longer_than_its_own_captions(
    tmp_path: Path,
) -> None:
    encoder = loaded(saved(tmp_path / "encoder"))
    text_cache.write(tmp_path, encoder, CAPTIONS)
    reader = opened(tmp_path, encoder)
    short, long = ["a red circle", ""], ["red " * 50, "a red circle"]
    reader.expect([*short, *long])
    for captions in (short, long):
        found, exact = reader.tokens(captions), encoder(captions)
        assert found is not None
        assert found.tokens.shape == exact.tokens.shape
        assert found.mask.equal(exact.mask)


def test_who_may_read_the_manifest_may_read_the_shards(tmp_path: Path) -> None:
    folder = text_cache.write(tmp_path, loaded(saved(tmp_path / "encoder")), CAPTIONS)
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert modes == {(folder / "manifest.json").stat().st_mode}
