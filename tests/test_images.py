"""Every odd kind of file becomes the picture a viewer shows, or is refused by name."""

import contextlib
import io
import struct
import time
import tracemalloc
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms

from daybreak.data import images
from daybreak.data.records import Refused
from daybreak.failure import BadData

Pixels = npt.NDArray[np.uint8]


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def colours(height: int = 12, width: int = 20) -> Pixels:
    """A picture that no mirroring and no turn leaves as it is."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([255 * y / (height - 1), 255 * x / (width - 1), 40 + 0 * x], axis=-1)
    rgb[: height // 3, : width // 3] = (250, 10, 10)
    return rgb.astype(np.uint8)


def png(width: int, height: int, depth: int, kind: int, body: bytes, *chunks: bytes) -> bytes:
    """A PNG written by hand, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_exact_formats_come_back_exactly(kind: str) -> None:
    rgb = colours()
    assert np.array_equal(images.decode(encoded(Image.fromarray(rgb), kind), "a"), rgb)


def test_lossless_webp_comes_back_exactly() -> None:
    rgb = colours()
    assert np.array_equal(
        images.decode(encoded(Image.fromarray(rgb), "WEBP", lossless=True), "a"), rgb
    )


def test_jpeg_comes_back_nearly() -> None:
    y, x = np.mgrid[:32, :32]
    smooth = np.stack([y * 8, x * 8, 128 + 0 * x], axis=-1).astype(np.uint8)
    decoded = images.decode(encoded(Image.fromarray(smooth), "JPEG", quality=95), "a")
    assert np.abs(decoded.astype(int) - smooth).mean() < 3


def test_the_result_is_always_uint8_rgb() -> None:
    for mode in ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]:
        decoded = images.decode(encoded(Image.new(mode, (5, 3))), mode)
        assert decoded.shape == (3, 5, 3)
        assert decoded.dtype == np.uint8


def test_sixteen_bit_grey_is_scaled_and_not_cut_off() -> None:
    values = np.array([[0, 257, 256 * 128, 65535]], dtype=np.uint16)
    for kind in ["PNG", "TIFF"]:
        decoded = images.decode(encoded(Image.fromarray(values), kind), kind)
        assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]


def test_big_endian_sixteen_bit_tiff_is_scaled_too() -> None:
    values = np.array([[0, 257, 65535]], dtype=">u2")
    image = Image.frombytes("I;16B", (3, 1), values.tobytes())
    decoded = images.decode(encoded(image, "TIFF"), "a")
    assert decoded[0, :, 0].tolist() == [0, 1, 255]


def test_sixteen_bit_colour_keeps_its_high_bytes() -> None:
    row = b"\x00" + struct.pack(">3H", 65535, 32896, 0)
    decoded = images.decode(png(1, 1, 16, 2, zlib.compress(row)), "a")
    assert decoded.tolist() == [[[255, 128, 0]]]


def test_sixteen_bit_grey_with_one_clear_value_shows_the_background() -> None:
    row = b"\x00" + struct.pack(">3H", 1000, 1001, 65535)
    clear = chunk(b"tRNS", struct.pack(">H", 1000))
    decoded = images.decode(png(3, 1, 16, 0, zlib.compress(row), clear), "a")
    assert decoded[0, :, 0].tolist() == [255, 4, 255]


def test_pixels_of_32_bits_are_refused_rather_than_guessed() -> None:
    for values in [np.ones((2, 2), np.float32), np.ones((2, 2), np.int32)]:
        with pytest.raises(BadData, match=r"deep\.tif.*no agreed white"):
            images.decode(encoded(Image.fromarray(values), "TIFF"), "deep.tif")


def test_clear_pixels_show_the_background_and_not_the_colour_beneath() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(200, 0, 0, 0), (200, 0, 0, 255), (200, 0, 0, 51)]
    data = encoded(Image.fromarray(rgba))
    assert images.decode(data, "a")[0].tolist() == [[255, 255, 255], [200, 0, 0], [244, 204, 204]]
    assert images.decode(data, "a", background=(0, 0, 255))[0, 0].tolist() == [0, 0, 255]


def test_grey_with_alpha_lies_on_the_background() -> None:
    data = encoded(Image.fromarray(np.array([[[90, 0], [90, 255]]], np.uint8), "LA"))
    assert images.decode(data, "a")[0, :, 0].tolist() == [255, 90]


def test_a_palette_with_holes_lies_on_the_background() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    for kind, clear in [("PNG", b"\x00\xff"), ("GIF", 0)]:
        decoded = images.decode(encoded(image, kind, transparency=clear), kind)
        assert decoded[0].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_one_clear_colour_of_an_rgb_png_shows_the_background() -> None:
    rgb = Image.fromarray(np.array([[[9, 8, 7], [9, 8, 6]]], np.uint8))
    decoded = images.decode(encoded(rgb, transparency=(9, 8, 7)), "a")
    assert decoded[0].tolist() == [[255, 255, 255], [9, 8, 6]]


