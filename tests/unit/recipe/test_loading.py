import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hub_server
import pytest

from hfft.errors import RecipeError
from hfft.recipe.augment import PRESETS, AugmentSpec
from hfft.recipe.loading import dump_recipe, load_recipe
from hfft.recipe.spec import AdapterSpec, DataSpec, ModelSpec, PhaseSpec, Recipe, SplitSpec

REPOSITORY = Path(__file__).parents[3]
SMALL = {
    "name": "small",
    "model": {"checkpoint": "some/model"},
    "data": {"source": "images"},
    "phases": [{"name": "head"}],
}
ABSENT = object()
PARTS = "{blocks: N}, {stages: N}, {layers: N}, {blocks: first N} or {parts: [stem, block 0, norm, head, ...]}"
UNFREEZE = f"head, norm, bias, all, {PARTS}"
SPLIT = "the name of a split of the source, a fraction between 0 and 1 carved from train"
AVERAGE = "allowed: {ema: D} with D between 0 and 1, or {last: K}, {best: K} or {soup: K} with K above 1"
CROP = "[smallest, largest] share of the image's area, with 0 < smallest <= largest <= 1"
PHASE_KEYS = (
    "adapter, average, batchnorm, early_stopping, gradual, head_learning_rate, layer_decay, name, solver, unfreeze"
)


def changed(changes):
    """SMALL with dotted paths set; `phases.0.x` is a key of its only phase."""
    content = copy.deepcopy(SMALL)
    for path, value in changes.items():
        *before, last = path.split(".")
        node = content
        for key in before:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        if value is ABSENT:
            del node[last]
        else:
            node[int(last) if isinstance(node, list) else last] = value
    return content


