import errno
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple

import pytest
import torch
import warm
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hfft.replay import store
from hfft.replay.store import Leaf, find_recording, locked, make_room, plan_recordings
from hfft.system.files import read_json, write_json

LEAVES = (Leaf(torch.float32, (2, 3)), Leaf(torch.bfloat16, (5,)))
ROWS = 2500  # three files of tiny rows: 1,024, 1,024 and 452
GB = 10**9
# Fills "k" under a lock unless it finds it; prints how many files it wrote, and the sum of all it can read then.
FILL = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from hfft.replay.store import Leaf, find_recording, locked, plan_recordings
folder, written = Path(sys.argv[1]), 0
PartialState()
with locked(folder, "k"):
    recording = find_recording(folder, "k", 2500)
    if recording is None:
        (files,) = plan_recordings(folder, {"k": [Leaf(torch.int64, ())]}, rows=2500, batch=4)
        for span in files.missing(files.spans):
            files.write(span, [torch.tensor(span)])
            written += 1
            print("wrote", flush=True)
        recording = files.finish()
print(written, int(recording.rows(range(2500))[0].sum()))
"""


@pytest.fixture(autouse=True)
def _launched(monkeypatch):
    PartialState()
    monkeypatch.setattr(store, "_verified", set())


@pytest.fixture
def log(caplog, monkeypatch):
    """Lines of hfft's log so far, without the prefix of accelerate's logger."""
    monkeypatch.setattr(logging.getLogger("hfft"), "propagate", True)  # the command line takes it away
    caplog.set_level(logging.INFO, "hfft")
    return lambda: [record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records]


def content(rows=ROWS):
    numbers = torch.arange(rows * 6, dtype=torch.float32)
    return numbers.reshape(rows, 2, 3), torch.randn(rows, 5, generator=torch.manual_seed(rows)).bfloat16()


def plan(folder, key="k", rows=ROWS, leaves=LEAVES, batch=4):
    return plan_recordings(folder, {key: leaves}, rows=rows, batch=batch)[0]


def fill(files, spans=None, tensors=None):
    for span in files.missing(files.spans) if spans is None else spans:
        files.write(span, [tensor[span.start : span.stop] for tensor in tensors or content(files.rows)])
    return files


def record(folder, key="k", rows=ROWS):
    return fill(plan(folder, key, rows)).finish()


def find(folder, key="k", rows=ROWS):
    """As another process finds it."""
    store._verified.clear()
    recording = find_recording(folder, key, rows)
    assert recording is not None
    return recording


def is_gone(folder, key="k", rows=ROWS):
    """Whether a damaged recording is found by no other process, and removed as a whole."""
    store._verified.clear()
    return find_recording(folder, key, rows) is None and not (folder / f"{key}.recording").exists()


def is_exact(recording, rows=ROWS):
    found = recording.rows(range(len(recording)))
    return len(recording) == rows and all(map(torch.equal, found, content(rows)))


def shards(folder, key="k"):
    return sorted((folder / f"{key}.recording").glob("*.safetensors"))


def names(folder, key="k"):
    return sorted(path.name for path in (folder / f"{key}.recording").iterdir())


def flip(path, position, mask=1):
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def start(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def line(child):
    assert child.stdout is not None
    return child.stdout.readline()


# Rows


def test_rows_come_back_bit_equal(tmp_path):
    recording = record(tmp_path)
    first, second = content()
    for index in (0, 1023, 1024, 2047, 2048, 2499):
        row = recording[index]
        assert [tensor.dtype for tensor in row] == [torch.float32, torch.bfloat16]
        assert torch.equal(row[0], first[index])
        assert torch.equal(row[1], second[index])
    assert torch.equal(recording[-1][0], first[2499])
    picked = [2499, 0, 1024, 0]
    assert [tuple(tensor.shape) for tensor in recording.rows(picked)] == [(4, 2, 3), (4, 5)]
    assert torch.equal(recording.rows(picked)[1], second[picked])
    with pytest.raises(IndexError):
        recording[2500]
    assert sum(1 for _ in recording) == 2500


def test_a_found_recording_is_the_one_that_was_written(tmp_path):
    assert find_recording(tmp_path, "k", ROWS) is None
    record(tmp_path)
    assert is_exact(find(tmp_path))
    assert find_recording(tmp_path, "other", ROWS) is None


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]
)
def test_every_bit_of_every_dtype(tmp_path, dtype):
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (40, 3, 8), dtype=torch.uint8)  # NaNs among them
    values = bits.view(dtype)
    files = plan(tmp_path, rows=40, leaves=[Leaf(dtype, values.shape[1:]), Leaf(torch.uint8, (3,))])
    odd = torch.arange(120, dtype=torch.uint8).reshape(40, 3)
    fill(files, tensors=(values, odd)).finish()
    found = find(tmp_path, rows=40).rows(range(40))
    assert found[0].dtype == dtype
    assert torch.equal(found[0].view(torch.uint8), bits)
    assert torch.equal(found[1], odd)


def test_rows_are_mapped_and_not_read(tmp_path):
    code = """
