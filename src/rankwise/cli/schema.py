"""``rankwise schema``: the JSON schema of a verb's ``--config`` file, for completion and checks in editors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from rankwise.cli.options import Verb
from rankwise.cli.output import Document, Output, print_document
from rankwise.errors import ConfigError
from rankwise.foreign import Fields, JsonObject
from rankwise.known_names import close_names
from rankwise.options import Panel, Settings, option

DIALECT = "https://json-schema.org/draft/2020-12/schema"
# In YAML 1.1, 2e-4 is text, since a float needs a dot. Settings convert such text to a number.
NUMERIC_TEXT = {"type": "string", "pattern": r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"}


class SchemaSettings(Settings):
    """The options of ``rankwise schema``."""

    verb: Annotated[str, option(Panel.OTHER, "Verb whose file is described.", metavar="VERB", argument=True)] = "train"


class _FileSchema(GenerateJsonSchema):
    """The schema of validation's input rather than of its result: lists and mappings may be text, as on the command
    line.
    """

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonObject:
        return {"anyOf": [super().function_before_schema(schema), {"type": "string"}]}

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonObject:
        return {"anyOf": [super().float_schema(schema), NUMERIC_TEXT]}


def verb_of(verbs: Sequence[Verb]) -> Verb:
    """The verb ``schema`` over these."""

    def run(settings: SchemaSettings, output: Output) -> Document:
        known = {verb.name: verb for verb in verbs}
        if settings.verb not in known:
            close = close_names(settings.verb, known, {}, cutoff=0.4) or list(known)
            raise ConfigError(
                "RW793", f"{settings.verb!r} is not a verb of rankwise; the closest are {', '.join(close)}."
            )
        document = file_schema(known[settings.verb])
        if not output.as_json:
            # As it is, so that `rankwise schema > train.schema.json` holds a schema.
            print_document(document)
        return document

    return Verb(
        name="schema",
        settings=SchemaSettings,
        run=run,
        summary="Print the JSON schema of a verb's --config file, for editors that complete and check YAML.",
        examples=("rankwise schema > train.schema.json", "rankwise schema compare > compare.schema.json"),
    )


def file_schema(verb: Verb) -> JsonObject:
    """The schema of the file that ``verb --config`` reads. Nothing is required: an option may be given beside it."""
    found = verb.settings.model_json_schema(schema_generator=_FileSchema)
    properties = {name.replace("_", "-"): _plain(field) for name, field in found["properties"].items()}
    # Keys may be spelled with underscores too.
    both = {name.replace("-", "_"): {"$ref": f"#/properties/{name}"} for name in properties if "-" in name}
    parts = {key: found[key] for key in ("$defs",) if key in found}
    return {
        "$schema": DIALECT,
        "title": f"rankwise {verb.name} --config",
        "description": verb.summary,
        "type": "object",
        "additionalProperties": False,
        "properties": {**properties, **both},
        **parts,
    }


def _plain(field: Fields) -> JsonObject:
    """The schema without titles, which repeat the names, and without what only the command line needs."""
    return {
        key: value for key, value in field.items() if key not in ("title", "panel", "metavar", "argument", "repeated")
    }
