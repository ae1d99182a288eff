"""execute.py: honest programs pass, and no trick does, hangs or leaves anything behind.

python -m pytest tests/test_execute.py
"""

import importlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import execute

RIGHT = "\ndef double(x):\n    return 2 * x\n"
WRONG = "\ndef double(x):\n    return 3 * x\n"
CHECK = "assert double(4) == 8\nassert double('ab') == 'abab'"
SLEEP = "98765.125"  # seconds: how a test finds its own sleepers
IS_ROOT = os.geteuid() == 0


def passes(program, tests=CHECK, names=(), **options):
    result = execute.run(program, tests, names, **options)
    assert result["passed"] == (result["reason"] == "passed")
    return result["passed"]


def strays():
    """Processes that a run left behind: of a user that was made for it, while its supervisor is
    gone; and sleepers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, command = (folder / "status").read_text(), (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if "State:\tZ" in status:
            continue
        uid = int(status.split("Uid:")[1].split()[0])
        supervisor = uid % (execute.PROGRAMS_UID - execute.JUDGES_UID)
        orphan = uid >= execute.JUDGES_UID and not Path(f"/proc/{supervisor}").exists()
        if orphan or SLEEP.encode() in command:
            found.append((folder.name, uid, command))
    return found


def left_behind():
    folder = Path(tempfile.gettempdir())
    return [*strays(), *folder.glob("execute-*"), *Path.home().glob("execute-was-here")]


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


# ----------------------------------------------------------------------------------------- attacks

FORGE = "class Any{base}:\n    __eq__ = __ne__ = __lt__ = __gt__ = __sub__ = __rsub__ = __abs__ = __bool__ = {method}\n"
ATTACKS = {  # name: (program, what the reason says)
    "os._exit": ("import os; os._exit(0)", "Ended"),
    "os._exit in an answer": ("import os\ndef double(x): os._exit(0)", "Ended"),
    "sys.exit": ("import sys; sys.exit(0)", "SystemExit"),
    "sys.exit in an answer": ("import sys\ndef double(x): sys.exit(0)", "SystemExit"),
    "atexit": ("import atexit, os, sys\natexit.register(os._exit, 0)" + WRONG + "sys.exit(0)", "SystemExit"),
    "interrupt": ("def double(x): raise KeyboardInterrupt", "KeyboardInterrupt"),
    "infinite loop": ("while True: pass", "CPU time|timed out"),
    "infinite loop in an answer": ("def double(x):\n    while True: pass", "CPU time|timed out"),
    "catches all": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass", "CPU time|timed out",
    ),
    "ignores signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "CPU time|timed out",
    ),
    "sleep": ("import time; time.sleep(1000)", "timed out"),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "time|timed out"),
    "fork chain": ("import os\nwhile True:\n    if os.fork(): os._exit(0)", "."),
    "16 GiB": ("x = bytearray(16 * 2**30)" + RIGHT, "MemoryError"),
    "endless list": ("x = [0]\nwhile True: x += x" + RIGHT, "MemoryError|SIGKILL|time"),
    "endless output": ("while True: print('x' * 65536)", "CPU time|timed out"),
    "endless answer": ("import itertools\ndef double(x): return ['x' * 2**20] * 100", "too long|MemoryError|time"),
    "kills its parent": ("import os; os.kill(os.getppid(), 9)" + RIGHT, "PermissionError"),
    "kills all": ("import os; os.kill(-1, 9)" + RIGHT, "PermissionError|ProcessLookupError"),
    "kills itself": ("import os; os.kill(os.getpid(), 11)" + RIGHT, "SIGSEGV"),
    "an odd signal": ("import os; os.kill(os.getpid(), 40)" + RIGHT, "signal 40"),
    "segfault": ("import ctypes; ctypes.string_at(0)" + RIGHT, "SIGSEGV"),
    "deep recursion": ("import sys; sys.setrecursionlimit(10**9)\ndef double(x): return double(x)", "Mem|time|SIG"),
    "deletes its folder": ("import os, shutil; shutil.rmtree(os.getcwd())" + RIGHT, "Error"),
    "writes at home": ("open({home!r} + '/execute-was-here', 'w').write('x')" + RIGHT, "Error"),
    "writes beside its folder": ("import os; os.mkdir('../execute-was-here')" + RIGHT, "Error"),
    "background process": ("import subprocess; subprocess.Popen(['sleep', {sleep!r}])" + RIGHT, "left a process"),
    "daemon": (
        "import os\nif not os.fork():\n    os.setsid()\n    if os.fork(): os._exit(0)\n"
        "    os.closerange(0, 64)\n    os.execvp('sleep', ['sleep', {sleep!r}])\nos.wait()" + RIGHT,
        "left a process",
    ),
    "patched AssertionError": ("import builtins\nbuiltins.AssertionError = SystemExit" + WRONG, "AssertionError"),
    "patched builtins": (
        "import builtins\nfor name in ('exec', 'compile', 'print', 'isinstance', 'len', '__import__'):\n"
        "    setattr(builtins, name, lambda *a, **k: True)" + WRONG,
        ".",
    ),
    "patched json": ("import json\njson.dumps = lambda x, **k: '[\"value\", 8]'" + WRONG, "TypeError"),
    "trace": ("import sys\nsys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)" + WRONG, "AssertionError"),
    "answer that equals all": (
        FORGE.format(base="", method="lambda *a: True") + "def double(x): return Any()", "AssertionError",
    ),
    "number that equals all": (
        FORGE.format(base="(int)", method="lambda *a: True") + "def double(x): return Any()", "AssertionError",
    ),
    "text that equals all": (
        "class Any(str):\n    __eq__ = lambda *a: True\n    __hash__ = str.__hash__\ndef double(x): return Any()",
        "AssertionError",
    ),
    "list of what equals all": (FORGE.format(base="", method="lambda *a: True") + "def double(x): return Any", "Asse"),
    "reads input": ("def double(x): return input() or 2 * x", "EOFError"),
    "closes all descriptors": ("import os; os.closerange(0, 4096)" + RIGHT, "Ended"),
    "writes to all descriptors": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'{{\"passed\": true, \"secret\": \"\"}}\\n')\n"
        "    except OSError: pass" + RIGHT,
        ".",
    ),
    "not Python": ("def double(x) return 2 * x", "SyntaxError"),
    "not text": ("\x00\ud800", "Error"),
    "nothing": ("", "NameError"),
    "opens a connection": ("import socket; socket.create_connection(('127.0.0.1', {port}), 1)" + RIGHT, "Error"),
    "sends a datagram": (
        "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))" + RIGHT, "Error",
    ),
    "reads a file of root": ("open('/etc/shadow').read()" + RIGHT, "PermissionError|FileNotFoundError"),
    "memory of several processes": (
        "import os, time\nfor _ in range(3):\n    if not os.fork():\n        x = bytearray(2**28)\n"
        "        time.sleep(60)\ntime.sleep(60)", "out of memory",
    ),
    "shared memory": ("import ctypes\nassert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0" + RIGHT, "AssertionErr"),
    "memory without a process": ("import os\nos.memfd_create('x')" + RIGHT, "PermissionError"),
    "keyring": (
        "import ctypes\nadd = dict(x86_64=248, aarch64=217)[__import__('os').uname().machine]\n"
        "assert ctypes.CDLL(None).syscall(add, b'user', b'name', b'x', 1, -3) >= 0" + RIGHT, "AssertionError",
    ),
    "virtual socket": ("import socket\nsocket.socket(40, socket.SOCK_STREAM)" + RIGHT, "PermissionError"),
    "inotify": ("import ctypes\nassert ctypes.CDLL(None).inotify_init() >= 0" + RIGHT, "AssertionError"),
    "user namespace": ("import ctypes\nassert ctypes.CDLL(None).unshare(1 << 28) == 0" + RIGHT, "AssertionError"),
    "sleeps at the end": (
        "import os, sys, time\nif not os.fork():\n    time.sleep({sleep!r})\nmain = sys.modules['__main__']\n"
        "receive = main.receive\ndef slow(stream):\n    try: return receive(stream)\n"
        "    except BaseException: time.sleep(9)\nmain.receive = slow" + RIGHT, "left a process",
    ),
    "large file": ("f = open('x', 'wb')\nfor _ in range(64): f.write(bytes(2**20))" + RIGHT, "OSError"),
    "deep folders": (
        "import os\nfor _ in range(1500):\n    os.mkdir('d'); os.chdir('d')\nos.chmod('.', 0)" + WRONG, "Error",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


QUICK = ("os._exit", "sys.exit in an answer", "answer that equals all", "shared memory", "keyring", "virtual socket")
QUICK += ("kills all", "background process", "patched json", "reads a file of root", "opens a connection", "inotify")


def chosen(names):
    """The names, those that are not quick marked as slow."""
    found = []
    for name in names:
        found.append(pytest.param(name, marks=() if name in QUICK else pytest.mark.slow))
    return found


@pytest.mark.parametrize("name", chosen(ATTACKS))
def test_no_attack_passes_or_leaves_anything(name, port):
    program, reason = ATTACKS[name]
    if "{" in program:
        for key, value in dict(home=repr(str(Path.home())), sleep=repr(SLEEP)).items():
            program = program.replace("{" + key + "!r}", value)
        program = program.replace("{port}", str(port)).replace("{{", "{").replace("}}", "}")
    timeout = 20.0 if reason == "out of memory" else 1.0  # one machine took more than that second
    result = execute.run(program, CHECK, timeout=timeout, memory=2**29)
    assert not result["passed"]
    assert not left_behind()
    assert re.search(reason, result["reason"]), result


HARD = ["fork bomb", "daemon", "kills its parent", "deep folders"]


@pytest.mark.slow
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("without", [("namespaces",), ("landlock",), ("namespaces", "landlock")], ids="+".join)
def test_the_other_walls_hold_where_one_is_missing(name, without):
    if not IS_ROOT:
        pytest.skip("without these walls a user's program can signal the user's processes")
    program = ATTACKS[name][0].replace("{sleep!r}", repr(SLEEP))
    result = execute.run(program, CHECK, timeout=1.0, memory=2**29, without=without)
    assert not result["passed"]
    assert not set(without) & set(result["walls"])
    assert not left_behind()


def test_memory_holds_neither_tests_nor_secret():
    """The program may read its own memory here, and even so finds nothing of the judge's."""
    if not IS_ROOT:
        pytest.skip("only root leaves walls out so that memory can be read")
    program = """
import ctypes, re
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
def search():
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb") as mem:
        for line in maps:
            a, b = (int(n, 16) for n in line.split()[0].split("-"))
            if " rw" in line:
                mem.seek(a)
                if re.search(b"needle[-]of[-]the[-]tests", mem.read(b - a)):  # the pattern does not match itself
                    return "found"
    return "searched"
"""
    options = dict(without=("namespaces", "landlock", "user"))  # there is no /proc behind them
    assert passes(program, "assert search() == 'searched'  # needle-of-the-tests", **options)
    assert passes(program + "own = 'needle-of-the-tests'", "assert search() == 'found'", **options)  # it can search


