"""A run on paper: what it takes, what a budget buys, and what is said when it cannot be."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from daybreak import cli, config
from daybreak.failure import BadRecipe, BadStorage
from daybreak.model import text, text_cache
from daybreak.train import budget, fitting, flops, hardware, measure, memory, plan
from daybreak.train.budget import Budget
from daybreak.train.hardware import Cluster
from daybreak.train.memory import Mesh
from tests import warm

PUBLISHED: dict[str, Any] = {
    "out": "runs/published",
    "micro": 32,
    "data": {"source": "data/published"},
    "text": {"encoder": "google/t5gemma-2b-2b-ul2", "max_tokens": 256},
    "dit": {},
    "tread": {"start": 1, "stop": 15},
    "repa": {},
    "lpips": {},
    "dino": {},
    "muon": {},
    "parallel": {"dp_replicate": 4},
    "stage": [
        {"resolution": 512, "steps": 100_000, "batch": 1024, "lr": 1e-4},
        {"resolution": 1024, "steps": 20_000, "batch": 512, "lr": 1e-4, "without": ["repa"]},
    ],
}
H200 = hardware.DEVICES["H200"]


def t5(folder: Path) -> Path:
    """A tiny encoder with random weights, as its users would publish it."""
    from transformers import T5Config, T5EncoderModel

    words = text.Config(vocabulary=400)
    text.learn_tokenizer(["a red circle"] * 20, words).save_pretrained(folder)
    size = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    T5EncoderModel(T5Config(vocab_size=400, **size)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published() -> config.Recipe:
    return config.parse(PUBLISHED, "published")


def test_the_published_run_costs_what_its_efficiency_says() -> None:
    """768 GPU-hours at 6.1 % of the peak; under 4 hours and about $235 at 40 % (without Muon)."""
    cluster = Cluster(32, H200)
    published = config.parse({k: v for k, v in PUBLISHED.items() if k != "muon"}, "published")
    slow = budget.plan(published, cluster, price=2.0, share=0.061, cached=True)
    assert slow.device_hours == pytest.approx(768, rel=0.05)
    assert slow.dollars == pytest.approx(1536, rel=0.05)
    fast = budget.plan(published, cluster, price=2.0, share=0.40, cached=True)
    assert fast.seconds < 4 * 3600
    assert fast.dollars == pytest.approx(235, rel=0.05)
    assert fast.pictures == 112_640_000
    assert {stage.limit for stage in fast.stages} == {"arithmetic"}


def test_exchanges_are_those_of_the_published_arithmetic(published: config.Recipe) -> None:
    """Of 1.177 B weights on 32 GPUs: 4.6 + 9.2 ms in a node and 18 ms between nodes, or 137 ms."""
    bare = config.parse(
        {k: v for k, v in PUBLISHED.items() if k not in ("repa", "muon")}
        | {"stage": PUBLISHED["stage"][:1]},
        "bare",
    )
    inside, across = budget.traffic(bare, Mesh(4, 8))
    assert inside / H200.link == pytest.approx((4.6 + 9.2) / 1000, rel=0.02)
    assert across / hardware.NETWORK == pytest.approx(0.018, rel=0.03)
    inside, across = budget.traffic(bare, Mesh(1, 32))
    assert inside == 0
    assert across / hardware.NETWORK == pytest.approx(0.137, rel=0.02)
    assert budget.traffic(published, Mesh(1, 1)) == (0, 0)


def test_twice_the_devices_take_half_the_time_and_the_same_money(published: config.Recipe) -> None:
    few, many = (budget.plan(published, Cluster(count, H200)) for count in (8, 16))
    assert many.seconds == pytest.approx(few.seconds / 2, rel=0.03)
    assert many.dollars == pytest.approx(few.dollars, rel=0.03)


def test_the_plan_of_a_recipe_is_the_sum_of_its_stages(published: config.Recipe) -> None:
    made = budget.plan(published, Cluster(32, H200))
    counted = sum(
        stage.count * (stage.batch * sum(work.picture.values()) + 4 * sum(work.step.values()))
        for stage in published.stage
        for work in [flops.work(published, stage)]
    )
    assert made.flops == pytest.approx(counted)
    assert made.flops == pytest.approx(sum(plan.totals(made).values()))


def test_words_that_were_encoded_before_cost_nothing_now(
    published: config.Recipe, tmp_path: Path
) -> None:
    online = budget.plan(published, Cluster(32, H200))
    cached = budget.plan(published, Cluster(32, H200), cached=True)
    assert online.flops - cached.flops == pytest.approx(plan.totals(online)["text encoder"])

    encoder = t5(tmp_path / "encoder")
    words = {"encoder": str(encoder), "max_tokens": 16}
    here = config.parse(
        PUBLISHED | {"data": {"source": str(tmp_path)}, "text": words, "compile": False}, "here"
    )
    pays = plan.totals(budget.plan(here, Cluster(32, H200)))["text encoder"]
    for compute, paid in ((torch.float32, pays), (torch.bfloat16, 0)):
        text_cache.write(tmp_path, text.pretrained(here.text, compute), ["a red circle"])
        made = budget.plan(here, Cluster(32, H200))
        assert plan.totals(made)["text encoder"] == paid, "a run there is in bfloat16"


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("1500usd", "dollars", 1500),
        ("$1,500", "dollars", 1500),
        ("24h", "seconds", 86400),
        ("90s", "seconds", 90),
        ("1.5 min", "seconds", 90),
        ("2d", "seconds", 172800),
        ("4e20flop", "flops", 4e20),
        ("4e+20 FLOP", "flops", 4e20),
        ("200k-images", "pictures", 200_000),
    ],
)
def test_budgets_are_read_as_people_write_them(text: str, kind: str, amount: float) -> None:
    assert budget.parse(text) == (kind, amount)


@pytest.mark.parametrize(
    "text",
    ["", "24", "h", "15eur", "-3h", "0h", "1e400flop", "1e305d", "1e300flop", "24 h 3 min"],
)
def test_other_budgets_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadRecipe, match=r"for example 1500usd, 1\.5h or 4e20flop"):
        budget.parse(text)


def test_a_budget_buys_its_share_of_the_run_in_every_unit(published: config.Recipe) -> None:
    made = budget.plan(published, Cluster(32, H200))
    assert made.dollars is not None
    for spent in (
        Budget("seconds", made.seconds / 2),
        Budget("dollars", made.dollars / 2),
        Budget("flops", made.flops / 2),
        Budget("pictures", made.pictures / 2),
    ):
        assert budget.bought(made, spent) == pytest.approx(0.5)
    said = plan.purchase(published, made, 0.5)
    assert "56,320,000 pictures" in said
    assert f"${made.dollars / 2:,.2f}" in said
    assert "--set stage.0.steps=50000" in said
    assert "--set stage.1.steps=10000" in said


def test_what_encoded_captions_ask_of_the_disk_is_said() -> None:
    recipe = config.load("prx_24h")
    made = budget.plan(recipe, Cluster(32, H200), cached=True)
    speed = made.stages[0].batch / made.stages[0].step
    found = plan.remarks(recipe, made)["disk"]
    assert f"{speed * 256 * 2304 * 2 / 1e9:.3g} GB/s for all" in found
    assert "disk" not in plan.remarks(recipe, made._replace(cached=False))


def test_what_compiling_takes_is_paid_for_once(published: config.Recipe) -> None:
    made = budget.plan(published, Cluster(32, H200))
    slow = made._replace(stages=(made.stages[0]._replace(start=600.0), *made.stages[1:]))
    assert slow.seconds == made.seconds + 600
    assert slow.dollars is not None
    rate = slow.dollars / slow.seconds
    half = 600 + made.seconds / 2
    for spent in (Budget("seconds", half), Budget("dollars", rate * half)):
        assert budget.bought(slow, spent) == pytest.approx(0.5)
    with pytest.raises(
        BadRecipe, match=r"too small for a step of each stage: give at least --budget 60\ds"
    ):
        budget.bought(slow, Budget("seconds", 300))
    assert plan.remarks(published, slow)["start"].startswith("10 min of this time")
    assert plan.remarks(published, made)["start"].startswith("not counted")


def test_a_budget_too_small_for_a_step_names_one_that_is_not(published: config.Recipe) -> None:
    made = budget.plan(published, Cluster(32, H200))
    for small in ("0.01s", "0.0001usd", "1e-12usd", "1e9flop", "5images"):
        with pytest.raises(BadRecipe, match="give at least --budget ") as refused:
            budget.bought(made, budget.parse(small))
        enough = str(refused.value).rpartition("--budget ")[2]
        assert budget.bought(made, budget.parse(enough)) > 0


@pytest.mark.parametrize(
    ("text", "number", "name"),
    [
        ("32xH200", 32, "H200"),
        ("h100", 1, "H100"),
        ("8 x A100", 8, "A100"),
        ("4XRTX4090", 4, "RTX 4090"),
        ("2x5090", 2, "RTX 5090"),
        ("rtx-5090", 1, "RTX 5090"),
        ("16xb200", 16, "B200"),
        ("l40s", 1, "L40S"),
    ],
)
def test_devices_are_read_as_people_write_them(text: str, number: int, name: str) -> None:
    assert hardware.parse(text, torch.bfloat16) == (number, hardware.DEVICES[name])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("32xH300", "did you mean H"),
        ("8xL40", "did you mean L40S?"),
        ("TPU", "there are A100, H100"),
        ("0xH100", "write how many and which"),
        ("-1xH100", "write how many and which"),
        ("1000000xH100", "write how many and which"),
        ("", "write how many and which"),
        ("8x", "write how many and which"),
        ("9" * 5000 + "xH200", "no figures are known"),
    ],
)
def test_unknown_devices_are_refused_with_the_nearest(text: str, words: str) -> None:
    with pytest.raises(BadRecipe) as refused:
        hardware.parse(text, torch.bfloat16)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
    ],
)
def test_a_slower_board_of_a_name_is_not_taken_for_the_fast_one(
    title: str, name: str | None
) -> None:
    assert hardware.known(title) == (hardware.DEVICES[name] if name else None)


def test_the_processor_has_a_speed_and_a_memory() -> None:
    device = hardware.here(torch.float32).device
    assert device.flops > 1e9
    assert device.memory > 2**28


@pytest.mark.parametrize("device", hardware.DEVICES.values(), ids=lambda device: device.name)
def test_what_is_said_to_fit_fits(published: config.Recipe, device: hardware.Device) -> None:
    """Where a plan is refused, the change it names is accepted."""
    cluster = Cluster(32, device)
    try:
        fitting.check_memory(published, budget.plan(published, cluster))
    except BadRecipe as refused:
        other, micro = re.search(r"(?:32 x (.+) with )?--set micro=(\d+)", str(refused)).groups()  # type: ignore[union-attr]
        smaller = config.parse(PUBLISHED | {"micro": int(micro)}, "smaller")
        cluster = Cluster(32, hardware.DEVICES[other]) if other else cluster
        made = budget.plan(smaller, cluster)
        fitting.check_memory(smaller, made)
        assert other or int(micro) < 32
    else:
        assert device.memory > 30e9


def test_where_no_pass_is_small_enough_that_is_said() -> None:
    huge = {"dit": {"width": 65536, "heads": 512, "depth": 96, "bottleneck": 0}}
    recipe = config.parse(PUBLISHED | huge, "huge")
    made = budget.plan(recipe, Cluster(32, hardware.DEVICES["RTX 4090"]))
    with pytest.raises(BadRecipe, match=r"no micro is small enough on 32 x RTX 4090") as said:
        fitting.check_memory(recipe, made)
    values = dict(re.findall(r"--set (\S+)=(\S+)", str(said.value)))
    heads = int(values["dit.heads"])
    for more, fits in ((0, True), (1, False)):
        size = {"width": 128 * (heads + more), "heads": heads + more}
        changes = {"dit": huge["dit"] | size, "parallel": {"dp_replicate": 4, "recompute": True}}
        smaller = config.parse(PUBLISHED | changes | {"micro": int(values["micro"])}, "smaller")
        assert int(values["dit.width"]) == 128 * heads
        found = budget.plan(smaller, Cluster(32, hardware.DEVICES["RTX 4090"]))
        assert (sum(found.fullest.values()) <= found.room) == fits


def test_where_no_device_is_large_enough_more_of_them_are_named() -> None:
    large = {"dit": {"width": 6144, "heads": 96, "depth": 16, "bottleneck": 0}}
    recipe = config.parse(PUBLISHED | large | {"parallel": {}}, "large")
    few = Cluster(1, hardware.DEVICES["B200"])
    with pytest.raises(BadRecipe, match=r"\d x B200 with .*--set micro=\d+ would fit") as said:
        fitting.check_memory(recipe, budget.plan(recipe, few))
    more = Cluster(int(str(said.value).partition(" x B200 with")[0].split()[-1]), few.device)
    fitted = fitting.fitted(recipe, more)
    fitting.check_memory(fitted, budget.plan(fitted, more))


@pytest.mark.parametrize(
    ("name", "number"), [("quickstart", 1), ("emoji", 1), ("prx_1gpu", 1), ("prx_24h", 64)]
)
def test_a_fitted_recipe_can_be_loaded(tmp_path: Path, name: str, number: int) -> None:
    fitted = fitting.fitted(config.load(name), Cluster(number, H200))
    (tmp_path / "fitted.toml").write_text(config.dump(fitted))
    assert config.load(tmp_path / "fitted.toml") == fitted


def test_a_fitted_recipe_whose_pictures_come_in_pairs_can_be_loaded(tmp_path: Path) -> None:
    recipe = config.parse(PUBLISHED | {"contrastive": {}, "micro": 0}, "pairs")
    tight = Cluster(256, hardware.DEVICES["RTX 4090"])
    (tmp_path / "fitted.toml").write_text(config.dump(fitting.fitted(recipe, tight)))
    assert config.load(tmp_path / "fitted.toml").micro % 2 == 0
    with pytest.raises(BadRecipe, match=r"in pairs, .* set a batch that 1024 divides"):
        budget.plan(recipe, Cluster(512, H200))


def test_float32_takes_twice_the_time_of_bfloat16() -> None:
    def hours(precision: str) -> float:
        recipe = config.parse(PUBLISHED | {"precision": precision}, precision)
        return budget.plan(recipe, budget.cluster(recipe, "32xH200")).device_hours

    assert hours("float32") == pytest.approx(2 * hours("bfloat16"))


def test_weights_that_are_gathered_twice_take_less_memory_and_more_traffic(
    published: config.Recipe,
) -> None:
    mesh = {"dp_replicate": 4, "reshard_after_forward": True}
    again = config.parse(PUBLISHED | {"parallel": mesh}, "again")
    once, twice = (budget.plan(recipe, Cluster(32, H200)) for recipe in (published, again))
    assert twice.fullest["copies"] < once.fullest["copies"]
    assert budget.traffic(again, Mesh(4, 8))[0] > budget.traffic(published, Mesh(4, 8))[0]


def test_a_run_counts_as_many_flops_as_its_plan(published: config.Recipe) -> None:
    made = budget.plan(published, Cluster(32, H200))
    steps = [flops.of_step(published, stage, replicas=4) for stage in published.stage]
    counted = sum(s.count * each for s, each in zip(published.stage, steps, strict=True))
    assert made.flops == pytest.approx(counted)


def test_a_fitted_recipe_takes_the_largest_passes_that_fit(published: config.Recipe) -> None:
    cluster = Cluster(32, hardware.DEVICES["RTX 4090"])
    fitted = fitting.fitted(published, cluster)
    fitting.check_memory(fitted, budget.plan(fitted, cluster))
    larger = fitted.model_copy(update={"micro": 2 * fitted.micro})
    with pytest.raises(BadRecipe):
        fitting.check_memory(larger, budget.plan(larger, cluster))


def test_a_stage_of_few_pictures_does_not_make_the_passes_of_the_others_small() -> None:
    recipe = config.load("prx_24h")
    cluster = Cluster(32, H200)
    assert [stage.batch // cluster.number for stage in recipe.stage] == [32, 16]
    assert fitting.fitted(recipe, cluster).micro == 32


def test_where_blocks_fit_only_if_recomputed_that_is_said_and_fitted(tmp_path: Path) -> None:
    plain, again = (
        config.parse(
            PUBLISHED | {"micro": 1, "parallel": {"dp_replicate": 4, "recompute": recompute}},
            "single",
        )
        for recompute in (False, True)
    )
    needs = [
        sum(budget.plan(recipe, Cluster(32, H200)).fullest.values()) for recipe in (plain, again)
    ]
    between = Cluster(32, H200._replace(memory=sum(needs) / 2 / budget.FILL))

    with pytest.raises(BadRecipe, match=r"--set parallel\.recompute=true --set micro=\d+ would"):
        fitting.check_memory(plain, budget.plan(plain, between))
    fitted = fitting.fitted(plain, between)
    fitting.check_memory(fitted, budget.plan(fitted, between))
    (tmp_path / "fitted.toml").write_text(config.dump(fitted))
    loaded = config.load(tmp_path / "fitted.toml")
    assert loaded == fitted
    assert loaded.parallel.recompute
    assert not fitting.fitted(plain, Cluster(32, H200)).parallel.recompute


def test_a_plan_has_the_mesh_that_the_run_would_have(published: config.Recipe) -> None:
    assert budget.plan(published, Cluster(32, H200)).mesh == Mesh(4, 8)
    assert budget.plan(published, Cluster(8, H200)).mesh == Mesh(4, 2)
    whole = config.parse(PUBLISHED | {"parallel": {}}, "whole")
    assert budget.plan(whole, Cluster(32, H200)).mesh == Mesh(1, 32)


def test_a_mesh_that_cannot_be_is_refused_and_fitted(published: config.Recipe) -> None:
    with pytest.raises(BadRecipe, match=r"--set parallel\.dp_replicate=1 "):
        budget.plan(published, Cluster(2, H200))
    assert (
        budget.plan(fitting.fitted(published, Cluster(2, H200)), Cluster(2, H200)).mesh.shard == 2
    )


def test_a_prepared_dataset_says_how_often_it_is_seen(
    tiny: Path, prepared: Callable[..., Path]
) -> None:
    folder = prepared([{"captions": [f"picture {number}"]} for number in range(5)])
    recipe = config.load(tiny, (f'data.source="{folder.as_posix()}"',), ("scenes",))
    made = budget.plan(recipe, Cluster(1, H200))
    assert plan.remarks(recipe, made)["pictures"] == "80: 16 times each of 5"


def test_a_stage_of_other_pictures_is_counted_by_itself(
    tiny: Path, prepared: Callable[..., Path]
) -> None:
    many, few = (prepared([{}] * count, called=f"{count}") for count in (20, 8))
    row = f"resolution=32, batch=8, lr=1e-3, steps=10, source={few.as_posix()!r}"
    tiny.write_text(tiny.read_text().replace('source = "scenes"', f"source = {many.as_posix()!r}"))
    tiny.write_text(tiny.read_text() + "".join(f"[[stage]]\n{row}\n".replace(", ", "\n")))
    recipe = config.load(tiny, (), ("scenes",))
    made = budget.plan(recipe, Cluster(1, H200))
    said = plan.remarks(recipe, made)["pictures"]
    assert said == "160: 4 times each of 20, then 10 times each of 8"


@pytest.mark.parametrize(("steps", "by_heart"), [(125, False), (126, True)])
def test_pictures_that_a_run_would_learn_by_heart_are_told(
    tiny: Path, prepared: Callable[..., Path], steps: int, by_heart: bool
) -> None:
    folder = prepared([{"captions": [f"picture {number}"]} for number in range(5)])
    recipe = config.load(tiny, (f'data.source="{folder.as_posix()}"',), ("scenes",))
    long = config.load(
        tiny, (f'data.source="{folder.as_posix()}"', f"stage.0.steps={steps}"), ("scenes",)
    )
    made = budget.plan(recipe, Cluster(1, H200))
    said = plan.remarks(long, budget.plan(long, Cluster(1, H200)))["pictures"]
    assert ("by heart" in said) == by_heart
    assert ("by heart" in plan.purchase(recipe, made, steps / 10)) == by_heart
    assert "by heart" not in plan.remarks(recipe, made)["pictures"]


def test_devices_that_cannot_share_a_batch_are_refused_with_a_number_that_can(
    published: config.Recipe,
) -> None:
    with pytest.raises(BadRecipe, match=r"33 devices .* stage\.0\.batch = 1024 .* 32 can"):
        budget.plan(published, Cluster(33, H200))


def test_real_steps_are_only_taken_on_a_machine_of_that_kind(published: config.Recipe) -> None:
    other = Cluster(1, hardware.Device("another", 1e12, 1e9, 1e9, None, None))
    with pytest.raises(BadRecipe, match="--measure takes steps on this machine"):
        budget.plan(published, other, measured=True)


def test_real_steps_set_the_pace_of_a_plan(tiny: Path) -> None:
    recipe = config.load(tiny)
    made = budget.plan(recipe, budget.cluster(recipe, "cpu"), measured=True)
    assert made.source.startswith("measured")
    assert 0 < made.stages[0].step < 30
    reached = made.share * made.cluster.device.flops * (made.seconds - made.start)
    assert reached == pytest.approx(made.flops)
    assert 0 < made.start < 60  # on a busy machine half of it
    assert not Path(recipe.out).exists()


def test_matrices_that_many_share_take_each_less_than_was_measured() -> None:
    """As on paper: prx_24h has 40.6 TFLOP of pictures and 29.1 of Muon, dealt out to eight."""
    recipe = config.load("prx_24h")
    eight, alone = Cluster(32, H200), fitting.spread(recipe, Cluster(1, H200))
    share = [stage.model_copy(update={"batch": stage.batch // 32}) for stage in recipe.stage]
    one = budget.plan(alone.model_copy(update={"stage": tuple(share)}), Cluster(1, H200))
    for row, stage in enumerate(budget.plan(recipe, eight).stages):
        work = flops.work(recipe, recipe.stage[row], cached=False)
        pictures, once = share[row].batch * sum(work.picture.values()), sum(work.step.values())
        measured = one.stages[row].seconds["arithmetic"]
        dealt = budget.dealt(measured, pictures, once, shard=8)
        assert dealt == pytest.approx(stage.seconds["arithmetic"])
        assert dealt < 0.8 * measured


def test_a_recipe_for_many_nodes_is_measured_on_one_device(tiny: Path, tmp_path: Path) -> None:
    recipe = config.load(tiny, ("parallel.dp_replicate=2",))
    short = measure.shortened(recipe, 2, tmp_path)
    assert (short.parallel.dp_replicate, short.stage[0].batch) == (1, recipe.stage[0].batch // 2)
    assert measure.steps(recipe, 2)[0].step > 0


def test_a_teacher_that_leaves_before_a_stage_is_not_measured_in_it(
    tiny: Path, toys: dict[str, Path], tmp_path: Path
) -> None:
    repa = f"repa={{teacher='{toys['dinov3']}',blocks=[0],until=10}}"
    later = (
        "stage=[{resolution=32,steps=10,batch=4,lr=1e-3},{resolution=32,steps=5,batch=4,lr=1e-3}]"
    )
    recipe = config.load(tiny, (repa, later))
    first, second = measure.shortened(recipe, 1, tmp_path).stage
    assert "repa" not in first.without
    assert "repa" in second.without


def test_what_a_run_may_spend_does_not_cut_its_measuring_short(tiny: Path) -> None:
    recipe = config.load(tiny, ("budget.flops=1.0",))
    assert measure.steps(recipe, 1)[0].step > 0


def test_nothing_is_evaluated_while_steps_are_measured(tiny: Path, tmp_path: Path) -> None:
    recipe = config.load(tiny, ("evaluate={every=5}",))
    assert recipe.evaluate is not None
    assert measure.shortened(recipe, 1, tmp_path).evaluate is None


@pytest.mark.slow
def test_data_that_is_not_there_is_replaced_for_measuring(tiny: Path) -> None:
    recipe = config.load(tiny, ('data.source="nowhere"',), ("scenes",))
    assert measure.steps(recipe, 2)[0].step > 0


def test_what_runs_on_this_machine_reports_its_own_memory(tiny: Path) -> None:
    recipe = config.load(tiny)
    made = budget.plan(recipe, budget.cluster(recipe, None))
    assert made.fullest["program"] > 1e8
    assert (
        made.fullest.keys() - {"program"}
        == memory.parts(recipe, recipe.stage[0], Mesh(1, 1), 8, torch.float32, "cpu").keys()
    )


def asked(*arguments: object) -> str:
    """What `daybreak plan` prints. Failures come as they are."""
    done = CliRunner().invoke(cli.app, ["plan", *map(str, arguments)])
    if done.exception:
        raise done.exception
    return done.output


def test_plan_prints_tables_and_writes_nothing(tiny: Path) -> None:
    printed = asked(tiny, "--gpus", "4xH100", "--budget", "10usd")
    for word in ("denoiser", "muon", "activations", "optimiser", "fits", "assumed", "buys"):
        assert word in printed, word
    assert list(tiny.parent.iterdir()) == [tiny]


def test_the_budget_of_a_recipe_counts_where_no_other_is_given(tiny: Path) -> None:
    def buys(*arguments: str) -> float:
        bought = json.loads(asked(tiny, "--gpus", "H100", "--json", *arguments))["budget_buys"]
        assert bought["steps"] == [max(1, int(10 * bought["times"] * (1 + 1e-12)))]
        return float(bought["times"])

    whole = json.loads(asked(tiny, "--gpus", "H100", "--json"))
    assert "budget_buys" not in whole
    seconds, flops = whole["seconds"] / 2, sum(whole["flops"].values()) / 4
    clock = ("--set", f"budget.seconds={seconds}")
    assert buys(*clock) == pytest.approx(0.5)
    assert buys(*clock, "--set", f"budget.flops={flops}") == pytest.approx(0.25)
    price = ("--set", f"budget.dollars={seconds}", "--set", "budget.price=3600.0")
    assert buys(*price) == pytest.approx(0.5), "at the recipe's price"
    two = json.loads(asked(tiny, "--gpus", "2xH100", "--json", "--price", 3600))
    there = buys(*price, "--gpus", "2xH100")
    assert there == pytest.approx(seconds / two["dollars"]), "which is one device's"
    assert buys(*clock, "--budget", "1h") == pytest.approx(3600 / whole["seconds"])


def test_plan_writes_the_fitted_recipe_where_it_is_asked_to(tiny: Path, tmp_path: Path) -> None:
    place, shorter = tmp_path / "fitted.toml", tmp_path / "shorter.toml"
    asked(tiny, "--gpus", "4xH100", "--fit", place)
    assert config.load(place).micro == 2
    pictures = sum(stage.count * stage.batch for stage in config.load(tiny).stage)
    half = ("--budget", f"{pictures / 2}images")
    asked(tiny, "--gpus", "4xH100", *half, "--fit", shorter)
    assert config.load(shorter).steps == config.load(tiny).steps // 2
    with pytest.raises(BadRecipe, match="exists already"):
        asked(tiny, "--gpus", "4xH100", "--fit", place)


def test_a_recipe_that_cannot_be_written_is_one_sentence(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(BadStorage, match="cannot write"):
        asked(tiny, "--gpus", "4xH100", "--fit", tmp_path / "nowhere" / "fitted.toml")


def test_a_cheap_run_costs_cents_and_watts_and_not_nothing(tiny: Path) -> None:
    whole = json.loads(asked(tiny, "--gpus", "H100", "--json", "--price", 1))
    said = asked(tiny, "--gpus", "H100", "--price", 0.75 / whole["dollars"])
    assert ", $0.75, fits" in said
    assert " 0 kWh" not in said
    assert ", $750, fits" in asked(tiny, "--gpus", "H100", "--price", 750 / whole["dollars"])


def test_a_dataset_of_pictures_that_are_too_small_is_refused_as_training_would(
    tiny: Path, prepared: Callable[..., Path]
) -> None:
    data = ("--data", prepared([{}]), "--without", "scenes", "--gpus", "H100")
    assert "times each of 1" in asked(tiny, *data, "--set", "stage.0.resolution=64")
    with pytest.raises(BadRecipe, match="was prepared for at most 64 px and a stage asks for 128"):
        asked(tiny, *data, "--set", "stage.0.resolution=128")


def test_plan_gives_json(tiny: Path) -> None:
    found = json.loads(asked(tiny, "--gpus", "2xL40S", "--json", "--price", 0.5, "--share", 0.2))
    assert found["dollars"] == pytest.approx(0.5 * found["device_hours"])
    assert found["share_of_arithmetic"] == 0.2
    assert found["share_of_peak"] == pytest.approx(
        sum(found["flops"].values()) / found["seconds"] / 2 / found["devices"]["flops"]
    )
    assert found["fits"] is True
    assert sum(found["flops"].values()) == pytest.approx(
        sum(sum(stage["flops"].values()) for stage in found["stages"])
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpus", "8xH300"), "H300"),
        (("--gpus", "3xH200"), "2 can"),
        (("--budget", "15eur"), "15eur"),
        (("--gpus", "H200", "--budget", "1e3flop"), "too small for a step of each stage"),
        (("--gpus", "cpu", "--budget", "9usd"), "--price"),
        (("--gpus", "H200", "--measure"), "--measure"),
        (("--gpus", "cpu", "--measure", "--share", "0.3"), "leave one of them out"),
        (("--gpus", "100000xH200"), "evenly: 8 can"),
        (("--gpus", ""), "write how many and which"),
        (("--budget", ""), "for example 1500usd"),
        (("--gpus", "H200", "--price", "inf", "--budget", "5usd"), "--price inf"),
        (("--gpus", "H200", "--price", "1e300"), "--price 1e+300"),
        (("--gpus", "H200", "--price", "0", "--budget", "5usd"), "no price above 0"),
        (("--set", "budget.seconds=1e308"), "budget.seconds = 1e+308"),
        (("--set", "text.encoder=nobody/nothing"), "text.encoder"),
        (("--gpus", "RTX4090", "--set", "dit.width=24576", "--set", "dit.heads=2"), "needs"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(
    tiny: Path, arguments: tuple[str, ...], words: str
) -> None:
    with pytest.raises(BadRecipe) as refused:
        asked(tiny, *arguments)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_plan_is_not_made_by_every_process_of_torchrun(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadRecipe, match="start it without torchrun"):
        asked(tiny)


def test_a_plan_loads_no_more_than_it_needs() -> None:
    """Each of these takes as long to load as the plan itself takes."""
    heavy = {"diffusers", "ftfy", "huggingface_hub", "sympy", "transformers"}
    heavy |= {"torch._dynamo", "torch.distributed.tensor"}
    code = (
        "import sys; from daybreak import cli; cli.plan('prx_24h', gpus='32xH200', budget='24h'); "
        f"sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_plan_that_does_not_fit_is_printed_and_leaves_with_code_2(tiny: Path) -> None:
    done = warm.run(
        *("-m", "daybreak", "plan", tiny, "--gpus", "RTX4090"),
        *("--set", "dit.width=24576", "--set", "dit.heads=2"),
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "DOES NOT FIT" in done.stdout
    assert done.stderr.startswith("daybreak: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("1,500usd", 1500),
        ("1_000_000 images", 1e6),
        ("1.5h", 5400),
        ("2 days", 172800),
        ("30m", 1800),
    ],
)
def test_a_budget_is_read_as_it_was_meant(text: str, amount: float) -> None:
    assert budget.parse(text).amount == amount


@pytest.mark.parametrize("text", ["1,5h", "1_0h", "٣h", "0h", "1,50,000usd", "24", "1e400h"])
def test_a_budget_that_could_mean_something_else_is_refused(text: str) -> None:
    with pytest.raises(BadRecipe, match="an amount above 0 and a unit"):
        budget.parse(text)


def test_nothing_is_measured_that_does_not_fit_or_cannot_be_written(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "nowhere" / "fitted.toml"
    with pytest.raises(BadStorage, match="there is no folder"):
        cli.plan(str(tiny), measure=True, fit=nowhere)
    with pytest.raises(BadRecipe, match="trains its own text encoder"):
        cli.plan(str(tiny), cached_text=True)
    large = ["dit.width=24576", "dit.heads=2", "dit.depth=64"]
    with pytest.raises(BadRecipe, match="GB"):
        cli.plan(str(tiny), measure=True, set_=large)
    assert "20 steps" not in capsys.readouterr().out


def small(tiny: Path, *batches: int) -> config.Recipe:
    stages = ",".join(f"{{resolution=32,steps=9,batch={batch},lr=1e-3}}" for batch in batches)
    return config.load(tiny, (f"stage=[{stages}]",))


def just(recipe: config.Recipe, pictures: int) -> Cluster:
    """A device that holds passes of so many pictures and no more."""
    held = budget.held(recipe, recipe.stage[0], Mesh(1, 1), pictures, torch.bfloat16, "H200")
    return Cluster(1, H200._replace(memory=sum(held.values()) / budget.FILL + 1))


@pytest.mark.parametrize("pictures", [1, 2, 3, 4, 6, 9, 12, 18, 36])
def test_every_pass_that_cuts_a_batch_evenly_is_found(tiny: Path, pictures: int) -> None:
    recipe = config.load(tiny, ("stage.0.batch=36", "precision=auto"))
    assert fitting.largest_pass(recipe, just(recipe, pictures)) == pictures


@pytest.mark.parametrize(("room", "pictures"), [(36, 36), (18, 12), (9, 6), (4, 4)])
def test_a_pass_cuts_the_batches_of_all_stages_evenly(tiny: Path, room: int, pictures: int) -> None:
    recipe = small(tiny, 36, 24).model_copy(update={"precision": "auto"})
    assert fitting.largest_pass(recipe, just(recipe, room)) == pictures


def test_more_processors_are_no_remedy_and_more_devices_share_evenly(tiny: Path) -> None:
    recipe = small(tiny, 12, 18)
    own = hardware.Device("cpu", 1e12, 1e6, 1e9, None, None)
    assert {place.device.name for place in fitting.clusters(recipe, Cluster(1, own))} == {
        *("cpu", *hardware.DEVICES)
    }
    assert [
        place.number
        for place in fitting.clusters(recipe, Cluster(1, own))
        if place.device.name == "cpu"
    ] == [1]
    largest = max(hardware.DEVICES.values(), key=lambda device: device.memory)
    numbers = [place.number for place in fitting.clusters(recipe, Cluster(1, largest))]
    assert numbers == [1, 2, 3, 6]


def test_a_pass_is_never_larger_than_a_share(published: config.Recipe) -> None:
    first, second = published.stage
    for count, at_once, passes in ((8, 32, 4), (32, 32, 1), (64, 16, 1)):
        assert budget.at_once(published, first, count) == at_once
        assert budget.passes(published, first, count) == passes
    assert budget.at_once(published, second, 32) == 16


def test_muons_matrices_travel_in_bfloat16_and_back(published: config.Recipe) -> None:
    plain = config.parse({k: v for k, v in PUBLISHED.items() if k != "muon"}, "plain")
    matrices = sum(shape.numel() for shape, by in flops.learned(published) if by == "muon")
    more = budget.traffic(published, Mesh(1, 8))[0] - budget.traffic(plain, Mesh(1, 8))[0]
    assert more == pytest.approx(2 * 2 * matrices / 8 * 7 / 8)


def test_what_is_computed_in_float32_travels_in_float32(published: config.Recipe) -> None:
    exact = config.parse(PUBLISHED | {"precision": "float32"}, "exact")
    weights = sum(shape.numel() for shape, _ in flops.learned(published))
    matrices = sum(shape.numel() for shape, by in flops.learned(published) if by == "muon")
    half, full = (
        budget.plan(recipe, Cluster(32, H200)).stages[0].seconds["communication"]
        for recipe in (published, exact)
    )
    more = (2 * weights + 2 * 2 * matrices / 8) * 7 / 8
    assert full - half == pytest.approx(more / H200.link)


def test_weights_that_are_let_go_are_gathered_in_every_pass() -> None:
    mesh = {"dp_replicate": 4, "reshard_after_forward": True}
    again = config.parse(PUBLISHED | {"parallel": mesh}, "again")
    once, four = (budget.traffic(again, Mesh(1, 8), passes)[0] for passes in (1, 4))
    weights = sum(shape.numel() for shape, _ in flops.learned(again))
    assert four - once == pytest.approx(3 * 4 * weights * 7 / 8)
    eight = budget.plan(again, Cluster(8, H200)).stages[0]
    assert eight.seconds["communication"] == pytest.approx(
        budget.communication(again, Mesh(4, 2), H200.link, 4)
    )


def test_an_average_that_teaches_is_gathered_in_every_pass() -> None:
    teaches = {"teacher": "self", "blocks": [1], "target": 2}
    taught = config.parse(PUBLISHED | {"repa": teaches}, "taught")
    once, four = (budget.traffic(taught, Mesh(1, 8), passes)[0] for passes in (1, 4))
    weights = sum(shape.numel() for shape, _ in flops.learned(taught))
    assert four - once == pytest.approx(3 * 2 * weights * 7 / 8)


def test_what_goes_to_another_node_goes_no_faster_than_out_of_the_device(
    published: config.Recipe,
) -> None:
    inside, across = budget.traffic(published, Mesh(4, 8))
    slow, fast = hardware.DEVICES["L4"].link, H200.link
    assert slow < hardware.NETWORK < fast
    assert budget.communication(published, Mesh(4, 8), slow) == pytest.approx(
        (inside + across) / slow
    )
    assert budget.communication(published, Mesh(4, 8), fast) == pytest.approx(
        inside / fast + across / hardware.NETWORK
    )


def test_energy_is_that_of_all_devices_and_unknown_of_a_processor(
    published: config.Recipe,
) -> None:
    made = budget.plan(published, Cluster(32, H200))
    assert made.energy == pytest.approx(32 * 0.7 * made.seconds / 3600)
    cpu = hardware.Device("cpu", 1e12, 1e12, 1e9, None, None)
    assert made._replace(cluster=Cluster(1, cpu)).energy is None


def test_a_plan_is_refused_by_the_stage_that_needs_most(published: config.Recipe) -> None:
    made = budget.plan(published, Cluster(32, H200))
    needs = [sum(stage.memory.values()) for stage in made.stages]
    assert made.needed == max(needs) > min(needs)
    for fill, fits in ((0.949, True), (0.951, False)):
        device = H200._replace(memory=made.needed / fill)
        assert made._replace(cluster=Cluster(32, device)).fits == fits


def test_an_hour_costs_what_is_given_else_what_the_recipe_says_else_what_is_usual() -> None:
    spends = config.parse(PUBLISHED | {"budget": {"seconds": 9, "price": 2.5}}, "spends")
    plain = config.parse(PUBLISHED, "plain")
    cluster = Cluster(32, H200)
    assert budget.plan(spends, cluster, price=7.0).price == 7.0
    assert budget.plan(spends, cluster).price == 2.5
    assert budget.plan(plain, cluster).price == H200.price
