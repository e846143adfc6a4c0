"""What is said of long phases: when, how often, and nothing of short ones."""

import io
import time

import pytest

from early_exit.runs import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def display(total, unit="steps", file=None, **how):
    """(one that nothing but the test looks at, its clock, what it is shown on)."""
    clock, file = Clock(), io.StringIO() if file is None else file
    return progress.Progress(total, unit, file=file, clock=clock, **how), clock, file


def test_without_a_terminal_there_is_a_plain_line_every_half_minute():
    shown, clock, log = display(3600, description="tuning")
    for _ in range(301):
        shown.update(1, "loss 2.5")
        clock.now += 1
    lines = log.getvalue().splitlines()
    assert len(lines) == 1 + 300 // 30
    assert not set("\r\x1b") & set(log.getvalue())
    assert lines[-1].startswith("tuning:   8%") and "loss 2.5" in lines[-1]
    assert "05:00<54:59, " in lines[-1] and "1.00 steps/s" in lines[-1]


def test_rates_leave_out_the_first_which_compiles():
    shown, clock, log = display(10)
    clock.now += 100
    shown.update(1)
    for _ in range(4):
        clock.now += 30
        shown.update(1)
    first, *_, last = log.getvalue().splitlines()
    assert "1/10" in first and "01:40<" in first
    assert "5/10" in last and "30.00 s/steps" in last and "<02:30" in last  # five of half a minute


def test_a_call_that_lasts_is_told_of_while_it_lasts():
    """Nothing is updated; the thread that watches looks."""
    shown, clock, log = display(None, "", description="compiling", after=5)
    for _ in range(70):
        clock.now += 1
        shown.look()
    assert log.getvalue().splitlines() == [f"compiling: {t}" for t in ("00:05", "00:35", "01:05")]


def test_on_a_terminal_it_is_one_line_and_earlier_work_counts():
    shown, clock, screen = display(100, done=50, file=Terminal())
    with shown:
        clock.now += 1
        shown.update(10)
    text = screen.getvalue()
    assert text.startswith("\r") and text.count("\n") == 1 and text.endswith("\n")
    assert "60%" in text and "60/100" in text


def test_large_numbers_are_short_and_small_ones_whole():
    shown, _, log = display(250_000, "tokens")
    with shown:
        shown.update(12_345)
    assert "12.3k/250k" in log.getvalue()
    shown, _, log = display(8, "batches")
    with shown:
        shown.update(3)
    assert "3/8 " in log.getvalue()


def test_what_is_over_soon_is_not_told():
    shown, clock, log = display(3, after=5)
    with shown:
        for _ in range(3):
            clock.now += 1
            shown.update(1)
    assert not log.getvalue()
    shown, clock, log = display(3, after=5)
    with shown:
        clock.now += 60  # in one call, and then it ends
    assert "01:00" in log.getvalue()


def test_only_commands_tell_and_nothing_within_a_phase(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BEFORE", 1e-9)
    assert list(progress.counted([1, 2], "recording")) == [1, 2]
    with progress.waiting("loading"):
        time.sleep(0.01)
    assert not capsys.readouterr().err

    with progress.shown():
        with progress.waiting("loading"):
            assert list(progress.counted([1, 2], "recording")) == [1, 2]
        assert list(progress.counted(iter([1, 2]), "timing", "turns", total=2)) == [1, 2]
    err = capsys.readouterr().err
    assert "loading: 00:00" in err and "recording" not in err
    assert "timing: 100%" in err and "2/2" in err
    assert list(progress.counted([1], "recording")) == [1]
    assert not capsys.readouterr().err


def test_what_breaks_or_leaves_off_in_a_phase_ends_it(capsys):
    with progress.shown():
        for item in progress.counted([1, 2, 3], "recording"):
            if item == 2:
                break
        with pytest.raises(ZeroDivisionError), progress.waiting("loading"):
            raise ZeroDivisionError
        assert progress._tells()
