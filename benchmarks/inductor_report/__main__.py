import sys

from benchmarks.inductor_report.cli import main

if __name__ == "__main__":
    sys.exit(main())
