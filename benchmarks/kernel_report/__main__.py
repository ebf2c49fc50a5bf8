import sys

from benchmarks.kernel_report.cli import main

sys.exit(main())
