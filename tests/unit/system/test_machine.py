import os
import platform
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from hfft.system.machine import (
    cpus_per_process,
    describe_arithmetic,
    describe_environment,
    has_native_bfloat16,
    package_versions,
)


def test_the_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    alone = cpus_per_process()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cpus_per_process() == max(alone // 2, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4096")
    assert cpus_per_process() == 1


def test_a_machine_without_git_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_environment()["git_commit"] is None


def test_the_hardware_has_a_name(monkeypatch, tmp_path):
    assert describe_environment()["hardware"]
    monkeypatch.setattr("hfft.system.machine.Path", lambda path: tmp_path / "none")
    monkeypatch.setattr("platform.processor", lambda: "")
    assert describe_environment()["hardware"] == platform.machine()


def test_the_environment_holds_no_variable_of_the_shell(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in str(describe_environment())
    assert os.environ["HF_TOKEN"] == "hf_secret"


@pytest.mark.parametrize(("avx", "amx"), [(False, False), (True, False), (False, True)])
def test_a_cpu_computes_in_bfloat16_with_avx512_or_amx(monkeypatch, avx, amx):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_native_bfloat16() == (avx or amx)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)], ids=str)
def test_a_gpu_does_from_ampere_on(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert has_native_bfloat16() is expected


def test_versions_of_packages_that_are_there(monkeypatch):
    assert package_versions()["timm"]
    assert package_versions()["pillow"]

    def gone(name):
        if name == "timm":
            raise PackageNotFoundError
        return version(name)

    monkeypatch.setattr("hfft.system.machine.version", gone)
    assert "timm" not in package_versions()
    assert package_versions()["pillow"]


def test_arithmetic_to_the_bit_names_more():
    found = {exact: describe_arithmetic(torch.device("cpu"), to_the_bit=exact) for exact in (False, True)}
    assert found[False] == {"device": "cpu", "mkldnn.matmul": "none", "mkldnn.conv": "none"}
    assert found[False].items() < found[True].items()
    assert found[True]["threads"] == torch.get_num_threads()
