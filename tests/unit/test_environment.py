"""What a rank that no launcher of ours started can still ask glibc's allocator for."""

import json
import os
import subprocess
import sys

import pytest

# What malloc does after `apply`: whether a large block is mapped by itself, whether freed memory
# stays, and whether threads share one arena.
SCRIPT = """
import ctypes, json, threading
from horovod_lm.config import make_config
from horovod_lm.environment import apply

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.fopen.restype = ctypes.c_void_p
libc.fclose.argtypes = [ctypes.c_void_p]
class Counts(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc.mallinfo2.restype = Counts

apply(make_config({"launch": {"threads": 1}}, "here"))
before = libc.mallinfo2()
large = libc.malloc(2**28)
mapped = libc.mallinfo2().hblks > before.hblks
libc.free(large)
for block in reversed([libc.malloc(100_000) for _ in range(2000)]):
    libc.free(block)
kept = libc.mallinfo2().arena - before.arena > 100_000_000

meeting = threading.Barrier(4)
def work():
    libc.malloc(5000)
    meeting.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
file = libc.fopen(b"malloc.xml", b"w")
libc.malloc_info(0, file)
libc.fclose(file)
print(json.dumps([mapped, kept, open("malloc.xml").read().count("<heap nr=") == 1]))
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [False, True, True]),
        ({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=3"}, [False, True, True]),
        ({"MALLOC_ARENA_MAX": "4"}, [False, True, False]),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, [False, True, False]),
        ({"MALLOC_MMAP_THRESHOLD_": "1000000"}, [True, True, True]),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, [False, False, True]),
    ],
    ids=str,
)
def test_each_setting_of_the_allocator_is_ours_unless_it_is_the_users(tmp_path, given, expected):
    ours = ("GLIBC_TUNABLES", "MALLOC_")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(ours)} | given
    environ["PYTHONPATH"] = os.getcwd()
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=environ,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == expected
