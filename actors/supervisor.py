"""Runs one command and sees to it that nothing of it is left: when it ends, when it is told, or when its owner dies.

    python -I -S supervisor.py LIFE command [argument ...]

LIFE is the number of an inherited pipe's reading end whose other end the owner holds: once that is closed (the owner says
stop, or was killed), everything the command started is killed. Exit status: the command's own, 128 + n after signal n.

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
prctl = ctypes.CDLL(None, use_errno=True).prctl


class ToldToEnd(Exception):
    pass


def told_to_end(*_):
    raise ToldToEnd


def supervise(life, command):
    parent = os.getpid()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever ends this ends it by the pipe, or by SIGKILL
    child = os.fork()
    if child == 0:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        try:
            signal.signal(signal.SIGTERM, told_to_end)
            if os.getppid() != parent:
                return 128 + signal.SIGKILL
            status = watch(life, start(command, life))
        except ToldToEnd:
            status = 128 + signal.SIGKILL
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        kill_descendants()
        return status
    os.close(0)  # the command's own
    status = exit_status(os.waitpid(child, 0)[1])
    kill_descendants()
    return status


def start(command, life):
    """Fork the command in a session of its own; it dies with its supervisor."""
    supervisor = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
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


def watch(life, child):
    """Wait for the command's end or the owner's; the exit status."""
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, life], [], [])
    if ended in ready:
        return exit_status(os.waitpid(child, 0)[1])
    return 128 + signal.SIGKILL


def exit_status(status):
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def kill_descendants():
    """Kill until no child is left: killed processes' orphans become children of this one."""
    while True:
        for pid in descendants(os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
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
    os._exit(supervise(int(sys.argv[1]), sys.argv[2:]))
