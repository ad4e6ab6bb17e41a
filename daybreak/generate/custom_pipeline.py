"""daybreak's sampler as a diffusers pipeline: this file is exported together with the weights.

    DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline="pipeline", trust_remote_code=True)

`PRXPixelPipeline` reads the same folder. This class adds the time grid of training, stochastic
steps with the call's own generator, guidance in an interval of t, self-guidance (the weak guess
comes from the same network with part of the tokens skipping most blocks), adaptive projected
guidance, and several prompts in one call. The model's own settings are in
scheduler/scheduler_config.json under "_sampling"; arguments that are not given are taken from them.

    t_i = s u / (1 + (s - 1) u),  u = 1 - i / n
    v   = (x - x_hat) / max(t_i, 0.05)
    x   <- x - (t_i - t_{i+1}) v,  or stochastic: (1 - t_{i+1}) (x - t_i v) + t_{i+1} eps

It needs only torch and diffusers: the parts of daybreak that sampling needs are repeated here.

Letters  b pictures, n image tokens, k tokens that the route keeps.
Source   daybreak/generate/sampler.py and daybreak/generate/guidance.py, which name the papers.
"""

from typing import Any, NamedTuple

import torch
from diffusers import PRXPixelPipeline
from diffusers.models.transformers.transformer_prx import get_image_ids, img2seq, seq2img
from diffusers.pipelines.prx.pipeline_output import PRXPipelineOutput
from torch import Tensor


class Sampling(NamedTuple):
    """Sampling settings. `route`: a share `carried` of tokens skips blocks start, ..., stop - 1."""

    steps: int
    stochastic: bool
    shift: float
    guide: str
    guidance: float
    interval: tuple[float, float]
    apg: dict[str, Any] | None = None
    route: dict[str, float] | None = None


class GuidedPixelPipeline(PRXPixelPipeline):  # type: ignore[misc]
    """`PRXPixelPipeline` with the time grid, guidance and defaults of the model's recipe."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        stochastic: bool | None = None,
        guidance_scale: float | None = None,
        guide: str | None = None,
        interval: tuple[float, float] | None = None,
        apg: dict[str, Any] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw one picture per prompt.

        `guide` is "classifier-free" (against `negative_prompt`) or "self". `apg` holds eta,
        momentum and norm; missing ones are the recipe's, or 0, -0.5 and none. The generator draws
        first the noise, then the route, then the noise of `stochastic` steps.

        Errors  ValueError for sides that are not multiples of the patch, or for "self" with a model
                that was trained without a route.
        """
        given: dict[str, Any] = {
            "steps": num_inference_steps,
            "stochastic": stochastic,
            "guidance": guidance_scale,
            "guide": guide,
            "interval": interval,
        }
        given = {name: value for name, value in given.items() if value is not None}
        trained = self.scheduler.config["_sampling"]
        if apg is not None:
            usual = trained.get("apg") or {"eta": 0.0, "momentum": -0.5, "norm": None}
            given["apg"] = {**usual, **apg}
        how = Sampling(**{**trained, **given})
        if how.guide not in ("classifier-free", "self"):
            raise ValueError(f'guide = {how.guide!r} is neither "classifier-free" nor "self"')
        if how.guide == "self" and how.route is None:
            raise ValueError("this model was trained without routes, which self-guidance needs")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        height = height or self.config.default_sample_size
        width = width or self.config.default_sample_size
        self.check_inputs(prompts, height, width, how.guidance)

        device, transformer = self._execution_device, self.transformer
        words, mask, weak_words, weak_mask = self.encode_prompt(
            prompts, device, how.guide == "classifier-free" and how.guidance > 1, negative_prompt
        )
        x = self.prepare_latents(
            len(prompts), 3, height, width, torch.float32, device, generator, latents
        )
        kept = None
        if how.guide == "self" and how.route is not None:
            tokens = height * width // transformer.config.patch_size**2
            kept = draw(how.route, len(prompts), tokens, generator).to(device)

        grid = times(how.steps, how.shift)
        difference = None
        for now, then in zip(self.progress_bar(grid[:-1]), grid[1:], strict=True):
            if how.guidance <= 1 or not how.interval[0] <= now <= how.interval[1]:
                guess = denoise(transformer, x, now, words, mask)
            else:
                if kept is None:  # with and without the prompt in one pass
                    twice = torch.cat((words, weak_words)), torch.cat((mask, weak_mask))
                    guess, weak = denoise(transformer, torch.cat((x, x)), now, *twice).chunk(2)
                else:
                    guess = denoise(transformer, x, now, words, mask)
                    weak = denoise(transformer, x, now, words, mask, how.route, kept)
                if how.apg is None:
                    guess = weak + how.guidance * (guess - weak)
                else:
                    memory = 0 if difference is None else how.apg["momentum"] * difference
                    difference = guess - weak + memory
                    guess = guess + (how.guidance - 1) * projected(difference, guess, how.apg)
            v = (x - guess) / max(now, 0.05)
            if how.stochastic and then > 0:
                eps = self.prepare_latents(len(x), *x.shape[1:], x.dtype, device, generator)
                x = (1 - then) * (x - now * v) + then * eps
            else:
                x = x - (now - then) * v

        images = x
        if output_type not in ("pt", "latent"):
            images = self.image_processor.postprocess(x, output_type=output_type)
        self.maybe_free_model_hooks()
        return PRXPipelineOutput(images=images) if return_dict else (images,)


