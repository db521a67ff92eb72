"""Plans for programs without Python: the file, the library that runs it, and its header `dsr.h`.

`writer.py` makes the bytes of a plan file, and the C++ files beside it read them (`plan_file.h`), check them
(`check.h`) and run them (`include/dsr.h`). `docs/deploy.md` is for users, `docs/format.md` has the format.
"""
