"""The files of deploy/ fit each other, the server's options and its metrics."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pace.engine.speculation import SpeculationStats
from pace.server.admission import Admission
from pace.server.config import ServerConfig, kind_of
from pace.server.fleet import Engine
from pace.server.metrics import Metrics
from pace.server.router import Bearer

DEPLOY = Path(__file__).parent.parent / "deploy"
SECRETS = "/run/secrets"

# Written when an engine is asked; there is none here.
STATS = SimpleNamespace(
    running=0,
    waiting=0,
    cache=SimpleNamespace(used_bytes=0, capacity_bytes=1),
    prefix_hit_rate=0.0,
    preemptions=0,
    steps=0,
    speculation=SpeculationStats(),
)


def metrics():
    """What the server shows at /metrics: the kind of each metric, and its labels."""
    shown = Metrics([Engine(Bearer(0), None, first_up=None, stats=STATS)], Admission(1, 1))
    shown.requests.labels("chat", "ok")
    for family in shown.registry.collect():
        labels = set.union(*(set(sample.labels) for sample in family.samples)) - {"le"}
        yield family.name + ("_total" if family.type == "counter" else ""), (family.type, labels)


METRICS = dict(metrics())
SERIES = {
    f"{name}{suffix}": (kind, labels | ({"le"} if suffix == "_bucket" else set()))
    for name, (kind, labels) in METRICS.items()
    for suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
}
OPTIONS = {"--" + each.name.replace("_", "-"): kind_of(each) for each in fields(ServerConfig) if each.name != "model"}


def read_yaml(name):
    return yaml.safe_load((DEPLOY / name).read_text())


def dashboard():
    return json.loads((DEPLOY / "grafana/pace.json").read_text())


def queries():
    shown = [target for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    return [(target["expr"], target["legendFormat"]) for target in shown]


def alerts():
    return [rule for group in read_yaml("alerts.yml")["groups"] for rule in group["rules"]]


def instructions():
    """Of the Dockerfile: (instruction, its text) with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]


def final_stage():
    lines = instructions()
    start = max(i for i, (name, _) in enumerate(lines) if name == "FROM")
    return lines[start:]


def only(name):
    """The one instruction of this name in the final stage."""
    (text,) = (text for found, text in final_stage() if found == name)
    return text


def unit():
    """The settings of the systemd unit, each with all its values."""
    settings = {}
    for line in (DEPLOY / "pace.service").read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            settings.setdefault(name, []).append(value)
    return settings


def serve_words(where):
    """What `pace serve` is given."""
    service = read_yaml("docker-compose.yml")["services"]["pace"]
    return {
        "Dockerfile": json.loads(only("ENTRYPOINT")),
        "docker-compose.yml": json.loads(only("ENTRYPOINT")) + service["command"],
        "pace.service": shlex.split(unit()["ExecStart"][0]),
    }[where]


def option(words, name):
    return words[words.index(name) + 1]


def seconds(text):
    return float(text.removesuffix("s"))


# --- metrics ---


@pytest.mark.parametrize("query", [expr for expr, _ in queries()])
def test_a_query_is_of_metrics_that_exist_with_labels_that_they_have(query):
    names = set(re.findall(r"\bpace_\w+", query))
    assert names
    assert names <= SERIES.keys()
    labels = set.intersection(*(SERIES[name][1] for name in names)) | {"instance", "job"}
    asked = {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(",")}
    asked |= {label for group in re.findall(r"{([^}]*)}", query) for label in re.findall(r"(\w+)\s*[=!]", group)}
    assert asked <= labels


@pytest.mark.parametrize(("query", "legend"), queries())
def test_a_legend_names_labels_that_the_query_keeps(query, legend):
    kept = {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(",")}
    assert set(re.findall(r"{{(\w+)}}", legend)) == kept - {"le"}


@pytest.mark.parametrize("query", [expr for expr, _ in queries()])
def test_what_only_grows_is_shown_as_a_rate_and_what_does_not_is_not(query):
    for name in re.findall(r"\bpace_\w+", query):
        rated = re.search(rf"\b(?:rate|increase)\({name}{{[^}}]*}}\[\$__rate_interval\]\)", query) is not None
        assert rated == (SERIES[name][0] != "gauge"), name
        assert ("histogram_quantile" in query) == name.endswith("_bucket"), name


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_is_of_what_there_is(rule):
    names = set(re.findall(r"\bpace_\w+", rule["expr"])) or {"up"}
    assert names <= SERIES.keys() | {"up"}
    labels = {"instance", "job"}.union(*(SERIES[name][1] for name in names if name != "up"))
    used = set(re.findall(r"(\w+)=", rule["expr"])) | set(
        re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])
    )
    assert used <= labels
    for name in names - {"up"}:
        rated = re.search(rf"\b(?:rate|increase)\({name}(?:{{[^}}]*}})?\[\d+m\]\)", rule["expr"]) is not None
        assert rated == (SERIES[name][0] != "gauge"), name
    outcomes = set(re.findall(r'outcome="(\w+)"', rule["expr"]))
    assert outcomes <= {"ok", "rejected", "cancelled", "error"}


