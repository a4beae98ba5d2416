"""Benchmark harness. command.py runs the parts in this order:

declare (inputs), contenders, verify, clock (timing), record (JSON), show (tables), compare.
"""
