from dataclasses import replace

import finished
import pytest

from hfft.commands.report import update_finished
from hfft.commands.run import Run


@pytest.mark.parametrize("asked", [True, False])
def test_a_page_that_an_interruption_left_out_is_written_when_the_run_is_asked_for_again(asked, tmp_path):
    folder = finished.make_run(tmp_path / "run", counts={"train": 8}, report=asked)
    (folder / "report.html").unlink(missing_ok=True)
    assert update_finished(
        replace(Run(folder).recipe, output_dir=str(tmp_path), name="run"), None, None, overwrite=False
    )
    assert (folder / "report.html").is_file() == asked
