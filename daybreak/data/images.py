"""Pictures: the one place where bytes of a file become pixels.

Whatever the file holds, the result is (h, w, 3) of sRGB: upright, on a plain background, with
sixteen bits scaled down and not cut off. A converter written for convenience gets five of these
wrong without a word: 16-bit grey turns white, transparent pixels show the colour hidden under
them, photographs lie on their side, CMYK and wide gamuts shift, palettes lose their holes.

The header is read first. A file of another format, or of more than 64 megapixels, is refused
before a pixel is decoded, so that 100 kB of zeros cannot ask for gigabytes.

Shapes  image (h, w, 3).     Units  uint8, sRGB.
Errors  BadData, naming the file, for what is damaged, foreign or too large.
"""

import io
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from daybreak.failure import BadData

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
LIMIT = 64_000_000
WHITE = (255, 255, 255)

SRGB = ImageCms.createProfile("sRGB")
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF tags


def decode(
    data: bytes, where: str, background: tuple[int, int, int] = WHITE
) -> npt.NDArray[np.uint8]:
    """The picture in a file; of an animation, its first frame.

    `where` is the name the error gives; `background` shows through where the picture is clear.
    """
    with _header(io.BytesIO(data), where) as image:
        try:
            image.load()
            return np.array(_srgb(ImageOps.exif_transpose(image), where, background))
        except BadData:
            raise
        except Exception as error:  # decoders raise whatever they tripped over
            raise BadData(f"{where}: cannot be decoded ({_why(error)}); replace it.") from error


def verify(file: IO[bytes], where: str) -> tuple[int, int]:
    """Check what can be checked without decoding; the height and width in the header.

    Of a PNG this reads the checksum of every chunk, of other formats the header alone: damage
    further on is found by `decode`.
    """
    with _header(file, where) as image:
        width, height = image.size
        try:
            image.verify()
        except Exception as error:
            raise BadData(f"{where}: is damaged ({_why(error)}); replace it.") from error
    return height, width


def fit(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """The largest centred part of the picture that has the wanted shape, scaled to it.

    Nothing is stretched. The filter is Lanczos with its support scaled to the reduction, so that
    fine texture turns into its mean and not into moire.
    """
    have_height, have_width = image.shape[:2]
    if (have_height, have_width) == (height, width):
        return image
    scale = max(height / have_height, width / have_width)
    top = (have_height - height / scale) / 2
    left = (have_width - width / scale) / 2
    box = (left, top, have_width - left, have_height - top)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS, box)
    return np.array(resized)


def _header(file: IO[bytes], where: str) -> Image.Image:
    """The opened picture, before any of its pixels is decoded."""
    try:
        image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadData(f"{where}: {_too_large()}") from error
    except UnidentifiedImageError as error:
        raise BadData(
            f"{where}: is not a PNG, JPEG, WebP, GIF, BMP or TIFF picture; convert or remove it."
        ) from error
    except Exception as error:
        raise BadData(f"{where}: has a damaged header ({_why(error)}); replace it.") from error
    if image.width * image.height > LIMIT:
        raise BadData(f"{where}: {_too_large()}")
    return image


def _srgb(image: Image.Image, where: str, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = _eight_bits(image)
    if image.mode in {"I", "F", "LAB"}:
        raise BadData(
            f"{where}: has pixels of kind {image.mode}, for which there is no agreed white; "
            "save it with 8 or 16 bits a channel."
        )

    alpha = None
    if image.has_transparency_data:
        # A palette has no profile of its own kind: its colours are RGB, like everything else's.
        grey = image.mode in {"L", "LA", "La"}
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("L" if grey else "RGB")

    image = _from_profile(image)
    if alpha is None:
        return image
    return Image.composite(image, Image.new("RGB", image.size, background), alpha)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Sixteen-bit grey, scaled: 65535 / 257 = 255. Pillow's own conversion clips instead."""
    values = np.asarray(image).astype(np.float32)
    tags = getattr(image, "tag_v2", {})  # TIFF alone has them
    white = 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535
    if tags.get(PHOTOMETRIC) == 0:
        values = white - values
    grey = Image.fromarray(np.clip(np.rint(values * (255 / white)), 0, 255).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # one exact value is clear, so it is compared at sixteen bits
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if "icc_profile" in image.info:
        grey.info["icc_profile"] = image.info["icc_profile"]
    return grey


def _from_profile(image: Image.Image) -> Image.Image:
    """To sRGB by the embedded colour profile, where there is one that can be used.

    A profile that is broken, or made for another kind of pixel, is passed over as every viewer
    does: the picture is then taken for sRGB, which it nearly always is.
    """
    data = image.info.get("icc_profile")
    if data and image.mode != "1":
        if image.mode in {"P", "RGBX", "YCbCr"}:
            image = image.convert("RGB")
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
            if "sRGB" not in (profile.profile.profile_description or ""):
                converted = ImageCms.profileToProfile(image, profile, SRGB, outputMode="RGB")
                assert converted is not None  # None is the answer of inPlace=True
                return converted
        except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
            pass
    return image.convert("RGB")


def _too_large() -> str:
    return f"has more than {LIMIT // 1_000_000} megapixels; scale it down."


def _why(error: Exception) -> str:
    """What the decoder said, short enough for one sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120].rstrip(". ")
