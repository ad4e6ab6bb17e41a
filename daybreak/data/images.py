"""Pictures: the only place where the bytes of a file become pixels.

Whatever the file holds, the result is (h, w, 3) in sRGB: upright, on a plain background, with
sixteen bits scaled to eight and not clipped. A simple conversion gets five things silently wrong:
16-bit grey turns white, transparent pixels show their hidden colour, photographs lie on their side,
colours of CMYK and wide gamuts shift, and palettes lose their transparency.

The header is read first. A file of another format, or of more than 64 megapixels, is refused
before any pixel is decoded, so that a file of 100 kB cannot take gigabytes of memory.

Shapes  image (h, w, 3).     Units  uint8, sRGB.
Errors  Refused, naming the file, of the kind `format` (no picture, or one of another format),
        `damaged`, `bomb` (too large to decode) or `pixels` (a mode without a defined white).
"""

import io
import struct
from collections.abc import Mapping
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, UnidentifiedImageError

from daybreak.data.records import Refused, why

try:
    import simplejpeg
except ImportError:  # Pillow does the same, a little slower
    simplejpeg = None

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")
LIMIT = 64_000_000
TOO_LARGE = f"has more than {LIMIT // 1_000_000} megapixels; scale it down."
TOO_MUCH_TEXT = "has more compressed text in it than pictures have; save it without its metadata."
WHITE = (255, 255, 255)
QUALITY = 92  # of JPEG, without chroma subsampling, which makes colour bleed over drawn edges

