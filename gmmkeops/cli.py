"""The command line: ``gmmkeops doctor`` says what works on this machine and what to type next."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version

from gmmkeops import doctor

__all__ = ["main"]

_SIGNS = {True: "ok", False: "!!", None: "--"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, or 1 where something that this machine could use does not work.

    Args:
        arguments: As on the command line, without the program's name.
    """
    parser = argparse.ArgumentParser(prog="gmmkeops", description="Gaussian mixtures for big point clouds.")
    parser.add_argument("--version", action="version", version=f"gmmkeops {version('gmmkeops')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    check = commands.add_parser(
        "doctor",
        help="what works on this machine, and what to type where something does not",
        description="Runs both engines on every device of this machine against float64 values.",
        epilog="examples:  gmmkeops doctor    gmmkeops doctor --json > report.json",
    )
    check.add_argument("--json", action="store_true", help="findings as JSON")
    options = parser.parse_args(arguments)
    return _doctor(options.json)


def _doctor(as_json: bool) -> int:
    findings = doctor.examine()
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    else:
        for finding in findings:
            sys.stdout.write(f"{_SIGNS[finding.ok]}  {finding.what:<18}{finding.says}\n")
            if finding.remedy:
                sys.stdout.write(f"    type: {finding.remedy}\n")
    return int(any(finding.ok is False for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
