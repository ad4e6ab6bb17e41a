"""Captions encoded once: the words of a frozen encoder, kept on disk.

    DATASET/text/KEY/manifest.json      what decides the numbers; bytes and sha256 of each shard
    DATASET/text/KEY/00000.safetensors
        tokens (n, e)     the words of all its captions, one after the other, without padding
        ends (c,)         where each caption ends
        digests (c, 24)   which caption it is, in hexadecimal

No entry can be out of date, for both names follow from contents. KEY is a hash of the encoder (the
commit of a hub id, or the sha256 of every file of a local folder), its precision and the settings
it is used with. A digest is a hash of the caption as it is tokenised. Another encoder has another
folder; another caption is not found, and what is not found is encoded. A kill costs the shard that
was being written: the manifest names those that are whole.

Several processes share a dataset out by digests, each into a folder of its own: KEY.1-of-8 and so
on. A reader takes all folders of a KEY.

This stands beside the encoder and not among the data because it returns what the encoder returns.
Of pictures it knows nothing: a dataset gives it a folder and captions.

Letters  b captions of a batch, c captions of a shard, n and l tokens, e width of the encoder.
Units    the precision of the encoder. Reading takes 48 bytes of memory for each caption that is
         held; the embeddings are mapped.
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
BATCH, AHEAD = 32, 4096  # captions encoded together, out of so many sorted by length
READERS = 16  # captions of a batch that are read from the disk at once
SOON = 6  # batches whose words are held before they are asked for
RECENT = 2**14  # captions whose digests are known: those of these batches
DIGITS = 24  # 96 bits: among a billion captions two are alike with a chance of 1e-11
# Settings that a frozen encoder does not have, and one that changes nothing but padding.
OURS = {"encoder", "lengths", "width", "depth", "heads", "vocabulary"}


def settings(config: Config, compute: torch.dtype) -> dict[str, Any]:
    """Everything but the caption that decides an embedding.

    A local folder is known by its files, not by its path. Errors: BadRecipe if there is no encoder.
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
    """The folder of the embeddings that are made with these settings."""
    digest = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()
    return dataset / "text" / digest[:16]


class Part(NamedTuple):
    """Which share of the captions, counted from 1, and of how many shares."""

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
        """Whether a caption belongs to it: the same one on every machine."""
        return int(_digest(caption), 16) % self.of == self.number - 1


ALL = Part(1, 1)


def places(dataset: Path, made_with: dict[str, Any]) -> dict[Part, Path]:
    """The folders of a dataset that hold such embeddings, by the share they are of."""
    whole, found = place(dataset, made_with), dict[Part, Path]()
    for manifest in sorted(whole.parent.glob(f"{whole.name}*/manifest.json")):
        number, _, of = manifest.parent.name[len(whole.name) + 1 :].partition("-of-")
        found[Part(int(number), int(of)) if of else ALL] = manifest.parent
    return found


