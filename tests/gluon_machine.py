"""What a Hopper multiprocessor does with groups of warps, barriers and shared memory, as far as a wrong program can tell.

Groups run one at a time and change places at barriers, in an order drawn from a seed. Everything asynchronous ends as late as it
may: a copy lands when nobody else can go on or the draw says so, a product is worked out when it is waited for, a store reads its
place when it is waited for. Who knows what is kept in clocks: `clock[x]` is how far into x's doings a group can see, and what a
group did becomes known to others as barriers pass it on. Two accesses to a place, one of them a write, must be in order.
"""

import math
import random
import sys
import threading

import torch

SHARED = 227 << 10


class Fault(Exception):
    """What a card would punish: with a hang, a fault or wrong numbers."""


class Stop(BaseException):
    """Ends the threads of a run that has failed."""


def where():
    """The lines of the kernel that are being worked on, the innermost first."""
    frame, lines = sys._getframe(1), []
    while frame:
        file = frame.f_code.co_filename
        if "__gluon__" in frame.f_globals:
            lines.append(f"{file.rsplit('/', 1)[-1]}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(lines[:3])


class Access:
    """Who touched which part of a place and how; `epoch` is None until it is over, `fence` is when a store was fenced."""

    __slots__ = ("asynchronous", "barrier", "box", "epoch", "fence", "group", "kind", "line", "write")

    def __init__(self, box, group, kind, write, asynchronous, epoch=None):
        self.box, self.group, self.kind, self.write, self.asynchronous = box, group, kind, write, asynchronous
        self.epoch, self.fence, self.barrier, self.line = epoch, None, None, where()

    def unordered(self, group, asynchronous):
        """Why something that `group` does now may come before this is over, or None."""
        if self.epoch is None:
            return "is not over"
        agent = self.barrier or self.group
        if agent is group and not asynchronous and (not self.asynchronous or self.kind != "load"):
            # The compiler puts a barrier between what a group's own threads do to shared memory.
            return None
        if self.write and not self.asynchronous and asynchronous:
            if self.fence is None:
                return "is not fenced (fence_async_shared)"
            if group.clock.get(agent, 0) < self.fence:
                return "is fenced, but no barrier comes after the fence"
            return None
        return None if group.clock.get(agent, 0) >= self.epoch else "is not known to be over: no barrier says so"


class Memory:
    """An allocation in shared memory, and what was done to it since all of it was last in order."""

    def __init__(self, shape, dtype, line):
        self.data, self.accesses, self.line = torch.full(shape, math.nan).to(dtype), [], line

    def touch(self, box, group, kind, write, asynchronous, epoch=None):
        """A new access, after those that it must come after."""
        new, written = Access(box, group, kind, write, asynchronous, epoch), write
        for old in self.accesses:
            if all(a < d and c < b for (a, b), (c, d) in zip(box, old.box)):
                written |= old.write
                reason = (write or old.write) and old.unordered(group, asynchronous)
                if reason:
                    raise Fault(
                        f"{group}'s {kind} of [{self.line}] at {box} races: the {old.kind} by {old.group} "
                        f"at {old.line} {reason}\n  now at {new.line}"
                    )
        if not written and kind != "product":
            # Products that nobody wants may be of anything.
            raise Fault(
                f"{group}'s {kind} of [{self.line}] at {box}: nothing was ever written there\n  now at {new.line}"
            )
        self.accesses = [old for old in self.accesses if not new.replaces(old)] + [new]
        return new


def _inside(inner, outer):
    return all(c <= a and b <= d for (a, b), (c, d) in zip(inner, outer))


def _replaces(new, old):
    """Whether who is in order with `new` is so with `old`."""
    if new.write:
        return _inside(old.box, new.box)
    same = not old.write and old.group is new.group and old.asynchronous == new.asynchronous and old.kind == new.kind
    return same and old.epoch is not None and new.epoch is not None and _inside(old.box, new.box)


Access.replaces = _replaces


class Barrier:
    """An mbarrier: a phase is over when `count` have arrived and all bytes have come that were announced."""

    def __init__(self, name):
        self.name, self.count, self.phase, self.bytes, self.left = name, None, 0, 0, 0
        self.coming, self.known = {}, [{}]

    def init(self, count):
        self.count = self.left = count

    def arrive(self, group, count=1):
        self.alive()
        if count > self.left:
            raise Fault(f"{self.name}: {group} arrives, but all {self.count} have, in phase {self.phase}; at {where()}")
        _join(self.coming, group.clock)
        self.left -= count
        self.turn()

    def turn(self):
        if self.left == 0 and self.bytes == 0:
            self.phase, self.left = self.phase + 1, self.count
            self.coming[self] = self.phase
            # What comes later in the same barrier knows this too.
            self.known.append(dict(self.coming))

    def alive(self):
        if self.count is None:
            raise Fault(f"{self.name} is not initialised; at {where()}")

    def passes(self, phase):
        """Whether the phase with this parity is over, as the hardware tells it."""
        return self.phase & 1 != phase

    def __repr__(self):
        return f"{self.name} in phase {self.phase}, wants {self.left} of {self.count} arrivals and {self.bytes} bytes"


def _join(clock, other):
    for agent, epoch in other.items():
        if clock.get(agent, 0) < epoch:
            clock[agent] = epoch


class Group:
    """A group of warps: its thread, its clock, and what it has begun and not waited for."""

    def __init__(self, name, clock):
        self.name, self.clock, self.epoch = name, dict(clock), 1
        self.go, self.done, self.waits, self.ready = threading.Semaphore(0), False, "", None
        self.seen, self.unfenced = {}, []
        self.products, self.copies, self.committed, self.stores = [], [], [], []

    def barrier(self):
        """All threads of the group know what each of them did."""
        self.clock[self] = self.epoch
        self.epoch += 1

    def fence(self):
        for access in self.unfenced:
            access.fence = self.epoch
        self.unfenced = []

    def retire(self, queue, keep):
        """The oldest of `queue` are over, but for `keep` of them."""
        while len(queue) > keep:
            queue.pop(0)()

    def finish(self):
        for queue, name in (
            (self.products, "products"),
            (self.committed + self.copies, "copies"),
            (self.stores, "stores"),
        ):
            if queue:
                raise Fault(f"{self} ends with {len(queue)} {name} that it did not wait for")

    def __repr__(self):
        return self.name


class Machine:
    """One program: its groups, and the copies on their way."""

    def __init__(self, seed):
        self.draw, self.late = random.Random(seed), seed % 2 == 0
        self.groups, self.loads, self.memories, self.bytes = [], [], [], 0
        self.back, self.current, self.stopped, self.fault = threading.Semaphore(0), None, False, None

    def run(self, work):
        """`work` in a group of its own, which may start others."""
        threads = [self.start("group 0", work, {})]
        try:
            while not all(group.done for group in self.groups):
                self.step()
                if self.fault:
                    raise self.fault
        finally:
            self.stopped = True
            for group in self.groups:
                group.go.release()
            for thread in threads + self.threads:
                thread.join()
        if self.loads:
            raise Fault(f"the program ends with {len(self.loads)} loads on their way")

    threads = ()

    def start(self, name, work, clock):
        group = Group(name, clock)

        def body():
            group.go.acquire()
            try:
                if not self.stopped:
                    with torch.no_grad():
                        work()
                    group.barrier()
                    group.finish()
            except Stop:
                pass
            except BaseException as fault:
                self.fault = self.fault or fault
            group.done = True
            self.back.release()

        thread = threading.Thread(target=body, daemon=True)
        self.groups.append(group)
        self.threads = [*self.threads, thread]
        thread.start()
        return thread

    def step(self):
        """Somebody goes on who can, or a copy lands."""
        ready = [group for group in self.groups if not group.done and (group.ready is None or group.ready())]
        choices = ready if ready and self.late else ready + self.loads
        if not choices:
            stuck = "\n  ".join(f"{group} waits at {group.waits}" for group in self.groups if not group.done)
            raise Fault(f"nobody can go on:\n  {stuck}")
        chosen = self.draw.choice(choices)
        if isinstance(chosen, Group):
            self.current, chosen.ready = chosen, None
            chosen.go.release()
            self.back.acquire()
        else:
            self.loads.remove(chosen)
            chosen.land()

    def pause(self, ready=None, what=""):
        """The group of this thread lets others go on, until `ready()`."""
        group = self.current
        group.ready, group.waits = ready, f"{what} {where()}" if ready else ""
        self.back.release()
        group.go.acquire()
        if self.stopped:
            raise Stop

    def specialize(self, partitions):
        first = self.current
        first.barrier()
        names = [f"group {i} {work.__name__}" for i, (work, _) in enumerate(partitions)]
        begun = len(self.groups)
        for name, (work, arguments) in list(zip(names, partitions))[1:]:
            self.start(name, lambda work=work, arguments=arguments: work(*arguments), first.clock)
        workers, first.name = self.groups[begun:], names[0]
        work, arguments = partitions[0]
        work(*arguments)
        self.pause(lambda: all(group.done for group in workers), "for the other groups to end")
        for group in workers:
            _join(first.clock, group.clock)
        first.barrier()

    def wait(self, barrier, phase):
        barrier.alive()
        group = self.current
        self.pause(lambda: barrier.passes(phase), f"for phase {phase} of {barrier.name}")
        # The phase that it can be sure of: the next with this parity that it has not seen; one lies before the first.
        seen = group.seen.get(barrier, 0)
        sure = seen + ((seen + 1 + phase) & 1)
        group.seen[barrier] = sure
        _join(group.clock, barrier.known[sure])

    def allocate(self, memory):
        self.memories.append(memory)
        self.bytes += memory.data.numel() * memory.data.element_size()
        if self.bytes > SHARED:
            raise Fault(f"{self.bytes} bytes of shared memory, a program may have {SHARED}")


class Load:
    """A copy from global to shared memory on its way, which `barrier` tells of."""

    def __init__(self, barrier, access, size, copy):
        self.barrier, self.access, self.size, self.copy = barrier, access, size, copy
        access.barrier = barrier

    def land(self):
        self.copy()
        if self.barrier.bytes < self.size:
            raise Fault(f"{self.barrier}: {self.size} bytes come that nobody announced, begun at {self.access.line}")
        self.access.epoch = self.barrier.phase + 1
        self.barrier.bytes -= self.size
        self.barrier.turn()
