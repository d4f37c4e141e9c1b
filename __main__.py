"""`python -m imagine_flash`, and what the command `imagine-flash` starts: as little as possible before an interrupt is caught."""

import gc
import sys


def main() -> None:
    # Python has 700: searching what imports make cost 8 % of a first picture, and 15 % of importing torch and diffusers
    gc.set_threshold(50_000)
    try:
        from imagine_flash.cli import main as run

        run()
    except KeyboardInterrupt:  # during the imports too
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