def test_the_alerts_are_read_by_prometheus():
    (name,) = read_yaml("prometheus.yml")["rule_files"]
    volumes = read_yaml("docker-compose.yml")["services"]["prometheus"]["volumes"]
    assert f"./{name}:/etc/prometheus/{name}:ro" in volumes


def test_the_metrics_of_the_docs_are_those_of_the_server():
    text = (DEPLOY.parent / "docs/InferenceServerMonitoring.md").read_text()
    told = re.findall(r"^\| `(pace_\w+)`(?: \(([^)]*)\))? \|", text, flags=re.MULTILINE)
    assert {name: set(re.findall(r"\w+", labels)) for name, labels in told} == {
        name: labels for name, (_, labels) in METRICS.items()
    }


def test_every_metric_is_on_the_dashboard():
    shown = {name for query, _ in queries() for name in re.findall(r"\bpace_\w+", query)}
    assert {name for name in METRICS if not any(each.startswith(name) for each in shown)} == set()


def test_the_dashboards_variables():
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    assert {name for query, _ in queries() for name in re.findall(r"\$(?!__)(\w+)", query)} == variables.keys()
    for name, variable in variables.items():
        metric, label = re.fullmatch(r"label_values\((\w+).*, (\w+)\)", variable["query"]["query"]).groups()
        assert label == name
        assert label in SERIES[metric][1] | {"instance"}


def test_panels_have_ids_of_their_own_and_lie_beside_each_other():
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


# --- how it all is started ---


@pytest.mark.parametrize("where", ["Dockerfile", "docker-compose.yml", "pace.service"])
def test_pace_serve_is_given_options_that_it_has(where):
    words = serve_words(where)
    assert [Path(words[0]).name, words[1]] == ["pace", "serve"]
    assert option(words, "--api-key-file")
    model = {"Dockerfile": 0, "docker-compose.yml": 1, "pace.service": 1}[where]  # a container's comes as an argument
    given, rest = iter(words[2:]), []
    for word in given:
        if not word.startswith("--"):
            rest.append(word)
        elif OPTIONS[word] is not bool:
            next(given)
    assert len([word for word in rest if not word.startswith("$PACE_OPTIONS")]) == model


