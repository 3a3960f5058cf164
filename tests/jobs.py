"""Several commands of hfft in one launch, each as if it were alone: the launch costs more than most commands.

`accelerate launch --config_file CONFIG -m jobs JOBS.json` runs each command of the file in turn, in the same
processes; `launches.run_jobs` starts it and gives what each of them wrote.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing_to(place: str) -> Iterator[None]:
    """Both streams of the process go to files of this beginning, whoever writes."""
    kept = [os.dup(number) for number in (1, 2)]
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{place}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


def main() -> None:
    """Run the commands until one fails."""
    file = Path(sys.argv[1])
    if sys.argv[2:] == ["fsdp"]:
        import fsdp_on_cpu

        fsdp_on_cpu.believe_in_accelerators()
        fsdp_on_cpu.tell_of_shards()
    from hfft.cli import main as run
    from hfft.system import distributed

    leave, distributed.leave = distributed.leave, lambda: None  # a command's end is not the launch's
    for name, words in json.loads(file.read_text()).items():
        place = f"{file.parent / name}.{os.environ['RANK']}"
        with writing_to(place):
            code = run(words)
        if code != 0:
            sys.exit(f"{name}: exit code {code}: {Path(f'{place}.stderr').read_text()}")
    leave()


if __name__ == "__main__":
    main()
