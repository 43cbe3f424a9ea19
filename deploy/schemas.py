"""Check the manifests and the Compose files in deploy/ against the schemas of Kubernetes and of the
Compose Specification.

    make schemas

Two packages carry the schemas (requirements/schemas.txt). They are downloaded and read as they are:
nothing of them is installed or run. A field that a schema does not know is an error.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

DEPLOY = Path(__file__).resolve().parent
DEFINITIONS = "/api/_definitions.json"
"""What the schemas of Kubernetes call the file of what they share."""
_KUBERNETES = re.compile(r"kubernetes_validate/kubernetes-json-schema/v([\d.]+)-local-strict/")
_COMPOSE = "check_jsonschema/builtin_schemas/vendor/compose-spec.json"
Schemas = dict[str, Any]
"""Of Kubernetes by the names of their files, such as `daemonset-apps-v1.json`."""


def problems(document: Any, schema: Any, shared: Any = None) -> list[str]:
    """What is wrong with a document, and where. `shared`: the definitions that its schema names."""
    registry = Registry().with_resource(DEFINITIONS, DRAFT202012.create_resource(shared or {}))
    found = Draft202012Validator(schema, registry=registry).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in found]


def schema_of(manifest: dict[str, Any]) -> str:
    """The name of the file with the schema of a manifest."""
    version = manifest["apiVersion"].replace("/", "-")
    return f"{manifest['kind']}-{version}.json".lower()


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every manifest with its file. What kustomization.yaml says is for kubectl alone."""
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        if path.name != "kustomization.yaml":
            for manifest in yaml.safe_load_all(path.read_text()):
                yield path.name, manifest


def of_kubernetes(wheel: Path) -> tuple[str, Schemas]:
    """The newest release that a wheel has strict schemas of, and these."""
    with zipfile.ZipFile(wheel) as files:
        found = {match[0]: match[1] for name in files.namelist()
                 if (match := _KUBERNETES.match(name))}  # fmt: skip
        folder = max(found, key=lambda name: [int(part) for part in found[name].split(".")])
        names = {schema_of(manifest) for _, manifest in manifests()}
        return found[folder], {
            name: json.loads(files.read(folder + name))
            for name in (*names, DEFINITIONS.rpartition("/")[2])
        }


def check(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each document with what is wrong with it, by the schemas of the wheels in `folder`."""
    (wheel,) = folder.glob("kubernetes_validate-*.whl")
    release, schemas = of_kubernetes(wheel)
    shared = schemas[DEFINITIONS.rpartition("/")[2]]
    for file, manifest in manifests():
        name = f"{file}: {manifest['kind']} of Kubernetes {release}"
        yield name, problems(manifest, schemas[schema_of(manifest)], shared)
    (wheel,) = folder.glob("check_jsonschema-*.whl")
    with zipfile.ZipFile(wheel) as files:
        compose = json.loads(files.read(_COMPOSE))
    for path in sorted(DEPLOY.glob("compose*.yaml")):
        found = problems(yaml.safe_load(path.read_text()), compose)
        yield f"{path.name}: the Compose Specification", found


def main(folder: Path) -> int:
    """Print every document and its problems; 1 if there are any."""
    wrong = 0
    for name, found in check(folder):
        print(f"{name}: {'well' if not found else f'{len(found)} wrong'}")
        for problem in found:
            print(f"  {problem}")
        wrong += len(found)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