def test_root_becomes_another_user():
    walls = execute.run(RIGHT, CHECK)["walls"]
    if not IS_ROOT:
        pytest.skip(f"not root; in force: {walls}")
    assert "user" in walls
    assert passes("import os\ndef ids(): return os.getresuid()", f"assert min(ids()) > {execute.PROGRAMS_UID}")


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_caller_leaves_no_program_and_no_folder(kill):
    call = (
        f"import execute, tempfile; tempfile.tempdir = {tempfile.gettempdir()!r}\n"
        f"execute.run('import subprocess; subprocess.run([\"sleep\", \"{SLEEP}\"])', 'assert 1')"
    )
    caller = subprocess.Popen([sys.executable, "-c", call], cwd=Path(execute.__file__).parent)
    assert execute.wait_until(strays, 20)
    caller.send_signal(kill)
    caller.wait()
    assert execute.wait_until(lambda: not left_behind(), 20)


def test_the_root_of_a_program_holds_only_what_it_needs():
    walls = execute.run(RIGHT, CHECK)["walls"]
    if "root" not in walls:
        pytest.skip(f"no private root; in force: {walls}")
    program = "import os\ndef f(): return sorted(os.listdir('/')), os.listdir('.')"
    tests = "top, own = f()\nassert own == [] and not {'proc', 'sys', 'var', 'run', 'boot'} & set(top), top"
    assert passes(program, tests, without=("landlock",))
    program = "def f():\n    with open('/proc/self/status') as f: return f.read()"
    tests = "try:\n    f()\n    ok = False\nexcept FileNotFoundError:\n    ok = True\nassert ok"
    assert passes(program, tests, without=("landlock",))


