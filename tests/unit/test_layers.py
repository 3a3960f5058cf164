import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hfft

PACKAGE = Path(hfft.__file__).parent
# From the lowest to the highest; those in one row don't import each other. A new package needs a place here.
LAYERS = (
    {"errors"},
    {"system"},
    {"recipe"},
    {"runs"},
    {"data", "model"},
    {"replay", "metrics"},
    {"training"},
    {"evaluators"},
    {"inference"},
    {"report"},
    {"hub"},
    {"commands"},
    {"cli"},
)
HEIGHTS = {name: height for height, names in enumerate(LAYERS) for name in names}
EXEMPT = {"hfft", "hfft._version", "hfft.__main__"}


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name, source):
    """Modules that a module imports, anywhere in its text, functions included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(name, source):
    return (imports(name, source) & set(SOURCES)) - EXEMPT - {name}


def layer(name):
    return name.split(".")[1]


def test_the_sources_were_found():
    assert {"hfft", "hfft.cli", "hfft.recipe", "hfft.recipe.spec", "hfft.data.sources.reading"} <= set(SOURCES)
    assert "hfft.recipe.spec" in own_imports("hfft.data.sources.reading", SOURCES["hfft.data.sources.reading"])
    assert "hfft.commands.finetune" in own_imports("hfft.cli.verbs", SOURCES["hfft.cli.verbs"])  # inside of a function


def test_every_module_has_a_layer():
    assert {layer(name) for name in SOURCES if name not in EXEMPT} <= set(HEIGHTS)


def test_a_module_imports_from_lower_layers_only():
    upward = {
        (name.removeprefix("hfft."), other.removeprefix("hfft."))
        for name in set(SOURCES) - EXEMPT
        for other in own_imports(name, SOURCES[name])
        if layer(other) != layer(name) and HEIGHTS[layer(other)] >= HEIGHTS[layer(name)]
    }
    assert upward == set()


def test_modules_within_a_folder_make_no_cycle():
    graph = {
        name: {other for other in own_imports(name, source) if layer(other) == layer(name)}
        for name, source in SOURCES.items()
        if name not in EXEMPT
    }
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) == set(graph)
    with pytest.raises(CycleError):
        list(TopologicalSorter({**graph, "a": {"b"}, "b": {"a"}}).static_order())


def test_a_recipe_needs_neither_torch_nor_transformers():
    heavy = {"torch", "transformers", "datasets", "accelerate", "peft", "torchvision", "evaluate", "huggingface_hub"}
    recipes = [name for name in SOURCES if name.startswith("hfft.recipe")]
    assert len(recipes) >= 4
    for name in recipes:
        assert not {imported.split(".")[0] for imported in imports(name, SOURCES[name])} & heavy


def test_the_command_line_imports_heavy_modules_inside_of_functions_only():
    own = {name for name in SOURCES if name.startswith("hfft.cli")}
    for name in ("hfft", "hfft.__main__", *own):
        tree = ast.parse(SOURCES[name])
        top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        light = {
            f"hfft.{name}"
            for name in ("_version", "errors", "system.signals", "system.lazy_imports", "system.files", "system.text")
        }
        assert {
            other for other in imports(name, ast.unparse(top)) if re.match(r"hfft\.", other) and other in SOURCES
        } <= light | own


def test_the_architecture_page_names_files_that_exist_and_every_room():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:hfft|tests|scripts)/[\w/]+\.\w+", page))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (PACKAGE.parent / name).is_file()] == []
    rooms = {layer(name) for name in SOURCES if name not in EXEMPT}
    assert [room for room in sorted(rooms) if not re.search(rf"\b{room}\b", page)] == []
