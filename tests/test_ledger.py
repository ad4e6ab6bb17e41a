"""What a run may spend, in all, however often it is interrupted."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from daybreak.failure import BadRecipe
from daybreak.train import ledger
from daybreak.train.ledger import Config, Ledger


class Clock:
    """Seconds since the birth of a process that works when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text('{"recipe": "abc"}\n')
    return path


def work(file: Path, config: Config, until: float = 1e9, seconds: float = 1.0) -> Ledger:
    """A process: five seconds of start-up, then steps until the budget or a kill ends it."""
    clock = Clock()
    clock.now = 5.0
    kept = Ledger(file, config, clock)
    while not kept.over and clock.now + seconds <= until:
        clock.now += seconds
        kept.step(1e9, 1e9)
    return kept


def test_a_run_ends_when_its_seconds_are_spent(file: Path) -> None:
    kept = work(file, Config(seconds=90))
    assert 90 - 1 - 2 * ledger.CLOSING - ledger.ENDING <= kept.spent <= 90


def test_a_run_that_is_interrupted_twice_spends_no_more(file: Path) -> None:
    config = Config(seconds=90)
    for until in (30.0, 25.0):
        work(file, config, until).write()
    kept = work(file, config)
    assert 90 - 1 - 2 * ledger.CLOSING - ledger.ENDING <= kept.spent <= 90
    assert kept.sessions == 3


def test_the_end_of_a_process_is_paid_for_too(file: Path) -> None:
    kept = Ledger(file, None, Clock(), rate=3600)
    kept.end()
    assert json.loads(file.read_text())["ledger"]["seconds"] == 1.5
    assert json.loads(file.read_text())["ledger"]["dollars"] == 1.5


def test_a_kill_costs_a_second_of_memory_at_most(file: Path) -> None:
    work(file, Config(seconds=90), until=30.0, seconds=0.25)  # and not another word
    assert Ledger(file, Config(seconds=90), Clock()).spent == pytest.approx(30, abs=1.25)


def test_the_rate_falls_to_nothing_at_the_end_of_the_budget(file: Path) -> None:
    clock = Clock()
    kept = Ledger(file, Config(seconds=102.5, cooldown=0.5), clock)
    factors = []
    for clock.now in (0.0, 50.0, 75.0, 90.0, 100.0, 200.0):
        factors.append(kept.factor)
    assert factors == pytest.approx([1, 1, 0.5, 0.2, 0, 0])


def test_of_several_limits_the_nearest_brings_the_rate_down(file: Path) -> None:
    clock = Clock()
    kept = Ledger(file, Config(seconds=1002.5, flops=100, cooldown=0.5), clock)
    kept.step(90, 1)
    assert kept.factor == pytest.approx(0.2)
    clock.now = 950.0
    assert kept.factor == pytest.approx(0.1)


def test_a_slow_checkpoint_is_given_its_time(file: Path) -> None:
    clock = Clock()
    kept = Ledger(file, Config(seconds=90), clock)
    clock.now = 82.0
    assert not kept.over
    kept.saved(10.0)
    assert kept.over


def test_dollars_are_seconds_at_a_price(file: Path) -> None:
    def limit(config: Config) -> float | None:
        return Ledger(file, config, Clock(), rate=7200).limit

    assert limit(Config(dollars=2, price=7200)) == 1
    assert limit(Config(dollars=2, price=7200, seconds=0.5)) == 0.5
    assert limit(Config(flops=1e15)) is None


def test_dollars_are_those_of_the_devices_that_were_there(file: Path) -> None:
    config, clock = Config(dollars=100, price=3600, cooldown=0.5), Clock()
    one = Ledger(file, config, clock, rate=3600)
    assert one.limit == 100
    clock.now = 40.0
    one.write()
    clock.now = 0.0
    four = Ledger(file, config, clock, rate=4 * 3600)
    assert four.paid == 40
    assert four.limit == 40 + 60 / 4
    assert four.factor == 1, "60 dollars are left, more than half of them"
    clock.now = 10.0
    assert four.paid == 80
    assert four.factor == pytest.approx(1 - (80 / 90 - 0.5) / 0.5, abs=1e-6)


def test_flops_end_a_run_too(file: Path) -> None:
    kept = work(file, Config(flops=10.5e9))
    assert kept.flops == 10e9
    assert kept.gone == pytest.approx(10 / 10.5)


def test_without_a_budget_nothing_ends_and_all_is_written_down(file: Path) -> None:
    clock = Clock()
    kept = Ledger(file, None, clock)
    clock.now = 1e6
    kept.step(3.0, 4.0)
    assert not kept.over
    assert kept.factor == 1
    written = json.loads(file.read_text())
    assert written["recipe"] == "abc"
    assert written["ledger"] == {
        "seconds": 1e6,
        "seconds_of_a_save": 0.0,
        "flops": 3.0,
        "flops_of_a_step": 4.0,
        "sessions": 1,
    }


