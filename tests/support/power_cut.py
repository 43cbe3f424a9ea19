"""Simulates a power cut: strace records a process's calls, and this computes what is durable.

The model is the least that POSIX promises. The bytes of a file are durable once it was fsynced
after the last write; a name in a folder is durable once the folder was fsynced after the name was
created. Everything else is lost: a file without its bytes is empty, or zeros.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CALLS = (
    "open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2,link,linkat,unlink,unlinkat,rmdir,"
    "write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,fallocate,copy_file_range,sendfile,"
    "fsync,fdatasync,access,faccessat,faccessat2"
)
MARK = "/power-cut/"
"""`os.access` of a name with this prefix is a mark in the recording."""
_LINE = re.compile(r"^(?P<pid>\d+) +(?P<text>.*)$")
_RESUMED = re.compile(r"^<\.\.\. \w+ resumed>(?P<rest>.*)$")
_CALL = re.compile(r"^(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
_QUOTED = re.compile(r'"([^"]*)"')
_DESCRIPTOR = re.compile(r"^\d+<([^>]*)>")
_WRITES = {
    "write", "pwrite64", "writev", "pwritev", "pwritev2", "ftruncate", "fallocate",
    "copy_file_range", "sendfile",
}  # fmt: skip


class Call(NamedTuple):
    """One system call that succeeded."""

    name: str
    paths: tuple[str, ...]
    """The paths quoted in its arguments; else that of its descriptor."""
    creates: bool = False


def command(recording: Path) -> list[str]:
    """The command to put before another one so that its calls are recorded."""
    return ["strace", "-f", "-y", "--seccomp-bpf", "-qq", "-s", "4096", "-e", f"trace={CALLS}",
            "-e", "signal=none", "-o", str(recording)]  # fmt: skip


def calls(recording: Path) -> Iterator[Call]:
    """Calls in the order in which they ended."""
    begun: dict[str, str] = {}
    for line in recording.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        pid, text = match["pid"], match["text"]
        if text.endswith("<unfinished ...>"):
            begun[pid] = text.removesuffix("<unfinished ...>").rstrip()
            continue
        resumed = _RESUMED.match(text)
        if resumed is not None:
            text = begun.pop(pid) + resumed["rest"]
        call = _CALL.match(text)
        if call is not None:
            yield from _parsed(call["name"], call["arguments"], int(call["result"]))


def _parsed(name: str, arguments: str, result: int) -> Iterator[Call]:
    quoted = tuple(_QUOTED.findall(arguments))
    if name.startswith(("access", "faccess")):
        yield Call("mark", quoted)
    elif result < 0:
        return
    elif name in _WRITES or name in ("fsync", "fdatasync"):
        held = _DESCRIPTOR.match(arguments)
        if held is not None:
            yield Call("write" if name in _WRITES else "fsync", (held[1],))
    else:
        yield Call(name, quoted, "O_CREAT" in arguments)


class Disk:
    """Files and folders below a folder that was durable at first, and what of them is durable."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._now: dict[str, int] = {self._root: 0}
        """Every path, with the file it names."""
        self._written: set[int] = set()
        """Files whose bytes are not durable."""
        self._durable: dict[int, dict[str, int]] = {0: {}}
        """The durable names of each folder."""
        self._next = 1

    @classmethod
    def standing(cls, root: Path) -> Disk:
        """Add all files and folders that are there now, all durable."""
        disk = cls(root)
        for folder, folders, files in os.walk(root):
            names = [*folders, *(name for name in files if (Path(folder) / name).is_file())]
            for name in names:
                file = disk._name(f"{folder}/{name}")
                disk._durable[disk._now[folder]][name] = file
                if name in folders:
                    disk._durable[file] = {}
        return disk

    def do(self, call: Call) -> None:
        """Apply one call."""
        paths = [path for path in call.paths if path.startswith(f"{self._root}/")]
        if call.name == "fsync":
            for path in call.paths:
                self._fsync(path)
        elif not paths:
            return
        elif call.name == "write":
            self._written.add(self._now.get(paths[0], -1))
        elif call.name.startswith("mkdir"):
            self._durable[self._name(paths[0])] = {}
        elif call.creates and paths[0] not in self._now:
            self._written.add(self._name(paths[0]))
        elif call.name.startswith(("rename", "link")) and len(paths) == 2:
            self._move(*paths, keep=call.name.startswith("link"))
        elif call.name.startswith(("unlink", "rmdir")):
            self._now.pop(paths[0], None)

    def _name(self, path: str) -> int:
        self._now[path] = self._next
        self._next += 1
        return self._now[path]

    def _move(self, source: str, target: str, *, keep: bool) -> None:
        below = [path for path in self._now if path == source or path.startswith(f"{source}/")]
        for path in below:
            file = self._now[path] if keep else self._now.pop(path)
            self._now[target + path.removeprefix(source)] = file

    def _fsync(self, path: str) -> None:
        file = self._now.get(path)
        if file is None:
            return
        self._written.discard(file)
        if file in self._durable:
            self._durable[file] = {
                other.rpartition("/")[2]: named
                for other, named in self._now.items()
                if other.rpartition("/")[0] == path
            }

    def restore(self, snapshot: Path, target: Path, *, zeros: bool) -> None:
        """Create in `target` what is durable of the root. `snapshot` is a copy of the root as it
        is.

        A durable name of a file that was removed since is left out, because its bytes are nowhere.
        The recording may lack the very last removal: a process that is killed within a call leaves
        no result.
        """
        there = {
            file: snapshot / Path(path).relative_to(self._root) for path, file in self._now.items()
        }
        where = {file: path for file, path in there.items() if path.exists()}
        self._restore(0, target, where, zeros)

    def _restore(self, folder: int, target: Path, where: dict[int, Path], zeros: bool) -> None:
        target.mkdir(exist_ok=True)
        for name, file in self._durable[folder].items():
            if file in self._durable:
                self._restore(file, target / name, where, zeros)
            elif file in where:
                data = where[file].read_bytes()
                if file in self._written:
                    data = bytes(len(data)) if zeros else b""
                (target / name).write_bytes(data)
