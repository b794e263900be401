"""Every touch of what another library does not promise to keep: one file per library, a reason at each name.

Private names, patched modules and undocumented internals are used here and nowhere else
(``tests/compat/test_private_names.py``). A canary in ``tests/compat`` says by name what a new version moved. What a
subclass of a foreign class overrides stays in that class; ``tests/compat/test_overridden.py`` watches the base.
This package imports no library by itself.
"""
