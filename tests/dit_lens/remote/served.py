"""An ndif server in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx

SERVER = Path(__file__).with_name("ndif_server.py")


class Served:
    """A server process."""

    def __init__(self, *options: str) -> None:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "COV"))
        }
        command = [sys.executable, "-I", str(SERVER), *options]
        self.process = subprocess.Popen(
            command, cwd="/", env=environment, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        said = json.loads(self.process.stdout.readline())
        self.url, self.child_url = (
            f"http://127.0.0.1:{said[port]}" for port in ("port", "child_port")
        )
        self.child: int | None = said["child"]

    def log(self) -> list[dict[str, int]]:
        """Bytes in and out of every run so far."""
        return httpx.get(f"{self.url}/log").json()

    def kill_child(self) -> None:
        if self.child is not None:
            os.kill(self.child, signal.SIGKILL)
            self.child = None

    def stop(self) -> None:
        self.kill_child()
        self.process.kill()
        self.process.wait()
