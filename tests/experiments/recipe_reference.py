"""What `docs/reference.md` and `recipe.schema.json` must say: all keys of a recipe, from the models that read them."""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from openlm_pipeline.experiments import spec
from openlm_pipeline.experiments.spec import Experiment
from openlm_pipeline.models.config import ALIASES, MODELS, ModelConfig
from openlm_pipeline.registry import ENGINES, LAUNCHERS, OPTIMIZERS, SAMPLINGS, SCHEDULES

Node = dict[str, Any]
MOST_TOKENS = 10**18
VARIABLE = {"type": "string", "pattern": r"\$\{"}
TOKENS = {"type": "string", "pattern": r"^\s*[0-9][0-9_]*(\.[0-9]+)?\s*[KMBTkmbt]?\s*$|\$\{"}
NUMBER = {"type": "string", "pattern": r"^[-+]?[0-9_]*\.?[0-9]*([eE][-+]?[0-9]+)?$|\$\{"}
CHOICES = {
    ("Training", "schedule"): SCHEDULES,
    ("Training", "optimizer"): OPTIMIZERS,
    ("Training", "sampling"): SAMPLINGS,
    ("Execution", "tokenizer_engine"): ENGINES,
    ("Launcher", "kind"): LAUNCHERS,
}
EXTENDS = (
    "Recipe to start from: a name, or a path of a YAML file from this one. What is given here changes it; `0:` and the "
    "like change one item of a list."
)
ORDER = (
    *("TokenizerSpec", "TrainedTokenizer", "Source", "DocumentMap", "Validation", "Training", "Parent", "Evaluation"),
    *("Baseline", "WhileTraining", "Execution", "Launcher"),
)


def documented(model: type[BaseModel]) -> dict[str, str]:
    """Field -> the string below it in the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0].body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(body, body[1:])
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _models() -> dict[str, type[BaseModel]]:
    """All that a recipe is made of, by their names in the schema."""
    named = {name: getattr(spec, name) for name in ORDER}
    settings = {f"launcher.{name}": entry.Settings for name, entry in LAUNCHERS if entry.Settings.model_fields}
    return {"Experiment": Experiment, "ModelConfig": ModelConfig, **named, **settings}


def _described() -> dict[str, Node]:
    """Model -> its JSON schema, each key with its description; the models inside are references."""
    found = {}
    for name, model in _models().items():
        node = model.model_json_schema(ref_template="#/$defs/{model}")
        node.pop("$defs", None)
        for key, text in documented(model).items():
            node["properties"][key]["description"] = text
        found[name] = node
    for (model, key), registry in CHOICES.items():
        field = found[model]["properties"][key]
        field["enum"] = [*(["auto"] if registry is ENGINES else []), *registry.names]
    found["ModelConfig"]["properties"] = {
        "name": {"enum": sorted({*MODELS, *ALIASES}), "description": "A known model, which other keys change."},
        **found["ModelConfig"]["properties"],
    }
    description = found["Experiment"]["properties"]["model"]["description"]
    found["Experiment"]["properties"]["model"] = {"$ref": "#/$defs/ModelConfig", "description": description}
    for name in found:
        if name.startswith("launcher."):
            kind = name.partition(".")[2]
            found["Launcher"]["properties"][kind] = {
                "$ref": f"#/$defs/{name}",
                "description": f"Settings of `kind: {kind}`.",
            }
    found["Launcher"]["additionalProperties"] = False
    return found


def _loose(node: Any) -> Any:
    """A schema that takes what a recipe's YAML may have in place of a value, and parts of what it extends."""
    if isinstance(node, list):
        return [_loose(part) for part in node]
    if not isinstance(node, dict):
        return node
    kept = {key: value for key, value in node.items() if key not in ("required", "title", "ge", "le", "properties")}
    changed = {key: value if key in ("default", "enum") else _loose(value) for key, value in kept.items()}
    if "properties" in node:
        changed["properties"] = {key: _loose(value) for key, value in node["properties"].items()}
    about = {key: changed.pop(key) for key in ("description", "default") if key in changed}
    kind = node.get("type")
    if kind == "integer" and MOST_TOKENS in (node.get("le"), node.get("maximum")):
        return {"anyOf": [{"type": "number", "minimum": 0}, TOKENS], **about}
    if kind in ("integer", "number"):
        return {"anyOf": [changed, NUMBER], **about}
    if kind == "boolean" or "enum" in node or "pattern" in node:
        return {"anyOf": [changed, VARIABLE], **about}
    if kind == "array" and "$ref" in node.get("items", {}):
        by_number = {"type": "object", "patternProperties": {"^[0-9]+$": node["items"]}, "additionalProperties": False}
        return {"anyOf": [changed, by_number], **about}
    return {**changed, **about}


