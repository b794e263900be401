"""Everything that uses private parts of other libraries: one file per library, with a reason for each name.

Private names, patched modules and undocumented internals are used here and nowhere else
(``tests/compat/test_private_names.py``). A canary in ``tests/compat`` says by name what a new version moved. What a
subclass of a foreign class overrides stays in that class; ``tests/compat/test_overridden.py`` watches the base.
This package imports no library by itself.
"""
