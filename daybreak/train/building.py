"""Everything that a run learns, built from its recipe and shared by its ranks.

Initial weights are random, depend only on the seed, and are equal on all ranks before sharding.
Frozen networks (a named text encoder, teachers) stay whole on every rank.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from daybreak import config, doctor
from daybreak.data import batches
from daybreak.failure import BadRecipe, Failure, told
from daybreak.model import text, text_to_image
from daybreak.model.text_to_image import TextToImage
from daybreak.objective.objective import Objective
from daybreak.optim import groups
from daybreak.optim.ema import Ema
from daybreak.train import accelerator, parallel
from daybreak.train.checkpoint import Checkpoint, State
from daybreak.train.parallel import World

VARIANTS = 256  # most compiled variants of a block
# Error messages of CPU kernels when memory runs out: torch's own, and oneDNN's.
FULL = ("allocate", "could not create a primitive")
WRITING = 5.0  # seconds that a linker may need to fill the file it has created


def sources(recipe: config.Recipe) -> tuple[batches.Pictures, ...]:
    """Open the pictures of each stage. Errors: BadData; BadRecipe, also if a stage cannot use them.

    Pictures that several stages share are opened once.
    """
    kinds = dict.fromkeys(recipe.data_of(stage) for stage in recipe.stage)
    opened = {
        data: batches.pictures(data, recipe.scenes, recipe.seed, recipe.dit.patch) for data in kinds
    }
    found = tuple(opened[recipe.data_of(stage)] for stage in recipe.stage)
    for stage, source in zip(recipe.stage, found, strict=True):
        source.plan(stage.resolution, stage.batch, first=0)  # refuse now, not when the stage begins
    return found


def loss(recipe: config.Recipe, dtype: torch.dtype) -> Objective:
    """Build the loss of a recipe, and load its teachers. Errors: BadRecipe if one is missing."""
    return Objective(
        recipe.flow,
        recipe.tread,
        recipe.repa,
        recipe.lpips,
        recipe.dino,
        recipe.contrastive,
        width=recipe.dit.width,
        seed=recipe.seed,
        compute=dtype,
        device=accelerator.choose(),
    )


def build(
    recipe: config.Recipe,
    sources: Sequence[batches.Pictures],
    here: World,
    found: Checkpoint | None,
    dtype: torch.dtype,
    known: text.Known | None,
    tell: Callable[[str], None],
) -> tuple[Objective, State, Ema[TextToImage]]:
    """Build the loss, what learns, and its average; the tokenizer is that of `found`, if given.

    Errors  BadRecipe if an encoder or a teacher is not available.
    """
    objective = loss(recipe, dtype)
    tokenizer = None
    if recipe.text.encoder is None:
        tokenizer = (
            text.load_tokenizer(found.folder / "tokenizer")
            if found
            else text.learn_tokenizer(_captions(sources), recipe.text)
        )
    of = (recipe.dit, recipe.text, tokenizer, recipe.seed, dtype, recipe.tread, known)
    model = text_to_image.build(*of).to(here.device)
    shared = None if model.text.trained else model.text
    twin = text_to_image.build(*of, shared).to(here.device)
    follows = parallel.Config(reshard_after_forward=True)
    compiled = compiles(recipe, here.device, tell)
    if compiled and here.device.type == "cuda":
        # On a CPU products take nearly all the time, and compiling costs more than it saves.
        objective.compile()
    parallel.prepare(model.dit, model.dit.blocks, here, recipe.parallel, dtype, compiled)
    parallel.prepare(twin.dit, twin.dit.blocks, here, follows, dtype)
    if model.text.trained:
        parallel.prepare(model.text, (), here, recipe.parallel)
        parallel.prepare(twin.text, (), here, follows)
    for term in objective.learned.children():
        parallel.prepare(term, (), here, recipe.parallel)
    optimizers = groups.optimizers(model, recipe.muon, recipe.adamw, objective.learned, dtype)
    ema = Ema(twin, recipe.ema)
    return objective, State(model, ema.model, optimizers, objective.learned), ema


def _captions(sources: Sequence[batches.Pictures]) -> Iterator[str]:
    """The captions of the pictures of all stages; those of a shared source once."""
    for number, source in enumerate(sources):
        if source not in sources[:number]:
            yield from source.captions()


@contextmanager
def room(recipe: config.Recipe) -> Iterator[None]:
    """If memory runs out, say which setting to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in FULL):
            raise
        sides = ", ".join(str(stage.resolution) for stage in recipe.stage)
        shares = ", ".join(str(stage.batch) for stage in recipe.stage)
        raise Failure(
            f"out of memory ({told(error)}) with "
            f"micro = {recipe.micro or 'off'}, stage.batch = {shares} at {sides} px: set micro to "
            "fewer pictures, set parallel.recompute = true, or start more processes"
        ) from error


def compiles(recipe: config.Recipe, device: torch.device, tell: Callable[[str], None]) -> bool:
    """Whether blocks are compiled. Without a compiler a CPU runs slower, and `tell` says so.

    Errors  BadRecipe for a GPU without a compiler, because its hours are paid for.
    """
    if not recipe.compile:
        return False
    if doctor.compiler(device.type) is None:
        if device.type == "cuda":
            raise BadRecipe(
                "compile = true needs a C compiler and Python's headers on a machine with a GPU: "
                "apt install gcc python3-dev, or train far more slowly with --set compile=false"
            )
        tell("blocks are not compiled, and training is slower: daybreak doctor says why")
        return False
    _sweep()
    # Each number of image tokens, and of words, is a variant; beyond the limit blocks run
    # uncompiled. The other limit is for all blocks together, which share their code.
    torch._dynamo.config.recompile_limit = VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = VARIANTS * recipe.dit.depth
    return True


def _sweep() -> None:
    """Remove libraries that a killed compiler has left empty: every later run would fail on them.

    One that may be being written now is left alone.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for library in Path(cache_dir()).glob("*/*.so"):
        with suppress(OSError):
            found = library.stat()
            if not found.st_size and time.time() - found.st_mtime > WRITING:
                library.unlink()
