import pytest

from hfft.commands.run import Run
from hfft.errors import RunError


def test_a_run_reads_a_folder_and_refuses_others(tmp_path):
    with pytest.raises(RunError, match="is no run folder"):
        Run(tmp_path)
