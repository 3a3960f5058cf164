"""How long the rest of a run will take: the images that are still to come, at speeds that this run has measured."""

from collections.abc import Sequence
from dataclasses import dataclass

_BACKWARD = 2  # forward passes that a backward pass is worth
_HEAVY = 0.1  # of a forward pass; with less, what is measured is reading and bookkeeping


@dataclass(frozen=True)
class Course:
    """What a phase goes through.

    Attributes:
        trained: Images that its steps train on, over all epochs.
        evaluated: Images that its evaluations look at.
        frozen_share: Of the network that is in front of all that trains.
        is_replayed: Whether that part is computed beforehand.
    """

    trained: int
    evaluated: int
    frozen_share: float
    is_replayed: bool

    @property
    def forward(self) -> float:
        """Share of a forward pass that an evaluated image takes."""
        return 1 - self.frozen_share if self.is_replayed else 1.0

    @property
    def step(self) -> float:
        """Forward passes that a trained image is worth."""
        return self.forward + _BACKWARD * (1 - self.frozen_share)


class RunClock:
    """Knows the phases of a run, is told how fast images went through, and says how long the rest may take.

    An image takes time in proportion to what is computed of it, but no less than the least that was measured.
    """

    def __init__(self, courses: Sequence[Course], scored: int) -> None:
        """Know what will come.

        Args:
            courses: Of the phases.
            scored: Images that are predicted when all phases have ended.
        """
        self._courses = courses
        self._scored = scored
        self._heaviest: tuple[float, float] | None = None  # forward passes per image, and seconds
        self._least = 0.0  # seconds of an image of which little is computed

    def note_frozen(self, number: int, images: int, seconds: float) -> None:
        """Images that went through the frozen part of a phase once."""
        self._note(self._courses[number].frozen_share, images, seconds)

    def note_trained(self, number: int, images: int, seconds: float) -> None:
        """Images that a phase has trained on, its evaluations included in the time."""
        self._note(self._courses[number].step, images, seconds)

    def left_after(self, number: int) -> float | None:
        """Seconds from the end of a phase to that of the run; None while nothing was measured to tell it by."""
        if number == len(self._courses) - 1 and not self._scored:
            return 0.0
        if self._heaviest is None:
            return None
        later = self._courses[number + 1 :]
        seconds = self._scored * self._per_image(1.0)
        for course in later:
            seconds += course.trained * self._per_image(course.step)
            seconds += course.evaluated * self._per_image(course.forward)
        return seconds

    def _note(self, work: float, images: int, seconds: float) -> None:
        if images <= 0 or seconds <= 0:
            return
        if work < _HEAVY:
            self._least = seconds / images
        elif self._heaviest is None or work >= self._heaviest[0]:
            self._heaviest = (work, seconds / images)

    def _per_image(self, work: float) -> float:
        assert self._heaviest is not None
        heaviest, seconds = self._heaviest
        return max(work * seconds / heaviest, self._least)
