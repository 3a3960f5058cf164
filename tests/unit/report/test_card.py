import json
import re
from dataclasses import replace
from pathlib import Path

import finished
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hfft.errors import RunError, TrainingError
from hfft.recipe.loading import load_recipe
from hfft.report.card import REPOSITORY, card_data, render_card, write_report
from hfft.runs.facts import Example, SourceFacts, read_facts

NASTY_YAML = "a: [b] # `c` | 'd' \"e\" 猫"
NASTY = ("a|b", "# `c`", "<b>d</b>", "*e*")
PHASE = {
    "changed": ["block 3"],
    "old_task": {"classes": 1000, "agreement": 0.484, "kl_divergence": 0.3126},
    "knn_accuracy": {"before": 0.8085, "after": 0.8164},
    "head_input": {"cka": 0.9505, "cosine_drift": 0.1147},
}
HEAD = {
    "changed": [],
    "old_task": {"classes": 1000, "agreement": 1.0, "kl_divergence": 0.0},
    "knn_accuracy": {"before": 0.8085, "after": 0.8085},
    "head_input": {"cka": 1.0, "cosine_drift": 0.0},
}
SAMPLE = {"split": "validation", "images": 200}
INTERPOLATION = {"alpha": 0.3, "metric": "log_loss", "images": 394, "curve": []}
PARSER = MarkdownIt("gfm-like", {"linkify": False})


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return read_facts(finished.make_run(tmp_path_factory.mktemp("card") / "run"))


def body(facts, figures=()):
    return render_card(facts, {name: f"figures/{name}.png" for name in figures}).split("\n---\n", 1)[1]


def section(text, title):
    return re.search(rf"^## {title}\n\n(.*?)(?=\n## |\Z)", text, re.DOTALL | re.MULTILINE).group(1)


def test_the_card_has_all_its_sections_and_none_is_empty(facts):
    text = body(facts)
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == [
        *("What it is for", "How to use it", "Classes", "Results", "How it was trained", "Limits", "Recipe"),
    ]
    assert all(section(text, title).strip() for title in titles)
    assert "More information needed".lower() not in text.lower()
    assert not re.search(r"\bNone\b|\bnan\b", text)


def test_the_numbers_are_those_of_the_run(facts):
    text, test = body(facts), facts.splits["test"]
    accuracy = test.metrics["accuracy"]
    shown = f"0.7500 ({accuracy.low:.4f} to {accuracy.high:.4f})"
    assert f"Accuracy on 8 test images: **{shown}**" in text
    assert f"| test | 8 | {shown} |" in text
    assert "| 0 | ant | 8 | 4 | 4 |" in section(text, "Classes")
    recall = test.by_class["bee"].recall
    assert f"0.750 ({recall.low:.3f} to {recall.high:.3f})" in section(text, "Results")
    assert "1 of 4 images of ant were taken for bee" in text
    assert "Expected calibration error 0.150" in text  # 0.9 for the class that is right in 0.75 of the images


def test_hub_ids_are_links_and_folders_are_names(facts):
    text = body(facts)
    assert "[`somewhere/base`](https://huggingface.co/somewhere/base)" in text
    assert "[`somewhere/photos`](https://huggingface.co/datasets/somewhere/photos)" in text
    text = body(replace(facts, checkpoint=SourceFacts("local", "vit", None), data=SourceFacts("memory", "x", None)))
    assert "from `vit` on images in memory" in text
    assert "huggingface.co" not in text


def test_names_of_classes_are_shown_as_they_are(tmp_path):
    text = body(read_facts(finished.make_run(tmp_path / "run", NASTY)), ["confusion_test"])
    tokens = PARSER.parse(text)
    assert not [token for token in tokens if token.type == "html_block"]
    inline = [token for token in tokens if token.type == "inline"]
    assert not [part for token in inline for part in token.children if part.type == "html_inline"]
    shown = ["".join(part.content for part in token.children) for token in inline]
    assert all(shown.count(name) == 2 for name in NASTY)  # a cell of the counts and one of the scores
    assert "1 of 4 images of a|b were taken for # `c`" in shown
    assert [token.content for token in tokens if token.type == "heading_open"] == [""] * 8  # none came from a name