def test_a_step_that_compiled_does_not_end_a_run_early(file: Path) -> None:
    clock = Clock()
    kept = Ledger(file, Config(seconds=90), clock)
    clock.now = 45.0  # of which 40 to compile
    kept.step(1e9, 1e9, new=True)
    assert not kept.over


def test_a_step_that_will_compile_is_given_its_time(file: Path) -> None:
    clock = Clock()
    kept = Ledger(file, Config(seconds=90), clock)
    clock.now = 25.0  # of which 20 to compile
    kept.step(1e9, 1e9, new=True)
    for clock.now in (26.0, 27.0):
        kept.step(1e9, 1e9)
    for clock.now, over in ((63.0, False), (67.0, True)):  # 25 s more are 92 and 96 with a save
        kept.drew(1.0)
        kept.step(1e9, 1e9)
        assert not kept.over
        clock.now += 1.0
        kept.step(1e9, 1e9, compiles=True)
        assert kept.over == over


def test_the_first_save_is_given_the_time_that_its_bytes_take(file: Path) -> None:
    clock = Clock()
    kept = Ledger(file, Config(seconds=90), clock, size=10e9)
    clock.now = 71.0
    assert kept.over
    kept.saved(2.0)
    assert not kept.over, "now it is known to be faster"


def test_what_comes_before_the_next_step_has_to_fit_too(file: Path) -> None:
    clock = Clock()
    kept = Ledger(file, Config(seconds=90), clock)
    kept.drew(20.0)
    kept.drew(0.0)  # an evaluation, say
    clock.now = 75.0
    assert not kept.late()
    assert kept.late(kept.drawing)


def test_what_is_left_is_told_of_flops_too(file: Path) -> None:
    clock = Clock()
    kept = Ledger(file, Config(flops=100, seconds=1000), clock)
    clock.now = 9.0
    kept.step(0, 10, new=True)
    assert kept.left == 991, "of the first step nothing is known but that it took long"
    for clock.now in (11.0, 13.0):
        kept.step(10, 10)
    assert kept.left == pytest.approx(16), "8 steps of 2 s"
    assert Ledger(file, None, clock).left == math.inf


def test_the_next_step_is_the_one_that_has_to_fit(file: Path) -> None:
    kept = Ledger(file, Config(flops=10), Clock())
    kept.step(4, 4)
    assert not kept.over
    kept.step(4, 2)
    assert not kept.over, "the next stage is cheaper"
    kept.step(2, 2)
    assert kept.over


def test_how_long_a_save_takes_is_known_after_an_interruption(file: Path) -> None:
    clock = Clock()
    kept = Ledger(file, Config(seconds=90), clock)
    kept.saved(30.0)
    kept.write()
    clock.now = 65.0
    assert Ledger(file, Config(seconds=90), clock).late()


def test_a_disk_that_fails_does_not_end_the_run(file: Path) -> None:
    kept = Ledger(file, Config(seconds=90), Clock())
    file.unlink()
    file.mkdir()
    kept.write()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            Config(seconds=0.01),
            r"a budget of 0\.01 s is spent before the first step.*--budget \d+s",
        ),
        (Config(flops=99), r"too small for one step: give at least --budget 1\.01e\+02flop"),
        (
            Config(seconds=1e9, dollars=0.5, price=3600),
            r"0\.5 usd, at 7200 an hour, is spent before the first step.*--budget 46\.00usd",
        ),
        (
            Config(dollars=0.5, price=3600),
            r"0\.5 usd, at 7200 an hour, is spent before the first step.*--budget 46\.00usd",
        ),
    ],
)
def test_a_budget_that_does_not_pay_for_a_step_names_one_that_does(
    file: Path, config: Config, words: str
) -> None:
    clock = Clock()
    clock.now = 9.0
    with pytest.raises(BadRecipe, match=words):
        Ledger(file, config, clock, rate=7200).check(100)
    enough = Config(seconds=1e9, flops=101, dollars=40, price=3600)
    Ledger(file, enough, clock, rate=7200).check(100)


def test_what_was_spent_before_the_first_checkpoint_stays_spent(file: Path) -> None:
    config = Config(seconds=90)
    work(file, config, until=89.0).write()
    clock = Clock()
    clock.now = 5.0
    with pytest.raises(BadRecipe, match=r"with 87 s of earlier starts.*--budget 189s"):
        Ledger(file, config, clock).check(1)


