"""deploy/ray_serve.py on a cluster of two "machines", which are both this one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from pace import LLM, SamplingParams

pytestmark = pytest.mark.slow

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0"}
ray = pytest.importorskip("ray", reason="ray is not installed: `make ray-test` makes an environment that has it")
from ray import serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

ROOT = Path(__file__).parents[2]
PROMPTS = [f"{word} {number}" for number in range(16) for word in ("the", "a", "no")]
NODE = {"num_cpus": 2, "object_store_memory": 100 << 20}


@pytest.fixture(scope="module")
def cluster():
    nodes = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    try:
        nodes.add_node(**NODE)
        ray.init(address=nodes.address, log_to_driver=False)
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.fixture(scope="module")
def app(cluster, tiny, tmp_path_factory):
    """As a user starts it, with two replicas. Its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"port": port}, proxy_location="HeadOnly")
    (keys := tmp_path_factory.mktemp("keys") / "keys").write_text("secret\n")
    options = [f"model={tiny}", "served_model_name=tiny", "min_replicas=2", "max_replicas=2", "engines=1", "threads=1"]
    options += ["kv_cache_bytes=2M", "prefix_caching=false", f"api_key_file={keys}"]
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "deploy.ray_serve:app", *options]
    log = tmp_path_factory.mktemp("run") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"RAY_ADDRESS": cluster.address},
        )
    try:
        wait_for(lambda: process.poll() is not None or len(running()) == 2, log.read_text)
        assert process.poll() is None, log.read_text()
        begun = set().union(*map(engines, running()))
        yield f"http://127.0.0.1:{port}"
        begun |= set().union(*map(engines, running()))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert begun
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in begun))


@pytest.fixture
def client(app):
    with httpx.Client(base_url=app, timeout=120, headers={"authorization": "Bearer secret"}) as client:
        yield client


def wait_for(condition, why=lambda: "", seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, why()
        time.sleep(0.5)


def running():
    """The processes of the replicas, where all that should be there are."""
    found = serve.status().applications.get("default")
    if found is None or found.status != "RUNNING":
        return set()
    return processes("-e", r"ray::ServeReplica:default:pace")


def processes(*which):
    """Of what `ps` lists with these arguments, those whose command has the last."""
    *which, pattern = which
    listed = subprocess.run(["ps", "-o", "pid=,args=", *which], capture_output=True, text=True, check=False).stdout
    return {int(line.split()[0]) for line in listed.splitlines() if pattern in line}


def engines(replica):
    """The processes of its engines, and of what holds their weights."""
    nodes = processes("--ppid", str(replica), "pace.server.node")
    return nodes.union(*(processes("--ppid", str(node), "pace.server.node") for node in nodes))


def log_of(cluster, replica):
    (path,) = Path(cluster.head_node.get_logs_dir_path()).glob(f"worker-*-{replica}.err")
    return path.read_text()


def ask(client, prompt):
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0.8, "seed": 3}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def wanted(tiny):
    outputs = LLM(tiny, kv_cache_bytes=2 << 20).generate(
        PROMPTS, SamplingParams(max_tokens=12, temperature=0.8, seed=3)
    )
    return [output.outputs[0].text for output in outputs]


def all_at_once(client):
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        return list(threads.map(lambda prompt: ask(client, prompt), PROMPTS))


def test_both_replicas_answer_as_generate_does(cluster, client, wanted):
    assert all_at_once(client) == wanted
    replicas = running()
    assert len(replicas) == 2
    assert all("outcome=ok" in log_of(cluster, replica) for replica in replicas)


def test_a_stream_comes_as_it_is_written(client):
    body = {"prompt": "abc", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    began, times, text = time.monotonic(), [], ""
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line and line != "data: [DONE]":
                times.append(time.monotonic() - began)
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    assert text == whole
    assert times[0] < times[-1] / 2


def test_who_leaves_a_stream_ends_it(cluster, client):
    body = {"prompt": "abc", "max_tokens": 450, "temperature": 0, "ignore_eos": True, "stream": True}
    headers = {"x-request-id": "leaves"}
    with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        next(response.iter_lines())
    line = r"request_id=leaves .*outcome=(\w+)"
    wait_for(lambda: any(re.search(line, log_of(cluster, replica)) for replica in running()), seconds=10)
    assert [found for replica in running() for found in re.findall(line, log_of(cluster, replica))] == ["cancelled"]


def test_keys_and_errors_are_those_of_the_server(app, client):
    assert httpx.get(f"{app}/v1/models").status_code == 401
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(f"{app}/ready").json()["status"] == "ready"
    refused = client.post("/v1/completions", json={"prompt": "a", "model": "other"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


def test_a_replica_that_is_killed_is_replaced(client, wanted):
    before = running()
    victim = min(before)
    orphans = engines(victim)
    assert orphans
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: victim not in running() and len(running()) == 2)
    assert len(running() - before) == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in orphans)
    assert all_at_once(client) == wanted


def test_an_engine_that_is_killed_comes_back_under_its_replica(client, wanted):
    before = running()
    replica = min(before)
    (node,) = processes("--ppid", str(replica), "pace.server.node")
    (engine,) = processes("--ppid", str(node), "pace.server.node")
    os.kill(engine, signal.SIGKILL)
    wait_for(lambda: processes("--ppid", str(node), "pace.server.node") - {engine})
    wait_for(lambda: client.get("/ready").status_code == 200)
    assert all_at_once(client) == wanted
    assert running() == before


def test_arguments_are_the_options_of_the_server():
    from deploy.ray_serve import app, config_of

    text = {"model": "m", "kv_cache_bytes": "2M", "threads": "3", "log_json": "true", "cors_origin": "[a, b]"}
    config = config_of(text | {"drain_seconds": "1.5", "engines": "2"})
    assert (config.kv_cache_bytes, config.threads, config.log_json) == (2 << 20, 3, True)
    assert (config.cors_origin, config.drain_seconds, config.engines) == (("a", "b"), 1.5, "2")
    assert config_of({"model": "m", "kv_cache_bytes": 2 << 20, "log_json": True}).log_json is True
    with pytest.raises(ValueError, match="port: Ray listens"):
        app({"model": "m", "port": "8000"})
    with pytest.raises(ValueError, match="replicas"):
        app({"model": "m", "replicas": "2"})


def test_ray_is_told_not_to_report_its_use():
    code = "import deploy.ray_serve, ray._common.usage.usage_lib as usage; print(usage.usage_stats_enabled())"
    bare = {name: value for name, value in os.environ.items() if name != "RAY_USAGE_STATS_ENABLED"}
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=bare, capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"
