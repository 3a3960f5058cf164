import ast
import importlib
import os
from collections import Counter

import pytest

from hfft.errors import DataError
from hfft.inference.outputs import WritingError, check_output_file, source_without_hfft, write_output_file


@pytest.mark.parametrize("module", ["hfft.inference.onnx_predict", "hfft.inference.demo_page"])
def test_a_program_without_hfft_holds_each_name_once(module):
    body = ast.parse(source_without_hfft(importlib.import_module(module))).body
    imported = {node.module for node in ast.walk(ast.Module(body, [])) if isinstance(node, ast.ImportFrom)}
    assert "PIL" in imported
    assert not [name for name in imported if name is not None and name.startswith("hfft")]
    targets = [
        one for node in body if isinstance(node, ast.Assign) for target in node.targets for one in ast.walk(target)
    ]
    names = Counter(one.id for one in targets if isinstance(one, ast.Name))
    names += Counter(node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    assert {"open_picture", "check_image"} <= set(names)
    assert [name for name, count in names.items() if count > 1] == []


def test_a_file_has_a_folder_and_an_allowed_ending(tmp_path):
    check_output_file(tmp_path / "p.PARQUET", endings=(".parquet",))
    check_output_file(tmp_path / "p.csv")
    with pytest.raises(DataError, match=r"--html .*p.csv: allowed: a name that ends in .html or .htm"):
        check_output_file(tmp_path / "p.csv", "--html", (".html", ".htm"))
    with pytest.raises(DataError, match="there is no folder"):
        check_output_file(tmp_path / "none" / "p.parquet")
    with pytest.raises(DataError, match="is a folder"):
        check_output_file(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_a_disk_that_is_full(tmp_path):
    (tmp_path / ".p.partial").symlink_to("/dev/full")
    with pytest.raises(WritingError, match=r"p: can't be written: .*No space left on device") as caught:
        write_output_file(tmp_path / "p", lambda path: path.write_text("x" * 100_000))
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