def test_a_palette_of_any_depth_keeps_its_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert images.decode(encoded(image, bits=1), "a")[0].tolist() == [[10, 20, 30], [40, 50, 60]]


def test_one_bit_pictures_are_black_and_white() -> None:
    decoded = images.decode(encoded(Image.fromarray(np.array([[True, False]]))), "a")
    assert decoded[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_the_colour_it_prints(kind: str) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow ink: red
    red, green, blue = images.decode(encoded(image, kind), "a")[8, 8].astype(int)
    assert red > 220
    assert green < 60
    assert blue < 60


def test_an_embedded_profile_is_applied() -> None:
    swapped = profile_with_red_and_blue_exchanged()
    data = encoded(Image.new("RGB", (2, 2), (255, 0, 0)), icc_profile=swapped)
    red, _, blue = images.decode(data, "a")[0, 0].astype(int)
    assert blue > 200
    assert red < 60


def test_a_profile_leaves_transparency_alone() -> None:
    image = Image.fromarray(np.array([[[255, 0, 0, 0], [255, 0, 0, 255]]], np.uint8))
    data = encoded(image, icc_profile=profile_with_red_and_blue_exchanged())
    clear, solid = images.decode(data, "a")[0].astype(int).tolist()
    assert clear == [255, 255, 255]
    assert solid[2] > 200


def test_an_srgb_profile_changes_nothing() -> None:
    rgb = colours()
    profile = ImageCms.ImageCmsProfile(images.SRGB).tobytes()
    data = encoded(Image.fromarray(rgb), icc_profile=profile)
    assert np.array_equal(images.decode(data, "a"), rgb)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "LA", "RGBA", "1"])
def test_a_broken_or_unsuitable_profile_is_passed_over(mode: str) -> None:
    image = Image.new("RGB", (3, 3), (120, 120, 120)).convert(mode)
    plain = images.decode(encoded(image), "a")
    assert np.array_equal(images.decode(encoded(image, icc_profile=b"nonsense"), "a"), plain)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert np.array_equal(images.decode(encoded(image, icc_profile=lab), "a"), plain)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(kind: str, orientation: int) -> None:
    upright = np.kron(colours(6, 8), np.ones((8, 8, 1), np.uint8))
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    decoded = images.decode(encoded(image, kind, exif=exif), "a")
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).mean() < 12


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_lose_the_picture() -> None:
    image = Image.fromarray(colours())
    for exif in [b"Exif\x00\x00garbage", b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", b"Exif\x00\x00"]:
        assert images.decode(encoded(image, "JPEG", exif=exif), "a").shape == (12, 20, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"no tags at all", b"II*\0\xff\xff\xff\x7f", b"MM\0"])
