"""`hfft demo`: the page on this machine, in a browser, and the Space that it writes, in a process without hfft."""

import ast
import io
import os
import shutil
import signal
import socket
import sys
from importlib.metadata import version
from pathlib import Path

import browser
import httpx2
import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import SpaceCard, constants
from packaging.requirements import Requirement
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hfft
from hfft.cli import main
from hfft.data.images.decoding import decode
from hfft.data.images.resize_mode import fit_processor
from hfft.data.images.transforms import pixel_scale
from hfft.model.adapters import attach, save_adapter
from hfft.model.checkpoint import reopen, save_model
from hfft.recipe.spec import AdapterSpec, DataSpec

CLASSES = ("ant", "bee", "cat")
WITHOUT_HFFT = "import runpy, sys; sys.modules['hfft'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A model of three classes whose answers differ from image to image, and images."""
    model = tiny.build(
        "vit", 3, id2label=dict(enumerate(CLASSES)), label2id={name: k for k, name in enumerate(CLASSES)}
    )
    with torch.no_grad():
        model.classifier.weight.mul_(40)
    model.save_pretrained(tmp_path / "bugs")
    tiny.processor().save_pretrained(tmp_path / "bugs")
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    photo = Image.fromarray(coarse).resize((40, 60), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "photo.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    deep = np.asarray(photo.convert("L"), dtype=np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(coarse[::-1, ::-1]).convert("P").save(tmp_path / "palette.gif")
    (tmp_path / "broken.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def demo(*arguments):
    return [sys.executable, "-m", "hfft", "demo", *map(str, arguments)]


def answers(file, source="bugs"):
    return hfft.Classifier.from_pretrained(source)(file, top=3).top


def preprocessed(file):
    """The pixels that the evaluation gives the network, as a picture (H, W, 3)."""
    classify = hfft.Classifier.from_pretrained("bugs")
    scale = pixel_scale(classify.processor)
    pixels = (classify.transform(decode(Path(file))) - scale.black) / (scale.white - scale.black) * 255
    return pixels.round().to(torch.uint8).permute(1, 2, 0).numpy()


def shown_shares(page):
    """Class to probability, as the bars of the page have them."""
    meters = page.query_selector_all("#labels meter")
    return {meter.get_attribute("aria-label"): float(meter.get_attribute("value")) for meter in meters}


def drop(page, file):
    """Drop a file on the page, as a user's mouse does."""
    content = list(Path(file).read_bytes())
    data = page.evaluate_handle(
        """([content, name]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(content)], name, {type: "image/png"}));
            return data;
        }""",
        [content, file],
    )
    page.dispatch_event("#image button[aria-label^='Drop']", "drop", {"dataTransfer": data})


def equals(shares):
    return {name: pytest.approx(share, abs=2e-6) for name, share in shares.items()}


@pytest.mark.browser
def test_an_image_that_is_dropped_on_the_page_is_labelled(home):
    port = free_port()
    with browser.served(demo("bugs", "--port", port), "http://") as (line, _), browser.chromium() as page:
        address = line.split()[0]
        assert address == f"http://127.0.0.1:{port}/"
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("#image button[aria-label^='Drop']")
        assert page.title() == "bugs"
        drop(page, "photo.png")
        page.wait_for_selector("#seen img")
        assert shown_shares(page) == equals(answers("photo.png"))
        best = max(answers("photo.png").items(), key=lambda entry: entry[1])[0]
        assert page.inner_text("#labels h2") == best
        picture = page.request.get(page.get_attribute("#seen img", "src")).body()
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture))), preprocessed("photo.png"))
        page.click("#image button[aria-label='Remove Image']")
        page.wait_for_selector("#seen img", state="detached")
        assert shown_shares(page) == {}
        drop(page, "broken.png")
        page.wait_for_selector("text=This image can't be read: not an image")
        others = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
        assert others == []  # no fonts, scripts or statistics from elsewhere


def ask(address, file):
    """Class to probability, and the picture, through the page's own interface."""
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False, analytics_enabled=False)
    labels, picture = client.predict(handle_file(file), api_name="/label")
    found = {entry["label"]: entry["confidence"] for entry in labels["confidences"]}
    return found, np.asarray(Image.open(picture))


def answer_to(address, payload):
    """What the page's interface says to a direct request."""
    called = httpx2.post(f"{address}/gradio_api/call/label", json={"data": [payload]}).json()
    return httpx2.get(f"{address}/gradio_api/call/label/{called['event_id']}", timeout=30).text


@pytest.fixture
def space(home, capsys):
    assert main(["demo", "bugs", "--space", "space"]) == 0
    assert "hf upload OWNER/NAME space --type space" in capsys.readouterr().out
    return home / "space"