import sys
from pathlib import Path
import torch
from hfft.replay.store import Leaf, plan_recordings
(files,) = plan_recordings(Path(sys.argv[1]), {"k": [Leaf(torch.float32, (2**15,))]}, rows=1024, batch=1)
for span in files.spans:
    files.write(span, [torch.ones(len(span), 2**15)])
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
recording = files.finish()
print(1024 * 2**17, resident() - before)
assert recording[700][0].sum() == 2**15
print(resident() - before)
"""
    child = start(code, tmp_path)
    output, error = child.communicate()
    assert child.returncode == 0, error
    size, opened, one_row = map(int, output.split())
    assert size == 128 * 2**20
    assert opened < size / 8
    assert one_row < size / 8


def test_a_row_is_a_view_of_the_file_and_rows_are_copies(tmp_path):
    recording = record(tmp_path)
    assert recording[5][0].data_ptr() - recording[4][0].data_ptr() == 24
    copies = recording.rows([4, 5])
    copies[0].zero_()
    copies[1].zero_()
    assert is_exact(recording)
    recording[4][0].zero_()  # a careless caller changes its own process
    assert is_exact(find(tmp_path))


def test_a_pickled_recording_is_its_path(tmp_path):
    pickled = pickle.dumps(record(tmp_path))
    assert len(pickled) < 1000
    assert is_exact(pickle.loads(pickled))


# Files


@pytest.mark.parametrize(
    ("row_bytes", "batch", "expected"),
    [
        (4, 1, 1024),
        (4, 48, 1008),  # 21 batches
        (4, 2000, 2000),  # never less than a batch
        (88_000, 32, 736),  # 762 rows are 64 MiB
        (591_000, 16, 112),
        (100_000_000, 8, 8),
    ],
)
def test_a_file_holds_whole_batches(tmp_path, row_bytes, batch, expected):
    files = plan(tmp_path, rows=5 * expected + 1, leaves=[Leaf(torch.uint8, (row_bytes,))], batch=batch)
    assert [len(span) for span in files.spans] == [expected] * 5 + [1]
    assert [number for span in files.spans for number in span] == list(range(5 * expected + 1))


def test_a_file_is_plain_safetensors_that_says_whose_it_is(tmp_path):
    record(tmp_path)
    assert names(tmp_path) == [
        "000000000.safetensors",
        "000001024.safetensors",
        "000002048.safetensors",
        "manifest.json",
    ]
    path = shards(tmp_path)[1]
    assert torch.equal(load_file(path)["0"], content()[0][1024:2048])
    with safe_open(path, "pt") as file:
        assert file.metadata().items() >= {"key": "k", "rows": "1024-2048"}.items()
    manifest = read_json(tmp_path / "k.recording" / "manifest.json")
    assert manifest["format"] == 1
    assert manifest["leaves"] == [{"dtype": "float32", "shape": [2, 3]}, {"dtype": "bfloat16", "shape": [5]}]


def test_an_empty_recording_is_one(tmp_path):
    assert len(plan(tmp_path, rows=0).finish()) == 0
    assert len(find(tmp_path, rows=0)) == 0


def test_processes_share_the_spans(tmp_path):
    processes = [plan(tmp_path) for _ in range(2)]
    for rank, files in enumerate(processes):
        fill(files, files.missing(files.spans[rank::2]))
        assert len(files.missing(files.spans)) == (1 if rank == 0 else 0)
    assert is_exact(processes[0].finish())


def test_what_is_not_whole_cannot_be_finished(tmp_path):
    files = plan(tmp_path)
    fill(files, files.spans[:2])
    with pytest.raises(FileNotFoundError):
        files.finish()
    assert find_recording(tmp_path, "k", ROWS) is None
    assert files.missing(files.spans) == [range(2048, 2500)]


# Damage


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


def flipped_first(path):
    flip(path, path.stat().st_size - 1024 * 34)


def flipped_last(path):
    flip(path, -1)


def foreign_key(path):
    other = path.parent.parent / "other"
    record(other, "another")
    os.replace(shards(other, "another")[1], path)


def other_rows(path):
    shutil.copy(path.with_name("000000000.safetensors"), path)


def other_dtype(path):
    same_bytes(path, lambda tensor: tensor.view(torch.float16))


def other_shape(path):
    same_bytes(path, lambda tensor: tensor.reshape(-1, 1))


def same_bytes(path, change):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors | {"1": change(tensors["1"])}, path, metadata)


def stranger(path):
    save_file({"weight": torch.zeros(3)}, path)


def text(path):
    path.write_text("not a file of tensors")


DAMAGE = (
    cut,
    empty,
    longer,
    flipped_first,
    flipped_last,
    foreign_key,
    other_rows,
    other_dtype,
    other_shape,
    stranger,
    text,
)


@pytest.mark.parametrize("harm", DAMAGE)
def test_a_damaged_recording_is_named_removed_and_made_anew(tmp_path, log, harm):
    record(tmp_path)
    damaged = shards(tmp_path)[1]
    harm(damaged)
    assert is_gone(tmp_path)
    assert len(log()) == 1
    assert log()[0].startswith(f"{damaged.parent}: damaged ({damaged.name}: ")
    assert log()[0].endswith("); it is recorded anew")
    assert is_exact(record(tmp_path))
    assert is_exact(find(tmp_path))


@pytest.mark.parametrize("harm", DAMAGE)
def test_whoever_goes_on_does_not_trust_what_is_there(tmp_path, harm):
    files = plan(tmp_path)
    fill(files, files.spans[:2])
    harm(shards(tmp_path)[1])
    assert files.missing(files.spans) == [range(1024, 2048), range(2048, 2500)]


def test_the_content_is_read_once_per_process(tmp_path, monkeypatch):
    record(tmp_path)
    checked = []
    checksum = store._checksum
    monkeypatch.setattr(store, "_checksum", lambda tensors: checked.append(tensors) or checksum(tensors))
    assert find_recording(tmp_path, "k", ROWS) is not None  # written here
    assert checked == []
    find(tmp_path)
    assert find_recording(tmp_path, "k", ROWS) is not None
    assert len(checked) == 3


def test_no_flipped_bit_of_a_header_goes_unnoticed(tmp_path):
    record(tmp_path / "good", rows=4)
    size = shards(tmp_path / "good")[0].stat().st_size - 4 * 34
    assert size > 100
    for position in range(size):
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        flip(shards(tmp_path / "bad")[0], position, 1 << position % 8)
        assert is_gone(tmp_path / "bad", rows=4), position
        shutil.rmtree(tmp_path / "bad")


def test_a_flipped_bit_of_a_manifest_costs_the_recording_at_most(tmp_path):
    record(tmp_path / "good", rows=4)
    for position in range((tmp_path / "good/k.recording/manifest.json").stat().st_size):
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        flip(tmp_path / "bad/k.recording/manifest.json", position, 1 << position % 8)
        store._verified.clear()
        recording = find_recording(tmp_path / "bad", "k", 4)
        assert recording is None or is_exact(recording, 4), position
        shutil.rmtree(tmp_path / "bad")


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"key": "other"},
        {"rows": 1024},
        {"file_rows": 512},
        {"file_rows": 0},
        {"leaves": [{"dtype": "float32", "shape": [2, 3]}]},
    ],
)
def test_a_recording_with_a_wrong_manifest_is_removed(tmp_path, log, change):
    record(tmp_path)
    manifest = tmp_path / "k.recording" / "manifest.json"
    write_json(manifest, read_json(manifest) | change)
    assert is_gone(tmp_path)
    assert log()[0].startswith(f"{manifest.parent}: damaged (")


@pytest.mark.parametrize("written", ["", "[]", "{}", '{"format": 1}', "null", "{"])
def test_a_manifest_that_is_none(tmp_path, log, written):
    record(tmp_path)
    (tmp_path / "k.recording" / "manifest.json").write_text(written)
    assert is_gone(tmp_path)
    assert len(log()) == 1


# Failures


def test_killed_while_writing_it_goes_on_where_it_was(tmp_path):
    stall = """
