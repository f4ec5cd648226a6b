"""The files of a run directory: what each holds, how it is written so that a crash cannot hurt it, how it is read back.

`docs/record-format.md` is the specification. `gradwatch.writer` and `gradwatch.reader` are the way in.
"""
