"""The server: where it listens, what it leaves behind, and how it ends."""

import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from tests.app import stand_in

from nexus_adapters.app.server import is_loopback, running, serve
from nexus_adapters.errors import InvalidArgument


def test_a_port_in_use_is_an_error_before_the_page_is_built():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidArgument) as caught:
            serve(lambda: pytest.fail("built"), port=port)
    assert (caught.value.name, caught.value.expected) == ("port", "a free port")


@pytest.mark.parametrize(
    ("host", "port", "name"), [("no.such.host.invalid", 0, "host"), ("127.0.0.1", 70000, "port")]
)
def test_where_nothing_can_listen_is_an_error(host, port, name):
    with pytest.raises(InvalidArgument) as caught:
        serve(lambda: pytest.fail("built"), host=host, port=port)
    assert caught.value.name == name


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        *((host, True) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "192.168.0.9", "example.org")),
    ],
)
def test_only_loopback_is_this_machine(host, is_local):
    assert is_loopback(host) == is_local


def test_files_and_settings_of_a_server_are_gone_after_it():
    before = dict(os.environ)
    with running(stand_in.build) as address:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.parent.stat().st_mode & 0o077 == 0
        assert httpx.get(address).status_code == 200
    assert not folder.parent.exists()
    assert dict(os.environ) == before


def test_other_names_of_the_server_must_be_allowed():
    with running(stand_in.build, allowed_hosts=["app.example"]) as address:
        port = address.rpartition(":")[2]

        def status(host, **headers):
            return httpx.get(f"{address}/config", headers={"Host": host} | headers).status_code

        assert status("app.example") == status("APP.example:443") == status(f"localhost:{port}") == 200
        assert status("localhost:9") == 200  # a forwarded port
        assert status("evil.example") == status("10.0.0.1") == status("app.example.evil.example") == 421
        assert status("app.example", Origin="https://app.example") == 200
        assert status("app.example", Origin="https://evil.example") == 403


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from nexus_adapters.app.server import serve
from tests.app import stand_in
serve(stand_in.build, host=sys.argv[2], port=0, on_ready=lambda address: print(address, flush=True))
print("ended", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_an_interrupt_ends_it_at_once_also_while_a_page_is_open():
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", PROGRAM, root, "0.0.0.0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        port = process.stdout.readline().strip().rpartition(":")[2]
        address = f"http://127.0.0.1:{port}"
        with httpx.stream("GET", f"{address}/gradio_api/heartbeat/tests", timeout=60) as heartbeat:
            assert next(heartbeat.iter_text()).startswith("data")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert out == "ended\n"
    assert process.returncode == 0
    (line,) = err.splitlines()  # no traceback, and the warning that there is no login
    assert "no login" in line


def test_only_a_reachable_server_warns(caplog):
    with running(stand_in.build), caplog.at_level(logging.WARNING):
        assert not caplog.records
