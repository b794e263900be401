"""All uses of private parts of other libraries: one file per library, with a reason for each name.

Private names, patched modules and undocumented internals are used here and nowhere else
(``tests/compat/test_private_names.py``). For each name, a canary in ``tests/compat`` fails when a new version moves it.
Overrides stay in the subclasses of foreign classes; ``tests/compat/test_overridden.py`` watches their bases.
Importing this package imports no other library.
"""
