"""What a user sees of a training: bars on a real terminal, plain lines elsewhere."""

import re
import sys

import launches
import pytest
import terminal
import tiny

RECIPE = """
name: bugs
model: {checkpoint: vit}
data: {source: photos}
training: {per_device_train_batch_size: 2, dataloader_num_workers: 0, num_train_epochs: 3, logging_steps: 5}
precision: float32
report: false
phases:
  - {name: head, unfreeze: head, learning_rate: 1.0e-2}
  - {name: last, unfreeze: {blocks: 2}, learning_rate: 1.0e-3}
"""
TRAIN = [sys.executable, "-m", "hfft", "train", "recipe.yaml"]
SPLITS = {f"{split}/{name}": 16 for split in ("train", "validation", "test") for name in ("ant", "bee", "cat")}
FULL = re.compile(
    r"phase 1/2 head: +\d+%\|[^|]*\| \d+/\d+ \[\d\d:\d\d<\d\d:\d\d, [^,]+, "
    r"[\d,]+ images/s, loss \d\.\d{3}, validation accuracy \d\.\d{3}\]"
)


@pytest.fixture
def workplace(tmp_path, photos):
    photos(SPLITS)
    tiny.save(tmp_path / "vit", "vit")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def bars(lines):
    return [line for line in lines if "|" in line]


def test_bars_on_a_terminal(workplace):
    done = terminal.run(TRAIN, workplace)
    assert done.code == 0, done.raw
    assert any(FULL.fullmatch(line) for line in done.drawn), done.drawn
    assert all(len(line) <= 160 for line in bars(done.drawn))
    left = [line for line in bars(done.lines) if line.startswith("phase ")]
    assert [re.split(r": +\d+%", line)[0] for line in left] == [
        *("phase 1/2 head: recording train images", "phase 1/2 head: recording validation images"),
        *("phase 1/2 head", "phase 2/2 last"),
    ]
    assert all(": 100%|" in line for line in left)
    # log lines stand whole, between the bars, as they do where there are none
    epochs = [line for line in done.lines if ": epoch " in line]
    assert [line.partition(",")[0] for line in epochs] == [
        f"phase {number}/2 {name}: epoch {epoch} of 3"
        for number, name in ((1, "head"), (2, "last"))
        for epoch in (1, 2, 3)
    ]
    assert not any("{'" in line for line in done.lines)  # transformers' own progress


def test_a_narrow_terminal_gets_shorter_lines_and_no_broken_ones(workplace):
    done = terminal.run(TRAIN, workplace, columns=70)
    assert done.code == 0, done.raw
    assert any(line.startswith("phase 2/2 last: ") for line in done.drawn)
    assert all(len(line) <= 70 for line in bars(done.drawn))


def test_plain_lines_in_a_pipe(workplace):
    done = launches.succeed(TRAIN, workplace)
    assert "\r" not in done.stderr
    assert not bars(done.stderr.splitlines())
    assert "phase 2/2 last: epoch 3 of 3, loss " in done.stderr


def test_bars_are_switched_off(workplace):
    done = terminal.run([*TRAIN, "training.disable_tqdm=true"], workplace)
    assert done.code == 0, done.raw
    assert not bars(done.drawn)
    assert "\r" not in done.raw
    assert any(line.startswith("phase 2/2 last: epoch 3 of 3") for line in done.lines)


def test_ctrl_c_leaves_clean_lines(workplace):
    has_typed = False

    def type_once(written):
        nonlocal has_typed
        if has_typed or "phase 1/2 head: epoch 1" not in written:
            return None
        has_typed = True
        return "\x03"

    done = terminal.run([*TRAIN, "phases.head.num_train_epochs=2000"], workplace, watch=type_once)
    assert done.code == 130, done.raw
    *_, bar, last, nothing = done.lines
    assert re.match(r"phase 1/2 head: +\d+%\|", bar), done.lines
    assert last == "interrupted; a run continues with the same command, without --overwrite"
    assert nothing == ""
    assert "stopping once this step is saved; again to stop at once" in done.lines
    assert any(re.fullmatch(r"phase 1/2 head: stopped after step \d+, which is saved", line) for line in done.lines)


@pytest.mark.multiprocess
def test_two_processes_draw_one_bar(workplace):
    command = [*launches.launch(), "-m", "hfft", "train", "recipe.yaml"]
    done = terminal.run(command, workplace)
    assert done.code == 0, done.raw
    assert any(FULL.fullmatch(line) for line in done.drawn), done.drawn
    left = [line for line in bars(done.lines) if line.startswith("phase ")]
    assert [re.split(r": +\d+%", line)[0] for line in left][-2:] == ["phase 1/2 head", "phase 2/2 last"]
    assert len(left) == 4