def test_exif_that_is_none_does_not_lose_the_picture(kind: str, exif: bytes) -> None:
    picture = Image.fromarray(colours())
    plain = images.decode(encoded(picture, kind), "a")
    assert np.array_equal(
        images.decode(encoded(picture, kind, exif=b"Exif\0\0" + exif), "a"), plain
    )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ["red", "lime", "blue"]]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(images.decode(data, "a")[4, 4].astype(int) - [255, 0, 0]).max() < 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_refused_by_name(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for length in [0, 3, 11, len(data) // 3, len(data) // 2]:
        with pytest.raises(BadData, match=r"cut\.bin: "):
            images.decode(data[:length], "cut.bin")


@pytest.mark.filterwarnings("ignore")
def test_no_damage_raises_anything_but_bad_data() -> None:
    random = np.random.default_rng(0)
    picture = Image.fromarray(colours())
    for kind in ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]:
        whole = np.frombuffer(encoded(picture, kind), np.uint8)
        for _ in range(60):
            data = whole.copy()
            data[random.integers(len(data), size=4)] = random.integers(256, size=4)
            with contextlib.suppress(BadData):
                assert images.decode(data.tobytes(), "a").shape[2] == 3


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "PDF", "EPS"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(BadData, match="is not a PNG, JPEG"):
        images.decode(encoded(Image.fromarray(colours(32, 32)), kind), "a")


def test_text_is_refused() -> None:
    with pytest.raises(BadData, match="notes: is not a PNG, JPEG"):
        images.decode(b"<svg></svg>", "notes")


@pytest.mark.parametrize(
    ("width", "height"), [(8001, 8000), (12_000, 12_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)]
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_from_the_header(width: int, height: int) -> None:
    zeros = zlib.compressobj(9)
    body = zeros.compress(bytes(1_000_000)) + zeros.flush()
    data = png(width, height, 1, 0, body)
    refused(b"\x00")  # Pillow's plugins load with the first picture it does not know

    start = time.perf_counter()
    tracemalloc.start()
    refused(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.perf_counter() - start < 0.05
    assert peak < 2_000_000


def test_a_webp_canvas_beyond_the_limit_is_refused() -> None:
    canvas = struct.pack("<I", 16382)[:3] * 2
    vp8x = b"VP8X" + struct.pack("<I", 10) + b"\x00" * 4 + canvas
    refused(b"RIFF" + struct.pack("<I", len(vp8x) + 4) + b"WEBP" + vp8x)


def test_exactly_the_limit_is_allowed() -> None:
    width, height = 8000, 8000
    assert width * height == images.LIMIT
    data = png(width, height, 1, 0, b"")
    assert images.verify(io.BytesIO(data), "a") == (height, width)


def refused(data: bytes) -> None:
    with pytest.raises(BadData, match="bomb"):
        images.decode(data, "bomb")


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_text_that_unfolds_to_gigabytes_is_refused_from_the_header(name: bytes) -> None:
    much = zlib.compress(bytes(50_000_000), 9)
    keyword = b"Comment\0\1\0\0\0" if name == b"iTXt" else b"Comment\0\0"
    body = zlib.compress(b"\0" + bytes(3))
    data = png(1, 1, 8, 2, body, chunk(name, keyword + much))
    tracemalloc.start()
    with pytest.raises(BadData, match=r"a\.png: has more compressed text"):
        images.decode(data, "a.png")
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "damaged"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (encoded(Image.new("RGB", (9, 9))).replace(b"IDAT", b"IDAX"), "damaged"),
        (b"<html>not found</html>", "format"),
        (encoded(Image.new("RGB", (9, 9)), "PPM"), "format"),
        (encoded(Image.new("RGB", (64, 64)), "JPEG")[:300], "damaged"),
        (encoded(Image.new("RGB", (64, 64)))[:60], "damaged"),
        (png(9_000, 8_000, 1, 0, b""), "bomb"),
        (encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "pixels"),
    ],
)
def test_every_refusal_has_its_word(data: bytes, kind: str) -> None:
    with pytest.raises(Refused) as caught:
        images.decode(data, "a")
    assert caught.value.kind == kind


@pytest.mark.parametrize(("shrink", "side"), [(1, 200), (2, 100), (3, 100), (4, 50), (9, 25)])
def test_a_jpeg_shrinks_to_a_half_a_quarter_or_an_eighth(shrink: int, side: int) -> None:
    y, x = np.mgrid[:200, :200]
    smooth = np.stack([y, x, 90 + 0 * x], axis=-1).astype(np.uint8)
    decoded = images.decode(
        encoded(Image.fromarray(smooth), "JPEG", quality=95), "a", shrink=shrink
    )
    assert decoded.shape == (side, side, 3)
    assert np.abs(decoded.astype(int) - images.fit(smooth, side, side)).max() <= 4
    assert images.decode(encoded(Image.fromarray(smooth)), "a", shrink=shrink).shape[0] == 200


def test_a_photograph_on_its_side_shrinks_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (320, 160)), "JPEG", exif=exif)
    assert images.size(data, "a") == (160, 320)
    assert images.decode(data, "a", shrink=4).shape == (80, 40, 3)


def test_what_is_encoded_without_loss_comes_back() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert np.array_equal(images.decode(images.encode(noise, "png"), "a"), noise)
    assert np.array_equal(images.decode(images.encode(noise, "webp"), "a"), noise)
    assert Image.open(io.BytesIO(images.encode(noise, "jpeg"))).format == "JPEG"


def test_verify_gives_the_size_and_finds_a_damaged_chunk() -> None:
    data = encoded(Image.fromarray(colours(12, 20)))
    assert images.verify(io.BytesIO(data), "a") == (12, 20)
    middle = data.index(b"IDAT") + 8
    broken = data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]
    with pytest.raises(BadData, match=r"b\.png: is damaged"):
        images.verify(io.BytesIO(broken), "b.png")


def test_fit_returns_a_picture_of_the_right_size_untouched() -> None:
    rgb = colours(8, 8)
    assert images.fit(rgb, 8, 8) is rgb


@pytest.mark.parametrize("shape", [(7, 5), (64, 200), (300, 31), (1, 1), (1, 400)])
def test_fit_gives_the_shape_asked_for(shape: tuple[int, int]) -> None:
    fitted = images.fit(colours(max(shape[0], 2), max(shape[1], 2)), 32, 48)
    assert fitted.shape == (32, 48, 3)
    assert fitted.dtype == np.uint8


