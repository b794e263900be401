"""Marks that several files use."""

from __future__ import annotations

import pytest

from rankwise_article.e2e_scores import missing_java

_MISSING_JAVA = missing_java()
# It starts a process: asked once.
needs_java = pytest.mark.skipif(_MISSING_JAVA is not None, reason=_MISSING_JAVA or "")
