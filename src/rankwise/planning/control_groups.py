"""The memory that Linux control groups leave to this process: limits of containers, SLURM jobs and systemd units."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
UNLIMITED = 2**63


class _Version(NamedTuple):
    mount: str
    limit: str
    usage: str
    # Cached pages of files that the kernel frees first, in memory.stat.
    freed_first: str


V1 = _Version(
    "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", freed_first="total_inactive_file"
)
V2 = _Version("sys/fs/cgroup", "memory.max", "memory.current", freed_first="inactive_file")


def free_bytes() -> int:
    """The bytes that the tightest group of this process leaves; ``UNLIMITED`` without a limit.

    The groups above a group limit it too. In a container, the path of the group may not exist below the mounted
    folder; the folder itself is the group then.
    """
    try:
        lines = (ROOT / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return UNLIMITED
    left = [UNLIMITED]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = V1 if controllers else V2
        mount = ROOT / version.mount
        group = mount / path.lstrip("/")
        left += [_left(place, version) for place in (group, *group.parents) if place.is_relative_to(mount)]
    return min(left)


def _left(group: Path, version: _Version) -> int:
    try:
        # Without a limit, version 2 writes "max".
        limit, usage = (int((group / name).read_text(encoding="ascii")) for name in (version.limit, version.usage))
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return UNLIMITED
    return max(0, limit - usage + int(counts.get(version.freed_first, 0)))