def test_a_space_runs_without_hfft_and_answers_as_the_model_does(space, tmp_path):
    from gradio_client.exceptions import AppError

    port = free_port()
    command = [sys.executable, "-c", WITHOUT_HFFT, "space/app.py"]
    paths = {"GRADIO_TEMP_DIR": str(tmp_path / "uploads"), "GRADIO_SERVER_PORT": str(port)}
    with browser.served(command, "http://", **paths) as (line, _):
        assert f":{port}" in line
        for file in ("photo.png", "turned.png", "deep.png", "palette.gif"):
            shares, picture = ask(f"http://127.0.0.1:{port}", file)
            assert shares == equals(answers(file)), file
            assert np.array_equal(picture, preprocessed(file)), file
        upright, turned = (ask(f"http://127.0.0.1:{port}", name)[0] for name in ("photo.png", "turned.png"))
        assert upright == turned
        assert shares != equals(upright)  # else any image would stand for any other
        with pytest.raises(AppError, match="This image can't be read: not an image"):
            ask(f"http://127.0.0.1:{port}", "broken.png")


def test_a_space_says_what_the_hub_needs_to_know(space):
    assert {path.name for path in space.iterdir()} == {
        "app.py",
        "requirements.txt",
        "README.md",
        ".gitattributes",
        "model",
    }
    card = SpaceCard.load(space / "README.md").data
    assert (card.title, card.sdk, card.sdk_version, card.app_file) == ("bugs", "gradio", version("gradio"), "app.py")
    needed = {one.name: one for one in map(Requirement, (space / "requirements.txt").read_text().splitlines())}
    for name, one in needed.items():
        assert one.specifier.contains(version(name).partition("+")[0]), name
    nodes = list(ast.walk(ast.parse((space / "app.py").read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    others = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert others == {
        "PIL",
        "gradio",
        "numpy",
        "torch",
        "transformers",
        "simplejpeg",
        "pillow_heif",
    }  # the last if it is there
    assert {"pillow", "numpy", "torch", "transformers", "simplejpeg"} <= set(needed)
    assert str(space.parent) not in (space / "app.py").read_text() + (space / "README.md").read_text()


@pytest.mark.parametrize("family", ["vit", "timm_wrapper"])
def test_a_space_lays_transparent_pixels_over_the_background_of_training(family, home):
    from hfft.inference.demo_page import make_labeler

    tiny.save(home / "net", family, 3)
    model, processor = reopen("net")
    config = model.config
    changed = fit_processor(processor, config, DataSpec(source="photos", fit="squash", background=(10, 200, 90)))
    save_model(model, changed, home / "trained")
    clear = Image.open("photo.png").convert("RGBA")
    clear.putalpha(0)
    clear.save("clear.png")
    opened = AutoModelForImageClassification.from_pretrained("trained")
    _, shown = make_labeler(opened.eval(), AutoImageProcessor.from_pretrained("trained"))("clear.png")
    assert np.asarray(shown).reshape(-1, 3).tolist() == [[10, 200, 90]] * (shown.width * shown.height)


def test_names_are_text_in_a_space(home):
    model = tiny.build("vit", 3, id2label={0: "<img src=x>", 1: "*b*", 2: "[c](d)"}, label2id={"*b*": 1})
    model.save_pretrained("a `b` <i>")
    tiny.processor().save_pretrained("a `b` <i>")
    assert main(["demo", "a `b` <i>", "--space", "space"]) == 0
    card = (home / "space/README.md").read_text()
    assert card.endswith(
        "\n# a \\`b\\` &lt;i&gt;\n\nLabels images: &lt;img src=x&gt;, \\*b\\*, \\[c\\](d). Made with hfft.\n"
    )
    assert SpaceCard.load(home / "space/README.md").data.title == "a `b` <i>"


def test_a_space_of_a_timm_model_asks_for_timm(home):
    tiny.save(home / "net", "timm_wrapper", 3)
    assert main(["demo", "net", "--space", "space"]) == 0
    assert "timm>=" in (home / "space/requirements.txt").read_text()
    model, processor = reopen("space/model")
    assert type(processor).__name__ == "TimmWrapperImageProcessor"
    assert model.config.num_labels == 3


def test_a_space_of_an_adapter_holds_a_plain_model(home):
    model, processor = reopen("bugs")
    network = attach(model, AdapterSpec())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    save_adapter(network, processor, home / "adapter", base=str(home / "bugs"), revision=None)
    assert main(["demo", "adapter", "--space", "space"]) == 0
    assert answers("photo.png", "space/model") == equals(answers("photo.png", "adapter"))
    assert answers("photo.png", "adapter") != equals(answers("photo.png"))


def test_a_space_of_a_model_on_the_hub_holds_its_name_alone(home):
    repository = Path(constants.HF_HUB_CACHE) / "models--me--bugs"
    shutil.copytree("bugs", repository / "snapshots" / ("c" * 40))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("c" * 40)
    try:
        assert main(["demo", "me/bugs", "--space", "space"]) == 0
    finally:
        shutil.rmtree(repository)
    assert {path.name for path in (home / "space").iterdir()} == {"app.py", "requirements.txt", "README.md"}
    assert "run_space('me/bugs', 'bugs')" in (home / "space/app.py").read_text()
    assert SpaceCard.load(home / "space/README.md").data.models == ["me/bugs"]


def test_a_space_is_replaced_when_asked_and_nothing_else_is_lost(space, capsys):
    assert main(["demo", "bugs", "--space", "space"]) == 2
    assert "--space space: is there already; --overwrite replaces it" in capsys.readouterr().err
    (space / "app.py").write_text("")
    assert main(["demo", "bugs", "--space", "space", "--overwrite"]) == 0
    assert (space / "app.py").read_text()
    (space / "model/notes.txt").write_text("mine")
    assert main(["demo", "bugs", "--space", "space", "--overwrite"]) == 2
    assert "holds model/notes.txt, which would be lost" in capsys.readouterr().err
    assert main(["demo", "bugs", "--space", ".", "--overwrite"]) == 2
    assert "is the folder that you are in" in capsys.readouterr().err


def check_that_only_uploads_are_read(address, home):
    (uploaded,) = httpx2.post(f"{address}/gradio_api/upload", files={"files": Path("photo.png").read_bytes()}).json()
    assert "event: complete" in answer_to(address, {"path": uploaded})
    photo = str(home / "photo.png")
    around = os.path.join(os.path.dirname(uploaded), os.path.relpath(photo, os.path.dirname(uploaded)))
    wrong = [photo, f"{photo}.none", around, "photo.png", os.path.dirname(uploaded), f"{uploaded}.none", ""]
    (said,) = {answer_to(address, {"path": path, **more}) for path in wrong for more in ({}, {"meta": {}})}
    assert "event: error" in said  # the same of what is there and what isn't
    assert "was not uploaded here" in said
    assert "event: error" in answer_to(address, {"path": photo, "meta": {"_type": "gradio.FileData"}})


def test_the_page_is_for_this_machine_alone_and_leaves_nothing(home, tmp_path):
    port = free_port()
    folder = tmp_path / "tmp"
    folder.mkdir()
    proxies = {"HTTP_PROXY": "http://127.0.0.1:9", "no_proxy": "", "TMPDIR": str(folder)}  # where nobody listens
    with browser.served(demo("bugs", "--port", port), "http://", **proxies) as (_, process):
        address = f"http://127.0.0.1:{port}"
        assert ask(address, "deep.png")[0] == equals(answers("deep.png"))
        assert [path.name for path in folder.rglob("deep.png")] == ["deep.png"]
        check_that_only_uploads_are_read(address, tmp_path)
        with pytest.raises(ConnectionRefusedError):  # another address of this machine
            socket.create_connection(("127.0.0.2", port), timeout=5).close()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert os.listdir(folder) == []


def test_a_port_that_is_taken_is_said(home, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["demo", "bugs", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: the page can't be served at 127.0.0.1, port {port}: Address already in use; ")


@pytest.mark.parametrize("wrong", [["--port", "70000"], ["--host", "300.1.1.1"], ["--host", "203.0.113.7"]])
def test_a_place_that_is_none_is_said(wrong, home, capsys):
    assert main(["demo", "bugs", *wrong]) == 1
    assert capsys.readouterr().err.startswith("error: the page can't be served at ")


@pytest.mark.parametrize("more", [[], ["--space", "space"]])
def test_without_gradio_the_command_that_installs_it_is_told(more, home, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)  # as Python has it: an import of it fails
    assert main(["demo", "bugs", *more]) == 2
    assert capsys.readouterr().err == 'error: not installed: gradio; pip install "hfft[demo]"\n'
    assert not (home / "space").exists()


def test_a_class_name_that_occurs_twice_is_told_apart(home):
    from hfft.inference.demo_page import make_labeler

    model = tiny.build("vit", 3, id2label={0: "crane", 1: "bee", 2: "crane"}, label2id={"bee": 1})
    processor = tiny.processor()
    shares, _ = make_labeler(model, processor)("photo.png")
    assert tuple(shares) == hfft.Classifier(model, processor).classes == ("crane (0)", "bee", "crane (2)")


def test_the_picture_has_its_colors_where_the_network_takes_blue_first(home):
    from transformers import MobileViTImageProcessor

    from hfft.inference.demo_page import make_labeler

    processor = MobileViTImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    Image.new("RGB", (50, 60), (250, 120, 10)).save("orange.png")
    _, picture = make_labeler(tiny.build("vit", 3), processor)("orange.png")
    assert np.unique(np.asarray(picture).reshape(-1, 3), axis=0).tolist() == [[250, 120, 10]]
