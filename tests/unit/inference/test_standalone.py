import ast
import importlib
from collections import Counter

import pytest

from hfft.inference.standalone import without_hfft


@pytest.mark.parametrize("module", ["hfft.inference.onnx_predict", "hfft.inference.page"])
def test_a_program_without_hfft_holds_each_name_once(module):
    body = ast.parse(without_hfft(importlib.import_module(module))).body
    imported = {node.module for node in ast.walk(ast.Module(body, [])) if isinstance(node, ast.ImportFrom)}
    assert "PIL" in imported
    assert not [name for name in imported if name is not None and name.startswith("hfft")]
    targets = [
        one for node in body if isinstance(node, ast.Assign) for target in node.targets for one in ast.walk(target)
    ]
    names = Counter(one.id for one in targets if isinstance(one, ast.Name))
    names += Counter(node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    assert {"open_picture", "check_header"} <= set(names)
    assert [name for name, count in names.items() if count > 1] == []
