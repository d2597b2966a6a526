"""Rings of stages in shared memory, between the warps that fill them and the warpgroups that empty them (Gluon)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from halfbyte.gluon_compat import aggregate


@aggregate
class Ring:
    """Two buffers [stages, ...] that are filled and emptied together, and the barriers of the stages."""

    first: gl.shared_memory_descriptor
    second: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, first, second, full, empty):
        self.first = first
        self.second = second
        self.full = full
        self.empty = empty


@aggregate
class Counter:
    """Counts the uses of a ring: which stage is next, and the phase of its barriers."""

    uses: gl.tensor
    stages: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, uses, stages):
        self.uses = uses
        self.stages = gl.constexpr(stages)

    @gluon.jit
    def stage(self):
        return self.uses % self.stages

    @gluon.jit
    def last_stage(self):
        return (self.uses - 1) % self.stages

    @gluon.jit
    def phase(self):
        return self.uses // self.stages & 1

    @gluon.jit
    def next(self):
        return Counter(self.uses + 1, self.stages)


@gluon.jit
def make_ring(first, second, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    return Ring(first, second, full, empty)
