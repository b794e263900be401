"""The canary of what `rankwise.compat.ray` replaces."""

from __future__ import annotations

import inspect

import pytest


def test_ray_listens_to_error_messages_in_a_function_of_its_own() -> None:
    worker = pytest.importorskip("ray._private.worker")
    assert list(inspect.signature(worker.listen_error_messages).parameters) == ["worker", "threads_stopped"]
    assert "target=listen_error_messages," in inspect.getsource(worker.connect)
