"""Pictures to features: the networks in whose features distances are measured.

    scenes      33 thousand weights, part of the package (`evaluate/scenes_features`)
    dinov2      DINOv2 ViT-L/14, class token
    clip        CLIP ViT-L/14 at 336 px, projected image embedding
    inception   Inception v3 as used for FID, installed with the extra `eval`
    any other   a vision or CLIP model of `transformers`, by hub id, hub id@revision or local folder

Pictures are bytes: what is scored is what would be saved. They are resized once, to the network's
input size, by Pillow's bicubic filter, which is antialiased; Inception does its own resizing, as
FID requires. Every extractor has a digest of weights and preprocessing, because values of
different versions cannot be compared.

A network that was used in training should not evaluate the model: do not report its distances.

Shapes  pictures (n, h, w, 3) uint8 or float in [0, 1]; features (n, f) float32.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor, nn

from daybreak.data import disk, images
from daybreak.evaluate import scenes_features
from daybreak.failure import BadData, BadRecipe, BadStorage, told
from daybreak.model.hub import Unpickling

Pictures = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]

VERSION = "1"  # of decoding and resizing; part of every digest

KNOWN = {  # name: (hub id, size and licence)
    "dinov2": ("facebook/dinov2-large", "1.2 GB, Apache-2.0"),
    "clip": ("openai/clip-vit-large-patch14-336", "1.7 GB, MIT"),
}
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # ends in the first digits of its sha256
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"
BATCH = 64


class Extractor(NamedTuple):
    """A network, with everything that its features depend on."""

    name: str
    digest: str  # 16 hex digits of the sha256 of weights and preprocessing
    side: int | None  # side of the square that pictures are resized to; None: not resized
    network: Callable[[UInt8[Tensor, "b 3 h w"]], Float[Tensor, "b f"]]
    family: str = ""  # its architecture: clip, dinov2, dinov3_vit, ...


class Reference(NamedTuple):
    """Features of a fixed set of pictures, and the key under which they are cached."""

    features: Features
    digest: str
    enlarged: int  # pictures that were smaller than the model's and were enlarged


def load(name: str, device: torch.device | str = "cpu") -> Extractor:
    """Load an extractor by one of the names above.

    Errors  BadRecipe if its weights or its package are missing; it says where to put them.
    """
    if name == "scenes":
        return scenes(device)
    if name == "inception":
        return inception(device)
    model, processor = from_hub(name)
    return from_model(name, model.to(device), processor)


def extract(extractor: Extractor, pictures: npt.NDArray[Any]) -> Features:
    """Return the features of all pictures, in order. Errors: ValueError as `as_bytes`."""
    parts = []
    pixels = as_bytes(pictures)
    for first in range(0, len(pixels), BATCH):
        batch = pixels[first : first + BATCH]
        if extractor.side is not None:
            batch = np.stack([fit(one, extractor.side, extractor.side) for one in batch])
        with torch.no_grad():
            found = extractor.network(torch.tensor(batch).permute(0, 3, 1, 2))
        parts.append(found.float().cpu().numpy())
    return np.concatenate(parts)


def as_bytes(pictures: npt.NDArray[Any]) -> Pictures:
    """Convert pictures to uint8, rounded; floats must be in [0, 1].

    Floats in 0-255 or in [-1, 1], or channels first, would give plausible but meaningless values.

    Errors  ValueError for any other range, type or shape, and for no pictures at all.
    """
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or 0 in pictures.shape:
        raise ValueError(f"pictures are (n, h, w, 3), not {pictures.shape}")
    if pictures.dtype == np.uint8:
        return pictures
    if not np.issubdtype(pictures.dtype, np.floating):
        raise ValueError(f"pictures are uint8 or float, not {pictures.dtype}")
    low, high = float(pictures.min()), float(pictures.max())
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise ValueError(f"float pictures lie in [0, 1], not in [{low:g}, {high:g}]")
    rounded: Pictures = np.rint(pictures.astype(np.float64) * 255).astype(np.uint8)
    return rounded


def fit(picture: Pictures, height: int, width: int) -> Pictures:
    """Crop the largest centred part of that aspect ratio and scale it by a bicubic filter."""
    if picture.shape[:2] == (height, width):
        return picture
    scaled = ImageOps.fit(Image.fromarray(picture), (width, height), Image.Resampling.BICUBIC)
    return np.asarray(scaled)


# Networks


def scenes(device: torch.device | str = "cpu") -> Extractor:
    """Return the network that was trained on coloured shapes."""
    network = scenes_features.load().to(device)
    return Extractor(
        "scenes",
        _digest(network, ()),
        None,
        lambda x: network(x.to(device).float() / 127.5 - 1),
        "scenes",
    )


def from_model(name: str, model: Any, processor: Any) -> Extractor:
    """Wrap a loaded vision model of `transformers`, or the image encoder of a CLIP model.

    Mean, standard deviation and side are taken from its preprocessor.
    """
    device = model.device
    side = _side(processor)
    mean, spread = (
        torch.tensor(values, device=device).view(1, 3, 1, 1)
        for values in (processor.image_mean, processor.image_std)
    )
    reads = hasattr(model.config, "text_config")  # CLIP and its like

    def network(x: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b f"]:
        pixels = (x.to(device).float() / 255 - mean) / spread
        output = model.get_image_features(pixels) if reads else model(pixels)
        found: Tensor = output.pooler_output
        return found

    preparation = (side, list(processor.image_mean), list(processor.image_std))
    family = str(model.config.model_type)
    return Extractor(name, _digest(model, preparation), side, network, family)


def inception(device: torch.device | str = "cpu") -> Extractor:
    """Load FID's Inception v3, with weights converted from the original ones.

    Errors  BadRecipe if the package or the file is missing, or if the file's sha256 is wrong.
    """
    weights = inception_home()
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision does not fit torch
        raise BadRecipe(
            'the features of inception need torch-fidelity: pip install "daybreak[eval]" '
            f"({told(error)})"
        ) from error
    if not weights.is_file():
        raise BadRecipe(
            f"the features of inception need {INCEPTION} (92 MB): download {INCEPTION_URL} to "
            f"{weights}"
        )
    expected = Path(INCEPTION).stem.rpartition("-")[2]
    if not _hash(weights).startswith(expected):
        raise BadRecipe(
            f"{weights} is damaged or another file: its sha256 does not begin with {expected}"
        )
    torch.load(weights, weights_only=True)  # first: torch-fidelity would unpickle code too
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights)).to(device)
    digest = _digest(network, ())
    return Extractor("inception", digest, None, lambda x: network(x.to(device))[0], "inception")


def inception_home() -> Path:
    """Return the path at which torch-fidelity itself stores the weights of Inception."""
    home = Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser()
    return home / "hub" / "checkpoints" / INCEPTION


def located(source: str) -> tuple[str, str]:
    """Return hub id or folder, and revision, for an extractor's name."""
    hub = KNOWN[source][0] if source in KNOWN else source
    name, _, revision = hub.partition("@")
    return (hub, "main") if Path(hub).is_dir() or not revision else (name, revision)