import os, time
calls, fsync = [], os.fsync
def slow(handle):
    calls.append(handle)
    if len(calls) == 5:  # two for each file: its own and its folder's
        print("written, not yet in place", flush=True)
        time.sleep(600)
    fsync(handle)
os.fsync = slow
"""
    child = start(stall + FILL, tmp_path)
    for expected in ("wrote\n", "wrote\n", "written, not yet in place\n"):
        assert line(child) == expected
    child.send_signal(signal.SIGKILL)
    child.communicate()
    left = names(tmp_path)
    assert len(left) == 3
    assert left[0].endswith(".partial")
    assert find_recording(tmp_path, "k", ROWS) is None
    output, error = start(FILL, tmp_path).communicate()
    assert output.splitlines() == ["wrote", f"1 {2500 * 2499 // 2}"], error
    assert names(tmp_path) == [
        "000000000.safetensors",
        "000001024.safetensors",
        "000002048.safetensors",
        "manifest.json",
    ]


def test_a_file_that_outgrows_the_disk_leaves_nothing(tmp_path):
    """The limit on a file's size is the kernel's: write() stores what fits and then fails."""
    code = """
import resource, sys
from pathlib import Path
import torch
from hfft.replay.store import Leaf, plan_recordings
(files,) = plan_recordings(Path(sys.argv[1]), {"k": [Leaf(torch.float32, (2**20,))]}, rows=2, batch=1)
(span,) = files.spans
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    files.write(span, [torch.zeros(2, 2**20)])
except OSError as error:
    print(error.errno)
