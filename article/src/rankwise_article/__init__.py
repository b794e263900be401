"""The benchmarks of the article that rankwise began with, as tasks of ``rankwise evaluate`` and ``rankwise compare``.

It uses of rankwise what ``rankwise.evaluation`` and ``rankwise.data`` export, and the modules of its base.
"""
