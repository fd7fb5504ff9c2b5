"""pace beyond one machine: replicas of the server under Ray Serve, which starts more of them while there is more to do.

    pip install 'pace[ray]'     # on each machine, the same version
    serve run deploy.ray_serve:app model=smollm2 min_replicas=1 max_replicas=4 api_key_file=/etc/pace/api-key

The API is that of `pace serve`, at Ray's own address (http://127.0.0.1:8000). Arguments are its options, with _ for -,
but for those of the socket, which is Ray's: --host, --port, --tls-cert, --tls-key. Beside them:

    min_replicas, max_replicas      1, 1: one a machine, since a replica's engines take the whole of it
    target_ongoing_requests         32: requests that a replica answers at once, above which another is started
    num_cpus                        1: what Ray reckons a replica at; all of them, where Ray runs other work as well

Files (a model's directory, keys) are read where the replica runs, and must be on each machine. Each replica has its own
queue, caches and /metrics: what Ray's address shows at /metrics is that of whichever replica answers.

As a file, for `serve deploy`:

    applications:
      - name: pace
        import_path: deploy.ray_serve:app
        args: {model: smollm2, max_replicas: 4, kv_cache_bytes: 8G}

Two things are settled when a machine's Ray begins. Where `serve run` begins it, this file does; else say them yourself:

    export RAY_USAGE_STATS_ENABLED=0                    # else Ray tells its makers how it is used
    export RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING=0  # else a proxy sends all it can to the replica beside it
    ray start --head                                    # and on the other machines: ray start --address=HEAD:6379
"""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING", "0")

import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Any

import yaml
from fastapi import FastAPI
from ray import cloudpickle, serve

from pace.cli.sizes import as_bytes
from pace.server.app import create_app
from pace.server.config import ServerConfig, kind_of
from pace.server.front import log_to, open_service, places
from pace.server.log import Handler

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the other machines have pace, but not this file

SOCKET = ("host", "port", "tls_cert", "tls_key")
SCALE = {"min_replicas": 1, "max_replicas": 1, "target_ongoing_requests": 32, "num_cpus": 1}


def app(args: Mapping[str, Any]) -> serve.Application:
    """ValueError for what is no option, or can't be."""
    scale = {name: int(args.get(name, default)) for name, default in SCALE.items()}
    config = config_of({name: value for name, value in args.items() if name not in SCALE})
    deployment = serve.deployment(
        serve.ingress(lambda: replica_app(config))(Replica),
        name="pace",
        autoscaling_config={name: value for name, value in scale.items() if name != "num_cpus"},
        ray_actor_options={"num_cpus": scale["num_cpus"]},
        max_replicas_per_node=1,
        max_ongoing_requests=config.max_sequences + config.max_waiting,  # beyond them pace itself says 429
        graceful_shutdown_timeout_s=config.drain_seconds,
    )
    return deployment.bind()


def config_of(args: Mapping[str, Any]) -> ServerConfig:
    """Of arguments that are text on a command line, and of any type in a file."""
    known = {each.name: each for each in fields(ServerConfig)}
    if theirs := [name for name in args if name in SOCKET]:
        raise ValueError(f"{', '.join(theirs)}: Ray listens, not pace; see `serve run --help` and `serve start --help`")
    values = dict(args)
    for name in values.keys() & known.keys():
        if isinstance(text := values[name], str) and kind_of(known[name]) is not str:
            is_size = known[name].metadata.get("kind") == "bytes"
            values[name] = as_bytes(text) if is_size else yaml.safe_load(text)
    return ServerConfig.of(values)


def replica_app(config: ServerConfig) -> FastAPI:
    """What a replica answers with: its engines begin before its first request, and end after its last."""
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray's, from num_cpus; the threads of an engine are pace's to choose
    service = open_service(config, places(config))
    log_to(Handler(config.log_json, service.metrics.log_lines_lost.inc))

    @asynccontextmanager
    async def engines(_: FastAPI) -> AsyncIterator[None]:
        try:
            await service.fleet.start()
            yield
        finally:
            await service.close()

    api = create_app(service)
    api.router.lifespan_context = engines
    api.state.service = service
    return api


class Replica:
    async def check_health(self) -> None:
        """Ray replaces a replica whose engines stay away: each is begun anew by itself."""
        if not self.app.state.service.ready:  # type: ignore[attr-defined]
            raise RuntimeError("no engine is up")