def problems(source, overrides=()):
    """The lines below the first of the message, which counts them."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    first, *lines = str(caught.value).splitlines()
    where = "recipe" if isinstance(source, dict) else source
    assert first == f"{where}: {'1 problem' if len(lines) == 1 else f'{len(lines)} problems'}"
    return [line.removeprefix("  ") for line in lines]


def written(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


INVALID = [
    # keys
    ({"nmae": "x"}, "nmae: unknown key; did you mean 'name'?"),
    (
        {"zzz": 1},
        "zzz: unknown key; allowed: class_weights, data, ",
    ),
    ({"name": ABSENT}, "name: this key is required"),
    ({"model": ABSENT}, "model: this key is required"),
    ({"data": ABSENT}, "data: this key is required"),
    ({"phases": ABSENT}, "phases: this key is required"),
    ({"model.checkpoint": ABSENT}, "model.checkpoint: this key is required"),
    ({"model.chekpoint": "y"}, "model.chekpoint: unknown key; did you mean 'checkpoint'?"),
    ({"replay.view": 2}, "replay.view: unknown key; did you mean 'views'?"),
    ({"novelty": True, "data.splits.validation": None}, "novelty: needs data.splits.validation"),
    ({"retain.measur": False}, "retain.measur: unknown key; did you mean 'measure'?"),
    ({"retain.interpolate": 1.5}, "retain.interpolate: found 1.5; allowed: less than or equal to 1 or 'auto'"),
    ({"retain.interpolate": 0.5}, "retain.interpolate: needs a phase that trains more than the head"),
    (
        {"retain.interpolate": 0.5, "phases.0.unfreeze": "all"},
        "retain.interpolate: needs a first phase that trains the head alone",
    ),
    (
        {"retain.interpolate": 0, "phases": [{"name": "head"}, {"name": "lora", "adapter": {"merge": False}}]},
        "retain.interpolate: needs an adapter that is merged (adapter.merge: true)",
    ),
    (
        {
            "retain.interpolate": "auto",
            "phases": [{"name": "head"}, {"name": "all", "unfreeze": "all"}],
            "data.splits.validation": None,
        },
        "retain.interpolate: 'auto' needs data.splits.validation",
    ),
    ({"replay.views": 0}, "replay.views: found 0; allowed: greater than 0 or 'auto'"),
    ({"replay.budget": "much"}, "replay.budget: found 'much'; allowed: a number of bytes with its unit"),
    ({"replay.engine": "tensorrt"}, "replay.engine: found 'tensorrt'; allowed: 'auto', 'torch' or 'onnxruntime'"),
    (
        {"license": "CC BY 4.0"},
        "license: found 'CC BY 4.0'; allowed: an identifier of https://huggingface.co/docs/hub/repositories-licenses, "
        "as the Hub refuses others, or 'other'; did you mean 'cc-by-4.0'?",
    ),
    (
        {"license": "Apache2"},
        "license: found 'Apache2'; allowed: an identifier of https://huggingface.co/docs/hub/repositories-licenses, "
        "as the Hub refuses others, or 'other'; did you mean 'apache-2.0'?",
    ),
    ({"license": ""}, "license: found ''; allowed: an identifier of https://huggingface.co/docs/hub/repositories-lic"),
    ({"widget": 0}, "widget: found 0; allowed: greater than 0"),
    ({"widget": 1000}, "widget: found 1000; allowed: less than or equal to 20"),
    ({"precision": "float16"}, "precision: found 'float16'; allowed: 'auto', 'float32' or 'bfloat16'"),
    ({"phases.0.learning_rate": "fast"}, "phases.head.learning_rate: found 'fast'; allowed: a valid number"),
    ({"phases.0.learning_rate": "auto"}, "phases.head.learning_rate: found 'auto'; allowed: a number above 0; a head"),
    ({"phases.0.solver": "sgd"}, "phases.head.solver: found 'sgd'; allowed: 'auto', 'lbfgs' or 'steps'"),
    ({"data.splits.valid": 0.1}, "data.splits.valid: unknown key; did you mean 'validation'?"),
    ({"data.augment.blur": 1.0}, "data.augment.blur: unknown key; allowed: augmix, color, crop, cutmix, erasing"),
    ({"data.augment.presets": "light"}, "data.augment.presets: unknown key; did you mean 'preset'?"),
    ({"data.augment": "heavy"}, "data.augment: found 'heavy'; allowed: keys with values, or a preset: none, light"),
    ({"data.augment.preset": 2}, "data.augment: found {'preset': 2}; allowed: keys with values, or a preset: none"),
    ({"data.augment.augmix": 11}, "data.augment.augmix: found 11; allowed: less than or equal to 10"),
    ({"data.augment.color": 1.5}, "data.augment.color: found 1.5; allowed: less than or equal to 1"),
    ({"data.augment.erasing": -0.1}, "data.augment.erasing: found -0.1; allowed: greater than or equal to 0"),
    ({"data.augment.cutmix": "on"}, "data.augment.cutmix: found 'on'; allowed: a valid number"),
    ({"data.augment.rotate90": 90}, "data.augment.rotate90: found 90; allowed: a valid boolean"),
    (
        {"data.augment": {"preset": "strong", "randaugment": 9}},
        "data.augment: found randaugment and trivialaugment; allowed: one of randaugment, trivialaugment, augmix",
    ),
    ({"phases.0.name": ABSENT}, "phases.0.name: this key is required"),
    ({"phases.0.unfreez": "all"}, "phases.head.unfreez: unknown key; did you mean 'unfreeze'?"),
    ({"phases.0.learningrate": 1.0}, "phases.head.learningrate: unknown key; did you mean 'learning_rate'?"),
    ({"phases.0.save_step": 5}, "phases.head.save_step: unknown key; did you mean 'max_steps'?"),
    (
        {"phases.0.arguments": {"learning_rate": 1.0}},
        f"phases.head.arguments: unknown key; allowed: {PHASE_KEYS} and the fields of transformers.TrainingArguments",
    ),
    (
        {"phases.0.adapter": {"rank": 8}},
        "phases.head.adapter.rank: unknown key; allowed: blocks, lora_alpha, lora_dropout, merge, method, on, r",
    ),
    ({"training.learningrate": 1.0}, "training.learningrate: unknown key; did you mean 'learning_rate'?"),
    (
        {"training.zzzzzz": 1},
        "training.zzzzzz: unknown key; allowed: the fields of transformers.TrainingArguments",
    ),
    ({"training": {1: 2}}, "training.1: unknown key; allowed: the fields of transformers.TrainingArguments"),
    # types
    ({"name": 3}, "name: found 3; allowed: a valid string"),
    ({"name": None}, "name: found None; allowed: a valid string"),
    ({"model": "some/model"}, "model: found 'some/model'; allowed: keys with values"),
    ({"model.image_size": 1.5}, "model.image_size: found 1.5; allowed: a valid integer"),
    ({"model.trust_remote_code": "yes"}, "model.trust_remote_code: found 'yes'; allowed: a valid boolean"),
    ({"data.splits": 0.2}, "data.splits: found 0.2; allowed: keys with values"),
    ({"data.augment.mixup": "much"}, "data.augment.mixup: found 'much'; allowed: a valid number"),
    ({"phases": None}, "phases: found None; allowed: a list of at least one phase"),
    ({"phases": {"head": {}}}, "phases: found {'head': {}}; allowed: a list of at least one phase"),
    ({"phases": ["head"]}, "phases.0: found 'head'; allowed: keys with values"),
    ({"phases.0.name": ["head"]}, "phases.0.name: found ['head']; allowed: a valid string"),
    ({"phases.0.adapter": "lora"}, "phases.head.adapter: found 'lora'; allowed: keys with values"),
    ({"phases.0.early_stopping": 1.0}, "phases.head.early_stopping: found 1.0; allowed: a valid integer"),
    ({"phases.0.learning_rate": "fast"}, "phases.head.learning_rate: found 'fast'; allowed: a valid number"),
    ({"training": [1]}, "training: found [1]; allowed: keys with values"),
    ({"training.bf16": "yes"}, "training.bf16: found 'yes'; allowed: a valid boolean"),
    ({"training.max_steps": 1.5}, "training.max_steps: found 1.5; allowed: a valid integer"),
    ({"training.optim": 3}, "training.optim: found 3; allowed: a valid string"),
    ({"output_dir": None}, "output_dir: found None; allowed: a valid string"),
    # values
    ({"name": "a b"}, "name: found 'a b'; allowed are letters, digits, '-' and '_', starting with a letter or digit"),
    ({"name": "../up"}, "name: found '../up'; allowed are letters, digits, '-' and '_'"),
    ({"seed": -1}, "seed: found -1; allowed: greater than or equal to 0"),
    ({"seed": 2**32}, "seed: found 4294967296; allowed: less than 4294967296"),
    ({"model.image_size": 0}, "model.image_size: found 0; allowed: greater than 0"),
    ({"model.head": "xavier"}, "model.head: found 'xavier'; allowed: 'zero' or 'normal'"),
    ({"data.splits.validation": 1.5}, f"data.splits.validation: found 1.5; allowed: {SPLIT}"),
    ({"data.splits.test": 0}, f"data.splits.test: found 0; allowed: {SPLIT}"),
    ({"data.splits.test": ""}, f"data.splits.test: found ''; allowed: {SPLIT}"),
    ({"data.splits.validation": 0.5, "data.splits.test": 0.5}, "data.splits: the fractions [0.5, 0.5] leave nothing"),
    ({"data.augment.crop": [0.5]}, f"data.augment.crop: found [0.5]; allowed: {CROP}"),
    ({"data.augment.crop": [0.9, 0.5]}, f"data.augment.crop: found [0.9, 0.5]; allowed: {CROP}"),
    ({"data.augment.crop": [0.5, 1.5]}, f"data.augment.crop: found [0.5, 1.5]; allowed: {CROP}"),
    ({"data.augment.crop": ["a", "b"]}, f"data.augment.crop: found ['a', 'b']; allowed: {CROP}"),
    (
        {"data.augment.flip": "diagonal"},
        "data.augment.flip: found 'diagonal'; allowed: a valid boolean or 'horizontal', 'vertical' or 'both'",
    ),
    ({"data.augment.randaugment": 31}, "data.augment.randaugment: found 31; allowed: less than or equal to 30"),
    ({"data.augment.mixup": -0.1}, "data.augment.mixup: found -0.1; allowed: greater than or equal to 0"),
    ({"data.augment.mixup": float("inf")}, "data.augment.mixup: found inf; allowed: a finite number"),
    ({"phases": []}, "phases: found []; allowed: a list of at least one phase"),
    ({"phases.0.unfreeze": "heads"}, f"phases.head.unfreeze: found 'heads'; allowed: {UNFREEZE}"),
    ({"phases.0.unfreeze": {"blocks": 0}}, f"phases.head.unfreeze: found {{'blocks': 0}}; allowed: {UNFREEZE}"),
    ({"phases.0.unfreeze": {"blocks": True}}, f"phases.head.unfreeze: found {{'blocks': True}}; allowed: {UNFREEZE}"),
    ({"phases.0.unfreeze": {"block": 1}}, f"phases.head.unfreeze: found {{'block': 1}}; allowed: {UNFREEZE}"),
    (
        {"phases.0.unfreeze": {"parts": "stem"}},
        f"phases.head.unfreeze: found {{'parts': 'stem'}}; allowed: {UNFREEZE}",
    ),
    ({"phases.0.average": {"ema": 1.0}}, f"phases.head.average: found {{'ema': 1.0}}; {AVERAGE}"),
    ({"phases.0.average": {"last": 1}}, f"phases.head.average: found {{'last': 1}}; {AVERAGE}"),
    (
        {"phases.0.average": {"ema": 0.9, "last": 2}},
        f"phases.head.average: found {{'ema': 0.9, 'last': 2}}; {AVERAGE}",
    ),
    ({"phases.0.layer_decay": 0}, "phases.head.layer_decay: found 0; allowed: greater than 0"),
    ({"phases.0.layer_decay": 1.5}, "phases.head.layer_decay: found 1.5; allowed: less than or equal to 1"),
    ({"phases.0.batchnorm": "off"}, "phases.head.batchnorm: found 'off'; allowed: 'eval', 'train' or 'sync'"),
    ({"phases.0.early_stopping": 0}, "phases.head.early_stopping: found 0; allowed: greater than 0"),
    (
        {"phases.0.adapter": {"method": "lokr"}},
        "phases.head.adapter.method: found 'lokr'; allowed: 'lora', 'dora', 'rslora', 'pissa', 'ia3' or 'vera'",
    ),
    ({"phases.0.adapter": {"blocks": 0}}, "phases.head.adapter.blocks: found 0; allowed: greater than 0 or 'all'"),
    ({"phases.0.adapter": {"lora_dropout": 1.0}}, "phases.head.adapter.lora_dropout: found 1.0; allowed: less than 1"),
    ({"phases.0.learning_rate": 0}, "phases.head.learning_rate: found 0; allowed: a number above 0"),
    ({"phases.0.learning_rate": float("nan")}, "phases.head.learning_rate: found nan; allowed: a number above 0"),
    ({"training.learning_rate": float("inf")}, "training.learning_rate: found inf; allowed: a number above 0"),
    ({"training.num_train_epochs": -1}, "training.num_train_epochs: found -1; allowed: a number above 0"),
    # contradictions
    (
        {"phases": [{"name": "a"}, {"name": "a"}]},
        "phases: two phases are called 'a'; each needs a name of its own",
    ),
    (
        {"phases.0.adapter": {}, "phases.0.unfreeze": "all"},
        "phases.head: an adapter trains together with the head only",
    ),
    (
        {"phases.0.adapter": {"method": "ia3", "r": 4}},
        "phases.head.adapter.r: the method 'ia3' has none; leave it out",
    ),
    ({"phases.0.adapter": {"method": "vera", "lora_alpha": 4}}, "phases.head.adapter.lora_alpha: the method 'vera'"),
    (
        {"phases": [{"name": "a", "adapter": {"merge": False}}, {"name": "b"}]},
        "phases.a.adapter.merge: only the last phase can leave its adapter apart",
    ),
    ({"phases.0.gradual": {"blocks_per_phase": 0}}, "phases.head.gradual.blocks_per_phase: found 0; allowed: greater"),
    ({"phases.0.gradual": {"blocks": 2}}, "phases.head.gradual.blocks_per_phase: this key is required"),
    (
        {"phases.0.gradual": {"blocks_per_phase": 1}, "phases.0.unfreeze": "all"},
        "phases.head: gradual says which blocks are released; leave unfreeze and adapter out",
    ),
    ({"phases.0.head_learning_rate": 0}, "phases.head.head_learning_rate: found 0; allowed: greater than 0"),
    ({"class_weights": "equal"}, "class_weights: found 'equal'; allowed: 'balanced'"),
    ({"phases.0.batchnorm": "train"}, "phases.head.batchnorm: 'train' is for released blocks"),
    ({"phases.0.adapter": {}, "phases.0.batchnorm": "train"}, "phases.head.batchnorm: 'train' is for released blocks"),
    (
        {"phases.0.unfreeze": {"blocks": "first 0"}},
        f"phases.head.unfreeze: found {{'blocks': 'first 0'}}; allowed: {UNFREEZE}",
    ),
    (
        {"phases.0.unfreeze": {"stages": "first 1"}},
        f"phases.head.unfreeze: found {{'stages': 'first 1'}}; allowed: {UNFREEZE}",
    ),
    ({"phases.0.adapter": {}, "phases.0.layer_decay": 0.5}, "phases.head: layer_decay is for unfrozen blocks"),
    (
        {"phases.0.early_stopping": 2, "data.splits.validation": None},
        "phases.head.early_stopping: needs data.splits.validation",
    ),
    ({"phases.0.average": {"best": 3}, "data.splits.validation": None}, "phases.head.average.best: needs data.splits"),
    (
        {"phases.0.average": {"soup": 3}, "training.eval_strategy": "no"},
        "phases.head.average.soup: needs an eval_strategy other than 'no'",
    ),
    (
        {"phases.0.early_stopping": 2, "training.eval_strategy": "no"},
        "phases.head.early_stopping: needs an eval_strategy other than 'no'",
    ),
]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(("changes", "message"), INVALID, ids=[message[:60] for _, message in INVALID])
def test_an_invalid_recipe_says_where_what_was_found_and_what_is_allowed(changes, message):
    (line,) = problems(changed(changes))
    assert line.startswith(message)


def test_the_base_of_the_table_is_valid():
    recipe = load_recipe(SMALL)
    assert recipe == Recipe(
        name="small",
        model=ModelSpec(checkpoint="some/model"),
        data=DataSpec(source="images"),
        phases=(PhaseSpec(name="head"),),
    )


def test_all_problems_of_a_file_come_together(tmp_path):
    path = written(
        tmp_path,
        """
