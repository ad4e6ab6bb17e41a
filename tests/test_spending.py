"""A budget in the loop: what is paid from it, and how a run ends that has spent it."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from daybreak import config
from daybreak.evaluate import interim
from daybreak.failure import BadRecipe
from daybreak.train import checkpoint, evaluations, flops, loop, spending
from daybreak.train.ledger import Ledger
from daybreak.train.parallel import World


@pytest.mark.parametrize("sets", [("budget.seconds=0.5",), ("budget.flops=1000",)])
def test_a_budget_too_small_for_a_step_is_refused_before_there_is_a_run(
    tiny: Path, sets: tuple[str, ...]
) -> None:
    recipe = config.load(tiny, sets)
    with pytest.raises(BadRecipe, match="give at least --budget"):
        loop.train(recipe, lambda line: None)
    assert not Path(recipe.out, "recipe.toml").exists()


def imported(tiny: Path) -> None:
    """Load what a run loads late, so that a small budget is not spent on that."""
    out = f"out={(tiny.parent / 'first').as_posix()}"
    loop.train(config.load(tiny, ("stage.0.steps=1", out)), lambda line: None, trial=True)


@pytest.mark.slow
def test_what_lies_between_steps_is_paid_from_the_budget(tiny: Path) -> None:
    imported(tiny)
    sets = ("budget.seconds=12", "sample.every=3", "sample.steps=4000", "stage.0.steps=100")
    recipe = config.load(tiny, sets)
    assert loop.train(recipe, lambda line: None) == (3, 0), "no step after a grid so long"
    assert checkpoint.required(Path(recipe.out), print).step == 3


def test_a_budget_of_all_the_flops_of_a_run_leaves_it_its_last_grid(tiny: Path) -> None:
    whole = config.load(tiny)
    step = flops.of_step(whole, whole.stage[0])
    recipe = config.load(tiny, (f"budget.flops={whole.steps * step}",))
    assert loop.train(recipe, lambda line: None) == (10, 0)
    assert len(list(Path(recipe.out, "samples").iterdir())) == 1
    status = json.loads(Path(recipe.out, "status.json").read_text())
    assert status["reason"] == "all steps are done"


def test_flops_that_are_spent_leave_time_for_a_grid_and_an_evaluation(tiny: Path) -> None:
    whole = config.load(tiny)
    sets = (f"budget.flops={4.5 * flops.of_step(whole, whole.stage[0])}",)
    evaluate = ("evaluate.every=100", 'evaluate.suites=["validation"]', "evaluate.pictures=32")
    recipe = config.load(tiny, (*sets, *evaluate))
    assert loop.train(recipe, lambda line: None) == (4, 0)
    assert (Path(recipe.out) / "samples" / "step-0000004" / "grid.png").is_file()
    assert [line["step"] for line in evaluations.lines(Path(recipe.out))] == [4]


def test_the_log_counts_the_words_that_were_read(tiny: Path, pictures: Path) -> None:
    source = f"data.source='{pictures.as_posix()}'"
    recipe = config.load(tiny, (source, "text.max_tokens=64"), ("scenes",))
    loop.train(recipe, lambda line: None)
    lines = (Path(recipe.out) / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert line["words"] == 16
        step = flops.of_step(flops.as_read(recipe, 16), recipe.stage[0])
        reached = line["flops_per_second"] / line["images_per_second"]
        assert reached == pytest.approx(step / recipe.stage[0].batch, rel=0.01)


def test_a_budget_ends_a_run_in_time_with_its_rate_brought_down(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = "\n[[stage]]\nresolution = 32\nsteps = 9\nbatch = 4\nlr = 1e-3\n"
    tiny.write_text(tiny.read_text().replace("steps = 10", "steps = 11") + stage)
    whole = config.load(tiny)
    step = flops.of_step(whole, whole.stage[0])
    sets = (f"budget.flops={10.5 * step}", "budget.cooldown=0.5", "stage.0.cooldown=0.0")
    recipe = config.load(tiny, sets)
    said: list[str] = []
    assert loop.train(recipe, said.append) == (10, 0)
    about = "at this pace the budget pays for about 11 of 20 steps; stage 1 is not reached: "
    assert about in capsys.readouterr().out
    run = Path(recipe.out)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines]
    assert rates[2:6] == [3e-3] * 4
    assert rates[6] == pytest.approx(3e-3 * (4.5 / 10.5) / 0.5)
    assert rates[9] == pytest.approx(3e-3 * (1.5 / 10.5) / 0.5)
    assert checkpoint.required(run, print).step == 10
    assert json.loads((run / "run.json").read_text())["ledger"]["flops"] == pytest.approx(10 * step)
    assert loop.train(recipe, said.append) == (10, 0)
    assert (
        said[-1] == f"{run} has spent its budget: 10 steps of 20; to continue, give it a larger one"
    )


def test_a_grid_for_which_there_is_no_time_is_left_out_and_steps_go_on(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ledger, "drew", lambda kept, _: setattr(kept, "drawing", 3600.0))
    recipe = config.load(tiny, ("budget.seconds=600", "sample.every=3"))
    assert loop.train(recipe, lambda line: None) == (10, 0)
    drawn = [grid.name for grid in Path(recipe.out, "samples").iterdir()]
    assert drawn == ["step-0000003"], "the first one took an hour"


@pytest.mark.slow
def test_an_evaluation_that_outlasts_the_budget_is_broken_off(tiny: Path) -> None:
    imported(tiny)
    recipe = config.load(tiny, ("budget.seconds=20", "stage.0.steps=1000", "sample.every=1000"))
    long = interim.Config(every=3, suites=("scenes",), per_task=1000)
    outcome = loop.train(recipe.model_copy(update={"evaluate": long}), lambda line: None)
    assert outcome == (3, 0)
    run = Path(recipe.out)
    assert checkpoint.required(run, print).step == 3
    assert not (run / "evaluation").exists(), "not a result was written"


def test_a_budget_spent_before_the_first_checkpoint_is_no_success(tiny: Path) -> None:
    recipe = config.load(tiny, ("budget.seconds=300",))
    Path(recipe.out).mkdir()
    told = {"ledger": {"seconds": 299.5, "sessions": 1}}
    Path(recipe.out, "run.json").write_text(json.dumps(told))
    with pytest.raises(BadRecipe, match="earlier starts"):
        loop.train(recipe, lambda line: None)


def test_stages_that_a_budget_does_not_reach_are_named(tiny: Path) -> None:
    each = "{resolution=32,steps=10,batch=8,lr=3e-3,warmup=2,cooldown=0.4}"
    recipe = config.load(tiny, (f"stage=[{each},{each},{each}]",))
    told = [spending.unreached(recipe, step).partition(": ")[0] for step in (0, 10, 11, 20, 21, 30)]
    assert told[:2] == ["; stages 1 to 2 are not reached"] * 2
    assert told[2:4] == ["; stage 2 is not reached"] * 2
    assert told[4:] == ["", ""]


def test_what_is_left_of_a_budget_reaches_further_in_cheaper_stages(tiny: Path) -> None:
    each = "resolution=32,steps=10,lr=3e-3"
    recipe = config.load(tiny, (f"stage=[{{{each},batch=8}},{{{each},batch=16}}]",))
    first, second = 5, 15
    for left, reached in ((0.0, 5), (4.5, 10), (5.0, 10), (5.1, 11), (7.0, 11), (9.1, 13)):
        assert spending.end(recipe, [1.0, 2.0], first, left) == reached
    assert spending.end(recipe, [2.0, 1.0], first, 6.0) == 12
    assert spending.end(recipe, [1.0, 2.0], second, 3.0) == 18
    assert spending.end(recipe, [1.0, 2.0], first, 1e9) == 20
    assert spending.end(recipe, [0.0, 0.0], first, 7.0) == 12, "of unknown size, all are alike"


def world(size: int) -> World:
    return World(0, size, torch.device("cpu"), None, HashStore())


def test_what_has_no_known_size_has_no_budget_of_arithmetic(tiny: Path) -> None:
    text = "text={encoder='nobody/nothing', max_tokens=8}"
    for free in ((), ("budget.seconds=9",)):
        assert spending.of_steps(config.load(tiny, (text, *free)), False, world(1)) == [0.0]
    with pytest.raises(BadRecipe, match="whose size is known"):
        spending.of_steps(config.load(tiny, (text, "budget.flops=1e15")), False, world(1))


def test_a_step_is_counted_as_one_of_its_stage_and_words(tiny: Path) -> None:
    each = "resolution=32,steps=10,lr=3e-3"
    recipe = config.load(tiny, (f"stage=[{{{each},batch=8}},{{{each},batch=16}}]",))
    worked = spending.of_words(recipe, False, world(1))
    for number, words in ((0, 7), (1, 7), (1, 20)):
        read = flops.as_read(recipe, words)
        assert worked(number, words) == flops.of_step(read, read.stage[number])
    assert len({worked(0, 7), worked(1, 7), worked(1, 20)}) == 3


def test_a_budget_of_time_or_money_that_earlier_starts_have_spent_is_spent(tiny: Path) -> None:
    told = {"ledger": {"seconds": 89.0, "dollars": 10.0}}
    (tiny.parent / "run.json").write_text(json.dumps(told))

    def spent(*sets: str) -> bool:
        return spending.spent(config.load(tiny, sets), tiny.parent, world(1), lambda: 0.0)

    assert spent("budget.seconds=90")
    assert not spent("budget.seconds=99")
    assert spent("budget.dollars=10", "budget.price=3")
    assert not spent("budget.dollars=11", "budget.price=3")


def test_what_devices_do_and_cost_is_that_of_all_of_them(tiny: Path) -> None:
    usual, priced = config.load(tiny), config.load(tiny, ("budget.flops=1e15", "budget.price=3"))
    one, four = world(1), world(4)
    flops, price = spending.rates(usual, one, torch.float32)
    assert spending.rates(usual, four, torch.float32) == (4 * flops, price and 4 * price)
    assert spending.rates(priced, one, torch.float32) == (flops, 3)
    assert spending.rates(priced, four, torch.float32) == (4 * flops, 12)
