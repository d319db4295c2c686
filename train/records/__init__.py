"""What is kept.

    runs       a run: everything that decides its result, and its line of results.jsonl
    state      what a run continues from, in one checked file with the one before it
    run_dir    the files of a run's folder, and the lock on it
"""
