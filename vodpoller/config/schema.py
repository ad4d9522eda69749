"""The JSON Schema of the file, for editors."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from vodpoller.config.callbacks import CallbackSource
from vodpoller.config.sink_types import UnusableSinkError, config_of, load_sink_class
from vodpoller.config.tables import TABLES
from vodpoller.config.wording import LISTS
from vodpoller.sinks.contract import SinkConfig
from vodpoller.sinks.registry import available_sinks


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the file, with the tables of the sink types that are installed and can be loaded."""
    sinks: dict[str, type[SinkConfig]] = {}
    for name, point in available_sinks().items():
        try:
            sinks[name] = config_of(load_sink_class(point))
        except UnusableSinkError:
            continue
    models: list[type[BaseModel]] = [*TABLES.values(), CallbackSource, *sinks.values()]
    keys: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in models]
    references, definitions = models_json_schema(keys)

    def reference(model: type[BaseModel]) -> dict[str, Any]:
        return dict(references[model, "validation"])

    properties = {
        name: {"type": "array", "minItems": 1, "items": reference(model)} if name in LISTS else reference(model)
        for name, model in TABLES.items()
    }
    properties["sources"]["items"] = {
        "if": {"properties": {"type": {"const": "callback"}}, "required": ["type"]},
        "then": reference(CallbackSource),
        "else": reference(TABLES["sources"]),
    }
    alternatives = [
        {"if": {"properties": {"type": {"const": name}}}, "then": reference(model)} for name, model in sinks.items()
    ]
    properties["sinks"] = {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {
            "type": "object",
            "required": ["type"],
            "properties": {"type": {"enum": sorted(sinks)}},
            "allOf": alternatives,
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vodpoller",
        "type": "object",
        "additionalProperties": False,
        "required": ["sources", "routes", "sinks"],
        "properties": properties,
        **definitions,
    }