def schema() -> str:
    """The JSON schema of a recipe's file."""
    described = _described()
    required = described["Experiment"]["required"]
    whole = _loose(described.pop("Experiment"))
    whole["properties"] = {"extends": {"type": "string", "description": EXTENDS}, **whole["properties"]}
    whole["anyOf"] = [{"required": ["extends"]}, {"required": required}]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Recipe of openlm_pipeline"}
    return json.dumps({**head, **whole, "$defs": {k: _loose(v) for k, v in described.items()}}, indent=1) + "\n"


def _type(node: Node) -> str:
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return f"[{_title(name)}](#{_title(name).replace('.', '').replace(' ', '-')})"
    if "anyOf" in node:
        return ", or ".join(_type(part) for part in node["anyOf"])
    if "enum" in node and len(node["enum"]) < 20:
        return ", ".join(f"`{value}`" for value in node["enum"])
    kind = node.get("type", "string")
    if kind == "array":
        items = node.get("items") or {"type": ", ".join(_type(part) for part in node["prefixItems"])}
        return f"list of {_type(items)}" if "items" in node else f"[{items['type']}]"
    if kind == "integer" and MOST_TOKENS in (node.get("le"), node.get("maximum")):
        return "tokens"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = ", ".join(f"{sign} {node[bound]:g}" for bound, sign in bounds.items() if bound in node)
    return f"{kind} {limits}".strip()


def _title(model: str) -> str:
    titles = {"TokenizerSpec": "tokenizer", "TrainedTokenizer": "tokenizer.train", "ModelConfig": "model"}
    titles |= {"Baseline": "evaluation.baselines", "WhileTraining": "evaluation.while_training", "Source": "sources"}
    titles["DocumentMap"] = "sources.map"
    return titles.get(model, model.lower() if model.isalpha() else model)


def _rows(node: Node) -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for key, field in node["properties"].items():
        missing = "required" if key in node.get("required", ()) else ""
        default = f"`{json.dumps(field['default'])}`" if field.get("default") not in (None, "") else missing
        default = default if len(default) < 40 else ""
        cells = (f"`{key}`", _type(field), default, field.get("description", ""))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """The reference, in Markdown."""
    described = _described()
    lines = [
        "# Every key of a recipe",
        "",
        *textwrap.wrap(
            "Made from the models that read recipes; a test holds it to them. Token counts are numbers such as `250B`, "
            "`1.5M` or `2000000`. Any value may have environment variables, `${NAME}` or `${NAME:-default}`.",
            120,
        ),
        "",
        *textwrap.wrap(
            "Editors complete and check keys with `openlm recipes --schema > recipe.schema.json` and, as the first "
            "line of a recipe, `# yaml-language-server: $schema=recipe.schema.json`.",
            120,
        ),
        "",
        *textwrap.wrap(f"`extends`: {EXTENDS[0].lower()}{EXTENDS[1:]}", 120),
    ]
    for name, node in described.items():
        title, doc = _title(name), inspect.getdoc(_models()[name]) or ""
        lines += ["", f"## {'The recipe itself' if name == 'Experiment' else title}"]
        lines += [" ".join(doc.split()), "", *_rows(node)]
        for (model, key), registry in CHOICES.items():
            if model == name:
                lines += ["", f"`{title}.{key}`:"]
                for choice, entry in registry:
                    own = entry.Settings.model_fields if model == "Training" and hasattr(entry, "Settings") else ()
                    read = [f"`{setting}`" for setting in getattr(entry, "settings", ()) if model == "Training"]
                    more = f" Settings: {', '.join(read)}." if read else ""
                    more += f" Of its own: {', '.join(f'`{setting}`' for setting in own)}." if own else ""
                    text = " ".join((inspect.getdoc(entry) or "").partition("\n\n")[0].split())
                    lines.append(f"- `{choice}`: {text}{more}")
    return "\n".join(lines) + "\n"
