"""Runs a script with the networks of this package registered, as timm's own scripts need it.

    python -m timm_nonlocal SCRIPT [ARGUMENT…]

The script sees its own name and arguments, and its exit code and traceback are what it would have alone.
"""

import runpy
import sys
import traceback
from pathlib import Path

import timm_nonlocal  # noqa: F401 (it registers)


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ('-h', '--help'):
        print(__doc__, end='', file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    script = Path(arguments[0])
    if not script.is_file():
        print(f'error: {script}: no such script; write python -m timm_nonlocal SCRIPT [ARGUMENT…]', file=sys.stderr)
        return 2
    sys.argv, sys.path[0] = arguments, str(script.resolve().parent)
    try:
        runpy.run_path(str(script), run_name='__main__')
    except Exception as error:
        own = error.__traceback__
        while own and own.tb_frame.f_code.co_filename != str(script):  # frames of ours and of runpy
            own = own.tb_next
        traceback.print_exception(type(error), error, own or error.__traceback__)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
