"""Run from a source tree on a machine that has only torch, transformers and triton: no installation, no pydantic."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src"


def source_tree() -> None:
    """Find rankwise in this tree, and give its settings something to be declared with where pydantic is missing.

    Only the command line reads settings; the operators, adapters and models that a benchmark calls do not.
    """
    if str(SOURCE) not in sys.path:
        sys.path.insert(0, str(SOURCE))
    if "pydantic" not in sys.modules and importlib.util.find_spec("pydantic") is None:
        sys.modules |= _declarations_only()


def _declarations_only() -> dict[str, ModuleType]:
    def accept(*_: Any, **__: Any) -> None: ...

    class Declared:
        """Stands where pydantic.BaseModel would; it checks and holds nothing."""

        model_validate = staticmethod(accept)

    module, core = ModuleType("pydantic"), ModuleType("pydantic_core")
    validators = dict.fromkeys(("Field", "BeforeValidator", "AfterValidator"), accept)
    vars(module).update(BaseModel=Declared, ConfigDict=dict, ValidationError=ValueError, **validators)
    vars(module).update(ValidationInfo=Any, create_model=lambda *_, **__: Declared)
    vars(core).update(ErrorDetails=dict)
    return {"pydantic": module, "pydantic_core": core}
