from dataclasses import replace

from huggingface_hub import ModelCard

from hfft.recipe.loading import load_recipe
from hfft.recipe.spec import AdapterSpec
from hfft.report.card import write_card

RECIPE = load_recipe(
    {
        "name": "cells",
        "model": {"checkpoint": "owner/base"},
        "data": {"source": "somewhere/photos"},
        "phases": [{"name": "head", "num_train_epochs": 3}, {"name": "lora", "adapter": {"method": "lora"}}],
    }
)
METRICS = {
    "validation": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}},
    "test": {"accuracy": {"value": 0.875, "low": 0.8125, "high": 0.9375}},
    "seconds": {},
}
DATA = {
    "splits": {
        "train": {"counts": {"ant": 30, "bee": 10}},
        "validation": {"counts": {"ant": 3, "bee": 1}},
        "test": {"counts": {"ant": 6, "bee": 2}},
    }
}


def test_the_card_shows_the_numbers_of_the_run(tmp_path):
    write_card(tmp_path, RECIPE, metrics=METRICS, data=DATA)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    result = card.data.eval_results[0]
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("accuracy", 0.875, "test")
    assert "| test | 8 | 0.8750 (0.8125 to 0.9375) |" in card.text
    assert "| validation | 4 | 0.5000 (0.4000 to 0.6000) |" in card.text
    assert "| ant | 30 |" in card.text
    assert "for ant and bee, fine-tuned from `owner/base`" in card.text
    assert "**lora**: adapter lora on attention" in card.text
    assert "{" not in card.text.replace("{blocks", "")


def test_a_run_without_held_out_images_has_a_card_too(tmp_path):
    data = {"splits": {"train": DATA["splits"]["train"]}}
    write_card(tmp_path, RECIPE, metrics={"seconds": {}}, data=data)
    assert "| bee | 10 |" in ModelCard.load(tmp_path / "README.md").text


def test_the_card_of_an_adapter_says_how_to_open_it(tmp_path):
    phases = [*RECIPE.phases[:1], replace(RECIPE.phases[1], adapter=AdapterSpec(merge=False))]
    write_card(tmp_path, replace(RECIPE, phases=tuple(phases)), metrics=METRICS, data=DATA)
    text = ModelCard.load(tmp_path / "README.md").text
    assert 'hfft.Classifier.from_pretrained("this/folder")  # loads `owner/base` too' in text
    assert "pipeline(" not in text
