"""The former name of python -m benchmarks.lm.why."""

from benchmarks.lm.why import main

if __name__ == "__main__":
    main()
