"""What a Hopper multiprocessor does with groups of warps, barriers and shared memory, as far as a wrong program can tell.

Groups run one at a time and change places at barriers, in an order drawn from a seed. Everything asynchronous ends as late as it
may: a copy lands when nobody else can go on (or earlier, where the seed is odd), a product is worked out and a store reads its
place when they are waited for. Who can know of what is kept in clocks: `clock[x]` says how far x's doings are known to a group,
`epoch` counts the times that a group's own threads have met; barriers pass clocks on. Of two accesses to a place, one of them
a write, the later one must come from a group whose clock knows that the earlier one is over.
"""

import math
import random
import sys
import threading

import torch

# Bytes of shared memory that a program may have.
SHARED = 227 << 10


class Fault(Exception):
    """What a card would punish: with a hang, a crash or wrong numbers."""


class Stop(BaseException):
    """Ends the threads of a run that has failed."""


def where():
    """The lines of the kernel that are being worked on, the innermost first."""
    frame, lines = sys._getframe(1), []
    while frame:
        if "__gluon__" in frame.f_globals:
            file = frame.f_code.co_filename.rsplit("/", 1)[-1]
            lines.append(f"{file}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(lines[:3])


class Access:
    """Who touched which part of a place, and how; `epoch` is None until it is over, `fence` is when a store was fenced."""

    def __init__(self, box, group, kind, write, asynchronous):
        self.box, self.group, self.kind, self.write, self.asynchronous = box, group, kind, write, asynchronous
        self.agent, self.epoch, self.fence, self.line = group, None, None, where()

    def unordered(self, group, asynchronous):
        """Why what `group` does now may come before this is over, or None."""
        if self.epoch is None:
            return "is not over"
        if self.agent is group and not asynchronous:
            if self.epoch == group.epoch:
                # The compiler lets a group's threads meet between what they themselves do to a place.
                group.meet()
            return None
        known, reason = group.clock.get(self.agent, 0), "is over, but no barrier says so"
        if self.write and not self.asynchronous and asynchronous:
            if self.fence is None:
                return "was not fenced (fence_async_shared)"
            return None if known >= self.fence else "was fenced, but no barrier after the fence says so"
        return None if known >= self.epoch else reason

    def replaces(self, old):
        """Whether who comes after this comes after `old`."""
        inside = all(c <= a and b <= d for (a, b), (c, d) in zip(old.box, self.box))
        if self.write or not inside:
            return inside
        same = self.agent is old.agent and self.asynchronous == old.asynchronous and not old.write
        return same and self.epoch is not None and old.epoch is not None


class Memory:
    """An allocation in shared memory, and the accesses to it that later ones must come after."""

    def __init__(self, shape, dtype):
        self.data, self.accesses, self.line = torch.full(shape, math.nan).to(dtype), [], where()

    def touch(self, box, group, kind, write=False, asynchronous=False, over=False):
        """A new access, which may be `over` at once."""
        new, written = Access(box, group, kind, write, asynchronous), write
        about = f"{group}: {kind} of [{self.line}] {box} at {new.line}"
        for old in self.accesses:
            if all(a < d and c < b for (a, b), (c, d) in zip(box, old.box)):
                written |= old.write
                reason = (write or old.write) and old.unordered(group, asynchronous)
                if reason:
                    raise Fault(f"{about}\n  races with {old.group}: {old.kind} at {old.line}, which {reason}")
        if not written and kind != "product":
            # A product that nobody wants may be one of anything.
            raise Fault(f"{about}, where nobody has written anything")
        new.epoch = group.epoch if over else None
        self.accesses = [old for old in self.accesses if not new.replaces(old)] + [new]
        return new


class Ledger:
    """Which group of which program wrote each number in global memory last and which read it, in one launch, and when."""

    # An epoch that nobody can know to be over: the copy engine tells of shared memory alone. And a reader that stands for many.
    NEVER, MANY = 1 << 30, -1

    def __init__(self):
        self.marks = {}

    def of(self, flat):
        """Writer, its epoch, reader, its epoch of every number."""
        key = flat.data_ptr(), flat.dtype
        if key not in self.marks:
            self.marks[key] = torch.zeros(4, flat.numel(), dtype=torch.int32)
        return self.marks[key]

    def touch(self, marks, group, write, epoch):
        """`marks` (4, ...) of some numbers as they were, which come back as they are now."""
        self.check(marks[:2], group, write, "was written by")
        if write:
            self.check(marks[2:], group, write, "was read by")
            marks[0], marks[1] = group.key, epoch
        else:
            alone = (marks[2] == 0) | (marks[2] == group.key)
            marks[2], marks[3] = torch.where(alone, group.key, self.MANY), epoch
        return marks

    def check(self, marks, group, write, told):
        (who, when), does = marks, "writes" if write else "reads"
        for key in who.unique().tolist() if who.any() else ():
            others = {other.key: other for other in Machine.now.groups}
            latest = when[who == key].max()
            if key and (key != group.key or latest == self.NEVER):
                by = others.get(key, "another program" if key > 0 else "several")
                if not isinstance(by, Group) or group.clock.get(by, 0) < latest:
                    raise Fault(f"{group} {does} global memory that {told} {by}, and nothing says before; at {where()}")


class Barrier:
    """An mbarrier: a phase is over when `count` have arrived and all bytes are there that were announced."""

    def __init__(self, name):
        self.name, self.count, self.left, self.phase, self.bytes = name, None, 0, 0, 0
        # What those know who arrived, and what is known at the end of each phase.
        self.coming, self.known = {}, [{}]

    def init(self, count):
        if self.known[1:]:
            raise Fault(f"{self} is initialised twice; at {where()}")
        self.count = self.left = count

    def alive(self):
        if self.count is None:
            raise Fault(f"{self.name} is not initialised; at {where()}")

    def arrive(self, group, count):
        self.alive()
        if count > self.left:
            raise Fault(f"{self}, {group} arrives {count} times; at {where()}")
        join(self.coming, group.clock)
        self.left -= count
        self.turn()

    def turn(self):
        if self.left == self.bytes == 0:
            self.phase, self.left = self.phase + 1, self.count
            self.coming[self] = self.phase
            self.known.append(dict(self.coming))

    def passes(self, parity):
        """Whether the last phase with this parity is over, as the hardware tells it; one lies before the first."""
        return self.phase & 1 != parity

    def __repr__(self):
        return f"{self.name} (phase {self.phase} lacks {self.left} of {self.count} arrivals and {self.bytes} bytes)"


def join(clock, other):
    for agent, epoch in other.items():
        clock[agent] = max(epoch, clock.get(agent, 0))


class Load:
    """A copy from global to shared memory on its way, of which `barrier` tells."""

    def __init__(self, barrier, access, size, copy):
        self.barrier, self.access, self.size, self.copy = barrier, access, size, copy
        self.clock, access.agent = dict(access.group.clock), barrier

    def land(self):
        if self.barrier.bytes < self.size:
            raise Fault(f"{self.barrier}: {self.size} bytes come that nobody announced, from {self.access.line}")
        self.copy()
        self.access.epoch = self.barrier.phase + 1
        join(self.barrier.coming, self.clock)
        self.barrier.bytes -= self.size
        self.barrier.turn()


class Group:
    """A group of warps: its thread, its clock, and what it has begun and not waited for, the oldest first."""

    def __init__(self, name, key, clock):
        self.name, self.key, self.clock, self.epoch = name, key, dict(clock), 1
        self.go, self.done, self.ready, self.waits = threading.Semaphore(0), False, None, ()
        self.products, self.copies, self.committed, self.stores = [], [], [], []
        # Stores to shared memory that it has not fenced.
        self.unfenced = []

    def meet(self):
        """All threads of the group know what each of them did."""
        self.clock[self] = self.epoch
        self.epoch += 1

    def fence(self):
        for access in self.unfenced:
            access.fence = self.epoch
        self.unfenced = []

    def retire(self, queue, keep):
        """The oldest are over, all but `keep`."""
        while len(queue) > keep:
            queue.pop(0)()

    def stuck(self):
        return " ".join(map(str, ("\n ", self, "waits for", *self.waits)))

    def finish(self):
        for name in ("products", "copies", "committed", "stores"):
            if getattr(self, name):
                raise Fault(f"{self} ends with {len(getattr(self, name))} {name} that it did not wait for")

    def __repr__(self):
        return self.name


class Machine:
    """One program: its number, its groups, and the copies on their way."""

    # The one that runs.
    now = None

    def __init__(self, program, seed, ledger):
        self.program, self.ledger = program, ledger
        self.draw, self.late, self.ranks = random.Random(seed), seed % 2 == 0, {}
        self.groups, self.threads, self.loads, self.bytes = [], [], [], 0
        self.back, self.current, self.stopped, self.fault = threading.Semaphore(0), None, False, None

    def run(self, work):
        """`work` in a group of its own, which may start others."""
        self.start("group 0", work, {})
        try:
            while not all(group.done for group in self.groups):
                self.step()
                if self.fault:
                    raise self.fault
        finally:
            self.stopped = True
            for group, thread in zip(self.groups, self.threads):
                group.go.release()
                thread.join()
        if self.loads:
            raise Fault(f"the program ends with loads on their way, from {self.loads[0].access.line}")

    def start(self, name, work, clock):
        group = Group(name, 16 * self.program + len(self.groups) + 1, clock)
        self.groups.append(group)
        self.threads.append(threading.Thread(target=self._body, args=(group, work), daemon=True))
        self.threads[-1].start()

    def _body(self, group, work):
        group.go.acquire()
        try:
            if not self.stopped:
                with torch.no_grad():
                    work()
                group.meet()
                group.finish()
        except Stop:
            pass
        except BaseException as fault:
            self.fault = fault
        group.done = True
        self.back.release()

    def step(self):
        """Somebody goes on who can, or a copy lands: whoever ranks first, and ranks change now and then."""
        ready = [group for group in self.groups if not group.done and (group.ready is None or group.ready())]
        choices = ready if ready and self.late else ready + self.loads
        if not choices:
            raise Fault("".join(["nobody can go on:", *(group.stuck() for group in self.groups if not group.done)]))
        if self.draw.random() < 0.05:
            self.ranks.clear()
        chosen = max(choices, key=lambda x: self.ranks.setdefault(x, self.draw.random()))
        if isinstance(chosen, Group):
            self.current = chosen
            chosen.go.release()
            self.back.acquire()
        else:
            self.loads.remove(chosen)
            chosen.land()

    def pause(self, ready=None, *what):
        """The group of this thread lets others go on, until `ready()`; `what` it waits for."""
        group = self.current
        group.ready, group.waits = ready, (*what, "at", where())
        self.back.release()
        group.go.acquire()
        if self.stopped:
            raise Stop

    def specialize(self, partitions):
        """The first of (function, arguments) goes on in this group, the others in new ones, to the end of all."""
        first, begun = self.current, len(self.groups)
        first.meet()
        for i, (work, arguments) in enumerate(partitions):
            name = f"group {i} {work.__name__}"
            if i:
                self.start(name, lambda work=work, arguments=arguments: work(*arguments), first.clock)
            else:
                first.name = name
        workers, (work, arguments) = self.groups[begun:], partitions[0]
        work(*arguments)
        self.pause(lambda: all(group.done for group in workers), "the other groups")
        for group in workers:
            join(first.clock, group.clock)
        first.meet()

    def wait(self, barrier, parity):
        """The group goes on when the hardware lets it, and knows what it can be sure of: the next phase of this parity."""
        barrier.alive()
        group = self.current
        self.pause(lambda: barrier.passes(parity), f"parity {parity} of", barrier)
        over = group.clock.get(barrier, 0)
        join(group.clock, barrier.known[over + (over + 1 + parity) % 2])

    def allocate(self, size):
        self.bytes += size
        if self.bytes > SHARED:
            raise Fault(f"{self.bytes} bytes of shared memory, a program may have {SHARED}; at {where()}")
