"""The real command line and clients against a Hub on the loopback interface; processes with caches of their own."""

import json
import os
import sys

import hub_server
import launches
import pandas as pd
import pushable
import pytest
import tiny
import torch
import warm

from hfft.cli import main
from hfft.data.images.decoding import decode
from hfft.data.images.transforms import evaluation_transform
from hfft.inference.opening import open_model

pytestmark = pytest.mark.slow

PIPELINE = """
import json, sys
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1])
answers = [classify(path, top_k=None, function_to_apply="none") for path in sys.argv[2:]]
print(json.dumps([{entry["label"]: entry["score"] for entry in answer} for answer in answers]))
"""
# As PIPELINE, for an adapter: docs/hub.md has these lines.
ADAPTER_PIPELINE = """
import json, sys
from transformers import AutoConfig, AutoModelForImageClassification, pipeline
name = sys.argv[1]
config = AutoConfig.from_pretrained(name)
model = AutoModelForImageClassification.from_pretrained(name, config=config, ignore_mismatched_sizes=True)
classify = pipeline("image-classification", model=model, image_processor=name)
answers = [classify(path, top_k=None, function_to_apply="none") for path in sys.argv[2:]]
print(json.dumps([{entry["label"]: entry["score"] for entry in answer} for answer in answers]))
"""
CLASSIFIER = """
import json, sys
import hfft
answers = hfft.Classifier.from_pretrained(sys.argv[1])(sys.argv[2:], top=9)
print(json.dumps([answer.top for answer in answers]))
"""
TRAINER = """
import sys
import tiny
import torch
from huggingface_hub import HfApi, snapshot_download
from transformers import Trainer, TrainingArguments

class Rows(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, n): return {"pixel_values": torch.full((3, 32, 32), n / 8.0), "labels": n % 2}

arguments = TrainingArguments(sys.argv[1], push_to_hub=True, hub_model_id="me/plain", hub_private_repo=True,
    max_steps=4, save_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True)
trainer = Trainer(tiny.build("vit", 2), arguments, train_dataset=Rows(), processing_class=tiny.processor())
trainer.train()
trainer.push_to_hub()
print(sorted(HfApi().list_repo_files("me/plain")))
print(sorted(path.name for path in __import__("pathlib").Path(snapshot_download("me/plain")).iterdir()))
"""
# `hfft` as a process with a Hub that huggingface_hub has read of its environment, and without waits between its tries.
IMPATIENT = """
import sys, types
from huggingface_hub.utils import _http
_http.time = types.SimpleNamespace(sleep=lambda seconds: None)
from hfft.cli import main
sys.exit(main())
"""
# `hfft` in a process of a launch, where the libraries are imported before they know of the Hub.
CONNECTED = """
import pathlib, sys, types
import hub_server, pytest
hub_server.connect(types.SimpleNamespace(url=sys.argv[1]), pytest.MonkeyPatch(), pathlib.Path("home"))
sys.argv[:2] = ["hfft"]
from hfft.cli import main
sys.exit(main())
"""


@pytest.fixture
def hub():
    with hub_server.running() as running:
        yield running


@pytest.fixture
def child(hub, tmp_path):
    """`child("-c", CODE, ...)`: a process that imports the Hugging Face libraries with a home of its own."""

    def run(*words, home="home"):
        environment = {**os.environ, **hub.environment(tmp_path / home)}
        return warm.run([sys.executable, *words], cwd=tmp_path, env=environment)

    return run


