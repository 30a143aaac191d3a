"""A real vLLM server on loopback, with the plugin, started as docs/integrations.md says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PORT = 8000  # as the page has it
SECONDS_TO_START = 420  # four minutes on two busy cores

# A small machine: the page's command is for a large one. Two processes of torch share the cores.
SMALL = {
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Server:
    url: str
    log: Path

    def metric(self, name: str, label: str = "") -> float:
        """The sum of one of the server's counters or gauges, over those that have the label, as in 'reason="stop"'."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found = re.findall(rf"^{re.escape(name)}(?:{{([^}}]*)}})? ([0-9.e+-]+)$", text, re.MULTILINE)
        assert found, f"no metric {name}"
        return sum(float(value) for labels, value in found if label in labels)

    def answered(self) -> float:
        """Requests whose answer ended by itself."""
        name = "vllm:request_success_total"
        return sum(self.metric(name, f'finished_reason="{reason}"') for reason in ("stop", "length"))

    def events(self, path: str, body: dict[str, object]) -> list[str]:
        """The data of the events of one stream, as they come over the wire."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as answer:
            lines = answer.read().decode().splitlines()
        return [line[6:] for line in lines if line.startswith("data: ")]

    def said(self, text: str, *, since: int = 0) -> bool:
        return text in self.log.read_text(errors="replace")[since:]

    def wait_until_idle(self, seconds: float = 60) -> None:
        """Until the engine holds no request."""
        end = time.monotonic() + seconds
        while self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting"):
            assert time.monotonic() < end, "the engine still has requests"
            time.sleep(0.2)


@contextmanager
def running(command: str, folder: Path, environment: Mapping[str, str]) -> Iterator[Server]:
    """The server that a shell command starts, until the end of the block; then everything that it started is gone."""
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            ["bash", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **SMALL, **environment},
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{PORT}", log)
    try:
        end = time.monotonic() + SECONDS_TO_START
        while not _healthy(server.url):
            if process.poll() is not None or time.monotonic() > end:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
                raise RuntimeError(f"the server did not start (status {process.poll()}):\n{tail}")
            time.sleep(0.5)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