def test_figures_are_shown_where_they_are(facts):
    assert "![" not in body(facts)
    text = body(facts, ["confusion_test", "reliability_test", "learning_curves"])
    assert re.findall(r"\]\((figures/\w+\.png)\)", text) == [
        *("figures/confusion_test.png", "figures/reliability_test.png", "figures/learning_curves.png"),
    ]


def test_tables_of_many_classes_are_folded_and_the_most_confused_listed(tmp_path):
    labels = tuple(f"class_{number}" for number in range(100))
    text = body(read_facts(finished.make_run(tmp_path / "run", labels, counts={"train": 2, "test": 4})))
    assert text.count("<summary>100 classes</summary>") == 2
    assert "class_10, class_11 and 88 more (listed below)" in text
    assert len(re.findall(r"^- 1 of 4 images of", text, re.MULTILINE)) == 10
    assert text.count("class_57") == 2


def test_a_run_without_held_out_images_says_what_is_not_known(tmp_path):
    text = body(read_facts(finished.make_run(tmp_path / "run", counts={"train": 8})))
    assert "No images were held out" in section(text, "Results")
    assert "Accuracy" not in text


def test_a_class_without_images_has_no_recall(facts):
    test = facts.splits["test"]
    absent = replace(test.by_class["bee"], images=0)
    unseen = replace(test, by_class={**test.by_class, "bee": absent, "cat": replace(absent, predicted=0)})
    text = body(replace(facts, splits={**facts.splits, "test": unseen}))
    assert re.search(r"\| bee \| 0 \| 0\.750 \(.*?\) \| - \| 0\.750", text)
    assert "| cat | 0 | - | - | - |" in text
    assert "least often is ant" in text


def test_limits_depend_on_the_run(facts):
    limits = section(body(facts), "Limits")
    assert "The test images were taken out of the training images at random" in limits
    assert "licence is unknown" in limits
    assert "`pipeline()` clips" in limits
    grouped = replace(facts.recipe, data=replace(facts.recipe.data, group_column="patient"))
    assert "at random" not in section(body(replace(facts, recipe=grouped)), "Limits")
    own = replace(facts.splits["test"], is_carved=False)
    licensed = replace(facts.recipe, license="mit")
    changed = replace(facts, splits={"test": own}, recipe=licensed, adapter_base="somewhere/base")
    limits = section(body(changed), "Limits")
    assert not re.search("at random|licence|clips|validation", limits)


def test_the_recipe_in_the_card_loads(facts):
    block = re.search(r"```yaml\n(.*?)```", section(body(facts), "Recipe"), re.DOTALL).group(1)
    path = facts.folder / "copied.yaml"
    path.write_text(block)
    assert load_recipe(path) == facts.recipe


def test_an_adapter_is_opened_by_hfft_and_says_what_it_needs(facts):
    use = section(body(replace(facts, adapter_base="somewhere/base")), "How to use it")
    assert f'hfft.Classifier.from_pretrained("{REPOSITORY}")' in use
    assert "[`somewhere/base`](https://huggingface.co/somewhere/base), are loaded too" in use
    assert "in the run's folder only" in section(body(replace(facts, adapter_base="/x/merged")), "How to use it")


def test_lines_to_copy_are_three(facts):
    for made in (facts, replace(facts, adapter_base="somewhere/base")):
        (block,) = re.findall(r"```python\n(.*?)\n```", body(made), re.DOTALL)
        assert len(block.splitlines()) == 3
        assert block.count(REPOSITORY) == 1


def test_timm_models_need_timm(tmp_path, facts):
    assert "timm" not in body(facts)
    text = body(replace(facts, config={"model_type": "timm_wrapper"}))
    assert "Needs transformers, torch, torchvision, pillow, timm." in text
    assert re.search(r"timm \d", section(text, "How it was trained"))


