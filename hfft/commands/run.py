"""Run: what `finetune` returns, a view of the folder that a run leaves."""

import os
from typing import TYPE_CHECKING

from hfft.hub.pushing import Pushed, Pushing, push
from hfft.runs.record import RunRecord

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Run(RunRecord):
    """A view of a run folder; changes nothing there but the note of what was pushed."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Open a run folder.

        Raises:
            RunError: If it isn't one.
        """
        super().__init__(folder)
        self.check_run()

    def push_to_hub(self, repo_id: str, *, trust_remote_code: bool = False, **pushing: "Unpack[Pushing]") -> Pushed:
        """Push the run as `hfft.push` does."""
        return push(self, repo_id, trust_remote_code=trust_remote_code, **pushing)
