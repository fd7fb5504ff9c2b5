"""A server in processes of its own, as a user starts it."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil


class Server:
    """Use as a context: `url` answers; at the end it has ended by SIGTERM, and no process is left."""

    def __init__(self, model, *flags, log, port=0, wait=True, env=None, **options):
        self.log = Path(log)
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pace", "serve", str(model), "--port", str(port), *map(str, flags)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | (env or {}),
                **options,
            )
        if wait:
            self.url = self._wait()
            self.client = httpx.Client(base_url=self.url, timeout=120)

    def _wait(self):
        for _ in range(1200):
            if found := re.search(r" on (https?://\S+) with ", self.text):
                return found[1]
            assert self.process.poll() is None, self.text
            time.sleep(0.1)
        raise AssertionError(self.text)

    @property
    def text(self):
        return self.log.read_text(errors="replace")

    @property
    def children(self):
        """The processes below this one: nodes, and their engines."""
        found, parents = set(), {self.process.pid}
        while parents:
            listed = subprocess.run(
                ["ps", "-o", "pid=", "--ppid", ",".join(map(str, parents))], capture_output=True, text=True, check=False
            )
            parents = {int(pid) for pid in listed.stdout.split()} - found
            found |= parents
        return found

    def engine(self, index=0):
        """The process of an engine, by the log."""
        return int(re.findall(rf"engine {index} is up, process (\d+)", self.text)[-1])

    @contextmanager
    def busy(self):
        """Meanwhile a request waits for its first token: the engines are halted."""
        engines = [int(pid) for pid in re.findall(r"engine \d+ is up, process (\d+)", self.text)]
        for pid in engines:
            os.kill(pid, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            try:
                waits = pool.submit(self.post, "/v1/completions", prompt="a", max_tokens=1)
                while "pace_requests_waiting 1.0" not in self.client.get("/metrics").text:
                    time.sleep(0.01)
                yield
            finally:
                for pid in engines:
                    os.kill(pid, signal.SIGCONT)
            assert waits.result().status_code == 200

    def post(self, path, **body):
        return self.client.post(path, json=body)

    def stop(self, number=signal.SIGTERM, seconds=30):
        """The exit status."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        children = self.children
        if self.process.poll() is None:
            self.stop()
        deadline = time.monotonic() + 10
        while any(map(alive, children)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [pid for pid in children if alive(pid)]


def alive(pid):
    """Whether a process is there, and not only its exit status, for whoever looks after orphans."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
