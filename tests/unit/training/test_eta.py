import pytest

from hfft.training.eta import Course, RunClock

HEAD = Course(trained=1000, evaluated=200, frozen_share=1.0, is_replayed=True)
BLOCKS = Course(trained=3000, evaluated=300, frozen_share=0.75, is_replayed=True)
WHOLE = Course(trained=3000, evaluated=300, frozen_share=0.75, is_replayed=False)


def test_work_of_an_image_in_forward_passes():
    assert (HEAD.step, HEAD.forward) == (0.0, 0.0)
    assert (BLOCKS.step, BLOCKS.forward) == (0.75, 0.25)  # the last quarter, forward and back; forward
    assert (WHOLE.step, WHOLE.forward) == (1.5, 1.0)  # all of it forward, a quarter back


def test_nothing_is_told_before_anything_was_measured():
    clock = RunClock([HEAD, BLOCKS], scored=100)
    assert clock.left_after(0) is None
    clock.note_trained(0, images=1000, seconds=2)  # of a head alone: tells nothing of blocks
    assert clock.left_after(0) is None
    assert RunClock([HEAD], scored=0).left_after(0) == 0


def test_the_rest_at_the_speed_of_the_frozen_part():
    clock = RunClock([HEAD, BLOCKS], scored=100)
    clock.note_frozen(0, images=400, seconds=40)  # 0.1 s for a whole forward pass
    assert clock.left_after(0) == pytest.approx(3000 * 0.075 + 300 * 0.025 + 100 * 0.1)
    assert clock.left_after(1) == pytest.approx(100 * 0.1)


def test_no_image_is_faster_than_the_fastest_measured():
    clock = RunClock([HEAD, BLOCKS], scored=0)
    clock.note_frozen(0, images=400, seconds=4)
    clock.note_trained(0, images=1000, seconds=20)  # reading and bookkeeping take 0.02 s, computing 0.0075 s
    assert clock.left_after(0) == pytest.approx(3300 * 0.02)


def test_heavier_work_tells_more_than_lighter():
    clock = RunClock([WHOLE, WHOLE], scored=0)
    clock.note_trained(0, images=300, seconds=30)
    clock.note_frozen(0, images=300, seconds=3000)  # of 0.75 forward passes
    assert clock.left_after(0) == pytest.approx(3000 * 0.1 + 300 * 0.1 / 1.5)


@pytest.mark.parametrize(("images", "seconds"), [(0, 1), (1, 0), (-5, 1)])
def test_what_is_no_measurement_is_not_noted(images, seconds):
    clock = RunClock([WHOLE, WHOLE], scored=1)
    clock.note_trained(0, images, seconds)
    assert clock.left_after(0) is None
