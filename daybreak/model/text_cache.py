"""Captions encoded once: the output of a frozen text encoder, kept on disk.

    DATASET/text/KEY/manifest.json      what the embeddings depend on; bytes and sha256 of shards
    DATASET/text/KEY/00000.safetensors
        tokens (n, e)     token vectors of all captions of the shard, concatenated, no padding
        ends (c,)         where each caption ends
        digests (c, 24)   hash of each caption, in hexadecimal

No entry can be out of date, because both names are hashes of contents. KEY is a hash of the encoder
(the commit of a hub id, or the sha256 of every file of a local folder), its precision and its
settings. A digest is a hash of the caption as it is tokenised. Another encoder has another folder;
a caption that is not found is encoded. If a process is killed, only the shard that it was writing
is lost: the manifest names only complete ones.

Several processes can divide a dataset by digest, each with a folder of its own: KEY.1-of-8 and so
on. A reader uses all folders of a KEY.

This module belongs to the model and not to the data because it returns what the encoder returns. It
does not depend on pictures: a dataset gives it a folder and captions.

Letters  b captions of a batch, c captions of a shard, n and l tokens, e width of the encoder.
Units    the precision of the encoder. A reader needs 48 bytes of memory for each stored caption;
         embeddings are memory-mapped.
"""

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from daybreak.data import disk
from daybreak.failure import BadData, BadRecipe, BadStorage
from daybreak.model import hub
from daybreak.model.text import Config, Text, TextEncoder, clean

SCHEMA = 1
SHARD_BYTES = 2**30
BATCH, AHEAD = 32, 4096  # captions encoded together; captions sorted by length at a time
READERS = 16  # captions of a batch that are read from disk in parallel
SOON = 6  # batches that are read before they are asked for
RECENT = 2**14  # captions whose digests are cached: enough for those batches
DIGITS = 24  # 96 bits: among a billion captions, the probability of a collision is 1e-11
# Settings left out of KEY: the encoder's name, those of a trained one, one that changes padding.
OURS = {"encoder", "lengths", "width", "depth", "heads", "vocabulary"}


def settings(config: Config, compute: torch.dtype) -> dict[str, Any]:
    """Return everything but the caption that an embedding depends on.

    A local folder counts by its files, not its path. Errors: BadRecipe if there is no encoder.
    """
    name = str(config.encoder)
    folder = Path(name)
    return {
        "schema": SCHEMA,
        "encoder": {"files": _tree(folder)} if folder.is_dir() else {name: _commit(name)},
        "precision": str(compute).removeprefix("torch."),
        "settings": config.model_dump(mode="json", exclude=OURS),
    }


def place(dataset: Path, made_with: dict[str, Any]) -> Path:
    """Return the folder of embeddings with these settings."""
    digest = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()
    return dataset / "text" / digest[:16]


class Part(NamedTuple):
    """A share of the captions: its number, counted from 1, and how many shares there are."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read `I/N`. Errors: BadRecipe."""
        found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text.strip())
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise BadRecipe(f"--part {text}: write I/N, from 1/8 to 8/8 on eight devices")
        return cls(int(found[1]), int(found[2]))

    def has(self, caption: str) -> bool:
        """Whether a caption belongs to this share, which is the same on every machine."""
        return int(_digest(caption), 16) % self.of == self.number - 1


ALL = Part(1, 1)


def places(dataset: Path, made_with: dict[str, Any]) -> dict[Part, Path]:
    """Return the folders of a dataset with such embeddings, by share of the captions."""
    whole, found = place(dataset, made_with), dict[Part, Path]()
    for manifest in sorted(whole.parent.glob(f"{whole.name}*/manifest.json")):
        number, _, of = manifest.parent.name[len(whole.name) + 1 :].partition("-of-")
        found[Part(int(number), int(of)) if of else ALL] = manifest.parent
    return found


