import sys

from benchmarks.lm.cli import main

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
