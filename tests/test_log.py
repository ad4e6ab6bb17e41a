"""Every step stands in the file once, and no one who watches can stop the training."""

import io
import json
import math
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from daybreak.train import log as module
from daybreak.train.log import Log


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(folder: Path, start: int, stop: int, stream: io.StringIO | None = None) -> None:
    with Log(folder, 100, start, stream or io.StringIO(), every=0) as log:
        for step in range(start + 1, stop + 1):
            log.step(step, {"loss": 1 / step, "norm": 0.5, "lr": 1e-4}, images=8)


def test_each_step_is_a_line_of_json(tmp_path: Path) -> None:
    train(tmp_path / "run", 0, 3)
    written = lines(tmp_path / "run")
    assert [line["step"] for line in written] == [1, 2, 3]
    assert [line["loss"] for line in written] == [1 / 1, 1 / 2, 1 / 3]
    assert [line["images"] for line in written] == [8, 16, 24]
    assert list(written[0])[:4] == ["step", "loss", "norm", "lr"]
    assert 0 <= written[0]["seconds"] <= written[1]["seconds"] < 10
    assert 1 < written[0]["memory_mib"] < 100_000
    assert written[2]["images_per_second"] > 0


def test_losses_are_written_to_the_last_bit(tmp_path: Path) -> None:
    with Log(tmp_path, 1, stream=io.StringIO()) as log:
        log.step(1, {"loss": 0.1 + 0.2}, 1)
    assert lines(tmp_path)[0]["loss"].hex() == (0.1 + 0.2).hex()


def test_a_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    with Log(tmp_path, 2, stream=io.StringIO()) as log:
        log.step(1, {"loss": 1.0}, 1)
        assert len(lines(tmp_path)) == 1


def test_resumed_every_step_stands_once(tmp_path: Path) -> None:
    train(tmp_path, 0, 7)
    before = lines(tmp_path)
    train(tmp_path, 4, 9)
    after = lines(tmp_path)
    assert [line["step"] for line in after] == list(range(1, 10))
    assert after[:4] == before[:4]
    assert [line["step"] for line in after if "resumed" in line] == [5]
    assert after[-1]["images"] == 72
    assert after[4]["seconds"] >= after[3]["seconds"]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_started_over_the_file_is_empty(tmp_path: Path) -> None:
    train(tmp_path, 0, 3)
    Log(tmp_path, 100, 0, io.StringIO())
    assert lines(tmp_path) == []


