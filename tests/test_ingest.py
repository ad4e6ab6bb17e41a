"""An input becomes the picture a viewer shows, at the size of its bucket, or is refused by rule."""

import hashlib
import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from daybreak.data import images, ingest
from daybreak.data.ingest import Config
from daybreak.data.records import Record, Refused

Picture = npt.NDArray[np.uint8]
SMALL = Config(resolution=64, unit=8, format="png")


def smooth(height: int, width: int) -> Picture:
    """Colours that change slowly, so that scaling and JPEG change them little."""
    y, x = np.mgrid[:height, :width]
    rgb = [255 * y / max(1, height - 1), 255 * x / max(1, width - 1), 90 + 0 * x]
    return np.stack(rgb, axis=-1).round().astype(np.uint8)


def encoded(picture: Picture | Image.Image, form: str = "PNG", **options: Any) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def take(data: bytes, config: Config = SMALL, **columns: object) -> dict[str, Any]:
    row, _ = ingest.take(Record("a.png", data, {"text": "x"} | columns), "source", config)
    return row


def stored(row: dict[str, Any]) -> Picture:
    return images.decode(row["image"]["bytes"], "stored")


def refused(data: bytes, config: Config = SMALL, **columns: object) -> tuple[str, str]:
    with pytest.raises(Refused) as caught:
        take(data, config, **columns)
    return caught.value.kind, str(caught.value)


def test_the_row_says_what_the_picture_is_and_where_it_came_from() -> None:
    data = encoded(smooth(64, 64))
    row = take(data, text="a  red\nsquare", keywords=["red"], license="CC0")
    assert {name: row[name] for name in row if name not in ("image", "hash")} == {
        "id": hashlib.sha256(data).hexdigest()[:16],
        "height": 64,
        "width": 64,
        "bucket": "64x64",
        "captions": ["a red square", "red"],
        "caption_weights": [0.9, 0.1],
        "source": "source",
        "where": "a.png",
        "licence": "CC0",
    }
    assert row["image"]["path"] is None
    assert -(2**63) <= row["hash"] < 2**63
    assert list(row) == list(ingest.features())


def test_a_picture_of_the_right_size_keeps_every_pixel() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(stored(take(encoded(picture))), picture)
    webp = SMALL.model_copy(update={"format": "webp"})
    assert np.array_equal(stored(take(encoded(picture), webp)), picture)


@settings(max_examples=80, deadline=None)
@given(st.integers(40, 300), st.integers(40, 300))
def test_the_stored_picture_just_covers_its_bucket(height: int, width: int) -> None:
    config = Config(resolution=64, unit=8, max_crop=0.99, max_upscale=16, format="png")
    row = take(encoded(Image.new("L", (width, height))), config)
    bucket, scale = ingest.fitted(height, width, config)
    assert row["bucket"] == bucket.name
    if scale >= 1:
        assert (row["height"], row["width"]) == (height, width)
    else:
        assert row["height"] >= bucket.height
        assert row["width"] >= bucket.width
        assert row["height"] == bucket.height or row["width"] == bucket.width
        assert 0 <= height * scale - row["height"] < 1 or row["height"] == bucket.height
        assert 0 <= width * scale - row["width"] < 1 or row["width"] == bucket.width


def test_nothing_is_stretched() -> None:
    y, x = np.mgrid[:400, :600]
    disc = np.where((y - 199.5) ** 2 + (x - 299.5) ** 2 < 150**2, 255, 0).astype(np.uint8)
    picture = stored(take(encoded(np.repeat(disc[:, :, None], 3, axis=2))))[:, :, 0] > 127
    assert abs(int(picture.any(0).sum()) - int(picture.any(1).sum())) <= 1


def test_what_overhangs_the_bucket_is_kept_for_the_dice() -> None:
    row = take(encoded(smooth(100, 112)))  # 64x64 at scale 0.64
    assert (row["bucket"], row["height"], row["width"]) == ("64x64", 64, 71)


def test_a_large_jpeg_is_decoded_at_a_fraction_and_looks_the_same() -> None:
    picture = smooth(1200, 1200)
    row = take(encoded(picture, "JPEG", quality=95), SMALL)
    assert np.abs(stored(row).astype(int) - images.fit(picture, 64, 64)).max() <= 3


def test_auto_stores_photographs_as_jpeg_and_drawings_as_png() -> None:
    auto = Config(resolution=64, unit=8)
    noise = np.random.default_rng(0).normal(128, 40, (64, 64, 3)).clip(0, 255).astype(np.uint8)
    drawing = Image.new("RGB", (64, 64), "white")
    drawing.paste("red", (10, 10, 40, 40))

    def form(data: bytes) -> str | None:
        return Image.open(io.BytesIO(take(data, auto)["image"]["bytes"])).format

    assert form(encoded(drawing)) == "PNG"
    assert form(encoded(drawing, "WEBP", lossless=True)) == "PNG"
    assert form(encoded(drawing, "JPEG")) == "JPEG"
    assert form(encoded(noise, "JPEG")) == "JPEG"
    y, x = np.mgrid[:64, :64]
    photograph = np.stack([128 + 60 * np.sin(x / 9 + k) * np.cos(y / 7) for k in range(3)], -1)
    assert form(encoded((photograph + noise / 16).astype(np.uint8))) == "JPEG"


