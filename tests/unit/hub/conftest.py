import hub_server
import pytest


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on the loopback interface, to which this process is connected."""
    with hub_server.running() as running:
        hub_server.connect(running, monkeypatch, tmp_path / "home")
        yield running