class Reader:
    """The embeddings of one dataset or several, all made with the same settings.

    `partial` are the datasets whose embeddings are not known to be complete.
    """

    def __init__(
        self, folders: Sequence[Path], config: Config, partial: Sequence[Path] = ()
    ) -> None:
        """Map the shards into memory. Errors: BadData if one contradicts its manifest."""
        self.partial = partial
        self.step = config.length_step
        self.pinned = torch.cuda.is_available()  # so that the host does not wait for copies
        self.shards: list[Tensor] = []
        digests = [np.empty(0, f"S{DIGITS}")]
        entries = [np.empty((0, 3), np.int64)]  # shard, start, end
        for path in (path for folder in folders for path in _whole(folder)):
            shard = load_file(path)
            ends = shard["ends"].numpy()
            starts = np.concatenate([[0], ends[:-1]])
            entries.append(np.stack([np.full_like(ends, len(self.shards)), starts, ends], axis=1))
            digests.append(shard["digests"].numpy().view(f"S{DIGITS}")[:, 0])
            self.shards.append(shard["tokens"])
        self.readers = ThreadPoolExecutor(READERS, "words")
        self.soon: deque[tuple[list[bytes], Text]] = deque(maxlen=SOON)
        order = np.argsort(np.concatenate(digests))
        self.digests: npt.NDArray[np.bytes_] = np.concatenate(digests)[order]
        self.entries = np.concatenate(entries)[order]

    def expect(self, captions: Sequence[str]) -> None:
        """Read the embeddings of a later batch from disk; called by the prefetching thread."""
        wanted = [_digest(caption) for caption in captions]
        words = self._words(wanted)
        if words is not None:
            self.soon.append((wanted, self._padded(words)))

    def tokens(self, captions: Sequence[str]) -> Text | None:
        """What the encoder would return for these captions; None if one of them is not stored.

        Token vectors and length are the encoder's; padding is zero.
        """
        wanted = [_digest(caption) for caption in captions]
        for held, text in tuple(self.soon):
            if held == wanted:
                return text
            for first in range(0, len(held), len(wanted)):  # a micro-batch of that batch
                if held[first : first + len(wanted)] == wanted:
                    return self._cut(text, slice(first, first + len(wanted)))
        words = self._words(wanted)
        return None if words is None else self._padded(words)

    def _cut(self, text: Text, rows: slice) -> Text:
        """Return some captions of a batch, cut to the padded length of the longest of them."""
        mask = text.mask[rows]
        length = -(-int(mask.sum(1).max()) // self.step) * self.step
        return Text(text.tokens[rows, :length], mask[:, :length])

    def _padded(self, words: Sequence[Tensor]) -> Text:
        """Return captions as one padded tensor, in pinned memory if there is a GPU."""
        lengths = torch.tensor([len(one) for one in words])
        length = -(-int(lengths.max()) // self.step) * self.step
        shape = len(words), length, words[0].shape[1]
        tokens = torch.empty(shape, dtype=words[0].dtype, pin_memory=self.pinned)

        def fill(row: Tensor, one: Tensor) -> None:
            row[: len(one)] = one
            row[len(one) :] = 0

        # The threads read from disk, in parallel, what is not in memory yet.
        deque(self.readers.map(fill, tokens, words), maxlen=0)
        mask = torch.arange(length) < lengths[:, None]
        return Text(tokens, mask.pin_memory() if self.pinned else mask)

    def _words(self, wanted: Sequence[bytes]) -> list[Tensor] | None:
        """Return the mapped tensors of these captions, not read yet; None if one is not stored."""
        digests = np.array(wanted)
        found = np.searchsorted(self.digests, digests)
        if not len(self.digests) or (self.digests.take(found, mode="clip") != digests).any():
            return None
        return [self.shards[shard][start:end] for shard, start, end in self.entries[found]]


def reader(datasets: Sequence[Path], config: Config, compute: torch.dtype) -> Reader | None:
    """Return a reader of the embeddings of datasets for an encoder; None if there are none."""
    there = present(datasets, config, compute)
    folders = [folder for parts in there.values() for folder in parts.values()]
    return Reader(folders, config, _lacking(there)) if folders else None


def present(
    datasets: Sequence[Path], config: Config, compute: torch.dtype
) -> dict[Path, dict[Part, Path]]:
    """Return the folders of embeddings for an encoder, by dataset and share.

    Errors  BadRecipe as `settings`.
    """
    if config.encoder is None or not any((dataset / "text").is_dir() for dataset in datasets):
        return {dataset: {} for dataset in datasets}
    made_with = settings(config, compute)  # slow: it hashes a local encoder, gigabytes
    return {dataset: places(dataset, made_with) for dataset in datasets}


def partial(datasets: Sequence[Path], config: Config, compute: torch.dtype) -> list[Path]:
    """Return the datasets whose embeddings are not known to be complete."""
    return _lacking(present(datasets, config, compute))


def _lacking(there: dict[Path, dict[Part, Path]]) -> list[Path]:
    return [dataset for dataset, parts in there.items() if not _all_held(parts)]


def _all_held(parts: dict[Part, Path]) -> bool:
    done = {part for part, folder in parts.items() if _listed(folder).get("whole")}
    return any(all(Part(n + 1, of) in done for n in range(of)) for _, of in done)


def write(
    dataset: Path,
    encoder: TextEncoder,
    captions: Iterable[str],
    progress: Callable[[int], None] | None = None,
    part: Part = ALL,
) -> Path:
    """Encode the captions that a dataset has no embeddings of; returns the folder of embeddings.

    The empty caption, which stands for no caption, is always included. `progress` is called with
    the number of captions done. With a `part`, other processes can encode the rest meanwhile.

    Errors  BadStorage if the disk fails; finished shards stay. BadRecipe while another process
            writes to the same folder.
    """
    made_with = settings(encoder.config, encoder.compute)
    folder = place(dataset, made_with)
    if part != ALL:
        folder = folder.with_name(f"{folder.name}.{part.number}-of-{part.of}")
        captions = filter(part.has, captions)
    there = [other for other in places(dataset, made_with).values() if other != folder]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        busy = f"another command is encoding captions into {folder}: wait for its end"
        with disk.claimed(folder, busy):
            _fill(folder, there, encoder, made_with, captions, progress)
    except (OSError, SafetensorError) as error:
        raise BadStorage(f"cannot write {folder}: {error}") from error
    return folder


def _fill(
    folder: Path,
    others: Sequence[Path],
    encoder: TextEncoder,
    made_with: dict[str, Any],
    captions: Iterable[str],
    progress: Callable[[int], None] | None,
) -> None:
    """Write shards with the new captions; each enters the manifest as soon as it is complete."""
    disk.sweep(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        disk.write_json(path, made_with | {"shards": {}})
    before = _listed(folder)
    shards = dict(before["shards"])
    held = set(Reader([folder, *others], encoder.config).digests.tolist())
    for shard in _shards(encoder, _new(captions, held, progress)):
        name = f"{len(shards):05}.safetensors"
        with disk.fresh(folder / name) as staged:
            save_file(shard, staged)
            staged.chmod(path.stat().st_mode)  # safetensors makes it private
            shards[name] = disk.sealed(staged)
        disk.write_json(path, made_with | {"shards": shards})
    if (now := made_with | {"shards": shards, "whole": True}) != before:
        disk.write_json(path, now)


def _listed(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder; empty if there is none. Errors: BadData."""
    try:
        found: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadData(f"{folder}/manifest.json cannot be read ({error}): {_REMEDY}") from error
    return found


def verify(dataset: Path) -> None:
    """Compare every byte of a dataset's embeddings with the manifests. Errors: BadData."""
    for path in sorted((dataset / "text").glob("*/manifest.json")):
        _whole(path.parent, hashed=True)


def _new(
    captions: Iterable[str], held: set[bytes], progress: Callable[[int], None] | None
) -> Iterator[str]:
    """Yield each caption that is not stored, once."""
    for done, caption in enumerate(chain([""], captions)):
        digest = _digest(caption)
        if digest not in held:
            held.add(digest)
            yield caption
        if progress and done:
            progress(done)


def _shards(encoder: TextEncoder, captions: Iterator[str]) -> Iterator[dict[str, Tensor]]:
    """Encode captions and yield shards of about SHARD_BYTES."""
    digests, words, size = list[bytes](), list[Tensor](), 0
    for digest, one in _encoded(encoder, captions):
        digests.append(digest)
        words.append(one)
        size += one.nbytes
        if size >= SHARD_BYTES:
            yield _shard(digests, words)
            digests, words, size = [], [], 0
    if words:
        yield _shard(digests, words)


def _shard(digests: list[bytes], words: list[Tensor]) -> dict[str, Tensor]:
    signs = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), DIGITS)
    return {
        "tokens": torch.cat(words),
        "ends": torch.tensor(list(accumulate(map(len, words)))),
        "digests": torch.from_numpy(signs.copy()),
    }


def _encoded(encoder: TextEncoder, captions: Iterator[str]) -> Iterator[tuple[bytes, Tensor]]:
    """Yield digest and token vectors of each caption, batched by length to save padding."""
    while ahead := sorted(islice(captions, AHEAD), key=len):
        for first in range(0, len(ahead), BATCH):
            part = ahead[first : first + BATCH]
            tokens, mask = (tensor.cpu() for tensor in encoder(part))
            for caption, row, there in zip(part, tokens, mask, strict=True):
                yield _digest(caption), row[there]


@lru_cache(RECENT)
def _digest(caption: str) -> bytes:
    """Return a hash of the cleaned caption: if `clean` changes, so does the hash."""
    return hashlib.sha256(clean(caption).encode()).hexdigest()[:DIGITS].encode()


def _whole(folder: Path, hashed: bool = False) -> list[Path]:
    """Return the shards that a folder's manifest names. Errors: BadData if they differ from it."""
    try:
        listed = _listed(folder)["shards"]
        for name, facts in listed.items():
            if wrong := disk.complaint(folder, name, facts, hashed):
                raise BadData(f"{folder} is damaged: {wrong}; {_REMEDY}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadData(f"{folder}/manifest.json cannot be read ({error}): {_REMEDY}") from error
    return [folder / name for name in listed]


_REMEDY = "remove this folder and run `daybreak prepare --cache-text` again"


def _tree(folder: Path) -> str:
    """Return a hash of the names and contents of all files of a folder but hidden ones."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part[0] == "." for part in path.relative_to(folder).parts)
    )
    with ThreadPoolExecutor() as pool:
        digests = pool.map(disk.sha256, paths)
    whole = hashlib.sha256()
    for path, digest in zip(paths, digests, strict=True):
        whole.update(f"{path.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return whole.hexdigest()


def _commit(name: str) -> str:
    """Return the commit of a hub id that `transformers` loads. Errors: BadRecipe if none."""
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoConfig

    with hub.loading("text.encoder", name, "give text.encoder a local folder that holds it"):
        AutoConfig.from_pretrained(name)  # downloads it, so that the commit is in the cache
        found = try_to_load_from_cache(name, "config.json")
    assert isinstance(found, str)  # .../snapshots/COMMIT/config.json
    return Path(found).parent.name
