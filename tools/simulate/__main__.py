"""`make simulate`."""

from tools.simulate.simulate import main

if __name__ == "__main__":
    raise SystemExit(main())
