#!/usr/bin/env python3
"""Run `systemd-analyze verify` on a unit whose program is not installed yet.

    verify.py SYSTEMD-ANALYZE UNIT PROGRAM

The unit is checked as a copy that starts PROGRAM. Any word about the unit is a failure.
"""
import pathlib
import re
import subprocess
import sys
import tempfile


def main():
    analyze, unit, program = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    text, count = re.subn(r"(?m)^(ExecStart=)\S+", rf"\g<1>{program.resolve()}", unit.read_text(encoding="utf-8"))
    if count != 1 or not program.exists():
        print(f"{unit}: {count} ExecStart lines; {program} {'exists' if program.exists() else 'is missing'}")
        return 1
    # The manual is not in its place yet either.
    text = re.sub(r"(?m)^Documentation=.*\n", "", text)
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / unit.name
        copy.write_text(text, encoding="utf-8")
        done = subprocess.run([analyze, "verify", "--man=no", copy], text=True, capture_output=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if unit.name in line]
    print("\n".join(said) if said else "nothing to say about the unit")
    return 1 if said or done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
