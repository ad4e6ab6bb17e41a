"""How fast is a training step? Ours against diffusers' own class, or routed against dense.

    python benchmarks/step.py [--case padded whole small routes] [--threads 1 2] [--json FILE]
    python benchmarks/step.py --recipe prx_24h [--stage 1] [--batch 32] [--json FILE]

padded  256 image tokens and prompts of 40 words. diffusers' pipeline pads them to 256 and masks the
        rest, our tokenizer pads to the longest of the batch (27 M weights; patch 16, width 384,
        depth 8, bottleneck 64).
whole   The same without padding for either.
small   The network of a few minutes on a processor: 64 image tokens, 16 words (9 M weights).
routes  256 image tokens through every block, or half of them through all blocks but the first and
        the last (27 M weights).

With a recipe the denoiser's whole step is timed: ours with the recipe's route and optimisers,
against diffusers' class with every token and plain AdamW, words as many as the recipe allows.

Each arm runs forward and backward on the same pictures, with the same weights, and with
`--optimiser` takes a step of fused AdamW, too. Arms take turns; the table gives medians, and for
each pair the median ratio of their turns and that of what the forward pass keeps for the backward
pass, on a GPU also of the memory at its fullest. Below 1 is better. Outputs are compared before
anything is timed.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from daybreak import host

host.settle()

import torch
import torch._functorch.config as functorch
from diffusers import PRXTransformer2DModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import AdamW, Optimizer
from turns import in_turn, write

from daybreak import config, doctor
from daybreak.model import dit, flow, tread
from daybreak.model.text import Text
from daybreak.optim import groups
from daybreak.train import accelerator, flops, parallel
from daybreak.train.dice import Dice

TEXT_WIDTH = 256
LARGER = dit.Config(patch=4, bottleneck=0, width=384, depth=8, heads=6)
PRECISIONS = {"float32": torch.float32}
if doctor.fast_bfloat16():  # where it is emulated nobody computes in it, and a step takes minutes
    PRECISIONS["bfloat16"] = torch.bfloat16
USUAL, DTYPE = list(PRECISIONS.items())[-1]  # what a run takes here


class Case(NamedTuple):
    """Size of the network, and what it is fed: of the words some are padding to one of the two."""

    size: dit.Config
    side: int
    batch: int
    words: int
    padded: int
    routes: bool = False
    recipe: config.Recipe | None = None
    text_width: int = TEXT_WIDTH


CASES = {
    "padded": Case(
        dit.Config(patch=16, bottleneck=64, width=384, depth=8, heads=6), 256, 4, 40, 256
    ),
    "whole": Case(dit.Config(patch=16, bottleneck=64, width=384, depth=8, heads=6), 256, 4, 40, 40),
    "small": Case(dit.Config(patch=4, bottleneck=0, width=256, depth=6, heads=4), 32, 64, 16, 16),
    "routes": Case(LARGER, 64, 8, 16, 16, routes=True),
}


class Given(NamedTuple):
    """What every arm is given: pictures, and their words with and without padding."""

    noisy: flow.Noisy
    text: Text
    padded: Text


class Arm(NamedTuple):
    """A network, how it is asked for its guess, and what moves it, at a rate of nothing."""

    model: nn.Module
    guess: Callable[[], Tensor]
    optimisers: tuple[Optimizer, ...] = ()


class Pair(NamedTuple):
    """Two arms that are compared: the first is divided by the second."""

    ours: str
    theirs: str


def of_recipe(name: str, number: int, batch: int | None) -> Case:
    """The denoiser of a recipe at one of its stages."""
    recipe = config.load(name)
    stage, words = recipe.stage[number], recipe.text.max_tokens
    batch = batch or recipe.micro or stage.batch
    width = flops.text_encoder(recipe).width
    return Case(recipe.dit, stage.resolution, batch, words, words, recipe=recipe, text_width=width)


def feed(case: Case) -> Given:
    """Draw pictures, noise and words."""
    device = accelerator.choose()
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(case.batch, 3, case.side, case.side, generator=generator) * 2 - 1
    t = torch.rand(case.batch, generator=generator)
    eps = torch.randn(image.shape, generator=generator)
    tokens = torch.randn(case.batch, case.padded, case.text_width, generator=generator).to(device)
    mask = (torch.arange(case.padded, device=device) < case.words).expand(case.batch, -1)
    return Given(
        flow.corrupt(*(value.to(device) for value in (image, t, eps))),
        Text(tokens[:, : case.words], mask[:, : case.words]),
        Text(tokens, mask),
    )


def network(case: Case) -> dit.DiT:
    """Build a network none of whose weights is zero."""
    torch.manual_seed(0)
    model = dit.DiT(case.size, case.text_width)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return model.to(accelerator.choose())


def ours(
    case: Case,
    given: Given,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    compiled: bool,
    route: tread.Config | None = None,
) -> Arm:
    """Our denoiser, eager or with compiled blocks; a route is drawn anew for each step."""
    model = dit.DiT(case.size, case.text_width, compute=dtype)
    model.load_state_dict(weights, assign=True)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False, options=parallel.KERNELS)
    steps, noisy = count(), given.noisy

    def guess() -> Tensor:
        way = None
        if route is not None:
            dice = Dice(0, next(steps), 0, len(noisy.x), noisy.x.device)
            way = tread.draw(route, noisy.x, case.size.patch, dice)
        return model(noisy.x_t, noisy.t, given.text, way).x

    if compiled:  # here and now, as train/parallel has it; diffusers' class as torch does it
        with functorch.patch(ban_recompute_materialized_backward=False):
            guess().sum().backward()
        model.zero_grad()
    return Arm(model, guess)


def theirs(
    case: Case, given: Given, weights: dict[str, Tensor], dtype: torch.dtype, compiled: bool
) -> Arm:
    """diffusers' class, in float32 or under bfloat16 autocast."""
    size = case.size
    model = PRXTransformer2DModel(
        in_channels=3,
        patch_size=size.patch,
        context_in_dim=case.text_width,
        hidden_size=size.width,
        mlp_ratio=size.mlp,
        num_heads=size.heads,
        depth=size.depth,
        axes_dim=[size.head_width // 2] * 2,
        bottleneck_size=size.bottleneck or None,
    )
    model.load_state_dict(weights, assign=True)
    if compiled:
        model.compile(dynamic=False)
    noisy, (tokens, mask) = given.noisy, given.padded

    def guess() -> Tensor:
        with torch.autocast(noisy.x.device.type, dtype, enabled=dtype != torch.float32):
            said: Tensor = model(noisy.x_t, noisy.t, tokens, attention_mask=mask).sample
        return said.float()

    return Arm(model, guess)


def classes(case: Case, given: Given, compiles: bool) -> tuple[dict[str, Arm], dict[str, Pair]]:
    """The same network, of two makers."""
    weights = network(case).state_dict()
    arms, pairs = {}, {}
    for compiled in (False, True) if compiles else (False,):
        for precision, dtype in PRECISIONS.items():
            name = f"{precision}, compiled" if compiled else precision
            pairs[name] = Pair(f"daybreak, {name}", f"diffusers, {name}")
            arms[pairs[name].theirs] = theirs(case, given, weights, dtype, compiled)
            arms[pairs[name].ours] = ours(case, given, weights, dtype, compiled)
    if compiles:
        pairs["as shipped"] = Pair(f"daybreak, {USUAL}, compiled", f"diffusers, {USUAL}")
    return arms, pairs


def routes(case: Case, given: Given, compiles: bool) -> tuple[dict[str, Arm], dict[str, Pair]]:
    """The same network, with all tokens or with half of them in most blocks."""
    weights = network(case).state_dict()
    half = tread.Config(start=1, stop=case.size.depth - 1, carried=0.5)
    kinds = {"float32": (torch.float32, False)}
    if compiles:
        kinds[f"{USUAL}, compiled"] = (DTYPE, True)
    arms, pairs = {}, {}
    for name, (dtype, compiled) in kinds.items():
        pairs[name] = Pair(f"routed, {name}", f"dense, {name}")
        arms[pairs[name].theirs] = ours(case, given, weights, dtype, compiled)
        arms[pairs[name].ours] = ours(case, given, weights, dtype, compiled, half)
    return arms, pairs


def trained(case: Case, given: Given, compiles: bool) -> tuple[dict[str, Arm], dict[str, Pair]]:
    """The step of a recipe, and the same pictures through the plain class with plain AdamW."""
    recipe, weights = case.recipe, network(case).state_dict()
    assert recipe is not None
    mine = ours(case, given, weights, DTYPE, compiles, recipe.tread)
    whole = nn.ModuleDict({"dit": mine.model})
    shared = groups.optimizers(whole, recipe.muon, recipe.adamw).values()
    arms = {"daybreak, this recipe": mine._replace(optimisers=tuple(one for one, _ in shared))}
    pairs = {}
    for compiled in (False, True) if compiles else (False,):
        name = f"diffusers, {USUAL}" + (", compiled" if compiled else "")
        arms[name] = with_adamw(theirs(case, given, weights, DTYPE, compiled))
        pairs[f"against {name}"] = Pair("daybreak, this recipe", name)
    return arms, pairs


def with_adamw(arm: Arm) -> Arm:
    """The same, moved by fused AdamW."""
    return arm._replace(optimisers=(AdamW(arm.model.parameters(), lr=0.0, fused=True),))


def step(arm: Arm, noisy: flow.Noisy) -> None:
    """Take the loss of training, its gradient, and the step, if something is there to take it."""
    v_hat, v = (flow.velocity(noisy.x_t, x, noisy.t) for x in (arm.guess(), noisy.x))
    (v_hat - v).square().mean().backward()
    for optimiser in arm.optimisers:
        optimiser.step()
    arm.model.zero_grad()


def fullest(arm: Arm, noisy: flow.Noisy) -> int:
    """The most bytes that a GPU holds during a step, those of all arms' weights included."""
    torch.cuda.reset_peak_memory_stats()
    step(arm, noisy)
    return torch.cuda.max_memory_allocated()


def saved(arm: Arm) -> int:
    """Count the bytes that a forward pass keeps for the backward pass, but for the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in arm.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        guess = arm.guess()  # held: what is freed would be counted twice
    del guess
    return sum(kept.values())


def measure(case: Case, rounds: int, compiles: bool, optimiser: bool) -> dict[str, Any]:
    """Time all arms of a case; returns seconds, bytes kept, and the ratios of its pairs."""
    given = feed(case)
    kind = trained if case.recipe else routes if case.routes else classes
    arms, pairs = kind(case, given, compiles)
    if optimiser and not case.recipe:
        arms = {name: with_adamw(arm) for name, arm in arms.items()}
    found: dict[str, Any] = {"batch": case.batch}
    if kind is classes:
        usual = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        with torch.no_grad():
            mine, other = (arms[name].guess() for name in pairs["float32"])
        found["outputs differ by"] = float((mine - other).abs().max())
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
        torch.set_float32_matmul_precision(usual)
    seconds = in_turn({name: partial(step, arm, given.noisy) for name, arm in arms.items()}, rounds)
    kept = {name: saved(arm) for name, arm in arms.items()}
    ratios = {}
    for name, (one, other_one) in pairs.items():
        turns = zip(seconds[one], seconds[other_one], strict=True)
        ratios[name] = {
            "time": statistics.median(a / b for a, b in turns),
            "saved": kept[one] / kept[other_one],
        }
    if torch.cuda.is_available():
        found["peak"] = {name: fullest(arm, given.noisy) for name, arm in arms.items()}
        for name, (one, other_one) in pairs.items():
            ratios[name]["peak"] = found["peak"][one] / found["peak"][other_one]
    return found | {"seconds": seconds, "saved": kept, "ratios": ratios}


def main() -> None:
    """Time every case with every number of threads, print the tables, write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, nargs="+", default=["padded", "whole"])
    parser.add_argument("--recipe", help="its whole step, instead of the cases")
    parser.add_argument("--stage", type=int, default=0, help="of the recipe, from 0")
    parser.add_argument("--optimiser", action="store_true", help="take a step of AdamW, too")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--eager", action="store_true", help="leave out what has to be compiled")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    wanted = {name: CASES[name] for name in arguments.case}
    if arguments.recipe:
        case = of_recipe(arguments.recipe, arguments.stage, arguments.batch)
        wanted = {f"{arguments.recipe}, {case.side} px": case}
    cases: dict[str, Any] = {}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for name, case in wanted.items():
            case = case._replace(batch=arguments.batch or case.batch)
            found = measure(case, arguments.rounds, not arguments.eager, arguments.optimiser)
            cases[f"{name}, {threads} threads"] = found
            print(f"{name}, {threads} threads, batch {case.batch}")
            for arm, times in found["seconds"].items():
                print(
                    f"  {arm:32} {case.batch / statistics.median(times):8.1f} img/s"
                    f" {found['saved'][arm] / 2**20:9.1f} MiB kept"
                )
            for pair, ratio in found["ratios"].items():
                peak = f"   peak x {ratio['peak']:.2f}" if "peak" in ratio else ""
                print(f"  {pair:32} time x {ratio['time']:.2f}   kept x {ratio['saved']:.2f}{peak}")
    write(arguments.json, {"cases": cases})


if __name__ == "__main__":
    main()
