"""Extractors: bytes are bytes, preparation is the model's own, and a reference is known by what
is in it.
"""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from daybreak.data import scenes
from daybreak.data.scenes import Scene
from daybreak.evaluate import distances, features, scenes_features
from daybreak.evaluate.features import Extractor, as_bytes, extract, fit, reference
from daybreak.failure import BadData, BadRecipe, BadStorage

Pictures = npt.NDArray[np.uint8]

PREPARATION = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": 28, "width": 28},
    "size": {"shortest_edge": 28},
    "resample": 3,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
    "rescale_factor": 1 / 255,
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
}
SIDE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


def some(n: int = 10, height: int = 40, width: int = 40, seed: int = 0) -> Pictures:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, height // 4, width // 4, 3), dtype=np.uint8)
    return coarse.repeat(4, 1).repeat(4, 2)


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 with random weights."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    return saved(Dinov2Model(config), tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights."""
    torch.manual_seed(0)
    config = CLIPConfig(
        projection_dim=8,
        text_config={**SIDE, "num_attention_heads": 2, "vocab_size": 300},
        vision_config={**SIDE, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    )
    return saved(CLIPModel(config), tmp_path_factory.mktemp("clip"))


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARATION))
    return folder


def toy(seed: int = 0, side: int | None = None) -> Extractor:
    """Means of random mixtures of pixels: an extractor without a model."""
    weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))

    def network(x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.uint8
        assert side is None or x.shape[-2:] == (side, side)
        return torch.tanh(torch.einsum("bchw,cf->bfhw", x.float() / 99, weights)).mean((2, 3))

    return Extractor("toy", f"seed {seed}", side, network)


# What comes in


def test_bytes_and_floats_in_0_to_1_are_the_same_pictures() -> None:
    pictures = some()
    for dtype in (np.float16, np.float32, np.float64):
        floats = (pictures / 255).astype(dtype)
        assert np.array_equal(as_bytes(floats), pictures)
        assert np.array_equal(extract(toy(), floats), extract(toy(), pictures))
    assert as_bytes(np.full((1, 1, 1, 3), 0.5 / 255 + 1e-6))[0, 0, 0, 0] == 1  # rounded, not cut


@pytest.mark.parametrize(
    ("pictures", "complaint"),
    [
        (some().astype(np.float32), r"\[0, 1\], not in \[\d+, 25\d\]"),
        (some() / 127.5 - 1, r"not in \[-"),
        (np.full((1, 2, 2, 3), np.nan), "nan"),
        (some().astype(np.int64), "not int64"),
        (some().transpose(0, 3, 1, 2), r"\(n, h, w, 3\), not \(10, 3, 40, 40\)"),
        (some()[0], r"not \(40, 40, 3\)"),
        (some()[:0], r"not \(0, "),
    ],
)
def test_pictures_that_would_be_misunderstood_are_refused(
    pictures: npt.NDArray[np.generic], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        extract(toy(), pictures)


def test_an_inverted_picture_is_not_what_a_float_turns_into() -> None:
    """Multiplying bytes by 255 in bytes is how a public metric measured negatives."""
    pictures = some()
    wrong = pictures * np.uint8(255)
    assert np.abs(extract(toy(), wrong) - extract(toy(), pictures)).max() > 0.1
    assert np.array_equal(extract(toy(), pictures / 255.0), extract(toy(), pictures))


def test_features_stand_in_the_order_of_their_pictures_whatever_the_batch() -> None:
    pictures = some(2 * features.BATCH + 3)
    whole = extract(toy(), pictures)
    assert whole.dtype == np.float32
    assert whole[[0, 70, 130]] == pytest.approx(extract(toy(), pictures[[0, 70, 130]]))


def test_resizing_does_not_let_fine_texture_through() -> None:
    """Every second line white: without antialiasing a reduction by two is white or black."""
    lines = np.zeros((64, 64, 3), dtype=np.uint8)
    lines[::2] = 255
    small = fit(lines, 32, 32)
    assert np.abs(small[4:-4].astype(int) - 128).max() <= 4
    assert fit(lines, 64, 64) is lines


def test_the_middle_of_a_wide_picture_is_looked_at() -> None:
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = 200
    assert (fit(wide, 10, 10)[:, 1:-1] > 190).all()


# Models of transformers


@pytest.mark.parametrize("kind", ["dino", "clip"])
def test_preparation_is_that_of_the_models_own_processor(
    kind: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    pictures = some(6, 56, 56)
    extractor = features.load(str(folder))
    model, _ = features.from_hub(str(folder))
    pixels = AutoImageProcessor.from_pretrained(
        folder, backend="pil"
    )(  # torchvision rounds otherwise
        [Image.fromarray(picture) for picture in pictures], return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        seen = model.get_image_features(pixels) if kind == "clip" else model(pixels)
    assert extract(extractor, pictures) == pytest.approx(seen.pooler_output.numpy(), abs=1e-4)
    assert extractor.side == 28


def test_dino_gives_its_class_token_and_clip_its_projection(dino: Path, clip: Path) -> None:
    assert extract(features.load(str(dino)), some()).shape == (10, 16)
    assert extract(features.load(str(clip)), some()).shape == (10, 8)


def test_a_family_is_that_of_the_network_however_its_folder_is_called(
    dino: Path, clip: Path, tmp_path: Path
) -> None:
    (tmp_path / "clip").symlink_to(dino)
    assert features.load(str(tmp_path / "clip")).family == "dinov2"
    assert features.load(str(clip)).family == "clip"
    assert features.load("scenes").family == "scenes"


def test_a_digest_changes_with_weights_and_with_preparation(dino: Path, tmp_path: Path) -> None:
    model, _ = features.from_hub(str(dino))
    here = features.load(str(dino)).digest
    assert here == features.load(str(dino)).digest
    again = saved(model, tmp_path / "again")
    assert features.load(str(again)).digest == here
    (again / "preprocessor_config.json").write_text(
        json.dumps(PREPARATION | {"image_mean": [0.5, 0.5, 0.5]})
    )
    assert features.load(str(again)).digest != here
    with torch.no_grad():
        model.layernorm.bias[0] += 1
    assert features.load(str(saved(model, tmp_path / "moved"))).digest != here


def test_weights_that_are_not_there_are_named_with_size_and_place() -> None:
    with pytest.raises(
        BadRecipe, match=r"facebook/dinov2-large \(1.2 GB, Apache-2.0\).*path of a folder"
    ):
        features.load("dinov2")
    with pytest.raises(BadRecipe, match="need the model no/such, which is neither"):
        features.load("no/such@revision")


def test_half_a_model_is_refused(dino: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, _ = features.from_hub(str(dino))
    folder = saved(model, tmp_path / "half")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layer.1." in name)
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadRecipe, match="lacks weights"):
        features.load(str(folder))


def test_weights_that_are_damaged_or_of_another_width_are_refused(
    dino: Path, tmp_path: Path
) -> None:
    model, _ = features.from_hub(str(dino))
    folder = saved(model, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(BadRecipe, match="neither a local folder nor can be loaded"):
        features.load(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    for data in (b"", b"PK\3\4 and no more", b"<html>"):  # what unpickling makes of them differs
        (folder / "pytorch_model.bin").write_bytes(data)
        with pytest.raises(BadRecipe, match="neither a local folder nor can be loaded"):
            features.load(str(folder))


def test_inception_without_its_package_or_weights_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert features.inception_home().parts[-3:-1] == ("hub", "checkpoints")
    try:
        import torch_fidelity  # noqa: F401
    except (ImportError, RuntimeError):
        with pytest.raises(BadRecipe, match=r'pip install "daybreak\[eval\]"'):
            features.load("inception")
        return
    with pytest.raises(BadRecipe, match=r"\(92 MB\): download https://"):
        features.load("inception")
    features.inception_home().parent.mkdir(parents=True)
    features.inception_home().write_bytes(b"something else")
    with pytest.raises(BadRecipe, match="damaged or another file"):
        features.load("inception")


# The network of the scenes


def drawn(first: int, count: int, change: dict[str, str] | None = None) -> Pictures:
    """Scenes of canvas 32; `change` replaces shapes or colours by others."""
    config = scenes.Config.model_validate({"canvas": "32", "held_out": ()})

    def changed(scene: Scene) -> Scene:
        words = change or {}
        things = tuple(
            thing._replace(
                shape=words.get(thing.shape, thing.shape),
                colour=words.get(thing.colour, thing.colour),
            )
            for thing in scene.things
        )
        return scene._replace(things=things)

    found = [changed(scenes.scene(config, 11, first + index)) for index in range(count)]
    return scenes.renders(found)


def test_the_scenes_network_is_the_one_that_was_taught() -> None:
    """If this fails, distances are not comparable with those measured before."""
    assert features.load("scenes").digest == "7dda5c4049bad286"


def test_the_scenes_network_notices_what_the_checker_would() -> None:
    """In units of how much the distance varies between sets of true pictures."""
    extractor = features.load("scenes")
    truth = extract(extractor, drawn(0, 600))

    def apart(pictures: Pictures) -> float:
        return distances.kernel(extract(extractor, pictures), truth).value

    null = [apart(drawn(1_000 * k, 600)) for k in range(1, 7)]
    for change in ({"star": "cross"}, {"circle": "square"}, {"red": "orange"}):
        assert apart(drawn(10_000, 600, change)) > np.mean(null) + 5 * np.std(null)


@pytest.mark.parametrize("canvas", ["32", "64", "64-large", "128"])
def test_the_scenes_network_sees_every_canvas(canvas: str) -> None:
    config = scenes.Config.model_validate({"canvas": canvas})
    pictures = np.stack([scenes.sample(config, 0, index).image for index in range(3)])
    assert extract(features.load("scenes"), pictures).shape == (3, 96)


def test_two_things_count_twice() -> None:
    extractor = features.load("scenes")
    one = scenes.Thing("circle", "red", None, 16.0, 16.0, 6.0)
    other = one._replace(x=46.0, y=46.0)
    dice = scenes.Dice(0, 0, 0, 0, 0, 0)
    empty, single, double = (
        extract(extractor, scenes.render(scenes.Scene("64", things, 90.0, dice))[None])[0, :32]
        for things in ((), (one,), (one, other))
    )
    assert double - empty == pytest.approx(2 * (single - empty), abs=0.2 * float(single.max()))


def test_teaching_depends_on_nothing_outside() -> None:
    torch.manual_seed(0)
    first = scenes_features.teach(steps=2).state_dict()
    torch.manual_seed(1)
    second = scenes_features.teach(steps=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


# References


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = []
    for number, picture in enumerate(some(5, 48, 64, seed=3)):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(picture).save(paths[-1])
    return paths


def test_a_reference_is_computed_once(files: list[Path], tmp_path: Path) -> None:
    asked: list[int] = []
    inner = toy(side=16)

    def counting(x: torch.Tensor) -> torch.Tensor:
        asked.append(len(x))
        return inner.network(x)

    extractor = inner._replace(network=counting)
    first = reference(extractor, files, 32, 32, tmp_path / "cache")
    again = reference(extractor, files[::-1], 32, 32, tmp_path / "cache")
    assert asked == [5]
    assert np.array_equal(first.features, again.features)
    assert first.digest == again.digest


def test_a_reference_holds_the_features_of_pictures_at_the_models_size(
    files: list[Path], tmp_path: Path
) -> None:
    found = reference(toy(), files, 24, 32, tmp_path).features
    pictures = np.stack([fit(np.asarray(Image.open(file)), 24, 32) for file in files])
    known = extract(toy(), pictures)
    assert sorted(found.tolist()) == sorted(known.tolist())


def test_small_pictures_of_a_reference_are_enlarged_and_counted(
    files: list[Path], tmp_path: Path
) -> None:
    Image.fromarray(some(1, 80, 64, seed=5)[0]).save(tmp_path / "large.png")
    both = [*files, tmp_path / "large.png"]
    for _ in range(2):  # made, then known
        assert reference(toy(), both, 64, 64, tmp_path / "cache").enlarged == len(files)
    assert reference(toy(), both, 48, 64, tmp_path / "cache").enlarged == 0


def test_whatever_changes_the_numbers_makes_another_reference(
    files: list[Path], tmp_path: Path
) -> None:
    here = reference(toy(), files, 32, 32, tmp_path).digest
    renamed = files[0].rename(tmp_path / "another name.png")
    assert reference(toy(), [renamed, *files[1:]], 32, 32, tmp_path).digest == here
    assert reference(toy(), files[1:], 32, 32, tmp_path).digest != here
    assert reference(toy(), [*files[1:], files[1]], 32, 32, tmp_path).digest != here
    assert reference(toy(1), [renamed, *files[1:]], 32, 32, tmp_path).digest != here
    assert reference(toy(), [renamed, *files[1:]], 32, 24, tmp_path).digest != here
    Image.fromarray(some(1, 48, 64, seed=4)[0]).save(renamed)
    assert reference(toy(), [renamed, *files[1:]], 32, 32, tmp_path).digest != here


def test_a_damaged_cache_is_computed_again(files: list[Path], tmp_path: Path) -> None:
    first = reference(toy(), files, 32, 32, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:-7])
    assert np.array_equal(
        reference(toy(), files, 32, 32, tmp_path / "cache").features, first.features
    )


def test_references_that_cannot_be_used_are_refused(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(BadData, match="no pictures to compare with"):
        reference(toy(), [], 32, 32, tmp_path)
    with pytest.raises(BadData, match=r"nowhere\.png"):
        reference(toy(), [tmp_path / "nowhere.png"], 32, 32, tmp_path)
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(files[0].read_bytes()[:200])
    with pytest.raises(BadData, match=r"damaged\.png"):
        reference(toy(), [damaged], 32, 32, tmp_path)
    with pytest.raises(BadStorage, match="cannot keep the reference"):
        reference(toy(), files, 32, 32, files[0])


@pytest.mark.usefixtures("full_disk")
def test_a_reference_that_a_full_disk_does_not_take_is_a_storage_failure(tmp_path: Path) -> None:
    with pytest.raises(BadStorage, match=r"cannot keep the reference.*: File too large"):
        features.keep(tmp_path / "reference.safetensors", np.zeros((64, 64), np.float32))
    assert list(tmp_path.iterdir()) == []
