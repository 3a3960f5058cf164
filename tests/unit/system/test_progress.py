import io
import re
import sys

import pytest

from hfft.system.progress import above_bars, bar, bars, close_bars


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def watch(monkeypatch):
    """Puts a terminal in the place of the standard error output; in the test, as pytest puts its own there before."""

    def put():
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    monkeypatch.delenv("RANK", raising=False)
    yield put
    close_bars()


def test_a_bar_says_how_fast_it_is_and_what_is_left(watch):
    watched = watch()
    shown = bar("counting", 40)
    shown.start_t -= 20  # 20 seconds ago
    shown.update(10)
    shown.set_postfix_str("loss 0.5")
    assert re.search(
        r"counting:  25%\|.*\| 10/40 \[00:2\d<(00:5\d|01:0\d), .*images.*, loss 0\.5\]", watched.getvalue()
    )


def test_items_without_a_known_number(watch):
    watched = watch()
    assert list(bar("reading", None, iter("abc"))) == ["a", "b", "c"]
    assert re.search(r"reading: 3images \[00:00, ", watched.getvalue())


def test_lines_stand_above(watch):
    watched = watch()
    shown = bar("counting", 4)
    with above_bars():
        watched.write("a line\n")
    before, _, after = watched.getvalue().rpartition("a line\n")
    assert before.rstrip("\r").endswith(" ")  # the bar was wiped
    assert after.lstrip("\r").startswith("counting: ")
    shown.close()


def test_what_is_done_soon_has_no_bar_even_beside_lines(watch):
    watched = watch()
    for _ in bar("quick", 2, range(2), delay=60):
        with above_bars():
            watched.write("a line\n")
    assert "quick" not in watched.getvalue()


def test_one_process_speaks(watch, monkeypatch):
    watched = watch()
    monkeypatch.setenv("RANK", "1")
    list(bar("counting", 2, range(2), shown=True))
    assert watched.getvalue() == ""


def test_bars_are_switched_off_for_a_while(watch):
    watched = watch()
    with bars(shown=False), bars(shown=True):
        list(bar("counting", 2, range(2), shown=True))
    assert watched.getvalue() == ""
    list(bar("counting", 2, range(2)))
    assert "counting" in watched.getvalue()


def test_nobody_watches_a_pipe(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    monkeypatch.delenv("RANK", raising=False)
    list(bar("counting", 2, range(2)))
    assert pipe.getvalue() == ""
    list(bar("counting", 2, range(2), shown=True))
    assert "counting" in pipe.getvalue()


def test_open_bars_are_left_on_lines_of_their_own(watch):
    watched = watch()
    shown = bar("counting", 4)
    shown.update(1)
    close_bars()
    assert watched.getvalue().endswith("\n")