"""
    output, error = start(code, tmp_path).communicate()
    assert output == f"{errno.EFBIG}\n", error
    assert names(tmp_path) == []


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_disk_that_turns_out_to_be_full_leaves_nothing(tmp_path, monkeypatch, function):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    files = plan(tmp_path)
    fill(files, files.spans[:1])
    with monkeypatch.context() as patched:
        patched.setattr(os, function, full)
        with pytest.raises(OSError, match="No space left"):
            fill(files, files.spans[1:2])
    assert names(tmp_path) == ["000000000.safetensors"]
    assert is_exact(fill(files).finish())


# Two runs at once


def test_two_runs_at_once_write_once_and_read_the_same(tmp_path):
    children = [start(FILL, tmp_path) for _ in range(2)]
    results = [child.communicate() for child in children]
    last = sorted(output.splitlines()[-1] for output, error in results if output or pytest.fail(error))
    assert last == [f"0 {2500 * 2499 // 2}", f"3 {2500 * 2499 // 2}"]


def test_the_second_run_waits_says_so_once_and_goes_on_when_the_first_is_killed(tmp_path, log):
    code = """
import sys, time
from pathlib import Path
from hfft.replay.store import locked
with locked(Path(sys.argv[1]), "k"):
    print("locked", flush=True)
    time.sleep(600)
