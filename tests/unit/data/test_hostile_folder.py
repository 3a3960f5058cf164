"""What an audit finds in a folder with every known defect: all of it, and nothing else."""

import hostile
import pytest
from pictures import make_photos

from hfft.commands.check_data import check_data


def found_in(folder):
    return {(finding.kind, frozenset(finding.files)) for finding in check_data(str(folder)).findings}


def test_there_are_enough_defects():
    assert len(hostile.ALL) >= 25
    assert len(hostile.BROKEN) >= 20


def test_a_clean_folder_has_no_findings(tmp_path):
    check = check_data(str(hostile.make_clean(tmp_path / "photos")))
    assert (check.findings, check.exit_code) == ((), 0)


@pytest.mark.nightly
@pytest.mark.parametrize("name", hostile.ALL)
def test_a_defect_alone(name, tmp_path):
    expected = hostile.make_hostile(tmp_path / "photos", {name: hostile.ALL[name]})
    assert found_in(tmp_path / "photos") == expected


def test_all_defects_together(tmp_path):
    expected = hostile.make_hostile(tmp_path / "photos")
    check = check_data(str(tmp_path / "photos"))
    assert {(finding.kind, frozenset(finding.files)) for finding in check.findings} == expected
    assert len(check.findings) == len(expected)
    assert check.exit_code == 1


def test_files_that_are_no_rows_where_folders_called_like_splits_are_classes(tmp_path):
    folder = make_photos(tmp_path / "photos", {"train": 8, "test": 8})
    (folder / "train/raw.dng").touch()
    (finding,) = check_data(str(folder), ["data.label_column=class_folder"]).findings
    assert (finding.kind, finding.files) == ("left out", ("train/raw.dng",))
