"""The manifests are YAML, and what they run is what the command line takes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.cli import _parser

yaml = pytest.importorskip("yaml")
DEPLOY = Path(__file__).parents[2] / "deploy"


def pods() -> Iterator[dict[str, Any]]:
    def find(value: Any) -> Iterator[dict[str, Any]]:
        if isinstance(value, dict):
            if "containers" in value:
                yield value
            value = list(value.values())
        if isinstance(value, list):
            for one in value:
                yield from find(one)

    for file in sorted(DEPLOY.glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            yield from find(document)


def test_commands_are_what_the_command_line_takes():
    parser, seen = _parser(), set()
    for pod in pods():
        for container in pod["containers"]:
            text = "\n".join([*container.get("command", []), *container.get("args", [])])
            probe = container.get("readinessProbe", {}).get("exec", {}).get("command", [])
            hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
            commands = [" ".join(probe[1:])] if probe else []
            if container["args"][0] == "serve":
                commands.append(" ".join(container["args"]))
            for script in (text, *hook):
                commands += re.findall(r"moe-jax ((?:worker|drain)(?:\\\n|[^\n;|])*)", script)
            for command in commands:
                command = command.replace("\\\n", " ").replace("$((HOST_INDEX * 8 + gpu))", "9").replace("$gpu", "1")
                args = parser.parse_args(command.split())
                seen.add(args.command.name)
    assert seen == {"serve", "worker", "drain", "health"}


def test_slurm_script():
    script = (DEPLOY / "slurm.sh").read_text()
    subprocess.run(["bash", "-n", str(DEPLOY / "slurm.sh")], check=True)
    parser = _parser()
    for name in ("serve", "worker"):
        (found,) = re.findall(rf"moe-jax ({name} (?:\\\n|[^\n&])*)", script)
        found = re.sub(r"\$\(\(.*?\)\)", "3", found.replace("\\\n", " ")).replace("$SLURM_NNODES", "4")
        found = found.replace("$gpu", "1").replace('"$ADDRESS"', "10.0.0.1:50051").replace('"', "")
        assert parser.parse_args(found.split()).command.name == name


def test_every_volume_and_port_that_is_named_is_there():
    for pod in pods():
        volumes = {volume["name"] for volume in pod["volumes"]} | {"journal"}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
