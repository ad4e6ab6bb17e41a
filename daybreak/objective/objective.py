"""What training minimises.

    x_t = (1 - t) x + t eps,    x_hat = DiT(x_t, t, text)
    L   = mean |v(x_hat) - v(x)|^2 + sum of weight * term,    v(y) = (x_t - y) / max(t, 0.05)

The whole loss of a run is in `Objective.__call__`; a term is a few lines there, a file beside this
one and a section of the recipe. Terms get the prediction and the true picture, never the network.
The network is called once, with a route if there is one, and also returns the tokens for REPA.

Letters  b pictures of the micro-batch, c channels, k pictures that a term is computed for.
Source   arXiv 2511.13720, eq. 6 (x-prediction, v-loss).
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from daybreak.model import flow, tread, vision
from daybreak.model.text import Text, sent
from daybreak.model.text_to_image import TextToImage
from daybreak.objective import contrastive, dino, lpips, repa
from daybreak.train.dice import Dice, key


class View(NamedTuple):
    """A teacher, and the grid of patches into which it divides a picture."""

    teacher: str
    rows: int
    columns: int


class Objective:
    """The loss of a run, and its parts by name.

    `learned` holds the trained weights of the terms, REPA's projectors, which are optimised and
    checkpointed like the model. Teachers and perceptual networks are not in it.

    Errors  BadRecipe if a teacher or a file of weights cannot be loaded.
    """

    def __init__(
        self,
        flow_config: flow.Config,
        tread_config: tread.Config | None = None,
        repa_config: repa.Config | None = None,
        lpips_config: lpips.Config | None = None,
        dino_config: dino.Config | None = None,
        contrastive_config: contrastive.Config | None = None,
        *,
        width: int = 0,
        seed: int = 0,
        compute: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.flow, self.tread = flow_config, tread_config
        self.lpips, self.dino = lpips_config, dino_config
        sections = {
            "repa": repa_config,
            "lpips": lpips_config,
            "dino": dino_config,
            "contrastive": contrastive_config,
        }
        self.weights = {name: section.weight for name, section in sections.items() if section}
        self.teachers: dict[str, vision.Teacher] = {}  # by name: two terms can share one
        for name, section in (("repa", repa_config), ("dino", dino_config)):
            if section and section.teacher not in {repa.SELF, *self.teachers}:
                self.teachers[section.teacher] = vision.load(
                    section.teacher, f"{name}.teacher", compute, device
                )
        self.vgg = lpips.load(lpips_config, compute, device) if lpips_config else None
        self.repa: repa.Repa | None = None
        if repa_config:
            teacher = self.teachers.get(repa_config.teacher)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(key(seed, "repa"))  # independent of the denoiser's weights
                self.repa = repa.Repa(repa_config, width, teacher.width if teacher else width)
        self.learned = nn.ModuleDict({"repa": self.repa} if self.repa else {}).to(device)

    def compile(self) -> None:
        """Compile teachers and LPIPS. Results stay the same up to rounding."""
        if self.vgg:
            self.vgg = lpips.compiled(self.vgg)
        for teacher in self.teachers.values():
            teacher.compile()

    def __call__(
        self,
        model: TextToImage,
        average: TextToImage,
        image: Float[Tensor, "b c h w"],
        captions: Sequence[str],
        dice: Dice,
        without: Collection[str] = (),
        shift: float | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return the loss to minimise and its detached, unweighted parts.

        `dice` has one random stream per picture. One of the parts, `words`, is only for the log:
        the padded length of the captions in tokens.

        `without` names the sections that are off in this step; `shift` overrides that of [flow].
        Changing the order of the draws (time, noise, route, each term's own) would change every
        run.
        """
        active = [name for name in self.weights if name not in without]
        patch = model.dit.config.patch
        grid = image.shape[-2] // patch, image.shape[-1] // patch
        t = flow.draw_time(self.flow, dice, shift)
        eps = flow.draw_noise(self.flow, image, dice)
        noisy = flow.corrupt(image, t, eps)
        route = None
        if self.tread and "tread" not in without:
            route = tread.draw(self.tread, image, patch, dice)
        words = model.text(captions)
        taps = self.repa.config.blocks if self.repa and "repa" in active else ()

        guess = model.dit(noisy.x_t, t, words, route, taps)

        x_hat, share = guess.x, 1.0
        if route and self.tread and self.tread.kind == "deferred":  # skipped: not predicted
            x_hat = torch.where(tread.walked(route, image, patch), x_hat, image)
            share = route.kept.shape[1] / (grid[0] * grid[1])
        v_hat, v = flow.velocity(noisy.x_t, x_hat, t), flow.velocity(noisy.x_t, image, t)
        parts = {"flow": (v_hat - v).square().mean() / share}
        seen: dict[View, Tensor] = {}  # features of the true pictures, shared by all terms
        if self.repa and "repa" in active:
            view = View(self.repa.config.teacher, *grid)
            if self.repa.config.network is None:
                seen[view] = self._elder(average, noisy, captions, words, dice)
            else:
                seen[view] = self._look(view, image)
            parts["repa"] = self.repa(guess.tapped, seen[view], view.rows)
        if self.lpips and self.vgg and "lpips" in active:
            some = dice.share(self.lpips.fraction)
            miss = lpips.distance(self.vgg, x_hat[some], image[some], self.lpips.resize)
            parts["lpips"] = mean(miss, t[some], self.lpips, len(image))
        if self.dino and "dino" in active:
            some = dice.share(self.dino.fraction)
            view = View(self.dino.teacher, *dino.grid(self.dino, *grid))
            truth = seen[view][some] if view in seen else self._look(view, image[some])
            miss = dino.distance(self._see(view, x_hat[some]), truth, self.dino.pooled)
            parts["dino"] = mean(miss, t[some], self.dino, len(image))
        if "contrastive" in active:
            captioned = sent(torch.tensor([caption != "" for caption in captions]), image.device)
            parts["contrastive"] = contrastive.term(v_hat, v, captioned) / share

        loss = parts["flow"] + sum(self.weights[name] * parts[name] for name in active)
        parts["words"] = loss.new_full((), words.tokens.shape[1])
        return loss, {name: part.detach() for name, part in parts.items()}

    def _see(self, view: View, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return self.teachers[view.teacher](image, view.rows, view.columns)

    @torch.no_grad()
    def _look(self, view: View, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """As `_see`, without gradients."""
        return self._see(view, image)

    @torch.no_grad()
    def _elder(
        self,
        average: TextToImage,
        noisy: flow.Noisy,
        captions: Sequence[str],
        words: Text,
        dice: Dice,
    ) -> Float[Tensor, "b n h"]:
        """Return the averaged model's tokens for the same pictures and noise at a lower t."""
        assert self.repa is not None
        assert self.repa.config.target is not None
        ahead = self.repa.config.earlier * dice.uniform(1)[:, 0]
        earlier = flow.corrupt(noisy.x, (noisy.t - ahead).clamp(min=flow.T_FIRST), noisy.eps)
        if average.text.trained:  # else both models have the same token vectors
            words = average.text(captions)
        taps = (self.repa.config.target,)
        return average.dit(earlier.x_t, earlier.t, words, None, taps).tapped[0].tokens


def mean(
    miss: Float[Tensor, " k"], t: Float[Tensor, " k"], term: lpips.Config | dino.Config, count: int
) -> Float[Tensor, ""]:
    """Average over `count` pictures, estimated from k; those with t >= `below` count as zero.

    PRX and PixelGen divide by the number of pictures below the gate instead. Here the weight of a
    picture does not depend on the others in its micro-batch.
    """
    return (miss * (t < term.below)).sum() / (term.fraction * count)
