"""What other libraries do not promise to keep is touched in ``rankwise.compat`` alone, as the source itself shows.

An underscore attribute belongs to another library unless a class in the same file defines it. Two more rules: modules
that are internal without an underscore are in a list, and nobody assigns to an attribute of an imported module.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rankwise

SOURCE = Path(rankwise.__file__).parent
PRIVATE = re.compile(r"_(?!_)\w+")
# Undocumented, and changed without notice.
INTERNAL_MODULES = (
    *("torch.multiprocessing.reductions", "torch.utils.weak"),
    *("transformers.conversion_mapping", "transformers.integrations.moe", "transformers.masking_utils"),
    *("transformers.modeling_gguf_pytorch_utils", "transformers.quantizers.quantizers_utils"),
    *("transformers.utils.output_capturing", "lm_eval.tasks.manager"),
)
# Exported by transformers under a documented interface, from a module that holds internals too.
PUBLIC_IN_THEM = {"AttentionMaskInterface", "ALL_MASK_ATTENTION_FUNCTIONS"}
# Documented for users, and a name of typeshed's alone.
PUBLIC_UNDERSCORED = {"os._exit", "csv._reader"}


def is_foreign(module: str) -> bool:
    root = module.partition(".")[0]
    return root != "rankwise" and root not in sys.stdlib_module_names


def own_names(tree: ast.AST) -> set[str]:
    """Attributes that the classes of a file define: methods, fields, what they set on ``self``."""
    found = set()
    for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in kind.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
        for node in ast.walk(kind):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


def imported_modules(tree: ast.AST) -> dict[str, str]:
    """{name in the file: what it was imported as} of other libraries."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.asname or alias.name).partition(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: module for name, module in found.items() if is_foreign(module)}


def imports(node: ast.AST) -> Iterator[str]:
    """Imports of private names and of internal modules."""
    if isinstance(node, ast.Import):
        modules, names = [alias.name for alias in node.names], []
    elif isinstance(node, ast.ImportFrom) and node.module and is_foreign(node.module) and node.module != "__future__":
        modules, names = [node.module], [alias.name for alias in node.names]
    else:
        return
    for module in modules:
        wanted = [name for name in names if name not in PUBLIC_IN_THEM]
        paths = [f"{module}.{name}" for name in wanted] or ([module] if not names else [])
        for path in paths:
            if is_foreign(path) and (any(map(PRIVATE.fullmatch, path.split("."))) or is_internal(path)):
                yield f"import of {path}"


def is_internal(path: str) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in INTERNAL_MODULES)


def attributes(node: ast.AST, own: set[str], foreign_names: set[str]) -> Iterator[str]:
    """Private attributes, by dot, by ``getattr`` and its relatives, and by ``vars(x).pop``."""
    if isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
        if node.attr not in own and ast.unparse(node) not in PUBLIC_UNDERSCORED:
            yield ast.unparse(node)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in foreign_names - own:
        yield repr(node.value)


def patches(node: ast.AST, imported: dict[str, str]) -> Iterator[str]:
    """Assignments to an attribute of an imported name, and ``setattr`` on one."""
    targets: list[ast.AST] = []
    if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
        targets = list(node.targets) if isinstance(node, ast.Assign) else [node.target]
        targets = [target for target in targets if isinstance(target, ast.Attribute)]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
        targets = [ast.Attribute(node.args[0], "_")]
    for target in targets:
        root = target
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name) and root.id in imported:
            yield f"patch of {ast.unparse(target)}"


def touches(text: str, foreign_names: set[str]) -> list[str]:
    tree = ast.parse(text)
    own, imported = own_names(tree), imported_modules(tree)
    found = []
    for node in ast.walk(tree):
        for what in (*imports(node), *attributes(node, own, foreign_names), *patches(node, imported)):
            found.append(f"line {getattr(node, 'lineno', 0)}: {what}")
    return found


def names_in_compat() -> set[str]:
    """The private names that ``compat`` touches: elsewhere not even a string may spell them."""
    found = set()
    for file in (SOURCE / "compat").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
            if isinstance(name, str) and PRIVATE.fullmatch(name):
                found.add(name)
    return found


def files_outside() -> list[Path]:
    return [file for file in sorted(SOURCE.rglob("*.py")) if (SOURCE / "compat") not in file.parents]


def test_compat_alone_touches_what_is_private_to_others() -> None:
    known = names_in_compat()
    assert {"_version", "_weight_conversions", "_storage_Use_Count"} <= known
    found = {
        str(file.relative_to(SOURCE)): touches(file.read_text(encoding="utf-8"), known) for file in files_outside()
    }
    assert not {file: places for file, places in found.items() if places}


@pytest.mark.parametrize(
    "text",
    [
        "from torch._subclasses.fake_tensor import FakeTensor",
        "from torch.utils._pytree import tree_iter",
        "from transformers.quantizers.base import _assign_is_quantized",
        "import torch._dynamo",
        "import torch\nx = torch._C",
        "import torch\nx = torch.ops.aten._unsafe_view",
        "def f(tensor):\n    return tensor._version",
        "def _version(tensor):\n    return tensor._version",
        "class A(Base):\n    def f(self):\n        return self._metrics",
        "def f(module):\n    module._is_hf_initialized = True",
        "def f(model):\n    return getattr(model, '_weight_conversions', None)",
        "def f(model):\n    vars(model).pop('_weight_conversions', None)",
        "from transformers import masking_utils",
        "from transformers.masking_utils import create_causal_mask",
        "def f():\n    from transformers.conversion_mapping import get_model_conversion_mapping",
        "from transformers import trainer\ntrainer.is_tracing = None",
        "import gguf\nsetattr(gguf, 'GGUFReader', None)",
        "import torch\ntorch.nn.functional.linear = None",
    ],
)
def test_each_way_to_touch_something_private_is_found(text: str) -> None:
    assert touches(text, {"_weight_conversions"})


@pytest.mark.parametrize(
    "text",
    [
        "from __future__ import annotations",
        "import os\nos._exit(1)",
        "class A:\n    def __init__(self):\n        self._x = 1\n\n    def f(self, other):\n        return other._x",
        "class A(Base):\n    def _save(self):\n        super()._save()",
        "class A:\n    _x: int\n\ndef f(a):\n    return a._x",
        "from rankwise.ops import library\nx = library.run",
        "import torch\nx = torch.zeros(1)\nx.requires_grad = True",
        "x = '_proj'",
        "from transformers.masking_utils import AttentionMaskInterface",
    ],
)
def test_what_is_ours_or_public_is_left_alone(text: str) -> None:
    assert not touches(text, {"_weight_conversions"})
