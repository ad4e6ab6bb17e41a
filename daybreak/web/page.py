"""What the pages have in common: each is one file that contains its pictures.

A page loads nothing and runs no scripts, and a policy in its head forbids both, so that an
untrusted caption is never more than text.
"""

import base64
import io
from pathlib import Path

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image

from daybreak import host
from daybreak.data import disk
from daybreak.failure import BadStorage

LETTERS = 240  # at most, of a caption, a name or a reason
SMALL = 64  # pixels along the longer side


def render(template: str, **values: object) -> str:
    """A page, as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": "{:,}".format, "size": size, "cut": cut, "steps": steps}
    version = host.version_of("daybreak")
    return environment.get_template(template).render(**values, version=version)


def write(text: str, path: Path) -> Path:
    """Write a page, completely or not at all. Errors: BadStorage."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk.fresh(path) as staged:
            staged.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadStorage(f"cannot write {path}: {error.strerror}; choose another --out") from error
    return path


def uri(pixels: npt.NDArray[np.uint8]) -> str:
    """A picture as a data URI. A small one is stored losslessly: its pixels will be visible."""
    file = io.BytesIO()
    small = max(pixels.shape[:2]) <= SMALL
    Image.fromarray(pixels).save(file, "WEBP", lossless=small, quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def cut(text: str) -> str:
    """A text, cut to at most LETTERS characters."""
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"


def steps(number: float) -> str:
    """A number of steps, perhaps a fraction, as text."""
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.1f}"


def size(number: float) -> str:
    """A number of bytes as text, in a unit that leaves few digits."""
    power = min(max(int(number).bit_length() - 1, 0) // 10, 4)
    return f"{number / 1024**power:,.0f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
