"""Prints the includes of csrc/ that must not be; exit code 1 where there are any."""

from tools.includes import ROOT, violations

if __name__ == "__main__":
    found = list(violations(ROOT / "csrc"))
    print(*found, sep="\n", end="\n" if found else "")
    raise SystemExit(bool(found))
