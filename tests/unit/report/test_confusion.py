from dataclasses import replace

import finished
import pytest

from hfft.report.confusion import Cell, lay_out
from hfft.runs.facts import read_facts


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return read_facts(finished.make_run(tmp_path_factory.mktemp("matrix") / "run")).splits["test"]


def test_cells_are_in_the_order_of_the_classes_and_as_strong_as_their_share(split):
    confusion = {"bee": {"ant": 1, "bee": 3}, "ant": {"ant": 6, "bee": 2}, "cat": {}}
    found = lay_out(replace(split, confusion=confusion), ["ant", "bee", "cat"])
    assert set(found.cells) == {Cell(0, 0, 6, 0.75), Cell(0, 1, 2, 0.25), Cell(1, 0, 1, 0.25), Cell(1, 1, 3, 0.75)}
    assert (found.images, found.right, found.numbered) == ((8, 4, 0), (6, 3, 0), True)


def test_small_shares_of_many_classes_can_be_seen(split):
    labels = [str(number) for number in range(30)]
    found = lay_out(replace(split, confusion={"3": {"3": 99, "4": 1}}), labels)
    assert {cell.column: cell.strength for cell in found.cells} == {3: 0.995, 4: 0.1}
    assert not found.numbered


@pytest.mark.parametrize("count", [2, 20, 100, 101, 1000])
def test_no_matrix_is_wider_than_a_screen(split, count):
    labels = [f"a long name of a class, {number}" for number in range(count)]
    found = lay_out(replace(split, confusion={}), labels)
    assert found.margin + found.size <= 1032  # the width of the page's text
    assert bool(found.names) == (count <= 100)
    assert found.letters <= found.side  # no name runs into the next
    assert found.letters >= (8 if found.names else 0)


def test_long_names_keep_both_ends(split):
    (name,) = lay_out(replace(split, confusion={}), ["Tomato___Tomato\n_Yellow_Leaf_Curl_Virus"]).names
    assert name.startswith("Tomato___")
    assert name.endswith("_Virus")
    assert len(name) <= 22
