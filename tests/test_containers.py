"""What docker/ promises, as far as reading tells: no engine is needed.

Its commands and flags exist, nothing runs as root or listens beyond this machine, secrets are files, and
every metric of the dashboard is one that a daemon exports.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
import yaml
from view_world import NOW, a_spec, own, replica, swarm

from shoal.node.cli.app import app
from shoal.node.view.assemble import assemble
from shoal.node.view.metrics import families
from shoal.node.view.parts import Checkpoints, LossPoint
from shoal.training import spec_file

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
OURS = ("owner", "peer-1", "peer-2", "peer-3", "peer-4")


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return loaded


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, continued lines joined."""
    text = re.sub(r"\\\n", " ", (DOCKER / "Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.partition(" ")[2]) for line in lines]


def last_stage() -> list[tuple[str, str]]:
    found = instructions()
    return found[max(index for index, (word, _) in enumerate(found) if word == "FROM") :]


def test_the_image_runs_as_nobody_special_and_knows_when_it_is_unwell() -> None:
    stage = last_stage()
    users = [rest for word, rest in stage if word == "USER"]
    assert users
    assert users[-1].split(":")[0] not in ("", "0", "root")
    after = stage[stage.index(("USER", users[-1])) :]
    assert not [word for word, _ in after if word in ("RUN", "COPY", "ADD")], "nothing is made as that user"
    (health,) = [rest for word, rest in stage if word == "HEALTHCHECK"]
    assert json.loads(health.partition("CMD ")[2]) == ["shoal", "status"]
    assert ("ENTRYPOINT", '["shoal"]') in stage
    assert not [word for word, _ in instructions() if word == "ADD"]
    text = (DOCKER / "Dockerfile").read_text()
    assert not re.search(r"(?i)^(ARG|ENV).*(token|password|secret|key)\b", text, re.MULTILINE)


def test_the_image_has_every_package_and_nothing_else_of_the_repository() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = set(project["tool"]["setuptools"]["package-dir"].values())
    copied = {rest.split()[0] for word, rest in instructions() if word == "COPY" and "--from" not in rest}
    assert {folder.split("/")[0] for folder in folders} <= copied
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    files = {name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]}
    assert {name for name in files if (ROOT / name).exists()} == allowed


def test_every_command_and_flag_of_the_composition_is_one_of_ours() -> None:
    known: Any = typer.main.get_command(app)
    for name in OURS:
        word, *arguments = compose()["services"][name]["command"]
        options = {option for parameter in known.commands[word].params for option in parameter.opts}
        assert {argument.split("=")[0] for argument in arguments if argument.startswith("--")} <= options
    assert spec_file.load(DOCKER / "run.toml").stages.count == 2


def test_services_are_confined_watched_and_closed_to_other_machines() -> None:
    services = compose()["services"]
    assert set(services) == {*OURS, "invitation", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not service.get("privileged"), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        image = service["image"]
        assert image == "shoal" or re.search(r":v?\d+\.\d+\.\d+$", image), f"{name}: {image} may change"
        if image != "shoal":
            assert "test" in service["healthcheck"], name
        elif name != "invitation":  # which ends; the others have the image's
            assert "healthcheck" not in service, name
            assert service["read_only"], name
    for peer in OURS[1:]:
        assert services[peer]["depends_on"]["invitation"]["condition"] == "service_completed_successfully"
        assert "@/tokens/join" in services[peer]["command"]
        assert "tokens:/tokens:ro" in services[peer]["volumes"]
    homes = [volume for name in OURS for volume in services[name]["volumes"] if volume.endswith(":/data")]
    assert len(set(homes)) == len(OURS), "each has an identity of its own"


def test_secrets_are_files_and_the_repository_has_none() -> None:
    loaded = compose()
    assert loaded["secrets"] == {"grafana_password": {"file": "./secrets/grafana_password"}}
    for service in loaded["services"].values():
        for key, value in service.get("environment", {}).items():
            assert key.endswith("__FILE") or not re.search("PASSWORD|SECRET|TOKEN|KEY", key), key
            assert not key.endswith("__FILE") or value.startswith("/run/secrets/")
    assert (DOCKER / "secrets" / ".gitignore").read_text().splitlines()[0] == "*"


def test_all_volumes_and_files_that_are_mounted_exist() -> None:
    loaded = compose()
    for name, service in loaded["services"].items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            here = source.startswith("./")
            assert (DOCKER / source).exists() if here else source in loaded["volumes"], name


def test_prometheus_asks_everybody_and_grafana_asks_prometheus() -> None:
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    services = compose()["services"]
    ports = {
        name: argument.rpartition(":")[2]
        for name in OURS
        for argument in services[name]["command"]
        if argument.startswith("--metrics=")
    }
    assert job["static_configs"][0]["targets"] == [f"{name}:{port}" for name, port in ports.items()]
    assert set(ports) == set(OURS)
    folder = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((folder / "dashboards" / "shoal.yaml").read_text())["providers"]
    mounted = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounted
    for panel in dashboard()["panels"]:
        assert panel["datasource"]["uid"] == source["uid"], panel["title"]


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DOCKER / "grafana" / "dashboards" / "shoal.json").read_text())
    return loaded


def exported() -> set[str]:
    """The names of all series that a daemon may export."""
    view = swarm(replica("me", 0), replica("p", 1))
    snapshot = replace(
        assemble(NOW, own(), view, a_spec()),
        loss=(LossPoint(tokens=1, at=NOW, held_out=2.0),),
        checkpoints=Checkpoints(age_s=1.0),
    )
    found = set()
    for family in families(snapshot):
        ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        found |= {family.name + end for end in ends}
    return found


def test_every_metric_of_the_dashboard_is_exported() -> None:
    known = exported()
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            named = set(re.findall(r"\bshoal_[a-z0-9_]+", target["expr"]))
            assert named, panel["title"]
            assert named <= known, panel["title"]


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells, panel["title"]
        assert all(x < 24 for x, _ in cells), panel["title"]
        taken |= cells
