"""The day with a GPU without one: shares of time, what is cut off and kept, exit codes, what is told at the end."""

import json
import os
import sys
import tomllib
from threading import Event

import psutil
import pytest
from headrace_core.testing.async_test import WAIT_S

from tests.perf.gpu_day import __main__ as command
from tests.perf.gpu_day import machine
from tests.perf.gpu_day.findings import findings
from tests.perf.gpu_day.one_call import case_of
from tests.perf.gpu_day.parts import LIMIT, Choice, Part, first, second
from tests.perf.gpu_day.run import Day


def part(name, code, weight=1, **changes):
    return Part(name, weight, (sys.executable, "-c", f"import pathlib, sys, time\n{code}"), f"{name}.log", **changes)


def touches(path):
    return f"pathlib.Path({str(path)!r}).touch()\n"


def waits_for(path):
    return f"while not pathlib.Path({str(path)!r}).exists(): time.sleep(0.01)\n"


HANGS = "print('found', flush=True)\nwhile True: time.sleep(100)\n"


def day(out, clock=lambda: 0.0, interrupted=None, seconds=100.0):
    return Day(out, out, seconds, os.environ, interrupted or Event(), clock)


def clock_by(*events):
    """A clock that shows so many seconds when a file is there, 0 before; the last that is there counts."""
    return lambda: max((seconds for path, seconds in events if path.exists()), default=0.0)


def test_parts_pass_and_fail_and_their_lines_are_kept(tmp_path):
    stages = [(part("good", "print('yes')"),), (part("bad", "print('no'); sys.exit(2)"),)]
    outcomes = list(day(tmp_path).run(stages))
    assert [(each.name, each.status, each.exit_code) for each in outcomes] == [
        ("good", "passed", 0),
        ("bad", "failed", 2),
    ]
    assert (tmp_path / "good.log").read_text().splitlines()[-1] == "yes"
    assert (tmp_path / "bad.log").read_text().splitlines()[-1] == "no"


def test_a_part_that_hangs_is_cut_off_at_its_share_and_the_next_begins(tmp_path):
    """Of 100 s it may take 30; what it found is in its log, and 60 of the 69 that are left then are the next one's."""
    found = tmp_path / "found"
    stages = [(part("hangs", touches(found) + HANGS, 30),), (part("next", "", 60),), (part("last", "", 9),)]
    outcomes = list(day(tmp_path, clock_by((found, 31.0))).run(stages))
    assert [(each.status, each.limit_s) for each in outcomes] == [
        ("cut off", pytest.approx(100 * 30 / 99)),
        ("passed", 60.0),
        ("passed", 69.0),
    ]
    assert "found" in (tmp_path / "hangs.log").read_text()


def test_time_that_a_part_does_not_need_is_the_others(tmp_path):
    outcomes = list(day(tmp_path).run([(part("quick", "", 50),), (part("next", "", 50),)]))
    assert [each.limit_s for each in outcomes] == [50.0, 100.0]


def test_when_all_time_is_over_nothing_more_begins(tmp_path):
    found = tmp_path / "found"
    stages = [(part("hangs", touches(found) + HANGS),), (part("late", ""),)]
    outcomes = list(day(tmp_path, clock_by((found, 101.0))).run(stages))
    assert [each.status for each in outcomes] == ["cut off", "not started"]
    assert not (tmp_path / "late.log").exists()