def test_a_program_has_no_capabilities():
    if not IS_ROOT:
        pytest.skip("not root: there are none to lose")
    program = """
import ctypes
def effective():
    header, found = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capget(header, found) == 0
    return found[0] | found[3]
"""
    assert passes(program, "assert effective() == 0, effective()")


CALL = "import ctypes, os, platform\nx86 = platform.machine() == 'x86_64'\nlibc = ctypes.CDLL(None, use_errno=True)\n"
CALL += "def call(*a):\n    if libc.syscall(*a) == -1: raise OSError(ctypes.get_errno(), 'refused')\n"
SET = "import socket\na, b = socket.socketpair()\na.setsockopt(socket.SOL_SOCKET, {}, {})"
FOR_NOBODY = {  # memory that is counted for no process, and what is the whole host's
    "shared anonymous memory": "import mmap; mmap.mmap(-1, 4096)",
    "shared and validated": "import mmap; mmap.mmap(-1, 4096, flags=3 | mmap.MAP_ANONYMOUS)",
    "huge pages": "import mmap; mmap.mmap(-1, 2**21, flags=0x40000 | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)",
    "socket buffer": SET.format("socket.SO_SNDBUF", 2**23),
    "forced socket buffer": SET.format(32, 2**23),
    "forced receive buffer": SET.format(33, 2**23),
    "socket filter": SET.format(26, "b'x' * 16"),
    "loaded socket filter": SET.format(50, 0),
    "filter of a port": SET.format(51, "b'x' * 16"),
    "netlink pair": "import socket; socket.socketpair(socket.AF_NETLINK, socket.SOCK_RAW)",
    "rules of landlock": CALL + "call(444, None, 0, 1)",
    "asynchronous I/O": CALL + "call(206 if x86 else 0, 1, ctypes.byref(ctypes.c_ulong()))",
    "pages given to a pipe": CALL + "call(278 if x86 else 75, os.pipe()[1], None, 0, 0)",
}


