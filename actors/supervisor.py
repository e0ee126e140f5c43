"""Runs one command and sees to it that nothing of it is left: when it ends, when it is told, or when its owner dies.

    python -I -S supervisor.py LIFE MEMORY_MB PROCESSES command [argument ...]

LIFE is the number of an inherited socket whose other end the owner holds: once that is closed (the owner says
stop, or was killed), everything the command started is killed. Exit status: the command's own, 128 + n after signal n.

MEMORY_MB and PROCESSES limit what the command and all it started take together; 0: no limit. Over one, all is killed, and
the socket gets "over_memory FOUND" or "over_processes FOUND". They are looked at some ten times a second: the kernel's own
limits are of another kind. RLIMIT_AS is of one process, and of addresses, of which V8 and CUDA reserve many times what they
use; RLIMIT_NPROC counts all processes of the user; a cgroup needs rights that a worker seldom has.

There are two of these processes, parent and child, each a subreaper: what the command daemonises comes back to them, so
"no children left" means that all of it is gone. If one is killed (Ray kills a worker's direct children), the other does
the work. Only the standard library, and little of that: it starts in some 20 ms.
"""

import ctypes
import os
import select
import signal
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LOOK_S = 0.1  # between two looks at the limits,
LOOK_SHARE = 0.05  # or so much more that they take no more than this share of a core
PAGE = os.sysconf("SC_PAGESIZE")
prctl = ctypes.CDLL(None, use_errno=True).prctl


class ToldToEnd(Exception):
    pass


def told_to_end(*_):
    raise ToldToEnd


def supervise(life, memory_mb, processes, command):
    parent = os.getpid()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever ends this ends it by the socket, or by SIGKILL
    child = os.fork()
    if child == 0:
        over = ""
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        try:
            signal.signal(signal.SIGTERM, told_to_end)
            if os.getppid() != parent:
                return 128 + signal.SIGKILL
            status, over = watch(life, start(command, life), memory_mb, processes)
        except ToldToEnd:
            status = 128 + signal.SIGKILL
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if over:
            tell(life, over)
        kill_descendants()
        return status
    os.close(0)  # the command's own
    status = exit_status(os.waitpid(child, 0)[1])
    kill_descendants()
    return status


def tell(life, over):
    try:
        os.write(life, over.encode())
    except OSError:  # the owner is gone
        return


def start(command, life):
    """Fork the command in a session of its own; it dies with its supervisor."""
    supervisor = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        stay_as_nice()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(128 + signal.SIGKILL)
        os.close(life)
        os.execvpe(command[0], command, os.environ)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def stay_as_nice():
    """Linux with autogroups shares the cores out among sessions: without this a hundred agents, each a session of its own,
    take a hundred shares, and the engine beside them one, however nice Ray has made its workers."""
    try:
        with open("/proc/self/autogroup", "w") as file:
            file.write(str(os.nice(0)))
    except OSError:  # there are no autogroups, or this user has set too many within a tenth of a second
        pass


def watch(life, child, memory_mb, processes):
    """Wait for the command's end, the owner's, or too much of what is limited; the exit status, and what was too much."""
    ended = os.pidfd_open(child)
    pause = LOOK_S if memory_mb or processes else None
    while True:
        ready, _, _ = select.select([ended, life], [], [], pause)
        if ended in ready:
            return exit_status(os.waitpid(child, 0)[1]), ""
        if life in ready:
            return 128 + signal.SIGKILL, ""
        began = time.monotonic()
        if over := over_limit(memory_mb, processes):
            return 128 + signal.SIGKILL, over
        pause = max(LOOK_S, (time.monotonic() - began) / LOOK_SHARE)


def over_limit(memory_mb, processes):
    """What of this process's descendants is over its limit, and by how much; "" where all is within."""
    resident = {pid: size for pid in descendants(os.getpid()) if (size := resident_bytes(pid))}  # a zombie has none
    if processes and len(resident) > processes:
        return f"over_processes {len(resident)}"
    if memory_mb and sum(resident.values()) > memory_mb << 20:  # what several share stands in each: a bound from above
        found = sum(map(proportional_bytes, resident))
        if found > memory_mb << 20:
            return f"over_memory {found >> 20}"
    return ""


def resident_bytes(pid):
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0


def proportional_bytes(pid):
    """Its resident memory, shared pages divided by those who share them; whole where that is not to be read."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith(b"Pss:"))
    except (OSError, StopIteration):  # it has ended, changed its user or forbids looks, or the kernel has no such file
        return resident_bytes(pid)


def exit_status(status):
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def kill_descendants():
    """Kill until no child is left that can be: killed processes' orphans become children of this one."""
    going = True
    while going:
        going = False
        for pid in descendants(os.getpid()):
            alive = resident_bytes(pid) > 0  # no zombie
            try:
                os.kill(pid, signal.SIGKILL)
                going |= alive
            except (ProcessLookupError, PermissionError):  # the latter: it has become another user's, as by sudo
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                going = True
            time.sleep(0.002)  # rather than wait: a process forked meanwhile has to be killed too
        except ChildProcessError:
            return


def descendants(root):
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(parent, []).append(int(name))
    found = [root]
    for pid in found:
        found.extend(children.get(pid, ()))
    return found[1:]


if __name__ == "__main__":
    life, memory_mb, processes = map(int, sys.argv[1:4])
    os._exit(supervise(life, memory_mb, processes, sys.argv[4:]))