def from_hub(source: str) -> tuple[Any, Any]:
    """Load a frozen model of `transformers` and its image preprocessor.

    Errors  BadRecipe if it is missing or incomplete, with name and size: `transformers` would fill
            missing weights with random values, and every score would be wrong.
    """
    from transformers import AutoImageProcessor, AutoModel

    hub, revision = located(source)
    try:
        processor = AutoImageProcessor.from_pretrained(hub, revision=revision)
        model, report = AutoModel.from_pretrained(
            hub, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError, EOFError, RuntimeError, Unpickling) as error:
        named = f"{hub} ({KNOWN[source][1]})" if source in KNOWN else hub
        raise BadRecipe(
            f"the features of {source} need the model {named}, which is neither a local folder nor "
            f"can be loaded from the hub ({told(error)}): connect once, or give the "
            "path of a folder with config.json, model.safetensors and preprocessor_config.json"
        ) from error
    absent = [name for name in report["missing_keys"] if not name.endswith("mask_token")]
    if absent:
        raise BadRecipe(f"the model {hub} lacks weights ({absent[0]}, ...): download it anew")
    return model.eval().requires_grad_(False), processor


def _side(processor: Any) -> int:
    """Return the side of a preprocessor's centre crop."""
    for size in (processor.crop_size, processor.size):
        if size is not None:
            side = size.height or size.shortest_edge
            if side is not None:
                return int(side)
    raise BadRecipe("preprocessor_config.json gives no picture size: add a crop_size or size to it")


def _digest(network: nn.Module, preparation: tuple[Any, ...]) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, *preparation]).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# The reference


def reference(
    extractor: Extractor, files: Sequence[Path], height: int, width: int, cache: Path
) -> Reference:
    """Return the features of picture files at the model's size, computed once.

    They are cached in `cache` under a hash of the files' contents, the size and the extractor: file
    names and order do not matter, and any changed byte gives another reference. Smaller pictures
    are enlarged, as is usual for published values, and counted.

    Errors  BadData for a damaged picture or for no pictures; BadStorage if the cache cannot be
            written.
    """
    if not files:
        raise BadData("there are no pictures to compare with")
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(_hash, files))
        ordered = [file for _, file in sorted(zip(hashes, files, strict=True))]
        parts_of_key = [VERSION, height, width, extractor.name, extractor.digest, *sorted(hashes)]
        digest = hashlib.sha256(json.dumps(parts_of_key).encode()).hexdigest()[:16]
        place = cache / f"{digest}.safetensors"
        known, small = kept(place, len(files)), kept(place, len(files), "enlarged")
        if known is not None and small is not None:
            return Reference(known, digest, int(small.sum()))
        parts, enlarged = [], []
        for first in range(0, len(ordered), BATCH):
            some = ordered[first : first + BATCH]
            read = list(pool.map(lambda file: _read(file, height, width), some))
            parts.append(extract(extractor, np.stack([picture for picture, _ in read])))
            enlarged += [smaller for _, smaller in read]
    features = np.concatenate(parts)
    keep(place, features, enlarged=np.array(enlarged, dtype=np.float32))
    return Reference(features, digest, sum(enlarged))


def kept(place: Path, number: int, what: str = "features") -> Features | None:
    """Return features from the cache; None if they are missing, damaged or not `number` rows."""
    try:
        found: Features = load_file(place)[what]
    except (OSError, SafetensorError, KeyError):
        return None
    return found if len(found) == number else None


def keep(place: Path, features: Features, **others: Features) -> None:
    """Write features, and other arrays, into the cache atomically. Errors: BadStorage."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with disk.fresh(place) as staged:
            staged.write_bytes(save({"features": features, **others}))
    except OSError as error:
        raise BadStorage(
            f"cannot keep the reference in {place.parent}: {error.strerror}"
        ) from error


def _read(file: Path, height: int, width: int) -> tuple[Pictures, bool]:
    """Return a picture of that shape, and whether it had to be enlarged."""
    picture = images.decode(file.read_bytes(), str(file))
    smaller = picture.shape[0] < height or picture.shape[1] < width
    return fit(picture, height, width), smaller


def _hash(file: Path) -> str:
    try:
        return disk.sha256(file)
    except OSError as error:
        raise BadData(f"{file}: cannot be read ({error.strerror})") from error
