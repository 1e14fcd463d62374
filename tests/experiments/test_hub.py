"""The one question to the Hub: bounded in time, obedient to the offline switch, and put in words."""

import http.server
import threading
import time

import pytest

from experiments import hub
from experiments.errors import ExperimentError


@pytest.fixture(autouse=True)
def asked_afresh(monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub.obstacle.cache_clear()
    yield
    hub.obstacle.cache_clear()


@pytest.fixture
def serve(monkeypatch):
    """Starts a Hub on this machine that answers every question with one status; returns the questions it got."""
    servers = []

    def start(status):
        asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                asked.append(self.path)
                self.send_response(status)
                self.end_headers()

            def log_message(self, *args):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("status", "says"), [(200, None), (404, None), (503, "the Hub answered with error 503")])
def test_any_answer_but_a_failure_will_do_and_is_asked_for_once(serve, status, says):
    asked = serve(status)
    assert [hub.obstacle(), hub.obstacle()] == [says, says]
    assert len(asked) == 1


def test_a_hub_that_hangs_costs_no_more_than_the_limit(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(hub, "_ask", lambda endpoint: released.wait(30) and None)  # as a name lookup can
    monkeypatch.setattr(hub, "LIMIT_SECONDS", 0.3)
    start = time.monotonic()
    assert "no answer within" in hub.obstacle()
    assert time.monotonic() - start < 2
    released.set()


def test_a_closed_door_is_reported(monkeypatch):
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.obstacle() == "the Hub is out of reach (connection refused)"


def test_offline_mode_is_respected_without_a_question(serve, monkeypatch):
    asked = serve(200)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.obstacle() == "HF_HUB_OFFLINE is set" and not asked


def cache(root, monkeypatch, *files, repo="models--some--model"):
    """A cache of the Hub's client that holds these files of one repository."""
    snapshot = root / repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / repo / "refs").mkdir()
    (root / repo / "refs" / "main").write_text("0" * 40)
    for name in files:
        (snapshot / name).write_text("{}")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(root))
    return snapshot


def test_what_is_cached_is_found_without_a_network(tmp_path, monkeypatch):
    snapshot = cache(tmp_path, monkeypatch, "config.json", "model.safetensors")
    assert hub.cached("some/model", ("config.json", "model*.safetensors")) == snapshot
    assert hub.cached("some/model", ("config.json", "weights.npz")) is None
    assert hub.cached("other/model", ("config.json",)) is None
    assert hub.cached("not a name!", ("config.json",)) is None


def test_a_failed_download_is_one_line(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ExperimentError) as error:
        hub.download("some/model", ("*",))
    assert str(error.value) == "model 'some/model' could not be downloaded: first line"