@pytest.mark.parametrize("name", FOR_NOBODY)
def test_memory_that_is_counted_for_nobody_is_refused(name):
    result = execute.run(FOR_NOBODY[name] + RIGHT, CHECK)
    if "seccomp" not in result["walls"]:
        pytest.skip(f"no seccomp; in force: {result['walls']}")
    assert result["reason"].startswith("PermissionError"), result


@pytest.mark.parametrize("without", [(), ("landlock",)])
def test_a_device_that_gives_shared_memory_is_out_of_reach(without):
    result = execute.run("open('/dev/zero', 'rb')" + RIGHT, CHECK, without=without)
    if not {"root", "landlock"} & set(result["walls"]):
        pytest.skip(f"no wall before files; in force: {result['walls']}")
    assert re.search("PermissionError|FileNotFoundError", result["reason"]), result


@pytest.mark.parametrize("kind", ["type=1", "type=2", "type=1, proto=262", "family=10", "family=10, proto=262"])
def test_ip_sockets_need_a_network_of_their_own(kind):
    """262 is MPTCP, which landlock's "no TCP" does not mean."""
    program = f"import socket\ntry: socket.socket({kind})\nexcept OSError as e: got = e.errno\nelse: got = 0\n"
    result = execute.run(program, "assert got == 1, got", without=("namespaces",))
    if "seccomp" not in result["walls"]:
        pytest.skip(f"no seccomp; in force: {result['walls']}")
    assert result["passed"], result
    apart = execute.run(program, "assert got != 1, got")  # there it is the kernel's own affair
    assert apart["passed"] or "namespaces" not in apart["walls"], apart


FILES = """
import os, time
for n in range({}):
    with open(str(n), 'wb') as f: os.posix_fallocate(f.fileno(), 0, 2**24)
"""
ENTRIES = "import os, time\nfor n in range({}): os.symlink('nowhere', str(n))\n"


@pytest.mark.parametrize("program, few, many", [(FILES, 3, 5), (ENTRIES, 3000, 4200)], ids=["bytes", "entries"])
def test_a_folder_on_the_disk_has_a_bound(program, few, many):
    assert passes(program.format(few) + RIGHT, without=("namespaces",))
    result = execute.run(program.format(many) + "time.sleep(1000)", CHECK, timeout=60, without=("namespaces",))
    assert result["reason"] == "out of disk space"
    assert not left_behind()


def test_the_size_of_a_folder(tmp_path):
    folder = tmp_path / "folder"
    assert execute.size_of(folder) == 0  # removed meanwhile
    (folder / "a").mkdir(parents=True)
    (folder / "all").symlink_to("/")  # not followed
    with open(folder / "a" / "b", "wb") as f:
        os.posix_fallocate(f.fileno(), 0, 2**20)
    entries = 3 * 2**14
    assert entries + 2**20 <= execute.size_of(folder) < entries + 2**20 + 2**15
    with open(folder / "a" / "b", "wb") as f:
        f.truncate(2**30)  # a hole takes nothing
    assert execute.size_of(folder) < entries + 2**15
    deep = os.open(folder / "a", os.O_RDONLY)
    for _ in range(450):
        os.mkdir("d" * 9, dir_fd=deep)
        deep, above = os.open("d" * 9, os.O_RDONLY, dir_fd=deep), deep
        os.close(above)
    os.close(deep)
    assert execute.size_of(folder) == math.inf  # the rest hides behind a path that is too long
    execute.remove(folder)