nmae: x
model: {checkpoint: c, head: xavier}
data: {source: d, augment: {flip: diagonal}}
training: {optimizer: sgd, seed: 3}
phases:
  - {name: a, unfreeze: heads, learning_rates: 1.0}
  - {name: b, adapter: {r: 0}, weight_decay: none}
seed: -1
""",
    )
    paths = {line.partition(": ")[0] for line in problems(path)}
    assert paths == {
        "nmae",
        "name",
        "model.head",
        "data.augment.flip",
        "training.optimizer",
        "training.seed",
        "phases.a.unfreeze",
        "phases.a.learning_rates",
        "phases.b.adapter.r",
        "phases.b.weight_decay",
        "seed",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nseed: 1\nname: b\n", ':3: not valid YAML: found duplicate key "name" with value "b"'),
        (
            "name: a\nphases:\n- {name: h, unfreeze: all, unfreeze: head}\n",
            ':3: not valid YAML: found duplicate key "un',
        ),
        ("name: [a\n", ":2: not valid YAML: "),
        ("name: a\n\tseed: 1\n", ":2: not valid YAML: "),
        ("name: !secret a\n", ":1: not valid YAML: could not determine a constructor for the tag '!secret'"),
        ("seed: !!python/object/apply:os.getcwd []\n", ":1: not valid YAML: could not determine a constructor"),
        ("seed: !!int many\n", ": not valid YAML: invalid literal"),
        ("name: 2024-13-45\n", ": not valid YAML: month must be in 1..12"),
        ("name: a\n---\nname: b\n", "not valid YAML: but found another document"),
        ("", ": a recipe is a mapping of keys to values, found nothing"),
        ("- name: a\n", ": a recipe is a mapping of keys to values, found a list"),
        ("some words", ": a recipe is a mapping of keys to values, found text"),
        ("7", ": a recipe is a mapping of keys to values, found a number"),
        ("? [a, b]\n: 1\n", ": not a recipe: keys must be str"),
        ("training: &t {optim_args: *t}\n", ": not a recipe: more than 100,000 values or 10,000,000 letters, aliases"),
        (BOMB, ": not a recipe: more than 100,000 values or 10,000,000 letters, aliases counted each time, or nested"),
        (f"a: &a {'x' * 200_000}\nb: [{', '.join(['*a'] * 60)}]\n", ": not a recipe: more than 100,000 values or 10,"),
        (f"a: {'[' * 60}{']' * 60}\n", "or nested more than 50 deep"),
        ("[" * 3000, ": not a recipe: nested too deeply"),
        ("%YAML 9.9\n---\nname: a\n", ": not valid YAML: "),
        ("<<: {{a: 1}: 2}\n", ": not "),
    ],
)
def test_a_file_that_is_no_recipe(text, message, tmp_path):
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("name: Zürich".encode("latin-1"))
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(RecipeError, match=r"the recipe can't be read|is a folder") as caught:
            load_recipe(path)
        assert str(path) in str(caught.value)


def test_yaml_1_2_numbers_and_words(tmp_path):
    path = written(
        tmp_path,
        """