def test_a_ledger_that_was_removed_begins_anew(file: Path) -> None:
    file.unlink()
    assert Ledger(file, Config(seconds=90), Clock()).spent == 0


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, "give an amount: seconds, dollars or flops"),
        ({"dollars": 3}, "price"),
        ({"seconds": -1}, "greater than 0"),
        ({"hours": 3}, "hours"),
    ],
)
def test_a_budget_that_says_nothing_is_refused(table: dict[str, float], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Config.model_validate(table)


def test_a_process_knows_its_age() -> None:
    code = "import time; time.sleep(0.5); from daybreak.train import ledger; print(ledger.age())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) >= 0.5 or sys.platform != "linux"


def test_one_slow_step_says_nothing_about_the_next(file: Path) -> None:
    clock = Clock()
    kept = Ledger(file, Config(seconds=1000), clock)
    for clock.now in (1.0, 2.0, 3.0, 4.0, 24.0, 25.0, 45.0):
        kept.step(1e9, 1e9)
    assert kept.usual == 1.0


def test_the_slowest_save_is_the_one_that_is_reckoned_with(file: Path) -> None:
    kept = Ledger(file, Config(seconds=90), Clock())
    kept.saved(30.0)
    before = kept.closing
    kept.saved(2.0)
    assert kept.closing == before


@pytest.mark.parametrize("pause", ["saved", "drew"])
def test_what_lies_between_two_steps_is_none_of_the_next_ones_time(file: Path, pause: str) -> None:
    clock = Clock()
    kept = Ledger(file, Config(seconds=1000), clock)
    clock.now = 1.0
    kept.step(1e9, 1e9)
    clock.now = 51.0
    getattr(kept, pause)(50.0)
    clock.now = 52.0
    kept.step(1e9, 1e9)
    assert kept.usual == 1.0


def test_seconds_of_a_run_that_had_no_price_are_paid_at_todays(file: Path) -> None:
    file.write_text(json.dumps({"ledger": {"seconds": 1800.0}}))
    assert Ledger(file, Config(dollars=9, price=4), Clock(), rate=4.0).paid == 2.0


def test_what_was_paid_stays_so_on_devices_without_a_price(file: Path) -> None:
    clock = Clock()
    Ledger(file, None, clock, rate=3600).end()
    clock.now = 10.0
    Ledger(file, None, clock).end()
    clock.now = 0.0
    assert Ledger(file, None, clock, rate=3600).paid == 1.5


def test_of_several_ranks_one_keeps_account(file: Path) -> None:
    before, clock = file.read_text(), Clock()
    other = Ledger(file, Config(seconds=90), clock, writes=False)
    clock.now = 9.0
    other.step(1e9, 1e9)
    other.end()
    assert file.read_text() == before


def test_where_a_disk_is_slow_entries_are_rare(file: Path) -> None:
    clock = Clock()
    kept = Ledger(file, None, clock)
    kept.entering = 1.0
    for clock.now, there in ((50.0, False), (199.0, False), (200.0, True)):
        kept.step(1e9, 1e9)
        assert ("ledger" in json.loads(file.read_text())) == there


def test_what_the_next_step_takes_is_known_after_an_interruption(file: Path) -> None:
    kept = Ledger(file, Config(flops=10), Clock())
    kept.step(4, 4)
    kept.step(4, 4)
    kept.write()
    assert Ledger(file, Config(flops=10), Clock()).full


def test_what_compiling_takes_is_the_most_that_it_took(file: Path) -> None:
    clock = Clock()
    kept = Ledger(file, Config(seconds=1000), clock)
    for seconds, compiles in ((20.0, True), (5.0, False), (60.0, False)):
        clock.now += seconds  # the last one is slow, as the first of a stage, and compiles nothing
        kept.step(1e9, 1e9, new=True, compiles=compiles)
    assert kept.compiling == 20.0


def test_a_budget_that_was_overspent_has_nothing_left(file: Path) -> None:
    clock = Clock()
    kept = Ledger(file, Config(seconds=90), clock)
    clock.now = 95.0
    assert kept.left == 0


def test_a_budget_that_dearer_devices_have_spent_names_one_that_does_for_these(file: Path) -> None:
    file.write_text(json.dumps({"ledger": {"seconds": 40.0, "dollars": 400.0}}))
    clock = Clock()
    clock.now = 9.0
    config = Config(dollars=400, price=3600)
    with pytest.raises(BadRecipe, match=r"with 40 s of earlier starts.*--budget 463\.00usd"):
        Ledger(file, config, clock, rate=3600).check(1)  # 400, and 63 s more
    Ledger(file, Config(dollars=463, price=3600), clock, rate=3600).check(1)


def test_what_is_usual_is_so_of_the_stage_that_goes_on(file: Path) -> None:
    clock = Clock()
    kept = Ledger(file, Config(seconds=1e6), clock)
    for seconds in [1.0] * 100 + [4.0] * 16:
        clock.now += seconds
        kept.step(1e9, 1e9)
    assert kept.usual == 4.0


def test_flops_of_earlier_starts_stay_spent(file: Path) -> None:
    file.write_text(json.dumps({"ledger": {"flops": 95}}))
    with pytest.raises(BadRecipe, match=r"give at least --budget 1\.06e\+02flop"):
        Ledger(file, Config(flops=100), Clock()).check(10)
    Ledger(file, Config(flops=106), Clock()).check(10)