def test_a_half_written_line_does_not_survive(tmp_path: Path) -> None:
    train(tmp_path, 0, 3)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    train(tmp_path, 2, 4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    file.write_bytes(b"\xff\x00nonsense\n[]\n{}\n" + file.read_bytes())
    train(tmp_path, 4, 5)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_line_says_what_is_reached_of_the_machine_and_what_it_costs(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Log(tmp_path, 4, stream=stream, every=0, peak=1e15, price=36.0) as log:
        for step in (1, 2):
            time.sleep(0.05)
            values = {"loss": 1.0, "waited": 0.01}
            log.step(step, values, images=8, flops=2e13, paid=1.0 * step)
    first, second = lines(tmp_path)
    assert 1e14 < second["flops_per_second"] < 4e14
    assert second["share_of_peak"] == second["flops_per_second"] / 1e15
    assert 0.05 < second["waiting"] < 0.2
    assert (first["dollars"], second["dollars"]) == (1.0, 2.0)
    assert 0.5 * 36 * 0.1 / 3600 < second["dollars_to_go"] < 4 * 36 * 0.1 / 3600
    shown = stream.getvalue().splitlines()[-1]
    for words in (" TFLOP/s (", " %)   waits ", "$2.00, $0.00 to go"):
        assert words in shown


def test_what_is_left_of_the_budget_is_left_where_that_is_less(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Log(tmp_path, 1_000_000, stream=stream, every=0, price=3600.0) as log:
        log.step(1, {"loss": 1.0}, 8, paid=40.0, may=60.0)
        time.sleep(0.01)
        log.step(2, {"loss": 1.0}, 8, paid=41.0, may=59.0)
        log.step(3, {"loss": 1.0}, 8, paid=101.0, may=0.0)
    lines = stream.getvalue().splitlines()
    assert "left 0:00:59" in lines[1]
    assert "left 0:00:00" in lines[2]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["dollars_to_go"] == 59.0


def test_what_is_left_counts_the_work_of_the_stages_to_come(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Log(tmp_path, 1_000, stream=stream, every=0, price=3600.0) as log:
        for step in (1, 2):
            time.sleep(0.02)
            log.step(step, {"loss": 1.0}, 8, paid=0.0, to_go=5000.0)
    assert 5000 * 0.02 < lines(tmp_path)[-1]["dollars_to_go"] < 5000 * 0.2


def test_a_first_step_that_compiled_says_nothing_about_the_pace_of_the_others(
    tmp_path: Path,
) -> None:
    stream = io.StringIO()
    with Log(tmp_path, 1_000, stream=stream, every=0) as log:
        time.sleep(0.6)
        log.step(1, {"loss": 1.0}, 8)
        time.sleep(0.02)
        log.step(2, {"loss": 1.0}, 8)
    first, second = lines(tmp_path)
    assert first["images_per_second"] < 8 / 0.6
    assert second["images_per_second"] > 2 * first["images_per_second"]


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    stream = io.StringIO()
    train(tmp_path, 0, 2, stream)
    unknown = {"flops_per_second", "share_of_peak", "dollars", "dollars_to_go"}
    assert not unknown & lines(tmp_path)[-1].keys()
    assert "FLOP/s" not in stream.getvalue()
    assert "$" not in stream.getvalue()


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Log(tmp_path, 2, stream=stream, every=0) as log:
        log.step(1, {"loss": math.nan, "norm": math.inf}, 1)
        log.step(2, {"loss": 1.0}, 1)
    assert lines(tmp_path)[0]["loss"] is None
    assert lines(tmp_path)[0]["norm"] is None
    assert "loss  1.0000" in stream.getvalue()


def test_away_from_a_terminal_lines_are_plain_and_aligned(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Log(tmp_path, 100, stream=stream, every=0) as log:
        for step in range(1, 101):
            time.sleep(0.001)  # a million images a second would not fit their column
            log.step(step, {"loss": 1 / step}, images=8)
    printed = stream.getvalue().splitlines()
    assert len(printed) == 100
    assert "\x1b" not in stream.getvalue()
    assert printed[0].startswith("step   1/100   loss  1.0000   ")
    assert printed[-1].startswith("step 100/100   ")
    assert len({len(line) for line in printed}) == 1


def test_between_first_and_last_a_line_every_ten_seconds(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Log(tmp_path, 50, stream=stream) as log:
        for step in range(1, 51):
            log.step(step, {"loss": 1.0}, 1)
    assert [line[:10] for line in stream.getvalue().splitlines()] == ["step  1/50", "step 50/50"]


def test_the_loss_shown_is_smoothed_without_bias(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Log(tmp_path, 60, stream=stream, every=0) as log:
        for step in range(1, 61):
            log.step(step, {"loss": 3.0 + (-1) ** step}, 1)
    shown = [float(line.split("loss")[1].split()[0]) for line in stream.getvalue().splitlines()]
    assert shown[0] == 2.0
    assert abs(shown[-1] - 3.0) < 0.1


def test_notes_are_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Log(tmp_path, 5, stream=stream) as log:
        log.note("saved [bold]checkpoint-5[/bold]")
    assert stream.getvalue() == "saved [bold]checkpoint-5[/bold]\n"


def test_a_closed_stream_does_not_stop_the_steps(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Log(tmp_path, 5, stream=stream, every=0) as log:
        log.step(1, {"loss": 1.0}, 1)
        stream.close()
        log.note("nobody reads this")
        for step in range(2, 6):
            log.step(step, {"loss": 1.0}, 1)
    assert len(lines(tmp_path)) == 5


SCRIPT = """
import sys, time
from pathlib import Path
from daybreak.train.log import Log
with Log(Path(sys.argv[1]), 200, every=0) as log:
    for step in range(1, 201):
        log.step(step, {"loss": 1.0}, 8)
        log.note("a note")
        time.sleep(0.001)
"""


def test_a_closed_pipe_does_not_stop_the_steps(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert errors == b""
    assert process.returncode == 0
    assert len(lines(tmp_path)) == 200


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_nobody_reads_is_said_in_vain(unbuffered: str) -> None:
    script = "from daybreak.train.log import say; say('so'); say('it'); say('goes'); exit(5)"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert errors == b""
    assert process.returncode == 5


@pytest.mark.parametrize("hang_up", [False, True])
def test_on_a_terminal_there_is_a_bar_that_may_vanish(tmp_path: Path, hang_up: bool) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    screen = os.read(ours, 1000)
    if hang_up:
        os.close(ours)
    else:
        screen += drained(ours)
    _, errors = process.communicate(timeout=60)
    assert errors == b""
    assert process.returncode == 0
    assert len(lines(tmp_path)) == 200
    if not hang_up:
        assert "━" in screen.decode(errors="ignore")
        assert b"step 200/200" in screen
        assert screen.count(b"a note\r\n") == 200


def drained(terminal: int) -> bytes:
    output = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # how Linux says that nobody holds the other end
            part = b""
        if not part:
            return output
        output += part


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_warns_once_and_delays_the_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Log(tmp_path, 5, stream=stream) as log:
        log.step(1, {"loss": 1.0}, 1)
        log._close()
        log.path = Path("/dev/full")
        log.step(2, {"loss": 1.0}, 1)
        log.step(3, {"loss": 1.0}, 1)
        log.path = tmp_path / "metrics.jsonl"
        log.step(4, {"loss": 1.0}, 1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert stream.getvalue().count("cannot be written (No space left on device)") == 1


def test_memory_is_that_of_this_process() -> None:
    block = bytearray(os.urandom(1)) * (64 * module.MIB)
    assert module.memory() > len(block)
    assert module.peak_memory() >= len(block)


def test_it_does_not_import_torch() -> None:
    check = "import sys, daybreak.train.log; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
