"""The former name of python -m benchmarks.positions.limits."""

from benchmarks.positions.limits import main

if __name__ == "__main__":
    main()
