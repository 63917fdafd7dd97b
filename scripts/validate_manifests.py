"""deploy/*.yaml against the schemas of Kubernetes, without a cluster.

    python3 -m venv .venv-k8s && .venv-k8s/bin/pip install kubernetes-validate
    .venv-k8s/bin/python scripts/validate_manifests.py --crd jobsets.yaml leaderworkersets.yaml podmonitors.yaml

kubernetes-validate brings the schemas of what Kubernetes itself knows. Those of other kinds are in the definitions
that their projects publish (kind CustomResourceDefinition: --crd). Fields that no schema has are errors, too. Prints
one line a document; exit code 1 when one is wrong, or of a kind that has no schema here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-not-found]
import kubernetes_validate  # type: ignore[import-not-found]
import yaml  # type: ignore[import-untyped]

_DEPLOY = Path(__file__).parents[1] / "deploy"


def closed(schema: Any) -> Any:
    """The schema of a custom resource, which allows no field that it does not name."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: closed(value) for name, value in schema.items()}
    loose = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not loose:
        schema["additionalProperties"] = False
    return schema


def definitions(files: list[Path]) -> dict[tuple[str, str], Any]:
    """Schemas by (apiVersion, kind)."""
    found = {}
    for file in files:
        for document in yaml.safe_load_all(file.read_text()):
            spec = document["spec"]
            for version in spec["versions"]:
                schema = closed(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return found


def errors(document: Any, custom: dict[tuple[str, str], Any]) -> Iterator[str]:
    schema = custom.get((document["apiVersion"], document["kind"]))
    if schema is not None:
        for error in jsonschema.Draft202012Validator(schema).iter_errors(document):
            yield f"{'.'.join(map(str, error.absolute_path))}: {error.message[:500]}"
        return
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as e:
        yield f"{'.'.join(map(str, e.path))}: {e.message[:500]}"
    except kubernetes_validate.SchemaNotFoundError:
        yield "found no schema of this kind: --crd"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crd", type=Path, nargs="*", default=[], metavar="FILE")
    custom, good = definitions(parser.parse_args().crd), True
    print(f"Kubernetes {kubernetes_validate.latest_version()}")
    for file in sorted(_DEPLOY.glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            wrong = list(errors(document, custom))
            good = good and not wrong
            name = f"{file.name}: {document['kind']} {document['metadata']['name']}"
            print(f"{'FAIL' if wrong else 'ok  '} {name}", *wrong, sep="\n     ")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