@pytest.fixture
def command(hub, tmp_path, monkeypatch, capsys):
    """`command("train", ...)`: hfft's exit code, output and errors in this process, which talks to the Hub."""
    monkeypatch.chdir(tmp_path)

    def run(*words, home="home", token="hf_mine"):
        hub_server.connect(hub, monkeypatch, tmp_path / home, token)
        code = main([*map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def workplace(tmp_path, hub):
    """Photos, and a checkpoint of ten classes, on the Hub and in a folder."""
    pushable.make_photos(tmp_path / "photos")
    folder = tiny.save(tmp_path / "vit", "vit", classes=10)
    hub.add_repository("me/vit", **{path.name: path.read_bytes() for path in folder.iterdir()})
    return tmp_path


def write_recipe(place, **changes):
    path = place / "recipe.yaml"
    path.write_text(json.dumps(pushable.recipe(place, **{"report": False, **changes})))
    return path


def evaluated(run):
    """Test images of a run, the class that its evaluation gave each, and logits of its own folder."""
    table = pd.read_parquet(run / "predictions.parquet")[lambda rows: rows["split"] == "test"]
    files = [run.parent.parent / "photos" / file for file in table["file"]]
    result = run / ("model" if (run / "model").exists() else "adapter")
    model, processor = open_model(str(result))
    transform = evaluation_transform(processor)
    with torch.inference_mode():
        logits = [model(pixel_values=transform(decode(path)).unsqueeze(0)).logits[0].tolist() for path in files]
    labels = [model.config.id2label[k] for k in range(len(logits[0]))]
    return files, list(table["prediction"]), [dict(zip(labels, row, strict=True)) for row in logits]


def last_line(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_same(answers, predictions, logits):
    assert len(answers) == len(predictions) == pushable.SPLITS["test"]
    assert len(set(predictions)) > 1
    for answer, prediction, expected in zip(answers, predictions, logits, strict=True):
        assert max(answer, key=answer.__getitem__) == prediction
        assert answer == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["full", "merged"])
def test_a_fresh_process_classifies_as_the_run_was_evaluated(kind, workplace, command, child):
    phases = pushable.recipe(workplace)["phases"]
    phases = [phases[0], {**phases[0], "name": "all", "unfreeze": "all"}] if kind == "full" else phases
    recipe = write_recipe(workplace, phases=phases)
    assert command("train", recipe, "training.num_train_epochs=3")[0] == 0
    run = workplace / "runs/cells"
    pushed = child("-m", "hfft", "push", run, "me/cells", "--json")
    assert last_line(pushed)["largest_difference"] == 0
    files, predictions, logits = evaluated(run)
    answers = last_line(child("-c", PIPELINE, "me/cells", *files, home="another"))
    assert_same(answers, predictions, logits)


def test_an_adapter_in_a_repository_of_its_own(workplace, command, child, hub):
    """Its base is on the Hub too. What opens it: Classifier, and transformers when it is told the adapter's config."""
    recipe = write_recipe(workplace, checkpoint="me/vit", merge=False, hub={"repo_id": "me/lora"})
    assert command("train", recipe, "training.num_train_epochs=3")[0] == 0
    run = workplace / "runs/cells"
    assert json.loads(hub.files("me/lora")["adapter_config.json"])["base_model_name_or_path"] == "me/vit"
    assert "model.safetensors" not in hub.files("me/lora")
    # The run's own predictions, as this process has no cache of the base.
    table = pd.read_parquet(run / "predictions.parquet")[lambda rows: rows["split"] == "test"]
    files = [workplace / "photos" / file for file in table["file"]]
    answers = last_line(child("-c", CLASSIFIER, "me/lora", *files, home="another"))
    alone = f"{ADAPTER_PIPELINE}pipeline('image-classification', model=name)"  # takes the base's ten classes
    refused = child("-c", alone, "me/lora", *files, home="a third")
    assert refused.returncode == 1
    assert "ignore_mismatched_sizes" in refused.stderr  # it says that the head doesn't fit
    through_transformers = json.loads(refused.stdout.splitlines()[-1])
    for answer, logits, row in zip(answers, through_transformers, table.to_dict("records"), strict=True):
        expected = {name: row[f"probability {name}"] for name in pushable.CLASSES}
        assert answer == pytest.approx(expected, abs=1e-5)
        assert max(logits, key=logits.__getitem__) == row["prediction"]
        shares = torch.tensor([logits[name] for name in pushable.CLASSES]).softmax(0).tolist()
        assert dict(zip(pushable.CLASSES, shares, strict=True)) == pytest.approx(expected, abs=1e-5)


def test_model_and_adapter_in_one_repository(workplace, command, child, hub):
    hub_section = {"repo_id": "me/cells", "what": "both"}
    recipe = write_recipe(workplace, checkpoint="me/vit", hub=hub_section)
    code, _, said = command("train", recipe, "training.num_train_epochs=3")
    assert code == 0
    assert f"pushed to {hub.url}/me/cells (private" in said
    assert {"config.json", "model.safetensors", "adapter/adapter_config.json"} <= set(hub.files("me/cells"))
    files, predictions, logits = evaluated(workplace / "runs/cells")
    assert_same(last_line(child("-c", PIPELINE, "me/cells", *files, home="another")), predictions, logits)


def test_a_private_repository_is_not_for_others(workplace, command):
    assert command("train", write_recipe(workplace, hub={"repo_id": "me/cells"}))[0] == 0
    code, _, said = command("predict", "me/cells", "photos/test", home="another", token="hf_others")
    assert code == 2
    assert "me/cells" in said
    assert "the Hub has no model of that name, or it is private" in said


def test_a_push_in_the_middle_of_which_the_hub_fails(workplace, command, child, hub):
    """With huggingface_hub's own five tries; the third push finishes the job."""
    assert command("train", write_recipe(workplace))[0] == 0
    run = workplace / "runs/cells"
    before = pushable.contents(run)
    for how, words in (
        ({"status": 500, "headers": {"Retry-After": "0"}}, "the Hub answered 500 (no luck)"),
        ({"cut": True}, "the connection was lost"),
    ):
        failure = hub.fail("PUT", "/storage/", **how)
        done = child("-c", IMPATIENT, "push", run, "me/cells")
        assert done.returncode == 1
        assert f"error: me/cells: uploading: {words}" in done.stderr
        assert "Traceback" not in done.stderr
        assert failure.hits >= 6  # five more tries, for each of the large files under way
        assert "[Retry 5/5]" in done.stderr
        assert f"requesting PUT {hub.url}/storage/" in done.stderr
        assert "signed" not in done.stderr  # what grants access to the storage
        assert pushable.contents(run) == before
        hub.failures.clear()
    code, said, _ = command("push", run, "me/cells")
    assert code == 0
    assert said.startswith(f"pushed to {hub.url}/me/cells (private, commit ")


@pytest.mark.multiprocess
def test_one_of_two_processes_pushes(workplace, hub, tmp_path):
    recipe = write_recipe(workplace, hub={"repo_id": "me/cells", "hub_strategy": "every_save"})
    (workplace / "connected.py").write_text(CONNECTED)
    connected = ["connected.py", hub.url, "train"]
    launches.succeed([*launches.launch(), *connected, recipe], tmp_path)
    assert len(hub.asked("POST /api/repos/create")) == 1
    assert sum("fine-tuned with hfft" in title for title in hub.titles("me/cells")) == 1
    refused = write_recipe(workplace, name="again", hub={"repo_id": "other/cells"})
    done = launches.run([*launches.launch(), *connected, refused], tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: other/cells: me has no write access there") == 1
    assert not (tmp_path / "runs/again").exists()


def test_the_plain_trainer_and_its_clients_take_this_hub_for_one(workplace, child, hub):
    done = child("-c", TRAINER, workplace / "out")
    assert done.returncode == 0, done.stderr
    listed, downloaded = done.stdout.splitlines()[-2:]
    assert listed == downloaded
    assert "'model.safetensors'" in listed
    assert "'training_args.bin'" in listed  # a pickle, which hfft doesn't send
    assert "End of training" in hub.titles("me/plain")
    assert hub.repositories["me/plain"].private
