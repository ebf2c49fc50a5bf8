"""The former name of python -m benchmarks.lm.figures."""

from benchmarks.lm.figures import main

if __name__ == "__main__":
    main()