def test_jpeg_keeps_coloured_edges() -> None:
    edges = np.zeros((64, 64, 3), np.uint8)
    edges[:, ::2] = (255, 0, 0)
    edges[:, 1::2] = (0, 0, 255)
    decoded = stored(take(encoded(edges), SMALL.model_copy(update={"format": "jpeg"})))
    assert np.abs(decoded.astype(int) - edges).mean() < 6  # 64 with colour at half size


@pytest.mark.parametrize(
    ("width", "height", "kind", "reason"),
    [
        (1, 1, "small", "is 1 x 1; to fill 64 x 64 it would be enlarged 64.00 times"),
        (47, 47, "small", "it would be enlarged 1.36 times, and --max-upscale allows 1.33."),
        (3200, 64, "aspect", "is 3200 x 64; its nearest bucket, 88 x 40, would cut away 96%"),
        (64, 3200, "aspect", "its nearest bucket, 40 x 88, would cut away 96% of it, and"),
    ],
)
def test_pictures_that_do_not_fit_are_refused_before_they_are_decoded(
    width: int, height: int, kind: str, reason: str
) -> None:
    whole = encoded(Image.effect_noise((width, height), 50))
    found = refused(whole)
    assert found[0] == kind
    assert reason in found[1]
    assert refused(whole[: max(60, len(whole) // 2)]) == found


def test_the_allowed_upscale_and_crop_are_inclusive_limits() -> None:
    assert take(encoded(smooth(48, 48)))["height"] == 48  # 64 / 48 is 4/3
    limit = Config(resolution=64, unit=8, max_aspect=1, max_crop=0.5)
    assert take(encoded(smooth(64, 128)), limit)["bucket"] == "64x64"
    kind, reason = refused(encoded(smooth(64, 130)), limit)
    assert kind == "aspect"
    assert reason.endswith("--max-crop allows 50%. --max-aspect 1 makes no longer ones.")
    coarse = Config(resolution=64, unit=32)
    assert "A smaller --unit" in refused(encoded(smooth(64, 96)), coarse)[1]


def test_the_shortest_side_can_be_asked_for() -> None:
    config = SMALL.model_copy(update={"min_side": 100})
    assert refused(encoded(smooth(99, 120)), config) == (
        "small",
        "is 120 x 99; --min-side asks for 100 px.",
    )
    assert take(encoded(smooth(100, 100)), config)["height"] == 64
    assert take(encoded(smooth(900, 900), "JPEG"), config)["height"] == 64  # decoded at an eighth


def test_only_allowed_licences_pass() -> None:
    config = SMALL.model_copy(update={"licences": ("cc0", "CC BY 4.0")})
    data = encoded(smooth(64, 64))
    assert take(data, config, license="CC0")["licence"] == "CC0"
    assert take(data, config, licence=" CC  BY 4.0 ")["licence"] == "CC BY 4.0"
    assert refused(data, config, license="CC BY-NC") == (
        "licence",
        "has the licence 'CC BY-NC'; --licence allows cc0, CC BY 4.0.",
    )
    assert refused(data, config) == (
        "licence",
        "states no licence; --licence allows cc0, CC BY 4.0.",
    )
    column = config.model_copy(update={"licence_column": "rights"})
    assert refused(data, column, license="CC0")[0] == "licence"
    assert take(data, column, rights="CC0")["licence"] == "CC0"
    assert take(data, license="half \ud800")["licence"] == "half \\ud800"


def test_the_skip_list_holds_names_and_hashes() -> None:
    data = encoded(smooth(64, 64))
    digest = hashlib.sha256(data).hexdigest()
    for entry in ("a.png", digest, digest[:16]):
        config = SMALL.model_copy(update={"skip": frozenset({entry})})
        assert refused(data, config) == ("skipped", "is on the skip list.")
    take(data, SMALL.model_copy(update={"skip": frozenset({"b.png", digest[:15]})}))


# What a viewer shows. Each is 64 x 64, and the same picture however it is written.

UPRIGHT = (smooth(64, 64) // 3 + 80).astype(np.uint8)
RGB = Image.fromarray(UPRIGHT)
GREY = np.repeat(UPRIGHT[:, :, :1], 3, axis=2)


def turned(orientation: int) -> tuple[Picture, dict[str, Any]]:
    stored = {
        1: UPRIGHT,
        2: UPRIGHT[:, ::-1],
        3: UPRIGHT[::-1, ::-1],
        4: UPRIGHT[::-1],
        5: UPRIGHT.transpose(1, 0, 2),
        6: UPRIGHT.transpose(1, 0, 2)[::-1],
        7: UPRIGHT.transpose(1, 0, 2)[::-1, ::-1],
        8: UPRIGHT.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return np.ascontiguousarray(stored), {"exif": exif}


def with_alpha() -> tuple[Image.Image, Picture]:
    alpha = np.full((64, 64, 1), 255, np.uint8)
    alpha[:20], alpha[20:40] = 0, 102
    rgba = np.concatenate([UPRIGHT, alpha], axis=2)
    shown = UPRIGHT * (alpha / 255) + 255 * (1 - alpha / 255)
    return Image.fromarray(rgba), shown.round().astype(np.uint8)


def odd_kinds() -> dict[str, tuple[bytes, Picture, int]]:
    """Name: bytes, what they show, and by how much a pixel may differ."""
    rgba, shown = with_alpha()
    grey_alpha, grey_shown = rgba.convert("LA"), np.asarray(rgba.convert("LA").convert("RGBA"))
    over = grey_shown[:, :, 3:] / 255
    grey_shown = (grey_shown[:, :, :3] * over + 255 * (1 - over)).round().astype(np.uint8)
    palette = RGB.quantize(64)
    shown_palette = np.asarray(palette.convert("RGB"))
    hole = np.where((np.asarray(palette) == 7)[..., None], 255, shown_palette).astype(np.uint8)
    sixteen = UPRIGHT[:, :, 0].astype(np.uint16) * 257
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("lime", "blue")]
    red = np.full((64, 64, 3), (255, 0, 0), np.uint8)
    animation = {"save_all": True, "append_images": frames}
    inverted = 255 - UPRIGHT
    cmyk = Image.merge("CMYK", [*Image.fromarray(inverted).split(), Image.new("L", (64, 64))])
    profile = ImageCms.ImageCmsProfile(images.SRGB).tobytes()
    kinds = {
        "grey": (encoded(Image.fromarray(GREY).convert("L")), GREY, 0),
        "bits": (encoded(Image.fromarray(GREY[:, :, 0] > 127)), 255 * (GREY > 127), 0),
        "sixteen.png": (encoded(Image.fromarray(sixteen)), GREY, 0),
        "sixteen.tif": (encoded(Image.fromarray(sixteen), "TIFF"), GREY, 0),
        "clear.png": (encoded(rgba), shown, 1),
        "clear.webp": (encoded(rgba, "WEBP", lossless=True, exact=True), shown, 1),
        "grey-alpha": (encoded(grey_alpha), grey_shown, 1),
        "palette": (encoded(palette), shown_palette, 0),
        "palette-hole": (encoded(palette, transparency=7), hole, 0),
        "animation.gif": (encoded(Image.fromarray(red), "GIF", **animation), red, 0),
        "animation.webp": (
            encoded(Image.fromarray(red), "WEBP", lossless=True, **animation),
            red,
            0,
        ),
        "animation.png": (encoded(Image.fromarray(red), "PNG", **animation), red, 0),
        "cmyk.tif": (encoded(cmyk, "TIFF"), UPRIGHT, 1),
        "srgb": (encoded(RGB, icc_profile=profile), UPRIGHT, 0),
        "broken-profile": (encoded(RGB, icc_profile=b"nonsense"), UPRIGHT, 0),
        "jpeg": (encoded(RGB, "JPEG", quality=95), UPRIGHT, 3),
        "jpeg-grey": (encoded(RGB.getchannel("R"), "JPEG", quality=95), GREY, 3),
        "bmp": (encoded(RGB, "BMP"), UPRIGHT, 0),
        "wrong-ending.png": (encoded(RGB, "GIF"), np.asarray(RGB.quantize().convert("RGB")), 60),
    }
    for orientation in range(1, 9):
        picture, exif = turned(orientation)
        kinds[f"exif-{orientation}.png"] = (encoded(picture, **exif), UPRIGHT, 0)
        kinds[f"exif-{orientation}.jpg"] = (
            encoded(picture, "JPEG", quality=95, **exif),
            UPRIGHT,
            3,
        )
    return kinds


@pytest.mark.parametrize("name", odd_kinds())
def test_every_kind_of_picture_is_stored_as_a_viewer_shows_it(name: str) -> None:
    data, shown, tolerance = odd_kinds()[name]
    picture = stored(take(data))
    assert picture.shape == shown.shape
    assert np.abs(picture.astype(int) - shown).max() <= tolerance


def test_jpeg_stores_soft_colours_within_three() -> None:
    picture = stored(take(encoded(UPRIGHT), SMALL.model_copy(update={"format": "jpeg"})))
    assert np.abs(picture.astype(int) - UPRIGHT).max() <= 3


def test_clear_pixels_show_the_background_that_is_chosen() -> None:
    blue = SMALL.model_copy(update={"background": (0, 0, 255)})
    picture = stored(take(encoded(with_alpha()[0]), blue))
    assert (picture[:20] == (0, 0, 255)).all()