"""
    child = start(code, tmp_path)
    assert line(child) == "locked\n"
    with locked(tmp_path, "another"):  # another key: at once
        assert log() == []
    killed = threading.Event()
    threading.Timer(1, lambda: (killed.set(), child.kill())).start()
    with locked(tmp_path, "k"):
        assert killed.is_set()
    assert child.wait(10) == -signal.SIGKILL
    assert log() == [f"{tmp_path / 'k.recording'}: waiting for another run that fills or checks it"]
    child.communicate()


# Room


@pytest.fixture
def cache(tmp_path):
    """Recordings a, b, c and d of about 20 kB, last used in the order b, d, a, c; d is unfinished."""
    for key in "abc":
        record(tmp_path, key, rows=600)
    fill(plan(tmp_path, "d", rows=600))
    for age, key in enumerate("cadb"):
        os.utime(tmp_path / f"{key}.recording", (1e9 - age, 1e9 - age))
    return tmp_path


def left(folder):
    return "".join(sorted(path.name[0] for path in folder.glob("*.recording")))


def size(folder, keys):
    return sum(path.stat().st_size for key in keys for path in (folder / f"{key}.recording").iterdir())


@pytest.mark.parametrize(("stays", "expected"), [("abcd", "abcd"), ("acd", "acd"), ("ac", "ac"), ("c", "c"), ("", "")])
def test_the_least_recently_used_go_first(cache, log, stays, expected):
    budget = size(cache, stays) + 1000
    assert make_room(cache, 1000, budget)
    assert left(cache) == expected
    assert len(log()) == 4 - len(expected)
    for said, key in zip(log(), "bdac", strict=False):
        assert said.startswith(f"{cache / key}.recording: removed to make room (0.00 GB, last used 20")


def test_one_byte_too_many_costs_one_more(cache):
    assert make_room(cache, 1001, size(cache, "acd") + 1000)
    assert left(cache) == "ac"


def test_being_found_counts_as_use(cache):
    assert find_recording(cache, "b", 600) is not None
    assert make_room(cache, 0, size(cache, "abc"))
    assert left(cache) == "abc"
    assert make_room(cache, 0, size(cache, "bc"))
    assert left(cache) == "bc"


def test_kept_ones_stay(cache):
    assert make_room(cache, 0, size(cache, "bd"), keep={"b", "d", "unknown"})
    assert left(cache) == "bd"


def test_locked_ones_stay(cache):
    with locked(cache, "b"):
        assert make_room(cache, 0, size(cache, "bc"))
    assert left(cache) == "bc"
    with locked(cache, "d"):  # of what is gone, too
        assert make_room(cache, 0, size(cache, "c"))
    assert left(cache) == "c"


def test_two_runs_that_make_room_at_once_take_turns(cache, monkeypatch):
    answers = []
    other = threading.Thread(target=lambda: answers.append(make_room(cache, 0, size(cache, "c"))))
    remove = shutil.rmtree

    def slow(path):
        if other.ident is None:
            other.start()
            other.join(0.5)  # it waits, and doesn't take what is locked here for recordings at work
            assert answers == []
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", slow)
    assert make_room(cache, 0, size(cache, "ac"))
    other.join(10)
    assert answers == [True]
    assert left(cache) == "c"


def test_nothing_goes_where_it_would_not_help(cache, log):
    assert not make_room(cache, 1001, 1000)
    with locked(cache, "a"):
        assert not make_room(cache, 1000, size(cache, "ab") + 999, keep={"b"})
    assert left(cache) == "abcd"
    assert log() == []


def test_room_on_the_disk_counts_too(cache, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 2 * GB))
    assert make_room(cache, GB // 2, 100 * GB)
    assert not make_room(cache, GB, 100 * GB)  # a margin of 1 GiB
    assert left(cache) == "abcd"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 2**30))
    assert make_room(cache, 1, 100 * GB)  # what goes is enough
    assert left(cache) == "acd"


def test_an_opened_recording_outlives_its_removal(cache):
    recording = find(cache, "c", 600)
    assert make_room(cache, 0, 0)
    assert left(cache) == ""
    assert is_exact(recording, 600)


def test_other_folders_are_left_alone(cache):
    other = cache / "model"
    other.mkdir()
    write_json(other / "manifest.json", {"format": 1})
    (cache / "x.txt").write_text(json.dumps([]))
    assert make_room(cache, 0, 0)
    assert (other / "manifest.json").exists()
    assert (cache / "x.txt").exists()
