"""scripts/train.slurm for real, with stand-ins for the commands of SLURM that it calls; nodes are the loopback."""

import json
import os
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from launches import ROOT, assert_same_result, free_port, run, succeed, train, write_recipe

SCRIPT = ["bash", ROOT / "scripts/train.slurm"]
SRUN = """#!/usr/bin/env bash
# One task per node, all at once; ends with the first exit code that isn't 0.
[[ $1 == --kill-on-bad-exit=1 ]] || { echo "srun: $1?" >&2; exit 64; }
shift
tasks=() code=0
for ((rank = 0; rank < SLURM_NNODES; rank++)); do
    SLURM_PROCID=$rank SLURM_STEP_NUM_TASKS=$SLURM_NNODES "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$1 $2 $#" == "show hostnames 3" ]] || { echo "scontrol: $*?" >&2; exit 64; }
tr , '\\n' <<< "$3"
"""
RECORDER = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "$RECORDED/rank$SLURM_PROCID"
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """`cluster(nodes, gpus)`: the variables of a job, and a PATH with its commands."""
    commands = tmp_path / "commands"
    commands.mkdir()
    monkeypatch.setenv("PATH", os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]))

    def add(name, text):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)

    def job(nodes, gpus, recorder=None):
        add("srun", SRUN)
        add("scontrol", SCONTROL)
        if recorder is not None:
            add("accelerate", recorder)
        return {
            "SLURM_JOB_ID": str(free_port()),
            "SLURM_JOB_NODELIST": ",".join(["127.0.0.1", "localhost"][:nodes]),
            "SLURM_NNODES": str(nodes),
            "SLURM_GPUS_ON_NODE": str(gpus),
            "SLURM_CPUS_PER_TASK": str(gpus),
            "RECORDED": str(tmp_path),
        }

    return job


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 4), (2, 1), (2, 8)])
def test_accelerate_accepts_what_the_script_starts(nodes, gpus, cluster, tmp_path):
    """By accelerate's own check, which refuses `--multi_gpu` for one process."""
    words = ["r.yaml", "phases.head.unfreeze={blocks: 1}", "name=it's"]
    job = cluster(nodes, gpus, RECORDER)
    succeed([*SCRIPT, *words], tmp_path, **job)
    ports = set()
    for rank in range(nodes):
        name, *line = (tmp_path / f"rank{rank}").read_text().split("\0")[:-1]
        assert name == "launch"
        asked = launch_command_parser().parse_args(line)
        assert (asked.training_script, asked.training_script_args) == ("hfft", ["train", *words])
        assert (asked.num_machines, asked.num_processes) == (nodes, nodes * gpus)
        assert asked.multi_gpu == (nodes * gpus > 1)
        if nodes > 1:
            assert (asked.machine_rank, asked.main_process_ip) == (rank, "127.0.0.1")
        ports.add(asked.main_process_port)
        _validate_launch_command(asked)
    assert len(ports) == 1  # all meet at one place
    succeed([*SCRIPT, *words], tmp_path, **{**job, "SLURM_JOB_ID": str(int(job["SLURM_JOB_ID"]) + 1)})
    line = (tmp_path / "rank0").read_text().split("\0")[1:-1]
    other = launch_command_parser().parse_args(line).main_process_port
    assert (other not in ports) == (nodes * gpus > 1)  # two jobs on a node don't meet


def test_a_job_without_gpus_is_refused(cluster, tmp_path):
    job = cluster(1, 1, RECORDER)
    done = run([*SCRIPT, "r.yaml"], tmp_path, **{**job, "SLURM_GPUS_ON_NODE": ""})
    assert done.returncode != 0
    assert "this script is for sbatch with --gpus-per-node" in done.stderr
    assert not (tmp_path / "rank0").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_jobs_of_one_node_and_of_two_end_with_the_same_weights(cluster, photos, tmp_path):
    photos({"train/ant": 11, "train/bee": 10, "validation/ant": 5, "validation/bee": 4, "test/ant": 4, "test/bee": 5})
    write_recipe(tmp_path, "vit")
    words = {nodes: train("vit", f"nodes{nodes}", "auto", 4 // nodes)[3:] for nodes in (1, 2)}
    for nodes in (1, 2):
        done = succeed([*SCRIPT, *words[nodes]], tmp_path, **cluster(nodes, 1))
        assert done.stderr.count("trains head;") == 1
        environment = json.loads((tmp_path / f"nodes{nodes}/of_vit/environment.json").read_text())
        assert environment["processes"] == nodes
    assert_same_result(tmp_path, "vit", "nodes1", "nodes2")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_job_that_fails_tells_slurm(cluster, tmp_path):
    done = run([*SCRIPT, "none.yaml"], tmp_path, **cluster(2, 1))
    assert done.returncode == 1  # the launcher's
    assert done.stderr.count("error: none.yaml: the recipe can't be read") == 1