@pytest.mark.parametrize("where", ["Dockerfile", "docker-compose.yml", "pace.service"])
def test_pace_serve_understands_what_it_is_given(where):
    words = [word for word in serve_words(where)[2:] if word != "$PACE_OPTIONS"]
    model = ["smollm2"] if where == "Dockerfile" else []
    command = [sys.executable, "-m", "pace", "serve", *words, *model, "--print-config"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    config = yaml.safe_load(run.stdout)
    assert (config["port"], config["engines"], config["log_json"]) == (8000, "auto", True)
    assert config["api_key_file"] == option(words, "--api-key-file")
    assert config["drain_seconds"] == 60


def test_what_the_server_needs_is_installed():
    assert any("[serve]" in text for name, text in instructions() if name == "RUN")
    assert "[serve]'" in (DEPLOY / "pace.service").read_text()


def test_requests_have_time_to_end():
    compose, settings = read_yaml("docker-compose.yml")["services"]["pace"], unit()
    assert seconds(compose["stop_grace_period"]) > float(option(serve_words("docker-compose.yml"), "--drain-seconds"))
    assert seconds(settings["TimeoutStopSec"][0]) > float(option(serve_words("pace.service"), "--drain-seconds"))
    assert settings["KillSignal"] == ["SIGTERM"]
    assert settings["KillMode"] == ["mixed"]  # the engines of a draining server are not told to end
    assert only("STOPSIGNAL") == "SIGTERM"
    assert re.search(r"--stop-timeout (\d+)", (DEPLOY / "Dockerfile").read_text())[1] == "90"


def test_the_image_runs_as_nobody_in_particular_without_a_compiler():
    assert only("USER") not in ("0", "root")
    uid = re.search(r"useradd --uid (\d+)", " ".join(text for name, text in final_stage() if name == "RUN"))[1]
    assert only("USER") == uid
    text = " ".join(text for _, text in final_stage())
    assert "gcc" not in text
    assert "apt-get" not in text
    first = instructions()[: len(instructions()) - len(final_stage())]
    assert any("gcc" in text for name, text in first if name == "RUN")
    assert {text.split()[0] for name, text in instructions() if name == "FROM"} == {"python:3.12-slim"}


def test_the_image_is_asked_for_its_health_where_it_listens():
    words = serve_words("Dockerfile")
    assert option(words, "--host") == "0.0.0.0"
    assert only("EXPOSE") == option(words, "--port")
    assert f"http://127.0.0.1:{option(words, '--port')}/health" in only("HEALTHCHECK")


def test_what_is_copied_is_there_and_sent_to_the_build():
    first = instructions()[: len(instructions()) - len(final_stage())]
    copied = {name for found, text in first if found == "COPY" for name in text.split()[:-1]}
    sent = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == sent
    assert all((DEPLOY.parent / name).exists() for name in copied)
    assert {"pace", "pyproject.toml", "setup.py"} <= copied


def test_the_parts_of_the_composition_find_each_other():
    compose = read_yaml("docker-compose.yml")
    services, (job,) = compose["services"], read_yaml("prometheus.yml")["scrape_configs"]
    port = option(serve_words("Dockerfile"), "--port")
    assert job["static_configs"] == [{"targets": [f"pace:{port}"]}]
    assert job["metrics_path"] == "/metrics"
    assert [entry.rpartition(":")[2] for entry in services["pace"]["ports"]] == [port]
    (source,) = read_yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert re.fullmatch(r"http://(\w+):9090", source["url"])[1] in services
    uids = set(re.findall(r'"type": "prometheus",\s*"uid": "([^"]*)"', (DEPLOY / "grafana/pace.json").read_text()))
    assert uids == {source["uid"]}
    scrape = read_yaml("prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape


def test_secrets_are_files_that_their_readers_have():
    compose = read_yaml("docker-compose.yml")
    services, (job,) = compose["services"], read_yaml("prometheus.yml")["scrape_configs"]
    read = {
        "pace": option(serve_words("Dockerfile"), "--api-key-file"),
        "prometheus": job["authorization"]["credentials_file"],
        "grafana": services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"],
    }
    assert read == {name: f"{SECRETS}/{service['secrets'][0]}" for name, service in services.items()}
    assert {secret for service in services.values() for secret in service["secrets"]} == compose["secrets"].keys()
    credential = unit()["LoadCredential"][0].partition(":")[0]
    assert option(serve_words("pace.service"), "--api-key-file") == f"${{CREDENTIALS_DIRECTORY}}/{credential}"


def test_volumes_are_declared_or_files_that_are_there():
    compose = read_yaml("docker-compose.yml")
    mounts = [volume.split(":") for service in compose["services"].values() for volume in service["volumes"]]
    named = {source for source, *_ in mounts if not source.startswith(".")}
    assert named == compose["volumes"].keys()
    assert all((DEPLOY / source).exists() for source, *_ in mounts if source.startswith("."))
    (provider,) = read_yaml("grafana/provisioning/dashboards/pace.yaml")["providers"]
    mounted = {target for _, target, *_ in mounts}
    assert f"{provider['options']['path']}/pace.json" in mounted
    command = compose["services"]["prometheus"]["command"]
    assert command[0].removeprefix("--config.file=") in mounted
    assert only("VOLUME") in mounted


def test_the_unit_leaves_what_pace_needs():
    settings = unit()
    assert settings.keys().isdisjoint({"CPUAffinity", "NUMAPolicy", "ProcSubset"})  # pace reads /proc/meminfo
    assert settings["SystemCallFilter"] == ["@system-service"]  # @resources binds threads and memory
    assert settings["LimitMEMLOCK"] == ["infinity"]
    assert settings["Type"] == ["exec"]
    assert settings["DynamicUser"] == ["yes"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze: not installed")
def test_the_unit_is_one_that_systemd_takes(tmp_path):
    """pace is not in /opt here, and what is executed must be there."""
    text = (DEPLOY / "pace.service").read_text()
    copy = tmp_path / "pace.service"

    def verify(text):
        copy.write_text(text)
        run = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(copy)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return run.returncode, [line for line in run.stderr.splitlines() if "pace.service" in line]

    here = text.replace("/opt/pace/bin/pace serve", "/bin/sh serve")
    assert verify(here) == (0, [])
    assert verify(here + "\n[Service]\nKillMode=never\n") != (0, [])
