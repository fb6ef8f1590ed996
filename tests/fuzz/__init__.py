"""A fuzzer of all that is read from others: recipes, data, media, checkpoints, weights, tokenizers, templates.

    python -m tests.fuzz --inputs 5000              all kinds; a table at the end, code 1 where there was a fault
    python -m tests.fuzz --kind image --seed 0 --index 17      one of them again, with all it said

Each input is made from (seed, kind, index) alone, in a process and a directory of its own (`runner`), behind walls
that see code run, files written outside and the network asked for (`walls`). Whatever comes of it is a verdict
(`verdicts`): accepted, refused in a line, or a fault.
"""