class Reader:
    """The embeddings of one dataset or several, all made with the same settings.

    `partial` are the datasets of which not every caption is known to be held.
    """

    def __init__(
        self, folders: Sequence[Path], config: Config, partial: Sequence[Path] = ()
    ) -> None:
        """Map the shards. Errors: BadData if one is not as its manifest says."""
        self.partial = partial
        self.step = config.length_step
        self.pinned = torch.cuda.is_available()  # so that nobody waits until they are on a device
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
        """Read from the disk what a batch will soon ask for; for a thread that is ahead of it."""
        wanted = [_digest(caption) for caption in captions]
        words = self._words(wanted)
        if words is not None:
            self.soon.append((wanted, self._padded(words)))

    def tokens(self, captions: Sequence[str]) -> Text | None:
        """What the encoder would give for these captions; None if one of them is not held.

        The words are the encoder's, and so is the length; padding is zero.
        """
        wanted = [_digest(caption) for caption in captions]
        for held, text in tuple(self.soon):
            if held == wanted:
                return text
            for first in range(0, len(held), len(wanted)):  # a pass of a batch that takes several
                if held[first : first + len(wanted)] == wanted:
                    return self._cut(text, slice(first, first + len(wanted)))
        words = self._words(wanted)
        return None if words is None else self._padded(words)

    def _cut(self, text: Text, rows: slice) -> Text:
        """Some captions of a batch, no longer than the longest of them asks for."""
        mask = text.mask[rows]
        length = -(-int(mask.sum(1).max()) // self.step) * self.step
        return Text(text.tokens[rows, :length], mask[:, :length])

    def _padded(self, words: Sequence[Tensor]) -> Text:
        """Captions as one tensor, in memory that a GPU copies from without being waited for."""
        lengths = torch.tensor([len(one) for one in words])
        length = -(-int(lengths.max()) // self.step) * self.step
        shape = len(words), length, words[0].shape[1]
        tokens = torch.empty(shape, dtype=words[0].dtype, pin_memory=self.pinned)

        def fill(row: Tensor, one: Tensor) -> None:
            row[: len(one)] = one
            row[len(one) :] = 0

        # Each reads from the disk what is not in memory yet, and all of them at once.
        deque(self.readers.map(fill, tokens, words), maxlen=0)
        mask = torch.arange(length) < lengths[:, None]
        return Text(tokens, mask.pin_memory() if self.pinned else mask)

    def _words(self, wanted: Sequence[bytes]) -> list[Tensor] | None:
        """Where the words of these captions are mapped; nothing is read yet."""
        digests = np.array(wanted)
        found = np.searchsorted(self.digests, digests)
        if not len(self.digests) or (self.digests.take(found, mode="clip") != digests).any():
            return None
        return [self.shards[shard][start:end] for shard, start, end in self.entries[found]]


def reader(datasets: Sequence[Path], config: Config, compute: torch.dtype) -> Reader | None:
    """The embeddings that datasets hold for an encoder; None if there are none at all."""
    there = present(datasets, config, compute)
    folders = [folder for parts in there.values() for folder in parts.values()]
    return Reader(folders, config, _lacking(there)) if folders else None


def present(
    datasets: Sequence[Path], config: Config, compute: torch.dtype
) -> dict[Path, dict[Part, Path]]:
    """The folders of embeddings for an encoder, by dataset and share.

    Errors  BadRecipe as `settings`.
    """
    if config.encoder is None or not any((dataset / "text").is_dir() for dataset in datasets):
        return {dataset: {} for dataset in datasets}
    made_with = settings(config, compute)  # a local encoder is hashed for it, gigabytes of it
    return {dataset: places(dataset, made_with) for dataset in datasets}


def partial(datasets: Sequence[Path], config: Config, compute: torch.dtype) -> list[Path]:
    """Those of the datasets of which not every caption is known to be held."""
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
    """Encode those captions that a dataset does not hold embeddings of; returns their folder.

    The empty caption, which stands for none, is always among them. `progress` hears how many
    captions are done. With a `part` others can encode the rest meanwhile.

    Errors  BadStorage if the disk refuses; the shards that were finished stay. BadRecipe while
            another process writes there.
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
    """Add shards with the captions that are new, each listed as soon as it is whole."""
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
            staged.chmod(path.stat().st_mode)  # safetensors lets nobody else read it
            shards[name] = disk.sealed(staged)
        disk.write_json(path, made_with | {"shards": shards})
    if (now := made_with | {"shards": shards, "whole": True}) != before:
        disk.write_json(path, now)


def _listed(folder: Path) -> dict[str, Any]:
    """What the manifest of a folder says; nothing where there is none. Errors: BadData."""
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
    """The captions that are not held, each once."""
    for done, caption in enumerate(chain([""], captions)):
        digest = _digest(caption)
        if digest not in held:
            held.add(digest)
            yield caption
        if progress and done:
            progress(done)


def _shards(encoder: TextEncoder, captions: Iterator[str]) -> Iterator[dict[str, Tensor]]:
    """Encode captions, and cut the result into pieces of about SHARD_BYTES."""
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
    """The words of each caption. Captions of like length are encoded together: little padding."""
    while ahead := sorted(islice(captions, AHEAD), key=len):
        for first in range(0, len(ahead), BATCH):
            part = ahead[first : first + BATCH]
            tokens, mask = (tensor.cpu() for tensor in encoder(part))
            for caption, row, there in zip(part, tokens, mask, strict=True):
                yield _digest(caption), row[there]


@lru_cache(RECENT)
def _digest(caption: str) -> bytes:
    """A hash of the caption as it is tokenised: with other cleaning it is another caption."""
    return hashlib.sha256(clean(caption).encode()).hexdigest()[:DIGITS].encode()


def _whole(folder: Path, hashed: bool = False) -> list[Path]:
    """The shards that the manifest of a folder names. Errors: BadData if they are others."""
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
    """A hash of every file of a folder, and of its name there; hidden ones do not count."""
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
    """The commit of a hub id that `transformers` loads. Errors: BadRecipe if there is none."""
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoConfig

    with hub.loading("text.encoder", name, "give text.encoder a local folder that holds it"):
        AutoConfig.from_pretrained(name)  # so that the commit is known here
        found = try_to_load_from_cache(name, "config.json")
    assert isinstance(found, str)  # .../snapshots/COMMIT/config.json
    return Path(found).parent.name
