#!/usr/bin/env python3
"""Check which room may include which, from the include lines alone (docs/architecture.md), and that every
header compiles by itself.

    python3 tests/check_includes.py [--cc CC] [--cflags "..."]

Prints a line for each fault and exits 1 when there is any.
"""
import argparse
import collections
import pathlib
import re
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = {
    # room: what of the project its files may include
    "base": ("base/",),
    "kernels": ("kernels/",),
    "engine": ("engine/", "kernels/", "base/"),
    "api": ("api/", "base/"),
    "daemon": ("daemon/", "api/", "base/", "engine/protocol.h"),
}
# An exception for single files: main() dispatches to the worker.
ALSO = {"daemon/main.c": ("engine/worker.h",)}
# System header: the files that may include it.
SYSTEM = [
    (r"microhttpd\.h", r"daemon/[^/]+\.c"),
    (r"sqlite3\.h", r"daemon/(store|migrat)[^/]*\.[ch]"),
    (r"(cuda|cublas|cusparse|curand|nvrtc|nvml|cooperative_groups|cub/|mma\.h).*", r"kernels/cuda/.*"),
    (r"jansson\.h", r"(?!kernels/).*"),
]
SINGLE = "microhttpd.h"  # in one file only
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
SOURCES = {".c", ".h", ".cu", ".cuh", ".inc"}


def sources():
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in SOURCES:
                yield path.relative_to(ROOT)


def resolve(path, name):
    """A quoted include as a path from the root, or None when no such file is in the tree (a generated one)."""
    for candidate in ((ROOT / path).parent / name, ROOT / name):
        if candidate.is_file():
            return candidate.resolve().relative_to(ROOT).as_posix()
    return None


def check_quoted(path, name, faults):
    allowed = ROOMS[path.parts[0]] + ALSO.get(path.as_posix(), ())
    target = resolve(path, name)
    if target is None:
        target = name if "/" in name else f"{path.parts[0]}/{name}"
    if not target.startswith(allowed):
        faults.append(f"{path}: {path.parts[0]}/ may not include {target}")


def check_rules(faults):
    users = collections.defaultdict(set)
    for path in sources():
        for bracket, name in INCLUDE.findall((ROOT / path).read_text(encoding="utf-8")):
            if bracket == '"':
                check_quoted(path, name, faults)
                continue
            users[name].add(path.as_posix())
            for header, files in SYSTEM:
                if re.fullmatch(header, name) and not re.fullmatch(files, path.as_posix()):
                    faults.append(f"{path}: <{name}> does not belong here")
            if resolve(path, name):
                faults.append(f'{path}: "{name}" of the project is included as a system header')
    if len(users[SINGLE]) > 1:
        faults.append(f"<{SINGLE}> is included by {len(users[SINGLE])} files: {', '.join(sorted(users[SINGLE]))}")


def check_flags(faults):
    """The binary must run on other processors than the one it is built on."""
    names = {"meson.build", "meson_options.txt", "meson.options", "Makefile", "CMakeLists.txt"}
    for path in sorted(ROOT.rglob("*")):
        relative = path.relative_to(ROOT)
        skip = any(part.startswith(("build", ".git", "venv", ".venv")) for part in relative.parts[:-1])
        if skip or not path.is_file() or not (path.name in names or path.suffix == ".sh"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if re.search(r"-m(arch|cpu|tune)=native", line.split("#")[0]):
                faults.append(f"{relative}:{number}: native instruction set")


def check_headers(compiler, flags, faults):
    for path in sources():
        if path.suffix != ".h" or path.parts[:2] == ("kernels", "cuda"):
            continue
        command = [*compiler, "-std=gnu17", "-D_GNU_SOURCE", "-fsyntax-only", f"-I{ROOT}", *flags, "-x", "c", "-"]
        # Twice, so that a missing include guard shows as well.
        done = subprocess.run(command, input=f'#include "{path}"\n' * 2, text=True, capture_output=True, check=False)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            faults.append(f"{path}: does not compile alone: {reason}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cc", default="cc")
    parser.add_argument("--cflags", default="")
    arguments = parser.parse_args()
    faults = []
    check_rules(faults)
    check_flags(faults)
    check_headers(shlex.split(arguments.cc), shlex.split(arguments.cflags), faults)
    print("\n".join(faults) if faults else "every include is where it belongs")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