def test_a_folder_that_is_closed_to_us_is_over_its_bound(tmp_path, monkeypatch):
    def closed(path):
        raise PermissionError(13, "closed")

    monkeypatch.setattr(os, "scandir", closed)
    assert execute.size_of(tmp_path) == math.inf


BURN = """
import os, time
def burn(seconds):
    start = time.process_time()
    while time.process_time() - start < seconds: pass
    os._exit(0)
"""
CHILDREN = "for _ in range(2):\n    if not os.fork(): burn(0.6)\n    os.wait()\n"
ORPHANS = """
for _ in range(2):
    if not os.fork():
        if not os.fork(): burn(0.6)
        os._exit(0)
    os.wait()
"""


@pytest.mark.parametrize("processes", [CHILDREN, ORPHANS], ids=["children", "orphans"])
def test_the_cpu_time_of_all_processes_adds_up(processes):
    """Each process stays below the limit."""
    loop = "def f():\n    while True: time.sleep(1)\n"  # until all orphans have ended, or the time limit
    result = execute.run(BURN + processes + loop, "f()", timeout=1)
    assert result["reason"] in ("out of CPU time", "timed out")
    if processes == CHILDREN:  # its end is not before theirs
        assert not passes(BURN + processes + RIGHT, timeout=1)
        assert passes(BURN + processes + RIGHT, timeout=30)


def test_cpu_time_that_no_look_has_seen_counts_at_the_end(tmp_path, monkeypatch):
    text = Path(execute.__file__).read_text()
    for name, value in dict(LOOK=10000, CLOCK=1000).items():  # no look, and all the time of a busy machine
        text, found = re.subn(rf"^{name} = [0-9.]+ ", f"{name} = {value} ", text, flags=re.M)
        assert found == 1
    (tmp_path / "blind.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    blind = importlib.import_module("blind")
    assert blind.run(BURN + CHILDREN + RIGHT, CHECK, timeout=1)["reason"] == "out of CPU time"


def test_cpu_time_is_that_of_the_living_and_of_those_that_ended():
    second, seen = os.sysconf("SC_CLK_TCK"), {}

    def seconds(**alive):
        return execute.cpu_time({pid: (own * second, childs * second) for pid, (own, childs) in alive.items()}, seen)

    assert seconds() == 0
    assert seconds(a=(1, 0)) == 1
    assert seconds(a=(1, 0), b=(2, 0), c=(4, 0)) == 7
    assert seconds(a=(1, 3), c=(4, 0)) == 8  # b ended after 3 seconds, and a waited for it: not 2 + 3
    assert seconds(a=(1, 3)) == 7  # nobody waited for c: what was last seen, 2 + 4, is more than 3
    assert seconds(a=(1, 9)) == 10  # a waited for others, of whom no look has seen as much
    assert seconds() == 7  # all have ended: what was last seen of each


def test_descendants_tell_their_cpu_time():
    """Three that burn, one of them a grandchild; and one that has ended and was waited for."""
    program = (
        BURN
        + """
if not os.fork(): burn(0.2)
os.wait()
for _ in range(2):
    if not os.fork():
        os.fork()
        burn(1000)
print(flush=True)
os.wait()
"""
    )
    others = set(execute.descendants())  # of other tests: a judge that waits for its next question
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)

    def ours():
        return {pid: times for pid, times in execute.descendants().items() if pid not in others}

    try:
        child.stdout.readline()

        def burnt():
            found = ours()
            return found[child.pid][1] > 0 and sum(own > 2 for pid, (own, _) in found.items() if pid != child.pid) == 4

        assert execute.wait_until(burnt, 60)
    finally:
        for pid in ours():
            os.kill(pid, signal.SIGKILL)
        child.communicate()


# ------------------------------------------------------------------------------- the program ends

CATCHES = "f()\nimport time\ntime.sleep(0.2)\ntry: f()\nexcept Exception: pass\n"


@pytest.mark.parametrize("end", ["os._exit(0)", "os.close(stream.fileno())", "os.kill(os.getpid(), 9)"])
def test_no_test_can_catch_that_the_program_has_ended(end):
    """It ends between two questions, in place of reading the second one."""
    program = f"import os, sys\ndef end(stream): {end}\ndef f(): sys.modules['__main__'].receive = end"
    result = execute.run(program, CATCHES)
    assert not result["passed"] and re.search("ProgramEnded|SIGKILL", result["reason"]), result