def test_a_report_lies_in_the_run_and_beside_the_model(tmp_path):
    run = finished.make_run(tmp_path / "run", report=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    written = write_report(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert written[0] == run / "model/README.md"
    names = ["confusion_test.png", "learning_curves.png", "reliability_test.png"]
    assert sorted(path.name for path in (run / "model/figures").iterdir()) == names
    text = written[0].read_text(encoding="utf-8")
    for name in names:
        assert f"(figures/{name})" in text
        assert (run / "model/figures" / name).read_bytes() == (run / "figures" / name).read_bytes()


def test_no_path_of_the_disk_is_in_the_card(tmp_path):
    home = tmp_path / "alice"
    (home / "photos").mkdir(parents=True)
    (home / "vit").mkdir()
    model, data = {"checkpoint": str(home / "vit")}, {"source": str(home / "photos")}
    run = finished.make_run(home / "run", model=model, data=data, output_dir=str(home))
    text = (run / "model/README.md").read_text(encoding="utf-8")
    assert "alice" not in text
    assert str(tmp_path) not in text
    assert "fine-tuned from `vit` on `photos`" in text


def test_a_report_that_cannot_be_written_is_an_error(tmp_path):
    run = finished.make_run(tmp_path / "run")
    (run / "model/README.md").unlink()
    (run / "model/README.md").mkdir()  # as nothing can be renamed over
    with pytest.raises(TrainingError, match="card and figures can't be written"):
        write_report(run, draws=False)


def test_only_a_finished_run_has_a_report(tmp_path):
    run = finished.make_run(tmp_path / "run")
    (run / "metrics.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        write_report(run)
    with pytest.raises(RunError, match="is no run folder"):
        write_report(Path("nowhere"))


def test_baselines_and_why_which_phase_was_kept_are_said(facts):
    half = {name: {"value": 0.5, "low": 0.4, "high": 0.6} for name in facts.splits["test"].metrics}
    reason = "last did not improve validation accuracy (0.9 after head): model/ is that of head"
    baselines = {"majority": {"about": "always ant", "test": half}, "knn": {"about": "left out: too long"}}
    text = body(replace(facts, kept=reason, baselines=baselines))
    assert "| always ant | 0.5000 (0.4000 to 0.6000) |" in section(text, "Results")
    assert "left out" not in text
    assert "last did not improve validation accuracy (0.9 after head): model/ is that of head." in text
    assert "What is simpler" not in body(facts)


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
        replace(facts, data=SourceFacts("local", NASTY_YAML, None), examples=(Example("examples/0.jpg", NASTY_YAML),))
    )
    assert data.to_dict()["widget"] == [{"src": "examples/0.jpg", "example_title": NASTY_YAML}]
    assert {result.dataset_name for result in data.eval_results} == {NASTY_YAML}
    assert "widget" not in read_back(facts).to_dict()


def card(folder, **options):
    return (finished.make_run(folder / "run", **options) / "model" / "README.md").read_text()


def test_the_card_says_what_is_left_after_each_phase_and_how_far_the_weights_went(tmp_path):
    retention = {"sample": SAMPLE, "phases": {"head": HEAD, "last": PHASE}}
    text = card(tmp_path, more={"retention": retention, "interpolation": INTERPOLATION})
    assert "on 200 validation images" in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert ["head", "1.000", "0.000", "0.000", "1.000", "0.808"] in rows
    assert ["last", "0.484", "0.313", "0.115", "0.951", "0.816"] in rows
    assert "The weights lie 0.3 of the way" in text
    assert "chosen by log loss on 394 validation images" in text


def test_without_an_old_task_there_is_no_column_for_it(tmp_path):
    retention = {"sample": SAMPLE, "phases": {"last": {**PHASE, "old_task": None, "head_input": None}}}
    text = card(tmp_path, more={"retention": retention})
    assert "old head" not in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert ["last", "-", "-", "0.816"] in rows
    assert "The weights lie" not in text


def test_an_encoder_that_no_phase_changed_needs_no_table(tmp_path):
    assert "pretrained encoder" not in card(tmp_path, more={"retention": {"sample": SAMPLE, "phases": {"head": HEAD}}})


def test_the_card_names_the_temperature_of_config_json(tmp_path):
    text = card(tmp_path)  # three of four answers are right, with a probability of 0.9 each
    kept = json.loads((tmp_path / "run/model/config.json").read_text())["hfft"]["temperature"]
    assert kept == pytest.approx(2, abs=0.001)  # odds of 9 to 1 become the 3 to 1 that they are
    assert "Divided by a temperature of 2.000, fitted on 8 validation images" in text
    assert "expected calibration error (15 bins) of 0.000 instead of 0.150" in text


def test_a_card_without_validation_images_or_of_an_older_run_says_nothing_of_it(tmp_path):
    assert "temperature" not in card(tmp_path, counts={"train": 8, "test": 4})
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    write_report(tmp_path / "run", metrics=metrics)
    assert "temperature" not in (tmp_path / "run/model/README.md").read_text()
