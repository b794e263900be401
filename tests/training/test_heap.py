"""The heap of a long run on a CPU: generated kernels are bounded, and holes between blocks in use are given back."""

import json
import os
import platform
import subprocess
import sys
import weakref

import pytest
from torch.autograd.graph import get_gradient_edge

from rankwise.training import watch

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


class Process:
    """Sizes that a process has at the ends of its steps, and how often its heap was given back."""

    def __init__(self, monkeypatch, sizes):
        self.sizes, self.given_back = iter(sizes), []
        self.holes = watch.Holes(lambda: next(self.sizes))
        monkeypatch.setattr(watch, "give_back_freed_memory", lambda: self.given_back.append(self.step))

    def run(self, steps):
        for self.step in range(steps):
            self.holes.end_step()
        return self.given_back


def test_a_heap_that_grows_is_given_back(monkeypatch):
    assert Process(monkeypatch, [100, 104, 106, 100, 104, 106, 101]).run(7) == [2, 5]


def test_larger_batches_are_no_holes(monkeypatch):
    """After the first giving back the larger batch is still as large, and what is usual from then on."""
    assert Process(monkeypatch, [100, 150, 150, 152, 148, 157]).run(6) == [1]


def test_no_graph_lies_between_the_activations_of_the_next_step(loop_of):
    """The losses' graph is gone at the end of a step, and the nodes that add up gradients are those of all steps."""
    loop = loop_of(max_steps=3)
    compute, graphs, seen = loop.objective.loss, [], []

    def loss(model, batch):
        found = compute(model, batch)
        # The graph holds its hooks.
        found.sum.register_hook(hook := lambda grad: None)
        graphs.append(weakref.ref(hook))
        return found

    class Watched(watch.Watch):
        def end_step(self, step, means, *, is_logged):
            node = get_gradient_edge(next(p for p in self.model.parameters() if p.requires_grad)).node
            seen.append(("is known" in node.metadata, [graph() for graph in graphs]))
            node.metadata["is known"] = True
            return super().end_step(step, means, is_logged=is_logged)

    loop.objective.loss = loss
    loop.fit(Watched(model=loop.model, progress=loop.progress, memory=watch.MemoryMeter("cpu")))
    assert [known for known, _ in seen] == [False, True, True]
    assert not any(graph for _, alive in seen for graph in alive)


HOLES = """
import json, torch
from rankwise.acceleration.memory import give_back_freed_memory, keep_freed_memory
from rankwise.acceleration import anonymous_memory_bytes

assert keep_freed_memory()
large, small = [], []
for _ in range(200):
    large.append(torch.ones(1 << 18))
    small.append(torch.ones(1 << 8))
full = anonymous_memory_bytes()
large.clear()
freed = anonymous_memory_bytes()
give_back_freed_memory()
print(json.dumps({"full": full, "freed": freed, "given_back": anonymous_memory_bytes()}))
"""

SHAPES = """
import ctypes, json, sys, torch
from rankwise.acceleration.memory import limit_generated_kernels

class Heap(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Heap
if sys.argv[1] == "limited":
    limit_generated_kernels()
weight, used = torch.ones(256, 256, dtype=torch.bfloat16), []
for tokens in range(64, 464):
    torch.ones(tokens, 256, dtype=torch.bfloat16) @ weight
    used.append(mallinfo().uordblks)
print(json.dumps(used[-1] - used[200]))
"""

GATHERS = """
import json, sys, torch
import torch.distributed as dist
from rankwise.acceleration.memory import keep_freed_memory, share_one_heap
from rankwise.acceleration import anonymous_memory_bytes

assert keep_freed_memory()
if sys.argv[1] == "shared":
    share_one_heap()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
part, whole = torch.ones(4 << 20), torch.ones(4 << 20)
before = anonymous_memory_bytes()
for _ in range(20):
    dist.all_gather_into_tensor(whole, part)
print(json.dumps(anonymous_memory_bytes() - before))
"""


# Imports once, and runs each script that it reads in a child, whose heap is as the imports left it.
FORKS = """
import json, os, sys, traceback
import torch, torch.distributed
from rankwise.acceleration import memory
from rankwise.ops import low_rank_linear
from rankwise.training import watch

for line in sys.stdin:
    if os.fork() == 0:
        script, *sys.argv[1:] = json.loads(line)
        try:
            exec(script, {"__name__": "__main__"})
        except BaseException:
            print(json.dumps({"failed": traceback.format_exc()}))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def answer_of():
    """What a script prints, in a process of its own."""
    without = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_CAPACITY")}
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=without) as forks:

        def answer(script, *arguments):
            print(json.dumps([script, *arguments]), file=forks.stdin, flush=True)
            found = json.loads(forks.stdout.readline())
            assert not (isinstance(found, dict) and "failed" in found), found["failed"]
            return found

        yield answer
        forks.stdin.close()


def test_holes_between_blocks_in_use_go_back_to_the_system(answer_of):
    sizes = answer_of(HOLES)
    assert sizes["freed"] > sizes["full"] - (20 << 20)
    assert sizes["given_back"] < sizes["full"] - (180 << 20)


def test_products_of_ever_new_shapes_do_not_fill_the_heap(answer_of):
    grown, limited = answer_of(SHAPES, "as it is"), answer_of(SHAPES, "limited")
    if grown < 2 << 20:
        pytest.skip("this CPU's products keep no generated code")
    assert limited < grown / 4


def test_threads_that_gather_keep_nothing_of_their_own(answer_of):
    """gloo copies what it gathers, here 16 MB, in one of its threads."""
    assert answer_of(GATHERS, "shared") < answer_of(GATHERS, "apart") - (12 << 20)