def test_parts_of_a_stage_run_at_the_same_time(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    stage = (part("a", touches(a) + waits_for(b)), part("b", touches(b) + waits_for(a)))
    assert {each.status for each in day(tmp_path).run([stage])} == {"passed"}


def test_what_the_machine_lacks_is_skipped(tmp_path):
    (outcome,) = day(tmp_path).run([(part("profile", "", missing="no ncu"),)])
    assert (outcome.status, outcome.is_good) == ("skipped", True)


def test_a_part_is_told_how_long_it_has(tmp_path):
    told = Part("told", 1, (sys.executable, "-c", "import sys; print(sys.argv[1])", LIMIT), "told.log")
    list(day(tmp_path).run([(told,)]))
    assert (tmp_path / "told.log").read_text().splitlines()[-1] == "97"


STARTS_ANOTHER = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
pathlib.Path({path!r} + ".partial").write_text(str(child.pid))
pathlib.Path({path!r} + ".partial").rename({path!r})
"""


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("ends", ["by itself", "at its limit", "interrupted"])
def test_no_process_is_left_behind(tmp_path, ends):
    """Not what a part started either, however it ends."""
    path, interrupted = tmp_path / "pid", Event()

    def clock():
        if path.exists() and ends == "interrupted":
            interrupted.set()
        return 200.0 if path.exists() and ends == "at its limit" else 0.0

    code = STARTS_ANOTHER.format(path=str(path)) + ("" if ends == "by itself" else HANGS)
    (outcome, later) = day(tmp_path, clock, interrupted).run([(part("parent", code),), (part("later", ""),)])
    assert outcome.status == ("passed" if ends == "by itself" else "cut off")
    assert later.status == ("passed" if ends == "by itself" else "not started")
    psutil.wait_procs(
        [psutil.Process(pid) for pid in [int(path.read_text())] if psutil.pid_exists(pid)], timeout=WAIT_S
    )
    assert not is_running(int(path.read_text()))


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((0, 5), 1)])
def test_the_exit_code_says_if_every_part_passed(tmp_path, monkeypatch, codes, expected, capsys):
    stages = [(part(f"p{number}", f"sys.exit({code})"),) for number, code in enumerate(codes)]
    monkeypatch.setattr(command, "first", lambda *_: stages)
    assert command.main(["first", "--dry-run", "--out", str(tmp_path)]) == expected
    kept = [json.loads(line) for line in (tmp_path / "parts.jsonl").read_text().splitlines()]
    assert [each["exit_code"] for each in kept] == list(codes)
    summary = (tmp_path / "summary.txt").read_text()
    assert summary == capsys.readouterr().out
    assert summary.endswith("not passed: p1 (failed)\n" if expected else "not passed: nothing\n")


def test_results_of_another_run_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "summary.txt").write_text("of before")
    assert command.main(["first", "--dry-run", "--out", str(tmp_path)]) == command.NOTHING_STARTED
    assert (tmp_path / "summary.txt").read_text() == "of before"


@pytest.mark.parametrize("wrong", [["third"], ["first", "--tune", "mla_decode"], ["second", "--seconds", "0"]])
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(wrong)
    assert ended.value.code == 2


def test_packages_come_from_the_checkout():
    settings = tomllib.loads((machine.ROOT / "pyproject.toml").read_text())
    paths = command.environment_of({"PYTHONPATH": "mine"})["PYTHONPATH"].split(os.pathsep)
    assert paths[-1] == os.path.abspath("mine")
    for package in (*settings["tool"]["importlinter"]["root_packages"], "headrace_demo", "tests"):
        assert any(os.path.isdir(os.path.join(path, package)) for path in paths), package


def test_the_second_run_is_what_is_asked_for(tmp_path):
    choice = Choice(["mla_decode"], ["tests/parity/kernels/test_rope.py"], ["mla_decode:heads 16, 16 bits"])
    (tests,), (kernels,), (tune,) = second(tmp_path, choice)
    assert tests.command[-1] == "tests/parity/kernels/test_rope.py"
    assert kernels.command[-2:] == ("--family", "mla_decode")
    assert "--no-peers" not in kernels.command
    assert tune.command[-2:] == ("--key", "heads 16, 16 bits")
    assert [stage[0].name for stage in second(tmp_path, Choice())] == ["kernels"]


def test_a_dry_run_is_as_small_as_it_goes(tmp_path):
    choice = Choice.dry([], [], [])
    assert [stage[0].name for stage in second(tmp_path, choice)] == ["parity", "kernels", f"tune {choice.tune[0]}"]
    assert "--dry-run" in second(tmp_path, choice)[1][0].command
    assert [stage[0].name for stage in second(tmp_path, Choice.dry(["rope"], [], []))] == ["parity", "kernels"]
    assert first(tmp_path, choice)[-1][0].command[0] != "ncu"


def test_the_first_run_measures_everything(tmp_path):
    stages = first(tmp_path, Choice())
    assert [[each.name for each in stage] for stage in stages] == [
        ["parity", "compile"], ["step"], ["kernels"], ["tokens"], ["profile"],
    ]  # fmt: skip
    for profiled in stages[-1][0].command[-5:]:
        assert case_of(profiled).family == profiled.partition(":")[0]
    with pytest.raises(ValueError, match="no case of a family 'rope' has 'T=7'"):
        case_of("rope:T=7")


def write_lines(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_is_told_at_the_end_is_what_was_found(tmp_path):
    assert list(findings(tmp_path)) == []
    name = "tests/parity/kernels/test_rope.py::test_{}"
    write_lines(
        tmp_path / "parity.jsonl",
        *({"test": name.format(test), "outcome": "began"} for test in "abc"),
        {"test": name.format("a"), "outcome": "passed"},
        {"test": name.format("b"), "outcome": "failed", "why": "assert 1\n == 2"},
    )
    write_lines(
        tmp_path / "compile.jsonl",
        {"launch": "rope T=1, launch 0", "problems": []},
        {"launch": "rope T=2, launch 0", "problems": ["cut off after 60 s"]},
    )
    row = {"family": "rope", "shape": "T=1", "fraction": 0.5, "error": ""}
    write_lines(
        tmp_path / "kernels.jsonl", {"GPU": "G"}, row, row | {"shape": "T=2", "fraction": None, "error": "cut off"}
    )
    engine = {
        "step": {"batches": {"1": {"replay_ms": 2.5, "fraction": 0.47}}, "error": "no memory"},
        "tokens": {"checkpoints": {"v3": {"equal": 12, "equal_captured": 11, "num_tokens": 12}}},
    }
    (tmp_path / "engine.json").write_text(json.dumps({"engine": engine}))
    families = {"f": {"small": {"us": 7.0, "config": {"BLOCK_M": 64}}}}
    (tmp_path / "tuned.json").write_text(json.dumps({"device": "G", "families": families}))
    assert list(findings(tmp_path)) == [
        "parity: 1 began, 1 failed, 1 passed",
        f"  failed: {name.format('b')}: assert 1 == 2",
        f"  began and did not end: {name.format('c')}",
        "  speeds below of what is wrong mean nothing: rope",
        "compile: 1 launches, 1 more with a problem",
        "  rope T=2, launch 0: cut off after 60 s",
        "step: failed: no memory",
        "step: batch 1: 2.500 ms, 47% of its floor",
        "kernels: rope: 1 cases measured, 50% to 50% of their floors",
        "  rope T=2: cut off",
        "tokens: v3: 12 plain and 11 captured of 12 equal transformers'",
        "tuned: f small: 7.0 µs with {'BLOCK_M': 64}",
    ]
