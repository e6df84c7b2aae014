"""A JSON schema of a custom resource, from its CRD: from_crd.py CRD.yaml MANIFEST.yaml SCHEMA.json

Of what the manifest uses everything is kept, beside it names and types alone: whole, KServe's schemas have two
megabytes, most of which is Kubernetes' own. Unknown fields are refused.
"""

import json
import sys
from pathlib import Path

import yaml

_KEPT = ("type", "enum", "required", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "format")


def pruned(schema, used):
    """used: what manifests have at this place; empty: nothing."""
    if not used:
        return {"type": schema["type"]} if "type" in schema else {}
    found = {key: schema[key] for key in _KEPT if key in schema and key != "format"}
    if schema.get("x-kubernetes-int-or-string"):
        found = {"type": ["integer", "string"]}
    if "properties" in schema:
        found["properties"] = {
            name: pruned(one, [value[name] for value in used if name in value])
            for name, one in sorted(schema["properties"].items())
        }
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            found["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        found["additionalProperties"] = pruned(
            schema["additionalProperties"], [one for value in used for one in value.values()]
        )
    if "items" in schema:
        found["items"] = pruned(schema["items"], [one for value in used for one in value])
    return found


def main(crd, manifest, schema):
    wanted = yaml.safe_load(Path(manifest).read_text())
    version = wanted["apiVersion"].partition("/")[2]
    versions = yaml.safe_load(Path(crd).read_text())["spec"]["versions"]
    (whole,) = [one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == version]
    found = pruned(whole, [wanted])
    # The CRD leaves this to Kubernetes.
    found["properties"]["apiVersion"]["const"] = wanted["apiVersion"]
    found["properties"]["metadata"] = {"type": "object"}
    text = json.dumps({"$schema": "http://json-schema.org/draft-07/schema#", **found}, indent=1)
    Path(schema).write_text(text + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
