from dataclasses import replace

import finished
import pytest
from huggingface_hub import ModelCard

from hfft.report.card import render_card
from hfft.report.metadata import card_data
from hfft.runs.facts import Example, SourceFacts, read_facts

NASTY = "a: [b] # `c` | 'd' \"e\" 猫"


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return read_facts(finished.make_run(tmp_path_factory.mktemp("metadata") / "run"))


def read_back(facts):
    """The metadata as the Hub reads it."""
    return ModelCard(render_card(facts, {})).data


def test_the_results_are_those_of_the_test_images(facts):
    data = read_back(facts)
    assert data.model_name == "run"
    found = {result.metric_type: result for result in data.eval_results}
    assert found["accuracy"].metric_value == 0.75
    assert set(found) == {"accuracy", "balanced_accuracy", "f1", "log_loss"}
    assert (found["f1"].metric_name, found["f1"].metric_args) == ("macro F1", {"average": "macro"})
    for result in data.eval_results:
        assert result.task_type == "image-classification"
        assert (result.dataset_type, result.dataset_name) == ("somewhere/photos", "somewhere/photos")
        assert result.dataset_split == "test"


def test_without_test_images_they_are_those_of_validation_or_none(tmp_path):
    run = finished.make_run(tmp_path / "a", counts={"train": 8, "validation": 4})
    assert {result.dataset_split for result in read_back(read_facts(run)).eval_results} == {"validation"}
    run = finished.make_run(tmp_path / "b", counts={"train": 8})
    assert read_back(read_facts(run)).eval_results is None


def test_hub_ids_are_named_with_their_relation(facts):
    data = read_back(facts).to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("somewhere/base", "finetune")
    assert data["datasets"] == ["somewhere/photos"]
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "image-classification")
    assert data["tags"] == ["hfft", "image-classification", "vit"]


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_what_is_not_on_the_hub_is_no_base_and_no_data_set(facts, kind):
    source = SourceFacts(kind, "owner-like", None)
    data = read_back(replace(facts, checkpoint=source, data=source))
    assert {"base_model", "base_model_relation", "datasets"}.isdisjoint(data.to_dict())
    assert {result.dataset_type for result in data.eval_results} == {"imagefolder"}


def test_an_adapter_says_so_unless_its_base_is_in_the_run(facts):
    data = read_back(replace(facts, adapter_base="somewhere/base")).to_dict()
    assert (data["base_model"], data["base_model_relation"], data["library_name"]) == (
        *("somewhere/base", "adapter"),
        "peft",
    )
    own = read_back(replace(facts, adapter_base="/disk/run/0-head/checkpoint-10"))
    assert {"base_model", "base_model_relation"}.isdisjoint(own.to_dict())
    assert "/disk" not in str(own)


def test_the_licence_is_the_recipes_or_unknown(facts):
    assert read_back(facts).license == "unknown"
    assert read_back(replace(facts, recipe=replace(facts.recipe, license="CC-BY-4.0"))).license == "cc-by-4.0"


def test_revisions_and_configurations_of_hub_data_are_told(facts):
    recipe = replace(facts.recipe, data=replace(facts.recipe.data, config="small"))
    data = card_data(replace(facts, recipe=recipe, data=SourceFacts("hub", "somewhere/photos", "abc")))
    assert {(result.dataset_config, result.dataset_revision) for result in data.eval_results} == {("small", "abc")}


def test_names_survive_yaml(facts):
    data = read_back(
        replace(facts, data=SourceFacts("local", NASTY, None), examples=(Example("examples/0.jpg", NASTY),))
    )
    assert data.to_dict()["widget"] == [{"src": "examples/0.jpg", "example_title": NASTY}]
    assert {result.dataset_name for result in data.eval_results} == {NASTY}
    assert "widget" not in read_back(facts).to_dict()
