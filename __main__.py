"""`python -m imagine_flash`, and what the command `imagine-flash` starts: as little as possible before an interrupt is caught."""

import gc
import io
import sys


def main() -> None:
    # Python has 700: searching what imports make cost 8 % of a first picture, and 15 % of importing torch and diffusers
    gc.set_threshold(50_000)
    for stream in (sys.stdout, sys.stderr):  # None where it is closed
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of an encoding that lacks what is said, as redirected on Windows
    try:
        from imagine_flash.cli import main as run

        run()
    except KeyboardInterrupt:  # during the imports too
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
