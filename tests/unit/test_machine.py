import os

from hfft.machine import cpus_per_process, describe_environment


def test_the_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    alone = cpus_per_process()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cpus_per_process() == max(alone // 2, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4096")
    assert cpus_per_process() == 1


def test_a_machine_without_git_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_environment()["git_commit"] is None


def test_the_environment_holds_no_variable_of_the_shell(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in str(describe_environment())
    assert os.environ["HF_TOKEN"] == "hf_secret"
