"""Two processes: what the main one computes or raises comes to both, and only collective operations have a limit."""

import os
import subprocess
import sys

import pytest
from launches import free_port

from hfft.errors import RunError
from hfft.system.distributed import meet, on_main

SCRIPT = """
import os, time
import torch
from hfft.system.distributed import join, meet, on_main
from hfft.errors import RunError

state = join(2)
main = state.is_main_process

def fail(error):
    raise error

print("value", on_main(lambda: os.environ["RANK"]))
for error in (RunError("no"), OSError(28, "full")):
    try:
        on_main(lambda: fail(error))
    except type(error) as found:
        print("raised", found)
time.sleep(4 * main)
meet()
print("met")
time.sleep(4 * (not main))
meet()
print("met")
try:
    time.sleep(4 * main)
    torch.distributed.barrier()
except RuntimeError as error:
    print("late", "Timed out waiting" in str(error), flush=True)
os._exit(0)
"""


@pytest.mark.multiprocess
def test_two_processes():
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate()[0].splitlines() for process in processes]
    together = ["value 0", "raised no", "raised [Errno 28] full", "met", "met"]
    assert [lines[:5] for lines in said] == [together, together]
    assert said[1][5:] == ["late True"]


def test_a_process_that_is_alone_waits_for_nobody():
    meet()
    assert on_main(lambda: 3) == 3
    with pytest.raises(RunError, match="no"):
        on_main(lambda: (_ for _ in ()).throw(RunError("no")))