@pytest.mark.parametrize(
    "answer", ["[1", "1", "{}", "[]", '["value"]', '["value", ["module", "os"]]', '["error", 1, 2]']
)
def test_no_test_can_catch_an_answer_that_makes_no_sense(answer):
    line = answer.encode() + b"\n"
    program = f"import sys\ndef send(stream, x): stream.write({line!r}); stream.flush()\n"
    program += "def f(): sys.modules['__main__'].send = send"  # from the next answer on
    result = execute.run(program, "f()\ntry: f()\nexcept Exception: pass")
    assert result["reason"].startswith("ProgramEnded"), result


def test_an_end_of_the_program_is_one_whether_it_is_read_or_written():
    for words, use in [(b"", lambda s: execute.send(s, 1)), (b"", execute.receive), (b"unread", execute.receive)]:
        ours, theirs = socket.socketpair()
        ours.send(words)
        theirs.close()
        with ours, pytest.raises(execute.ProgramEnded, match="before its checks did"):
            use(ours.makefile("rwb", buffering=0))


# ---------------------------------------------------------------------- the interpreter's folders


def test_a_path_entry_opens_no_project_to_a_program(tmp_path, monkeypatch):
    """An editable installation puts the project into a .pth file, and Python that on its path."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "secret.txt").write_text("answers")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "project.pth").write_text(f"{project}\n")
    monkeypatch.setattr(sys, "executable", str(venv / "bin" / "python"))
    program = f"import sys\nproject = {str(project)!r}\nfound = project in sys.path\n"
    program += "def read(): return open(project + '/secret.txt').read()"
    result = execute.run(program, "assert found\nread()")
    if not {"root", "landlock"} & set(result["walls"]):
        pytest.skip(f"no wall before files; in force: {result['walls']}")
    assert re.search("PermissionError|FileNotFoundError", result["reason"]), result


# --------------------------------------------------------------------------------- honest programs

HONEST = {  # name: (program, tests)
    "numbers": ("def f(): return 0.1, 2**70, 1j, True, None, float('inf')",
                "assert f() == (0.1, 2**70, 1j, True, None, float('inf'))"),
    "nan": ("def f(): return float('nan')", "x = f()\nassert x != x"),
    "containers": ("def f(): return {1: [2, (3, {4}, frozenset({5}))], 'b': b'x', (1, 2): range(3)}",
                   "assert f() == {1: [2, (3, {4}, frozenset({5}))], 'b': b'x', (1, 2): range(3)}"),
    "tuple is not list": ("def f(): return (1, 2)", "assert f() != [1, 2] and type(f()) is tuple"),
    "bool is bool": ("def f(x): return x > 1", "assert f(2) is True and f(0) is False"),
    "text": ("def f(): return 'é\\ud800\\n\\0'", "assert f() == 'é\\ud800\\n\\0'"),
    "subclasses": ("import collections, enum\nclass E(enum.IntEnum): A = 1\nT = collections.namedtuple('T', 'a b')\n"
                   "def f(): return collections.Counter('aab'), T(1, 2), E.A, collections.OrderedDict(a=1)",
                   "assert f() == ({'a': 2, 'b': 1}, (1, 2), 1, {'a': 1})"),
    "deque is not list": ("from collections import deque\ndef f(): return deque([1])",
                          "assert f() != [1] and list(f()) == [1]"),
    "generator": ("def f():\n    yield from range(3)", "assert list(f()) == [0, 1, 2] and f() != [0, 1, 2]"),
    "views": ("def f(): return {1: 2}.keys(), {1: 2}.values(), map(str, [1])",
              "k, v, m = f()\nassert k == {1} and list(v) == [2] and list(m) == ['1']"),
    "exception": ("def f(x): raise ValueError('no')",
                  "try:\n    f(1)\n    raise AssertionError\nexcept ValueError as e:\n    assert 'no' in str(e)"),
    "own exception": ("class E(Exception): pass\ndef f(x): raise E",
                      "try:\n    f(1)\n    raise SystemExit\nexcept Exception: pass"),
    "class": ("class Node:\n    def __init__(self, x): self.x, self.left = x, None\n"
              "    def __eq__(self, other): return self.x == other.x\n"
              "def depth(n): return 0 if n is None else 1 + depth(n.left)\ndef same(n): return n",
              "a = Node(1)\na.left = Node(2)\nassert depth(a) == 2 and a.left.x == 2 and depth(None) == 0\n"
              "assert same(a) == a and same(a) != Node(7) and depth(same(a)) == 2 and a != 1"),
    "state": ("n = 0\ndef f():\n    global n\n    n += 1\n    return n", "assert (f(), f(), f()) == (1, 2, 3)"),
    "helper": ("def helper(x): return x + 1\ndef f(x): return helper(x)", "assert f(1) == helper(1) == 2"),
    "module of the program": ("import math\ndef f(): return math.pi", "assert math.isclose(f(), 3.14, rel_tol=0.01)"),
    "function of a module": ("from math import isclose\ndef f(): return 1.0", "assert isclose(f(), 1.0)"),
    "type": ("def f(x): return type(x)", "assert f('a') is str and f(1) == int"),
    "class without a module": ("X = type('X', (), {})\ndef f(): return X()", "assert f() is not None"),
    "keywords": ("def f(a, *b, c=0, **d): return a, b, c, d", "assert f(1, 2, c=3, e=4) == (1, (2,), 3, {'e': 4})"),
    "prints": ("print('x' * 10**6)\ndef f(): print('y'); return 1", "print(f())\nassert f() == 1"),
    "own folder": ("def f():\n    open('a', 'w').write('b')\n    return open('a').read()", "assert f() == 'b'"),
    "subprocess": ("import subprocess\ndef f(): return subprocess.check_output(['echo', 'a'], text=True)",
                   "assert f() == 'a\\n'"),
    "threads": ("import threading\ndef f():\n    out = []\n    t = threading.Thread(target=out.append, args=(1,))\n"
                "    t.start(); t.join()\n    return out", "assert f() == [1]"),
    "main": ("if __name__ == '__main__':\n    raise SystemExit\ndef f(): return 1", "assert f() == 1"),
    "dataclass": ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 1\ndef f(): return P().x",
                  "assert f() == 1"),
    "no environment": ("import os\ndef f(): return 'HOME' in os.environ or 'TABOM_DATA' in os.environ",
                       "assert f() is False"),
    "chain map": ("from collections import ChainMap\ndef f(a, b): return ChainMap(a, b)",
                  "assert f({1: 2}, {1: 3, 4: 5}) == {1: 2, 4: 5} and {1: 2} == f({1: 2}, {})"),
    "user containers": ("import collections as c, types\n"
                        "def f(): return c.UserDict(a=1), c.UserList([2]), c.UserString('b')\n"
                        "def g(): return types.MappingProxyType({3: 4})",
                        "assert f() == ({'a': 1}, [2], 'b') and g() == {3: 4}"),
    "self by keyword": ("def f(self, name): return self + name", "assert f(self=1, name=2) == 3 == f(1, name=2)"),
    "end of input": ("try: n = input()\nexcept EOFError: n = 1\ndef f(): return n", "assert f() == 1"),
    "empty input": ("import os, sys\ndef f(): return sys.stdin.read(), sys.stdin.readline(), os.read(0, 1)",
                    "assert f() == ('', '', b'')"),
    "maps memory": ("import mmap\nm = mmap.mmap(-1, 9, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\nm[0] = 7\n"
                    "with open('a', 'w+b') as f:\n    f.write(b'abc'); f.flush(); n = mmap.mmap(f.fileno(), 3)",
                    "assert m[0] == 7 and n[:3] == b'abc'"),
    "socket pair": ("import socket as s\na, b = s.socketpair()\na.setsockopt(s.SOL_SOCKET, s.SO_REUSEADDR, 1)\n"
                    "def f(): return a.send(b'x'), b.recv(9)", "assert f() == (1, b'x')"),
    "decimals": ("from decimal import Decimal\nfrom fractions import Fraction\n"
                 "def f(x): return Decimal('0.50'), Fraction(1, 2), x", "assert f(3) == (0.5, 0.5, 3)"),
}  # fmt: skip


def test_numbers_of_numpy_are_plain():
    numpy = pytest.importorskip("numpy")
    for x, wanted in [
        (numpy.longdouble("2.5"), 2.5), (numpy.clongdouble(1 + 2j), 1 + 2j), (numpy.float32(0.5), 0.5),
        (numpy.int8(3), 3), (numpy.bool_(True), True), (numpy.complex64(1j), 1j), (numpy.str_("a"), "a"),
        (numpy.bytes_(b"a"), b"a"),
    ]:  # fmt: skip
        got = execute.decode(json.loads(json.dumps(execute.encode(x, None))), None)
        assert type(got) is type(wanted) and got == wanted
    assert passes("import numpy\ndef f(): return numpy.longdouble(2.5)", "assert f() == 2.5 and abs(f() - 2) == 0.5")


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(name):
    result = execute.run(*HONEST[name])
    assert result["passed"], result


def test_a_builtin_of_the_tests_is_the_programs_only_where_it_is_named():
    program, tests = "def sum(a, b): return a + b\ndef abs(x): return 0", "assert sum(1, 2) == 3"
    assert passes(program, tests, ["sum"])
    assert not passes(program, tests)
    assert passes(program, "assert abs(-1) == 1")


def test_functions_that_tests_use_cannot_be_forged_through_a_module():
    program = "import math\nmath.isclose = lambda *a, **k: True\ndef f(): return 5.0"
    assert not passes(program, "assert math.isclose(f(), 1.0)")
    assert not passes(program, "import math\nassert math.isclose(f(), 1.0)")


def test_a_module_of_the_standard_library_is_the_judges():
    tests = "assert size('ab') == sys.getsizeof('ab')"
    assert passes("import sys\ndef size(x): return sys.getsizeof(x)", tests)
    assert not passes("class sys:\n    getsizeof = lambda x: 0\ndef size(x): return 0", tests)
    assert not passes("def size(x): return 51", tests)  # the checks need the program's import, as in one process
    assert passes("class queue:\n    n = 1", "assert queue.n == 1", ["queue"])  # unless the program is to define it


def test_a_reason_can_be_written_to_a_file():
    result = execute.run("def f(): raise ValueError('\\ud800')", "f()")
    assert result["reason"].encode() == b"ValueError: \\ud800"


def test_tests_that_make_no_sense_cost_one_verdict():
    jobs = [("x = 1", "assert x =="), ("x = 1", ""), ("x = 1", "\0"), ("x = 1", "assert x == 1")]
    results = execute.run_many(jobs, workers=2)
    assert [result["passed"] for result in results] == [False, False, False, True]
    assert "not Python" in results[0]["reason"] and "no tests" in results[1]["reason"]


def test_tests_that_cannot_fail_are_refused():
    for tests in ("", "  \n", "# nothing\n"):
        with pytest.raises(ValueError, match="no tests"):
            execute.run(RIGHT, tests)
    with pytest.raises(ValueError, match="not Python"):
        execute.run(RIGHT, "assert (")


def test_a_misspelt_wall_and_a_judge_that_cannot_start_are_errors(monkeypatch):
    with pytest.raises(ValueError, match="landlok"):
        execute.run(RIGHT, CHECK, without=("landlok",))
    with pytest.raises(RuntimeError, match="did not start"):
        monkeypatch.setattr(sys, "executable", "/bin/false")
        execute.run(RIGHT, CHECK)


def test_the_verdict_needs_the_secret_and_a_clean_end():
    good = b'{"walls": []}\n{"secret": "abc"}\n'
    assert execute.verdict(good, 0, "abc")["passed"]
    for out, status, secret in [
        (good, 0, "xyz"), (good, 3, "abc"), (good, -9, "abc"), (b'{"walls": []}\n{"passed": true}\n', 0, "abc"),
        (b'{"walls": []}\n{"secret": null}\n', 0, "abc"),
    ]:  # fmt: skip
        assert not execute.verdict(out, status, secret)["passed"]


def test_many_keep_their_order():
    jobs = [(f"def f(): return {i}", f"assert f() == {i - i % 3}") for i in range(12)]
    assert [r["passed"] for r in execute.run_many(jobs, workers=4)] == [i % 3 == 0 for i in range(12)]
    assert not left_behind()


def test_processes_share_the_cores_that_they_may_use(monkeypatch):
    for may, processes, share in ((8, None, 8), (8, "2", 4), (1, "4", 1)):
        monkeypatch.setattr(execute.os, "sched_getaffinity", lambda _, may=may: set(range(may)))
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if processes:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert execute.cores() == share


# ---------------------------------------------------------------------------------------- the wire

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.complex_numbers(allow_nan=False) | st.fractions() | st.decimals(allow_nan=False)
    | st.builds(range, st.integers(-9, 9)),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner)
    | st.sets(st.integers()) | st.frozensets(st.text()),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(plain)
def test_plain_values_survive_the_wire_with_their_types(x):
    def same(a, b):
        if isinstance(a, (list, tuple)):
            return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, dict):
            return type(b) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
        return type(a) is type(b) and a == b

    assert same(x, execute.decode(json.loads(json.dumps(execute.encode(x, None))), None))


def test_what_the_program_may_send_is_limited():
    for text in (
        '{"a": 1}',
        '["module", "os"]',
        '["type", "print"]',
        '["eval", "1"]',
        '["Fraction", "x"]',
        "[[]]",
        "[]",
    ):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            execute.decode(json.loads(text), None)
    assert execute.decode(["module", "math"], None) is math
    assert execute.encode([Decimal("0.10"), Fraction(1, 3)], None) == ["list", ["Decimal", "0.10"], ["Fraction", 1, 3]]