SRGB = ImageCms.createProfile("sRGB")
BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION = 258, 262, 274  # TIFF tags
TURNS = {  # turns a picture upright, by its orientation tag
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(
    data: bytes, where: str, background: tuple[int, int, int] = WHITE, shrink: int = 1
) -> npt.NDArray[np.uint8]:
    """The picture in a file; of an animation, its first frame.

    `where` is the name used in errors; `background` shows where the picture is transparent. With
    `shrink` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, but at no less than 1 / `shrink`: its
    blocks of 8 x 8 are then decoded at lower resolution, in a fraction of the time. Other formats
    have no such short cut and are returned in full size.
    """
    with _header(io.BytesIO(data), where) as image:
        try:
            if shrink > 1:
                image.draft(None, (image.width // shrink, image.height // shrink))
            image.load()
            return np.array(_srgb(_upright(image), where, background, image))
        except Refused:
            raise
        except Exception as error:  # decoders raise errors of any kind
            if _is_text_bomb(error):
                raise Refused(f"{where}: {TOO_MUCH_TEXT}", "bomb") from error
            raise Refused(f"{where}: cannot be decoded ({why(error)}); replace it.") from error


def size(data: bytes, where: str) -> tuple[int, int]:
    """The height and width in the header, before a photograph is turned upright."""
    with _header(io.BytesIO(data), where) as image:
        return image.height, image.width


def encode(image: npt.NDArray[np.uint8], form: Literal["jpeg", "webp", "png"]) -> bytes:
    """The bytes of a file: JPEG of quality 92, or lossless WebP or PNG."""
    options: dict[str, dict[str, object]] = {
        "jpeg": {"quality": QUALITY, "subsampling": 0},
        "webp": {"lossless": True, "exact": True},
        "png": {},
    }
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **options[form])
    return file.getvalue()


def decode_to_cover(data: bytes, where: str, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Decode a picture that is stored upright and in sRGB, no larger than necessary.

    A JPEG is decoded at a half, a quarter or an eighth of its size if that still covers `height` x
    `width`; other fractions would save less time. `simplejpeg` gives the same pixels faster.
    """
    if simplejpeg is None or not data.startswith(b"\xff\xd8"):
        return decode(data, where, shrink=_shrink(*size(data, where), height, width))
    try:
        have_height, have_width, colours, _ = simplejpeg.decode_jpeg_header(data)
        shrink = _shrink(have_height, have_width, height, width)
        if colours == "CMYK" or have_height * have_width > LIMIT:
            return decode(data, where, shrink=shrink)
        least = -(-have_height // shrink), -(-have_width // shrink)
        return simplejpeg.decode_jpeg(data, min_height=least[0], min_width=least[1])
    except ValueError as error:
        raise Refused(f"{where}: cannot be decoded ({why(error)}); replace it.") from error


def verify(file: IO[bytes], where: str) -> tuple[int, int]:
    """Check what can be checked without decoding; return the height and width in the header.

    For a PNG this checks the checksum of every chunk, for other formats only the header: `decode`
    finds damage after it.
    """
    with _header(file, where) as image:
        width, height = image.size
        try:
            image.verify()
        except Exception as error:
            raise Refused(f"{where}: is damaged ({why(error)}); replace it.") from error
    return height, width


def fit(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """The largest centred part of the picture with the wanted aspect, scaled to `height` x `width`.

    Nothing is stretched. The filter is Lanczos with its support scaled by the reduction, so that
    fine texture becomes its mean, not moire.
    """
    have_height, have_width = image.shape[:2]
    if (have_height, have_width) == (height, width):
        return image
    scale = max(height / have_height, width / have_width)
    top = max(0.0, (have_height - height / scale) / 2)  # never below 0 by a rounding error
    left = max(0.0, (have_width - width / scale) / 2)
    box = (left, top, have_width - left, have_height - top)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS, box)
    return np.array(resized)


def _shrink(have_height: int, have_width: int, height: int, width: int) -> int:
    """The largest factor by which a JPEG may be reduced and still cover a shape."""
    covers = min(have_height // height, have_width // width)
    return next((by for by in (8, 4, 2) if by <= covers), 1)


def _header(file: IO[bytes], where: str) -> Image.Image:
    """The opened picture, before any of its pixels is decoded."""
    try:
        image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused(f"{where}: {TOO_LARGE}", "bomb") from error
    except UnidentifiedImageError as error:
        file.seek(0)
        begins = file.read(4)
        if not begins or begins.startswith(SIGNATURES):
            what = "has a damaged header" if begins else "is empty"
            raise Refused(f"{where}: {what}; replace it.") from error
        raise Refused(
            f"{where}: is not a PNG, JPEG, WebP, GIF, BMP or TIFF picture; convert or remove it.",
            "format",
        ) from error
    except Exception as error:
        if _is_text_bomb(error):
            raise Refused(f"{where}: {TOO_MUCH_TEXT}", "bomb") from error
        raise Refused(f"{where}: has a damaged header ({why(error)}); replace it.") from error
    if image.width * image.height > LIMIT:
        raise Refused(f"{where}: {TOO_LARGE}", "bomb")
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Turn a loaded picture upright; tags that cannot be read are ignored.

    Pillow's `exif_transpose` is not used: it also rewrites the tags, and fails if that fails.
    """
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except (SyntaxError, struct.error, OSError, LookupError, TypeError, ValueError):
        return image
    return image if turn is None else image.transpose(turn)


def _srgb(
    image: Image.Image, where: str, background: tuple[int, int, int], opened: Image.Image
) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and opened.format == "PNG"):
        image = _eight_bits(image, getattr(opened, "tag_v2", {}))  # only TIFF has them
    if image.mode in {"I", "F", "LAB"}:
        raise Refused(
            f"{where}: has pixels of kind {image.mode}, for which there is no agreed white; "
            "save it with 8 or 16 bits a channel.",
            "pixels",
        )

    alpha = None
    if image.has_transparency_data:
        # No profile is for palettes: a palette's colours are RGB, and so is its profile.
        grey = image.mode in {"L", "LA", "La"}
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("L" if grey else "RGB")

    image = _from_profile(image)
    if alpha is None:
        return image
    return Image.composite(image, Image.new("RGB", image.size, background), alpha)


def _eight_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Scale sixteen-bit grey to eight: 65535 / 257 = 255. Pillow's own conversion clips."""
    values = np.asarray(image).astype(np.float32)
    white = 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535
    if tags.get(PHOTOMETRIC) == 0:
        values = white - values
    grey = Image.fromarray(np.clip(np.rint(values * (255 / white)), 0, 255).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # one exact value is transparent: compare at sixteen bits
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if "icc_profile" in image.info:
        grey.info["icc_profile"] = image.info["icc_profile"]
    return grey


def _from_profile(image: Image.Image) -> Image.Image:
    """Convert to sRGB by the embedded colour profile, if there is a usable one.

    A profile that is broken, or made for another kind of pixel, is ignored, as viewers do: the
    picture is then assumed to be sRGB, which it nearly always is.
    """
    data = image.info.get("icc_profile")
    if data and image.mode != "1":
        if image.mode in {"P", "RGBX", "YCbCr"}:
            image = image.convert("RGB")
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
            if "sRGB" not in (profile.profile.profile_description or ""):
                converted = ImageCms.profileToProfile(image, profile, SRGB, outputMode="RGB")
                assert converted is not None  # only inPlace=True returns None
                return converted
        except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
            pass
    return image.convert("RGB")


def _is_text_bomb(error: Exception) -> bool:
    """Whether Pillow refused the compressed text of a PNG: 1 MB of it may expand to a gigabyte."""
    return isinstance(error, ValueError) and "text" in str(error).lower()
