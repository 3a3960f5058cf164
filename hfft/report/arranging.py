"""Room for the words around a figure's axes, found once per figure."""

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine


def arrange(figure: Figure) -> None:
    """Move axes so that their labels have room, for every file that the figure is then saved to.

    A figure that has a layout engine of its own is drawn twice for each file, first to find this room. Axes of a fixed
    aspect ratio are arranged twice: where they are first measured, they have another shape.

    Args:
        figure: Finished, without a layout engine; colour bars are made with `use_gridspec=False`.
    """
    has_fixed_shape = any(axes.get_aspect() != "auto" for axes in figure.axes)
    for _ in range(2 if has_fixed_shape else 1):
        ConstrainedLayoutEngine().execute(figure)
