"""The loss is the equation in its docstring, and each part moves what it is meant to move."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from daybreak.model import dit, flow, text, tread
from daybreak.model.text_to_image import TextToImage, build
from daybreak.objective import contrastive, dino, lpips, repa
from daybreak.objective.objective import Objective, mean
from daybreak.train.dice import Dice

CONFIG = flow.Config(shift=2.0)
CAPTIONS = ("a red circle", "", "a blue square", "two green stars", "a cross", "a red cross")
DIT = dit.Config(patch=8, bottleneck=0, width=32, depth=4, heads=2)
TEXT = text.Config(width=32, depth=1, heads=2, vocabulary=400, max_tokens=16)
ROUTE = tread.Config(start=1, stop=3, carried=0.5)


class Setting(NamedTuple):
    """A model whose every weight matters, its elder, and a batch."""

    model: TextToImage
    average: TextToImage
    image: torch.Tensor

    def run(
        self, objective: Objective, first: int = 0, stop: int = 6, without: tuple[str, ...] = ()
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return objective(
            self.model,
            self.average,
            self.image[first:stop],
            CAPTIONS[first:stop],
            Dice(0, 1, first, stop - first),
            without,
        )


def awake(seed: int) -> TextToImage:
    """A model whose zeros have been replaced, so that gradients reach everything."""
    model = build(DIT, TEXT, text.learn_tokenizer(CAPTIONS * 10, TEXT), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=generator)
    return model


@pytest.fixture
def setting() -> Setting:
    image = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Setting(awake(0), awake(1).requires_grad_(False), image)


@pytest.fixture
def sections(toys: dict[str, Path]) -> dict[str, Any]:
    """Every ingredient at once, with tiny teachers; REPA and P-DINO share theirs."""
    return {
        "tread_config": ROUTE,
        "repa_config": repa.Config(teacher=str(toys["dinov2"]), blocks=(1, 3)),
        "lpips_config": lpips.Config(vgg=str(toys["vgg"]), heads=str(toys["heads"])),
        "dino_config": dino.Config(teacher=str(toys["dinov2"])),
        "contrastive_config": contrastive.Config(),
        "width": DIT.width,
    }


def only(sections: dict[str, Any], *names: str) -> Objective:
    wanted = {f"{name}_config" for name in names} | {"width"}
    return Objective(CONFIG, **{key: sections[key] for key in sections if key in wanted})


def gradients(loss: torch.Tensor, model: TextToImage) -> set[str]:
    """The names of all weights that a loss pulls at."""
    for parameter in model.parameters():
        parameter.grad = None
    loss.backward()
    named = model.named_parameters()
    return {name for name, p in named if p.grad is not None and p.grad.any()}


def test_it_is_the_squared_difference_of_velocities(setting: Setting) -> None:
    loss, parts = setting.run(Objective(CONFIG))
    dice = Dice(0, 1, 0, 6)
    t = flow.draw_time(CONFIG, dice)
    eps = dice.normal(3, 32, 32)
    level = t.view(-1, 1, 1, 1)
    noisy = (1 - level) * setting.image + level * eps
    guess = setting.model.dit(noisy, t, setting.model.text(CAPTIONS)).x
    expected = ((guess - setting.image) / level.clamp(min=0.05)).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert parts.keys() == {"flow", "words"}
    assert not parts["flow"].requires_grad


def test_the_loss_is_the_weighted_sum_of_its_parts(
    setting: Setting, sections: dict[str, Any]
) -> None:
    objective = Objective(CONFIG, **sections)
    loss, parts = setting.run(objective)
    assert parts.pop("words") == setting.model.text(CAPTIONS).tokens.shape[1]
    assert list(parts) == ["flow", "repa", "lpips", "dino", "contrastive"]
    weights = {"flow": 1.0, "repa": 0.5, "lpips": 0.1, "dino": 0.01, "contrastive": 0.05}
    torch.testing.assert_close(loss, sum(weights[name] * part for name, part in parts.items()))
    assert not any(part.requires_grad for part in parts.values())


def test_however_the_batch_is_cut_the_loss_is_the_same(
    setting: Setting, sections: dict[str, Any]
) -> None:
    sections["lpips_config"] = sections["lpips_config"].model_copy(update={"fraction": 0.5})
    sections["dino_config"] = sections["dino_config"].model_copy(
        update={"fraction": 1 / 3, "below": 0.8}
    )
    objective = Objective(CONFIG, **sections)
    whole, all_parts = setting.run(objective)
    first, some = setting.run(objective, 0, 2)
    second, rest = setting.run(objective, 2, 6)
    torch.testing.assert_close(whole, (2 * first + 4 * second) / 6)
    for name, part in all_parts.items():
        torch.testing.assert_close(part, (2 * some[name] + 4 * rest[name]) / 6, msg=name)


def test_in_half_precision_every_part_is_near(setting: Setting, sections: dict[str, Any]) -> None:
    _, exact = setting.run(Objective(CONFIG, **sections))
    half = build(DIT, TEXT, setting.model.text.tokenizer, 0, torch.bfloat16)
    half.load_state_dict(setting.model.state_dict())
    _, near = setting._replace(model=half).run(
        Objective(CONFIG, **sections, compute=torch.bfloat16)
    )
    for name, part in exact.items():
        assert near[name].dtype == torch.float32
        torch.testing.assert_close(near[name], part, rtol=0.05, atol=1e-3, msg=name)


def test_sections_that_rest_leave_the_loss(setting: Setting, sections: dict[str, Any]) -> None:
    everything = Objective(CONFIG, **sections)
    resting = ("tread", "repa", "lpips", "dino", "contrastive")
    loss, parts = setting.run(everything, without=resting)
    plain, _ = setting.run(Objective(CONFIG))
    assert torch.equal(loss, plain)
    assert parts.keys() == {"flow", "words"}


def test_repa_compares_the_tokens_that_walk_with_their_own_patches(
    setting: Setting, sections: dict[str, Any]
) -> None:
    objective = only(sections, "tread", "repa")
    _, parts = setting.run(objective)

    dice = Dice(0, 1, 0, 6)
    t = flow.draw_time(CONFIG, dice)
    noisy = flow.corrupt(setting.image, t, flow.draw_noise(CONFIG, setting.image, dice))
    route = tread.draw(ROUTE, setting.image, 8, dice)
    guess = setting.model.dit(noisy.x_t, t, setting.model.text(CAPTIONS), route, (1, 3))
    with torch.no_grad():
        seen = objective.teachers[sections["repa_config"].teacher](setting.image, 4, 4)
    walked, everyone = guess.tapped
    assert objective.repa is not None
    said = objective.repa.projectors["1"](walked.tokens, 4)
    there = torch.stack([seen[row, places] for row, places in enumerate(route.kept)])
    inside = 1 - torch.nn.functional.cosine_similarity(said, there, dim=-1).mean()
    said = objective.repa.projectors["3"](everyone.tokens, 4)
    outside = 1 - torch.nn.functional.cosine_similarity(said, seen, dim=-1).mean()
    assert said.shape[1] == 2 * there.shape[1] == 16
    torch.testing.assert_close(parts["repa"], (inside + outside) / 2)


def test_repa_moves_the_blocks_below_it_the_words_and_its_projector(
    setting: Setting, sections: dict[str, Any]
) -> None:
    sections["repa_config"] = sections["repa_config"].model_copy(update={"blocks": (1,)})
    objective = only(sections, "repa")
    with_it, _ = setting.run(objective)
    without, _ = setting.run(objective, without=("repa",))
    moved = gradients(with_it - without, setting.model)  # the two flows cancel to the last bit
    above = ("dit.blocks.2.", "dit.blocks.3.", "dit.final_layer.")
    below = {name for name, _ in setting.model.dit.named_parameters(prefix="dit")}
    below = {name for name in below if not name.startswith(above)}
    assert {name for name in moved if name.startswith("dit.")} == below
    assert any(name.startswith("text.") for name in moved)
    assert all(p.grad is not None and p.grad.any() for p in objective.learned.parameters())


@pytest.mark.parametrize("name", ["lpips", "dino"])
def test_a_perceptual_term_moves_the_whole_network_and_no_teacher(
    setting: Setting, sections: dict[str, Any], name: str
) -> None:
    objective = only(sections, name)
    objective.weights = {name: 1e6}  # the flow's pull is nothing beside it
    loss, _ = setting.run(objective)
    moved = gradients(loss, setting.model)
    assert {key for key, _ in setting.model.dit.named_parameters()} == {
        key.removeprefix("dit.") for key in moved if key.startswith("dit.")
    }
    for teacher in objective.teachers.values():
        assert all(p.grad is None for p in teacher.network.parameters())
    assert not list(objective.learned.parameters())


def test_only_the_projectors_are_learned(sections: dict[str, Any]) -> None:
    objective = Objective(CONFIG, **sections)
    assert {name.split(".")[0] for name in objective.learned.state_dict()} == {"repa"}
    widths = {tuple(p.shape) for p in objective.learned.parameters()}
    assert widths == {(32, 32), (32,)}
    assert not Objective(CONFIG).learned.state_dict()


def test_projectors_depend_on_the_seed_alone(sections: dict[str, Any]) -> None:
    first, again = Objective(CONFIG, **sections), Objective(CONFIG, **sections)
    other = Objective(CONFIG, **sections, seed=1)
    for name, value in first.learned.state_dict().items():
        assert torch.equal(value, again.learned.state_dict()[name])
    key = "repa.projectors.1.layers.0.weight"
    assert not torch.equal(first.learned.state_dict()[key], other.learned.state_dict()[key])


def test_two_terms_with_one_teacher_look_at_the_true_pictures_once(
    setting: Setting, sections: dict[str, Any]
) -> None:
    objective = only(sections, "repa", "dino")
    (teacher,) = objective.teachers.values()
    looks: list[int] = []
    teacher.network.register_forward_hook(lambda *_: looks.append(1))
    _, together = setting.run(objective)
    assert len(looks) == 2  # the truth once, the guess once
    _, apart = setting.run(objective, without=("repa",))
    assert len(looks) == 4
    torch.testing.assert_close(together["dino"], apart["dino"])


def test_terms_with_two_teachers_or_two_grids_each_have_their_own_view(
    setting: Setting, sections: dict[str, Any], toys: dict[str, Path]
) -> None:
    other = {"teacher": str(toys["dinov3"])}
    for change in (other, {"patches": 4}):
        sections["dino_config"] = dino.Config(**({"teacher": str(toys["dinov2"])} | change))
        _, together = setting.run(only(sections, "repa", "dino"))
        _, alone = setting.run(only(sections, "dino"))
        torch.testing.assert_close(together["dino"], alone["dino"])


def test_with_itself_as_teacher_it_listens_to_its_average_at_less_noise(setting: Setting) -> None:
    setting.average.requires_grad_()  # so that only the objective keeps gradients out
    config = repa.Config(teacher="self", blocks=(1,), target=3, earlier=0.3)
    objective = Objective(CONFIG, ROUTE, config, width=DIT.width)
    loss, parts = setting.run(objective)
    assert not objective.teachers

    dice = Dice(0, 1, 0, 6)
    t = flow.draw_time(CONFIG, dice)
    eps = flow.draw_noise(CONFIG, setting.image, dice)
    noisy = flow.corrupt(setting.image, t, eps)
    route = tread.draw(ROUTE, setting.image, 8, dice)
    sooner = (t - 0.3 * dice.uniform(1)[:, 0]).clamp(min=1e-3)
    assert (sooner < t).all()
    assert (sooner > t - 0.3).all()
    x_s = flow.corrupt(setting.image, sooner, eps).x_t
    elder = setting.average.dit(x_s, sooner, setting.average.text(CAPTIONS), None, (3,)).tapped[0]
    tap = setting.model.dit(noisy.x_t, t, setting.model.text(CAPTIONS), route, (1,)).tapped[0]
    assert objective.repa is not None
    said = objective.repa.projectors["1"](tap.tokens, 4)
    torch.testing.assert_close(
        parts["repa"], repa.disagreement(said, elder.tokens, route.kept), rtol=1e-4, atol=1e-6
    )
    loss.backward()
    assert all(p.grad is None for p in setting.average.parameters())


def test_a_share_of_the_pictures_has_the_expectation_of_all() -> None:
    miss, t = torch.arange(1.0, 13.0), torch.linspace(0.05, 0.95, 12)
    term = lpips.Config(fraction=0.25, below=0.7)
    shares = []
    for first in range(4):
        rows = Dice(0, 1, first, 12).share(term.fraction)
        shares.append(mean(miss[rows], t[rows], term, 12))
    whole = mean(miss, t, term.model_copy(update={"fraction": 1.0}), 12)
    torch.testing.assert_close(torch.stack(shares).mean(), whole)
    torch.testing.assert_close(whole, (miss * (t < 0.7)).mean())


def test_a_share_of_nobody_costs_nothing(setting: Setting, sections: dict[str, Any]) -> None:
    for name in ("lpips", "dino"):
        key = f"{name}_config"
        sections[key] = sections[key].model_copy(update={"fraction": 0.1})
    loss, parts = setting.run(only(sections, "lpips", "dino"))
    assert float(parts["lpips"]) == float(parts["dino"]) == 0
    assert torch.equal(loss, setting.run(Objective(CONFIG))[0])


@pytest.mark.parametrize("name", ["lpips", "dino"])
def test_above_the_gate_a_guess_is_not_judged(
    setting: Setting, sections: dict[str, Any], name: str
) -> None:
    t = flow.draw_time(CONFIG, Dice(0, 1, 0, 6))
    gate = float(t.sort().values[2:4].mean())
    key = f"{name}_config"
    sections[key] = sections[key].model_copy(update={"below": gate})
    objective = only(sections, name)
    _, gated = setting.run(objective)
    below = torch.tensor([float(t[row]) < gate for row in range(6)])
    each = [setting.run(objective, row, row + 1)[1][name] for row in range(6)]
    assert [float(value) > 0 for value in each] == below.tolist()
    torch.testing.assert_close(gated[name], torch.stack(each).mean())


def test_what_is_deferred_is_neither_guessed_nor_judged(
    setting: Setting, sections: dict[str, Any]
) -> None:
    sections["tread_config"] = tread.Config(kind="deferred", start=1, stop=4, carried=0.5)
    loss, parts = setting.run(only(sections, "tread", "lpips"))
    dice = Dice(0, 1, 0, 6)
    t = flow.draw_time(CONFIG, dice)
    noisy = flow.corrupt(setting.image, t, flow.draw_noise(CONFIG, setting.image, dice))
    route = tread.draw(sections["tread_config"], setting.image, 8, dice)
    guess = setting.model.dit(noisy.x_t, t, setting.model.text(CAPTIONS), route).x
    shown = tread.walked(route, setting.image, 8).expand_as(guess)
    miss = (guess - setting.image) / t.clamp(min=0.05).view(-1, 1, 1, 1)
    torch.testing.assert_close(parts["flow"], miss[shown].square().mean(), rtol=1e-4, atol=1e-6)
    pasted = torch.where(shown, guess, setting.image)
    vgg = lpips.load(sections["lpips_config"])
    expected = lpips.distance(vgg, pasted, setting.image, 0.5).mean()
    torch.testing.assert_close(parts["lpips"], expected, rtol=1e-4, atol=1e-6)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("kind", ["tread", "sprint"])
def test_on_any_other_route_the_whole_picture_is_guessed_and_judged(
    setting: Setting, kind: str
) -> None:
    config = tread.Config.model_validate({"kind": kind, "start": 1, "stop": 3})
    model = build(DIT, TEXT, setting.model.text.tokenizer, 0, route=config)
    torch.nn.init.normal_(model.dit.final_layer.linear.weight, std=0.1)
    _, parts = setting._replace(model=model).run(Objective(CONFIG, config))
    dice = Dice(0, 1, 0, 6)
    t = flow.draw_time(CONFIG, dice)
    noisy = flow.corrupt(setting.image, t, flow.draw_noise(CONFIG, setting.image, dice))
    route = tread.draw(config, setting.image, 8, dice)
    guess = model.dit(noisy.x_t, t, model.text(CAPTIONS), route).x
    miss = (guess - setting.image) / t.clamp(min=0.05).view(-1, 1, 1, 1)
    torch.testing.assert_close(parts["flow"], miss.square().mean(), rtol=1e-4, atol=1e-6)


def test_a_teacher_too_sees_the_truth_where_nothing_was_guessed(
    setting: Setting, sections: dict[str, Any]
) -> None:
    sections["tread_config"] = tread.Config(kind="deferred", start=1, stop=4, carried=0.5)
    sections["dino_config"] = sections["dino_config"].model_copy(update={"pooled": True})
    objective = only(sections, "tread", "dino")
    _, parts = setting.run(objective)
    dice = Dice(0, 1, 0, 6)
    t = flow.draw_time(CONFIG, dice)
    noisy = flow.corrupt(setting.image, t, flow.draw_noise(CONFIG, setting.image, dice))
    route = tread.draw(sections["tread_config"], setting.image, 8, dice)
    guess = setting.model.dit(noisy.x_t, t, setting.model.text(CAPTIONS), route).x
    pasted = torch.where(tread.walked(route, setting.image, 8), guess, setting.image)
    (teacher,) = objective.teachers.values()
    one, other = (teacher(image, 4, 4).mean(1) for image in (pasted, setting.image))
    expected = 1 - torch.nn.functional.cosine_similarity(one, other).mean()
    torch.testing.assert_close(parts["dino"], expected, rtol=1e-4, atol=1e-6)


def test_a_guess_that_has_a_caption_keeps_away_from_its_neighbours_truth(
    setting: Setting, sections: dict[str, Any]
) -> None:
    _, parts = setting.run(only(sections, "contrastive"))
    dice = Dice(0, 1, 0, 6)
    t = flow.draw_time(CONFIG, dice)
    noisy = flow.corrupt(setting.image, t, flow.draw_noise(CONFIG, setting.image, dice))
    guess = setting.model.dit(noisy.x_t, t, setting.model.text(CAPTIONS)).x
    said, true = (flow.velocity(noisy.x_t, x, t) for x in (guess, setting.image))
    apart = [(said[i] - true[i ^ 1]).square().mean() for i in range(6) if CAPTIONS[i]]
    assert len(apart) == 5
    torch.testing.assert_close(parts["contrastive"], -sum(apart) / 6, rtol=1e-4, atol=1e-6)


def test_deferred_guesses_are_repelled_as_much_as_if_they_were_the_whole_picture(
    setting: Setting, sections: dict[str, Any]
) -> None:
    sections["tread_config"] = tread.Config(kind="deferred", start=1, stop=4, carried=0.5)
    objective = only(sections, "tread", "contrastive")
    with_it, without = (
        setting.run(objective, without=names)[0] for names in ((), ("contrastive",))
    )
    dice = Dice(0, 1, 0, 6)
    t = flow.draw_time(CONFIG, dice)
    noisy = flow.corrupt(setting.image, t, flow.draw_noise(CONFIG, setting.image, dice))
    route = tread.draw(sections["tread_config"], setting.image, 8, dice)
    guess = setting.model.dit(noisy.x_t, t, setting.model.text(CAPTIONS), route).x
    shown = tread.walked(route, setting.image, 8).expand_as(guess)
    said, true = (flow.velocity(noisy.x_t, x, t) for x in (guess, setting.image))
    captioned = torch.tensor([caption != "" for caption in CAPTIONS]).view(-1, 1, 1, 1)
    apart = (said - true[[1, 0, 3, 2, 5, 4]]).square() * captioned
    weight = setting.model.dit.final_layer.linear.weight
    (pull,) = torch.autograd.grad(with_it - without, weight)
    (expected,) = torch.autograd.grad(-0.05 * apart[shown].mean(), weight)
    torch.testing.assert_close(pull, expected, rtol=1e-3, atol=1e-5)


def test_the_average_is_never_asked_about_less_noise_than_any_training_sees(
    setting: Setting,
) -> None:
    quiet = flow.Config(mean=-20.0, uniform=0.0)
    objective = Objective(
        quiet, None, repa.Config(teacher="self", blocks=(1,), target=3), width=DIT.width
    )
    asked: list[torch.Tensor] = []
    setting.average.dit.register_forward_pre_hook(lambda _, given: asked.append(given[1]))
    setting.run(objective)
    assert torch.equal(asked[0], torch.full((6,), 1e-3))


def test_the_shift_of_a_stage_is_that_of_its_noise(setting: Setting) -> None:
    given = (setting.model, setting.average, setting.image, CAPTIONS)
    staged, _ = Objective(CONFIG)(*given, Dice(0, 1, 0, 6), shift=7.0)
    other = CONFIG.model_copy(update={"shift": 7.0})
    assert torch.equal(staged, Objective(other)(*given, Dice(0, 1, 0, 6))[0])
    assert not torch.equal(staged, setting.run(Objective(CONFIG))[0])


def test_to_make_an_objective_draws_none_of_the_numbers_that_others_draw(
    sections: dict[str, Any],
) -> None:
    before = torch.get_rng_state()
    Objective(CONFIG, **sections)
    assert torch.equal(torch.get_rng_state(), before)


def test_projectors_do_not_begin_with_the_numbers_of_the_denoiser(
    sections: dict[str, Any],
) -> None:
    tokenizer = text.learn_tokenizer(CAPTIONS, TEXT)
    first = build(DIT, TEXT, tokenizer, 5).state_dict()["dit.img_in.weight"].flatten()[: 32 * 32]
    learned = Objective(CONFIG, **sections, seed=5).learned.state_dict()
    other = learned["repa.projectors.1.layers.0.weight"].flatten()
    assert abs(float(torch.corrcoef(torch.stack((first, other)))[0, 1])) < 0.2


def test_projectors_lead_from_the_width_of_the_denoiser_to_that_of_the_teacher(
    sections: dict[str, Any],
) -> None:
    learned = Objective(CONFIG, **sections | {"width": 48}).learned.state_dict()
    shapes = [tuple(learned[f"repa.projectors.1.layers.{i}.weight"].shape) for i in range(3)]
    assert shapes == [(32, 48), (32, 32), (32, 32)]


def test_teachers_are_kept_in_the_precision_of_the_blocks(sections: dict[str, Any]) -> None:
    half = Objective(CONFIG, **sections, compute=torch.bfloat16)
    (teacher,) = half.teachers.values()
    assert teacher.network.dtype == torch.bfloat16
    assert half.vgg is not None
    assert half.vgg.depths[0][0][0].dtype == torch.bfloat16


def test_teachers_stay_as_they_were_read(setting: Setting, sections: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    objective = Objective(CONFIG, **sections)
    weights = [*setting.model.parameters(), *objective.learned.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    before = objective.learned.state_dict()["repa.projectors.1.layers.0.weight"].clone()
    for _ in range(3):
        setting.run(objective)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(
        before, objective.learned.state_dict()["repa.projectors.1.layers.0.weight"]
    )
    for source, teacher in objective.teachers.items():
        stored = load_file(Path(source) / "model.safetensors")
        now = teacher.network.state_dict()
        assert all(torch.equal(now[name], stored[name]) for name in stored if name in now)
        assert len(stored.keys() & now.keys()) > 10


def test_a_picture_that_is_no_square_is_seen_in_its_own_rows_and_columns(
    setting: Setting, sections: dict[str, Any]
) -> None:
    image = setting.image[..., :16, :]  # two rows of four patches
    sections["repa_config"] = sections["repa_config"].model_copy(
        update={"blocks": (1,), "projector": "conv"}
    )
    objective = only(sections, "repa", "dino")
    _, parts = setting._replace(image=image).run(objective)

    dice = Dice(0, 1, 0, 6)
    t = flow.draw_time(CONFIG, dice)
    noisy = flow.corrupt(image, t, flow.draw_noise(CONFIG, image, dice))
    guess = setting.model.dit(noisy.x_t, t, setting.model.text(CAPTIONS), None, (1,))
    teacher = objective.teachers[sections["repa_config"].teacher]
    seen = teacher(image, 2, 4)
    assert objective.repa is not None
    said = objective.repa.projectors["1"](guess.tapped[0].tokens, 2)
    torch.testing.assert_close(parts["repa"], repa.disagreement(said, seen, None))
    expected = dino.distance(teacher(guess.x, 2, 4), seen).mean()
    torch.testing.assert_close(parts["dino"], expected)