name: numbers
seed: 0o17
model: {checkpoint: yes}
data: {source: on}
training: {weight_decay: 5e-2, adam_epsilon: 1E-8, run_name: 2024-11-05}
phases:
  - {name: lora, adapter: {on: attention}, learning_rate: 1e-5, num_train_epochs: 2}
""",
    )
    recipe = load_recipe(path)
    assert recipe.seed == 15
    assert (recipe.model.checkpoint, recipe.data.source) == ("yes", "on")
    (phase,) = recipe.phases
    assert phase.adapter == AdapterSpec(on="attention")
    assert phase.arguments == {
        "weight_decay": 0.05,
        "adam_epsilon": 1e-8,
        "run_name": "2024-11-05",
        "learning_rate": 0.00001,
        "num_train_epochs": 2,
    }


def test_a_phase_repeats_fields_of_training():
    training = {"learning_rate": 0.1, "weight_decay": 0.05}
    content = changed({"training": training, "phases": [{"name": "a"}, {"name": "b", "learning_rate": 0.2}]})
    recipe = load_recipe(content)
    assert recipe.training == training
    assert recipe.phases[0].arguments == {"learning_rate": 0.1, "weight_decay": 0.05}
    assert recipe.phases[1].arguments == {"learning_rate": 0.2, "weight_decay": 0.05}


def test_null_training_is_none_at_all():
    assert load_recipe(changed({"training": None})) == load_recipe(SMALL)


def test_a_mapping_may_hold_paths_and_tuples_and_is_left_alone():
    content = changed({"data": {"source": Path("a/b"), "augment": {"crop": (0.5, 1)}}})
    before = copy.deepcopy(content)
    recipe = load_recipe(content, ["data.config=x", "phases.head.unfreeze=all"])
    assert recipe.data == DataSpec(source="a/b", config="x", augment=AugmentSpec(crop=(0.5, 1.0)))
    assert content == before


def test_overrides_reach_sections_that_are_not_there_and_phases_by_name():
    two = changed({"phases": [{"name": "head"}, {"name": "rest", "unfreeze": "all"}]})
    recipe = load_recipe(
        two,
        [
            "seed=3",
            "model.image_size=64",
            "data.splits.validation=0.25",
            "data.augment.crop=[0.5, 1.0]",
            "training.weight_decay=1e-2",
            "phases.rest.learning_rate=5e-4",
            "phases.rest.unfreeze={blocks: 2}",
            "output_dir=a=b",
        ],
    )
    assert (recipe.seed, recipe.model.image_size, recipe.output_dir) == (3, 64, "a=b")
    assert recipe.data.splits == SplitSpec(validation=0.25)
    assert recipe.data.augment.crop == (0.5, 1.0)
    head, rest = recipe.phases
    assert (head.arguments, head.unfreeze) == ({"weight_decay": 0.01}, "head")
    assert (rest.arguments, rest.unfreeze) == ({"weight_decay": 0.01, "learning_rate": 0.0005}, {"blocks": 2})


def test_a_license_is_written_as_on_the_hub():
    for text in ("Apache-2.0", "cc-by-nc-sa-4.0", "OpenRAIL++", *hub_server.LICENSES):
        recipe = load_recipe(changed({"license": text}))
        assert recipe.license == text.lower()
    assert load_recipe(SMALL).license is None


def test_the_last_of_two_overrides_counts():
    assert load_recipe(SMALL, ["seed=1", "seed=2"]).seed == 2


def test_overrides_are_checked_like_the_file():
    lines = problems(SMALL, ["seed=-1", "data.source=null", "training.lerning_rate=1"])
    assert sorted(lines) == [
        "data.source: found None; allowed: a valid string",
        "seed: found -1; allowed: greater than or equal to 0",
        "training.lerning_rate: unknown key; did you mean 'learning_rate'?",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("data..source=x", "write it as key=value"),
        ("phases.body.learning_rate=1", "no phase is called 'body'; the phases are: head"),
        ("phases.0.learning_rate=1", "no phase is called '0'; the phases are: head"),
        ("phases.head=3", "phases has no keys"),
        ("name.first=x", "name has no keys"),
        ("name.first.second=x", "there is nothing to set below 'first'"),
        ("seed=[1", "not valid YAML"),
        ("name=a: b: c", "not valid YAML"),
        ("name=2024-13-45", "not valid YAML"),
    ],
)
def test_an_override_that_makes_no_sense(override, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(SMALL, [override])
    assert str(caught.value).startswith(f"override {override!r}")
    assert message in str(caught.value)


LARGE = Recipe(
    name="1e-5",
    model=ModelSpec(checkpoint="~/a b: c", revision="0123", image_size=64, head="normal", trust_remote_code=True),
    data=DataSpec(
        source="2024-11-05",
        config="null",
        image_column="on",
        label_column="- é",
        splits=SplitSpec(train="training", validation=0.1, test=None),
        augment=AugmentSpec(crop=(0.5, 1.0), flip="both", randaugment=9, mixup=0.2),
    ),
    training={
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "optim_args": "a=1",
        "lr_scheduler_kwargs": {"min_lr": 1e-9},
    },
    phases=(
        PhaseSpec(name="head", arguments={"learning_rate": 1e-3, "weight_decay": 0.1}),
        PhaseSpec(name="parts", unfreeze={"parts": ("stem", "block 0")}, early_stopping=2, batchnorm="train"),
        PhaseSpec(name="deep", unfreeze={"layers": 3}, layer_decay=0.75, arguments={"learning_rate": 2e-5}),
        PhaseSpec(name="null", arguments={"optim_args": None, "run_name": None}),
        PhaseSpec(name="lora", adapter=AdapterSpec()),
        PhaseSpec(name="dora", adapter=AdapterSpec(method="dora", on="mlp", blocks=2, r=4, lora_dropout=0.1)),
    ),
    seed=7,
    output_dir="  out: #1  ",
)


def test_a_dumped_recipe_loads_as_an_equal_one(tmp_path):
    phases = [replace(phase, arguments={**LARGE.training, **phase.arguments}) for phase in LARGE.phases]
    recipe = replace(LARGE, phases=tuple(phases))
    again = load_recipe(written(tmp_path, dump_recipe(recipe)))
    assert again == recipe
    assert again.phases[3].arguments["optim_args"] is None
    assert "run_name" in again.phases[3].arguments


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_survives_a_dump(path, tmp_path):
    recipe = load_recipe(path)
    assert load_recipe(written(tmp_path, dump_recipe(recipe))) == recipe


def test_a_dump_leaves_defaults_and_repetitions_out():
    text = dump_recipe(load_recipe(changed({"training.weight_decay": 0.1, "phases.0.learning_rate": 0.01})))
    assert json.loads(json.dumps(load_yaml(text))) == {
        **SMALL,
        "training": {"weight_decay": 0.1},
        "phases": [{"name": "head", "learning_rate": 0.01}],
    }


def load_yaml(text):
    from ruamel.yaml import YAML

    return YAML(typ="safe").load(text)


@pytest.mark.parametrize(
    "statement",
    [
        "import hfft.recipe.loading",
        "import hfft",
        "import hfft.cli",
        "from hfft import load_recipe; load_recipe('{recipe}')",
    ],
)
def test_reading_a_recipe_imports_neither_torch_nor_transformers(statement, tmp_path):
    recipe = written(tmp_path, json.dumps(SMALL))
    code = (
        f"{statement.format(recipe=recipe)}\nimport sys; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "[]\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train", "--help"], ["train", "no-such-recipe.yaml"]]
)
def test_the_command_line_starts_without_torch(arguments, tmp_path):
    code = (
        "import sys, hfft.cli\n"
        "try:\n    hfft.cli.main(sys.argv[1:])\n"
        "except SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout + done.stderr


def augmented(augment, *overrides):
    content = {"name": "r", "model": {"checkpoint": "c"}, "phases": [{"name": "head"}]}
    return load_recipe({**content, "data": {"source": "d", "augment": augment}}, overrides)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_stands_for_its_keys(name, tmp_path):
    named = augmented(name)
    assert named == augmented({"preset": name}) == augmented(PRESETS[name])
    assert named.data.augment == AugmentSpec(**PRESETS[name])
    (tmp_path / "r.yaml").write_text(dump_recipe(named))
    assert load_recipe(tmp_path / "r.yaml") == named


def test_keys_of_ones_own_change_a_preset():
    changed = augmented({"preset": "standard", "trivialaugment": False, "augmix": 3, "crop": [0.5, 1.0]}).data.augment
    assert changed == AugmentSpec(crop=(0.5, 1.0), flip=True, augmix=3)
    assert augmented("light", "data.augment.flip=both").data.augment == AugmentSpec(crop=(0.64, 1.0), flip="both")
    assert augmented({"flip": True}, "data.augment=none").data.augment == AugmentSpec()


def test_comments_stand_beside_their_values_and_change_nothing(tmp_path):
    phases = [{"name": "head", "learning_rate": 1e-5}, {"name": "last", "unfreeze": {"blocks": 3}}]
    recipe = load_recipe({"name": "a", "model": {"checkpoint": "b"}, "data": {"source": "c"}, "phases": phases})
    reasons = {"": "asked so", "model.checkpoint": "why: 'b' # or c", "phases.last.unfreeze": "three", "phases.x": "-"}
    text = dump_recipe(recipe, reasons)
    assert text.startswith("# asked so\n")
    assert "  checkpoint: b # why: 'b' # or c\n" in text
    assert "  unfreeze: # three\n    blocks: 3\n" in text
    (tmp_path / "r.yaml").write_text(text)
    assert load_recipe(tmp_path / "r.yaml") == recipe