def test_fit_never_reaches_a_rounding_error_beyond_the_edge() -> None:
    for height, width, high, wide in [(55, 120, 40, 88), (57, 125, 40, 88), (58, 120, 42, 88)]:
        assert images.fit(colours(height, width), high, wide).shape == (high, wide, 3)


def test_fit_takes_the_centre() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert (images.fit(wide, 10, 10) == 255).all()
    assert (images.fit(wide.transpose(1, 0, 2).copy(), 10, 10) == 255).all()


def test_fit_does_not_stretch() -> None:
    y, x = np.mgrid[:200, :320]
    disc = np.where((y - 99.5) ** 2 + (x - 159.5) ** 2 < 60**2, 255, 0).astype(np.uint8)
    fitted = images.fit(np.repeat(disc[:, :, None], 3, axis=2), 50, 50)[:, :, 0] > 127
    assert abs(int(fitted.any(0).sum()) - int(fitted.any(1).sum())) <= 1


def test_fit_averages_fine_texture() -> None:
    checkers = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    fitted = images.fit(np.repeat(checkers[:, :, None], 3, axis=2), 32, 32)
    assert np.abs(fitted.astype(int) - 127).max() <= 2


def profile_with_red_and_blue_exchanged() -> bytes:
    """sRGB with the colorants of red and blue exchanged: any reader can tell it was applied."""
    data = bytearray(ImageCms.ImageCmsProfile(images.SRGB).tobytes())
    count = struct.unpack(">I", data[128:132])[0]
    for entry in range(132, 132 + 12 * count, 12):
        name = bytes(data[entry : entry + 4])
        data[entry : entry + 4] = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}.get(name, name)
    # Its description says sRGB, in UTF-16; a profile that says so is not applied.
    return bytes(data).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


def test_a_jpeg_is_of_quality_92_with_colour_as_fine_as_grey() -> None:
    rgb = colours(48, 48)
    mine = Image.open(io.BytesIO(images.encode(rgb, "jpeg")))
    usual = Image.open(io.BytesIO(encoded(Image.fromarray(rgb), "JPEG", quality=92)))
    assert mine.quantization == usual.quantization  # type: ignore[attr-defined]
    assert [layer[1:3] for layer in mine.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]


def test_fit_reduces_by_lanczos() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = Image.fromarray(noise).resize((24, 24), Image.Resampling.LANCZOS)
    assert np.array_equal(images.fit(noise, 24, 24), np.array(expected))


def linear_grey() -> bytes:
    """A profile of grey whose numbers are amounts of light, written by hand: 128 is seen as 188."""
    white = struct.pack(">4s4x3i", b"XYZ ", 0xF6D6, 0x10000, 0xD32D)
    curve = struct.pack(">4s4xIHxx", b"curv", 1, 0x100)
    tags = struct.pack(">I", 2)
    tags += struct.pack(">4sII4sII", b"wtpt", 156, len(white), b"kTRC", 176, len(curve))
    size = 128 + len(tags) + len(white) + len(curve)
    header = struct.pack(">I4xI4s4s4s12x4s", size, 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"acsp")
    header += struct.pack(">28x3i", 0xF6D6, 0x10000, 0xD32D)
    return header.ljust(128, b"\0") + tags + white + curve


def test_a_profile_of_grey_is_applied_to_every_kind_of_grey() -> None:
    eight = Image.new("L", (2, 2), 128)
    clear = Image.merge("LA", (eight, Image.new("L", (2, 2), 255)))
    sixteen = Image.fromarray(np.full((2, 2), 128 * 257, np.uint16))
    for image in (eight, clear, sixteen):
        seen = images.decode(encoded(image, icc_profile=linear_grey()), "a")
        assert np.abs(seen.astype(int) - 188).max() <= 1, image.mode


def grey_tiff(width: int, bits: int, photometric: int, row: bytes) -> bytes:
    """A TIFF of one row of grey written by hand, for what Pillow does not write."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8}
    tags |= {277: 1, 278: 1, 279: len(row)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    body = row + bytes(len(row) % 2)
    begins = struct.pack("<2sHI", b"II", 42, 8 + len(body))
    return begins + body + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


def test_twelve_bit_grey_is_scaled_by_its_own_white() -> None:
    packed = (0xFFF800).to_bytes(3, "big")  # 4095 and 2048
    assert images.decode(grey_tiff(2, 12, 1, packed), "a")[0, :, 0].tolist() == [255, 128]


def test_sixteen_bit_grey_whose_zero_is_white_comes_as_it_is_seen() -> None:
    for photometric, seen in ((1, [0, 1, 255]), (0, [255, 254, 0])):
        data = grey_tiff(3, 16, photometric, struct.pack("<3H", 0, 257, 65535))
        assert images.decode(data, "a")[0, :, 0].tolist() == seen