def times(steps: int, shift: float) -> list[float]:
    """Return the time grid 1 = t_0 > ... > t_n = 0."""
    even = [(steps - i) / steps for i in range(steps + 1)]
    return [shift * u / (shift * u + (1 - u)) for u in even]


def draw(
    route: dict[str, float],
    pictures: int,
    tokens: int,
    generator: torch.Generator | list[torch.Generator] | None,
) -> Tensor:
    """Choose the tokens of each picture that the route keeps: (b, k), in raster order."""
    if isinstance(generator, list):
        rows = [draw(route, 1, tokens, one) for one in generator]
        return torch.cat([row.cpu() for row in rows])
    device = "cpu" if generator is None else generator.device
    keys = torch.rand(pictures, tokens, generator=generator, device=device)
    k = max(1, tokens - round(tokens * route["carried"]))
    return keys.argsort(dim=1)[:, :k].sort(dim=1).values


def denoise(
    transformer: Any,
    x_t: Tensor,
    t: float,
    words: Tensor,
    mask: Tensor,
    route: dict[str, float] | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Return x_hat, float32; with `kept`, only those tokens pass the blocks of the route."""
    x, time = x_t.to(transformer.dtype), x_t.new_full((len(x_t),), t)
    if kept is None or route is None:
        return transformer(x, time, words, mask, return_dict=False)[0].float()
    patch = transformer.patch_size
    tokens = transformer.img_in(img2seq(x, patch))
    ids = get_image_ids(len(x), *x.shape[-2:], patch_size=patch, device=x.device)
    angles = transformer.pe_embedder(ids)  # (b, 1, n, pairs, 2, 2)
    vector = transformer._compute_timestep_embedding(time, dtype=tokens.dtype)
    if transformer.resolution_embedder is not None:
        sides = (x_t.new_full((len(x),), side) for side in x.shape[-2:])
        vector = vector + transformer.resolution_embedder(*sides, dtype=vector.dtype)
    text = transformer.txt_in(words)

    def walk(blocks: Any, tokens: Tensor, angles: Tensor) -> Tensor:
        for block in blocks:
            tokens = block(tokens, text, vector, angles, mask)
        return tokens

    start, stop = int(route["start"]), int(route["stop"])
    places = kept[..., None].expand(-1, -1, tokens.shape[-1])
    here = kept[:, None, :, None, None, None].expand(-1, -1, -1, *angles.shape[3:])
    tokens = walk(transformer.blocks[:start], tokens, angles)
    walked = walk(transformer.blocks[start:stop], tokens.gather(1, places), angles.gather(2, here))
    tokens = tokens.scatter(1, places, walked)
    tokens = walk(transformer.blocks[stop:], tokens, angles)
    guess: Tensor = seq2img(transformer.final_layer(tokens, vector), patch, tuple(x.shape))
    return guess.float()


def projected(difference: Tensor, guess: Tensor, apg: dict[str, Any]) -> Tensor:
    """The difference, shortened to an RMS of `norm`, without (1 - eta) of its part along x_hat."""
    d, along = difference.flatten(1), guess.flatten(1)
    if apg["norm"] is not None:
        d = d * (apg["norm"] / d.square().mean(1, keepdim=True).sqrt()).clamp(max=1)
    length = along.square().sum(1, keepdim=True).clamp(min=1e-12)
    share = (d * along).sum(1, keepdim=True) / length
    return (d - (1 - apg["eta"]) * share * along).view_as(difference)
