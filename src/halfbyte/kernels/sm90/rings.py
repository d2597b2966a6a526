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

    @gluon.jit
    def wait(self, count):
        """Until the stage of `count` is filled."""
        mbarrier.wait(self.full.index(count.stage()), count.phase())

    @gluon.jit
    def give_back(self, stage):
        """A warpgroup is done with it. What it loaded from the stage must have arrived: see `products`."""
        mbarrier.arrive(self.empty.index(stage), count=1)


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
        return (self.uses % self.stages).to(gl.int32)

    @gluon.jit
    def last_stage(self):
        return ((self.uses - 1) % self.stages).to(gl.int32)

    @gluon.jit
    def phase(self):
        return (self.uses // self.stages & 1).to(gl.int32)

    @gluon.jit
    def next(self):
        return Counter(self.uses + 1, self.stages)


@gluon.jit
def counter(STAGES: gl.constexpr, ONE_RING: gl.constexpr):
    """Division without a sign is cheaper. Kernels with two rings do not have it: HUGE would keep 64 bytes more per thread in memory (Triton 3.6)."""
    return Counter(gl.to_tensor(0).to(gl.uint32) if ONE_RING else gl.to_tensor(0), STAGES)


@gluon.jit
def make_ring(first, second, STAGES: gl.constexpr, PRODUCERS: gl.constexpr, CONSUMERS: gl.constexpr):
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=PRODUCERS)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    return Ring(first, second, full, empty)
