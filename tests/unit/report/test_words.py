from dataclasses import replace

import finished
import pytest

from hfft.recipe.loading import dump_recipe, load_recipe
from hfft.recipe.spec import AdapterSpec, PhaseSpec
from hfft.report.words import (
    for_all_phases,
    how_trained,
    machine_in_words,
    rates,
    shared_recipe,
    time_in_words,
    trained_parts,
)
from hfft.runs.facts import read_facts
from hfft.runs.record import Group


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.31, "0.3 s"),
        (9.9, "9.9 s"),
        (42.4, "42 s"),
        (59.7, "1 min 0 s"),
        (119.6, "2 min 0 s"),
        (3599.8, "1 h 0 min"),
    ],
)
def test_durations(seconds, words):
    assert time_in_words(seconds) == words


def test_more_than_a_day_is_hours():
    assert time_in_words(26 * 3600 + 59 * 60) == "26 h 59 min"


def group(part, rate):
    return Group(part, ("x",), rate, 0.0)


def test_rates_are_one_or_the_highest_and_the_lowest():
    assert rates((group("norm", 1e-3), group("head", 1e-3))) == "0.001"
    assert rates((group("stem", 1e-5), group("block 0", 2e-4), group("head", 1e-3))) == "0.001 (head) to 1e-05 (stem)"
    assert rates((group("head", None),)) == "unknown"


def test_an_adapter_is_described():
    adapter = AdapterSpec(method="dora", r=4, lora_alpha=8)
    spec = PhaseSpec(name="p", adapter=adapter)
    assert trained_parts(spec, "adapter in block 3 of 4, head") == (
        "adapter in block 3 of 4, head (dora on attention, r 4, lora_alpha 8, then added to the weights)"
    )
    assert trained_parts(replace(spec, adapter=replace(adapter, merge=False)), "x").endswith("kept apart)")


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    home = tmp_path_factory.mktemp("words") / "alice" / "secret"
    (home / "photos").mkdir(parents=True)
    (home / "vit").mkdir()
    return read_facts(
        finished.make_run(
            home / "run",
            model={"checkpoint": str(home / "vit")},
            data={"source": str(home / "photos"), "image_folder": str(home / "pictures")},
            output_dir=str(home / "runs"),
            replay={"folder": str(home / "recordings")},
            training={"run_name": str(home / "logs"), "lr_scheduler_type": "cosine"},
        )
    )


def test_a_phase_in_sentences(facts):
    words = how_trained(facts.phases[0])
    assert words.startswith(
        "Trained blocks 2-3 of 4, head: 1,234 of 56,789 parameters. 20 steps of 8 images (2 epochs)"
    )
    assert "learning rate 0.001 (head) to 0.0002 (block 2), cosine schedule, weight decay 0.01." in words
    assert words.endswith("The weights of step 10 were kept, the best by accuracy on validation (0.7500).")


def test_a_phase_that_stopped_early_or_had_nothing_to_be_judged_by(facts):
    phase = facts.phases[0]
    assert "15 of 20 planned steps of 8" in how_trained(replace(phase, result=replace(phase.result, steps=15)))
    assert "kept" not in how_trained(replace(phase, result=replace(phase.result, metrics={})))
    assert how_trained(replace(phase, engine="onnxruntime")).endswith("computed once and replayed.")


def test_augmentation_and_balance_are_told(facts):
    assert for_all_phases(facts.recipe) == ""
    content = {"name": "r", "model": {"checkpoint": "c"}, "phases": [{"name": "head"}], "class_weights": "balanced"}
    augment = {"crop": [0.6, 1.0], "flip": "both", "randaugment": 5, "mixup": 0.2}
    loaded = load_recipe({**content, "data": {"source": "d", "augment": augment}, "loss": {"name": "focal"}})
    assert for_all_phases(loaded) == (
        "Training images were augmented: random crops of 0.6 to 1 of the area, horizontal and vertical flips, "
        "RandAugment of magnitude 5, mixup with alpha 0.2. In all phases: class weights balanced, focal loss."
    )
    others = {"trivialaugment": True, "rotate90": True, "color": 0.4, "erasing": 0.25, "cutmix": 1.0}
    loaded = load_recipe({**content, "data": {"source": "d", "augment": others}, "class_weights": None})
    assert for_all_phases(loaded) == (
        "Training images were augmented: turns by multiples of 90 degrees, TrivialAugment Wide, brightness, contrast "
        "and saturation changed by up to 40%, rectangles erased in 25% of the images, CutMix with alpha 1."
    )
    flipped = load_recipe({**content, "data": {"source": "d", "augment": {"flip": True}}, "class_weights": None})
    assert for_all_phases(flipped) == "Training images were augmented: horizontal flips."
    sampled = load_recipe({**content, "data": {"source": "d"}, "class_weights": {"a": 2.0}, "sampler": "sqrt"})
    assert for_all_phases(sampled) == "In all phases: class weights given by class, sqrt sampling."


def test_the_shared_recipe_tells_nothing_of_the_disk(facts):
    text = dump_recipe(shared_recipe(facts))
    assert "alice" in dump_recipe(facts.recipe)
    assert not {"alice", "secret"} & set(text.replace("/", " ").split())
    assert "/" not in text
    for line in (
        "checkpoint: vit",
        "source: photos",
        "image_folder: pictures",
        "folder: recordings",
        "run_name: logs",
    ):
        assert line in text


def test_hub_ids_and_other_words_stay_in_the_shared_recipe(tmp_path):
    run = finished.make_run(tmp_path / "run", training={"report_to": "none", "run_name": "my/run"})
    text = dump_recipe(shared_recipe(read_facts(run)))
    assert "checkpoint: somewhere/base" in text
    assert "source: somewhere/photos" in text
    assert "run_name: my/run" in text


def test_machines():
    environment = {"device": "cpu", "hardware": "AMD EPYC", "cores": 2, "processes": 1}
    assert machine_in_words(environment) == "cpu (AMD EPYC, 2 cores)"
    assert machine_in_words({**environment, "processes": 4}) == "4 processes on cpu (AMD EPYC, 2 cores each)"
    gpus = {"device": "cuda:0", "hardware": "NVIDIA A100", "cores": 12, "processes": 8}
    assert machine_in_words(gpus) == "8 processes on cuda (NVIDIA A100)"
