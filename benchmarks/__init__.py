"""Runs that measure sm_flex, each by ``python -m benchmarks.<name>`` from the root of the repository.

Each writes its own result file, so that every number that is quoted can be traced to a machine, a commit and
a command.
"""
