"""A folder for sys.path of the processes that hold an engine.

It contains what those processes need from here and nothing else. Such a process is started by the path of `run_worker.py`,
so this folder, and not the overlay's, is what Python looks in: a stock engine cannot see the overlay by accident.
"""
